"""Would the tests notice? Changes one thing in the formulas and the methods, again and again, and runs their tests.

Run:  python benchmarks/mutants.py [--sample 200] [--seed 0] [--processes 2] [--json FILE]

A mutant is a module of lit_sparse/functional or lit_sparse/methods with one operator, comparison, number, argument,
condition or statement exchanged; it is killed when a test fails, or runs for longer than ten times as long as all need.
Messages, annotations and docstrings are left alone. Each runs in a process of its own that has torch and Lightning
imported, and reads the changed source in place of the file, which is not touched.
"""

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("functional", "methods")
TESTS = ["tests/functional", "tests/methods", "tests/callbacks/test_sparsify.py"]

Change = Callable[[Any], ast.AST]
SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or,
    ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "all": "any", "any": "all", "floor": "ceil", "ceil": "floor"}


def changes_of(node: ast.AST) -> Iterator[tuple[str, Change]]:
    """What can be exchanged in a node itself: in words, and what does it to a copy."""
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPS:
        other = SWAPS[type(node.op)]
        yield f"{type(node.op).__name__} -> {other.__name__}", lambda n: _with(n, op=other())
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        other = SWAPS[type(node.ops[0])]
        yield f"{type(node.ops[0]).__name__} -> {other.__name__}", lambda n: _with(n, ops=[other(), *n.ops[1:]])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield f"without {type(node.op).__name__}", lambda n: n.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield f"{node.value} -> {not node.value}", lambda n: _with(n, value=not n.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield f"{node.value} -> {node.value + 1}", lambda n: _with(n, value=n.value + 1)
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield "condition turned round", lambda n: _with(n, test=ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES:
        other_name = NAMES[node.func.id]
        yield f"{node.func.id} -> {other_name}", lambda n: _with(n, func=ast.Name(other_name, ast.Load()))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in NAMES:
        other_name = NAMES[node.func.attr]
        yield f"{node.func.attr} -> {other_name}", lambda n: _with(n, func=_with(n.func, attr=other_name))
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "statement left out", lambda _: ast.Pass()
    if isinstance(node, ast.Raise):
        yield "error not raised", lambda _: ast.Pass()


def _with(node: Any, **fields: Any) -> Any:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def places(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Where nodes are that count: parent, field, and place in a list."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list", "exc", "bases"):
            continue
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            is_docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if (
                not isinstance(child, ast.AST)
                or is_docstring
                or isinstance(child, ast.JoinedStr | ast.Import | ast.ImportFrom)
            ):
                continue
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if _warns(child):
                continue
            yield tree, field, index if isinstance(value, list) else None
            yield from places(child)


def _warns(node: ast.AST) -> bool:
    """Whether it is a warning or a line of the log: words."""
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and any(word in ast.unparse(call.func) for word in ("warn", "_log", "rank_zero"))


def mutants(file: Path) -> Iterator[tuple[str, str]]:
    """Every changed source of a file, with what was changed."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for parent, field, index in list(places(tree)):
        old = getattr(parent, field)
        node = old if index is None else old[index]
        for words, change in changes_of(node):
            new = ast.copy_location(change(node), node)
            setattr(parent, field, new if index is None else [*old[:index], new, *old[index + 1 :]])
            line = node.lineno  # type: ignore[attr-defined]
            yield f"{file.relative_to(ROOT)}:{line}: {words}", ast.unparse(ast.fix_missing_locations(tree))
            setattr(parent, field, old)


class Exchanged(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Reads a module from a changed source."""

    def __init__(self, name: str, source: str, file: Path) -> None:
        self.name, self.source, self.file = name, source, file

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        spec = importlib.util.spec_from_loader(fullname, self, origin=str(self.file))
        spec.has_location = True  # type: ignore[union-attr]
        return spec

    def exec_module(self, module: Any) -> None:
        exec(compile(self.source, str(self.file), "exec"), module.__dict__)  # noqa: S102


def survives(words: str, source: str) -> bool:
    """Run the tests with a changed source; in a process that ends after it."""
    import pytest

    file = ROOT / words.partition(":")[0]
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    sys.meta_path.insert(0, Exchanged(name, source, file))
    own = [str(path) for path in (ROOT / "tests" / file.parent.name).glob(f"test_*{file.stem}*.py")]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore", "--no-header", "-m", "not slow"]
    try:
        return pytest.main([*options, *own, *TESTS]) == 0
    except BaseException:
        return False


def _child(words: str, source: str, answer: Any) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    answer.value = int(survives(words, source))
    os._exit(0)


def judge(tasks: list[tuple[str, str]], processes: int, limit: float) -> Iterator[tuple[str, bool, float]]:
    """What was changed, whether it survived, and how long the tests took."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(tasks), []
    while waiting or running:
        while waiting and len(running) < processes:
            words, source = waiting.pop(0)
            answer = context.Value("i", 0)
            process = context.Process(target=_child, args=(words, source, answer))
            process.start()
            running.append((words, process, answer, time.monotonic()))
        for entry in list(running):
            words, process, answer, start = entry
            took = time.monotonic() - start
            if process.is_alive() and took > limit:
                process.kill()
                process.join()
            if not process.is_alive():
                running.remove(entry)
                yield words, bool(answer.value), took
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=200, help="how many mutants, drawn at random; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", help="write the verdicts there too")
    options = parser.parse_args()
    os.chdir(ROOT)
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    for module in ("torch", "lightning.pytorch", "transformers", "hypothesis", "pytest", "datasets", "peft"):
        importlib.import_module(module)
    sys.modules["torch"].set_num_threads(1)

    files = [file for folder in FOLDERS for file in sorted((ROOT / "lit_sparse" / folder).glob("*.py"))]
    every = [mutant for file in files for mutant in mutants(file)]
    chosen = random.Random(options.seed).sample(every, options.sample) if options.sample else every
    unchanged = f"{files[-1].relative_to(ROOT)}:0: unchanged", files[-1].read_text(encoding="utf-8")
    ((_, sound, needed),) = judge([unchanged], 1, 3600)
    if not sound:
        raise SystemExit("The tests fail without any change.")
    print(f"{len(every)} mutants, {len(chosen)} of them tried; the tests take {needed:.0f} s.", flush=True)
    verdicts = {}
    for number, (words, survived, took) in enumerate(judge(chosen, options.processes, 10 * needed), 1):
        verdicts[words] = "survived" if survived else "killed"
        if survived:
            print(f"{number}/{len(chosen)} survived: {words} ({took:.0f} s)", flush=True)
    killed = sum(verdict == "killed" for verdict in verdicts.values())
    print(f"{killed} of {len(verdicts)} killed ({killed / len(verdicts):.1%}).")
    if options.json:
        Path(options.json).write_text(json.dumps({"mutants": len(every), "tried": verdicts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
