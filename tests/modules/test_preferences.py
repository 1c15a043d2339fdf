"""lit_sparse.PreferenceLM against two models and a loop over tokens, and its reference through training."""

import copy
import functools
import json
import math
from pathlib import Path

import programs
import pytest
import torch
import yaml
from datasets import Dataset
from projects import last_figures
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lit_sparse as ls

IGNORED = -100
PAIRS = [("good", "true", "false"), ("bad", "false", "true")]


def pairs(count=6, seed=0):
    """Batches of two pairs, with prompts and answers of very different length."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count // 2):
        ids = torch.randint(5, 60, (2, 2, 12), generator=generator)
        labels, mask = ids.clone(), torch.ones_like(ids)
        for row in range(2):
            labels[row, :, : 2 + row + number] = IGNORED
            for side in range(2):
                end = 6 + 2 * row + 3 * side
                labels[row, side, end:], mask[row, side, end:] = IGNORED, 0
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


@pytest.fixture
def pair_file(tmp_path):
    """Twelve pairs of texts in a file."""
    rows = [
        {"prompt": f"is the {thing} {word} :", "chosen": f" {right}", "rejected": f" {wrong}"}
        for thing in ("film", "dog", "house", "tree", "cat", "man")
        for word, right, wrong in PAIRS
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "pairs.jsonl")


def preference_lm(backbone, method=None, lr=1e-2, **options):
    optimizer = functools.partial(torch.optim.AdamW, lr=lr)
    return ls.PreferenceLM(backbone, method or ls.LoRA(rank=4), optimizer=optimizer, **options)


def log_probabilities(model, batch):
    """Sum and number of the answer's tokens of each row and side, one text and one token at a time."""
    found = []
    for row in range(len(batch["labels"])):
        for side in range(2):
            ids, labels = batch["input_ids"][row, side], batch["labels"][row, side]
            length = int(batch["attention_mask"][row, side].sum())
            with torch.no_grad():
                logits = model(input_ids=ids[:length].unsqueeze(0)).logits[0].double()
            each = [
                math.log(logits[place - 1].softmax(-1)[ids[place]])
                for place in range(1, length)
                if labels[place] != IGNORED
            ]
            found.append((math.fsum(each), len(each)))
    return found


def log_sigmoid(x):
    return math.log(1 / (1 + math.exp(-x)))


def slow_loss(settings, w, r):
    """The loss by sums, counts and reference sums of both answers."""
    ratio = (w[0] - w[2]) - (r[0] - r[2])
    mean = (w[0] - w[2]) / w[1] - (r[0] - r[2]) / r[1]
    means = [w[0] / w[1], r[0] / r[1]]
    odds = [math.exp(log) / (1 - math.exp(log)) for log in means]
    smooth = settings.get("label_smoothing", 0)
    return {
        "dpo": -(1 - smooth) * log_sigmoid(0.2 * ratio) - smooth * log_sigmoid(-0.2 * ratio),
        "ipo": (mean - 1 / (2 * 0.2)) ** 2,
        "orpo": -means[0] - 0.2 * log_sigmoid(math.log(odds[0]) - math.log(odds[1])),
        "simpo": -log_sigmoid(0.2 * (means[0] - means[1]) - 0.3),
    }[settings["loss"]]


