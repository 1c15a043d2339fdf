"""The adapter of a linear layer without factors: trained changes of single entries of its weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from lit_sparse.adapters.fused import autocasts, no_autocast
from lit_sparse.adapters.linear import FrozenLinear, ReplacesLinear, features_of, may_fuse
from lit_sparse.errors import UsageError


class DeltaLinear(ReplacesLinear):
    """``y = (W0 + ΔW) x + b``, where ΔW has trained values at some entries of the frozen W0, and zeros elsewhere.

    The values are float32 or better. In half precision, W0 and a value are added before they are rounded, as in
    training with float32 master weights, so that merging changes no output. ΔW is never dense between two layers: a
    pass forms the weight of its layer, and drops it. (Where the frozen layer has hooks, and in compiled graphs, torch
    keeps that weight for the backward pass.)

    Args:
        base: Frozen ``nn.Linear`` or ``Conv1D``, not quantized.
        count: Number of trained entries, at least 1.

    Raises:
        UsageError: If ``base`` is of another kind, or has fewer entries than ``count``.
    """

    values: nn.Parameter
    indices: Tensor
    shape: Tensor
    watcher: Callable[[Tensor, bool], None] | None
    """Who sees the gradient of the whole weight; see :meth:`watch`."""

    def __init__(self, base: FrozenLinear, count: int) -> None:
        if type(getattr(base, "weight", None)) not in (nn.Parameter, Tensor) or not isinstance(base, FrozenLinear):
            raise UsageError(f"DeltaLinear adapts nn.Linear and Conv1D that are not quantized; got {base}.")
        weight = base.weight
        if not 1 <= count <= weight.numel():
            raise UsageError(f"A weight of {weight.numel():,} entries cannot have {count:,} trained ones.")
        super().__init__(*features_of(base))
        self.base = base.requires_grad_(False)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.values = nn.Parameter(torch.zeros(count, dtype=dtype, device=weight.device))
        """Shape ``(count,)``, zeros at the start."""
        kind = torch.int32 if weight.numel() <= 2**31 else torch.int64
        self.register_buffer("indices", torch.arange(count, dtype=kind, device=weight.device))
        """Places of the values in the flattened weight, ascending, each once; shape ``(count,)``."""
        self.register_buffer("shape", torch.tensor(weight.shape, device=weight.device))
        """Rows and columns of the weight, for readers of a checkpoint."""
        self._hook: RemovableHandle | None = None
        self.watch(None)

    def __getstate__(self) -> dict[str, Any]:
        # A copy is not watched: hooks are not copied.
        return {**self.__dict__, "watcher": None, "_probe": None, "_hook": None}

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        if not self.enabled:
            return self.base(x)  # type: ignore[no-any-return]
        rows = x.reshape(-1, self.in_features)
        base, transposed = self.base, isinstance(self.base, Conv1D)
        if may_fuse(base, rows):
            if autocasts(rows) and rows.dtype != torch.float64:
                rows = rows.to(torch.get_autocast_dtype(rows.device.type))
            parts = (base.weight, base.bias, self.values, self.indices)
            y = _ChangedLinear.apply(rows, *parts, transposed, self._probe)  # type: ignore[no-untyped-call]
        else:
            y = self.base(rows)
            delta = self._delta() if self._probe is None else self._delta() + self._probe
            y = y + F.linear(rows, self._as_matrix(delta).to(rows.dtype)).to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)  # type: ignore[no-any-return]

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Rows and columns of the weight, which FSDP may have flattened."""
        shape = (self.out_features, self.in_features)
        return shape[::-1] if isinstance(self.base, Conv1D) else shape

    @property
    def is_placed(self) -> bool:
        """Whether places were chosen: until then, they are the first ones. Waits for the device."""
        return self.size == self.in_features * self.out_features or int(self.indices[-1]) >= self.size

    @property
    def size(self) -> int:
        """Number of trained entries."""
        return len(self.values)

    @property
    def start_size(self) -> int:
        """Number of trained entries."""
        return len(self.values)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """The matrix that merging adds to the frozen weight, in the orientation and shape of that weight."""
        return self._delta()

    @torch.no_grad()
    def move(self, indices: Tensor) -> Tensor:
        """Train other entries: those that stay keep their values, and new ones start at zero.

        Args:
            indices: The new places, ascending, each once; shape ``(count,)``.

        Returns:
            For each new place, where its value stood before; -1 where it had none.
        """
        places = indices.to(self.indices.dtype)
        sources = torch.searchsorted(self.indices, places).clamp(max=self.size - 1)
        stays = self.indices[sources] == places
        self.values.copy_(self.values[sources].where(stays, 0))
        self.indices.copy_(places)
        return sources.where(stays, -1)

    def watch(self, watcher: Callable[[Tensor, bool], None] | None) -> None:
        """Show the gradient of the whole changed weight in every backward pass from now on.

        The gradient exists until ``watcher`` returns, so that layers have it one after another (in compiled graphs,
        the layers of a graph together). It is that of the process's own batch, and scaled if a gradient scaler is used.

        Args:
            watcher: Called with the gradient, in the orientation, shape and dtype of the frozen weight, and with
                whether gradients of earlier passes were dropped: ``values.grad``, which such a pass had set, is None
                when this one begins. None: no more.
        """
        self.watcher = watcher
        self._probe: Tensor | None = None
        self._passed = self._shown = False
        self._dropped: bool | None = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if watcher is not None:
            self._hook = self.values.register_hook(self._before_accumulation)
            # A zero for every entry in the memory of one: added to the weight, it would have the weight's gradient.
            zero = torch.zeros((), dtype=self.base.weight.dtype, device=self.values.device)
            self._probe = zero.expand(self.weight_shape).requires_grad_()
            self._probe.register_post_accumulate_grad_hook(self._show)

    def _before_accumulation(self, _: Tensor) -> None:
        # Autograd calls this and _show once in a pass, in any order. The first of them sees what was there before.
        if not self._shown:
            self._dropped = self._passed and self.values.grad is None
        self._passed, self._shown = True, False

    def _show(self, probe: Tensor) -> None:
        gradient, probe.grad = probe.grad, None
        dropped, self._dropped = self._dropped, None
        if dropped is None:
            self._shown, dropped = True, self._passed and self.values.grad is None
        if self.watcher is not None and gradient is not None:
            self.watcher(gradient, dropped)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, entries={len(self.values)}"

    def _delta(self) -> Tensor:
        zeros = self.values.new_zeros(self.in_features * self.out_features)
        return zeros.index_add(0, self.indices, self.values).view(self.weight_shape)


