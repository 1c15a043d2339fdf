"""Load an exported folder with its backbone, labels and tokenizer in one call, to predict."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto

from lit_sparse.data.tokenizers import load_tokenizer
from lit_sparse.errors import UsageError
from lit_sparse.interchange.metadata import METADATA, read_metadata
from lit_sparse.interchange.peft_import import load_peft
from lit_sparse.interchange.processors import has_processor
from lit_sparse.interchange.sparse_folder import load_adapter
from lit_sparse.modules.backbone import load_backbone

# The pipelines of transformers that take a text alone, and the classes of models for each.
_PIPELINES = {
    "text-classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token-classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "fill-mask": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "text-generation": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A model with its adapters live, and what belongs to it.

    Args:
        model: In evaluation mode. The names of its classes are in its configuration too.
        tokenizer: With the tokens that training added; the backbone's where the folder holds none.
        labels: Names of the classes in order; None where there are none.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    labels: list[str] | None

    def predict(self, texts: str | Mapping[str, str] | Sequence[Any], **options: Any) -> Any:
        """Predict by the ``transformers.pipeline`` of the task.

        Args:
            texts: One text or several: to classify, to tag, to continue, or with mask tokens to fill in. A pair to
                classify is ``{"text": …, "text_pair": …}``, and a conversation among several a list of messages.
            options: Of the pipeline's call, such as ``top_k`` or ``max_new_tokens``.

        Returns:
            What the pipeline returns: for each text dictionaries with a label and its score, or with the text. The
            score of a regression is the number, and has no label.

        Raises:
            UsageError: If the model is of a task that needs more than a text, or a pair is none of the above.
        """
        kind = type(self.model).__name__
        task = next((task for task, kinds in _PIPELINES.items() if kind in kinds.values()), None)
        if task is None:
            raise UsageError(f"predict is for {', '.join(_PIPELINES)}, and {kind} is none: call its model yourself.")
        make: Any = transformers.pipeline
        given = texts if isinstance(texts, (str, Mapping)) else list(texts)
        if not given and not isinstance(given, str):
            return []
        pair = next((text for text in given if task == "text-classification" and isinstance(text, (list, tuple))), None)
        if pair is not None:
            raise UsageError(f'A pair of texts is {{"text": …, "text_pair": …}} for predict; got {pair!r}.')
        found = make(task, model=self.model, tokenizer=self.tokenizer)(given, **options)
        config: Any = self.model.config
        is_number = config.problem_type == "regression" and config.num_labels == 1
        return _without_labels(found) if is_number else found


def from_pretrained(
    folder: str | os.PathLike[str], backbone: str | None = None, trust_remote_code: bool = False
) -> Pretrained:
    """Load an exported folder, of the format peft, sparse, delta or merged, with its backbone.

    Args:
        folder: The folder, or its id on the hub.
        backbone: Hub id or folder of the pretrained model; None: the one that the folder names.
        trust_remote_code: Whether code that comes with the backbone may run.

    Returns:
        Model, tokenizer and labels. Adapters are live, except for those of ``delta`` and ``merged``, which are part of
        the weights.

    Raises:
        UsageError: If the folder is of another program or format, names no backbone, or cannot be read.
    """
    path = _local(folder)
    entries = read_metadata(path)
    form = entries.get("format")
    base = str(path) if form == "merged" else backbone or entries.get("base_model_name_or_path")
    model = plain_model(path, entries, base, trust_remote_code)
    if form != "merged":
        (load_peft if form == "peft" else load_adapter)(model, path)
    tokenizer = load_tokenizer(str(path) if has_processor(path) else str(base))
    return Pretrained(model.eval().requires_grad_(False), tokenizer, entries.get("labels"))


def plain_model(
    folder: Path, entries: Mapping[str, Any], base: str | None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model that an exported folder is for, without its adapters.

    Args:
        folder: The folder.
        entries: Its metadata.
        base: Hub id or folder of the pretrained model.
        trust_remote_code: Whether code that comes with the backbone may run.

    Raises:
        UsageError: If the folder is of another program or format, ``base`` is not known, or the model cannot be loaded.
    """
    form = entries.get("format")
    kind = getattr(transformers, str(entries.get("model_class")), None)
    # A folder chooses a model, and nothing else to be called.
    is_model = isinstance(kind, type) and issubclass(kind, PreTrainedModel)
    if form not in ("peft", "sparse", "delta", "merged") or not is_model:
        raise UsageError(
            f"{str(folder)!r} holds no export of the format peft, sparse, delta or merged of a model of transformers: "
            f"its {METADATA} has the format {form!r} and the class {entries.get('model_class')!r}. Load its parts by "
            "load_peft or load_adapter."
        )
    if not base:
        raise UsageError(f"{str(folder)!r} does not name the model that it was trained on: give it as backbone.")
    arguments: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    if form != "merged":
        arguments |= _head(entries)
    return load_backbone(base, kind, dtype="auto", **arguments)


def _without_labels(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: value for key, value in found.items() if key != "label"}
    return [_without_labels(item) for item in found]


def _head(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for a head like the exported one; the backbone may have one for another task."""
    labels, count, problem = (entries.get(key) for key in ("labels", "num_labels", "problem_type"))
    found: dict[str, Any] = {} if problem is None else {"problem_type": problem}
    if labels:
        found |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    elif count is not None and count != 2:  # what transformers assumes
        found["num_labels"] = count
    return {**found, "ignore_mismatched_sizes": True} if found else found


def _local(folder: str | os.PathLike[str]) -> Path:
    """The folder on this machine, downloaded if it is a hub id."""
    path = Path(folder)
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(str(folder)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{str(folder)!r} is no folder, and cannot be loaded from the hub ({reason}).") from error