SETTINGS = [
    {"loss": "dpo"},
    {"loss": "dpo", "label_smoothing": 0.1},
    {"loss": "ipo"},
    {"loss": "orpo"},
    {"loss": "simpo", "gamma": 0.3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_metrics_are_those_of_a_loop_with_a_second_model(settings, tiny_llama, trainer):
    module, run = preference_lm(tiny_llama, beta=0.2, **settings), trainer(max_epochs=3)
    loader = DataLoader(pairs(), batch_size=None)
    run.fit(module, loader, loader)
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    module.model.eval()
    rows = []
    for batch in pairs():
        now, before = log_probabilities(module.model, batch), log_probabilities(reference, batch)
        sides = [(total, count, old) for (total, count), (old, _) in zip(now, before, strict=True)]
        rows += list(zip(sides[::2], sides[1::2], strict=True))
    with_reference = settings["loss"] in ("dpo", "ipo")

    def reward(side):
        score = side[0] - (side[2] if with_reference else 0)
        return 0.2 * (score if settings["loss"] == "dpo" else score / side[1])

    expected = {
        "loss": [slow_loss(settings, *row) for row in rows],
        "reward_accuracy": [float(reward(w) > reward(r)) for w, r in rows],
        "reward_margin": [reward(w) - reward(r) for w, r in rows],
        "chosen_log_probability": [w[0] for w, _ in rows],
        **({"chosen_log_ratio": [w[0] - w[2] for w, _ in rows]} if with_reference else {}),
    }
    means = {f"val_{name}": sum(values) / len(values) for name, values in expected.items()}
    found = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("val_")}
    assert found == pytest.approx(means, rel=1e-4, abs=1e-6)
    assert {f"train_{name}" for name in expected} <= set(run.callback_metrics)
    assert all(math.isfinite(value) for value in run.callback_metrics.values())


def llama(**changes):
    torch.manual_seed(3)
    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**{**settings, **heads, **changes}))


METHODS = {
    "LoRA": lambda **o: ls.LoRA(rank=4, **o),
    "SoRA": lambda **o: ls.SoRA(rank=4, threshold=0.01, **o),
    "RoseLoRA": lambda **o: ls.RoseLoRA(rank=4, density=0.2, begin=0.1, end=0.6, **o),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("method", METHODS)
def test_the_reference_is_the_model_before_training(method, tied, trainer):
    """Bit for bit, with dropout, gates, and a trained output layer."""
    plain = llama(attention_dropout=0.2, tie_word_embeddings=tied)
    before = copy.deepcopy(plain).eval()
    head = {"train_head": ["lm_head"], "exclude_modules": ["lm_head"], "dropout": 0.1}
    module = preference_lm(plain, METHODS[method](**head))
    trainer(max_epochs=4).fit(module, DataLoader(pairs(), batch_size=None))
    (batch, *_) = pairs()
    answers = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}
    module.train()
    with module._as_reference():
        found = module(**answers).logits
    assert torch.equal(found, before(**answers).logits)
    assert not found.requires_grad
    assert all(part.training for part in module.model.modules()), "in training again"
    assert not torch.equal(module(**answers).logits, found)
    trained = dict(module.model.named_parameters())["lm_head.weight" if not tied else "model.embed_tokens.weight"]
    assert trained.requires_grad
    assert not torch.equal(trained, before.lm_head.weight)


def test_new_tokens_have_their_first_rows_in_the_reference(tiny_llama, pair_file, trainer):
    module, run = preference_lm(tiny_llama, new_tokens=["<true>", "film"]), trainer(max_epochs=2)
    text = Path(pair_file).read_text().replace("true", "<true>")
    Path(pair_file).write_text(text)
    data = ls.PreferenceData(data_files={"train": pair_file, "validation": pair_file}, batch_size=4)
    (start,) = run.validate(module, data, verbose=False)
    assert abs(start["val_chosen_log_ratio"]) < 1e-5
    answers = {name: value.flatten(0, 1) for name, value in next(iter(data.val_dataloader())).items()}
    assert answers.pop("labels").max() >= len(AutoTokenizer.from_pretrained(tiny_llama))
    with module._as_reference():
        before = module(**answers).logits
    run.fit(module, data)
    with module._as_reference():
        assert torch.equal(module(**answers).logits, before)
    assert abs(run.callback_metrics["val_chosen_log_ratio"]) > 1e-2


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("loss", ["dpo", "simpo"])
def test_gradients_flow_to_adapters_and_the_trained_head_alone(loss, precision, trainer):
    """Under autocast too, which keeps casts of weights from one pass to the next."""
    module = preference_lm(llama(), ls.SoRA(rank=4, threshold=0.01, train_head=["lm_head"]), loss=loss)
    module.configure_model()
    with torch.no_grad():
        for _, adapter in ls.adapters_in(module):
            adapter.lora_B_t.normal_()
    module.log = module.log_dict = lambda *args, **options: None  # there is no Trainer
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        module.training_step(pairs()[0], 0).backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert set(grads) == {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[2] for name in grads} == {"lora_A", "lora_B_t", "gate", "weight"}
    assert all(grad.abs().max() > 0 for grad in grads.values())