class _ChangedLinear(Function):
    """A linear layer with a changed weight, which is formed again in the backward pass instead of being kept."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        indices: Tensor,
        transposed: bool,
        probe: Tensor | None,  # noqa: ARG004
    ) -> Tensor:
        matrix = changed_weight(weight, values, indices, rows.dtype)
        matrix = matrix if transposed else matrix.t()
        ctx.save_for_backward(rows, weight, values, indices)
        ctx.transposed = transposed
        return rows.mm(matrix) if bias is None else torch.addmm(bias.to(rows.dtype), rows, matrix)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        rows, weight, values, indices = ctx.saved_tensors
        grad_rows = grad_values = grad_probe = None
        with no_autocast(grad_y):  # dtypes are fixed by now
            if ctx.needs_input_grad[0]:
                matrix = changed_weight(weight, values, indices, rows.dtype)
                grad_rows = grad_y.mm(matrix.t() if ctx.transposed else matrix)
            if ctx.needs_input_grad[3]:
                # The product of all entries, of which few are taken: see docs/performance.md for the alternatives.
                gradient = rows.t().mm(grad_y) if ctx.transposed else grad_y.t().mm(rows)
                grad_values = gradient.flatten().index_select(0, indices).to(values.dtype)
                grad_probe = gradient if ctx.needs_input_grad[6] else None
        return grad_rows, None, None, grad_values, None, None, grad_probe


def changed_weight(weight: Tensor, values: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` with ``values`` added at ``indices`` of its flat form, in ``dtype``; sums are rounded once."""
    flat, places = weight.detach().flatten(), indices.long()
    sums = flat.index_select(0, places).to(values.dtype) + values
    return flat.to(dtype, copy=True).index_copy_(0, places, sums.to(dtype)).view(weight.shape)
