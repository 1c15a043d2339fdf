"""The benchmarks run, and the tables in the documentation are those of the files that they wrote."""

import json
import sys
from collections import Counter
from pathlib import Path

import programs
import pytest
from backbones import save_tiny_llama

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

tables = pytest.importorskip("tables")
method_files = tables.method_files


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.stem)
def test_the_tables_are_those_of_the_results(page):
    assert tables.written(page.read_text()) == page.read_text(), "run python benchmarks/tables.py"


def test_a_method_is_one_file_of_150_lines_and_longer_ones_are_shared():
    files = method_files.files()
    assert {"SoRA", "LIFT", "`init_weights: gora`", "`init_weights: lora_ga`"} <= set(files)
    assert "SparseMethod" not in files
    assert {name: n for name, file in files.items() if (n := method_files.length(file)) > 150} == {}
    used = Counter(other for file in set(files.values()) for other in all_used(file))
    assert [file for file, times in used.items() if times == 1 and method_files.length(file) > 150] == []


def all_used(file: Path) -> set[Path]:
    """What a file imports, and what that imports in turn."""
    direct = method_files.uses(file)
    return set(direct).union(*map(all_used, direct))


def test_every_result_has_its_place_in_a_page():
    page = "".join(page.read_text() for page in tables.PAGES)
    for file in (ROOT / "benchmarks" / "results").glob("*.json"):
        if file.stem.partition("-")[0] in tables.KINDS:
            assert f"<!-- results/{file.name} -->" in page


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["bert", "llama"])
def test_step_time_writes_what_the_tables_read(backbone, tmp_path):
    pytest.importorskip("peft")
    file = tmp_path / "step_time-test.json"
    command = ["benchmarks/step_time.py", "--backbone", backbone, "--layers", "1", "--rank", "2"]
    size = ["--rows", "1", "--tokens", "2", "4", "8", "--rounds", "2", "--json", str(file)]
    variants = ["--variants", "floor", "PEFT LoRA", "PEFT AdaLoRA", "SoRA", "RoseLoRA", "RoseLoRA, released"]
    done = programs.run([*command, *size, *variants], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    assert [result["tokens"] for result in content["results"]] == [2, 4, 8]
    made = tables.of_step_time(content)
    assert made.count("| SoRA |") == 4  # three tables, and the slope
    assert made.splitlines()[-1].startswith("| RoseLoRA, released | tokens: 2, 4, 8 |")
    assert made in done.stdout


def test_cells_are_run_once_and_taken_over_from_the_dead(tmp_path):
    pytest.importorskip("peft")
    cells = pytest.importorskip("cells")
    store, ran = cells.Store(tmp_path / "results.json"), []

    def missing(found):
        wanted = ["first", "second"] + (["third"] if "second" in found else [])
        return {key: key for key in wanted if key not in found}

    def run(cell):
        ran.append(cell)
        if ran == ["second"]:
            raise KeyboardInterrupt
        return {"score": 1.0, "seconds": 0.0, "cell": cell}

    store.claims.mkdir()
    (store.claims / "first").write_text("999999999")  # no process has such a number
    with pytest.raises(KeyboardInterrupt):
        cells.run_missing(store, missing, run, processes=1)
    (store.claims / "second").write_text("1")  # which lives, and works on it
    cells.run_missing(store, missing, run, processes=1)
    assert ran == ["second", "first"]
    (store.claims / "second").unlink()
    cells.run_missing(store, missing, run, processes=1)
    assert ran == ["second", "first", "second", "third"]
    results = store.read()
    assert set(results) == {"first", "second", "third"}
    assert results["first"]["commit"] == results["third"]["commit"]
    assert "command" not in results["first"]
    assert not list(store.claims.iterdir())


def final(task, method, seed, score, parameters=100, changed=1.0):
    return {
        "phase": "final", "task": task, "method": method, "seed": seed, "score": score, "parameters": parameters,
        "changed": changed, "lr": 1e-3, "seconds": 10.0, "ranks": {"encoder.layer.0.attention.self.query": 4},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("sora", "parameters", "rose", "changed", "outcome"),
    [
        (79.8, 70, 79.0, 0.10, ["holds", "holds"]),
        (79.6, 70, 78.9, 0.10, ["**does not hold**"] * 2),  # too few points
        (79.8, 71, 79.0, 0.11, ["**does not hold**"] * 2),  # too much is left
    ],
)
def test_the_table_says_what_became_of_the_promises(sora, parameters, rose, changed, outcome):
    cells = [final(task, "LoRA", seed, 80.0 + off) for task, off in (("cola", -20), ("rte", 20)) for seed in (0, 1)]
    for task, off in (("cola", -20), ("rte", 20)):
        for seed, more in ((0, -1), (1, 1)):
            cells.append(final(task, "SoRA", seed, sora + off + more, parameters))
            cells.append(final(task, "RoseLoRA", seed, rose + off + more, changed=changed))
    cells += [final("mrpc", "LoRA", seed, 99.0) for seed in (0, 1)]  # a task that the others lack counts for nobody
    cells += [final("qnli", method, 0, 99.0) for method in ("LoRA", "SoRA", "RoseLoRA")]  # as one with seeds to come
    cells.append(final("cola", "AdaLoRA", 0, 99.0))
    cells.append({**cells[0], "phase": "search", "score": 0.0})
    made = tables.of_quality({str(i): cell for i, cell in enumerate(cells)})
    assert all(left_out not in made for left_out in ("mrpc", "qnli", "AdaLoRA"))
    assert f"| SoRA | {sora - 20:.2f} ± 1.41 | {sora + 20:.2f} ± 1.41 | {sora:.2f} ± 1.41 | {parameters} |" in made
    promises = [line for line in made.splitlines() if line.startswith("- ")]
    assert [line.rpartition(": ")[2] for line in promises] == [f"{word}." for word in outcome]
    assert f"SoRA: {sora - 80:+.2f} points against LoRA (by seed {sora - 81:+.2f}, {sora - 79:+.2f})" in made
    assert "| Mean rank left, SoRA | cola | rte |" in made


def test_the_search_goes_on_where_the_best_rate_is_at_an_end():
    pytest.importorskip("peft")
    quality = pytest.importorskip("quality")
    low, middle, high = quality.LEARNING_RATES
    scores: dict[float, float] = {}

    def found():
        return {quality.Cell("search", "rte", "SoRA", lr, 0).key: {"score": score} for lr, score in scores.items()}

    def searched():
        return quality.searched(found(), "rte", "SoRA"), quality.chosen_lr(found(), "rte", "SoRA")

    scores |= {low: 1.0, middle: 2.0}
    assert searched() == ([low, middle, high], None)
    scores[high] = 1.5
    assert searched() == ([low, middle, high], middle)
    scores[high] = 3.0
    assert searched() == ([low, middle, high, 2 * high], None)
    scores[2 * high] = 2.5
    assert searched() == ([low, middle, high, 2 * high], high)
    scores[2 * high] = 4.0
    assert searched() == ([low, middle, high, 2 * high, 4 * high], None)
    scores[4 * high] = 5.0
    assert searched() == ([low, middle, high, 2 * high, 4 * high], 4 * high)  # and no further
    scores[low] = 9.0
    assert searched() == ([low / 2, low, middle, high], None)


def test_what_was_forgotten_is_compared_where_lora_scores_the_same():
    def cells(method, *points):
        return {
            f"{method}/{lr}/{seed}": {
                "method": method, "lr": lr, "seed": seed, "score": score + seed, "before": {"other": 50.0},
                "after": {"other": kept - seed}, "changed": 0.04,
            }
            for lr, score, kept in points for seed in (-1, 1)
        }  # fmt: skip

    lora = cells("LoRA", (1e-4, 70.0, 48.0), (1e-3, 80.0, 40.0), (1e-2, 60.0, 10.0))
    # 65 is LoRA's only on the way down, 81 not at all; 75 is half of the way from its lowest rate to the best.
    ours = cells("RoseLoRA", (1e-4, 65.0, 49.0), (1e-3, 75.0, 47.0), (1e-2, 81.0, 46.0))
    lines = tables.of_forgetting({**ours, **lora}).splitlines()
    assert lines[-2:] == ["", "- RoseLoRA at 0.001, and LoRA where it scores 75.00 as well: other 47.00, LoRA's 44.00."]
    assert len([line for line in lines if line.startswith("- ")]) == 1


def test_the_table_of_what_was_forgotten_groups_seeds():
    cells = {
        f"{method}/{lr}/{seed}": {
            "method": method, "lr": lr, "seed": seed, "score": 80.0 + seed, "before": {"other": 50.0},
            "after": {"other": 40.0 - seed}, "changed": 0.04,
        }
        for method in ("RoseLoRA", "LoRA") for lr in (4e-3, 5e-4) for seed in (0, 2)
    }  # fmt: skip
    lines = tables.of_forgetting(cells).splitlines()
    assert lines[0] == "| | lr | task | other (before 50.00) | weights changed |"
    assert lines[2] == "| LoRA | 0.0005 | 81.00 ± 1.41 | 39.00 ± 1.41 | 4.0% |"
    assert [line.split(" | ")[:2] for line in lines[3:]] == [
        ["| LoRA", "0.004"], ["| RoseLoRA", "0.0005"], ["| RoseLoRA", "0.004"],
    ]  # fmt: skip


def test_the_table_of_peft_s_comparison_has_the_rise_of_the_loss():
    cells = {
        f"{method}/{lr}/{seed}": {
            "method": method, "lr": lr, "seed": seed, "score": 20.0 + seed, "before": 2.0, "after": 2.1 + lr * seed,
            "trained": 4000, "stored": 1000 + 2 * seed,
        }
        for method in ("SoRA", "LoRA, rank 2", "LoRA") for lr in (3e-3, 1e-3) for seed in (0, 1)
    }  # fmt: skip
    lines = tables.of_method_comparison(cells).splitlines()
    assert "rise of the loss (from 2.000)" in lines[0]
    assert lines[2] == "| LoRA | 0.001 | 20.50 ± 0.71 | 0.101 ± 0.001 | 4,000 | 1,001 |"
    assert [line.split(" | ")[:2] for line in lines[3:]] == [
        ["| LoRA", "0.003"], ["| LoRA, rank 2", "0.001"], ["| LoRA, rank 2", "0.003"],
        ["| SoRA", "0.001"], ["| SoRA", "0.003"],
    ]  # fmt: skip


@pytest.mark.slow
def test_peft_s_comparison_in_small_trains_and_measures_every_method(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    replica = pytest.importorskip("method_comparison_replica")
    model = save_tiny_llama(tmp_path / "model")
    mawps, stories = tmp_path / "math_reasoning" / "mawps", tmp_path / "text" / "tinystories"
    mawps.mkdir(parents=True)
    stories.mkdir(parents=True)
    rows = [{"original_text": f"what is one and {i}", "equation": f"X=1+{i}", "ans": 1.0 + i} for i in range(20)]
    (mawps / "trainset.json").write_text(json.dumps(rows))
    (mawps / "test.json").write_text(json.dumps([{"instruction": "what is one and 3", "answer": "4.0"}] * 3))
    (stories / "validation.jsonl").write_text('{"text": "the cat sat on the tree"}\n')
    monkeypatch.setattr(replica, "STEPS", 10)
    monkeypatch.setattr(replica, "NEW_TOKENS", 4)
    cells = {method: replica.run(model, tmp_path, (method, 1e-2, 0)) for method in tables.COMPARED}
    assert list(replica.missing({})) == [
        f"{method}/{lr}/{seed}" for seed in replica.SEEDS for method in tables.COMPARED for lr in replica.LEARNING_RATES
    ]
    assert all(cell["after"] != cell["before"] for cell in cells.values())
    dense = cells["LoRA"]["stored"]
    assert cells["LoRA"]["trained"] == dense
    assert cells["LoRA, rank 2"]["stored"] == dense / 4
    assert 0.2 * dense < cells["SoRA"]["stored"] <= dense / 4
    assert cells["AdaLoRA"]["stored"] < 0.3 * dense
    assert cells["RoseLoRA"]["stored"] < 0.1 * dense
    assert len(tables.of_method_comparison(cells).splitlines()) == 2 + len(tables.COMPARED)
