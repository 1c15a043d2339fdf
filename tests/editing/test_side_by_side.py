"""Edits that are trained at the same time are those that would be trained alone."""

import logging
import re

import pytest
import torch
from backbones import build_tiny, save_tiny_llama
from edit_groups import adam, alone, batches, llama, require_alike, trained
from fake_gpu import GPU, fake_gpu
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

import lit_sparse as ls
from lit_sparse.editing.side_by_side import train_each
from lit_sparse.editing.training import train
from lit_sparse.errors import UsageError

METHODS = {
    "lora": ls.LoRA(["v_proj", "down_proj"], rank=2, alpha=8),
    "roselora": ls.RoseLoRA(["v_proj", "down_proj"], rank=4, alpha=16, density=0.2, begin=1, end=4, clamp=0.2),
    "held": ls.RoseLoRA("all-linear", rank=2, alpha=8, density=0.2, begin=1, end=4, update_every=2),
    "sora": ls.SoRA(["v_proj", "down_proj"], rank=4, alpha=16, threshold=0.02, freeze_zero_after=2, gate_lr=0.05),
    "ones": ls.SoRA(["v_proj"], rank=4, alpha=16, sparsity_weight=0.3, gate_init="ones", loraplus_lr_ratio=2.0),
    "gated": ls.GatedRoseLoRA(["down_proj"], rank=4, alpha=16, threshold=0.02, density=0.3, begin=1, end=4),
    "layers": ls.RoseLoRA(["v_proj", "down_proj"], rank=4, density=0.2, overrides={"v_proj": {"rank": 2}}),
}
OTHERS = {
    "budget": (ls.SoRA(["v_proj"], rank=4, budget=0.5), "SoRA compares the ranks"),
    "changed": (ls.RoseLoRA(["v_proj"], rank=4, changed=0.1), "RoseLoRA compares the ranks"),
    "penalty": (ls.SoRA(["v_proj"], rank=4, threshold=0.01, l1_weight=0.1), "SoRA compares the ranks"),
    "dropout": (ls.LoRA(["v_proj"], rank=4, dropout=0.1), "the method has dropout"),
    "embedding": (ls.LoRA(["embed_tokens"], rank=4), r"adapts layers as \['LowRankEmbedding'\]"),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pulls"),
    pytest.mark.filterwarnings("ignore:No gate became zero"),
    pytest.mark.filterwarnings("ignore:density .* lets BA change"),
]


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_each_is_as_if_it_were_alone(name, stops, caplog):
    model, groups, method = llama(), batches(5), METHODS[name]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stop_loss = None
    if stops:  # where three of five get to
        stop_loss = 1.0001 * sorted(trained.loss for trained in alone(model, groups, method, 12, adam, None))[2]
    expected = alone(model, groups, method, 12, adam, stop_loss)
    with caplog.at_level(logging.INFO):
        found = trained(model, groups, method, 12, adam, stop_loss, range(5))
    assert "one after another" not in caplog.text
    require_alike(found, expected, model)
    if stops:
        assert len({trained.steps for trained in found}) > 1, "some leave the batch before others"
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not list(ls.adapters_in(model))
    assert len({str(trained.patch) for trained in found}) == 5


