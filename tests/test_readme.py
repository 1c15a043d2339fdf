"""What the README says is there, and works."""

import json
import re
from pathlib import Path

import pytest

import lit_sparse as ls

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_every_configuration_in_a_command_exists() -> None:
    named = re.findall(r"--config (\S+)", "\n".join(blocks("bash")))
    assert named
    for name in named:
        assert (ROOT / name).is_file(), name


def test_ci_runs_the_test_command_of_the_readme() -> None:
    (command,) = [line for block in blocks("bash") for line in block.splitlines() if "pytest" in line]
    steps = [step.strip() for step in command.split("&&")]
    ci = (ROOT / ".ci" / "run").read_text()
    assert steps[-1] == "pytest -n 2"
    assert f"\n{steps[-1]}\n" in ci
    constraints = re.search(r"-c constraints\.txt -e \"\.\[test\]\"", steps[-2])
    assert constraints is not None
    assert constraints[0] in ci


def set_up() -> list[str]:
    """The commands that the README begins with."""
    return blocks("bash")[0].splitlines()


def test_the_image_is_made_by_the_commands_of_the_readme() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    steps = [re.split(r"\s+", line, maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    runs = [" ".join(rest.split()) for kind, rest in steps if kind == "RUN"]
    assert runs[-1].replace("--no-cache-dir ", "") == " && ".join(set_up())
    (command,) = [json.loads(rest) for kind, rest in steps if kind == "CMD"]
    assert " ".join(command) in blocks("bash")[1].splitlines()
    kinds = [kind for kind, _ in steps]
    assert dict(steps)["FROM"] == "python:3.11-slim"
    assert dict(steps)["USER"] == "1000"  # none but the owner of what is copied
    assert kinds.index("USER") < kinds.index("COPY") < len(kinds) - 1 - kinds[::-1].index("RUN")


def test_what_git_ignores_is_not_copied_into_the_image() -> None:
    ignored, left_out = ((ROOT / name).read_text(encoding="utf-8").split() for name in (".gitignore", ".dockerignore"))
    assert {line.rstrip("/") for line in ignored} <= {line.removeprefix("**/") for line in left_out}


def test_the_notebook_has_the_python_of_the_readme() -> None:
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    install, *cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert "".join(blocks("python")).rstrip("\n") in cells
    shown = [text for cell in notebook["cells"] for made in cell.get("outputs", []) for text in made.get("text", [])]
    assert all(line in " ".join("".join(shown).split()) for line in blocks("text")[0].splitlines())
    # Colab's torch is for its GPU: pip may neither replace it, nor see the other one in the constraints.
    assert re.search(r"%pip install .*-c colab\.txt .*\[plot,quickstart\]", install)
    assert "torch=={version('torch')}" in install
    assert "constraints.txt" not in re.sub("#.*", "", install)
    names: dict[str, object] = {}
    exec(re.sub("^( +)[!%].*", r"\1pass", install, flags=re.MULTILINE), names)  # noqa: S102
    assert names["repository"] == ""  # elsewhere, it does nothing


def test_the_badges_say_what_is_so() -> None:
    badges = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "badges").glob("*.svg")}
    assert f">{ls.__version__}<" in badges["version"]
    assert ">Apache-2.0<" in badges["licence"]
    assert all(f"](docs/badges/{name}.svg)" in README for name in badges)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_python_of_the_readme_runs_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})  # noqa: S102
    said = r"([\d,]+) parameters in.*tensor\((\d\.\d+)\)"
    shown, printed = (re.search(said, text, re.DOTALL) for text in (README, capsys.readouterr().out))
    assert shown is not None
    assert printed is not None
    left, promised = (int(found[1].replace(",", "")) for found in (printed, shown))
    assert abs(left - promised) <= 1536 + 384, "the largest rank"  # another machine may keep another one
    assert abs(float(printed[2]) - float(shown[2])) < 0.03
    assert Path("my-lora/adapter_config.json").is_file()
