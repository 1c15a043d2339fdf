"""Predictions under teacher forcing against one token after another, whatever the padding, tokenizer and batch."""

import pytest
import torch
from backbones import save_tiny_gpt2, save_tiny_llama
from tokenizers import processors
from transformers import AutoModelForCausalLM

from lit_sparse.data.tokenizers import load_tokenizer, prompt_tokens
from lit_sparse.editing.measuring import Measurer, Questions, Unedited
from lit_sparse.editing.requests import EditRequest, Probe
from lit_sparse.editing.teacher_forcing import collate, encode, predict
from lit_sparse.editing.writing import Writer
from lit_sparse.errors import UsageError

PAIRS = [
    ("the dog likes", "the cat and the river"),
    ("who is the best man in the city?", "a sad man"),
    ("it was ", "not a good film"),
    ("in Ω the plot", " is naïve"),
    ("a", "b"),
]


@pytest.fixture(scope="module", params=[save_tiny_llama, save_tiny_gpt2], ids=["with bos", "without bos or pad"])
def folder(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float64").eval()


@pytest.fixture
def tokenizer(folder):
    return load_tokenizer(folder)


def one_by_one(model, tokenizer, prompt: str, answer: str) -> list[int]:
    """Feed prompt and answer token by token, and write down what the model finds most likely each time."""
    joined = prompt + answer if prompt.endswith(" ") or answer.startswith(" ") else f"{prompt} {answer}"
    ids = tokenizer(joined)["input_ids"]
    start = len(tokenizer(prompt)["input_ids"])
    while tokenizer.decode(ids[:start], skip_special_tokens=True) not in prompt:
        start -= 1  # the last token of the prompt is another where a text follows
    found = []
    with torch.no_grad():
        for place in range(start, len(ids)):
            found.append(int(model(input_ids=torch.tensor([ids[:place]])).logits[0, -1].argmax()))
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("side", ["left", "right"])
def test_predictions_are_those_of_one_token_after_another(model, tokenizer, batch_size, side):
    tokenizer.padding_side = side
    rows = encode(tokenizer, PAIRS)
    assert predict(model, tokenizer, rows, batch_size) == [one_by_one(model, tokenizer, *pair) for pair in PAIRS]


def test_the_answer_is_what_comes_after_the_prompt(tokenizer):
    for (prompt, answer), row in zip(PAIRS, encode(tokenizer, PAIRS), strict=True):
        assert tokenizer.decode(row.answer).strip() == answer.strip()
        assert tokenizer.decode(row.input_ids[: row.start], skip_special_tokens=True).strip() == prompt.strip()
        assert row.answer == row.input_ids[row.start :]


def test_an_eos_that_the_tokenizer_adds_is_no_part_of_the_answer(folder):
    tokenizer = load_tokenizer(folder)
    expected = encode(tokenizer, PAIRS)
    single = "<s> $A </s>" if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else "$A </s>"
    specials = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=specials)
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    assert encode(tokenizer, PAIRS) == expected


def test_special_tokens_in_a_prompt_stay_where_they_are(tokenizer):
    (row,) = encode(tokenizer, [("<s>the cat</s>", "sat")])
    assert tokenizer.decode(row.input_ids[: row.start]).replace(" ", "") == "<s>thecat</s>"
    assert tokenizer.decode(row.answer).strip() == "sat"


