"""Losses of preference learning, by the log-probabilities of a chosen and a rejected answer."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

_IGNORED = -100  # the label of tokens that are no part of an answer


def answer_log_probabilities(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's answer, and its number of tokens.

    Beside ``logits``, which autograd keeps, memory holds one row in float32 at a time. The gradient takes as much
    memory as ``logits``.

    Args:
        logits: Scores of the next token, shape ``(rows, tokens, vocabulary)``.
        labels: Token ids, shape ``(rows, tokens)``; -100 where a token is no part of the answer. The label at a
            position is predicted by the logits at the position before.

    Returns:
        Sums over the tokens in nats, float32 or better, and counts, both of shape ``(rows,)``.

    Example:
        >>> logits = torch.zeros(1, 3, 4)
        >>> answer_log_probabilities(logits, torch.tensor([[-100, 1, 3]]))  # 2 log ¼
        (tensor([-2.7726]), tensor([2]))
    """
    # The labels are shifted: the gradient of shifted logits would be copied.
    targets = pad(labels[:, 1:], (0, 1), value=_IGNORED)
    counted = targets != _IGNORED
    each: Tensor = _LabelLogProbability.apply(logits, targets.where(counted, 0))  # type: ignore[no-untyped-call]
    return each.where(counted, 0).sum(-1), counted.sum(-1)


def dpo_loss(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Direct preference optimization: −(1 − ε) log σ(βΔ) − ε log σ(−βΔ), Δ = ``chosen`` − ``rejected``.

    Args:
        chosen: log π(y_w|x) − log π_ref(y_w|x) of each row, sums over the tokens, in nats.
        rejected: The same of y_l.
        beta: β; the larger, the closer the model stays to the reference.
        label_smoothing: ε, the share of pairs that are assumed to be the wrong way round, in [0, 0.5). 0 is DPO,
            more is conservative DPO.

    Returns:
        The loss of each row.

    Source:
        Rafailov et al. 2023 (arXiv:2305.18290), Eq. (7). Mitchell 2023, "A note on DPO with noisy preferences and
        relationship to IPO", for ε.

    Example:
        >>> dpo_loss(torch.tensor([1.0]), torch.tensor([-1.0]), beta=0.5)
        tensor([0.3133])
    """
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def ipo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Identity preference optimization: (Δ − 1 / 2β)², Δ = ``chosen`` − ``rejected``.

    Args:
        chosen: log π(y_w|x) − log π_ref(y_w|x) of each row. The paper's formula has sums over the tokens.
            :class:`~lit_sparse.PreferenceLM` takes means, so that the aim 1 / 2β does not depend on the length of
            answers; according to TRL, which does the same, the paper's results were made so.
        rejected: The same of y_l.
        beta: The paper's τ; the larger, the closer the model stays to the reference.

    Returns:
        The loss of each row.

    Source:
        Azar et al. 2023 (arXiv:2310.12036), Eq. (17).

    Example:
        >>> ipo_loss(torch.tensor([1.0]), torch.tensor([-1.0]), beta=0.5)
        tensor([1.])
    """
    return (chosen - rejected - 1 / (2 * beta)).square()


def orpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Odds ratio preference optimization: −``chosen`` − β log σ(log odds(y_w) − log odds(y_l)).

    The first term is that of fine-tuning on the chosen answers. The odds are P / (1 − P).

    Args:
        chosen: log P(y_w|x) of each row, the mean over the tokens, in nats.
        rejected: The same of y_l.
        beta: The paper's λ, the weight of the odds ratio.

    Returns:
        The loss of each row.

    Source:
        Hong et al. 2024 (arXiv:2403.07691), Eqs. (4) and (7) for the odds.

    Example:
        >>> orpo_loss(torch.tensor([0.5]).log(), torch.tensor([0.2]).log(), beta=1.0)  # log 2 + log (1 + ¼)
        tensor([0.9163])
    """
    return -chosen - beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """Simple preference optimization: −log σ(β ``chosen`` − β ``rejected`` − γ).

    Args:
        chosen: log π(y_w|x) of each row, the mean over the tokens, in nats.
        rejected: The same of y_l.
        beta: β, the scale of rewards.
        gamma: γ, the margin by which the reward of the chosen answer is to be higher.

    Returns:
        The loss of each row.

    Source:
        Meng et al. 2024 (arXiv:2405.14734).

    Example:
        >>> simpo_loss(torch.tensor([-1.0]), torch.tensor([-2.0]), beta=2.0, gamma=2.0)
        tensor([0.6931])
    """
    return -logsigmoid(beta * (chosen - rejected) - gamma)


def _log_odds(log_probability: Tensor) -> Tensor:
    # log (1 − P); a P that rounds to 1 would have infinite odds.
    rest = -torch.expm1(log_probability)
    return log_probability - rest.clamp(min=torch.finfo(rest.dtype).tiny).log()


class _LabelLogProbability(torch.autograd.Function):
    """log softmax(logits) at the labels; autograd's own would keep a float32 copy of all half-precision logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        totals = torch.stack([row.to(wide).logsumexp(-1) for row in logits])
        ctx.save_for_backward(logits, labels, totals)
        return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1).to(wide) - totals

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, labels, totals = ctx.saved_tensors
        found = torch.empty_like(logits)
        for row, logit, label, total, grad in zip(found, logits, labels, totals, grads[0], strict=True):
            one = logit.to(total.dtype).sub(total.unsqueeze(-1)).exp_().mul_(-grad.unsqueeze(-1))
            row.copy_(one.scatter_add_(-1, label.unsqueeze(-1), grad.unsqueeze(-1)))
        return found, None
