"""lit_sparse.AudioData on small sound files: decoding, resampling, padding, and bad input."""

import sys

import numpy as np
import pytest
import soundfile
import torch
from backbones import save_tiny_vit, save_tiny_wav2vec2
from datasets import Audio, ClassLabel, Dataset
from media_files import sine, write_tones
from transformers import ASTFeatureExtractor, AutoFeatureExtractor, WhisperFeatureExtractor

from lit_sparse import AudioData, UsageError

RATE = 16_000  # of the feature extractors


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    """One that, like that of wav2vec2-base, gives no mask."""
    return save_tiny_wav2vec2(tmp_path_factory.mktemp("wav2vec2"), return_attention_mask=False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """One that gives the samples as they are, and a mask."""
    return save_tiny_wav2vec2(tmp_path_factory.mktemp("plain"), do_normalize=False, return_attention_mask=True)


@pytest.fixture
def sounds(tmp_path):
    """Write sounds to class folders, as training and as validation split: name → samples, rate."""

    def write(**files):
        for number, (name, (samples, rate)) in enumerate(files.items()):
            for split in ("train", "validation"):
                file = tmp_path / "sounds" / split / f"class{number % 2}" / name.replace("_", ".")
                file.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(file, samples, rate)
        return tmp_path / "sounds"

    return write


@pytest.fixture
def set_up(plain):
    def make(path, stage="fit", **arguments):
        data = AudioData(str(path), **{"processor": plain, **arguments})
        data.setup(stage)
        return data

    return make


def noise(seconds, seed=0, channels=1):
    shape = (round(seconds * RATE), channels) if channels > 1 else round(seconds * RATE)
    return 0.1 * np.random.default_rng(seed).standard_normal(shape)


def unpadded(batch):
    return [row[mask == 1] for row, mask in zip(batch["input_values"], batch["attention_mask"], strict=True)]


# What is in a batch.


@pytest.mark.parametrize("masked", [False, True])
def test_batches_hold_what_the_feature_extractor_makes_of_each_file(masked, sounds, set_up, extractor, tmp_path):
    if masked:
        extractor = save_tiny_wav2vec2(tmp_path / "masked", return_attention_mask=True)
    folder = sounds(a_wav=(noise(0.1), RATE), b_wav=(noise(0.08, seed=1), RATE))
    data = set_up(folder, processor=extractor)
    assert (data.num_labels, data.label_names) == (2, ["class0", "class1"])
    (batch,) = data.val_dataloader()
    read = [
        soundfile.read(folder / "validation" / name, dtype="float32")[0] for name in ("class0/a.wav", "class1/b.wav")
    ]
    expected = AutoFeatureExtractor.from_pretrained(extractor)(
        read, sampling_rate=RATE, padding=True, return_tensors="pt"
    )
    assert sorted(batch) == sorted([*expected, "labels"])
    assert ("attention_mask" in batch) == masked
    torch.testing.assert_close(batch["input_values"], expected["input_values"], rtol=0, atol=1e-6)
    if masked:
        assert batch["attention_mask"].sum(1).tolist() == [1600, 1280]
    assert batch["labels"].tolist() == [0, 1]
    assert len(next(iter(data.train_dataloader()))["labels"]) == 2


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_a_sine_of_another_rate_becomes_the_same_sine_at_the_models(rate, sounds, set_up):
    folder = sounds(a_wav=(sine(440, rate, 0.2), rate), b_wav=(sine(440, RATE, 0.2), RATE))
    (batch,) = set_up(folder).val_dataloader()
    resampled, same = unpadded(batch)
    assert abs(len(resampled) - 3200) <= 1
    wanted = torch.tensor(sine(440, RATE, 0.2), dtype=torch.float32)
    middle = slice(400, 2800)  # at its ends a filter cannot know what came before and what follows
    torch.testing.assert_close(resampled[middle], wanted[middle], rtol=0, atol=2e-4)
    torch.testing.assert_close(same, wanted, rtol=0, atol=3.1e-5)  # a file has 16 bits


def test_what_is_above_half_the_models_rate_does_not_come_back_as_another_tone(sounds, set_up):
    """A tone of 9 kHz would fold to 7 kHz if samples were only left out."""
    folder = sounds(a_wav=(sine(9_000, 48_000, 0.2), 48_000), b_wav=(sine(7_000, RATE, 0.2), RATE))
    too_high, kept = unpadded(next(iter(set_up(folder).val_dataloader())))
    assert too_high[400:2800].abs().max() < 1e-3
    assert kept[400:2800].abs().max() > 0.49


def test_channels_are_averaged(sounds, set_up):
    stereo = noise(0.1, channels=2)
    (batch,) = set_up(sounds(a_wav=(stereo, RATE), b_wav=(noise(0.1), RATE))).val_dataloader()
    expected = torch.tensor((stereo[:, 0] + stereo[:, 1]) / 2, dtype=torch.float32)
    torch.testing.assert_close(batch["input_values"][0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rate", [RATE, 44_100])
def test_long_sounds_are_cut(rate, sounds, set_up):
    folder = sounds(a_wav=(sine(440, rate, 0.3), rate), b_wav=(sine(440, RATE, 0.05), RATE))
    (whole,), (cut,) = (list(set_up(folder, max_seconds=s).val_dataloader()) for s in (None, 0.1))
    assert whole["attention_mask"].sum(1).tolist() == [4800, 800]
    assert cut["attention_mask"].sum(1).tolist() == [1600, 800]
    torch.testing.assert_close(cut["input_values"][0, :1400], whole["input_values"][0, :1400], rtol=0, atol=2e-4)


@pytest.mark.parametrize("ending", ["flac", "ogg", "mp3", "aiff"])
def test_other_kinds_of_files_are_read(ending, sounds, set_up):
    folder = sounds(**{f"a_{ending}": (sine(440, RATE, 0.3), RATE), "b_wav": (sine(440, RATE, 0.3), RATE)})
    compressed, exact = unpadded(next(iter(set_up(folder).val_dataloader())))
    assert len(compressed) >= len(exact)
    assert (compressed[1000:3800] - exact[1000:3800]).abs().max() < (1e-4 if ending in ("flac", "aiff") else 0.05)


@pytest.mark.parametrize("kind", ["whisper", "ast"])
def test_a_feature_extractor_that_pads_of_itself_is_left_to_it(kind, sounds, set_up, tmp_path):
    """Whisper's models take features of one length only, those of AST too."""
    own = WhisperFeatureExtractor(chunk_length=1) if kind == "whisper" else ASTFeatureExtractor(num_mel_bins=32)
    own.save_pretrained(tmp_path / "own")
    folder = sounds(a_wav=(noise(0.3), RATE), b_wav=(noise(0.2), RATE))
    (batch,) = set_up(folder, processor=str(tmp_path / "own")).val_dataloader()
    read = [
        soundfile.read(folder / "validation" / name, dtype="float32")[0] for name in ("class0/a.wav", "class1/b.wav")
    ]
    expected = own(read, sampling_rate=RATE, return_tensors="pt")
    (name,) = expected
    assert batch[name].shape == {"whisper": (2, 80, 100), "ast": (2, 1024, 32)}[kind]
    torch.testing.assert_close(batch[name], expected[name], rtol=0, atol=1e-5)


def test_sounds_in_a_table_of_the_hubs_form(tmp_path, set_up):
    write_tones(tmp_path / "tones", 4)
    files = sorted((tmp_path / "tones").rglob("*.wav"))
    rows = Dataset.from_dict(
        {"speech": [{"bytes": f.read_bytes(), "path": f.name} for f in files], "label": [0, 0, 1, 1]}
    )
    rows = rows.cast_column("speech", Audio(sampling_rate=8_000)).cast_column("label", ClassLabel(names=["up", "down"]))
    rows.to_parquet(tmp_path / "hub" / "train.parquet")
    rows.to_parquet(tmp_path / "hub" / "validation.parquet")
    (from_table,) = set_up(tmp_path / "hub", audio="speech").val_dataloader()
    (tmp_path / "tones").rename(tmp_path / "validation")
    data = set_up(tmp_path, "validate", labels=["high", "low"])
    (from_folder,) = data.val_dataloader()
    for name in ("input_values", "attention_mask", "labels"):
        assert torch.equal(from_table[name], from_folder[name])


# Errors.


def assert_refused(match, set_up, path, stage="fit", **arguments):
    with pytest.raises(UsageError, match=match) as caught:
        set_up(path, stage, **arguments)
    assert "\n" not in str(caught.value)


@pytest.fixture
def folder(sounds):
    return sounds(a_wav=(noise(0.1), RATE), b_wav=(noise(0.1), RATE))


def test_a_file_that_is_no_sound_is_named_before_training(folder, set_up):
    (folder / "train" / "class1" / "c.mp3").write_text("<html>not found</html>")
    assert_refused(r"Row 2 .* 'train' \(.*class1/c\.mp3\) cannot be read as audio \(", set_up, folder)


def test_a_file_without_sound_is_named(folder, set_up):
    soundfile.write(folder / "train" / "class0" / "0.wav", np.zeros(0), RATE)
    assert_refused(r"class0/0\.wav\) cannot be read as audio \(it holds no sound\)", set_up, folder)


def test_a_class_without_training_sounds_names_the_file(folder, set_up):
    (folder / "validation" / "class1").rename(folder / "validation" / "class2")
    assert_refused(r"class2/b\.wav\) has the label 'class2' in the column 'label', which is none", set_up, folder)


@pytest.mark.parametrize("package", ["soundfile", "soxr"])
def test_without_its_packages_the_extra_is_named(package, folder, set_up, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert_refused(rf'need {package}: install the audio extra, pip install "lit-sparse\[audio\]"', set_up, folder)


def test_a_processor_must_be_for_sounds(folder, set_up, tmp_path):
    vit = save_tiny_vit(tmp_path / "vit")
    assert_refused("processor '.*vit' could not be loaded", set_up, folder, processor=vit)
    assert_refused("No processor is given", set_up, folder, processor=None)


@pytest.mark.parametrize("max_seconds", [0.0, -1.0, float("nan")])
def test_max_seconds_is_a_length(max_seconds, folder):
    with pytest.raises(UsageError, match="max_seconds must be above 0; got"):
        AudioData(str(folder), max_seconds=max_seconds)
