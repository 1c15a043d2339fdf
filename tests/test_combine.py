"""lit_sparse.combine: sums against PEFT's, rules against the papers' algorithms entry by entry, and what is refused."""

import json
import re
import sys
from pathlib import Path

import peft
import pytest
import torch
from backbones import build_tiny, save_tiny_bert, save_tiny_llama
from trained import as_trained, save_checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    MixtralForCausalLM,
    RobertaForSequenceClassification,
    ViTForImageClassification,
)

import lit_sparse as ls
from lit_sparse.cli.main import main
from lit_sparse.functional.combining import Conflicts
from lit_sparse.interchange.patches import Entries, combined
from lit_sparse.interchange.peft_folder import read_peft

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 6, 7, 9]])
WEIGHTS = (1.0, -0.5)
NARROW = {"target_modules": ["query", "value"], "r": 4, "lora_alpha": 6, "use_rslora": True}
WIDE = {"target_modules": ["value", "dense"], "r": 3, "rank_pattern": {"value": 5}, "alpha_pattern": {"dense": 2}}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture(scope="module")
def pair(bert, tmp_path_factory):
    """Two LoRAs of PEFT's on BERT, with other layers, ranks and scales, without heads.

    The second uses rslora. If the first did, PEFT would multiply its sum by the root of the rank.
    """
    made = tmp_path_factory.mktemp("pair")
    return [lora_of(bert, made / name, seed, **settings) for seed, (name, settings) in
            enumerate({"wide": WIDE, "narrow": NARROW}.items())]  # fmt: skip


@pytest.fixture(scope="module")
def equal(bert, tmp_path_factory):
    """Two LoRAs on the same two layers, whose ranks together are the whole width of 32."""
    made = tmp_path_factory.mktemp("equal")
    settings = {"target_modules": ["0.attention.self.query", "1.attention.self.key"], "r": 16}
    return [lora_of(bert, made / str(seed), seed, **settings) for seed in range(2)]


def classifier(folder, **arguments):
    return AutoModelForSequenceClassification.from_pretrained(folder, **arguments)


def lora_of(base, folder, seed, head=False, labels=2, **settings):
    """The folder of a LoRA of random numbers."""
    torch.manual_seed(seed)
    saved = {"modules_to_save": ["classifier"]} if head else {}
    config = peft.LoraConfig(init_lora_weights=False, **saved, **settings)
    adapted = peft.get_peft_model(classifier(base, num_labels=labels, ignore_mismatched_sizes=True), config)
    if head:
        torch.nn.init.normal_(adapted.get_submodule("base_model.model.classifier.modules_to_save.default").weight)
    adapted.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@torch.no_grad()
def deltas(folder):
    """Layer to ``scale · B A`` of a folder in PEFT's format, as its numbers say."""
    layers = read_peft(folder).layers
    return {name: layer.scaled_lora_B_t().T @ layer.lora_A.double() for name, layer in layers.items()}


def with_peft(base, sources, **options):
    """PEFT's own combination of several folders: layer to change, and its model."""
    model = peft.PeftModel.from_pretrained(classifier(base), sources[0], adapter_name="0")
    for number, source in enumerate(sources[1:], start=1):
        model.load_adapter(source, adapter_name=str(number))
    model.add_weighted_adapter([str(n) for n in range(len(sources))], adapter_name="sum", **options)
    model.set_adapter("sum")
    found = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear) and "sum" in module.lora_A:
            found[name] = module.get_delta_weight("sum").detach()
    return found, model


def summed(sources, weights=WEIGHTS):
    found = {}
    for source, weight in zip(sources, weights, strict=True):
        for name, delta in deltas(source).items():
            found[name] = found.get(name, 0) + weight * delta
    return found


def assert_close(found, expected, atol=1e-5):
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name].double(), delta.double(), rtol=1e-4, atol=atol, msg=name)