def test_the_loss_is_on_the_answers_alone(model, tokenizer):
    rows = encode(tokenizer, PAIRS)
    loss = model(**collate(tokenizer, rows)).loss
    losses = []
    with torch.no_grad():
        for row in rows:
            scores = model(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
            losses += [-scores[place - 1, row.input_ids[place]] for place in range(row.start, len(row.input_ids))]
    torch.testing.assert_close(loss, torch.stack(losses).mean().to(loss.dtype), rtol=1e-6, atol=1e-6)


def test_an_answer_without_tokens_is_refused(tokenizer):
    with pytest.raises(UsageError, match="prompt and answer need at least one each"):
        encode(tokenizer, [*PAIRS, ("a ", "")])


# All figures of some requests.

REQUESTS = [
    EditRequest(
        0, "the dog is", "a cat", rephrases=("a dog: it is", "dogs are"),
        portability={"Reasoning": (Probe("the cat has", ("a house", "the river")), Probe("it saw", ("a tree",)))},
        locality={"F": (Probe("the man", ("likes a film",)),), "R": (Probe("who", ("has it", "was it")),)},
    ),
    EditRequest(1, "one two", "three", locality={"R": (Probe("the city of", ("the best",)),)}),
    EditRequest(2, "so so", "dull"),
]  # fmt: skip


def test_all_figures_against_one_token_after_another(model, tokenizer, folder):
    other = AutoModelForCausalLM.from_pretrained(folder, dtype="float64").eval()
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.3 * weight.std() * torch.randn_like(weight)

    def share(prompt, answer, expected=None):
        found = one_by_one(other, tokenizer, prompt, answer)
        wanted = encode(tokenizer, [(prompt, answer)])[0].answer if expected is None else expected
        return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)

    def local(prompt, answer):
        return share(prompt, answer, one_by_one(model, tokenizer, prompt, answer))

    before = Measurer(model, tokenizer, REQUESTS, 0, None, 3)
    after = Measurer(other, tokenizer, REQUESTS, 0, None, 3)
    questions = Questions(tokenizer, REQUESTS)
    found = after.measure(questions, before.unedited(questions))
    reasoning = (
        max(share("the cat has", "a house"), share("the cat has", "the river")) + share("it saw", "a tree")
    ) / 2
    first = {
        "edit_success": share("the dog is", "a cat"),
        "rephrase": (share("a dog: it is", "a cat") + share("dogs are", "a cat")) / 2,
        "portability": reasoning,
        "portability/Reasoning": reasoning,
        "portability_first_name": (share("the cat has", "a house") + share("it saw", "a tree")) / 2,
        "portability_first_name/Reasoning": (share("the cat has", "a house") + share("it saw", "a tree")) / 2,
        "locality": (local("the man", "likes a film") + local("who", "has it")) / 2,
        "locality/F": local("the man", "likes a film"),
        "locality/R": local("who", "has it"),
    }
    second = {"edit_success": share("one two", "three"), "locality": local("the city of", "the best")}
    second["locality/R"] = second["locality"]
    assert [pytest.approx(row) for row in (first, second, {"edit_success": share("so so", "dull")})] == found
    assert 0 < fmean_of(found, "locality") < 1, "the noise should change some predictions and leave some"


def fmean_of(rows, name):
    known = [row[name] for row in rows if name in row]
    return sum(known) / len(known)


def test_perplexity_against_one_text_after_another(model, tokenizer, tmp_path):
    texts = ["the dog likes the cat", "a film", "who was it that saw the best river in the city? no one", "x"]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    losses = []
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            scores = model(input_ids=ids).logits[0].log_softmax(-1)
            losses += [-float(scores[i - 1, ids[0, i]]) for i in range(1, ids.shape[1])]
    found = Measurer(model, tokenizer, [], 0, str(file), 2).perplexity()
    assert found == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-5)


@pytest.mark.parametrize("content", ["", "{}\n", "[1]\n", "no json\n"])
def test_texts_that_are_none(model, tokenizer, tmp_path, content):
    file = tmp_path / "texts.jsonl"
    file.write_text(content)
    with pytest.raises(UsageError, match=r"texts\.jsonl"):
        Measurer(model, tokenizer, [], 0, str(file), 2)


def test_continuations_are_greedy_and_do_not_depend_on_the_batch(model, tokenizer):
    requests = [EditRequest(i, prompt, "x") for i, (prompt, _) in enumerate(PAIRS)]
    together = Measurer(model, tokenizer, requests, 8, None, 5)
    alone = Measurer(model, tokenizer, requests, 8, None, 1)
    questions = Questions(tokenizer, requests)
    assert together._fluent(questions) == alone._fluent(questions)
    assert "fluency" in together.measure(questions, Unedited({}, {}))[0]
    assert "fluency" not in together.measure(questions, Unedited({}, {}), answers_only=True)[0]


# Answers that the model writes itself.


def test_requests_without_unrelated_prompts(model, tokenizer):
    questions = Questions(tokenizer, REQUESTS[2:])
    measurer = Measurer(model, tokenizer, REQUESTS[2:], 0, None, 3, 8)
    (found,) = measurer.measure(questions, measurer.unedited(questions))
    assert set(found) == {"edit_success", "generated_success", "contained_success"}


