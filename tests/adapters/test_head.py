"""lit_sparse.adapters.head on the models whose heads it must find, and on half-precision heads end to end."""

import copy
import warnings

import pytest
import torch
import transformers
from backbones import build_tiny
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    PreTrainedModel,
    T5ForConditionalGeneration,
)

from lit_sparse.adapters.head import keep_precision, output_embeddings, pretrained_bodies, task_head
from lit_sparse.adapters.injection import inject
from lit_sparse.adapters.survey import left_out
from lit_sparse.methods.lora import LoRA
from lit_sparse.modules.base import SparseModule

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])

HEADS = {
    "BertForSequenceClassification": ["classifier"],
    "BertForTokenClassification": ["classifier"],
    "BertForQuestionAnswering": ["qa_outputs"],
    "RobertaForSequenceClassification": ["classifier"],
    "DebertaV2ForSequenceClassification": ["pooler", "classifier"],
    "DistilBertForSequenceClassification": ["pre_classifier", "classifier"],
    "AlbertForSequenceClassification": ["classifier"],
    "GPT2ForSequenceClassification": ["score"],
    "LlamaForSequenceClassification": ["score"],
    "ViTForImageClassification": ["classifier"],
    "T5ForSequenceClassification": ["classification_head"],
    "GPT2LMHeadModel": [],
    "LlamaForCausalLM": [],
    "T5ForConditionalGeneration": [],
    "BertForMaskedLM": [],
    "BertModel": [],
    "GPT2Model": [],
    "LlamaModel": [],
}


class Own(nn.Module):
    """What a user writes around an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = build_tiny(BertModel)
        self.activation = nn.Tanh()
        self.out = nn.Linear(32, 3)
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.out(self.activation(self.encoder(input_ids).pooler_output)) * self.temperature


@pytest.mark.parametrize(("name", "head"), HEADS.items(), ids=HEADS)
def test_the_head_is_what_the_task_added(name, head):
    assert task_head(build_tiny(getattr(transformers, name))) == head


def test_a_tied_and_an_untied_output_layer_are_both_no_head():
    for tied in (True, False):
        model = build_tiny(LlamaForCausalLM, tie_word_embeddings=tied)
        assert task_head(model) == []
        assert list(output_embeddings(model)) == [model.lm_head]


def test_everything_beside_the_encoder_of_an_own_module_is_its_head():
    assert sorted(task_head(Own())) == ["out", "temperature"]
    nested = nn.ModuleDict({"inner": Own(), "extra": nn.Sequential(nn.ReLU(), nn.Linear(3, 2)), "loss": nn.MSELoss()})
    assert sorted(task_head(nested)) == ["extra", "inner.out", "inner.temperature"]


def test_a_language_model_beside_other_layers_keeps_its_output_layer():
    model = nn.ModuleDict({"lm": build_tiny(LlamaForCausalLM), "value": nn.Linear(32, 1)})
    assert task_head(model) == ["value"]
    assert [name for name, _ in pretrained_bodies(model)] == ["lm.model"]


def test_two_encoders_are_two_bodies():
    model = nn.ModuleDict(
        {
            "question": build_tiny(BertModel),
            "answer": build_tiny(BertForSequenceClassification),
            "score": nn.Linear(2, 1),
        }
    )
    assert [name for name, _ in pretrained_bodies(model)] == ["question", "answer.bert"]
    assert sorted(task_head(model)) == ["answer.classifier", "score"]


def test_without_a_hugging_face_model_there_is_no_recognisable_head():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    assert pretrained_bodies(model) == []
    assert task_head(model) == []


class OwnPreTrained(PreTrainedModel):
    """A user's own class of transformers' kind, whose prefix names none of its parts."""

    config_class = BertConfig

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.encoder = build_tiny(BertModel)
        self.classifier = nn.Linear(32, 3)
        self.post_init()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.classifier(self.encoder(input_ids).pooler_output)


class OwnLightning(LightningModule):
    """The same in a LightningModule, the model one level down."""

    def __init__(self) -> None:
        super().__init__()
        self.net = OwnPreTrained(BertConfig())
        self.classifier = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("make", "head"),
    [
        (lambda: OwnPreTrained(BertConfig()), ["classifier"]),
        (OwnLightning, ["net.classifier", "classifier"]),
        (Own, ["out", "temperature"]),
    ],
    ids=["PreTrainedModel", "LightningModule", "nn.Module"],
)
def test_all_linear_leaves_a_classifier_beside_a_bare_backbone_alone(make, head):
    model = make()
    assert sorted(task_head(model)) == sorted(head)
    adapters = inject(model, LoRA())
    assert len(adapters) == 13  # two blocks of six, and the pooler
    assert not any(name.startswith(tuple(head)) for name in adapters)
    frozen = make()
    inject(frozen, LoRA(train_head=False))
    reasons = left_out(frozen)
    assert all("lies outside the pretrained body" in reasons[name] for name in head if name in reasons)
    assert any(name in reasons for name in head)


def test_a_class_on_top_of_a_complete_model_keeps_its_body():
    class OwnT5(T5ForConditionalGeneration):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    assert task_head(build_tiny(OwnT5)) == []


def test_a_model_without_a_recognisable_head_is_not_adapted_in_silence():
    def encoder() -> nn.Module:
        return nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(8, 8), nn.Tanh()), "classifier": nn.Linear(8, 2)})

    with pytest.warns(UserWarning, match="holds no Hugging Face model, so its task head cannot be told from the rest"):
        inject(encoder(), LoRA())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapters = inject(encoder(), LoRA(train_head=["classifier"]))
    assert list(adapters) == ["encoder.0"]


def test_an_own_head_with_a_bare_parameter_is_trained():
    model = Own()
    inject(model, LoRA())
    model(IDS).sum().backward()
    assert model.temperature.grad is not None
    assert model.out.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "BertForSequenceClassification",
        "RobertaForSequenceClassification",
        "DebertaV2ForSequenceClassification",
        "GPT2ForSequenceClassification",
        "LlamaForSequenceClassification",
    ],
)
def test_a_half_precision_model_trains_its_head_in_float32(name, dtype):
    model = build_tiny(getattr(transformers, name)).to(dtype).eval()
    reference = build_tiny(getattr(transformers, name)).to(dtype).float().eval()
    inject(model, LoRA())
    labels = torch.tensor([0, 1])
    output, expected = (m(IDS, labels=labels) for m in (model, reference))
    assert output.logits.dtype == torch.float32
    torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=0.03)
    output.loss.backward()
    expected.loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
    for head in task_head(reference):
        for n, parameter in reference.get_submodule(head).named_parameters():
            gradient = trained[f"{head}.{n}"].grad
            torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=0.03)
            assert gradient.any()


def test_a_small_update_of_a_half_precision_head_is_not_lost():
    model = build_tiny(BertForSequenceClassification).to(torch.bfloat16)
    with torch.no_grad():
        model.classifier.weight.fill_(1.0)
    inject(model, LoRA())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.classifier.weight.grad = torch.full_like(model.classifier.weight, 1e-4)  # bfloat16 steps by 4e-3 below 1
    optimizer.step()
    torch.testing.assert_close(model.classifier.weight, torch.full((2, 32), 1 - 1e-4), rtol=0, atol=1e-6)


def test_inputs_are_cast_however_they_are_passed_and_integers_are_not():
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, hidden: Tensor, *, index: Tensor, name: str) -> Tensor:
            assert index.dtype == torch.int64
            assert name == "x"
            return self.linear(hidden)[index]

    head = Head().to(torch.bfloat16)
    keep_precision(head, head)
    hidden, index = torch.randn(3, 4, dtype=torch.bfloat16), torch.tensor([2, 0])
    expected = head.linear(hidden.float())[index]
    assert torch.equal(head(hidden, index=index, name="x"), expected)
    assert torch.equal(head(hidden=hidden, index=index, name="x"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_head_in_full_precision_is_left_alone(dtype):
    head = nn.Linear(4, 2, dtype=dtype)
    keep_precision(head, head)
    assert head.weight.dtype == dtype
    with pytest.raises(RuntimeError, match="dtype"):  # nothing is cast on the way in
        head(torch.randn(1, 4, dtype=torch.bfloat16))


def parts_of(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Normed(Own):
    """With a buffer of running statistics in the head, which is trained with it."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 3))


