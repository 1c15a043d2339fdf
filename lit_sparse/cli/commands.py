"""Commands that take no configuration: a function each, whose arguments are the options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from docstring_parser import parse

from lit_sparse.cli.parser import SparseParser
from lit_sparse.verbosity import show

_BOOLEANS = ("true", "false", "yes", "no", "null")  # values of a switch; any other word after it is not its value


class Command(NamedTuple):
    """A function as a command; the help has the texts of its docstring.

    Args:
        function: The function. If it returns something, that is shown.
        words: Its arguments that are words without ``--``; one that is a list takes several words.
        repeated: Its arguments whose options may be given several times.
        numbers: Its arguments whose options take several numbers.
        fixed: Its arguments that are no options, and their values.
    """

    function: Callable[..., object]
    words: Sequence[str] = ()
    repeated: Sequence[str] = ()
    numbers: Sequence[str] = ()
    fixed: Mapping[str, Any] = MappingProxyType({})

    def run(self, words: Sequence[str], program: str, summary: str | None = None) -> None:
        """Parse the words after the command's name, and call the function.

        Args:
            words: The words.
            program: Names of the program and of the command, for the help.
            summary: What the command does; None: the first paragraph of the docstring.
        """
        text = parse(inspect.getdoc(self.function) or "")
        taken = inspect.signature(self.function, eval_str=True).parameters
        about = {argument.arg_name: argument.description for argument in text.params}
        parser = SparseParser(prog=program, description=summary or text.short_description)
        for name in self.words:
            several = {} if taken[name].annotation is str else {"nargs": "+"}
            parser.add_argument(name, type=str, help=about[name], **several)
        for name in self.repeated:
            parser.add_argument(f"--{name}", action="append", type=str, help=about[name])
        for name in self.numbers:
            parser.add_argument(f"--{name}", nargs="+", type=float, help=about[name])
        skipped: set[str | int] = {*self.words, *self.repeated, *self.numbers, *self.fixed}
        parser.add_function_arguments(self.function, skip=skipped)
        given = parser.parse_args(spelled_out(words, self.function)).as_dict()
        found = self.function(**given, **self.fixed)
        if found is not None:
            show(str(found))


def spelled_out(words: Sequence[str], function: Callable[..., object]) -> list[str]:
    """Options of a command as its parser knows them: ``--require-final`` becomes ``--require_final=true``.

    Args:
        words: The words after the name of the command.
        function: The function that the command calls. Options may have dashes in place of underscores, and those with
            a boolean default need no value.
    """
    options = inspect.signature(function).parameters
    changed = []
    for word, following in zip(words, [*words[1:], "--"], strict=False):
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in options:
            changed.append(word)
            continue
        if not equals and isinstance(options[name].default, bool) and following.lower() not in _BOOLEANS:
            equals, value = "=", "true"
        changed.append(f"--{name}{equals}{value}")
    return changed
