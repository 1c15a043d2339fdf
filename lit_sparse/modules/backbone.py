"""Load a Hugging Face model by name or folder, with errors that a user can mend."""

from __future__ import annotations

import copy
import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.quantizers.base import get_keys_to_not_convert

from lit_sparse.adapters.head import pretrained_bodies, task_head
from lit_sparse.adapters.quantized import quantized_layers
from lit_sparse.data.quickstart import resolve
from lit_sparse.errors import UsageError, listed, reason_of
from lit_sparse.foreign_errors import is_size_mismatch, refused_global
from lit_sparse.interchange.metadata import keep_name, means_path

# Errors that transformers raises for damaged or forged folders, and for arguments that a class does not know.
_LOADING_ERRORS = (
    ImportError,
    OSError,
    ValueError,
    RuntimeError,
    TypeError,
    AttributeError,
    SafetensorError,
)

# Quantization method -> the packages that it needs. The extra of the same name installs them.
_PACKAGES = {"torchao": ("torchao",), "bitsandbytes": ("bitsandbytes", "accelerate")}


def load_backbone(name: str, auto_class: Any, **arguments: Any) -> PreTrainedModel:
    """``auto_class.from_pretrained(name)``, in float32 unless ``arguments`` name another dtype.

    Args:
        name: Hub id, local folder, or ``quickstart://…``.
        auto_class: Auto class of the task, such as ``AutoModelForCausalLM``; None: the class that the model's own
            configuration names as its architecture.
        arguments: Passed on to ``from_pretrained``. ``trust_remote_code`` is off unless given here.
            ``quantization_config`` may be plain values, as in a YAML: ``{load_in_4bit: true}`` and so on for
            bitsandbytes, ``{quant_method: torchao, quant_type: Int8WeightOnlyConfig}``, or what transformers
            writes into a configuration. The task head is never quantized.

    Under ``with torch.device("meta")`` the model is built from its configuration, without weights and memory for them.

    Returns:
        The model in training mode: ``from_pretrained`` returns evaluation mode, the Trainer keeps what it
        finds, and dropout would stay off.

    Raises:
        UsageError: If the model cannot be found, does not fit the task, or cannot be quantized as asked.
    """
    folder = resolve(name)
    _require_folder(name, folder)
    arguments = {"dtype": "float32", **arguments}
    for flag in ("load_in_8bit", "load_in_4bit"):
        if flag in arguments:
            raise UsageError(f"Since transformers 5, {flag} stands inside of quantization_config: {{{flag}: true}}.")
    try:
        loader = auto_class if auto_class is not None else _architecture(folder, arguments)
        if torch.get_default_device().type == "meta":
            model = _without_weights(loader, folder, arguments)
        else:
            if "quantization_config" in arguments:
                empty = _empty(loader, folder, arguments)
                arguments["quantization_config"] = _quantization(empty, arguments["quantization_config"])
            model, loaded = loader.from_pretrained(folder, output_loading_info=True, **arguments)
            if "quantization_config" in arguments:
                _require_head(model, empty, arguments["quantization_config"])
            else:  # the names are not those of packed weights
                _require_body(name, model, loaded)
    except UsageError:
        raise
    except UnpicklingError as error:
        found = refused_global(error) or "it is damaged"
        raise UsageError(
            f"The backbone {name!r} cannot be loaded: its weights are a pickle that holds more than weights ({found}). "
            "Take them as safetensors."
        ) from error
    except _LOADING_ERRORS as error:
        reason = reason_of(error)
        if is_size_mismatch(error):
            reason = (
                "its head has another number of outputs than the data has labels. Set backbone_args to "
                "{ignore_mismatched_sizes: true} for a new head."
            )
        raise UsageError(f"The backbone {name!r} cannot be loaded: {reason}") from error
    if "quantization_config" in arguments:
        _require_quantized(model, arguments["quantization_config"])
    if folder != name:
        keep_name(model, name)
    return model.train()  # type: ignore[no-any-return]


