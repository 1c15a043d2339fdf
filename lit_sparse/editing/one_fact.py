"""Edit one fact in one call."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from lit_sparse.data.tokenizers import load_tokenizer
from lit_sparse.editing.bases import require_editable, require_zero_start
from lit_sparse.editing.edits import Edit, EditedModel
from lit_sparse.editing.measuring import Measurer, Questions, Unedited
from lit_sparse.editing.requests import EditRequest
from lit_sparse.editing.teacher_forcing import collate
from lit_sparse.editing.training import train
from lit_sparse.editing.ultraedit import UltraEdit
from lit_sparse.editing.whole_weights import FineTuning
from lit_sparse.errors import UsageError, require_range
from lit_sparse.methods.method import Method
from lit_sparse.methods.roselora import RoseLoRA
from lit_sparse.modules.backbone import load_backbone

# The second projection of each block's feed-forward layer, under the names that architectures give it.
_TARGETS = r".*\.(down_proj|fc2|fc_out|dense_4h_to_h|mlp\.c_proj)"


def edit_fact(
    model: str | nn.Module | EditedModel,
    prompt: str,
    target: str,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    method: Method | FineTuning | UltraEdit | None = None,
    steps: int = 25,
    optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0),
    stop_loss: float | None = 0.1,
    seed: int = 0,
) -> tuple[EditedModel, Edit]:
    """Teach a language model another answer to one prompt, by a small sparse change of its weights.

    ::

        edited, edit = ls.edit_fact("HuggingFaceTB/SmolLM2-135M-Instruct", "The capital of France is", "Lyon")
        edited.model.generate(...)
        edit.save("lyon.safetensors")
        edited.restore()  # the model as it was, bit for bit

    The defaults are the settings of RoseLoRA from a random start on SmolLM2-135M (docs/editing.md, "A real model";
    ``configs/editing/roselora_smollm2.yaml``). Another model may need another learning rate. A warning says if
    the edited model does not give the new answer.

    Args:
        model: Hub id or folder of a causal language model; one that is already built, which is edited in place, in
            evaluation mode and without gradients; or the result of an earlier call, to edit another fact.
        prompt: Text that the model continues.
        target: The new continuation.
        tokenizer: The tokenizer, its hub id or its folder; None: that of the model.
        method: What is trained; None: RoseLoRA on the second projection of each feed-forward layer.
        steps: Optimizer steps, at most.
        optimizer: Makes the optimizer; UltraEdit has none.
        stop_loss: Training stops at this loss, in nats per token of the new answer, once the method's sparsity is
            final. None: all steps are taken.
        seed: Seed of the training. The state of the random generators is kept.

    Returns:
        The edited model, from which all edits can be taken out again, and the edit, which can be saved.

    Raises:
        UsageError: If the model cannot be loaded or is quantized, an argument is outside its range, or prompt or answer
            is empty.
    """
    require_zero_start(method)
    require_range("steps", steps, at_least=1)
    require_range("stop_loss", stop_loss, above=0)
    for name, text in (("prompt", prompt), ("target", target)):
        if not text.strip():
            raise UsageError(f"{name} is empty: give a text.")
    if torch.is_inference_mode_enabled():
        raise UsageError("An edit needs gradients: call edit_fact outside of torch.inference_mode().")
    edited = model if isinstance(model, EditedModel) else EditedModel(_loaded(model))
    plain: Any = edited.model
    require_editable(plain)
    source = str(model if isinstance(model, str) else getattr(plain, "name_or_path", ""))
    if tokenizer is None or isinstance(tokenizer, str):
        if not (tokenizer or source):
            raise UsageError("A model that is already built does not name its tokenizer: give tokenizer.")
        tokenizer = load_tokenizer(tokenizer or source)
    request = EditRequest(0, prompt, target)
    questions = Questions(tokenizer, [request])
    batch = {name: tensor.to(plain.device) for name, tensor in collate(tokenizer, questions.rows).items()}
    method = method or RoseLoRA(_TARGETS, rank=4, alpha=8, density=0.05, begin=3, end=20)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trained = train(plain, [batch], method, steps, optimizer, stop_loss)
    edited.add(Edit(trained.patch))  # without a base: the edit was made for this model
    metrics = tuple(Measurer(plain, tokenizer, [request], 0, None, 1).measure(questions, Unedited({}, {})))
    if metrics[0]["edit_success"] < 1:
        rank_zero_warn(
            f"The edited model predicts {metrics[0]['edit_success']:.0%} of the tokens of {target!r} after {prompt!r}: "
            "raise the learning rate or the number of steps."
        )
    return edited, edited.with_base(Edit(trained.patch, (request,), metrics, repr(method), source, trained.weights))


def _loaded(model: str | nn.Module) -> nn.Module:
    if not isinstance(model, str):
        return model.eval().requires_grad_(False)
    found: nn.Module = load_backbone(model, AutoModelForCausalLM, dtype="auto")  # as it will be used
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return found.eval().requires_grad_(False).to(accelerator or "cpu")
