"""Arguments that modules share: on the command line, in checkpoints and in users' sub-classes."""

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.model_helpers import is_overridden

import lit_sparse as ls
from lit_sparse.modules.rebuilding import rebuild

OWN = {
    "SequenceClassification": {"num_labels", "label_names", "metrics", "multi_label"},
    "TokenClassification": {"num_labels", "label_names"},
    "MultipleChoice": {"num_labels", "label_names", "metrics"},
    "QuestionAnswering": {"max_answer_length", "null_threshold"},
    "CausalLM": {"max_new_tokens", "num_beams"},
    "Seq2SeqLM": {"max_new_tokens", "generate_in_fit"},
    "MaskedLM": set(),
}
SHARED = {
    "backbone": "Hub id or folder of the pretrained model",
    "method": "How to adapt it",
    "optimizer": "Makes the optimizer from parameter groups",
    "lr_schedule": "decay to zero over the run",
    "warmup": "Share of the run in which the learning rate rises",
    "gradient_checkpointing": "Recompute activations in the backward pass",
    "compile": "Compile the blocks of the model",
    "backbone_args": "Arguments for",
    "start_from": "Folder of a dense LoRA in PEFT's format",
    "new_tokens": "Tokens to add to the backbone's tokenizer",
}


class Warm(ls.CausalLM):
    """A user's module with an argument of its own.

    Args:
        own: An argument.
    """

    def __init__(self, *args, own: int = 1, **options) -> None:
        super().__init__(*args, **options)
        self.own = own


@pytest.mark.parametrize("name", OWN)
def test_the_command_line_knows_and_explains_every_argument(name):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(getattr(ls, name), "model")
    arguments = {
        action.dest.removeprefix("model."): action.help for action in parser._actions if "model." in action.dest
    }
    arguments = {name: text for name, text in arguments.items() if not name.endswith(".help")}
    assert arguments.keys() == OWN[name] | SHARED.keys()
    for argument, text in SHARED.items():
        assert text in arguments[argument]
    assert all(arguments.values())


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["true"], {}),
        (["false"], None),
        (["{mode: max-autotune, fullgraph: true}"], {"mode": "max-autotune", "fullgraph": True}),
        (["{options: {max_autotune: true}}"], {"options": {"max_autotune": True}}),
    ],
)
def test_arguments_of_the_compiler(words, options, tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ls.CausalLM, "model")
    words = ["--model.backbone=unused", "--model.method=LoRA", "--model.compile", *words]
    module = parser.instantiate(parser.parse_args(words)).model
    assert module.compile_options == options
    torch.save(dict(module.hparams), tmp_path / "kept")
    kept = {"hyper_parameters": torch.load(tmp_path / "kept", weights_only=True)}
    assert rebuild(ls.CausalLM, kept, {"method": ls.LoRA()}, False).compile_options == options


def test_an_unknown_argument_of_the_compiler_is_refused():
    with pytest.raises(ls.UsageError, match=r"An argument in compile must be 'mode', .* or 'options'; got 'mod'"):
        ls.CausalLM("unused", ls.LoRA(), compile={"mod": "default"})


@pytest.mark.parametrize("name", OWN)
def test_an_unknown_argument_is_refused(name):
    with pytest.raises(TypeError, match="unexpected keyword argument 'wramup'"):
        getattr(ls, name)("unused", ls.LoRA(), wramup=0.1)


def test_all_arguments_are_kept_and_built_from(tmp_path):
    module = Warm("unused", ls.LoRA(rank=3), own=5, num_beams=2, warmup=0.25, new_tokens=["<a>"])
    kept = dict(module.hparams)
    assert kept.keys() == {"own", "max_new_tokens", "num_beams", *SHARED} - {"optimizer"}
    torch.save(kept, tmp_path / "kept")
    again = rebuild(Warm, {"hyper_parameters": torch.load(tmp_path / "kept", weights_only=True)}, {}, False)
    assert (again.own, again.num_beams, again.warmup, again.new_tokens) == (5, 2, 0.25, ["<a>"])
    assert again.method.rank == 3


def test_arguments_that_a_class_does_not_take_are_left_out():
    """Checkpoints of other versions may hold more."""
    saved = {"backbone": "unused", "num_labels": 3, "metrics": None, "warmup": 0.5, "gone": 1}
    module = rebuild(ls.TokenClassification, {"hyper_parameters": saved}, {"method": ls.LoRA()}, False)
    assert (module.num_labels, module.warmup) == (3, 0.5)
    assert not hasattr(module, "gone")


@pytest.mark.parametrize("name", [*OWN, "PreferenceLM", "Editor"])
def test_no_hook_is_one_that_lightning_shares_with_data_modules(name):
    """Lightning would warn at every start of a run with a data module."""
    hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    assert not [hook for hook in hooks if is_overridden(hook, getattr(ls, name), parent=L.LightningModule)]
