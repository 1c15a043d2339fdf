"""UltraEdit: edits by least squares, from the inputs of layers and the gradients of their outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lit_sparse.data.padding import IGNORED
from lit_sparse.editing.holding import HeldInputs, answers_of, require_finite
from lit_sparse.editing.watching import Places, watching
from lit_sparse.editing.whole_weights import Changing, WholeWeights
from lit_sparse.errors import UsageError, require_choice, require_range
from lit_sparse.functional.keys import needed_features
from lit_sparse.functional.ultraedit import Held, Ridge, RunningMoments, least_squares

Normalization = Literal["lifelong", "turn"]


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
        held: What the layers have as inputs on the texts that are held.

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
        held: HeldInputs,
    ) -> None:
        change.require_linear("UltraEdit")
        self._method, self._change = method, change
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
        self._held = held.of(model, change.layers, batches)

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
        require_finite([tensor for pair in found.values() for tensor in pair], f"in step {self._taken + 1}")
        self._taken += 1
        if self._method.normalization == "lifelong":
            for name, pair in found.items():
                self._moments_of(name).update(torch.cat(pair, dim=1))
        for name, (inputs, gradients) in found.items():
            if (turn, name) not in self._ridges:
                held = self._held[turn].get(name) or Held(inputs[:0])
                features = needed_features(inputs.square().sum(0), held.squares, self._method.density)
                self._ridges[turn, name] = features, held.ridge(features)
            features, ridge = self._ridges[turn, name]
            columns = slice(None) if features is None else features
            wanted = self._wanted(name, inputs, gradients)
            change = inputs.new_zeros(inputs.shape[1], wanted.shape[1])
            change[columns] = least_squares(inputs[:, columns], wanted, ridge)
            self._change.as_matrix(name, self._change.weights[name]).add_(change.mT)

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
