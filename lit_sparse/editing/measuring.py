"""Ask a model all prompts of edit requests, and compute the metrics of its answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torchmetrics.text import Perplexity
from transformers import PreTrainedTokenizerBase

from lit_sparse.data.padding import IGNORED
from lit_sparse.data.tokenizers import open_ended
from lit_sparse.editing.metrics import Answer, EditSuccess, Fluency, Locality, Portability, Rephrase, RequestMean
from lit_sparse.editing.requests import EditRequest, Probe
from lit_sparse.editing.teacher_forcing import batches, encode, predict
from lit_sparse.errors import UsageError, parse_json
from lit_sparse.modules.language_modeling import most_likely_continuation

_TEXT_LENGTH = 128  # tokens of a text that its perplexity is measured on


class Questions:
    """All prompts of some requests with their answers, in tokens.

    Args:
        tokenizer: Tokenizer of the model.
        requests: The requests.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest]) -> None:
        self.requests = list(requests)
        self._pairs: list[tuple[str, str]] = []
        self.edits = [self._add(r.prompt, [r.target_new])[0] for r in requests]
        self.rephrases = [[self._add(prompt, [r.target_new])[0] for prompt in r.rephrases] for r in requests]
        self.portability = [self._add_kinds(r.portability, None) for r in requests]
        # Whether the model says the same as before is asked of one name only.
        self.locality = [self._add_kinds(r.locality, 1) for r in requests]
        self.rows = encode(tokenizer, self._pairs)
        """Tokens; the other attributes hold indices into this list."""

    def _add(self, prompt: str, answers: Sequence[str]) -> list[int]:
        first = len(self._pairs)
        self._pairs += [(prompt, answer) for answer in answers]
        return list(range(first, len(self._pairs)))

    def _add_kinds(self, kinds: Mapping[str, Sequence[Probe]], names: int | None) -> dict[str, list[list[int]]]:
        return {kind: [self._add(p.prompt, p.answers[:names]) for p in probes] for kind, probes in kinds.items()}


class Measurer:
    """Measures a model on edit requests.

    Args:
        model: A causal language model.
        tokenizer: Tokenizer of the model.
        requests: All requests of the run; their kinds of probes name the metrics.
        fluency_tokens: Tokens to generate after a prompt; 0: none.
        texts: File of texts for perplexity, or None.
        batch_size: Prompts per batch.

    Raises:
        UsageError: If the file of texts cannot be read.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        requests: Iterable[EditRequest],
        fluency_tokens: int,
        texts: str | None,
        batch_size: int,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._fluency_tokens, self._batch_size = fluency_tokens, batch_size
        self._texts = [] if texts is None else _read_texts(texts, tokenizer)
        requests = list(requests)
        portability = Portability(sorted({kind for request in requests for kind in request.portability}))
        locality = Locality(sorted({kind for request in requests for kind in request.locality}))
        self.names = ("edit_success", "rephrase", *portability.names, *locality.names, "fluency", "perplexity")
        """All metrics that a request may have."""

    def unedited(self, questions: Questions) -> dict[int, list[int]]:
        """Index of an unrelated answer → the model's prediction; to be called before an edit."""
        kinds = [prompts for request in questions.locality for prompts in request.values()]
        places = [place for prompts in kinds for names in prompts for place in names]
        rows = [questions.rows[place] for place in places]
        return dict(zip(places, predict(self._model, self._tokenizer, rows, self._batch_size), strict=True))

    def measure(
        self, questions: Questions, before: Mapping[int, list[int]], answers_only: bool = False
    ) -> list[dict[str, float]]:
        """The metrics of every request, by name.

        Args:
            questions: Questions of the requests.
            before: Result of :meth:`unedited`.
            answers_only: Leave fluency and perplexity out.
        """
        predicted = predict(self._model, self._tokenizer, questions.rows, self._batch_size)

        def answer(place: int) -> Answer:
            return Answer(predicted[place], before.get(place, questions.rows[place].answer))

        def answers(kinds: dict[str, list[list[int]]]) -> dict[str, list[list[Answer]]]:
            return {k: [[answer(place) for place in names] for names in prompts] for k, prompts in kinds.items()}

        texts = [] if answers_only or not self._fluency_tokens else self._continuations(questions)
        perplexity = {} if answers_only or not self._texts else {"perplexity": self.perplexity()}
        return [
            {
                **EditSuccess.scores(answer(questions.edits[i])),
                **Rephrase.scores([answer(place) for place in questions.rephrases[i]]),
                **Portability.scores(answers(questions.portability[i])),
                **Locality.scores(answers(questions.locality[i])),
                **(Fluency.scores(texts[i]) if texts else {}),
                **perplexity,
            }
            for i in range(len(questions.requests))
        ]

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

    @torch.no_grad()
    def _continuations(self, questions: Questions) -> list[str]:
        """The model's greedy continuation of each request's prompt."""
        prompts = open_ended(self._tokenizer, [request.prompt for request in questions.requests])
        texts: list[str] = []
        for batch in batches(self._model, self._tokenizer, prompts, self._batch_size, left=True):
            new = most_likely_continuation(self._model, batch, self._fluency_tokens)
            texts += self._tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts


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
