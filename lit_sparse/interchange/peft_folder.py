"""Read a LoRA from the folder that PEFT wrote, and start from it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.convolution import LowRankConv2d
from lit_sparse.adapters.injection import adapters_in, inject
from lit_sparse.adapters.selection import matches_tail, survey
from lit_sparse.errors import UsageError
from lit_sparse.json_text import parse
from lit_sparse.methods.base import Overrides
from lit_sparse.methods.lora import LoRA

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

_FACTOR = re.compile(r"(.+)\.lora_(?:([AB])\.weight|embedding_([AB]))")
# Settings that are used here, or that say nothing of what the tensors mean. Any other must be unset: DoRA and its like
# compute something else with the same tensors, and what PEFT will invent next is not known here.
_UNDERSTOOD = {
    *("peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("fan_in_fan_out", "init_lora_weights", "eva_config", "megatron_core", "qalora_group_size"),
}
# The other ways to start (pissa, olora, corda, loftq …) change the frozen weights, and the folder does not hold those.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LowRankPair:
    """What PEFT keeps of one layer.

    Args:
        lora_A: Shape ``(rank, in_features)``.
        lora_B: Shape ``(out_features, rank)``.
        alpha: Numerator of the scale.
        scale: What BA is multiplied by.
    """

    lora_A: Tensor
    lora_B: Tensor
    alpha: float
    scale: float


@dataclass(frozen=True)
class PeftLoRA:
    """A LoRA as PEFT keeps it.

    Args:
        folder: Where it was read.
        config: What ``adapter_config.json`` says.
        pairs: Full layer name, within the model that PEFT adapted, to its matrices.
        whole: Full name to tensor, of all that is not low-rank: the task head, as a rule.
    """

    folder: Path
    config: dict[str, Any]
    pairs: dict[str, LowRankPair]
    whole: dict[str, Tensor]

    def heads(self, model: nn.Module) -> list[str]:
        """Names of the modules of ``model`` that the folder brings whole: those of ``modules_to_save``."""
        saved = self.config.get("modules_to_save") or []
        names = [name for name, _ in model.named_modules() if any(matches_tail(name, part) for part in saved)]
        return [name for name in names if any(key.startswith(f"{name}.") for key in self.whole)]


def load_peft(model: nn.Module, folder: str | os.PathLike[str]) -> dict[str, LowRankAdapter]:
    """Start from a dense LoRA in PEFT's format, in place.

    Into a model with freshly injected adapters, of whatever method, A and B of the folder are copied, and gates set to
    1: the model then computes what PEFT's did, and training goes on sparsely from there. PEFT's scale is folded into B,
    the method keeps its own. Ranks that the adapter has beyond the folder's keep their random A and have B = 0. For
    RoseLoRA nothing is masked yet; a ``clamp`` takes effect at the first step.

    Into a model without adapters, a :class:`~lit_sparse.LoRA` is injected just as the folder says, layer by layer, for
    inference or to go on densely.

    The task head in the folder (``modules_to_save``) goes into the model's, which must be trained.

    Args:
        model: The model that PEFT was given (not PEFT's), with or without adapters.
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        Full layer name to adapter.

    Raises:
        UsageError: If the folder cannot be read, holds something else than plain LoRA on linear layers, convolutions
            and embeddings, or does not fit: other layers, shapes, a larger rank, a head that is frozen here, tensors
            that have no place; or if the adapters are not as new.
    """
    return install(model, read_peft(folder))


def read_peft(folder: str | os.PathLike[str]) -> PeftLoRA:
    """Read a folder of PEFT's; arguments and errors as those of :func:`load_peft`."""
    path = Path(folder)
    config = _read_config(path)
    named = {name.removeprefix(PREFIX): tensor for name, tensor in _read_tensors(path).items()}
    factors: dict[str, dict[str, Tensor]] = {}
    whole = {}
    for name, tensor in named.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            whole[name] = tensor
        else:
            if not tensor.is_floating_point():
                raise UsageError(f"{path / WEIGHTS} holds {name!r} as {tensor.dtype}, not as floating-point numbers.")
            factors.setdefault(match[1], {})[match[2] or match[3]] = tensor.flatten(1)
    if not factors:
        raise UsageError(f"{path / WEIGHTS} holds no lora_A and lora_B; its tensors are {some(named)}.")
    return PeftLoRA(path, config, {name: _pair(path, config, name, own) for name, own in factors.items()}, whole)


@torch.no_grad()
def install(model: nn.Module, lora: PeftLoRA) -> dict[str, LowRankAdapter]:
    """Put what was read into a model; arguments and errors as those of :func:`load_peft`."""
    _compare_backbones(model, lora)
    adapters = dict(adapters_in(model))
    if adapters:
        _require_new(model, adapters)
        _require_layers(model, lora, adapters)
    else:
        _require_layers(model, lora, adapters)
        adapters = inject(model, _method(lora, lora.heads(model)))
    for name, pair in lora.pairs.items():
        _start(adapters[name], name, pair, max(p.lora_A.shape[0] for p in lora.pairs.values()))
    own = {id(p) for adapter in adapters.values() for p in adapter.parameters(recurse=False)}
    _load_whole(model, lora, own)
    return adapters


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    if not file.is_file():
        raise UsageError(f"{str(path)!r} is no folder of a PEFT adapter: it has no {CONFIG}. Give a local folder.")
    try:
        config: Any = parse(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{file} cannot be read: {error}.") from error
    if not isinstance(config, dict):
        raise UsageError(f"{file} holds a {type(config).__name__}, not the settings of an adapter.")
    if config.get("peft_type") != "LORA":
        raise UsageError(f"{file} describes {config.get('peft_type')!r}; only LORA can be loaded.")
    if config.get("bias", "none") != "none":
        raise UsageError(f"{file} trains biases (bias: {config['bias']!r}), which stay frozen here.")
    start = config.get("init_lora_weights", True)
    if start not in _STARTS:
        raise UsageError(
            f"{file} started from {start!r}, which changes the frozen weights or more than A and B. Convert it to a "
            "plain LoRA with PEFT: save_pretrained(folder, path_initial_model_for_weight_conversion=…)."
        )
    others = {name: value for name, value in config.items() if value and name not in _UNDERSTOOD}
    if others:
        raise UsageError(f"{file} is no plain LoRA: it sets {others}, which cannot be loaded.")
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    file = path / WEIGHTS
    if not file.is_file():
        pickled = (path / "adapter_model.bin").is_file()
        raise UsageError(
            f"{path} has no {WEIGHTS}"
            + (", only a pickle, which may run code when it is read. Save it again with PEFT." if pickled else ".")
        )
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise UsageError(f"{file} cannot be read: {error}.") from error
    spoilt = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if spoilt:
        raise UsageError(f"{file} holds values that are not finite, in {some(spoilt)}.")
    return tensors


def _pair(path: Path, config: Mapping[str, Any], name: str, factors: Mapping[str, Tensor]) -> LowRankPair:
    if len(factors) < 2:
        raise UsageError(f"{path / WEIGHTS} holds lora_{next(iter(factors))} of {name!r} alone.")
    rank = factors["A"].shape[0]
    stated = of_layer(config.get("rank_pattern"), name, config["r"])
    if not rank == factors["B"].shape[1] == stated:
        raise UsageError(
            f"In {path} the rank of {name!r} is {rank} by lora_A, {factors['B'].shape[1]} by lora_B, and {stated} by "
            f"{CONFIG}: it is no plain LoRA of one rank. (In a convolution with groups, PEFT's is another function.)"
        )
    alpha = of_layer(config.get("alpha_pattern"), name, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRankPair(factors["A"], factors["B"], alpha, scale)


def of_layer(patterns: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """PEFT's rule: a key is a regular expression for trailing parts of the name, the first that matches holds."""
    keys = (key for key in patterns or {} if re.match(rf"(.*\.)?({key})$", name))
    key = next(keys, None)
    return otherwise if key is None or patterns is None else patterns[key]


def _compare_backbones(model: nn.Module, lora: PeftLoRA) -> None:
    trained, here = lora.config.get("base_model_name_or_path"), getattr(model, "name_or_path", None)
    if trained and here and trained.rstrip("/") != str(here).rstrip("/"):
        rank_zero_warn(
            f"{lora.folder} was trained on {trained!r}, and this model is {here!r}. If that is more than another name "
            "for the same weights, the adapter is worth nothing here."
        )


def _require_new(model: nn.Module, adapters: Mapping[str, LowRankAdapter]) -> None:
    used = [n for n, a in adapters.items() if not a.lora_B_t.is_meta and bool(a.lora_B_t.any())]
    if used:
        raise UsageError(
            f"{len(used)} adapters of {type(model).__name__} are not as new, the first at {used[0]!r}: its B is not "
            "zero. Load into a freshly loaded model, and inject without init_weights 'pissa', which changes the "
            "frozen weights."
        )


def _require_layers(model: nn.Module, lora: PeftLoRA, adapters: Mapping[str, LowRankAdapter]) -> None:
    """Check that the folder's layers are those adapted here or, where none is yet, layers of this model."""
    every = {*survey(model), *adapters}
    absent = [name for name in lora.pairs if name not in every]
    if absent:
        raise UsageError(
            f"{lora.folder} adapts {some(absent)}, and {type(model).__name__} has no such layers: its own are "
            f"{some(every)}. Load the class of model that PEFT was given."
        )
    only_there = [name for name in lora.pairs if name not in adapters]
    only_here = [name for name in adapters if name not in lora.pairs]
    if adapters and (only_there or only_here):
        raise UsageError(
            f"{lora.folder} and the method adapt other layers. In the folder only: {some(only_there)}. Here only: "
            f"{some(only_here)}. Set target_modules to {_tails(lora.pairs, every)}."
        )


def _tails(names: Iterable[str], every: Iterable[str]) -> list[str]:
    """The shortest trailing name parts, all of one length, that mean ``names`` and no other of ``every``."""
    wanted, others = set(names), set(every) - set(names)
    for length in range(1, max(name.count(".") for name in wanted) + 1):
        tails = sorted({".".join(name.split(".")[-length:]) for name in wanted})
        if not any(matches_tail(name, tail) for name in others for tail in tails):
            return tails
    return sorted(wanted)


def _method(lora: PeftLoRA, heads: list[str]) -> LoRA:
    config = lora.config
    overrides: Overrides = {}
    for name, pair in lora.pairs.items():
        own = {"rank": pair.lora_A.shape[0], "alpha": pair.alpha}
        if own != {"rank": config["r"], "alpha": config["lora_alpha"]}:
            overrides[exactly(name)] = own
    return LoRA(
        target_modules="|".join(exactly(name) for name in lora.pairs),
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout") or 0.0,
        train_head=heads,
        use_rslora=bool(config.get("use_rslora")),
        overrides=overrides or None,
    )


def exactly(name: str) -> str:
    """A pattern for ``target_modules`` and ``overrides`` that means one layer."""
    # In a group, since the bare name would also be taken for the trailing part of longer ones.
    return f"(?:{re.escape(name)})"


def _start(adapter: LowRankAdapter, name: str, pair: LowRankPair, largest: int) -> None:
    if isinstance(adapter, LowRankConv2d):
        base = adapter.base
        if base.dilation != (1, 1) or base.padding_mode != "zeros":
            raise UsageError(
                f"{name!r} is a convolution with dilation or other padding than zeros, which PEFT leaves out."
            )
    rank = pair.lora_A.shape[0]
    if rank > adapter.rank:
        raise UsageError(
            f"The LoRA has rank {rank} at {name!r}, the adapter there {adapter.rank}. Set rank to {largest}, the "
            "largest of the LoRA, or override it for this layer."
        )
    shapes = (pair.lora_A.shape[1], pair.lora_B.shape[0])
    if shapes != (adapter.in_features, adapter.out_features):
        raise UsageError(
            f"The LoRA maps {shapes[0]} features to {shapes[1]} at {name!r}, the layer {adapter.in_features} to "
            f"{adapter.out_features}: it was trained on another model."
        )
    adapter.lora_A[:rank] = pair.lora_A.to(adapter.lora_A)
    adapter.lora_B_t.zero_()
    adapter.lora_B_t[:rank] = (pair.lora_B.double() * (pair.scale / adapter.scale)).t().to(adapter.lora_B_t)
    if adapter.gate is not None:
        adapter.gate.fill_(1)


def _load_whole(model: nn.Module, lora: PeftLoRA, own: set[int]) -> None:
    """Load the task head; what else the folder brings must be what the model has."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    places = {**dict(model.named_buffers(remove_duplicate=False)), **parameters}
    brought = {name.replace(".base_layer.", ".base."): tensor for name, tensor in lora.whole.items()}
    homeless = [name for name in brought if name not in places]
    if homeless:
        raise UsageError(f"{lora.folder} holds {some(homeless)}, for which {type(model).__name__} has no place.")
    for name, tensor in brought.items():
        here = places[name]
        if here.shape != tensor.shape:
            raise UsageError(
                f"{lora.folder} holds {name!r} of shape {tuple(tensor.shape)}, here it has {tuple(here.shape)}: a head "
                "for another number of labels, or another vocabulary."
            )
        frozen = name in parameters and not here.requires_grad
        if frozen and not here.is_meta and not torch.equal(here, tensor.to(here)):
            raise UsageError(
                f"{lora.folder} trained {name!r}, which is frozen here and has other values. Set train_head to true, "
                "or name the module in it."
            )
    _require_untied(model, lora, parameters)
    for name, tensor in brought.items():
        places[name].copy_(tensor)
    alone = [n for n, p in parameters.items() if p.requires_grad and id(p) not in own and n not in brought]
    if alone:
        rank_zero_warn(f"{lora.folder} holds nothing for {some(alone)}: these start as the backbone has them.")


def _require_untied(model: nn.Module, lora: PeftLoRA, parameters: Mapping[str, nn.Parameter]) -> None:
    heads = tuple(f"{name}." for name in lora.heads(model))
    saved = {id(parameters[name]): name for name in lora.whole if name.startswith(heads) and name in parameters}
    tied = {name: saved[id(p)] for name, p in parameters.items() if id(p) in saved and not name.startswith(heads)}
    if tied:
        raise UsageError(
            f"{lora.folder} trained a copy of what {type(model).__name__} shares: {tied}. Untie them in the backbone "
            "(backbone_args: {tie_word_embeddings: false}) to load it."
        )


def some(names: Iterable[str]) -> str:
    """A list that fits into a message."""
    ordered = sorted(names)
    shown = ", ".join(repr(name) for name in ordered[:6])
    more = f" and {len(ordered) - 6} more" if len(ordered) > 6 else ""
    return f"[{shown}]{more}"
