"""One LightningCLI behind ``lightning``, ``lit-sparse`` and ``python -m lit_sparse``."""

from __future__ import annotations

import difflib
import errno
import inspect
import logging
import os
import re
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import lit_sparse
from lit_sparse import exporting
from lit_sparse.adapters.injection import inject
from lit_sparse.callbacks.resume import last_checkpoint, usable
from lit_sparse.editing import commands
from lit_sparse.editing.data import EditingData
from lit_sparse.editing.editor import Editor
from lit_sparse.editing.measuring import text_table
from lit_sparse.errors import TrainingError, UsageError
from lit_sparse.inspection import describe
from lit_sparse.methods.base import SparseMethod
from lit_sparse.modules import checkpoint as checkpoints
from lit_sparse.modules.base import SparseModule
from lit_sparse.reporting import command

DESCRIPTION = """Fine-tune Hugging Face models with sparse adapters, or any LightningModule of yours.

Example: lightning fit --config configs/quickstart.yaml --trainer.max_epochs 1"""

# A word that is not ours goes to the lightning command of another package, if there is one.
COMMANDS = ("fit", "validate", "test", "predict", "inspect", "edit", *exporting.COMMANDS)


# Lines of jsonargparse's errors that say nothing of what is wrong: the types it tried, and reprs of its own.
_NOISE = re.compile(
    r"(- )?Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|- Expected a <class 'NoneType'>"
    r"|Given value type: .*|Given value: (NestedArg|Namespace)\(.*"
)


class SparseParser(LightningArgumentParser):
    """Reports an error in one line, and takes no abbreviations: ``max_epoch`` would pass for ``max_epochs``."""

    options: Sequence[str] = ()
    """The options of a command that takes no configuration."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **options: Any) -> Any:  # type: ignore[override]
        """Parse, with null for a key two classes deep: jsonargparse (4.53) hands it on as the word None."""
        if args is not None and not self.exit_on_error:
            args = [f"{word.removesuffix('None')}null" if word.endswith("=None") else word for word in args]
        return super().parse_args(args, *others, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong, and exit with status 2."""
        if not self.exit_on_error:  # a parser within ours: its caller may have another type to try
            super().error(message, ex)
        lines = [line.strip() for line in message.splitlines()]
        unknown = re.search(r"(?:[Oo]ption '|[Kk]ey '|arguments: --)([\w.]+)", message)
        hint = _suggestion(unknown[1], self.options) if unknown else ""
        if re.search(r"arguments are required: \w+\.model\b", message):
            hint = (
                ": neither the configuration nor the words of the command line name a model (model: {class_path: …})."
            )
        _fail(" ".join(line for line in lines if not _NOISE.fullmatch(line)) + hint, status=2)


# The disk is full, or what is there may not be written or read.
_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)

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


# What these words of the Trainer's mean for a module of ours, which keeps adapters whole in every process.
_SHARDING: dict[str, tuple[str, dict[str, Any]]] = {
    "fsdp": ("lit_sparse.SparseFSDPStrategy", {}),
    "fsdp_cpu_offload": ("lit_sparse.SparseFSDPStrategy", {"cpu_offload": True}),
    "fsdp2": ("lit_sparse.SparseFSDP2Strategy", {}),
    "fsdp2_cpu_offload": ("lit_sparse.SparseFSDP2Strategy", {"cpu_offload": True}),
}


class SparseTrainer(Trainer):
    """Lightning's Trainer with two commands more."""

    def inspect(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,  # noqa: ARG002
    ) -> None:
        """List the layers that a configuration would adapt; given a checkpoint or folder instead, what it holds.

        No weights are loaded and nothing is trained. The latter is :mod:`lit_sparse.reporting.command`.

        Args:
            model: A module that holds adapters after ``configure_model``.
            datamodule: Its data, read only if the module takes the number of labels from it.
            ckpt_path: Not for this command; here because the configurations that ``fit`` writes have it.
            weights_only: The same.
        """
        if ckpt_path is not None:
            raise UsageError("inspect looks at what a configuration would adapt, not at a checkpoint: omit ckpt_path.")
        self.strategy.connect(model)
        model.trainer = self
        if datamodule is not None:
            self.datamodule = datamodule
            datamodule.trainer = self
            if getattr(model, "num_labels", 0) is None:
                datamodule.prepare_data()
                datamodule.setup("fit")
        with torch.device("meta"):
            model.configure_model()
        if isinstance(model, Editor):
            # An edit puts its adapters in and takes them out again; none is in the model between edits.
            if not isinstance(model.method, SparseMethod):
                raise UsageError(f"inspect lists adapters, and {type(model.method).__name__} has none.")
            inject(model.model, model.method)
        backbone = model.model if isinstance(model, SparseModule | Editor) else None
        sys.stdout.write(describe(backbone or model) + "\n")

    def edit(self, model: Editor, datamodule: EditingData) -> None:
        """Edit facts by the requests of a file, and measure each; ``edit apply|list|remove`` for edits that were saved.

        Args:
            model: What edits.
            datamodule: The requests.
        """
        self.test(model, datamodule, verbose=False)
        if self.is_global_zero:
            sys.stdout.write(f"{text_table(model.summary)}\nWrote {model.output}.\n")