# Sums


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_the_sum_is_exact_and_that_of_peft(layout, bert, pair, tmp_path):
    report = ls.combine(pair, tmp_path / "sum", WEIGHTS, layout=layout)
    expected, model = with_peft(bert, pair, weights=list(WEIGHTS), combination_type="cat")
    assert_close(deltas(tmp_path / "sum"), summed(pair))
    assert_close(deltas(tmp_path / "sum"), expected)
    loaded = peft.PeftModel.from_pretrained(classifier(bert), tmp_path / "sum")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(loaded), logits(classifier(bert)), atol=1e-2)
    ranks = {name.rpartition(".")[2]: layer.ranks for name, layer in read_peft(tmp_path / "sum").layers.items()}
    assert ranks == dict.fromkeys(ranks, (9,)) if layout == "padded" else {"query": (4,), "value": (9,), "dense": (3,)}
    assert (report.format, report.error, report.conflicts) == ("peft", 0.0, None)
    card = (tmp_path / "sum" / "README.md").read_text()
    assert "added up from 2 sources by stacking A and B" in card
    assert "| weights | `[1.0, -0.5]` |" in card


@pytest.mark.parametrize("budget", [0.5, 0.2])
def test_svd_keeps_the_largest_singular_values_of_all_layers(budget, bert, equal, tmp_path):
    report = ls.combine(equal, tmp_path / "cut", WEIGHTS, rule="svd", budget=budget)
    # Slowly: all singular triples of both dense sums, the largest first. All ranks cost the same here.
    whole = summed(equal)
    triples = []
    for name, delta in whole.items():
        left, values, right = torch.linalg.svd(delta)
        triples += [(float(v), name, torch.outer(left[:, i], right[i]) * v) for i, v in enumerate(values)]
    triples.sort(key=lambda triple: -triple[0])
    kept = int(budget * len(triples))
    expected = {name: torch.zeros_like(delta) for name, delta in whole.items()}
    for _, name, part in triples[:kept]:
        expected[name] += part
    assert_close(deltas(tmp_path / "cut"), expected)
    rest, all_of_it = (sum(v**2 for v, _, _ in part) for part in (triples[kept:], triples))
    assert report.error == pytest.approx((rest / all_of_it) ** 0.5, rel=1e-5)


def test_svd_of_one_layer_is_that_of_peft(bert, tmp_path):
    settings = {"target_modules": ["0.attention.self.query"], "r": 4}
    sources = [lora_of(bert, tmp_path / str(seed), seed, **settings) for seed in range(2)]
    ls.combine(sources, tmp_path / "cut", WEIGHTS, rule="svd", budget=0.375)
    expected, _ = with_peft(bert, sources, weights=list(WEIGHTS), combination_type="svd", svd_rank=3)
    assert_close(deltas(tmp_path / "cut"), expected)


def test_adapters_of_all_kinds_add_up(bert, tmp_path):
    """A checkpoint with gates, a folder of save_adapter and a LoRA of PEFT's, against their changes in models."""
    module = ls.SequenceClassification(bert, ls.SoRA(rank=4, alpha=6, threshold=0.1, train_head=False), num_labels=2)
    torch.manual_seed(0)
    checkpoint = save_checkpoint(module, tmp_path / "run.ckpt")
    sparse = as_trained(classifier(bert), ls.RoseLoRA(["query", "dense"], rank=3, density=0.1, train_head=False))
    ls.save_adapter(sparse, tmp_path / "sparse")
    sources = [checkpoint, str(tmp_path / "sparse"), lora_of(bert, tmp_path / "peft", 0, **NARROW)]
    weights = [0.5, 2.0, 1.0]
    ls.combine(sources, tmp_path / "sum", weights)
    expected = summed([sources[2]], [1.0])
    for model, weight in ((module.model, 0.5), (sparse, 2.0)):
        for name, adapter in ls.adapters_in(model):
            expected[name] = expected.get(name, 0) + weight * adapter.delta_weight().double()
    assert_close(deltas(tmp_path / "sum"), {name: delta for name, delta in expected.items() if delta.any()})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rule", ["concatenate", "ties"])
