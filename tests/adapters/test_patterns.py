"""lit_sparse.adapters.patterns against ``re`` and against PEFT's own function, and what could make it hang."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from lit_sparse.adapters.patterns import NamePatterns
from lit_sparse.errors import UsageError

NAMES = [
    f"model.layers.{block}.{layer}"
    for block in (0, 1, 2, 12)
    for layer in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
] + ["lm_head", "q_proj", "vision.model.layers.1.self_attn.q_proj", "model.layers.1_"]


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "model.layers.1.self_attn.q_proj",
        r"^model\.layers\.1\.self_attn\.q_proj",
        r"(?:model\.layers\.1\.self_attn\.q_proj)|(?:lm_head)",
        r".*\.(q|k)_proj",
        r"^(?!.*vision).*(?:q_proj|up_proj)$",
        r"(?=.*mlp)model.*",
        r".*layers\.(0|1[0-9])\..*q_proj",
        r"layers\.\d+\.\w+\.[qk]_proj",
        r"[^.]+_[a-z]{4}",
        r".*?\D\.\S+",
        r"(?P<part>lm)_head\Z|x{2,}?",
        r"layers.1\w?",
    ],
)
def test_a_pattern_matches_what_re_and_peft_match(pattern):
    """PEFT looks for the key of rank_pattern and alpha_pattern by ``(.*\\.)?(key)$``."""
    whole, tails = NamePatterns("pattern"), NamePatterns("pattern", tails=True)
    found = [name for name in NAMES if whole.matches(pattern, name)]
    assert found == [name for name in NAMES if re.fullmatch(pattern, name)]
    found = [name for name in NAMES if tails.matches(pattern, name)]
    assert found == [name for name in NAMES if get_pattern_key([pattern], name) == pattern]
    assert found


pieces = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", r"\d", "^", "$", "(?=a)", "(?!b)"])
repeated = st.tuples(pieces, st.sampled_from(["", "*", "+?", "?", "{2}", "{1,3}"]))
sequences = st.lists(repeated, max_size=4).map(lambda parts: "".join(p + r * (p not in "^$") for p, r in parts))
groups = st.tuples(sequences, sequences, st.sampled_from(["", "*", "+", "{0,2}"])).map(
    lambda g: f"({g[0]}|{g[1]}){g[2]}"
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(parts=st.lists(sequences | groups, max_size=3), name=st.text("ab.1", max_size=6))
def test_any_pattern_matches_as_in_re(parts, name):
    pattern = "".join(parts)
    assert NamePatterns("pattern").matches(pattern, name) == (re.fullmatch(pattern, name) is not None)


@pytest.mark.parametrize(
    "pattern", [r"([a-z0-9._]+)+\d!", r"(.*)*x", r"(a|a)*b", r"(\w+\.?)+!", r"(x?){1000}y", "(a|a)" * 90 + "b"]
)
def test_no_pattern_takes_exponential_time(pattern):
    started = time.process_time()
    assert not NamePatterns("pattern", tails=True).matches(pattern, "a" * 60 + ".layers.10.self_attn.q_proj")
    assert time.process_time() - started < 2


def test_many_costly_patterns_are_refused(monkeypatch):
    monkeypatch.setattr("lit_sparse.adapters.patterns._MOST_STEPS", 10_000)
    patterns, costly = NamePatterns("rank_pattern"), [rf"(((.*a)*b?)*c?)*{number}" for number in range(100)]
    with pytest.raises(
        UsageError, match=r"rank_pattern '.*' takes too long to match\. Give simpler or fewer patterns\."
    ):
        [patterns.matches(pattern, "model.layers.11.self_attn.q_proj") for pattern in costly]


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", "is not a valid regular expression: missing"),
        ("(" * 1500, "is not a valid regular expression"),
        ("a{99999999999999999999}", "is not a valid regular expression: the repetition number is too large"),
        ("a*" * 1500, "is longer than 2000 characters"),
        (r"(a)\1", "uses groupref, which"),
        ("(?i)a", "uses flags, which"),
        ("(?i:a)", "uses flags, which"),
        (r"\bq", "uses word boundaries, which"),
        ("(?<=a)b", "uses look-behind, which"),
    ],
)
def test_what_cannot_be_matched_is_refused(pattern, reason):
    with pytest.raises(UsageError, match=rf"target_modules '.*' {reason}"):
        NamePatterns("target_modules").matches(pattern, "aa")
