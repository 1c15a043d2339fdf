"""The methods as a method of PEFT, in loops like that of PEFT's method comparison, and in the comparison itself."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backbones import build_tiny
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, LlamaForCausalLM, get_cosine_schedule_with_warmup

import lit_sparse as ls

peft = pytest.importorskip("peft")
tuners_utils = pytest.importorskip("peft.tuners.tuners_utils")
if not hasattr(tuners_utils.BaseTuner, "_get_adapter_state_dict"):
    pytest.skip("needs PEFT 0.20", allow_module_level=True)

FOLDER = Path(__file__).parents[1] / "benchmarks" / "peft_method_comparison"
CHECKOUT = os.environ.get("LIT_SPARSE_PEFT_CHECKOUT")
sys.path.insert(0, str(FOLDER))

from launch import sparse_steps
from peft_method import SparseConfig, register

STEPS = 5
TARGETS = {"target_modules": ["q_proj", "v_proj"], "rank": 4}
METHODS = {
    "LoRA": TARGETS,
    "SoRA": {**TARGETS, "budget": 0.4, "begin": 0, "end": 4},
    "RoseLoRA": {**TARGETS, "density": 0.2, "begin": 0, "end": 4},
}


@pytest.fixture(autouse=True)
def registered():
    register()


def peft_model(method: str) -> Any:
    torch.manual_seed(1)
    config = SparseConfig(task_type="CAUSAL_LM", method=method, arguments=METHODS[method])
    return peft.get_peft_model(build_tiny(LlamaForCausalLM), config)


def injected(method: str) -> tuple[LlamaForCausalLM, ls.SparseMethod]:
    torch.manual_seed(1)
    made = getattr(ls, method)(**METHODS[method])
    model = build_tiny(LlamaForCausalLM)
    ls.inject(model, made)
    return model, made


def batch(seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (2, 6), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def optimizer_and_scheduler(model: Any, *, max_steps: int, **options: Any) -> tuple[Any, Any]:
    """As the suite's function of this name makes them."""
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=1, num_training_steps=max_steps)


def train_as_the_suite(model: Any, clip: float = 0.1, launched: bool = True) -> None:
    """The loop of the suite's ``run.py``, as the launcher starts it or as it is."""
    utils = SimpleNamespace(get_optimizer_and_scheduler=optimizer_and_scheduler)
    with sparse_steps(utils) if launched else nullcontext():
        optimizer, scheduler = utils.get_optimizer_and_scheduler(model, max_steps=STEPS, lr=0.05, weight_decay=0.1)
        for step in range(STEPS):
            optimizer.zero_grad()
            model(**batch(step)).loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
    assert utils.get_optimizer_and_scheduler is optimizer_and_scheduler


