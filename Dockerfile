# The quickstart in a container:  docker build -t lit-sparse . && docker run --rm lit-sparse
FROM python:3.11-slim

# The builds of torch without CUDA's libraries; constraints.txt has the version. For a mirror: --build-arg PIP_EXTRA_INDEX_URL=…
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

RUN useradd --create-home --uid 1000 user && install --directory --owner=user --group=user /home/user/lit_sparse
USER 1000
WORKDIR /home/user/lit_sparse
COPY --chown=user:user . .

# The two commands of README.md.
RUN python3 -m venv .venv && . .venv/bin/activate && \
    pip install --no-cache-dir -c constraints.txt -e ".[quickstart]"

ENV PATH=/home/user/lit_sparse/.venv/bin:$PATH
CMD ["lightning", "fit", "--config", "configs/quickstart.yaml"]
