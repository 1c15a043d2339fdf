"""Where adapters are refused: over PEFT's, on weights that are not there, and on several devices."""

import copy

import accelerate
import peft
import pytest
import torch
from backbones import build_tiny
from torch import nn
from transformers import BertForSequenceClassification, LlamaForCausalLM

import lit_sparse as ls
from lit_sparse.adapters.injection import adapters_in, inject
from lit_sparse.errors import UsageError
from lit_sparse.methods.lora import LoRA
from lit_sparse.methods.sora import SoRA

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])


def refused(model: nn.Module, message: str) -> None:
    """The refusal comes before anything is changed."""
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(UsageError, match=message) as refusal:
        inject(model, SoRA("all-linear", rank=2, threshold=0.1))
    assert "\n" not in str(refusal.value)
    assert not any(True for _ in adapters_in(model))
    assert trainable == [n for n, p in model.named_parameters() if p.requires_grad]


def test_a_model_that_peft_adapted_is_refused():
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    message = r"PEFT adapted \w+ already, the first at '.*query'.*model\.merge_and_unload\(\), .* with load_peft\."
    adapted = peft.get_peft_model(build_tiny(BertForSequenceClassification), config)
    refused(adapted.base_model.model, message)
    merged = adapted.merge_and_unload()
    inject(merged, LoRA("all-linear"))
    assert not any("lora_" in name for name, _ in adapters_in(merged))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        lambda model: model.add_adapter(peft.LoraConfig(target_modules=["q_proj"])) or model,
    ],
    ids=["prompt tuning", "transformers' add_adapter"],
)
def test_every_form_of_peft_is_refused(wrap):
    refused(wrap(build_tiny(LlamaForCausalLM)), "PEFT adapted")


def test_a_folder_of_peft_is_refused_over_peft_too(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(build_tiny(LlamaForCausalLM), config)
    adapted.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="PEFT adapted"):
        ls.load_peft(adapted.base_model.model, tmp_path)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_an_offloaded_base_is_refused(offload, tmp_path):
    model = build_tiny(LlamaForCausalLM).eval()
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    if offload == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.dispatch_model(
            model, {**places, "model.rotary_emb": "cpu", "lm_head": "cpu"}, main_device="cpu", offload_dir=tmp_path
        )
    refused(model, r"LlamaForCausalLM has parameters on the meta device: .*SparseFSDP2Strategy \(fsdp2\)")


def test_weights_that_were_never_loaded_are_refused_unless_all_is_meant_to_be_empty():
    with torch.device("meta"):
        model = build_tiny(LlamaForCausalLM)
        inject(copy.deepcopy(model), LoRA())  # a dry run
    refused(model, "has parameters on the meta device")


def test_a_base_on_several_devices_is_refused():
    """The second device is a stand-in: PyTorch can compute nothing there, but says where parameters are."""
    model = build_tiny(LlamaForCausalLM)
    with torch.device("meta"):
        model.model.layers[1].to("meta")
        refused(model, r"is spread over the devices \['cpu', 'meta'\]: .*SparseFSDP2Strategy.*export_merged")


def test_adapters_that_were_spread_after_injection_are_refused_at_set_up():
    model = build_tiny(LlamaForCausalLM)
    method = LoRA(["q_proj"])
    inject(model, method)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    model.model.layers[1].to("meta")
    with pytest.raises(UsageError, match=r"LlamaForCausalLM is spread over the devices \['cpu', 'meta'\]"):
        ls.SparseSteps(method, model, optimizer, total_steps=3)
