"""Questions whose answer is a span of a text, in the forms of SQuAD."""

from functools import partial
from typing import Any

from datasets import Dataset

from lit_sparse.data.sources import DataFiles, Reader, require_text
from lit_sparse.data.text import Collator, Rows, TextData
from lit_sparse.data.windows import OUTSIDE, PadQuestions, PadWindows, answer_tokens, one_window_a_row
from lit_sparse.errors import UsageError

_POSITIONS = ("start_positions", "end_positions")


class QuestionAnsweringData(TextData):
    """Questions with a context that holds the answer, from files or from the hub.

    A row has an id, a question, a context and, but for prediction, its answers in the form that SQuAD has on the
    hub: ``{"text": ["Paris"], "answer_start": [42]}``, the latter counted in characters. A ``.json`` file as SQuAD
    itself publishes them (``data`` → ``paragraphs`` → ``qas``) is read too, then with SQuAD's own column names.

    Question and context are tokenised together. A context that is too long is cut into windows, each with the
    question before it, that overlap by ``stride`` tokens; a window that does not hold all of the answer is labelled
    with the CLS token, as are questions without an answer. Training takes the first answer of a question.

    Training batches are of windows: ``input_ids``, ``attention_mask``, ``token_type_ids`` where the tokenizer gives
    them, ``start_positions`` and ``end_positions``, shape (windows,): first and last token of the answer.

    Other batches are of questions, each with all of its windows, so that the best answer over them is known at
    once. They also hold

    - ``question``, shape (windows,): which question of the batch, from 0, a window belongs to;
    - ``offsets``, shape (windows, tokens, 2): first character of each token in the context and the one behind its
      last; -1 for tokens that are not of the context;
    - ``null_positions``, shape (windows,): where the CLS token is, the first token where there is none;
    - ``row``, shape (questions,): number of the question in its split, from 0;
    - ``id``, ``context`` and, unless for prediction, ``answers``: lists with an entry for each question.

    Args:
        path: Where the rows are: the id of a data set on the Hugging Face hub; a folder with files named by
            split (train, validation, test, predict; ending in .csv, .json, .jsonl or .parquet) or laid out
            like a data set of the hub; or one such file, which is then the training split. Give either this
            or ``data_files``.
        name: Configuration of the data set on the hub, where it has several.
        revision: Branch, tag or commit of the data set on the hub; None is its newest state.
        data_files: Split → file, or list of files that are read one after another, for files that are not named by
            split.
        validation_fraction: Share of the questions of the training split, in (0, 1), to hold out as validation
            split where the source has none. The questions held out are the same in every run.
        id: Column of what names a question in the predictions.
        question: Column of the question.
        context: Column of the text that holds the answer.
        answers: Column of the answers.
        unanswerable: Whether rows without answers are questions that the context does not answer, as in SQuAD 2.0;
            if not, they are errors.
        stride: Tokens that a window shares with the one before. 128 is the value of BERT's SQuAD script; an
            answer that is longer may be whole in no window.
        tokenizer: Hub id or folder of the tokenizer, a fast one; None is that of the model's ``backbone``.
        max_length: Longest window in tokens, with the question. The tokenizer's own limit holds if it is lower.
            384 is the value of BERT's SQuAD script.
        batch_size: Training windows per batch and device.
        eval_batch_size: Questions per batch and device in validation, test and prediction, whose windows go through
            the model together; None is the same as ``batch_size``.
        length_grouped: Whether a training batch holds windows of like length, which saves most of the padding.
            If not, they are only shuffled.
        num_workers: Processes that assemble batches; 0 is this one. Rows are tokenised already, which leaves
            workers nothing to do but padding.
        seed: Seed of the order of training windows, which depends on it and on the epoch alone.
    """

    def __init__(
        self,
        path: str | None = None,
        name: str | None = None,
        revision: str | None = None,
        data_files: DataFiles | None = None,
        validation_fraction: float | None = None,
        id: str = "id",  # noqa: A002
        question: str = "question",
        context: str = "context",
        answers: str = "answers",
        unanswerable: bool = False,
        stride: int = 128,
        tokenizer: str | None = None,
        max_length: int = 384,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        length_grouped: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            path=path,
            name=name,
            revision=revision,
            data_files=data_files,
            validation_fraction=validation_fraction,
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            length_grouped=length_grouped,
            num_workers=num_workers,
            seed=seed,
        )
        if stride < 0:
            raise UsageError(f"stride is a number of tokens, at least 0; got {stride}.")
        self.id = id
        self.question = question
        self.context = context
        self.answers = answers
        self.unanswerable = unanswerable
        self.stride = stride

    def _columns(self, labelled: bool) -> list[str]:
        columns = [self.id, self.question, self.context]
        return [*columns, self.answers] if labelled else columns

    def _recipe(self) -> list[Any]:
        return [*self._columns(labelled=True), self.unanswerable, self.stride]

    def _readers(self) -> dict[str, Reader]:
        return {split: partial(_flat, reader) for split, reader in super()._readers().items()}

    def _load_tokenizer(self) -> None:
        super()._load_tokenizer()
        if not self._tokenizer.is_fast:
            raise UsageError(
                f"{type(self).__name__} needs a fast tokenizer, which knows the place of each token in the text; "
                f"{type(self._tokenizer).__name__} is none: give another tokenizer."
            )
        self._tokenizer.padding_side = "right"  # positions are counted from the first token

    def _encode(self, rows: Rows, numbers: list[int], split: str, labelled: bool) -> Rows:
        texts = [
            [require_text(text, column, split, n, blank=False) for text, n in zip(rows[column], numbers, strict=True)]
            for column in (self.question, self.context)
        ]
        self._require_room(texts[0], split, numbers)
        answers = [self._spans(rows, i, split, n) for i, n in enumerate(numbers)] if labelled else None
        windows = self._windows(*texts)
        encoded: Rows = {"id": rows[self.id], "context": texts[1], "row": numbers}
        if answers is not None:
            encoded["answers"] = [[text for text, _ in spans] for spans in answers]
        for i, parts in enumerate(windows):
            if answers is not None:
                for part in parts:
                    first = answers[i][0] if answers[i] else None
                    place = answer_tokens(part["offsets"], first) or (part["null_positions"],) * 2
                    part.update(zip(_POSITIONS, place, strict=True))
            for name in parts[0]:
                encoded.setdefault(name, []).append([part[name] for part in parts])
        return {**encoded, "length": [sum(map(len, ids)) for ids in encoded["input_ids"]]}

    def _windows(self, questions: list[str], contexts: list[str]) -> list[list[dict[str, Any]]]:
        """The windows of each question."""
        tokenised = self._tokenizer(
            questions,
            contexts,
            truncation="only_second",
            max_length=self._token_limit,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        windows: list[list[dict[str, Any]]] = [[] for _ in questions]
        inputs = [name for name in self._tokenizer.model_input_names if name in tokenised]
        for i, owner in enumerate(tokenised["overflow_to_sample_mapping"]):
            ids, cls = tokenised["input_ids"][i], self._tokenizer.cls_token_id
            offsets = [
                offset if sequence == 1 and offset[0] < offset[1] else (OUTSIDE, OUTSIDE)
                for offset, sequence in zip(tokenised["offset_mapping"][i], tokenised.sequence_ids(i), strict=True)
            ]
            windows[owner].append(
                {
                    **{name: tokenised[name][i] for name in inputs},
                    "offsets": offsets,
                    "null_positions": ids.index(cls) if cls in ids else 0,
                }
            )
        return windows

    def _require_room(self, questions: list[str], split: str, numbers: list[int]) -> None:
        """Refuse questions beside which a window could not move on."""
        special = self._tokenizer.num_special_tokens_to_add(pair=True)
        for ids, number in zip(self._tokenizer(questions, add_special_tokens=False)["input_ids"], numbers, strict=True):
            room = self._token_limit - special - len(ids)
            if room <= self.stride:
                raise UsageError(
                    f"Row {number} (counted from 0) of the split {split!r} has a question of {len(ids)} tokens, which "
                    f"leaves {room} of max_length={self._token_limit} for the context, but stride={self.stride} of "
                    f"them repeat the window before: raise max_length, lower stride, or remove the row."
                )

    def _spans(self, rows: Rows, place: int, split: str, number: int) -> list[tuple[str, int]]:
        """Text and first character of each answer of a row; none for a question without an answer."""
        given, context = rows[self.answers][place], rows[self.context][place]
        where = f"Row {number} (counted from 0) of the split {split!r}"
        form = isinstance(given, dict) and {"text", "answer_start"} <= set(given)
        texts, starts = (given["text"], given["answer_start"]) if form else (None, None)
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise UsageError(
                f"{where} has {given!r} in the column {self.answers!r}, which must be {{'text': [...], "
                f"'answer_start': [...]}} with as many starts as texts."
            )
        if not texts and not self.unanswerable:
            raise UsageError(
                f"{where} has no answer in the column {self.answers!r}: fill it in or remove the row, or set "
                f"unanswerable to true if there are questions that the context does not answer."
            )
        for text, start in zip(texts, starts, strict=True):
            found = context[start : start + len(text)] if text and isinstance(start, int) and start >= 0 else None
            if found is None or found != text:
                raise UsageError(
                    f"{where} has the answer {text!r} at character {start}, where the context has {found!r}: mend "
                    f"answer_start, counted from 0 in characters, or remove the row."
                )
        return list(zip(texts, starts, strict=True))

    def _carve(self, rows: Dataset, role: str) -> Dataset:
        # Only now cut into windows, so that those of a question stay on one side.
        questions = super()._carve(rows, role)
        if role != "train":
            return questions
        return questions.map(one_window_a_row, batched=True, remove_columns=questions.column_names)

    def _collator(self, role: str) -> Collator:
        return PadWindows(self._tokenizer) if role == "train" else PadQuestions(self._tokenizer)


def _flat(reader: Reader) -> Dataset:
    """The rows of a source, one for each question even where SQuAD's own files nest them."""
    rows = reader()
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
            f"A file with the one field 'data' must be of SQuAD's form, data → paragraphs → qas; this one differs at "
            f"{error}. Other rows are written one below the other (.jsonl) or as one list."
        ) from error
    flat: Rows = {name: [qa.get(name) for _, qa in questions] for name in ("id", "question")}
    flat["context"] = [context for context, _ in questions]
    flat["answers"] = [
        {key: [answer[key] for answer in qa.get("answers") or []] for key in ("text", "answer_start")}
        for _, qa in questions
    ]
    return flat
