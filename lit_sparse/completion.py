"""What a shell needs to complete commands and options."""

from __future__ import annotations

import argparse
import sys
from typing import Any

_SCRIPT = """# Commands and options of lit-sparse and lightning, for bash.
# zsh reads it too, after: autoload -U bashcompinit && bashcompinit
_lit_sparse() {{
    local words
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    if [ "$COMP_CWORD" -eq 1 ]; then words="{first}"; fi
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _lit_sparse lit-sparse lightning
"""


class PrintCompletion(argparse.Action):
    """``--print_completion``: print a script for bash, and exit.

    Written by us: what jsonargparse (4.53) makes with shtab follows every class that a key may name, and is not done
    after minutes.
    """

    def __init__(self, option_strings: list[str], **_: Any) -> None:
        super().__init__(
            option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS,
            help="Print a script that lets bash and zsh complete commands and options, and exit.",
        )  # fmt: skip

    def __call__(self, parser: Any, *_: Any) -> None:
        """Print it."""
        commands: dict[str, Any] = parser._subcommands_action._name_parser_map
        sys.stdout.write(bash_script(parser, commands))
        parser.exit()


def bash_script(parser: argparse.ArgumentParser, commands: dict[str, argparse.ArgumentParser]) -> str:
    """A function for bash that completes a command first, then its options; files where nothing fits.

    Args:
        parser: That of the program.
        commands: Those of its commands, by name.
    """
    cases = [f'        {name}) words="{" ".join(_options(command))}" ;;' for name, command in commands.items()]
    first = [*commands, *_options(parser)]
    return _SCRIPT.format(cases="\n".join(cases), first=" ".join(first))


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [option for option in parser._option_string_actions if option.startswith("--")]
