"""What other packages say on the terminal: hide what no user of this one can act on, by their names and words."""

from __future__ import annotations

import logging
import sys
import warnings

# Logger → the words in its message.
_ADVERTS = ("try installing [litlogger]", "try installing [litmodels]")
_MESSAGES = {
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),  # kernels for hardware that is not there
    "torch.utils._pytree": ("Calling register_constant() on Enum subclasses is deprecated",),  # torchao's own enums
    "lightning.pytorch.utilities.rank_zero": _ADVERTS,
    "lightning.fabric.utilities.rank_zero": _ADVERTS,  # of the two, that of the package which was imported last
}
# Beginning of a warning, as a regular expression, and the module that it is said of.
_WARNINGS = (
    (r"`isinstance\(treespec, LeafSpec\)` is deprecated", r"lightning\."),
    (r"The number of training batches \(\d+\) is smaller than the logging interval", r"lightning\."),
)


class _Without(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not any(words in record.getMessage() for words in _MESSAGES[record.name])


class _Stderr:
    """Standard error as it is when a line is written: on a terminal, a progress bar takes its lines and makes room."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def lead_around_bars() -> None:
    """Let Lightning's messages appear above a progress bar, not in the middle of it."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            if type(handler) is logging.StreamHandler:  # not a user's file
                handler.setStream(_Stderr())


def hide_noise() -> None:
    """Hide it from now on in this process, before the packages are imported."""
    for name in _MESSAGES:
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Without) for known in logger.filters):
            logger.addFilter(_Without())
    for message, module in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, module=module)
