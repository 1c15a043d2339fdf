"""lit_sparse.data.chat: formats, truncation, what has a loss, prompts, and what the user is told."""

import json
import logging
from pathlib import Path

import datasets
import pytest
import torch
from chat_templates import BY_HAND, SYSTEM_REFUSED, save_chat_tokenizer, tokens_of
from datasets import Dataset
from transformers import AutoTokenizer

from lit_sparse import ChatData, UsageError

SYSTEM = {"role": "system", "content": "be good"}
CHATS = [
    [("who was it", "the cat"), ("where?", "in the house")],
    [("is it true", "no")],
    [("a film " * 9, "a story " * 7), ("and the dog", "it sat"), ("why", "so")],
]
CALL = {"type": "function", "function": {"name": "find", "arguments": {"size": 1, "of": "cat"}}}
OTHER_CALL = {"type": "function", "function": {"name": "count", "arguments": {"of": ["a", "b"], "size": 2.5}}}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "find", "parameters": {"properties": {"size": {"minimum": 1}, "of": {}}}},
    },
    {
        "type": "function",
        "function": {"name": "count", "parameters": {"properties": {"of": {}, "size": {"minimum": 0.5}}}},
    },
]


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    return save_chat_tokenizer(tmp_path_factory.mktemp("chatml"), BY_HAND["ChatML"][0])


def turns_of(pairs, *first):
    return [
        *first,
        *(
            {"role": role, "content": text}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ),
    ]


def write(rows, name="rows.jsonl"):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def encoded(rows, tokenizer, stage="validate", **arguments):
    """The rows as they are encoded, and the tokenizer."""
    source = {"data_files": {stage.replace("validate", "validation"): write(rows)}} if isinstance(rows, list) else rows
    data = ChatData(**source, tokenizer=tokenizer, **arguments)
    data.setup(stage)
    (split,) = data._prepared[stage.replace("validate", "validation")]
    return split.to_list(), AutoTokenizer.from_pretrained(tokenizer)


def labelled(row):
    """Tokens, and whether they have a loss."""
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    assert row["length"] == len(row["input_ids"])
    return row["input_ids"], [label != -100 for label in row["labels"]]


def in_format(form, pairs):
    if form == "messages":
        return {"messages": turns_of(pairs)}
    if form == "parts":
        return {
            "messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns_of(pairs)]
        }
    if form == "sharegpt":
        names = {"user": "human", "assistant": "gpt"}
        return {"conversations": [{"from": names[t["role"]], "value": t["content"]} for t in turns_of(pairs)], "id": 7}
    ((question, answer),) = pairs
    if form == "texts":
        return {"prompt": question, "completion": answer}
    if form == "prompt_completion":
        (asked, answered) = turns_of(pairs)
        return {"prompt": [asked], "completion": [answered]}
    return {"instruction": question, "output": answer}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("form", ["messages", "parts", "sharegpt", "prompt_completion", "texts", "alpaca"])
def test_formats_give_the_conversations_made_by_hand(form, name, chatml):
    template, by_hand = BY_HAND[name]
    chats = CHATS if form in ("messages", "parts", "sharegpt") else [chat[:1] for chat in CHATS]
    rows, tokenizer = encoded([in_format(form, chat) for chat in chats], chatml, chat_template=template)
    assert [labelled(row) for row in rows] == [tokens_of(tokenizer, by_hand(turns_of(chat))) for chat in chats]


def test_an_input_follows_the_instruction(chatml):
    rows = [
        {"instruction": "add", "input": " 1 and 2\n", "output": "3"},
        {"instruction": "go", "input": "", "output": "a"},
    ]
    found, tokenizer = encoded(rows, chatml)
    chats = [[("add\n 1 and 2\n", "3")], [("go", "a")]]
    assert [labelled(row) for row in found] == [tokens_of(tokenizer, BY_HAND["ChatML"][1](turns_of(c))) for c in chats]


