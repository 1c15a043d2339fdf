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

    @classmethod
    def figures(cls, request: Any) -> Mapping[str, float]:
        """The figures that one request has, by name; sub-classes make them of what was predicted."""
        return request  # type: ignore[no-any-return]

    def update(self, requests: Iterable[Any]) -> None:
        """Add requests.

        Args:
            requests: Of each what :meth:`figures` takes.

        Raises:
            UsageError: If one has a figure of another name.
        """
        for request in requests:
            for name, value in self.figures(request).items():
                if name not in self.names:
                    raise UsageError(
                        f"{type(self).__name__} was made for the figures {list(self.names)}, not {name!r}."
                    )
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

    @classmethod
    def figures(cls, request: Answer) -> Mapping[str, float]:
        """Of the answer to the request's prompt."""
        return {"edit_success": request.share}


class Rephrase(RequestMean):
    """Edit success on other wordings of the prompt, the mean of those that a request has."""

    def __init__(self, **options: Any) -> None:
        super().__init__(("rephrase",), **options)

    @classmethod
    def figures(cls, request: Sequence[Answer]) -> Mapping[str, float]:
        """Of an answer to each wording; none, if there is no other wording."""
        return {"rephrase": fmean(answer.share for answer in request)} if request else {}


class Portability(RequestMean):
    """Share of the tokens predicted of answers that follow from the new fact; of several names, the best predicted.

    Averaged over the prompts of a kind, then over the kinds that a request has: ``portability``, and
    ``portability/<kind>`` for each kind.

    EasyEdit's scripts for KnowEdit ask for the first name only. Where an answer has several names, this figure is as
    high as theirs or higher, so the two cannot be compared; see the page on editing.

    Args:
        kinds: Those that requests may have.
    """

    name = "portability"

    def __init__(self, kinds: Sequence[str], **options: Any) -> None:
        super().__init__((self.name, *(f"{self.name}/{kind}" for kind in kinds)), **options)

    @classmethod
    def figures(cls, request: Mapping[str, Sequence[Sequence[Answer]]]) -> Mapping[str, float]:
        """Of the kinds, for each kind the prompts, for each prompt an answer for every name."""
        means = {
            f"{cls.name}/{kind}": fmean(max(answer.share for answer in names) for names in prompts)
            for kind, prompts in request.items()
            if prompts
        }
        return {cls.name: fmean(means.values()), **means} if means else {}


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

    @classmethod
    def figures(cls, request: str) -> Mapping[str, float]:
        """Of the text that was generated, without the prompt."""
        return {"fluency": fluency(request)}
