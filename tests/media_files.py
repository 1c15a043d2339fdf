"""Small image and sound files of two classes that a tiny model can tell apart."""

from pathlib import Path

import numpy as np
import PIL.Image
import soundfile

STRIPES = ("horizontal", "vertical")
TONES = {"high": 1500, "low": 400}  # Hz


def write_stripes(folder: Path, count: int, seed: int = 0) -> None:
    """``folder/horizontal/0.png`` …: noise of 20 × 24 pixels with dark stripes, anywhere along their direction."""
    draw = np.random.default_rng(seed)
    for number in range(count):
        direction = number % 2
        pixels = draw.integers(0, 256, (20, 24, 3))
        dark = (np.arange(pixels.shape[direction]) + draw.integers(8)) // 4 % 2 == 1
        pixels[(slice(None),) * direction + (dark,)] //= 4
        file = folder / STRIPES[direction] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels.astype(np.uint8)).save(file)


def write_tones(folder: Path, count: int, seed: int = 0) -> None:
    """``folder/high/0.wav`` …: tones in noise, of 0.08 to 0.12 s, half of them at 16 kHz, the others at 22.05."""
    draw = np.random.default_rng(seed)
    for number in range(count):
        name = list(TONES)[number % 2]
        rate = (16_000, 22_050)[number // 2 % 2]
        samples = sine(TONES[name] * draw.uniform(0.9, 1.1), rate, draw.uniform(0.08, 0.12), draw.uniform(0, 6))
        file = folder / name / f"{number}.wav"
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(file, samples + 0.05 * draw.standard_normal(len(samples)), rate)


def sine(frequency: float, rate: int, seconds: float, phase: float = 0.0) -> np.ndarray:
    """A tone of amplitude one half."""
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate + phase)
