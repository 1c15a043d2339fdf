"""Sentences of words with a tag each: named entities, parts of speech, chunks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, concatenate_datasets
from torch import Tensor
from transformers import DataCollatorForTokenClassification, PreTrainedTokenizerBase

from lit_sparse.data.conll import ENDINGS, read_conll
from lit_sparse.data.sources import DataFiles, Reader, open_source, paths_of, require_columns
from lit_sparse.data.text import Collator, Rows, TextData
from lit_sparse.errors import UsageError

IGNORED = -100  # the label that torch's cross entropy leaves out
NO_TOKEN = -1  # the position of a word that was cut off, or that the tokenizer drops


class TokenClassificationData(TextData):
    """Words with a tag each, from files or from the hub; the first sub-token of a word stands for the word.

    A row has a list of words and a list of as many tags. Besides the files that every data module reads, files
    ending in .conll, .bio or .txt are read as CoNLL-2003 is written: one word a line, its tag in the last of the
    columns, which tabs or spaces part; a blank line between sentences; lines of ``-DOCSTART-`` say nothing. Lines
    of the split "predict" need no tag.

    The words of a row are joined by single spaces and tokenised as running text, which is what the model was
    trained on. Batches hold ``input_ids``, ``attention_mask``, ``token_type_ids`` where the tokenizer gives them,
    and ``labels``: the class id at the first sub-token of each word, -100 elsewhere.

    A row that is longer than ``max_length`` loses its last words. So that evaluation can count them, batches for
    evaluation also hold ``word_labels``, the class ids of all words, and ``word_positions``, where in ``input_ids``
    each starts: -1 for a word without a token, -100 beyond the last word, both of shape (rows, most words).
    Batches for prediction hold ``word_positions`` and ``words``, lists of strings, instead of labels.

    Args:
        path: Where the rows are: the id of a data set on the Hugging Face hub; a folder with files named by
            split (train, validation, test, predict; ending in .csv, .json, .jsonl, .parquet, or as above) or laid
            out like a data set of the hub; or one such file, which is then the training split. Give either this
            or ``data_files``.
        name: Configuration of the data set on the hub, where it has several.
        revision: Branch, tag or commit of the data set on the hub; None is its newest state.
        data_files: Split → file, or list of files that are read one after another, for files that are not named by
            split.
        validation_fraction: Share of the training split, in (0, 1), to hold out as validation split where the
            source has none. The rows held out are the same in every run.
        words: Column of the lists of words.
        tags: Column of the lists of tags, which are names or class ids.
        labels: Names of the tags in the order of their ids. None takes them from the source if it names its
            classes, and otherwise the sorted distinct tags of the training split. For entities they are written
            as in IOB2: O, B-PER, I-PER …
        tokenizer: Hub id or folder of the tokenizer, a fast one; None is that of the model's ``backbone``.
        max_length: Longest row in tokens; the words beyond are cut off. The tokenizer's own limit holds if it is
            lower. 128 holds nearly all sentences of news; attention costs time with the square of the length.
        batch_size: Training rows per batch and device.
        eval_batch_size: Rows per batch and device in validation, test and prediction; None is the same as
            ``batch_size``, though there is room for more without gradients.
        length_grouped: Whether a training batch holds rows of like length, which saves most of the padding.
            If not, rows are only shuffled.
        num_workers: Processes that assemble batches; 0 is this one. Rows are tokenised already, which leaves
            workers nothing to do but padding.
        seed: Seed of the order of training rows, which depends on it and on the epoch alone.
    """

    def __init__(
        self,
        path: str | None = None,
        name: str | None = None,
        revision: str | None = None,
        data_files: DataFiles | None = None,
        validation_fraction: float | None = None,
        words: str = "tokens",
        tags: str = "ner_tags",
        labels: list[str] | None = None,
        tokenizer: str | None = None,
        max_length: int = 128,
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
        self.words = words
        self.tags = tags
        self.labels = labels
        self._ids: dict[Any, int] = {}  # what may stand in the tag column -> class id

    def _columns(self, labelled: bool) -> list[str]:
        return [self.words, self.tags] if labelled else [self.words]

    def _recipe(self) -> list[Any]:
        return [self.words, self.tags, [[str(k), v] for k, v in self._ids.items()]]

    def _readers(self) -> dict[str, Reader]:
        files = self._conll_files()
        if not files:
            return super()._readers()
        if self.name or self.revision:
            raise UsageError(
                f"name and revision choose within a data set of the hub, but {self.path or 'data_files'} names local "
                f"files: leave out name={self.name!r} and revision={self.revision!r}."
            )
        others = {split: file for split, file in (self.data_files or {}).items() if split not in files}
        readers = open_source(None, None, None, others, self._split_names()) if others else {}
        conll = {split: partial(self._read_conll, parts, split) for split, parts in files.items()}
        return {**readers, **conll}

    def _conll_files(self) -> dict[str, list[Path]]:
        if self.data_files is not None:
            if self.path is not None:
                return {}
            given = {split: paths_of(files, split) for split, files in self.data_files.items()}
            return {split: files for split, files in given.items() if {file.suffix for file in files} <= set(ENDINGS)}
        place = Path(self.path or "").expanduser()
        if place.suffix in ENDINGS:
            return {"train": [place]}
        named = [(split, place / f"{split}{ending}") for split in self._split_names() for ending in ENDINGS]
        return {split: [file] for split, file in named if file.is_file()}

    def _read_conll(self, files: list[Path], split: str) -> Dataset:
        return concatenate_datasets([read_conll(file, split, self.words, self.tags) for file in files])

    def _load_tokenizer(self) -> None:
        super()._load_tokenizer()
        if not self._tokenizer.is_fast:
            raise UsageError(
                f"{type(self).__name__} needs a fast tokenizer, which knows the place of each token in the "
                f"text; {type(self._tokenizer).__name__} is none: give another tokenizer."
            )
        self._tokenizer.padding_side = "right"  # positions are counted from the first token

    def _encode(self, rows: Rows, numbers: list[int], split: str, labelled: bool) -> Rows:
        sentences = [self._checked_words(words, split, n) for words, n in zip(rows[self.words], numbers, strict=True)]
        tokenised = self._tokenizer(
            [" ".join(words) for words in sentences], truncation=True, max_length=self._token_limit
        )
        encoded: Rows = {**tokenised, "length": [len(ids) for ids in tokenised["input_ids"]]}
        encoded["word_positions"] = [
            first_tokens(words, tokenised.encodings[i].char_to_token) for i, words in enumerate(sentences)
        ]
        if not labelled:
            return {**encoded, "words": sentences}
        encoded["word_labels"] = [
            self._class_ids(tags, len(words), split, n)
            for tags, words, n in zip(rows[self.tags], sentences, numbers, strict=True)
        ]
        encoded["labels"] = [
            _at_positions(labels, positions, length)
            for labels, positions, length in zip(
                encoded["word_labels"], encoded["word_positions"], encoded["length"], strict=True
            )
        ]
        return encoded

    def _checked_words(self, words: Any, split: str, number: int) -> list[str]:
        if not isinstance(words, list) or not words:
            raise UsageError(
                f"Row {number} (counted from 0) of the split {split!r} has no list of words in the column "
                f"{self.words!r} but {words!r}: fill it in or remove the row."
            )
        for place, word in enumerate(words):
            if not isinstance(word, str) or not word:
                raise UsageError(
                    f"Row {number} (counted from 0) of the split {split!r} has {word!r} for word {place} in the "
                    f"column {self.words!r}: fill it in, or remove it together with its tag."
                )
        return words

    def _class_ids(self, tags: Any, count: int, split: str, number: int) -> list[int]:
        if not isinstance(tags, list) or len(tags) != count:
            found = f"{len(tags)} tags" if isinstance(tags, list) else repr(tags)
            raise UsageError(
                f"Row {number} (counted from 0) of the split {split!r} has {count} words in the column {self.words!r} "
                f"but {found} in {self.tags!r}: each word needs one tag."
            )
        unknown = [tag for tag in tags if tag not in self._ids]
        if unknown:
            raise UsageError(
                f"Row {number} (counted from 0) of the split {split!r} has the tag {unknown[0]!r} in the column "
                f"{self.tags!r}, which is none of {self.label_names}: mend the row, or give all names in labels."
            )
        return [self._ids[tag] for tag in tags]

    def _learn_labels(self, readers: dict[str, Reader]) -> None:
        names = self.labels or self._names_in_features(readers)
        numbered = names is not None
        if names is None:
            names = self._distinct_tags(readers)
        if len(names) < 2 or len(set(names)) < len(names):
            raise UsageError(
                f"Classification needs at least two different tags, but the column {self.tags!r} or labels has {names}."
            )
        # Files that the hub exported hold ids; where only names were found, an id would be a guess.
        self._ids = {**({i: i for i in range(len(names))} if numbered else {}), **{n: i for i, n in enumerate(names)}}
        self.label_names, self.num_labels = names, len(names)

    def _names_in_features(self, readers: dict[str, Reader]) -> list[str] | None:
        split = "train" if "train" in readers else next(iter(readers))
        feature = getattr(readers[split]().features.get(self.tags), "feature", None)  # of List(ClassLabel(...))
        return list(feature.names) if isinstance(feature, ClassLabel) else None

    def _distinct_tags(self, readers: dict[str, Reader]) -> list[str]:
        """Sorted tags of the training split; where one is missing, encoding will name the row."""
        if "train" not in readers:
            raise UsageError(
                f"{self.path or 'data_files'} has no training split to learn the tags from: give their names in "
                f"labels, in the order that the model was trained with."
            )
        rows = readers["train"]()
        require_columns(rows, "train", [self.tags])
        column = [tags if isinstance(tags, list) else [tags] for tags in rows[self.tags]]
        tags = {tag for tags in column for tag in tags if tag is not None}
        numbers = [tag for tag in tags if not isinstance(tag, str)]
        if numbers:
            raise UsageError(
                f"The column {self.tags!r} of the split 'train' holds {numbers[0]!r} and nothing says what it stands "
                f"for: give the names of the tags in labels, in the order of their ids."
            )
        return sorted(tags)

    def _collator(self, role: str) -> Collator:
        return PadWords(self._tokenizer, training=role == "train")


@dataclass(frozen=True)
class PadWords:
    """Makes a batch of rows of :class:`TokenClassificationData` by padding to the longest of them.

    Args:
        tokenizer: Says what tokens are padded with.
        training: Whether only what the model takes is kept.
    """

    tokenizer: PreTrainedTokenizerBase
    training: bool

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return tensors of type long, and ``words`` as they are."""
        apart = [name for name in ("word_positions", "word_labels", "words") if name in rows[0]]
        inputs = [{name: value for name, value in row.items() if name not in apart} for row in rows]
        batch = dict(DataCollatorForTokenClassification(self.tokenizer)(inputs))
        if self.training:
            return batch
        for name in apart:
            values = [row[name] for row in rows]
            batch[name] = values if name == "words" else _pad(values)
        return batch


def first_tokens(words: Sequence[str], char_to_token: Any) -> list[int]:
    """The token with which each word starts, -1 for a word without one.

    Args:
        words: Words of a text in which single spaces part them.
        char_to_token: Number of a character of the text → number of its token, None where it has none.
    """
    positions, start = [], 0
    for word in words:
        # Beyond the first character: the normalizer may have dropped that one.
        tokens = (char_to_token(character) for character in range(start, start + len(word)))
        positions.append(next((token for token in tokens if token is not None), NO_TOKEN))
        start += len(word) + 1
    return positions


def _at_positions(labels: list[int], positions: list[int], length: int) -> list[int]:
    placed = [IGNORED] * length
    for label, position in zip(labels, positions, strict=True):
        if position != NO_TOKEN:
            placed[position] = label
    return placed


def _pad(values: list[list[int]]) -> Tensor:
    rows = [torch.tensor(row, dtype=torch.long) for row in values]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)
