"""``--quiet``: one switch for everything that shows how far something is."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tqdm.auto import tqdm

_state = {"quiet": False}
_LOGGERS = ("lightning.pytorch", "lightning.fabric")


def be_quiet() -> None:
    """Show no progress and no tables of training from now on; warnings and errors stay."""
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
    # Here, for they take half a second that a callback in a user's own program need not pay.
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
    """A progress bar of work that has a few stages; every ``next`` begins one. A file or a pipe gets none.

    Args:
        title: What is done.
        names: What is done in each stage.
    """
    with tqdm(total=len(names), desc=title, leave=False, disable=True if is_quiet() else None) as bar:
        for name in names:
            bar.set_postfix_str(name)
            yield
            bar.update()
