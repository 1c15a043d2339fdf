"""Read an export in PEFT's format back into a model, by PEFT itself where it is installed."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from lit_sparse.adapters.patterns import matches_tail
from lit_sparse.adapters.token_rows import embedding_count, text_model
from lit_sparse.errors import UsageError, listed
from lit_sparse.interchange.peft_import import load_peft
from lit_sparse.interchange.vocabulary import rows_of

ELSE = "Use save_adapter (format sparse), export_delta (delta) or export_merged (merged)."
"""What to do where PEFT's format cannot hold something."""


def has_peft() -> bool:
    """Whether PEFT is installed."""
    return importlib.util.find_spec("peft") is not None


def read_back(model: nn.Module, plain: nn.Module, folder: Path) -> nn.Module:
    """Load a folder into a copy of a model, by PEFT, or by :func:`~lit_sparse.load_peft` where it is not installed.

    Args:
        model: The model that was exported.
        plain: Its copy without adapters; changed in place.
        folder: In PEFT's format.

    Returns:
        The copy with the layers of PEFT, or ours.

    Raises:
        UsageError: If PEFT cannot load the folder.
    """
    if not has_peft():
        load_peft(plain, folder)
        return plain
    from peft import PeftConfig, PeftModel

    if rows_of(model):
        text_model(plain).resize_token_embeddings(embedding_count(model), mean_resizing=False)
    config: Any = PeftConfig.from_pretrained(str(folder))
    written = config.target_modules
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice for training
        try:
            loaded: nn.Module = PeftModel.from_pretrained(plain, str(folder), config=config).get_base_model()
        except Exception as error:  # anything that PEFT raises
            _require_kept(written, config.target_modules)
            raise UsageError(
                f"PEFT cannot load the LoRA that was written: {' '.join(str(error).split()).rstrip('.')}. {ELSE}"
            ) from error
    _require_kept(written, config.target_modules)
    return loaded


def _require_kept(written: str | Collection[str], read: Collection[str]) -> None:
    """Check that PEFT kept ``target_modules``, in which it replaces names that experts had before transformers 5."""
    names = [] if isinstance(written, str) else sorted(written)
    taken = [name for name in names if not any(matches_tail(name, target) for target in read)]
    if taken:
        raise UsageError(
            f"PEFT takes {listed(taken)} for weights of experts, whose names ended like that before transformers 5. "
            f"Leave these layers out of target_modules. Otherwise: {ELSE}"
        )
