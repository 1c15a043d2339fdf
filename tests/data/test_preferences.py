"""lit_sparse.data.preferences: the tokens of pairs in every form, what the loss sees, what is cut and said."""

import logging

import chat_templates
import pytest
import torch
from backbones import save_tiny_causal_tokenizer
from datasets import Dataset
from transformers import AutoTokenizer

from lit_sparse import PreferenceData, UsageError

ROWS = [
    {"prompt": "Is the film good?", "chosen": " It is great.", "rejected": " no"},
    {"prompt": "Who was in the house?", "chosen": " a man", "rejected": " a dog and a cat and a man"},
]
ROWS_IN_TURNS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        **{side: [{"role": "assistant", "content": row[side].strip()}] for side in ("chosen", "rejected")},
    }
    for row in ROWS
]
CONVERSATIONS = [
    {"score": 1.5, "prompt": "not read", **{side: row["prompt"] + row[side] for side in ("chosen", "rejected")}}
    for row in ROWS_IN_TURNS
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny_causal_tokenizer(tmp_path_factory.mktemp("llama"), add_bos=True, pad_token="<pad>")  # noqa: S106


@pytest.fixture(scope="module")
def chat(llama, tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = chat_templates.CHATML
    folder = tmp_path_factory.mktemp("chat")
    tokenizer.save_pretrained(folder)
    return str(folder)


def batch_of(rows, write, stage="validate", **arguments):
    file = write(rows)
    data = PreferenceData(data_files={"validation": file, "predict": file}, **arguments)
    data.setup(stage)
    return next(iter(data.val_dataloader() if stage == "validate" else data.predict_dataloader()))


def parts(tokenizer, batch, row, side):
    """The texts of the tokens without and with a loss, less the padding."""
    ids, mask, labels = (batch[name][row, side] for name in ("input_ids", "attention_mask", "labels"))
    assert (mask.diff() <= 0).all(), "padding is on the right"
    assert (labels[mask == 0] == -100).all()
    ids, labels = ids[mask == 1], labels[mask == 1]
    answered = labels != -100
    assert torch.equal(labels[answered], ids[answered])
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    return tokenizer.decode(ids[~answered]), tokenizer.decode(ids[answered])


def test_texts_become_a_prompt_and_two_answers(write, llama):
    batch = batch_of(ROWS, write, tokenizer=llama)
    assert {name: (value.dtype, value.shape[:2]) for name, value in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (torch.long, (2, 2))
    )
    for row, texts in enumerate(ROWS):
        for side, name in enumerate(("chosen", "rejected")):
            assert parts(llama, batch, row, side) == (f"<s>{texts['prompt']}", f"{texts[name]}</s>")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    first = batch["input_ids"][0, 0][batch["attention_mask"][0, 0] == 1]
    assert first.tolist() == [*tokenizer("Is the film good? It is great.")["input_ids"], tokenizer.eos_token_id]


def test_a_template_and_columns_of_ones_own(write, llama):
    rows = [{"q": "What is it?", "good": "a dog", "bad": "a cat"}]
    batch = batch_of(rows, write, tokenizer=llama, template="Q: {q} A: ", chosen="good", rejected="bad")
    assert parts(llama, batch, 0, 0) == ("<s>Q: What is it? A: ", "a dog</s>")
    assert parts(llama, batch, 0, 1) == ("<s>Q: What is it? A: ", "a cat</s>")


@pytest.mark.parametrize("rows", [ROWS_IN_TURNS, CONVERSATIONS], ids=["turns", "conversations"])
def test_turns_are_written_by_the_chat_template(rows, write, chat):
    batch = batch_of(rows, write, tokenizer=chat)
    tokenizer = AutoTokenizer.from_pretrained(chat)
    for row, texts in enumerate(ROWS):
        prompt = [{"role": "user", "content": texts["prompt"]}]
        for side, name in enumerate(("chosen", "rejected")):
            turns = [*prompt, {"role": "assistant", "content": texts[name].strip()}]
            whole = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
            asked = tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=False, add_generation_prompt=True)
            ids = batch["input_ids"][row, side][batch["attention_mask"][row, side] == 1].tolist()
            labels = batch["labels"][row, side][batch["attention_mask"][row, side] == 1].tolist()
            end = whole.index(tokenizer.convert_tokens_to_ids("<|im_end|>"), len(asked)) + 1
            assert ids == whole[:end]  # without the line break after the last turn
            assert labels == [-100] * len(asked) + whole[len(asked) : end]


def test_the_chat_format_goes_to_the_model(write, chat, llama):
    for rows, expected in ((ROWS_IN_TURNS, chat_templates.CHATML), (ROWS, None)):
        data = PreferenceData(data_files={"validation": write(rows)}, tokenizer=chat)
        data.setup("validate")
        assert (data.chat_format or {}).get("template") == expected


def test_answers_in_turns_to_a_prompt_that_is_a_text(write, chat):
    rows = [{**turns, "prompt": texts["prompt"]} for turns, texts in zip(ROWS_IN_TURNS, ROWS, strict=True)]
    batch, same = batch_of(rows, write, tokenizer=chat), batch_of(ROWS_IN_TURNS, write, tokenizer=chat)
    assert all(torch.equal(batch[name], same[name]) for name in same)


@pytest.mark.parametrize("rows", [ROWS_IN_TURNS, CONVERSATIONS], ids=["turns", "conversations"])
def test_prediction_gets_the_prompts_of_turns(rows, write, chat):
    batch = batch_of(rows, write, "predict", tokenizer=chat)
    tokenizer = AutoTokenizer.from_pretrained(chat)
    assert sorted(batch) == ["attention_mask", "input_ids"]
    texts = tokenizer.batch_decode(
        [ids[mask == 1] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    )
    assert texts == [f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n" for row in ROWS]


def test_prediction_gets_prompts_that_are_texts(write, llama):
    batch = batch_of([{"prompt": "one"}, {"prompt": "Who was it?"}], write, "predict", tokenizer=llama)
    assert (batch["attention_mask"][:, -1] == 1).all()
    ids = batch["input_ids"][0][batch["attention_mask"][0] == 1]
    assert AutoTokenizer.from_pretrained(llama).decode(ids) == "<s>one"


def test_both_answers_keep_the_same_end_of_a_long_prompt(write, llama, caplog):
    rows = [{"prompt": "one two three " * 20 + "the end:", "chosen": " a man", "rejected": " a dog and a cat"}, ROWS[0]]
    with caplog.at_level(logging.INFO):
        batch = batch_of(rows, write, tokenizer=llama, max_length=16)
    heads, answers = zip(*(parts(llama, batch, 0, side) for side in (0, 1)), strict=True)
    assert heads[0] == heads[1]
    assert heads[0].startswith("<s>")
    assert heads[0].endswith("the end:")
    assert answers == (" a man</s>", " a dog and a cat</s>")
    assert batch["attention_mask"][0].sum(-1).max() == 16
    assert "1 of 2 rows for validation are longer than max_length (16 tokens)" in caplog.text


def test_a_long_answer_loses_its_end(write, llama, caplog):
    rows = [{"prompt": "one", "chosen": " two three" * 20, "rejected": " no"}]
    with caplog.at_level(logging.INFO):
        batch = batch_of(rows, write, tokenizer=llama, max_length=8)
    assert parts(llama, batch, 0, 0)[0] == parts(llama, batch, 0, 1)[0] == ""
    assert parts(llama, batch, 0, 0)[1].startswith(" two three")
    assert "</s>" not in parts(llama, batch, 0, 0)[1]
    assert parts(llama, batch, 0, 1)[1] == " no</s>"
    assert "1 of 1 rows" in caplog.text


def test_nothing_is_said_where_nothing_is_cut(write, llama, caplog):
    with caplog.at_level(logging.INFO):
        batch_of(ROWS, write, tokenizer=llama)
    assert "max_length" not in caplog.text


def test_splits_have_the_names_of_the_source(llama, tmp_path):
    """As on the hub, whose folders are read the same."""
    sides = {side: [row[side] for row in ROWS * 4] for side in ("prompt", "chosen", "rejected")}
    names = ("train_prefs", "test_prefs", "train_sft")
    for name in names:
        Dataset.from_dict(sides).to_parquet(tmp_path / "hub" / f"{name}-00000-of-00001.parquet")
    splits = {"train": "train_prefs", "validation": "test_prefs"}
    data = PreferenceData(str(tmp_path / "hub"), splits=splits, tokenizer=llama, batch_size=4)
    data.setup("fit")
    assert [len(batch["labels"]) for batch in data.train_dataloader()] == [4, 4]
    assert sum(len(batch["labels"]) for batch in data.val_dataloader()) == 8
    for wrong in ({"train": "train_dpo"}, {"training": "train_prefs"}):
        with pytest.raises(UsageError, match="splits names the split of the source for some of train, valid"):
            PreferenceData(str(tmp_path / "hub"), splits=wrong, tokenizer=llama).setup("fit")


def refused(rows, write, match, **arguments):
    with pytest.raises(UsageError, match=match) as caught:
        batch_of(rows, write, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_missing_and_empty_answers_name_their_place(side, write, llama, chat):
    refused([{**ROWS[0], side: " "}], write, f"Row 0 .* has no text in the column '{side}'", tokenizer=llama)
    without = [{name: text for name, text in row.items() if name != side} for row in ROWS]
    refused(without, write, f"has no column '{side}'", tokenizer=llama)
    without = [{name: turns for name, turns in row.items() if name != side} for row in ROWS_IN_TURNS]
    refused(without, write, f"has no column '{side}'", tokenizer=chat)
    asked = {**ROWS_IN_TURNS[0], side: ROWS_IN_TURNS[0]["prompt"]}
    refused([asked], write, f"Row 0 .* ends with a turn of 'user' in the column '{side}'", tokenizer=chat)


def test_conversations_may_differ_in_the_last_turn_alone(write, chat):
    other = [{"role": "user", "content": "Another?"}, *ROWS_IN_TURNS[0]["rejected"]]
    refused([{**CONVERSATIONS[0], "rejected": other}], write, "differ before their last turns", tokenizer=chat)


def test_an_answer_needs_a_prompt(write, chat):
    rows = [{side: row[side] for side in ("chosen", "rejected")} for row in ROWS_IN_TURNS]
    refused(rows, write, "Row 0 .* without a question .* there is no column 'prompt'", tokenizer=chat)


@pytest.mark.parametrize("columns", [("prompt",), ("chosen",), ("rejected",), ("prompt", "chosen")])
def test_a_text_among_turns_is_one_of_them(columns, write, chat):
    rows = [
        {**turns, **{column: text[column].strip() for column in columns}}
        for text, turns in zip(ROWS, ROWS_IN_TURNS, strict=True)
    ]
    expected, batch = (batch_of(given, write, tokenizer=chat) for given in (ROWS_IN_TURNS, rows))
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["labels"], expected["labels"])


@pytest.mark.parametrize("stage", ["validate", "predict"])
@pytest.mark.parametrize("rows", [ROWS_IN_TURNS, CONVERSATIONS], ids=["turns", "conversations"])
def test_a_system_prompt_may_have_its_own_column(rows, stage, write, chat):
    batch = batch_of([{**row, "system": "be good"} for row in rows], write, stage, tokenizer=chat)
    ids = batch["input_ids"][0, 0] if stage == "validate" else batch["input_ids"][0][batch["attention_mask"][0] == 1]
    text = AutoTokenizer.from_pretrained(chat).decode(ids)
    assert text.startswith("<|im_start|>system\nbe good<|im_end|>\n<|im_start|>user\nIs the film good?<|im_end|>")


def test_a_developer_is_the_system_and_tools_are_given(write, chat):
    turns = [{"role": "developer", "content": "be good"}]
    rows = [
        {side: [*turns, *row[side]] for side in ("chosen", "rejected")} | {"tools": [{"name": "find"}]}
        for row in CONVERSATIONS
    ]
    batch = batch_of(rows, write, tokenizer=chat, chat_template=chat_templates.QWEN)
    prompt, answer = parts(chat, batch, 0, 0)
    assert prompt.startswith('<|im_start|>system\nbe good\n\n# Tools\n\n<tools>\n{"name": "find"}')
    assert answer == "It is great.<|im_end|>"


def test_turns_need_a_chat_template(write, llama):
    refused(ROWS_IN_TURNS, write, "has no chat template", tokenizer=llama)
    batch = batch_of(ROWS_IN_TURNS, write, tokenizer=llama, chat_template=chat_templates.MISTRAL)
    assert parts(llama, batch, 0, 1) == ("<s>[INST] Is the film good? [/INST]", " no</s>")
