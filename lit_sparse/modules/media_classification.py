"""Classify images and sounds."""

from __future__ import annotations

from transformers import AutoModelForAudioClassification, AutoModelForImageClassification

from lit_sparse.modules.classification import Classification


class ImageClassification(Classification):
    """Classify images by models such as ViT, Swin, ConvNeXt and DINOv2.

    Arguments and errors are those of :class:`~lit_sparse.modules.classification.Classification`.
    """

    auto_class = AutoModelForImageClassification


class AudioClassification(Classification):
    """Classify sounds by models such as Wav2Vec2, HuBERT, WavLM, Whisper and AST.

    Arguments and errors are those of :class:`~lit_sparse.modules.classification.Classification`.
    """

    auto_class = AutoModelForAudioClassification
