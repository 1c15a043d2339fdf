"""Add up stored adapters: several LoRAs to one, or several patches to one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_sparse.adapters.factors import LayerFactors, stacked
from lit_sparse.adapters.injection import take_out
from lit_sparse.adapters.patterns import matches_tail
from lit_sparse.adapters.survey import survey
from lit_sparse.combining.factors import refactored
from lit_sparse.combining.patches import conflict_sentence, write_sum
from lit_sparse.combining.recipe import Recipe
from lit_sparse.combining.sources import AUTO_CLASSES, LABELLED, Addend, read_addend, require_fit, same_head
from lit_sparse.data.quickstart import hub_id
from lit_sparse.errors import UsageError, listed, require_choice, require_range
from lit_sparse.functional.combining import Conflicts, Rule
from lit_sparse.interchange.card import Provenance
from lit_sparse.interchange.export import require_free
from lit_sparse.interchange.loading import inject_layers, places_in, require_shapes
from lit_sparse.interchange.patches import require_weights
from lit_sparse.interchange.peft_export import Layout, export_peft
from lit_sparse.interchange.processors import has_processor, keep_processor
from lit_sparse.interchange.remains import whole_modules
from lit_sparse.methods.account import parse_budget
from lit_sparse.methods.truncation import truncate
from lit_sparse.modules import checkpoint as checkpoints
from lit_sparse.modules.backbone import load_backbone
from lit_sparse.serving.from_checkpoint import restore
from lit_sparse.serving.pretrained import plain_model

RULES = ("concatenate", "svd", "ties", "dare")


@dataclass(frozen=True)
class CombineReport:
    """What :func:`combine` wrote.

    Args:
        folder: The folder.
        format: ``peft`` or ``delta``.
        bytes: Size of its weights.
        error: What ranks or a budget left out of the merged change, ‖rest‖ / ‖change‖ in the Frobenius norm; 0 for
            ``concatenate`` and for patches.
        conflicts: Entries that several sources change; None where low-rank changes were added by their factors.
        text: Lines for the terminal.
    """

    folder: Path
    format: str
    bytes: int
    error: float
    conflicts: Conflicts | None
    text: str

    def __str__(self) -> str:
        """The lines for the terminal."""
        return self.text


def combine(
    sources: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
    rule: Rule = "concatenate",
    budget: float | str | None = None,
    density: float = 0.2,
    seed: int = 0,
    head: str | os.PathLike[str] | None = None,
    layout: Layout = "padded",
    backbone: str | None = None,
    trust_remote_code: bool = False,
) -> CombineReport:
    """Add up stored adapters of one backbone, without training.

    Low-rank adapters become a LoRA in PEFT's format, with a card, that is read back and compared as every export.
    Patches (``export_delta``) become one patch. Rules:

    - ``concatenate``: the weighted sum, exact to rounding. A and B are stacked, so the ranks add up.
    - ``svd``: the same sum, cut to ``budget`` by :func:`~lit_sparse.truncate`: the largest singular values of all
      layers are kept. The changes are not formed. For low-rank adapters only.
    - ``ties``: trim every change, elect a sign for each entry, and take the mean of the changes that agree with it.
    - ``dare``: drop entries at random, rescale the others, and add.

    TIES and DARE work on the entries of the weighted changes, as their papers do. Of low-rank adapters, the result is
    written by its largest singular values, with at most as many ranks in each layer as the sources have together, and
    within ``budget`` if there is one.

    Args:
        sources: At least two: folders of a LoRA in PEFT's format or of ``save_adapter``, and checkpoint files of a
            :class:`~lit_sparse.SparseModule`; or folders of ``export_delta``.
        output: Folder to write; must not exist, or be empty.
        weights: Factor of each source's change; None: 1 for all.
        rule: How they are added up.
        budget: For ``svd``, ``ties`` and ``dare``: as for :func:`~lit_sparse.truncate`; a share counts the ranks of all
            sources.
        density: Share of its nonzero entries that TIES or DARE keeps of each change. 0.2 is the TIES paper's.
        seed: Of the entries that DARE draws.
        head: The source whose task head is kept, as in ``sources``. None: the only one, or the one that all share.
        layout: As for :func:`~lit_sparse.export_peft`.
        backbone: Hub id or folder of the backbone; None: the one that all sources name.
        trust_remote_code: Whether code that comes with the backbone may run.

    Returns:
        What was written.

    Raises:
        UsageError: If a source cannot be read, the sources are of different backbones, tasks, kinds, or numbers of
            labels, several have heads of their own and ``head`` names none of them, they hold rows of tokens, an
            argument does not belong to the rule, nothing is left, or the export is refused.

    Source:
        TIES: Yadav et al. 2023 (arXiv:2306.01708); DARE: Yu et al. 2024 (arXiv:2311.03099).
    """
    if isinstance(sources, str | os.PathLike):
        raise UsageError(f"combine adds up at least two sources; got {os.fspath(sources)!r} alone.")
    paths = [os.fspath(source) for source in sources]
    factors = [1.0] * len(paths) if weights is None else [float(weight) for weight in weights]
    kept = None if head is None else os.fspath(head)
    _require_arguments(paths, factors, rule, budget, density, seed, kept)
    require_choice("layout", layout, ("padded", "ragged"))
    require_free(output)
    addends = [read_addend(path) for path in paths]
    require_fit(addends, backbone, kept)
    giver = _head_giver(addends, kept)
    recipe = Recipe(rule, paths, factors, density, seed, budget, giver.path if giver.head else None)
    if addends[0].patch is not None:
        if rule == "svd" or budget is not None or layout != "padded":
            raise UsageError("svd, budget and layout are for low-rank adapters; these sources are patches (delta).")
        found, size, text = write_sum(addends, giver, recipe, output, backbone)
        return CombineReport(Path(output), "delta", size, 0.0, found, text)
    model, heads = _open(giver, backbone, trust_remote_code)
    error, shared = _put_sum(model, addends, recipe, heads)
    named = backbone or giver.base
    base = None if named is None else hub_id(named)
    provenance = Provenance(base, "Combination", recipe.record(), truncation=_clause(len(paths), rule, error))
    report = export_peft(model, output, layout, provenance=provenance)
    lines = [str(report), *([] if shared is None else [conflict_sentence(shared)])]
    return CombineReport(Path(output), "peft", report.bytes, error, shared, "\n".join(lines))


def _put_sum(
    model: nn.Module, addends: Sequence[Addend], recipe: Recipe, heads: list[str]
) -> tuple[float, Conflicts | None]:
    """Inject the merged change, within the budget; what was left out of it, and the entries that sources share."""
    names = _names(model, addends)
    shared: Conflicts | None = None
    if recipe.rule in ("ties", "dare"):
        layers, square, shared = refactored(addends, recipe, names)
    else:
        layers = stacked([addend.layers for addend in addends], recipe.weights, names)
        square = _square(layers)
    if not layers:
        raise UsageError("Nothing is left: no source changes a weight, or all weights are 0.")
    adapters = inject_layers(model, layers, "the sum of the sources", train_head=heads)
    if recipe.budget is not None:
        truncate(model, recipe.budget)
    left = _square({name: LayerFactors.of(name, adapter) for name, adapter in adapters.items()})
    rest = 1 - left / square
    # A and B are float32, so that what is smaller is their rounding.
    return (0.0 if recipe.rule == "concatenate" or rest < 1e-6 else rest**0.5), shared


def _require_arguments(
    paths: Sequence[str],
    weights: Sequence[float],
    rule: str,
    budget: float | str | None,
    density: float,
    seed: int,
    head: str | None,
) -> None:
    if len(paths) < 2:
        raise UsageError(f"combine adds up at least two sources; got {paths}.")
    require_weights(weights, len(paths))
    require_choice("rule", rule, RULES)
    require_range("density", density, above=0, at_most=1)
    require_range("seed", seed, at_least=-(2**63), at_most=2**63 - 1)
    if budget is not None:
        parse_budget(budget)
    if (rule == "svd" and budget is None) or (rule == "concatenate" and budget is not None):
        raise UsageError("The rule svd needs a budget, such as 0.5, and concatenate, which is exact, takes none.")
    if head is not None and Path(head) not in map(Path, paths):
        raise UsageError(f"head names {head!r}, which is none of the sources {paths}.")


def _head_giver(addends: Sequence[Addend], kept: str | None) -> Addend:
    """The source whose head is kept; the first where no source has one."""
    having = [addend for addend in addends if addend.head]
    if kept is not None:
        named = next(addend for addend in addends if Path(addend.path) == Path(kept))
        if having and not named.head:
            raise UsageError(f"head names {kept!r}, which holds no task head; {listed(a.path for a in having)} do.")
        return named
    if any(not same_head(having[0], other) for other in having[1:]):
        raise UsageError(
            f"{listed(addend.path for addend in having)} have task heads of their own, which do not add up. Name the "
            "source whose head is to be kept as head."
        )
    return having[0] if having else addends[0]


def _open(giver: Addend, backbone: str | None, trust_remote_code: bool) -> tuple[Any, list[str]]:
    """The backbone with the head of a source and without adapters, and the names of the head's modules."""
    path, name = Path(giver.path), backbone or giver.base
    if giver.entries is None:
        model: Any = restore(checkpoints.read(path), path, backbone, trust_remote_code).model
        heads = whole_modules(model) if giver.head else []
        take_out(model)
        return model, heads
    if giver.entries.get("model_class"):
        model = plain_model(path, giver.entries, name, trust_remote_code)
    elif name is None:
        raise UsageError(f"{giver.path!r} does not name the model that it was trained on: give it as backbone.")
    else:
        arguments: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
        if giver.labels is not None and giver.task in LABELLED:
            arguments |= {"num_labels": giver.labels, "ignore_mismatched_sizes": True}
        model = load_backbone(name, AUTO_CLASSES.get(str(giver.task)), dtype="auto", **arguments)
    keep_processor(model, giver.path if has_processor(path) else None)
    require_shapes(model, {name: tensor.shape for name, tensor in giver.head.items()}, path)
    places = places_in(model)
    with torch.no_grad():
        for tensor_name, tensor in giver.head.items():
            places[tensor_name].copy_(tensor)
    modules = [name for name, _ in model.named_modules() if name]
    return model, [name for name in modules if any(matches_tail(name, part) for part in giver.head_modules)]


def _names(model: nn.Module, addends: Sequence[Addend]) -> list[str]:
    """The layers that a source adapts, in the model's order."""
    known = list(survey(model))
    for addend in addends:
        absent = [name for name in addend.layers if name not in known]
        if absent:
            raise UsageError(
                f"{addend.path!r} adapts {listed(absent)}, which {type(model).__name__} lacks: it was trained on "
                "another model."
            )
    adapted = {name for addend in addends for name in addend.layers}
    return [name for name in known if name in adapted]


def _square(layers: Mapping[str, LayerFactors]) -> float:
    """The square of the Frobenius norm of all changes."""
    return sum(float(layer.change_norms.square().sum()) for layer in layers.values())


def _clause(count: int, rule: Rule, error: float) -> str:
    how = {"concatenate": "by stacking A and B", "svd": "and cut to the largest singular values"}
    left_out = "" if rule == "concatenate" else f", which leave out {error:.2%} of the merged change's norm"
    if rule in ("ties", "dare"):
        how[rule] = f"entry by entry ({rule.upper()}) and written by its largest singular values"
    return f"added up from {count} sources {how[rule]}{left_out}"
