"""The singular values of an adapter's update, and its ranks turned into their directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.factors import LayerFactors
from lit_sparse.adapters.optimizer_state import mix_rows
from lit_sparse.functional import within_budget
from lit_sparse.methods.account import Account, is_trained, open_gates


class Spectrum(NamedTuple):
    """The singular value decomposition of ``scale · B diag(gate) A`` of every copy, in float64.

    Args:
        left: Shape ``(copies, out_features, k)``, where k is the largest rank that the product can have.
        values: Shape ``(copies, k)``, the largest first, and zero where there is only rounding.
        right: Shape ``(copies, k, in_features)``.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def of(cls, adapter: LowRankAdapter) -> Spectrum:
        """Decompose the product by way of the QR factors of B and Aᵀ."""
        factors, shape = LayerFactors.of("", adapter), (adapter.copies, adapter.rank)
        A_t = factors.lora_A.double().view(*shape, adapter.in_features).mT
        B = factors.scaled_lora_B_t().view(*shape, adapter.out_features).mT
        Q_A, R_A = torch.linalg.qr(A_t)
        Q_B, R_B = torch.linalg.qr(B)
        left, values, right = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
        rounding = values[:, :1] * max(adapter.in_features, adapter.out_features) * torch.finfo(values.dtype).eps
        # Inputs and outputs that no rank touches, such as the padding of an embedding, stay untouched bit for bit.
        left = Q_B @ left * B.any(2, keepdim=True)
        right = right @ Q_A.mT * A_t.any(2).unsqueeze(1)
        return cls(left, values.where(values > rounding, 0.0), right)


@torch.no_grad()
def cut(adapters: Sequence[LowRankAdapter], account: Account, allowed: int, optimizer: Optimizer) -> None:
    """Close the ranks of gated adapters that a budget does not pay for, by the singular values of all updates.

    A layer that loses none keeps its ranks as they are, and gates that are not trained stay. This waits for the device,
    and goes from layer to layer.

    Args:
        adapters: With gates.
        account: Of all adapters.
        allowed: What the ranks may cost together.
        optimizer: Holds the adapters.
    """
    finite = [weight.isfinite().all() for adapter in adapters for weight in adapter.parameters(recurse=False)]
    if not bool(torch.stack(finite).all()):
        return  # there are no singular values; FiniteLoss reports such a run
    trained = [(adapter, cost) for adapter, cost in zip(adapters, account.costs, strict=True) if is_trained(adapter)]
    opened = open_gates(adapters)
    paid = account.spent([0 if is_trained(a) else count for a, count in zip(adapters, opened, strict=True)])
    spectra = [Spectrum.of(adapter) for adapter, _ in trained]
    values = torch.cat([(s.values / math.sqrt(cost)).flatten() for s, (_, cost) in zip(spectra, trained, strict=True)])
    if not bool(values.any()):  # B has not moved
        return
    counts = [spectrum.values.numel() for spectrum in spectra]
    kept = within_budget(values, [cost for _, cost in trained], counts, allowed - paid) & (values > 0)
    chosen = [own.view_as(s.values) for own, s in zip(kept.split(counts), spectra, strict=True)]
    before = [adapter.gate.view(adapter.copies, -1).count_nonzero(1) for adapter, _ in trained]  # type: ignore[union-attr]
    loses = torch.stack([(own.sum(1) < held).any() for own, held in zip(chosen, before, strict=True)]).tolist()
    for (adapter, _), spectrum, own, loses_some in zip(trained, spectra, chosen, loses, strict=True):
        if loses_some:
            turn(adapter, spectrum, own, optimizer)


@torch.no_grad()
def turn(adapter: LowRankAdapter, spectrum: Spectrum, kept: Tensor, optimizer: Optimizer) -> None:
    """Turn the ranks of a gated adapter into singular directions, and close those that are not kept.

    The first ranks become the directions, the largest first. Their rows of A have one size, the mean of those that were
    open, as at the start of a LoRA; their columns of B have the rest of the singular value. Gates become 1, or 0 where
    a direction is not kept. What the optimizer remembers of gradients is turned with A and B, exactly for averages of
    gradients, and for averages of squares as if gradients of different ranks had nothing in common.

    Args:
        adapter: An adapter with gates.
        spectrum: Of its update.
        kept: Booleans, shape ``(copies, k)``, the first ones of every row.
        optimizer: Holds A, B and gate.
    """
    copies, rank = adapter.copies, adapter.rank
    A, gate = adapter.lora_A.double().view(copies, rank, -1), adapter.gate.double().view(copies, rank, 1)  # type: ignore[union-attr]
    opened = gate != 0
    size = ((A.square().sum(2, keepdim=True) * opened).sum() / opened.sum()).sqrt()
    along = A @ spectrum.right.mT / size  # A = along · A', and B' = alongᵀ · diag(gate) B
    lengths = (spectrum.values / (adapter.scale * size)).unsqueeze(2)
    rest, live = (0, 0, 0, rank - spectrum.values.shape[1]), kept.unsqueeze(2)
    of_A, of_B = along.mT * opened.mT, torch.linalg.pinv(along) * (opened / gate.where(opened, 1.0)).mT
    mix_rows(optimizer, adapter.lora_A, F.pad(of_A * live, rest))
    mix_rows(optimizer, adapter.lora_B_t, F.pad(of_B * live, rest))
    mix_rows(optimizer, adapter.gate, torch.zeros(copies, rank, rank, device=A.device).double())  # type: ignore[arg-type]
    adapter.lora_A.copy_(F.pad(spectrum.right * size, rest).flatten(0, 1))
    adapter.lora_B_t.copy_(F.pad(spectrum.left.mT * lengths, rest).flatten(0, 1))
    adapter.gate.copy_(F.pad(kept, rest[2:]).flatten())  # type: ignore[union-attr]
