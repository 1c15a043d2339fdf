"""The LightningCLI behind the commands that take a configuration, and how the other commands are reached."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import SIGTERMException

import lit_sparse
from lit_sparse.callbacks.checkpoint_files import furthest_first, last_checkpoint, usable
from lit_sparse.cli import edit
from lit_sparse.cli.chat import chat
from lit_sparse.cli.commands import Command
from lit_sparse.cli.evaluate import evaluate_source
from lit_sparse.cli.init import write_configuration
from lit_sparse.cli.inspect import inspect_adapters, names_a_source
from lit_sparse.cli.main import COMMANDS
from lit_sparse.cli.noise import lead_around_bars
from lit_sparse.cli.parser import SparseParser, refused_by_lightning
from lit_sparse.cli.trainer import OneLineBar, SaveRunConfig, SparseTrainer
from lit_sparse.cli.words import closest, fail
from lit_sparse.combining.combine import combine
from lit_sparse.errors import TrainingError, UsageError
from lit_sparse.modules import checkpoint as checkpoints
from lit_sparse.modules.base import SparseModule
from lit_sparse.serving.from_checkpoint import export_checkpoint
from lit_sparse.verbosity import be_quiet, quiet_within

# Commands that take no configuration; inspect and edit take one, or a source or a command of their own.
_ON_THEIR_OWN = {
    "init": Command(write_configuration),
    "inspect": Command(inspect_adapters, ["source"]),
    "export": Command(export_checkpoint),
    "merge": Command(export_checkpoint, fixed={"format": "merged", "layout": "padded", "with_head": True}),
    "combine": Command(combine, ["sources"], numbers=["weights"]),
    "chat": Command(chat, ["source"], repeated=["prompt"]),
    "evaluate": Command(evaluate_source, ["source"]),
}

# The disk is full, or a file may not be written or read.
_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)

# For inspect: nothing runs and nothing is logged, so the devices of a cluster are not needed.
_NO_RUN = {
    "accelerator": "cpu",
    "strategy": "auto",
    "devices": 1,
    "num_nodes": 1,
    "precision": None,
    "plugins": None,
    "logger": False,
    "callbacks": None,
    "profiler": None,
    "enable_checkpointing": False,
}

# For modules of this package, these names of strategies mean ours, which keep adapters whole in every process.
_SHARDING: dict[str, tuple[str, dict[str, Any]]] = {
    "fsdp": ("lit_sparse.SparseFSDPStrategy", {}),
    "fsdp_cpu_offload": ("lit_sparse.SparseFSDPStrategy", {"cpu_offload": True}),
    "fsdp2": ("lit_sparse.SparseFSDP2Strategy", {}),
    "fsdp2_cpu_offload": ("lit_sparse.SparseFSDP2Strategy", {"cpu_offload": True}),
}
# Key → title of its group in the help; otherwise docstrings of Lightning and torch.
_TITLES = {
    "trainer": "Lightning's Trainer",
    "model": "module",
    "data": "data",
    "optimizer": "optimizer of a module that has no own",
    "lr_scheduler": "learning rate schedule of such a module",
    "ckpt_path": "checkpoint",
}
_EDITING = {"inference_mode": False, "enable_checkpointing": False}


class SparseCLI(LightningCLI):
    """LightningCLI for the modules of this package and for any other by ``class_path``."""

    def __init__(self, command: str, **options: Any) -> None:
        self._command = command
        super().__init__(**options)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command of this run alone: a parser takes a third of a second to build."""
        skipped = {**LightningCLI.subcommands(), "inspect": {"model", "datamodule"}, "edit": {"model", "datamodule"}}
        return {self._command: skipped[self._command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--quiet``."""
        parser.add_argument("--quiet", action="store_true", help="Show only results, warnings and errors.")

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        options = {"description": COMMANDS[self._command], "usage": "%(prog)s [-c CONFIG] [--KEY VALUE ...]"}
        super()._add_subcommands(parser, **{self._command: {**kwargs.get(self._command, {}), **options}})
        made: Any = self._subcommand_parsers[self._command]
        made.lists_classes = True
        for group in made._action_groups:
            keys = {action.dest.partition(".")[0] for action in group._group_actions}
            group.title = next((title for key, title in _TITLES.items() if key in keys), group.title)
        self.add_arguments_to_parser(parser)  # --quiet may stand before the command too

    def before_instantiate_classes(self) -> None:
        """Adjust the Trainer to the command; refuse an unreadable checkpoint, and a second optimizer."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        if config.quiet or self.config.get("quiet"):
            be_quiet()
            config.trainer.enable_progress_bar = config.trainer.enable_model_summary = False
        if self.subcommand == "inspect":
            vars(config.trainer).update(_NO_RUN)
        if self.subcommand == "edit":
            _set_up_editing(config)
            return
        resumes = self.subcommand == "fit"
        config["ckpt_path"] = _checkpoint(config.get("ckpt_path"), config.get("weights_only"), resumes)
        class_path = config.model.get("class_path", "")
        if config.trainer.strategy in _SHARDING and _is_sparse_module(class_path):
            kind, arguments = _SHARDING[config.trainer.strategy]
            init_args: Any = Namespace(**arguments)  # type: ignore[no-untyped-call]
            config.trainer.strategy = Namespace(class_path=kind, init_args=init_args)  # type: ignore[no-untyped-call]
        given = [key for key in ("optimizer", "lr_scheduler") if config.get(key)]
        if given and _is_sparse_module(class_path):
            raise UsageError(
                f"--{given[0]} does not reach {class_path}, which groups its own parameters: set "
                "model.init_args.optimizer, lr_schedule and warmup instead."
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer; its errors are about the user's arguments."""
        given = self._get(self.config_init, "trainer.callbacks") or []
        given = list(given) if isinstance(given, list) else [given]  # a copy: Lightning adds its bar to a list
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except MisconfigurationException:
            raise
        except (TypeError, ValueError) as error:
            strategy = self._get(self.config_init, "trainer.strategy")
            unknown = isinstance(strategy, str) and strategy not in StrategyRegistry
            hint = closest(strategy, StrategyRegistry) if unknown else ""
            raise UsageError(f"The Trainer cannot be made: {str(error).rstrip('.')}.{hint}") from error
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [OneLineBar() if type(c) is RichProgressBar and c not in given else c for c in callbacks]
        return trainer

    def before_fit(self) -> None:
        """Find the checkpoint for ``last``: Lightning would take a damaged one."""
        config = self.config_init[self.subcommand]
        if config.get("ckpt_path") != "last":
            return
        folders: list[str] = [getattr(c, "dirpath", None) or "" for c in self.trainer.checkpoint_callbacks]
        found = [last_checkpoint(folder) for folder in folders if folder]
        # The checkpoint written at SLURM's signal often has a higher step.
        found.append(last_checkpoint(self.trainer.default_root_dir, "hpc_ckpt_*.ckpt"))
        sound = [file for file in found if file is not None]
        if any(folders) or sound:
            # None at first: a requeued job runs the same command again.
            furthest = next(iter(furthest_first(sound)), None)
            config["ckpt_path"] = None if furthest is None else str(furthest)

    def instantiate_classes(self) -> None:
        """Make the objects, and raise a UsageError of their constructors as it is."""
        try:
            super().instantiate_classes()
        except ValueError as error:  # jsonargparse wraps it into a list of the types it tried
            cause = error.__cause__
            while cause is not None and not isinstance(cause, UsageError):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from None

    def _parse_ckpt_path(self) -> None:
        # Lightning would silently replace the model of the configuration by the checkpoint's. Ours keeps the user's
        # model, and refuses a checkpoint that does not fit.
        return


def _set_up_editing(config: Any) -> None:
    """Edits run in the Trainer's test loop, with gradients, and write to one folder."""
    vars(config.trainer).update(_EDITING)
    if config.trainer.logger is None:
        config.trainer.logger = False
    if config.trainer.default_root_dir is None:
        config.trainer.default_root_dir = config.model.get("init_args", {}).get("output")


def run(command: str, words: Sequence[str], program: str) -> None:
    """Run a command; :func:`~lit_sparse.cli.main.main` says how it ends.

    Args:
        command: Its name.
        words: All words after the program's name.
        program: Name of the program, for the help.
    """
    folder = str(Path.cwd())
    if not {"", folder} & set(sys.path):
        sys.path.insert(0, folder)  # as python -m does, so that the user's own modules are found
    for name in dir(lit_sparse):
        getattr(lit_sparse, name)  # jsonargparse finds imported classes by their bare names
    lead_around_bars()
    # Transformers reports every weight it loads; the head it names as missing is the one we train.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        with quiet_within():
            _run(command, words, program)
    except SIGTERMException:  # it has no status of its own: the process would end with 0
        raise SystemExit(128 + signal.SIGTERM) from None
    except Exception as error:
        if not _can_be_fixed(error) or os.environ.get("LIT_SPARSE_TRACEBACK"):
            raise
        fail(f"A file cannot be written or read: {error}." if isinstance(error, OSError) else str(error), status=1)


def _can_be_fixed(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _NO_PLACE
    return isinstance(error, UsageError | TrainingError | MisconfigurationException) or refused_by_lightning(error)


def _run(command: str, words: Sequence[str], program: str) -> None:
    """Run a command that has a parser of its own, or else one of LightningCLI's."""
    if "--quiet" in words:
        be_quiet()
    others = [word for word in words if word != "--quiet"]
    others.remove(command)
    if command in _ON_THEIR_OWN and (command != "inspect" or names_a_source(others)):
        _ON_THEIR_OWN[command].run(others, f"{program} {command}", COMMANDS[command])
    elif command == "edit" and others[:1] and not others[0].startswith("-"):
        edit.run(others, program)
    else:
        SparseCLI(
            command,
            trainer_class=SparseTrainer,
            args=None if words == sys.argv[1:] else list(words),
            parser_class=SparseParser,
            parser_kwargs={"prog": program},
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
        )


def _checkpoint(path: str | None, weights_only: bool | None, resumes: bool) -> str | None:
    if path is None or path in ("best", "last", "hpc") or ":" in path:  # chosen later, or a URL
        return path
    file = usable(path)
    if file.is_file() and weights_only is not False:
        found = checkpoints.load(file, mmap=True)  # refuse it before anything is built
        if resumes:
            checkpoints.require_resumable(found, file)
    return str(file)


def _is_sparse_module(class_path: str) -> bool:
    module, _, name = class_path.rpartition(".")
    kind: Any = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and issubclass(kind, SparseModule)
