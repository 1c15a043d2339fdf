"""lit_sparse.data.chat_template: conversations as tokens, against those made by hand."""

import json
from itertools import groupby

import chat_templates
import pytest
from chat_templates import BY_HAND, SYSTEM_REFUSED, save_chat_tokenizer, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer

from lit_sparse import UsageError
from lit_sparse.data.chat_template import ChatTemplate
from lit_sparse.data.readers import Place, errors_in

PLACE = Place("train", 3)
SYSTEM = [{"role": "system", "content": "be good"}]
TURNS = [
    {"role": "user", "content": "who was it"},
    {"role": "assistant", "content": "the cat"},
    {"role": "user", "content": "where, and how?"},
    {"role": "assistant", "content": "in the house.\n\nVery well."},
]
CALL = {"type": "function", "function": {"name": "find", "arguments": {"of": "cat", "size": 1}}}
TOOL_TURNS = [
    TURNS[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "a tree"},
    {"role": "tool", "content": ""},
    *TURNS[1:],
]
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def spans(tokenizer, ids, trained):
    """The texts of the runs of trained tokens."""
    runs = groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for own, run in runs if own]


@pytest.mark.parametrize(
    ("name", "turns"),
    [
        *((name, turns) for name in BY_HAND for turns in (TURNS, TURNS[:2])),
        *((name, SYSTEM + TURNS) for name in BY_HAND if name not in SYSTEM_REFUSED),
    ],
)
def test_conversations_are_those_made_by_hand(name, turns, tokenizer):
    template, by_hand = BY_HAND[name]
    chat = ChatTemplate(tokenizer, template)
    ids, trained = chat.conversation(turns)
    assert (ids, trained) == tokens_of(tokenizer, by_hand(turns))
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(turns, tokenize=False)
    assert sum(token == tokenizer.bos_token_id for token in ids) == ("bos_token" in template)
    if name == "plain" and len(turns) > 2:
        return  # a prompt is cut nowhere, and so not before earlier answers
    asked = chat.prompt(turns[:-1])
    assert ids[: len(asked)] == asked
    assert (trained[len(asked) - 1], trained[len(asked)]) == (False, True)


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_calls_of_tools_are_trained_and_results_are_not(tools, tokenizer):
    template, by_hand = BY_HAND["Qwen"]
    ids, trained = ChatTemplate(tokenizer, template).conversation(TOOL_TURNS, tools)
    assert (ids, trained) == tokens_of(tokenizer, by_hand(TOOL_TURNS, tools))
    called = f"<tool_call>\n{json.dumps(CALL['function'])}\n</tool_call>"
    # The generation prompt ends in a line, which this template writes before a call as well.
    assert spans(tokenizer, ids, trained) == [
        f"{called}\n{called}<|im_end|>",
        "the cat<|im_end|>",
        f"{TURNS[-1]['content']}<|im_end|>",
    ]
    assert ("find" in tokenizer.decode(ids).split("<|im_end|>")[0]) == (tools is not None)


@pytest.mark.parametrize("name", BY_HAND)
def test_only_turns_from_the_first_on_count(name, tokenizer):
    template, by_hand = BY_HAND[name]
    parts = by_hand(TURNS)
    answers = [number for number, (_, own) in enumerate(parts) if own]
    parts = [(text, number == answers[-1]) for number, (text, _) in enumerate(parts)]
    for first in (2, 3):
        assert ChatTemplate(tokenizer, template).conversation(TURNS, first=first) == tokens_of(tokenizer, parts)
    assert not any(ChatTemplate(tokenizer, template).conversation(TURNS, first=4)[1])


@pytest.mark.parametrize("name", BY_HAND)
def test_a_turn_of_weight_zero_is_context(name, tokenizer):
    template, by_hand = BY_HAND[name]
    parts = by_hand(TURNS)
    answers = [number for number, (_, own) in enumerate(parts) if own]
    for out in range(len(answers)):
        turn = [number for number, turn in enumerate(TURNS) if turn["role"] == "assistant"][out]
        turns = [{**t, "weight": int(number != turn)} for number, t in enumerate(TURNS)]
        expected = [(text, own and number != answers[out]) for number, (text, own) in enumerate(parts)]
        assert ChatTemplate(tokenizer, template).conversation(turns) == tokens_of(tokenizer, expected)