_EDITING = {"inference_mode": False, "enable_checkpointing": False}


class SparseCLI(LightningCLI):
    """LightningCLI for the modules of this package and for any other by ``class_path``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, but for ``inspect`` and ``edit``."""
        return {**LightningCLI.subcommands(), "inspect": {"model", "datamodule"}, "edit": {"model", "datamodule"}}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        for name, function in exporting.COMMANDS.items():  # for --help; main runs them without a configuration
            commands: Any = parser._subcommands_action
            commands.add_subcommand(name, _export_parser(name), help=_summary(function))

    def before_instantiate_classes(self) -> None:
        """Refuse an ``optimizer`` beside a module that builds its own, and a checkpoint that cannot be read."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        if self.subcommand == "inspect":
            # Nothing runs, so that what a cluster has is not needed, and nothing is logged.
            vars(config.trainer).update(_NO_RUN)
        if self.subcommand == "edit":
            _set_up_editing(config)
            return
        config["ckpt_path"] = _checkpoint(config.get("ckpt_path"), config.get("weights_only"))
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
        """The Trainer; what it refuses is what the user wrote."""
        try:
            return super().instantiate_trainer(**kwargs)
        except MisconfigurationException:
            raise
        except (TypeError, ValueError) as error:
            raise UsageError(f"There is no such Trainer: {error}") from error

    def before_fit(self) -> None:
        """Find the checkpoint that ``last`` means: Lightning would take a damaged one, and know no other."""
        config = self.config_init[self.subcommand]
        if config.get("ckpt_path") != "last":
            return
        folders: list[str] = [getattr(c, "dirpath", None) or "" for c in self.trainer.checkpoint_callbacks]
        found = [last_checkpoint(folder) for folder in folders if folder]
        # What SLURM's signal left is often newer.
        found.append(last_checkpoint(self.trainer.default_root_dir, "hpc_ckpt_*.ckpt"))
        sound = [file for file in found if file is not None]
        if any(folders) or sound:
            # None the first time: a job that is requeued has the same command.
            newest = max(sound, key=lambda file: file.stat().st_mtime_ns, default=None)
            config["ckpt_path"] = None if newest is None else str(newest)

    def instantiate_classes(self) -> None:
        """Make the objects; what their constructors refuse comes out as they said it."""
        try:
            super().instantiate_classes()
        except ValueError as error:  # jsonargparse wraps it in a list of the types it tried
            cause = error.__cause__
            while cause is not None and not isinstance(cause, UsageError):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from None

    def _parse_ckpt_path(self) -> None:
        # Lightning would replace the model of the configuration by the checkpoint's, without a word. What the
        # user wrote stands; our modules refuse a checkpoint that does not fit.
        return


def _set_up_editing(config: Any) -> None:
    """What the Trainer must be to edit: its test loop, with gradients, into one folder."""
    vars(config.trainer).update(_EDITING)
    if config.trainer.logger is None:
        config.trainer.logger = False
    if config.trainer.default_root_dir is None:
        config.trainer.default_root_dir = config.model.get("init_args", {}).get("output")  # for the configuration


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Errors that a user can mend are printed in one line, with status 1, or 2 when the configuration does not
    parse; anything else keeps its traceback. ``LIT_SPARSE_TRACEBACK=1`` shows the traceback of the former too.

    Args:
        args: Words after the program's name; None: those of the process.
    """
    folder = str(Path.cwd())
    if not {"", folder} & set(sys.path):
        sys.path.insert(0, folder)  # as python -m does, so that modules of the user's own are found
    # Transformers reports every weight it loads; the head it names as missing is the one we train.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    words = sys.argv[1:] if args is None else list(args)
    try:
        _require_readable(words)
        if words and words[0] in exporting.COMMANDS:
            _export(words[0], words[1:])
            return
        if words[:1] == ["inspect"] and command.names_a_source(words[1:]):
            command.run(words[1:], _program())
            return
        if words[:1] == ["edit"] and words[1:2] and words[1] in commands.NAMES:
            commands.run(words[1:], _program())
            return
        SparseCLI(
            trainer_class=SparseTrainer,
            args=None if args is None else words,
            parser_class=SparseParser,
            parser_kwargs={"prog": _program(), "description": DESCRIPTION, "version": lit_sparse.__version__},
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
        )
    except (UsageError, TrainingError, MisconfigurationException) as error:
        if os.environ.get("LIT_SPARSE_TRACEBACK"):
            raise
        _fail(str(error), status=1)
    except OSError as error:
        if error.errno not in _NO_PLACE or os.environ.get("LIT_SPARSE_TRACEBACK"):
            raise
        _fail(f"A file cannot be written or read: {error}.", status=1)


