"""The proximal step in the optimizer's metric acts only on what the optimizer stepped."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import lit_sparse as ls

WEIGHT, LR, WIDTH = 0.01, 1e-2, 6


class TwoTowers(nn.Module):
    """Two layers side by side; a batch goes through one of them or both."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, right: bool) -> Tensor:
        return self.left(x) + self.right(x) if right else self.left(x)


def gates_while_training(steps_on_the_right: list[bool]) -> Iterator[tuple[Tensor, Tensor, torch.optim.Optimizer]]:
    """Train; yield both gates after each step, and the optimizer."""
    torch.manual_seed(0)
    method = ls.SoRA(["left", "right"], rank=3, sparsity_weight=WEIGHT, metric="optimizer", gate_init="ones")
    model = TwoTowers()
    adapters = ls.inject(model, method)
    optimizer = torch.optim.Adam(ls.parameter_groups(model, method), lr=LR)
    steps = ls.SparseSteps(method, model, optimizer, len(steps_on_the_right))
    for right in steps_on_the_right:
        model(torch.randn(4, WIDTH), right).square().mean().backward()
        steps.observe()
        optimizer.step()
        optimizer.zero_grad()
        yield adapters["left"].gate.detach().clone(), adapters["right"].gate.detach().clone(), optimizer


def test_a_gate_that_was_never_stepped_stays_as_it_is() -> None:
    *_, (left, right, optimizer) = gates_while_training([False] * 4)
    assert torch.equal(right, torch.ones(3))
    assert not torch.equal(left, torch.ones(3))
    assert sum("exp_avg_sq" in state for state in optimizer.state.values()) == 3  # A, B and gate of one layer


def test_a_gate_is_not_thresholded_in_a_step_that_leaves_it_out() -> None:
    values = [right for _, right, _ in gates_while_training([True, True, False, False, True])]
    assert not torch.equal(values[0], values[1])
    assert torch.equal(values[1], values[2])
    assert torch.equal(values[2], values[3])
    assert not torch.equal(values[3], values[4])


def test_gates_with_gradients_of_zero_stay_until_they_have_moved() -> None:
    """While B is zero, every gate's gradient is zero: λ·lr/ε as a threshold would zero them all in the first step."""
    (first, _, _), (second, _, optimizer) = gates_while_training([True, True])
    assert torch.equal(first, torch.ones(3))
    gate = optimizer.param_groups[-1]["params"][0]
    assert gate.shape == (3,)
    moments = optimizer.state[gate]
    # Adam's second step from 1, then the proximal map: both written out.
    root = (moments["exp_avg_sq"] / (1 - 0.999**2)).sqrt() + 1e-8
    moved = 1 - LR * moments["exp_avg"] / (1 - 0.9**2) / root
    expected = moved.sign() * (moved.abs() - WEIGHT * LR / root).clamp(min=0)
    assert (second != 0).any()
    torch.testing.assert_close(second, expected)
