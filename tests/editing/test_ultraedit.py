"""UltraEdit against its equations, written slowly, and what an Editor makes of it."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import programs
import pytest
import torch
import yaml
from backbones import build_tiny, save_tiny_gpt2, save_tiny_llama
from edit_groups import batches, llama
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralForCausalLM

import lit_sparse as ls
from lit_sparse.data.padding import IGNORED
from lit_sparse.editing import holding
from lit_sparse.editing.edits import load_edit
from lit_sparse.editing.holding import HeldInputs, answers_of
from lit_sparse.editing.side_by_side import train_each
from lit_sparse.editing.training import Trained, train
from lit_sparse.errors import TrainingError, UsageError
from lit_sparse.functional.ultraedit import Held, RunningMoments, least_squares
from lit_sparse.interchange.patches import add

TARGETS = ["v_proj", "gate_proj", "up_proj", "down_proj"]  # gate_proj and up_proj have one shape


def made(
    model: Any, turns: list[dict[str, Tensor]], steps: int, stop_loss: float | None = None, **options: Any
) -> Trained:
    method = ls.UltraEdit(**{"target_modules": TARGETS, "lr": 1e-3, **options})
    return train(model, turns, method, steps, torch.optim.SGD, stop_loss)


# The mathematics.


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 9), st.integers(0, 99), st.floats(0.1, 30)
)
def test_no_other_change_costs_less(tokens, features, outputs, others, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    H, V, X = (
        scale * torch.randn(shape, generator=generator, dtype=torch.double)
        for shape in ((tokens, features), (tokens, outputs), (others, features))
    )
    found = least_squares(H, V, Held(X).ridge()).requires_grad_()
    cost = (H @ found - V).square().sum() + found.square().sum() + (X @ found).square().sum()
    (gradient,) = torch.autograd.grad(cost, found)
    assert gradient.abs().max() < 1e-8 * scale**3
    some = torch.arange(0, features, 2)
    within, some_H, some_X = least_squares(H[:, some], V, Held(X).ridge(some)), H[:, some], X[:, some]
    square = some_H.T @ some_H + some_X.T @ some_X + torch.eye(len(some), dtype=torch.double)
    torch.testing.assert_close(within, torch.linalg.inv(square) @ some_H.T @ V, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("others", [9, 40])
def test_large_inputs_and_bfloat16_precision_do_not_spoil_the_solution(others):
    generator = torch.Generator().manual_seed(0)
    H, V, X = (torch.randn(shape, generator=generator) for shape in ((5, 20), (5, 3), (others, 20)))
    X += 1e4 * torch.randn(20, generator=generator)  # as activations of some tokens are
    with torch.autocast("cpu", torch.bfloat16):
        found = least_squares(H, V, Held(X).ridge())
    exact = [tensor.double() for tensor in (H, V, X)]
    square = exact[0].T @ exact[0] + exact[2].T @ exact[2] + torch.eye(20, dtype=torch.double)
    expected = torch.linalg.solve(square, exact[0].T @ exact[1])
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-6)


def test_moments_are_those_of_all_rows():
    rows = torch.randn(30, 5, dtype=torch.double) * torch.arange(1, 6) + 3
    moments = RunningMoments()
    for part in rows.split([1, 12, 17]):
        moments.update(part)
    expected = (rows - rows.mean(0)) / rows.std(0)
    torch.testing.assert_close(moments.normalized(rows), expected)


def slow(model: Any, turns: list[dict[str, Tensor]], steps: int, lr: float, targets: list[str]) -> None:
    """UltraEdit as its release computes it, token by token and layer by layer, with all statistics anew."""
    layers = {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in targets}
    history: dict[Any, list[Tensor]] = {}
    for step in range(steps):
        batch = turns[step % len(turns)]
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def hook_of(name, inputs=inputs, outputs=outputs):
            def hook(_, args, output):
                inputs[name], outputs[name] = args[0].detach(), output.requires_grad_()
                return output

            return hook

        hooks = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
        with torch.enable_grad():
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            places = [
                (row, place - 1)
                for row, labels in enumerate(batch["labels"].tolist())
                for place, token in enumerate(labels)
                if token != IGNORED
            ]
            losses = [-logits[r, p].log_softmax(-1)[batch["labels"][r, p + 1]] for r, p in places]
            gradients = torch.autograd.grad(sum(losses) / len(losses), list(outputs.values()))
        for handle in hooks:
            handle.remove()
        found = {}
        for (name, x), gradient in zip(inputs.items(), gradients, strict=True):
            found[name] = [torch.stack([t[r, p] for r, p in places]) for t in (x, gradient)]
            history.setdefault(layers[name].weight.shape, []).append(torch.cat(found[name], 1))
        for name, (H, G) in found.items():
            seen = torch.cat(history[layers[name].weight.shape])
            V = torch.zeros_like(G)
            for i in range(len(H)):
                z = (torch.cat([H[i], G[i]]) - seen.mean(0)) / seen.std(0)
                h, v = z[: H.shape[1]], z[H.shape[1] :]
                V[i] = -lr * (h @ h) * v
            M = H.T @ H + torch.eye(H.shape[1], dtype=H.dtype)
            layers[name].weight += torch.linalg.inv(M).mm(H.T).mm(V).T


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_turns_are_those_of_the_release(steps):
    turns, model = batches(3), llama()
    expected = copy.deepcopy(model)
    slow(expected, turns, steps, 1e-3, TARGETS)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = made(model, turns, steps)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert found.steps == steps
    assert len(found.patch) == 2 * len(TARGETS)
    assert found.weights == sum(model.get_parameter(name).numel() for name in found.patch)
    add(model, found.patch)
    for name, p in model.named_parameters():
        moved = (expected.get_parameter(name) - before[name]).abs().max()
        torch.testing.assert_close(p, expected.get_parameter(name), rtol=0, atol=1e-5 * float(moved) + 1e-12)
        assert (moved > 1e-6) == (name in found.patch)


@torch.no_grad()
def test_a_step_by_hand_with_anchors():
    """One linear layer, whose output is the last: its gradient is known."""
    model = llama()
    (group,) = batches(1)
    other = torch.randint(5, 50, (2, group["labels"].shape[1]), generator=torch.Generator().manual_seed(1))
    weights = torch.zeros(other.shape)
    weights[0, 2:5], weights[1, 4:] = 0.5, 2.0
    rows = {
        "input_ids": torch.cat([group["input_ids"], other]),
        "attention_mask": torch.cat([group["attention_mask"], torch.ones_like(other)]),
        "labels": torch.cat([group["labels"], torch.full_like(other, IGNORED)]),
        "held": torch.cat([torch.zeros(group["labels"].shape), weights]),
    }
    found = made(model, [rows], 1, target_modules=["lm_head"], normalization="turn", lr=0.01)
    hidden = model.model(rows["input_ids"], attention_mask=rows["attention_mask"]).last_hidden_state[:, :-1]
    answers = group["labels"][:, 1:] != IGNORED
    H = hidden[: len(answers)][answers]
    G = (H @ model.lm_head.weight.T).softmax(-1)
    G[torch.arange(len(G)), group["labels"][:, 1:][answers]] -= 1
    V = -0.01 * H.shape[1] * G / G.square().mean().sqrt()
    X = torch.cat([weights[r, p] ** 0.5 * hidden[len(answers) + r, p - 1][None] for r, p in weights.nonzero().tolist()])
    D = torch.linalg.inv(H.T @ H + torch.eye(H.shape[1], dtype=H.dtype) + X.T @ X) @ H.T @ V
    before = model.lm_head.weight.clone()
    add(model, found.patch)
    torch.testing.assert_close(model.lm_head.weight - before, D.T, rtol=1e-5, atol=1e-7)
    assert (X @ D).norm() < 0.2 * (X @ (torch.linalg.inv(H.T @ H + torch.eye(H.shape[1])) @ H.T @ V)).norm()


def test_texts_that_several_turns_and_edits_hold_are_read_once(monkeypatch):
    ids, turns = torch.randint(5, 50, (2, 6), generator=torch.Generator().manual_seed(1)), []
    for group in batches(4):
        width = group["labels"].shape[1]
        texts = torch.nn.functional.pad(ids, (0, width - 6))
        held = torch.zeros(2, width)
        held[:, 1:6] = 3.0
        turns.append(
            {
                "input_ids": torch.cat([group["input_ids"], texts]),
                "attention_mask": torch.cat([group["attention_mask"], (texts > 0).long()]),
                "labels": torch.cat([group["labels"], torch.full_like(texts, IGNORED)]),
                "held": torch.cat([torch.zeros(group["labels"].shape), held]),
            }
        )
    read, inputs_of = [], holding._inputs_of
    monkeypatch.setattr(holding, "_inputs_of", lambda *args: read.append(1) or inputs_of(*args))
    method, model = ls.UltraEdit(TARGETS, lr=1e-3), llama()
    edits = [turns[:2], turns[2:]]
    known = HeldInputs()
    found = list(train_each(model, edits, method, 4, torch.optim.SGD, None, [0, 1], known))
    assert len(read) == len(known._known) == 1
    turns[1]["held"][-1, 1] *= 1 + 1e-6  # no longer the same
    assert len(list(train_each(model, edits, method, 4, torch.optim.SGD, None, [0, 1], known))) == 2
    assert len(read) == 1 + 1
    assert len(known._known) == 1, "what the last edit does not hold is forgotten"
    again = [made(model, turns[:2], 4), made(model, turns[2:], 4)]
    assert len(read) == 1 + 1 + 2 + 1
    for one, other in zip(found, again, strict=True):
        for name, entries in one.patch.items():
            torch.testing.assert_close(entries.values, other.patch[name].values, rtol=1e-3, atol=1e-9)


def test_answers_are_read_without_the_padding_of_longer_texts():
    ones = torch.ones(2, 13, dtype=torch.long)
    rows = {"input_ids": ones, "attention_mask": ones.clone(), "labels": ones, "held": torch.zeros(2, 13)}
    rows["attention_mask"][0, 9:], rows["held"][1, 1:] = 0, 1.0
    assert {name: tuple(tensor.shape) for name, tensor in answers_of(rows).items()} == dict.fromkeys(
        ["input_ids", "attention_mask", "labels"], (1, 9)
    )


@torch.no_grad()
@pytest.mark.parametrize("anchored", [False, True])
def test_few_features_change_those_that_the_answers_need_most(anchored):
    model, (group,) = llama(), batches(1)
    other = torch.randint(5, 50, group["labels"].shape, generator=torch.Generator().manual_seed(1))
    rows = {**group, "held": torch.zeros(group["labels"].shape)}
    held = torch.zeros(other.shape)
    held[:, 1:] = 2.0
    texts = {"input_ids": other, "attention_mask": torch.ones_like(other), "labels": torch.full_like(other, IGNORED)}
    if anchored:
        rows = {name: torch.cat([rows[name], {**texts, "held": held}[name]]) for name in rows}
    options = {"target_modules": ["lm_head"], "normalization": "turn", "lr": 0.01, "density": 0.2}
    found = made(model, [rows], 3, **options)
    before = model.lm_head.weight.clone()
    add(model, found.patch)
    columns = (model.lm_head.weight != before).any(0)
    H = model.model(group["input_ids"]).last_hidden_state[:, :-1][group["labels"][:, 1:] != IGNORED]
    scores = H.square().sum(0)
    if anchored:
        usual = model.model(other).last_hidden_state[:, :-1].flatten(0, 1).square().sum(0)
        scores = scores / (usual + 1e-3 * usual.mean())
    assert columns.nonzero().flatten().tolist() == sorted(scores.topk(6).indices.tolist())  # of 32
    assert found.patch["lm_head.weight"].count == 6 * model.lm_head.out_features


# What it makes of models.


def sharp() -> Any:
    """A model whose answers can be likely."""
    model = llama()
    model.lm_head.weight.mul_(20)
    return model


@pytest.mark.parametrize(("normalization", "lr"), [("lifelong", 1e-3), ("turn", 3e-4)])
def test_steps_learn_the_answers_and_end(normalization, lr):
    found = made(sharp(), batches(3), 60, stop_loss=0.1, normalization=normalization, lr=lr)
    assert 3 < found.steps < 60
    assert found.loss <= 0.1


@torch.no_grad()
def test_gpt2_whose_weights_are_transposed(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_gpt2(tmp_path)).train().requires_grad_(False)
    ids = torch.tensor([[5, 6, 7, 8]])
    rows = {"input_ids": ids, "labels": ids.masked_fill(torch.tensor([[True, True, False, False]]), IGNORED)}
    old = float(copy.deepcopy(model).eval()(**rows).loss)
    options = {"target_modules": ["c_fc", "c_proj"], "normalization": "turn", "lr": 1e-3}
    assert made(model, [rows], 1, **options).loss == pytest.approx(old), "without dropout"
    found = made(model, [rows], 12, **options)
    assert model.training
    add(model, found.patch)
    assert float(model.eval()(**rows).loss) < old - 0.3


def test_half_precision_is_edited_over_the_stored_type():
    model, (group,) = sharp().bfloat16(), batches(1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = made(model, [group], 8, normalization="turn", lr=1e-3)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert {entries.values.dtype for entries in found.patch.values()} == {torch.float32}
    old = float(model(**group).loss)
    add(model, found.patch)
    assert float(model(**group).loss) < 0.3 * old


def rewired(kind: str) -> Any:
    """A model whose feed-forward layers are called in another way."""
    model = llama()
    for block in model.model.layers:
        mlp = block.mlp

        def forward(x, mlp=mlp, plain=mlp.forward):
            if kind == "flat":
                return plain(x.flatten(0, 1)).view(x.shape)
            if kind == "another axis":
                return plain(x[:, None])[:, 0]
            if kind == "tokens first":
                return plain(x.transpose(0, 1)).transpose(0, 1)
            if kind == "twice":
                return plain(x) + plain(x)
            if kind == "never":
                return x
            inner = mlp.up_proj(input=x)
            inner.mul_(mlp.act_fn(mlp.gate_proj(x)))  # writes over an output
            y = mlp.down_proj(inner)
            inner.zero_()  # and over an input
            return y

        mlp.forward = forward
    return model


@pytest.mark.parametrize("kind", ["flat", "another axis", "in place"])
@pytest.mark.parametrize("first", ["gate_proj", "up_proj"])
def test_it_does_not_matter_how_layers_are_called(kind, first):
    options = {"target_modules": [first, "down_proj"], "normalization": "turn"}
    expected = made(llama(), batches(3), 3, **options)
    found = made(rewired(kind), batches(3), 3, **options)
    assert found.patch.keys() == expected.patch.keys()
    for name, entries in found.patch.items():
        torch.testing.assert_close(entries.values, expected.patch[name].values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("tokens first", r"one input for each token, and 'model.layers.0.*' has others, of shape \(7, 3, 32\)"),
        ("twice", "the model calls 'model.layers.0.*' twice"),
        ("never", "The answers do not depend on the layers that UltraEdit changes"),
    ],
)
def test_layers_without_one_input_for_each_token_are_refused(kind, message):
    with pytest.raises(UsageError, match=message):
        made(rewired(kind), batches(3)[2:], 1, target_modules=["gate_proj", "up_proj", "down_proj"])


def test_an_answer_that_is_certain_stays():
    model = llama().float()
    model.lm_head.weight.mul_(2400)  # gradients are 10⁻²⁶, and their squares are 0 in float32
    (group,) = batches(1)
    group["labels"].fill_(IGNORED)
    group["labels"][0, -1] = group["input_ids"][0, -1] = model(group["input_ids"]).logits[0, -2].argmax()
    assert made(model, [group], 5, target_modules=["down_proj"], normalization="turn").loss == 0


def test_values_that_are_not_finite_end_it():
    with pytest.raises(TrainingError, match=r"NaN or infinite, in step [23]: lower the learning rate"):
        made(llama().float(), batches(1), 5, normalization="turn", lr=1e30)
    (group,) = batches(1)
    rows = {name: torch.cat([tensor, tensor]) for name, tensor in group.items()}
    rows["held"] = torch.zeros(rows["labels"].shape)
    rows["held"][1, 1:], rows["labels"][1] = 1.0, IGNORED
    rows["input_ids"][1] = 3
    model = llama()
    model.model.embed_tokens.weight[3] = torch.nan
    with pytest.raises(TrainingError, match="NaN or infinite, on the anchors"):
        made(model, [rows], 3, normalization="turn")


def test_what_is_refused():
    (group,) = batches(1)
    group["labels"][:, :-1] = IGNORED
    with pytest.raises(UsageError, match="compares tokens, and the answers of the first turn have one: set norm"):
        made(llama(), [group], 1)
    assert made(llama(), [group], 1, normalization="turn").patch
    with pytest.raises(UsageError, match="lr must be above 0; got 0"):
        ls.UltraEdit(lr=0.0)
    with pytest.raises(UsageError, match="normalization must be 'lifelong' or 'turn'; got 'none'"):
        ls.UltraEdit(normalization="none")
    with pytest.raises(UsageError, match="density must be above 0 and at most 1; got 0"):
        ls.UltraEdit(density=0.0)
    with pytest.raises(UsageError, match="name at least one layer"):
        ls.UltraEdit([])
    with pytest.raises(
        UsageError, match=r"changes linear layers, and \['model.embed_tokens.weight'\] are of other kinds"
    ):
        made(llama(), batches(1), 1, target_modules=["embed_tokens"])
    mixtral = build_tiny(MixtralForCausalLM, num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(UsageError, match="UltraEdit changes the weights of plain layers, not those of experts"):
        made(mixtral, batches(1), 1, target_modules="all-linear")


# Under an Editor.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("ultraedit")
    save_tiny_llama(place / "llama")
    model = AutoModelForCausalLM.from_pretrained(place / "llama", dtype="float32")
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # so that answers can be likely
    model.save_pretrained(place / "llama")
    facts = [("the cat is", "a dog"), ("the man saw", "the river"), ("the city was", "a house"), ("a dog", "the man")]
    requests = [{"prompt": prompt, "target_new": answer, "subject": prompt.split()[1]} for prompt, answer in facts]
    (place / "edits.json").write_text(json.dumps(requests))
    return place


def test_one_change_for_all_requests_in_turns_from_the_command_line(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    method = {"target_modules": ["down_proj", "up_proj"], "lr": 3e-4, "normalization": "turn"}
    model = {
        "backbone": str(folder / "llama"),
        "method": {"class_path": "lit_sparse.UltraEdit", "init_args": method},
        "output": "out",
        "steps": 120,
        "requests_per_step": 2,
        "anchors": {"weight": 1.0, "general": 2, "of_subject": 1, "tokens": 3},
        "fluency_tokens": 0,
        "generated_tokens": 0,
        "save_edits": True,
    }
    content = {
        "model": {"class_path": "lit_sparse.Editor", "init_args": model},
        "data": {
            "class_path": "lit_sparse.EditingData",
            "init_args": {"path": str(folder / "edits.json"), "batch_size": 4},
        },
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }
    Path("edit.yaml").write_text(yaml.safe_dump(content))
    run = programs.run(["-m", "lit_sparse", "edit", "--config", "edit.yaml"])
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in Path("out/results.jsonl").read_text().splitlines()]
    assert sorted(row["edit_success"] for row in rows)[1:] == [1.0] * 3, "turns may forget a token of others"
    assert len({row["steps"] for row in rows}) == 1
    edit = load_edit("out/edits/000000.safetensors")
    assert "UltraEdit(" in edit.method
    assert len(edit.patch) == 4
    printed = programs.run(["-m", "lit_sparse", "edit", "list", "out/edits"])
    assert printed.returncode == 0
    wrong = programs.run(
        ["-m", "lit_sparse", "edit", "--config", "edit.yaml", "--model.init_args.method.init_args.lr", "2"]
    )
    assert wrong.returncode == 1
    assert "holds a run with other settings: method was" in wrong.stderr


def test_edits_in_sequence_begin_anew_and_resume(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(output: str, limit: int | None = None) -> Any:
        method = ls.UltraEdit(["down_proj"], lr=1e-3, normalization="turn")
        editor = ls.Editor(
            str(folder / "llama"), method, output, steps=5, sequential=True, fluency_tokens=0, generated_tokens=0
        )
        trainer = L.Trainer(accelerator="cpu", inference_mode=False, logger=False, enable_progress_bar=False)
        trainer.test(editor, ls.EditingData(str(folder / "edits.json"), limit=limit), verbose=False)
        return Path(output, "results.jsonl").read_text()

    whole = run("whole")
    run("parts", limit=2)
    assert run("parts") == whole


def test_one_fact(folder):
    method = ls.UltraEdit(["down_proj"], lr=3e-3, normalization="turn")
    edited, edit = ls.edit_fact(str(folder / "llama"), "the cat is", "a dog", method=method, steps=30)
    assert edit.metrics[0]["edit_success"] == 1
    assert math.isfinite(sum(float(entries.values.abs().sum()) for entries in edit.patch.values()))
    plain = AutoModelForCausalLM.from_pretrained(folder / "llama", dtype="float32")
    edited.restore()
    assert all(torch.equal(p, plain.get_parameter(name)) for name, p in edited.model.named_parameters())
