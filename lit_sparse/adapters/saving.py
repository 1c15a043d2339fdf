"""Keep transformers from saving a model with adapters under names that nothing can load."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lit_sparse.errors import UsageError

_SAVING = ("save_pretrained", "push_to_hub")


def guard_saving(adapter: type[nn.Module]) -> None:
    """Let ``save_pretrained`` and ``push_to_hub`` refuse every model that holds a module of the class ``adapter``.

    Wraps both methods of the class ``PreTrainedModel``, once. This covers copies, models loaded from a pickle and
    models around the adapted one, and no longer applies to a model whose adapters were removed.
    """
    for name in _SAVING:
        method = getattr(PreTrainedModel, name)
        if not getattr(method, "guards_adapters", False):
            setattr(PreTrainedModel, name, _guarded(method, adapter))


def _guarded(method: Any, adapter: type[nn.Module]) -> Any:
    @functools.wraps(method)
    def guarded(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(module, adapter) for module in self.modules()):
            raise UsageError(
                f"{method.__name__} of a {type(self).__name__} with adapters would write weights that from_pretrained "
                "cannot load. Call lit_sparse.export_merged, export_peft or save_adapter instead, or merge(model) "
                "first; for transformers' Trainer set save_strategy='no'."
            )
        return method(self, *args, **kwargs)

    guarded.guards_adapters = True  # type: ignore[attr-defined]
    return guarded
