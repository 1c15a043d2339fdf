"""Sparse adapters for Hugging Face models, trained with PyTorch Lightning.

The public names stand in ``__init__.pyi``. They are loaded on first use, so that ``import lit_sparse`` costs
milliseconds.
"""

import importlib
import re
from pathlib import Path
from typing import Any

from lit_sparse._version import __version__ as __version__

_STUB = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_HOME = {name: home for home, name in re.findall(r"^from lit_sparse\.(?!_)(\S+) import (\w+) as", _STUB, re.MULTILINE)}


def __getattr__(name: str) -> Any:
    if name == "functional":
        return importlib.import_module("lit_sparse.functional")
    if name not in _HOME:
        raise AttributeError(f"module 'lit_sparse' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lit_sparse.{_HOME[name]}"), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({"__version__", *_HOME, "functional"})
