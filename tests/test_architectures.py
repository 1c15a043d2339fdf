"""Every architecture through the whole chain: inject, train, save, load, merge, count.

``python tests/test_architectures.py`` runs it and then writes the table of docs/backbones.md.
"""

from __future__ import annotations

import copy
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, Architecture, Batch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

import lit_sparse as ls
from lit_sparse.adapters.experts import AdaptedExperts
from lit_sparse.adapters.head import task_head
from lit_sparse.adapters.statistics import layer_sparsity, live_ranks, sparsity_of
from lit_sparse.adapters.survey import left_out, survey

DENSITY = 0.3
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "backbones.md"
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def all_linear(model: nn.Module) -> ls.SparseMethod:
    # Gates start as N(0, 1): two steps zero those below 1, about two thirds.
    return ls.SoRA(rank=4, threshold=0.5)


def all_that_can_be_named(model: nn.Module) -> ls.SparseMethod:
    """Embeddings, convolutions and output layers too."""
    names = [name for name, layer in survey(model, task_head(model)).items() if layer.refusal is None]
    return ls.RoseLoRA(target_modules=names, rank=4, density=DENSITY, begin=0, end=1)


@pytest.mark.parametrize("make_method", [all_linear, all_that_can_be_named])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_adapters_train_save_load_and_merge(architecture, make_method, tmp_path):
    model, batch = architecture.build(), architecture.batch()
    # Frozen for the moment: torch's attention takes another kernel when no weight needs a gradient.
    original, modules = outputs(model.requires_grad_(False), batch), classes(model)
    model.requires_grad_(True)
    keys = list(model.state_dict())
    module = ls.SparseModule(model, make_method(model), sgd, lr_schedule="constant", warmup=0.0)
    module.configure_model()
    require_close(outputs(model, batch), original, exact=not has_experts(model))

    start = copied_state(model)
    trainer = fit(module, batch)
    require_only_trained_changed(architecture, model, start)
    require_pruned(module)

    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    require_counted(model, trained_values(tmp_path / "trained.ckpt", model))
    loaded = ls.SparseModule.load_from_checkpoint(tmp_path / "trained.ckpt", backbone=architecture.build())
    trained = outputs(model, batch)
    require_close(outputs(loaded.model, batch), trained, exact=True)
    assert any(not torch.equal(a, b) for a, b in zip(trained, original, strict=True))

    loaded.model.double().set_experts_implementation("eager")  # the default one knows no float64
    batch = {name: value.double() if is_floating(value) else value for name, value in batch.items()}
    with EverythingInFloat64():
        before = outputs(loaded.model, batch)
        ls.merge(loaded.model)
        after = outputs(loaded.model, batch)
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert not list(ls.adapters_in(loaded.model))
    assert classes(loaded.model) == modules
    assert list(loaded.model.state_dict()) == keys


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("WavLM", "attention.q_proj", "WavLMAttention"),
        ("WavLM", "attention.out_proj", "WavLMAttention"),
        ("Mamba", "mixer.dt_proj", "MambaMixer"),
        ("Mamba", "mixer.out_proj", "MambaMixer"),  # in training, by the kernel for CUDA
        ("Mamba-2", "mixer.out_proj", "Mamba2Mixer"),
        ("Jamba", "mamba.dt_proj", "JambaMambaMixer"),
        ("SigLIP", "head.attention.out_proj", "MultiheadAttention"),
        ("DeBERTa-v3", "rel_embeddings", "DebertaV2Encoder"),
        ("GPT-2", "wte", "shares its weight with 'lm_head'"),
        ("T5", "shared", "shares its weight"),
        ("BART", "encoder.embed_positions", "computes something else than Embedding"),
        ("Whisper", "encoder.conv1", "Conv1d"),
        ("Mixtral", "mlp.gate", "MixtralTopKRouter"),
        ("XLNet", "rel_attn", "XLNetRelativeAttention"),
    ],
)
def test_a_layer_that_no_adapter_can_serve_is_refused_by_name(name, target, reason):
    model = BY_NAME[name].build()
    with pytest.raises(ls.UsageError, match=rf"target_modules .*{target}.*{reason}"):
        ls.inject(model, ls.LoRA(target_modules=[target]))
    assert not list(ls.adapters_in(model))


@pytest.mark.slow
def test_the_table_in_the_docs_is_the_generated_one():
    text = DOCUMENT.read_text(encoding="utf-8")
    version = ".".join(transformers.__version__.split(".")[:2])
    if f"transformers {version} |" not in text:
        pytest.skip(f"the table is of another version of transformers than {version}")
    assert text == with_table(text)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


def fit(module: ls.SparseModule, batch: Batch) -> Trainer:
    """Two steps on one batch: A has no gradient in the first, since B is zero."""
    options = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = Trainer(accelerator="cpu", max_epochs=1, **dict.fromkeys(options, False))
    trainer.fit(module, DataLoader([batch, batch], batch_size=None))
    return trainer


