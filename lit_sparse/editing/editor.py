"""Edit facts one after another under the Trainer, and measure each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from lit_sparse.data.tokenizers import load_tokenizer
from lit_sparse.editing.anchors import Anchors, Examples, require_holdable
from lit_sparse.editing.bases import require_able, require_editable, require_zero_start
from lit_sparse.editing.data import EditingData
from lit_sparse.editing.edits import SUFFIX, Edit, EditedModel, load_edit
from lit_sparse.editing.measuring import Measurer, Questions, summarize, summary_of
from lit_sparse.editing.requests import EditRequest
from lit_sparse.editing.results import Results, Row
from lit_sparse.editing.settings import MEASURED, settings_of
from lit_sparse.editing.side_by_side import train_each
from lit_sparse.editing.starting import require_startable
from lit_sparse.editing.training import Trained
from lit_sparse.editing.ultraedit import UltraEdit
from lit_sparse.editing.whole_weights import FineTuning
from lit_sparse.errors import UsageError, require_range
from lit_sparse.methods.method import Method
from lit_sparse.modules.backbone import load_backbone


class Editor(LightningModule):
    """Change a language model's answers to prompts, request by request, and measure what else changed.

    For each request (or group of requests, see ``batch_size`` of :class:`~lit_sparse.EditingData`) a change of the
    weights is trained on the tokens of the new answer, added to the weights, measured, and taken out again, bit for
    bit. It runs under a Trainer, as in ``lit-sparse edit --config …``::

        editor = ls.Editor("meta-llama/Llama-2-7b-chat-hf", ls.RoseLoRA(["q_proj", "v_proj"], clamp=3e-3), "runs/zsre")
        L.Trainer(inference_mode=False).test(editor, ls.EditingData("ZsRE-test-all.json"))

    Each edit is trained in a loop of its own within the Trainer's test loop, with the method's hooks. The Trainer
    provides device, precision, progress bar and processes. The processes share the requests, and the results are those
    of a single process.

    The folder ``output`` then has ``results.jsonl``, one line per request; ``summary.json``, means and standard errors;
    ``timings.jsonl``; and, with ``save_edits``, one file per edit. A killed run continues when it is started again.

    Args:
        backbone: Hub id or folder of a causal language model, or one that is already built.
        method: What is trained: a method of adapters, whose schedule counts the steps of one edit, or
            :class:`~lit_sparse.FineTuning` or :class:`~lit_sparse.UltraEdit`.
        output: Folder for results and edits.
        steps: Optimizer steps of an edit at most. 25 as in RoseLoRA's release.
        requests_per_step: Requests of a group in one optimizer step, which take turns; None: all. A large group in
            small turns is edited breadth-first (LocFT-BF, arXiv:2509.22072).
        prefixes: Texts that the model writes; each prompt is also trained on after each of them.
        anchors: Texts on which an edit is to change nothing; None: none.
        start_at_keys: Start A at the inputs that the answers have and the anchors have not
            (:func:`~lit_sparse.editing.starting.start_at_keys`), for methods of linear layers whose B starts at zero.
        optimizer: Makes the optimizer of one edit; UltraEdit has none. RoseLoRA's release has a learning rate of 5e-4.
        stop_loss: An edit stops at this loss, in nats per token of the new answer, once the method's sparsity is final;
            in turns, the mean over one turn counts. 0.1 as in RoseLoRA's release. None: all steps are taken.
        sequential: Keep every edit and make the next on top of it. This needs a single process, and saves the edits.
        retest_every: In sequence, measure all edits again after so many edits, and at the end. None: only at the end.
        save_edits: Save every edit to ``<output>/edits/<number of the request>.safetensors``.
        fluency_tokens: Tokens to generate after the prompt, for fluency; 0: fluency is not measured.
        generated_tokens: Tokens that the model may write, at most, as its own answer (``generated_success`` and so on);
            0: answers are not generated. 16 hold the answers of the published files, and cost about what fluency does.
        generated_samples: Random answers, at temperature 1, beside each greedy one (``sampled_success`` and so on).
        chat_template: Ask these prompts as turns of a user, in the tokenizer's chat template. Edits are trained on the
            plain prompts.
        texts: JSON Lines file with a column ``text``, for perplexity on the first 128 tokens of each; None: no file.
        eval_batch_size: Prompts per batch while measuring.
        seed: Request ``i`` is edited with the seed ``seed + i``, whatever was edited before.
        tokenizer: Hub id or folder of the tokenizer; None: the backbone's.
        backbone_args: Arguments for ``from_pretrained``: dtype (default float32), revision, attn_implementation …

    Raises:
        UsageError: If an argument is outside its range, the backbone cannot be loaded or is quantized, or the Trainer
            cannot edit.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        method: Method | FineTuning | UltraEdit,
        output: str,
        steps: int = 25,
        requests_per_step: int | None = None,
        prefixes: int = 0,
        anchors: Anchors | None = None,
        start_at_keys: bool = False,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=5e-4, weight_decay=0.0),
        stop_loss: float | None = 0.1,
        sequential: bool = False,
        retest_every: int | None = None,
        save_edits: bool = False,
        fluency_tokens: int = 100,
        generated_tokens: int = 16,
        generated_samples: int = 0,
        chat_template: bool = False,
        texts: str | None = None,
        eval_batch_size: int = 32,
        seed: int = 0,
        tokenizer: str | None = None,
        backbone_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        require_range("steps", steps, at_least=1)
        require_range("requests_per_step", requests_per_step, at_least=1)
        require_range("prefixes", prefixes, at_least=0)
        require_range("stop_loss", stop_loss, above=0)
        require_range("retest_every", retest_every, at_least=1)
        require_range("fluency_tokens", fluency_tokens, at_least=0)
        require_range("generated_tokens", generated_tokens, at_least=0)
        require_range("generated_samples", generated_samples, at_least=0)
        require_range("eval_batch_size", eval_batch_size, at_least=1)
        require_zero_start(method)
        require_startable(method, start_at_keys)
        require_holdable(anchors, method, in_turns=requests_per_step is not None)
        if retest_every is not None and not sequential:
            raise UsageError("retest_every measures a sequence of edits again: set sequential to true.")
        if (chat_template or generated_samples) and not generated_tokens:
            name = "chat_template" if chat_template else "generated_samples"
            raise UsageError(f"{name} is for generated answers: set generated_tokens.")
        if tokenizer is None and isinstance(backbone, nn.Module):
            raise UsageError("A backbone that is already built does not name its tokenizer: give tokenizer.")
        self._backbone, self.method = backbone, method
        self.output, self.steps = output, steps
        self.requests_per_step = requests_per_step
        self.prefixes, self.anchors = prefixes, anchors
        self.start_at_keys = start_at_keys
        self.optimizer = optimizer
        self.stop_loss = stop_loss
        self.sequential, self.retest_every = sequential, retest_every
        self.save_edits = save_edits or sequential
        self.fluency_tokens, self.generated_tokens = fluency_tokens, generated_tokens
        self.generated_samples = generated_samples
        self.chat_template = chat_template
        self.texts = texts
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.tokenizer_name = str(tokenizer or backbone)
        self.backbone_args = backbone_args or {}
        self.model: Any = None
        self.summary: dict[str, Any] = {}
        """The last run: ``figures`` (metric → ``mean``, ``standard_error``, ``requests``), and the cost of an edit."""

    def configure_model(self) -> None:
        """Load backbone and tokenizer."""
        if self.model is not None:
            return
        model: Any = self._backbone
        if isinstance(model, str):
            model = load_backbone(model, AutoModelForCausalLM, **self.backbone_args)
        require_editable(model)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.tokenizer_name)

    def on_test_start(self) -> None:
        """Open the folder; rows of an earlier run are kept."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, EditingData):
            raise UsageError(f"An Editor needs an EditingData for its requests; got {type(data).__name__}.")
        require_able(self.trainer, self.sequential)
        self._requests = data.requests
        self._edited = EditedModel(self.model)
        how: dict[str, Any] = {name: getattr(self, name) for name in MEASURED}
        self._measurer = Measurer(self.model, self.tokenizer, data.requests, batch_size=self.eval_batch_size, **how)
        self._examples = Examples(self.model, self.tokenizer, self.prefixes, self.anchors, self.seed)
        self._results = Results(self.output, settings_of(self, data), self.global_rank)
        self._so_far: list[EditRequest] = []
        self._edits_so_far = 0

    def test_step(self, batch: Sequence[Sequence[EditRequest]], batch_idx: int) -> None:  # noqa: ARG002
        """Make an edit for each group of requests, unless an earlier run did."""
        done = [all(request.index in self._results.rows for request in group) for group in batch]
        # If a run was killed within the list, all of it is trained again: rounding depends on how many share a batch.
        alone = self.sequential or all(done)
        ahead: Iterator[Trained | None] = iter([None] * len(batch)) if alone else self._train(batch)
        for group, is_done, trained in zip(batch, done, ahead, strict=True):
            if not is_done:
                self._results.add(self.edit(group, trained))
            elif self.sequential:
                file = self._edit_file(group)
                self._edited.add(load_edit(file), str(file))
            self._so_far += group
            self._edits_so_far += 1
            if self.retest_every is not None and self._edits_so_far % self.retest_every == 0:
                self._retest()

    def on_test_epoch_end(self) -> None:
        """Collect the rows of all processes, and log the means."""
        if self.sequential:
            self._retest()
            self._edited.restore()
        self._examples.forget_inputs()  # they may be large
        self.trainer.strategy.barrier()
        summary: dict[str, Any] = {}
        if self.global_rank == 0:
            rows = self._results.finish([request.index for request in self._requests])
            summary = summary_of(rows, self._measurer.names)
            self._results.write_summary(summary)
        self.summary = self.trainer.strategy.broadcast(summary)
        self.log_dict({name: metric["mean"] for name, metric in self.summary["figures"].items()}, batch_size=1)

    def _train(self, groups: Sequence[Sequence[EditRequest]]) -> Iterator[Trained]:
        edits = [self._examples.batches(requests, self.requests_per_step, self.device) for requests in groups]
        seeds = [self.seed + requests[0].index for requests in groups]
        how = (self.method, self.steps, self.optimizer, self.stop_loss)
        if self.sequential:
            self._examples.forget_inputs()  # the last edit changed them
        return train_each(self.model, edits, *how, seeds, self._examples.held, self.start_at_keys)

    def edit(self, requests: Sequence[EditRequest], trained: Trained | None = None) -> list[Row]:
        """Train one change for some requests, add it and measure it; take it out unless edits are in sequence.

        Args:
            requests: At least one.
            trained: The change, if it was trained already.

        Returns:
            A row for each request.
        """
        questions = Questions(self.tokenizer, requests)
        with self._edited.as_it_was():
            before = self._measurer.unedited(questions)
        start = time.perf_counter()
        if trained is None:
            (trained,) = self._train([requests])
        else:
            start -= trained.whole_seconds
        self._edited.add(Edit(trained.patch))  # without a base: the edit was made for this model
        seconds = time.perf_counter() - start
        metrics = self._measurer.measure(questions, before)
        edit = Edit(
            trained.patch, tuple(requests), tuple(metrics), repr(self.method), self.backbone_name(), trained.weights
        )
        if self.save_edits:
            self._edited.with_base(edit).save(self._edit_file(requests))
        if not self.sequential:
            start = time.perf_counter()
            self._edited.restore()
            seconds += time.perf_counter() - start
        changed = edit.changed
        return [
            {
                "index": request.index,
                "prompt": request.prompt,
                "target_new": request.target_new,
                "steps": trained.steps,
                "loss": trained.loss,
                "changed": changed,
                "changed_share": changed / trained.weights,
                **values,
                "seconds": seconds / len(requests),
                "step_seconds": trained.seconds / len(requests),
            }
            for request, values in zip(requests, metrics, strict=True)
        ]

    def _retest(self) -> None:
        """Measure all edits so far again, unless an earlier run did."""
        after = len(self._so_far)
        if not after or after in self._results.retained():
            return
        questions = Questions(self.tokenizer, self._so_far)
        with self._edited.as_it_was():
            before = self._measurer.unedited(questions)
        metrics = self._measurer.measure(questions, before, answers_only=True)
        means = {name: metric["mean"] for name, metric in summarize(metrics, self._measurer.names).items()}
        each = {"index": [r.index for r in self._so_far], "each": [row["edit_success"] for row in metrics]}
        self._results.retain({"after": after, **means, **each})

    def _edit_file(self, requests: Sequence[EditRequest]) -> Path:
        return self._results.edits / f"{requests[0].index:06d}{SUFFIX}"

    def backbone_name(self) -> str:
        """Hub id or folder of the backbone; empty if it is not known."""
        return self._backbone if isinstance(self._backbone, str) else str(getattr(self.model, "name_or_path", ""))
