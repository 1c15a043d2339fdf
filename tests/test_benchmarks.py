"""The benchmarks run, and the tables in the documentation are those of the files that they wrote."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

tables = pytest.importorskip("tables")


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.stem)
def test_the_tables_are_those_of_the_results(page):
    assert tables.written(page.read_text()) == page.read_text(), "run python benchmarks/tables.py"


def test_every_result_has_its_place_in_a_page():
    page = "".join(page.read_text() for page in tables.PAGES)
    for file in (ROOT / "benchmarks" / "results").glob("*.json"):
        if file.stem.partition("-")[0] in tables.KINDS:
            assert f"<!-- results/{file.name} -->" in page


@pytest.mark.parametrize("backbone", ["bert", "llama"])
def test_step_time_writes_what_the_tables_read(backbone, tmp_path):
    pytest.importorskip("peft")
    file = tmp_path / "step_time-test.json"
    command = [sys.executable, "benchmarks/step_time.py", "--backbone", backbone, "--layers", "1", "--rank", "2"]
    size = ["--rows", "1", "--tokens", "2", "4", "8", "--rounds", "2", "--json", str(file)]
    variants = ["--variants", "floor", "PEFT LoRA", "PEFT AdaLoRA", "SoRA", "RoseLoRA", "RoseLoRA, released"]
    done = subprocess.run([*command, *size, *variants], cwd=ROOT, capture_output=True, text=True, check=False)
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
