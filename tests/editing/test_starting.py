"""A that starts at the inputs that the answers have and the anchors have not."""

import pytest
import torch
from backbones import build_tiny
from edit_groups import adam, alone, anchored, batches, held_rows, llama, require_alike, shortened, trained
from transformers import GPT2LMHeadModel

import lit_sparse as ls
from lit_sparse.adapters.injection import inject, take_out
from lit_sparse.data.padding import IGNORED
from lit_sparse.editing.holding import HeldInputs, answers_of
from lit_sparse.editing.starting import start_at_keys
from lit_sparse.editing.training import train
from lit_sparse.errors import TrainingError, UsageError

LLAMA = ["v_proj", "down_proj"]
ROSE = ls.RoseLoRA(LLAMA, rank=4, alpha=16, density=0.25, begin=1, end=4)
pytestmark = [
    pytest.mark.filterwarnings("ignore:No gate became zero"),
    pytest.mark.filterwarnings("ignore:density .* lets BA change"),
]


def slow_gradients(model, turns, layers) -> dict[str, torch.Tensor]:
    """The sum of x gᵀ over the places in which answers are predicted, turn by turn and place by place."""
    found = dict.fromkeys(layers, 0)
    for turn in turns:
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def hook_of(name, seen=seen):
            def keep(_, args, output):
                seen[name] = args[0].detach(), output.requires_grad_()
                return output.clone()

            return keep

        hooks = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
        rows = [row for row in range(len(turn["labels"])) if row not in held_rows(turn)]
        logits = model(turn["input_ids"][rows], attention_mask=turn["attention_mask"][rows]).logits[:, :-1]
        labels = turn["labels"][rows][:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.mT, labels, ignore_index=IGNORED)
        gradients = torch.autograd.grad(loss, [outputs for _, outputs in seen.values()])
        for handle in hooks:
            handle.remove()
        for (name, (inputs, _)), gradient in zip(seen.items(), gradients, strict=True):
            for row, place in (labels != IGNORED).nonzero().tolist():
                found[name] = found[name] + torch.outer(inputs[row, place], gradient[row, place])
    return found


@pytest.mark.parametrize("kind", ["lora", "rose", "gpt2"])
def test_a_starts_at_the_whitened_gradient_of_the_answers(kind):
    torch.manual_seed(0)
    model = build_tiny(GPT2LMHeadModel).double().eval().requires_grad_(False) if kind == "gpt2" else llama()
    targets = ["c_attn", "c_proj"] if kind == "gpt2" else LLAMA
    method = ROSE if kind == "rose" else ls.LoRA(targets, rank=6, alpha=8, dropout=0.5)
    turns = [anchored(group) for group in batches(2, width=12)]
    layers = {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in targets}
    gradients = slow_gradients(model, turns, layers)
    adapters = inject(model, method)
    assert adapters.keys() == layers.keys()
    norms = {name: adapter.lora_A.norm(dim=1) for name, adapter in adapters.items()}
    inputs = HeldInputs().of(model, adapters, turns)[0]
    start_at_keys(model, method, adapters, turns, HeldInputs())
    for name, adapter in adapters.items():
        A, G = adapter.lora_A.detach(), gradients[name]
        torch.testing.assert_close(A.norm(dim=1), norms[name])
        features = A.any(0).nonzero().flatten()
        assert len(features) == (round(0.25 * A.shape[1]) if kind == "rose" else A.shape[1])
        C = inputs[name].gram(features)
        whitened = torch.linalg.solve(C + 0.03 * C.diagonal().mean() * torch.eye(len(C)), G[features].double())
        left, values, _ = torch.linalg.svd(whitened, full_matrices=False)
        count = min(len(A), int((values > 1e-5 * values[0]).sum()))
        assert count > 1
        rows = A[:count][:, features] / A[:count].norm(dim=1, keepdim=True)
        torch.testing.assert_close(
            (rows * left[:, :count].T).sum(1).abs(), torch.ones(count).double(), rtol=1e-3, atol=0
        )
        assert not adapter.lora_B_t.any()
        assert all(p.grad is None or not p.grad.any() for p in adapter.parameters(recurse=False))


@pytest.mark.parametrize("method", [ROSE, ls.LoRA(LLAMA, rank=3, alpha=8)], ids=["roselora", "lora"])
@pytest.mark.parametrize("with_anchors", [False, True])
def test_side_by_side_as_if_alone(method, with_anchors):
    model, groups = llama(), batches(3, width=13)
    if with_anchors:
        groups = [shortened(anchored(group, weight=0.1)) for group in groups]

    def one_by_one():
        found = []
        for seed, group in enumerate(groups):
            torch.manual_seed(seed)
            found.append(train(model, [group], method, 8, adam, None, HeldInputs(), at_keys=True))
        return found

    require_alike(trained(model, groups, method, 8, adam, None, range(3), HeldInputs(), True), one_by_one(), model)
    plain = [answers_of(group) for group in groups]
    assert alone(model, plain, method, 8, adam, None)[0].loss != pytest.approx(one_by_one()[0].loss, rel=1e-3)


def test_a_single_token_leaves_other_rows_to_chance_within_the_features():
    model, (group,) = llama(), batches(1)
    group["labels"][:, :-1] = IGNORED
    adapters = inject(model, ROSE)
    start_at_keys(model, ROSE, adapters, [group], HeldInputs())
    for adapter in adapters.values():
        used = adapter.lora_A.detach() != 0
        assert bool((used == used[0]).all())
        assert int(used[0].sum()) == round(0.25 * adapter.in_features)
        assert torch.linalg.matrix_rank(adapter.lora_A.detach()) == adapter.rank


def test_what_is_refused():
    for method in (ls.FineTuning(), ls.UltraEdit(), ls.SHiRA(LLAMA)):
        with pytest.raises(UsageError, match=f"start_at_keys starts A, and {type(method).__name__} has no A"):
            ls.Editor("folder", method, "out", start_at_keys=True)
    with pytest.raises(UsageError, match="'pissa' changes the frozen weights, and an edit must be removable"):
        ls.Editor("folder", ls.LoRA(LLAMA, init_weights="pissa"), "out")
    with pytest.raises(UsageError, match=r"start_at_keys is for linear layers, and \['model.embed_tokens'\]"):
        train(llama(), batches(1), ls.LoRA(["embed_tokens"], rank=2), 3, adam, None, at_keys=True)
    model, (group,) = llama(), batches(1)
    model.model.embed_tokens.weight[5] = float("nan")
    group["input_ids"].fill_(5)
    with pytest.raises(TrainingError, match="NaN or infinite, before the edit"):
        train(model, [group], ROSE, 3, adam, None, at_keys=True)


def test_half_precision_starts_where_full_precision_does():
    """Rounding gives a single token no more directions than its own: the other rows stay random."""
    model, (group,) = llama().float(), batches(1)
    group["labels"][:, :-1] = IGNORED
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        adapters = inject(model, ROSE)
        drawn = {name: adapter.lora_A.detach().clone() for name, adapter in adapters.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            start_at_keys(model, ROSE, adapters, [group], HeldInputs())
        found.append([adapter.lora_A[0].detach().clone() for adapter in adapters.values()])
        for name, adapter in adapters.items():
            kept = drawn[name] * (adapter.lora_A != 0)
            alike = torch.nn.functional.cosine_similarity(kept[1:], adapter.lora_A[1:])
            torch.testing.assert_close(alike, torch.ones_like(alike))
        take_out(model)
    for full, half in zip(*found, strict=True):
        assert torch.nn.functional.cosine_similarity(full, half, dim=0).abs() > 0.95