def taught(folder, tokenizer, pairs):
    """A model that learnt to answer these prompts."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    batch = collate(tokenizer, encode(tokenizer, pairs))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        loss = model(**batch).loss
        if loss < 0.01:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.01
    return model.eval()


@pytest.mark.slow
def test_answers_end_where_the_text_the_line_or_the_turn_ends(folder, tokenizer):
    pairs = [("the dog is", " a cat</s> and"), ("one two", " \n three\nfour"), ("who", " no man at all")]
    model = taught(folder, tokenizer, pairs)
    prompts = [prompt for prompt, _ in pairs]
    found = Writer(model, tokenizer, 2, 3).answers([*prompts, "the dog is"])
    assert found[0] == found[3] == "a cat"
    assert Writer(model, tokenizer, 2, 8).answers(["one two"]) == ["three"]
    assert "no man at all".startswith(found[2])
    assert found[2] != "no man at all", "three tokens are not enough for it"

    with pytest.raises(UsageError, match=r"chat_template is true, and the tokenizer .* has none"):
        Writer(model, tokenizer, 2, 8, chat_template=True)
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    chatting = taught(folder, tokenizer, [("user: who\nassistant:", "a dog\n")])
    assert Writer(chatting, tokenizer, 2, 8, chat_template=True).answers(["who"]) == ["a dog"]
    assert Writer(chatting, tokenizer, 2, 8).answers(["who"]) != ["a dog"]


@torch.no_grad()
def test_the_share_of_random_answers_is_the_probability_of_the_answer(folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    model.lm_head.weight.mul_(20)  # few words are likely
    prompt, taken = "the dog is", 400
    logits = model(torch.tensor([prompt_tokens(tokenizer, prompt)])).logits[0, -1]
    answer = tokenizer.decode(logits.argmax()).strip()
    request = EditRequest(index=3, prompt=prompt, target_new=answer)
    measurer = Measurer(model, tokenizer, [request], 0, None, 8, generated_tokens=1, generated_samples=taken, seed=5)
    questions = Questions(tokenizer, [request])
    state = torch.get_rng_state()
    share = measurer.measure(questions, Unedited({}, {}))[0]["sampled_success"]
    assert torch.equal(torch.get_rng_state(), state)
    texts = [tokenizer.decode(token).strip() for token in range(len(logits))]
    expected = sum(float(p) for p, text in zip(logits.softmax(-1), texts, strict=True) if text == answer)
    assert 0.05 < expected < 0.95
    assert abs(share - expected) < 4 * (expected * (1 - expected) / taken) ** 0.5
    assert measurer.measure(questions, Unedited({}, {}))[0]["sampled_success"] == share


@pytest.mark.slow
def test_figures_of_answers_that_the_model_writes(folder, tokenizer):
    before = taught(folder, tokenizer, [("the man", " is sad\n"), ("who", " a woman\n"), ("the dog is", " a dog\n")])
    after = taught(
        folder,
        tokenizer,
        [
            ("the dog is", " A cat.\n"),
            ("a dog: it is", " the cat\n"),
            ("dogs are", " a cat and so\n"),
            ("the cat has", " the river\n"),
            ("it saw", " a river\n"),
            ("the man", " is sad!\n"),
            ("who", " a cat\n"),
        ],
    )
    questions = Questions(tokenizer, REQUESTS[:1])
    was = Measurer(before, tokenizer, REQUESTS[:1], 0, None, 3, 8).unedited(questions)
    measurer = Measurer(after, tokenizer, REQUESTS[:1], 0, None, 3, 8)
    (found,) = measurer.measure(questions, was)
    expected = {
        "generated_success": 1.0,
        "generated_rephrase": 0.5,
        "generated_portability": 0.5,
        "generated_portability/Reasoning": 0.5,
        "generated_locality": 0.5,
        "generated_locality/F": 1.0,
        "generated_locality/R": 0.0,
        "contained_success": 1.0,
        "contained_rephrase": 1.0,
        "contained_portability": 0.5,
        "contained_portability/Reasoning": 0.5,
    }
    assert {name: value for name, value in found.items() if name.startswith(("generated", "contained"))} == expected
    assert set(found) < set(measurer.names)
    assert {name for name in measurer.names if name.startswith(("generated", "contained"))} == set(expected)
