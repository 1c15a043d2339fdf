"""What a CUDA graph needs: tensors that stay where they are, and one graph for all steps.

``torch.compile(mode="reduce-overhead")`` records the kernels of a graph with the addresses of parameters, and records
anew where one moved. Nothing here needs a GPU: dynamo says how many graphs it made.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from every_method import KINDS, METHODS, STEPS, Features, Loop, Routed
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lit_sparse as ls

CPU = torch.device("cpu")


class Compiled(Loop):
    def __init__(self, kind: str, method: Any) -> None:
        torch._dynamo.reset()
        counters.clear()
        super().__init__(kind, method, CPU)
        self.model.compile(backend="eager")

    @property
    def graphs(self) -> int:
        return counters["stats"]["unique_graphs"]

    def addresses(self) -> dict[str, int]:
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return {n: t.data_ptr() for n, t in tensors.items() if type(t) in (Tensor, nn.Parameter)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "kind"),
    [
        *((method, "linear") for method in METHODS),
        *(pytest.param("SoRA, threshold", kind, marks=pytest.mark.slow) for kind in list(KINDS)[1:]),
    ],
)
def test_all_steps_are_one_graph_on_the_same_addresses(method: str, kind: str) -> None:
    loop = Compiled(kind, method)
    before = loop.addresses()
    for _ in range(STEPS):
        loop.step()
    assert loop.graphs == 1
    assert not counters["graph_break"]
    assert loop.addresses() == before


@pytest.mark.filterwarnings("ignore")
def test_compaction_moves_tensors_and_makes_one_more_graph() -> None:
    loop = Compiled("linear", "SoRA, budget")
    for _ in range(STEPS - 2):
        loop.step()
    before = loop.addresses()
    ls.compact(loop.model, loop.optimizer)
    moved = {name for name, address in loop.addresses().items() if address != before[name]}
    assert {name.rpartition(".")[2] for name in moved} == {"lora_A", "lora_B_t", "gate"}
    after = loop.addresses()
    for _ in range(2):
        loop.step()
    assert loop.graphs == 2
    assert loop.addresses() == after


@pytest.mark.filterwarnings("ignore")
def test_experts_whose_numbers_of_rows_are_read_break_the_graph() -> None:
    """Those in float32, of which the compiler knows no product by groups."""
    torch._dynamo.reset()
    counters.clear()
    model = Features(Routed())
    ls.inject(model, ls.LoRA(["gate_up_proj", "down_proj"], rank=4, train_head=False))
    model.compile(backend="eager")
    model(torch.zeros(2, 8, dtype=torch.long))
    assert counters["graph_break"]


def evaluated(loop: Compiled) -> None:
    loop.model.eval()
    with torch.no_grad():
        loop.model(loop.ids)
    loop.model.train()


def off(loop: Compiled) -> None:
    with ls.disable_adapters(loop.model), torch.no_grad():
        loop.model(loop.ids)


@pytest.mark.parametrize("between", [evaluated, off])
def test_validation_and_a_reference_have_a_graph_of_their_own(between: Callable[[Compiled], None]) -> None:
    """A second visit needs no third one."""
    loop = Compiled("linear", "LoRA")
    for _ in range(3):
        loop.step()
        between(loop)
    assert loop.graphs == 2
