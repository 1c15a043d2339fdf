"""Preferences: make the better of two answers likelier than the other, by DPO, IPO, ORPO or SimPO."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_sparse.adapters.injection import adapters_in, disable_adapters
from lit_sparse.adapters.modes import in_mode
from lit_sparse.callbacks.measuring import Mean, Metrics
from lit_sparse.errors import UsageError, require_choice, require_range
from lit_sparse.functional import answer_log_probabilities, dpo_loss, ipo_loss, orpo_loss, simpo_loss
from lit_sparse.methods.method import Method
from lit_sparse.modules.language_modeling import CausalLM

_WITH_REFERENCE = ("dpo", "ipo")
_PER_TOKEN = ("ipo", "orpo", "simpo")  # losses by the mean log-probability of a token, not by their sum


class PreferenceLM(CausalLM):
    """Fine-tune a causal language model on pairs of a chosen and a rejected answer, as PreferenceData has them.

    The reference of DPO and IPO is the model itself, with its adapters off, the original values of its trained head and
    without dropout: there is no second copy of the backbone. ORPO and SimPO need no reference, and no second forward
    pass.

    The reward of an answer is β times its log-ratio, log π(y|x) − log π_ref(y|x), or its log-probability with a loss
    that needs no reference. It is a sum over the answer's tokens with DPO, and their mean with the other losses. All
    rewards of DPO and IPO are 0 before the first step. Training and evaluation log, as means over the rows:

    - ``loss``;
    - ``reward_accuracy``, the share of rows whose chosen answer has the higher reward;
    - ``reward_margin``, the reward of the chosen answer less that of the rejected one;
    - ``chosen_log_probability``, log π of the chosen answer, in nats;
    - ``chosen_log_ratio``, with a reference: log π − log π_ref of the chosen answer, in nats. On answers that the model
      itself wrote, it estimates the Kullback–Leibler divergence from the reference.

    Rows that are no pairs are measured as in :class:`~lit_sparse.CausalLM`, for example by
    :class:`~lit_sparse.ForgettingProbe`, and prompts are continued.

    Args:
        loss: ``dpo``, ``ipo``, ``orpo`` or ``simpo``; see ``lit_sparse.functional`` for the formulas.
        beta: Scale of rewards; for ``ipo`` the regularization τ, for ``orpo`` the weight λ of the odds ratio. None is
            0.1, and 2.0 for ``simpo``, whose rewards are means over tokens.
        label_smoothing: Share of the pairs that ``dpo`` takes to be the wrong way round, in [0, 0.5): conservative DPO.
        gamma: Margin of rewards that ``simpo`` aims at; None is 0.5.
        options: Further arguments of :class:`~lit_sparse.CausalLM`.

    Raises:
        UsageError: If an argument is outside its range or not for this loss, the backbone cannot be loaded, or
            ``init_weights`` or ``start_from`` leave no reference.

    Source:
        Rafailov et al. 2023 (DPO, arXiv:2305.18290), Azar et al. 2023 (IPO, arXiv:2310.12036), Hong et al. 2024 (ORPO,
        arXiv:2403.07691), Meng et al. 2024 (SimPO, arXiv:2405.14734).
    """

    _label_dimensions = (2, 3)

    def __init__(
        self,
        backbone: str | nn.Module,
        method: Method,
        *,
        loss: Literal["dpo", "ipo", "orpo", "simpo"] = "dpo",
        beta: float | None = None,
        label_smoothing: float = 0.0,
        gamma: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(backbone, method, **options)
        require_choice("loss", loss, ("dpo", "ipo", "orpo", "simpo"))
        require_range("beta", beta, above=0)
        require_range("label_smoothing", label_smoothing, at_least=0, below=0.5)
        require_range("gamma", gamma, at_least=0)
        if label_smoothing and loss != "dpo":
            raise UsageError(f"label_smoothing is for the loss 'dpo', and the loss is {loss!r}: leave it out.")
        if gamma is not None and loss != "simpo":
            raise UsageError(f"gamma is for the loss 'simpo', and the loss is {loss!r}: leave it out.")
        self.loss = loss
        self.beta = beta if beta is not None else 2.0 if loss == "simpo" else 0.1
        self.label_smoothing = label_smoothing
        self.gamma = 0.5 if gamma is None else gamma

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:  # noqa: ARG002
        """The mean loss of the pairs."""
        if batch["labels"].ndim != 3:
            raise UsageError(
                "PreferenceLM learns from pairs of answers, labels of shape (rows, 2, tokens), as PreferenceData has "
                f"them; these have the shape {tuple(batch['labels'].shape)}. Use CausalLM for single answers."
            )
        found = {name: rows.mean() for name, rows in self._compared(batch).items()}
        loss = found.pop("loss")
        self._log_loss(loss)
        self.log_dict({f"train_{name}": value for name, value in found.items()})
        return loss

    def make_metrics(self) -> Metrics:
        """Means over the pairs, and the metrics of single answers."""
        names = ("reward_accuracy", "reward_margin", "chosen_log_probability", "chosen_log_ratio")
        return {**super().make_metrics(), **{name: Mean() for name in names}}

    def measure(self, batch: dict[str, Any], metrics: Metrics, data: Any = None, name: str = "") -> None:
        """Update metrics with a batch of pairs, or of single answers."""
        if "labels" not in batch or batch["labels"].ndim != 3:
            super().measure(batch, metrics, data, name)
            return
        for key, rows in self._compared(batch).items():
            metrics[key].update(rows.sum(), len(rows))

    def _compared(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss and the metrics of each row of a batch of pairs."""
        answers = {name: value.flatten(0, 1) for name, value in batch.items()}
        labels = answers.pop("labels")
        reference = None
        if self.loss in _WITH_REFERENCE:
            with self._as_reference():
                reference, _ = answer_log_probabilities(self(**answers).logits, labels)
        sums, counts = answer_log_probabilities(self(**answers).logits, labels)
        scores = sums if reference is None else sums - reference
        if self.loss in _PER_TOKEN:
            scores = scores / counts
        chosen, rejected = scores.view(-1, 2).unbind(1)
        found = {"loss": self._losses(chosen, rejected)}
        with torch.no_grad():
            found["reward_accuracy"] = (chosen > rejected).float()
            found["reward_margin"] = self.beta * (chosen - rejected)
            found["chosen_log_probability"] = sums[::2].detach()
            if reference is not None:
                found["chosen_log_ratio"] = (sums - reference)[::2]
        return found

    def _losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        if self.loss == "dpo":
            return dpo_loss(chosen, rejected, self.beta, self.label_smoothing)
        if self.loss == "ipo":
            return ipo_loss(chosen, rejected, self.beta)
        if self.loss == "orpo":
            return orpo_loss(chosen, rejected, self.beta)
        return simpo_loss(chosen, rejected, self.beta, self.gamma)

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        """Within the context, the module computes what it did before training, without dropout and gradients."""
        model = self._require_model()
        # They are off while GoRA takes its start from gradients; the head is the original one then.
        on = any(adapter.enabled for _, adapter in adapters_in(model))
        with torch.no_grad(), in_mode(model, training=False), disable_adapters(model, head=on):
            yield

    def _ask_data(self) -> None:
        """Refuse a loss whose reference is lost once the backbone is loaded."""
        if self.loss not in _WITH_REFERENCE:
            return
        if self.method.changes_weights:
            raise UsageError(
                f"The loss {self.loss!r} compares with the pretrained model, whose weights init_weights "
                f"{self.method.init_weights!r} changes: set init_weights to 'lora', or loss to 'orpo' or 'simpo'."
            )
        if self.start_from is not None:
            raise UsageError(
                f"The loss {self.loss!r} compares with the model before training, and the backbone without start_from "
                "is another one: merge that LoRA into the backbone and name the merged folder as backbone, or set loss "
                "to 'orpo' or 'simpo'."
            )
