"""How the command line behaves: what it shows and when, what is at hand everywhere, what a shell can complete."""

import os
import pty
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

import programs
import pytest
import yaml
from hostile import make_project, run

from lit_sparse.cli.main import main

ROOT = Path(__file__).parents[1]
COMMAND = ["-m", "lit_sparse"]
CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")  # colours and moves of the cursor


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = make_project(tmp_path_factory.mktemp("project"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for key in ("enable_progress_bar", "enable_model_summary"):
        del config["trainer"][key]
    config["trainer"]["callbacks"].insert(0, {"class_path": "lit_sparse.SparsityMonitor"})
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def typed(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    done = programs.run([*COMMAND, *words], cwd=project)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def told(stderr: str) -> set[str]:
    """Lines, without the numbers in them."""
    return {re.sub(r"\d+", "", line) for line in stderr.splitlines() if line.strip()}


@pytest.mark.slow
def test_quiet_shows_nothing_but_warnings_and_writes_the_same(project):
    fit = ["fit", "--config", "config.yaml", "--trainer.callbacks.dirpath"]
    quiet = typed(project, "--quiet", *fit, "kept")
    assert not quiet.stdout.strip()
    # What other packages say when they are imported; bitsandbytes does on some processors.
    imports = told(typed(project, "--version").stderr) | told(programs.run(["-c", "import bitsandbytes"]).stderr)
    assert not [line for line in told(quiet.stderr) - imports if not re.search("[Ww]arn|site-packages", line)]
    export = ["export", "--ckpt_path", "kept/last.ckpt", "--output"]
    silent = typed(project, *export, "my-lora", "--quiet")
    assert not silent.stdout
    assert told(silent.stderr) <= imports
    assert (project / "my-lora" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_nothing_of_a_run_is_wider_than_a_terminal_of_80_columns(project):
    """On a real terminal, where bars and tables are drawn anew in place."""
    main_end, end = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "LINES": "24", "TERM": "xterm"}
    words = [*COMMAND, "fit", "--config", "config.yaml"]
    process = programs.Program(words, cwd=project, env=environment, stdin=end, stdout=end, stderr=end)
    os.close(end)
    shown, until = b"", time.monotonic() + 300
    while time.monotonic() < until:
        ready, _, _ = select.select([main_end], [], [], 1)
        try:
            part = os.read(main_end, 65536) if ready else b""
        except OSError:  # the other end was closed
            break
        shown += part
        if not ready and process.poll() is not None:
            break
    assert process.wait(30) == 0
    assert b"\x1b[" in shown, "a terminal gets colours"
    text = CONTROL.sub("", shown.decode())
    assert "layer" in text
    table = text[text.index("Adapters in") :]
    assert all(len(line) <= 80 for part in table.splitlines() for line in part.split("\r") if "ranks are" not in line)
    bars = [line for line in re.split(r"[\r\n]", text) if "Epoch" in line]
    assert bars
    assert max(map(len, bars)) <= 80, bars
    whole = [bar for bar in bars if "val_loss" in bar and "val_accuracy" in bar]
    assert whole, "all metrics are on the line of the bar"
    assert "Epoch" not in table, "the bar is not drawn again below the table"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_a_run_saves_of_its_configuration_leaves_a_users_file_alone(project, tmp_path):
    """Without a logger it is saved where the user is, and what is there may be the file that it was started with."""
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    written = (tmp_path / "config.yaml").read_bytes()
    assert run(["fit", "--config", "config.yaml"]).status == 0
    assert (tmp_path / "config.yaml").read_bytes() == written
    saved = (tmp_path / "run_config.yaml").read_bytes()
    assert saved.startswith(b"# lightning")
    (tmp_path / "config.yaml").rename(tmp_path / "mine.yaml")
    for text in (b"# of another program\nanswer: 42\n", b""):
        (tmp_path / "config.yaml").write_bytes(text)
        assert run(["fit", "--config", "mine.yaml", "--trainer.max_epochs", "2"]).status == 0
        assert (tmp_path / "config.yaml").read_bytes() == text
    (tmp_path / "config.yaml").unlink()
    assert run(["fit", "--config", "mine.yaml"]).status == 0
    assert run(["fit", "--config", "mine.yaml", "--trainer.max_epochs", "3"]).status == 0
    assert "max_epochs: 3" in (tmp_path / "config.yaml").read_text(), "an earlier run's is replaced"


@pytest.mark.slow
def test_configurations_of_the_package_are_at_hand_everywhere(capsys):
    printed = []
    for name in (str(ROOT / "configs" / "quickstart.yaml"), "lit_sparse://quickstart.yaml"):
        for words in (["--config", name], [f"--config={name}"]):
            with pytest.raises(SystemExit) as ended:
                main(["fit", *words, "--print_config"])
            assert ended.value.code == 0
            printed.append(capsys.readouterr().out)
    assert len(set(printed)) == 1
    assert "quickstart://all-MiniLM-L6-v2" in printed[0]


@pytest.mark.parametrize("name", ["lit_sparse://quickstart.yml", "lit_sparse://../pyproject.toml", "lit_sparse://"])
def test_another_name_is_answered_with_those_there_are(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", name])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: There is no configuration '{name}' in the package; there are arithmetic/")
    assert "quickstart.yaml" in error
    assert len(error.splitlines()) == 1
