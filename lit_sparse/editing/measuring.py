"""Ask a model everything that edit requests ask, and compare the answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.text import Perplexity
from transformers import PreTrainedTokenizerBase

from lit_sparse.data.instructions import IGNORED, PadPromptAndResponse
from lit_sparse.data.tokenizers import open_ended
from lit_sparse.editing.metrics import (
    Answer,
    EditSuccess,
    Fluency,
    Locality,
    Portability,
    Rephrase,
    RequestMean,
)
from lit_sparse.editing.requests import EditRequest
from lit_sparse.editing.teacher_forcing import encode, predict
from lit_sparse.errors import UsageError, parse_json
from lit_sparse.modules.language_modeling import most_likely_continuation

_TEXT_LENGTH = 128  # tokens of a text that its perplexity is measured on


class Questions:
    """All prompts of some requests with their answers, in tokens.

    Args:
        tokenizer: Of the model.
        requests: Whose prompts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest]) -> None:
        self.requests = list(requests)
        self._pairs: list[tuple[str, str]] = []
        self.edits = [self._place(r.prompt, [r.target_new])[0] for r in requests]
        self.rephrases = [[self._place(prompt, [r.target_new])[0] for prompt in r.rephrases] for r in requests]
        self.portability = [
            {kind: [self._place(p.prompt, p.answers) for p in probes] for kind, probes in r.portability.items()}
            for r in requests
        ]
        # Whether the model says the same as before can be asked of one name only.
        self.locality = [
            {kind: [self._place(p.prompt, p.answers[:1])[0] for p in probes] for kind, probes in r.locality.items()}
            for r in requests
        ]
        self.rows = encode(tokenizer, self._pairs)
        """Numbers in the other attributes are places in this list."""

    def _place(self, prompt: str, answers: Sequence[str]) -> list[int]:
        first = len(self._pairs)
        self._pairs += [(prompt, answer) for answer in answers]
        return list(range(first, len(self._pairs)))


class Measurer:
    """Measures a model by edit requests.

    Args:
        model: A causal language model.
        tokenizer: Of the model.
        requests: All that will be asked, for the kinds of their probes.
        fluency_tokens: Tokens to generate after a prompt; 0: none.
        texts: File of texts for perplexity, or None.
        batch_size: Prompts at a time.

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
        kinds: dict[str, set[str]] = {"portability": set(), "locality": set()}
        for request in requests:
            kinds["portability"] |= set(request.portability)
            kinds["locality"] |= set(request.locality)
        asked = (*Portability(sorted(kinds["portability"])).names, *Locality(sorted(kinds["locality"])).names)
        self.names = ("edit_success", "rephrase", *asked, "fluency", "perplexity")
        """Of all figures that a request may have."""

    def unedited(self, questions: Questions) -> dict[int, list[int]]:
        """What the model predicts of the unrelated answers alone, by their places: to be asked before an edit."""
        places = [place for kinds in questions.locality for probes in kinds.values() for place in probes]
        rows = [questions.rows[place] for place in places]
        return dict(zip(places, predict(self._model, self._tokenizer, rows, self._batch_size), strict=True))

    def measure(
        self, questions: Questions, before: dict[int, list[int]], answers_only: bool = False
    ) -> list[dict[str, float]]:
        """Name to figure of every request, with those that it has.

        Args:
            questions: Of the requests.
            before: What :meth:`unedited` gave.
            answers_only: Leave fluency and perplexity out.
        """
        predicted = predict(self._model, self._tokenizer, questions.rows, self._batch_size)

        def answer(place: int) -> Answer:
            return Answer(predicted[place], questions.rows[place].answer)

        texts = [] if answers_only or not self._fluency_tokens else self._continuations(questions)
        perplexity = {} if answers_only or not self._texts else {"perplexity": self.perplexity()}
        measured = []
        for i in range(len(questions.requests)):
            kinds = questions.portability[i]
            follows = {k: [[answer(place) for place in names] for names in prompts] for k, prompts in kinds.items()}
            unrelated = {
                kind: [[Answer(predicted[place], before[place])] for place in probes]
                for kind, probes in questions.locality[i].items()
            }
            measured.append(
                {
                    **EditSuccess.figures(answer(questions.edits[i])),
                    **Rephrase.figures([answer(place) for place in questions.rephrases[i]]),
                    **Portability.figures(follows),
                    **Locality.figures(unrelated),
                    **(Fluency.figures(texts[i]) if texts else {}),
                    **perplexity,
                }
            )
        return measured

    @torch.no_grad()
    def perplexity(self) -> float:
        """Of the texts: e to the mean loss of their tokens."""
        # Not synchronized: every process has edits of its own. The annotation of torchmetrics (1.9) is wrong.
        metric = Perplexity(ignore_index=IGNORED, sync_on_compute=False)  # type: ignore[arg-type]
        metric = metric.to(self._model.device)
        for first in range(0, len(self._texts), self._batch_size):
            batch = self._padded(self._texts[first : first + self._batch_size], left=False)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
            metric.update(self._model(**batch, use_cache=False).logits[:, :-1].float(), labels[:, 1:])
        return float(metric.compute())

    @torch.no_grad()
    def _continuations(self, questions: Questions) -> list[str]:
        """What the model goes on with after each prompt, greedily."""
        prompts = open_ended(self._tokenizer, [request.prompt for request in questions.requests])
        texts: list[str] = []
        for first in range(0, len(prompts), self._batch_size):
            batch = self._padded(prompts[first : first + self._batch_size], left=True)
            new = most_likely_continuation(self._model, batch, self._fluency_tokens)
            texts += self._tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts

    def _padded(self, rows: Sequence[list[int]], left: bool) -> dict[str, Tensor]:
        padding = PadPromptAndResponse(int(self._tokenizer.pad_token_id), left=left)
        batch = padding([{"input_ids": row} for row in rows])
        return {key: value.to(self._model.device) for key, value in batch.items()}


def summarize(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Name of a figure to its ``mean``, ``standard_error`` (None for a single request) and number of ``requests``."""
    metric = RequestMean(names, sync_on_compute=False)  # rows are those of all processes, and only one has them
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
    """The means of a run as lines of text."""
    lines = [f"{'':<36} {'mean':>7} {'± s.e.':>8} {'requests':>9}"]
    for name, figure in summary["figures"].items():
        error = figure["standard_error"]
        spread = "" if error is None else f"{error:.4f}"
        lines.append(f"{name:<36} {figure['mean']:>7.4f} {spread:>8} {figure['requests']:>9}")
    lines.append(
        f"An edit changed {summary['mean_changed']:,.0f} entries ({summary['mean_changed_share']:.2%} of the weights "
        f"that it may), in {summary['mean_steps']:.1f} steps and {summary['seconds_per_edit']:.2f} s "
        f"({summary['share_outside_of_steps']:.1%} of it outside of the steps)."
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
        raise UsageError(f"{file!r} has no text of two tokens or more to measure perplexity on.")
    return tokens
