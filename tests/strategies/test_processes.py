"""Real processes, each strategy: they take the steps of one process with the same global batch, and agree."""

import itertools
import json
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from backbones import WORDS, build_tiny, save_tiny_causal_tokenizer
from transformers import LlamaForCausalLM

WORKER = str(Path(__file__).with_name("worker.py"))
STRATEGIES = ("ddp", "fsdp", "fsdp2")
METHODS = ("sora", "refit", "roselora", "gated", "budget", "budget_norm", "budget_sensitivity", "hard_concrete")
State = dict[str, torch.Tensor]

pytestmark = pytest.mark.slow


def start(processes: int, runs: list[dict[str, Any]]) -> None:
    """Train all runs, one after the other, in so many processes; 1 is a plain process."""
    file = Path(f"runs_{processes}_{runs[0]['tag']}.json")
    file.write_text(json.dumps(runs))
    words = [WORKER, file]
    done = programs.launch(processes, words, timeout=600) if processes > 1 else programs.run(words, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


def final(tag: str, process: int = 0) -> State:
    return torch.load(f"{tag}_{process}.pt", weights_only=True)  # type: ignore[no-any-return]


def difference(one: State, other: State) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def zeros_differ(one: State, other: State) -> list[str]:
    return [name for name in one if not torch.equal(one[name] == 0, other[name] == 0)]


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_every_strategy_equals_one_process(arch: str) -> None:
    cases = [
        {"arch": arch, "method": method, "accumulate": accumulate, "tag": f"{method}_{accumulate}"}
        for method, accumulate in itertools.product(METHODS, (1, 4))
        if accumulate == 1 or method == "gated"  # which is both of the others
    ]
    start(1, [{**case, "strategy": "auto", "tag": f"alone_{case['tag']}"} for case in cases])
    start(2, [{**c, "strategy": s, "tag": f"{s}_{c['tag']}"} for c in cases for s in STRATEGIES])
    for case, strategy in itertools.product(cases, STRATEGIES):
        alone = final(f"alone_{case['tag']}")
        first, second = (final(f"{strategy}_{case['tag']}", process) for process in (0, 1))
        assert difference(first, second) == 0, (strategy, case)
        assert difference(first, alone) <= 1e-6, (strategy, case)
        assert zeros_differ(first, alone) == [], (strategy, case)
        pruned = [name for name, value in alone.items() if name.endswith(("gate", "lora_A")) and (value == 0).any()]
        assert pruned, case


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_single_entries_are_trained_alike_by_every_strategy_and_resumed(arch: str) -> None:
    case = {"arch": arch, "method": "shira", "steps": 20}
    start(1, [{**case, "strategy": "auto", "tag": "alone"}])
    saved = [{**case, "strategy": s, "tag": s, "save_at": 10, "save": f"{s}.ckpt"} for s in STRATEGIES]
    start(2, [*saved, {**case, "strategy": "fsdp2", "tag": "resumed", "resume": "ddp.ckpt"}])
    for tag in (*STRATEGIES, "resumed"):
        first, second, alone = final(tag, 0), final(tag, 1), final("alone")
        assert difference(first, second) == 0, tag
        assert difference(first, alone) <= 1e-6, tag
    assert all(bool(value.any()) for name, value in final("alone").items() if name.endswith("values"))


def test_entries_of_the_rank_reduced_weight_are_trained_alike_and_move_alike() -> None:
    cases = [{"arch": "bert", "method": method, "steps": 12} for method in ("lift", "lift_moving")]
    start(1, [{**case, "strategy": "auto", "tag": f"alone_{case['method']}"} for case in cases])
    fixed = [{**cases[0], "strategy": s, "tag": s} for s in STRATEGIES]
    saved = {**cases[1], "strategy": "ddp", "tag": "moving", "save_at": 7, "save": "lift.ckpt"}
    start(2, [*fixed, saved, {**cases[1], "strategy": "ddp", "tag": "resumed", "resume": "lift.ckpt"}])
    for tag in (*STRATEGIES, "moving"):
        alone = final("alone_lift_moving" if tag == "moving" else "alone_lift")
        assert difference(final(tag, 0), final(tag, 1)) == 0, tag
        assert difference(final(tag), alone) <= 1e-6, tag
    assert difference(final("moving"), final("resumed")) == 0
    with pytest.raises(AssertionError, match="update_every decomposes whole weights, which FSDP shards"):
        start(2, [{**cases[1], "strategy": "fsdp2", "tag": "refused"}])


def test_entries_that_gradients_drop_and_grow_are_those_of_one_process() -> None:
    case = {"arch": "bert", "method": "spiel", "steps": 15}
    kinds = [
        {**case, "tag": "spiel"},
        {**case, "accumulate": 4, "tag": "spiel_in_parts"},
        {**case, "arch": "llama", "compile": {"backend": "aot_eager"}, "tag": "spiel_compiled"},
    ]
    start(1, [{**kind, "strategy": "auto", "tag": f"alone_{kind['tag']}"} for kind in kinds])
    runs = [{**kind, "strategy": s, "tag": f"{s}_{kind['tag']}"} for kind in kinds for s in STRATEGIES]
    # Steps 6, 7 and 8 are those of a window. A checkpoint of ddp goes on under fsdp2, and the other way round.
    saved = [{**case, "strategy": s, "tag": f"{s}_saved", "save_at": 7, "save": f"{s}.ckpt"} for s in ("ddp", "fsdp2")]
    pairs = (("ddp", "ddp"), ("ddp", "fsdp2"), ("fsdp2", "ddp"))
    rest = [{**case, "strategy": to, "tag": f"{of}_{to}", "resume": f"{of}.ckpt"} for of, to in pairs]
    start(2, [*runs, *saved, *rest])
    tags = [(f"{s}_{kind['tag']}", f"alone_{kind['tag']}") for kind in kinds for s in STRATEGIES]
    for tag, alone in [*tags, ("ddp_fsdp2", "alone_spiel"), ("fsdp2_ddp", "alone_spiel")]:
        assert difference(final(tag, 0), final(tag, 1)) == 0, tag
        assert difference(final(tag), final(alone)) <= 1e-6, tag
    assert difference(final("ddp_spiel"), final("ddp_ddp")) == 0


def test_processes_choose_entries_by_the_gradients_of_all_their_batches() -> None:
    case = {"arch": "bert", "method": "shira_snip", "steps": 6}
    start(1, [{**case, "strategy": "auto", "tag": "alone"}])
    saved = {**case, "strategy": "ddp", "tag": "ddp", "save_at": 3, "save": "snip.ckpt"}
    start(2, [saved, {**case, "strategy": "ddp", "tag": "resumed", "resume": "snip.ckpt"}])
    assert difference(final("ddp", 0), final("ddp", 1)) == 0
    assert difference(final("ddp"), final("resumed")) == 0
    with pytest.raises(AssertionError, match="mask 'snip' needs the gradients of whole weights, which FSDP shards"):
        start(2, [{**case, "strategy": "fsdp2", "tag": "refused"}])


def test_a_cap_of_forgetting_binds_alike_in_all_processes() -> None:
    cases = [
        {"arch": "llama", "method": method, "steps": 20, "tolerance": 1e-6, "tag": method}
        for method in ("sora", "roselora")
    ]
    start(1, [{**case, "strategy": "auto", "tag": f"alone_{case['tag']}"} for case in cases])
    runs = [{**c, "strategy": s, "tag": f"{s}_{c['tag']}"} for c in cases for s in STRATEGIES]
    saved = {**cases[0], "strategy": "fsdp2", "tag": "saved", "save_at": 12, "save": "capped.ckpt"}
    start(2, [*runs, saved, {**saved, "tag": "resumed", "save_at": 0, "resume": "capped.ckpt"}])
    for case, strategy in itertools.product(cases, STRATEGIES):
        alone, tag = final(f"alone_{case['tag']}"), f"{strategy}_{case['tag']}"
        first, second = (json.loads(Path(f"{tag}_{process}.json").read_text()) for process in (0, 1))
        assert first == second, tag
        assert first[1] < 1, tag
        assert difference(final(tag, 0), final(tag, 1)) == 0, tag
        assert difference(final(tag), alone) <= 1e-6, tag
        assert zeros_differ(final(tag), alone) == [], tag
    assert difference(final("saved"), final("resumed")) == 0


def test_compiled_blocks_are_sharded_and_compacted() -> None:
    case = {"arch": "llama", "method": "refit", "steps": 30}
    compiled = {**case, "compile": {"backend": "aot_eager"}}
    compacted = {**compiled, "compact_every": 5}
    start(1, [{**case, "strategy": "auto", "tag": "eager"}])
    runs = [{**compiled, "strategy": strategy, "tag": strategy} for strategy in STRATEGIES]
    start(2, [*runs, {**compacted, "strategy": "fsdp2", "tag": "compacted"}])
    for tag in STRATEGIES:
        assert difference(final(tag, 0), final(tag, 1)) == 0, tag
        assert difference(final(tag), final("eager")) <= 1e-6, tag
        assert zeros_differ(final(tag), final("eager")) == [], tag
    small, alive = final("compacted"), final("eager")
    assert difference(small, final("compacted", 1)) == 0
    gates = [name for name in alive if name.endswith("gate")]
    for name in gates:
        kept = small[name][small[name] != 0]
        assert len(small[name]) == max(2, len(kept))
        torch.testing.assert_close(kept, alive[name][alive[name] != 0], rtol=0, atol=1e-6)
    assert sum(len(small[name]) for name in gates) < sum(len(alive[name]) for name in gates)


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def save_llama() -> str:
    """Of a width that bitsandbytes can pack: it takes blocks of 64 weights."""
    build_tiny(LlamaForCausalLM, hidden_size=64, intermediate_size=128).save_pretrained("llama")
    return "llama"


def test_weights_of_four_bits_are_sharded_by_fsdp2() -> None:
    pytest.importorskip("bitsandbytes")
    common = {"arch": save_llama(), "steps": 20}
    cases = [
        {**common, "quantization": NF4, "method": "sora", "recompute": True, "tag": "sora"},
        {**common, "quantization": NF4, "method": "roselora", "recompute": False, "tag": "roselora"},
        {
            **common,
            "quantization": {**NF4, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "float32"},
            "method": "gated",
            "recompute": False,
            "tag": "gated",
        },
    ]
    strategies = ("ddp", "fsdp2", "fsdp2_offload")
    start(1, [{**case, "strategy": "auto", "tag": f"alone_{case['tag']}"} for case in cases])
    runs = [{**c, "strategy": s, "tag": f"{s}_{c['tag']}"} for c in cases for s in strategies]
    start(2, [{**run, "traffic": f"{run['tag']}.json"} for run in runs])
    gathered = json.loads(Path("fsdp2_roselora.json").read_text())["steps"][-1]["_allgather_base_"]
    block = (4096 + 2 * 2048 + 4096 + 3 * 8192) // 2 + 2 * 64 * 4  # bytes: 4 bits a weight, and two norms
    assert gathered.count(block + block // 2) == 4  # two blocks, forward and backward: the whole from the halves
    for case, strategy in itertools.product(cases, strategies):
        alone, ended = (final(f"{name}_{case['tag']}") for name in ("alone", strategy))
        assert difference(ended, alone) <= 1e-6, (strategy, case)
        assert zeros_differ(ended, alone) == [], (strategy, case)


@pytest.mark.parametrize(("strategy", "quantization"), [("fsdp", NF4), ("fsdp2", {"load_in_8bit": True})])
def test_other_quantized_weights_are_refused_with_what_to_use(strategy: str, quantization: dict[str, Any]) -> None:
    pytest.importorskip("bitsandbytes")
    case = {"arch": save_llama(), "quantization": quantization, "method": "sora", "recompute": False}
    with pytest.raises(AssertionError, match=r"cannot shard quantized weights such as those of 'model\.model") as found:
        start(2, [{**case, "strategy": strategy, "tag": "refused"}])
    assert "Use bitsandbytes' 4 bits (load_in_4bit) and strategy fsdp2, strategy ddp, or a bfloat16" in str(found.value)


def test_four_processes_under_ddp() -> None:
    case = {"arch": "bert", "method": "gated"}
    start(1, [{**case, "strategy": "auto", "tag": "alone"}])
    start(4, [{**case, "strategy": "ddp", "tag": "ddp", "logs": "logs"}])
    assert len(list(Path("logs").rglob("sparsity.csv"))) == 1
    alone = final("alone")
    for process in range(4):
        assert difference(final("ddp", process), final("ddp")) == 0
    assert difference(final("ddp"), alone) <= 1e-6
    assert zeros_differ(final("ddp"), alone) == []


@pytest.mark.parametrize("method", ["gora", "lora_ga", "eva"])
def test_processes_start_alike_from_all_their_batches(method: str) -> None:
    case = {"arch": "bert", "method": method, "steps": 6}
    start(1, [{**case, "strategy": "auto", "tag": "alone"}])
    saved = {**case, "strategy": "ddp", "tag": "ddp", "save_at": 3, "save": "gora.ckpt"}
    others = [{**case, "strategy": name, "tag": name} for name in ("fsdp", "fsdp2") if method == "eva"]
    others += [{**other, "tag": f"resumed_{other['tag']}", "resume": "gora.ckpt"} for other in others]
    start(2, [saved, {**case, "strategy": "ddp", "tag": "resumed", "resume": "gora.ckpt"}, *others])
    assert difference(final("ddp", 0), final("ddp", 1)) == 0
    assert difference(final("ddp"), final("resumed")) == 0
    for other in others:
        assert difference(final(other["tag"], 0), final(other["tag"], 1)) == 0, other
        assert difference(final(other["tag"]), final("ddp")) <= 1e-6, other
    ranks = {name: len(value) for name, value in final("alone").items() if name.endswith("lora_A")}
    assert {name: len(value) for name, value in final("ddp").items() if name in ranks} == ranks
    assert method == "gora" or difference(final("ddp"), final("alone")) <= 1e-4  # A of GoRA is random
    assert len(set(ranks.values())) > 2 or method == "lora_ga"


@pytest.mark.parametrize("method", ["sora", "roselora"])
def test_pairs_are_compared_with_the_reference_in_every_process(method: str) -> None:
    """By DPO, with a trained output layer, whose reference is the original one."""
    case = {"arch": "pairs", "method": method, "steps": 40}
    alone = {**case, "strategy": "auto", "tag": "alone"}
    start(1, [alone, {**alone, "accumulate": 2, "tag": "alone_2"}])
    saved = {**case, "strategy": "ddp", "tag": "ddp", "save_at": 20, "save": "pairs.ckpt"}
    others = [
        {**case, "strategy": "ddp", "accumulate": 2, "tag": "ddp_2"},
        {**case, "strategy": "ddp", "tag": "resumed", "resume": "pairs.ckpt"},
        *({**case, "strategy": name, "tag": name} for name in ("fsdp", "fsdp2")),
        {**case, "strategy": "ddp", "dropout": 0.1, "tag": "dropped"},
    ]
    start(2, [saved, *others])
    for tag in ("ddp", "fsdp", "fsdp2"):
        assert difference(final(tag), final("alone")) <= 1e-6, tag
        assert zeros_differ(final(tag), final("alone")) == [], tag
    assert difference(final("ddp_2"), final("alone_2")) <= 1e-6
    assert difference(final("resumed"), final("ddp")) == 0
    for tag in ("ddp", "dropped"):
        assert difference(final(tag, 0), final(tag, 1)) == 0


@pytest.mark.parametrize("method", ["sora", "roselora"])
def test_packed_sequences_are_divided_among_processes(method: str, tmp_path: Path) -> None:
    """A batch is one sequence, because its loss is the mean over its tokens, and sequences have unequal numbers."""
    tokenizer = save_tiny_causal_tokenizer(tmp_path / "tokenizer", add_bos=True, pad_token="<pad>")  # noqa: S106
    rows = [{"question": " ".join(WORDS[i % 7 : i % 7 + 1 + i % 5]), "output": WORDS[i % 40]} for i in range(500)]
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    case = {"arch": "rows", "method": method, "rows": "rows.jsonl", "tokenizer": tokenizer, "steps": 16}
    start(1, [{**case, "strategy": "auto", "accumulate": 8, "tag": "alone"}])
    divided = [{**case, "strategy": s, "accumulate": 4, "tag": s} for s in STRATEGIES]
    straight = {**case, "strategy": "ddp", "tag": "straight", "save_at": 8, "save": "packed.ckpt"}
    start(2, [*divided, straight, {**case, "strategy": "ddp", "tag": "resumed", "resume": "packed.ckpt"}])
    for tag in STRATEGIES:
        assert difference(final(tag, 0), final(tag, 1)) == 0, tag
        assert difference(final(tag), final("alone")) <= 1e-6, tag
        assert zeros_differ(final(tag), final("alone")) == [], tag
    assert difference(final("resumed"), final("straight")) == 0


def test_checkpoints_are_resumed_by_any_strategy_and_number_of_processes() -> None:
    case = {"arch": "llama", "method": "gated", "steps": 40}
    saved = {"save_at": 20}
    names = ("auto", *STRATEGIES)

    def resumed(*by: str) -> list[dict[str, Any]]:
        pairs = itertools.product(by, names)
        return [{**case, "strategy": s, "tag": f"{s}_{n}", "resume": f"{n}.ckpt"} for s, n in pairs]

    start(1, [{**case, **saved, "strategy": "auto", "tag": "auto", "save": "auto.ckpt"}])
    straight = [{**case, **saved, "strategy": s, "tag": s, "save": f"{s}.ckpt"} for s in STRATEGIES]
    start(2, [*straight, *resumed(*STRATEGIES)])
    start(1, resumed("auto"))
    sizes = {Path(f"{name}.ckpt").stat().st_size for name in names}
    assert max(sizes) - min(sizes) < 20_000  # what is trained, once, and the state of the generators of every process
    for one, other in itertools.product(names, names):
        end, expected = final(f"{one}_{other}"), final(other)
        assert zeros_differ(end, expected) == [], (one, other)
        assert difference(end, expected) <= (0 if one == other else 1e-6), (one, other)


def test_what_processes_send_and_draw() -> None:
    both = itertools.product(STRATEGIES, ("bert", "llama", "own"))
    dropped = [{"arch": a, "method": "gated", "dropout": 0.1, "strategy": s, "tag": f"{s}_{a}"} for s, a in both]
    sent = {"arch": "llama", "method": "gated", "accumulate": 2, "steps": 4}
    counted = [{**sent, "strategy": s, "tag": f"{s}_sent", "traffic": f"{s}.json"} for s in STRATEGIES]
    cut = {"arch": "llama", "method": "sora", "steps": 60, "compact_every": 20}
    compacted = [{**cut, "strategy": s, "tag": f"{s}_cut", "traffic": f"{s}_cut.json"} for s in STRATEGIES[1:]]
    plain = {"arch": "llama", "method": "gated", "steps": 20}
    recomputed = [{**plain, "strategy": s, "tag": f"{s}_recomputed", "recompute": True} for s in STRATEGIES]
    half = [{**plain, "strategy": s, "tag": f"{s}_half", "precision": "bf16-true"} for s in STRATEGIES]
    others = [
        {**plain, "strategy": "ddp", "tag": "ddp_plain"},
        {**plain, "strategy": "fsdp2_offload", "tag": "fsdp2_offload"},
    ]
    start(2, [*dropped, *counted, *compacted, *recomputed, *half, *others])
    for run in (*recomputed, *others):
        assert difference(final(run["tag"]), final("ddp_plain")) <= 1e-6, run
    for run in half:
        assert difference(final(run["tag"]), final("ddp_half")) <= 1e-6, run
    for run in (*dropped, *compacted, *half):
        assert difference(final(run["tag"], 0), final(run["tag"], 1)) == 0, run
    for strategy in STRATEGIES:
        check_traffic(strategy, json.loads(Path(f"{strategy}.json").read_text()))
    for strategy in STRATEGIES[1:]:
        steps = json.loads(Path(f"{strategy}_cut.json").read_text())["steps"]
        assert all(len(step["allreduce_"]) == 1 for step in steps)
        assert steps[-1]["allreduce_"][0] < 0.9 * steps[0]["allreduce_"][0]  # as ranks leave


def check_traffic(strategy: str, told: dict[str, Any]) -> None:
    gradients = 4 * told["trained"]
    accumulating, stepping = told["steps"][4:6]
    sent = stepping["allreduce_"]
    if strategy == "ddp":
        assert sum(sent) == gradients  # in DDP's own buckets
        assert len(sent) <= 2
    else:
        assert sent == [gradients + 4 * told["tensors"]]  # and a number per tensor: whether it took part
        assert not any("reduce_scatter" in name for name in stepping)  # frozen weights have no gradients
    assert "allreduce_" not in accumulating
    # Sensitivities, as large as the adapters, stay where they are.
    assert sum(stepping.get("broadcast_", [])) < gradients / 10
