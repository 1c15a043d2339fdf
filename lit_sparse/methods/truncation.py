"""Truncate trained adapters to a budget: the smallest singular values of all layers are cut."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.compaction import shrink
from lit_sparse.adapters.injection import low_rank_in
from lit_sparse.adapters.merging import require_on
from lit_sparse.adapters.placement import require_whole
from lit_sparse.adapters.statistics import live_ranks, sparsity_of
from lit_sparse.errors import UsageError, listed
from lit_sparse.functional import within_budget
from lit_sparse.methods.account import Account
from lit_sparse.methods.spectrum import Spectrum


@torch.no_grad()
def truncate(model: nn.Module, budget: float | str) -> dict[str, int]:
    """Cut trained adapters of any method to a budget, in place and without data.

    The singular values of ``scale · B diag(gate) A`` of all layers and experts compete. The largest are kept as long as
    the budget lasts; one that no longer fits is skipped, and smaller ones of cheaper layers are tried. Apart from this
    use of the remainder, the rule is the paper's one threshold for all layers: values are not divided by what a rank
    costs. If all ranks cost the same, no other choice within the budget changes the weights less, in the Frobenius
    norm. Everything is computed in float64, from the QR factors of A and B; BA is not formed.

    The ranks that are left are the singular directions, each with √(σ / scale) in its row of A and column of B. Scales
    stay, and gates become 1. (Where a method computes the gates, those of a layer become equal, and B is divided by
    them.) The other ranks are removed, as by :func:`~lit_sparse.compact`: parameters stay the same objects, and a layer
    may end with rank 0. All experts of one weight hold as many ranks as the expert that keeps most; the others are
    filled up with zeros, which the budget does not count. Buffers with a row for each rank, such as sensitivities, are
    reset.

    RoseLoRA's sparse A and B become dense, with a warning: merging then changes more weights.

    Call it after training. An optimizer keeps state of the old shapes: make a new one to train on.

    Args:
        model: Model with adapters. Those of a LoRA in PEFT's format come from :func:`~lit_sparse.load_peft`.
        budget: What A and B may keep, counted as a method's ``budget``: a share in (0, 1] of the parameters that they
            started with, parameters such as ``"500k"``, or bytes such as ``"2MB"`` in the adapters' dtype. 1.0 only
            removes ranks that contribute nothing.

    Returns:
        Full layer name to remaining rank.

    Raises:
        UsageError: If there is no adapter in ``model``, an adapter is switched off, started from the singular vectors
            of its frozen weight or holds values that are not finite, PEFT adapted the model, its weights are on the
            meta device or on several devices, the budget cannot be read or held, or nothing would be left. Nothing is
            changed then.

    Source:
        PARA, "Post-Optimization Adaptive Rank Allocation for LoRA" (arXiv:2604.27796).
    """
    require_whole(model)
    adapters = low_rank_in(model, "truncate cuts singular values of BA")
    if not adapters:
        raise UsageError(f"{type(model).__name__} holds no adapter to truncate. Inject a method, or call load_peft.")
    require_on(model, "truncate")
    _require_truncatable(adapters)
    account = Account.of(budget, list(adapters.values()))._replace(frozen=0)  # frozen gates are folded, too
    account.require_possible()
    spectra = [Spectrum.of(adapter) for adapter in adapters.values()]
    values, counts = torch.cat([s.values.flatten() for s in spectra]), [s.values.numel() for s in spectra]
    kept = within_budget(values, account.costs, counts, account.limit) & (values > 0)
    if not kept.any():
        raise UsageError(
            f"Nothing would be left: all of BA is zero, as before training, or the budget of {account.limit:,} "
            f"{account.unit} pays for no rank of the layers where it is not. Train first, or raise budget."
        )
    masked = [name for name, adapter in adapters.items() if _is_masked(adapter)]
    before = int(sparsity_of(list(adapters.values()))["remaining_parameters"])
    for adapter, spectrum, own in zip(adapters.values(), spectra, kept.split(counts), strict=True):
        _replace(adapter, spectrum, own.view_as(spectrum.values))
    if masked:
        after = int(sparsity_of(list(adapters.values()))["remaining_parameters"])
        rank_zero_warn(
            f"A and B were sparse at {listed(masked)}, and singular directions are dense: {before:,} non-zero "
            f"parameters became {after:,}, and merging now changes weights that it left as they were. Lower density "
            "in training to keep A and B sparse."
        )
    return {name: adapter.rank for name, adapter in adapters.items()}


def _replace(adapter: LowRankAdapter, spectrum: Spectrum, kept: Tensor) -> None:
    """Put the kept singular directions into an adapter, which is cut to as many ranks."""
    gate, rank = adapter.effective_gate(), int(kept.sum(1).max())
    if adapter.gate is not None and gate is not None and len(gate):
        computed = adapter.gate_function is not None
        adapter.gate.fill_(adapter.gate[gate.abs().argmax()] if computed else 1.0)
    shrink(adapter, rank)
    roots = (spectrum.values * kept / adapter.scale).sqrt()[:, :rank].unsqueeze(2)
    adapter.lora_A.copy_((roots * spectrum.right[:, :rank]).flatten(0, 1))
    B_t, gate = (roots * spectrum.left.mT[:, :rank]).flatten(0, 1), adapter.effective_gate()
    adapter.lora_B_t.copy_(B_t if gate is None else B_t / gate.unsqueeze(1))
    for buffer in adapter.buffers(recurse=False):
        if buffer.ndim and len(buffer) == len(adapter.lora_A):  # of ranks that are no more: as before the first step
            buffer.fill_(buffer.dtype == torch.bool)


def _require_truncatable(adapters: Mapping[str, LowRankAdapter]) -> None:
    changed = [name for name, adapter in adapters.items() if adapter.took_from_weight]
    if changed:
        raise UsageError(
            f"The adapters at {listed(changed)} started as a part of the frozen weights (init_weights 'pissa' or "
            "'lora_ga'): truncation would cut what belongs to the weights. Train with init_weights 'lora'."
        )
    spoilt = [n for n, a in adapters.items() if not all(p.isfinite().all() for p in a.parameters(recurse=False))]
    if spoilt:
        raise UsageError(
            f"A, B or gate hold values that are not finite at {listed(spoilt)}. Take a checkpoint from before training "
            "failed."
        )


def _is_masked(adapter: LowRankAdapter) -> bool:
    """Whether live ranks have zeros in columns of A or rows of B that other live ranks of the copy use."""
    live = live_ranks(adapter).view(adapter.copies, adapter.rank, 1)
    for matrix in (adapter.lora_A, adapter.lora_B_t):
        used = matrix.view(adapter.copies, adapter.rank, matrix.shape[1]).ne(0) & live
        if bool((live & ~used & used.any(1, keepdim=True)).any()):
            return True
    return False
