"""Tag the words of a text: named entities, parts of speech, chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric
from transformers import AutoModelForTokenClassification

from lit_sparse.callbacks.measuring import Metrics
from lit_sparse.data.padding import IGNORED
from lit_sparse.errors import UsageError
from lit_sparse.modules.labels import LabelledModule

OUTSIDE = "O"
"""The tag of words outside of entities."""


class TokenClassification(LabelledModule):
    """Give each word of a text a tag.

    Number and names of the tags come from the data module when it has them, as
    :class:`~lit_sparse.TokenClassificationData` does; else the names are those in the model's configuration. Evaluation
    logs, over all words of the set,

    - ``val_loss``: mean cross entropy of the words that have a token, in nats;
    - ``val_accuracy``: share of the words with the right tag;
    - where all tags are written as O, B-… and I-…: ``val_precision``, ``val_recall`` and ``val_f1`` of whole
      entities, in total over their types. An entity is found if type, first and last word are right.

    A word without a token of its own, because the row is longer than ``max_length``, counts as predicted O; where
    there is no tag O, as predicted wrong. Entities are read from tags as conlleval does: a B- starts one, and so
    does an I- that follows no word of its type. If batches have no ``word_positions``, the labelled tokens count as
    words. Arguments are those of :class:`~lit_sparse.modules.labels.LabelledModule`.

    Raises:
        UsageError: If an argument is outside its range, the backbone cannot be loaded, or the number of tags is not
            known.
    """

    auto_class = AutoModelForTokenClassification

    def _check_model(self) -> None:
        super()._check_model()
        names = self._names()
        if OUTSIDE in names and not _are_iob(names):
            rank_zero_warn(
                f"The tags {names} are not all written as O, B-… and I-…, so there are no entities to score: only "
                "the accuracy is logged."
            )
        self._tags = names

    def make_metrics(self) -> Metrics:
        """The loss of the words, and the scores of tags and entities."""
        return {**super().make_metrics(), "tags": TagScores(self._tags)}

    def measure(self, batch: dict[str, Any], metrics: Metrics, data: Any = None, name: str = "") -> None:  # noqa: ARG002
        """Update metrics with a batch with ``labels``."""
        if "labels" not in batch:
            raise UsageError("The rows have no labels, so nothing can be measured. Use predict for them.")
        logits = self(**_inputs(batch)).logits
        predicted = self._predicted(logits, _word_positions(batch))
        metrics["tags"].update(predicted, batch.get("word_labels", batch["labels"]))
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        # Weighted by words, not by rows: the mean of batch means is not the loss of the set.
        metrics["loss"].update(losses, (batch["labels"] != IGNORED).sum())

    def predict_step(
        self,
        batch: dict[str, Any],
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> dict[str, Any]:
        """Names of the tags, a list for each row, with the ``words`` if the batch has them."""
        logits = self(**_inputs(batch)).logits
        positions = _word_positions(batch)
        numbers, positions = self._predicted(logits, positions).cpu(), positions.cpu()
        found = [
            [self._tags[number] if number >= 0 else None for number in row[place != IGNORED].tolist()]
            for row, place in zip(numbers, positions, strict=True)
        ]
        return {**({"words": batch["words"]} if "words" in batch else {}), "tags": found}

    def _predicted(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Number of the tag of each word; O for words without a token, -1 where there is no O."""
        without_token = self._tags.index(OUTSIDE) if OUTSIDE in self._tags else -1
        return logits.argmax(-1).gather(1, positions.clamp(min=0)).masked_fill(positions < 0, without_token)


