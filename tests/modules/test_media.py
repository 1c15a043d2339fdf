"""lit_sparse.ImageClassification and AudioClassification, as a user trains, measures and predicts with them."""

import json

import PIL.Image
import pytest
import soundfile
import soxr
import torch
from backbones import build_tiny, save_tiny_vit, save_tiny_wav2vec2
from media_files import STRIPES, TONES, write_stripes, write_tones
from projects import last_figures, read_lines, write_config
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    ConvNextConfig,
    ConvNextForImageClassification,
    HubertConfig,
    HubertForSequenceClassification,
)

import lit_sparse as ls
from lit_sparse.cli.main import main

WRITE = {"image": write_stripes, "audio": write_tones}
NAMES = {"image": list(STRIPES), "audio": list(TONES)}
MODULE = {"image": ls.ImageClassification, "audio": ls.AudioClassification}
DATA = {"image": ls.ImageData, "audio": ls.AudioData}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return {
        "image": save_tiny_vit(tmp_path_factory.mktemp("vit")),
        "audio": save_tiny_wav2vec2(tmp_path_factory.mktemp("wav2vec2"), return_attention_mask=True),
    }


def write_splits(kind, folder, counts):
    for seed, (split, count) in enumerate(counts.items()):
        WRITE[kind](folder / split, count, seed)
    return folder


def one_by_one(kind, module, folder, backbone):
    """Loss, class and true class of each file of a folder of classes, each alone, without our data modules."""
    module.eval()
    rows = []
    for file in sorted(folder.rglob("*.*")):
        if kind == "image":
            inputs = AutoImageProcessor.from_pretrained(backbone)(PIL.Image.open(file), return_tensors="pt")
        else:
            samples, rate = soundfile.read(file, dtype="float32")
            samples = soxr.resample(samples, rate, 16_000)
            extractor = AutoFeatureExtractor.from_pretrained(backbone)
            inputs = extractor(samples, sampling_rate=16_000, return_tensors="pt")
        truth = NAMES[kind].index(file.parent.name)
        with torch.no_grad():
            output = module.model(**inputs, labels=torch.tensor([truth]))
        rows.append((float(output.loss), int(output.logits.argmax()), truth))
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["image", "audio"])
def test_two_classes_are_learned_from_files_by_the_command_line(kind, backbone, tmp_path):
    folder = write_splits(kind, tmp_path / "files", {"train": 96, "validation": 40, "test": 30})
    config = write_config(
        tmp_path / "config.yaml",
        {"class_path": f"lit_sparse.{MODULE[kind].__name__}", "init_args": {"backbone": backbone[kind]}},
        {"class_path": f"lit_sparse.{DATA[kind].__name__}", "init_args": {"path": str(folder), "batch_size": 16}},
        lr=0.01,
        max_epochs=6,
    )
    main(["fit", "--config", config])
    fitted = last_figures()
    assert fitted["val_accuracy"] >= 0.9  # each class is half of the rows

    checkpoint = ["--ckpt_path", "kept/last.ckpt"]
    main(["validate", "--config", config, *checkpoint])
    module = MODULE[kind].load_from_checkpoint("kept/last.ckpt", map_location="cpu")
    module.configure_model()
    rows = one_by_one(kind, module, folder / "validation", backbone[kind])
    accuracy = sum(guess == truth for _, guess, truth in rows) / len(rows)
    assert last_figures()["val_accuracy"] == pytest.approx(accuracy)
    assert last_figures()["val_loss"] == pytest.approx(sum(loss for loss, _, _ in rows) / len(rows), rel=1e-3)
    assert last_figures()["val_accuracy"] == fitted["val_accuracy"]

    main(["test", "--config", config, *checkpoint])
    rows = one_by_one(kind, module, folder / "test", backbone[kind])
    assert last_figures()["test_accuracy"] == pytest.approx(sum(g == t for _, g, t in rows) / len(rows))
    assert last_figures()["test_accuracy"] >= 0.8

    writer = ["--trainer.callbacks+=lit_sparse.PredictionWriter", "--trainer.callbacks.output", "predicted.jsonl"]
    main(["predict", "--config", config, *checkpoint, *writer])
    predicted = read_lines("predicted.jsonl")
    assert [row["prediction"] for row in predicted] == [guess for _, guess, _ in rows]
    assert all(sum(row["probabilities"]) == pytest.approx(1, abs=1e-5) for row in predicted)


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_class_names_come_from_the_folders_and_gates_from_the_method(kind, backbone, tmp_path, trainer):
    folder = write_splits(kind, tmp_path / "files", {"train": 8, "validation": 4})
    module = MODULE[kind](backbone[kind], ls.SoRA(rank=4, sparsity_weight=1.0))
    run = trainer(max_epochs=1)
    run.fit(module, DATA[kind](str(folder), batch_size=4))
    assert module.model.config.id2label == dict(enumerate(NAMES[kind]))
    assert {"val_accuracy", "val_loss", "sparsity/zero_gates"} <= set(run.callback_metrics)
    assert len(list(ls.adapters_in(module))) >= 12  # six linear layers in each of the two blocks
    trained = {name for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    assert {"classifier.weight", "classifier.bias"} <= trained
    assert not any("layernorm" in name for name in trained)


def test_a_broken_file_ends_the_command_in_one_line(backbone, tmp_path, capsys):
    folder = write_splits("image", tmp_path / "files", {"train": 4, "validation": 4})
    (folder / "train" / "vertical" / "1.png").write_bytes(b"")
    config = write_config(
        tmp_path / "config.yaml",
        {"class_path": "lit_sparse.ImageClassification", "init_args": {"backbone": backbone["image"]}},
        {"class_path": "lit_sparse.ImageData", "init_args": {"path": str(folder)}},
        lr=0.01,
    )
    with pytest.raises(SystemExit, match="1"):
        main(["fit", "--config", config])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: Row 2 (counted from 0) of the split 'train'")
    assert "vertical/1.png) cannot be read as image" in last


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_other_architectures_of_the_task_are_trained_as_well(kind, backbone, tmp_path, trainer):
    """A convolutional network and a model whose convolutions are norms of layers, built beforehand."""
    folder = write_splits(kind, tmp_path / "files", {"train": 8, "validation": 4})
    if kind == "image":
        config = ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], image_size=16, num_labels=2)
        model = ConvNextForImageClassification(config)
    else:
        sizes = {"conv_dim": (32, 32), "conv_kernel": (10, 8), "conv_stride": (5, 4), "num_conv_pos_embeddings": 16}
        sizes |= {"num_conv_pos_embedding_groups": 4, "feat_extract_norm": "layer", "mask_time_prob": 0.0}
        model = build_tiny(HubertForSequenceClassification, **sizes)
        assert type(model.config) is HubertConfig
    module, run = MODULE[kind](model, ls.RoseLoRA(rank=4, density=0.5, begin=0, end=2)), trainer(max_epochs=2)
    run.fit(module, DATA[kind](str(folder), batch_size=4, processor=backbone[kind]))
    assert run.global_step == 4
    before = json.dumps(run.callback_metrics, default=float)
    run.validate(module, DATA[kind](str(folder), batch_size=1, processor=backbone[kind]), verbose=False)
    assert float(run.callback_metrics["val_accuracy"]) == json.loads(before)["val_accuracy"]