class EverythingInFloat64(TorchFunctionMode):
    """Norms, softmax and rotations that a model computes in float32 by name are computed in float64.

    Else they round, and outputs of two ways to compute the same differ by more than 1e-9 whatever we do.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widen(value):
            return torch.float64 if value is torch.float32 else value

        func = Tensor.double if func is Tensor.float else func
        return func(*map(widen, args), **{name: widen(value) for name, value in (kwargs or {}).items()})


@torch.no_grad()
def outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    """All floating-point numbers that the model gives in evaluation, the loss first."""
    training = model.training
    result = model.eval()(**batch)
    model.train(training)
    return list(floats(result))


def is_floating(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def floats(value):
    if is_floating(value):
        yield value
    elif isinstance(value, dict):  # a ModelOutput is one
        for part in value.values():
            yield from floats(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from floats(part)


def classes(model: nn.Module) -> dict[str, str]:
    """By name, since torch makes a class for every parametrized module."""
    return {name: type(module).__qualname__ for name, module in model.named_modules()}


def has_experts(model: nn.Module) -> bool:
    return any(isinstance(module, AdaptedExperts) for module in model.modules())


def copied_state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def require_close(found: list[Tensor], expected: list[Tensor], exact: bool) -> None:
    """Equal bit for bit; experts multiply in another order than the kernel of transformers does."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if exact else 1e-6)


def require_only_trained_changed(architecture: Architecture, model: nn.Module, start: dict[str, Tensor]) -> None:
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    adapters = {name for name, _ in ls.adapters_in(model)}
    own = ("lora_A", "lora_B_t", "gate", "sensitivity_A", "sensitivity_B_t")
    allowed = {f"{name}.{part}" for name in adapters for part in own}
    allowed |= {name for name in start if name.startswith(tuple(f"{part}." for part in architecture.head))}
    assert changed <= allowed
    # And every adapter did learn: none is passed by.
    learned = {name for name in adapters if f"{name}.lora_B_t" in changed}
    assert adapters - learned == {name for name in adapters if name.startswith(architecture.idle)}
    assert {part for part in architecture.head if any(n.startswith(f"{part}.") for n in changed)} == set(
        architecture.head
    )


def require_pruned(module: ls.SparseModule) -> None:
    adapters = [adapter for _, adapter in ls.adapters_in(module.model)]
    if module.method.gated:
        gates = torch.cat([adapter.gate for adapter in adapters])
        assert 0 < (gates == 0).sum() < gates.numel()
        return
    for adapter in adapters:
        for matrix in (adapter.lora_A, adapter.lora_B_t):  # a row is one of A, or a column of B
            most = max(1, int(DENSITY * matrix.shape[1] + 1e-9))
            assert (matrix[live_ranks(adapter)].count_nonzero(dim=1) <= most).all()  # idle ones have no scores


def trained_values(checkpoint, model: nn.Module) -> dict[str, np.ndarray]:
    """The checkpoint's tensors by their names in the model; nothing frozen is in it."""
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    values = {name.removeprefix("model."): value.numpy() for name, value in state.items()}
    assert not {name for name, parameter in model.named_parameters() if not parameter.requires_grad} & set(values)
    return values


def require_counted(model: nn.Module, values: dict[str, np.ndarray]) -> None:
    """``remaining_parameters`` against a count of what the checkpoint holds, rank by rank."""
    by_hand = {}
    for name in sorted(n.removesuffix(".lora_A") for n in values if n.endswith(".lora_A")):
        lora_A, lora_B_t = values[f"{name}.lora_A"], values[f"{name}.lora_B_t"]
        gate = values.get(f"{name}.gate", np.ones(len(lora_A)))
        by_hand[name] = sum(
            int((a != 0).sum() + (b != 0).sum())
            for a, b, g in zip(lora_A, lora_B_t, gate, strict=True)
            if g and a.any() and b.any()
        )
    assert {layer.name: layer.remaining_parameters for layer in layer_sparsity(model)} == by_hand
    total = sparsity_of([adapter for _, adapter in ls.adapters_in(model)])["remaining_parameters"]
    assert int(total) == sum(by_hand.values()) > 0


def with_table(document: str) -> str:
    """The document with the table for today's code between its marks."""
    before, _, rest = document.partition(f"{BEGIN}\n")
    _, _, after = rest.partition(f"{END}\n")
    version = ".".join(transformers.__version__.split(".")[:2])
    head = [f"transformers {version}", '`"all-linear"` adapts', "adapted when named", "trained whole", "never adapted"]
    rows = [head, ["---"] * len(head), *map(row, ARCHITECTURES)]
    return f"{before}{BEGIN}\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in rows) + f"{END}\n{after}"


def row(architecture: Architecture) -> list[str]:
    model = architecture.build()
    nameable = [n for n, layer in survey(model, task_head(model)).items() if layer.passed_over and not layer.refusal]
    adapters = ls.inject(model, ls.LoRA())
    kinds = {"Linear": "linear layers", "Experts": "weights of experts"}
    adapted = Counter(kinds[type(adapter).__name__.removeprefix("LowRank")] for adapter in adapters.values())
    left = {name: reason for name, reason in left_out(model).items() if name not in nameable}
    left |= {f"{start}*": "is never called: its adapters learn nothing" for start in architecture.idle}
    return [
        f"**{architecture.name}**<br>`{architecture.model_class}`",
        "<br>".join(f"{count} {kind}" for kind, count in adapted.items()),
        "<br>".join(patterns(nameable)),
        "<br>".join(f"`{name}`" for name in architecture.head),
        "<br>".join(by_reason(left)),
    ]


def patterns(names: Iterable[str]) -> list[str]:
    """Names that differ only in numbers as one, with a star for every number."""
    counted = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    return [f"`{pattern}`" for pattern in counted]


def by_reason(left: Mapping[str, str]) -> list[str]:
    names: dict[str, list[str]] = {}
    for name, reason in left.items():
        names.setdefault(reason, []).append(name)
    return [f"{', '.join(patterns(own))}: {reason}" for reason, own in names.items()]


if __name__ == "__main__":
    if pytest.main(["-q", __file__, "-k", "train_save_load_and_merge"]):
        sys.exit("Not written: an architecture fails.")
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
