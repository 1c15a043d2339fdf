"""The adapters of a mixture of experts, whose weights are three-dimensional parameters of one module."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.grouped import ALIGNED, RowGroups


@dataclass(frozen=True, eq=False)
class ExpertWeight:
    """One three-dimensional parameter: a linear layer for every expert.

    Args:
        module: The module that holds all experts of a block.
        name: The parameter's name in it: ``gate_up_proj``, ``up_proj`` or ``down_proj``.
    """

    module: nn.Module
    name: str

    @property
    def weight(self) -> nn.Parameter:
        """Of shape ``(experts, out, in)``, or ``(experts, in, out)`` where the module stores it transposed."""
        return self.module.get_parameter(self.name)


def expert_weights(module: nn.Module) -> list[ExpertWeight]:
    """The expert weights of a module of transformers' experts interface; none of any other module.

    Modules of that interface (``use_experts_implementation``, transformers 5) share one forward: project up, gate or
    activate, project down, weigh by the router and add up. Attributes give the layout of their weights.
    """
    if not all(hasattr(module, name) for name in ("_apply_gate", "has_gate", "is_transposed", "has_bias")):
        return []
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    found = [ExpertWeight(module, name) for name in names if isinstance(getattr(module, name, None), nn.Parameter)]
    return [weight for weight in found if weight.weight.ndim == 3]


class LowRankExperts(LowRankAdapter):
    """The low-rank part of one weight of all experts: each expert has ranks, and gates, of its own.

    It is a child of :class:`AdaptedExperts`, which computes the forward pass. The ranks of the experts are consecutive
    rows of ``lora_A`` ``(experts · rank, in)``, ``lora_B_t`` ``(experts · rank, out)`` and ``gate``.

    Args:
        base: The weight, frozen.
        rank: Number of ranks r of each expert, at least 1.
        scale: Factor of B diag(gate) A.
        dropout: Probability of zeroing an entry of an expert's input before A, while training, in [0, 1).
        gated: Whether each rank has a gate.
    """

    def __init__(self, base: ExpertWeight, rank: int, scale: float, dropout: float = 0.0, gated: bool = False) -> None:
        weight = base.weight
        out_features, in_features = weight.shape[1:] if not base.module.is_transposed else weight.shape[:0:-1]
        super().__init__(weight, in_features, out_features, rank, scale, dropout, gated, copies=weight.shape[0])
        self._base = base  # not a child: the module belongs to AdaptedExperts

    @property
    def layer(self) -> nn.Module:
        """The module of the experts."""
        return self._base.module

    @property
    def weight(self) -> Tensor:
        """The frozen weight."""
        return self._base.weight

    def forward(self, rows: Tensor, groups: RowGroups) -> Tensor:
        """Map ``(rows, in_features)``, in groups by expert, to what the experts add to their frozen outputs."""
        shape, short = (self.copies, self.rank), -self.rank % ALIGNED
        lora_A = F.pad(self.lora_A.view(*shape, self.in_features), (0, 0, 0, short))
        lora_B_t = F.pad(self.scaled_lora_B_t(self.training).view(*shape, self.out_features), (0, 0, 0, short))
        hidden = groups.product(self.dropout(rows), lora_A.to(rows.dtype).mT)
        return groups.product(hidden, lora_B_t.to(hidden.dtype))

    def _delta_matrix(self) -> Tensor:
        shape = (self.copies, self.rank)  # the rank may be 0, which allows no -1
        B_t = self.scaled_lora_B_t().view(*shape, self.out_features)
        return B_t.mT @ self.lora_A.view(*shape, self.in_features)

    def _as_matrix(self, weight: Tensor) -> Tensor:
        return weight.mT if self.layer.is_transposed else weight

    def _as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.mT if self.layer.is_transposed else matrix


class AdaptedExperts(nn.Module):
    """A module of experts with adapters on one or both of its weights.

    Tokens are sorted by expert, and the experts multiply their own all at once where torch can
    (:class:`~lit_sparse.adapters.grouped.RowGroups`).

    Args:
        base: The module of the experts, frozen.
        adapters: The adapters, under the names of their parameters.
    """

    def __init__(self, base: nn.Module, adapters: dict[str, LowRankExperts]) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        for name, adapter in adapters.items():
            self.add_module(name, adapter)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Pass each token ``(tokens, hidden)`` through its experts ``(tokens, k)``, and add their weighted outputs."""
        if not any(adapter.enabled for adapter in self.children() if isinstance(adapter, LowRankExperts)):
            return self.base(hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]
        chosen = top_k_index.flatten()
        order = chosen.argsort(stable=True)
        token = order // top_k_index.shape[1]
        groups = RowGroups(chosen[order], self.base.get_parameter("down_proj").shape[0])
        rows = self._experts(hidden_states[token], groups)
        weighted = rows * top_k_weights.flatten()[order].unsqueeze(1)
        return torch.zeros_like(hidden_states).index_add_(0, token, weighted.to(hidden_states.dtype))

    def _experts(self, rows: Tensor, groups: RowGroups) -> Tensor:
        base = self.base
        if base.has_gate:
            hidden = base._apply_gate(self._project("gate_up_proj", rows, groups))  # type: ignore[operator]
        else:
            hidden = base.act_fn(self._project("up_proj", rows, groups))  # type: ignore[operator]
        output = self._project("down_proj", hidden, groups)
        if getattr(base, "has_post_expert_norm", False):
            output = base.post_expert_norm(output)  # type: ignore[operator]
        return output

    def _project(self, name: str, rows: Tensor, groups: RowGroups) -> Tensor:
        weight = self.base.get_parameter(name)
        output = groups.product(rows, weight if self.base.is_transposed else weight.mT)
        if self.base.has_bias:
            output = output + self.base.get_parameter(f"{name}_bias")[groups.group].to(output.dtype)
        adapter = self._modules.get(name)
        if isinstance(adapter, LowRankExperts) and adapter.enabled and adapter.rank:
            output = output + adapter(rows, groups).to(output.dtype)
        return output
