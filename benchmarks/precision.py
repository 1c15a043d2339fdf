"""How far each precision is from float64: a training step, merged and exported models, for every method.

Run:  python benchmarks/precision.py [--json FILE]

A small model with every kind of layer but experts, adapters as in the midst of training, and random tokens. The
reference is the same model in float64, with the frozen weights rounded as they are in the precision: what is measured
is the error of computing, not that of the weights. Errors are relative, in the Euclidean norm: of the logits, of all
gradients, of what a step of fused SGD and the method changes, and of the logits of a merged model and of one with the
exported adapter. A CPU has no TF32: the operands of all products are rounded to its 10 bits instead. float16 has a
gradient scaler.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D
from variants import provenance, write_json

import lit_sparse as ls

NAMES = ["tokens", "up", "down", "mixed"]
METHODS: dict[str, Callable[[], ls.SparseMethod]] = {
    "LoRA": lambda: ls.LoRA(NAMES, rank=8, train_head=["out"]),
    "SoRA": lambda: ls.SoRA(NAMES, rank=8, threshold=0.01, train_head=["out"]),
    "RoseLoRA": lambda: ls.RoseLoRA(NAMES, rank=8, density=0.3, begin=0, end=1, train_head=["out"]),
    "gated RoseLoRA": lambda: ls.GatedRoseLoRA(
        NAMES, rank=8, threshold=0.01, density=0.3, begin=0, end=1, train_head=["out"]
    ),
}


@dataclass(frozen=True)
class Precision:
    """A way to compute.

    Args:
        eps: Distance of the numbers that products round to, relative.
        weights: Dtype of the frozen weights.
        autocast: Dtype of autocast; None without.
        tf32: Whether operands of products are rounded as TF32 does.
        quantized: Configuration of torchao's for the linear layers.
    """

    eps: float
    weights: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    tf32: bool = False
    quantized: str | None = None


PRECISIONS = {
    "32-true": Precision(2**-23),
    "32-true, TF32": Precision(2**-10, tf32=True),
    "bf16-mixed": Precision(2**-7, autocast=torch.bfloat16),
    "bf16-true": Precision(2**-7, weights=torch.bfloat16),
    "16-mixed": Precision(2**-10, autocast=torch.float16),
    "16-true": Precision(2**-10, weights=torch.float16),
    "32-true, fp8 weights": Precision(2**-23, quantized="Float8WeightOnlyConfig"),
    "bf16-true, fp8 weights": Precision(2**-7, weights=torch.bfloat16, quantized="Float8WeightOnlyConfig"),
    "bf16-true, int8 weights": Precision(2**-7, weights=torch.bfloat16, quantized="Int8WeightOnlyConfig"),
}


class Net(nn.Module):
    """An embedding, linear layers of both kinds, a convolution and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 64)
        self.up, self.down = nn.Linear(64, 128), Conv1D(64, 128)
        self.mixed, self.out = nn.Conv2d(64, 64, 3, padding=1), nn.Linear(64, 8)
        nn.init.normal_(self.down.weight, std=0.1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        x = x + self.down(nn.functional.gelu(self.up(x)))
        x = self.mixed(x.mT.unflatten(2, (3, -1))).flatten(2).mean(2)
        return self.out(x)


class Rounded(TorchDispatchMode):
    """Rounds the operands of products of float32 to 10 bits, as TF32 does."""

    PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "convolution", "convolution_backward")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in self.PRODUCTS:
            first = 1 if name.startswith(("addmm", "baddbmm")) else 0  # what is added is not rounded
            args = [_tf32(arg) if first <= i < first + 3 else arg for i, arg in enumerate(args)]
        return func(*args, **(kwargs or {}))


