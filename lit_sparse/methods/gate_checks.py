"""Checks of the optimizer and the thresholds of gates before a run, for SoRA and GatedRoseLoRA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from lit_sparse.errors import UsageError


def require_adam(optimizer: Optimizer) -> None:
    """Raise UsageError if the optimizer does not have the metric of ``metric: optimizer``."""
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        raise UsageError(
            f"metric 'optimizer' is the metric of Adam and AdamW; the optimizer is {type(optimizer).__name__}. Use one "
            "of them, or metric 'euclidean'."
        )


def compare_groups(gates: Sequence[nn.Parameter], optimizer: Optimizer, gate_lr: float | None, pull: str) -> list[str]:
    """Warn of weight decay on gates, and raise UsageError if the optimizer trains them with another lr than gate_lr."""
    held = {gate for gate in gates if gate.requires_grad}
    groups = [group for group in optimizer.param_groups if any(p in held for p in group["params"])]
    rates = [float(group.get("initial_lr", group["lr"])) for group in groups]
    if gate_lr is not None and any(rate != gate_lr for rate in rates):
        raise UsageError(
            f"gate_lr is {gate_lr:g}, but the optimizer holds gates with lr {rates}. Build it from "
            "lit_sparse.parameter_groups(model, method)."
        )
    decays = [group["weight_decay"] for group in groups if group.get("weight_decay")]
    if not decays:
        return []
    return [
        f"The optimizer's weight decay {decays} pulls at the gates beside the {pull}. Build it from "
        "lit_sparse.parameter_groups(model, method), which exempts them."
    ]


def predict(gates: Sequence[nn.Parameter], knob: str, strength: float, rates: Sequence[float], span: str) -> list[str]:
    """Simulate two extreme gates: one that starts at 1 and is only pulled, one that Adam always pushes outward.

    An Adam step moves a gate by about its lr at most. The threshold is hopeless when the pull alone cannot
    take a gate from 1 to 0, and destructive when even the largest gate, pushed outward by lr at every
    step, ends at 0. ``rates`` are the learning rates of the steps that pull, and ``span`` is the name of these steps.
    """
    pulls = [strength if knob == "threshold" else lr * strength for lr in rates]
    largest = float(torch.cat([gate.detach().flatten() for gate in gates]).abs().max())
    for lr, pull in zip(rates, pulls, strict=True):
        largest = max(0.0, largest + lr - pull)
    if sum(pulls) < 1:
        return [
            f"{knob} {strength:g} pulls a gate towards zero by {sum(pulls):.2g} in the whole {span}, so that by itself "
            f"it cannot zero a gate of size 1. Raise {knob}, or train longer."
        ]
    if largest == 0:
        return [
            f"{knob} {strength:g} pulls every gate to zero within the {span}, even one that the optimizer always "
            f"pushes outward. Lower {knob}, or raise the learning rate of the gates."
        ]
    return []
