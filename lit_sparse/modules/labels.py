"""Number, names and order of the classes of a task, in its data and in the head of its backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lit_sparse.adapters.head import task_head
from lit_sparse.errors import UsageError, listed, require_range
from lit_sparse.interchange.snippet import labels_of
from lit_sparse.methods.method import Method
from lit_sparse.modules.base import SparseModule


class LabelledModule(SparseModule):
    """A module whose head has an output for each of its labels.

    Args:
        num_labels: Number of classes or tags, 1 for regression; None: the data module's, or the built model's.
        label_names: Names of the classes in the order of their numbers; None: the data module's.
        options: Further arguments of :class:`~lit_sparse.SparseModule`.

    Raises:
        UsageError: If an argument is outside its range, the backbone cannot be loaded, or the number of labels
            is not known.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        method: Method,
        *,
        num_labels: int | None = None,
        label_names: list[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(backbone, method, **options)
        require_range("num_labels", num_labels, at_least=1)
        if label_names is not None and num_labels is not None and len(label_names) != num_labels:
            raise UsageError(f"num_labels is {num_labels}, but label_names has {len(label_names)}: {label_names}.")
        self.num_labels = num_labels
        self.label_names = label_names

    def load_model(self) -> nn.Module:
        """Load the backbone with a new head of ``num_labels`` outputs, unless it has one of that size."""
        self.backbone_args = {**self._head_arguments(), **self.backbone_args}
        return super().load_model()

    def _prepare_head(self, model: nn.Module) -> None:
        """Give the head the labels of the data."""
        if self.label_names is not None:
            name_classes(model, self.label_names, self.method.train_head)

    def _check_model(self) -> None:
        # In the checkpoint, so that it loads without a data module.
        self.hparams.update(num_labels=self._known_num_labels(), label_names=self.label_names)

    def _ask_data(self) -> None:
        """Take what was not given from the data module, and refuse what contradicts it."""
        count = getattr(self._data, "num_labels", None)
        names = getattr(self._data, "label_names", None)
        if self.num_labels is None:
            self.num_labels = count
        elif count is not None and count != self.num_labels:
            raise UsageError(
                f"num_labels is {self.num_labels}, but the data has {count} ({names}). Leave num_labels out to take "
                "it from the data."
            )
        if self.label_names is None:
            self.label_names = names

    def _head_arguments(self) -> dict[str, Any]:
        """Arguments by which ``from_pretrained`` makes the head."""
        # A head of another task, such as MNLI's three classes for RTE, gives way to a new one.
        return {"num_labels": self._known_num_labels(), "ignore_mismatched_sizes": True}

    def _known_num_labels(self) -> int:
        if self.num_labels is not None:
            return self.num_labels
        if self._built:
            count = getattr(getattr(self._built[0], "config", None), "num_labels", None)
            if isinstance(count, int):
                return count
        raise UsageError("The number of labels is not known: give num_labels, or fit with a data module that has it.")

    def _names(self) -> list[str]:
        config: Any = getattr(self.model, "config", None)
        return self.label_names or [config.id2label[number] for number in range(self._known_num_labels())]


def name_classes(model: nn.Module, names: Sequence[str], train_head: bool | list[str]) -> None:
    """Give the classes of a model the names of the data's, so that each output belongs to the class of its name.

    A pretrained head has classes of its own. If they have the names of the data's classes, ignoring case, the rows of
    the head are put into the data's order. If they have other names, the head stays as it is, with a warning.

    Args:
        model: Model with a head of as many classes. A model without a configuration of transformers stays unchanged.
        names: Names of the classes in the data, in the order of their numbers.
        train_head: The method's ``train_head``: the modules of the head that are trained and exported.

    Raises:
        UsageError: If the head is in another order and stays frozen, so that an export would not hold the new order.
    """
    config: Any = getattr(model, "config", None)
    if config is None or getattr(config, "num_labels", None) != len(names):
        return
    own = labels_of(model)
    if own is not None and own != list(names):
        order = _order(own, names)
        if order is None:
            rank_zero_warn(
                f"The backbone's head has the classes {own}, the data {list(names)}. The head is kept: its first class "
                "stands for the data's first, and so on. If that is wrong, use a backbone without this head."
            )
        elif order != list(range(len(names))):
            _reorder(model, order, own, train_head)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}


def _order(own: Sequence[str], names: Sequence[str]) -> list[int] | None:
    """The number in ``own`` of each of ``names``; None unless both have the same classes."""
    numbers = {name.casefold(): number for number, name in enumerate(own)}
    wanted = [name.casefold() for name in names]
    return [numbers[name] for name in wanted] if len(numbers) == len(own) and set(wanted) == set(numbers) else None


@torch.no_grad()
def _reorder(model: nn.Module, order: list[int], own: list[str], train_head: bool | list[str]) -> None:
    heads = task_head(model)
    inside = tuple(f"{head}." for head in heads)
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if f"{name}.".startswith(inside) and isinstance(module, nn.Linear) and module.out_features == len(order)
    ]
    if not layers:
        raise UsageError(
            f"The backbone's classes are {own}, in another order than the data's, and no linear layer of its head "
            f"{listed(heads)} gives them. Give the data's labels in this order."
        )
    name, last = layers[-1]
    if train_head is False or (
        train_head is not True and not f"{name}.".startswith(tuple(f"{t}." for t in train_head))
    ):
        raise UsageError(
            f"The backbone's classes are {own}, in another order than the data's, and its head stays frozen. Give the "
            "data's labels in this order, or train the head (train_head)."
        )
    for parameter in (last.weight, last.bias):
        if parameter is not None:
            parameter.copy_(parameter[order])
