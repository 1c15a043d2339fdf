"""Rows that are conversations are told from broken ones by every data module that reads text."""

import json

import pytest
from backbones import save_tiny_causal_tokenizer, save_tiny_tokenizer

import lit_sparse as ls
from lit_sparse import UsageError

OPENAI = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Tim"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Tim"}], "id": 3}
PARTS = {"messages": [{"role": "user", "content": [{"type": "text"}]}, {"role": "assistant", "content": "Tim"}]}
MODULES = [
    ls.InstructionData,
    ls.TextClassificationData,
    ls.TokenClassificationData,
    ls.QuestionAnsweringData,
    ls.MultipleChoiceData,
    ls.MaskedLMData,
    ls.Seq2SeqData,
]


def write(folder, rows):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"train": str(file), "validation": str(file)}


@pytest.mark.parametrize("row", [OPENAI, SHAREGPT, PARTS], ids=["OpenAI", "ShareGPT", "parts"])
@pytest.mark.parametrize("kind", MODULES)
def test_chat_rows_are_refused_with_what_to_do(kind, row, tmp_path):
    data = kind(data_files=write(tmp_path, [row] * 4), tokenizer=save_tiny_tokenizer(tmp_path / "tokenizer"))
    column = next(iter(row))
    with pytest.raises(
        UsageError, match=f"holds conversations, in the column '{column}': lit_sparse.ChatData reads these"
    ):
        data.setup("fit")


@pytest.mark.parametrize("template", ["{messages}", "{messages[0][content]}"])
def test_so_they_are_where_a_template_names_them(template, tmp_path):
    data = ls.InstructionData(
        data_files=write(tmp_path, [{**OPENAI, "output": "x"}] * 4),
        template=template,
        tokenizer=save_tiny_tokenizer(tmp_path / "tokenizer"),
    )
    with pytest.raises(UsageError, match="holds conversations, in the column 'messages'"):
        data.setup("fit")


def test_a_conversation_beside_the_columns_that_are_read_does_no_harm(tmp_path):
    tokenizer = save_tiny_causal_tokenizer(tmp_path / "tokenizer", add_bos=True, pad_token="<pad>")  # noqa: S106
    rows = [{**OPENAI, "instruction": "Who?", "output": "Tim"}] * 4
    data = ls.InstructionData(data_files=write(tmp_path, rows), tokenizer=tokenizer)
    data.setup("fit")
    assert len(data.train_dataloader().dataset) == 4