@pytest.mark.parametrize("narrow", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.bfloat16)])
def test_what_is_trained_stays_float32_whatever_the_rest_becomes(narrow):
    model = Normed()
    inject(model, LoRA(["query"], rank=2))
    before = [parameter.detach().clone() for parameter in parts_of(model)]
    assert len(before) > 5  # adapters, a module and a bare parameter
    model(IDS).sum().backward()
    for changed in (model, copy.deepcopy(model)):
        narrow(changed)
        trained = parts_of(changed)
        assert all(torch.equal(now, then) for now, then in zip(trained, before, strict=True))
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in trained)  # a copy has none
        assert changed.out[0].running_mean.dtype == torch.float32
        assert changed.encoder.pooler.dense.weight.dtype == narrow(nn.Linear(1, 1)).weight.dtype
    narrow(model)(IDS).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in parts_of(model))


def test_a_head_that_was_never_narrowed_pays_nothing():
    model = Own()
    inject(model, LoRA(["query"], rank=2))
    model.to("cpu")
    assert not model.out._forward_pre_hooks


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@pytest.mark.parametrize("labels", [torch.tensor([0, 1]), torch.tensor([0.25, -1.5])], ids=["classes", "numbers"])
def test_the_head_learns_in_float32_under_true_half_precision(precision, labels):
    numbers = labels.is_floating_point()
    model = build_tiny(BertForSequenceClassification, num_labels=1 if numbers else 2)
    module = SparseModule(
        model,
        LoRA(["query"], rank=2),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=1e-6),
        lr_schedule="constant",
        warmup=0.0,
    )
    start = model.classifier.weight.detach().clone()
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    rows = [{"input_ids": IDS, "labels": labels}]
    Trainer(max_steps=1, precision=precision, **options).fit(module, DataLoader(rows, batch_size=None))
    assert model.bert.pooler.dense.weight.itemsize == 2
    assert model.classifier.weight.dtype == torch.float32
    # Steps of lr · gradient, which half precision would round away.
    assert 0 < (model.classifier.weight - start).abs().max() < 1e-4