def _require_readable(words: Sequence[str]) -> None:
    """Refuse a file of configuration that is no YAML: the parser does not say which file it means."""
    for option, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = option.partition("=")
        file = Path(value if equals else following)
        if name not in ("-c", "--config") or not file.is_file():
            continue
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"{file} is no YAML in UTF-8: {error}") from error
        if not isinstance(content, dict):
            found = "empty" if content is None else f"a {type(content).__name__}"
            raise UsageError(f"{file} is {found}, not a configuration: model, data and trainer with their arguments.")


def lightning_main() -> None:
    """``lightning``: ours, but for commands of another package that installs a program of that name."""
    words = sys.argv[1:]
    values = {i + 1 for i, word in enumerate(words) if word in ("-c", "--config")}
    word = next((word for i, word in enumerate(words) if not word.startswith("-") and i not in values), None)
    other = _other_lightning()
    if word is not None and word not in COMMANDS and other is not None:
        other.load()()
        return
    main()


def _export(name: str, words: Sequence[str]) -> None:
    parser = _export_parser(name, prog=f"{_program()} {name}")
    report = exporting.COMMANDS[name](**parser.parse_args(words).as_dict())
    sys.stdout.write(f"{report}\n")


def _export_parser(name: str, **options: Any) -> SparseParser:
    command = exporting.COMMANDS[name]
    parser = SparseParser(description=_summary(command), **options)
    parser.options = parser.add_function_arguments(command)
    return parser


def _summary(command: object) -> str:
    return (inspect.getdoc(command) or "").splitlines()[0]


def _other_lightning() -> EntryPoint | None:
    """The ``lightning`` program of another installed package, such as lightning_sdk."""
    own = __name__
    found = entry_points(group="console_scripts", name="lightning")
    return next((entry for entry in found if entry.module != own), None)


def _checkpoint(path: str | None, weights_only: bool | None) -> str | None:
    if path is None or path in ("best", "last", "hpc") or ":" in path:  # chosen later, or not on this machine
        return path
    file = usable(path)
    if file.is_file() and weights_only is not False:
        checkpoints.load(file, mmap=True)  # refused here in a line, before anything is built
    return str(file)


def _is_sparse_module(class_path: str) -> bool:
    module, _, name = class_path.rpartition(".")
    kind: Any = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and issubclass(kind, SparseModule)


def _suggestion(key: str, options: Sequence[str]) -> str:
    """Options of the command, else arguments of ours or of the Trainer, spelt like the last part of ``key``."""
    public = [] if options else [getattr(lit_sparse, name) for name in dir(lit_sparse)]
    kinds: list[Any] = [kind for kind in public if isinstance(kind, type) and not issubclass(kind, Exception)]
    known = options or {argument for kind in [Trainer, *kinds] for argument in inspect.signature(kind).parameters}
    close = difflib.get_close_matches(key.rpartition(".")[2], known)
    if close:
        return f". Did you mean {' or '.join(map(repr, close))}?"
    return f". --{'help' if options else 'print_config'} lists what there is."


def _program() -> str:
    name = os.path.basename(sys.argv[0])  # noqa: PTH119  # a word, not a path
    return "python -m lit_sparse" if name == "__main__.py" else name


def _fail(message: str, status: int) -> NoReturn:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    raise SystemExit(status)
