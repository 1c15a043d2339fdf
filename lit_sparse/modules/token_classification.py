"""Tag the words of a text: named entities, parts of speech, chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import AutoModelForTokenClassification

from lit_sparse.errors import UsageError
from lit_sparse.methods.base import SparseMethod
from lit_sparse.modules.classification import Classification
from lit_sparse.modules.optimization import LrSchedule

IGNORED = -100
"""The label of tokens that start no word, and the position of words that are padding."""
OUTSIDE = "O"
"""The tag of words outside of entities."""


class TokenClassification(Classification):
    """Give each word of a text a tag.

    Number and names of the tags come from the data module when it has them, as
    :class:`~lit_sparse.TokenClassificationData` does. Evaluation logs, over all words of the set,

    - ``val_loss``: mean cross entropy of the words that have a token, in nats;
    - ``val_accuracy``: share of the words with the right tag;
    - where all tags are written as O, B-… and I-…: ``val_precision``, ``val_recall`` and ``val_f1`` of whole
      entities, in total over their types. An entity is found if type, first and last word are right.

    A word without a token of its own, because the row is longer than ``max_length``, counts as predicted O; where
    there is no tag O, as predicted wrong. Entities are read from tags as conlleval does: a B- starts one, and so
    does an I- that follows no word of its type. Entities of batches that say nothing of words (no
    ``word_positions``) are those of the labelled tokens.

    Args:
        backbone: Hub id or folder of the pretrained model, or a model that is already built.
        method: How to adapt it.
        num_labels: Number of tags; None: the data module's, or the built model's.
        label_names: Names of the tags in the order of their numbers; None: the data module's, else those in the
            model's configuration.
        optimizer: Makes the optimizer from parameter groups; gates, biases and norms are exempt from its weight
            decay. In a YAML ``class_path: torch.optim.AdamW`` and ``init_args``.
        lr_schedule: ``linear`` or ``cosine`` decay to zero over the run, or ``constant``.
        warmup: Share of the run in which the learning rate rises linearly, in [0, 1).
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        compile: Compile the model by ``torch.compile``.
        backbone_args: Arguments for ``from_pretrained``: dtype (default float32), revision, attn_implementation …
        start_from: Folder of a dense LoRA in PEFT's format from which the adapters start, by
            :func:`~lit_sparse.load_peft`. A checkpoint that is resumed holds later values, and overrides it.
        new_tokens: Tokens to add to the backbone's tokenizer and to its embeddings, of which only the new rows are
            trained (:func:`~lit_sparse.add_tokens`).

    Raises:
        UsageError: If an argument is outside its range, the backbone cannot be loaded, the number of tags is not
            known, or there are entities to score and nervaluate is not installed.
    """

    auto_class = AutoModelForTokenClassification

    def __init__(
        self,
        backbone: str | nn.Module,
        method: SparseMethod,
        num_labels: int | None = None,
        label_names: list[str] | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        lr_schedule: LrSchedule = "linear",
        warmup: float = 0.06,
        gradient_checkpointing: bool = False,
        compile: bool = False,  # noqa: A002
        backbone_args: dict[str, Any] | None = None,
        start_from: str | None = None,
        new_tokens: list[str] | None = None,
    ) -> None:
        super().__init__(
            backbone=backbone,
            method=method,
            num_labels=num_labels,
            label_names=label_names,
            optimizer=optimizer,
            lr_schedule=lr_schedule,
            warmup=warmup,
            gradient_checkpointing=gradient_checkpointing,
            compile=compile,
            backbone_args=backbone_args,
            start_from=start_from,
            new_tokens=new_tokens,
        )

    def configure_model(self) -> None:
        """Learn the tags from the data module, load, inject, and see that they can be scored."""
        if self.model is not None:
            return
        super().configure_model()
        self.hparams.pop("metrics")  # there is no choice of them
        model: Any = self.model
        names = self.label_names or list(model.config.id2label.values())
        if OUTSIDE in names and not _are_iob(names):
            rank_zero_warn(
                f"The tags {names} are not all written as O, B-… and I-…, so there are no entities to score: only "
                "the accuracy is logged."
            )
        self._tags = names
        TagScores(names)  # raises for a missing package before anything is trained

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of each validation set."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of each test set."""
        self._log_scores("test")

    def predict_step(
        self,
        batch: dict[str, Any],
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> dict[str, Any]:
        """Names of the tags, a list for each row, with the ``words`` if the batch has them."""
        logits = self(**_inputs(batch)).logits
        positions = _word_positions(batch)
        found = [
            [self._tags[number] if number >= 0 else None for number in row[place != IGNORED].tolist()]
            for row, place in zip(self._predicted(logits, positions), positions, strict=True)
        ]
        return {**({"words": batch["words"]} if "words" in batch else {}), "tags": found}

    def _predicted(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Number of the tag of each word; O for words without a token, -1 where there is no O."""
        without_token = self._tags.index(OUTSIDE) if OUTSIDE in self._tags else -1
        return logits.argmax(-1).gather(1, positions.clamp(min=0)).masked_fill(positions < 0, without_token)

    def _evaluate(self, stage: str, batch: dict[str, Tensor], index: int) -> None:
        if "labels" not in batch:
            raise UsageError(f"The {stage} rows have no labels, so nothing can be measured. Use predict for them.")
        logits = self(**_inputs(batch)).logits
        positions = _word_positions(batch)
        scores = self._metrics[stage][index]  # type: ignore[index]
        scores.update(self._predicted(logits, positions), batch.get("word_labels", batch["labels"]))
        labelled = int((batch["labels"] != IGNORED).sum())
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        # Weighted by words, not by rows: the mean of batch means is not the loss of the set.
        loss_name = f"{self._prefix(stage, index)}loss"
        mean = loss / max(1, labelled)
        self.log(loss_name, mean, add_dataloader_idx=False, sync_dist=True, on_epoch=True, batch_size=labelled)

    def _make_metrics(self, stage: str, count: int) -> None:
        made = nn.ModuleList(TagScores(self._tags) for _ in range(count))
        self._metrics[stage] = made.to(self.device)

    def _log_scores(self, stage: str) -> None:
        sets: Any = self._metrics[stage]
        for index, scores in enumerate(sets):
            prefix = self._prefix(stage, index)
            self.log_dict({f"{prefix}{name}": value for name, value in scores.compute().items()}, prog_bar=True)

    def _prefix(self, stage: str, index: int) -> str:
        return f"{stage}_" if len(self._metrics[stage]) == 1 else f"{stage}_{index}_"  # type: ignore[arg-type]


class TagScores(Metric):
    """Accuracy of tags, and precision, recall and F1 of the entities that they spell, over a whole set.

    All states are counts, which are summed over batches and processes. Without any entity predicted, precision is
    0, without any in the data recall is 0, and F1 is 0 with either.

    Args:
        names: Names of the tags; entities are scored if all are written as O, B-… and I-….

    Raises:
        UsageError: If there are entities to score and nervaluate is not installed.

    Source:
        Tjong Kim Sang and De Meulder 2003, "Introduction to the CoNLL-2003 Shared Task", section 2.4, and its
        script conlleval, by whose rules entities begin and end.
    """

    full_state_update = False
    right: Tensor
    words: Tensor
    found: Tensor
    predicted: Tensor
    gold: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)
        self.spans = _span_reader() if _are_iob(names) else None
        for state in ("right", "words", "found", "predicted", "gold"):
            self.add_state(state, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, gold: Tensor) -> None:
        """Count the words and entities of some rows.

        Args:
            predicted: Numbers of tags, shape (rows, words); -1 is none of them.
            gold: The right ones, of the same shape; -100 where there is no word.
        """
        counted = gold != IGNORED
        self.right += ((predicted == gold) & counted).sum()
        self.words += counted.sum()
        if self.spans is None:
            return
        for guess, truth, real in zip(predicted, gold, counted, strict=True):
            guessed, true = self._entities(guess[real]), self._entities(truth[real])
            self.found += len(guessed & true)
            self.predicted += len(guessed)
            self.gold += len(true)

    def compute(self) -> dict[str, Tensor]:
        """``accuracy`` and, if entities are scored, ``precision``, ``recall`` and ``f1``, all in [0, 1]."""
        scores = {"accuracy": self.right / self.words}
        if self.spans is None:
            return scores
        return {
            **scores,
            "precision": self.found / self.predicted.clamp(min=1),
            "recall": self.found / self.gold.clamp(min=1),
            "f1": 2 * self.found / (self.predicted + self.gold).clamp(min=1),  # equals 2PR / (P + R)
        }

    def _entities(self, numbers: Tensor) -> set[tuple[str, int, int]]:
        """Type, first and last word of each entity."""
        tags = [self.names[number] if number >= 0 else OUTSIDE for number in numbers.tolist()]
        return {(span["label"], span["start"], span["end"]) for span in self.spans(tags)}  # type: ignore[misc]


def _span_reader() -> Callable[[list[str]], list[dict[str, Any]]]:
    try:
        from nervaluate import collect_named_entities
    except ImportError as error:
        raise UsageError(
            'Entities are scored with nervaluate: pip install "lit-sparse[token-classification]".'
        ) from error
    return collect_named_entities  # type: ignore[no-any-return]


def _are_iob(names: Sequence[str]) -> bool:
    return all(name == OUTSIDE or name.startswith(("B-", "I-")) for name in names)


def _word_positions(batch: dict[str, Any]) -> Tensor:
    """Where the words start in ``input_ids``; without them, the labelled tokens, without labels all tokens."""
    if "word_positions" in batch:
        positions: Tensor = batch["word_positions"]
        return positions
    real = batch["labels"] != IGNORED if "labels" in batch else batch["attention_mask"].bool()
    return torch.arange(real.shape[1], device=real.device).where(real, IGNORED)


def _inputs(batch: dict[str, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in batch.items() if k not in ("labels", "words", "word_labels", "word_positions")}
