"""What all adapters share: how they change a frozen weight; and those of low rank, with A, B and gate, rank-major."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_sparse.adapters.fused import no_autocast
from lit_sparse.adapters.head import never_narrowing
from lit_sparse.adapters.saving import guard_saving
from lit_sparse.errors import require_range


class KeepsPrecision(nn.Module):
    """A module whose own parameters stay float32 or better under ``.half()``, ``.to(dtype)`` and their like."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsPrecision:
        # Every .to(), .half() and .cuda() of nn.Module comes through here.
        if recurse:
            for child in self.children():
                child._apply(fn)

        applied: Any = super()._apply(never_narrowing(fn), recurse=False)  # type: ignore[no-untyped-call]
        return applied  # type: ignore[no-any-return]


class Adapter(KeepsPrecision):
    """Changes a frozen weight, seen as a matrix of shape ``(out_features, in_features)``, by parameters of its own.

    The parameters are float32 when the frozen weight is float16, bfloat16 or quantized, and stay float32 under
    ``module.half()``, ``module.to(dtype)`` and Lightning's true half precision, because the 8 bits of a bfloat16
    mantissa lose updates of size lr.

    Args:
        in_features: Columns of the matrix.
        out_features: Rows of the matrix.
        copies: Number of matrices in the weight (experts).
    """

    def __init__(self, in_features: int, out_features: int, copies: int = 1) -> None:
        super().__init__()
        guard_saving(Adapter)
        self.in_features, self.out_features = in_features, out_features
        self.copies = copies
        self.enabled = True
        self.overrides: Mapping[str, float] = {}
        """Arguments that this layer has in place of the method's."""
        self.took_from_weight = False
        """Whether the adapter started as a part of the frozen weight, which only holds the rest since then."""
        self.compiled = False
        """Whether :func:`~lit_sparse.compile_blocks` compiled the model."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        guard_saving(Adapter)  # a pickle may be loaded where nothing was injected

    @property
    def layer(self) -> nn.Module:
        """The frozen layer."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The frozen weight. Backbones such as T5 read its dtype."""
        return self.layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return self.layer.bias  # type: ignore[return-value]

    @property
    def size(self) -> int:
        """What a method gave the adapter at the start, by which checkpoints tell whether they fit: ranks or entries."""
        raise NotImplementedError

    @property
    def start_size(self) -> int:
        """Parameters at the start, without gates."""
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """The matrix that merging adds to the frozen weight, in the orientation and shape of that weight."""
        raise NotImplementedError

    def _as_matrix(self, weight: Tensor) -> Tensor:
        """The weight as ``(out_features, in_features)``."""
        return weight

    def _as_weight(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`_as_matrix`."""
        return matrix


class ReplacesLayer(Adapter):
    """An adapter that replaces the layer it adapts, and holds that layer as :attr:`base`."""

    base: nn.Module

    @property
    def layer(self) -> nn.Module:
        """The frozen layer."""
        return self.base

    def __getattr__(self, name: str) -> Any:
        # Backbones read attributes of the layer: num_embeddings, padding_idx, kernel_size.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class LowRankAdapter(Adapter):
    """Adds ``scale · B diag(gate) A`` to a frozen weight, seen as a matrix of shape ``(out_features, in_features)``.

    B is stored rank-major, as :attr:`lora_B_t` of shape ``(rank, out_features)``: every rank is then one
    contiguous row in A and in B, which makes the thin matrix products and the per-rank updates fast, and every kind of
    layer looks the same to methods. :attr:`lora_B` is the same memory in the orientation of the papers and of PEFT.

    The forward pass rounds the parameters to the dtype of the frozen layer's output, as autocast does.

    A sub-class for a kind of layer defines the matrix and the forward pass.

    Args:
        weight: The frozen weight, for dtype and device.
        in_features: Columns of the matrix.
        out_features: Rows of the matrix.
        rank: Number of ranks r, at least 1.
        scale: Factor of B diag(gate) A.
        dropout: Probability of zeroing an entry of the input before A, while training, in [0, 1).
        gated: Whether each rank has a gate.
        copies: Number of matrices in the weight, each with its own ranks (experts). Their ranks are consecutive rows
            of A, Bᵀ and gate.

    Raises:
        UsageError: If ``rank`` < 1 or ``dropout`` is outside [0, 1).

    Source:
        Hu et al. 2021 (arXiv:2106.09685) for A and B; Ding et al. 2023 (arXiv:2311.11696) for the gate.
    """

    lora_A: nn.Parameter
    lora_B_t: nn.Parameter
    gate: nn.Parameter | None

    def __init__(
        self,
        weight: Tensor,
        in_features: int,
        out_features: int,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        gated: bool = False,
        copies: int = 1,
    ) -> None:
        super().__init__(in_features, out_features, copies)
        require_range("rank", rank, at_least=1)
        require_range("dropout", dropout, at_least=0, below=1)
        self.max_rank = rank
        """Number of ranks (of each copy) at the start, before :func:`~lit_sparse.compact` removed any."""
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.gate_function: Callable[[Tensor, bool], Tensor] | None = None
        """A method's :meth:`~lit_sparse.SparseMethod.effective_gate`; None where the parameter itself is the gate."""
        self.start: tuple[Tensor, Tensor] | None = None
        """The A and Bᵀ that LoRA-GA took out of the frozen weight, on the CPU: what checkpoints need to do it again."""

        def new(*shape: int) -> nn.Parameter:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=weight.device))

        self.lora_A = new(copies * rank, in_features)
        self.lora_B_t = new(copies * rank, out_features)
        self.register_parameter("gate", new(copies * rank) if gated else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A Kaiming-uniform (a = √5), B zero, so that training starts at the frozen model; gates 1."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B_t)
        if self.gate is not None:
            nn.init.ones_(self.gate)

    @property
    def size(self) -> int:
        """Ranks (of each copy) at the start."""
        return self.max_rank

    @property
    def start_size(self) -> int:
        """Entries of A and B at the start."""
        return self.copies * self.max_rank * (self.in_features + self.out_features)

    @property
    def rank(self) -> int:
        """Number of ranks held (by each copy), zero gates included."""
        return self.lora_A.shape[0] // self.copies

    @property
    def lora_B(self) -> Tensor:
        """B of shape ``(out_features, rank)``: a view of :attr:`lora_B_t` that can be written in place."""
        return self.lora_B_t.t()

    def effective_gate(self, training: bool = False) -> Tensor | None:
        """The factor of each rank, shape ``(copies · rank,)``; None without gates.

        Args:
            training: Whether it is for a forward pass in training, where a method may draw gates at random.
        """
        if self.gate is None or self.gate_function is None:
            return self.gate
        return self.gate_function(self.gate, training)

    def scaled_lora_B_t(self, training: bool = False) -> Tensor:
        """``scale · gate ∘ Bᵀ``, shape ``(rank, out_features)``, with the :meth:`effective_gate`."""
        gate = self.effective_gate(training)
        return self.lora_B_t * (self.scale if gate is None else (gate * self.scale).unsqueeze(1))

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """The matrix that merging adds to the frozen weight, in the orientation and shape of that weight."""
        with no_autocast(self.lora_A):  # the product keeps the precision of A and B
            return self._as_weight(self._delta_matrix())

    @torch.no_grad()
    def start_from_principal(self) -> None:
        """Move the largest singular values from the frozen weight into A and B, in equal shares: PiSSA.

        The layer computes what it did before. Gates must be 1, and the weight must have as many singular values as
        there are ranks.

        Source:
            Meng et al. 2024 (arXiv:2404.02948), Eqs. (2)–(4).
        """
        matrices = self._as_matrix(self.weight).reshape(self.copies, self.out_features, self.in_features)
        left, values, right = torch.linalg.svd(matrices.to(self.lora_A.dtype), full_matrices=False)
        roots = values[:, : self.rank].sqrt().unsqueeze(2)
        self.lora_A.copy_((roots * right[:, : self.rank]).flatten(0, 1))
        self.lora_B_t.copy_((roots * left.mT[:, : self.rank] / self.scale).flatten(0, 1))
        self.weight.copy_(self.weight.to(self.lora_A.dtype) - self.delta_weight())
        self.took_from_weight = True

    @torch.no_grad()
    def take_start(self, lora_A: Tensor, lora_B_t: Tensor) -> None:
        """Take ``scale · BA`` of the start of a run out of the frozen weight; A and B stay what they are.

        Args:
            lora_A: A of the start, shape ``(copies · ranks, in_features)``.
            lora_B_t: Bᵀ of the start, shape ``(copies · ranks, out_features)``.
        """
        A, B_t = (part.to(self.lora_A).unflatten(0, (self.copies, -1)) for part in (lora_A, lora_B_t))
        taken = self._as_weight(((self.scale * B_t).mT @ A).view_as(self._as_matrix(self.weight)))
        self.weight.copy_(self.weight.to(taken.dtype) - taken)
        self.start = (lora_A.detach().cpu().clone(), lora_B_t.detach().cpu().clone())
        self.took_from_weight = True

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        gated = ", gated" if self.gate is not None else ""
        copies = f", copies={self.copies}" if self.copies > 1 else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}{copies}{gated}"

    def _delta_matrix(self) -> Tensor:
        return self.scaled_lora_B_t().t() @ self.lora_A


class LowRankLayer(LowRankAdapter, ReplacesLayer):
    """An adapter of low rank that replaces the layer it adapts.

    Args:
        base: Frozen layer with a ``weight``.
        rank: Number of ranks r, at least 1.
        scale: Factor of B diag(gate) A: alpha / rank.
        dropout: Probability of zeroing an entry of the input before A, while training, in [0, 1).
        gated: Whether each rank has a gate.

    Raises:
        UsageError: If ``rank`` < 1 or ``dropout`` is outside [0, 1).
    """

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float = 0.0, gated: bool = False) -> None:
        super().__init__(base.weight, *self._features(base), rank, scale, dropout, gated)  # type: ignore[arg-type]
        self.base = base.requires_grad_(False)

    @staticmethod
    def _features(base: Any) -> tuple[int, int]:
        """Columns and rows of the matrix."""
        raise NotImplementedError