@pytest.mark.parametrize("form", ["messages", "sharegpt", "prompt_completion", "texts", "alpaca"])
def test_a_system_prompt_may_have_its_own_column(form, chatml):
    system = [SYSTEM["content"], "", None, SYSTEM["content"]]
    chats = [CHATS[1], CHATS[1], CHATS[1], [("go", "a")]]
    rows = [{**in_format(form, chat), "system": text} for chat, text in zip(chats, system, strict=True)]
    found, tokenizer = encoded(rows, chatml)
    turns = [turns_of(chat, *[SYSTEM] * bool(text)) for chat, text in zip(chats, system, strict=True)]
    assert [labelled(row) for row in found] == [tokens_of(tokenizer, BY_HAND["ChatML"][1](t)) for t in turns]
    (prompt, *_), _ = encoded(rows, chatml, "predict")
    assert tokenizer.decode(prompt["input_ids"]).startswith("<|im_start|>system\nbe good<|im_end|>\n<|im_start|>user")


def test_only_the_completion_has_a_loss(chatml):
    turns = turns_of(CHATS[0])
    (row,), tokenizer = encoded([{"prompt": turns[:3], "completion": turns[3:]}], chatml)
    _, trained = labelled(row)
    assert (
        tokenizer.decode([t for t, own in zip(row["input_ids"], trained, strict=True) if own])
        == "in the house<|im_end|>"
    )


@pytest.mark.parametrize("name", [name for name in BY_HAND if name not in SYSTEM_REFUSED])
@pytest.mark.parametrize("train_on", ["all", "last"])
def test_long_conversations_lose_their_oldest_turns(name, train_on, chatml):
    template, by_hand = BY_HAND[name]
    tokenizer = AutoTokenizer.from_pretrained(chatml)
    turns = turns_of(CHATS[2], SYSTEM)
    whole = len(tokens_of(tokenizer, by_hand(turns))[0])
    least = tokens_of(tokenizer, by_hand([SYSTEM, *turns[5:]]))[1].index(True) + 1
    for limit in range(least, whole + 2, 11):
        rows, _ = encoded([{"messages": turns}], chatml, chat_template=template, max_length=limit, train_on=train_on)
        shorter = [by_hand([SYSTEM, *turns[start:]]) for start in (1, 3, 5)]
        parts = next((p for p in shorter if len(tokens_of(tokenizer, p)[0]) <= limit), shorter[-1])
        last = max(number for number, (_, own) in enumerate(parts) if own)
        if train_on == "last":
            parts = [(text, number == last) for number, (text, _) in enumerate(parts)]
        ids, trained = tokens_of(tokenizer, parts)
        if name != "plain":  # it cuts the text before answers that have a loss only
            assert labelled(rows[0]) == (ids[:limit], trained[:limit])
        assert len(rows[0]["input_ids"]) <= limit


def test_rows_without_a_token_to_train_are_counted(chatml):
    rows = [{"messages": turns_of(chat)} for chat in CHATS]
    lost = [{"messages": rows[0]["messages"][:1]}, {"messages": turns_of([("one " * 99, "two")])}]
    with pytest.warns(
        UserWarning, match="2 of the 5 rows of the split 'validation' have no turn .* max_length=64: they"
    ):
        found, tokenizer = encoded([lost[0], *rows, lost[1]], chatml, max_length=64)
    # The last question and answer of the third conversation, and the others whole.
    kept = [turns_of(CHATS[0]), turns_of(CHATS[1]), turns_of(CHATS[2][1:])]
    assert [labelled(row) for row in found] == [tokens_of(tokenizer, BY_HAND["ChatML"][1](turns)) for turns in kept]
    with pytest.raises(UsageError, match=r"2 of the 2 rows of the split 'validation' .*: none is left"):
        encoded(lost, chatml, max_length=64)


def test_a_part_of_lost_rows_may_come_first(chatml):
    rows = [{"messages": [{"role": "user", "content": "one"}]}] * 1000 + [{"messages": turns_of(CHATS[1])}]
    with pytest.warns(UserWarning, match="1000 of the 1001 rows"):
        found, _ = encoded(rows, chatml)
    assert len(found) == 1


