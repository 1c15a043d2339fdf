"""The base of data modules for causal language models: padded rows, or sequences packed with whole rows."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from datasets import Dataset

from lit_sparse._version import __version__
from lit_sparse.data.padding import IGNORED, PadRows
from lit_sparse.data.readers import Rows
from lit_sparse.data.rows import Collator
from lit_sparse.data.tables import fingerprint
from lit_sparse.data.text import TextData
from lit_sparse.errors import require_range


@dataclass(kw_only=True, eq=False, repr=False)
class CausalData(TextData):
    """Serves rows of ``input_ids`` and ``labels`` to a causal language model; the base of such data modules.

    Args:
        packing: Whether a training sequence holds as many whole rows as fit into ``max_length``, so that little of a
            batch is padding. ``batch_size`` then counts sequences. Positions restart at every row, and a row attends
            to itself alone: its loss is the same as without packing. The rows of a sequence stay together in every
            epoch. Validation, test and prediction are never packed.
    """

    packing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("max_length", self.max_length, at_least=2)  # nothing comes before a first token to predict it

    def _collator(self, role: str) -> Collator:
        return PadRows(self.pad_token_id, left=role == "predict")

    def _hold_out(self, rows: Dataset, role: str) -> Dataset:
        """The part of ``rows`` that plays ``role``, packed if it is trained on."""
        rows = super()._hold_out(rows, role)
        if not self.packing or role != "train":
            return rows
        return rows.map(
            partial(packed, max_length=self._token_limit),
            batched=True,
            remove_columns=rows.column_names,
            new_fingerprint=fingerprint([rows._fingerprint, "packed", self._token_limit, __version__]),
            desc="Packing train",
        )


def packed(rows: Rows, max_length: int) -> Rows:
    """Join rows to sequences of at most ``max_length`` tokens, longest rows first, each where it fits best.

    Args:
        rows: ``input_ids`` and ``labels``, one list of integers for each row; none is longer than ``max_length``.
        max_length: Longest sequence.

    Returns:
        ``input_ids``, ``labels``, ``position_ids``, which restart at 0 with every row, and ``length`` of each sequence.
        The first label of a row is -100: the token before it belongs to another row.
    """
    packs = best_fit([len(ids) for ids in rows["input_ids"]], max_length)
    joined: Rows = {"input_ids": [], "labels": [], "position_ids": [], "length": []}
    for pack in packs:
        ids = [rows["input_ids"][row] for row in pack]
        joined["input_ids"].append([token for row in ids for token in row])
        joined["labels"].append([label for row in pack for label in [IGNORED, *rows["labels"][row][1:]]])
        joined["position_ids"].append([position for row in ids for position in range(len(row))])
        joined["length"].append(sum(map(len, ids)))
    return joined


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Divide items among few bins by best-fit decreasing.

    Args:
        lengths: Length of each item, at most ``room``.
        room: Size of a bin.

    Returns:
        Numbers of the items in each bin. Equal lengths keep their order, so that all processes agree.

    Source:
        Johnson 1973, Near-optimal bin packing algorithms.
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # free room and number of each bin, sorted
    for item in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        place = bisect_left(free, (lengths[item], 0))
        left, number = free.pop(place) if place < len(free) else (room, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(item)
        insort(free, (left - lengths[item], number))
    return bins
