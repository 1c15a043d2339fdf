"""The nine tasks of GLUE by name, with their columns, labels and official metrics."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lit_sparse.data.sources import Reader, open_source
from lit_sparse.data.text_classification import TextClassificationData
from lit_sparse.errors import UsageError

_HUB_ID = "nyu-mll/glue"


@dataclass(frozen=True)
class _Task:
    columns: tuple[str, ...]  # the text, or the two texts of a pair
    labels: tuple[str, ...] | None  # names in the order of their ids; None is regression
    metrics: tuple[str, ...]


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_TASKS = {
    "cola": _Task(("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": _Task(("sentence",), ("negative", "positive"), ("accuracy",)),
    "mrpc": _Task(_PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qqp": _Task(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "stsb": _Task(_PAIR, None, ("pearson", "spearman")),
    "mnli": _Task(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",)),
    "qnli": _Task(("question", "sentence"), _ENTAILMENT, ("accuracy",)),
    "rte": _Task(_PAIR, _ENTAILMENT, ("accuracy",)),
    "wnli": _Task(_PAIR, ("not_entailment", "entailment"), ("accuracy",)),
}


class GLUE(TextClassificationData):
    """A task of GLUE by its name.

    Columns, label ids and label names are those of the data set on the hub, the metrics are GLUE's own: cola
    matthews; mrpc and qqp accuracy and f1; stsb, the one regression, pearson and spearman; the others
    accuracy. MNLI has two validation and two test sets, matched and mismatched, and a data loader for each.
    GLUE hides most test labels: those batches hold none.

    Args:
        task: Name of the task. WNLI's validation set contradicts its training set: do not compare methods
            on it.
        path: Hub id of GLUE, or a local copy: a folder with one sub-folder per task, or the folder of the
            task, with files named train, validation, test (MNLI: validation_matched, …) that end in .csv,
            .json, .jsonl or .parquet.
        revision: Branch, tag or commit on the hub; None is the newest state.
        tokenizer: Hub id or folder of the tokenizer; None is that of the model's ``backbone``.
        max_length: Longest row in tokens; longer ones are cut, of a pair the longer text first. With BERT's
            vocabulary 128 cuts 12 % of the training rows of RTE, 0.4 % of QNLI and none of the smaller tasks
            and SST-2; MNLI and QQP were not measured.
        batch_size: Training rows per batch and device.
        eval_batch_size: Rows per batch and device in validation, test and prediction; None is the same as
            ``batch_size``, though there is room for more without gradients.
        length_grouped: Whether a training batch holds rows of like length, which saves most of the padding.
            If not, rows are only shuffled.
        num_workers: Processes that assemble batches; 0 is this one. Rows are tokenised already, which leaves
            workers nothing to do but padding.
        seed: Seed of the order of training rows, which depends on it and on the epoch alone.

    Source:
        Wang et al. 2018 (arXiv:1804.07461).
    """

    def __init__(
        self,
        task: Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"],
        path: str = _HUB_ID,
        revision: str | None = None,
        tokenizer: str | None = None,
        max_length: int = 128,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        length_grouped: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if task not in _TASKS:
            raise UsageError(f"GLUE has no task {task!r}; its tasks are {', '.join(_TASKS)}.")
        facts = _TASKS[task]
        super().__init__(
            path=path,
            revision=revision,
            text=facts.columns[0],
            text_pair=facts.columns[1] if len(facts.columns) == 2 else None,
            labels=list(facts.labels) if facts.labels else None,
            regression=facts.labels is None,
            metrics=list(facts.metrics),
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            length_grouped=length_grouped,
            num_workers=num_workers,
            seed=seed,
        )
        self.task = task
        if task == "mnli":
            self._validation_splits = ("validation_matched", "validation_mismatched")
            self._test_splits = ("test_matched", "test_mismatched")

    def _readers(self) -> dict[str, Reader]:
        copy = Path(str(self.path)).expanduser()
        if not copy.exists():
            return open_source(self.path, self.task, self.revision, None, self._split_names())
        folder = copy / self.task
        return open_source(str(folder if folder.is_dir() else copy), None, self.revision, None, self._split_names())
