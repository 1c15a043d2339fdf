"""Rebuild a trained module from its checkpoint alone, and export it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lit_sparse.adapters.injection import low_rank_in
from lit_sparse.adapters.statistics import live_ranks_of_all
from lit_sparse.data.quickstart import hub_id, resolve
from lit_sparse.errors import UsageError
from lit_sparse.interchange.card import ExportReport, Provenance
from lit_sparse.interchange.export import ExportOptions, require_free
from lit_sparse.interchange.gguf_export import export_gguf
from lit_sparse.interchange.merged_folder import Dtype, export_merged
from lit_sparse.interchange.peft_export import Layout, export_peft
from lit_sparse.interchange.processors import processor_of
from lit_sparse.interchange.sparse_folder import export_delta, save_adapter
from lit_sparse.methods.account import parse_budget
from lit_sparse.methods.progress import Progress
from lit_sparse.methods.truncation import truncate
from lit_sparse.modules import checkpoint as checkpoints
from lit_sparse.modules.base import SparseModule
from lit_sparse.modules.rebuilding import known_class, rebuild, saved_method

Format = Literal["peft", "gguf", "sparse", "delta", "merged"]

_IN_PYTHON = (
    "Or build the module in Python, load the checkpoint, and call export_peft or another export with module.model."
)
# Arguments that only training needs, or that the checkpoint's record has.
_NOT_REBUILT = ("optimizer", "start_from", "compile", "gradient_checkpointing", "new_tokens", "_class_path")


def export_checkpoint(
    ckpt_path: str,
    output: str,
    format: Format = "peft",  # noqa: A002
    layout: Layout = "padded",
    with_head: bool = True,
    dtype: Dtype | None = None,
    tolerance: float | None = None,
    backbone: str | None = None,
    license: str = "unknown",  # noqa: A002
    push_to_hub: str | None = None,
    import_modules: list[str] | None = None,
    trust_remote_code: bool = False,
    require_final: bool = False,
    budget: float | str | None = None,
) -> ExportReport:
    """Export what a run trained, from its checkpoint alone.

    Args:
        ckpt_path: Checkpoint file of a SparseModule whose backbone was given by name.
        output: Folder to write; must not exist, or be empty.
        format: peft: a plain LoRA, for PEFT and serving engines. gguf: a LoRA for llama.cpp. sparse: the non-zero
            entries of A and B. delta: a patch of the changed entries of the frozen weights. merged: the whole model,
            for transformers.
        layout: For peft. padded: all layers with one rank, for every engine; ragged: each with its own, smaller, for
            PEFT and transformers only.
        with_head: For peft: also write modules that were trained whole.
        dtype: For merged: dtype of the weights; null: that of the backbone.
        tolerance: Largest difference of outputs that is accepted; null: what rounding may do.
        backbone: Name or folder of the backbone, if it has moved since the run.
        license: License on the model card.
        push_to_hub: Repository on the hub, such as me/my-adapter, to upload the folder to.
        import_modules: Your Python modules to import first, with the classes that the checkpoint names.
        trust_remote_code: Let transformers run the code in the backbone's folder, if the run did.
        require_final: Refuse a checkpoint that was saved before its sparsity was final, instead of a warning.
        budget: Truncate the adapters to this budget first: a share of the parameters that A and B started with, such as
            0.25, parameters such as 500k, or bytes such as 2MB. The largest singular values of all layers are kept. The
            export is then no longer the model that the run trained; null: export that model.

    Returns:
        Sizes, and the difference that was found when the folder was read back.

    Raises:
        UsageError: If the checkpoint cannot be read or lacks what rebuilds its model, an option does not belong to the
            format, the budget is impossible, the export is refused, or ``require_final`` is set and the sparsity was
            not final.
    """
    _require_options(format, layout, with_head, dtype)
    if budget is not None:
        parse_budget(budget)
    require_free(output)  # before the backbone is loaded
    import_named(import_modules or ())
    checkpoint = checkpoints.read(ckpt_path)
    _check_final(checkpoint, ckpt_path, require_final)
    module = restore(checkpoint, ckpt_path, backbone, trust_remote_code)
    model: Any = module.model
    provenance = _provenance(checkpoint, module, license)
    if budget is not None:
        provenance = replace(provenance, truncation=_truncated(model, budget))
    options: ExportOptions = {
        "tolerance": tolerance,
        "provenance": provenance,
        "push_to_hub": push_to_hub,
    }
    if format == "peft":
        return export_peft(model, output, layout, with_head, **options)
    if format == "merged":
        return export_merged(model, output, dtype, processor_of(model) or resolve(module.backbone), **options)
    write = {"gguf": export_gguf, "sparse": save_adapter, "delta": export_delta}[format]
    return write(model, output, **options)


def import_named(modules: Sequence[str]) -> None:
    """Import the user's modules, with classes that a checkpoint names.

    Raises:
        UsageError: If one cannot be imported.
    """
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UsageError(f"import_modules names {name!r}, which cannot be imported: {error}.") from error


def restore(
    checkpoint: Mapping[str, Any],
    path: str | os.PathLike[str],
    backbone: str | None = None,
    trust_remote_code: bool = False,
) -> SparseModule:
    """Rebuild the module that wrote a checkpoint, with its backbone, and load the trained parameters.

    Args:
        checkpoint: The checkpoint's content.
        path: Its file, for messages.
        backbone: Name or folder of the backbone; None: the checkpoint's.
        trust_remote_code: Whether code that comes with the backbone may run.

    Raises:
        UsageError: If the backbone was given as a built model or runs its own code, the module needs arguments that
            the checkpoint does not hold, or parameters outside the backbone were trained.
    """
    saved = checkpoint[checkpoints.KEY]
    _require_rebuildable(checkpoint, path)
    kind = known_class(saved["module"], SparseModule)
    kept = {name: value for name, value in checkpoint["hyper_parameters"].items() if name not in _NOT_REBUILT}
    given = {"backbone": backbone or saved["backbone"], "method": saved_method(saved["method"])}
    try:
        module = rebuild(kind, {"hyper_parameters": kept}, given, trust_remote_code)
    except TypeError as error:
        raise UsageError(f"{kind.__name__} cannot be made of {str(path)!r} alone ({error}). {_IN_PYTHON}") from error
    try:
        module.configure_model()
    except UsageError as error:
        hint = "If the backbone was moved, give its place as backbone."
        if backbone is not None:
            hint = f"The checkpoint was trained on the backbone {saved['backbone']!r}, and backbone is {backbone!r}."
        raise UsageError(f"{error} ({hint})") from error
    module.on_load_checkpoint(dict(checkpoint))
    module.load_state_dict(checkpoint["state_dict"])
    model: Any = module.model
    if processor_of(model) is not None:
        model.processor_name = resolve(model.processor_name)
    config: Any = getattr(model, "config", None)
    if config is not None and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = saved["pad_token_id"]  # learned from the data
    return module


def _require_options(form: str, layout: str, with_head: bool, dtype: str | None) -> None:
    if dtype is not None and form != "merged":
        raise UsageError(f"dtype is for the format merged; {form} keeps the precision of the adapters.")
    if form != "peft" and (layout != "padded" or not with_head):
        raise UsageError(f"layout and with_head are for the format peft; this is {form}.")


def _require_rebuildable(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    saved = checkpoint[checkpoints.KEY]
    if "module" not in saved or "hyper_parameters" not in checkpoint:
        raise UsageError(
            f"{str(path)!r} does not say which module wrote it: it is of an earlier version. Resume the run for a step "
            f"to write it anew. {_IN_PYTHON}"
        )
    if saved["built"]:
        raise UsageError(
            f"The backbone of {str(path)!r} was given to its run as a model that was already built, which a checkpoint "
            f"does not hold. {_IN_PYTHON}"
        )
    outside = checkpoints.outside_backbone(checkpoint)
    if outside:
        raise UsageError(
            f"{str(path)!r} holds {outside[:3]}, which lie outside the backbone: an export would lack them."
        )


def _provenance(checkpoint: Mapping[str, Any], module: SparseModule, license_name: str) -> Provenance:
    metrics: dict[str, float] = {}
    for state in checkpoint.get("callbacks", {}).values():
        if not isinstance(state, dict):
            continue
        metrics |= state.get("metrics") or {}  # of SparseCheckpoint
        monitor = state.get("monitor")
        for score, name in (("current_score", f"{monitor}"), ("best_model_score", f"{monitor}, best of the run")):
            if monitor is not None and state.get(score) is not None:
                metrics[name] = float(state[score])
    method = module.method
    backbone, progress = hub_id(module.backbone), Progress.in_checkpoint(checkpoint)
    return Provenance(backbone, type(method).__name__, method.init_args(), metrics, license_name, progress)


def _truncated(model: nn.Module, budget: float | str) -> str:
    """Truncate the adapters; a clause for the card and the report."""
    adapters = list(low_rank_in(model, "budget cuts singular values of BA").values())
    before = int(live_ranks_of_all(adapters).sum())
    truncate(model, budget)
    return (
        f"truncated after the run from {before:,} to {int(live_ranks_of_all(adapters).sum()):,} ranks (budget "
        f"{budget}), so this is no longer the model that the run trained and measured"
    )


def _check_final(checkpoint: Mapping[str, Any], path: str, required: bool) -> None:
    """Warn of a checkpoint that is not as sparse as the run's end, or refuse it."""
    progress = Progress.in_checkpoint(checkpoint)
    if progress is None and required:
        raise UsageError(f"{path!r} does not record whether its sparsity was final: it is of an earlier version.")
    if progress is None or progress.final:
        return
    if Path(path).name.startswith("last"):
        why = "the run was stopped before its sparsity was final (EarlyStopping, a time limit or a kill)"
        advice = "Go on with fit --ckpt_path, without the cause of the stop."
    else:
        why, advice = "it is not as sparse as at the end of the run", "SparseCheckpoint keeps the end as last.ckpt."
    found = f"{path!r} is of {progress}: {why}"
    if required:
        raise UsageError(f"{found}, and require_final is set. {advice}")
    rank_zero_warn(f"{found}. {advice}")
