"""Ask a model all prompts of edit requests, and compute the metrics of its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torchmetrics.text import Perplexity
from transformers import PreTrainedTokenizerBase

from lit_sparse.data.chat_template import ChatTemplate
from lit_sparse.data.padding import IGNORED
from lit_sparse.data.tokenizers import Prompt, open_ended, prompt_tokens
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
    Scored,
)
from lit_sparse.editing.requests import EditRequest, Probe
from lit_sparse.editing.teacher_forcing import batches, encode, predict
from lit_sparse.errors import UsageError, parse_json
from lit_sparse.modules.language_modeling import WITHOUT_SAMPLING, continuation

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
    ) -> None:
        if chat_template and not tokenizer.chat_template:
            raise UsageError(
                f"chat_template is true, and the tokenizer {tokenizer.name_or_path!r} has none: set it to false."
            )
        self._model, self._tokenizer = model, tokenizer
        self._generated_tokens, self._chat_template = generated_tokens, chat_template
        self._fluency_tokens, self._batch_size = fluency_tokens, batch_size
        self._texts = [] if texts is None else _read_texts(texts, tokenizer)
        requests = list(requests)
        asked = sorted({kind for request in requests for kind in request.portability})
        locality = Locality(sorted({kind for request in requests for kind in request.locality}))
        names = ("edit_success", "rephrase", *Portability(asked).names, *locality.names)
        self.names = (
            *(*names[: -len(locality.names)], *FirstNamePortability(asked).names, *locality.names),
            *(_named("generated", name) for name in names),
            *(_named("contained", name) for name in names[: -len(locality.names)]),
            *("fluency", "perplexity"),
        )
        """All metrics that a request may have."""

    def unedited(self, questions: Questions) -> Unedited:
        """The model's answers to unrelated prompts; to be called before an edit."""
        kinds = [prompts for request in questions.locality for prompts in request.values()]
        places = [place for prompts in kinds for names in prompts for place in names]
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
        written = self._written(questions, range(len(questions.rows)))

        def forced(place: int) -> Answer:
            return Answer(predicted[place], before.predicted.get(place, questions.rows[place].answer))

        def exact(place: int) -> Continuation:
            return Continuation(written[place], before.written.get(place, questions.pairs[place][1]))

        def contained(place: int) -> Continuation:
            return exact(place)._replace(contained=True)

        texts = [] if answers_only or not self._fluency_tokens else self._fluent(questions)
        perplexity = {} if answers_only or not self._texts else {"perplexity": self.perplexity()}
        measured = []
        for i in range(len(questions.requests)):
            row = _scores(questions, i, forced)
            row |= FirstNamePortability.scores(_answers(questions.portability[i], forced))
            if written:
                row |= {_named("generated", name): value for name, value in _scores(questions, i, exact).items()}
                found = _scores(questions, i, contained)
                row |= {_named("contained", name): found[name] for name in found if not name.startswith(Locality.name)}
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

    def answers(self, prompts: Sequence[str]) -> list[str]:
        """What the model writes after each prompt: greedily, to the end of the first line that is not blank.

        It also ends with the text or turn, and after ``generated_tokens``.
        """
        asked: list[Prompt] = [[{"role": "user", "content": p}] if self._chat_template else p for p in prompts]
        rows = [prompt_tokens(self._tokenizer, prompt) for prompt in asked]
        ends = {self._tokenizer.eos_token_id}
        if self._chat_template:
            ends.add(ChatTemplate(self._tokenizer).end_id)
        return [
            text.lstrip().partition("\n")[0].rstrip() for text in self._continued(rows, self._generated_tokens, ends)
        ]

    def _written(self, questions: Questions, places: Iterable[int]) -> dict[int, str]:
        if not self._generated_tokens:
            return {}
        prompts = {place: questions.pairs[place][0] for place in places}
        distinct = list(dict.fromkeys(prompts.values()))
        text = dict(zip(distinct, self.answers(distinct), strict=True))
        return {place: text[prompt] for place, prompt in prompts.items()}

    def _fluent(self, questions: Questions) -> list[str]:
        """The model's continuation of each request's prompt."""
        rows = open_ended(self._tokenizer, [request.prompt for request in questions.requests])
        return self._continued(rows, self._fluency_tokens, set())

    @torch.no_grad()
    def _continued(self, rows: list[list[int]], max_new_tokens: int, ends: set[int | None]) -> list[str]:
        """Greedy continuations of rows of tokens, each up to the first of the tokens in ``ends``."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        new: list[list[int]] = []
        for batch in batches(self._model, self._tokenizer, [rows[i] for i in order], self._batch_size, left=True):
            new += continuation(self._model, batch, max_new_tokens, num_beams=1, **WITHOUT_SAMPLING).tolist()
        kept = [ids[: next((i for i, token in enumerate(ids) if token in ends), None)] for ids in new]
        texts = [str(self._tokenizer.decode(ids, skip_special_tokens=True)) for ids in kept]
        by_row = dict(zip(order, texts, strict=True))
        return [by_row[i] for i in range(len(rows))]


def _named(how: str, metric: str) -> str:
    """``generated_success`` for ``edit_success``, ``generated_rephrase`` for ``rephrase``, and so on."""
    return f"{how}_{metric.removeprefix('edit_')}"


def _answers(kinds: Mapping[str, list[list[int]]], answer: Callable[[int], Scored]) -> dict[str, list[list[Scored]]]:
    return {kind: [[answer(place) for place in names] for names in prompts] for kind, prompts in kinds.items()}


def _scores(questions: Questions, i: int, answer: Callable[[int], Scored]) -> dict[str, float]:
    """The metrics of request ``i`` by one kind of answer."""
    return {
        **EditSuccess.scores(answer(questions.edits[i])),
        **Rephrase.scores([answer(place) for place in questions.rephrases[i]]),
        **Portability.scores(_answers(questions.portability[i], answer)),
        **Locality.scores(_answers(questions.locality[i], answer)),
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


def _read_texts(file: str, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    try:
        rows = [parse_json(line) for line in Path(file).read_text(encoding="utf-8").split("\n") if line.strip()]
        texts = [row["text"] for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"texts must be JSON Lines with a column text; {file!r} cannot be read: {error!r}.") from error
    tokens = [ids[:_TEXT_LENGTH] for ids in open_ended(tokenizer, texts)] if texts else []
    tokens = [ids for ids in tokens if len(ids) > 1]
    if not tokens:
        raise UsageError(f"{file!r} has no text of at least two tokens to measure perplexity on.")
    return tokens
