"""Every method on every kind of layer, as on a GPU: the host waits for none of the steps, and devices do not mix.

See fake_gpu.py. The same run on the CPU gives the numbers to compare with.
"""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import save_tiny_llama
from every_method import CHOSEN, KINDS, METHODS, QUANTIZED, STEPS, Features, Loop, Routed, loss_of
from fake_gpu import CPU, GPU, SECOND_GPU, Wait, fake_gpu
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lit_sparse as ls
from lit_sparse.adapters.base import LowRankLayer
from lit_sparse.adapters.experts import LowRankExperts
from lit_sparse.adapters.statistics import layer_sparsity, sparsity_of

BOUNDARIES = {
    "cut": "a cut of singular values decomposes layer after layer, at most 33 times in a run",
    "cost_of_each": "the costs of ranks go to the device when the first budget is applied, and after a compaction",
    "_owners": "the layer of every rank goes to the device when the first entries are chosen, and after a compaction",
    "resume": "in the first step of a run of SpIEL, whether a checkpoint holds candidates is read from every layer",
}
"""What may wait within a step, and why; docs/gpu.md has the list."""


BOTH = {"SoRA, threshold", "GatedRoseLoRA, budget"}
"""They have gates, masks, a budget and a threshold; without ``slow``, the others are run on one kind of layer."""

every_pair = pytest.mark.parametrize(
    ("method", "kind"),
    [
        pytest.param(method, kind, marks=[] if kind == "linear" or method in BOTH else pytest.mark.slow)
        for method in METHODS
        for kind in KINDS
        if kind not in QUANTIZED or METHODS[method](rank=4).init_weights == "lora"  # others start from the weight
    ],
)
quiet = pytest.mark.filterwarnings("ignore::UserWarning")


def tensors_of(loop: Loop) -> dict[str, Tensor]:
    """Everything that has to be on the device, buffers that no checkpoint holds among it."""
    found = {**dict(loop.model.named_parameters()), **dict(loop.model.named_buffers())}
    states = enumerate(loop.optimizer.state.values())
    found |= {f"{i}.{k}": v for i, state in states for k, v in state.items() if k != "step"}
    return found


def unexpected(waits: list[Wait]) -> list[str]:
    return [str(wait) for wait in waits if not wait.under(BOUNDARIES)]


@quiet
@every_pair
def test_a_run_waits_for_the_gpu_only_where_it_may(method: str, kind: str, tmp_path: Path) -> None:
    """Inject, train, log, compact, train on, save, load and merge, with the numbers of the CPU."""
    with fake_gpu() as gpu:
        loop = Loop(kind, method, GPU)
        assert {t.device for t in tensors_of(loop).values()} == {GPU}
        waited = []
        for number in range(1, STEPS):
            gpu.waits.clear()
            loop.step()
            assert unexpected(gpu.waits) == []
            waited += [number] if gpu.waits else []
        assert len(waited) <= (2 if any(word in method for word in ("budget", "changed", "penalty")) else 0), waited
        assert all(number <= CHOSEN for number in waited)  # the rest of the run is free of waits
        plain = {name: t for name, t in tensors_of(loop).items() if type(t) in (Tensor, nn.Parameter)}
        result = {name: tensor.cpu() for name, tensor in plain.items()}

        gpu.waits.clear()
        sparsity_of(loop.adapters)  # what SparsityMonitor logs
        assert gpu.waits == []
        layers = layer_sparsity(loop.model)
        gpu.waits.clear()
        ls.compact(loop.model, loop.optimizer)
        assert len(gpu.waits) <= 2, [str(wait) for wait in gpu.waits]  # whether B was trained, and all numbers of ranks
        gpu.waits.clear()
        loop.step()
        assert unexpected(gpu.waits) == []
        assert {t.device for t in tensors_of(loop).values()} == {GPU}

        if not loop.method.changes_weights:  # of which only the whole model is exported
            ls.save_adapter(loop.model, tmp_path, batch={"ids": loop.ids})
            fresh = KINDS[kind][0]().to(GPU)
            ls.load_adapter(fresh, tmp_path)
            assert {t.device for t in (*fresh.parameters(), *fresh.buffers())} == {GPU}
        assert {p.device for p in ls.merge(loop.model).parameters()} == {GPU}
    alike = Loop(kind, method, CPU, foreach=True)
    for _ in range(1, STEPS):
        alike.step()
    expected = tensors_of(alike)
    for name, value in result.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    assert layers == layer_sparsity(alike.model)


