"""Sounds with a class each."""

import inspect
import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, BinaryIO, ClassVar

from datasets import Audio
from torch import Tensor
from transformers import AutoFeatureExtractor

from lit_sparse.data import quickstart
from lit_sparse.data.media import MediaData, Medium
from lit_sparse.errors import UsageError


@dataclass(frozen=True)
class AudioMedium(Medium):
    """Sounds, decoded by soundfile, resampled by soxr and made ready by a feature extractor."""

    kind: ClassVar[str] = "audio"
    feature: ClassVar[Any] = Audio(decode=False)
    endings: ClassVar[tuple[str, ...]] = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".au", ".caf")

    extractor: Any
    max_seconds: float | None

    def check(self, stream: BinaryIO) -> None:
        """Read the header."""
        import soundfile

        if soundfile.info(stream).frames == 0:
            raise ValueError("it holds no sound")

    def decode(self, stream: BinaryIO) -> Any:
        """Samples at the feature extractor's rate, the mean of all channels, shape ``(samples,)``."""
        import soundfile
        import soxr

        with soundfile.SoundFile(stream) as file:
            rate: int = file.samplerate
            frames = -1 if self.max_seconds is None else math.ceil(self.max_seconds * rate)
            samples = file.read(frames, dtype="float32", always_2d=True).mean(1)
        wanted: int = self.extractor.sampling_rate
        if rate != wanted:
            samples = soxr.resample(samples, rate, wanted)
        return samples if self.max_seconds is None else samples[: round(self.max_seconds * wanted)]

    def batch(self, decoded: list[Any]) -> dict[str, Tensor]:
        """``input_values`` or ``input_features``, and ``attention_mask`` where the feature extractor gives one."""
        arguments = {"sampling_rate": self.extractor.sampling_rate, "return_tensors": "pt"}
        padding = inspect.signature(type(self.extractor).__call__).parameters.get("padding")
        # Others pad of themselves: Whisper's always to the 30 s that its model needs.
        if padding is not None and padding.default is False:
            arguments["padding"] = True
        return dict(self.extractor(decoded, **arguments))


class AudioData(MediaData):
    """Sounds with a class each, from a folder or from the hub; needs ``pip install "lit-sparse[audio]"``.

    Sounds are made mono by the mean of their channels and resampled to the rate of the backbone's feature extractor,
    which makes what the model takes. Batches hold ``input_values`` or ``input_features``, ``attention_mask`` where
    the feature extractor gives one, and ``labels``, class ids (long). A test split whose labels are all -1, as
    benchmarks hide them, gives batches without labels; so does prediction.

    Args:
        path: Where the sounds are: a folder with a folder for each split (train, validation, test, predict) that
            has a folder for each class; a folder of classes alone, which is then the training split; a folder with
            tables named by split (train.parquet …) or laid out like a data set of the hub; or the id of a data set
            on the hub. A table holds sounds or their paths, which start at the working directory.
        name: Configuration of the data set on the hub, where it has several.
        revision: Branch, tag or commit of the data set on the hub; None is its newest state.
        validation_fraction: Share of the training split, in (0, 1), to hold out as validation split where the
            source has none. The rows held out are the same in every run.
        audio: Column of the sounds; folders of sounds call it ``audio``.
        label: Column of the label; folders of sounds call it ``label``.
        labels: Names of the classes in the order of their ids. None takes them from the training split: the names
            that the column itself has, otherwise its sorted distinct values.
        max_seconds: Longest sound in seconds; what is beyond is cut off. None cuts nothing, and the longest sound of
            a batch decides how much memory it takes.
        processor: Hub id or folder of the feature extractor; None is that of the model's ``backbone``.
        batch_size: Training rows per batch and device.
        eval_batch_size: Rows per batch and device in validation, test and prediction; None is the same as
            ``batch_size``, though there is room for more without gradients.
        num_workers: Processes that decode sounds and assemble batches; 0 is this one. A GPU waits for the sounds
            unless there are several.
        seed: Seed of the order of training rows, which depends on it and on the epoch alone.
    """

    _medium_class = AudioMedium

    def __init__(
        self,
        path: str,
        name: str | None = None,
        revision: str | None = None,
        validation_fraction: float | None = None,
        audio: str = "audio",
        label: str = "label",
        labels: list[str] | None = None,
        max_seconds: float | None = None,
        processor: str | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            path=path,
            name=name,
            revision=revision,
            validation_fraction=validation_fraction,
            column=audio,
            label=label,
            labels=labels,
            processor=processor,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        if max_seconds is not None and not max_seconds > 0:
            raise UsageError(f"max_seconds must be above 0; got {max_seconds}.")
        self.max_seconds = max_seconds

    def _load_medium(self, name: str) -> AudioMedium:
        missing = [package for package in ("soundfile", "soxr") if find_spec(package) is None]
        if missing:
            raise UsageError(
                f'Sounds need {" and ".join(missing)}: install the audio extra, pip install "lit-sparse[audio]".'
            )
        try:
            extractor = AutoFeatureExtractor.from_pretrained(quickstart.resolve(name))
        except (ImportError, OSError, ValueError) as error:
            raise UsageError(
                f"The feature extractor of {name!r} could not be loaded ({' '.join(str(error).split())}): give its "
                f"folder as processor, or its hub id while the hub can be reached."
            ) from error
        return AudioMedium(extractor, self.max_seconds)
