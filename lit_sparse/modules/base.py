"""A backbone with a sparse method, an optimizer and a schedule, as a LightningModule."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.saving import _default_map_location
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from lit_sparse.adapters.compiled import CompileOptions, compile_blocks, compile_options
from lit_sparse.adapters.factors import gate_record
from lit_sparse.adapters.frozen import (
    complete_average,
    frozen_sample,
    leave_out_frozen,
    require_match,
    trained_missing,
)
from lit_sparse.adapters.injection import inject
from lit_sparse.adapters.token_rows import add_tokens, text_model
from lit_sparse.callbacks.stages import ThresholdStages
from lit_sparse.callbacks.support import callbacks_of
from lit_sparse.data.tokenizers import load_tokenizer
from lit_sparse.errors import UsageError, require_choice
from lit_sparse.interchange.peft_import import load_peft
from lit_sparse.interchange.processors import chat_format_of, keep_chat_format, keep_processor, processor_of
from lit_sparse.methods.method import Method
from lit_sparse.methods.start import take_ranks, take_starts
from lit_sparse.modules import checkpoint as checkpoints
from lit_sparse.modules.backbone import checkpoint_activations, load_backbone, without_cache
from lit_sparse.modules.callbacks import OwnSparsify, own_callbacks
from lit_sparse.modules.evaluation import EvaluationLoop
from lit_sparse.modules.optimization import LrSchedule, lr_scheduler, make_optimizer, relative_groups
from lit_sparse.modules.rebuilding import keep_arguments, method_record, path_of, read_hyperparameters, rebuild

if TYPE_CHECKING:
    from typing_extensions import Self


class SparseModule(EvaluationLoop):
    """Fine-tune any Hugging Face model whose ``forward`` returns a ``.loss``, by a sparse method.

    ``configure_model`` loads and adapts the :attr:`model`. The module brings the callbacks
    :class:`~lit_sparse.Sparsify`, :class:`~lit_sparse.SparsityMonitor`, :class:`~lit_sparse.FiniteLoss`,
    :class:`~lit_sparse.ExactResume` and :class:`~lit_sparse.SlurmRequeue`. Its checkpoints hold the trained weights,
    without the frozen ones.

    A sub-class for a task sets :attr:`auto_class`, and overrides ``training_step``, and ``make_metrics`` and
    ``measure``, by which it is validated and tested.

    Args:
        backbone: Hub id or folder of the pretrained model, or a model that is already built. Give
            ``load_from_checkpoint`` a built model again.
        method: How to adapt it.
        optimizer: Makes the optimizer from parameter groups; gates, biases and norms are exempt from its weight
            decay. In a YAML ``class_path: torch.optim.AdamW`` and ``init_args``.
        lr_schedule: ``linear`` or ``cosine`` decay to zero over the run, or ``constant``.
        warmup: Share of the run in which the learning rate rises linearly, in [0, 1).
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        compile: Compile the blocks of the model (:func:`~lit_sparse.compile_blocks`); a dictionary has arguments of
            ``torch.compile``: mode, dynamic, fullgraph, backend, options.
        backbone_args: Arguments for ``from_pretrained``: dtype (default float32), revision, attn_implementation …
        start_from: Folder of a dense LoRA in PEFT's format from which the adapters start, by
            :func:`~lit_sparse.load_peft`. A resumed checkpoint overrides it.
        new_tokens: Tokens to add to the backbone's tokenizer and embeddings. Only the new rows of the embeddings are
            trained (:func:`~lit_sparse.add_tokens`).

    Raises:
        UsageError: If an argument is outside its range, or the backbone cannot be loaded.
    """

    auto_class: ClassVar[Any] = None
    """The transformers auto class of the task; None: the architecture that the model's configuration names."""

    model: nn.Module | None

    def __init__(
        self,
        backbone: str | nn.Module,
        method: Method,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        lr_schedule: LrSchedule = "linear",
        warmup: float = 0.06,
        gradient_checkpointing: bool = False,
        compile: bool | CompileOptions = False,  # noqa: A002
        backbone_args: dict[str, Any] | None = None,
        start_from: str | None = None,
        new_tokens: list[str] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= warmup < 1:
            raise UsageError(f"warmup is a share of the run, in [0, 1); got {warmup}.")
        require_choice("lr_schedule", lr_schedule, ("linear", "cosine", "constant"))
        if isinstance(backbone, nn.Module) and backbone_args:
            raise UsageError("backbone_args are for loading a backbone by name; this one is already built.")
        self.model = None
        self.method = method
        self.backbone = backbone if isinstance(backbone, str) else _name_of(backbone)
        # The tuple keeps a built model from being registered twice: it becomes self.model after injection.
        self._built = (backbone,) if isinstance(backbone, nn.Module) else ()
        self.optimizer = optimizer
        self.lr: float | None = None  # set by a LearningRateFinder; replaces the optimizer's
        self.lr_schedule: LrSchedule = lr_schedule
        self.warmup = warmup
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_options = compile_options(compile)
        self.backbone_args = backbone_args or {}
        self.start_from = start_from
        self.new_tokens = new_tokens
        self._sparsify = OwnSparsify(method)
        self._frozen_sample: Tensor | None = None
        keep_arguments(self, method, optimizer, backbone if isinstance(backbone, str) else None)

    @_restricted_classmethod
    def load_from_checkpoint(
        cls,  # noqa: N805
        checkpoint_path: str | os.PathLike[str] | IO[bytes],
        map_location: Any = None,
        hparams_file: str | os.PathLike[str] | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Build the module that wrote a checkpoint, and load what it trained.

        A checkpoint cannot choose what code runs. Its method and optimizer must be classes of this library or of
        modules that are imported already, and no other argument is made from a class path.

        Args:
            checkpoint_path: File, URL or open stream.
            map_location: Where the tensors go, as in ``torch.load``.
            hparams_file: YAML file with arguments that replace those in the checkpoint.
            strict: Whether all keys must match.
            weights_only: False runs any code that the file's pickle holds.
            trust_remote_code: Whether the checkpoint may ask for code that comes with the backbone.
            kwargs: Arguments that replace those of the checkpoint.

        Raises:
            UsageError: If the checkpoint cannot be read or does not fit, names a class that is not known, or wants to
                run code.
        """
        checkpoint = checkpoints.load(
            checkpoint_path,
            map_location=map_location or _default_map_location,
            weights_only=weights_only is not False,
        )
        if hparams_file is not None:
            checkpoint["hyper_parameters"] = read_hyperparameters(hparams_file)
        module = rebuild(cls, checkpoint, kwargs, trust_remote_code)
        module.configure_model()
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], module.strict_loading if strict is None else strict)
        stored = next(iter(checkpoint["state_dict"].values()), None)
        return module if stored is None else module.to(stored.device)

    def load_model(self) -> nn.Module:
        """Load the backbone that ``backbone`` names, without adapters; for sub-classes to add arguments."""
        return load_backbone(self.backbone, self.auto_class, **self.backbone_args)

    def configure_model(self) -> None:
        """Load the backbone, inject the method, add ``new_tokens`` and start from ``start_from``, once."""
        if self.model is None:
            self._ask_data()
            self.model = self._adapted()
            # Before a strategy shards the model.
            self._frozen_sample = frozen_sample(self)
            self._check_model()
        keep_chat_format(self.model, getattr(self._data, "chat_format", None))
        keep_processor(self.model, getattr(self._data, "named_processor", None))

    def _ask_data(self) -> None:
        """Take arguments that were not given from the Trainer's data module, before the backbone is loaded."""

    def _prepare_head(self, model: nn.Module) -> None:
        """Change the head of a backbone that was loaded or built, before adapters are injected."""

    def _check_model(self) -> None:
        """Check the model with its adapters, and keep in the hyperparameters what was learned from the data."""

    def _adapted(self) -> nn.Module:
        if self.start_from is not None and self.method.batch_start is not None:
            raise UsageError(
                f"start_from and {self.method.batch_start} are two starts of the adapters: remove one of them."
            )
        model = self._built[0].train() if self._built else self.load_model()
        self._prepare_head(model)
        inject(model, self.method)
        if self.new_tokens is not None:
            text_model(model)  # refuses a model without text before a tokenizer is looked for
            add_tokens(model, load_tokenizer(self.backbone), self.new_tokens)
        if self.start_from is not None:
            load_peft(model, self.start_from)
            self.hparams.update(start_from=None)  # checkpoints have later values: they load without the folder
        if self.gradient_checkpointing:
            checkpoint_activations(model)
        if self.compile_options is not None:
            device = None if self._trainer is None else self._trainer.strategy.root_device.type
            compile_blocks(model, device, **self.compile_options)
        return model

    def configure_callbacks(self) -> list[Callback]:
        """The callbacks of this module, without those that the Trainer has already."""
        return own_callbacks(self, self._sparsify)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over its parameter groups, with a schedule over the whole run."""
        optimizer = make_optimizer(self.optimizer, relative_groups(self, self.method), self.lr)
        total = self.trainer.estimated_stepping_batches
        stages = next((callback.shares() for callback in callbacks_of(self.trainer, ThresholdStages)), [1.0])
        scheduler = lr_scheduler(optimizer, self.lr_schedule, self.warmup, total, stages)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def forward(self, **batch: Any) -> Any:
        """The model's own output for a batch of its own arguments, without a cache for generation."""
        return self._require_model()(**without_cache(self._require_model(), batch))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:  # noqa: ARG002
        """The model's own loss."""
        loss: Tensor = self(**batch).loss
        self._log_loss(loss)
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the frozen weights, and record which backbone and adapters the trained weights belong to."""
        leave_out_frozen(self, checkpoint)
        progress = None if self._trainer is None else self._sparsify.progress(self._trainer.global_step)
        checkpoint[checkpoints.KEY] = {
            **checkpoints.describe(self, self.backbone, method_record(self.method), self._frozen_sample, progress),
            # The module is rebuilt from these and its hyperparameters.
            "module": path_of(type(self)),
            "built": bool(self._built),
            **gate_record(self, checkpoint.get("state_dict", {})),
            "pad_token_id": getattr(getattr(self.model, "config", None), "pad_token_id", None),
            "chat_format": chat_format_of(self.model),
            "processor": processor_of(self.model),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other adapters or another backbone, and to resume training from weights alone."""
        if self._trainer is not None and self._trainer.state.fn == "fit":
            checkpoints.require_resumable(checkpoint, self._trainer.ckpt_path)
        take_ranks(self, self.method, checkpoint.get(checkpoints.KEY))
        new_tokens = self._trainer is None or self.new_tokens is not None  # the Trainer's data module reads new_tokens
        checkpoints.require_fit(self, self.backbone, method_record(self.method), checkpoint, new_tokens)
        take_starts(self, checkpoint[checkpoints.KEY].get("starts", {}))
        complete_average(self, checkpoint)
        if chat_format_of(self.model) is None:  # data of this run has its own
            keep_chat_format(self.model, checkpoint[checkpoints.KEY].get("chat_format"))
        keep_processor(self.model, checkpoint[checkpoints.KEY].get("processor"))
        if checkpoint[checkpoints.KEY].get("token_rows"):
            self._frozen_sample = frozen_sample(self)  # embeddings may have grown

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """Load the trained weights; frozen weights may be absent, everything else must match.

        Args:
            state_dict: The state, with or without the frozen weights.
            strict: Raise when a trained value is missing or a key is unknown.
            assign: As in ``torch.nn.Module``.

        Raises:
            UsageError: If ``strict`` and the keys do not match, or a shape does not.
        """
        try:
            keys = super().load_state_dict(state_dict, strict=False, assign=assign)
        except RuntimeError as error:
            reasons = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
            raise UsageError(f"The weights do not fit {type(self).__name__}: {reasons[0]}") from error
        if strict:
            require_match(self, keys, f"The weights do not fit {type(self).__name__}")
        return _IncompatibleKeys(trained_missing(self, keys), keys.unexpected_keys)

    def _require_model(self) -> nn.Module:
        if self.model is None:
            raise UsageError(
                f"{type(self).__name__} has no model yet: call configure_model() first, as the Trainer does."
            )
        return self.model


def _name_of(model: nn.Module) -> str:
    name = getattr(model, "name_or_path", "")
    return name if isinstance(name, str) and name else type(model).__name__
