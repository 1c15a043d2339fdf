"""Editing metrics against slow references and cases by hand, and across two processes."""

import math
import random
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st
from programs import launch
from torchmetrics.functional.text import squad

from lit_sparse.editing.metrics import (
    Answer,
    Continuation,
    EditSuccess,
    FirstNamePortability,
    Fluency,
    Locality,
    Portability,
    Rephrase,
    RequestMean,
    fluency,
    ngram_entropy,
)
from lit_sparse.errors import UsageError

RIGHT, HALF, WRONG = Answer([1, 2], [1, 2]), Answer([1, 9], [1, 2]), Answer([8, 9], [1, 2])


def values(metric) -> dict[str, float]:
    return {name: float(value) for name, value in metric.compute().items()}


def test_an_answer_counts_by_token():
    assert [RIGHT.share, HALF.share, WRONG.share] == [1.0, 0.5, 0.0]
    assert Answer([3, 1, 2], [1, 2, 3]).share == 0  # places count, not what occurs
    for wrong in (Answer([1], [1, 2]), Answer([], [])):
        with pytest.raises(ValueError, match=r"shorter|longer|at least one"):
            _ = wrong.share


def test_edit_success_is_the_mean_over_requests():
    metric = EditSuccess()
    metric.update([RIGHT, HALF])
    metric.update([WRONG])
    assert values(metric) == {"edit_success": 0.5}
    assert float(metric.standard_errors()["edit_success"]) == pytest.approx(stdev([1, 0.5, 0]) / math.sqrt(3))


def test_rephrased_prompts_of_a_request_count_as_one():
    metric = Rephrase()
    metric.update([[RIGHT, HALF], [WRONG], []])
    assert values(metric) == {"rephrase": (0.75 + 0) / 2}


def test_portability_takes_the_best_name_and_averages_prompts_then_kinds_then_requests():
    metric = Portability(["Reasoning", "Aliasing", "Other"])
    metric.update(
        [
            {"Reasoning": [[WRONG, RIGHT], [HALF]], "Aliasing": [[WRONG]]},  # 0.75 and 0: 0.375
            {"Aliasing": [[RIGHT, HALF]], "Reasoning": []},  # 1
            {"Reasoning": []},  # has none
            {},
        ]
    )
    found = values(metric)
    assert found["portability"] == (0.375 + 1) / 2
    assert found["portability/Reasoning"] == 0.75
    assert found["portability/Aliasing"] == 0.5
    assert math.isnan(found["portability/Other"])
    assert math.isnan(float(metric.standard_errors()["portability/Reasoning"]))  # of one request nothing is known


def test_portability_by_the_first_name():
    metric = FirstNamePortability(["Reasoning"])
    metric.update([{"Reasoning": [[WRONG, RIGHT], [HALF, RIGHT]]}])
    assert values(metric) == {"portability_first_name": 0.25, "portability_first_name/Reasoning": 0.25}


TEXTS = st.text(st.sampled_from("aAnthe .,'-é1 \t"), max_size=12)


@given(TEXTS, TEXTS)
def test_continuations_match_exactly_where_squad_s_do(text, expected):
    answers = {"id": "0", "answers": {"text": [expected], "answer_start": [0]}}
    score = squad({"id": "0", "prediction_text": text}, answers)["exact_match"]
    assert Continuation(text, expected).share == float(score) / 100


@pytest.mark.parametrize(
    ("text", "expected", "exact", "contained"),
    [
        ("Lyon.", "the Lyon", 1, 1),
        ("Lyon, a city of France", "Lyon", 0, 1),
        ("Lyonnais", "Lyon", 0, 0),
        ("The New  York Times", "new york", 0, 1),
        ("New, and York", "New York", 0, 0),
        ("", "Lyon", 0, 0),
        ("Lyon", "The", 0, 0),
        ("", "The", 1, 1),
    ],
)
def test_continuations_by_hand(text, expected, exact, contained):
    assert Continuation(text, expected).share == exact
    assert Continuation(text, expected, contained=True).share == contained


def test_locality_has_its_own_names():
    metric = Locality(["F"])
    metric.update([{"F": [[RIGHT], [WRONG]]}])
    assert values(metric) == {"locality": 0.5, "locality/F": 0.5}


def test_a_kind_that_was_not_named_is_an_error():
    with pytest.raises(UsageError, match=r"has the metrics \['locality', 'locality/F'\], but not 'locality/G'"):
        Locality(["F"]).update([{"G": [[RIGHT]]}])


def slow_entropy(words, n):
    """− Σ p log₂ p, with every n-gram looked up in the list of all."""
    grams = [tuple(words[i : i + n]) for i in range(len(words)) if i + n <= len(words)]
    return -sum(grams.count(g) / len(grams) * math.log2(grams.count(g) / len(grams)) for g in set(grams))


@given(st.lists(st.sampled_from("abc"), max_size=12), st.integers(1, 3))
def test_ngram_entropy_against_a_slow_one(words, n):
    assert ngram_entropy(words, n) == pytest.approx(slow_entropy(words, n) if len(words) >= n else 0, abs=1e-12)
    # Bounds: nothing repeats, everything repeats.
    assert -1e-12 <= ngram_entropy(words, n) <= math.log2(max(1, len(words) - n + 1)) + 1e-12


def test_fluency_by_hand():
    # a b c d e: 4 bigrams, 3 trigrams, all different.
    assert fluency("a b c d e") == pytest.approx((math.log2(4) * 2 / 3 + math.log2(3) * 4 / 3) / 2)
    assert str(fluency("no no no no no no")) == "0.0"  # not -0.0
    assert fluency("") == fluency("one") == 0
    assert fluency("a, b. C d") == fluency("1 2 3 4 5 6".replace(" ", "\n"))  # signs are words of their own
    metric = Fluency()
    metric.update(["a b c d e", "no no no"])
    assert values(metric)["fluency"] == pytest.approx(fluency("a b c d e") / 2)


def test_means_and_errors_of_many_requests_in_any_batches():
    rng = random.Random(0)  # noqa: S311 - no secret
    rows = [{n: rng.random() for n in "ab" if rng.random() < 0.7} for _ in range(50)]
    metric = RequestMean("ab")
    for first in range(0, 50, 7):
        metric.update(rows[first : first + 7])
    for name in "ab":
        known = [row[name] for row in rows if name in row]
        assert float(metric.compute()[name]) == pytest.approx(fmean(known))
        assert float(metric.standard_errors()[name]) == pytest.approx(stdev(known) / math.sqrt(len(known)))


def test_forward_gives_the_metrics_of_the_batch_alone():
    metric = EditSuccess()
    assert float(metric([RIGHT])["edit_success"]) == 1
    assert float(metric([WRONG])["edit_success"]) == 0
    assert values(metric) == {"edit_success": 0.5}
    metric.reset()
    assert math.isnan(values(metric)["edit_success"])


WORKER = """
import sys, torch
from lit_sparse.editing.metrics import Answer, Portability
torch.distributed.init_process_group("gloo")
right, half, wrong = Answer([1, 2], [1, 2]), Answer([1, 9], [1, 2]), Answer([8, 9], [1, 2])
metric = Portability(["R"])
metric.update([{"R": [[half]]}] if torch.distributed.get_rank() else [{"R": [[right]]}, {}, {"R": [[wrong]]}])
found = {name: float(value) for name, value in metric.compute().items()}
assert found == {"portability": 0.5, "portability/R": 0.5}, found
print("added up")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_add_up(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    done = launch(2, [worker])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("added up") == 2
