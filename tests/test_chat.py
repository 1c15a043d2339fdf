"""A chat model from the command line: trained, asked, and exported with its chat format."""

import json
import sys
from pathlib import Path

import programs
import pytest
from backbones import save_tiny_llama
from chat_templates import BY_HAND, save_chat_tokenizer
from lightning.pytorch import Trainer
from projects import last_figures, read_lines, write_config
from transformers import AutoModelForCausalLM, AutoTokenizer

import lit_sparse as ls
from lit_sparse.cli.main import main
from lit_sparse.serving.language_models import open_language_model

QUESTIONS = ["who was it", "is it true", "where"]
ANSWER = "the cat"
OWN = BY_HAND["ChatML"][0].replace("'\\n' + message.content", "'\\n' + message.content | trim")
PROMPT = "<|im_start|>user\nAn example of a text.<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def config(tmp_path):
    """A tiny Llama whose tokenizer has another template than the run, and conversations."""
    save_tiny_llama("llama", vocab_size=448)
    save_chat_tokenizer("llama", BY_HAND["Phi"][0])
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": ANSWER}]}
        for question in QUESTIONS
    ]
    for split, times in (("train", 40), ("validation", 1), ("predict", 1)):
        Path(f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * times))
    Path("own.jinja").write_text(OWN)
    model = {
        "class_path": "lit_sparse.CausalLM",
        "init_args": {"backbone": str(tmp_path / "llama"), "max_new_tokens": 8},
    }
    data = {"class_path": "lit_sparse.ChatData"}
    data["init_args"] = {"path": str(tmp_path), "chat_template": str(tmp_path / "own.jinja"), "batch_size": 8}
    return write_config(tmp_path / "config.yaml", model, data, 0.02, max_epochs=1)


def refine(data, tokens):
    """A module after one step on data, and its checkpoint."""
    module = ls.CausalLM("llama", ls.LoRA(rank=2), max_new_tokens=tokens)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_steps=1, limit_val_batches=0, enable_checkpointing=False, **options)
    trainer.fit(module, data)
    trainer.save_checkpoint("run.ckpt")
    return module


def test_the_chat_format_goes_from_the_data_to_model_checkpoint_and_export(config):
    module = refine(ls.ChatData("train.jsonl", validation_fraction=0.1, chat_template="own.jinja"), 8)
    tokenizer = AutoTokenizer.from_pretrained("llama")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert module.model.chat_format == {"template": OWN, "end": "<|im_end|>", "end_id": end}
    loaded = ls.CausalLM.load_from_checkpoint("run.ckpt").model
    assert loaded.chat_format == module.model.chat_format
    assert loaded.generation_config.eos_token_id == [tokenizer.eos_token_id, end]
    for model, folder in ((module.model, "live"), (loaded, "loaded")):
        ls.save_adapter(model, folder)
        assert AutoTokenizer.from_pretrained(folder).chat_template == OWN
        assert f"```text\n{PROMPT}\n```" in Path(folder, "README.md").read_text()
    ls.export_gguf(module.model, "gguf")
    assert (
        "--lora gguf/adapter.gguf --jinja --chat-template-file gguf/chat_template.jinja\n"
        in Path("gguf/README.md").read_text()
    )


def test_the_tokenizer_of_the_run_goes_with_it(config):
    tokenizer = AutoTokenizer.from_pretrained("llama")
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained("own")
    module = refine(ls.ChatData("train.jsonl", validation_fraction=0.1, tokenizer="own"), 8)
    ls.save_adapter(module.model, "live")
    ls.export_checkpoint("run.ckpt", "peft")
    ls.export_checkpoint("run.ckpt", "merged", format="merged")
    found = [AutoTokenizer.from_pretrained(folder) for folder in ("live", "peft", "merged")]
    assert [t.model_max_length for t in [*found, open_language_model("run.ckpt").tokenizer]] == [77] * 4
    assert AutoTokenizer.from_pretrained("llama").model_max_length != 77


def test_other_texts_leave_the_template_of_the_backbone_and_the_card_alone(config):
    Path("rows.jsonl").write_text(
        json.dumps({"instruction": "who", "output": "a cat"}) + "\n" + '{"instruction": "a", "output": "b"}'
    )
    module = refine(ls.InstructionData("rows.jsonl", validation_fraction=0.5, template="{instruction}"), 8)
    ls.save_adapter(module.model, "out")
    assert AutoTokenizer.from_pretrained("out").chat_template == BY_HAND["Phi"][0]
    assert "Chat format" not in Path("out", "README.md").read_text()


def test_alpaca_prompts_on_a_chat_model_are_warned_of(config):
    rows = [{"instruction": "who", "output": "a cat"}] * 2
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data_files": {"validation": "rows.jsonl"}, "tokenizer": "llama"}
    with pytest.warns(UserWarning, match="has a chat template, and the prompt is Stanford Alpaca's.* ChatData"):
        ls.InstructionData(**data).setup("validate")
    ls.InstructionData(**data, template="{instruction}").setup("validate")  # and warnings are errors


def lightning(command, config, *words):
    done = programs.run(["-m", "lit_sparse", command, "--config", config, *words])
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_a_chat_model_from_fit_to_its_exports(config, monkeypatch):
    assert (
        "is read as conversations of the format messages" in lightning("fit", config, "--trainer.max_epochs=4").stderr
    )
    assert last_figures()["val_token_accuracy"] == 1.0
    checkpoint = ["--ckpt_path", "kept/last.ckpt"]
    writer = ["--trainer.callbacks+=lit_sparse.PredictionWriter", "--trainer.callbacks.output=answers.jsonl"]
    lightning("predict", config, *checkpoint, *writer)
    rows = read_lines("answers.jsonl")
    assert [row["text"] for row in rows] == [ANSWER] * 3  # and then it stops
    monkeypatch.setattr(sys, "argv", ["lit-sparse"])
    main(["export", *checkpoint, "--output", "peft"])
    main(["merge", *checkpoint, "--output", "merged"])
    for folder in ("peft", "merged"):
        assert Path(folder, "chat_template.jinja").read_text() == OWN
        card = Path(folder, "README.md").read_text()
        assert f"```text\n{PROMPT}\n```\n\nThe model ends its turn with `<|im_end|>`" in card
        assert "tokenizer.apply_chat_template(turns, add_generation_prompt=True" in card
    # A user who asks the merged model as the card shows.
    tokenizer, model = AutoTokenizer.from_pretrained("merged"), AutoModelForCausalLM.from_pretrained("merged")
    turns = [{"role": "user", "content": "is it true"}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8)
    assert tokenizer.decode(tokens[0][inputs["input_ids"].shape[1] :]) == f"{ANSWER}<|im_end|>"