class TagScores(Metric):
    """Accuracy of tags, and precision, recall and F1 of the entities that they mark, over a whole set.

    All states are counts, which are summed over batches and processes. Precision is 0 if no entity is predicted, recall
    is 0 if the data has none, and F1 is 0 in both cases. No value is read back from a device.

    Args:
        names: Names of the tags; entities are scored if all are written as O, B-… and I-….

    Source:
        Tjong Kim Sang and De Meulder 2003, "Introduction to the CoNLL-2003 Shared Task", section 2.4, and its
        script conlleval, whose rules decide where entities begin and end.
    """

    full_state_update = False
    right: Tensor
    words: Tensor
    found: Tensor
    predicted: Tensor
    gold: Tensor
    types: Tensor
    begins: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.scores_entities = _are_iob(names)
        for state in ("right", "words", "found", "predicted", "gold"):
            self.add_state(state, torch.tensor(0), dist_reduce_fx="sum")
        tags = [*names, OUTSIDE]  # the last one is that of the number -1
        kinds = sorted({tag.partition("-")[2] for tag in tags if tag != OUTSIDE})
        types = [-1 if tag == OUTSIDE else kinds.index(tag.partition("-")[2]) for tag in tags]
        self.register_buffer("types", torch.tensor(types), persistent=False)
        self.register_buffer("begins", torch.tensor([tag.startswith("B-") for tag in tags]), persistent=False)

    def update(self, predicted: Tensor, gold: Tensor) -> None:
        """Count the words and entities of some rows.

        Args:
            predicted: Numbers of the predicted tags, shape (rows, words); -1 stands for no tag.
            gold: Numbers of the right tags, of the same shape; -100 where there is no word.
        """
        counted = gold != IGNORED
        self.right += ((predicted == gold) & counted).sum()
        self.words += counted.sum()
        if not self.scores_entities:
            return
        # Words first, in their order: what lies between them is no word.
        order = counted.logical_not().int().argsort(dim=1, stable=True)
        guess, truth = (self._entities(tags.masked_fill(~counted, -1).gather(1, order)) for tags in (predicted, gold))
        self.predicted += (guess[0] >= 0).sum()
        self.gold += (truth[0] >= 0).sum()
        self.found += ((guess[0] >= 0) & (guess[0] == truth[0]) & (guess[1] == truth[1])).sum()

    def compute(self) -> dict[str, Tensor]:
        """``accuracy`` and, if entities are scored, ``precision``, ``recall`` and ``f1``, all in [0, 1]."""
        scores = {"accuracy": self.right / self.words}
        if not self.scores_entities:
            return scores
        return {
            **scores,
            "precision": self.found / self.predicted.clamp(min=1),
            "recall": self.found / self.gold.clamp(min=1),
            "f1": 2 * self.found / (self.predicted + self.gold).clamp(min=1),  # equals 2PR / (P + R)
        }

    def _entities(self, tags: Tensor) -> tuple[Tensor, Tensor]:
        """The type of the entity that begins at each word, -1 where none does, and where it ends."""
        types, words = self.types[tags], tags.shape[1]
        before = torch.nn.functional.pad(types, (1, 0), value=-1)[:, :words]
        starts = (types >= 0) & (self.begins[tags] | (types != before))
        inside = (types >= 0) & ~starts
        goes_on = torch.nn.functional.pad(inside, (0, 1))[:, 1:]
        ends = torch.arange(words, device=tags.device).where(~goes_on, words)
        return types.where(starts, -1), ends.flip(1).cummin(1).values.flip(1)


def _are_iob(names: Sequence[str]) -> bool:
    return all(name == OUTSIDE or name.startswith(("B-", "I-")) for name in names)


def _word_positions(batch: dict[str, Any]) -> Tensor:
    """Positions in ``input_ids`` where words start; else those of labelled tokens, or of all tokens without labels."""
    if "word_positions" in batch:
        positions: Tensor = batch["word_positions"]
        return positions
    real = batch["labels"] != IGNORED if "labels" in batch else batch["attention_mask"].bool()
    return torch.arange(real.shape[1], device=real.device).where(real, IGNORED)


def _inputs(batch: dict[str, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in batch.items() if k not in ("labels", "words", "word_labels", "word_positions")}
