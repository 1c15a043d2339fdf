"""UltraEdit: changes of weights by least squares, and the moments that scale them."""

from __future__ import annotations

import torch
from torch import Tensor


class Held:
    """Inputs of a layer on which its outputs are to stay.

    Args:
        rows: The inputs times the roots of their weights, shape ``(tokens, in_features)``.
    """

    def __init__(self, rows: Tensor) -> None:
        self.squares = rows.square().sum(0)
        """Of each input feature, shape ``(in_features,)``."""
        self._few = len(rows) < rows.shape[1]
        self._kept = rows if self._few else rows.double().mT @ rows.double()
        self._narrow = self._kept
        self._moved: Tensor | None = None
        self._whole: Ridge | None = None

    def weighed(self, matrix: Tensor) -> Tensor:
        """M XᵀX in the precision of M, whose shape is ``(..., in_features)``."""
        if self._narrow.dtype != matrix.dtype:
            self._narrow = self._kept.to(matrix.dtype)
        return (matrix @ self._narrow.mT) @ self._narrow if self._few else matrix @ self._narrow

    def moved(self, weight: Tensor) -> Tensor:
        """‖X Wᵀ‖² for the weight of the layer, shape ``(out_features, in_features)``; computed once."""
        if self._moved is None:
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            self._moved = (self.weighed(wide) * wide).sum()
        return self._moved

    def gram(self, features: Tensor | None = None) -> Tensor:
        """XᵀX in float64, of all features or of some, whose numbers are given."""
        chosen = slice(None) if features is None else features
        if not self._few:
            return self._kept[chosen][:, chosen]
        rows = self._kept[:, chosen].double()
        return rows.mT @ rows

    def ridge(self, features: Tensor | None = None) -> Ridge:
        """For all features, or for some of them, whose numbers are given."""
        if features is None:
            self._whole = self._whole or Ridge(self._kept, self._few)
            return self._whole
        kept = self._kept[:, features]
        return Held(kept).ridge() if self._few else Ridge(kept[features], few=False)


class Ridge:
    """Solves with I + XᵀX, in float64, for XᵀX may have entries of 10⁸, and I is to count all the same.

    Args:
        kept: X if it has few rows, else XᵀX.
        few: Which of them.
    """

    def __init__(self, kept: Tensor, few: bool) -> None:
        square = kept.double() @ kept.double().mT if few else kept
        self._factor = torch.linalg.cholesky(square + torch.eye(len(square), dtype=square.dtype, device=square.device))
        self._rows = kept if few else None

    def solve(self, columns: Tensor) -> Tensor:
        """(I + XᵀX)⁻¹ columns, which are of float64."""
        if self._rows is None:
            return torch.cholesky_solve(columns, self._factor)
        rows = self._rows.double()
        return columns - rows.mT @ torch.cholesky_solve(rows @ columns, self._factor)


def least_squares(inputs: Tensor, outputs: Tensor, ridge: Ridge) -> Tensor:
    """The D that minimizes ‖inputs D − outputs‖² + ‖D‖² + ‖X D‖².

    Args:
        inputs: Shape ``(tokens, in_features)``.
        outputs: Shape ``(tokens, out_features)``.
        ridge: Made of X.

    Returns:
        Shape ``(in_features, out_features)``.

    Example:
        >>> inputs, outputs = torch.tensor([[1.0, 2.0]]), torch.tensor([[6.0]])
        >>> least_squares(inputs, outputs, Held(torch.zeros(0, 2)).ridge())
        tensor([[1.],
                [2.]])
        >>> least_squares(inputs, outputs, Held(torch.tensor([[0.0, 1.0]])).ridge())
        tensor([[1.5000],
                [1.5000]])
    """
    rows = inputs.double()
    moved = ridge.solve(rows.mT)
    unit = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    solved: Tensor = torch.linalg.solve(rows @ moved + unit, outputs.double())
    return (moved @ solved).to(outputs.dtype)


class RunningMoments:
    """Mean and standard deviation of all rows so far.

    UltraEdit's release counts the squared deviations of n rows n / (n - 1) times, and a single row makes it give NaN.
    """

    def __init__(self) -> None:
        self.count: float = 0
        self.mean = self.squares = torch.zeros(())
        """``squares`` is the sum of the squared deviations from the mean."""

    def update(self, rows: Tensor) -> None:
        """Take rows of shape ``(rows, features)`` into account, at least one."""
        count, away = self.count + len(rows), rows.mean(0) - self.mean.to(rows)
        self.squares = self.squares.to(rows) + (rows - rows.mean(0)).square().sum(0)
        self.squares = self.squares + away.square() * (self.count * len(rows) / count)
        self.mean, self.count = self.mean.to(rows) + away * (len(rows) / count), count

    def normalized(self, rows: Tensor) -> Tensor:
        """Rows less the mean, in units of the deviation."""
        tiny = torch.finfo(rows.dtype).eps
        return (rows - self.mean) / ((self.squares / (self.count - 1 + tiny)).sqrt() + tiny)
