"""Log what a language model answers to fixed prompts while it trains."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.seed import isolate_rng

from lit_sparse.adapters.modes import in_mode
from lit_sparse.callbacks.checkpoint_files import is_remote
from lit_sparse.callbacks.support import StepCallback
from lit_sparse.errors import UsageError, require_range

_NAME = "samples"
_COLUMNS = ("step", "prompt", "answer")


class GenerationSamples(StepCallback):
    """Let the model answer a few prompts before the first step, every so many steps and after the last step.

    The answers are added to ``samples.jsonl`` in the run's folder, one line per prompt with ``step``, ``prompt`` and
    ``answer``. A resumed run continues the file; another run with the same folder replaces it. Loggers that take text
    get the answers too: Weights & Biases and MLflow as tables, TensorBoard and Comet as texts.

    The module's own ``predict_step`` answers, by the model's ``generation_config``. Nothing of the run changes:
    training modes and random states are as before. All processes generate the same, as sharded models need.

    Args:
        prompts: Texts to continue, or lists of messages with ``role`` and ``content`` for the tokenizer's chat
            template.
        every_n_steps: Optimizer steps between two logs, at least 1.
        max_new_tokens: Longest answer, in tokens; 64 as in :class:`~lit_sparse.CausalLM`.

    Raises:
        UsageError: If there are no prompts, a number is outside its range, or when training starts, if the module does
            not generate, the data module cannot encode prompts, or a prompt does not suit the tokenizer.
    """

    def __init__(self, prompts: list[str | list[dict[str, str]]], every_n_steps: int, max_new_tokens: int = 64) -> None:
        super().__init__(every_n_steps)
        require_range("max_new_tokens", max_new_tokens, at_least=1)
        if isinstance(prompts, str) or not prompts:
            raise UsageError(f"prompts must be a list of at least one prompt; got {prompts!r}.")
        for prompt in prompts:
            turns = [] if isinstance(prompt, str) else prompt
            if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
                raise UsageError(f"Each of prompts is a text or a list of messages; one is {prompt!r}.")
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self._file: Path | None = None
        self._logged: int | None = None  # the last step whose answers were logged

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer before the first step: prompts that do not work fail now. A resumed run continues its file."""
        super().on_train_start(trainer, pl_module)
        self._logged = None
        folder = trainer.log_dir or trainer.default_root_dir  # in every process: log_dir is broadcast
        keep = trainer.is_global_zero and not trainer.fast_dev_run and not is_remote(folder)  # type: ignore[attr-defined]
        self._file = Path(folder) / f"{_NAME}.jsonl" if keep else None
        if self._file is not None:
            _begin(self._file, trainer.global_step)
        if trainer.global_step == 0:
            self._log(trainer, pl_module)

    def after_step(self, trainer: Trainer, pl_module: LightningModule, is_due: bool) -> None:
        """Answer if it is due."""
        if is_due:
            self._log(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer after the last step."""
        if self._logged != trainer.global_step:
            self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._logged = step = trainer.global_step
        answers = self._answers(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        rows = [(step, _shown(prompt), answer) for prompt, answer in zip(self.prompts, answers, strict=True)]
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.writelines(
                    json.dumps(dict(zip(_COLUMNS, row, strict=True)), ensure_ascii=False) + "\n" for row in rows
                )
        for logger in trainer.loggers:
            _give(logger, rows)

    def _answers(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(pl_module, "max_new_tokens"):
            raise UsageError(
                f"GenerationSamples needs a module that generates, with predict_step and max_new_tokens, such as "
                f"CausalLM; this is {type(pl_module).__name__}."
            )
        if not hasattr(data, "encode_prompts") or not hasattr(data, "decode"):
            raise UsageError(
                "GenerationSamples needs a data module that has encode_prompts(prompts) and decode(tokens), as "
                f"InstructionData has; got {type(data).__name__}."
            )
        batch = {k: v.to(trainer.strategy.root_device) for k, v in data.encode_prompts(self.prompts).items()}
        limited = _length(pl_module, self.max_new_tokens)
        with in_mode(pl_module, training=False), isolate_rng(), torch.no_grad(), limited:
            torch.manual_seed(0)  # processes that drew different tokens would wait for each other's shards for ever
            found: dict[str, Any] = trainer.strategy.predict_step(batch, 0)
        texts: list[str] = found["text"] if "text" in found else data.decode(found["tokens"])
        return texts


@contextmanager
def _length(module: Any, max_new_tokens: int) -> Iterator[None]:
    before, module.max_new_tokens = module.max_new_tokens, max_new_tokens
    try:
        yield
    finally:
        module.max_new_tokens = before


def _begin(file: Path, step: int) -> None:
    """Begin the file of a run; a resumed run keeps the lines up to the step from which it goes on."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text(encoding="utf-8").splitlines() if step and file.is_file() else []
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _shown(prompt: str | list[dict[str, str]]) -> str:
    """A prompt as one text."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in prompt)


def _give(logger: Logger, rows: Sequence[tuple[int, str, str]]) -> None:
    """Give the answers to a logger, if it takes text."""
    experiment: Any = getattr(logger, "experiment", None)
    if isinstance(logger, WandbLogger):
        table: list[Any] = [list(row) for row in rows]
        logger.log_text(_NAME, columns=list(_COLUMNS), data=table, step=rows[0][0])
    elif isinstance(logger, MLFlowLogger):
        columns = dict(zip(_COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
        experiment.log_table(logger.run_id, columns, f"{_NAME}.json")
    elif isinstance(logger, TensorBoardLogger):
        for number, (step, prompt, answer) in enumerate(rows):
            experiment.add_text(f"{_NAME}/{number}", f"{prompt}\n\n---\n\n{answer}", step)
    elif isinstance(logger, CometLogger):
        for step, prompt, answer in rows:
            experiment.log_text(answer, step=step, metadata={"prompt": prompt})
