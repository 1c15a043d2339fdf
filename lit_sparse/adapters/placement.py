"""Check that a model can take adapters: whole, on one device, and without adapters of PEFT."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lit_sparse.errors import UsageError

_INSTEAD = (
    "Load it whole onto one device, without device_map. A backbone that is too large for one device trains under the "
    "strategy lit_sparse.SparseFSDP2Strategy (fsdp2), with cpu_offload if need be"
)


def require_whole(model: nn.Module) -> None:
    """Check that ``model`` can take adapters.

    Raises:
        UsageError: If its weights are offloaded by accelerate, were never loaded or lie on several devices, or PEFT
            adapted it before.
    """
    name = type(model).__name__
    tuned = [n for n, module in model.named_modules() if isinstance(module, _peft_classes())]
    if tuned:
        first = next(filter(None, tuned), name)
        raise UsageError(
            f"PEFT adapted {name} already, the first at {first!r}. Fold its adapters in with "
            "model = model.merge_and_unload(), or load the plain backbone and start from the adapter's folder with "
            "load_peft."
        )
    parameters = list(model.parameters())
    empty = any(p.is_meta for p in parameters)
    if empty and torch.get_default_device().type != "meta":  # a model built under torch.device("meta") may be empty
        raise UsageError(
            f"{name} has parameters on the meta device: accelerate offloaded them, or no weights were loaded. "
            f"{_INSTEAD}."
        )
    require_one_device(name, parameters)


def require_one_device(name: str, parameters: Iterable[nn.Parameter]) -> None:
    """Raise a UsageError if ``parameters`` of the model called ``name`` lie on several devices."""
    devices = sorted({str(p.device) for p in parameters})
    if len(devices) > 1:
        raise UsageError(
            f"{name} is spread over the devices {devices}: gates and masks are chosen over all adapters at once. "
            f"{_INSTEAD}; for inference, export_merged writes a model that device_map can spread."
        )


def _peft_classes() -> tuple[type[Any], ...]:
    peft: Any = sys.modules.get("peft")  # not imported: without it nothing can be of its classes
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")
    return (peft.PeftModel, tuners.BaseTunerLayer) if peft is not None and tuners is not None else ()