def test_turns_after_the_last_answer_are_left_out(chatml):
    turns = turns_of(CHATS[0])
    found, _ = encoded([{"messages": turns}, {"messages": [*turns, turns[0]]}], chatml)
    assert found[0] == found[1]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_calls_and_schemas_of_tools_survive_the_file(ending, chatml):
    template, by_hand = BY_HAND["Qwen"]
    turns = turns_of(CHATS[0])
    called = [
        [
            turns[0],
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "so"},
            *turns[1:],
        ]
        for call in (CALL, OTHER_CALL)
    ]
    rows = [{"messages": called[i], "tools": [TOOLS[i]]} for i in (0, 1)]
    rows += [{"messages": turns, "tools": None}, {"messages": turns, "tools": json.dumps(TOOLS)}][
        : 1 if ending == "parquet" else 2
    ]
    file = write(rows)
    if ending == "parquet":
        if not hasattr(datasets, "Json"):
            pytest.skip("this version has no column of JSON")
        nested = datasets.Features({"messages": datasets.Json(), "tools": datasets.Json()})
        file = "rows.parquet"
        Dataset.from_list(rows, features=nested).to_parquet(file)
    found, tokenizer = encoded({"data_files": {"validation": file}}, chatml, chat_template=template)
    schemas = [[TOOLS[0]], [TOOLS[1]], None, TOOLS][: len(rows)]
    chats = [[{**t, "content": t["content"] or ""} for t in row["messages"]] for row in rows]
    expected = [tokens_of(tokenizer, by_hand(chat, tools)) for chat, tools in zip(chats, schemas, strict=True)]
    assert [labelled(row) for row in found] == expected


def test_a_template_that_ignores_tools_is_told(chatml):
    with pytest.warns(UserWarning, match="template does not mention tools: the column 'tools' has no effect"):
        encoded([{"messages": turns_of(CHATS[0]), "tools": TOOLS}], chatml)


def test_a_template_that_does_not_write_calls_is_refused(chatml):
    turns = [{"role": "user", "content": "who"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    with pytest.raises(UsageError, match=r"^Row 1 .* has tool_calls, and the chat template does not write them"):
        encoded([{"messages": turns_of(CHATS[0])}, {"messages": turns}], chatml)


def test_sharegpt_calls_tools_in_json(chatml):
    calls = [CALL["function"], OTHER_CALL["function"]]
    arguments = {"chat_template": BY_HAND["Qwen"][0]}
    for value, made in ((calls[0], [CALL]), (calls, [CALL, OTHER_CALL])):
        openai = [
            {"role": "user", "content": "who"},
            {"role": "assistant", "content": None, "tool_calls": made},
            {"role": "tool", "content": "Tim"},
            {"role": "assistant", "content": "It was Tim"},
        ]
        sharegpt = [
            {"from": "human", "value": "who"},
            {"from": "function_call", "value": json.dumps(value)},
            {"from": "observation", "value": "Tim"},
            {"from": "gpt", "value": "It was Tim"},
        ]
        expected, _ = encoded([{"messages": openai}], chatml, **arguments)
        assert encoded([{"conversations": sharegpt}], chatml, **arguments)[0] == expected


def test_turns_in_a_csv_are_json(chatml):
    Dataset.from_list([{"messages": json.dumps(turns_of(pairs, SYSTEM))} for pairs in CHATS]).to_csv("rows.csv")
    expected, _ = encoded([{"messages": turns_of(pairs, SYSTEM)} for pairs in CHATS], chatml)
    assert encoded({"data_files": {"validation": "rows.csv"}}, chatml)[0] == expected


def test_a_table_fills_in_keys_and_they_are_taken_out(chatml):
    turns = turns_of(CHATS[0])
    turns[1] = {**turns[1], "tool_calls": [CALL]}
    Dataset.from_list([{"messages": turns}]).to_parquet("rows.parquet")
    assert Dataset.from_parquet("rows.parquet")[0]["messages"][0]["tool_calls"] is None
    template, by_hand = BY_HAND["Qwen"]
    found, tokenizer = encoded({"data_files": {"validation": "rows.parquet"}}, chatml, chat_template=template)
    assert labelled(found[0]) == tokens_of(tokenizer, by_hand(turns))


def test_a_developer_is_the_system_of_templates_that_know_none(chatml):
    turns = turns_of(CHATS[0], {"role": "developer", "content": "be good"})
    found, tokenizer = encoded([{"messages": turns}], chatml, chat_template=BY_HAND["Qwen"][0])
    assert tokenizer.decode(found[0]["input_ids"]).startswith("<|im_start|>system\nbe good<|im_end|>")
    own = BY_HAND["ChatML"][0] + "{# developer #}"
    found, _ = encoded([{"messages": turns}], chatml, chat_template=own)
    assert tokenizer.decode(found[0]["input_ids"]).startswith("<|im_start|>developer\nbe good<|im_end|>")


def test_prediction_asks_for_the_last_answer(chatml):
    turns = turns_of(CHATS[0], SYSTEM)
    rows = [{"messages": turns}, {"messages": [*turns, turns[1]]}, {"messages": turns[:2]}]
    data = ChatData(data_files={"predict": write(rows)}, tokenizer=chatml)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert sorted(batch) == ["attention_mask", "input_ids"]
    assert (batch["attention_mask"][:, -1] == 1).all()
    tokenizer = AutoTokenizer.from_pretrained(chatml)
    for row, asked in enumerate((turns[:4], [*turns, turns[1]], turns[:2])):
        ids = batch["input_ids"][row][batch["attention_mask"][row] == 1]
        expected = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        assert ids.tolist() == expected


@pytest.mark.parametrize(
    "row",
    [{"prompt": "who was it"}, {"prompt": [{"role": "user", "content": "who was it"}]}, {"instruction": "who was it"}],
)
def test_prediction_needs_no_answer(row, chatml):
    found, tokenizer = encoded([row], chatml, "predict")
    assert tokenizer.decode(found[0]["input_ids"]) == "<|im_start|>user\nwho was it<|im_end|>\n<|im_start|>assistant\n"


def test_long_prompts_lose_their_oldest_turns(chatml):
    turns = turns_of(CHATS[2], SYSTEM)
    found, tokenizer = encoded([{"messages": turns}], chatml, "predict", max_length=45)
    assert found[0]["input_ids"] == tokenizer.apply_chat_template(
        [SYSTEM, *turns[5:6]], add_generation_prompt=True, return_dict=False
    )
    least = found[0]["length"]
    with pytest.raises(
        UsageError, match=rf"^Row 0 .* has a prompt whose .* are {least} tokens, more than max_length=9: r"
    ):
        encoded([{"messages": turns}], chatml, "predict", max_length=9)


def test_train_batches_are_cached_and_padded(chatml, monkeypatch):
    rows = write([{"messages": turns_of(chat)} for chat in CHATS * 9])
    arguments = {"path": rows, "validation_fraction": 0.2, "tokenizer": chatml, "batch_size": 4}
    data = ChatData(**arguments)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), torch.long
    )
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["attention_mask"].diff(dim=1) <= 0).all()
    monkeypatch.setattr(ChatData, "_encode", lambda *rows, **how: pytest.fail("tokenised again"))
    ChatData(**arguments).setup("fit")
    with pytest.raises(pytest.fail.Exception, match="tokenised again"):
        ChatData(**arguments, chat_template=BY_HAND["Phi"][0]).setup("fit")