@pytest.mark.parametrize(
    ("model_class", "options", "targets"),
    [
        (MixtralForCausalLM, {"num_key_value_heads": 4, "tie_word_embeddings": False}, "all-linear"),
        (RobertaForSequenceClassification, {}, ["word_embeddings", "query"]),
        (ViTForImageClassification, {}, ["projection", "q_proj"]),
    ],
)
def test_experts_embeddings_and_convolutions(rule, model_class, options, targets, tmp_path):
    torch.manual_seed(0)
    build_tiny(model_class, **options).save_pretrained(tmp_path / "base")
    sources, expected = [], {}
    for seed, weight in enumerate(WEIGHTS):
        model = model_class.from_pretrained(tmp_path / "base")
        as_trained(model, ls.SoRA(targets, rank=4, alpha=6, threshold=0.1, train_head=False))
        with torch.no_grad():
            for name, adapter in ls.adapters_in(model):
                adapter.lora_A.copy_(adapter.lora_A.roll(seed, 1))
                expected[name] = expected.get(name, 0) + weight * adapter.delta_weight().double()
        ls.export_peft(model, tmp_path / str(seed), layout=["padded", "ragged"][seed])
        sources.append(str(tmp_path / str(seed)))
    ls.combine(sources, tmp_path / "sum", WEIGHTS, rule=rule)
    model = model_class.from_pretrained(tmp_path / "base")
    found = {name: adapter.delta_weight() for name, adapter in ls.load_peft(model, tmp_path / "sum").items()}
    if rule == "concatenate":
        expected = {name: delta for name, delta in expected.items() if name in found or delta.any()}
        assert_close(found, expected)
    else:  # of the size of the sum, and other than it
        assert all(0 < delta.norm() < 2 * expected[name].norm() for name, delta in found.items())


# Rules for entries


