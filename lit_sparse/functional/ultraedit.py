"""UltraEdit: changes of weights by least squares, and the moments that scale them."""

from __future__ import annotations

import torch
from torch import Tensor


def least_squares(inputs: Tensor, outputs: Tensor, held: Tensor) -> Tensor:
    """The D that minimizes ‖inputs D − outputs‖² + ‖D‖² + ‖held D‖².

    Args:
        inputs: Shape ``(tokens, in_features)``.
        outputs: Shape ``(tokens, out_features)``.
        held: Shape ``(other tokens, in_features)``.

    Returns:
        Shape ``(in_features, out_features)``.

    Example:
        >>> least_squares(torch.tensor([[1.0, 2.0]]), torch.tensor([[6.0]]), torch.zeros(0, 2))
        tensor([[1.],
                [2.]])
        >>> least_squares(torch.tensor([[1.0, 2.0]]), torch.tensor([[6.0]]), torch.tensor([[0.0, 1.0]]))
        tensor([[1.5000],
                [1.5000]])
    """
    rows = torch.cat([inputs, held])
    unit = torch.eye(min(rows.shape), dtype=rows.dtype, device=rows.device)
    if len(unit) == rows.shape[1]:  # the smaller of two equal systems
        found: Tensor = torch.linalg.solve(rows.mT @ rows + unit, inputs.mT @ outputs)
        return found
    targets = torch.cat([outputs, outputs.new_zeros(len(held), outputs.shape[1])])
    solved: Tensor = torch.linalg.solve(rows @ rows.mT + unit, targets)
    return rows.mT @ solved


class RunningMoments:
    """Mean and standard deviation of all rows so far."""

    def __init__(self) -> None:
        self.count: float = 0
        self.mean = self.squares = torch.zeros(())
        """``squares`` is the sum of the squared deviations from the mean."""

    def update(self, rows: Tensor) -> None:
        """Take rows of shape ``(rows, features)`` into account."""
        count, away = self.count + len(rows), rows.mean(0) - self.mean.to(rows)
        self.squares = self.squares.to(rows) + (rows - rows.mean(0)).square().sum(0)
        self.squares = self.squares + away.square() * (self.count * len(rows) / count)
        self.mean, self.count = self.mean.to(rows) + away * (len(rows) / count), count

    def normalized(self, rows: Tensor) -> Tensor:
        """Rows less the mean, in units of the deviation."""
        tiny = torch.finfo(rows.dtype).eps
        return (rows - self.mean) / ((self.squares / (self.count - 1 + tiny)).sqrt() + tiny)
