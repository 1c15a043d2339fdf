"""The nine tasks of GLUE by name, with their columns, labels and official metrics."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lit_sparse.data.readers import Reader
from lit_sparse.data.sources import open_source
from lit_sparse.data.text_classification import TextClassificationData
from lit_sparse.errors import UsageError


@dataclass(frozen=True)
class _Task:
    columns: tuple[str, str | None]  # the text, and the second text of a pair
    labels: tuple[str, ...] | None  # names in the order of their ids; None is regression
    metrics: tuple[str, ...]


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_TASKS = {
    "cola": _Task(("sentence", None), ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": _Task(("sentence", None), ("negative", "positive"), ("accuracy",)),
    "mrpc": _Task(_PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qqp": _Task(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "stsb": _Task(_PAIR, None, ("pearson", "spearman")),
    "mnli": _Task(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",)),
    "qnli": _Task(("question", "sentence"), _ENTAILMENT, ("accuracy",)),
    "rte": _Task(_PAIR, _ENTAILMENT, ("accuracy",)),
    "wnli": _Task(_PAIR, ("not_entailment", "entailment"), ("accuracy",)),
}


@dataclass(kw_only=True, eq=False, repr=False)
class GLUE(TextClassificationData):
    """A task of GLUE by its name.

    Columns, label ids and label names are those of the data set on the hub. The metrics are GLUE's own: matthews for
    cola; accuracy and f1 for mrpc and qqp; pearson and spearman for stsb, the one regression; accuracy for the others.
    MNLI has two validation and two test sets, matched and mismatched, and a data loader for each. GLUE hides most test
    labels; such batches hold no labels.

    Args:
        task: Name of the task. WNLI's validation set contradicts its training set: do not compare methods
            on it.
        path: Hub id of GLUE, or a local copy: a folder with one sub-folder per task, or the folder of the task. It
            holds files named train, validation, test (MNLI: validation_matched, …), of any kind that data modules read.
        max_length: Longest row in tokens; longer ones are cut, in a pair the longer text first. With BERT's
            vocabulary 128 cuts 12 % of the training rows of RTE, 0.4 % of QNLI and none of the smaller tasks
            and SST-2; MNLI and QQP were not measured.

    Source:
        Wang et al. 2018 (arXiv:1804.07461).
    """

    task: Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]
    path: str = field(default="nyu-mll/glue", kw_only=False)

    # The task decides these.
    name: None = field(default=None, init=False)
    data_files: None = field(default=None, init=False)
    validation_fraction: None = field(default=None, init=False)
    text: str = field(init=False)
    text_pair: str | None = field(init=False)
    label: str = field(default="label", init=False)
    labels: list[str] | None = field(init=False)
    regression: bool = field(init=False)
    metrics: list[str] = field(init=False)

    def __post_init__(self) -> None:
        if self.task not in _TASKS:
            raise UsageError(f"GLUE has no task {self.task!r}; its tasks are {', '.join(_TASKS)}.")
        facts = _TASKS[self.task]
        self.text, self.text_pair = facts.columns
        self.labels = list(facts.labels) if facts.labels else None
        self.regression = facts.labels is None
        self.metrics = list(facts.metrics)
        super().__post_init__()
        if self.task == "mnli":
            self._validation_splits = ("validation_matched", "validation_mismatched")
            self._test_splits = ("test_matched", "test_mismatched")

    def _readers(self) -> dict[str, Reader]:
        copy = Path(self.path).expanduser()
        if not copy.exists():
            return open_source(self.path, self.task, self.revision, None, self._split_names())
        folder = copy / self.task
        return open_source(str(folder if folder.is_dir() else copy), None, self.revision, None, self._split_names())
