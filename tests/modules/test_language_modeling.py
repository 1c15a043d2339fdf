"""lit_sparse.CausalLM: loss, perplexity and accuracy against a loop over every labelled token."""

import functools
import json
import math
from collections import ChainMap

import pytest
import torch
from projects import last_figures, read_lines, write_config
from torch.utils.data import DataLoader

import lit_sparse as ls
from lit_sparse.cli.main import main

IGNORED = -100


def causal_lm(backbone, lr=1e-2, **options):
    optimizer = functools.partial(torch.optim.AdamW, lr=lr)
    return ls.CausalLM(backbone, ls.LoRA(rank=4), optimizer=optimizer, **options)


def batches(prompt=3):
    """Batches with very different numbers of labelled tokens: 1 row of 2, 3 rows of 9, 2 rows of 1 and 4."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for lengths in ([2], [9, 9, 9], [1, 4]):
        width = prompt + max(lengths)
        ids = torch.randint(5, 60, (len(lengths), width), generator=generator)
        labels, mask = ids.clone(), torch.ones_like(ids)
        for row, length in enumerate(lengths):
            labels[row, :prompt] = IGNORED
            labels[row, prompt + length :] = IGNORED
            mask[row, prompt + length :] = 0
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


@torch.no_grad()
def token_by_token(module, made):
    """The loss of each labelled token and whether it is the most likely one, row by row."""
    module.eval()
    rows = []
    for batch in made:
        for row in range(len(batch["labels"])):
            logits = module.model(
                input_ids=batch["input_ids"][row : row + 1], attention_mask=batch["attention_mask"][row : row + 1]
            ).logits[0]
            losses, right = [], []
            for position in range(1, len(logits)):
                label = int(batch["labels"][row, position])
                if label != IGNORED:
                    losses.append(-math.log(logits[position - 1].double().softmax(-1)[label]))
                    right.append(int(logits[position - 1].argmax()) == label)
            rows.append((losses, right))
    return rows


@pytest.fixture
def trained(tiny_llama, trainer):
    """A module after some steps on the first rows, and its Trainer."""
    module, run = causal_lm(tiny_llama), trainer(max_epochs=3)
    loader = DataLoader(batches(), batch_size=None)
    run.fit(module, loader, loader)
    return module, run


def test_figures_are_those_over_all_labelled_tokens(trained):
    module, run = trained
    rows = token_by_token(module, batches())
    losses = [loss for row, _ in rows for loss in row]
    right = [hit for _, row in rows for hit in row]
    assert len(losses) == 2 + 27 + 5
    mean = sum(losses) / len(losses)
    assert run.callback_metrics["val_loss"] == pytest.approx(mean, rel=1e-5)
    assert run.callback_metrics["val_perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert run.callback_metrics["val_token_accuracy"] == pytest.approx(sum(right) / len(right))
    (tested,) = run.test(module, DataLoader(batches(), batch_size=None), verbose=False)
    assert tested["test_loss"] == pytest.approx(mean, rel=1e-5)
    assert tested["test_token_accuracy"] == pytest.approx(sum(right) / len(right))


def test_prediction_continues_each_prompt_greedily(tiny_llama, tmp_path, trainer):
    (tmp_path / "predict.json").write_text(json.dumps([{"instruction": text} for text in ("a dog", "who was the man")]))
    data = ls.InstructionData(str(tmp_path), template="{instruction}")
    module, run = causal_lm(tiny_llama, max_new_tokens=5), trainer()
    (found,) = run.predict(module, data)
    (batch,) = data.predict_dataloader()
    for ids, mask, new in zip(batch["input_ids"], batch["attention_mask"], found["tokens"], strict=True):
        sequence = ids[mask.bool()].tolist()
        for token in new.tolist():  # one forward pass of the bare prompt for each
            with torch.no_grad():
                logits = module.model(input_ids=torch.tensor([sequence])).logits[0, -1]
            assert token == int(logits.argmax())
            sequence.append(token)
    assert found["tokens"].shape == (2, 5)
    assert [type(text) for text in found["text"]] == [str, str]


def test_the_training_loss_is_on_the_response_only(tiny_llama):
    """A change of the prompt's labels is none; the loss is the mean over the tokens that are labelled."""
    module = causal_lm(tiny_llama)
    module.configure_model()
    batch = batches()[1]
    expected = [loss for row, _ in token_by_token(module, [batch]) for loss in row]
    assert module(**batch).loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_instructions_are_learned_and_their_prompts_cost_nothing(tiny_llama, tmp_path, trainer):
    rows = [
        {"instruction": f"what is a {word}", "output": answer} for word, answer in (("dog", "true"), ("cat", "false"))
    ]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.json").write_text(json.dumps(rows * 8))
    data = ls.InstructionData(str(tmp_path), template="{instruction}\n", batch_size=4)
    module, run = causal_lm(tiny_llama, lr=3e-2), trainer(max_epochs=8)
    (before,) = run.validate(module, data, verbose=False)
    run.fit(module, data)
    labelled = [loss for row, _ in token_by_token(module, list(data.val_dataloader())) for loss in row]
    assert run.callback_metrics["val_loss"] == pytest.approx(sum(labelled) / len(labelled), rel=1e-4)
    assert run.callback_metrics["val_loss"] < 0.97 * before["val_loss"]


