"""A dry run: what a configuration adapts, trains whole, and leaves as it is, with parameter counts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.injection import adapters_in
from lit_sparse.adapters.selection import left_out
from lit_sparse.errors import UsageError


@dataclass(frozen=True)
class Part:
    """Layers of one name, but for the number of their block, that are treated alike.

    Args:
        name: Their name, with ``*`` for numbers that differ.
        count: How many they are.
        what: Kind, shape and rank; or why they are left out.
        parameters: Trained parameters of all of them.
    """

    name: str
    count: int
    what: str
    parameters: int


def describe(model: nn.Module) -> str:
    """Say what of ``model`` is adapted, trained whole, and left as it is.

    Args:
        model: Model after injection; on the meta device it costs no memory.

    Returns:
        A text of several lines.

    Raises:
        UsageError: If there is no adapter in ``model``.
    """
    adapters = dict(adapters_in(model))
    if not adapters:
        raise UsageError(f"{type(model).__name__} holds no adapter to list. Inject a method first.")
    own = {id(p) for adapter in adapters.values() for p in adapter.parameters(recurse=False)}
    whole = [(n, p.numel()) for n, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    adapted = _grouped((name, _adapter(adapter), _count(adapter)) for name, adapter in adapters.items())
    trained = _grouped((name.rpartition(".")[0] or name, "trained whole", count) for name, count in whole)
    left = _grouped((name, reason, 0) for name, reason in left_out(model).items())
    in_adapters = sum(part.parameters for part in adapted)
    in_head = sum(count for _, count in whole)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    share = (in_adapters + in_head) / (in_adapters + in_head + frozen)
    return "\n".join(
        [
            *_table(f"Adapted: {len(adapters)} layers", adapted, numbers=True),
            *_table("Trained whole", trained, numbers=True),
            *_table("Left as they are", left, numbers=False),
            f"{in_adapters:,} adapter and {in_head:,} other parameters are trained, {share:.2%} of all; {frozen:,} are "
            "frozen.",
        ]
    )


def _adapter(adapter: LowRankAdapter) -> str:
    experts = f"{adapter.copies} × " if adapter.copies > 1 else ""
    gated = ", gated" if adapter.gate is not None else ""
    kind = type(adapter).__name__.removeprefix("LowRank")
    return f"{kind} {experts}{adapter.in_features} → {adapter.out_features}, rank {adapter.rank}{gated}"


def _count(adapter: LowRankAdapter) -> int:
    return sum(p.numel() for p in adapter.parameters(recurse=False))


def _grouped(rows: Iterator[tuple[str, str, int]]) -> list[Part]:
    """One part for all rows that are alike but for the numbers in their names, in the order of the first."""
    groups: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for name, what, parameters in rows:
        groups.setdefault((re.sub(r"(?<![^.])\d+(?![^.])", "*", name), what), []).append((name, parameters))
    parts = []
    for (pattern, what), members in groups.items():
        names = dict.fromkeys(name for name, _ in members)
        shown = pattern if len(names) > 1 else next(iter(names))
        parts.append(Part(shown, len(names), what, sum(parameters for _, parameters in members)))
    return parts


def _table(title: str, parts: list[Part], numbers: bool) -> list[str]:
    if not parts:
        return []
    rows = [
        [part.name, f"× {part.count}" if part.count > 1 else "", f"{part.parameters:,}" if numbers else "", part.what]
        for part in parts
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        f"  {name:<{widths[0]}}  {count:>{widths[1]}}  {parameters:>{widths[2]}}  {what}"
        for name, count, parameters, what in rows
    ]
    return [title, *(re.sub(r" +$", "", line) for line in lines), ""]
