"""The adapters of a mixture of experts, whose weights are three-dimensional parameters of one module."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankAdapter


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

    def forward(self, rows: Tensor, expert: int) -> Tensor:
        """Map ``(rows, in_features)`` to what ``expert`` adds to its frozen output."""
        ranks = slice(expert * self.rank, (expert + 1) * self.rank)
        gate = None if self.gate is None else self.gate[ranks]
        if gate is not None and self.gate_function is not None:
            gate = self.gate_function(gate, self.training)
        scale = self.scale if gate is None else (gate * self.scale).unsqueeze(1)
        lora_A, lora_B_t = self.lora_A[ranks], self.lora_B_t[ranks] * scale
        return F.linear(self.dropout(rows), lora_A.to(rows.dtype)) @ lora_B_t.to(rows.dtype)

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

    Tokens are sorted by expert and each expert multiplies its own, as in transformers' eager implementation.

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
        experts = self.base.get_parameter("down_proj").shape[0]
        chosen = top_k_index.flatten()
        order = chosen.argsort(stable=True)
        token = order // top_k_index.shape[1]
        sizes = chosen.bincount(minlength=experts).tolist()  # the one host sync
        parts = hidden_states[token].split(sizes)
        outputs = [self._expert(i, part) for i, part in enumerate(parts) if part.shape[0]]
        rows = torch.cat(outputs or [self._expert(0, parts[0])])  # torch.cat needs at least one tensor
        weighted = rows * top_k_weights.flatten()[order].unsqueeze(1)
        return torch.zeros_like(hidden_states).index_add_(0, token, weighted.to(hidden_states.dtype))

    def _expert(self, expert: int, rows: Tensor) -> Tensor:
        base = self.base
        if base.has_gate:
            hidden = base._apply_gate(self._project("gate_up_proj", rows, expert))  # type: ignore[operator]
        else:
            hidden = base.act_fn(self._project("up_proj", rows, expert))  # type: ignore[operator]
        output = self._project("down_proj", hidden, expert)
        if getattr(base, "has_post_expert_norm", False):
            output = base.post_expert_norm(output)  # type: ignore[operator]
        return output

    def _project(self, name: str, rows: Tensor, expert: int) -> Tensor:
        weight = self.base.get_parameter(name)[expert]
        bias = self.base.get_parameter(f"{name}_bias")[expert] if self.base.has_bias else None
        output = F.linear(rows, weight.t() if self.base.is_transposed else weight, bias)
        adapter = self._modules.get(name)
        if isinstance(adapter, LowRankExperts) and adapter.enabled and adapter.rank:
            output = output + adapter(rows, expert).to(output.dtype)
        return output
