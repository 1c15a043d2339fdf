"""Prefixes of prompts, and texts on which an edit changes nothing."""

import json
from pathlib import Path

import programs
import pytest
import torch
import yaml
from backbones import save_tiny_llama
from edit_groups import adam, alone, batches, llama, require_alike, trained
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import lit_sparse as ls
from lit_sparse.adapters.rowwise import Routes
from lit_sparse.data.padding import IGNORED
from lit_sparse.data.tokenizers import load_tokenizer
from lit_sparse.editing.anchors import Examples
from lit_sparse.editing.edits import Edit, EditedModel, load_edit
from lit_sparse.editing.objective import Objective
from lit_sparse.editing.requests import EditRequest
from lit_sparse.editing.settings import of_anchors
from lit_sparse.editing.training import train
from lit_sparse.errors import UsageError

METHODS = {
    "lora": ls.LoRA(["v_proj", "down_proj"], rank=2, alpha=8),
    "roselora": ls.RoseLoRA(["v_proj", "down_proj"], rank=4, alpha=16, density=0.2, begin=1, end=4, clamp=0.2),
    "sora": ls.SoRA(["v_proj", "down_proj"], rank=4, alpha=16, threshold=0.02, freeze_zero_after=2, gate_lr=0.05),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:No gate became zero"),
    pytest.mark.filterwarnings("ignore:density .* lets BA change"),
]


def held(count: int) -> list[dict[str, torch.Tensor]]:
    """Groups as in test_side_by_side, of which the odd ones have two anchors of different lengths each."""
    groups, generator = batches(count), torch.Generator().manual_seed(1)
    for group in groups[1::2]:
        shape = (2, group["labels"].shape[1])
        ids, mask = torch.randint(5, 50, shape, generator=generator), torch.ones(shape, dtype=torch.long)
        mask[1, -2:] = 0
        weights = torch.zeros(shape)
        weights[0, 2:], weights[1, 1:-2] = 0.3, 0.2
        weights = torch.cat([torch.zeros(group["labels"].shape), weights])
        group["input_ids"] = torch.cat([group["input_ids"], ids])
        group["attention_mask"] = torch.cat([group["attention_mask"], mask])
        group["labels"] = torch.cat([group["labels"], torch.full(shape, IGNORED)])
        group["held"] = weights
    return groups


def slow_objective(model, before, group) -> tuple[float, float]:
    """Row by row and token by token."""
    answers, away = [], 0.0
    for row, ids in enumerate(group["input_ids"]):
        length = int(group["attention_mask"][row].sum())
        for place in range(1, length):
            logits = [net(ids[None, :place]).logits[0, -1].log_softmax(-1) for net in (model, before)]
            if group["labels"][row, place] != IGNORED:
                answers.append(-float(logits[0][ids[place]]))
            weight = float(group["held"][row, place]) if "held" in group else 0.0
            if weight:
                away += weight * float((logits[1].exp() * (logits[1] - logits[0])).sum())
    mean = sum(answers) / len(answers)
    return mean, mean + away


