"""`lit-sparse inspect`: what it says, and that it needs neither weights nor the machine that the run is for."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from backbones import build_tiny, save_tiny_bert
from torch import nn
from transformers import BertForSequenceClassification, GPT2LMHeadModel, MixtralForCausalLM

import lit_sparse as ls
from lit_sparse.cli.main import main
from lit_sparse.reporting.dry_run import describe


@pytest.fixture(autouse=True)
def _as_from_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lit-sparse"])
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def config(tmp_path):
    folder = tmp_path / "bert"
    save_tiny_bert(folder)
    (folder / "model.safetensors").unlink()  # a dry run reads no weights
    rows = [f"{text},{label}" for text, label in [("a good film", "yes"), ("bad", "no"), ("so so", "maybe")] * 4]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.csv").write_text("\n".join(["text,label", *rows]))
    settings = {
        "model": {
            "class_path": "lit_sparse.SequenceClassification",
            "init_args": {
                "backbone": str(folder),
                "method": {"class_path": "lit_sparse.SoRA", "init_args": {"rank": 2, "threshold": 0.01}},
            },
        },
        "data": {"class_path": "lit_sparse.TextClassificationData", "init_args": {"path": str(tmp_path)}},
        # Of a cluster that this machine is not.
        "trainer": {"accelerator": "gpu", "devices": 8, "num_nodes": 4, "strategy": "fsdp", "precision": "bf16-true"},
        "ckpt_path": None,  # as in the configurations that fit writes
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def test_it_lists_layers_and_counts_without_weights_or_gpus(config, capsys):
    main(["inspect", "--config", config, "--model.init_args.method.init_args.overrides", '{"query": {"rank": 4}}'])
    text = capsys.readouterr().out
    # Per block: query of rank 4, three more of width 32, and two of 32 → 64 and back, of rank 2; two blocks, a pooler.
    query, square, wide = 4 * 64 + 4, 2 * 64 + 2, 2 * 96 + 2
    assert re.search(rf"query +× 2 +{2 * query} +Linear 32 → 32, rank 4, gated\n", text)
    assert re.search(rf"bert\.encoder\.layer\.\*\.intermediate\.dense +× 2 +{2 * wide} +Linear 32 → 64, rank 2", text)
    total = 2 * (query + 3 * square + 2 * wide) + square
    assert re.search(rf"classifier +{3 * 32 + 3} +trained whole", text)  # three labels, learned from the rows
    assert f"{total:,} adapter and {3 * 32 + 3} other parameters are trained" in text
    frozen = sum(
        p.numel() for p in BertForSequenceClassification.from_pretrained(save_tiny_bert("whole")).bert.parameters()
    )
    assert f"{frozen:,} are frozen" in text
    assert re.search(r"bert.embeddings.word_embeddings +is no linear layer", text)
    assert not list(Path().glob("**/*.ckpt"))
    assert not Path("lightning_logs").exists()


def test_layers_may_be_one_number(config, capsys):
    main(["inspect", "--config", config, "--model.init_args.method.init_args.layers", "1"])
    assert re.search(r"Adapted: 6 layers\n.*bert\.encoder\.layer\.1\.attention", capsys.readouterr().out)


def test_a_wrong_target_ends_in_one_line(config, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["inspect", "--config", config, "--model.init_args.method.init_args.target_modules", "[quary]"])
    assert caught.value.code == 1
    assert "target_modules 'quary' matches no linear layer" in capsys.readouterr().err


def test_a_checkpoint_is_not_for_it(config, capsys):
    Path("last.ckpt").write_bytes(b"PK")
    with pytest.raises(SystemExit):
        main(["inspect", "--config", config, "--ckpt_path", "last"])
    assert "omit ckpt_path" in capsys.readouterr().err


def test_experts_and_tied_layers_have_their_lines():
    model = build_tiny(MixtralForCausalLM, num_local_experts=3)
    ls.inject(model, ls.SoRA(["q_proj", "down_proj"], rank=2, threshold=0.1))
    text = describe(model)
    assert re.search(r"layers\.\*\.mlp\.experts\.down_proj +× 2 +[\d,]+ +Experts 3 × \d+ → 32, rank 2, gated", text)
    assert re.search(r"layers\.\*\.mlp\.experts\.gate_up_proj +× 2 +is not named by target_modules", text)
    model = build_tiny(GPT2LMHeadModel)
    ls.inject(model, ls.LoRA())
    assert re.search(r"lm_head +shares its weight with 'transformer.wte'", describe(model))


def test_the_shares_add_up():
    model = build_tiny(BertForSequenceClassification)
    whole = sum(p.numel() for p in model.parameters())
    ls.inject(model, ls.LoRA(["query"], rank=1))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = re.search(
        r"([\d,]+) adapter and ([\d,]+) other parameters are trained, ([\d.]+)% of all; ([\d,]+)", describe(model)
    )
    adapter, other, share, frozen = (float(part.replace(",", "")) for part in found.groups())
    assert adapter + other == trained
    assert frozen + other == whole
    assert share == pytest.approx(100 * trained / (trained + frozen), abs=0.005)


def test_a_model_without_adapters_has_nothing_to_list():
    with pytest.raises(ls.UsageError, match="Linear holds no adapter to list"):
        describe(nn.Linear(2, 2))


def test_a_backbone_on_the_meta_device_takes_no_weights(tmp_path):
    folder = save_tiny_bert(tmp_path / "bert")
    with torch.device("meta"):
        module = ls.SequenceClassification(folder, ls.RoseLoRA(rank=2), num_labels=5)
        module.configure_model()
    assert all(p.is_meta for p in module.parameters())
    assert module.model.classifier.weight.shape == (5, 32)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("0.25", "at most {quarter:,} of {all:,} parameters"),
        ("400", "at most 400 of {all:,} parameters"),
        ("0.5k", "at most 500 of {all:,} parameters"),
        ("2kB", "at most 2,000 of {bytes:,} bytes"),
    ],
)
def test_it_says_what_a_budget_comes_to(budget, said, config, capsys):
    method = "--model.init_args.method.init_args"
    main(["inspect", "--config", config, f"{method}.threshold", "null", f"{method}.budget", budget])
    parameters = 2 * (9 * 64 + 4 * 96)  # rank 2 of nine layers of 32 → 32, and four of 32 → 64 and back
    numbers = {"quarter": parameters // 4, "all": parameters, "bytes": 4 * parameters}
    assert f"The budget leaves {said.format(**numbers)} of A and B from end=0.5 on.\n" in capsys.readouterr().out
