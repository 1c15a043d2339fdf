"""Find the answer to a question in generated text, and compare it with the right answer."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


class AnswerRule(ABC):
    """Finds an answer in a text."""

    @abstractmethod
    def find(self, text: str) -> str | None:
        """The plain answer, None if there is none."""

    def right(self, text: str, answer: str) -> bool:
        """Whether the text gives this answer."""
        found = self.find(text)
        return found is not None and found.lower() == answer.strip().lower()


@dataclass(frozen=True)
class Choice(AnswerRule):
    """One of several words, such as ``answer2`` or ``true``: the first of them in the text.

    Args:
        words: The words in lower case; case in the text does not matter.

    Source:
        Hu et al. 2023 (LLM-Adapters, arXiv:2304.01933), whose commonsense sets ask for such words.
    """

    words: Sequence[str]

    def find(self, text: str) -> str | None:
        """The first of the words; only whole words count: ``untrue`` does not contain ``true``."""
        found = re.search(rf"\b(?:{'|'.join(map(re.escape, self.words))})\b", text.lower())
        return found[0] if found else None


@dataclass(frozen=True)
class Letter(AnswerRule):
    """The letter of an option, A to E.

    The rule takes the letter after the last ``answer is`` or ``answer:``. Without such words it takes the last letter
    in brackets, and without brackets the last letter that stands alone, because a reasoning ends with its result.
    LLM-Adapters takes the first capital A to E anywhere, even the one of ``A train …``.

    Args:
        letters: Capital letters of the options.
    """

    letters: str = "ABCDE"

    def find(self, text: str) -> str | None:
        """The letter, in upper case."""
        one = f"[{self.letters}]"
        said = rf"(?i:\banswer(?:\s+is)?\s*:?)\s*(?:option\s*)?\(?({one})\b"
        for pattern in (said, rf"\(({one})\)", rf"\b({one})\b"):
            found: list[str] = re.findall(pattern, text)
            if found:
                return found[-1]
        return None


@dataclass(frozen=True)
class Number(AnswerRule):
    """A number: the last one in the text, as in LLM-Adapters.

    Commas between thousands are left out. A minus sign counts unless it is a subtraction, as in ``5-3``.

    Args:
        tolerance: Largest difference from the right number that still counts as right; 1e-3 as in LLM-Adapters.
    """

    tolerance: float = 1e-3

    def find(self, text: str) -> str | None:
        """The number as it is written, without commas."""
        found = re.findall(r"(?:(?<![\w.)])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?", text)
        return found[-1].replace(",", "") if found else None

    def right(self, text: str, answer: str) -> bool:
        """Whether the number equals the answer, within the tolerance."""
        found, gold = self.find(text), self.find(answer)
        return found is not None and gold is not None and abs(float(found) - float(gold)) <= self.tolerance


def _numbered(word: str, count: int) -> Choice:
    return Choice([f"{word}{number}" for number in range(1, count + 1)])


RULES: dict[str, AnswerRule] = {
    "boolq": Choice(["true", "false"]),
    "piqa": _numbered("solution", 2),
    "social_i_qa": _numbered("answer", 5),
    "hellaswag": _numbered("ending", 4),
    "winogrande": _numbered("option", 2),
    "ARC-Easy": _numbered("answer", 5),
    "ARC-Challenge": _numbered("answer", 5),
    "openbookqa": _numbered("answer", 5),
    "AQuA": Letter(),
    "gsm8k": Number(),
    "mawps": Number(),
    "SVAMP": Number(),
    "AddSub": Number(),
    "MultiArith": Number(),
    "SingleEq": Number(),
}
"""Name of a set's folder in LLM-Adapters → its rule."""
