"""Each level of the package imports only levels above it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lit_sparse

ROOT = Path(lit_sparse.__file__).parent
LEVELS = [
    {"errors", "foreign_errors", "verbosity", "_version"},
    {"functional"},
    {"adapters"},
    {"methods", "figures"},
    {"interchange", "strategies"},
    {"callbacks"},
    {"data"},
    {"modules"},
    {"editing", "reporting", "serving"},
    {"combining"},
    {"__init__"},  # offers the public names of all of the above
    {"cli"},
    {"__main__"},
]
LEVEL = {part: number for number, level in enumerate(LEVELS) for part in level}
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def part_of(file: Path) -> str:
    return file.parts[0].removesuffix(".py")


def imported_parts(source: str) -> Iterator[str]:
    """The parts of lit_sparse that ``source`` imports, within functions too, but not for type checkers.

    The package itself, or a public name of it, counts as ``__init__``.
    """
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = []
        for name in names:
            package, _, rest = name.partition(".")
            if package == "lit_sparse":
                part = rest.split(".")[0]
                yield part if part in LEVEL else "__init__"
        pending.extend(ast.iter_child_nodes(node))


def wrong_imports(part: str, source: str) -> set[str]:
    return {p for p in imported_parts(source) if p != part and LEVEL[p] >= LEVEL[part]}


def test_the_package_is_looked_through():
    assert {part_of(file) for file in FILES} <= set(LEVEL), "put a new part of the package into its level"
    assert len(FILES) > 20
    used = {p for file in FILES for p in imported_parts((ROOT / file).read_text(encoding="utf-8"))}
    assert {"errors", "functional", "adapters", "methods", "callbacks", "modules", "cli"} <= used


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_point_to_earlier_levels(file):
    assert not wrong_imports(part_of(file), (ROOT / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from lit_sparse.adapters.linear import LowRankLinear", set()),
        ("from lit_sparse.methods.lora import LoRA", set()),
        ("from lit_sparse.callbacks.sparsify import Sparsify", {"callbacks"}),
        ("import lit_sparse.cli.main as c", {"cli"}),
        ("from lit_sparse import modules", {"modules"}),
        ("from lit_sparse import SoRA", {"__init__"}),  # the lazy names would hide the direction
        ("def f():\n    from lit_sparse.data.text import TextData", {"data"}),
        ("if TYPE_CHECKING:\n    from lit_sparse.cli.main import main\nelse:\n    import lit_sparse.data", {"data"}),
        ("import lit_sparse", {"__init__"}),
        ("import lit_sparse_other.cli", set()),
    ],
)
def test_a_wrong_import_is_noticed(source, wrong):
    assert wrong_imports("methods", source) == wrong
