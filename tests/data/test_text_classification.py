"""lit_sparse.data.text_classification, text, sources and tokenizers on small files."""

import json

import pytest
import torch
from backbones import MAX_LENGTH, save_tiny_causal_tokenizer, save_tiny_tokenizer
from datasets import ClassLabel, Dataset, Features, Value
from lightning.pytorch import LightningModule, Trainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lit_sparse import TextClassificationData, UsageError
from lit_sparse.data.sampling import LengthGroupedSampler
from lit_sparse.data.tokenizers import identify_tokenizer

TRAIN = [
    {"text": "a good film", "label": "good"},
    {"text": "a really very awful film with bad acting and no plot at all", "label": "bad"},
    {"text": "great acting", "label": "good"},
    {"text": "dull", "label": "bad"},
    {"text": "not a good story", "label": "bad"},
]
VALIDATION = [{"text": "a warm film", "label": "good"}, {"text": "the plot is awful and sad", "label": "bad"}]
PAIRS = [
    {"one": "a man sat", "two": "a man was", "score": 4.5},
    {"one": "a dog runs", "two": "the cat sat in the tree", "score": 0},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def write(tmp_path):
    """Write rows to ``folder/<name>``, whose ending says how, and give back the path."""

    def write_rows(name, rows):
        file = tmp_path / "rows" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif file.suffix == ".json":
            file.write_text(json.dumps(rows))
        else:
            table = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
            table.to_csv(file) if file.suffix == ".csv" else table.to_parquet(file)
        return str(file)

    return write_rows


@pytest.fixture
def folder(write, tmp_path):
    write("train.jsonl", TRAIN)
    write("validation.jsonl", VALIDATION)
    return str(tmp_path / "rows")


@pytest.fixture
def tokenised(monkeypatch):
    """The splits that were tokenised, one entry per batch of rows."""
    calls = []
    encode = TextClassificationData._encode
    monkeypatch.setattr(
        TextClassificationData,
        "_encode",
        lambda self, rows, places, labelled: calls.append(places[0].split) or encode(self, rows, places, labelled),
    )
    return calls


def set_up(stage="fit", **arguments):
    data = TextClassificationData(**arguments)
    data.setup(stage)
    return data


def texts_of(batch, tokenizer):
    return AutoTokenizer.from_pretrained(tokenizer).batch_decode(batch["input_ids"], skip_special_tokens=True)


# What is in a batch.


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "parquet"])
def test_batches_hold_the_rows_of_each_kind_of_file(ending, write, tmp_path, tokenizer):
    write(f"train.{ending}", TRAIN)
    write(f"validation.{ending}", VALIDATION)
    data = set_up(path=str(tmp_path / "rows"), tokenizer=tokenizer)
    assert (data.num_labels, data.label_names, data.validation_names) == (2, ["bad", "good"], ("",))
    (batch,) = data.val_dataloader()
    assert texts_of(batch, tokenizer) == [row["text"] for row in VALIDATION]
    assert batch["labels"].tolist() == [1, 0]
    assert batch["labels"].dtype == torch.long
    (batch,) = data.train_dataloader()
    label_of = {row["text"]: row["label"] for row in TRAIN}
    assert sorted(texts_of(batch, tokenizer)) == sorted(label_of)
    for text, label in zip(texts_of(batch, tokenizer), batch["labels"], strict=True):
        assert data.label_names[label] == label_of[text]


