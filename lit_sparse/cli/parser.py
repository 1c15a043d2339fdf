"""The parser of the command line, which reports an error in one line."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

import lit_sparse
from lit_sparse.cli.arguments import ConfigFile
from lit_sparse.foreign_errors import lacks_model, unknown_key, without_noise


class SparseParser(LightningArgumentParser):
    """Report an error in one line, and accept no abbreviations: ``max_epoch`` would pass for ``max_epochs``."""

    options: Sequence[str] = ()
    """Options of a command that takes no configuration."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def add_argument(self, *names: Any, **options: Any) -> Any:
        """Add an argument; ``--config`` finds the files of the package too."""
        if options.get("action") is ActionConfigFile:
            options["action"] = ConfigFile
        return super().add_argument(*names, **options)

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **options: Any) -> Any:  # type: ignore[override]
        """Parse; for nested parsers of jsonargparse 4.53, which pass None on as the word None, write null instead."""
        if not self.exit_on_error and args is not None:
            args = [f"{word.removesuffix('None')}null" if word.endswith("=None") else word for word in args]
        return super().parse_args(args, *others, **options)

    def _print_message(self, message: str, file: Any = None) -> None:
        with contextlib.suppress(OSError):  # a closed pipe; argparse of Python 3.10 does not suppress it itself
            super()._print_message(message, file)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error, and exit with status 2."""
        if not self.exit_on_error:  # a nested parser: its caller may try another type
            super().error(message, ex)
        unknown = unknown_key(message)
        hint = _suggestion(unknown, self.options) if unknown else ""
        if lacks_model(message):
            hint = ": name a model in the configuration or on the command line (model: {class_path: …})."
        fail(without_noise(message) + hint, status=2)


def refused_by_lightning(error: Exception) -> bool:
    """Whether Lightning itself raised ``error`` about the user's settings, not torch or a module below it.

    Except for ``MisconfigurationException`` such errors have no type of their own: EarlyStopping raises a RuntimeError
    for an unknown metric.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_in = str(frames[-1].f_globals.get("__name__")) if frames else ""
    return isinstance(error, RuntimeError | ValueError) and raised_in.startswith("lightning.")


def fail(message: str, status: int) -> NoReturn:
    """Print an error in one line, and exit."""
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    raise SystemExit(status)


def _suggestion(key: str, options: Sequence[str]) -> str:
    """Suggest options of the command, or arguments of this package and the Trainer, that are spelt like ``key``."""
    public = [] if options else [getattr(lit_sparse, name) for name in dir(lit_sparse)]
    classes = (kind for kind in public if isinstance(kind, type) and kind.__module__.startswith("lit_sparse."))
    kinds: list[Any] = [kind for kind in classes if not issubclass(kind, (Exception, dict))]
    known = options or {argument for kind in [Trainer, *kinds] for argument in inspect.signature(kind).parameters}
    close = difflib.get_close_matches(key.rpartition(".")[2], known)
    if close:
        return f". Did you mean {' or '.join(map(repr, close))}?"
    return f". --{'help' if options else 'print_config'} lists the known ones."
