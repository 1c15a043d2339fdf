"""``lit-sparse chat SOURCE``: talk with a language model, its adapters live."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

import torch
from transformers import TextStreamer

from lit_sparse.adapters.injection import disable_adapters
from lit_sparse.data.tokenizers import Prompt
from lit_sparse.errors import UsageError
from lit_sparse.serving.answering import Decoding, answer
from lit_sparse.serving.language_models import LanguageModel, open_language_model
from lit_sparse.verbosity import show


def chat(
    source: str,
    prompt: Sequence[str] | None = None,
    system: str | None = None,
    compare: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    backbone: str | None = None,
    import_modules: list[str] | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Talk in the terminal, or answer given prompts.

    A tokenizer's chat template is used where there is one; without it, the model continues each text on its own.
    Without ``prompt``, a standard input that is no terminal is read to its end as one prompt.

    Args:
        source: A checkpoint file, an adapter's folder, or the folder or hub id of a model.
        prompt: Text to answer instead of talking; may be given several times. Each is answered on its own.
        system: System message that begins every conversation.
        compare: Answer every turn without the adapters too. Both answer the same conversation, in which the answers
            with adapters are remembered.
        max_new_tokens: Longest answer, in tokens.
        temperature: Divides the logits before sampling; 0 is greedy decoding.
        top_p: Share of the probability that tokens are sampled from, in (0, 1], the most likely first.
        seed: Seed of sampling.
        backbone: Name or folder of the adapter's backbone, if it has moved since the run.
        import_modules: Your Python modules to import first, with the classes that the checkpoint names.
        trust_remote_code: Let transformers run the code in the model's folder.

    Raises:
        UsageError: If the source is no causal language model, a message does not suit its tokenizer or context, or an
            option is outside its range.
    """
    decoding = Decoding(max_new_tokens, temperature, top_p)
    talks = prompt is None and sys.stdin.isatty()
    try:
        model = open_language_model(source, backbone, import_modules or (), trust_remote_code)
        if compare:
            model.require_comparable()
        torch.manual_seed(seed)
        conversation = Conversation(model, decoding, system, compare)
        if talks:
            _talk(conversation)
            return
        prompts = prompt or [_read_prompt()]
        for text in prompts:
            if len(prompts) > 1:
                sys.stdout.write(f"> {text}\n")
            conversation.reset()
            conversation.answer(text)
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        if not talks:
            raise SystemExit(128 + signal.SIGINT) from None


class Conversation:
    """Turns with a language model, whose answers are written to standard output as they come.

    Args:
        source: The model.
        decoding: How it chooses tokens.
        system: Message that begins the conversation.
        compare: Whether every turn is first answered without the adapters.

    Raises:
        UsageError: If there is a system message, and the tokenizer has no chat template.
    """

    def __init__(self, source: LanguageModel, decoding: Decoding, system: str | None, compare: bool) -> None:
        self._has_template = bool(source.tokenizer.chat_template)
        if system is not None and not self._has_template:
            raise UsageError(
                f"The tokenizer of {source.name!r} has no chat template for a system message: leave it out."
            )
        self._source, self._decoding, self._compare = source, decoding, compare
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self._turns = list(self._start)

    def answer(self, text: str) -> None:
        """Answer a text; the turn is remembered if the tokenizer has a chat template."""
        turns = [*self._turns, {"role": "user", "content": text}]
        prompt: Prompt = turns if self._has_template else text
        if self._compare:
            # Both answers sample by the same random numbers, so comparing changes no answer.
            device = self._source.model.device
            with torch.random.fork_rng([device] if device.type == "cuda" else []), disable_adapters(self._source.model):
                self._write(prompt, "Without adapters:\n")
        answered = self._write(prompt, "With adapters:\n" if self._compare else "")
        if self._has_template:
            self._turns = [*turns, {"role": "assistant", "content": answered}]

    def _write(self, prompt: Prompt, label: str) -> str:
        sys.stdout.write(label)
        streamer = TextStreamer(self._source.tokenizer, skip_prompt=True, skip_special_tokens=True)
        return answer(self._source, prompt, self._decoding, streamer)


def _talk(conversation: Conversation) -> None:
    """Read turns from the terminal until its end or ``/exit``."""
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 - input() then edits lines and remembers them
    show("/reset begins a new conversation; /exit, Ctrl-D or Ctrl-C leaves.")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            sys.stdout.write("\n")
            return
        if text == "/exit":
            return
        if text == "/reset":
            conversation.reset()
        elif text:
            try:
                conversation.answer(text)
            except UsageError as error:  # it is too long, or the template refuses it; the next may do
                sys.stdout.write(f"{error}\n")


def _read_prompt() -> str:
    text = sys.stdin.read().rstrip("\n")
    if not text:
        raise UsageError("There is nothing to answer: give --prompt, or a text on standard input, or use a terminal.")
    return text
