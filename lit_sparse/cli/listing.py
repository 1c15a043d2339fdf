"""The public classes of this package in the help of the commands that take a configuration."""

from __future__ import annotations

import inspect
import shutil
import textwrap

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.strategies import Strategy

import lit_sparse
from lit_sparse.cli.parser import plain
from lit_sparse.methods.base import SparseMethod

# Title, option and base of each kind.
_KINDS: tuple[tuple[str, str, type], ...] = (
    ("Modules", "--model", LightningModule),
    ("Data", "--data", LightningDataModule),
    ("Methods", "--model.method", SparseMethod),
    ("Callbacks", "--trainer.callbacks+", Callback),
    ("Strategies", "--trainer.strategy", Strategy),
)
_ARGUMENTS = """--model.help CLASS and --data.help CLASS list the arguments of a class, and
--model CLASS --model.method.help CLASS those of a method."""


def listing() -> str:
    """A line for each class, by kind, as wide as the terminal."""
    public = {name: getattr(lit_sparse, name) for name in dir(lit_sparse)}
    width = min(shutil.get_terminal_size().columns, 120)
    lines = ["CLASS is one of these, or the class path of your own; a bare name suffices in a configuration too."]
    for title, option, base in _KINDS:
        kinds = {n: kind for n, kind in public.items() if isinstance(kind, type) and issubclass(kind, base)}
        lines += ["", f"{title}, {option} CLASS:"]
        for name, kind in kinds.items():
            if kind is not base:
                summary = plain((inspect.getdoc(kind) or "").partition("\n\n")[0])
                lines.append(f"  {name:<23} {textwrap.shorten(summary, width - 26, placeholder=' …')}")
    return "\n".join([*lines, "", _ARGUMENTS])
