"""PEFT's format of SHiRA: the values and places of single entries."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_sparse.adapters.delta import DeltaLinear
from lit_sparse.adapters.injection import inject
from lit_sparse.adapters.survey import survey
from lit_sparse.errors import UsageError, listed
from lit_sparse.interchange.export import save_tensors
from lit_sparse.interchange.loading import exactly
from lit_sparse.interchange.peft_folder import CONFIG, PREFIX, WEIGHTS, read_config, read_tensors
from lit_sparse.methods.shira import SHiRA

_ENTRIES = re.compile(r"(.+)\.shira_(weight|indices)")


@dataclass(frozen=True)
class PeftSHiRA:
    """A SHiRA in PEFT's format.

    Args:
        folder: Its folder.
        config: The content of ``adapter_config.json``.
        values: Full name of a layer to its values, shape ``(count,)``.
        places: The same to rows and columns of the values, shape ``(2, count)``.
        whole: Full name to tensor of everything else, usually the task head.
    """

    folder: Path
    config: dict[str, Any]
    values: dict[str, Tensor]
    places: dict[str, Tensor]
    whole: dict[str, Tensor]


def write_shira(
    adapters: Mapping[str, DeltaLinear], config: Mapping[str, Any], whole: Mapping[str, Tensor], draft: Path
) -> list[str]:
    """Write a folder that PEFT's ``PeftModel.from_pretrained`` loads.

    PEFT gives every layer r · (inputs + outputs) entries, so that smaller ones are filled up with zeros.

    Args:
        adapters: By full layer name; ``nn.Linear`` layers.
        config: The settings that all kinds of PEFT's adapters have.
        whole: Names to tensors of modules that are saved whole, as PEFT names them.
        draft: The folder.

    Returns:
        Notes for card and terminal.

    Raises:
        UsageError: If a layer is too small for as many entries.
    """
    r = max(-(-adapter.size // (adapter.in_features + adapter.out_features)) for adapter in adapters.values())
    sizes = {name: r * (adapter.in_features + adapter.out_features) for name, adapter in adapters.items()}
    full = [name for name, adapter in adapters.items() if sizes[name] > adapter.in_features * adapter.out_features]
    if full:
        raise UsageError(
            f"PEFT's SHiRA gives every layer {r} · (inputs + outputs) entries, and {listed(full)} have fewer. Use "
            "export_delta (format delta) or export_merged (merged)."
        )
    tensors = dict(whole)
    for name, adapter in adapters.items():
        values, indices = _filled(adapter, sizes[name])
        tensors[f"{PREFIX}{name}.shira_weight"] = values
        places = torch.stack([indices // adapter.in_features, indices % adapter.in_features])
        tensors[f"{PREFIX}{name}.shira_indices"] = places.to(torch.int32)
    save_tensors(tensors, draft / WEIGHTS)
    # The only mask that PEFT knows by name. It draws one, and then reads the places from the file.
    own = {"peft_type": "SHIRA", "r": r, "mask_type": "random", "random_seed": None, "init_weights": True}
    (draft / CONFIG).write_text(json.dumps({**config, **own}, indent=2) + "\n", encoding="utf-8")
    held, written = sum(adapter.size for adapter in adapters.values()), sum(sizes.values())
    return [
        f"For PEFT (0.17 or later) alone, as its SHiRA with r {r}: {held:,} trained entries, and "
        f"{written - held:,} zeros, since PEFT gives every layer r · (inputs + outputs). Serve the format merged in "
        "engines."
    ]


def is_shira(folder: Path) -> bool:
    """Whether a folder of PEFT's holds a SHiRA."""
    try:
        config: Any = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("peft_type") == "SHIRA"


def read_shira(folder: Path) -> PeftSHiRA:
    """Read a folder of PEFT's; errors as those of :func:`~lit_sparse.load_peft`."""
    config, found = read_config(folder, "SHIRA"), PeftSHiRA(folder, {}, {}, {}, {})
    for key, tensor in read_tensors(folder).items():
        name = key.removeprefix(PREFIX)
        match = _ENTRIES.fullmatch(name)
        if match is None:
            found.whole[name] = tensor
        else:
            (found.values if match[2] == "weight" else found.places)[match[1]] = tensor
    fits = found.values.keys() == found.places.keys() and all(
        found.places[name].shape == (2, *values.shape)
        and not found.places[name].is_floating_point()
        and 0 < values.numel() == found.places[name].unique(dim=1).shape[1]
        for name, values in found.values.items()
    )
    if not found.values or not fits:
        raise UsageError(f"{folder / WEIGHTS} holds no matching shira_weight and shira_indices: it is damaged.")
    found.config.update(config)
    return found


@torch.no_grad()
def inject_shira(model: nn.Module, shira: PeftSHiRA, train_head: list[str]) -> dict[str, DeltaLinear]:
    """Put the entries of a folder into a model without adapters.

    Args:
        model: The model that PEFT was given.
        shira: The folder.
        train_head: Names of the modules that the folder trained whole.

    Returns:
        Full layer name to adapter.

    Raises:
        UsageError: If the model lacks these layers or entries.
    """
    layers = {name: candidate.layer for name, candidate in survey(model).items()}
    linear = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    absent = [name for name in shira.values if name not in linear]
    if absent:
        raise UsageError(f"{shira.folder} adapts {listed(absent)}, which are no linear layers of this model.")
    shares: dict[str, dict[str, float]] = {}
    for name, places in shira.places.items():
        rows, columns = linear[name].weight.shape
        outside = bool((places.amin(1) < 0).any()) or int(places[0].max()) >= rows or int(places[1].max()) >= columns
        if outside or places.shape[1] > rows * columns:
            raise UsageError(f"{shira.folder} changes entries that {name!r} does not have: it is of another model.")
        shares[exactly(name)] = {"changed": places.shape[1] / (rows * columns)}
    method = SHiRA(target_modules="|".join(shares), overrides=dict(shares), train_head=train_head or False)
    adapters: dict[str, DeltaLinear] = inject(model, method)
    for name, adapter in adapters.items():
        row, column = shira.places[name].long()
        order = (row * adapter.in_features + column).sort()
        adapter.indices.copy_(order.values)
        adapter.values.copy_(shira.values[name][order.indices])
    return adapters


def _filled(adapter: DeltaLinear, size: int) -> tuple[Tensor, Tensor]:
    """Values and their flat places, with zeros at the first free places, in order."""
    indices, values = adapter.indices.long().cpu(), adapter.values.detach().cpu()
    free = torch.ones(adapter.in_features * adapter.out_features, dtype=torch.bool)
    free[indices] = False
    added = free.nonzero().flatten()[: size - len(indices)]
    order = torch.cat([indices, added]).sort()
    return torch.cat([values, values.new_zeros(len(added))])[order.indices], order.values
