"""Load a Hugging Face model by name or folder, with errors a user can act on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel

from lit_sparse.errors import UsageError
from lit_sparse.quickstart import resolve


def load_backbone(name: str, auto_class: Any, **arguments: Any) -> PreTrainedModel:
    """``auto_class.from_pretrained(name)``, in float32 unless ``arguments`` name another dtype.

    Args:
        name: Hub id, local folder, or ``quickstart://…``.
        auto_class: Auto class of the task, such as ``AutoModelForCausalLM``; None: the class that the model's own
            configuration names as its architecture.
        arguments: Passed on to ``from_pretrained``. ``trust_remote_code`` is off unless given here.

    Under ``with torch.device("meta")`` the model is built from its configuration, without weights and memory for them.

    Returns:
        The model in training mode: ``from_pretrained`` returns evaluation mode, the Trainer keeps what it
        finds, and dropout would stay off.

    Raises:
        UsageError: If the model cannot be found or does not fit the task.
    """
    folder = resolve(name)
    _require_folder(name, folder)
    arguments = {"dtype": "float32", **arguments}
    try:
        loader = auto_class if auto_class is not None else _architecture(folder, arguments)
        if torch.get_default_device().type == "meta":
            model = _without_weights(loader, folder, arguments)
        else:
            model = loader.from_pretrained(folder, **arguments)
    except UsageError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        if "ignore_mismatched_sizes" in reason:
            reason = (
                "its head has another number of outputs than the data has labels. Set backbone_args to "
                "{ignore_mismatched_sizes: true} for a new head."
            )
        raise UsageError(f"The backbone {name!r} cannot be loaded: {reason}") from error
    return model.train()  # type: ignore[no-any-return]


def _require_folder(name: str, folder: str) -> None:
    path = Path(folder)
    local = path.is_absolute() or folder.startswith((".", "~")) or folder.count("/") > 1
    if local and not (path / "config.json").is_file():
        state = "has no config.json" if path.is_dir() else "does not exist"
        raise UsageError(
            f"The backbone folder {name!r} {state}. Give a folder written by save_pretrained, or a hub id such as "
            "'microsoft/deberta-v3-base'."
        )


def _without_weights(loader: Any, folder: str, arguments: dict[str, Any]) -> Any:
    # Some arguments are the configuration's; those of loading, such as ignore_mismatched_sizes, have nothing to do.
    config, _ = AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **arguments)
    build = loader.from_config if hasattr(loader, "from_config") else loader
    return build(config)


def _architecture(folder: str, arguments: dict[str, Any]) -> Any:
    keys = ("revision", "trust_remote_code", "token", "cache_dir")
    config = AutoConfig.from_pretrained(folder, **{k: arguments[k] for k in keys if k in arguments})
    for architecture in config.architectures or []:
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)
    raise UsageError(
        f"The configuration of {folder!r} names the architectures {config.architectures}, none of which transformers "
        "has. Build the model yourself and pass it as backbone."
    )
