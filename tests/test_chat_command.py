"""``lit-sparse chat``: what a model says, from every place where it is stored."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import programs
import pytest
import torch
from backbones import save_tiny_bert, save_tiny_llama, save_tiny_t5
from chat_templates import BY_HAND, save_chat_tokenizer
from language_models import FORMS, save_language_model
from trained import save_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

import lit_sparse as ls
from lit_sparse.cli.main import main
from lit_sparse.interchange.processors import keep_chat_format
from lit_sparse.serving.language_models import open_language_model


@pytest.fixture(autouse=True)
def _as_from_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lit-sparse"])
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """Paths of a model whose tokenizer has a chat template."""
    return save_language_model(tmp_path_factory.mktemp("chatty"), chat=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Paths of a model whose tokenizer has none."""
    return save_language_model(tmp_path_factory.mktemp("plain"), chat=False)


@pytest.fixture
def told(capsys):
    """Run ``chat`` in this process, and give back what it wrote."""

    def run(*words):
        capsys.readouterr()
        main(["chat", *words])
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(capsys):
    def run(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["chat", *words])
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        return ended.value.code, line

    return run


def by_transformers(folder, text, count, **options):
    """The text that transformers' own generate adds to ``text``, as it is tokenised."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    mask = torch.ones_like(ids)
    made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count, **{"do_sample": False, **options})
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("form", FORMS)
def test_a_greedy_answer_is_that_of_the_merged_model(form, chatty, told):
    text = "<s>system: a warm cat\nuser: who is the dog\nassistant: "
    expected = by_transformers(chatty["merged"], text, 12)
    assert expected != by_transformers(chatty["base"], text, 12)
    words = ["--prompt", "who is the dog", "--system", "a warm cat", "--max-new-tokens", "12"]
    assert told(chatty[form], *words) == expected + "\n"


def test_a_prompt_without_template_is_continued(plain, told):
    expected = [by_transformers(plain["merged"], f"<s>{text}", 8) for text in ("the dog", "a cat")]
    prompts = ["--prompt", "the dog", "--prompt", "a cat", "--max_new_tokens", "8"]
    assert told(plain["checkpoint"], *prompts) == f"> the dog\n{expected[0]}\n> a cat\n{expected[1]}\n"


@pytest.mark.parametrize("form", ["checkpoint", "peft", "sparse"])
def test_compare_answers_without_the_adapters_too(form, plain, told):
    without, live = (by_transformers(plain[kind], "<s>the dog", 8) for kind in ("base", "merged"))
    words = ["--compare", plain[form], "--prompt", "the dog", "--max_new_tokens", "8"]
    assert told(*words) == f"Without adapters:\n{without}\nWith adapters:\n{live}\n"


def test_sampling_is_repeatable_and_comparing_changes_no_answer(plain, told):
    words = [plain["checkpoint"], "--prompt", "the dog", "--max_new_tokens", "8", "--temperature", "1.3"]
    first, again = told(*words), told(*words)
    assert first == again
    assert first != told(*words, "--seed", "1")
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 1.3, "top_k": 0}
    assert first == by_transformers(plain["merged"], "<s>the dog", 8, **options) + "\n"
    assert told(*words, "--compare").endswith(f"With adapters:\n{first}")
    # The most likely token alone is within a share this small.
    greedy = told(*words[:-2])
    assert told(*words, "--top_p", "1e-6") == greedy != first


def test_tokens_that_were_added_in_training(plain, told, tmp_path):
    module = ls.CausalLM(plain["base"], ls.LoRA(rank=2), new_tokens=["<person>"])
    checkpoint = save_checkpoint(module, tmp_path / "run.ckpt", std=1.0)
    ls.export_checkpoint(checkpoint, "merged", format="merged")
    ids = open_language_model(checkpoint).tokenizer("<person>", add_special_tokens=False)["input_ids"]
    assert len(ids) == 1
    expected = by_transformers("merged", "<s><person> is", 8)
    assert told(checkpoint, "--prompt", "<person> is", "--max_new_tokens", "8") == expected + "\n"


def test_the_chat_format_of_the_training_is_used(tmp_path):
    """Its template, not that of the backbone's tokenizer, and its end of a turn, which the backbone does not know."""
    base = save_tiny_llama(tmp_path / "base", vocab_size=448)
    save_chat_tokenizer(base, BY_HAND["Phi"][0])
    module = ls.CausalLM(base, ls.LoRA(rank=2))
    module.configure_model()
    end = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("<|im_end|>")
    template = BY_HAND["ChatML"][0]
    keep_chat_format(module.model, {"template": template, "end": "<|im_end|>", "end_id": end})
    checkpoint = save_checkpoint(module, tmp_path / "run.ckpt", std=1.0)
    for form in ("peft", "sparse", "merged"):
        ls.export_checkpoint(checkpoint, form, format=form)
    for source in (checkpoint, "peft", "sparse", "merged"):
        opened = open_language_model(source)
        assert opened.tokenizer.chat_template == template, source
        assert end in opened.model.generation_config.eos_token_id, source


@pytest.mark.filterwarnings("ignore:.*was trained on")
def test_a_backbone_that_was_moved(plain, told, refused, tmp_path):
    moved = tmp_path / "moved"
    Path(plain["base"]).rename(moved)
    words = ["--prompt", "the dog", "--max_new_tokens", "4"]
    try:
        for form in ("checkpoint", "peft", "sparse"):
            status, line = refused(plain[form], *words)
            assert status == 1
            assert f"{plain['base']!r} does not exist" in line
            assert told(plain[form], *words, "--backbone", str(moved)) == told(plain["merged"], *words)
    finally:
        moved.rename(plain["base"])


