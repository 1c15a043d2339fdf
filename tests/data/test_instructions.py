"""lit_sparse.data.instructions: what the loss sees, what is cut, and what the user is told."""

import pytest
import torch
from backbones import save_tiny_causal_tokenizer, save_tiny_tokenizer
from tokenizers import processors
from transformers import AutoTokenizer

from lit_sparse import InstructionData, UsageError

ROWS = [
    {"instruction": "Is the film good?", "input": "", "output": "no"},
    {"instruction": "Is it true?", "input": "The cat sat.\nThe dog runs.", "output": "It is {true}."},
    {"instruction": "Who was in the house?", "input": None, "output": "a man and a woman"},
]
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nIs the film good?\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nIs it true?\n\n### Input:\nThe cat sat.\nThe dog runs.\n\n### Response:\n"
)
QUESTION = "Q: {instruction} A: "


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny_causal_tokenizer(tmp_path_factory.mktemp("llama"), add_bos=True, pad_token="<pad>")  # noqa: S106


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return save_tiny_causal_tokenizer(tmp_path_factory.mktemp("gpt2"), add_bos=False, pad_token=None)


def batch_of(rows, write, stage="validate", **arguments):
    file = write(rows)
    data = InstructionData(data_files={"validation": file, "predict": file}, **arguments)
    data.setup(stage)
    return next(iter(data.val_dataloader() if stage == "validate" else data.predict_dataloader()))


def decode(tokenizer, ids):
    return AutoTokenizer.from_pretrained(tokenizer).decode(ids)


def parts(batch, row):
    """The unpadded ids of a row, apart as those without and those with a loss."""
    ids = batch["input_ids"][row][batch["attention_mask"][row] == 1]
    labels = batch["labels"][row][batch["attention_mask"][row] == 1]
    answered = labels != -100
    assert torch.equal(labels[answered], ids[answered])
    return ids[~answered], ids[answered]


def test_the_loss_is_on_the_response_and_eos_alone(write, llama):
    batch = batch_of(ROWS, write, tokenizer=llama, max_length=512)
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), torch.long
    )
    for row, (prompt, response) in enumerate([(ALPACA, "no"), (ALPACA_WITH_INPUT, "It is {true}.")]):
        head, answer = parts(batch, row)
        assert decode(llama, head) == f"<s>{prompt}"
        assert decode(llama, answer) == f"{response}</s>"
    assert "### Input" not in decode(llama, parts(batch, 2)[0])
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["labels"][padding] == -100).all()
    assert (batch["attention_mask"].diff(dim=1) <= 0).all()  # padding is on the right


def test_a_template_of_ones_own(write, llama):
    rows = [{"q": "What is it?", "options": "{a dog}", "a": "a dog"}]
    batch = batch_of(rows, write, tokenizer=llama, template="{q} of {{{options}}}: ", response="a")
    head, answer = parts(batch, 0)
    assert decode(llama, head) == "<s>What is it? of {{a dog}}: "
    assert decode(llama, answer) == "a dog</s>"


