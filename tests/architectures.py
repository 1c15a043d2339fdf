"""One tiny model of every architecture that the library is checked with, and a batch for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

Batch = dict[str, Any]
TOKENS = 96
IDS = {"vocab_size": TOKENS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Architecture:
    """A random model of width 16 with two layers, and a batch of two rows with labels.

    Args:
        name: As its users know it.
        model_class: Name of the class in transformers, with a task head where the architecture has one.
        batch: Makes the batch.
        config: Fields of its configuration.
        head: Modules outside the pretrained body, which a task trains whole.
        idle: Start of the names of layers that the model holds and never calls.
    """

    name: str
    model_class: str
    batch: Callable[[], Batch]
    config: dict[str, Any] = field(default_factory=dict)
    head: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()

    def build(self) -> PreTrainedModel:
        """The model in float32, always the same, without dropout, in training mode."""
        model_class = getattr(transformers, self.model_class)
        config = model_class.config_class(**self.config)
        _without_dropout(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return model_class(config).train()


def _without_dropout(config: PreTrainedConfig) -> None:
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            _without_dropout(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


def _random(make: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return make(*arguments, generator=torch.Generator().manual_seed(0))


def tokens(length: int = 6) -> Tensor:
    """Two rows of token numbers, without special ones."""
    return _random(torch.randint, 5, TOKENS - 5, (2, length))


def classified_text() -> Batch:
    return {"input_ids": tokens(), "attention_mask": torch.ones(2, 6, dtype=torch.long), "labels": torch.tensor([0, 1])}


def text() -> Batch:
    return {"input_ids": tokens(), "labels": tokens()}


def text_pair() -> Batch:
    return {"input_ids": tokens(12), "labels": tokens(8)}


def classified_image() -> Batch:
    return {"pixel_values": _random(torch.randn, (2, 3, 32, 32)), "labels": torch.tensor([0, 1])}


def captioned_image() -> Batch:
    return {"input_ids": tokens(), "pixel_values": _random(torch.randn, (2, 3, 32, 32)), "return_loss": True}


def image_in_text() -> Batch:
    input_ids = tokens(8)
    input_ids[:, 1:5] = IMAGE_TOKEN
    return {"input_ids": input_ids, "pixel_values": _random(torch.randn, (2, 3, 32, 32)), "labels": tokens(8)}


def spectrogram() -> Batch:
    return {"input_features": _random(torch.randn, (2, 8, 16)), "labels": tokens(4)}


def waveform() -> Batch:
    return {"input_values": _random(torch.randn, (2, 160)), "labels": tokens(3)}


def classified_waveform() -> Batch:
    return {"input_values": _random(torch.randn, (2, 160)), "labels": torch.tensor([0, 1])}


IMAGE_TOKEN = TOKENS - 1
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
ENCODER = {**IDS, **SIZE, "max_position_embeddings": 32}
DECODER = {**ENCODER, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": False}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
DEBERTA = {**ENCODER, "type_vocab_size": 0, "relative_attention": True, "position_buckets": 8}
DEBERTA |= {"norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"]}
DEBERTA |= {"position_biased_input": False, "pooler_hidden_size": 16}
GPT = {**IDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "n_positions": 32}
T5 = {**IDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
SEQ2SEQ = {**IDS, "d_model": 16, "decoder_start_token_id": 2, "max_position_embeddings": 32}
SEQ2SEQ |= {f"{half}_layers": 2 for half in ("encoder", "decoder")}
SEQ2SEQ |= {f"{half}_attention_heads": 2 for half in ("encoder", "decoder")}
SEQ2SEQ |= {f"{half}_ffn_dim": 24 for half in ("encoder", "decoder")}
VISION = {**SIZE, "image_size": 32, "patch_size": 16}
TEXT_AND_IMAGE = {"text_config": ENCODER, "vision_config": VISION, "projection_dim": 16}
SPEECH = {**ENCODER, "conv_dim": [16, 16], "conv_kernel": [8, 3], "conv_stride": [4, 2], "num_feat_extract_layers": 2}
SPEECH |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False}
SPEECH |= {"classifier_proj_size": 16}
MAMBA = {**IDS, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "expand": 2, "conv_kernel": 4}

ARCHITECTURES = [
    # Encoders of text
    Architecture("BERT", "BertForSequenceClassification", classified_text, ENCODER, head=("classifier",)),
    Architecture("RoBERTa", "RobertaForSequenceClassification", classified_text, ENCODER, head=("classifier",)),
    Architecture("XLM-R", "XLMRobertaForSequenceClassification", classified_text, ENCODER, head=("classifier",)),
    Architecture(
        "DeBERTa-v2",
        "DebertaV2ForSequenceClassification",
        classified_text,
        {**DEBERTA, "conv_kernel_size": 3},
        head=("pooler", "classifier"),
    ),
    Architecture(
        "DeBERTa-v3", "DebertaV2ForSequenceClassification", classified_text, DEBERTA, head=("pooler", "classifier")
    ),
    Architecture(
        "ELECTRA",
        "ElectraForSequenceClassification",
        classified_text,
        {**ENCODER, "embedding_size": 8},
        head=("classifier",),
    ),
    Architecture(
        "ModernBERT",
        "ModernBertForSequenceClassification",
        classified_text,
        {**ENCODER, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2, "local_attention": 4},
        head=("head", "classifier"),
    ),
    Architecture(
        "DistilBERT",
        "DistilBertForSequenceClassification",
        classified_text,
        {**IDS, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 32},
        head=("pre_classifier", "classifier"),
    ),
    Architecture(
        "ALBERT",
        "AlbertForSequenceClassification",
        classified_text,
        {**ENCODER, "embedding_size": 8},
        head=("classifier",),
    ),
    Architecture("MPNet", "MPNetForSequenceClassification", classified_text, ENCODER, head=("classifier",)),
    Architecture(
        "XLNet",
        "XLNetForSequenceClassification",
        classified_text,
        {**IDS, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24},
        head=("sequence_summary", "logits_proj"),
    ),
    # Decoders of text
    Architecture("GPT-2", "GPT2LMHeadModel", text, GPT),
    Architecture("GPT-J", "GPTJForCausalLM", text, {**GPT, "rotary_dim": 4}),
    Architecture("GPT-NeoX / Pythia", "GPTNeoXForCausalLM", text, ENCODER),
    Architecture("OPT", "OPTForCausalLM", text, {**ENCODER, "ffn_dim": 24, "word_embed_proj_dim": 8}),
    Architecture("BLOOM", "BloomForCausalLM", text, {**IDS, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    Architecture("Falcon", "FalconForCausalLM", text, {**ENCODER, "ffn_hidden_size": 24}),
    Architecture("Llama", "LlamaForCausalLM", text, DECODER),
    Architecture("Mistral", "MistralForCausalLM", text, DECODER),
    Architecture("Qwen2", "Qwen2ForCausalLM", text, DECODER),
    Architecture("Qwen3", "Qwen3ForCausalLM", text, DECODER),
    Architecture("Gemma", "GemmaForCausalLM", text, {**DECODER, "tie_word_embeddings": True}),
    Architecture("Gemma 2", "Gemma2ForCausalLM", text, {**DECODER, "tie_word_embeddings": True}),
    Architecture("Gemma 3", "Gemma3ForCausalLM", text, {**DECODER, "tie_word_embeddings": True}),
    Architecture("Phi", "PhiForCausalLM", text, {**DECODER, "num_key_value_heads": 2}),
    Architecture("Phi-3", "Phi3ForCausalLM", text, DECODER),
    Architecture("OLMo 2", "Olmo2ForCausalLM", text, DECODER),
    Architecture("StableLM", "StableLmForCausalLM", text, DECODER),
    # Mixtures of experts
    Architecture("Mixtral", "MixtralForCausalLM", text, {**DECODER, **EXPERTS}),
    Architecture(
        "Qwen2-MoE", "Qwen2MoeForCausalLM", text, {**DECODER, **EXPERTS, "shared_expert_intermediate_size": 12}
    ),
    Architecture("Qwen3-MoE", "Qwen3MoeForCausalLM", text, {**DECODER, **EXPERTS}),
    Architecture("GPT-OSS", "GptOssForCausalLM", text, {**DECODER, **EXPERTS}),
    Architecture(
        "DeepSeek-V3",
        "DeepseekV3ForCausalLM",
        text,
        {
            **{**DECODER, "num_key_value_heads": 2, "head_dim": 4},
            **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_group": 2},
            **{"topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8},
            **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
        },
    ),
    Architecture("Granite-MoE", "GraniteMoeForCausalLM", text, {**DECODER, **EXPERTS}),
    Architecture(
        "Switch Transformers",
        "SwitchTransformersForConditionalGeneration",
        text_pair,
        {
            **{**T5, "num_decoder_layers": 2, "num_experts": 4, "router_jitter_noise": 0.0},
            **{"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        },
    ),
    # State spaces
    Architecture("Mamba", "MambaForCausalLM", text, MAMBA),
    Architecture(
        "Mamba-2", "Mamba2ForCausalLM", text, {**MAMBA, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4}
    ),
    Architecture(
        "Jamba",
        "JambaForCausalLM",
        text,
        {
            **{**DECODER, **EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
            **{"expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 2, "use_mamba_kernels": False},
        },
    ),
    # Text to text
    Architecture("T5", "T5ForConditionalGeneration", text_pair, T5),
    Architecture(
        "mT5 / Flan-T5",
        "MT5ForConditionalGeneration",
        text_pair,
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    Architecture("BART", "BartForConditionalGeneration", text_pair, SEQ2SEQ),
    Architecture("mBART", "MBartForConditionalGeneration", text_pair, SEQ2SEQ),
    Architecture("Pegasus", "PegasusForConditionalGeneration", text_pair, SEQ2SEQ),
    # Images
    Architecture("ViT", "ViTForImageClassification", classified_image, VISION, head=("classifier",)),
    Architecture(
        "Swin",
        "SwinForImageClassification",
        classified_image,
        {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4},
        head=("classifier",),
    ),
    Architecture(
        "ConvNeXt",
        "ConvNextForImageClassification",
        classified_image,
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32},
        head=("classifier",),
    ),
    Architecture("BEiT", "BeitForImageClassification", classified_image, VISION, head=("classifier",)),
    Architecture(
        "DINOv2", "Dinov2ForImageClassification", classified_image, {**VISION, "mlp_ratio": 2}, head=("classifier",)
    ),
    # Images and text
    Architecture("CLIP", "CLIPModel", captioned_image, TEXT_AND_IMAGE),
    Architecture("SigLIP", "SiglipModel", captioned_image, TEXT_AND_IMAGE),
    Architecture(
        "LLaVA",
        "LlavaForConditionalGeneration",
        image_in_text,
        {
            **{"text_config": {**DECODER, "model_type": "llama"}, "image_token_index": IMAGE_TOKEN},
            **{"vision_config": {**VISION, "model_type": "clip_vision_model", "projection_dim": 16}},
        },
        idle=("model.vision_tower.encoder.layers.1.",),
    ),
    # Sound
    Architecture(
        "Whisper",
        "WhisperForConditionalGeneration",
        spectrogram,
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16},
    ),
    Architecture("Wav2Vec2", "Wav2Vec2ForCTC", waveform, SPEECH, head=("lm_head",)),
    Architecture(
        "Wav2Vec2, classifying",
        "Wav2Vec2ForSequenceClassification",
        classified_waveform,
        SPEECH,
        head=("projector", "classifier"),
    ),
    Architecture("HuBERT", "HubertForCTC", waveform, SPEECH, head=("lm_head",)),
    Architecture(
        "WavLM", "WavLMForCTC", waveform, {**SPEECH, "num_buckets": 8, "max_bucket_distance": 16}, head=("lm_head",)
    ),
]
