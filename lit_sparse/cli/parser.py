"""The parser of the command line, and what is wrong with what a user wrote, in one line."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

import lit_sparse
from lit_sparse.cli.arguments import with_packaged_configs
from lit_sparse.foreign_errors import lacks_model, unknown_key, without_noise


class SparseParser(LightningArgumentParser):
    """Reports an error in one line, and takes no abbreviations: ``max_epoch`` would pass for ``max_epochs``."""

    options: Sequence[str] = ()
    """The options of a command that takes no configuration."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **options: Any) -> Any:  # type: ignore[override]
        """Parse, with configurations of the package found.

        A key two classes deep that is None comes here as the word None (jsonargparse 4.53): it is made null again.
        """
        if self.exit_on_error:
            args = with_packaged_configs(sys.argv[1:] if args is None else args)
        elif args is not None:
            args = [f"{word.removesuffix('None')}null" if word.endswith("=None") else word for word in args]
        return super().parse_args(args, *others, **options)

    def _print_message(self, message: str, file: Any = None) -> None:
        with contextlib.suppress(OSError):  # who read has gone; newer argparse does so itself, Python 3.10's does not
            super()._print_message(message, file)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong, and exit with status 2."""
        if not self.exit_on_error:  # a parser within ours: its caller may have another type to try
            super().error(message, ex)
        unknown = unknown_key(message)
        hint = _suggestion(unknown, self.options) if unknown else ""
        if lacks_model(message):
            hint = ": name a model in the configuration or on the command line (model: {class_path: …})."
        fail(without_noise(message) + hint, status=2)


def refused_by_lightning(error: Exception) -> bool:
    """Whether Lightning itself raised ``error``, as it does about what a user asked of it.

    Its other errors than ``MisconfigurationException`` have no type of their own: EarlyStopping raises a RuntimeError
    for a metric that is not there. One that comes from deeper, in torch or a module, is none of these.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_in = str(frames[-1].f_globals.get("__name__")) if frames else ""
    return isinstance(error, RuntimeError | ValueError) and raised_in.startswith("lightning.")


def fail(message: str, status: int) -> NoReturn:
    """Print a line of error, and exit."""
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    raise SystemExit(status)


def _suggestion(key: str, options: Sequence[str]) -> str:
    """Options of the command, else arguments of ours or of the Trainer, spelt like the last part of ``key``."""
    public = [] if options else [getattr(lit_sparse, name) for name in dir(lit_sparse)]
    kinds: list[Any] = [kind for kind in public if isinstance(kind, type) and not issubclass(kind, Exception)]
    known = options or {argument for kind in [Trainer, *kinds] for argument in inspect.signature(kind).parameters}
    close = difflib.get_close_matches(key.rpartition(".")[2], known)
    if close:
        return f". Did you mean {' or '.join(map(repr, close))}?"
    return f". --{'help' if options else 'print_config'} lists what there is."
