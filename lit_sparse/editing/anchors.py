"""What an edit is trained on, beside its prompt: prefixes, and texts on which nothing should change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_sparse.data.tokenizers import open_ended
from lit_sparse.editing.holding import HeldInputs
from lit_sparse.editing.requests import EditRequest
from lit_sparse.editing.teacher_forcing import Forced, collate, encode, read_texts
from lit_sparse.editing.ultraedit import UltraEdit
from lit_sparse.editing.whole_weights import WholeWeights
from lit_sparse.editing.writing import SAMPLING, Writer
from lit_sparse.errors import UsageError, reason_of, require_choice, require_range
from lit_sparse.methods.base import SparseMethod
from lit_sparse.modules.language_modeling import WITHOUT_SAMPLING

Hold = Literal["outputs", "probabilities"]
_WEIGHTS = {"outputs": 300.0, "probabilities": 1.0}
# Those of the release of MEMIT (Meng et al. 2022, arXiv:2210.07229), whose prefixes begin with them.
_STARTS = ("The", "Therefore", "Because", "I", "You")
_OF_SUBJECT = ("{} is", "{} was", "{}", "The name of {}", "{}, who", "{} has")
_LIKELY: dict[str, Any] = {**SAMPLING, "top_k": 50}  # no token that nobody would write
_PREFIX_TOKENS = 8
_ROWS = 32  # texts that are written at the same time


@dataclass(frozen=True, kw_only=True)
class Anchors:
    """Texts on which an edit is to change nothing. The model writes them itself, unless there is a file.

    Either the ``outputs`` of the layers that change are held there, or the ``probabilities`` of the tokens. To hold
    outputs takes one pass over the texts, and in a step a product with one matrix per layer. Edits that hold the same
    texts share pass and matrices; texts on subjects are each edit's own, and such edits are trained one after another.
    The loss of an edit gets ``weight`` times

    - ``outputs``: the sum over the layers of Σ_s ‖ΔW x(s)‖² / Σ_s ‖W x(s)‖², with the inputs x(s) that a layer of the
      weight W has where the tokens s are predicted. :class:`~lit_sparse.UltraEdit` has the equation that it solves.
    - ``probabilities``: the mean of KL(p₀ ‖ p) in nats over the tokens, with the probabilities p₀ before the edit.

    Args:
        hold: What is held. UltraEdit, and requests that take turns, need ``outputs``.
        weight: Price of a change, in units of the loss of the new answer; None: 300 for outputs, of which a change by a
            hundredth then costs 0.03 for each layer, and 1 for probabilities. For UltraEdit, the sum of the weights w
            of all tokens.
        of_subject: Texts on the subject of each request, at most 6, such as "SUBJECT was …". A request without a
            subject has none. While requests take turns, the matrices of every turn with such texts are kept.
        general: Texts on anything, drawn once, or the first ones of ``texts``.
        tokens: Longest continuation, or part of a text of the file, in tokens. The first token of a text of the file is
            not held.
        texts: JSON Lines file with a column ``text``; None: the model writes the general texts.

    Raises:
        UsageError: If an argument is outside its range, or there would be no text.
    """

    hold: Hold = "outputs"
    weight: float | None = None
    of_subject: int = 6
    general: int = 6
    tokens: int = 12
    texts: str | None = None

    def __post_init__(self) -> None:
        require_choice("hold", self.hold, get_args(Hold))
        if self.weight is None:
            object.__setattr__(self, "weight", _WEIGHTS[self.hold])
        require_range("weight", self.weight, above=0)
        require_range("of_subject", self.of_subject, at_least=0, at_most=len(_OF_SUBJECT))
        require_range("general", self.general, at_least=0)
        require_range("tokens", self.tokens, at_least=1)
        if not self.of_subject and not self.general:
            raise UsageError("of_subject and general are both 0, so nothing would be held: raise one of them.")
        if self.texts is not None and not self.general:
            raise UsageError("texts are given, and general is 0, so none of them would be held: raise general.")
        if self.texts is not None and self.tokens < 2:
            raise UsageError("texts are given, and tokens is 1, but the first token of each is not held: raise tokens.")


def require_holdable(anchors: Anchors | None, method: object, in_turns: bool) -> None:
    """Refuse anchors that a method cannot hold, or not while requests take turns."""
    if anchors is None:
        return
    what = "requests_per_step" if in_turns else "UltraEdit" if isinstance(method, UltraEdit) else None
    if anchors.hold == "probabilities" and what is not None:
        raise UsageError(f"Anchors cannot hold probabilities with {what}: set hold of the anchors to outputs.")
    if anchors.hold == "outputs" and not isinstance(method, SparseMethod | WholeWeights):
        raise UsageError(
            f"Anchors cannot hold outputs with {type(method).__name__}, which has neither A and B nor whole weights: "
            "set hold of the anchors to probabilities."
        )


class Examples:
    """Makes the batches of edits.

    Args:
        model: The model, which is not edited yet.
        tokenizer: Tokenizer of the model.
        prefixes: Texts that the model writes; each prompt is trained on alone, and after each of them.
        anchors: What is held; None: nothing.
        seed: Of the texts that are drawn.

    Raises:
        UsageError: If the tokenizer cannot read the words that texts begin with, the model writes nothing, or the file
            of texts cannot be read or has too few.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, prefixes: int, anchors: Anchors | None, seed: int
    ) -> None:
        self._writer, self._tokenizer, self._anchors = Writer(model, tokenizer, _ROWS, 0), tokenizer, anchors
        with isolate_rng():
            torch.manual_seed(seed)
            drawn = self._continued(_repeated(prefixes), _PREFIX_TOKENS, _LIKELY)
            texts = [tokenizer.decode(row.input_ids, skip_special_tokens=True) for row in drawn]
            self._prefixes = [" ".join(str(text).split()) for text in texts]
            general = [] if anchors is None or anchors.texts is not None else _repeated(anchors.general)
            held = [] if anchors is None else self._continued(general, anchors.tokens, _LIKELY)
        if len(drawn) < prefixes or len(held) < len(general):
            raise UsageError(
                f"The model ends texts such as {_STARTS[0]!r} at once, so it writes no prefixes or general anchors: "
                "set prefixes to 0, and general of the anchors to 0."
            )
        if anchors is not None and anchors.texts is not None:
            found = read_texts(anchors.texts, tokenizer, anchors.tokens, anchors.general)
            if len(found) < anchors.general:
                raise UsageError(
                    f"{anchors.texts!r} has {len(found)} texts of at least two tokens, and general is "
                    f"{anchors.general}: lower it to that number."
                )
            held = [Forced(ids, 1) for ids in found]
        self._general = [Forced(row.input_ids, 1) for row in held]
        self.held = HeldInputs() if anchors is not None and anchors.hold == "outputs" else None
        """The inputs of layers on the anchors, if outputs are held."""

    def forget_inputs(self) -> None:
        """Forget the inputs of layers on the anchors."""
        if self.held is not None:
            self.held.clear()

    def batches(
        self, requests: Sequence[EditRequest], size: int | None, device: torch.device
    ) -> list[dict[str, Tensor]]:
        """Batches that take turns, of ``size`` requests, or one of all.

        Args:
            requests: Those of one edit.
            size: Requests per batch, at most.
            device: Where the batches are put.
        """
        parts = [requests[i : i + (size or len(requests))] for i in range(0, len(requests), size or len(requests))]
        return [{name: tensor.to(device) for name, tensor in self._batch(part).items()} for part in parts]

    def _batch(self, requests: Sequence[EditRequest]) -> dict[str, Tensor]:
        prompts = [(prompt, r.target_new) for r in requests for prompt in (r.prompt, *self._after_prefixes(r.prompt))]
        if self._anchors is None:
            return collate(self._tokenizer, encode(self._tokenizer, prompts))
        subjects = dict.fromkeys(request.subject for request in requests if request.subject)
        starts = [start.format(name) for name in subjects for start in _OF_SUBJECT[: self._anchors.of_subject]]
        held = [*self._continued(starts, self._anchors.tokens, WITHOUT_SAMPLING), *self._general]
        if not held:
            rank_zero_warn(
                f"Nothing is held while the answer to {requests[0].prompt!r} changes: the request has no subject, or "
                "the model writes nothing on it, and general is 0."
            )
        return collate(self._tokenizer, encode(self._tokenizer, prompts), held, self._anchors.weight or 0.0)

    def _after_prefixes(self, prompt: str) -> list[str]:
        return [f"{prefix}. {prompt}" for prefix in self._prefixes]

    def _continued(self, starts: Sequence[str], tokens: int, how: dict[str, Any]) -> list[Forced]:
        """The tokens of what the model writes after each start; nothing where it writes nothing."""
        try:
            rows = open_ended(self._tokenizer, list(starts)) if starts else []
        except Exception as error:  # a tokenizer without a token for unknown words may raise anything
            raise UsageError(
                f"The tokenizer cannot read {starts[0]!r} ({reason_of(error)}), with which prefixes or anchors begin: "
                "set prefixes to 0, and leave the anchors out."
            ) from error
        written = self._writer.continued(rows, tokens, {self._tokenizer.eos_token_id}, how)
        return [Forced(row + new, len(row)) for row, new in zip(rows, written, strict=True) if new]


def _repeated(count: int) -> list[str]:
    return [_STARTS[i % len(_STARTS)] for i in range(count)]
