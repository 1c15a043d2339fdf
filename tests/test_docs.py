"""What the pages under docs/ say is there, and works: links, code, configurations, commands and the reference."""

import contextlib
import json
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import programs
import pytest
import yaml
from backbones import save_tiny_deberta, save_tiny_llama

import lit_sparse as ls
from lit_sparse.cli.main import main

ROOT = Path(__file__).parents[1]
WRONG_WORDS = re.compile("unrecognized|required|invalid choice|Did you mean|does not accept")
GALLERY = "examples/adapters/README.md"  # tests/test_gallery.py does what it says
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))


def blocks(page: str, language: str) -> list[str]:
    """But those with a title, which are files: .ci/first_steps.py uses them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    """The lines of the page's bash blocks, those that are continued put together, and ``a && b`` taken apart."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [part.partition("  #")[0].strip() for line in lines for part in line.split("&&") if part.strip()]


def pages_with(language: str) -> list[str]:
    return [page for page in PAGES if blocks(page, language)]


def heading_ids(file: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md", GALLERY])
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = ROOT / page if not path else (ROOT / page).parent / path
        assert target.exists(), link
        if anchor:
            assert anchor in heading_ids(target), link


def test_the_notebook_of_the_language_model_is_made_of_its_page():
    """Whose commands the checks take step by step."""
    notebook = runpy.run_path(str(ROOT / ".ci" / "tutorial_notebook.py"))["notebook"]
    made = notebook((ROOT / "docs" / "language-model.md").read_text(encoding="utf-8"))
    assert (ROOT / "examples" / "language_model.ipynb").read_text(encoding="utf-8") == made
    assert "%%writefile library.yaml" in made
    assert ".venv" not in made


def test_the_reference_has_every_public_name():
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    named = set(re.findall(r"^::: lit_sparse\.(\w+)$", text, re.MULTILINE))
    assert set(ls._HOME) <= named


@pytest.fixture
def project():
    """What the pages' code names: models, tables, requests."""
    Path("examples").symlink_to(ROOT / "examples")
    save_tiny_deberta("microsoft/deberta-v3-base")
    for name in ("meta-llama/Llama-2-7b-chat-hf", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        save_tiny_llama(name)
    rows = "review,stars\n" + "".join(f"a {word} film,{word}\n" for word in ["good", "bad"] * 20)
    for name in ("train.csv", "dev.csv"):
        Path(name).write_text(rows)
    requests = Path("KnowEdit/benchmark/ZsRE/ZsRE-test-all.json")
    requests.parent.mkdir(parents=True)
    requests.write_text(json.dumps([{"prompt": "the cat is", "target_new": "a dog", "subject": "cat"}]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", pages_with("python"))
def test_the_code_runs(page, project):
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)  # noqa: S102


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", pages_with("yaml"))
def test_the_configurations_are_read(page, project, capsys):
    for number, block in enumerate(blocks(page, "yaml")):
        Path(f"{number}.yaml").write_text(block)
        whole = "data" in yaml.safe_load(block)
        first = [] if whole else ["--config", str(ROOT / "configs" / "quickstart.yaml")]
        with pytest.raises(SystemExit) as ended:
            main(["fit", *first, "--config", f"{number}.yaml", "--print_config"])
        assert ended.value.code == 0, capsys.readouterr().err


def titled(page: str) -> dict[str, str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return dict(re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```', text, re.DOTALL | re.MULTILINE))


@pytest.mark.slow
def test_the_search_tries_budgets_and_rates_and_goes_on(project, tmp_path):
    pytest.importorskip("optuna", reason="the extra search is not installed")
    Path("search.py").write_text(titled("docs/how-to/search.md")["search.py"])
    main(["init", "--data", "train.csv", "--backbone", "microsoft/deberta-v3-base", "--budget", "0.5"])
    for trials in ("1", "2"):
        done = programs.run(["search.py", "config.yaml", "val_accuracy", trials])
        assert done.returncode == 0, done.stderr
    found = re.findall(r"^trial (\d): val_accuracy [\d.]+, ([\d,]+) parameters, ", done.stdout, re.MULTILINE)
    assert {number for number, _ in found} <= {"0", "1"}
    budgets = {yaml.safe_load(file.read_text())["model"]["init_args"]["method"]["init_args"]["budget"]
               for file in Path("runs/search").glob("trial*/version_0/config.yaml")}  # fmt: skip
    assert len(budgets) == 2
    assert all(0.02 <= budget <= 1 for budget in budgets)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [*pages_with("bash"), GALLERY, pytest.param("README.md", marks=pytest.mark.slow)])
def test_the_commands_are_read(page, tmp_path, capsys):
    for name, content in titled(page).items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content)
    for name in ("benchmarks", "configs", "examples", "tests"):  # and none of the runs that a developer has there
        (tmp_path / name).symlink_to(ROOT / name)
    for command in commands(page):
        program, *words = shlex.split(re.sub(r"^(?:[A-Z_]+=\S+ )+", "", command))
        if program == "python" and words[0] != "-m" and words[0] != "-c":
            assert Path(words[0]).is_file(), command
            source = Path(words[0]).read_text(encoding="utf-8")
            for option in [word for word in words[1:] if word.startswith("--")]:
                assert f'"{option}"' in source, command
        elif program in ("lightning", "lit-sparse") and words[0] in ("fit", "validate", "test", "predict"):
            with pytest.raises(SystemExit) as ended:
                main([*words, "--print_config"])
            assert ended.value.code == 0, (command, capsys.readouterr().err)
        elif program in ("lightning", "lit-sparse"):
            # Its words are read before what they name is looked for, which is not there.
            with contextlib.suppress(SystemExit):
                main(words)
            assert not WRONG_WORDS.search(capsys.readouterr().err), command
        else:
            others = ("python", "python3", "pip", "mkdir", "mkdocs", "pytest", "sbatch", "docker", ".")
            assert program in others, command
