"""Judge a language model by the tasks of lm-eval, the Language Model Evaluation Harness."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lit_sparse.adapters.injection import disable_adapters
from lit_sparse.errors import UsageError, require_range
from lit_sparse.serving.language_models import LanguageModel

_LOADING_ERRORS = (OSError, ValueError)  # of datasets that cannot be had, and of broken tasks


@dataclass(frozen=True)
class Settings:
    """How tasks are run; None is what a task itself says.

    Args:
        tasks: Names of tasks or groups of tasks.
        include_path: Folder with further tasks as YAML files. A file may name Python functions, which are run.
        num_fewshot: Examples before each question.
        limit: Rows of each task: a number, or a share below 1; None: all.
        batch_size: Rows at a time; ``auto``: as many as fit into memory.
        apply_chat_template: Whether a question is a turn of the user, in the model's chat format.

    Raises:
        UsageError: If a number is outside its range, the folder does not exist, a task is not known, or lm-eval is not
            installed.
    """

    tasks: Sequence[str]
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    batch_size: int | Literal["auto"] = 1
    apply_chat_template: bool = False

    def __post_init__(self) -> None:
        require_range("num_fewshot", self.num_fewshot, at_least=0)
        require_range("limit", self.limit, above=0)
        if self.batch_size != "auto":
            require_range("batch_size", self.batch_size, at_least=1)
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise UsageError(f"include_path {self.include_path!r} is no folder: give one with tasks as YAML files.")
        if importlib.util.find_spec("lm_eval") is None:
            raise UsageError(
                'evaluate needs the package lm-eval, which is not installed: run pip install "lit-sparse[lm-eval]"'
            )
        known = _manager(self.include_path).all_tasks
        unknown = next((name for name in self.tasks if name not in known), None)
        if unknown is not None or not self.tasks:
            close = difflib.get_close_matches(str(unknown), known)
            hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else "lm-eval ls tasks lists those it has."
            raise UsageError(f"There is no task {unknown!r} in lm-eval or include_path. {hint}")


@functools.cache  # it reads thousands of files
def _manager(include_path: str | None) -> Any:
    """lm-eval's index of its tasks and those of ``include_path``."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def evaluate(source: LanguageModel, settings: Settings, adapters: bool = True) -> dict[str, Any]:
    """Run tasks on a language model.

    Args:
        source: The model.
        settings: The tasks, and how they are run.
        adapters: Whether the adapters are on.

    Returns:
        What lm-eval reports: ``results`` (task → ``metric,filter`` → value), ``n-shot``, ``versions`` and more.

    Raises:
        UsageError: If the data of a task cannot be loaded, or the tokenizer lacks the chat template that is asked for.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    if settings.apply_chat_template and not source.tokenizer.chat_template:
        raise UsageError(f"apply_chat_template needs a chat template, and the tokenizer of {source.name!r} has none.")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that is given as such
    with _tied(source.model):
        model = HFLM(pretrained=source.model, tokenizer=source.tokenizer, batch_size=settings.batch_size)
    with nullcontext() if adapters else disable_adapters(source.model):
        try:
            found: dict[str, Any] = simple_evaluate(
                model,
                tasks=list(settings.tasks),
                task_manager=_manager(settings.include_path),
                num_fewshot=settings.num_fewshot,
                limit=settings.limit,
                apply_chat_template=settings.apply_chat_template,
                log_samples=False,
            )
        except _LOADING_ERRORS as error:
            raise UsageError(f"lm-eval cannot run {list(settings.tasks)}: {' '.join(str(error).split())}") from error
    return found


@contextmanager
def _tied(model: Any) -> Iterator[None]:
    """Make ``tie_weights``, which lm-eval calls, do nothing: transformers fails on tied embeddings with new tokens."""
    model.tie_weights = lambda: None
    try:
        yield
    finally:
        del model.tie_weights