ENTRIES: dict[str, Callable[..., ls.Method]] = {
    "SHiRA": lambda names, rank, **o: ls.SHiRA(names, changed=0.3, **o),
    "SHiRA, gradient": lambda names, rank, **o: ls.SHiRA(names, changed=0.3, mask="gradient", **o),
    "LIFT": lambda names, rank, **o: ls.LIFT(names, changed=0.3, filter_rank=rank, **o),
    "SpIEL": lambda names, rank, **o: ls.SpIEL(names, changed=0.3, update_every=4, window=2, **o),
}


@quiet
@pytest.mark.parametrize("method", ENTRIES)
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "linear in bfloat16"])
def test_a_run_of_single_entries_waits_for_the_gpu_in_its_first_step_at_most(method: str, kind: str) -> None:
    with fake_gpu() as gpu:
        loop = Loop(kind, ENTRIES[method], GPU)
        assert {t.device for t in tensors_of(loop).values()} == {GPU}
        gpu.waits.clear()
        loop.step()
        assert unexpected(gpu.waits) == []
        assert bool(gpu.waits) == (method == "SpIEL")
        gpu.waits.clear()
        for _ in range(1, STEPS):
            loop.step()
        sparsity_of(loop.adapters)
        assert gpu.waits == []
        result = {name: tensor.cpu() for name, tensor in tensors_of(loop).items()}
        assert {p.device for p in ls.merge(loop.model).parameters()} == {GPU}
    alike = Loop(kind, ENTRIES[method], CPU, foreach=True)
    for _ in range(STEPS):
        alike.step()
    expected = tensors_of(alike)
    for name, value in result.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


# What the audit is for is found


@pytest.mark.parametrize("wait", ["item", "__bool__", "__float__", "tolist", "cpu", "nonzero", "unique"])
def test_a_planted_wait_is_found(wait: str) -> None:
    class Reading(ls.SoRA):
        def after_step(self, adapters: Any, step: Any, observed: Any) -> None:
            super().after_step(adapters, step, observed)
            getattr(adapters[0].gate[:1].detach(), wait)()

    with fake_gpu() as gpu:
        loop = Loop("linear", functools.partial(Reading, threshold=0.02), GPU)
        gpu.waits.clear()
        loop.step()
        (found,) = gpu.waits
    assert found.under({"after_step"})
    assert "test_gpu.py" in str(found)


def test_a_planted_buffer_of_the_host_is_found() -> None:
    class Misplaced(ls.SoRA):
        def adapt(self, *arguments: Any) -> ls.LowRankAdapter:
            adapter = super().adapt(*arguments)
            adapter.register_buffer("count", torch.zeros(len(adapter.lora_A)), persistent=False)
            return adapter

        def after_step(self, adapters: Any, step: Any, observed: Any) -> None:
            super().after_step(adapters, step, observed)
            for adapter in adapters:
                adapter.count += adapter.gate.detach() == 0

    with fake_gpu():
        loop = Loop("linear", functools.partial(Misplaced, threshold=0.02), GPU)
        assert {t.device for t in tensors_of(loop).values()} == {CPU, GPU}
        with pytest.raises(RuntimeError, match="at least two devices, cpu and cuda:0!"):
            loop.step()


def test_a_planted_copy_to_the_gpu_is_found() -> None:
    with fake_gpu() as gpu:
        x, rows = torch.randn(4, device="cuda"), torch.randn(4)
        copies = (rows.cuda, lambda: torch.tensor([1.0], device="cuda"), lambda: x.copy_(rows), lambda: x[[0, 1]])
        for copy_over in copies:
            gpu.waits.clear()
            copy_over()
            assert len(gpu.waits) == 1
        gpu.waits.clear()
        rows.to("cuda", non_blocking=True), torch.zeros(3, device="cuda"), x + torch.tensor(1.0)
        assert gpu.waits == []


