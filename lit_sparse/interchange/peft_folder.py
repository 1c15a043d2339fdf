"""Read a LoRA from the folder that PEFT wrote."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lit_sparse.adapters.factors import LayerFactors
from lit_sparse.adapters.patterns import NamePatterns, matches_tail
from lit_sparse.errors import UsageError, listed, parse_json
from lit_sparse.interchange.metadata import METADATA, read_metadata
from lit_sparse.interchange.metadata import read_tensors as read_file
from lit_sparse.interchange.peft_parameters import from_peft, parameter_names
from lit_sparse.interchange.vocabulary import StoredRows

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

ROWS = ".token_adapter.trainable_tokens_delta"
"""Suffix of tensors that hold rows of tokens."""
_FACTOR = re.compile(r"(.+)\.lora_([AB]\.weight|embedding_[AB])")
_PARTS = {False: ("A.weight", "B.weight"), True: ("embedding_A", "embedding_B")}
# Settings that are used here, or that do not change what the tensors mean. Any other must be unset: DoRA, for one,
# computes another function of the same tensors, and later versions of PEFT will have settings that are unknown here.
_UNDERSTOOD = {
    *("peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    "target_parameters",
    "trainable_token_indices",
    *("mask_type", "random_seed", "init_weights"),  # of SHiRA
    *("fan_in_fan_out", "init_lora_weights", "eva_config", "megatron_core", "qalora_group_size"),
}
# Other initializations (pissa, olora, corda, loftq …) change the frozen weights, which the folder does not hold.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class PeftLoRA:
    """A LoRA in PEFT's format.

    Args:
        folder: Its folder.
        config: The content of ``adapter_config.json``.
        layers: Full name of a layer or of a weight of experts, within the model that PEFT adapted, to its factors.
        embeddings: Names of the layers that are stored as embeddings.
        whole: Full name to tensor of everything else, usually the task head.
        tokens: Full name of an embedding or output layer to its rows of tokens.
        patterns: Matches patterns of the configuration against whole names.
        tails: Matches patterns against whole names and name suffixes.
    """

    folder: Path
    config: dict[str, Any]
    layers: dict[str, LayerFactors]
    embeddings: set[str]
    whole: dict[str, Tensor]
    tokens: dict[str, StoredRows]
    patterns: NamePatterns
    tails: NamePatterns

    def heads(self, model: nn.Module) -> list[str]:
        """Names of the modules of ``model`` that ``modules_to_save`` means."""
        saved = self.config.get("modules_to_save") or []
        return [name for name, _ in model.named_modules() if name and any(matches_tail(name, part) for part in saved)]

    def targets(self, name: str) -> bool:
        """Whether PEFT adapts the layer of this full name under the folder's configuration."""
        config, parts = self.config, name.split(".")
        starts = [".".join(parts[: i + 1]) for i in range(len(parts))]
        saved = config.get("modules_to_save") or []
        if any(self.tails.matches(module, start) for start in starts for module in saved):
            return False
        if self._is_named(config.get("exclude_modules") or [], name):
            return False
        targets, blocks = config["target_modules"], config.get("layers_to_transform")
        if isinstance(targets, str) or blocks is None or blocks == []:
            return self._is_named(targets, name)
        stacks = config.get("layers_pattern") or r".+\.[^.]*"
        stacks = [stacks] if isinstance(stacks, str) else stacks
        numbers = [(start, int(n)) for start, n in zip(starts, parts[1:-1], strict=False) if n.isdecimal()]
        found = (number for stack in stacks for start, number in numbers if self.tails.matches(stack, start))
        return self._is_named(targets, name) and next(found, None) in ([blocks] if isinstance(blocks, int) else blocks)

    def parameters_of(self, stored: Iterable[str]) -> dict[str, str]:
        """Names of tensors, without ``lora_A`` and ``lora_B``, to full names of the parameters that they adapt."""
        targets = self.config.get("target_parameters") or []
        return parameter_names((name for name in stored if not self.targets(name)), targets)

    def _is_named(self, patterns: str | list[str], name: str) -> bool:
        if isinstance(patterns, str):
            return self.patterns.matches(patterns, name)
        return any(matches_tail(name, pattern) for pattern in patterns)