def test_the_response_has_the_tokens_of_running_text(write, llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    (head, answer) = parts(batch_of(ROWS[:1], write, tokenizer=llama, template="{instruction} A:"), 0)
    whole = tokenizer("Is the film good? A:no")["input_ids"]
    assert torch.cat([head, answer]).tolist() == [*whole, tokenizer.eos_token_id]


def test_a_token_across_the_border_belongs_to_neither(write, llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    rows = [{"instruction": "the a", "output": "wful film"}]
    whole = tokenizer("the awful film")["input_ids"]
    head, answer = parts(batch_of(rows, write, tokenizer=llama, template="{instruction}"), 0)
    assert head.tolist() == tokenizer("the a")["input_ids"]
    assert head.tolist() != whole[: len(head)]  # "awful" is one token in running text
    assert decode(llama, answer) == "wful film</s>"


@pytest.fixture(params=["none", "bos", "eos", "bos and eos"])
def adding(request, llama, tmp_path):
    """Tokenizers that add these on their own."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    single = {"none": "$A", "bos": "<s> $A", "eos": "$A </s>", "bos and eos": "<s> $A </s>"}[request.param]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")],
    )
    tokenizer.save_pretrained(tmp_path / "adding")
    return str(tmp_path / "adding"), "<s>" if "bos" in request.param else ""


def test_eos_comes_once_whatever_the_tokenizer_adds(write, adding):
    tokenizer, bos = adding
    head, answer = parts(batch_of(ROWS[:1], write, tokenizer=tokenizer, template=QUESTION), 0)
    assert decode(tokenizer, head) == f"{bos}Q: Is the film good? A: "
    assert decode(tokenizer, answer) == "no</s>"


@pytest.mark.parametrize("end", ["</s>", "</s></s>", "</s> A: ", "<s>"])
def test_special_tokens_in_the_template_stay_where_they_are(end, write, adding):
    tokenizer, bos = adding
    template = f"{{instruction}}{end}"
    head, answer = parts(batch_of(ROWS[:1], write, tokenizer=tokenizer, template=template), 0)
    assert decode(tokenizer, head) == f"{bos}Is the film good?{end}"
    assert decode(tokenizer, answer) == "no</s>"
    asked = batch_of(ROWS[:1], write, "predict", tokenizer=tokenizer, template=template)["input_ids"][0]
    assert asked.tolist() == head.tolist()


def test_a_template_that_begins_with_bos_gets_no_second_one(write, adding):
    tokenizer, _ = adding
    template = "<s>[INST] {instruction} [/INST]"
    head, answer = parts(batch_of(ROWS[:1], write, tokenizer=tokenizer, template=template), 0)
    assert decode(tokenizer, head) == "<s>[INST] Is the film good? [/INST]"
    assert decode(tokenizer, answer) == "no</s>"


def test_a_response_that_ends_in_eos_gets_no_second_one(write, adding):
    tokenizer, _ = adding
    rows = [{"instruction": "one", "output": "no</s>"}, {"instruction": "the a", "output": "wful film</s>"}]
    batch = batch_of(rows, write, tokenizer=tokenizer, template="{instruction}")
    assert [decode(tokenizer, parts(batch, row)[1]) for row in (0, 1)] == ["no</s>", "wful film</s>"]


@pytest.mark.parametrize("column", ["q.text", "q[0]", "a b", "0"])
def test_braces_hold_the_whole_name_of_a_column(column, write, llama):
    rows = [{column: "one", "output": "no"}]
    head, _ = parts(batch_of(rows, write, tokenizer=llama, template=f"Q: {{{column}}} A:"), 0)
    assert decode(llama, head) == "<s>Q: one A:"


def test_a_long_prompt_loses_its_beginning_but_not_bos(write, llama):
    rows = [{"instruction": "one two three " * 20 + "the end", "output": "a man"}]
    head, answer = parts(batch_of(rows, write, tokenizer=llama, template=QUESTION, max_length=16), 0)
    assert len(head) + len(answer) == 16
    assert decode(llama, head).startswith("<s>")
    assert decode(llama, head).endswith("the end A: ")
    assert decode(llama, answer) == "a man</s>"


def test_a_long_response_loses_its_end(write, llama):
    rows = [{"instruction": "one", "output": "two three " * 20}]
    head, answer = parts(batch_of(rows, write, tokenizer=llama, template=QUESTION, max_length=8), 0)
    assert (len(head), len(answer)) == (0, 8)
    assert decode(llama, answer).startswith("two three ")
    assert "</s>" not in decode(llama, answer)


def test_without_bos_or_pad_token(write, gpt2):
    rows = [{"instruction": "one " * 40, "output": "no"}, {"instruction": "two", "output": "no"}]
    batch = batch_of(rows, write, tokenizer=gpt2, template=QUESTION, max_length=20)
    eos = AutoTokenizer.from_pretrained(gpt2).eos_token_id
    padding = batch["attention_mask"] == 0
    assert (batch["input_ids"][padding] == eos).all()
    assert (batch["labels"][padding] == -100).all()
    head, answer = parts(batch, 1)
    assert decode(gpt2, torch.cat([head, answer])) == "Q: two A: no</s>"
    assert len(torch.cat(parts(batch, 0))) == 20


def test_prediction_gets_prompts_padded_on_the_left(write, llama):
    rows = [{"instruction": "one"}, {"instruction": "Who was in the house?"}]
    batch = batch_of(rows, write, "predict", tokenizer=llama, template=QUESTION)
    assert sorted(batch) == ["attention_mask", "input_ids"]
    assert (batch["attention_mask"][:, -1] == 1).all()
    assert decode(llama, batch["input_ids"][0][batch["attention_mask"][0] == 1]) == "<s>Q: one A: "


def test_training_on_one_file_is_grouped_by_length_and_cached(write, llama, monkeypatch):
    file = write([{"instruction": "one " * i, "output": "no"} for i in range(1, 41)])
    arguments = {"path": file, "validation_fraction": 0.1, "template": QUESTION, "tokenizer": llama}
    data = InstructionData(**arguments, batch_size=6)
    data.setup("fit")
    assert (data.num_labels, data.label_names, data.validation_names) == (None, None, ("",))
    widths = [batch["input_ids"].shape[1] for batch in data.train_dataloader()]
    assert widths == sorted(widths, reverse=True)
    monkeypatch.setattr(InstructionData, "_encode", lambda *rows, **how: pytest.fail("tokenised again"))
    InstructionData(**arguments).setup("fit")


def refused(rows, write, match, **arguments):
    with pytest.raises(UsageError, match=match) as caught:
        batch_of(rows, write, **arguments)
    assert "\n" not in str(caught.value)


def test_unknown_columns_list_those_found(write, llama):
    found = r"has no column 'instrction'; its columns are \['instruction', 'input', 'output'\]"
    refused(ROWS, write, found, tokenizer=llama, template="{instrction}")
    refused(ROWS, write, "has no column 'answer'", tokenizer=llama, response="answer")
    refused([{"prompt": "a", "output": "b"}], write, "has no column 'instruction'", tokenizer=llama)


def test_templates_must_be_well_formed(write, llama):
    refused(ROWS, write, "has a brace without its partner", tokenizer=llama, template="{instruction")
    refused(ROWS, write, "names no column", tokenizer=llama, template="Go on: ")


@pytest.mark.parametrize("output", ["", "  ", None])
def test_empty_responses_name_the_row(output, write, llama):
    rows = [*ROWS, {"instruction": "one", "input": "", "output": output}]
    refused(rows, write, "Row 3 .* 'validation' has no text in the column 'output'", tokenizer=llama)


def test_numbers_are_to_be_texts(write, llama):
    rows = [{"instruction": "one", "input": "", "output": 2}]
    refused(rows, write, r"""Row 0 .* no text in the column 'output' but 2: write .* "2" in JSON""", tokenizer=llama)


def test_a_single_token_is_too_short_to_predict(write, llama):
    refused(ROWS, write, "max_length must be at least 2; got 1", tokenizer=llama, max_length=1)


def test_empty_prompts_name_the_row(write, llama):
    rows = [*ROWS, {"instruction": "", "input": "", "output": "no"}]
    refused(rows, write, "Row 3 .* has no text in the column 'instruction' but ''", tokenizer=llama)


def test_a_tokenizer_without_eos_is_refused(write, tmp_path):
    refused(ROWS, write, "no eos token to end a response", tokenizer=save_tiny_tokenizer(tmp_path / "bert"))
