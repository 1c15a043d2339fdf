"""lit_sparse.data.answers: what counts as the answer in generated text."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_sparse.data.answers import RULES, Choice, Letter, Number

REAL = os.environ.get("LIT_SPARSE_REASONING_DATA")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("the correct answer is answer2", "answer2"),
        ("Answer1, because answer2 is not", "answer1"),
        ("answer12", None),
        ("It is answer3.", None),
        ("", None),
    ],
)
def test_a_choice_is_the_first_whole_word_of_its_words(text, answer):
    assert Choice(["answer1", "answer2"]).find(text) == answer


def test_untrue_is_not_true():
    rule = RULES["boolq"]
    assert rule.find("That is untrue: false") == "false"
    assert rule.right("the correct answer is TRUE", "true")
    assert not rule.right("I do not know", "true")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A train leaves at 5. So the answer is (C).", "C"),
        ("The answer is B", "B"),
        ("the answer is option D.", "D"),
        ("Answer: E", "E"),
        ("At first the answer is A, but then the answer is B", "B"),
        ("(A) is too small, so it must be (D)", "D"),
        ("Add both: B", "B"),
        ("none of them", None),
        ("ABLE", None),
    ],
)
def test_the_letter_is_that_of_the_conclusion(text, letter):
    assert Letter().find(text) == letter


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 4 apples and eats 1. The answer is 3.", "3"),
        ("The answer is $1,234.50.", "1234.50"),
        ("5-3", "3"),
        ("10 - 4 = 6 dollars", "6"),
        ("x = -3", "-3"),
        ("(-2)", "-2"),
        ("1.8333333333333335", "1.8333333333333335"),
        (".5", ".5"),
        ("about 1e3", "1e3"),
        ("none", None),
    ],
)
def test_the_number_is_the_last_one(text, number):
    assert Number().find(text) == number


def test_numbers_are_compared_by_value():
    assert Number().right("so 15", "15.0")
    assert Number().right("1.8333", "1.8333333333333335")
    assert not Number().right("1.83", "1.8333333333333335")
    assert not Number().right("nothing", "3")
    assert not Number().right("3", "nothing")


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{:d}", "{:,d}", "{:d}.0", "${:,d}."]))
def test_a_number_is_found_as_people_write_it(number, form):
    written = form.format(number) if "$" not in form else form.format(abs(number))
    assert float(Number().find(f"It was 7, then 8; the answer is {written}")) == (
        abs(number) if "$" in form else number
    )


@pytest.mark.skipif(REAL is None, reason="LIT_SPARSE_REASONING_DATA names no folder with LLM-Adapters' data sets")
def test_every_gold_string_of_the_real_test_files_is_found():
    seen = 0
    for name, rule in RULES.items():
        for file in Path(REAL).rglob(f"{name}/test.json"):
            for row in json.loads(file.read_text()):
                assert rule.right(row["answer"], row["answer"]), (name, row["answer"])
                seen += 1
                if isinstance(rule, Choice):  # the sentence to train on; of the others it is no gold
                    assert rule.right(row["output"], row["answer"]), (name, row["output"])
    assert seen > 0
