"""Merge low-rank changes entry by entry, and write the result by its singular values."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lit_sparse.adapters.factors import LayerFactors, layer_of
from lit_sparse.combining.recipe import Recipe
from lit_sparse.combining.sources import Addend
from lit_sparse.functional.combining import Conflicts, conflicts, merged, trim_threshold

Layers = dict[str, LayerFactors]


@torch.no_grad()
def refactored(addends: Sequence[Addend], recipe: Recipe, names: Sequence[str]) -> tuple[Layers, float, Conflicts]:
    """Merge changes entry by entry, and write the result as B and A by its largest singular values.

    One layer's changes are formed at a time; those of TIES three times, since it trims all layers of a source together.

    Args:
        addends: The sources.
        recipe: With the rule ``ties`` or ``dare``. DARE draws layer by layer, and source by source within a layer.
        names: The layers to merge, in the model's order.

    Returns:
        Layers that keep a rank, with at most as many as the sources have together; the square of the Frobenius norm of
        the merged change; the entries that sources share.
    """
    weights, rule, density = recipe.weights, recipe.rule, recipe.density
    thresholds = [
        trim_threshold(functools.partial(_changes, addend, weight, names), density) if rule == "ties" else 0.0
        for addend, weight in zip(addends, weights, strict=True)
    ]
    generator = torch.Generator().manual_seed(recipe.seed)
    layers: Layers = {}
    square, shared = 0.0, Conflicts(0, 0)
    for name in names:
        own = [i for i, addend in enumerate(addends) if name in addend.layers]
        ranks = torch.tensor([addends[i].layers[name].ranks for i in own]).sum(0).tolist()
        parts = zip(*(_changes(addends[i], weights[i], [name]) for i in own), strict=True)
        A, B_t = [], []
        for rank, changes in zip(ranks, parts, strict=True):
            flat = torch.stack([change.flatten() for change in changes])
            shared += conflicts(flat)
            matrix = merged(flat, rule, [thresholds[i] for i in own], density, generator).view_as(changes[0])
            square += float(matrix.double().square().sum())
            rows_A, rows_B_t = _largest(matrix, rank)
            A.append(rows_A)
            B_t.append(rows_B_t)
        if any(map(len, A)):
            layers[name] = layer_of(name, A, B_t)
    return layers, square, shared


def _changes(addend: Addend, weight: float, names: Sequence[str]) -> Iterator[Tensor]:
    """The weighted change of each matrix of each layer, in float32."""
    for layer in (addend.layers[name] for name in names if name in addend.layers):
        for A, B_t in zip(layer.lora_A.split(layer.ranks), layer.lora_B_t.split(layer.ranks), strict=True):
            yield ((B_t.double().mT @ A.double()) * weight).float()


def _largest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and Bᵀ of the best approximation of a matrix by so many ranks, in equal shares."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    left, values, right = (part.cpu() for part in torch.linalg.svd(matrix.to(device), full_matrices=False))
    count = min(rank, int((values > values.max() * max(matrix.shape) * torch.finfo(values.dtype).eps).sum()))
    roots = values[:count].sqrt().unsqueeze(1)
    return roots * right[:count], roots * left.mT[:count]
