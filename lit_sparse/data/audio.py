"""Sounds with a class each."""

import inspect
import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, BinaryIO, ClassVar

from datasets import Audio
from torch import Tensor
from transformers import AutoFeatureExtractor

from lit_sparse.data.media import MediaData, Medium, load_processor
from lit_sparse.errors import UsageError, require_range


@dataclass(frozen=True)
class AudioMedium(Medium):
    """Sounds, decoded by soundfile, resampled by soxr and processed by a feature extractor."""

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
        # Others pad by default: Whisper's always to the 30 s that its model needs.
        if padding is not None and padding.default is False:
            arguments["padding"] = True
        return dict(self.extractor(decoded, **arguments))


@dataclass(kw_only=True, eq=False, repr=False)
class AudioData(MediaData):
    """Sounds with a class each, from a folder or from the hub; needs ``pip install "lit-sparse[audio]"``.

    Sounds are made mono by the mean of their channels and resampled to the rate of the backbone's feature extractor,
    which makes the model inputs. Batches hold ``input_values`` or ``input_features``, ``attention_mask`` where
    the feature extractor gives one, and ``labels``, class ids (long). Test splits whose labels are all hidden
    (-1) give batches without labels; so does prediction.

    Args:
        audio: Column of the sounds; in folders of sounds it is ``audio``.
        max_seconds: Longest sound in seconds; longer ones are cut. With None the longest sound of a batch decides how
            much memory the batch takes.
    """

    audio: str = "audio"
    max_seconds: float | None = None

    _medium_class = AudioMedium

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("max_seconds", self.max_seconds, above=0)

    def _load_medium(self, name: str) -> AudioMedium:
        missing = [package for package in ("soundfile", "soxr") if find_spec(package) is None]
        if missing:
            raise UsageError(
                f'Sounds need {" and ".join(missing)}: install the audio extra, pip install "lit-sparse[audio]".'
            )
        return AudioMedium(load_processor(AutoFeatureExtractor, name), self.max_seconds)