def test_recomputed_activations_are_those_of_the_trained_model(trainer):
    grads = []
    for recompute in (False, True):
        module = preference_lm(llama(), gradient_checkpointing=recompute)
        torch.manual_seed(4)
        module.configure_model()
        with torch.no_grad():
            for _, adapter in ls.adapters_in(module):
                adapter.lora_B_t.normal_()
        module.train()
        module.log = module.log_dict = lambda *args, **options: None
        module.training_step(pairs()[0], 0).backward()
        grads.append([p.grad for p in module.parameters() if p.requires_grad])
    torch.testing.assert_close(*grads)


def test_rewards_start_equal_and_the_chosen_answers_win(trainer):
    loader = DataLoader(pairs(), batch_size=None)
    module, run = preference_lm(llama()), trainer(max_epochs=15)
    (start,) = run.validate(module, loader, verbose=False)
    assert start["val_loss"] == pytest.approx(math.log(2))
    assert (start["val_reward_margin"], start["val_chosen_log_ratio"], start["val_reward_accuracy"]) == (0, 0, 0)
    run.fit(module, loader)
    (end,) = run.validate(module, loader, verbose=False)
    assert end["val_reward_accuracy"] == 1
    assert end["val_reward_margin"] > 0.1


def test_gora_starts_from_gradients_at_the_reference(trainer):
    method = ls.LoRA(rank=4, init_weights="gora", start_batches=3, gora_gamma=1.0, train_head=["lm_head"])
    module, run = preference_lm(llama(), method, lr=1e-8), trainer(max_epochs=1)
    before = copy.deepcopy(module._built[0]).eval()
    loader = DataLoader(pairs(), batch_size=None)
    run.fit(module, loader)
    (found,) = run.validate(module, loader, verbose=False)
    assert found["val_reward_accuracy"] == 1  # by a step of gradient descent, before any of the optimizer's
    answers = {name: value.flatten(0, 1) for name, value in pairs()[0].items() if name != "labels"}
    with module._as_reference():
        assert torch.equal(module(**answers).logits, before(**answers).logits)


def test_single_answers_are_measured_as_in_causal_lm(trainer):
    """So that a probe can watch other data."""
    single = [{name: value[:, 0] for name, value in batch.items()} for batch in pairs()]
    probed = {}
    for kind in (ls.CausalLM, ls.PreferenceLM):
        module, run = kind(llama(), ls.LoRA(rank=4)), trainer()
        torch.manual_seed(5)
        (probed[kind],) = run.validate(module, DataLoader(single, batch_size=None), verbose=False)
    assert probed[ls.PreferenceLM] == probed[ls.CausalLM]
    assert "val_perplexity" in probed[ls.CausalLM]


def test_data_of_another_task_is_refused(trainer):
    single = [{name: value[:, 0] for name, value in batch.items()} for batch in pairs()]
    with pytest.raises(ls.UsageError, match=r"learns from pairs .* the shape \(2, 12\). Use CausalLM"):
        trainer(max_epochs=1).fit(preference_lm(llama()), DataLoader(single, batch_size=None))
    with pytest.raises(ls.UsageError, match=r"CausalLM needs a label for every token, .* PreferenceLM"):
        trainer(max_epochs=1).fit(ls.CausalLM(llama(), ls.LoRA()), DataLoader(pairs(), batch_size=None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "ppo"}, "loss must be 'dpo', 'ipo', 'orpo' or 'simpo'; got 'ppo'"),
        ({"beta": 0.0}, "beta must be above 0; got 0.0"),
        ({"label_smoothing": 0.5}, "label_smoothing must be at least 0 and below 0.5"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing is for the loss 'dpo', and the loss is 'ipo'"),
        ({"gamma": 1.0}, "gamma is for the loss 'simpo', and the loss is 'dpo'"),
        ({"loss": "simpo", "gamma": -1.0}, "gamma must be at least 0"),
    ],
)
def test_arguments_outside_of_their_range_are_refused(options, message):
    with pytest.raises(ls.UsageError, match=message):
        preference_lm(llama(), **options)


