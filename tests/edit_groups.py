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


def anchored(group: dict[str, torch.Tensor], texts: int = 3, weight: float = 2.0, seed: int = 1):
    """The group, and some texts of different lengths on which nothing is to change."""
    width = group["labels"].shape[1]
    ids = torch.randint(5, 50, (texts, width), generator=torch.Generator().manual_seed(seed))
    mask, shares = torch.ones_like(ids), torch.zeros(ids.shape)
    for row in range(texts):
        mask[row, width - row :] = 0
        shares[row, 1 : width - row] = 1.0 + row
    rows = {"input_ids": ids, "attention_mask": mask, "labels": torch.full_like(ids, IGNORED)}
    both = {name: torch.cat([group[name], tensor]) for name, tensor in rows.items()}
    nothing = torch.zeros(group["labels"].shape)
    return {**both, "held": torch.cat([nothing, weight * shares / shares.sum()])}


def held_rows(group):
    return [row for row in range(len(group["labels"])) if group["held"][row].any()]


def shortened(group):
    """With the same texts, whatever the width of the group is."""
    width = int(group["attention_mask"].sum(1).max())
    texts = anchored({name: tensor[:, :10] for name, tensor in group.items() if name != "held"})
    rows = held_rows(texts)
    own = [row for row in range(len(group["labels"])) if row not in held_rows(group)]

    def padded(tensor, name):
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=IGNORED if name == "labels" else 0)

    return {
        name: torch.cat([group[name][own][:, :width], padded(texts[name][rows[-3:]], name)[:, :width]])
        for name in group
    }
