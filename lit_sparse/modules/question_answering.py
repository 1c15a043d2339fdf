"""Answer questions by a span of a given text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional.text import squad
from torchmetrics.utilities import dim_zero_cat
from transformers import AutoModelForQuestionAnswering

from lit_sparse.callbacks.measuring import Metrics
from lit_sparse.errors import UsageError, require_range
from lit_sparse.methods.method import Method
from lit_sparse.modules.base import SparseModule

_APART = ("question", "offsets", "null_positions", "row", "id", "context")  # columns that the model does not take


class QuestionAnswering(SparseModule):
    """Find the span of a context that answers a question.

    The answer to a question is the span, over all windows of its context, with the highest sum of the start logit of
    its first token and the end logit of its last, among spans of at most ``max_answer_length`` tokens.
    :class:`~lit_sparse.QuestionAnsweringData` documents the batches, and keeps the windows of a question in
    one batch. Evaluation logs

    - ``val_loss``: the model's loss, mean over all windows;
    - ``val_exact_match`` and ``val_f1``: SQuAD's metrics, as shares in [0, 1] where SQuAD prints percentages.
      The reference answer that fits best counts; a question without reference answers wants the empty one.

    Args:
        max_answer_length: Longest answer, in tokens. 30 is the value of BERT's SQuAD script.
        null_threshold: Answer nothing where the logits of the CLS token exceed those of the best span by more than
            this, in nats. None: 0 if the data has unanswerable questions, and else always give an answer.
        options: Further arguments of :class:`~lit_sparse.SparseModule`.

    Raises:
        UsageError: If an argument is outside its range, or the backbone cannot be loaded.
    """

    auto_class = AutoModelForQuestionAnswering

    def __init__(
        self,
        backbone: str | nn.Module,
        method: Method,
        *,
        max_answer_length: int = 30,
        null_threshold: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(backbone, method, **options)
        require_range("max_answer_length", max_answer_length, at_least=1)
        self.max_answer_length = max_answer_length
        self.null_threshold = null_threshold

    def _ask_data(self) -> None:
        if self.null_threshold is None and getattr(self._data, "unanswerable", False):
            self.null_threshold = 0.0
        # In the checkpoint, so that it answers alike without a data module.
        self.hparams.update(null_threshold=self.null_threshold)

    def make_metrics(self) -> Metrics:
        """The loss of the windows, and SQuAD's metrics."""
        return {**super().make_metrics(), "squad": SquadScores()}

    def measure(self, batch: dict[str, Any], metrics: Metrics, data: Any = None, name: str = "") -> None:  # noqa: ARG002
        """Update metrics with a batch of questions with ``answers``."""
        output = self._read(batch)
        if "answers" not in batch:
            raise UsageError("The rows have no answers, so nothing can be measured. Use predict for them.")
        windows = len(batch["question"])
        metrics["loss"].update(output.loss * windows, windows)
        metrics["squad"].update(batch["row"], self._answers(batch, output), batch["answers"])

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:  # noqa: ARG002
        """The ``id`` and the ``answer`` of each question, empty where there is none."""
        answers = self._answers(batch, self._read(batch))
        return {"id": batch["id"], "answer": answers}

    def _read(self, batch: dict[str, Any]) -> Any:
        missing = set(_APART) - set(batch)
        if missing:
            raise UsageError(
                "QuestionAnswering reads answers from batches such as those of QuestionAnsweringData; this one lacks "
                f"{sorted(missing)}."
            )
        return self(**{k: v for k, v in batch.items() if k not in (*_APART, "answers")})

    def _answers(self, batch: dict[str, Any], output: Any) -> list[str]:
        start, end, offsets = output.start_logits.float(), output.end_logits.float(), batch["offsets"]
        scores, first, last = best_spans(start, end, offsets[..., 0] >= 0, self.max_answer_length)
        window = torch.arange(len(scores), device=scores.device)
        begins, ends = offsets[window, first, 0], offsets[window, last, 1]
        nulls = (start + end)[window, batch["null_positions"]]
        # The rest is text: what it needs is read once for all questions.
        scores, begins, ends, nulls, questions = (t.cpu() for t in (scores, begins, ends, nulls, batch["question"]))
        answers = []
        for number, context in enumerate(batch["context"]):
            own = (questions == number).nonzero()[:, 0]
            best = own[scores[own].argmax()]
            # A question has no answer if that holds for all of its windows: the least certain of them decides.
            absent = self.null_threshold is not None and nulls[own].min() - scores[best] > self.null_threshold
            answers.append("" if absent else context[begins[best] : ends[best]].strip())
        return answers


class SquadScores(Metric):
    """Exact match and F1 of SQuAD over a whole set, each question counted once.

    Answers are compared without case, punctuation, articles and surplus spaces. All processes gather their scores with
    the numbers of the questions, so that questions which a distributed sampler repeats do not count twice.

    Source:
        Rajpurkar et al. 2016 (arXiv:1606.05250), section 6.1, and the scripts evaluate-v1.1 and evaluate-v2.0. In the
        latter, the empty string is the only right answer to an unanswerable question.
    """

    full_state_update = False
    rows: list[Tensor]
    scores: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", [], dist_reduce_fx="cat")
        self.add_state("scores", [], dist_reduce_fx="cat")

    def update(self, rows: Tensor, predicted: list[str], answers: list[list[str]]) -> None:
        """Score some questions.

        Args:
            rows: Numbers of the questions in their set, shape (questions,).
            predicted: An answer for each.
            answers: The right answers of each; none if the question has no answer.
        """
        found = [
            squad(
                {"id": "0", "prediction_text": guess},
                {"id": "0", "answers": {"text": right or [""], "answer_start": []}},
            )
            for guess, right in zip(predicted, answers, strict=True)
        ]
        scores = torch.tensor([[float(score["exact_match"]), float(score["f1"])] for score in found])
        self.scores.append(scores.to(rows.device) / 100)
        self.rows.append(rows)

    def compute(self) -> dict[str, Tensor]:
        """``exact_match`` and ``f1``, in [0, 1]."""
        scores = dim_zero_cat(self.scores)
        numbers = dim_zero_cat(self.rows).tolist()
        once = list({number: place for place, number in enumerate(numbers)}.values())
        exact_match, f1 = scores[once].mean(0)
        return {"exact_match": exact_match, "f1": f1}


def best_spans(start: Tensor, end: Tensor, allowed: Tensor, max_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The span of each window with the highest sum of a start and an end logit.

    Args:
        start: Logits of the first token, shape (windows, tokens).
        end: Logits of the last token, of the same shape.
        allowed: Whether a token may begin or end a span, of the same shape.
        max_length: Tokens of the longest span.

    Returns:
        The sum of the two logits, the first and the last token of each window's best span, shape (windows,). The
        sum is -inf where no token is allowed.
    """
    length = min(max_length, start.shape[1])
    start, end = (logits.masked_fill(~allowed, -torch.inf) for logits in (start, end))
    # The ends near each start, not the whole square of starts and ends: shape (windows, tokens, length).
    ends = nn.functional.pad(end, (0, length - 1), value=-torch.inf).unfold(1, length, 1)
    scores, places = (start[..., None] + ends).flatten(1).max(1)
    first = places // length
    return scores, first, first + places % length
