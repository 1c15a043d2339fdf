"""UltraEdit: edits by least squares, from the inputs of layers and the gradients of their outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_sparse.adapters.linear import FrozenLinear
from lit_sparse.data.padding import IGNORED
from lit_sparse.editing.watching import Places, watching
from lit_sparse.editing.whole_weights import Changing, WholeWeights
from lit_sparse.errors import TrainingError, UsageError, require_choice, require_range
from lit_sparse.functional.ultraedit import Held, Ridge, RunningMoments, least_squares

Normalization = Literal["lifelong", "turn"]
_RARE = 1e-3  # a feature with less than this share of the mean counts as if it had that share
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
      of this edit so far, of all layers of the same shape. It needs two tokens at least, and is meant for many facts:
      the release's run of T turns of N facts has a ``batch_size`` of T · N, N ``requests_per_step``, T ``steps``, no
      ``stop_loss`` and no anchors. An edit of its own, also in a sequence, begins with new statistics.
    - ``turn``: V = −lr · in_features · G / rms(G). It keeps nothing between turns, and works for a single token.

    With a ``density``, only so many input features of each layer may change what it does: those with the largest
    Σ h² over the answers' tokens of the turn, relative to their mean square on the anchors, where there are some.

    An Editor takes ``steps`` steps at most, and stops at ``stop_loss``. It does not use the optimizer. One step often
    leaves an answer half learnt, and further steps go on from there. With ``requests_per_step``, each step takes a turn
    of that many requests.

    Args:
        target_modules: ``"all-linear"``, a list of whole trailing name parts, or one regular expression over full
            names, as for the methods. All must be linear.
        layers: Numbers of the transformer blocks to change, or one number; None: all.
        exclude_modules: Layers to leave out: a list of trailing name parts or a regular expression.
        lr: Length of a step. The release's 1e-6 is for models of 7 billion weights; a small model needs more.
        normalization: How V is scaled.
        density: Share of the input features whose columns of the weight change, chosen in the first step of a turn.

    Raises:
        UsageError: If an argument is outside its range. An edit raises one if a layer is not linear or has not one
            input for each token, and a :class:`~lit_sparse.errors.TrainingError` if values become NaN or infinite.

    Source:
        Gu et al. 2025 (arXiv:2505.14679), as in its release (XiaojieGu/UltraEdit at 0beb222, ``editor/ultraedit.py``),
        whose deviations are larger by √(n / (n − 1)), for batches of n tokens.
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
        UsageError: If a layer is not linear, or does not see one input for each token, or there are too few tokens.
        TrainingError: If inputs or gradients are not finite.
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
            raise UsageError(f"UltraEdit changes linear layers, and {others[:3]} are of other kinds: leave them out.")
        self._model, self._method, self._change = model, method, change
        for weight in change.weights.values():
            weight.requires_grad_(False)  # a step needs the gradients of outputs alone
        self._turns = [Places.of(answers_of(batch)["labels"] != IGNORED) for batch in batches]
        if method.normalization == "lifelong" and len(self._turns[0].flat) < 2:
            raise UsageError(
                "UltraEdit's normalization 'lifelong' compares tokens, and the answers of the first turn have one: set "
                "normalization to 'turn', or edit several requests at once (batch_size)."
            )
        self._taken = 0
        self._moments: dict[torch.Size, RunningMoments] = {}
        self._ridges: dict[tuple[int, str], tuple[Tensor | None, Ridge]] = {}
        self._held: list[dict[str, Held]] = []
        held_of_turns = [_held_of(batch) for batch in batches]
        known[:] = [one for one in known if any(_equal(one[0], rows) for rows in held_of_turns)]  # for it may be large
        for rows in held_of_turns:
            held = next((held for others, held in known if _equal(rows, others)), None)
            if held is None:
                held = self._inputs_of(rows)
                known.append((rows, held))
            self._held.append(held)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the context, steps see what the layers saw in the last pass."""
        with watching(self._change.layers, lambda: self._turns[self._taken % len(self._turns)]) as self._seen:
            yield

    @torch.no_grad()
    def step(self) -> None:
        """Change the weights by the last pass, which was one over the rows of the turn."""
        turn = self._taken % len(self._turns)
        found = {
            name: (inputs, self._turns[turn].rows(output.grad, name))
            for name, (inputs, output) in self._seen.items()
            if output is not None and output.grad is not None  # else the answers do not depend on it
        }
        self._seen.clear()
        _require_finite([tensor for pair in found.values() for tensor in pair], f"in step {self._taken + 1}")
        self._taken += 1
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
            return gradients * (-lr * features / rms.clamp(min=torch.finfo(rms.dtype).tiny ** 0.5))  # squares vanish
        normal = self._moments_of(name).normalized(torch.cat([inputs, gradients], dim=1))
        return normal[:, features:] * (-lr * normal[:, :features].square().sum(1, keepdim=True))

    def _moments_of(self, name: str) -> RunningMoments:
        return self._moments.setdefault(self._change.weights[name].shape, RunningMoments())

    @torch.no_grad()
    def _inputs_of(self, held: Mapping[str, Tensor]) -> dict[str, Held]:
        if not len(held["labels"]):
            return {}
        arguments = {name: rows for name, rows in held.items() if name not in ("labels", "held")}
        places = Places.of(held["held"] > 0)
        with watching(self._change.layers, lambda: places) as seen:
            self._model(**arguments, use_cache=False)
        roots = held["held"].flatten()[places.flat + 1].sqrt()[:, None]
        found = {name: Held(roots * inputs) for name, (inputs, _) in seen.items()}
        _require_finite([held.squares for held in found.values()], "on the anchors")
        return found


def answers_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows that are not held."""
    if "held" not in batch:
        return dict(batch)
    return {name: rows for name, rows in _some(batch, ~batch["held"].any(1)).items() if name != "held"}


def _held_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows that are held."""
    if "held" not in batch or not batch["held"].any():
        return {"labels": batch["labels"][:0]}
    return _some(batch, batch["held"].any(1))


def _some(batch: Mapping[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
    """Some rows, without columns that are padding in all of them."""
    width = int(batch["attention_mask"][chosen].sum(1).max())
    return {name: rows[chosen, :width] for name, rows in batch.items()}


def _equal(rows: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return rows.keys() == others.keys() and all(torch.equal(rows[name], others[name]) for name in rows)


def _require_finite(tensors: Sequence[Tensor], where: str) -> None:
    if tensors and not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():  # at once, for this waits
        raise TrainingError(
            f"UltraEdit found inputs or gradients of layers that are NaN or infinite, {where}: lower lr, or give the "
            "model a wider dtype."
        )
