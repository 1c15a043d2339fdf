"""Ask a model all prompts of edit requests, and compute the metrics of its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torchmetrics.text import Perplexity
from transformers import PreTrainedTokenizerBase

from lit_sparse.data.padding import IGNORED
from lit_sparse.data.tokenizers import open_ended
from lit_sparse.editing.metrics import (
    Answer,
    Continuation,
    EditSuccess,
    FirstNamePortability,
    Fluency,
    Locality,
    Portability,
    Rephrase,
    RequestMean,
    Samples,
    Scored,
)
from lit_sparse.editing.requests import EditRequest, Probe
from lit_sparse.editing.teacher_forcing import batches, encode, predict, read_texts
from lit_sparse.editing.writing import SAMPLING, Writer

_TEXT_LENGTH = 128  # tokens of a text that its perplexity is measured on


class Questions:
    """All prompts of some requests with their answers, in tokens.

    Args:
        tokenizer: Tokenizer of the model.
        requests: The requests.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest]) -> None:
        self.requests = list(requests)
        self.pairs: list[tuple[str, str]] = []
        """Prompts with an answer; the attributes below hold indices into this list, and into ``rows``."""
        self.edits = [self._add(r.prompt, [r.target_new])[0] for r in requests]
        self.rephrases = [[self._add(prompt, [r.target_new])[0] for prompt in r.rephrases] for r in requests]
        self.portability = [self._add_kinds(r.portability, None) for r in requests]
        # Whether the model says the same as before is asked of one name only.
        self.locality = [self._add_kinds(r.locality, 1) for r in requests]
        self.rows = encode(tokenizer, self.pairs)
        """The pairs in tokens."""

    @property
    def locality_places(self) -> list[int]:
        """Indices of the pairs that have nothing to do with an edit."""
        kinds = [prompts for request in self.locality for prompts in request.values()]
        return [place for prompts in kinds for names in prompts for place in names]

    def _add(self, prompt: str, answers: Sequence[str]) -> list[int]:
        first = len(self.pairs)
        self.pairs += [(prompt, answer) for answer in answers]
        return list(range(first, len(self.pairs)))

    def _add_kinds(self, kinds: Mapping[str, Sequence[Probe]], names: int | None) -> dict[str, list[list[int]]]:
        return {kind: [self._add(p.prompt, p.answers[:names]) for p in probes] for kind, probes in kinds.items()}


class Unedited(NamedTuple):
    """What a model answers before an edit, by the index of an unrelated answer.

    Args:
        predicted: Its predictions in the places of the answer's tokens.
        written: What it writes after the prompt; empty if that is not measured.
    """

    predicted: Mapping[int, list[int]]
    written: Mapping[int, str]


