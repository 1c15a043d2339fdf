"""Holding the outputs of layers: what changes of adapters and of whole weights cost, and what it is good for."""

import json
import math
from pathlib import Path

import lightning as L
import programs
import pytest
import torch
import yaml
from backbones import build_tiny, save_tiny_llama
from edit_groups import adam, alone, anchored, batches, held_rows, llama, require_alike, shortened, trained
from transformers import GPT2LMHeadModel

import lit_sparse as ls
from lit_sparse.adapters.injection import adapters_in, inject
from lit_sparse.editing.edits import load_edit
from lit_sparse.editing.holding import HeldInputs, held_of, price_of_adapters, price_of_weights
from lit_sparse.editing.training import train
from lit_sparse.editing.whole_weights import changing
from lit_sparse.errors import UsageError

METHODS = {
    "lora": ls.LoRA(["v_proj", "down_proj"], rank=2, alpha=8),
    "roselora": ls.RoseLoRA(["v_proj", "down_proj"], rank=4, alpha=16, density=0.2, begin=1, end=4, clamp=0.2),
    "sora": ls.SoRA(["v_proj", "down_proj"], rank=4, alpha=16, threshold=0.02, freeze_zero_after=2, gate_lr=0.05),
}
GPT2 = ["c_attn", "c_proj"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:No gate became zero"),
    pytest.mark.filterwarnings("ignore:density .* lets BA change"),
]


def slow_price(model, group, layers, deltas) -> torch.Tensor:
    """Token by token, from the inputs that layers have in a pass over each text alone."""
    total = 0
    for name, layer in layers.items():
        moved = usual = 0
        for row in held_rows(group):
            seen = []
            hook = layer.register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[0].detach()))
            length = int(group["attention_mask"][row].sum())
            model(group["input_ids"][row : row + 1, :length])
            hook.remove()
            inputs = seen[0].reshape(length, -1)
            weight = layer.weight.detach().T if type(layer).__name__ == "Conv1D" else layer.weight.detach()
            for place in range(1, length):
                share = group["held"][row, place]
                moved = moved + share * (deltas[name] @ inputs[place - 1]).square().sum()
                usual = usual + share * (weight @ inputs[place - 1]).square().sum()
        total = total + group["held"].sum() * moved / usual
    return total


@pytest.mark.parametrize("texts", [1, 12], ids=["few", "many"])  # tokens: fewer than features, or more
@pytest.mark.parametrize("kind", ["lora", "sora", "gpt2"])
def test_the_price_of_adapters_is_that_of_a_slow_loop(kind, texts):
    torch.manual_seed(0)
    model = build_tiny(GPT2LMHeadModel).double().eval().requires_grad_(False) if kind == "gpt2" else llama()
    group = anchored(batches(1, width=texts + 9)[0], texts)
    method = ls.LoRA(GPT2, rank=2, alpha=8) if kind == "gpt2" else METHODS[kind]
    layers = {name: adapter.layer for name, adapter in inject(model, method).items()}
    adapters = dict(adapters_in(model))
    price = price_of_adapters(model, adapters, [group], HeldInputs())
    for adapter in adapters.values():
        for parameter in adapter.parameters(recurse=False):
            parameter.data.normal_()
            parameter.grad = torch.ones_like(parameter)
    price(0)
    deltas = {
        name: adapter.scale * adapter.lora_B @ torch.diag(ones_or(adapter)) @ adapter.lora_A
        for name, adapter in adapters.items()
    }
    parameters = [p for adapter in adapters.values() for p in adapter.parameters(recurse=False)]
    with ls.disable_adapters(model):
        expected = torch.autograd.grad(slow_price(model, group, layers, deltas), parameters)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, 1 + gradient, rtol=1e-3, atol=1e-4)


