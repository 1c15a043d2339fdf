"""Questions that a causal language model answers in generated text: the sets of LLM-Adapters."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from datasets import Dataset

from lit_sparse.data.answers import RULES
from lit_sparse.data.instructions import InstructionData
from lit_sparse.data.padding import PadRows
from lit_sparse.data.readers import Place, Reader, Rows
from lit_sparse.data.rows import Collator
from lit_sparse.data.sources import files_named_by_split, require_texts
from lit_sparse.data.tables import read_files
from lit_sparse.errors import UsageError, require_choice


@dataclass(kw_only=True, eq=False, repr=False)
class ReasoningData(InstructionData):
    """Commonsense and arithmetic questions: trains on responses, and tests the generated answers, set by set.

    Rows are those of LLM-Adapters: ``instruction``, ``input``, ``output`` (the response to train on) and ``answer``
    (the plain answer: ``answer2``, ``true``, ``B``, ``15.0``). Training and validation batches are those of
    :class:`~lit_sparse.InstructionData`; test batches hold the prompts, padded on the left, and ``answers``. A
    :class:`~lit_sparse.CausalLM` continues the prompts and logs ``test_<set>_accuracy`` for every set, and
    ``test_accuracy``, the unweighted mean over the sets.

    Each set has a rule that finds the answer in the generated text: the first of the words that the set asks for
    (``solution1``, ``false`` …), the letter of an option for AQuA, the last number for the other arithmetic sets.

    Args:
        path: Folder with a folder for each set, named as in LLM-Adapters. These hold ``test.json`` and, for training,
            ``train.json``, or files of another kind that data modules read.
        sets: Sets to test on: ``boolq``, ``piqa``, ``social_i_qa``, ``hellaswag``, ``winogrande``, ``ARC-Easy``,
            ``ARC-Challenge``, ``openbookqa``, ``AQuA``, ``gsm8k``, ``mawps``, ``SVAMP``, ``AddSub``, ``MultiArith``,
            ``SingleEq``. None is all sets in ``path``.
        train_file: File to train on, such as commonsense_170k.json or math_10k.json. None is the ``train.json`` of
            every set, one after another.
        validation_fraction: Share of the training rows, in (0, 1), to hold out for validation, the same in every run.
        validation: ``loss`` measures the loss of the response, which is fast. ``answers`` generates answers as in the
            test, which is slow but the better measure to choose a checkpoint by.
        template: The prompt, with names of columns in braces; None is the prompt of Stanford Alpaca.

    Raises:
        UsageError: If ``sets`` names an unknown set, or a file is missing.

    Source:
        Hu et al. 2023 (LLM-Adapters, arXiv:2304.01933).
    """

    path: str = field(kw_only=False)
    sets: list[str] | None = None
    train_file: str | None = None
    validation_fraction: float = 0.02
    validation: Literal["loss", "answers"] = "loss"
    batch_size: int = 16

    # LLM-Adapters decides these.
    name: None = field(default=None, init=False)
    revision: None = field(default=None, init=False)
    data_files: None = field(default=None, init=False)
    response: str = field(default="output", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.sets or () if name not in RULES]
        if unknown or self.sets == []:
            raise UsageError(f"sets are some of {', '.join(RULES)}; got {unknown or self.sets}.")
        require_choice("validation", self.validation, ("loss", "answers"))
        self._folder = Path(self.path).expanduser()
        self._test_splits = tuple(self.sets or self._sets_in_folder())

    @property
    def test_names(self) -> tuple[str, ...]:
        """The sets to test on, in their order."""
        return self._test_splits

    def is_right(self, text: str, answer: str, name: str) -> bool:
        """Whether a generated text gives the answer.

        Args:
            text: The generated text.
            answer: The right answer.
            name: Name of the set, or "" for validation rows, which may be of any set. Their rule is the first that
                finds their right answer.
        """
        if name:
            return RULES[name].right(text, answer)
        rule = next((rule for rule in RULES.values() if rule.find(answer) == answer.strip()), RULES["gsm8k"])
        return rule.right(text, answer)

    def _sets_in_folder(self) -> list[str]:
        if not self._folder.is_dir():
            raise UsageError(f"The path {self.path!r} is no folder: give one that holds a folder for each set.")
        found = [name for name in RULES if (self._folder / name).is_dir()]
        if not found:
            raise UsageError(f"The folder {self.path!r} holds none of the sets {', '.join(RULES)}.")
        return found

    def _readers(self) -> dict[str, Reader]:
        files = {name: files_named_by_split(self._folder / name, ("train", "test")) for name in self._test_splits}
        for name, found in files.items():
            if "test" not in found:
                raise UsageError(f"The set {name!r} has no test.json, or file of another kind, in {self.path}.")
        training = [file for found in files.values() for file in found.get("train", [])]
        if self.train_file is not None:
            training = [Path(self.train_file).expanduser()]
            if not training[0].is_file():
                raise UsageError(f"train_file names a file that does not exist: {self.train_file}.")
        parts = {name: found["test"] for name, found in files.items()} | ({"train": training} if training else {})
        return {split: Reader(partial(read_files, found, split), found) for split, found in parts.items()}

    def _is_labelled(self, rows: Dataset, role: str) -> bool:  # noqa: ARG002 - the base looks at rows
        return not self._is_asked(role) and role != "predict"

    def _is_asked(self, role: str) -> bool:
        """Whether the model generates answers to rows of this role."""
        return role == "test" or (role == "validation" and self.validation == "answers")

    def _columns(self, labelled: bool) -> list[str]:
        return [*super()._columns(labelled), *([] if labelled else ["answer"])]

    def _collator(self, role: str) -> Collator:
        if role != "predict" and not self._is_asked(role):
            return super()._collator(role)
        texts = () if role == "predict" else ("answers",)
        return PadRows(self.pad_token_id, left=True, texts=texts, left_out=("answers",))

    def _encode(self, rows: Rows, places: Sequence[Place], labelled: bool) -> Rows:
        encoded = super()._encode(rows, places, labelled)
        if labelled:
            return encoded
        answers = [str(answer) if isinstance(answer, int | float) else answer for answer in rows["answer"]]
        return {**encoded, "answers": require_texts(answers, "answer", places)}
