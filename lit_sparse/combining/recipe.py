"""What is added up, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lit_sparse.functional.combining import Rule


@dataclass(frozen=True)
class Recipe:
    """Arguments of :func:`~lit_sparse.combine`, checked.

    Args:
        rule: How the sources are added up.
        sources: As the user named them.
        weights: Of each source.
        density: For TIES and DARE.
        seed: For DARE.
        budget: For low-rank adapters; None: no limit.
        head: The source whose head is kept; None: no source has one.
    """

    rule: Rule
    sources: Sequence[str]
    weights: Sequence[float]
    density: float
    seed: int
    budget: float | str | None
    head: str | None

    def record(self) -> dict[str, Any]:
        """Plain values for metadata and cards, without what does not count for the rule."""
        found: dict[str, Any] = {"rule": self.rule, "sources": list(self.sources), "weights": list(self.weights)}
        found |= {"density": self.density} if self.rule in ("ties", "dare") else {}
        found |= {"seed": self.seed} if self.rule == "dare" else {}
        found |= {"budget": self.budget} if self.budget is not None else {}
        return found | ({"head": self.head} if self.head is not None else {})
