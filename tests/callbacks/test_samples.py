"""GenerationSamples: answers to fixed prompts during a fit that they do not change."""

import json
import random
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from backbones import save_tiny_llama, save_tiny_t5
from language_models import TEMPLATE
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from programs import launch
from projects import read_lines, write_config
from tensorboardX.proto.event_pb2 import Event
from transformers import AutoTokenizer

import lit_sparse as ls
from lit_sparse.cli.main import main

TURNS = [{"role": "system", "content": "a cat"}, {"role": "user", "content": "who is the dog"}]
PROMPTS = ["the dog", "who was the man in the house", TURNS]
SHOWN = [*PROMPTS[:2], "system: a cat\nuser: who is the dog"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = save_tiny_llama(tmp_path_factory.mktemp("llama"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    rows = [{"instruction": f"a dog {n}", "output": "the cat"} for n in range(24)]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    return lambda: ls.InstructionData(str(tmp_path), template="{instruction} : ", batch_size=4)


def fit(module, data, *callbacks, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(
        callbacks=list(callbacks), **{**quiet, "max_steps": 6, "enable_model_summary": False, **options}
    )
    L.seed_everything(1)
    trainer.fit(module, data)
    return trainer


class Answers(L.Callback):
    """Answers each prompt alone, by transformers' generate and a copy of the model, at some steps."""

    def __init__(self, folder, count):
        self.tokenizer, self.count, self.found = AutoTokenizer.from_pretrained(folder), count, {}

    def on_train_batch_end(self, trainer, module, *_):
        self.found[trainer.global_step] = [self.answer(module, prompt) for prompt in PROMPTS]

    def answer(self, module, prompt):
        if not isinstance(prompt, str):
            prompt = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)[3:]
        ids = torch.tensor([self.tokenizer(prompt)["input_ids"]])  # with the bos token that the template writes too
        model = module.model.eval()
        new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.count)[0, ids.shape[1] :]
        module.train()
        return self.tokenizer.decode(new, skip_special_tokens=True)


def test_answers_are_those_of_each_prompt_alone_at_their_steps(backbone, data, tmp_path):
    module = ls.CausalLM(backbone, ls.SoRA(rank=4, threshold=0.01), max_new_tokens=3)
    reference = Answers(backbone, 7)
    fit(module, data(), ls.GenerationSamples(PROMPTS, every_n_steps=4, max_new_tokens=7), reference)
    assert module.max_new_tokens == 3
    rows = read_lines(tmp_path / "samples.jsonl")
    assert [row["step"] for row in rows] == [0, 0, 0, 4, 4, 4, 6, 6, 6]
    assert [row["prompt"] for row in rows] == SHOWN * 3
    for step, first in ((4, 3), (6, 6)):
        assert [row["answer"] for row in rows[first : first + 3]] == reference.found[step]


def test_a_run_is_bit_for_bit_the_same(backbone, data, tmp_path):
    ends = []
    for callbacks in ([], [ls.GenerationSamples(PROMPTS, every_n_steps=1, max_new_tokens=3)]):
        torch.manual_seed(0)
        module = ls.CausalLM(backbone, ls.LoRA(rank=4, dropout=0.5))
        module.configure_model()
        module.model.generation_config.update(do_sample=True)  # which draws random numbers
        module.model.model.norm.eval()  # a mode of its own
        fit(module, data(), *callbacks)
        draws = [torch.rand(1).item(), np.random.rand(), random.random()]  # noqa: S311
        modes = [part.training for part in module.modules()]
        ends.append(({n: p.detach() for n, p in module.named_parameters() if p.requires_grad}, draws, modes))
    assert (tmp_path / "samples.jsonl").is_file()
    assert ends[0][1:] == ends[1][1:]
    assert all(torch.equal(value, ends[1][0][name]) for name, value in ends[0][0].items())
    assert any(value.any() for name, value in ends[0][0].items() if "lora_B" in name)


def test_a_resumed_run_continues_the_file(backbone, data, tmp_path):
    def samples():
        return ls.GenerationSamples(["the dog"], every_n_steps=2, max_new_tokens=3)

    whole = fit(ls.CausalLM(backbone, ls.LoRA(rank=4)), data(), samples(), max_steps=6)
    expected = read_lines(tmp_path / "samples.jsonl")
    first = fit(ls.CausalLM(backbone, ls.LoRA(rank=4)), data(), samples(), max_steps=3)
    first.save_checkpoint("three.ckpt")
    with Path("samples.jsonl").open("a") as file:  # as a run leaves it that was killed after its last checkpoint
        file.write('{"step": 4, "prompt": "the dog", "answer": "lost"}\n')
    again = L.Trainer(max_steps=6, callbacks=[samples()], logger=False, enable_checkpointing=False, accelerator="cpu")
    again.fit(ls.CausalLM(backbone, ls.LoRA(rank=4)), data(), ckpt_path="three.ckpt")
    assert whole.global_step == again.global_step == 6
    assert [row["step"] for row in expected] == [0, 2, 4, 6]
    rows = read_lines(tmp_path / "samples.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 3, 4, 6]
    assert all(row["answer"] != "lost" for row in rows)


def test_loggers_that_take_text_are_given_it(backbone, data, tmp_path):
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "board")]
    samples = ls.GenerationSamples(PROMPTS[:2], every_n_steps=3, max_new_tokens=4)
    fit(ls.CausalLM(backbone, ls.LoRA(rank=4)), data(), samples, logger=loggers)
    (file,) = tmp_path.rglob("samples.jsonl")
    assert file.is_relative_to(tmp_path / "csv")  # the folder of the first logger is the run's
    (events,) = (tmp_path / "board").rglob("events.out.tfevents.*")
    found = {}
    for record in records(events.read_bytes()):
        event = Event.FromString(record)
        for value in event.summary.value:
            if value.tag.startswith("samples/"):
                found[event.step, value.tag] = value.tensor.string_val[0].decode()
    for number, row in enumerate(read_lines(file)):
        tag = f"samples/{number % 2}/text_summary"
        assert found.pop((row["step"], tag)) == f"{row['prompt']}\n\n---\n\n{row['answer']}"
    assert not found


def records(content):
    """The records of a TFRecord file: length, checksum, data, checksum."""
    while content:
        length = int.from_bytes(content[:8], "little")
        yield content[12 : 12 + length]
        content = content[16 + length :]


def test_from_a_configuration(backbone, data, tmp_path, monkeypatch):
    data()
    samples = {
        "class_path": "lit_sparse.GenerationSamples",
        "init_args": {"prompts": ["the dog", TURNS], "every_n_steps": 4, "max_new_tokens": 4},
    }
    config = write_config(
        tmp_path / "config.yaml",
        {"class_path": "lit_sparse.CausalLM", "init_args": {"backbone": backbone}},
        {"class_path": "lit_sparse.InstructionData", "init_args": {"path": str(tmp_path), "template": "{instruction}"}},
        lr=1e-2,
        max_steps=4,
        callbacks=[samples],
    )
    monkeypatch.setattr("sys.argv", ["lit-sparse"])
    main(["fit", "--config", config])
    (file,) = Path("runs").rglob("samples.jsonl")
    assert [(row["step"], row["prompt"]) for row in read_lines(file)] == [
        (step, prompt) for step in (0, 4) for prompt in ("the dog", SHOWN[2])
    ]


def test_an_encoder_decoder_is_given_sources(tmp_path):
    t5 = save_tiny_t5(tmp_path / "t5")
    rows = [{"source": "a dog", "target": "a cat"}] * 8
    for split in ("train", "validation"):
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    data = ls.Seq2SeqData(str(tmp_path), prefix="so: ", batch_size=4)
    module = ls.Seq2SeqLM(t5, ls.LoRA(rank=2))
    fit(module, data, ls.GenerationSamples(["the dog", "a man has a cat"], 2, max_new_tokens=4), max_steps=2)
    tokenizer = AutoTokenizer.from_pretrained(t5)
    answers = [row["answer"] for row in read_lines(tmp_path / "samples.jsonl")][2:]
    for prompt, answer in zip(["the dog", "a man has a cat"], answers, strict=True):
        made = module.model.eval().generate(**tokenizer(f"so: {prompt}", return_tensors="pt"), max_new_tokens=4)
        assert tokenizer.decode(made[0], skip_special_tokens=True) == answer
    with pytest.raises(ls.UsageError, match="takes prompts that are texts; one of them is a list of messages"):
        data.encode_prompts([TURNS])


def test_what_the_user_is_told(backbone, data, tmp_path):
    with pytest.raises(ls.UsageError, match="at least one prompt; got \\[\\]"):
        ls.GenerationSamples([], 5)
    with pytest.raises(ls.UsageError, match="at least one prompt; got 'the dog'"):
        ls.GenerationSamples("the dog", 5)
    for prompt in (5, ["no message"], TURNS[0]):
        with pytest.raises(ls.UsageError, match=r"^Each of prompts is a text or a list of messages; one is "):
            ls.GenerationSamples(["the dog", prompt], 5)
    with pytest.raises(ls.UsageError, match="every_n_steps must be at least 1"):
        ls.GenerationSamples(["the dog"], 0)
    with pytest.raises(ls.UsageError, match="max_new_tokens must be at least 1"):
        ls.GenerationSamples(["the dog"], 5, max_new_tokens=0)
    module = ls.CausalLM(backbone, ls.LoRA(rank=2))
    made = data()
    with pytest.raises(ls.UsageError, match="do not suit the chat template"):
        fit(module, made, ls.GenerationSamples([[]], 5))
    rows = torch.utils.data.DataLoader([{"input_ids": torch.arange(4), "labels": torch.arange(4)}] * 4, batch_size=2)
    with pytest.raises(ls.UsageError, match=r"has encode_prompts\(prompts\) and decode\(tokens\), .* got NoneType"):
        fit(ls.CausalLM(backbone, ls.LoRA(rank=2)), rows, ls.GenerationSamples(["the dog"], 5))
    with pytest.raises(ls.UsageError, match=r"needs a module that generates.*; this is SparseModule"):
        fit(ls.SparseModule(backbone, ls.LoRA(rank=2)), data(), ls.GenerationSamples(["the dog"], 5))


SCRIPT = """
import sys
import lightning as L
import torch
import lit_sparse as ls

torch.set_num_threads(1)
backbone, data, strategy = sys.argv[1:]
strategies = {"ddp": lambda: "ddp", "fsdp": ls.SparseFSDPStrategy, "fsdp2": ls.SparseFSDP2Strategy}
for samples in (True, False):
    L.seed_everything(0)
    module = ls.CausalLM(backbone, ls.LoRA(rank=4, dropout=0.3))
    module.configure_model()
    module.model.generation_config.update(do_sample=True)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategies[strategy](), max_steps=4, logger=False,
        callbacks=[ls.GenerationSamples(["the dog", "a cat is in the house"], 2, 6)] if samples else [],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=strategy,
    )
    trainer.fit(module, ls.InstructionData(data, template="{instruction} : ", batch_size=2))
    state = [p.detach() for p in module.parameters() if p.requires_grad]
    torch.save(state, f"{strategy}/{samples}_{trainer.global_rank}.pt")
"""


@pytest.mark.slow
def test_several_processes_under_every_strategy(backbone, data, tmp_path):
    data()
    (tmp_path / "script.py").write_text(SCRIPT)
    texts = []
    for strategy in ("ddp", "fsdp", "fsdp2"):
        (tmp_path / strategy).mkdir()
        done = launch(2, ["script.py", backbone, str(tmp_path), strategy], cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-4000:]
        ends = [torch.load(tmp_path / strategy / f"{n}_{rank}.pt") for n in (True, False) for rank in (0, 1)]
        assert all(torch.equal(*pair) for end in ends[1:] for pair in zip(ends[0], end, strict=True))
        rows = read_lines(tmp_path / strategy / "samples.jsonl")
        assert [row["step"] for row in rows] == [0, 0, 2, 2, 4, 4]
        texts.append([row["answer"] for row in rows])
    assert texts[0] == texts[1] == texts[2]