def test_a_greeting_is_context(tokenizer):
    chat = ChatTemplate(tokenizer, chat_templates.CHATML)
    ids, trained = chat.conversation([{"role": "assistant", "content": "hello"}, *TURNS])
    assert spans(tokenizer, ids, trained) == ["the cat<|im_end|>", f"{TURNS[-1]['content']}<|im_end|>"]


def test_thinking_that_the_template_drops(tokenizer):
    turns = [{**turn, "content": f"<think>\nhm\n</think>\n\n{turn['content']}"} for turn in TURNS]
    chat = ChatTemplate(tokenizer, chat_templates.THINKING)
    with pytest.warns(UserWarning, match="trained as they stand in the conversation"):
        ids, trained = chat.conversation([TURNS[0], turns[1], TURNS[2], turns[3]])
    assert spans(tokenizer, ids, trained) == ["the cat<|im_end|>", f"{turns[-1]['content']}<|im_end|>"]
    ids, trained = chat.conversation(TURNS, first=3)
    assert spans(tokenizer, ids, trained) == [f"<think>\n\n</think>\n\n{TURNS[-1]['content']}<|im_end|>"]


def test_a_template_that_moves_what_it_wrote(tokenizer):
    chat = ChatTemplate(tokenizer, chat_templates.MOVING)
    match = r"^Row 3 .* 'train' cannot be trained: the chat template renders what precedes turn 2 .*last turn"
    with pytest.raises(UsageError, match=match), errors_in(PLACE):
        chat.conversation(SYSTEM + TURNS)
    ids, trained = chat.conversation(SYSTEM + TURNS, first=4)
    assert spans(tokenizer, ids, trained) == [f" {TURNS[-1]['content']}</s>"]
    marked = chat_templates.MOVING.replace(
        "{{- ' ' + message.content + eos_token }}", "{% generation %}x{% endgeneration %}"
    )
    with pytest.raises(UsageError, match="what precedes turn 4"):
        ChatTemplate(tokenizer, marked).conversation([*SYSTEM, *TURNS, TURNS[0]], first=3)


@pytest.mark.parametrize("name", ["CHATML", "MARKED"])
def test_generation_prompts_may_open_the_thinking_that_turns_lack(name, tokenizer):
    template = getattr(chat_templates, name).replace("|>assistant\\n'", "|>assistant\\n<think>\\n'")
    chat = ChatTemplate(tokenizer, template)
    assert tokenizer.decode(chat.prompt(TURNS[:1])).endswith("<|im_start|>assistant\n<think>\n")
    with pytest.warns(UserWarning, match="trained as they stand in the conversation"):
        ids, trained = chat.conversation(TURNS, first=3)
    assert spans(tokenizer, ids, trained) == [f"{TURNS[-1]['content']}<|im_end|>"]


def test_the_last_turn_may_end_with_a_token_of_its_own(tokenizer):
    end = "('<|end|>' if message.role == 'assistant' and not loop.last else '<|im_end|>')"
    chat = ChatTemplate(tokenizer, chat_templates.CHATML.replace("'<|im_end|>'", end))
    ids, trained = chat.conversation(TURNS)
    assert spans(tokenizer, ids, trained) == ["the cat<|end|>", f"{TURNS[-1]['content']}<|im_end|>"]


def test_several_tokens_may_end_a_turn(tokenizer):
    chat = ChatTemplate(tokenizer, chat_templates.CHATML.replace("<|im_end|>", "<|end|><|im_end|>"))
    ids, trained = chat.conversation(TURNS)
    assert spans(tokenizer, ids, trained) == [f"{turn['content']}<|end|><|im_end|>" for turn in TURNS[1::2]]
    assert tokenizer.decode([chat.end_id]) == "<|im_end|>"


