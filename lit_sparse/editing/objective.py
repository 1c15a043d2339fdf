"""What edits minimize."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_sparse.adapters.rowwise import Routes
from lit_sparse.data.padding import IGNORED


class Objective:
    """The loss of the answers of several edits, and what their anchors cost.

    With the answer's tokens T of an edit, the places S of its anchors and their weights w,

        L = mean over t in T of -log p(t)  +  sum over s in S of w(s) · KL(p₀(·|s) ‖ p(·|s))

    where p₀ are the probabilities of the model as it is when the objective is made.

    Args:
        model: A causal language model.
        rows: Its arguments, with ``labels``, and ``held`` if there are anchors: the weights of the tokens before which
            the model's probabilities are held, 0 elsewhere, of the shape of ``labels``.
        routes: Which edit each row belongs to, shared with the adapters; None: all to one.
        edits: The number of edits.
    """

    def __init__(self, model: nn.Module, rows: Mapping[str, Tensor], routes: Routes | None = None, edits: int = 1):
        self._rows = dict(rows)
        self._routes = routes or Routes(torch.zeros_like(rows["labels"][:, 0]))
        self._edits = edits
        self._held: tuple[Tensor, Tensor] | None = None
        """Rows and columns of the logits of the tokens that are held. To find them waits for the device, so once."""
        if "held" in rows:
            self._held = rows["held"][:, 1:].nonzero(as_tuple=True)  # type: ignore[assignment]
            with torch.no_grad():
                self._before = self._log_probabilities(self._logits(model))

    def __call__(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """The mean loss of each edit's answer, in nats per token, and L; both of shape ``(edits,)``.

        An edit without rows has 0.
        """
        logits, labels = self._logits(model), self._rows["labels"][:, 1:]
        each = F.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(labels)
        zeros, edits = each.new_zeros(self._edits), self._routes.copies
        counted = (labels != IGNORED).sum(1).to(each.dtype)
        losses = zeros.index_add(0, edits, each.sum(1)) / zeros.index_add(0, edits, counted).clamp(min=1)
        if self._held is None:
            return losses, losses
        away = (self._before.exp() * (self._before - self._log_probabilities(logits))).sum(-1)
        weights = self._rows["held"][:, 1:][self._held]
        return losses, losses.index_add(0, edits[self._held[0]], weights * away)

    def leave_out(self, ended: Sequence[int]) -> None:
        """Go on without the rows of some edits; the routes then lead to the others."""
        kept = ~torch.isin(self._routes.copies, self._routes.copies.new_tensor(ended))
        if self._held is not None:
            self._before = self._before[kept[self._held[0]]]
        self._routes.copies = self._routes.copies[kept]
        self._rows = {name: tensor[kept] for name, tensor in self._rows.items()}
        if self._held is not None:
            self._held = self._rows["held"][:, 1:].nonzero(as_tuple=True)  # type: ignore[assignment]

    def _logits(self, model: nn.Module) -> Tensor:
        """Of the token after each but the last."""
        inputs = {name: tensor for name, tensor in self._rows.items() if name not in ("labels", "held")}
        logits: Tensor = model(**inputs, use_cache=False).logits
        return logits[:, :-1]

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        return logits[self._held].float().log_softmax(-1)