def _tf32(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.ndim < 2:
        return value
    return ((value.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def allowed(precision: Precision, path: str) -> float:
    """The error up to which a path is as exact as its precision.

    A sum of n products in float32 has an error of about the square root of n roundings, in others of one. What a step
    changes is the difference of weights that are stored in float32, and are larger than it.
    """
    single = precision.eps == torch.finfo(torch.float32).eps
    return precision.eps * (64 if single and path == "step" else 8 if single else 2)


@contextmanager
def computing(precision: Precision, device: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    autocast: AbstractContextManager[Any] = nullcontext()
    if precision.autocast is not None:
        autocast = torch.autocast(device, precision.autocast)
    torch.set_float32_matmul_precision("high" if precision.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = precision.tf32
    try:
        with autocast, Rounded() if precision.tf32 and device == "cpu" else nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def frozen(precision: Precision) -> Net:
    """The backbone, always the same, with weights as the precision has them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net().to(precision.weights)
    if precision.quantized is not None:
        from torchao import quantization

        chosen = {"up"}
        quantization.quantize_(
            net, getattr(quantization, precision.quantized)(), filter_fn=lambda _, name: name in chosen
        )
    return net


@torch.no_grad()
def adapt(net: Net, method: ls.SparseMethod) -> None:
    """Inject, and set adapters and head as training would leave them."""
    adapters = ls.inject(net, method)
    generator = torch.Generator().manual_seed(1)

    def draw(parameter: Tensor, size: float) -> None:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)

    for adapter in adapters.values():
        draw(adapter.lora_A, 0.1)
        draw(adapter.lora_B_t, 0.1)
        if getattr(method, "density", None) is not None:
            for matrix in (adapter.lora_A, adapter.lora_B_t):
                matrix.mul_(ls.functional.top_fraction_mask(matrix.abs(), method.density, dim=1))
        if adapter.gate is not None:
            draw(adapter.gate, 1.0)
            adapter.gate[::4] = 0
    for parameter in net.out.parameters():
        draw(parameter, 0.1)


@torch.no_grad()
def reference_of(precision: Precision) -> Net:
    """The backbone in float64, with weights as the precision has rounded them."""
    net = Net().double()
    for name, parameter in frozen(precision).named_parameters():
        net.get_parameter(name).copy_(parameter.dequantize() if type(parameter.data) is not Tensor else parameter)
    return net


def train(net: Net, method: ls.SparseMethod, ids: Tensor, precision: Precision) -> dict[str, Tensor]:
    """The logits, the gradients, and what one step of a fused optimizer and the method changes."""
    device = ids.device.type
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    before = torch.cat([parameter.detach().flatten() for parameter in parameters])
    scaler = torch.amp.GradScaler(device, enabled=torch.float16 in (precision.autocast, precision.weights))
    optimizer = torch.optim.SGD(ls.parameter_groups(net, method), lr=0.1, fused=True)
    steps = ls.SparseSteps(method, net, optimizer, total_steps=1)
    with computing(precision, device):
        logits = net(ids)
        loss = nn.functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), ids[:, 0] % 8)
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    steps.observe()
    gradients = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    scaler.step(optimizer)
    after = torch.cat([parameter.detach().flatten() for parameter in parameters])
    return {"forward": logits.detach(), "backward": gradients, "step": after - before}


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.cpu().double() - exact).norm() / exact.norm())


def errors(precision: Precision, method: ls.SparseMethod, device: str = "cpu") -> dict[str, float]:
    """The relative error of each path on a device, against the CPU."""
    ids = torch.randint(50, (16, 12), generator=torch.Generator().manual_seed(2))
    net, exact, there = frozen(precision).to(device), reference_of(precision), ids.to(device)
    for model in (net, exact):
        adapt(model, method)
    trained, wanted = train(net, method, there, precision), train(exact, method, ids, PRECISIONS["32-true"])
    found = {path: error(trained[path], values) for path, values in wanted.items()}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), computing(precision, device):
        for parameter, values in zip(net.parameters(), exact.parameters(), strict=True):
            if parameter.requires_grad:
                parameter.copy_(values)  # where the reference has come to
        ls.save_adapter(net, Path(folder) / "adapter", batch={"ids": there})
        loaded = frozen(precision).to(device)
        ls.load_adapter(loaded, Path(folder) / "adapter")
        found["exported"] = error(loaded(there), exact(ids))
        found["merged"] = error(ls.merge(net)(there), exact(ids))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the figures there too")
    options = parser.parse_args()
    results = {
        name: {"eps": precision.eps, "errors": {method: errors(precision, METHODS[method]()) for method in METHODS}}
        for name, precision in PRECISIONS.items()
    }
    for name, row in results.items():
        print(name, f"eps {row['eps']:.1e}")
        for method, found in row["errors"].items():
            print(f"  {method:16}", ", ".join(f"{path} {value:.1e}" for path, value in found.items()))
    write_json(options.json, {**provenance(), "results": results})


if __name__ == "__main__":
    main()
