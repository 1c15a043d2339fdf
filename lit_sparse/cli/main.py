"""``lightning``, ``lit-sparse`` and ``python -m lit_sparse``: help and version at once, the rest when it is named."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import entry_points

from lit_sparse._version import __version__
from lit_sparse.cli.noise import hide_noise
from lit_sparse.cli.words import closest, fail

# Title → command → what it does. Other words go to the lightning command of another package, if there is one.
_GROUPS: Mapping[str, Mapping[str, str]] = {
    "Train": {
        "init": "Write a configuration for a task, a backbone and your rows.",
        "fit": "Train with a configuration; options after it override its keys.",
        "validate": "Measure on the validation rows; --ckpt_path names the checkpoint.",
        "test": "Measure on the test rows; --ckpt_path names the checkpoint.",
        "predict": "Predict; the callback PredictionWriter writes the predictions.",
    },
    "Look and share": {
        "inspect": "List what a configuration adapts, or adapters that are stored.",
        "export": "Export the adapters of a checkpoint.",
        "merge": "Write the whole model of a checkpoint with its adapters merged.",
        "combine": "Add up several adapters of one backbone to one.",
    },
    "Language models": {
        "chat": "Talk with a checkpoint, an adapter's folder or a whole model.",
        "evaluate": "Judge one of these by the tasks of lm-eval.",
        "edit": "Edit facts of a file; also edit fact, apply, combine, list, remove.",
    },
}
COMMANDS = {name: summary for group in _GROUPS.values() for name, summary in group.items()}
_ALL = ", ".join(COMMANDS)
_HELP = """usage: {program} [--help] [--version] [--quiet] COMMAND ...

Fine-tune Hugging Face models with sparse adapters (SoRA, RoseLoRA), or train
any LightningModule of yours.
{commands}

{program} COMMAND --help lists the options of a command, and that of fit all
modules, data modules and methods. A first run, with a file of the package:
  {program} fit --config lit_sparse://quickstart.yaml
--quiet hides all but results, warnings and errors.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Errors that a user can fix are printed in one line, with status 1, or 2 if the words or the configuration do not
    parse; others keep their traceback. ``LIT_SPARSE_TRACEBACK=1`` shows all tracebacks. A run that SIGTERM stopped ends
    with status 143, as a shell reports the signal.

    Args:
        args: Words after the program's name; None: those of the process.
    """
    words = sys.argv[1:] if args is None else list(args)
    command, program = _command(words), _program()
    if command is None and "--version" in words:
        _say(f"{program} {__version__}\n")
    elif not words or (command is None and {"-h", "--help"} & set(words)):
        _say(_help(program))
    elif command is None:
        fail(f"A command is missing before or after {' '.join(words)!r}: {_ALL}.", status=2)
    elif command not in COMMANDS:
        fail(f"There is no command {command!r}.{closest(command, COMMANDS) or f' The commands are {_ALL}.'}", status=2)
    else:
        hide_noise()
        from lit_sparse.cli.lightning_cli import run  # imports torch and lightning, which takes seconds

        run(command, words, program)


def lightning_main() -> None:
    """``lightning``: our commands, and those of another package that installs a program of that name."""
    command = _command(sys.argv[1:])
    programs = entry_points(group="console_scripts", name="lightning")
    other = next((program for program in programs if program.module != __name__), None)  # such as lightning_sdk's
    if command is not None and command not in COMMANDS and other is not None:
        other.load()()
        return
    main()


def _command(words: Sequence[str]) -> str | None:
    """The first word that is no option, nor the value of one before the command."""
    values = {i + 1 for i, word in enumerate(words) if word in ("-c", "--config")}
    return next((word for i, word in enumerate(words) if not word.startswith("-") and i not in values), None)


def _help(program: str) -> str:
    lines = []
    for title, commands in _GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:<10}{summary}" for name, summary in commands.items())]
    return _HELP.format(program=program, commands="\n".join(lines))


def _say(text: str) -> None:
    """Print and exit; a closed pipe is no error."""
    with suppress(OSError):
        sys.stdout.write(text)
    raise SystemExit(0)


def _program() -> str:
    name = os.path.basename(sys.argv[0])  # noqa: PTH119  # a word, not a path
    return "python -m lit_sparse" if name == "__main__.py" else name
