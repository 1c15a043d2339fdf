"""``--quiet``: one switch for progress bars, tables and messages."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tqdm.auto import tqdm

_state = {"quiet": False}
_LOGGERS = ("lightning.pytorch", "lightning.fabric")


def be_quiet() -> None:
    """Hide progress bars, tables and messages from now on, but not warnings and errors."""
    _state["quiet"] = True
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    _show_bars(False)


@contextmanager
def quiet_within() -> Iterator[None]:
    """Undo :func:`be_quiet` at the end of the context: a process may run several commands."""
    was, levels = is_quiet(), {name: logging.getLogger(name).level for name in _LOGGERS}
    try:
        yield
    finally:
        if is_quiet() and not was:
            _state["quiet"] = False
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            _show_bars(True)


def _show_bars(shown: bool) -> None:
    # Imported here: they take half a second, which a user's program that needs only a callback does not pay.
    import datasets
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    if shown:
        datasets.enable_progress_bars()
        transformers.utils.logging.enable_progress_bar()
        enable_progress_bars()
    else:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
        disable_progress_bars()


def is_quiet() -> bool:
    """Whether :func:`be_quiet` was called in this process."""
    return _state["quiet"]


def show(text: str) -> None:
    """Print what a command did, unless ``--quiet`` was given."""
    if not is_quiet():
        sys.stdout.write(f"{text}\n")


def stages(title: str, names: Sequence[str]) -> Iterator[None]:
    """Show a progress bar of a few stages on a terminal; every ``next`` starts a stage.

    Args:
        title: Name of the work.
        names: Names of its stages.
    """
    with tqdm(total=len(names), desc=title, leave=False, disable=True if is_quiet() else None) as bar:
        for name in names:
            bar.set_postfix_str(name)
            yield
            bar.update()