def test_conversations_are_packed_without_those_that_are_left_out(chatml):
    rows = [{"messages": turns_of(chat)} for chat in CHATS[:2] * 6] + [{"messages": turns_of(CHATS[0])[:1]}]
    data = ChatData(write(rows), validation_fraction=0.25, packing=True, max_length=128, tokenizer=chatml)
    with pytest.warns(UserWarning, match="1 of the 13 rows"):
        data.setup("fit")
    found = data._prepared["train"][0].to_list()
    assert sum(row["position_ids"].count(0) for row in found) == 9
    assert len(found) < 9


def test_the_format_is_logged_once(chatml, caplog):
    file = write([in_format("sharegpt", CHATS[0])])
    data = ChatData(data_files={"train": file, "validation": file}, tokenizer=chatml)
    with caplog.at_level(logging.INFO):
        data.prepare_data()
        data.setup("fit")
    line = "The split 'validation' of data_files is read as conversations of the format sharegpt."
    assert caplog.text.count(line) == 1


BOTH = {**in_format("messages", CHATS[0]), **in_format("alpaca", CHATS[1])}
FIRST = turns_of(CHATS[0])[0]


@pytest.mark.parametrize(
    ("row", "arguments", "message"),
    [
        (
            {"text": "a"},
            {},
            r"'validation' has the columns of no format\. Its columns are \['text'\]; the formats are messages \(mes",
        ),
        ({"prompt": "a"}, {}, "has the columns of no format"),
        ({"instruction;output": "a"}, {}, "'instruction;output' seems to be separated by ';': separate cells by ','"),
        (BOTH, {}, "several formats .messages, alpaca., so name one as format. Its columns are"),
        ({"text": "a"}, {"format": "alpaca"}, "does not have the columns of the format 'alpaca'"),
        ({"messages": []}, {}, "^Row 1 .* has .* in the column 'messages', not a list of turns.*remove the row"),
        ({"messages": "who"}, {}, "^Row 1 .* has 'who' in the column 'messages', not a list"),
        ({"messages": ["who"]}, {}, r"^Row 1 .* in the column 'messages' a turn 0 .* is 'who', not an object"),
        (
            {"messages": [FIRST, {"role": "bot", "content": "a"}]},
            {},
            "turn 1 .* has the role 'bot': the roles are system",
        ),
        ({"messages": [{"content": "a"}]}, {}, "turn 0 .* has the role None"),
        ({"messages": [FIRST, {"role": "assistant"}]}, {}, "turn 1 .* has no content"),
        (
            {"messages": [FIRST, {"role": "assistant", "content": " "}]},
            {},
            "turn 1 .* an assistant's turn without text",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, {}, "turn 0 .* content that is not text: 3"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}]},
            {},
            "turn 0 .* content that is not text: {'type': 'image'",
        ),
        ({"messages": [{**FIRST, "weight": 0.5}]}, {}, r"turn 0 .* has the weight 0\.5: a turn is trained .1. or not"),
        ({"conversations": [{"from": "function_call", "value": "a"}]}, {}, "turn 0 .* calls a tool by 'a': write JSON"),
        ({"conversations": [{"from": "bing", "value": "a"}]}, {}, "has the role 'bing'"),
        ({"prompt": "", "completion": "a"}, {}, "^Row 1 .* no text in the column 'prompt'"),
        ({"prompt": "a", "completion": {"b": 3}}, {}, "^Row 1 .* has {'b': 3} in the column 'completion', not a list"),
        ({"instruction": "a", "output": None}, {}, "^Row 1 .* no text in the column 'output'"),
        ({"messages": [FIRST], "tools": "{"}, {}, "^Row 1 .* no JSON in the column 'tools'"),
        (
            {"messages": [FIRST], "tools": ["find"]},
            {},
            r"^Row 1 .* has \['find'\] in the column 'tools', not a list",
        ),
        (
            {"messages": turns_of(CHATS[0], SYSTEM), "system": "be bad"},
            {},
            "^Row 1 .* has one system prompt in the column 'system' and another as its first turn: keep one",
        ),
        ({"messages": turns_of(CHATS[0], SYSTEM)}, {"chat_template": BY_HAND["Gemma"][0]}, "System role not supported"),
        (
            {"messages": [FIRST, *turns_of(CHATS[0])]},
            {"chat_template": BY_HAND["Mistral"][0]},
            "^Row 1 .*roles must alternate",
        ),
    ],
)
def test_what_is_wrong_is_named(row, arguments, message, chatml):
    good = {
        column: {"messages": turns_of(CHATS[0]), "conversations": turns_of(CHATS[0]), "tools": None}.get(column, "a")
        for column in row
    }
    with pytest.raises(UsageError, match=message) as caught:
        encoded([good, row], chatml, **arguments)
    assert "\n" not in str(caught.value)


def test_several_formats_are_told_apart_by_the_argument(chatml):
    chats = [encoded([BOTH], chatml, format=form)[0] for form in ("messages", "alpaca")]
    assert len(chats[0][0]["input_ids"]) > len(chats[1][0]["input_ids"])


def test_arguments_are_checked(tmp_path, chatml):
    with pytest.raises(UsageError, match="train_on must be 'all' or 'last'; got 'first'"):
        ChatData("rows.json", train_on="first")
    plain = save_chat_tokenizer(tmp_path / "plain")
    with pytest.raises(UsageError, match="has no chat template: give one as chat_template"):
        encoded([{"messages": turns_of(CHATS[0])}], plain)


@pytest.mark.parametrize("turns", [[turns_of(CHATS[0])[1]], [turns_of(CHATS[0])[1], FIRST]])
def test_a_prompt_needs_a_turn(turns, chatml):
    if turns[-1]["role"] == "assistant":
        with pytest.raises(UsageError, match=r"Row 0 .* has no turn before the assistant's"):
            encoded([{"messages": turns}], chatml, "predict")
    else:
        assert encoded([{"messages": turns}], chatml, "predict")[0][0]["length"] > 0
