"""One LightningCLI behind ``lightning``, ``lit-sparse`` and ``python -m lit_sparse``."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

import lit_sparse
from lit_sparse.callbacks.checkpoint_files import furthest_first, last_checkpoint, usable
from lit_sparse.cli import chat, edit, evaluate, export, inspect
from lit_sparse.cli.parser import SparseParser, fail, refused_by_lightning
from lit_sparse.cli.trainer import SaveRunConfig, SparseTrainer
from lit_sparse.errors import TrainingError, UsageError
from lit_sparse.modules import checkpoint as checkpoints
from lit_sparse.modules.base import SparseModule
from lit_sparse.verbosity import be_quiet, quiet_within

DESCRIPTION = """Fine-tune Hugging Face models with sparse adapters, or any LightningModule of yours: lightning fit
--config my.yaml --trainer.max_epochs 1. Configurations of the package are named like --config
lit_sparse://quickstart.yaml. Every command takes --quiet, which hides all but results, warnings and errors."""
# Lightning's own summaries end in the middle of a sentence.
_SUMMARIES = {
    "fit": "Train with a configuration; options after it override its keys.",
    "validate": "Measure on the validation rows; --ckpt_path names the trained checkpoint.",
    "test": "Measure on the test rows; --ckpt_path names the trained checkpoint.",
    "predict": "Predict; the callback PredictionWriter writes the predictions.",
}

_ON_SOURCES = {"chat": chat, "evaluate": evaluate}  # commands with a stored model and no configuration

# Other words go to the lightning command of another package, if there is one.
COMMANDS = (*_SUMMARIES, "inspect", "edit", *export.NAMES, *_ON_SOURCES)

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
_EDITING = {"inference_mode": False, "enable_checkpointing": False}


class SparseCLI(LightningCLI):
    """LightningCLI for the modules of this package and for any other by ``class_path``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and ``inspect`` and ``edit``."""
        return {**LightningCLI.subcommands(), "inspect": {"model", "datamodule"}, "edit": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--quiet``."""
        parser.add_argument("--quiet", action="store_true", help="Show only results, warnings and errors.")

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        for name, summary in _SUMMARIES.items():
            kwargs.setdefault(name, {}).setdefault("description", summary)
        super()._add_subcommands(parser, **kwargs)
        self.add_arguments_to_parser(parser)  # --quiet may stand before the command too
        subcommands: Any = parser._subcommands_action
        for action in subcommands._choices_actions:
            action.help = _SUMMARIES.get(action.dest, action.help)
        for name in export.NAMES:  # for --help; main runs them without a configuration
            subcommands.add_subcommand(name, export.parser(name), help=export.summary(name))
        for name, command in _ON_SOURCES.items():
            subcommands.add_subcommand(name, command.parser(), help=command.SUMMARY)

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
        try:
            return super().instantiate_trainer(**kwargs)
        except MisconfigurationException:
            raise
        except (TypeError, ValueError) as error:
            raise UsageError(f"The Trainer cannot be made: {error}") from error

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


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Errors that a user can fix are printed in one line, with status 1, or 2 if the configuration does not parse; others
    keep their traceback. ``LIT_SPARSE_TRACEBACK=1`` shows all tracebacks. A run that SIGTERM stopped ends with status
    143, as a shell reports the signal.

    Args:
        args: Words after the program's name; None: those of the process.
    """
    folder = str(Path.cwd())
    if not {"", folder} & set(sys.path):
        sys.path.insert(0, folder)  # as python -m does, so that the user's own modules are found
    # Transformers reports every weight it loads; the head it names as missing is the one we train.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        with quiet_within():
            _run(args)
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


def _run(args: Sequence[str] | None) -> None:
    """Run a command that has a parser of its own, or else one of LightningCLI's."""
    words = sys.argv[1:] if args is None else args
    if "--quiet" in words:
        be_quiet()
    name, *others = [word for word in words if word != "--quiet"] or [""]
    if name in export.NAMES:
        export.run(others, _program(), name)
    elif name in _ON_SOURCES:
        _ON_SOURCES[name].run(others, _program())
    elif name == "inspect" and inspect.names_a_source(others):
        inspect.run(others, _program())
    elif name == "edit" and others[:1] and others[0] in edit.NAMES:
        edit.run(others, _program())
    else:
        SparseCLI(
            trainer_class=SparseTrainer,
            args=None if args is None else list(args),
            parser_class=SparseParser,
            parser_kwargs={"prog": _program(), "description": DESCRIPTION, "version": lit_sparse.__version__},
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
        )


def lightning_main() -> None:
    """``lightning``: our commands, and those of another package that installs a program of that name."""
    words = sys.argv[1:]
    values = {i + 1 for i, word in enumerate(words) if word in ("-c", "--config")}
    word = next((word for i, word in enumerate(words) if not word.startswith("-") and i not in values), None)
    programs = entry_points(group="console_scripts", name="lightning")
    other = next((program for program in programs if program.module != __name__), None)  # such as lightning_sdk's
    if word is not None and word not in COMMANDS and other is not None:
        other.load()()
        return
    main()


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


def _program() -> str:
    name = os.path.basename(sys.argv[0])  # noqa: PTH119  # a word, not a path
    return "python -m lit_sparse" if name == "__main__.py" else name