def test_every_method_and_every_kind_of_layer_is_audited() -> None:
    public = {getattr(ls, name) for name in dir(ls) if name[0].isupper()}
    methods = {m for m in public if inspect.isclass(m) and issubclass(m, ls.SparseMethod)} - {ls.SparseMethod}
    assert {type(make(rank=4)) for make in METHODS.values()} == methods
    seen = set()
    for kind, (_, names) in KINDS.items():
        adapters = ls.inject(KINDS[kind][0]().to(CPU), ls.LoRA(names, train_head=False)).values()
        seen |= {type(adapter) for adapter in adapters}
    assert seen == set(LowRankLayer.__subclasses__()) | {LowRankExperts}


# Several devices, and GPUs without a kernel


def test_a_model_on_two_gpus_is_refused() -> None:
    with fake_gpu():
        model = Features(nn.Linear(16, 16)).to(GPU)
        model.out.to(SECOND_GPU)
        with pytest.raises(RuntimeError, match="at least two devices, cuda:0 and cuda:1!"):
            model(torch.zeros(2, 3, dtype=torch.long, device=GPU))
        with pytest.raises(ls.UsageError, match=r"spread over the devices \['cuda:0', 'cuda:1'\]"):
            ls.inject(model, ls.SoRA(["layer"]))


@quiet
@pytest.mark.parametrize(
    ("capability", "dtype", "once"),
    [((9, 0), "bfloat16", 0), ((10, 0), "bfloat16", 0), ((8, 0), "bfloat16", 1), ((9, 0), "float32", 1)],
)
def test_experts_ask_once_per_layer_where_torch_has_no_kernel(capability: Any, dtype: str, once: int) -> None:
    with fake_gpu(capability) as gpu:
        model = Features(Routed()).to(GPU, getattr(torch, dtype))
        ls.inject(model, ls.SoRA(["gate_up_proj", "down_proj"], rank=4, threshold=0.02, train_head=False))
        ids = torch.randint(11, (6, 8), device=GPU)
        gpu.waits.clear()
        loss_of(model, ids).backward()
    assert len(gpu.waits) == once, [str(wait) for wait in gpu.waits]
    assert all(wait.under({"sizes"}) for wait in gpu.waits)


# After training


def language_model(folder: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder).to(device)
    ls.inject(model, ls.SoRA(["q_proj", "down_proj"], rank=4, threshold=0.01))
    ls.add_tokens(model, AutoTokenizer.from_pretrained(folder), ["<new>"])
    for _, adapter in ls.adapters_in(model):
        nn.init.normal_(adapter.lora_B_t, std=0.1)
        nn.init.zeros_(adapter.gate[:2])
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@quiet
@pytest.mark.parametrize("export", [ls.export_peft, ls.save_adapter, ls.export_delta, ls.export_merged])
def test_an_export_is_the_same_file(export: Callable[..., Any], llama: str, tmp_path: Path) -> None:
    with fake_gpu():
        model = language_model(llama, GPU)
        assert {t.device for t in (*model.parameters(), *model.buffers())} == {GPU}
        export(model, tmp_path / "gpu")
    export(language_model(llama, CPU), tmp_path / "cpu")
    (file,) = (tmp_path / "gpu").glob("*.safetensors")
    assert file.read_bytes() == (tmp_path / "cpu" / file.name).read_bytes()


@quiet
def test_what_becomes_of_a_model_stays_on_the_gpu(llama: str) -> None:
    """Truncated, merged and back, generating, and edited."""
    ids = torch.tensor([[5, 6, 7]])
    with fake_gpu():
        model = language_model(llama, GPU)
        for change in (lambda: ls.truncate(model, 0.5), lambda: ls.merge(model), lambda: None):
            change()
            assert model.eval().generate(ids.to(GPU), max_new_tokens=3, pad_token_id=0).device == GPU
            assert {t.device for t in (*model.parameters(), *model.buffers())} == {GPU}
        plain = AutoModelForCausalLM.from_pretrained(llama).to(GPU)
        ls.inject(plain, ls.LoRA(["q_proj"], rank=2))
        nn.init.ones_(next(ls.adapters_in(plain))[1].lora_B_t)
        ls.unmerge(ls.merge(plain, keep=True))
        ls.unload(plain)
        tokenizer = AutoTokenizer.from_pretrained(llama)
        edited, _ = ls.edit_fact(plain, "the dog is", "cat", tokenizer=tokenizer, steps=40)
        assert {t.device for t in (*edited.model.parameters(), *edited.model.buffers())} == {GPU}
        edited.restore()