def test_another_token_than_usual_may_end_a_turn(tokenizer):
    template = chat_templates.CHATML.replace(
        "'<|im_end|>' + '\\n'", "('<|eot_id|>' if message.tool_calls else '<|im_end|>') + '\\n'"
    )
    turns = [TURNS[0], {**TURNS[1], "tool_calls": [CALL]}, {"role": "tool", "content": "x"}, TURNS[1]]
    ids, trained = ChatTemplate(tokenizer, template).conversation(turns)
    assert spans(tokenizer, ids, trained) == ["the cat<|eot_id|>", "the cat<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "turns", "reason"),
    [
        ("Gemma", SYSTEM + TURNS, "System role not supported"),
        ("Mistral", SYSTEM + TURNS, "Conversation roles must alternate"),
        ("Mistral", TURNS[:1] * 2, "Conversation roles must alternate"),
        ("ChatML", [{"role": "user", "content": 3}], "can only concatenate str"),
        ("ChatML", [], "empty conversation"),
    ],
)
def test_what_the_template_refuses_is_named(name, turns, reason, tokenizer):
    chat = ChatTemplate(tokenizer, BY_HAND[name][0])
    for refused in (chat.prompt, chat.conversation):
        match = rf"^Row 3 .*'train' does not suit the chat template \(.*{reason}"
        with pytest.raises(UsageError, match=match) as caught, errors_in(PLACE):
            refused(turns)
        assert "\n" not in str(caught.value)


def test_a_slow_tokenizer_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(UsageError, match="Conversations need a fast tokenizer"):
        ChatTemplate(tokenizer, chat_templates.CHATML)


def test_templates_come_from_the_tokenizer_a_text_or_a_file(tokenizer, tmp_path):
    with pytest.raises(UsageError, match="no chat template: give one as chat_template"):
        ChatTemplate(tokenizer)
    (tmp_path / "own.jinja").write_text(chat_templates.CHATML)
    assert ChatTemplate(tokenizer, str(tmp_path / "own.jinja")).text == chat_templates.CHATML
    assert ChatTemplate(tokenizer).text == chat_templates.CHATML
    for wrong in ("missing.jinja", "chatml", str(tmp_path)):
        with pytest.raises(UsageError, match=r"chat_template must be .* the path of an existing \.jinja file; got"):
            ChatTemplate(tokenizer, wrong)
    with pytest.raises(UsageError, match=r"no valid Jinja: .* \(line 2\)"):
        ChatTemplate(tokenizer, "{{ messages }}\n{% for %}")


texts = st.text("ab \n.é", min_size=1).filter(str.strip)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4), st.sampled_from(["ChatML", "plain", "Phi", "marked"]))
def test_spans_are_the_answers_whatever_they_hold(folder, pairs, name):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template, by_hand = BY_HAND[name]
    turns = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    ids, trained = ChatTemplate(tokenizer, template).conversation(turns)
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer.decode(ids) == rendered
    assert spans(tokenizer, ids, trained) == [text for text, own in by_hand(turns) if own]
    if name != "marked":
        whole = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        asked = [ChatTemplate(tokenizer).prompt(turns[:i]) for i in range(1, len(turns), 2)]
        fits = all(whole[: len(prompt)] == prompt for prompt in asked)
        assert ids == (whole if fits else tokens_of(tokenizer, by_hand(turns))[0])


@pytest.mark.parametrize("space", [True, False])
def test_a_tokenizer_whose_offsets_leave_out_spaces(space, tokenizer):
    template, by_hand = BY_HAND["plain"]
    post = tokenizer.backend_tokenizer.post_processor
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), post])
    if not space:
        template = template.replace("'assistant: '", "'assistant:'")
    ids, trained = ChatTemplate(tokenizer, template).conversation(TURNS)
    answers = [("" if space else " ") + text for text, own in by_hand(TURNS) if own]
    assert spans(tokenizer, ids, trained) == answers
    whole = tokenizer.apply_chat_template(TURNS, return_dict=False)
    assert (ids == whole) == (not space)
