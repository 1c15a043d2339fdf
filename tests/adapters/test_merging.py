"""lit_sparse.adapters.merging: what merge refuses before it changes a weight."""

import re

import pytest
import torch
from backbones import build_tiny
from trained import SORA, as_trained
from transformers import BertForSequenceClassification, GPT2LMHeadModel, MixtralForCausalLM

import lit_sparse as ls
from lit_sparse.adapters.experts import LowRankExperts

IDS = torch.tensor([[5, 6, 7, 8]])
EXPERTS = ls.SoRA(["gate_up_proj", "q_proj"], rank=2, threshold=0.1)


def frozen(model):
    """A copy of the frozen weights."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["lora_A", "lora_B_t", "gate"])
@pytest.mark.parametrize(
    ("model_class", "method"),
    [(BertForSequenceClassification, SORA), (GPT2LMHeadModel, SORA), (MixtralForCausalLM, EXPERTS)],
)
def test_a_value_that_is_not_finite_is_refused_before_a_weight_changes(model_class, method, part, value, tmp_path):
    model = as_trained(build_tiny(model_class), method)
    adapters = dict(ls.adapters_in(model))
    kind = LowRankExperts if model_class is MixtralForCausalLM else object
    name = [n for n, a in adapters.items() if isinstance(a, kind) and a.gate.any()][-1]  # the last: others come before
    with torch.no_grad():
        getattr(adapters[name], part).view(-1)[0] = value
    before = frozen(model)
    with pytest.raises(ls.UsageError, match=re.escape(f"['{name}'] would have weights that are not finite")):
        ls.merge(model)
    torch.testing.assert_close(frozen(model), before, rtol=0, atol=0)
    assert dict(ls.adapters_in(model)) == adapters
    for write in (ls.export_peft, ls.save_adapter, ls.export_delta, ls.export_merged):
        with pytest.raises(ls.UsageError, match=re.escape(f"'{name}.{part}'] hold values that are not finite")):
            write(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_sum_that_is_too_large_for_the_weights_is_refused():
    model = build_tiny(BertForSequenceClassification).half()
    adapter = next(iter(ls.inject(model, ls.LoRA(["query"], rank=1, alpha=1)).values()))
    with torch.no_grad():
        adapter.lora_A.fill_(300)
        adapter.lora_B_t.fill_(300)  # 90,000 is finite in float32 and not in float16
    before = frozen(model)
    with pytest.raises(ls.UsageError, match="the sum is too large for the dtype of the weights"):
        ls.merge(model)
    torch.testing.assert_close(frozen(model), before, rtol=0, atol=0)
    assert ls.merge(model.float()).bert.encoder.layer[0].attention.self.query.weight.max() > 80_000


def test_a_quantized_model_that_is_not_merged_stays_quantized():
    torchao = pytest.importorskip("torchao.quantization")
    model = build_tiny(BertForSequenceClassification)
    torchao.quantize_(model.bert.encoder, torchao.Int8WeightOnlyConfig())
    adapters = ls.inject(model.eval(), ls.LoRA(["query"], rank=2))
    before, layers = model(IDS).logits, [adapter.base for adapter in adapters.values()]
    with torch.no_grad():
        next(iter(adapters.values())).lora_A[0, 0] = float("inf")
    with pytest.raises(ls.UsageError, match="so nothing is merged"):
        ls.merge(model)
    assert [adapter.base for adapter in adapters.values()] == layers
    next(iter(adapters.values())).reset_parameters()
    assert torch.equal(model(IDS).logits, before)


def test_what_was_infinite_in_the_backbone_may_stay_so():
    model = build_tiny(BertForSequenceClassification)
    model.bert.encoder.layer[0].attention.self.query.weight.data[0, 0] = -float("inf")
    weight = ls.merge(as_trained(model, SORA)).bert.encoder.layer[0].attention.self.query.weight
    assert weight[0, 0] == -float("inf")
    assert weight.isfinite().sum() == weight.numel() - 1


def test_a_frozen_adapter_is_checked_too(tmp_path):
    model = as_trained(build_tiny(BertForSequenceClassification), SORA)
    name, adapter = list(ls.adapters_in(model))[1]
    adapter.requires_grad_(False).lora_B_t[0, 0] = float("nan")
    with pytest.raises(ls.UsageError, match=re.escape(f"['{name}.lora_B_t'] hold values that are not finite")):
        ls.save_adapter(model, tmp_path / "out")