@pytest.mark.slow
def test_a_user_teaches_a_model_to_answer_by_the_command_line(tiny_llama, tmp_path, monkeypatch):
    """The answer is one of two, and one word of the prompt says which."""
    starts = ("the", "a", "this", "that", "who likes the", "it is a", "from the", "what was the")
    things = ("film", "movie", "story", "plot", "dog", "river")
    asked = [
        {"instruction": f"{start} {word} {thing}", "input": "", "output": answer}
        for start in starts
        for thing in things
        for word, answer in (("good", "true"), ("bad", "false"))
    ]
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [asked[number] for number in order]
    for split, part in {"train": rows[:64], "validation": rows[64:80], "test": rows[64:], "predict": rows[64:]}.items():
        (tmp_path / f"{split}.json").write_text(json.dumps(part))
    config = write_config(
        tmp_path / "config.yaml",
        {"class_path": "lit_sparse.CausalLM", "init_args": {"backbone": tiny_llama, "max_new_tokens": 6}},
        {
            "class_path": "lit_sparse.InstructionData",
            "init_args": {"path": str(tmp_path), "template": "{instruction} : "},
        },
        lr=1e-2,
        max_epochs=20,
    )
    monkeypatch.setattr("sys.argv", ["lit-sparse"])
    main(["fit", "--config", config])
    kept = ["--ckpt_path", "kept/last.ckpt"]
    main(["test", "--config", config, *kept])
    # Every answer ends with an eos token; half of them are "true".
    assert last_figures()["test_token_accuracy"] > 0.9
    writer = ["--trainer.callbacks+=lit_sparse.PredictionWriter", "--trainer.callbacks.output", "answers.jsonl"]
    main(["predict", "--config", config, *kept, *writer])
    written = read_lines("answers.jsonl")
    assert [row["prompt"] for row in written] == [f"{row['instruction']} : " for row in rows[64:]]
    answers = [row["text"].strip() for row in written]
    right = [answer == row["output"] for answer, row in zip(answers, rows[64:], strict=True)]
    assert sum(right) / len(right) > 0.9
    assert 0.3 < sum(answer == "true" for answer in answers) / len(answers) < 0.7


def test_a_batch_without_labelled_tokens_counts_for_nothing(tiny_llama, trainer):
    module, run = causal_lm(tiny_llama), trainer()
    made = batches()
    (expected,) = run.validate(module, DataLoader(made, batch_size=None), verbose=False)
    empty = {**made[0], "labels": torch.full_like(made[0]["labels"], IGNORED)}
    (found,) = run.validate(module, DataLoader([*made, empty], batch_size=None), verbose=False)
    assert found == pytest.approx(expected)


def reasoning_folder(root, asked):
    """Two sets of unequal size: one asks for true or false, the other for one of two numbers."""
    words = {"boolq": {"good": "true", "bad": "false"}, "gsm8k": {"good": "1", "bad": "2"}}
    for name, answers in words.items():
        rows = [
            {"instruction": f"{name} {text}", "input": "", "output": answers[word], "answer": answers[word]}
            for text, word in asked
        ]
        (root / name).mkdir(parents=True)
        (root / name / "train.json").write_text(json.dumps(rows))
        (root / name / "test.json").write_text(json.dumps(rows[: 8 if name == "boolq" else 24]))
    return str(root)


ASKED = [
    (f"{start} {word} {thing}", word)
    for start in ("the", "a", "this", "that", "who likes the", "it is a")
    for thing in ("film", "movie", "dog", "river")
    for word in ("good", "bad")
]


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
def test_answers_are_generated_row_by_row_and_sets_count_alike(tiny_llama, tmp_path, trainer, beams):
    order = torch.randperm(len(ASKED), generator=torch.Generator().manual_seed(0)).tolist()
    folder = reasoning_folder(tmp_path / "sets", [ASKED[number] for number in order])
    data = ls.ReasoningData(folder, template="{instruction} : ", batch_size=8, validation_fraction=0.2)
    module, run = causal_lm(tiny_llama, max_new_tokens=4, num_beams=beams), trainer(max_epochs=40)
    run.fit(module, data)
    found = dict(ChainMap(*run.test(module, data, verbose=False)))
    module.eval()
    shares = {}
    for name, loader in zip(data.test_names, data.test_dataloader(), strict=True):
        right = []
        for batch in loader:
            for ids, mask, answer in zip(batch["input_ids"], batch["attention_mask"], batch["answers"], strict=True):
                prompt = ids[mask.bool()].unsqueeze(0)
                tokens = module.model.generate(input_ids=prompt, max_new_tokens=4, num_beams=beams, do_sample=False)
                text = data.decode(tokens[:, prompt.shape[1] :])[0]
                right.append(text.strip().split(" ")[0] == answer)
        shares[name] = sum(right) / len(right)
    assert found == pytest.approx(
        {
            "test_boolq_accuracy": shares["boolq"],
            "test_gsm8k_accuracy": shares["gsm8k"],
            "test_accuracy": sum(shares.values()) / 2,
        }
    )
    assert found["test_accuracy"] > 0.4
    assert ChainMap(*run.test(module, data, verbose=False)) == found, "nothing is drawn by chance"


def test_a_checkpoint_may_be_chosen_by_generated_answers(tiny_llama, tmp_path, trainer):
    folder = reasoning_folder(tmp_path / "sets", ASKED)
    data = ls.ReasoningData(folder, template="{instruction} : ", validation_fraction=0.2, validation="answers")
    module, run = causal_lm(tiny_llama, max_new_tokens=4), trainer(max_epochs=1)
    run.fit(module, data)
    assert 0 <= run.callback_metrics["val_accuracy"] <= 1
    assert "val_loss" not in run.callback_metrics