def without_cache(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch with ``use_cache=False`` where the model has such an argument.

    By default, language models keep the keys and values of all layers for a continuation that training does not make.
    Compiled blocks would also be another graph in every layer.
    """
    return {"use_cache": False, **batch} if "use_cache" in inspect.signature(model.forward).parameters else batch


def checkpoint_activations(model: nn.Module) -> None:
    """Let the model recompute activations in the backward pass; a UsageError if it cannot."""
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise UsageError(
            f"gradient_checkpointing needs a Hugging Face model; {type(model).__name__} has no "
            "gradient_checkpointing_enable."
        )
    # The reentrant form would cut the graph before the first adapter: frozen embeddings' outputs need no gradient.
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _require_body(name: str, model: nn.Module, loaded: Mapping[str, Any]) -> None:
    """Refuse a backbone that lacks weights: transformers fills them with random numbers."""
    head = tuple(f"{part}." for part in task_head(model))
    others = [key for key, *_ in loaded["mismatched_keys"] if not f"{key}.".startswith(head)]
    if others:
        raise UsageError(
            f"The backbone {name!r} cannot be loaded: {listed(others)} have other shapes in its files than its "
            "config.json says."
        )
    missing = {key for key in loaded["missing_keys"] if not f"{key}.".startswith(head)}
    parts: dict[str, list[str]] = {}
    for body_name, body in pretrained_bodies(model):
        for key, _ in body.named_parameters(prefix=body_name, remove_duplicate=False):
            part = key.removeprefix(f"{body_name}.").partition(".")[0]
            parts.setdefault(f"{body_name}.{part}".lstrip("."), []).append(key)
    absent = [part for part, keys in parts.items() if missing.issuperset(keys)]
    broken = [key for part, keys in parts.items() if part not in absent for key in keys if key in missing]
    if broken or (parts and len(absent) == len(parts)):
        raise UsageError(
            f"The backbone {name!r} cannot be loaded: its files lack {listed(broken or missing)}. They are damaged, "
            "not all there, or of another architecture."
        )
    if missing:
        rank_zero_warn(
            f"{name!r} has no weights for {listed(missing)}: they start at random, and stay so unless train_head names "
            "their module."
        )


def _require_folder(name: str, folder: str) -> None:
    path = Path(folder)
    if means_path(folder) and not (path / "config.json").is_file():
        state = "has no config.json" if path.is_dir() else "does not exist"
        raise UsageError(
            f"The backbone folder {name!r} {state}. Give a folder written by save_pretrained, or a hub id such as "
            "'microsoft/deberta-v3-base'."
        )


def _without_weights(loader: Any, folder: str, arguments: dict[str, Any]) -> Any:
    # Arguments of the configuration are used; those of loading, such as ignore_mismatched_sizes, have no effect here.
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


def _empty(loader: Any, folder: str, arguments: dict[str, Any]) -> Any:
    """The model before quantization, on the meta device."""
    with torch.device("meta"):
        return _without_weights(loader, folder, {k: v for k, v in arguments.items() if k != "quantization_config"})


def _require_head(model: nn.Module, empty: nn.Module, config: Any) -> None:
    """Refuse a stored head of another size: with quantization, transformers before 5.23 keeps it."""
    if config.quant_method not in _PACKAGES:
        return  # may pack the head
    shapes = {name: value.shape for name, value in empty.named_parameters()}
    head = tuple(f"{part}." for part in task_head(model))
    for name, value in model.named_parameters():
        if f"{name}.".startswith(head) and value.shape != shapes.get(name, value.shape):
            raise UsageError(
                f"{name} has the shape {tuple(value.shape)} of the stored weights, but the new head has "
                f"{tuple(shapes[name])}: transformers {transformers.__version__} makes no new head for a quantized "
                "model that has one. Install transformers 5.23 or newer (for Python 3.11 and newer), or remove "
                "quantization_config."
            )


def _quantization(empty: nn.Module, given: Any) -> Any:
    """The configuration object, which excludes the task head of the model from quantization."""
    config = _parsed(given) if isinstance(given, Mapping) else copy.deepcopy(given)
    skip = "llm_int8_skip_modules" if hasattr(config, "llm_int8_skip_modules") else "modules_to_not_convert"
    if hasattr(config, skip):
        # Naming modules drops transformers' own choice; by that, a head with stored weights would be quantized.
        named = getattr(config, skip)
        setattr(config, skip, [*(get_keys_to_not_convert(empty) if named is None else named), *task_head(empty)])
    return config


def _parsed(given: Mapping[str, Any]) -> Any:
    bits = given.get("load_in_8bit") or given.get("load_in_4bit")
    method = "bitsandbytes" if bits else given.get("quant_method")
    for package in _PACKAGES.get(str(method), ()):
        if importlib.util.find_spec(package) is None:
            raise UsageError(
                f"Quantization by {method} needs the package {package}, which is not installed: run pip install "
                f'"lit-sparse[{method}]"'
            )
    settings = dict(given)
    if method == "torchao":
        settings["quant_type"] = _torchao_type(given.get("quant_type"))
    config = AutoQuantizationConfig.from_dict(settings)
    known = [*inspect.signature(type(config)).parameters, "quant_method"]
    # transformers writes names with an underscore into the configuration of a quantized model.
    unknown = [name for name in given if name not in known and not name.startswith("_")]
    if unknown:
        raise UsageError(f"quantization_config has no {unknown} for {method}; it knows {sorted(known)}.")
    return config


def _torchao_type(given: Any) -> Any:
    from torchao import quantization
    from torchao.core.config import AOBaseConfig, config_to_dict

    if isinstance(given, Mapping) and list(given) == ["default"]:
        return given
    kind = getattr(quantization, given, None) if isinstance(given, str) else None
    if not (isinstance(kind, type) and issubclass(kind, AOBaseConfig)):
        known = sorted(name for name in dir(quantization) if name.endswith("WeightOnlyConfig"))
        raise UsageError(
            f"torchao's quant_type is the name of a configuration class, such as {known}, or with arguments "
            f"{{default: {{_type: name, _version: 2, _data: arguments}}}}; got {given!r}."
        )
    return {"default": config_to_dict(kind())}


def _require_quantized(model: nn.Module, config: Any) -> None:
    if config.quant_method in _PACKAGES and not any(quantized_layers(model)):
        raise UsageError(
            f"quantization_config quantized no layer of {type(model).__name__}. torchao packs nn.Linear only, not "
            "GPT-2's Conv1D, which bitsandbytes packs too. If the model has nn.Linear, check the modules that the "
            "configuration excludes."
        )