def test_wrong_sources_and_options_get_one_line(plain, chatty, refused, tmp_path, monkeypatch):
    ask = ["--prompt", "the dog"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("no checkpoint")
    bert, t5 = save_tiny_bert(tmp_path / "bert"), save_tiny_t5(tmp_path / "t5")
    of_bert = save_checkpoint(ls.SequenceClassification(bert, ls.LoRA(rank=2), num_labels=2), tmp_path / "bert.ckpt")
    pissa = ls.CausalLM(plain["base"], ls.LoRA(rank=2, init_weights="pissa"))
    cases = [
        (["empty"], "'empty' holds neither adapters nor a model. Give a checkpoint file"),
        (["./nowhere"], "'./nowhere' does not exist. Give a checkpoint file"),
        (["last.ckpt"], "'last.ckpt' does not exist. Give a checkpoint file"),
        (["nowhere"], "The backbone 'nowhere' cannot be loaded"),
        (["note.txt"], "'note.txt' cannot be read as a checkpoint"),
        ([bert], "BertForSequenceClassification, which does not continue a text"),
        ([t5], "T5ForConditionalGeneration, which does not continue a text"),
        ([of_bert], "BertForSequenceClassification, which does not continue a text"),
        ([f"{plain['peft']}/adapter_model.safetensors"], f"give the folder, {plain['peft']!r}"),
        ([plain["merged"], "--compare"], f"compare switches adapters off, and {plain['merged']!r} has none"),
        ([plain["delta"], "--compare"], f"compare switches adapters off, and {plain['delta']!r} has none"),
        ([save_checkpoint(pissa, tmp_path / "pissa.ckpt"), "--compare"], "(init_weights 'pissa' or 'lora_ga')"),
        ([plain["merged"], "--backbone", plain["base"]], "is a whole model: leave it out"),
        ([plain["merged"], "--system", "be kind"], "has no chat template for a system message"),
        ([plain["merged"], "--top_p", "0.9"], "temperature is 0, which is greedy: set a temperature"),
        ([plain["merged"], "--temperature", "-1"], "temperature must be at least 0"),
        ([plain["merged"], "--max_new_tokens", "600"], "more than the 512 that the model can take"),
    ]
    for words, message in cases:
        status, line = refused(*words, *ask)
        assert (status, message in line) == (1, True), line
    status, line = refused(plain["merged"], *ask, "--max-new-token", "1")
    assert (status, "Did you mean --max_new_tokens?" in line) == (2, True), line
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert "There is nothing to answer: give --prompt" in refused(plain["merged"])[1]


# In a process of its own.


@pytest.mark.slow
def test_standard_input_is_one_prompt(chatty, tmp_path):
    (tmp_path / "ask.txt").write_text("who is\nthe dog\n")
    expected = by_transformers(chatty["merged"], "<s>user: who is\nthe dog\nassistant: ", 6)
    with (tmp_path / "ask.txt").open() as stream:
        words = ["-m", "lit_sparse", "chat", chatty["peft"], "--max_new_tokens", "6"]
        done = programs.run(words, stdin=stream)
    assert (done.returncode, done.stdout) == (0, expected + "\n"), done.stderr


class Terminal:
    """``chat`` on a terminal of its own."""

    def __init__(self, *words):
        self._end, program = pty.openpty()
        self.text = ""
        command = ["-m", "lit_sparse", "chat", *words]
        self.program = programs.Program(command, stdin=program, stdout=program, stderr=program)
        os.close(program)

    def wait_for(self, pattern, seconds=120):
        """Read until the unread text matches; gives back what was read."""
        ends = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < ends, self.text
            if select.select([self._end], [], [], 1)[0]:
                self.text += os.read(self._end, 4096).decode().replace("\r\n", "\n")
        read, self.text = self.text[: found.end()], self.text[found.end() :]
        return read

    def type(self, text):
        os.write(self._end, text.encode())

    def close(self):
        self.program.kill()
        os.close(self._end)


@pytest.fixture
def terminal(chatty):
    shown = Terminal(chatty["checkpoint"], "--max_new_tokens", "5")
    shown.wait_for(r"/reset begins a new conversation.*\n.*> ")
    yield shown
    shown.close()


@pytest.mark.slow
def test_turns_are_remembered_until_reset(chatty, terminal):
    first = by_transformers(chatty["merged"], "<s>user: the dog\nassistant: ", 5)
    second = by_transformers(chatty["merged"], f"<s>user: the dog\nassistant: {first}\nuser: a cat\nassistant: ", 5)
    alone = by_transformers(chatty["merged"], "<s>user: a cat\nassistant: ", 5)
    assert second != alone
    for text, answered in (("the dog", first), ("a cat", second), ("/reset", None), ("a cat", alone)):
        terminal.type(f"{text}\n")
        told = terminal.wait_for(r"> $")
        if answered is not None:
            assert answered in told
    terminal.type(f"{'a dog ' * 300}\n")  # which is no reason to leave
    terminal.wait_for(r"more than the 512 that the model can take.*\n.*> $")
    terminal.type("/exit\n")
    assert terminal.program.wait(60) == 0


@pytest.mark.slow
def test_ctrl_d_leaves(terminal):
    terminal.type("\x04")
    assert terminal.program.wait(60) == 0
    assert "Traceback" not in terminal.text


@pytest.mark.slow
def test_ctrl_c_leaves(terminal):
    for _ in range(4):  # Python misses a signal between its prompt and its wait for a key
        terminal.program.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            assert terminal.program.wait(15) == 0
            break
    assert terminal.program.poll() == 0
    assert "Traceback" not in terminal.text
