"""``--quiet``: one switch for everything that shows how far something is."""

import logging
import sys
from collections.abc import Iterator, Sequence

import datasets
import transformers
from huggingface_hub.utils.tqdm import disable_progress_bars
from tqdm.auto import tqdm

_LIGHTNING = "lightning.pytorch"


def be_quiet() -> None:
    """Show no progress and no tables of training from now on; warnings and errors stay."""
    for name in (_LIGHTNING, "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()


def is_quiet() -> bool:
    """Whether Lightning's logger keeps to itself what is no warning, by ``--quiet`` or by the user's own setting."""
    return not logging.getLogger(_LIGHTNING).isEnabledFor(logging.INFO)


def say(text: str) -> None:
    """Tell on the standard output what a command did, unless it is quiet."""
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