@pytest.mark.parametrize("there", [False, True])
def test_batches_are_pinned_where_there_is_a_gpu(there, folder, tokenizer, monkeypatch):
    """Lightning copies pinned batches without waiting."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    data = set_up(path=folder, tokenizer=tokenizer)
    assert [loader.pin_memory for loader in (data.train_dataloader(), data.val_dataloader())] == [there, there]


def test_a_batch_is_padded_to_its_own_longest_row(folder, tokenizer):
    data = set_up(path=folder, tokenizer=tokenizer, batch_size=2, eval_batch_size=1)
    tokens = [len(AutoTokenizer.from_pretrained(tokenizer)(row["text"])["input_ids"]) for row in TRAIN]
    widths = [batch["input_ids"].shape[1] for batch in data.train_dataloader()]
    assert widths[0] == max(tokens)
    assert widths[-1] == min(tokens)
    for batch in data.train_dataloader():
        assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]
        assert ((batch["input_ids"] == 0) == (batch["attention_mask"] == 0)).all()  # [PAD] is 0
    assert len(list(data.val_dataloader())) == 2


def test_pairs_and_numbers(write, tokenizer):
    file = write("pairs.jsonl", PAIRS)
    data = set_up(
        data_files={"train": file, "validation": file},
        text="one",
        text_pair="two",
        label="score",
        regression=True,
        metrics=["pearson"],
        tokenizer=tokenizer,
    )
    assert (data.num_labels, data.label_names, data.regression, data.metrics) == (1, None, True, ["pearson"])
    (batch,) = data.val_dataloader()
    assert batch["labels"].dtype == torch.float
    assert batch["labels"].tolist() == [4.5, 0]
    second = batch["input_ids"][1][batch["token_type_ids"][1] == 1]
    assert texts_of({"input_ids": second[None]}, tokenizer) == ["the cat sat in the tree"]


@pytest.mark.parametrize(("max_length", "expected"), [(6, 6), (1000, MAX_LENGTH)])
def test_long_rows_are_cut_at_the_lower_limit(max_length, expected, write, tokenizer):
    file = write("long.jsonl", [{"text": "good " * 100, "label": 0}, {"text": "bad " * 100, "label": 1}])
    data = set_up(data_files={"train": file, "validation": file}, tokenizer=tokenizer, max_length=max_length)
    assert next(iter(data.val_dataloader()))["input_ids"].shape == (2, expected)


def test_words_that_look_like_missing_values_are_texts(write, tokenizer):
    file = write("odd.csv", [{"text": "null", "label": 0}, {"text": "NA", "label": 1}])
    data = set_up(data_files={"train": file, "validation": file}, tokenizer=tokenizer)
    assert texts_of(next(iter(data.val_dataloader())), tokenizer) == ["null", "na"]


# Labels.


@pytest.mark.parametrize(
    ("values", "names", "ids"),
    [
        ([1, 0, 2], ["0", "1", "2"], [1, 0, 2]),  # kept
        ([5, -1, 3], ["-1", "3", "5"], [2, 0, 1]),
        (["pos", "neg", "pos"], ["neg", "pos"], [1, 0, 1]),
        ([True, False, True], ["False", "True"], [1, 0, 1]),
    ],
)
def test_without_names_labels_are_the_sorted_values(values, names, ids, write, tokenizer):
    file = write("rows.jsonl", [{"text": "film", "label": value} for value in values])
    data = set_up(data_files={"train": file, "validation": file}, tokenizer=tokenizer)
    assert data.label_names == names
    assert next(iter(data.val_dataloader()))["labels"].tolist() == ids


@pytest.mark.parametrize("values", [["bad", "good"], [1, 0]])
def test_with_names_labels_are_names_or_ids(values, write, tokenizer):
    file = write("rows.jsonl", [{"text": "film", "label": value} for value in values])
    files = {"train": file, "validation": file}
    data = set_up(data_files=files, tokenizer=tokenizer, labels=["good", "bad", "so-so"])
    assert (data.num_labels, data.label_names) == (3, ["good", "bad", "so-so"])
    assert next(iter(data.val_dataloader()))["labels"].tolist() == [1, 0]


def test_labels_that_only_look_like_numbers_keep_their_names(write, tokenizer, tmp_path):
    for split, labels in (("train", ["007", "7", "10"]), ("validation", ["10", "7"])):  # the latter a column of numbers
        (tmp_path / f"{split}.csv").write_text("text,label\n" + "".join(f"a film,{label}\n" for label in labels))
    data = TextClassificationData(path=str(tmp_path), tokenizer=tokenizer)
    data.setup("fit")
    assert data.label_names == ["007", "10", "7"]
    assert next(iter(data.val_dataloader()))["labels"].tolist() == [1, 2]


def test_a_folder_of_the_hub_form_names_its_own_classes(write, tmp_path, tokenizer):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["worse", "better"])})
    rows = Dataset.from_dict({"text": ["bad film", "good film"], "label": [0, 1]}, features=features)
    write("data/train-00000-of-00001.parquet", rows)
    write("data/validation-00000-of-00001.parquet", rows)
    data = set_up(path=str(tmp_path / "rows"), tokenizer=tokenizer)
    assert data.label_names == ["worse", "better"]
    assert next(iter(data.val_dataloader()))["labels"].tolist() == [0, 1]


def test_a_test_split_with_hidden_labels_gives_batches_without(write, tokenizer):
    train = write("a.jsonl", [{"text": "film", "label": i} for i in (0, 1)])
    hidden = write("b.jsonl", [{"text": "film", "label": -1}] * 2)
    data = set_up("test", data_files={"train": train, "test": hidden}, tokenizer=tokenizer)
    assert "labels" not in next(iter(data.test_dataloader()))
    assert data.num_labels == 2


@pytest.mark.parametrize("split", ["predict", "test"])
def test_prediction_needs_and_gives_no_labels(split, write, tokenizer):
    file = write("rows.jsonl", [{"text": "a film"}])
    data = set_up("predict", data_files={split: file}, labels=["a", "b"], tokenizer=tokenizer)
    assert sorted(next(iter(data.predict_dataloader()))) == ["attention_mask", "input_ids", "token_type_ids"]


# Splits.


def test_validation_rows_held_out_are_the_same_in_every_run(write, tokenizer):
    rows = [{"text": f"film {i}", "label": i % 2} for i in range(10, 40)]  # all of one length
    file = write("rows.jsonl", rows)

    def splits(seed):
        data = set_up(path=file, validation_fraction=0.2, tokenizer=tokenizer, seed=seed)
        return (
            [text for batch in loader for text in texts_of(batch, tokenizer)]
            for loader in (data.train_dataloader(), data.val_dataloader())
        )

    train, validation = splits(seed=0)
    assert len(validation) == 6
    assert sorted(train + validation) == sorted(row["text"] for row in rows)
    other_train, other_validation = splits(seed=1)
    assert other_validation == validation
    assert sorted(other_train) == sorted(train)
    assert other_train != train
    assert list(splits(seed=0)) == [train, validation]


def test_only_the_splits_of_the_stage_are_tokenised(write, folder, tokenizer, tokenised):
    write("test.jsonl", VALIDATION)
    set_up("fit", path=folder, tokenizer=tokenizer)
    assert tokenised == ["train", "validation"]
    set_up("validate", path=folder, tokenizer=tokenizer)
    assert tokenised == ["train", "validation"]
    set_up("test", path=folder, tokenizer=tokenizer)
    assert tokenised == ["train", "validation", "test"]


def test_rows_are_tokenised_again_only_if_something_changed(write, folder, tokenizer, tokenised, tmp_path):
    data = TextClassificationData(path=folder, tokenizer=tokenizer)
    data.prepare_data()
    assert len(tokenised) == 2
    data.setup("fit")
    first = next(iter(data.val_dataloader()))
    again = next(iter(set_up(path=folder, tokenizer=tokenizer, batch_size=7, seed=3).val_dataloader()))
    assert len(tokenised) == 2
    assert torch.equal(first["input_ids"], again["input_ids"])
    set_up(path=folder, tokenizer=tokenizer, max_length=5)
    assert len(tokenised) == 4
    set_up(path=folder, tokenizer=tokenizer, labels=["good", "bad"])
    assert len(tokenised) == 6
    set_up(path=folder, tokenizer=save_tiny_causal_tokenizer(tmp_path / "gpt", add_bos=False, pad_token=None))
    assert len(tokenised) == 8
    write("train.jsonl", TRAIN[:4])
    set_up(path=folder, tokenizer=tokenizer)
    assert tokenised[8:] == ["train"]


def test_a_tokenizer_is_known_by_what_it_makes_of_texts(tokenizer, tmp_path):
    identity = identify_tokenizer(AutoTokenizer.from_pretrained(tokenizer))
    other_folder = save_tiny_tokenizer(tmp_path / "copy")
    assert identify_tokenizer(AutoTokenizer.from_pretrained(other_folder)) == identity
    assert identify_tokenizer(AutoTokenizer.from_pretrained(tokenizer, eos_token="[MASK]")) != identity  # noqa: S106


# With a Trainer.


class Recorder(LightningModule):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch["input_ids"].tolist()))
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=0.1)


@pytest.mark.parametrize("length_grouped", [True, False])
def test_a_trainer_gets_the_backbones_tokenizer_and_a_new_order_each_epoch(length_grouped, folder, tokenizer, tmp_path):
    def fit():
        module = Recorder(tokenizer)
        trainer = Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = TextClassificationData(path=folder, batch_size=1, length_grouped=length_grouped)
        trainer.fit(module, datamodule=data)
        assert isinstance(trainer.train_dataloader.sampler, LengthGroupedSampler) == length_grouped
        return [[ids for epoch, ids in module.seen if epoch == wanted] for wanted in (0, 1)]

    first, second = fit()
    assert sorted(first) == sorted(second)
    assert len(first) == len(TRAIN)
    if not length_grouped:  # five rows of five lengths are always sorted alike
        assert first != second
    torch.manual_seed(1234)
    assert fit() == [first, second]


def test_a_trainer_that_never_validates_needs_no_validation_split(write, tokenizer, tmp_path):
    module, file = Recorder(tokenizer), write("a.jsonl", TRAIN)
    options = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False}
    data = TextClassificationData(data_files={"train": file}, batch_size=1)
    Trainer(default_root_dir=tmp_path, limit_val_batches=0, **options).fit(module, datamodule=data)
    assert len(module.seen) == len(TRAIN)
    with pytest.raises(UsageError, match="or limit_val_batches=0 to train without it"):
        Trainer(default_root_dir=tmp_path, **options).fit(module, datamodule=data)


def test_a_tokenizer_without_pad_pads_with_eos(folder, tmp_path):
    tokenizer = save_tiny_causal_tokenizer(tmp_path / "gpt", add_bos=False, pad_token=None)
    batch = next(iter(set_up(path=folder, tokenizer=tokenizer).val_dataloader()))
    eos = AutoTokenizer.from_pretrained(tokenizer).eos_token_id
    assert (batch["input_ids"][batch["attention_mask"] == 0] == eos).all()
    assert (batch["attention_mask"] == 0).any()


# Errors.


def assert_refused(match, stage="fit", **arguments):
    with pytest.raises(UsageError, match=match) as caught:
        set_up(stage, **arguments)
    assert "\n" not in str(caught.value)


def test_one_source_is_needed(folder, tokenizer):
    assert_refused("either path .* or data_files .* got neither", tokenizer=tokenizer)
    both = {"path": folder, "data_files": {"train": f"{folder}/train.jsonl"}}
    assert_refused("either path .* or data_files .* got both", **both, tokenizer=tokenizer)


def test_missing_files_are_named_before_anything_else():
    assert_refused("path './nowhere' does not exist", path="./nowhere")
    assert_refused("path 'nowhere.csv' does not exist", path="nowhere.csv")
    assert_refused(
        "files that do not exist: /no/a.csv, /no/b.csv", data_files={"train": "/no/a.csv", "test": "/no/b.csv"}
    )


def test_data_files_need_known_splits(folder):
    assert_refused(r"some of \['train', .*got {'dev': ", data_files={"dev": f"{folder}/train.jsonl"})


def test_files_must_be_of_a_kind_that_can_be_read(tmp_path):
    file = tmp_path / "rows.txt"
    file.write_text("a film")
    endings = r"\.csv, \.tsv, \.json, \.jsonl, \.ndjson, \.parquet, and \.gz or \.zst if they are compressed"
    assert_refused(rf"rows\.txt cannot be read: files of rows end in {endings}", path=str(file))


def test_a_broken_file_is_named(tmp_path, tokenizer):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a film", "label": \n')
    assert_refused(
        r"'train' is empty or cannot be read as json from .*rows\.jsonl",
        path=str(file),
        validation_fraction=0.5,
        tokenizer=tokenizer,
    )


def test_a_split_in_two_files_is_ambiguous(write, folder):
    write("train.csv", TRAIN)
    assert_refused(r"'train' must be one file, but .* has \['train.csv', 'train.jsonl'\]", path=folder)


@pytest.mark.parametrize("name", ["dev.csv", "val.jsonl", "valid.parquet", "dev-00000-of-00001.parquet"])
def test_a_folder_may_name_validation_in_other_words(name, write, tmp_path, tokenizer):
    write("train.jsonl", TRAIN)
    write(name, VALIDATION)
    data = TextClassificationData(path=str(tmp_path / "rows"), tokenizer=tokenizer)
    data.setup("fit")
    assert len(data.val_dataloader().dataset) == len(VALIDATION)
    write("validation-00000-of-00001.parquet", VALIDATION)  # not a second part, but the same split twice
    assert_refused("'validation' must be one file, but ", path=str(tmp_path / "rows"))


def test_name_and_revision_are_for_the_hub(folder):
    assert_refused("leave out name='cola' and revision=None", path=folder, name="cola")


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach 'org/rows'\non the Hub")

    monkeypatch.setattr("lit_sparse.data.sources.load_dataset", unreachable)
    assert_refused(r"'org/rows' could not be loaded \(Couldn't reach 'org/rows' on the Hub\)", path="org/rows")


def test_stages_say_which_split_they_miss(write, folder, tokenizer):
    file = write("a.jsonl", TRAIN)
    no_validation = "needs the split 'validation', but .* only has 'train': .* or validation_fraction"
    assert_refused(no_validation, path=file, tokenizer=tokenizer)
    assert_refused("'test' needs the split 'test', .* 'train', 'validation'", "test", path=folder, tokenizer=tokenizer)
    assert_refused("'predict' needs the split 'predict'", "predict", path=folder, tokenizer=tokenizer)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 20])
def test_validation_fraction_is_a_share(fraction, write):
    assert_refused(
        r"validation_fraction must be above 0 and below 1; got",
        path=write("a.jsonl", TRAIN),
        validation_fraction=fraction,
    )


def test_validation_fraction_and_split_exclude_each_other(folder):
    assert_refused("but this one has 'validation'", path=folder, validation_fraction=0.1)


def test_validation_fraction_leaves_rows_on_both_sides(write, tokenizer):
    file = write("a.jsonl", TRAIN[:2])
    assert_refused("leaves nothing on one side", path=file, validation_fraction=0.9, tokenizer=tokenizer)


@pytest.mark.parametrize("column", ["text", "text_pair", "label"])
def test_missing_columns_list_those_found(column, folder, tokenizer):
    match = r"'train' has no column 'other'; its columns are \['text', 'label'\]"
    assert_refused(match, path=folder, tokenizer=tokenizer, **{column: "other"})


@pytest.mark.parametrize("name", ["empty.csv", "empty.jsonl", "empty.parquet"])
def test_empty_splits_are_named(name, write, folder, tokenizer):
    rows = Dataset.from_dict({"text": [], "label": []}, Features({"text": Value("string"), "label": Value("string")}))
    empty = write(name, [] if name.endswith("jsonl") else rows)
    files = {"train": f"{folder}/train.jsonl", "validation": empty}
    assert_refused("'validation' .*is empty", data_files=files, tokenizer=tokenizer)


def test_unknown_labels_name_row_and_value(write, folder, tokenizer):
    odd = write("odd.jsonl", [*VALIDATION, {"text": "a film", "label": "so-so"}])
    files = {"train": f"{folder}/train.jsonl", "validation": odd}
    match = r"Row 2 .* 'validation' has the label 'so-so' .* none of the labels \['bad', 'good'\]"
    assert_refused(match, data_files=files, tokenizer=tokenizer)
    assert_refused("Row 0 .* has the label 'good'", data_files=files, tokenizer=tokenizer, labels=["a", "b"])


@pytest.mark.parametrize("value", [2, -1])
def test_ids_outside_the_range_name_row_and_value(value, write, tokenizer):
    file = write("rows.jsonl", [{"text": "film", "label": 0}, {"text": "film", "label": value}])
    files = {"train": file, "validation": file}
    assert_refused(f"Row 1 .* has the label {value} ", data_files=files, tokenizer=tokenizer, labels=["a", "b"])


def test_hidden_labels_are_for_test_splits_only(write, tokenizer):
    train = write("a.jsonl", [{"text": "film", "label": i} for i in (0, 1)])
    hidden = write("b.jsonl", [{"text": "film", "label": -1}])
    match = "Row 0 .* 'validation' has the label -1 "
    assert_refused(match, data_files={"train": train, "validation": hidden}, tokenizer=tokenizer)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@pytest.mark.parametrize("values", [(0, 1, None), ("a", "b", None)])
def test_missing_labels_name_the_row(ending, values, write, tokenizer):
    file = write(f"rows.{ending}", [{"text": "film", "label": value} for value in values])
    files = {"train": file, "validation": file}
    assert_refused("Row 2 .* 'train' has the label (None|nan) ", data_files=files, tokenizer=tokenizer)


@pytest.mark.parametrize("value", [None, float("nan"), "high"])
def test_regression_needs_finite_numbers(value, write, tokenizer):
    rows = [{"text": "film", "label": value}] if isinstance(value, str) else [{"text": "film", "label": 1.5}]
    file = write("rows.parquet", [*rows, {"text": "film", "label": value}])
    files = {"train": file, "validation": file}
    assert_refused("regression needs a finite number", data_files=files, tokenizer=tokenizer, regression=True)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_missing_texts_name_the_row(ending, write, tokenizer):
    file = write(f"rows.{ending}", [{"text": "film", "label": 0}, {"text": None, "label": 1}])
    match = "Row 1 .* 'train' has no text in the column 'text' but None"
    assert_refused(match, data_files={"train": file, "validation": file}, tokenizer=tokenizer)


def test_one_class_is_not_enough(write, tokenizer):
    file = write("rows.jsonl", [{"text": "film", "label": "a"}] * 3)
    files = {"train": file, "validation": file}
    assert_refused(r"two different labels, but .* has \['a'\]", data_files=files, tokenizer=tokenizer)
    assert_refused(r"two different labels", data_files=files, tokenizer=tokenizer, labels=["a", "a"])


def test_fractions_are_no_classes(write, tokenizer):
    file = write("rows.jsonl", [{"text": "film", "label": 1.5}, {"text": "film", "label": 2.0}])
    match = r"Row 0 \(.*rows.jsonl\) of the split 'train' holds 1.5 in the column 'label': .* set regression to true"
    assert_refused(match, data_files={"train": file, "validation": file}, tokenizer=tokenizer)


def test_labels_cannot_be_learned_without_training_split(write, tokenizer):
    file = write("rows.jsonl", VALIDATION)
    assert_refused("no training split to learn the labels from", "test", data_files={"test": file}, tokenizer=tokenizer)


def test_a_tokenizer_is_needed(folder):
    assert_refused("No tokenizer is given", path=folder)


def test_a_tokenizer_that_cannot_be_loaded_is_named(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_refused("tokenizer '.*empty' could not be loaded", path=folder, tokenizer=str(empty))


def test_a_tokenizer_must_be_able_to_pad(folder, tokenizer, tmp_path):
    loaded = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    PreTrainedTokenizerFast(tokenizer_object=loaded.backend_tokenizer).save_pretrained(tmp_path / "padless")
    assert_refused("neither a pad nor an eos token", path=folder, tokenizer=str(tmp_path / "padless"))
