"""What the results of an Editor's run depend on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_sparse.editing.anchors import Anchors
from lit_sparse.editing.data import EditingData
from lit_sparse.modules.optimization import make_optimizer

MEASURED = ("seed", "fluency_tokens", "generated_tokens", "generated_samples", "chat_template", "texts")
"""Arguments of the measurements."""
_OTHERS = ("steps", "requests_per_step", "prefixes", "start_at_keys", "stop_loss", "sequential", "save_edits")


def settings_of(editor: Any, data: EditingData) -> dict[str, Any]:
    """All arguments of an Editor that its results depend on, and the content of its files."""
    optimizer = make_optimizer(editor.optimizer, [{"params": [nn.Parameter(torch.zeros(1))]}])
    return {
        "backbone": editor.backbone_name(),
        "tokenizer": editor.tokenizer_name,
        "backbone_args": str(editor.backbone_args),
        "method": repr(editor.method),
        "anchors": of_anchors(editor.anchors),
        "optimizer": f"{type(optimizer).__name__} {optimizer.defaults}",
        "path": data.path,
        "requests": hashlib.sha256(Path(data.path).read_bytes()).hexdigest(),
        "batch_size": data.batch_size,
        "side_by_side": 1 if editor.sequential else data.side_by_side,
        "precision": str(editor.trainer.precision),
        **{name: getattr(editor, name) for name in (*_OTHERS, *MEASURED)},
    }


def of_anchors(anchors: Anchors | None) -> str:
    """The arguments of anchors, and the content of their file."""
    file = None if anchors is None else anchors.texts
    return str(anchors) if file is None else f"{anchors} {hashlib.sha256(Path(file).read_bytes()).hexdigest()}"
