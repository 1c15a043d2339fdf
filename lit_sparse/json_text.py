"""JSON that others wrote."""

import json
from typing import Any


def parse(text: str) -> Any:
    """``json.loads``, but a byte-order mark may come first, and whatever is wrong has one kind of error.

    Raises:
        ValueError: If it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
