"""Which layers of a backbone a method's ``target_modules`` mean."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from lit_sparse.adapters.layers import Layer
from lit_sparse.adapters.patterns import NamePatterns, matches_tail
from lit_sparse.adapters.survey import Candidate, survey
from lit_sparse.errors import UsageError


def select_layers(
    model: nn.Module,
    target_modules: str | Sequence[str],
    layers: int | Sequence[int] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    head: Collection[str] = (),
) -> dict[str, Layer]:
    """Choose the layers to adapt.

    Args:
        model: The backbone.
        target_modules: ``"all-linear"`` (every linear layer of the pretrained body but its output embeddings, the
            weights of experts included), another string: a regular expression that must match the full name, or a list
            of whole trailing name parts. Convolutions and embeddings are adapted when they are named.
        layers: Keep only these transformer blocks, or this one: the first number in a layer's name. None keeps all.
        exclude_modules: Left out of the choice: a regular expression or a list of trailing name parts.
        head: Names of the head modules that are trained whole and therefore not adapted.

    Returns:
        Full name to layer, in the order of ``model.named_modules()``; never empty.

    Raises:
        UsageError: If a pattern matches nothing, or something that cannot be adapted, ``layers`` holds a bool or a
            block that does not exist, or nothing is left.
    """
    candidates = survey(model, head)
    if not candidates:
        raise UsageError(f"{type(model).__name__} has no linear layer, convolution or embedding to adapt.")
    if target_modules == "all-linear":
        chosen = [n for n, c in candidates.items() if c.refusal is None and c.passed_over is None]
    else:
        chosen = _matched(model, "target_modules", target_modules, candidates)
    if exclude_modules is not None:
        excluded = set(_matched(model, "exclude_modules", exclude_modules, candidates))
        chosen = [n for n in chosen if n not in excluded]
    if layers is not None:
        chosen = _in_blocks(chosen, [layers] if isinstance(layers, int) else layers)
    if not chosen:
        raise UsageError(
            f"No layer of {type(model).__name__} is left to adapt after target_modules={target_modules!r}, "
            f"layers={layers!r} and exclude_modules={exclude_modules!r}. Its {_adaptable(candidates)}."
        )
    for name in chosen:
        refusal = candidates[name].refusal
        if refusal is not None:
            tail = ".".join(name.split(".")[-2:])
            raise UsageError(
                f"target_modules {target_modules!r} matches {name!r} of {type(model).__name__}, which {refusal}. "
                f"Leave it out, for example with exclude_modules={[tail]!r}."
            )
    return {name: candidates[name].layer for name in chosen}


def _matched(
    model: nn.Module, argument: str, patterns: str | Sequence[str], candidates: dict[str, Candidate]
) -> list[str]:
    """Names of the layers that match ``patterns``; every pattern must match one."""
    kind = type(model).__name__
    modules = {name: type(m) for name, m in model.named_modules() if name}
    known = dict.fromkeys([*modules, *candidates])
    chosen: set[str] = set()
    expressions = NamePatterns(argument)
    whole = isinstance(patterns, str)
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = [n for n in known if (expressions.matches(pattern, n) if whole else matches_tail(n, pattern))]
        layers = [candidates[n] for n in found if n in candidates]
        # Layers of the head are skipped if others match, too: many heads have a "dense".
        usable = [c.name for c in layers if argument == "exclude_modules" or not c.in_head]
        if usable:
            chosen.update(usable)
        elif layers:
            raise UsageError(
                f"{argument} {pattern!r} matches only the task head of {kind}, which is trained whole. Leave it out, "
                "or set train_head to false to adapt it instead."
            )
        elif found:
            types = sorted({modules[n].__name__ for n in found})
            raise UsageError(
                f"{argument} {pattern!r} matches modules of {kind} of type {types}, not linear layers. Its "
                f"{_adaptable(candidates)}."
            )
        else:
            how = (
                "Give a list of trailing name parts, or a regular expression that matches a full name"
                if whole
                else "Give whole trailing parts of a name, such as 'query' or 'attention.output.dense'"
            )
            raise UsageError(
                f"{argument} {pattern!r} matches no linear layer of {kind}, whose {_adaptable(candidates)}. {how}."
            )
    return [n for n in candidates if n in chosen]


def _in_blocks(names: list[str], layers: Sequence[int]) -> list[str]:
    if any(isinstance(number, bool) for number in layers):
        raise UsageError(
            f"layers takes the numbers of transformer blocks, such as 1 or [0, 1]; got {list(layers)}. Leave it out to "
            "adapt all."
        )
    block = {n: next((int(part) for part in n.split(".") if part.isdigit()), None) for n in names}
    present = {b for b in block.values() if b is not None}
    absent = sorted(set(layers) - present, key=str)
    if absent or not layers:
        raise UsageError(
            f"layers {absent or list(layers)} match no chosen layer; the chosen ones stand in blocks {sorted(present)}."
        )
    return [n for n in names if block[n] in set(layers)]


def _adaptable(candidates: dict[str, Candidate]) -> str:
    """``linear layers end in [...]``, and convolutions and embeddings if there are any."""
    leaves: dict[str, set[str]] = {}
    for name, candidate in candidates.items():
        leaves.setdefault(candidate.kind, set()).add(name.rpartition(".")[2])
    return ", ".join(f"{kind}s end in {sorted(names)}" for kind, names in leaves.items())