def slow_ties(sources, weights, density):
    """Algorithm 1 of the paper, on one long vector and entry by entry; weights in place of λ."""
    names = list(deltas(sources[0]))
    vectors = []
    for source, weight in zip(sources, weights, strict=True):
        vector = torch.cat([deltas(source)[name].flatten() for name in names]) * weight
        kept = vector.abs().argsort(descending=True)[: int(density * len(vector))]
        vectors.append(torch.zeros_like(vector).index_copy(0, kept, vector[kept]).tolist())
    merged = []
    for entries in zip(*vectors, strict=True):
        total = sum(entries)
        agreeing = [entry for entry in entries if entry * total > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    parts = torch.tensor(merged, dtype=torch.float64).split([deltas(sources[0])[name].numel() for name in names])
    return {name: part.view(32, 32) for name, part in zip(names, parts, strict=True)}


@pytest.mark.parametrize(("weights", "density"), [((1.0, 1.0), 0.2), (WEIGHTS, 0.5), ((0.3, 0.7), 1.0)])
def test_ties_is_the_papers_algorithm(weights, density, equal, tmp_path):
    report = ls.combine(equal, tmp_path / "ties", weights, rule="ties", density=density)
    assert_close(deltas(tmp_path / "ties"), slow_ties(equal, weights, density))
    assert report.error < 1e-3
    signs = [torch.cat([delta.flatten() for delta in deltas(source).values()]).sign() for source in equal]
    same_sign = weights[0] * weights[1] > 0
    opposed = int((signs[0] == (-signs[1] if same_sign else signs[1])).sum())
    assert report.conflicts == Conflicts(2 * 32 * 32, opposed)


@pytest.mark.filterwarnings("ignore:The density 1.0")
def test_ties_of_one_layer_and_equal_weights_is_that_of_peft_on_changes(bert, tmp_path):
    """PEFT trims each layer by itself, and elects signs before it weighs."""
    settings = {"target_modules": ["0.attention.self.query"], "r": 16}
    sources = [lora_of(bert, tmp_path / str(seed), seed, **settings) for seed in range(2)]
    ls.combine(sources, tmp_path / "ties", [0.7, 0.7], rule="ties", density=0.3)
    options = {"combination_type": "ties_svd", "svd_rank": 32, "density": 0.3}
    expected, _ = with_peft(bert, sources, weights=[0.7, 0.7], **options)
    assert_close(deltas(tmp_path / "ties"), expected)
    # On the factors, as PEFT's ``ties`` works, it is something else.
    factors, _ = with_peft(bert, sources, weights=[0.7, 0.7], combination_type="ties", density=0.3)
    name = next(iter(expected))
    assert (factors[name] - expected[name]).norm() > 0.5 * expected[name].norm()


def test_dare_draws_what_peft_draws(bert, equal, tmp_path):
    ls.combine(equal, tmp_path / "dare", WEIGHTS, rule="dare", density=0.4, seed=3)
    model = peft.PeftModel.from_pretrained(classifier(bert), equal[0], adapter_name="0")
    model.load_adapter(equal[1], adapter_name="1")
    options = {"combination_type": "dare_linear_svd", "svd_rank": 32, "density": 0.4}
    # add_weighted_adapter first draws a new adapter: the seed is set where it draws entries.
    made = model.base_model._svd_generalized_task_arithmetic_weighted_adapter
    model.base_model._svd_generalized_task_arithmetic_weighted_adapter = seeded(3, made)
    model.add_weighted_adapter(["0", "1"], [*WEIGHTS], "sum", **options)
    lora = peft.tuners.lora.Linear
    found = {n: m.get_delta_weight("sum") for n, m in model.base_model.model.named_modules() if isinstance(m, lora)}
    assert_close(deltas(tmp_path / "dare"), {name: delta.detach() for name, delta in found.items()})


def seeded(seed, call):
    """``call``, before whose first use the seed is set."""
    torch_seed = iter([seed])

    def wrapper(*args, **kwargs):
        for first in torch_seed:
            torch.manual_seed(first)
        return call(*args, **kwargs)

    return wrapper


def test_dare_drops_entries_and_keeps_the_mean(equal, tmp_path):
    for seed in range(2):
        ls.combine(equal, tmp_path / str(seed), [1, 0], rule="dare", density=0.25, seed=seed)
    whole = torch.cat([delta.flatten() for delta in deltas(equal[0]).values()])
    kept = [torch.cat([d.flatten() for d in deltas(tmp_path / str(seed)).values()]) for seed in range(2)]
    for found in kept:
        stay = found.abs() > 2 * whole.abs()
        assert 0.2 < float(stay.float().mean()) < 0.3
        torch.testing.assert_close(found[stay], 4 * whole[stay], rtol=1e-3, atol=1e-5)
        assert float(found[~stay].abs().max()) < 1e-5
    assert not torch.allclose(*kept)


def test_what_is_left_out_is_no_rounding(bert, tmp_path):
    # Ranks for the whole width: nothing is left out of any sum.
    sources = [lora_of(bert, tmp_path / str(seed), seed, target_modules=["query"], r=24) for seed in range(2)]
    for rule, arguments in {"svd": {"budget": 1.0}, "ties": {"density": 1.0}}.items():
        report = ls.combine(sources, tmp_path / rule, rule=rule, **arguments)
        assert report.error == 0
        assert "which leave out 0.00% of" in str(report)


def test_a_budget_cuts_the_merged_change(equal, tmp_path):
    ls.combine(equal, tmp_path / "whole", rule="ties")
    report = ls.combine(equal, tmp_path / "cut", rule="ties", budget=0.25)
    whole, cut = deltas(tmp_path / "whole"), deltas(tmp_path / "cut")
    values = torch.cat([torch.linalg.svdvals(delta) for delta in whole.values()]).sort(descending=True).values
    assert sum(int(torch.linalg.matrix_rank(delta, rtol=1e-5)) for delta in cut.values()) == 16
    assert report.error == pytest.approx(float((values[16:] ** 2).sum() / (values**2).sum()) ** 0.5, rel=1e-3)
    assert re.search(r"\(TIES\) and written by its largest singular values, which leave out \d+\.\d+% of", str(report))


# Heads


def test_the_only_head_is_kept(bert, pair, tmp_path):
    with_head = lora_of(bert, tmp_path / "head", 5, head=True, **NARROW)
    ls.combine([pair[0], with_head], tmp_path / "sum")
    kept, source = (read_peft(folder).whole for folder in (tmp_path / "sum", with_head))
    assert kept.keys() == source.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in source.items())
    _, model = with_peft(bert, [pair[0], with_head], weights=[1.0, 1.0], combination_type="cat")
    model.base_model.model.classifier.set_adapter("1")
    loaded = peft.PeftModel.from_pretrained(classifier(bert), tmp_path / "sum")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


