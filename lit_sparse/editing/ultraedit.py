"""UltraEdit: edits by least squares, from the inputs of layers and the gradients of their outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_sparse.adapters.linear import FrozenLinear
from lit_sparse.data.padding import IGNORED
from lit_sparse.editing.whole_weights import Changing, WholeWeights
from lit_sparse.errors import UsageError, require_choice, require_range
from lit_sparse.functional.ultraedit import Held, Ridge, RunningMoments, least_squares

Normalization = Literal["lifelong", "turn"]
_RARE = 1e-3  # a feature that is rarer than this share of the mean counts as if it were not
Known = list[tuple[dict[str, Tensor], dict[str, Held]]]
"""Rows that are held, and the inputs that each layer has there."""


class UltraEdit(WholeWeights):
    """Edits by least squares instead of an optimizer: a step takes one pass over the requests of its turn.

    A layer has the inputs H, shape ``(tokens, in_features)``, where the answers' tokens are predicted, and the loss
    has the gradients G by its outputs there. Its weight changes by the transpose of

        D = argmin ‖H D − V‖² + ‖D‖² + Σ w(s) ‖x(s) D‖²  =  (HᵀH + I + Σ w(s) x(s)ᵀ x(s))⁻¹ Hᵀ V

    where the sum is over the tokens of the Editor's ``anchors``, with their weights w and inputs x: on them, outputs
    stay. V says where the outputs of each answer's token should go:

    - ``lifelong``: V = −lr · ‖ĥ‖² · ĝ, with h and g normalized by the means and deviations of all tokens of the turns
      so far, of all layers of the same shape. One step per turn, without anchors, is UltraEdit as published.
    - ``turn``: V = −lr · in_features · G / rms(G). It keeps nothing between turns, and works for a single token.

    With a ``density``, only so many input features of each layer may change what it does: those with the largest
    Σ h² over the answers' tokens of the turn, relative to their mean square on the anchors, where there are some.

    An Editor takes ``steps`` of them at most, and ends at ``stop_loss``; the optimizer is not used. With several steps
    each goes on where the last one ended, and the answers are learnt where one step leaves them half learnt. With
    ``requests_per_step``, each step takes a turn of that many requests.

    Args:
        target_modules: ``"all-linear"``, a list of whole trailing name parts, or one regular expression over full
            names, as for the methods. All must be linear.
        layers: Numbers of the transformer blocks to change, or one number; None: all.
        exclude_modules: Layers to leave out: a list of trailing name parts or a regular expression.
        lr: Length of a step. The release's 1e-6 is for models of 7 billion weights; a small model needs more.
        normalization: How V is scaled.
        density: Share of the input features whose columns of the weight change, chosen in the first step of a turn.

    Raises:
        UsageError: If an argument is outside its range.

    Source:
        Gu et al. 2025 (arXiv:2505.14679), as in its release (XiaojieGu/UltraEdit at 0beb222, ``editor/ultraedit.py``).
        Anchors are the K₀ of MEMIT (Meng et al. 2022, arXiv:2210.07229); several steps, ``turn`` and density are ours.
    """

    def __init__(
        self,
        target_modules: str | list[str] = "all-linear",
        layers: int | list[int] | None = None,
        exclude_modules: str | list[str] | None = None,
        lr: float = 1e-6,
        normalization: Normalization = "lifelong",
        density: float = 1.0,
    ) -> None:
        super().__init__(target_modules, layers, exclude_modules)
        require_range("lr", lr, above=0)
        require_choice("normalization", normalization, get_args(Normalization))
        require_range("density", density, above=0, at_most=1)
        self.lr = lr
        self.normalization = normalization
        self.density = density


class Solver:
    """Takes the steps of UltraEdit, each after a pass of the model and its backward pass.

    Args:
        model: A causal language model.
        method: The method.
        change: What may be changed.
        batches: The rows of each turn, as :class:`~lit_sparse.editing.objective.Objective` takes them.
        known: What an earlier solver of the same layers found in the same model; then, what this one found.

    Raises:
        UsageError: If a layer is not linear, or does not see one input for each token.
    """

    def __init__(
        self,
        model: nn.Module,
        method: UltraEdit,
        change: Changing,
        batches: Sequence[Mapping[str, Tensor]],
        known: Known,
    ) -> None:
        others = sorted(name for name, layer in change.layers.items() if not isinstance(layer, FrozenLinear))
        if others:
            raise UsageError(f"UltraEdit changes linear layers, and {others[:3]} are of others: leave them out.")
        self._model, self._method, self._change = model, method, change
        for weight in change.weights.values():
            weight.requires_grad_(False)  # a step needs the gradients of outputs alone
        self._moments: dict[torch.Size, RunningMoments] = {}
        self._ridges: dict[tuple[int, str], tuple[Tensor | None, Ridge]] = {}
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}
        self._answers = [answers_of(batch)["labels"] != IGNORED for batch in batches]
        self._held: list[dict[str, Held]] = []
        used: Known = []
        for batch in batches:
            rows = _held_of(batch)
            held = next((held for others, held in [*used, *known] if _equal(rows, others)), None)
            if held is None:
                held = self._inputs_of(rows)
            used.append((rows, held))
            self._held.append(held)
        known[:] = used

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the context, inputs and outputs of the layers in the last pass are kept."""

        def keep(name: str) -> Callable[..., Tensor]:
            def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                if torch.is_grad_enabled():
                    output.requires_grad_() if output.is_leaf else output.retain_grad()
                self._seen[name] = args[0].detach(), output
                return output

            return hook

        hooks = [layer.register_forward_hook(keep(name)) for name, layer in self._change.layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def step(self, turn: int) -> None:
        """Change the weights by the last pass, which was one over the rows of this turn."""
        found = {}
        for name, (x, y) in self._seen.items():
            gradient = torch.zeros_like(y) if y.grad is None else y.grad
            found[name] = tuple(self._before(self._answers[turn], tensor, name) for tensor in (x, gradient))
        self._seen = {}
        if self._method.normalization == "lifelong":
            for name, pair in found.items():
                self._moments_of(name).update(torch.cat(pair, dim=1))
        for name, (inputs, gradients) in found.items():
            if (turn, name) not in self._ridges:
                held = self._held[turn].get(name) or Held(inputs[:0])
                features = self._chosen(inputs, held)
                self._ridges[turn, name] = features, held.ridge(features)
            features, ridge = self._ridges[turn, name]
            columns = slice(None) if features is None else features
            wanted = self._wanted(name, inputs, gradients)
            change = inputs.new_zeros(inputs.shape[1], wanted.shape[1])
            change[columns] = least_squares(inputs[:, columns], wanted, ridge)
            is_transposed = isinstance(self._change.layers[name], Conv1D)
            self._change.weights[name].add_(change if is_transposed else change.mT)

    def _chosen(self, inputs: Tensor, held: Held) -> Tensor | None:
        """The numbers of the input features that may change what the layer does; None: all."""
        if self._method.density == 1:
            return None
        usual = held.squares + _RARE * held.squares.mean()
        scores = inputs.square().sum(0) / usual.where(usual > 0, 1)
        count = max(1, round(self._method.density * inputs.shape[1]))
        return scores.topk(count).indices.sort().values

    def _wanted(self, name: str, inputs: Tensor, gradients: Tensor) -> Tensor:
        """V."""
        lr, features = self._method.lr, inputs.shape[1]
        if self._method.normalization == "turn":
            rms = gradients.square().mean().sqrt()
            return gradients * (-lr * features / rms.clamp(min=torch.finfo(rms.dtype).tiny))
        normal = self._moments_of(name).normalized(torch.cat([inputs, gradients], dim=1))
        return normal[:, features:] * (-lr * normal[:, :features].square().sum(1, keepdim=True))

    def _moments_of(self, name: str) -> RunningMoments:
        return self._moments.setdefault(self._change.weights[name].shape, RunningMoments())

    @torch.no_grad()
    def _inputs_of(self, held: Mapping[str, Tensor]) -> dict[str, Held]:
        if not len(held["labels"]):
            return {}
        with self.watching():
            self._model(
                **{name: rows for name, rows in held.items() if name not in ("labels", "held")}, use_cache=False
            )
        seen, self._seen = self._seen, {}
        prices = held["held"][:, 1:][held["held"][:, 1:] > 0].sqrt()[:, None]
        return {name: Held(prices * self._before(held["held"] > 0, x, name)) for name, (x, _) in seen.items()}

    def _before(self, tokens: Tensor, values: Tensor, name: str) -> Tensor:
        """The values where these tokens are predicted, in float32 or wider, shape ``(tokens, features)``."""
        if values.shape[:-1].numel() != tokens.numel():
            raise UsageError(f"UltraEdit needs an input for each token, and {name!r} sees others: leave the layer out.")
        chosen = values.reshape(*tokens.shape, -1)[:, :-1][tokens[:, 1:]]
        return chosen.to(self._change.weights[name].dtype)


def answers_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows that are not held."""
    if "held" not in batch:
        return dict(batch)
    learnt = ~batch["held"].any(1)
    return {name: rows[learnt] for name, rows in batch.items() if name != "held"}


def _held_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows that are held, without columns that are padding in all of them."""
    if "held" not in batch or not batch["held"].any():
        return {"labels": batch["labels"][:0]}
    chosen = batch["held"].any(1)
    width = int(batch["attention_mask"][chosen].sum(1).max())
    return {name: rows[chosen, :width] for name, rows in batch.items()}


def _equal(rows: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return rows.keys() == others.keys() and all(torch.equal(rows[name], others[name]) for name in rows)
