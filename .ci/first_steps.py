"""Do what a tutorial says, in order and word by word, with nothing but a copy of the repository: files and commands.

docs/index.md: the run must end with what the page shows, and the exported folder must hold it.
docs/how-to/own-module.md: the module must learn as well as the page says, and keep as much.
docs/language-model.md: the model must learn to answer, all its forms must answer alike, and lm-eval must count as many.
docs/editing.md: the edited model must say of one fact what the page says.

Run:  python .ci/first_steps.py FOLDER, which must not exist: the copy.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
STATE = re.compile(
    r"step (\d+) of (\d+), sparsity final, ([\d,]+ parameters in ([\d,]+) of ([\d,]+) ranks, [\d.]+ % of the adapted)"
)
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', re.DOTALL | re.MULTILINE)


def script(page: str) -> str:
    """A block with a title is a file of that name, a block of bash what is typed."""
    lines = ["set -euo pipefail"]
    for language, title, body in BLOCK.findall(page):
        if title:
            lines.append(f"cat > {shlex.quote(title)} <<'END OF BLOCK'\n{body}END OF BLOCK")
        elif language == "bash":
            lines.append(body)
    return "\n".join(lines)


def take(page: str, clone: Path, env: dict[str, str], section: str = "") -> str:
    """Type what a page or one section of it says, and return what is printed."""
    text = (clone / page).read_text(encoding="utf-8")
    if section:
        text = "```bash\n. .venv/bin/activate\n```\n" + text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    done = subprocess.run(
        ["bash", "-c", script(text)],
        cwd=clone, env=env, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    print(done.stdout[-2000:])
    return done.stdout


def main() -> None:
    clone = Path(sys.argv[1])
    made = shutil.ignore_patterns(
        *(".git", ".venv", "*.egg-info", "__pycache__", ".*_cache"), *("build", "dist", "runs", "site")
    )
    shutil.copytree(ROOT, clone, symlinks=True, ignore=made)
    own = Path(sys.prefix, "bin").resolve()  # of this environment nothing is to be found
    kept = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    kept["PATH"] = os.pathsep.join(p for p in kept["PATH"].split(os.pathsep) if Path(p).resolve() != own)
    check_index(take("docs/index.md", clone, kept), clone, kept)
    check_own_module(take("docs/how-to/own-module.md", clone, kept, "Train"), clone)
    check_language_model(take("docs/language-model.md", clone, kept), clone)
    check_one_fact(take("docs/editing.md", clone, kept, "One fact"), clone)


def number(written: str) -> int:
    return int(written.replace(",", ""))


def check_index(printed: str, clone: Path, kept: dict[str, str]) -> None:
    assert (clone / "hotel-lora" / "adapter_config.json").is_file()
    told = list(STATE.finditer(" ".join(printed.split())))
    own, exported = told[0], told[1]  # of own.yaml's run and of its export; the quickstart's comes after them
    assert own[0] == exported[0], (own[0], exported[0])
    assert own[1] == own[2], own[0]
    assert number(own[4]) < number(own[5]), f"nothing was pruned: {own[0]}"
    command = [clone / ".venv" / "bin" / "lit-sparse", "inspect", "hotel-lora"]
    shown = subprocess.run(command, cwd=clone, env=kept, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert own[3] in " ".join(shown.split()), (own[3], shown)
    page = (clone / "docs" / "index.md").read_text(encoding="utf-8")
    promised = re.search(r"([\d,]+) parameters in", page)
    assert promised is not None
    left = number(own[3].partition(" ")[0])
    assert abs(left - number(promised[1])) <= 1920, "the page's parameters, but for one rank"
    card = (clone / "hotel-lora" / "README.md").read_text(encoding="utf-8")
    accuracy = re.search(r"^\| val_accuracy \| ([\d.]+) \|", card, re.MULTILINE)
    shown = re.search(r"`val_accuracy` is ([\d.]+)", page)
    assert accuracy is not None
    assert shown is not None
    assert abs(float(accuracy[1]) - float(shown[1])) <= 0.1, "the page's accuracy, but for four reviews"
    assert "['good', 'bad']" in printed
    script = re.search(r"^accuracy ([\d.]+)$", printed, re.MULTILINE)
    assert script is not None
    assert abs(float(script[1]) - float(shown[1])) <= 0.1, "the script's accuracy"
    score = r"(\d\.\d+(?:e[+-]\d+)?)"
    rows = re.findall(rf"\[{score}, {score}\]", printed[printed.rindex("tensor(") :])
    assert len(rows) == 2, "predict.py scores two texts"
    assert all(abs(float(a) + float(b) - 1) < 1e-3 for a, b in rows)


def check_own_module(printed: str, clone: Path) -> None:
    page = (clone / "docs" / "how-to" / "own-module.md").read_text(encoding="utf-8")
    result = re.compile(r"accuracy ([\d.]+)\n.*?([\d,]+) parameters in \d+ of 96 ranks", re.DOTALL)
    found, promised = result.search(printed), result.search(page)
    assert found is not None
    assert promised is not None
    assert abs(float(found[1]) - float(promised[1])) <= 0.1, "the page's accuracy, but for four reviews"
    assert abs(number(found[2]) - number(promised[2])) <= 768, "the page's parameters, but for one rank"
    assert (clone / "reviews-lora" / "adapter_config.json").is_file()


def check_language_model(printed: str, clone: Path) -> None:
    told = STATE.search(" ".join(printed.split()))
    assert told is not None
    assert number(told[4]) < number(told[5]), f"nothing was pruned: {told[0]}"
    promised = re.search(r"([\d,]+) parameters in", (clone / "docs" / "language-model.md").read_text(encoding="utf-8"))
    assert promised is not None
    left = number(told[3].partition(" ")[0])
    assert abs(left - number(promised[1])) <= 2112, "the page's parameters, but for one rank"
    exact = re.search(r"(\d+) of 20 answers are exact", printed)
    assert exact is not None
    assert int(exact[1]) >= 18, exact[0]
    answers = printed[exact.end() :]
    assert answers.count("Comma") == 2, (
        "the checkpoint and the merged model answer alike, and the backbone does not know"
    )
    judged = re.search(r"library +exact_match +0 +([\d.]+) +[\d.]+ +([\d.]+)", answers)
    assert judged is not None
    assert round(20 * float(judged[1])) == int(exact[1]), "lm-eval and judge.py compare the same answers"
    assert float(judged[2]) == 0, "the backbone does not know"
    assert any((clone / "library-gguf").glob("*.gguf"))
    assert (clone / "library-lora" / "adapter_config.json").is_file()


def check_one_fact(printed: str, clone: Path) -> None:
    page = (clone / "docs" / "editing.md").read_text(encoding="utf-8")
    answers = re.compile(r"^(.+)\n  before: (.+)\n  after: +(.+)$", re.MULTILINE)
    found, promised = answers.findall(printed), answers.findall(page)
    assert len(found) == len(promised) == 4
    for (prompt, before, after), (asked, first, later) in zip(found, promised, strict=True):
        assert (prompt, before, after.split()[0]) == (asked, first, later.split()[0]), (prompt, before, after)
    changed, told = (re.search(r"([\d,]+) of 26,542,080 weights changed", text) for text in (printed, page))
    assert changed is not None
    assert told is not None
    assert abs(number(changed[1]) / number(told[1]) - 1) <= 0.05, changed[0]
    assert (clone / "lyon.safetensors").is_file()


if __name__ == "__main__":
    main()
