"""Groups of rows to edit a tiny Llama on, and what must be the same for edits side by side."""

import pytest
import torch
from backbones import build_tiny
from transformers import LlamaForCausalLM

from lit_sparse.data.padding import IGNORED
from lit_sparse.editing.side_by_side import train_each
from lit_sparse.editing.training import train


def batches(count: int, width: int = 9) -> list[dict[str, torch.Tensor]]:
    """Groups of one to three rows of different lengths; the last tokens are the answer."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for edit in range(count):
        rows, tokens = 1 + edit % 3, width - edit % 4
        ids = torch.randint(5, 50, (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        if rows > 1:
            mask[0, -1] = 0
        labels = ids.masked_fill(mask == 0, IGNORED)
        labels[:, : tokens - 3] = IGNORED
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.02)


def llama():
    torch.manual_seed(0)
    return build_tiny(LlamaForCausalLM).double().eval().requires_grad_(False)


def alone(model, groups, method, steps, optimizer, stop_loss):
    found = []
    for seed, batch in enumerate(groups):
        torch.manual_seed(seed)
        found.append(train(model, [batch], method, steps, optimizer, stop_loss))
    return found


def trained(model, groups, *arguments):
    return list(train_each(model, [[batch] for batch in groups], *arguments))


def require_alike(found, expected, model, tolerance=1e-5):  # models compute losses in float32
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.steps, a.weights) == (b.steps, b.weights)
        assert a.loss == pytest.approx(b.loss, rel=tolerance)
        assert a.patch.keys() == b.patch.keys()
        for name, entries in a.patch.items():
            dense = [torch.zeros_like(model.get_parameter(name)).flatten() for _ in "ab"]
            for target, source in zip(dense, (entries, b.patch[name]), strict=True):
                target[source.places] = source.values.to(target.dtype)
            torch.testing.assert_close(*dense, rtol=tolerance, atol=tolerance)
            assert torch.equal(dense[0] != 0, dense[1] != 0), "the same entries change"