def read_peft(folder: str | os.PathLike[str]) -> PeftLoRA:
    """Read a folder in PEFT's format; arguments and errors as those of :func:`load_peft`."""
    path = Path(folder)
    config = read_config(path)
    tensors = read_tensors(path)
    named = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    if len({name.startswith(PREFIX) for name in tensors}) > 1:  # so that one name would stand for two tensors
        bare = [name for name in tensors if not name.startswith(PREFIX)]
        raise UsageError(
            f"{path / WEIGHTS} holds {listed(bare)} without the {PREFIX!r} that its other names begin with."
        )
    factors: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    for name, tensor in named.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            (rows if name.endswith(ROWS) else whole)[name.removesuffix(ROWS)] = tensor
            continue
        if not tensor.is_floating_point() or tensor.ndim < 2:
            raise UsageError(
                f"{path / WEIGHTS} holds {name!r} of shape {tuple(tensor.shape)} as {tensor.dtype}, not as a matrix of "
                "floating-point numbers."
            )
        factors.setdefault(match[1], {})[match[2]] = tensor.flatten(1)
    if not factors:
        raise UsageError(f"{path / WEIGHTS} holds no lora_A and lora_B; its tensors are {listed(named)}.")
    patterns, tails = (NamePatterns(f"{path / CONFIG}: the pattern", tails=tails) for tails in (False, True))
    embeddings = {name for name, own in factors.items() if "embedding_A" in own}
    lora = PeftLoRA(path, config, {}, embeddings, whole, _tokens(path, config, rows), patterns, tails)
    parameters = lora.parameters_of(factors)
    for stored, own in factors.items():
        name = parameters.get(stored, stored)
        lora.layers[name] = _layer(path, config, name, own, tails, stored in parameters)
    return lora


def _tokens(path: Path, config: Mapping[str, Any], rows: Mapping[str, Tensor]) -> dict[str, StoredRows]:
    """The rows of tokens, checked against ``trainable_token_indices``."""
    stated: Any = config.get("trainable_token_indices") or {}
    stated = dict.fromkeys(rows, stated) if isinstance(stated, list) else stated
    texts = _texts(path) if rows else {}
    found = {}
    named = set()
    for name, tensor in rows.items():
        keys = [key for key in stated if matches_tail(name, key)]
        ids: Any = stated[keys[0]] if len(keys) == 1 else None
        plain = isinstance(ids, list) and all(isinstance(i, int) and i >= 0 for i in ids) and tensor.ndim == 2
        if not plain or len(set(ids)) < len(ids) or len(ids) != len(tensor):
            raise UsageError(
                f"{path / WEIGHTS} holds rows of tokens for {name!r} of shape {tuple(tensor.shape)}, and {CONFIG} "
                f"names {ids} for it: there must be a row for each token, once."
            )
        named.add(keys[0])
        order = sorted(range(len(ids)), key=ids.__getitem__)
        known = [texts.get(i, "") for i in sorted(ids)]
        found[name] = StoredRows(sorted(ids), known if any(known) else [], tensor[order], None)
    # Of layers that share a matrix, PEFT stores the rows once.
    lacking = [key for key in stated if key not in named and not any(stated[key] == stated[other] for other in named)]
    if lacking or (config.get("trainable_token_indices") and not rows):
        raise UsageError(f"{path / WEIGHTS} lacks the rows of tokens that {CONFIG} names for {lacking or stated}.")
    return found


def _texts(path: Path) -> dict[int, str]:
    """Id to text of tokens, where this library wrote the folder."""
    try:
        entries: Any = read_metadata(path).get("new_tokens", {})
        return {int(number): str(text) for number, text in entries.items() if text}
    except (AttributeError, ValueError) as error:
        raise UsageError(f"{path / METADATA} is damaged: {error}.") from error


