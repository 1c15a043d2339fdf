"""The public names: lazy, complete, and the objects of their home modules."""

import ast
import importlib
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

import lit_sparse

STUB = ast.parse(Path(lit_sparse.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))

IMPORT = """
import json, logging, os, sys

def state():
    loggers = {None: logging.getLogger(), **logging.root.manager.loggerDict}
    return {
        "environment": dict(os.environ),
        "handlers": {str(n): [repr(h) for h in getattr(l, "handlers", [])] for n, l in loggers.items()},
        "warnings": repr(__import__("warnings").filters),
        "hook": repr(sys.excepthook),
    }

import warnings
before = state()
import lit_sparse
names = dir(lit_sparse)
print(json.dumps({
    "same": before == state(),
    "heavy": sorted({"torch", "lightning", "transformers", "datasets", "numpy", "matplotlib"} & set(sys.modules)),
    "own": sorted(m for m in sys.modules if m.startswith("lit_sparse")),
    "version": lit_sparse.__version__,
    "names": names,
}))
"""


@pytest.fixture(scope="module")
def imported() -> dict:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_importing_loads_nothing_heavy_and_changes_nothing(imported):
    assert imported["heavy"] == []
    assert imported["own"] == ["lit_sparse", "lit_sparse._version"]
    assert imported["same"]


def test_dir_names_everything_before_it_is_loaded(imported):
    assert {*lit_sparse._HOME, "functional", "__version__"} <= set(imported["names"])
    assert imported["version"] == lit_sparse.__version__


@pytest.mark.slow
def test_a_first_use_loads_what_it_needs_and_no_more():
    code = (
        "import sys, lit_sparse; lit_sparse.functional; lit_sparse.functional.soft_threshold; lit_sparse.UsageError; "
        "print(sorted({'torch', 'lightning', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['torch']"


@pytest.mark.parametrize("name", sorted(lit_sparse._HOME))
def test_a_public_name_is_the_object_of_its_home(name):
    home = importlib.import_module(f"lit_sparse.{lit_sparse._HOME[name]}")
    assert getattr(lit_sparse, name) is getattr(home, name)
    assert getattr(home, name).__module__ == home.__name__  # defined there, not passed through
    assert getattr(home, name).__doc__


def test_every_name_in_dir_resolves():
    for name in dir(lit_sparse):
        getattr(lit_sparse, name)
    assert isinstance(lit_sparse.functional, types.ModuleType)


def test_type_checkers_see_the_same_names():
    seen = {}
    for line in STUB.body[1:]:
        assert isinstance(line, ast.ImportFrom)
        for alias in line.names:
            assert alias.asname == alias.name  # `X as X` is what exports a name
            seen[alias.name] = line.module
    assert seen.pop("functional") == "lit_sparse"
    assert seen.pop("__version__") == "lit_sparse._version"
    assert seen == {name: f"lit_sparse.{home}" for name, home in lit_sparse._HOME.items()}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'lit_sparse' has no attribute 'SORA'"):
        _ = lit_sparse.SORA
    with pytest.raises(ImportError, match="cannot import name 'Sora'"):
        exec("from lit_sparse import Sora", {})  # noqa: S102
    assert not hasattr(lit_sparse, "utils")
