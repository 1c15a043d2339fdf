"""``lit-sparse export`` and ``lit-sparse merge``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lit_sparse.cli.arguments import spelled_out
from lit_sparse.cli.parser import SparseParser
from lit_sparse.serving.from_checkpoint import export_checkpoint
from lit_sparse.verbosity import show

# Command → (summary, the arguments of export_checkpoint that it sets).
_COMMANDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "export": ("Export the adapters of a checkpoint.", {}),
    "merge": (
        "Write the whole model of a checkpoint with its adapters merged.",
        {"format": "merged", "layout": "padded", "with_head": True},
    ),
}
NAMES = tuple(_COMMANDS)


def summary(name: str) -> str:
    """One line for ``--help``."""
    return _COMMANDS[name][0]


def parser(name: str, **options: Any) -> SparseParser:
    """The parser of a command, without the arguments that the command sets."""
    made = SparseParser(description=summary(name), **options)
    made.add_function_arguments(export_checkpoint, skip=set(_COMMANDS[name][1]))
    return made


def run(words: Sequence[str], program: str, name: str) -> None:
    """Run a command.

    Args:
        words: The words after the name of the command.
        program: Name of the program, for the help.
        name: One of :data:`NAMES`.

    Raises:
        UsageError: As :func:`export_checkpoint`.
    """
    arguments = parser(name, prog=f"{program} {name}").parse_args(spelled_out(words, export_checkpoint)).as_dict()
    show(str(export_checkpoint(**arguments, **_COMMANDS[name][1])))
