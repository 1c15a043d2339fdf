"""Changes are trained apart from the model, added, stored, combined and taken back bit for bit."""

import copy
import functools

import pytest
import torch
from backbones import build_tiny, save_tiny_gpt2, save_tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, MixtralForCausalLM

import lit_sparse as ls
from lit_sparse.adapters.injection import adapters_in
from lit_sparse.cli.edit import apply_edits, remove_edits
from lit_sparse.data.tokenizers import load_tokenizer
from lit_sparse.editing.edits import Edit, EditedModel, combine, load_edit
from lit_sparse.editing.requests import EditRequest, Probe
from lit_sparse.editing.teacher_forcing import collate, encode
from lit_sparse.editing.training import train
from lit_sparse.editing.whole_weights import FineTuning
from lit_sparse.errors import UsageError
from lit_sparse.interchange.patches import Entries, add, patch_of, put

ADAM = functools.partial(torch.optim.Adam, lr=1e-2)
ROSELORA = ls.RoseLoRA(["q_proj", "v_proj"], rank=2, density=0.1, begin=1, end=4)
METHODS = {
    "roselora": ROSELORA,
    "lora": ls.LoRA(["q_proj", "v_proj"], rank=2),
    "sora": ls.SoRA(["q_proj", "v_proj"], rank=2, threshold=1e-3),
    "gated": ls.GatedRoseLoRA(["q_proj", "v_proj"], rank=2, density=0.1, begin=1, end=4, threshold=1e-3),
    "shira": ls.SHiRA(["q_proj", "v_proj"], changed=0.05),
    "lift": ls.LIFT(["q_proj", "v_proj"], changed=0.05, filter_rank=4, update_every=2),
    "spiel": ls.SpIEL(["q_proj", "v_proj"], changed=0.05, update_every=2, window=1),
    "fine-tuning": FineTuning(["q_proj", "v_proj"]),
    "ultraedit": ls.UltraEdit(["q_proj", "v_proj"], lr=1e-3, normalization="turn"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def model(folder):
    found = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval().requires_grad_(False)
    with torch.no_grad():
        found.model.layers[0].self_attn.q_proj.weight[0, :5] = -0.0  # which + 0.0 would turn into 0.0
    return found


@pytest.fixture
def batch(folder):
    tokenizer = load_tokenizer(folder)
    return collate(tokenizer, encode(tokenizer, [("the dog is", "a cat")]))


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone().view(torch.int32) for n, p in model.named_parameters()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trained_on(model, batch, method, stop_loss=None):
    return train(model, [batch], method, 6, ADAM, stop_loss)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_change_is_trained_apart_from_the_model(model, batch, method):
    before, modes = bits(model), [m.training for m in model.modules()]
    old = model(**batch).loss
    trained = trained_on(model, batch, method)
    assert same(bits(model), before)
    assert [m.training for m in model.modules()] == modes
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not list(adapters_in(model))
    assert trained.steps == 6
    assert trained.weights == 2 * (32 * 32 + 16 * 32)
    add(model, trained.patch)
    assert model(**batch).loss < old


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_under_autocast_steps_see_the_steps_before(model, batch, method):
    def loss() -> float:
        torch.manual_seed(3)
        return trained_on(model, batch, method).loss

    before, plain = float(model(**batch).loss), loss()
    with torch.autocast("cpu", torch.bfloat16):  # one for all steps, as within the Trainer's
        assert abs(loss() - plain) < 0.2 * (before - plain)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_under_autocast_a_change_keeps_the_precision_of_the_parameters(model, batch, method):
    def rounded(values: torch.Tensor) -> torch.Tensor:
        return values.bfloat16().float()

    with torch.autocast("cpu", torch.bfloat16):
        patch = trained_on(model, batch, method).patch
    for entries in patch.values():
        assert entries.values.dtype == torch.float32
        assert not torch.equal(entries.values, rounded(entries.values))


@pytest.mark.parametrize("method", ["roselora", "sora"])
def test_training_equals_a_loop_with_adapters_by_hand(model, batch, method):
    method = METHODS[method]
    torch.manual_seed(3)
    trained = trained_on(model, batch, method)
    torch.manual_seed(3)
    other = copy.deepcopy(model)
    adapters = ls.inject(other, method)
    optimizer = ADAM(ls.parameter_groups(other, method))
    steps = ls.SparseSteps(method, other, optimizer, total_steps=6)
    other.train()
    for _ in range(6):
        loss = other(**batch).loss
        loss.backward()
        steps.observe()
        optimizer.step()
        optimizer.zero_grad()
    assert trained.loss == loss.item()
    expected = patch_of(adapters)
    assert trained.patch.keys() == expected.keys()
    for name, entries in expected.items():
        assert torch.equal(trained.patch[name].values, entries.values)
    add(model, trained.patch)
    ls.merge(other)
    assert same(bits(model), bits(other))


def test_only_a_few_entries_change_and_those_by_the_paper_s_bound(model, batch):
    trained = trained_on(model, batch, ROSELORA)
    for entries in trained.patch.values():
        assert entries.count <= 2 * 3 * 3  # rank · ⌊0.1 · 32⌋², for 32 inputs and 32 or 16 outputs
    assert sum(entries.count for entries in trained.patch.values()) > 0


@pytest.mark.parametrize(
    ("stop_loss", "steps"), [(100.0, {"roselora": 4, "lora": 0}), (None, {"roselora": 6, "lora": 6})]
)
def test_training_stops_early_but_not_before_the_masks_are_final(model, batch, stop_loss, steps):
    for name, expected in steps.items():
        assert trained_on(model, batch, METHODS[name], stop_loss=stop_loss).steps == expected


def test_an_edit_that_ends_before_its_budget_holds_says_so(model, batch):
    method = ls.SoRA(["q_proj", "v_proj"], rank=2, budget=0.5, begin=0, end=50, train_head=False)
    with pytest.warns(UserWarning, match=r"more than the budget of [\d,]+: the run ended before .*end=50"):
        trained_on(model, batch, method)


def test_a_method_that_trains_more_is_refused_and_the_model_left_alone(model, batch):
    before = bits(model)
    with pytest.raises(UsageError, match=r"also trains \['lm_head.weight'\]: set train_head to false"):
        trained_on(model, batch, ls.LoRA(["q_proj"], train_head=["lm_head"]))
    assert same(bits(model), before)
    assert not list(adapters_in(model))


def test_an_error_in_training_leaves_the_model_alone(model, batch):
    before = bits(model)
    for method in METHODS.values():
        with pytest.raises(RuntimeError, match="scalar types"):
            trained_on(model, {**batch, "input_ids": batch["input_ids"].float()}, method)
        assert same(bits(model), before)
        assert not list(adapters_in(model))


def test_fine_tuning_of_gpt2_and_what_it_refuses(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_gpt2(tmp_path)).requires_grad_(False)
    ids = torch.tensor([[5, 6, 7]])
    trained = trained_on(model, {"input_ids": ids, "labels": ids}, FineTuning(layers=[1]))
    assert {name.split(".")[2] for name in trained.patch} == {"1"}
    with pytest.raises(UsageError, match="name at least one layer"):
        FineTuning([])
    with pytest.raises(UsageError, match="matches no linear layer"):
        trained_on(model, {"input_ids": ids, "labels": ids}, FineTuning(["nope"]))


def test_fine_tuning_of_experts_is_refused():
    model = build_tiny(MixtralForCausalLM, num_local_experts=2, num_experts_per_tok=1)
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(UsageError, match="not those of experts"):
        trained_on(model, {"input_ids": ids, "labels": ids}, FineTuning("all-linear"))


@pytest.mark.parametrize("stops", [False, True])
def test_batches_take_turns_and_training_stops_by_the_mean_over_a_turn(folder, model, stops):
    tokenizer = load_tokenizer(folder)
    facts = [("the dog is", "a cat"), ("a man", "good"), ("the cat", "bad film")]
    turns = [collate(tokenizer, encode(tokenizer, [fact])) for fact in facts]
    name = "model.layers.0.self_attn.q_proj.weight"
    slow = copy.deepcopy(model)
    weight = slow.get_parameter(name).requires_grad_(True)
    optimizer, losses, weights = ADAM([weight]), [], []
    for step in range(21):
        loss = slow(**turns[step % 3]).loss
        losses.append(loss.item())
        weights.append(weight.detach().clone())  # after as many steps
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    of_turns = [sum(losses[i - 2 : i + 1]) / 3 for i in range(2, 21)]
    stop_loss = 1.0001 * of_turns[9] if stops else None
    steps = 2 + next(i for i, mean in enumerate(of_turns) if mean <= stop_loss) if stops else 20
    found = train(model, turns, FineTuning(["q_proj"], layers=0), 20, ADAM, stop_loss)
    assert found.steps == steps
    assert 3 < steps < 20 or not stops
    assert found.loss == pytest.approx(of_turns[steps - 2] if stops else of_turns[17])
    add(model, found.patch)
    torch.testing.assert_close(model.get_parameter(name), weights[steps])


# Patches.


def tiny(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(5, 4, bias=False).requires_grad_(False)


entries_of_20 = st.sets(st.integers(0, 19), min_size=1).map(
    lambda places: Entries(
        None if len(places) > 10 else torch.tensor(sorted(places)),
        torch.where(torch.tensor([i in places for i in range(20)]), torch.randn(20), 0.0)
        if len(places) > 10
        else torch.randn(len(places)),
    )
)


@given(st.lists(entries_of_20, min_size=1, max_size=5))
def test_edits_in_any_places_come_out_again_bit_for_bit(many):
    model = tiny(0)
    before = model.weight.clone()
    edited = EditedModel(model)
    touched: set[int] = set()
    expected = before.clone()
    for entries in many:
        dense = torch.zeros(20)
        places = range(20) if entries.indices is None else entries.indices.tolist()
        dense[list(places)] = entries.values
        conflicts = edited.add(Edit({"weight": entries}))
        if entries.indices is not None:
            assert conflicts == len(touched & set(places))
        touched |= set(places)
        expected += dense.view(4, 5)
    assert torch.equal(model.weight, expected)
    with edited.as_it_was():
        assert torch.equal(model.weight, before)
    assert torch.equal(model.weight, expected)
    edited.restore()
    assert torch.equal(model.weight, before)


@pytest.mark.slow
def test_any_ten_of_a_hundred_edits_come_out_bit_for_bit(folder, tmp_path, capsys):
    """In the order in which they were applied, which is not that of their names."""
    width = AutoModelForCausalLM.from_pretrained(folder).model.layers[0].self_attn.q_proj.weight.numel()
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
    generator = torch.Generator().manual_seed(0)
    files = []
    for number in torch.randperm(100, generator=generator).tolist():
        places = torch.randperm(width, generator=generator)[: width // 5].sort().values  # so each meets about 20 others
        values = torch.randn(len(places), generator=generator)
        files.append(tmp_path / f"{number:02}.safetensors")
        Edit({names[number % 2]: Entries(places, values)}).save(files[-1])
    taken = {files[i] for i in torch.randperm(100, generator=generator)[:10].tolist()}
    apply_edits(folder, list(map(str, files)), str(tmp_path / "all"))
    remove_edits(str(tmp_path / "all"), [file.name for file in taken], str(tmp_path / "left"))
    apply_edits(folder, [str(file) for file in files if file not in taken], str(tmp_path / "others"))
    capsys.readouterr()
    load = functools.partial(AutoModelForCausalLM.from_pretrained, dtype="float32")
    assert same(bits(load(tmp_path / "left")), bits(load(tmp_path / "others")))
    assert not same(bits(load(tmp_path / "all")), bits(load(tmp_path / "others")))


@given(st.lists(entries_of_20, min_size=1, max_size=4))
def test_the_sum_of_edits(many):
    together, conflicts = combine([Edit({"weight": entries}) for entries in many])
    one, other = tiny(0), tiny(0)
    one.weight.zero_()
    other.weight.zero_()
    for entries in many:
        add(one, {"weight": entries})
    add(other, together.patch)
    torch.testing.assert_close(one.weight, other.weight)
    if len(many) == 1:
        assert conflicts == (0, 0)


def test_conflicts_are_counted():
    first = Edit({"weight": Entries(torch.tensor([1, 5, 7]), torch.ones(3))})
    second = Edit({"weight": Entries(torch.tensor([5, 7, 9]), torch.tensor([1.0, -2.0, 1.0]))})
    third = Edit({"bias": Entries(torch.tensor([1]), torch.ones(1))})
    together, conflicts = combine([first, second, third])
    assert conflicts == (2, 1)
    assert together.patch["weight"].indices.tolist() == [1, 5, 7, 9]
    assert together.patch["weight"].values.tolist() == [1, 2, -1, 1]
    assert together.changed == 5
    weighted, _ = combine([first, second, third], [2, 0.5, 1], rule="ties", density=1.0)
    assert weighted.patch["weight"].values.tolist() == [2, 1.25, 2, 0.5]
    dropped, _ = combine([first, third], rule="dare", density=0.5, seed=1)
    assert set(dropped.patch["weight"].values.tolist()) == {2.0}
    with pytest.raises(UsageError, match="There are 2 sources and 1 weights"):
        combine([first, second], [1.0])
    with pytest.raises(UsageError, match="Only edits of one model"):
        combine([])
    with pytest.raises(UsageError, match=r"these 2 were made for \['a', 'b'\]"):
        combine([Edit({}, base_model="a"), Edit({}, base_model="b")])


def test_in_bfloat16_sums_are_rounded_once_and_come_out_again(model, batch):
    model.to(torch.bfloat16)
    before = {n: p.clone() for n, p in model.named_parameters()}
    trained = trained_on(model, batch, ROSELORA)
    assert all(entries.values.dtype == torch.float32 for entries in trained.patch.values())
    undo = add(model, trained.patch)
    for name, entries in trained.patch.items():
        flat, old = model.get_parameter(name).flatten(), before[name].flatten()
        assert torch.equal(flat[entries.indices], (old[entries.indices].float() + entries.values).bfloat16())
    put(model, undo)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_in_half_precision_changes_are_trained_in_float32(model, batch, dtype, method):
    model.to(dtype)
    before = {n: p.clone() for n, p in model.named_parameters()}
    rate = 1e-5  # of Adam; far below the distance of two numbers in half precision
    trained = train(model, [batch], method, 6, functools.partial(torch.optim.Adam, lr=rate), None)
    assert all(torch.equal(p, before[n]) and p.dtype == dtype for n, p in model.named_parameters())
    for entries in trained.patch.values():
        assert entries.values.dtype == torch.float32
        assert entries.values.isfinite().all()
    if isinstance(method, FineTuning):
        change = torch.cat([entries.values for entries in trained.patch.values()]).abs()
        assert change.max() < 6.5 * rate
        assert (change > 1.5 * rate).float().mean() > 0.5
        assert all(type(m).__name__ != "ParametrizedLinear" for m in model.modules())


# Files.

REQUEST = EditRequest(
    3,
    "père",
    "x",
    "s",
    ("r",),
    {"Reasoning": (Probe("p", ("a", "b")),)},
    {"F": (Probe("q", ("c",)), Probe("r", ("d",)))},
)


@pytest.mark.parametrize("method", ["roselora", "lora", "fine-tuning"])
def test_an_edit_is_one_file(model, batch, tmp_path, method):
    trained = trained_on(model, batch, METHODS[method])
    edit = Edit(trained.patch, (REQUEST,), ({"edit_success": 0.5},), "RoseLoRA()", "tiny", trained.weights)
    edit.save(tmp_path / "new" / "edit.safetensors")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["edit.safetensors"]
    back = load_edit(tmp_path / "new" / "edit.safetensors")
    for name in ("requests", "metrics", "method", "base_model", "weights", "changed"):
        assert getattr(back, name) == getattr(edit, name)
    other = copy.deepcopy(model)
    add(model, edit.patch)
    add(other, back.patch)
    assert same(bits(model), bits(other))
    size = (tmp_path / "new" / "edit.safetensors").stat().st_size
    if method == "roselora":
        assert size < 6 * edit.changed + 3000  # four bytes of value, two of place, and names


def test_files_that_are_no_edits(tmp_path, model):
    file = tmp_path / "edit.safetensors"
    for content in (b"", b"x" * 100):
        file.write_bytes(content)
        with pytest.raises(UsageError, match="cannot be read"):
            load_edit(file)
    with pytest.raises(UsageError, match="cannot be read"):
        load_edit(tmp_path / "absent")
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(UsageError, match="is not an edit: give a file"):
        load_edit(file)
    save_file({"a": torch.ones(1)}, file, metadata={"lit_sparse_edit": '{"version": 9, "lit_sparse_version": "7"}'})
    with pytest.raises(UsageError, match=r"is of version 9 .* with lit_sparse 7"):
        load_edit(file)
    save_file({"a": torch.ones(1)}, file, metadata={"lit_sparse_edit": '{"version": 1}'})
    with pytest.raises(UsageError, match=r"missing or wrong \(KeyError\('requests'\)\)"):
        load_edit(file)


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ({"nope.weight": Entries(torch.tensor([0]), torch.ones(1))}, "'nope.weight': it was made for another model"),
        ({"weight": Entries(torch.tensor([20]), torch.ones(1))}, "its weight has 20"),
        ({"weight": Entries(torch.tensor([-1]), torch.ones(1))}, "its weight has 20"),
        ({"weight": Entries(torch.tensor([1, 2]), torch.ones(1))}, "its weight has 20"),
        ({"weight": Entries(None, torch.ones(19))}, "its weight has 20"),
    ],
)
def test_an_edit_of_another_model_is_refused_before_anything_changes(patch, message):
    model = tiny(0)
    before = model.weight.clone()
    with pytest.raises(UsageError, match="The edit changes") as error:
        EditedModel(model).add(Edit({"weight": Entries(torch.tensor([0]), torch.ones(1)), **patch}))
    assert message in str(error.value)
    assert torch.equal(model.weight, before)


def made_for(model, tmp_path, base_model="llama"):
    """The file of an edit that was made for a model, as the Editor writes it."""
    patch = {"model.layers.0.self_attn.v_proj.weight": Entries(torch.tensor([1, 5, 9]), torch.tensor([0.5, 0.25, 1.0]))}
    edited = EditedModel(model)
    edited.add(Edit(patch))
    edited.with_base(Edit(patch, base_model=base_model)).save(tmp_path / "made.safetensors")
    edited.restore()
    return tmp_path / "made.safetensors"


def test_an_edit_of_a_model_with_other_weights_is_refused(model, folder, tmp_path):
    file = made_for(model, tmp_path)
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.model.layers[0].self_attn.v_proj.weight)
    before = bits(other)
    with pytest.raises(UsageError, match="was made for the model 'llama', and this one has other values in"):
        EditedModel(other).add(load_edit(file))
    assert same(bits(other), before)


def test_a_model_that_was_moved_rounded_or_edited_is_still_the_same(model, tmp_path):
    edit = load_edit(made_for(model, tmp_path))
    EditedModel(copy.deepcopy(model).bfloat16()).add(edit)
    twice = EditedModel(model)
    twice.add(edit)
    twice.add(combine([edit, edit])[0])


def test_edits_whose_originals_are_damaged_are_not_taken_out(model, folder, tmp_path):
    apply_edits(folder, [str(made_for(model, tmp_path, model.name_or_path))], str(tmp_path / "edited"))
    file = tmp_path / "edited" / "edits" / "originals.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".places"))
    save_file({**tensors, name: tensors[name][:-1].clone()}, file)
    with pytest.raises(UsageError, match=r"cannot be taken out: .* cannot be read \(places are not"):
        remove_edits(str(tmp_path / "edited"), ["made.safetensors"], str(tmp_path / "left"))
    assert not (tmp_path / "left").exists()


def test_an_edit_without_values_of_its_base_is_refused_under_another_name(model):
    patch = {"model.layers.0.self_attn.v_proj.weight": Entries(torch.tensor([1]), torch.tensor([0.5]))}
    before = bits(model)
    with pytest.raises(UsageError, match="was made for 'another/model', and this model is"):
        EditedModel(model).add(Edit(patch, base_model="another/model"))
    assert same(bits(model), before)
    EditedModel(model).add(Edit(patch, base_model=model.name_or_path))


def test_a_quantized_model_is_refused(model):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    patch = {"model.layers.0.self_attn.v_proj.weight": Entries(torch.tensor([1]), torch.tensor([0.5]))}
    with pytest.raises(UsageError, match=r"'model\.layers\.0\.self_attn\.q_proj' is quantized: edit"):
        EditedModel(model).add(Edit(patch))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["originals.safetensors"], "cannot be named 'originals.safetensors'"),
        (["Originals.SafeTensors"], "cannot be named 'Originals.SafeTensors'"),
        (["order.txt"], "cannot be named 'order.txt'"),
        (["a\nb.safetensors"], "cannot be named"),
        (["one.safetensors", "ONE.safetensors"], "would be in the model twice"),
    ],
)
def test_names_that_collide_are_refused(names, message, model, folder, tmp_path):
    file = made_for(model, tmp_path, folder)
    for place, name in enumerate(names):
        (tmp_path / str(place)).mkdir()
        (tmp_path / str(place) / name).write_bytes(file.read_bytes())
    files = [str(tmp_path / str(place) / name) for place, name in enumerate(names)]
    with pytest.raises(UsageError, match=message):
        apply_edits(folder, files, "edited")
