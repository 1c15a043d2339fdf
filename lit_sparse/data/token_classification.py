"""Sentences of words with a tag each: named entities, parts of speech, chunks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lit_sparse.data.conll import with_conll
from lit_sparse.data.labels import learn_classes
from lit_sparse.data.padding import IGNORED, PadRows
from lit_sparse.data.readers import Place, Reader, RowError, Rows, per_row
from lit_sparse.data.rows import Collator
from lit_sparse.data.sources import open_source
from lit_sparse.data.text import TextData

NO_TOKEN = -1  # the position of a word that was cut off, or that the tokenizer drops


@dataclass(kw_only=True, eq=False, repr=False)
class TokenClassificationData(TextData):
    """Words with a tag each, from files or from the hub; the first sub-token of a word stands for the word.

    A row has a list of words and a list of as many tags. Files that end in .conll, .bio or .txt are read in the format
    of CoNLL-2003: one word per line, with its tag in the last column; columns are separated by tabs or spaces,
    sentences by blank lines; lines of ``-DOCSTART-`` are skipped. Lines of the split "predict" need no tag.

    The words of a row are joined by single spaces and tokenised as running text, on which models are trained. Batches
    hold ``input_ids``, ``attention_mask``, ``token_type_ids`` where the tokenizer gives them, and ``labels``: the class
    id at the first sub-token of each word, -100 elsewhere.

    A row that is longer than ``max_length`` loses its last words. Evaluation counts them, so its batches also hold
    ``word_labels``, the class ids of all words, and ``word_positions``, the first token of each word in ``input_ids``:
    -1 for a word without a token, -100 beyond the last word, both of shape (rows, most words). Batches for prediction
    hold ``word_positions`` and ``words``, lists of strings, instead of labels.

    Args:
        path: Where the rows are. One of: the id of a data set on the Hugging Face hub; a folder with files named by
            split (train; validation, valid, val or dev; test; predict; ending as above or in .csv, .tsv, .json, .jsonl,
            .ndjson or .parquet, and in .gz or .zst if they are compressed); a folder laid out like a data set of the
            hub; a single file, which is then the training split. Give either ``path`` or ``data_files``.
        words: Column of the lists of words.
        tags: Column of the lists of tags, which are names or class ids.
        labels: Names of the tags in the order of their ids. None takes the names that the source gives, or else the
            sorted distinct tags of the training split. Tags of entities are written as in IOB2: O, B-PER, I-PER …
        tokenizer: Hub id or folder of the tokenizer, a fast one; None is that of the model's ``backbone``.
        max_length: Longest row in tokens; later words are cut. The tokenizer's own limit holds if it is lower. 128
            holds nearly all sentences of news; attention costs time with the square of the length.
    """

    words: str = "tokens"
    tags: str = "ner_tags"
    labels: list[str] | None = None

    _needs_offsets = True

    def _columns(self, labelled: bool) -> list[str]:
        return [self.words, self.tags] if labelled else [self.words]

    def _recipe(self) -> list[Any]:
        return [*super()._recipe(), self.words, self.tags, self._classes.recipe()]

    def _readers(self) -> dict[str, Reader]:
        kinds = with_conll(self.words, self.tags)
        return open_source(self.path, self.name, self.revision, self.data_files, self._split_names(), kinds)

    def _learn_labels(self, readers: dict[str, Reader]) -> None:
        self._classes = learn_classes(
            readers, self.tags, self.labels, self._source, of_lists=True, numbers_need_names=True
        )
        self.label_names, self.num_labels = self._classes.names, len(self._classes.names)

    def _collator(self, role: str) -> Collator:
        words = ("word_labels", "word_positions") if role == "train" else ()
        return PadRows(self.pad_token_id, texts=("words",), left_out=words)

    def _encode(self, rows: Rows, places: Sequence[Place], labelled: bool) -> Rows:
        sentences = per_row(self._checked_words, rows[self.words], places)
        tokenised = self._tokenizer(
            [" ".join(words) for words in sentences], truncation=True, max_length=self._token_limit
        )
        encoded: Rows = {**tokenised, "length": [len(ids) for ids in tokenised["input_ids"]]}
        encoded["word_positions"] = [
            first_tokens(words, tokenised.encodings[i].char_to_token) for i, words in enumerate(sentences)
        ]
        if not labelled:
            return {**encoded, "words": sentences}
        encoded["word_labels"] = per_row(self._class_ids, zip(rows[self.tags], sentences, strict=True), places)
        encoded["labels"] = [
            _at_positions(labels, positions, length)
            for labels, positions, length in zip(
                encoded["word_labels"], encoded["word_positions"], encoded["length"], strict=True
            )
        ]
        return encoded

    def _checked_words(self, words: Any) -> list[str]:
        if not isinstance(words, list) or not words:
            raise RowError(f"has no list of words in the column {self.words!r} but {words!r}: fill it in or remove it.")
        for number, word in enumerate(words):
            if not isinstance(word, str) or not word:
                raise RowError(
                    f"has {word!r} for word {number} in the column {self.words!r}: fill it in, or remove it together "
                    "with its tag."
                )
        return words

    def _class_ids(self, tags_and_words: tuple[Any, list[str]]) -> list[int]:
        tags, words = tags_and_words
        if not isinstance(tags, list) or len(tags) != len(words):
            found = f"{len(tags)} tags" if isinstance(tags, list) else repr(tags)
            raise RowError(
                f"has {len(words)} words in the column {self.words!r} but {found} in {self.tags!r}: each word needs "
                "one tag."
            )
        return [self._classes.number_of(tag, self.tags) for tag in tags]


def first_tokens(words: Sequence[str], char_to_token: Any) -> list[int]:
    """The token with which each word starts, -1 for a word without one.

    Args:
        words: Words of a text, which are separated by single spaces.
        char_to_token: Maps the number of a character of the text to the number of its token, or to None.
    """
    positions, start = [], 0
    for word in words:
        # Not only the first character: the normalizer may have dropped it.
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
