"""Bring the classes of a head that came with its backbone into the order of the data's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lit_sparse.adapters.head import task_head
from lit_sparse.errors import UsageError, listed
from lit_sparse.interchange.snippet import labels_of


def name_classes(model: nn.Module, names: Sequence[str], train_head: bool | list[str]) -> None:
    """Name the classes of ``model`` as the data does, and let each output be the class of its name.

    A head that came with the weights has classes of its own. Where their names are those of the data, case aside, its
    rows are put into the data's order; where they are others, they stay as they are, with a warning.

    Args:
        model: With a head for as many classes; a model without a configuration of transformers is left alone.
        names: In the order of the data's numbers.
        train_head: The method's: what of the head is trained, and so kept with the adapters.

    Raises:
        UsageError: If a head in another order stays frozen, so that an export would not hold the new order.
    """
    config: Any = getattr(model, "config", None)
    if config is None or getattr(config, "num_labels", None) != len(names):
        return
    own = labels_of(model)
    if own is not None and own != list(names):
        order = _order(own, names)
        if order is None:
            rank_zero_warn(
                f"The backbone's head has the classes {own}, the data {list(names)}: the head is kept, its first class "
                "for the data's first and so on. If they mean something else, take a backbone without this head."
            )
        elif order != list(range(len(names))):
            _reorder(model, order, own, train_head)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}


def _order(own: Sequence[str], names: Sequence[str]) -> list[int] | None:
    """Number in ``own`` of each of ``names``; None unless both name the same classes."""
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
