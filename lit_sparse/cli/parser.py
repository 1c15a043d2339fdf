"""The parser of the command line, which reports an error in one line."""

from __future__ import annotations

import contextlib
import inspect
import pydoc
import re
import shutil
import sys
import textwrap
import traceback
from argparse import _SubParsersAction
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning.pytorch import Callback, LightningDataModule, LightningModule, callbacks
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import Strategy
from torch import optim

import lit_sparse
from lit_sparse.cli.config_files import ConfigFile
from lit_sparse.cli.words import closest, fail
from lit_sparse.foreign_errors import lacks_model, unknown_choice, unknown_class, unknown_key, without_noise
from lit_sparse.methods.base import SparseMethod
from lit_sparse.methods.method import Method

# In the help of jsonargparse: every subclass that any package defines, hundreds of torch.nn.Module.
_SUBCLASSES = re.compile(r",\s+known\s+subclasses:[^)]*(?=\))")
_MARKS = re.compile(r":\w+:`~?(?:lit_sparse\.)?([^`]+)`|``([^`]+)``")
# Title, option and base of each kind.
_KINDS: tuple[tuple[str, str, type], ...] = (
    ("Modules", "--model", LightningModule),
    ("Data", "--data", LightningDataModule),
    ("Methods", "--model.method", Method),
    ("Callbacks", "--trainer.callbacks+", Callback),
    ("Strategies", "--trainer.strategy", Strategy),
)
_ARGUMENTS = """--model.help CLASS and --data.help CLASS list the arguments of a class, and
--model CLASS --model.method.help CLASS those of a method."""


class SparseParser(LightningArgumentParser):
    """Report an error in one line, and accept no abbreviations: ``max_epoch`` would pass for ``max_epochs``."""

    lists_classes = False
    """Whether the help lists the public classes of this package above the options."""

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

    def format_help(self, formatter: Any = None) -> str:
        """The help, without the classes of other packages and the marks of docstrings."""
        text = _SUBCLASSES.sub("", super().format_help(formatter))
        if self.lists_classes:
            text = text.replace("\noptions:\n", f"\n{_listing()}\n\noptions:\n", 1)
        return plain(text)

    def _print_message(self, message: str, file: Any = None) -> None:
        with contextlib.suppress(OSError):  # a closed pipe; argparse of Python 3.10 does not suppress it itself
            super()._print_message(message, file)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error, and exit with status 2."""
        if not self.exit_on_error:  # a nested parser: its caller may try another type
            super().error(message, ex)
        hint = self._other_key(message) or _other_class(message) or _other_choice(message)
        if lacks_model(message):
            hint = ": name a model in the configuration or on the command line (model: {class_path: …})."
        fail(without_noise(message) + hint, status=2)

    def _other_key(self, message: str) -> str:
        """Suggest keys of the same level that are spelt like one that jsonargparse does not know."""
        found = unknown_key(message)
        if found is None:
            return ""
        class_path, key = found
        known = _arguments(class_path) if class_path else self._keys()
        above, word = "", ""
        for word in key.removeprefix("--").replace("-", "_").split("."):
            level = {name.removeprefix(above).partition(".")[0] for name in known if name.startswith(above)}
            if word not in level:
                break
            above += f"{word}."
        close = closest(word, level, f"--{above}{{}}" if key.startswith("--") else "{!r}")
        listed = "print_config" if "print_config" in self._keys() else "help"
        return f".{close}" if close else f". --{listed} lists the known ones."

    def _keys(self) -> set[str]:
        """Options of this parser, and of the command in it."""
        found = {name[2:].rstrip("+") for name in self._option_string_actions if name.startswith("--")}
        nested = (action.choices.values() for action in self._actions if isinstance(action, _SubParsersAction))
        return found.union(*(command._keys() for commands in nested for command in commands))


def refused_by_lightning(error: Exception) -> bool:
    """Whether Lightning itself raised ``error`` about the user's settings, not torch or a module below it.

    Except for ``MisconfigurationException`` such errors have no type of their own: EarlyStopping raises a RuntimeError
    for an unknown metric.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_in = str(frames[-1].f_globals.get("__name__")) if frames else ""
    return isinstance(error, RuntimeError | ValueError) and raised_in.startswith("lightning.")


def plain(text: str) -> str:
    """A text of a docstring without the marks of code and of links."""
    return _MARKS.sub(r"\1\2", text)


def _listing() -> str:
    """A line for each class, by kind, as wide as the terminal."""
    public = {name: getattr(lit_sparse, name) for name in dir(lit_sparse)}
    width = min(shutil.get_terminal_size().columns, 120)
    lines = ["CLASS is one of these, or the class path of your own; a bare name suffices in a configuration too."]
    for title, option, base in _KINDS:
        kinds = {n: kind for n, kind in public.items() if isinstance(kind, type) and issubclass(kind, base)}
        lines += ["", f"{title}, {option} CLASS:"]
        for name, kind in kinds.items():
            if kind not in (base, SparseMethod):
                summary = plain((inspect.getdoc(kind) or "").partition("\n\n")[0])
                lines.append(f"  {name:<23} {textwrap.shorten(summary, width - 26, placeholder=' …')}")
    return "\n".join([*lines, "", _ARGUMENTS])


def _arguments(class_path: str) -> set[str]:
    """Arguments of a class and of those that it is made of, to which it may pass some on; and ``init_args``."""
    kinds = getattr(pydoc.locate(class_path), "__mro__", ())
    names = {name for kind in kinds for name in inspect.signature(kind.__init__).parameters}
    return names - {"self", "args", "kwargs"} | {"init_args"}


def _other_class(message: str) -> str:
    """Suggest classes that are spelt like one that jsonargparse did not find."""
    found = unknown_class(message)
    if found is None:
        return ""
    module, name = found
    known = dir(sys.modules[module]) if module in sys.modules else [*dir(lit_sparse), *dir(callbacks), *dir(optim)]
    close = closest(name, (word for word in known if word[:1].isupper()))
    return f".{close}" if close else ""


def _other_choice(message: str) -> str:
    """Suggest a value that is spelt like one that jsonargparse does not accept."""
    close = closest(*found) if (found := unknown_choice(message)) else ""
    return f".{close}" if close else ""
