"""Run PEFT's method comparison on MetaMathQA, as it is published, with the methods of lit_sparse.

Run:  PYTHONPATH=PEFT/src python launch.py PEFT/method_comparison/MetaMathQA [-v] [--clean] experiments/METHOD/NAME

PEFT is a checkout of https://github.com/huggingface/peft. Run it in this folder, whose experiments/ the suite then
reads. All arguments after the first are those of the suite's run.py, which writes into its own folders of results.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from peft_method import SparseTuner, register

import lit_sparse as ls


def load_utils(suite: Path) -> ModuleType:
    """The suite's module ``utils``, from which its ``run.py`` takes the functions that it calls."""
    if str(suite) not in sys.path:
        sys.path.insert(0, str(suite))
    return importlib.import_module("utils")


@contextmanager
def sparse_steps(utils: Any) -> Iterator[list[ls.SparseSteps]]:
    """Within the context, methods of lit_sparse act around the steps of every optimizer that the suite makes.

    The suite has no hook between backward and clipping, where gradients must be observed, so that its call of torch's
    ``clip_grad_norm_`` becomes that hook. Without clipping (``grad_norm_clip`` 0), the first step is an error.

    Args:
        utils: Holds the suite's ``get_optimizer_and_scheduler``.

    Yields:
        The steps that are followed.
    """
    make, clip = utils.get_optimizer_and_scheduler, torch.nn.utils.clip_grad_norm_
    followed: list[ls.SparseSteps] = []

    def make_and_follow(model: Any, *, max_steps: int, **options: Any) -> tuple[torch.optim.Optimizer, Any]:
        tuner = getattr(model, "base_model", None)
        if not isinstance(tuner, SparseTuner):
            return make(model, max_steps=max_steps, **options)  # type: ignore[no-any-return]
        # The suite reads no more of it than parameters(), which may be groups: gates have no weight decay.
        grouped = SimpleNamespace(parameters=lambda: ls.parameter_groups(tuner.model, tuner.method))
        optimizer, scheduler = make(grouped, max_steps=max_steps, **options)
        followed.append(ls.SparseSteps(tuner.method, tuner.model, optimizer, max_steps, scheduler))
        return optimizer, scheduler

    def observe_and_clip(*args: Any, **kwargs: Any) -> torch.Tensor:
        for steps in followed:
            steps.observe()
        return clip(*args, **kwargs)

    utils.get_optimizer_and_scheduler, torch.nn.utils.clip_grad_norm_ = make_and_follow, observe_and_clip
    try:
        yield followed
    finally:
        utils.get_optimizer_and_scheduler, torch.nn.utils.clip_grad_norm_ = make, clip
    for steps in followed:
        steps.finish()


def launch(suite: Path, arguments: Sequence[str]) -> None:
    """Run the suite's ``run.py`` with these arguments."""
    register()
    script = str(suite / "run.py")
    before, sys.argv = sys.argv, [script, *arguments]
    try:
        with sparse_steps(load_utils(suite)):
            runpy.run_path(script, run_name="__main__")
    finally:
        sys.argv = before


if __name__ == "__main__":
    if len(sys.argv) < 3 or not (Path(sys.argv[1]) / "run.py").is_file():
        sys.exit(__doc__)
    launch(Path(sys.argv[1]).resolve(), sys.argv[2:])