class Measurer:
    """Measures a model on edit requests.

    Args:
        model: A causal language model.
        tokenizer: Tokenizer of the model.
        requests: All requests of the run; their kinds of probes name the metrics.
        fluency_tokens: Tokens to generate after a prompt; 0: none.
        texts: File of texts for perplexity, or None.
        batch_size: Prompts per batch.
        generated_tokens: Tokens to generate, at most, in place of an answer; 0: answers are not generated.
        chat_template: Whether these prompts are turns of a user.
        generated_samples: Random answers to generate for each prompt, beside the greedy one.
        seed: Seed of these, to which the number of the first request that is measured is added.

    Raises:
        UsageError: If the file of texts cannot be read, or there is no chat template.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        requests: Iterable[EditRequest],
        fluency_tokens: int,
        texts: str | None,
        batch_size: int,
        generated_tokens: int = 0,
        chat_template: bool = False,
        generated_samples: int = 0,
        seed: int = 0,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._writer = Writer(model, tokenizer, batch_size, generated_tokens, chat_template)
        self._sampler = Writer(model, tokenizer, max(1, generated_samples), generated_tokens, chat_template)
        self._fluency_tokens, self._batch_size = fluency_tokens, batch_size
        self._samples, self._seed = generated_samples, seed
        self._texts = [] if texts is None else read_texts(texts, tokenizer, _TEXT_LENGTH)
        requests = list(requests)
        asked = sorted({kind for request in requests for kind in request.portability})
        locality = Locality(sorted({kind for request in requests for kind in request.locality}))
        names = ("edit_success", "rephrase", *Portability(asked).names)
        self.names = (
            *(*names, *FirstNamePortability(asked).names, *locality.names),
            *(_named("generated", name) for name in (*names, *locality.names)),
            *(_named(how, name) for how in ("contained", "sampled", "sampled_contained") for name in names),
            *("fluency", "perplexity"),
        )
        """All metrics that a request may have."""

    def unedited(self, questions: Questions) -> Unedited:
        """The model's answers to unrelated prompts; to be called before an edit."""
        places = questions.locality_places
        rows = [questions.rows[place] for place in places]
        predicted = predict(self._model, self._tokenizer, rows, self._batch_size)
        written = self._written(questions, places)
        return Unedited(dict(zip(places, predicted, strict=True)), written)

    def measure(self, questions: Questions, before: Unedited, answers_only: bool = False) -> list[dict[str, float]]:
        """The metrics of every request, by name.

        Args:
            questions: Questions of the requests.
            before: Result of :meth:`unedited`.
            answers_only: Leave fluency and perplexity out.
        """
        predicted = predict(self._model, self._tokenizer, questions.rows, self._batch_size)
        written, drawn = self._written(questions, range(len(questions.rows))), self._drawn(questions)

        def forced(place: int) -> Answer:
            return Answer(predicted[place], before.predicted.get(place, questions.rows[place].answer))

        def exact(place: int) -> Continuation:
            return Continuation(written[place], before.written.get(place, questions.pairs[place][1]))

        def contained(place: int) -> Continuation:
            return exact(place)._replace(contained=True)

        def sampled(place: int) -> Samples:
            return Samples([Continuation(text, questions.pairs[place][1]) for text in drawn[place]])

        def sampled_contained(place: int) -> Samples:
            return Samples([one._replace(contained=True) for one in sampled(place).drawn])

        texts = [] if answers_only or not self._fluency_tokens else self._fluent(questions)
        perplexity = {} if answers_only or not self._texts else {"perplexity": self.perplexity()}
        measured = []
        for i in range(len(questions.requests)):
            row = _scores(questions, i, forced)
            row |= FirstNamePortability.scores(_answers(questions.portability[i], forced))
            if written:
                row |= {_named("generated", name): value for name, value in _scores(questions, i, exact).items()}
            ways: dict[str, Callable[[int], Scored]] = {"contained": contained} if written else {}
            ways |= {"sampled": sampled, "sampled_contained": sampled_contained} if drawn else {}
            for how, answer in ways.items():
                row |= {_named(how, name): value for name, value in _scores_of_edit(questions, i, answer).items()}
            measured.append({**row, **(Fluency.scores(texts[i]) if texts else {}), **perplexity})
        return measured

    @torch.no_grad()
    def perplexity(self) -> float:
        """Perplexity of the texts: e to the mean loss of their tokens."""
        # Not synchronized: every process has edits of its own. The annotation of torchmetrics (1.9) is wrong.
        metric = Perplexity(ignore_index=IGNORED, sync_on_compute=False)  # type: ignore[arg-type]
        metric = metric.to(self._model.device)
        for batch in batches(self._model, self._tokenizer, self._texts, self._batch_size):
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
            metric.update(self._model(**batch, use_cache=False).logits[:, :-1].float(), labels[:, 1:])
        return float(metric.compute())

    def _drawn(self, questions: Questions) -> dict[int, list[str]]:
        """Random answers by place: the same ones in every run, for one prompt at a time is answered."""
        if not self._samples:
            return {}
        # Locality is asked of greedy answers alone: random ones differ without an edit, too.
        unrelated = set(questions.locality_places)
        prompts = {i: prompt for i, (prompt, _) in enumerate(questions.pairs) if i not in unrelated}
        with isolate_rng():
            torch.manual_seed(self._seed + questions.requests[0].index)
            answers = {p: self._sampler.answers([p] * self._samples, SAMPLING) for p in dict.fromkeys(prompts.values())}
        return {i: answers[prompt] for i, prompt in prompts.items()}

    def _written(self, questions: Questions, places: Iterable[int]) -> dict[int, str]:
        if not self._writer.max_new_tokens:
            return {}
        prompts = {place: questions.pairs[place][0] for place in places}
        distinct = list(dict.fromkeys(prompts.values()))
        text = dict(zip(distinct, self._writer.answers(distinct), strict=True))
        return {place: text[prompt] for place, prompt in prompts.items()}

    def _fluent(self, questions: Questions) -> list[str]:
        """The model's continuation of each request's prompt."""
        rows = open_ended(self._tokenizer, [request.prompt for request in questions.requests])
        return self._writer.continuations(rows, self._fluency_tokens, set())


