"""Put a stored adapter into a model that others share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_sparse.adapters.frozen import require_match
from lit_sparse.adapters.injection import inject
from lit_sparse.adapters.token_rows import embedding_count
from lit_sparse.errors import UsageError
from lit_sparse.interchange.peft_folder import read_peft
from lit_sparse.interchange.peft_import import install
from lit_sparse.interchange.peft_shira import is_shira
from lit_sparse.methods.start import take_ranks
from lit_sparse.modules import checkpoint as checkpoints
from lit_sparse.modules.rebuilding import saved_method
from lit_sparse.serving.places import everything


def load(model: nn.Module, path: Path) -> None:
    """Put an adapter into a plain model, whose tensors stay what they are.

    Args:
        model: Frozen. Where the adapter has other values for a tensor, the model gets a new one.
        path: Folder of a LoRA in PEFT's format, or checkpoint file of a SparseModule.

    Raises:
        UsageError: If the source cannot be read or does not fit the model.
    """
    if not path.exists():
        raise UsageError(f"{str(path)!r} does not exist. Give a folder in PEFT's format, or a checkpoint file.")
    (_load_folder if path.is_dir() else _load_checkpoint)(model, path)


def _load_folder(model: nn.Module, path: Path) -> None:
    if is_shira(path):
        raise UsageError(f"{str(path)!r} holds a SHiRA. A bank reads one from its checkpoint alone: give that file.")
    lora = read_peft(path)
    heads = tuple(f"{name}." for name in lora.heads(model))
    _make_room(model, {name: tensor for name, tensor in lora.whole.items() if name.startswith(heads)}, path)
    _require_rows(model, path, [rows.ids for rows in lora.tokens.values()])
    install(model, lora)


def _load_checkpoint(model: nn.Module, path: Path) -> None:
    checkpoint = checkpoints.read(path)
    weights: dict[str, Tensor] = checkpoint["state_dict"]
    outside = checkpoints.outside_backbone(checkpoint)
    if outside:
        raise UsageError(f"{str(path)!r} holds {outside[:3]}, which lie outside the backbone: a bank cannot use them.")
    saved = checkpoint[checkpoints.KEY]["method"]
    method = saved_method(saved)
    if method.changes_weights:
        start = method.init_weights
        raise UsageError(f"{str(path)!r} was trained with init_weights {start!r}, which changed the shared weights.")
    _make_room(model, {name.removeprefix(checkpoints.PREFIX): tensor for name, tensor in weights.items()}, path)
    inject(model, method)
    wrapped = nn.ModuleDict({checkpoints.PREFIX.rstrip("."): model})
    take_ranks(wrapped, method, checkpoint[checkpoints.KEY])
    _require_rows(model, path, [entry["ids"] for entry in checkpoint[checkpoints.KEY].get("token_rows", {}).values()])
    name = getattr(model, "name_or_path", "") or type(model).__name__
    checkpoints.require_fit(wrapped, name, saved, checkpoint)
    require_match(
        wrapped, wrapped.load_state_dict(weights, strict=False), f"The weights in {str(path)!r} do not fit {name!r}"
    )


def _require_rows(model: nn.Module, path: Path, tokens: Iterable[Iterable[int]]) -> None:
    """Refuse an adapter with tokens beyond the shared embeddings."""
    largest = max((i for ids in tokens for i in ids), default=-1)
    if largest >= 0 and largest >= embedding_count(model):
        raise UsageError(
            f"{str(path)!r} has a row for the token {largest}, and the backbone that the bank shares has "
            f"{embedding_count(model)}. Call model.resize_token_embeddings({largest + 1}) before you make the bank."
        )


def _make_room(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Replace the tensors that an adapter has values for by new ones, so that the plain ones keep theirs."""
    plain: dict[str, Tensor] = dict(
        chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    )
    places = list(everything(model))
    for name, tensor in tensors.items():
        if name not in plain:
            continue  # belongs to an adapter, which is injected later
        old = plain[name]
        owner = model.get_submodule(name.rpartition(".")[0])
        if tensor.shape != old.shape:
            if not isinstance(owner, nn.Linear) or tensor.shape[1:] != old.shape[1:]:
                raise UsageError(
                    f"{str(path)!r} has {name!r} of shape {tuple(tensor.shape)}, the backbone {tuple(old.shape)}; only "
                    "the number of a linear layer's outputs may differ."
                )
            owner.out_features = tensor.shape[0]
        new: Tensor = torch.zeros(tensor.shape, dtype=old.dtype, device=old.device)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new)
        for place, key, value in places:
            if value is old:  # under all names of a shared tensor
                place[key] = new