def ones_or(adapter):
    return torch.ones(adapter.rank, dtype=torch.float64) if adapter.gate is None else adapter.gate


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_price_of_whole_weights_is_that_of_a_slow_loop(kind):
    torch.manual_seed(0)
    model = build_tiny(GPT2LMHeadModel).double().eval().requires_grad_(False) if kind == "gpt2" else llama()
    group = anchored(batches(1)[0])
    targets = GPT2 if kind == "gpt2" else ["v_proj", "down_proj"]
    layers = {f"{n}.weight": m for n, m in model.named_modules() if n.rpartition(".")[2] in targets}
    with changing(model, ls.FineTuning(targets)) as change:
        price = price_of_weights(model, change, [group], HeldInputs())
        for weight in change.weights.values():
            weight.data += torch.randn_like(weight)
            weight.grad = torch.ones_like(weight)
        price(0)
        deltas = {name: (w.detach() - change.before[name]).requires_grad_() for name, w in change.weights.items()}
        found = {name: weight.grad for name, weight in change.weights.items()}
    turned = {name: delta.T if kind == "gpt2" else delta for name, delta in deltas.items()}
    expected = torch.autograd.grad(slow_price(model, group, layers, turned), list(deltas.values()))
    for gradient, other in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(gradient, 1 + other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_edits_that_hold_the_same_outputs_are_side_by_side_as_if_alone(name):
    model, groups, method = llama(), [anchored(group, weight=1.0) for group in batches(4, width=13)], METHODS[name]
    groups = [shortened(group) for group in groups]

    def one_by_one(stop_loss):
        found = []
        for seed, group in enumerate(groups):
            torch.manual_seed(seed)
            found.append(train(model, [group], method, 12, adam, stop_loss, HeldInputs()))
        return found

    stop_loss = 1.0001 * sorted(one.loss for one in one_by_one(None))[1]
    found = trained(model, groups, method, 12, adam, stop_loss, range(4), HeldInputs())
    require_alike(found, one_by_one(stop_loss), model)
    assert len({one.steps for one in found}) > 1, "some leave the batch before others"
    free = alone(model, [{k: v for k, v in group.items() if k != "held"} for group in groups], method, 12, adam, None)
    assert free[0].loss != pytest.approx(found[0].loss, rel=1e-3)


def test_edits_with_texts_of_their_own_are_trained_one_after_another(caplog):
    model, groups = llama(), [anchored(group, seed=i) for i, group in enumerate(batches(2))]
    with caplog.at_level("INFO"):
        found = trained(model, groups, METHODS["lora"], 5, adam, None, range(2), HeldInputs())
    assert "each edit has anchors of its own" in caplog.text
    assert len(found) == 2


@pytest.mark.parametrize("name", ["lora", "roselora", "fine-tuning"])
def test_outputs_stay_where_they_are_held(name):
    method = METHODS.get(name, ls.FineTuning(["v_proj", "down_proj"]))
    model = llama()
    model.lm_head.weight.mul_(20)  # so that answers can be learnt
    layers = {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in ("v_proj", "down_proj")}

    def edited(weight: float) -> tuple[float, float]:
        groups = [anchored(group, texts=2, weight=weight) for group in batches(2)]  # they take turns
        torch.manual_seed(0)
        rate = 2e-3 if name == "fine-tuning" else 0.02
        found = train(model, groups, method, 60, lambda p: torch.optim.Adam(p, lr=rate), None, HeldInputs())
        deltas = {n: torch.zeros_like(layer.weight) for n, layer in layers.items()}
        for n, entries in found.patch.items():
            deltas[n.removesuffix(".weight")].view(-1)[entries.places] = entries.values.double()
        return found.loss, float(slow_price(model, groups[0], layers, deltas)) / weight

    free, kept = edited(1e-9), edited(0.1)
    assert kept[0] < 1.3 * free[0] + 0.1, "the answers are learnt all the same"
    assert kept[1] < 0.2 * free[1]


def test_half_precision_computes_the_price_in_float32():
    model, groups = llama().float(), [anchored(batches(1)[0])]
    adapters = inject(model, METHODS["lora"])
    price = price_of_adapters(model, adapters, groups, HeldInputs())
    gradients = []
    for enabled in (False, True):
        for adapter in adapters.values():
            adapter.zero_grad()
            torch.nn.init.ones_(adapter.lora_B_t)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            price(0)
        gradients.append([p.grad.clone() for adapter in adapters.values() for p in adapter.parameters(recurse=False)])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_what_cannot_be_held_is_refused():
    model, groups = llama(), [anchored(batches(1)[0])]
    for method, message in [
        (ls.LoRA(["embed_tokens"], rank=2), "'model.embed_tokens' is adapted as .*: leave it out, or set hold"),
        (ls.SHiRA(["down_proj"]), "is adapted as DeltaLinear"),
        (ls.FineTuning(["embed_tokens"]), "with anchors that hold outputs, changes linear layers"),
    ]:
        before = {name: p.clone() for name, p in model.named_parameters()}
        with pytest.raises(UsageError, match=message):
            train(model, groups, method, 3, adam, None, HeldInputs())
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(UsageError, match="cannot hold outputs with SHiRA"):
        ls.Editor("folder", ls.SHiRA(["down_proj"]), "out", anchors=ls.Anchors())


@pytest.mark.parametrize("method", [METHODS["lora"], ls.FineTuning(["v_proj", "down_proj"])], ids=["lora", "weights"])
def test_a_layer_without_outputs_has_no_price(method):
    model = llama().float()
    model.model.layers[1].mlp.down_proj.weight.zero_()
    found = train(model, [anchored(batches(1)[0], weight=300.0)], method, 3, adam, None, HeldInputs())
    assert math.isfinite(found.loss)
    assert all(bool(entries.values.isfinite().all()) for entries in found.patch.values())
    assert "model.layers.1.mlp.down_proj.weight" in found.patch


def test_weights_are_those_of_what_is_held():
    assert (ls.Anchors().weight, ls.Anchors(hold="probabilities").weight) == (300.0, 1.0)


def test_edits_that_hold_nothing_are_side_by_side(caplog):
    with caplog.at_level("INFO"):
        found = trained(llama(), batches(3), METHODS["lora"], 3, adam, None, range(3), HeldInputs())
    assert "one after another" not in caplog.text
    assert len(found) == 3


def test_a_batch_without_anchors_costs_nothing():
    model, groups = llama(), batches(1)
    torch.manual_seed(0)
    found = train(model, groups, METHODS["lora"], 5, adam, None, HeldInputs())
    require_alike([found], alone(model, groups, METHODS["lora"], 5, adam, None), model)
    assert not len(held_of(groups[0])["labels"])


def test_requests_in_turns_from_the_command_line(tmp_path, monkeypatch):
    """One change for three requests, in turns of two; then edits in sequence, whose inputs are found anew."""
    monkeypatch.chdir(tmp_path)
    save_tiny_llama("llama")
    requests = [
        {"prompt": "the cat is", "target_new": "a dog", "subject": "cat"},
        {"prompt": "the man saw", "target_new": "the river"},
        {"prompt": "the city was", "target_new": "a house", "subject": "city"},
    ]
    Path("edits.json").write_text(json.dumps(requests))
    Path("texts.jsonl").write_text('{"text": "the man saw the river and the house"}\n{"text": "the cat is good"}\n')
    method = {"class_path": "lit_sparse.RoseLoRA", "init_args": {"target_modules": ["down_proj"], "rank": 2}}
    method["init_args"] |= {"density": 0.5, "begin": 1, "end": 3}
    model = {
        "backbone": "llama",
        "method": method,
        "output": "out",
        "steps": 4,
        "stop_loss": None,
        "requests_per_step": 2,
        "fluency_tokens": 0,
        "generated_tokens": 0,
        "start_at_keys": True,
        "anchors": {"weight": 10.0, "of_subject": 1, "general": 2, "texts": "texts.jsonl"},
        "save_edits": True,
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.05}},
    }
    content = {
        "model": {"class_path": "lit_sparse.Editor", "init_args": model},
        "data": {"class_path": "lit_sparse.EditingData", "init_args": {"path": "edits.json", "batch_size": 3}},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }
    Path("edit.yaml").write_text(yaml.safe_dump(content))
    words = ["-m", "lit_sparse", "edit", "--config", "edit.yaml"]
    programs.run(words)
    (file,) = Path("out/edits").iterdir()
    assert load_edit(file).changed
    programs.run([*words, "--model.init_args.anchors.weight", "1e6", "--model.init_args.output", "heavy"])
    (other,) = Path("heavy/edits").iterdir()
    pairs = zip(load_edit(file).patch.values(), load_edit(other).patch.values(), strict=True)
    assert not any(torch.equal(one.values, two.values) for one, two in pairs), "the price counts"
    sequence = ["--data.init_args.batch_size", "1", "--model.init_args.sequential", "true"]
    programs.run([*words, *sequence, "--model.init_args.output", "one", "--model.init_args.requests_per_step", "null"])
    assert len(list(Path("one/edits").iterdir())) == 3


