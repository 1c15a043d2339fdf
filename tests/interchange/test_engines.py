"""What engines compute with a PEFT folder: their rules, applied to ours and compared with the live model."""

import pytest
import torch
from backbones import build_tiny
from engine_rules import apply, llama_cpp, read, tgi, vllm
from trained import ROSELORA, SORA, as_trained, logits
from transformers import BertForSequenceClassification, LlamaForCausalLM

import lit_sparse as ls
from lit_sparse.interchange.engines import engine_notes

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
LAYERS = {"num_hidden_layers": 3}


@torch.no_grad()
def difference(rule, folder, live):
    """The largest difference of logits between the live model and what an engine makes of the folder."""
    plain = build_tiny(LlamaForCausalLM, **LAYERS).double()
    return float((logits(apply(rule, folder, plain), IDS) - logits(live, IDS)).abs().max())


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
    assert engine_notes("padded", rank, 1, 1, [], experts=False)[1:] == ([] if note is None else [note])


def test_a_head_that_engines_refuse_is_said(tmp_path):
    model = as_trained(build_tiny(BertForSequenceClassification), SORA)
    report = ls.export_peft(model, tmp_path / "lora")
    assert "Trained whole and in modules_to_save: classifier. PEFT" in str(report)
    assert "vLLM refuses them" in (tmp_path / "lora" / "README.md").read_text()
    assert "modules_to_save" not in str(ls.export_peft(model, tmp_path / "no-head", with_head=False))
