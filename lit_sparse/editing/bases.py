"""Whether a model is the one that an edit was made for: by some of its values, or else by its name."""

from __future__ import annotations

import torch
from torch import nn

from lit_sparse.errors import UsageError
from lit_sparse.interchange.patches import Entries, Patch, require_fit, standing

_SAMPLED = 16  # entries of each weight
# Half-precision copies of one model differ by rounding, 2⁻⁸ at most for bfloat16; other weights by far more.
_ROUNDING = 2.0**-6


def sample_of(originals: Patch) -> Patch:
    """A few of the entries, the first of each weight."""
    sample: Patch = {}
    for name, entries in originals.items():
        indices = torch.arange(entries.count) if entries.indices is None else entries.indices
        sample[name] = Entries(indices[:_SAMPLED].clone(), entries.values[:_SAMPLED].clone())
    return sample


def require_base(model: nn.Module, originals: Patch, sample: Patch, base: str, what: str) -> None:
    """Check that an edit was made for this model.

    Args:
        model: To edit.
        originals: What its changed entries were before any edit.
        sample: What :func:`sample_of` took from the model that the edit was made for; empty in older files.
        base: Name of that model.
        what: The edit, for messages.

    Raises:
        UsageError: If the model has other values than the sample, or without a sample another name.
    """
    require_fit(model, sample, what)
    found = standing(model, sample)
    for name, entries in found.items():
        known, indices = originals.get(name), sample[name].indices
        values = entries.values.cpu().float()
        if known is not None and indices is not None:
            places = torch.arange(known.count) if known.indices is None else known.indices.cpu()
            edit, place = (indices.cpu()[:, None] == places).nonzero(as_tuple=True)
            values[edit] = known.values.cpu().float()[place]
        if not torch.allclose(values, sample[name].values.float(), rtol=_ROUNDING, atol=1e-6):
            raise UsageError(
                f"{what} was made for the model {base!r}, and this one has other values in {name!r}. Give the model "
                "that the edit was made for."
            )
    here = str(getattr(model, "name_or_path", ""))
    if not sample and base and here and base.rstrip("/") != here.rstrip("/"):
        raise UsageError(
            f"{what} was made for {base!r}, and this model is {here!r}. Its file is of an earlier version, without "
            "values to compare the weights by. Make the edit again, or name the model as it was named then."
        )
