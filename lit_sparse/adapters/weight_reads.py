"""Find layers whose weight a model reads directly, without calling the layer: an adapter there would have no effect.

This reads the source of the model's classes. Watching a forward pass instead would miss paths that this pass does not
take: kernels for other devices, such as Mamba's for CUDA, and branches for training or for other inputs.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from types import CodeType

from torch import nn

# Attributes of a weight that a model may read without computing with the weight.
_HARMLESS = {"dtype", "device", "shape", "ndim", "size", "numel", "dim", "requires_grad", "is_meta", "layout"}
_SETTING_UP = ("__init__", "_init", "init_", "reset_", "_reset")
_LIBRARY_BASES = ("torch.", "transformers.modeling_utils", "transformers.generation", "transformers.integrations")


def reads_weight(model: nn.Module, name: str) -> str | None:
    """Find a class that computes with the weight of a layer instead of calling the layer.

    Its source has ``self.x_proj.weight``, other than in set-up code or to read a dtype or shape. Branches that the
    model's own settings switch off (``if self.pretraining_tp > 1``) do not count. Classes without source, such as
    those typed into a terminal, are taken to call their layers.

    Args:
        model: The model.
        name: Full name of the layer in it.

    Returns:
        Name of the class, or None.
    """
    parts = name.split(".")
    for end in range(len(parts)):
        holder = model.get_submodule(".".join(parts[:end]))
        if isinstance(holder, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            # In evaluation, both run one kernel on the weights of all layers that they hold.
            return type(holder).__name__
        for path, guards in _reads(type(holder)):  # type: ignore[arg-type]  # classes are hashable
            if path == ".".join(parts[end:]) and all(_may_hold(holder, test, wanted) for test, wanted in guards):
                return type(holder).__name__
    return None


@functools.cache
def _reads(kind: type[nn.Module]) -> tuple[tuple[str, tuple[tuple[CodeType, bool], ...]], ...]:
    """Paths below ``self`` whose ``.weight`` the methods of ``kind`` compute with, and the conditions around each."""
    found = []
    for name, method in inspect.getmembers(kind, inspect.isfunction):
        if name.startswith(_SETTING_UP) or method.__module__.startswith(_LIBRARY_BASES):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, TypeError, SyntaxError):
            continue
        found += list(_reads_below(tree, ()))
    return tuple(found)


def _reads_below(
    node: ast.AST, guards: tuple[tuple[CodeType, bool], ...]
) -> Iterator[tuple[str, tuple[tuple[CodeType, bool], ...]]]:
    if isinstance(node, ast.If | ast.IfExp):
        test = _setting(node.test)
        yield from _reads_below(node.test, guards)
        for branch, taken in ((node.body, True), (node.orelse, False)):
            inner = guards if test is None else (*guards, (test, taken))
            for part in branch if isinstance(branch, list) else [branch]:
                yield from _reads_below(part, inner)
        return
    if isinstance(node, ast.Attribute):
        if node.attr in _HARMLESS and _path(node.value):
            return
        path = _path(node.value) if node.attr == "weight" and isinstance(node.ctx, ast.Load) else None
        if path:
            yield path, guards
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr"):
        return
    for child in ast.iter_child_nodes(node):
        yield from _reads_below(child, guards)


def _path(node: ast.AST) -> str | None:
    """``a.b`` for ``self.a.b``."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return ".".join(parts) if isinstance(node, ast.Name) and node.id == "self" and parts else None


def _setting(test: ast.expr) -> CodeType | None:
    """A condition on the module's own attributes and constants, compiled; None for any other condition."""
    plain = (ast.Name, ast.Attribute, ast.Constant, ast.BoolOp, ast.UnaryOp, ast.Compare)
    small = (ast.expr_context, ast.boolop, ast.unaryop, ast.cmpop)
    nodes = list(ast.walk(test))
    if not all(isinstance(n, plain + small) and (not isinstance(n, ast.Name) or n.id == "self") for n in nodes):
        return None
    return compile(ast.Expression(test), "<setting>", "eval")


def _may_hold(holder: nn.Module, test: CodeType, wanted: bool) -> bool:
    if "training" in test.co_names:
        return True  # holds now or later
    try:
        value = eval(test, {"__builtins__": {}}, {"self": holder})  # noqa: S307  # of the model's own source, no calls
    except Exception:  # a property of the model may raise anything
        return True
    return bool(value) is wanted if isinstance(value, bool | int | float | str | type(None)) else True
