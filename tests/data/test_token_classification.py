"""lit_sparse.data.token_classification: which token a word gets, what is cut, and what the user is told."""

import gzip
import json

import pytest
import torch
from backbones import save_tiny_causal_tokenizer
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import AutoTokenizer

from lit_sparse import TokenClassificationData, UsageError

NAMES = ["O", "B-PER", "I-PER"]
ROWS = [
    {"tokens": ["Zoe", "saw", "a", "dog", "."], "ner_tags": ["B-PER", "O", "O", "O", "O"]},
    {"tokens": ["the", "man"], "ner_tags": ["O", "O"]},
    {"tokens": ["who", "is", "John", "de", "Souza-Li", "?"], "ner_tags": ["O", "O", "B-PER", "I-PER", "I-PER", "O"]},
]
CONLL = """-DOCSTART- -X- O

Zoe NNP B-PER
saw VB O
a DT O
dog NN O
. . O

the\tDT\tO
man\tNN\tO
\u0020
who WP O
is VB O
John NNP B-PER
de NNP I-PER
Souza-Li NNP I-PER
? . O"""


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return save_tiny_causal_tokenizer(tmp_path_factory.mktemp("gpt2"), add_bos=True, pad_token="<pad>")  # noqa: S106


@pytest.fixture
def write(tmp_path):
    def write_rows(rows, name="rows.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write_rows


def prepared(rows, write, tokenizer, stage="validate", **arguments):
    file = write(rows)
    files = dict.fromkeys(("train", "validation", "predict"), file)
    data = TokenClassificationData(data_files=files, tokenizer=tokenizer, **arguments)
    data.setup(stage)
    return data


def only_batch(rows, write, tokenizer, **arguments):
    (batch,) = prepared(rows, write, tokenizer, **arguments).val_dataloader()
    return batch


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_first_token_of_each_word_has_its_label(kind, write, request):
    """Against a tokenizer that is given one word at a time."""
    name = request.getfixturevalue(kind)
    tokenizer = AutoTokenizer.from_pretrained(name)
    batch = only_batch(ROWS, write, name)
    for number, row in enumerate(ROWS):
        ids, labels, positions = [tokenizer.cls_token_id if kind == "bert" else tokenizer.bos_token_id], [-100], []
        for place, (word, tag) in enumerate(zip(row["tokens"], row["ner_tags"], strict=True)):
            spaced = word if kind == "bert" or place == 0 else f" {word}"
            tokens = tokenizer(spaced, add_special_tokens=False)["input_ids"]
            before = int(not tokenizer.decode(tokens[0]).strip())  # a token of the space alone is not the word's
            positions.append(len(ids) + before)
            ids += tokens
            labels += [-100] * before + [sorted(NAMES).index(tag)] + [-100] * (len(tokens) - before - 1)
        if kind == "bert":
            ids, labels = [*ids, tokenizer.sep_token_id], [*labels, -100]
        length = len(ids)
        assert batch["input_ids"][number, :length].tolist() == ids
        assert batch["labels"][number].tolist() == labels + [-100] * (batch["labels"].shape[1] - length)
        assert batch["attention_mask"][number].sum() == length
        words = len(positions)
        assert batch["word_positions"][number].tolist() == positions + [-100] * (6 - words)
        gold = [sorted(NAMES).index(tag) for tag in row["ner_tags"]]
        assert batch["word_labels"][number].tolist() == gold + [-100] * (6 - words)


def test_words_that_are_cut_off_or_dropped_have_no_token_but_keep_their_label(write, bert):
    rows = [{"tokens": ["man", "\u200b", "xyz", "dog"], "ner_tags": ["O", "B-PER", "I-PER", "B-PER"]}]
    whole = only_batch(rows, write, bert)
    # [CLS] man x ##y ##z dog [SEP]: BERT's tokenizer drops the space of no width.
    assert whole["word_positions"].tolist() == [[1, -1, 2, 5]]
    assert whole["labels"].tolist() == [[-100, 2, 1, -100, -100, 0, -100]]
    cut = only_batch(rows, write, bert, max_length=5)
    assert cut["input_ids"].shape == (1, 5)
    assert cut["word_positions"].tolist() == [[1, -1, 2, -1]]
    assert cut["labels"].tolist() == [[-100, 2, 1, -100, -100]]
    assert cut["word_labels"].tolist() == [[2, 0, 1, 0]]


def test_training_batches_hold_what_the_model_takes_and_prediction_the_words(write, bert):
    data = prepared(ROWS, write, bert, "fit")
    batch = next(iter(data.train_dataloader()))
    assert sorted(batch) == ["attention_mask", "input_ids", "labels", "token_type_ids"]
    assert (data.num_labels, data.label_names) == (3, ["B-PER", "I-PER", "O"])
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert "labels" not in batch
    assert batch["words"] == [row["tokens"] for row in ROWS]


def test_files_of_conll_are_the_same_rows(write, bert, tmp_path):
    expected = only_batch(ROWS, write, bert)
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.conll").write_text(CONLL, encoding="utf-8", newline="\r\n" if split == "test" else "\n")
    data = TokenClassificationData(str(tmp_path), tokenizer=bert)
    data.setup("validate")
    data.setup("test")
    for (batch,) in (data.val_dataloader(), data.test_dataloader()):
        assert batch.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(batch[name], value)


def test_conll_files_of_a_pattern_may_be_compressed_and_name_their_sentences(bert, tmp_path):
    for part, sentences in (("a", "John B-PER\n\nruns O\n"), ("b", "Zoe B-PER\n\nsits O-\n")):
        (tmp_path / f"{part}.CONLL.gz").write_bytes(gzip.compress(sentences.encode()))
    files = {"train": str(tmp_path / "*.CONLL.gz")}
    data = TokenClassificationData(data_files=files, tokenizer=bert, validation_fraction=0.25)
    data.setup("fit")
    assert data.label_names == ["B-PER", "O", "O-"]
    data = TokenClassificationData(data_files=files, tokenizer=bert, validation_fraction=0.25, labels=["O", "B-PER"])
    place = r"Row 1 \(counted from 0 in .*b\.CONLL\.gz\) of the split 'train'"
    with pytest.raises(UsageError, match=f"{place} has the label 'O-' in the column 'ner_tags'"):
        data.setup("fit")


def test_conll_files_beside_others_and_on_their_own(write, bert, tmp_path):
    (tmp_path / "dev.bio").write_text("John B-PER\nruns O\n")
    (tmp_path / "new.txt").write_text("a\nbig\u00a0dog\n\nIt\truns\n")
    files = {"train": write(ROWS), "validation": str(tmp_path / "dev.bio"), "predict": str(tmp_path / "new.txt")}
    data = TokenClassificationData(data_files=files, tokenizer=bert)
    data.setup("fit")
    (batch,) = data.val_dataloader()
    assert batch["word_labels"].tolist() == [[0, 2]]
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch["words"] == [["a", "big\u00a0dog"], ["It"]]
    single = TokenClassificationData(str(tmp_path / "dev.bio"), tokenizer=bert, validation_fraction=0.5)
    with pytest.raises(UsageError, match="leaves nothing"):
        single.setup("fit")
    both = TokenClassificationData(str(tmp_path), data_files=files, tokenizer=bert)
    with pytest.raises(UsageError, match="got both"):
        both.setup("fit")


def test_names_of_ids_come_from_the_features_or_the_argument(write, bert, tmp_path):
    rows = [{"tokens": row["tokens"], "ner_tags": [NAMES.index(tag) for tag in row["ner_tags"]]} for row in ROWS]
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=NAMES))})
    for split in ("train", "validation"):
        Dataset.from_list(rows, features).to_parquet(tmp_path / f"{split}.parquet")
    named = TokenClassificationData(str(tmp_path), tokenizer=bert)
    named.setup("validate")
    (batch,) = named.val_dataloader()
    assert named.label_names == NAMES
    assert batch["word_labels"][2].tolist() == [0, 0, 1, 2, 2, 0]
    by_id = only_batch(rows, write, bert, labels=NAMES)
    by_name = only_batch(ROWS, write, bert, labels=NAMES)
    assert torch.equal(by_id["labels"], batch["labels"])
    assert torch.equal(by_name["labels"], batch["labels"])
    with pytest.raises(UsageError, match=r"Row 0 .* holds \d in the column 'ner_tags' and .*: give the names"):
        prepared(rows, write, bert)