@torch.no_grad()
def test_in_a_sequence_the_inputs_are_those_of_the_model_so_far(monkeypatch, tmp_path):
    save_tiny_llama(tmp_path / "llama")
    seen: list[float] = []
    inner = HeldInputs.of

    def of(self, model, layers, groups):
        found = inner(self, model, layers, groups)
        seen.append(float(sum(held.squares.sum() for held in found[0].values())))
        return found

    monkeypatch.setattr(HeldInputs, "of", of)
    requests = [{"prompt": "the cat is", "target_new": "a dog"}, {"prompt": "the man saw", "target_new": "the river"}]
    (tmp_path / "edits.json").write_text(json.dumps(requests))
    for sequential, distinct in ((False, 1), (True, 2)):
        seen.clear()
        editor = ls.Editor(
            str(tmp_path / "llama"),
            ls.FineTuning(["down_proj"]),
            str(tmp_path / f"out{sequential}"),
            steps=3,
            optimizer=lambda p: torch.optim.Adam(p, lr=0.05),
            anchors=ls.Anchors(of_subject=0, general=2),
            sequential=sequential,
            fluency_tokens=0,
            generated_tokens=0,
        )
        trainer = L.Trainer(accelerator="cpu", inference_mode=False, logger=False, enable_progress_bar=False)
        trainer.test(editor, ls.EditingData(str(tmp_path / "edits.json")), verbose=False)
        assert len(seen) == 2
        assert len(set(seen)) == distinct
