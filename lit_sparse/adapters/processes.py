"""Whether the run has several processes."""

from torch import distributed


def is_distributed() -> bool:
    """Whether there is a process group."""
    return distributed.is_available() and distributed.is_initialized()
