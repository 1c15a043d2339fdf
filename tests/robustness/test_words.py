"""Configurations and words of the command line that are wrong."""

from pathlib import Path

import pytest
from hostile import DATA, METHOD, MODEL, Case, require_refused


def written(text: str | bytes, name: str = "bad.yaml"):
    def prepare():
        Path(name).write_bytes(text.encode() if isinstance(text, str) else text)

    return prepare


BAD = ["fit", "--config", "bad.yaml"]

STOPPING = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor"]

CASES = [
    # YAML.
    Case("a YAML of no mapping", BAD, "bad.yaml", written("- fit\n- me\n")),
    Case("a YAML that is a sentence", BAD, "bad.yaml", written("just words")),
    Case("an empty YAML", BAD, "bad.yaml is empty", written("")),
    Case("a YAML with a tab", BAD, "bad.yaml", written("model:\n\tclass_path: x\n")),
    Case("an unclosed bracket", BAD, "bad.yaml", written("model: {class_path: [}\n")),
    Case("a YAML in UTF-16", BAD, "bad.yaml", written("model: x\n".encode("utf-16"))),
    Case("a YAML in Latin-1", BAD, "bad.yaml", written("model: {class_path: é}\n".encode("latin-1"))),
    Case("a YAML with NUL bytes", BAD, "bad.yaml", written(b"model: \x00\x00\n")),
    Case("binary in the place of a YAML", BAD, "bad.yaml", written(bytes(range(256)))),
    Case("a YAML that runs Python", BAD, "bad.yaml", written("model: !!python/object/apply:os.system ['true']\n")),
    Case("an anchor that is nowhere", BAD, "bad.yaml", written("model: *nothing\n")),
    Case("a folder as configuration", ["fit", "--config", "data"], "data"),
    Case("a configuration that is not there", ["fit", "--config", "gone.yaml"], "gone.yaml"),
    Case("a key at the top that nobody knows", BAD, "name a model", written("modell: {}\n")),
    Case("a section in the place of a number", [*BAD], "max_epochs", written("trainer: {max_epochs: {a: 1}}\n")),
    Case("a word in the place of a number", ["--trainer.max_epochs", "many"], "max_epochs"),
    Case("a number with a unit", [f"{DATA}batch_size", "8MB"], "batch_size"),
    Case("a float for an integer", [f"{METHOD}rank", "2.5"], "rank"),
    Case("not-a-number", [f"{METHOD}alpha", "nan"], "alpha"),
    Case("infinity", [f"{METHOD}sparsity_weight", "inf"], "sparsity_weight"),
    # Words.
    Case("no command", ["fit"], "model"),
    Case("a flag that nobody knows", ["--fast"], "--fast"),
    Case("a flag without its value", ["--trainer.max_epochs"], "expected one argument"),
    Case("a word that belongs to nothing", ["please"], "please"),
    Case("a single dash", ["-x"], "-x"),
    Case("another dash", ["—config"], "—config"),
    # Methods.
    Case("rank 0", [f"{METHOD}rank", "0"], "rank"),
    Case("a negative rank", [f"{METHOD}rank", "-3"], "rank"),
    Case("alpha 0", [f"{METHOD}alpha", "0"], "alpha"),
    Case("dropout 1", [f"{METHOD}dropout", "1.0"], "dropout"),
    Case("negative dropout", [f"{METHOD}dropout", "-0.1"], "dropout"),
    Case("a negative threshold", [f"{METHOD}sparsity_weight", "null", f"{METHOD}threshold", "-1"], "threshold"),
    Case("threshold and sparsity_weight", [f"{METHOD}threshold", "0.1"], "exactly one"),
    Case("a gate_lr of 0", [f"{METHOD}gate_lr", "0"], "gate_lr"),
    Case("an unknown operator", [f"{METHOD}operator", "hard"], "operator"),
    Case("an unknown start", [f"{METHOD}init_weights", "ones"], "init_weights"),
    Case("a layer that is not there", [f"{METHOD}target_modules", "[q_proj]"], "q_proj"),
    Case("no layers", [f"{METHOD}target_modules", "[]"], "target_modules"),
    Case("a broken regular expression", [f"{METHOD}target_modules", "(query"], "(query"),
    Case("a block that is not there", [f"{METHOD}layers", "[99]"], "99"),
    Case("a negative block", [f"{METHOD}layers", "[-1]"], "-1"),
    Case("all excluded", [f"{METHOD}exclude_modules", "[dense, query, key, value]"], "exclude_modules"),
    Case("an override of nothing", [f"{METHOD}overrides", "{nothing: {rank: 1}}"], "nothing"),
    Case("an override of what cannot be", [f"{METHOD}overrides", "{query: {dropot: 1}}"], "dropot"),
    Case("a head that is not there", [f"{METHOD}train_head", "[heads]"], "heads"),
    Case("a class that is no method", [f"{MODEL}method", "torch.nn.Linear"], "method"),
    Case("a method that is not there", [f"{MODEL}method", "lit_sparse.SORA"], "SORA"),
    Case("a module that cannot be imported", [f"{MODEL}method", "no_such.thing.Method"], "no_such"),
    Case("a density of 0", [f"{MODEL}method", "lit_sparse.RoseLoRA", f"{METHOD}density", "0"], "density"),
    Case("a density above 1", [f"{MODEL}method", "lit_sparse.RoseLoRA", f"{METHOD}density", "1.5"], "density"),
    Case(
        "masks that end before they begin",
        [
            f"{MODEL}method",
            "lit_sparse.RoseLoRA",
            f"{METHOD}density",
            "0.1",
            f"{METHOD}begin",
            "0.8",
            f"{METHOD}end",
            "0.2",
        ],
        "begin",
    ),
    # Training.
    Case("a warm-up longer than the run", [f"{MODEL}warmup", "2"], "warmup"),
    Case("a negative learning rate", [f"{MODEL}optimizer.init_args.lr", "-1"], "learning rate"),
    Case("an optimizer that is none", [f"{MODEL}optimizer", "torch.nn.ReLU"], "optimizer"),
    Case("an optimizer that is not there", [f"{MODEL}optimizer", "torch.optim.AdamWW"], "AdamWW"),
    Case("a schedule that nobody knows", [f"{MODEL}lr_schedule", "stairs"], "stairs"),
    Case("a precision that nobody knows", ["--trainer.precision", "7"], "precision"),
    Case("a strategy that nobody knows", ["--trainer.strategy", "ddpp"], "ddpp"),
    Case("DeepSpeed", ["--trainer.strategy", "deepspeed"], "eep"),
    Case("minus two devices", ["--trainer.devices", "-2"], "devices"),
    Case("a GPU where there is none", ["--trainer.accelerator", "cuda"], "CUDA"),
    Case("a batch of 0 rows", [f"{DATA}batch_size", "0"], "batch_size"),
    Case("texts of 0 tokens", [f"{DATA}max_length", "0"], "max_length"),
    Case("minus one worker", [f"{DATA}num_workers", "-1"], "num_workers"),
    Case("two epochs and a half", ["--trainer.max_epochs", "2.5"], "max_epochs"),
    # Callbacks of Lightning's.
    Case("a validation metric that is not logged", [*STOPPING, "val_acc"], "Did you mean 'val_accuracy'"),
    Case("a training metric that is not logged", [*STOPPING, "train_acc"], "metric `train_acc` which is not available"),
    Case(
        "a search for a learning rate",
        ["--trainer.callbacks+=LearningRateFinder", "--trainer.callbacks.attr_name", "rate"],
        "attr_name",
    ),
    # Commands on files.
    Case("an export of nothing", ["export", "--ckpt_path", "no.ckpt", "--format", "peft", "--output", "o"], "no.ckpt"),
    Case(
        "an export in a format of another", ["export", "--ckpt_path", "x", "--format", "onnx", "--output", "o"], "onnx"
    ),
    Case("inspect of nothing", ["inspect", "nowhere"], "nowhere"),
    Case("a checkpoint that is not there", ["--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt"),
    Case("a checkpoint that is a folder", ["--ckpt_path", "data"], "data"),
    Case("edits of a model that is none", ["edit", "apply", "bert", "data/train.csv", "--output", "o"], "train.csv"),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_it_is_refused(case):
    require_refused(case)
