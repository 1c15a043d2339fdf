"""A dry run: what a configuration adapts, trains whole and leaves frozen, with parameter counts."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from lit_sparse.adapters.base import Adapter, LowRankAdapter
from lit_sparse.adapters.injection import adapters_in
from lit_sparse.adapters.survey import left_out
from lit_sparse.errors import UsageError
from lit_sparse.methods.method import Method


def describe(model: nn.Module, method: Method | None = None) -> str:
    """List what of ``model`` is adapted, trained whole, and left as it is.

    Args:
        model: Model after injection; on the meta device it costs no memory.
        method: The method that was injected, for its goal.

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
    adapted = [
        (name, _kind_of(adapter), sum(p.numel() for p in adapter.parameters(recurse=False)))
        for name, adapter in adapters.items()
    ]
    in_adapters = sum(count for _, _, count in adapted)
    in_head = sum(count for _, count in whole)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    goal = method.goal(list(adapters.values())) if method is not None else None
    share = (in_adapters + in_head) / (in_adapters + in_head + frozen)
    return "\n".join(
        [
            *_table(f"Adapted: {len(adapters)} layers", adapted),
            *_table("Trained whole", [(name.rpartition(".")[0] or name, "trained whole", n) for name, n in whole]),
            *_table("Left as they are", [(name, reason, None) for name, reason in left_out(model).items()]),
            f"{in_adapters:,} adapter and {in_head:,} other parameters are trained, {share:.2%} of all; {frozen:,} are "
            "frozen.",
            *([] if goal is None else [goal]),
        ]
    )


def _kind_of(adapter: Adapter) -> str:
    shape = f"{adapter.in_features} → {adapter.out_features}"
    if not isinstance(adapter, LowRankAdapter):
        return f"{type(adapter).__name__.removesuffix('Linear')} {shape}, {adapter.size:,} entries"
    experts = f"{adapter.copies} × " if adapter.copies > 1 else ""
    gated = ", gated" if adapter.gate is not None else ""
    kind = type(adapter).__name__.removeprefix("LowRank")
    return f"{kind} {experts}{shape}, rank {adapter.rank}{gated}"


def _table(title: str, layers: Iterable[tuple[str, str, int | None]]) -> list[str]:
    """A line for all layers that differ only in the numbers in their names, in the order of the first.

    Args:
        title: Above the table.
        layers: Name, description and number of parameters of each layer.
    """
    groups: dict[tuple[str, str], list[tuple[str, int | None]]] = {}
    for name, what, count in layers:
        groups.setdefault((re.sub(r"(?<![^.])\d+(?![^.])", "*", name), what), []).append((name, count))
    rows = []
    for (pattern, what), members in groups.items():
        names = {name for name, _ in members}
        counts = [count for _, count in members if count is not None]
        shown = pattern if len(names) > 1 else members[0][0]
        rows.append([shown, f"× {len(names)}" if len(names) > 1 else "", f"{sum(counts):,}" if counts else "", what])
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"  {n:<{widths[0]}}  {c:>{widths[1]}}  {p:>{widths[2]}}  {what}".rstrip() for n, c, p, what in rows]
    return [title, *lines, ""]
