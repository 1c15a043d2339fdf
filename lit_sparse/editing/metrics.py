"""Metrics of edits: whether a fact changed, and whether anything else did."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_sparse.errors import UsageError

_WORDS = re.compile(r"\w+|[^\w\s]")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


class Scored(Protocol):
    """An answer with its share of what is right."""

    @property
    def share(self) -> float:
        """In [0, 1]."""


class Answer(NamedTuple):
    """A model's predictions under teacher forcing, token by token, and the tokens they are compared with.

    Args:
        predicted: One token for each token of the answer.
        expected: As many tokens: the answer's own, or those that another model predicts.
    """

    predicted: Sequence[int]
    expected: Sequence[int]

    @property
    def share(self) -> float:
        """Share of equal tokens, in [0, 1]; a ValueError unless both have the same number of tokens, at least one."""
        return fmean(float(a == b) for a, b in zip(self.predicted, self.expected, strict=True))


class Continuation(NamedTuple):
    """What a model writes after a prompt on its own, and the text that it is compared with.

    Args:
        text: The model's continuation.
        expected: The answer, or what another model writes.
        contained: Whether it is enough that ``expected`` occurs in ``text``, as whole words.
    """

    text: str
    expected: str
    contained: bool = False

    @property
    def share(self) -> float:
        """1 if the texts match after :func:`normalized`, else 0."""
        text, expected = normalized(self.text), normalized(self.expected)
        return float(f" {expected} " in f" {text} " if self.contained else expected == text)


class Samples(NamedTuple):
    """Several continuations of a prompt, drawn at random.

    Args:
        drawn: At least one.
    """

    drawn: Sequence[Continuation]

    @property
    def share(self) -> float:
        """Share of them that match, in [0, 1]."""
        return fmean(one.share for one in self.drawn)


def normalized(text: str) -> str:
    """A text in lower case, without punctuation, articles and surplus spaces.

    Source:
        Rajpurkar et al. 2016 (arXiv:1606.05250): the script evaluate-v1.1.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def ngram_entropy(words: Sequence[str], n: int) -> float:
    """Entropy of the n-grams of a text, in bits; 0 for fewer than n words."""
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    total = sum(counts.values())
    return 0.0 - sum(c / total * math.log2(c / total) for c in counts.values())  # not -0.0 for one n-gram


def fluency(text: str) -> float:
    """Mean of the bigram and trigram entropies, weighted by 2/3 and 4/3, in bits: low for text that repeats itself.

    A word is a run of letters and digits, or one punctuation mark.

    Source:
        Zhang et al. 2018 (arXiv:1809.05972) with the weights of Meng et al. 2022 (ROME, arXiv:2202.05262), as EasyEdit
        computes it. Published tables often multiply it by 100.
    """
    words = _WORDS.findall(text)
    return (ngram_entropy(words, 2) * 2 / 3 + ngram_entropy(words, 3) * 4 / 3) / 2


class RequestMean(Metric):
    """Means over edit requests; the base of all editing metrics.

    A request may lack a metric; each mean is over the requests that have it, and NaN if none has. States are sums, so
    processes add up.

    Args:
        names: Names of the metrics; None: those of the class.
    """

    full_state_update = False
    names: tuple[str, ...] = ()
    total: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self, names: Sequence[str] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.names = self.names if names is None else tuple(names)
        for state in ("total", "squares", "count"):
            self.add_state(state, torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")

    @classmethod
    def scores(cls, request: Any) -> Mapping[str, float]:
        """The metrics of one request, by name. Sub-classes compute them from predictions."""
        return request  # type: ignore[no-any-return]

    def update(self, requests: Iterable[Any]) -> None:
        """Add requests.

        Args:
            requests: One argument of :meth:`scores` for each request.

        Raises:
            UsageError: If a request has a metric of another name.
        """
        for request in requests:
            for name, value in self.scores(request).items():
                if name not in self.names:
                    raise UsageError(f"{type(self).__name__} has the metrics {list(self.names)}, but not {name!r}.")
                place = self.names.index(name)
                self.total[place] += value
                self.squares[place] += value**2
                self.count[place] += 1

    def compute(self) -> dict[str, Tensor]:
        """Name → mean."""
        return dict(zip(self.names, (self.total / self.count).unbind(), strict=True))

    def standard_errors(self) -> dict[str, Tensor]:
        """Name → standard error of the mean, s / √n with n − 1 in s; NaN for fewer than two requests."""
        spread = (self.squares - self.total**2 / self.count).clamp(min=0) / (self.count - 1)
        errors = torch.where(self.count > 1, (spread / self.count).sqrt(), torch.nan)
        return dict(zip(self.names, errors.unbind(), strict=True))


class EditSuccess(RequestMean):
    """Share of the new answer's tokens that the edited model predicts, given the prompt and the tokens before.

    Source:
        The definition of EasyEdit (Wang et al. 2023, arXiv:2308.07269).
    """

    names = ("edit_success",)

    @classmethod
    def scores(cls, request: Scored) -> Mapping[str, float]:
        """From the answer to the request's prompt."""
        return {"edit_success": request.share}


class Rephrase(RequestMean):
    """Edit success on other wordings of the prompt, averaged over the wordings of a request."""

    names = ("rephrase",)

    @classmethod
    def scores(cls, request: Sequence[Scored]) -> Mapping[str, float]:
        """From one answer per wording; empty without other wordings."""
        return {"rephrase": fmean(answer.share for answer in request)} if request else {}


class Portability(RequestMean):
    """Share of predicted tokens in answers that follow from the new fact; of several accepted names, the best counts.

    It is averaged over the prompts of a kind (``portability/<kind>``), then over the kinds of a request
    (``portability``).

    EasyEdit's runner for KnowEdit asks for the first name only, as :class:`FirstNamePortability` does.

    Args:
        kinds: Kinds that requests may have.
    """

    name = "portability"

    def __init__(self, kinds: Sequence[str], **options: Any) -> None:
        super().__init__((self.name, *(f"{self.name}/{kind}" for kind in kinds)), **options)

    @classmethod
    def scores(cls, request: Mapping[str, Sequence[Sequence[Scored]]]) -> Mapping[str, float]:
        """From kind → prompts → one answer for each accepted name; kinds without prompts do not count."""
        means = {
            f"{cls.name}/{kind}": fmean(max(answer.share for answer in names) for names in prompts)
            for kind, prompts in request.items()
            if prompts
        }
        return {cls.name: fmean(means.values()), **means} if means else {}


class FirstNamePortability(Portability):
    """:class:`Portability` by the first name of each answer, as EasyEdit's runner for KnowEdit computes it.

    Args:
        kinds: Kinds that requests may have.
    """

    name = "portability_first_name"

    @classmethod
    def scores(cls, request: Mapping[str, Sequence[Sequence[Scored]]]) -> Mapping[str, float]:
        """As :meth:`Portability.scores`."""
        return super().scores({kind: [names[:1] for names in prompts] for kind, prompts in request.items()})


class Locality(Portability):
    """Share of the tokens of unrelated answers for which the edited model predicts what the unedited model predicts.

    It is averaged over the prompts of a kind (``locality/<kind>``), then over the kinds of a request (``locality``).
    The expected tokens of an answer are the unedited model's predictions; of several names the first is used.

    Args:
        kinds: Kinds that requests may have.
    """

    name = "locality"


class Fluency(RequestMean):
    """:func:`fluency` of the edited model's continuation of the prompt, in bits."""

    names = ("fluency",)

    @classmethod
    def scores(cls, request: str) -> Mapping[str, float]:
        """From the generated text, without the prompt."""
        return {"fluency": fluency(request)}