def test_of_several_heads_one_is_named(bert, tmp_path):
    module = ls.SequenceClassification(bert, ls.LoRA(["query"], rank=2), num_labels=3)
    run = save_checkpoint(module, tmp_path / "run.ckpt")
    two = lora_of(bert, tmp_path / "two", 5, head=True, **NARROW)
    other = lora_of(bert, tmp_path / "other", 6, head=True, **NARROW)
    ls.combine([two, other], tmp_path / "slash", head=f"{other}/")  # as a shell completes it
    assert torch.equal(*(read_peft(f).whole["classifier.weight"] for f in (tmp_path / "slash", Path(other))))
    with pytest.raises(ls.UsageError, match="have task heads of their own, which do not add up"):
        ls.combine([two, other], tmp_path / "sum")
    with pytest.raises(ls.UsageError, match=r"number of labels of .*run\.ckpt' is 3, and that of .*two' is 2"):
        ls.combine([run, two], tmp_path / "sum")
    ls.combine([run, two], tmp_path / "sum", head=run)
    assert torch.equal(read_peft(tmp_path / "sum").whole["classifier.weight"], module.model.classifier.weight)
    ls.combine([two, two], tmp_path / "twice", [0.5, 0.5])  # the same head
    assert ls.from_pretrained(tmp_path / "twice").model.classifier.weight.shape == (2, 32)


# Patches


def patches(llama, folder):
    """Two folders of export_delta, and their models."""
    made = []
    for seed, density in enumerate((0.3, 0.2)):
        model = AutoModelForCausalLM.from_pretrained(llama)
        as_trained(model, ls.RoseLoRA(["q_proj", "v_proj"], rank=2, density=density))
        with torch.no_grad():
            for _, adapter in ls.adapters_in(model):
                adapter.lora_A.copy_(adapter.lora_A.roll(seed, 1))
        ls.export_delta(model, folder / str(seed))
        made.append(model)
    return [str(folder / str(seed)) for seed in range(2)], made