def read_config(path: Path, kind: str = "LORA") -> dict[str, Any]:
    """Read and check the settings of an adapter of one kind; errors as those of :func:`load_peft`."""
    file = path / CONFIG
    if not file.is_file():
        raise UsageError(f"{str(path)!r} is no folder of a PEFT adapter: it has no {CONFIG}. Give a local folder.")
    try:
        config: Any = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{file} cannot be read: {error}.") from error
    if not isinstance(config, dict):
        raise UsageError(f"{file} holds a {type(config).__name__}, not the settings of an adapter.")
    if config.get("peft_type") != kind:
        raise UsageError(f"{file} describes {config.get('peft_type')!r}; only {kind} can be loaded here.")
    if config.get("bias", "none") != "none":
        raise UsageError(f"{file} trains biases (bias: {config['bias']!r}), which stay frozen here.")
    for key in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "target_parameters"):
        named = config.get(key)
        pattern = isinstance(named, str) and key not in ("modules_to_save", "target_parameters")
        if not (named is None or pattern or (isinstance(named, list) and all(isinstance(n, str) for n in named))):
            raise UsageError(f"{file} holds {named!r} as {key}, not names of modules.")
    config["target_modules"] = config.get("target_modules") or []
    if not config["target_modules"] and not config.get("target_parameters"):
        raise UsageError(f"{file} names no target_modules, so that it is not known which layers it adapts.")
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


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter; errors as those of :func:`load_peft`."""
    file = path / WEIGHTS
    if not file.is_file():
        pickled = (path / "adapter_model.bin").is_file()
        raise UsageError(
            f"{path} has no {WEIGHTS}"
            + (", only a pickle, which may run code when it is read. Save it again with PEFT." if pickled else ".")
        )
    tensors = read_file(file)
    spoilt = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if spoilt:
        raise UsageError(f"{file} holds values that are not finite, in {listed(spoilt)}.")
    return tensors


def _layer(
    path: Path,
    config: Mapping[str, Any],
    name: str,
    factors: Mapping[str, Tensor],
    tails: NamePatterns,
    is_parameter: bool,
) -> LayerFactors:
    embedding = any(part.startswith("embedding") for part in factors)
    if set(factors) != set(_PARTS[embedding]):
        raise UsageError(
            f"{path / WEIGHTS} holds {[f'lora_{part}' for part in factors]} of {name!r}, where two matrices A and B of "
            "one layer are wanted."
        )
    lora_A, lora_B = (factors[part] for part in _PARTS[embedding])
    stated = of_layer(config.get("rank_pattern"), name, config["r"], tails)
    rows = lora_A.shape[0]
    experts = int(rows // stated) if is_parameter and stated in range(1, rows) and rows % stated == 0 else 1
    rank = rows // experts
    if not (rows == lora_B.shape[1] and rank == stated):
        raise UsageError(
            f"In {path} the rank of {name!r} is {rows} by lora_A, {lora_B.shape[1]} by lora_B, and {stated} by "
            f"{CONFIG}: it is no plain LoRA of one rank. (In a convolution with groups, PEFT's is another function.)"
        )
    alpha = of_layer(config.get("alpha_pattern"), name, config["lora_alpha"], tails)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LayerFactors(
        name=name,
        lora_A=lora_A,
        lora_B_t=from_peft(lora_B, experts),
        ranks=(rank,) * experts,
        max_rank=rank,
        scale=scale,
        alpha=alpha,
    )


def differs_in_peft(convolution: nn.Conv2d) -> bool:
    """Whether PEFT's A lacks a setting of the convolution, so that its LoRA is another function."""
    return convolution.dilation != (1, 1) or convolution.padding_mode != "zeros"


def of_layer(patterns: Mapping[str, Any] | None, name: str, otherwise: Any, known: NamePatterns) -> Any:
    """The value of the first pattern that matches a name, or ``otherwise``."""
    return next((value for key, value in (patterns or {}).items() if known.matches(key, name)), otherwise)
