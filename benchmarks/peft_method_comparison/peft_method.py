"""The methods of lit_sparse as one of PEFT's: a configuration, and the tuner that ``get_peft_model`` makes of it."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
from peft import LoraConfig, PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor, nn

import lit_sparse as ls
from lit_sparse.interchange.remains import folded, trained_whole, without_empty

PEFT_TYPE = "LIT_SPARSE"
PREFIX = "base_model.model."


def register() -> None:
    """Let PEFT read :class:`SparseConfig` where ``peft_type`` is ``LIT_SPARSE``, and build :class:`SparseTuner`.

    PEFT's ``register_peft_method`` fills the same tables, but refuses names that are not in its own enumeration.

    Raises:
        UsageError: If PEFT is so old that tuners cannot say what is stored of them.
    """
    if not hasattr(BaseTuner, "_get_adapter_state_dict"):
        raise ls.UsageError(f"PEFT {peft.__version__} is too old. Take that of the suite's checkout, 0.20 or later.")
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = SparseConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = SparseTuner


@dataclass
class SparseConfig(PeftConfig):
    """Configuration of a method of lit_sparse.

    Args:
        method: Name of its class in ``lit_sparse``, such as ``SoRA``.
        arguments: Those of its constructor.

    Raises:
        UsageError: If there is no such method, or it refuses its arguments.
    """

    method: str = "LoRA"
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self.make()

    def make(self) -> ls.SparseMethod:
        """The method."""
        kind = getattr(ls, self.method, None)
        if not (isinstance(kind, type) and issubclass(kind, ls.SparseMethod)):
            raise ls.UsageError(
                f"lit_sparse has no method {self.method!r}: take LoRA, SoRA, RoseLoRA or GatedRoseLoRA."
            )
        try:
            return kind(**self.arguments)
        except TypeError as error:  # which PEFT would take for an unknown key of the file, to be dropped
            raise ls.UsageError(f"{self.method} cannot be made of {self.arguments}: {error}.") from error

    @property
    def is_adaption_prompt(self) -> bool:
        """True: the tuner switches its adapters off by itself. PEFT would look for layers of its own classes."""
        return True

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the configuration: in a folder with the weights of :class:`SparseTuner`, that of the LoRA they are."""
        weights = Path(save_directory) / SAFETENSORS_WEIGHTS_NAME
        if not weights.is_file():
            super().save_pretrained(str(save_directory), **kwargs)
            return
        ending = ".lora_A.weight"
        with safe_open(weights, "pt") as file:
            found = {name: file.get_slice(name).get_shape()[0] for name in file.keys() if name.endswith(ending)}  # noqa: SIM118
        ranks = {name.removeprefix(PREFIX).removesuffix(ending): rank for name, rank in found.items()}
        largest = max(ranks.values())
        pattern = {name: rank for name, rank in ranks.items() if rank != largest}
        lora = LoraConfig(
            task_type=self.task_type,
            base_model_name_or_path=self.base_model_name_or_path,
            inference_mode=True,
            target_modules=list(ranks),
            r=largest,
            lora_alpha=largest,
            rank_pattern=pattern,
            alpha_pattern=pattern,
        )
        lora.save_pretrained(str(save_directory), **kwargs)


class SparseTuner(nn.Module):
    """A model with the adapters of a :class:`SparseConfig`, as PEFT's models hold it.

    Args:
        model: Hugging Face model; gets the adapters in place.
        peft_config: Adapter name to its configuration.
        adapter_name: Name of the adapter.

    Raises:
        UsageError: If PEFT's file of a LoRA could not hold what is trained.
    """

    def __init__(self, model: nn.Module, peft_config: dict[str, SparseConfig], adapter_name: str) -> None:
        super().__init__()
        self.model, self.peft_config, self.active_adapter = model, peft_config, adapter_name
        self.method = peft_config[adapter_name].make()
        adapters = ls.inject(model, self.method)
        others = [name for name, adapter in adapters.items() if not isinstance(adapter, ls.LowRankLinear)]
        others += trained_whole(model)
        if others:
            raise ls.UsageError(
                f"{others[0]!r} is no adapter of a linear layer, and only these are stored here. Set target_modules "
                "to linear layers, and train_head to false."
            )
        self._disabled = ExitStack()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def disable_adapter_layers(self) -> None:
        """Compute what the pretrained model does, until :meth:`enable_adapter_layers`."""
        self._disabled.enter_context(ls.disable_adapters(self.model))

    def enable_adapter_layers(self) -> None:
        """Undo :meth:`disable_adapter_layers`."""
        self._disabled.close()

    @classmethod
    def _get_adapter_state_dict(cls, model: PeftModel, **_: Any) -> dict[str, Tensor]:
        """What ``save_pretrained`` stores: the LoRA without dead ranks, its gates and scales folded into B."""
        adapters = dict(ls.adapters_in(model.get_base_model()))
        layers = without_empty({name: folded(name, adapter) for name, adapter in adapters.items()})
        return {
            f"{PREFIX}{name}.lora_{part}.weight": tensor
            for name, layer in layers.items()
            for part, tensor in (("A", layer.lora_A), ("B", layer.lora_B_t.t()))
        }

    @staticmethod
    def _remove_adapter_name_from_key(key: str, _: str) -> str:
        """The key, which holds no name of an adapter."""
        return key
