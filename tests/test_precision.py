"""Every precision against float64: errors are those of its rounding, for every method and path."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

precision = pytest.importorskip("precision")


def needs(name: str) -> list[pytest.MarkDecorator]:
    try:
        import torchao  # noqa: F401
    except ImportError:
        missing = precision.PRECISIONS[name].quantized is not None
        return [pytest.mark.skipif(missing, reason="needs torchao")]
    return []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", precision.METHODS)
@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in precision.PRECISIONS])
def test_errors_are_those_of_the_rounding(name: str, method: str) -> None:
    chosen = precision.PRECISIONS[name]
    found = precision.errors(chosen, precision.METHODS[method]())
    assert set(found) == {"forward", "backward", "step", "exported", "merged"}
    for path, error in found.items():
        assert chosen.eps / 16 < error < precision.allowed(chosen, path), path  # less would be another precision


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in precision.PRECISIONS])
def test_what_is_trained_is_float32(name: str) -> None:
    net, method = precision.frozen(precision.PRECISIONS[name]), precision.METHODS["SoRA"]()
    precision.adapt(net, method)
    ids = torch.zeros(2, 12, dtype=torch.long)
    precision.train(net, method, ids, precision.PRECISIONS[name])
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    assert {p.dtype for p in trained} | {p.grad.dtype for p in trained} == {torch.float32}
    assert net.tokens.base.weight.dtype == precision.PRECISIONS[name].weights


def test_tf32_is_rounded_to_ten_bits() -> None:
    values = torch.tensor([[1 + 2**-10, 1 + 2**-11 + 2**-20, 1 + 2**-12, -(1 + 3 * 2**-11)]])
    assert precision._tf32(values).tolist() == [[1 + 2**-10, 1 + 2**-10, 1.0, -(1 + 2 * 2**-10)]]