def _named(how: str, metric: str) -> str:
    """``generated_success`` for ``edit_success``, ``generated_rephrase`` for ``rephrase``, and so on."""
    return f"{how}_{metric.removeprefix('edit_')}"


def _answers(kinds: Mapping[str, list[list[int]]], answer: Callable[[int], Scored]) -> dict[str, list[list[Scored]]]:
    return {kind: [[answer(place) for place in names] for names in prompts] for kind, prompts in kinds.items()}


def _scores(questions: Questions, i: int, answer: Callable[[int], Scored]) -> dict[str, float]:
    """The metrics of request ``i`` by one kind of answer."""
    unrelated = Locality.scores(_answers(questions.locality[i], answer))
    return {**_scores_of_edit(questions, i, answer), **unrelated}


def _scores_of_edit(questions: Questions, i: int, answer: Callable[[int], Scored]) -> dict[str, float]:
    """The same without locality."""
    return {
        **EditSuccess.scores(answer(questions.edits[i])),
        **Rephrase.scores([answer(place) for place in questions.rephrases[i]]),
        **Portability.scores(_answers(questions.portability[i], answer)),
    }


def summarize(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Metric → ``mean``, ``standard_error`` (None for a single request) and number of ``requests``."""
    metric = RequestMean(names, sync_on_compute=False)  # one process has the rows of all
    metric.update({name: row[name] for name in names if name in row} for row in rows)
    means, errors = metric.compute(), metric.standard_errors()
    counts = dict(zip(metric.names, metric.count.tolist(), strict=True))
    return {
        name: {
            "mean": float(means[name]),
            "standard_error": float(errors[name]) if counts[name] > 1 else None,
            "requests": int(counts[name]),
        }
        for name in names
        if counts[name]
    }


def summary_of(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """The metrics of a run, as ``figures``, and the cost of an edit."""
    return {
        "figures": summarize(rows, names),
        **{f"mean_{name}": fmean(row[name] for row in rows) for name in ("steps", "changed", "changed_share")},
        "seconds_per_edit": fmean(row["seconds"] for row in rows),
        "share_outside_of_steps": 1 - sum(r["step_seconds"] for r in rows) / sum(r["seconds"] for r in rows),
    }


def text_table(summary: Mapping[str, Any]) -> str:
    """The summary of a run as text."""
    lines = [f"{'':<36} {'mean':>7} {'± s.e.':>8} {'requests':>9}"]
    for name, metric in summary["figures"].items():
        error = metric["standard_error"]
        spread = "" if error is None else f"{error:.4f}"
        lines.append(f"{name:<36} {metric['mean']:>7.4f} {spread:>8} {metric['requests']:>9}")
    lines.append(
        f"Mean per edit: {summary['mean_changed']:,.0f} entries changed ({summary['mean_changed_share']:.2%} of the "
        f"weights in question), {summary['mean_steps']:.1f} steps, {summary['seconds_per_edit']:.2f} s "
        f"({summary['share_outside_of_steps']:.1%} outside of the steps)."
    )
    return "\n".join(lines)
