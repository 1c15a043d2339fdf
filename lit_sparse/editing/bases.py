"""Check that a model and a Trainer can edit, and that an edit was made for a model, by its values or its name."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch import nn

from lit_sparse.adapters.quantized import quantized_layers
from lit_sparse.errors import UsageError
from lit_sparse.interchange.patches import Entries, Patch, require_fit, standing
from lit_sparse.methods.method import Method

_SAMPLED = 16  # entries of each weight
# Half-precision copies of one model differ by rounding, 2⁻⁸ at most for bfloat16; other weights by far more.
_ROUNDING = 2.0**-6


def require_editable(model: nn.Module) -> None:
    """Raise a UsageError if a layer of the model is quantized."""
    name = next((name for name, _ in quantized_layers(model)), None)
    if name is not None:
        raise UsageError(
            f"Edits are added to weights, and that of {name!r} is quantized: edit the model before it is quantized."
        )


def require_zero_start(method: object) -> None:
    """Refuse a method whose adapters start from training batches, of which an edit has none, or out of the weights."""
    if isinstance(method, Method) and method.batch_start is not None:
        raise UsageError(f"{method.batch_start} starts from training batches, and an edit has none: leave it out.")
    if isinstance(method, Method) and method.changes_weights:
        raise UsageError(
            f"init_weights {method.init_weights!r} changes the frozen weights, and an edit must be removable: set it "
            "to 'lora'."
        )


def require_able(trainer: Trainer, sequential: bool) -> None:
    """Refuse a Trainer under which weights cannot be edited."""
    if torch.is_inference_mode_enabled():
        raise UsageError("Edits need gradients: set the Trainer's inference_mode to false.")
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
        raise UsageError(
            f"Every process edits a whole model, and {type(strategy).__name__} shards it: use a single device or ddp."
        )
    if trainer.precision_plugin.precision in ("bf16-true", "16-true"):
        raise UsageError(
            f"{trainer.precision_plugin.precision} is not for edits: use 32-true, and give the model its type by "
            "backbone_args {dtype: bfloat16}. Edits are then trained in float32 over the stored type."
        )
    if trainer.precision_plugin.precision == "16-mixed":
        raise UsageError("Edits are trained without a gradient scaler: use bf16-mixed or 32-true, not 16-mixed.")
    if sequential and trainer.world_size > 1:
        raise UsageError("Edits in sequence build upon each other: use one process, devices=1.")


def sample_of(originals: Patch) -> Patch:
    """The first few entries of each weight."""
    return {
        name: Entries(entries.places[:_SAMPLED].clone(), entries.values[:_SAMPLED].clone())
        for name, entries in originals.items()
    }


def require_base(model: nn.Module, originals: Patch, sample: Patch, base: str, edit: str) -> None:
    """Check that an edit was made for this model.

    Args:
        model: The model to edit.
        originals: Values of its changed entries before any edit.
        sample: Result of :func:`sample_of` for the model that the edit was made for; empty in older files.
        base: Name of that model.
        edit: What messages call the edit.

    Raises:
        UsageError: If the model's values differ from the sample, or, without a sample, if it has another name.
    """
    require_fit(model, sample, edit)
    for name, found in standing(model, sample).items():
        values, indices = found.values.cpu().float(), sample[name].places.cpu()
        if name in originals:
            ours, theirs = (indices[:, None] == originals[name].places.cpu()).nonzero(as_tuple=True)
            values[ours] = originals[name].values.cpu().float()[theirs]
        if not torch.allclose(values, sample[name].values.float(), rtol=_ROUNDING, atol=1e-6):
            raise UsageError(
                f"{edit} was made for the model {base!r}, and this one has other values in {name!r}. Load {base!r}."
            )
    here = str(getattr(model, "name_or_path", ""))
    if not sample and base and here and base.rstrip("/") != here.rstrip("/"):
        raise UsageError(
            f"{edit} was made for {base!r}, and this model is {here!r}. Its file holds no values to compare, so load "
            f"the model as {base!r}, or make the edit again."
        )