@pytest.mark.parametrize("name", ["lora", "held", "gated"])
def test_no_step_waits_for_a_gpu(name, monkeypatch):
    """But for transformers, which asks in every forward pass whether there is padding."""
    steps = 6
    for function in ("get_rng_state", "set_rng_state"):
        ours = getattr(torch, function)
        monkeypatch.setattr(torch.cuda, function, lambda *state, ours=ours: ours(*state[: ours is torch.set_rng_state]))
    expected = trained(llama().float(), batches(5), METHODS[name], steps, adam, None, range(5))
    with fake_gpu() as gpu:
        model = llama().float().to(GPU)
        groups = [{key: value.to(GPU) for key, value in batch.items()} for batch in batches(5)]
        gpu.waits.clear()
        found = trained(model, groups, METHODS[name], steps, adam, None, range(5))
    waits = [w for w in gpu.waits if not w.under({"_ignore_causal_mask_sdpa", "patch_of_deltas", "check", "finish"})]
    # The rows of each edit, before the first step; the losses, after the last one.
    assert len(waits) <= 3, [str(wait) for wait in waits]
    require_alike(found, expected, llama().float(), tolerance=1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_share_a_model_is_trained_one_after_another(name, caplog):
    model, groups = llama(), batches(3)
    method, reason = OTHERS[name]
    expected = alone(model, groups, method, 6, adam, None)
    with caplog.at_level(logging.INFO):
        found = trained(model, groups, method, 6, adam, None, range(3))
    assert re.search(f"one after another: .*{reason}", caplog.text)
    require_alike(found, expected, model, tolerance=0)


def test_an_optimizer_that_looks_at_whole_matrices_is_given_one_edit_at_a_time(caplog):
    def adafactor(parameters):
        return torch.optim.Adafactor(parameters, lr=0.02)

    model, groups = llama(), batches(3)
    expected = alone(model, groups, METHODS["lora"], 6, adafactor, None)
    with caplog.at_level(logging.INFO):
        found = trained(model, groups, METHODS["lora"], 6, adafactor, None, range(3))
    assert "Adafactor may not step each entry by itself" in caplog.text
    require_alike(found, expected, model, tolerance=0)


@pytest.mark.parametrize(("dropout", "shared"), [(0.0, True), (0.1, False)])
def test_a_model_that_draws_random_numbers_edits_one_after_another(dropout, shared, caplog):
    torch.manual_seed(0)
    model = build_tiny(GPT2LMHeadModel, resid_pdrop=dropout, embd_pdrop=0.0, attn_pdrop=0.0)
    model = model.double().eval().requires_grad_(False)
    method, groups = ls.RoseLoRA(["c_attn", "c_fc"], rank=2, density=0.2, begin=1, end=4), batches(3)
    expected = alone(model, groups, method, 6, adam, None)
    with caplog.at_level(logging.INFO):
        found = trained(model, groups, method, 6, adam, None, range(3))
    assert ("the model draws random numbers" not in caplog.text) == shared
    require_alike(found, expected, model, tolerance=1e-5 if shared else 0)


def test_rows_that_a_model_mixes_are_noticed(caplog):
    class Flat(torch.nn.Module):
        """A layer that sees tokens without rows, as in some models."""

        def __init__(self, layer):
            super().__init__()
            self.down_proj = layer

        def forward(self, x):
            return self.down_proj(x.flatten(0, 1)).view(*x.shape[:2], -1)

    model, groups = llama(), batches(3)
    for block in model.model.layers:
        block.mlp.down_proj = Flat(block.mlp.down_proj)
    method = ls.LoRA(["down_proj"], rank=2)
    expected = alone(model, groups, method, 6, adam, None)
    with caplog.at_level(logging.INFO):
        found = trained(model, groups, method, 6, adam, None, range(3))
    assert "an adapted layer gets an input of shape" in caplog.text
    require_alike(found, expected, model, tolerance=0)
    assert not list(ls.adapters_in(model))


def test_too_little_memory_halves_the_number(monkeypatch, caplog):
    """The device's own error, from a layer that is asked for more than two rows."""
    model, groups = llama(), [batch for batch in batches(9) if len(batch["labels"]) == 1]
    groups += [{name: tensor.clone() for name, tensor in groups[0].items()}]
    assert len(groups) == 4

    def small(module, inputs):
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("out of memory")

    expected = alone(model, groups, METHODS["lora"], 6, adam, None)
    hook = model.lm_head.register_forward_pre_hook(small)
    with caplog.at_level(logging.INFO):
        found = trained(model, groups, METHODS["lora"], 6, adam, None, range(4))
    hook.remove()
    assert "too small for 4 edits side by side: trying 2" in caplog.text
    require_alike(found, expected, model)


def test_a_method_that_trains_a_head_is_refused_as_for_one_edit():
    method = ls.LoRA(["v_proj"], rank=2, train_head=["model.norm"])
    with pytest.raises(UsageError, match="set train_head to false"):
        trained(llama(), batches(2), method, 6, adam, None, range(2))


@pytest.mark.slow
def test_in_bfloat16_to_its_rounding(tmp_path):
    save_tiny_llama(tmp_path / "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.bfloat16).eval().requires_grad_(False)
    groups, method = batches(4), METHODS["lora"]
    expected = alone(model, groups, method, 4, adam, None)
    found = trained(model, groups, method, 4, adam, None, range(4))
    for a, b in zip(found, expected, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=0.02)


def test_edits_whose_requests_take_turns_are_trained_one_after_another(caplog):
    model, groups, method = llama(), batches(4), METHODS["lora"]
    edits = [groups[:2], groups[2:]]
    expected = []
    for seed, turns in enumerate(edits):
        torch.manual_seed(seed)
        expected.append(train(model, turns, method, 6, adam, None))
    with caplog.at_level(logging.INFO):
        found = list(train_each(model, edits, method, 6, adam, None, range(2)))
    assert "one after another: the requests of an edit take turns" in caplog.text
    require_alike(found, expected, model, tolerance=0)
