"""How well a fact was changed, and nothing else with it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_sparse.errors import UsageError

_WORDS = re.compile(r"\w+|[^\w\s]")


class Answer(NamedTuple):
    """What a model predicts under teacher forcing, token by token, and what it is compared with.

    Args:
        predicted: A token for each token of the answer.
        expected: As many: the answer's own, or those that another model predicts.
    """

    predicted: Sequence[int]
    expected: Sequence[int]

    @property
    def share(self) -> float:
        """Share of the tokens that are the same, in [0, 1]."""
        if len(self.predicted) != len(self.expected) or not self.expected:
            raise UsageError(
                f"An answer has as many predicted tokens as expected ones, and at least one; got {len(self.predicted)} "
                f"and {len(self.expected)}."
            )
        return fmean(float(a == b) for a, b in zip(self.predicted, self.expected, strict=True))


def ngram_entropy(words: Sequence[str], n: int) -> float:
    """Entropy, in bits, of the n-grams of some words; 0 for fewer than n."""
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0


def fluency(text: str) -> float:
    """Mean of the entropies of bigrams and trigrams, weighted by 2/3 and 4/3, in bits: low where text repeats itself.

    Words are runs of letters and digits, and signs one by one.

    Source:
        Zhang et al. 2018 (arXiv:1809.05972) with the weights of Meng et al. 2022 (ROME, arXiv:2202.05262), as EasyEdit
        computes it; tables there are often a hundred times this.
    """
    words = _WORDS.findall(text)
    return (ngram_entropy(words, 2) * 2 / 3 + ngram_entropy(words, 3) * 4 / 3) / 2


class RequestMean(Metric):
    """Means over edit requests of some figures, each over the requests that have it; the base of editing metrics.

    ``compute`` returns name to mean, NaN where no request has the figure. States are sums, so that processes add up.

    Args:
        names: Of the figures.
    """

    full_state_update = False
    total: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self, names: Sequence[str], **options: Any) -> None:
        super().__init__(**options)
        self.names = tuple(names)
        for state in ("total", "squares", "count"):
            self.add_state(state, torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, *requests: Mapping[str, float]) -> None:
        """Add requests, each with the figures that it has."""
        for request in requests:
            for name, value in request.items():
                place = self.names.index(name)
                self.total[place] += value
                self.squares[place] += value**2
                self.count[place] += 1

    def compute(self) -> dict[str, Tensor]:
        """Name to mean."""
        return dict(zip(self.names, (self.total / self.count).unbind(), strict=True))

    def standard_errors(self) -> dict[str, Tensor]:
        """Name to the mean's standard error, s / √n with n − 1 in s; NaN for fewer than two requests."""
        spread = (self.squares - self.total**2 / self.count).clamp(min=0) / (self.count - 1)
        errors = torch.where(self.count > 1, (spread / self.count).sqrt(), torch.nan)
        return dict(zip(self.names, errors.unbind(), strict=True))


class EditSuccess(RequestMean):
    """Share of the tokens of the new answer that the edited model predicts, given the prompt and those before.

    Source:
        The definition of EasyEdit (Wang et al. 2023, arXiv:2308.07269).
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(("edit_success",), **options)

    def update(self, answers: Iterable[Answer]) -> None:  # type: ignore[override]
        """Add requests.

        Args:
            answers: One for each request, to its prompt.
        """
        super().update(*({"edit_success": answer.share} for answer in answers))


class Rephrase(RequestMean):
    """Edit success on other wordings of the prompt, the mean of those that a request has."""

    def __init__(self, **options: Any) -> None:
        super().__init__(("rephrase",), **options)

    def update(self, requests: Iterable[Sequence[Answer]]) -> None:  # type: ignore[override]
        """Add requests.

        Args:
            requests: For each request an answer to each wording; one without any counts for nothing.
        """
        super().update(*({"rephrase": fmean(a.share for a in answers)} for answers in requests if answers))


class Portability(RequestMean):
    """Share of the tokens predicted of answers that follow from the new fact; of several names, the best predicted.

    Averaged over the prompts of a kind, then over the kinds that a request has: ``portability``, and
    ``portability/<kind>`` for each kind.

    Args:
        kinds: Those that requests may have.
    """

    name = "portability"

    def __init__(self, kinds: Sequence[str], **options: Any) -> None:
        super().__init__((self.name, *(f"{self.name}/{kind}" for kind in kinds)), **options)

    def update(self, requests: Iterable[Mapping[str, Sequence[Sequence[Answer]]]]) -> None:  # type: ignore[override]
        """Add requests.

        Args:
            requests: For each request the kinds, for each kind the prompts, for each prompt an answer for every name;
                one without any counts for nothing.
        """
        super().update(*(self._figures(kinds) for kinds in requests if any(kinds.values())))

    def _figures(self, kinds: Mapping[str, Sequence[Sequence[Answer]]]) -> dict[str, float]:
        means = {
            f"{self.name}/{kind}": fmean(max(answer.share for answer in names) for names in prompts)
            for kind, prompts in kinds.items()
            if prompts
        }
        return {self.name: fmean(means.values()), **means}


class Locality(Portability):
    """Share of the tokens of unrelated answers for which the edited model predicts what the unedited one does.

    Averaged over the prompts of a kind, then over the kinds that a request has: ``locality``, and ``locality/<kind>``.
    What is expected of an answer are the unedited model's predictions; of several names the first is taken.

    Args:
        kinds: Those that requests may have.
    """

    name = "locality"


class Fluency(RequestMean):
    """:func:`fluency` of what the edited model goes on with, in bits."""

    def __init__(self, **options: Any) -> None:
        super().__init__(("fluency",), **options)

    def update(self, texts: Iterable[str]) -> None:  # type: ignore[override]
        """Add requests.

        Args:
            texts: What was generated after the prompt of each request, without the prompt.
        """
        super().update(*({"fluency": fluency(text)} for text in texts))
