"""Classify images and sounds."""

from __future__ import annotations

from transformers import AutoModelForAudioClassification, AutoModelForImageClassification

from lit_sparse.modules.classification import Classification


class ImageClassification(Classification):
    """Classification of images, by such as ViT, Swin, ConvNeXt and DINOv2.

    Arguments and errors are those of :class:`Classification`.
    """

    auto_class = AutoModelForImageClassification


class AudioClassification(Classification):
    """Classification of sounds, by such as Wav2Vec2, HuBERT, WavLM, Whisper and AST.

    Arguments and errors are those of :class:`Classification`.
    """

    auto_class = AutoModelForAudioClassification
