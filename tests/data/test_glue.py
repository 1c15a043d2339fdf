"""lit_sparse.data.glue on local copies in every layout; the hub is only asked by a stand-in."""

import json

import pytest
from backbones import save_tiny_tokenizer
from datasets import Dataset, DatasetDict

from lit_sparse import GLUE, UsageError

# Task -> (text columns, names of the classes, metrics), written down from the hub and the paper.
FACTS = {
    "cola": (["sentence"], ["unacceptable", "acceptable"], ("matthews",)),
    "sst2": (["sentence"], ["negative", "positive"], ("accuracy",)),
    "mrpc": (["sentence1", "sentence2"], ["not_equivalent", "equivalent"], ("accuracy", "f1")),
    "qqp": (["question1", "question2"], ["not_duplicate", "duplicate"], ("accuracy", "f1")),
    "stsb": (["sentence1", "sentence2"], None, ("pearson", "spearman")),
    "mnli": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"], ("accuracy",)),
    "qnli": (["question", "sentence"], ["entailment", "not_entailment"], ("accuracy",)),
    "rte": (["sentence1", "sentence2"], ["entailment", "not_entailment"], ("accuracy",)),
    "wnli": (["sentence1", "sentence2"], ["not_entailment", "entailment"], ("accuracy",)),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def rows_of(task, hidden=False, word="film"):
    columns, names, _ = FACTS[task]
    labels = [0.5, 5.0] if names is None else range(len(names))
    return [
        {**dict.fromkeys(columns, f"{word} {i}"), "label": -1 if hidden else label, "idx": i}
        for i, label in enumerate(labels)
    ]


def write_task(folder, task):
    folder.mkdir(parents=True)
    parts = ["_matched", "_mismatched"] if task == "mnli" else [""]
    contents = {"train": rows_of(task)}
    for part in parts:
        contents[f"validation{part}"] = rows_of(task, word="cat" if part == "_mismatched" else "film")
        contents[f"test{part}"] = rows_of(task, hidden=True)
    for split, rows in contents.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def decoded(data, batch):
    return data._tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)


@pytest.mark.parametrize("task", FACTS)
def test_every_task_has_its_columns_labels_and_metrics(task, tmp_path, tokenizer):
    columns, names, metrics = FACTS[task]
    write_task(tmp_path / "glue" / task, task)
    data = GLUE(task=task, path=str(tmp_path / "glue"), tokenizer=tokenizer)
    data.setup("fit")
    assert (data.label_names, data.metrics, data.regression) == (names, list(metrics), names is None)
    assert data.num_labels == (len(names) if names else 1)
    batch = next(iter(data.train_dataloader()))
    assert "film 0" + " film 0" * (len(columns) - 1) in decoded(data, batch)
    loaders = data.val_dataloader()
    batch = next(iter(loaders[0] if task == "mnli" else loaders))
    assert batch["labels"].tolist() == [row["label"] for row in rows_of(task)]


def test_mnli_has_two_validation_and_two_test_sets(tmp_path, tokenizer):
    write_task(tmp_path / "mnli", "mnli")
    data = GLUE(task="mnli", path=str(tmp_path), tokenizer=tokenizer)
    assert data.validation_names == ("matched", "mismatched")
    data.setup("fit")
    matched, mismatched = data.val_dataloader()
    assert decoded(data, next(iter(matched)))[0] == "film 0 film 0"
    assert decoded(data, next(iter(mismatched)))[0] == "cat 0 cat 0"
    data.setup("test")
    assert len(data.test_dataloader()) == 2


def test_hidden_test_labels_are_left_out(tmp_path, tokenizer):
    write_task(tmp_path / "rte", "rte")
    data = GLUE(task="rte", path=str(tmp_path), tokenizer=tokenizer)
    assert data.validation_names == ("",)
    data.setup("test")
    assert "labels" not in next(iter(data.test_dataloader()))
    data.setup("predict")
    assert len(next(iter(data.predict_dataloader()))["input_ids"]) == 2


def test_the_folder_of_the_task_itself_will_do(tmp_path, tokenizer):
    write_task(tmp_path / "copy", "cola")
    data = GLUE(task="cola", path=str(tmp_path / "copy"), tokenizer=tokenizer)
    data.setup("validate")
    assert decoded(data, next(iter(data.val_dataloader()))) == ["film 0", "film 1"]


def test_a_clone_of_the_hubs_repository_will_do(tmp_path, tokenizer):
    (tmp_path / "mnli").mkdir()
    for split in ("train", "validation_matched", "validation_mismatched"):
        Dataset.from_list(rows_of("mnli")).to_parquet(tmp_path / "mnli" / f"{split}-00000-of-00002.parquet")
        Dataset.from_list(rows_of("mnli")).to_parquet(tmp_path / "mnli" / f"{split}-00001-of-00002.parquet")
    data = GLUE(task="mnli", path=str(tmp_path), tokenizer=tokenizer)
    data.setup("fit")
    assert [len(loader.dataset) for loader in (data.train_dataloader(), *data.val_dataloader())] == [6, 6, 6]


def test_the_hub_is_asked_for_the_task(monkeypatch, tokenizer, tmp_path):
    asked = []
    rows = Dataset.from_list(rows_of("cola"))

    def load(path, name, revision):
        asked.append((path, name, revision))
        return DatasetDict({"train": rows, "validation": rows})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lit_sparse.data.sources.load_dataset", load)
    data = GLUE(task="cola", revision="main", tokenizer=tokenizer)
    data.setup("fit")
    assert asked == [("nyu-mll/glue", "cola", "main")]
    assert next(iter(data.val_dataloader()))["labels"].tolist() == [0, 1]


def test_an_unknown_task_lists_the_tasks():
    with pytest.raises(UsageError, match="no task 'mrcp'; its tasks are cola, sst2, mrpc"):
        GLUE(task="mrcp")


def test_a_missing_copy_is_named(tmp_path):
    with pytest.raises(UsageError, match="nowhere' does not exist"):
        GLUE(task="rte", path=str(tmp_path / "nowhere")).setup("fit")
