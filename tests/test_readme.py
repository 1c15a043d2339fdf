"""What the README says is there, and works."""

import re
from pathlib import Path
from typing import Any

import pytest
from backbones import save_tiny_tokenizer
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

import lit_sparse as ls

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_every_linked_file_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    for link in links:
        pattern = link.replace("*", "")
        assert (ROOT / pattern).exists(), link


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


@pytest.mark.filterwarnings("ignore")
def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    config = DebertaV2Config(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False, max_relative_positions=16,
    )  # fmt: skip
    folder = tmp_path / "deberta"
    DebertaV2ForSequenceClassification(config).save_pretrained(folder)
    save_tiny_tokenizer(folder)
    rows = "review,stars\n" + "".join(f"a {word} film,{word}\n" for word in ["good", "bad"] * 20)
    (tmp_path / "train.csv").write_text(rows)
    (tmp_path / "dev.csv").write_text(rows)
    code = "\n".join(blocks("python")).replace('"microsoft/deberta-v3-base"', repr(str(folder)))
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102

    assert isinstance(names["module"], ls.SequenceClassification)
    own, trainer = names["MyModule"](), names["trainer"]
    files = {"train": "train.csv", "validation": "dev.csv"}
    data = ls.TextClassificationData(data_files=files, text="review", label="stars", tokenizer=str(folder))
    trainer.fit(own, datamodule=data)
    assert trainer.global_step == 3 * 2
    assert trainer.callbacks[0].steps_taken == 3 * 2