def test_without_a_reference_there_is_no_dpo(tmp_path):
    plain = preference_lm(llama(), ls.LoRA(rank=4, init_weights="pissa"))
    with pytest.raises(ls.UsageError, match="whose weights init_weights 'pissa' changes"):
        plain.configure_model()
    with pytest.raises(ls.UsageError, match="merge that LoRA into the backbone"):
        preference_lm(llama(), start_from=str(tmp_path)).configure_model()
    preference_lm(llama(), ls.LoRA(rank=4, init_weights="pissa"), loss="simpo").configure_model()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("loss", "theirs"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_the_same_rows_have_the_same_loss_in_trl(loss, theirs, tiny_llama, trainer, pair_file):
    """From the tokens of texts to the metrics, after some steps of training."""
    trl = pytest.importorskip("trl")
    rows = Dataset.from_json(pair_file)
    module, run = preference_lm(tiny_llama, loss=loss, beta=0.2), trainer(max_epochs=3)
    data = ls.PreferenceData(data_files={"train": pair_file, "validation": pair_file}, batch_size=4)
    run.fit(module, data)
    (ours,) = run.validate(module, data, verbose=False)
    judge = trl.DPOTrainer(
        ls.merge(copy.deepcopy(module.model)),
        ref_model=AutoModelForCausalLM.from_pretrained(tiny_llama),
        args=trl.DPOConfig(
            "judge",
            loss_type=[theirs],
            beta=0.2,
            per_device_eval_batch_size=12,
            use_cpu=True,
            bf16=False,
            report_to="none",
        ),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
    )
    found = judge.evaluate()
    assert ours["val_loss"] == pytest.approx(found["eval_loss"], rel=1e-5)
    assert ours["val_reward_accuracy"] == pytest.approx(found["eval_rewards/accuracies"])
    if loss == "dpo":  # their rewards of IPO are those of DPO
        assert ours["val_reward_margin"] == pytest.approx(found["eval_rewards/margins"], rel=1e-5)


def write_project(folder, backbone, method, files):
    """A configuration that keeps a checkpoint of every step."""
    keeper = {"dirpath": "kept", "every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"}
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "lit_sparse.PreferenceLM",
            "init_args": {
                "backbone": str(backbone),
                "method": method,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
            },
        },
        "data": {"class_path": "lit_sparse.PreferenceData", "init_args": {"data_files": files, "batch_size": 4}},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 4,
            "accumulate_grad_batches": 2,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs"}},
            "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keeper}],
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def run(*words):
    done = programs.run(["-m", "lit_sparse", *words])
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("method", ["SoRA", "RoseLoRA"])
def test_the_command_line_trains_resumes_inspects_and_exports(method, tiny_llama, pair_file, tmp_path):
    arguments = {"SoRA": {"threshold": 0.01}, "RoseLoRA": {"density": 0.2, "begin": 0.1, "end": 0.6}}[method]
    made = {"class_path": f"lit_sparse.{method}", "init_args": {"rank": 4, **arguments}}
    write_project(tmp_path, tiny_llama, made, {"train": pair_file, "validation": pair_file})
    run("fit", "--config", "config.yaml")
    straight = last_figures()
    assert straight["val_reward_accuracy"] > 0.5
    assert straight["val_chosen_log_ratio"] != 0
    end = torch.load("kept/step=8.ckpt", weights_only=True)
    Path("kept/step=8.ckpt").unlink()
    run("fit", "--config", "config.yaml", "--ckpt_path", "kept/step=3.ckpt", "--trainer.logger.save_dir", "again")
    resumed = torch.load("kept/step=8.ckpt", weights_only=True)
    assert resumed["state_dict"].keys() == end["state_dict"].keys()
    assert all(torch.equal(resumed["state_dict"][name], value) for name, value in end["state_dict"].items())
    assert last_figures("again")["val_loss"] == straight["val_loss"]
    assert "step 8 of 8, sparsity final" in run("inspect", "kept/step=8.ckpt")
    run("export", "--ckpt_path", "kept/step=8.ckpt", "--format", "peft", "--output", "lora")
    assert json.loads(Path("lora/adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    loaded = ls.PreferenceLM.load_from_checkpoint("kept/step=8.ckpt")
    assert (loaded.loss, loaded.beta) == ("dpo", 0.1)
