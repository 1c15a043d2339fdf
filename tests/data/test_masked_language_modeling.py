"""lit_sparse.MaskedLMData: which tokens are hidden, when they are others, and what the user is told."""

import json

import pytest
import torch
from backbones import save_tiny_causal_tokenizer
from transformers import AutoTokenizer

from lit_sparse import MaskedLMData, UsageError

TEXTS = ["the dog runs", "a good film and a bad film", "one", "it is true so it is not false", "a cat sat in a house"]


@pytest.fixture
def prepare(tmp_path, bert):
    """A data module of these texts in every split, set up for a stage."""

    def make(texts=TEXTS, stage="fit", **arguments):
        file = tmp_path / "rows.json"
        file.write_text(json.dumps([{"text": text} for text in texts]))
        files = dict.fromkeys(("train", "validation", "test", "predict"), str(file))
        data = MaskedLMData(data_files=files, **{"tokenizer": bert, **arguments})
        data.setup(stage)
        return data

    return make


def hidden_rows(loader):
    """The unpadded inputs and labels of each row."""
    return [
        (ids[mask == 1].tolist(), labels[mask == 1].tolist())
        for batch in loader
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]


def test_labels_are_the_tokens_that_are_hidden(prepare, bert):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    data = prepare(mlm_probability=0.5, batch_size=5, length_grouped=False)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        (batch,) = loader
        assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(
            ("input_ids", "token_type_ids", "attention_mask", "labels"), torch.long
        )
        assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
        restored = batch["input_ids"].where(batch["labels"] == -100, batch["labels"])
        assert sorted(tokenizer.batch_decode(restored, skip_special_tokens=True)) == sorted(TEXTS)
        assert not torch.isin(batch["labels"], torch.tensor(tokenizer.all_special_ids)).any()
        assert (batch["input_ids"] == tokenizer.mask_token_id).any()


def test_the_share_of_hidden_tokens_is_that_asked_for(prepare):
    data = prepare([" ".join(["dog"] * 50)] * 80, mlm_probability=0.3, batch_size=80)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        (batch,) = loader
        assert ((batch["labels"] != -100).sum() / (80 * 50)).item() == pytest.approx(0.3, abs=0.03)
        assert len(set(map(str, (batch["labels"] != -100).tolist()))) == 80  # each row has others


def test_training_hides_others_each_time_and_evaluation_the_same(prepare):
    data = prepare(mlm_probability=0.5, batch_size=5, length_grouped=False)
    first, second = (sorted(hidden_rows(data.train_dataloader())) for _ in range(2))
    assert first != second
    expected = hidden_rows(data.val_dataloader())
    assert all(any(label != -100 for label in labels) for _, labels in expected)
    for arguments in ({}, {"eval_batch_size": 1}, {"eval_batch_size": 2}, {"eval_batch_size": 3, "num_workers": 1}):
        torch.manual_seed(7)
        again = prepare(mlm_probability=0.5, **arguments)
        assert hidden_rows(again.val_dataloader()) == expected
        again.setup("test")
        assert hidden_rows(again.test_dataloader()) == expected


def test_a_share_of_the_rows_has_the_same_hidden_tokens(prepare):
    """As where processes share the rows, each with some of them in its batches."""
    loader = prepare(mlm_probability=0.5, batch_size=5).val_dataloader()
    rows = list(loader.dataset)
    together, apart = loader.collate_fn(rows), loader.collate_fn([rows[3], rows[1]])
    for row, number in enumerate((3, 1)):
        width = len(rows[number]["input_ids"])
        for name in ("input_ids", "labels"):
            assert torch.equal(apart[name][row, :width], together[name][number, :width])


def test_evaluation_leaves_the_random_state_alone(prepare):
    """Otherwise dropout and the order of rows would be the same after every validation."""
    loader = prepare().val_dataloader()
    state = torch.get_rng_state()
    loader.collate_fn(list(loader.dataset))
    assert torch.equal(torch.get_rng_state(), state)


def test_something_is_hidden_even_in_a_single_short_row(prepare):
    data = prepare(["dog"] * 20, batch_size=1)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert [(batch["labels"] != -100).sum().item() for batch in loader] == [1] * 20


def test_prediction_hides_nothing_and_has_masks_of_its_own(prepare, bert):
    data = prepare(["the [MASK] runs", "[MASK]"], "predict")
    (batch,) = data.predict_dataloader()
    assert sorted(batch) == ["attention_mask", "input_ids", "token_type_ids"]
    decoded = AutoTokenizer.from_pretrained(bert).batch_decode(batch["input_ids"])
    assert decoded == ["[CLS] the [MASK] runs [SEP]", "[CLS] [MASK] [SEP] [PAD] [PAD]"]
    assert (batch["input_ids"] == data.mask_token_id).sum() == 2


def test_long_texts_are_cut(prepare):
    (batch,) = prepare(["dog " * 30], max_length=10).val_dataloader()
    assert batch["input_ids"].shape == (1, 10)


def test_prediction_without_a_mask_names_the_row(prepare):
    with pytest.raises(UsageError, match=r"Row 1 .* of the split 'predict' has no \[MASK\] among the first 64 tokens"):
        prepare(["a [MASK]", "a dog"], "predict")
    with pytest.raises(UsageError, match=r"Row 0 .* has no \[MASK\] among the first 4 tokens of the column 'text'"):
        prepare(["the dog runs to the [MASK]"], "predict", max_length=4)


@pytest.mark.parametrize("text", ["", "  ", None])
def test_empty_texts_name_the_row(text, prepare):
    with pytest.raises(UsageError, match=r"Row 5 .* of the split 'train' has no text in the column 'text'"):
        prepare([*TEXTS, text])


def test_texts_without_tokens_name_the_row(prepare):
    with pytest.raises(UsageError, match=r"Row 5 .* of the split 'train' has no token in the column 'text'"):
        prepare([*TEXTS, "\u0007"])  # a control character, which BERT's tokenizer drops


def test_a_tokenizer_without_mask_token_is_refused(prepare, tmp_path):
    llama = save_tiny_causal_tokenizer(tmp_path / "llama", add_bos=True, pad_token="<pad>")  # noqa: S106
    with pytest.raises(UsageError, match=r"tokenizer '.*llama' has no mask token"):
        prepare(tokenizer=llama)


def test_missing_columns_list_those_found(prepare):
    with pytest.raises(UsageError, match=r"has no column 'txt'; its columns are \['text'\]"):
        prepare(text="txt")


@pytest.mark.parametrize("share", [0, 1, -0.1, 15])
def test_some_tokens_are_hidden_but_not_all(share):
    with pytest.raises(UsageError, match=r"mlm_probability must be above 0 and below 1; got"):
        MaskedLMData("rows.json", mlm_probability=share)