def train_by_hand(model: LlamaForCausalLM, method: ls.SparseMethod) -> None:
    optimizer = torch.optim.AdamW(ls.parameter_groups(model, method), lr=0.05, weight_decay=0.1)
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=1, num_training_steps=STEPS)
    steps = ls.SparseSteps(method, model, optimizer, STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(**batch(step)).loss.backward()
        steps.observe()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("method", METHODS)
def test_get_peft_model_injects(method):
    model, (other, _) = peft_model(method), injected(method)
    torch.manual_seed(2)
    with torch.no_grad():
        for _, adapter in [*ls.adapters_in(model), *ls.adapters_in(other)]:
            adapter.lora_B_t.fill_(0.3)
    assert isinstance(model, peft.PeftModelForCausalLM)
    assert torch.equal(model(**batch(0)).logits, other(**batch(0)).logits)
    trained = sum(p.numel() for p in other.parameters() if p.requires_grad)
    assert model.get_nb_trainable_parameters() == (trained, sum(p.numel() for p in other.parameters()))
    assert model.generate(**{k: v for k, v in batch(0).items() if k != "labels"}, max_new_tokens=2).shape == (2, 8)


def test_the_pretrained_model_is_measured_without_adapters():
    model, plain = peft_model("SoRA"), build_tiny(LlamaForCausalLM)
    with torch.no_grad():
        for _, adapter in ls.adapters_in(model):
            adapter.lora_B_t.fill_(0.3)
    with_adapters = model(**batch(0)).logits
    with model.disable_adapter():
        assert torch.equal(model(**batch(0)).logits, plain(**batch(0)).logits)
    assert torch.equal(model(**batch(0)).logits, with_adapters)
    assert not torch.equal(with_adapters, plain(**batch(0)).logits)


@pytest.mark.parametrize("method", METHODS)
def test_the_suites_loop_takes_the_steps_of_one_with_sparse_steps(method):
    clip = torch.nn.utils.clip_grad_norm_
    model, (other, made) = peft_model(method), injected(method)
    train_as_the_suite(model)
    train_by_hand(other, made)
    assert torch.nn.utils.clip_grad_norm_ is clip
    state = model.get_base_model().state_dict()
    expected = other.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    ended = {"LoRA": "lora_A", "SoRA": "gate", "RoseLoRA": "lora_A"}[method]
    values = torch.cat([value.flatten() for name, value in state.items() if name.endswith(ended)])
    assert bool((values == 0).any()) == (method != "LoRA")


def test_without_clipping_the_first_step_is_an_error():
    with pytest.raises(ls.UsageError, match="gradients were not observed"):
        train_as_the_suite(peft_model("SoRA"), clip=0)


def test_other_methods_train_as_before():
    weights = []
    for launched in (True, False):
        torch.manual_seed(1)
        model = peft.get_peft_model(build_tiny(LlamaForCausalLM), peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
        train_as_the_suite(model, launched=launched)
        weights.append(peft.get_peft_model_state_dict(model))
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_is_the_lora_of_our_export_and_peft_loads_it(method, tmp_path):
    model = peft_model(method)
    train_as_the_suite(model)
    model.save_pretrained(str(tmp_path / "saved"))
    ls.export_peft(model.get_base_model(), tmp_path / "exported", layout="ragged")
    saved, exported = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("saved", "exported"))
    assert saved.keys() == exported.keys()
    assert all(torch.equal(saved[name], value) for name, value in exported.items())
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("saved", "exported")]
    for key in ("peft_type", "task_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        assert configs[0][key] == configs[1][key]
    assert sorted(configs[0]["target_modules"]) == sorted(configs[1]["target_modules"])
    dense = sum(a.lora_A.numel() + a.lora_B_t.numel() for _, a in ls.adapters_in(model))
    share = {"LoRA": 1.0, "SoRA": 0.4, "RoseLoRA": 1.0}[method]
    assert 0.8 * share * dense < sum(value.numel() for value in saved.values()) <= share * dense
    loaded = peft.PeftModel.from_pretrained(build_tiny(LlamaForCausalLM), str(tmp_path / "saved"))
    assert isinstance(loaded.base_model, peft.LoraModel)
    model.eval(), loaded.eval()
    torch.testing.assert_close(loaded(**batch(9)).logits, model(**batch(9)).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("folder", sorted(FOLDER.glob("experiments/*/*")), ids=lambda folder: folder.name)
def test_peft_reads_the_experiments(folder, tmp_path):
    config = peft.PeftConfig.from_pretrained(str(folder))
    written = json.loads((folder / "adapter_config.json").read_text())
    method = config.make()
    assert type(method).__name__ == written["method"]
    assert {name: getattr(method, name) for name in written["arguments"]} == written["arguments"]
    assert method.scale == 2  # that of the suite's LoRA
    assert folder.parent.name == f"lit-sparse-{config.method.lower()}"  # overwrites no result of the suite
    config.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(str(tmp_path)) == config
    json.dumps(config.to_dict())  # into the suite's results


def test_what_cannot_be_made_or_stored_is_an_error():
    with pytest.raises(ls.UsageError, match="no method 'Sora'"):
        SparseConfig(method="Sora")
    with pytest.raises(ls.UsageError, match=r"SoRA cannot be made of .*'budge'"):
        SparseConfig(method="SoRA", arguments={"budge": 0.5})
    config = SparseConfig(task_type="SEQ_CLS", method="LoRA", arguments={"target_modules": ["query"]})
    with pytest.raises(ls.UsageError, match=r"'classifier.weight' is no adapter of a linear layer"):
        peft.get_peft_model(build_tiny(BertForSequenceClassification), config)


@pytest.mark.slow
@pytest.mark.skipif(CHECKOUT is None, reason="needs LIT_SPARSE_PEFT_CHECKOUT=DIR, a clone of huggingface/peft")
def test_the_published_suite_runs_the_experiments():
    checkout = Path(str(CHECKOUT)).resolve()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout / "src"), str(FOLDER.parents[1])])}
    command = [sys.executable, "trial.py", str(checkout / "method_comparison" / "MetaMathQA"), "--steps", "10"]
    done = subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("lit-sparse-")]
    assert len(lines) == len(list(FOLDER.glob("experiments/*/*")))
    assert all(": success, " in line for line in lines)
    sizes = {line.partition("/")[0] + line.partition("rank")[2][:2]: int(line.split()[-2]) for line in lines}
    lora = sizes["lit-sparse-lora32"]
    assert sizes["lit-sparse-roselora32"] == lora
    assert 0.2 * lora < sizes["lit-sparse-sora32"] < 0.3 * lora  # a quarter, and the file's header
    assert 0.9 * lora < sizes["lit-sparse-sora64"] < 1.05 * lora  # a half of twice as much
