"""lit_sparse.functional.preferences against loops over tokens and the formulas of the papers."""

import math
from collections.abc import Callable

import pytest
import torch

from lit_sparse.functional import answer_log_probabilities, dpo_loss, ipo_loss, orpo_loss, simpo_loss

IGNORED = -100
CHOSEN = torch.tensor([-0.3, -2.0, -1.1, -0.01], dtype=torch.float64)
REJECTED = torch.tensor([-1.2, -0.5, -1.1, -4.0], dtype=torch.float64)


def log_sigmoid(x: float) -> float:
    return math.log(1 / (1 + math.exp(-x)))


def slow_dpo(w: float, r: float) -> float:
    return -log_sigmoid(0.3 * w - 0.3 * r)


def slow_conservative_dpo(w: float, r: float) -> float:
    return -0.8 * log_sigmoid(0.3 * (w - r)) - 0.2 * log_sigmoid(0.3 * (r - w))


def slow_ipo(w: float, r: float) -> float:
    return ((w - r) - 1 / 0.3 / 2) ** 2


def slow_orpo(w: float, r: float) -> float:
    odds = [math.exp(log) / (1 - math.exp(log)) for log in (w, r)]
    return -w + 0.3 * -log_sigmoid(math.log(odds[0] / odds[1]))


def slow_simpo(w: float, r: float) -> float:
    return -log_sigmoid(0.3 * w - 0.3 * r - 0.7)


@pytest.mark.parametrize(
    ("fast", "slow"),
    [
        (lambda w, r: dpo_loss(w, r, 0.3), slow_dpo),
        (lambda w, r: dpo_loss(w, r, 0.3, 0.2), slow_conservative_dpo),
        (lambda w, r: ipo_loss(w, r, 0.3), slow_ipo),
        (lambda w, r: orpo_loss(w, r, 0.3), slow_orpo),
        (lambda w, r: simpo_loss(w, r, 0.3, 0.7), slow_simpo),
    ],
    ids=["dpo", "conservative dpo", "ipo", "orpo", "simpo"],
)
def test_losses_are_the_formulas(fast: Callable[..., torch.Tensor], slow: Callable[[float, float], float]) -> None:
    expected = [slow(w, r) for w, r in zip(CHOSEN.tolist(), REJECTED.tolist(), strict=True)]
    assert fast(CHOSEN, REJECTED).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("certain", [0.0, -1e-30])
def test_a_certain_answer_has_finite_odds(certain: float) -> None:
    chosen = torch.tensor([certain, -1.0], requires_grad=True)
    orpo_loss(chosen, chosen.flip(0), beta=0.1).sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.isfinite().all()


def rows(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    logits = (3 * torch.randn(3, 6, 11)).to(dtype)
    labels = torch.randint(0, 11, (3, 6))
    labels[0, :2] = IGNORED
    labels[1, 4:] = IGNORED  # right from the start: the first token is predicted by nothing
    labels[2] = IGNORED
    return logits, labels


def token_by_token(logits: torch.Tensor, labels: torch.Tensor) -> tuple[list[float], list[int]]:
    sums, counts = [], []
    for row, wanted in zip(logits.double(), labels.tolist(), strict=True):
        each = [
            math.log(row[place - 1].softmax(-1)[token])
            for place, token in enumerate(wanted)
            if place > 0 and token != IGNORED
        ]
        sums.append(math.fsum(each))
        counts.append(len(each))
    return sums, counts


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
def test_log_probabilities_are_those_of_every_labelled_token(dtype: torch.dtype, precision: float) -> None:
    logits, labels = rows(dtype)
    sums, counts = answer_log_probabilities(logits, labels)
    expected, numbers = token_by_token(logits, labels)
    assert sums.tolist() == pytest.approx(expected, rel=precision)
    assert counts.tolist() == numbers == [4, 3, 0]
    assert sums.dtype == torch.promote_types(dtype, torch.float32)


def test_their_gradient_is_that_of_the_definition() -> None:
    logits, labels = rows(torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: answer_log_probabilities(x, labels)[0], logits)
    half = logits.detach().bfloat16().requires_grad_()
    answer_log_probabilities(half, labels)[0].sum().backward()
    wide = half.detach().double().requires_grad_()
    answer_log_probabilities(wide, labels)[0].sum().backward()
    assert half.grad is not None
    torch.testing.assert_close(half.grad, wide.grad.bfloat16())
