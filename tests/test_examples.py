"""Every script in examples/ does what it shows, in a process of its own, as its first lines say."""

import os
import re
import sys
from pathlib import Path

import pytest
from programs import run

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
SHOWS = {
    "bring_your_own_module.py": r"[0-7] of 8 ranks remain",
    "add_a_method.py": r"ranks kept in each layer: \[2\]",
    "add_a_gated_method.py": r"\d+ of 104\s+ranks",
    "custom_head_and_loss.py": r"accuracy (0\.9|1\.0)",
    "two_losses_own_optimizer.py": r"train_loss 0\.[0-4]\d, drift \d",
    "manual_optimization.py": r"entries kept in each row of A: \[3\]",
    "fabric_loop.py": r"[0-7] of 8 ranks remain",
    "several_adapters.py": r"((upper|inner|in one batch): accuracy (0\.9|1\.0)\d\n){3}",
    "predict_with_transformers.py": r"transformers: same answers True.*\nPEFT: (same answers True|not installed)",
    # All ten are said, and what is unrelated stays as a rule.
    "edit_generated_facts.py": (
        r"edit_success +│ +1\.0 +│(.|\n)*generated_success +│ +1\.0 +│\n│ +locality +│ +(0\.9\d+|1\.0) "
    ),
    "with_lightning_callbacks.py": r"[3-9]\d% of the gates are zero",
}


def test_each_example_is_listed_and_short() -> None:
    assert {path.name for path in EXAMPLES} == set(SHOWS)
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) < 60, path
        assert f"python examples/{path.name}" in path.read_text()
        assert f"]({path.name})" in (path.parent / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path) -> None:
    done = run([path], env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
    assert re.search(SHOWS[path.name], done.stdout), done.stdout


@pytest.mark.slow
def test_the_users_own_module_loses_ranks_and_learns(tmp_path: Path) -> None:
    sys.path.insert(0, str(EXAMPLES[0].parent))
    try:
        import bring_your_own_module as example
    finally:
        sys.path.pop(0)
    import lightning as L
    import torch

    import lit_sparse as ls

    method = ls.SoRA(target_modules=["query", "value"], rank=8, threshold=5e-3)
    module = example.MyModule(method)
    assert not isinstance(module, ls.SparseModule)
    tokens = torch.randint(2, 64, (256, 12), generator=torch.Generator().manual_seed(0))
    labels = (tokens[:, 1] > 32).long()
    rows = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens, labels), batch_size=16)
    losses: list[float] = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
            losses.append(float(outputs["loss"]))

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=15, callbacks=[ls.Sparsify(method), Record()], accelerator="cpu", **options)
    trainer.fit(module, rows)
    zero = sum(int((adapter.gate == 0).sum()) for _, adapter in ls.adapters_in(module))
    assert 0 < zero < 4 * 8
    assert sum(losses[-16:]) < 0.9 * sum(losses[:16])