def slow_merge(changes, rule, density):
    """Entry by entry; a share of the entries is one of those that a source changes."""
    if rule == "concatenate":
        return changes.sum(0)
    kept = []
    for change in changes:
        magnitudes = sorted((abs(v) for v in change.tolist() if v), reverse=True)
        least = magnitudes[int(density * len(magnitudes)) - 1]
        kept.append([v if abs(v) >= least else 0.0 for v in change.tolist()])
    merged = []
    for entries in zip(*kept, strict=True):
        agreeing = [v for v in entries if v * sum(entries) > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(merged)


@pytest.mark.filterwarnings("ignore:The patch changes")
@pytest.mark.parametrize("rule", ["concatenate", "ties"])
def test_patches_add_up_entry_by_entry(rule, llama, tmp_path):
    sources, models = patches(llama, tmp_path)
    report = ls.combine(sources, tmp_path / "sum", WEIGHTS, rule=rule, density=0.5)
    own = [{n: a.delta_weight().flatten() for n, a in ls.adapters_in(model)} for model in models]
    names = list(own[0])
    changes = torch.stack([torch.cat([o[n] for n in names]) * w for o, w in zip(own, WEIGHTS, strict=True)])
    expected = slow_merge(changes, rule, 0.5)
    plain, changed = (AutoModelForCausalLM.from_pretrained(llama) for _ in range(2))
    ls.load_adapter(changed, tmp_path / "sum")
    found = torch.cat(
        [(changed.get_submodule(n).weight - plain.get_submodule(n).weight).detach().flatten() for n in names]
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    both, opposed = int((changes != 0).all(0).sum()), int((changes[0] * changes[1] < 0).sum())
    assert 0 < opposed < both
    assert report.conflicts == Conflicts(both, opposed)
    entries = json.loads((tmp_path / "sum" / "lit_sparse.json").read_text())
    assert entries["conflicts"] == {"shared": both, "opposed": opposed}
    assert entries["changed_entries"] == int(expected.count_nonzero())
    assert (
        f"{both:,} entries are changed by more than one source, {opposed:,} of them in opposite directions."
        in (tmp_path / "sum" / "README.md").read_text()
    )
    reloaded = ls.from_pretrained(tmp_path / "sum").model
    assert all(torch.equal(a, b) for a, b in zip(reloaded.parameters(), changed.parameters(), strict=True))


# Refusals


@pytest.mark.filterwarnings("ignore:The patch changes")
def test_a_patch_of_all_entries_is_stored_sparse_once_most_are_trimmed():
    whole = {"weight": Entries(None, torch.arange(1.0, 101.0))}
    patch, _ = combined([whole, whole], rule="ties", density=0.2)
    assert patch["weight"].places.tolist() == list(range(80, 100))
    assert patch["weight"].indices is not None


def test_what_does_not_fit_is_refused(bert, llama, pair, tmp_path):
    sources, _ = patches(llama, tmp_path)
    other = save_tiny_bert(tmp_path / "other_bert")
    foreign = lora_of(other, tmp_path / "foreign", 0, **NARROW)
    wide = save_tiny_bert(tmp_path / "wide_bert", hidden_size=64)
    large = lora_of(wide, tmp_path / "large", 0, **NARROW)
    token = lora_of(bert, tmp_path / "token", 0, task_type="TOKEN_CLS", **NARROW)
    classed = lora_of(bert, tmp_path / "classed", 0, task_type="SEQ_CLS", **NARROW)
    strange = save_tiny_bert(tmp_path / "strange_bert", initializer_range=0.5)
    runs = [
        save_checkpoint(ls.SequenceClassification(base, ls.LoRA(["query"], rank=2), num_labels=2), tmp_path / name)
        for base, name in ((bert, "run.ckpt"), (strange, "strange.ckpt"))
    ]
    entries = ls.SequenceClassification(bert, ls.SHiRA(["query"], changed=0.1), num_labels=2)
    entries.configure_model()
    kept = {"state_dict": entries.state_dict(), "hyper_parameters": dict(entries.hparams)}
    entries.on_save_checkpoint(kept)
    torch.save(kept, tmp_path / "entries.ckpt")
    cases = [
        ([pair[0], str(tmp_path / "entries.ckpt")], {}, "changes single entries, and has no A and B. Export it"),
        (runs, {"backbone": bert, "head": runs[0]}, "on different backbones: their frozen weights differ"),
        ([pair[0]], {}, "at least two sources"),
        (pair, {"weights": [1.0]}, "There are 2 sources and 1 weights"),
        (pair, {"weights": [1.0, float("nan")]}, "A weight must be"),
        (pair, {"weights": [0, 0]}, "Nothing is left"),
        (pair, {"rule": "sum"}, "rule must be 'concatenate', 'svd', 'ties' or 'dare'"),
        (pair, {"rule": "ties", "density": 0}, "density must be above 0"),
        (pair, {"rule": "svd"}, "svd needs a budget"),
        (pair, {"budget": 0.5}, "concatenate, which is exact, takes none"),
        (pair, {"head": "elsewhere"}, "head names 'elsewhere', which is none of the sources"),
        ([pair[0], runs[0]], {"head": pair[0]}, "head names .*, which holds no task head; .*run.ckpt.* do"),
        (pair, {"rule": "dare", "seed": 2**70}, "seed must be at least"),
        (pair[0], {}, "at least two sources; got .* alone"),
        ([pair[0], "nowhere"], {}, "'nowhere' holds no adapter"),
        ([pair[0], f"{pair[1]}/adapter_model.safetensors"], {}, "is one file: give the folder"),
        ([pair[0], foreign], {}, "The backbone of .* names of one model, give its name as backbone"),
        ([pair[0], large], {"backbone": bert}, r"has the size \(32, 32, 1\) in .* and \(64, 64, 1\) in"),
        ([token, classed], {}, "The task of .* is 'TOKEN_CLS', and that of .* is 'SEQ_CLS'"),
        ([pair[0], sources[0]], {"backbone": bert}, "are patches of the weights"),
        (sources, {"rule": "svd", "budget": 0.5}, "these sources are patches"),
        (pair, {"backbone": llama}, "adapts .* which .* lacks: it was trained on another model"),
    ]
    for given_sources, arguments, message in cases:
        with pytest.raises(ls.UsageError, match=message):
            ls.combine(given_sources, tmp_path / "sum", **arguments)
        assert not (tmp_path / "sum").exists()


# The command


def test_the_command_adds_up(bert, pair, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["lit-sparse"])
    main(["combine", *pair, "--weights", "1", "-0.5", "--output", "sum", "--layout", "ragged"])
    assert re.match(r"Wrote sum \(peft\): [\d,]+ bytes of weights; .* added up from 2 sources", capsys.readouterr().out)
    assert_close(deltas("sum"), summed(pair))
    main(["combine", *pair, "--rule", "ties", "--density", "0.5", "--output", "ties"])
    assert "entries are changed by more than one source" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["combine", *pair, "--rule", "svd", "--output", "cut"])
    assert ended.value.code == 1
    assert "error: The rule svd needs a budget" in capsys.readouterr().err