@torch.no_grad()
def test_the_objective_is_that_of_a_slow_loop():
    before, model, groups = llama(), llama(), held(4)
    names = dict.fromkeys(name for group in groups for name in group)
    width = max(group["labels"].shape[1] for group in groups)

    def wide(group, name):
        tensor = group.get(name, torch.zeros(group["labels"].shape))
        filled = torch.full((len(tensor), width), IGNORED if name == "labels" else 0, dtype=tensor.dtype)
        filled[:, : tensor.shape[1]] = tensor
        return filled

    rows = {name: torch.cat([wide(group, name) for group in groups]) for name in names}
    routes = Routes(torch.tensor([i for i, group in enumerate(groups) for _ in group["labels"]]))
    together = Objective(model, rows, routes, 4)
    each = [Objective(model, group) for group in groups]
    for p in model.parameters():
        p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3), dtype=p.dtype))
    expected = torch.tensor([slow_objective(model, before, group) for group in groups])
    assert bool((expected[1::2, 1] > expected[1::2, 0] + 1e-3).all()), "the anchors cost something"
    torch.testing.assert_close(torch.stack(together(model), 1), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack([torch.cat(one(model)) for one in each]), expected, rtol=1e-4, atol=1e-5)
    together.leave_out([1])
    expected[1] = 0
    torch.testing.assert_close(torch.stack(together(model), 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["roselora", "sora"])
def test_edits_with_anchors_side_by_side_are_as_if_alone(name):
    model, groups, method = llama(), held(4), METHODS[name]
    stop_loss = 1.0001 * sorted(one.loss for one in alone(model, groups, method, 12, adam, None))[1]
    found = trained(model, groups, method, 12, adam, stop_loss, range(4))
    require_alike(found, alone(model, groups, method, 12, adam, stop_loss), model)
    assert len({one.steps for one in found}) > 1, "some leave the batch before others"


@pytest.mark.parametrize(
    "method",
    [
        METHODS["lora"],
        ls.FineTuning(["v_proj", "down_proj"]),
        ls.UltraEdit(["v_proj", "down_proj"], lr=5e-4, normalization="turn"),
    ],
    ids=["lora", "fine-tuning", "ultraedit"],
)
def test_anchors_hold_what_the_model_says(method):
    def distance(weight: float) -> tuple[float, float]:
        model, group = llama(), held(2)[1]
        model.lm_head.weight.mul_(20)  # so that little moves much
        fair = {**group, "held": group["held"].clone()}
        group["held"] = group["held"] * weight
        judge = Objective(model, fair)
        torch.manual_seed(0)
        rate = 0.02 if isinstance(method, ls.Method) else 2e-3
        found = train(model, [group], method, 40, lambda p: torch.optim.Adam(p, lr=rate), None)
        edited = EditedModel(model)
        edited.add(Edit(found.patch))
        loss, whole = judge(model)
        return float(loss.detach()), float((whole - loss).detach())

    # The inputs of these layers are small, and UltraEdit holds outputs, not probabilities.
    free, kept = distance(1e-6), distance(1e4 if isinstance(method, ls.UltraEdit) else 1.0)
    assert kept[0] < 0.5, "the answer is learnt all the same"
    assert kept[1] < 0.3 * free[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("anchors")
    save_tiny_llama(place / "llama")
    requests = [
        {"prompt": "the cat is", "target_new": "a dog", "subject": "cat"},
        {"prompt": "the man saw", "target_new": "the river"},
        {"prompt": "the city was", "target_new": "a house", "subject": "city"},
    ]
    (place / "edits.json").write_text(json.dumps(requests))
    return place


def test_the_texts_of_a_batch(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "llama").eval()
    tokenizer = load_tokenizer(str(folder / "llama"))
    state = torch.get_rng_state()
    examples = Examples(model, tokenizer, 2, ls.Anchors(weight=3.0, of_subject=2, general=1, tokens=4), seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    requests = [EditRequest(0, "the cat is", "a dog", "cat"), EditRequest(1, "the man saw", "the river")]
    (batch,) = examples.batches(requests, None, torch.device("cpu"))
    texts = [tokenizer.decode(ids[m == 1]) for ids, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert [text.endswith(("the cat is a dog", "the man saw the river")) for text in texts] == 6 * [True] + 3 * [False]
    assert texts[0].removeprefix("<s>").strip() == "the cat is a dog"
    assert ". the cat is a dog" in texts[1]
    assert texts[1] != texts[2]
    assert texts[6].removeprefix("<s>").strip().startswith("cat is")
    assert texts[7].removeprefix("<s>").strip().startswith("cat was")
    with torch.no_grad():
        ids = batch["input_ids"][6, : int(batch["attention_mask"][6].sum())]
        start = int((batch["held"][6] != 0).nonzero()[0])
        assert torch.equal(model(ids[None]).logits[0, start - 1 : -1].argmax(-1), ids[start:]), "the model's own words"
    assert not batch["held"][:6].any()
    assert batch["held"].sum() == pytest.approx(3.0)
    assert bool((batch["labels"][6:] == IGNORED).all())
    again = Examples(model, tokenizer, 2, ls.Anchors(weight=3.0, of_subject=2, general=1, tokens=4), seed=5)
    assert torch.equal(again.batches(requests, None, torch.device("cpu"))[0]["input_ids"], batch["input_ids"])
    turns = Examples(model, tokenizer, 1, None, seed=5).batches(requests, 1, torch.device("cpu"))
    assert [len(turn["labels"]) for turn in turns] == [2, 2]
    assert "held" not in turns[0]


def test_texts_of_a_file(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder / "llama").eval()
    tokenizer = load_tokenizer(str(folder / "llama"))
    texts = ["the man saw the river and the house", "", "the cat is good", "a dog was bad"]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    anchors = ls.Anchors(of_subject=1, general=2, tokens=4, weight=2.0, texts=str(file))
    (batch,) = Examples(model, tokenizer, 0, anchors, seed=5).batches(
        [EditRequest(0, "the cat is", "a dog", "cat")], None, torch.device("cpu")
    )
    for place, text in ((2, texts[0]), (3, texts[2])):
        length = int(batch["attention_mask"][place].sum())
        assert length == min(4, len(tokenizer(text)["input_ids"]))
        assert batch["input_ids"][place, :length].tolist() == tokenizer(text)["input_ids"][:4]
        assert (batch["held"][place] > 0).nonzero().flatten().tolist() == list(range(1, length))
    assert batch["held"].sum() == pytest.approx(2.0)
    with pytest.raises(UsageError, match="has 3 texts of at least two tokens, and general is 5: lower it"):
        Examples(model, tokenizer, 0, ls.Anchors(general=5, texts=str(file)), seed=5)
    with pytest.raises(UsageError, match=r"none\.jsonl' cannot be read: "):
        Examples(model, tokenizer, 0, ls.Anchors(texts=str(tmp_path / "none.jsonl")), seed=5)
    with pytest.raises(UsageError, match="texts are given, and general is 0"):
        ls.Anchors(general=0, texts=str(file))
    with pytest.raises(UsageError, match="texts are given, and tokens is 1"):
        ls.Anchors(tokens=1, texts=str(file))
    before = of_anchors(anchors)
    file.write_text(file.read_text() + '{"text": ["the", "man"]}\n')
    assert of_anchors(anchors) != before, "a run is not continued with other texts"
    for bad in ('{"text": ["the", "man"]}', '{"text": 5}', '{"words": "the man"}', "[1]", '{"text": "the'):
        file.write_text(f'{{"text": "the cat is good"}}\n\n{bad}\n')
        with pytest.raises(UsageError, match=r"Line 3 of .*texts.jsonl' must have a text, .* it is "):
            Examples(model, tokenizer, 0, ls.Anchors(general=2, texts=str(file)), seed=5)


def test_from_the_command_line(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = {
        "backbone": str(folder / "llama"),
        "method": {"class_path": "lit_sparse.LoRA", "init_args": {"target_modules": ["down_proj"], "rank": 2}},
        "output": "out",
        "steps": 3,
        "fluency_tokens": 0,
        "generated_tokens": 0,
        "prefixes": 2,
        "anchors": {"weight": 2.0, "general": 3},
        "save_edits": True,
    }
    content = {
        "model": {"class_path": "lit_sparse.Editor", "init_args": model},
        "data": {"class_path": "lit_sparse.EditingData", "init_args": {"path": str(folder / "edits.json")}},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }
    Path("edit.yaml").write_text(yaml.safe_dump(content))
    words = ["-m", "lit_sparse", "edit", "--config", "edit.yaml"]
    programs.run(words)
    edits = [load_edit(f"out/edits/{i:06d}.safetensors") for i in range(3)]
    assert all(edit.changed for edit in edits)
    other = programs.run([*words, "--model.init_args.anchors.weight", "1"])
    assert other.returncode == 1
    assert "anchors" in other.stderr
    one = programs.run([*words, "--model.init_args.output", "one", "--data.init_args.side_by_side", "1"])
    assert one.returncode == 0
    for i, edit in enumerate(edits):
        for name, entries in load_edit(f"one/edits/{i:06d}.safetensors").patch.items():
            torch.testing.assert_close(entries.values, edit.patch[name].values, rtol=1e-3, atol=1e-5)


def test_wrong_arguments(folder):
    for wrong, message in [
        ({"weight": 0.0}, "weight must be above 0"),
        ({"hold": "answers"}, "hold must be"),
        ({"of_subject": 7}, "of_subject must be"),
        ({"general": -1}, "general must be at least 0"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"of_subject": 0, "general": 0}, "nothing would be held: raise one of them"),
    ]:
        with pytest.raises(UsageError, match=message):
            ls.Anchors(**wrong)
    method = ls.LoRA(["down_proj"], rank=2)
    with pytest.raises(UsageError, match="prefixes must be at least 0"):
        ls.Editor(str(folder / "llama"), method, "out", prefixes=-1)
    with pytest.raises(UsageError, match="with requests_per_step: set hold of the anchors to outputs"):
        ls.Editor(str(folder / "llama"), method, "out", anchors=ls.Anchors(hold="probabilities"), requests_per_step=2)
    with pytest.raises(UsageError, match="cannot hold probabilities with UltraEdit"):
        ls.Editor(str(folder / "llama"), ls.UltraEdit(), "out", anchors=ls.Anchors(hold="probabilities"))


def test_texts_that_cannot_be_written(folder, tmp_path):
    model, cpu = AutoModelForCausalLM.from_pretrained(folder / "llama").eval(), torch.device("cpu")
    tokenizer = load_tokenizer(str(folder / "llama"))
    alone = Examples(model, tokenizer, 0, ls.Anchors(general=0), seed=5)
    with pytest.warns(UserWarning, match="Nothing is held while the answer to 'the man saw' changes"):
        (batch,) = alone.batches([EditRequest(1, "the man saw", "the river")], None, cpu)
    assert "held" not in batch
    words = ["<pad>", "</s>", "the", "cat", "is", "dog"]
    small = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    small.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    unread = PreTrainedTokenizerFast(tokenizer_object=small, pad_token="<pad>", eos_token="</s>")  # noqa: S106
    with pytest.raises(UsageError, match=r"cannot read 'The' .*set prefixes to 0, and leave the anchors out"):
        Examples(model, unread, 1, None, seed=5)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    with pytest.raises(UsageError, match="The model ends texts such as 'The' at once"):
        Examples(quiet(model), tokenizer, 1, None, seed=5)


def quiet(model):
    """The model, after whose every token comes token 0."""
    inner = model.forward

    def forward(*args, **options):
        out = inner(*args, **options)
        out.logits[..., 0] = 1e4
        return out

    model.forward = forward
    return model