def refused(rows, write, tokenizer, match, **arguments):
    with pytest.raises(UsageError, match=match) as caught:
        prepared(rows, write, tokenizer, **arguments)
    assert "\n" not in str(caught.value)


def test_rows_that_do_not_fit_are_named(write, bert):
    def row(tokens, tags):
        return [*ROWS, {"tokens": tokens, "ner_tags": tags}]

    refused(
        row(["a", "dog"], ["O"]), write, bert, r"Row 3 .* 'validation' has 2 words in the column 'tokens' but 1 tags"
    )
    refused(row(["a"], None), write, bert, "Row 3 .* has 1 words in the column 'tokens' but None in 'ner_tags'")
    refused(row([], []), write, bert, r"Row 3 .* has no list of words in the column 'tokens' but \[\]")
    refused(row(None, ["O"]), write, bert, "Row 3 .* has no list of words in the column 'tokens' but None")
    refused(row(["a", ""], ["O", "O"]), write, bert, "Row 3 .* has '' for word 1 in the column 'tokens'")
    unknown = r"Row 3 .* label 'B-LOC' in the column 'ner_tags', which is none of the labels \['O', 'B-PER', 'I-PER'\]"
    refused(row(["a"], ["B-LOC"]), write, bert, unknown, labels=NAMES)
    found = r"has no column 'pos_tags'; its columns are \['tokens', 'ner_tags'\]"
    refused(ROWS, write, bert, found, tags="pos_tags")
    refused(ROWS, write, bert, "no column 'words'", words="words")
    refused([{"tokens": ["a"], "ner_tags": ["O"]}], write, bert, r"at least two different labels, .* has \['O'\]")


def test_texts_instead_of_lists_are_refused(write, bert):
    rows = [{"tokens": "a dog", "ner_tags": ["O", "B-PER"]}] * 2
    refused(rows, write, bert, "Row 0 .* has no list of words in the column 'tokens' but 'a dog'")


def test_without_training_rows_the_names_must_be_given(write, bert):
    data = TokenClassificationData(data_files={"validation": write(ROWS)}, tokenizer=bert)
    with pytest.raises(UsageError, match="no training split to learn the labels from: give their names in labels"):
        data.setup("validate")


def test_mistakes_in_conll_files_are_named(bert, tmp_path):
    (tmp_path / "train.conll").write_text("a O\ndog B-PER\nruns\n")
    with pytest.raises(UsageError, match=r"Line 3 of .*train.conll is 'runs', without a tag"):
        TokenClassificationData(str(tmp_path), tokenizer=bert, validation_fraction=0.5).setup("fit")
    with pytest.raises(UsageError, match=r"nowhere.conll' does not exist"):
        TokenClassificationData(str(tmp_path / "nowhere.conll"), tokenizer=bert, validation_fraction=0.5).setup("fit")
    with pytest.raises(UsageError, match=r"leave out name='en' and revision=None"):
        TokenClassificationData(str(tmp_path), name="en", tokenizer=bert).setup("fit")
