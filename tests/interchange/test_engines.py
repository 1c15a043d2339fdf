"""What engines compute with a PEFT folder: their rules, applied to ours and compared with the live model."""

import json
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from backbones import build_tiny
from safetensors.torch import load_file
from trained import ROSELORA, SORA, as_trained, logits
from transformers import BertForSequenceClassification, LlamaForCausalLM

import lit_sparse as ls
from lit_sparse.interchange.engines import engine_notes

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
LAYERS = {"num_hidden_layers": 3}


def read(folder):
    """The configuration, and A and B of each layer by its full name."""
    config = json.loads((folder / "adapter_config.json").read_text())
    pairs = defaultdict(dict)
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        name, _, factor = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        pairs[name][factor] = tensor
    return config, pairs


def vllm(config, pairs, model):
    """One scale for all layers (vllm/lora/peft_helper.py and lora_weights.py); patterns are not read."""
    assert not config["modules_to_save"]
    assert all(pair["A"].shape[0] <= config["r"] for pair in pairs.values())  # copied into a buffer of rank r
    return {name: config["lora_alpha"] / config["r"] * pair["B"] @ pair["A"] for name, pair in pairs.items()}


def llama_cpp(config, pairs, model):
    """alpha by the rank of the tensor (llama.cpp, src/llama-adapter.h, get_scale); patterns are not converted."""
    return {name: config["lora_alpha"] / pair["B"].shape[1] * pair["B"] @ pair["A"] for name, pair in pairs.items()}


def tgi(config, pairs, model):
    """A projection is stacked over all layers of the model, ranks padded to 8, or dropped if one layer has none of it.

    text-generation-inference, server/text_generation_server/adapters/lora.py, prepare_weights.
    """
    stacks = defaultdict(list)
    for name in pairs:
        stacks[name.rpartition(".")[2]].append(name)
    whole = {leaf: names for leaf, names in stacks.items() if len(names) == model.config.num_hidden_layers}
    for names in whole.values():
        torch.stack([F.pad(pairs[name]["A"], (0, 0, 0, max(0, 8 - len(pairs[name]["A"])))) for name in names])
    return vllm(config, {name: pairs[name] for names in whole.values() for name in names}, model)


@torch.no_grad()
def difference(rule, folder, live):
    """The largest difference of logits between the live model and what an engine makes of the folder."""
    plain = build_tiny(LlamaForCausalLM, **LAYERS).double()
    for name, delta in rule(*read(folder), plain).items():
        plain.get_submodule(name).weight += delta
    return float((logits(plain, IDS) - logits(live, IDS)).abs().max())


@pytest.fixture(params=[SORA, ROSELORA], ids=lambda method: type(method).__name__)
def live(request):
    """A Llama whose layers keep from none to all of their ranks (SoRA), or all of them (RoseLoRA)."""
    return as_trained(build_tiny(LlamaForCausalLM, **LAYERS).double(), request.param)


@pytest.mark.parametrize("rule", [vllm, llama_cpp, tgi])
def test_the_default_folder_is_right_under_the_rule_of(rule, live, tmp_path):
    ls.export_peft(live, tmp_path / "lora")
    assert difference(rule, tmp_path / "lora", live) < 1e-10


@pytest.mark.parametrize(("rule", "right"), [(vllm, True), (llama_cpp, False), (tgi, False)])
def test_a_ragged_folder_is_not_for_every_engine(rule, right, tmp_path):
    live = as_trained(build_tiny(LlamaForCausalLM, **LAYERS).double(), SORA)
    report = ls.export_peft(live, tmp_path / "lora", "ragged")
    assert (difference(rule, tmp_path / "lora", live) < 1e-10) == right
    assert "for PEFT and transformers only" in str(report)
    assert "for PEFT and transformers only" in (tmp_path / "lora" / "README.md").read_text()


def test_the_report_and_the_card_give_the_bytes_of_both_layouts(tmp_path):
    live = as_trained(build_tiny(LlamaForCausalLM), SORA)
    reports = {layout: ls.export_peft(live, tmp_path / layout, layout) for layout in ("padded", "ragged")}
    pairs = {layout: read(tmp_path / layout)[1].values() for layout in reports}
    sizes = {
        layout: sum(tensor.nbytes for pair in found for tensor in pair.values()) for layout, found in pairs.items()
    }
    assert sizes["ragged"] < sizes["padded"]
    sentence = f"A and B take {sizes['padded']:,} bytes; the layout ragged, for PEFT and transformers only, would take"
    assert f"{sentence} {sizes['ragged']:,}." in str(reports["padded"])
    assert f"{sentence} {sizes['ragged']:,}." in (tmp_path / "padded" / "README.md").read_text()


@pytest.mark.parametrize(
    ("rank", "note"),
    [
        (16, None),
        (17, "vLLM loads rank 17 with --max-lora-rank 32 (its default is 16)."),
        (300, "vLLM loads rank 300 with --max-lora-rank 320 (its default is 16)."),
        (513, "vLLM loads ranks up to 512, and this is 513."),
    ],
)
def test_ranks_that_vllm_must_be_told_of_are_said(rank, note):
    assert engine_notes("padded", rank, 1, 1, [])[1:] == ([] if note is None else [note])


def test_a_head_that_engines_refuse_is_said(tmp_path):
    model = as_trained(build_tiny(BertForSequenceClassification), SORA)
    report = ls.export_peft(model, tmp_path / "lora")
    assert "classifier were trained whole and are in modules_to_save" in str(report)
    assert "vLLM refuses modules_to_save" in (tmp_path / "lora" / "README.md").read_text()
    assert "modules_to_save" not in str(ls.export_peft(model, tmp_path / "no-head", with_head=False))
