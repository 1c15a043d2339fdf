"""Questions whose answer is a span of a text, in the formats of SQuAD."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from datasets import Dataset

from lit_sparse.data.readers import Place, Reader, RowError, Rows, per_row
from lit_sparse.data.rows import Collator
from lit_sparse.data.sources import require_texts
from lit_sparse.data.text import TextData
from lit_sparse.data.windows import OUTSIDE, PadQuestions, answer_tokens, one_window_a_row
from lit_sparse.errors import UsageError, require_range


@dataclass(kw_only=True, eq=False, repr=False)
class QuestionAnsweringData(TextData):
    """Questions with a context that holds the answer, from files or from the hub.

    A row has an id, a question, a context and, except for prediction, its answers in the format of SQuAD on the hub:
    ``{"text": ["Paris"], "answer_start": [42]}``, the latter counted in characters. A ``.json`` file in SQuAD's own
    format (``data`` → ``paragraphs`` → ``qas``) is read too, and has SQuAD's column names.

    Question and context are tokenised together. A context that is too long is cut into windows that overlap by
    ``stride`` tokens; each window starts with the question. The label of a window is the CLS token if the window lacks
    part of the answer, or if the question has no answer. Training takes the first answer of a question.

    Training batches hold windows: ``input_ids``, ``attention_mask``, ``token_type_ids`` where the tokenizer gives
    them, ``start_positions`` and ``end_positions``, shape (windows,): first and last token of the answer.

    Other batches hold questions, each with all of its windows, so the best answer over them is known at once. They
    also hold

    - ``question``, shape (windows,): which question of the batch, from 0, a window belongs to;
    - ``offsets``, shape (windows, tokens, 2): start and end of each token in the context, in characters; -1 for tokens
      outside the context;
    - ``null_positions``, shape (windows,): position of the CLS token, 0 where there is none;
    - ``row``, shape (questions,): number of the question in its split, from 0;
    - ``id``, ``context`` and, unless for prediction, ``answers``: lists with an entry for each question.

    Args:
        validation_fraction: Share of the questions of the training split, in (0, 1), to hold out as validation
            split where the source has none. Every run holds out the same questions.
        id: Column of the names of questions in the predictions.
        question: Column of the question.
        context: Column of the text that holds the answer.
        answers: Column of the answers.
        unanswerable: Whether a row without answers is a question that the context does not answer, as in SQuAD 2.0, or
            an error.
        stride: Tokens that a window shares with the one before. An answer that is longer may be complete in no window.
            128 is the value of BERT's SQuAD script.
        tokenizer: Hub id or folder of the tokenizer, a fast one; None is that of the model's ``backbone``.
        max_length: Longest window in tokens, with the question. The tokenizer's own limit holds if it is lower.
            384 is the value of BERT's SQuAD script.
        batch_size: Training windows per batch and device.
        eval_batch_size: Questions per batch and device in validation, test and prediction, whose windows go through
            the model together; None is the same as ``batch_size``.
    """

    id: str = "id"
    question: str = "question"
    context: str = "context"
    answers: str = "answers"
    unanswerable: bool = False
    stride: int = 128
    max_length: int = 384

    _needs_offsets = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("stride", self.stride, at_least=0)

    def _columns(self, labelled: bool) -> list[str]:
        columns = [self.id, self.question, self.context]
        return [*columns, self.answers] if labelled else columns

    def _recipe(self) -> list[Any]:
        return [*super()._recipe(), *self._columns(labelled=True), self.unanswerable, self.stride]

    def _readers(self) -> dict[str, Reader]:
        readers = super()._readers()
        return {split: replace(reader, read=partial(_flat, reader.read)) for split, reader in readers.items()}

    def _hold_out(self, rows: Dataset, role: str) -> Dataset:
        # Questions are divided before they become windows, so that the windows of a question stay on one side.
        questions = super()._hold_out(rows, role)
        if role != "train":
            return questions
        return questions.map(one_window_a_row, batched=True, remove_columns=questions.column_names)

    def _collator(self, role: str) -> Collator:
        pad_windows = super()._collator(role)
        return pad_windows if role == "train" else PadQuestions(pad_windows)

    def _encode(self, rows: Rows, places: Sequence[Place], labelled: bool) -> Rows:
        questions, contexts = (require_texts(rows[column], column, places) for column in (self.question, self.context))
        per_row(self._require_room, self._tokenizer(questions, add_special_tokens=False)["input_ids"], places)
        encoded: Rows = {"id": rows[self.id], "context": contexts, "row": [place.number for place in places]}
        owners, windows = self._windows(questions, contexts)
        if labelled:
            answers = per_row(self._spans, zip(rows[self.answers], contexts, strict=True), places)
            encoded["answers"] = [[text for text, _ in spans] for spans in answers]
            first = [answers[owner][0] if answers[owner] else None for owner in owners]
            found = map(answer_tokens, windows["offsets"], first)
            ends = [place or (null, null) for place, null in zip(found, windows["null_positions"], strict=True)]
            windows["start_positions"], windows["end_positions"] = map(list, zip(*ends, strict=True))
        for name, values in windows.items():
            encoded[name] = [[] for _ in places]
            for owner, value in zip(owners, values, strict=True):
                encoded[name][owner].append(value)
        return {**encoded, "length": [sum(map(len, ids)) for ids in encoded["input_ids"]]}

    def _windows(self, questions: list[str], contexts: list[str]) -> tuple[list[int], Rows]:
        """The number of the question of each window, and the windows."""
        found = self._tokenizer(
            questions,
            contexts,
            truncation="only_second",
            max_length=self._token_limit,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        windows: Rows = {name: found[name] for name in self._tokenizer.model_input_names if name in found}
        windows["offsets"] = [
            [
                offset if sequence == 1 and offset[0] < offset[1] else (OUTSIDE, OUTSIDE)
                for offset, sequence in zip(offsets, found.sequence_ids(i), strict=True)
            ]
            for i, offsets in enumerate(found["offset_mapping"])
        ]
        cls = self._tokenizer.cls_token_id
        windows["null_positions"] = [ids.index(cls) if cls in ids else 0 for ids in found["input_ids"]]
        return found["overflow_to_sample_mapping"], windows

    def _require_room(self, question: list[int]) -> None:
        """Refuse tokens of a question that leave no room for a window to move on."""
        room = self._token_limit - self._tokenizer.num_special_tokens_to_add(pair=True) - len(question)
        if room <= self.stride:
            raise RowError(
                f"has a question of {len(question)} tokens, which leaves {room} of max_length={self._token_limit} for "
                f"the context, but stride={self.stride} of them repeat the window before: raise max_length, lower "
                "stride, or remove the row."
            )

    def _spans(self, answers_and_context: tuple[Any, str]) -> list[tuple[str, int]]:
        """Text and first character of each answer of a row; none for a question without an answer."""
        given, context = answers_and_context
        complete = isinstance(given, dict) and {"text", "answer_start"} <= set(given)
        texts, starts = (given["text"], given["answer_start"]) if complete else (None, None)
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise RowError(
                f"has {given!r} in the column {self.answers!r}, which must be {{'text': [...], 'answer_start': [...]}} "
                "with as many starts as texts."
            )
        if not texts and not self.unanswerable:
            raise RowError(
                f"has no answer in the column {self.answers!r}: fill it in or remove the row, or set unanswerable to "
                "true if there are questions that the context does not answer."
            )
        for text, start in zip(texts, starts, strict=True):
            found = context[start : start + len(text)] if text and isinstance(start, int) and start >= 0 else None
            if found is None or found != text:
                raise RowError(
                    f"has the answer {text!r} at character {start}, where the context has {found!r}: mend "
                    "answer_start, counted from 0 in characters, or remove the row."
                )
        return list(zip(texts, starts, strict=True))


def _flat(read: Callable[[], Dataset]) -> Dataset:
    """The rows of a source, one for each question even where SQuAD's own files nest them."""
    rows = read()
    if set(rows.column_names) not in ({"data"}, {"data", "version"}):
        return rows
    return rows.map(_questions_of, batched=True, remove_columns=rows.column_names)


def _questions_of(files: Rows) -> Rows:
    try:
        questions = [
            (paragraph["context"], qa)
            for articles in files["data"]
            for article in articles
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
        ]
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"A file with the single field 'data' must have SQuAD's format, data → paragraphs → qas; this one differs "
            f"at {error}. Write other rows one per line (.jsonl) or as one list."
        ) from error
    flat: Rows = {name: [qa.get(name) for _, qa in questions] for name in ("id", "question")}
    flat["context"] = [context for context, _ in questions]
    flat["answers"] = [
        {key: [answer[key] for answer in qa.get("answers") or []] for key in ("text", "answer_start")}
        for _, qa in questions
    ]
    return flat
