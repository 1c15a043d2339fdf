"""The table of the files of methods in docs/methods.md, which benchmarks/tables.py writes there."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import get_args

import lit_sparse as ls
from lit_sparse.methods.base import InitWeights
from lit_sparse.methods.method import Method

PACKAGE = Path(ls.__file__).parent


def files() -> dict[str, Path]:
    """Each public method, and each value of ``init_weights`` with formulas of its own, to its file."""
    public = [getattr(ls, name) for name, home in ls._HOME.items() if home.startswith("methods.")]
    methods = [one for one in public if inspect.isclass(one) and issubclass(one, Method)]
    bases = {base for method in methods for base in method.__mro__[1:]}
    named = {method.__name__: Path(inspect.getfile(method)) for method in methods if method not in bases}
    starts = {}
    for start in get_args(InitWeights):
        homes = [PACKAGE / part / f"{start}.py" for part in ("functional", "methods")]  # what gathers uses formulas
        starts |= {f"`init_weights: {start}`": home for home in homes if home.exists() and home not in named.values()}
    return dict(sorted(named.items())) | starts


def length(file: Path) -> int:
    """Lines of a file, those of docstrings and empty ones too."""
    return len(file.read_text(encoding="utf-8").splitlines())


def uses(file: Path) -> list[Path]:
    """The other files of methods and functions that a file imports from."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    paths = [(node.module or "").split(".")[1:] for node in nodes if (node.module or "").startswith("lit_sparse.")]
    found = {PACKAGE.joinpath(*path).with_suffix(".py") for path in paths if path[0] in ("methods", "functional")}
    return sorted(one for one in found if one.exists())


def table() -> str:
    lines = ["| | file in `lit_sparse` | lines | uses |", "|---|---|---|---|"]
    for name, file in files().items():
        used = ", ".join(f"{other.relative_to(PACKAGE)} ({length(other)})" for other in uses(file))
        lines.append(f"| {name} | {file.relative_to(PACKAGE)} | {length(file)} | {used} |")
    return "\n".join(lines)
