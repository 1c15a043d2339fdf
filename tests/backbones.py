"""Complete two-layer backbones with real tokenizers, written to a folder without any download."""

# ruff: noqa: S106, SIM905 - a token is no password; a word list reads best as words
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTForImageClassification,
    ViTImageProcessorPil,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)

MAX_LENGTH = 64  # positions of the tiny encoder
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()[]{}<>#*+-=/_"
WORDS = """
    a an the this that it is was are be not no and or but of in on at to for with as by from film movie story
    plot acting good bad great awful fine dull warm cold funny sad best worst very really too so one two three
    man woman dog cat house tree river city runs sat likes saw has had what who where when why how answer
    true false
""".split()


def save_tiny_tokenizer(folder: str | Path) -> str:
    """A lower-casing WordPiece tokenizer of BERT's form: ``WORDS`` are one token each, the rest is spelt."""
    tokens = [*SPECIAL, *CHARACTERS, *(f"##{c}" for c in CHARACTERS), *(w for w in WORDS if len(w) > 1)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    tokenizer.decoder = decoders.WordPiece()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    wrapped.save_pretrained(folder)
    return str(folder)


def save_tiny_causal_tokenizer(folder: str | Path, *, add_bos: bool, pad_token: str | None) -> str:
    """A byte-level BPE tokenizer of GPT's form: any text survives encoding and decoding unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 2, trainer)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        bos_token="<s>",
        eos_token="</s>",
        pad_token=pad_token,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    return str(folder)


def save_tiny_bert(folder: str | Path, **config: Any) -> str:
    """A two-layer BERT of width 32 with a classification head; ``config`` overrides any BertConfig field."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(save_tiny_tokenizer(folder))
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": MAX_LENGTH,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return _save(BertForSequenceClassification, BertConfig(**{**settings, **config}), folder)


def save_tiny_roberta(folder: str | Path, **config: Any) -> str:
    """A two-layer RoBERTa of width 32 with a classification head, and BERT's tokenizer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(save_tiny_tokenizer(folder))
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": MAX_LENGTH + 1,  # positions are counted from behind the pad token's number
        "type_vocab_size": 2,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return _save(RobertaForSequenceClassification, RobertaConfig(**{**settings, **config}), folder)


def save_tiny_deberta(folder: str | Path, **config: Any) -> str:
    """A two-layer DeBERTa-v3 of width 32 with a classification head, and BERT's tokenizer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(save_tiny_tokenizer(folder))
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": MAX_LENGTH,
        "type_vocab_size": 0,
        "relative_attention": True,
        "position_buckets": 16,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "pooler_hidden_size": 32,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return _save(DebertaV2ForSequenceClassification, DebertaV2Config(**{**settings, **config}), folder)


def save_tiny_llama(folder: str | Path, **config: Any) -> str:
    """A two-layer Llama of width 32 whose tokenizer puts ``<s>`` first and has a pad token."""
    return _save_llama_like(LlamaForCausalLM, LlamaConfig, folder, add_bos=True, **config)


def save_tiny_qwen2(folder: str | Path, **config: Any) -> str:
    """A two-layer Qwen2 of width 32, with biases in its attention; its tokenizer adds no ``<s>`` and has a pad."""
    return _save_llama_like(Qwen2ForCausalLM, Qwen2Config, folder, add_bos=False, **config)


def _save_llama_like(model_class: Any, config_class: Any, folder: str | Path, *, add_bos: bool, **config: Any) -> str:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        save_tiny_causal_tokenizer(folder, add_bos=add_bos, pad_token="<pad>")
    )
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return _save(model_class, config_class(**{**settings, **config}), folder)


def save_tiny_gpt2(folder: str | Path, **config: Any) -> str:
    """A two-layer GPT-2 of width 32; its tokenizer, like the real one, adds no ``<s>`` and has no pad."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        save_tiny_causal_tokenizer(folder, add_bos=False, pad_token=None)
    )
    settings = {
        "vocab_size": len(tokenizer),
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return _save(GPT2LMHeadModel, GPT2Config(**{**settings, **config}), folder)


def save_tiny_t5(folder: str | Path, **config: Any) -> str:
    """A two-layer T5 of width 32 with tied embeddings; its tokenizer spells with ``▁`` and adds ``</s>``."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -8.0), *((c, -9.0) for c in CHARACTERS)]
    pieces += [(f"▁{word}", -4.0) for word in WORDS]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    wrapped.save_pretrained(folder)
    settings = {
        "vocab_size": len(wrapped),
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    }
    return _save(T5ForConditionalGeneration, T5Config(**{**settings, **config}), folder)


def save_tiny_bart(folder: str | Path, **config: Any) -> str:
    """A two-layer BART of width 32, whose decoder starts with ``</s>``; its tokenizer puts texts in ``<s> </s>``."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        save_tiny_causal_tokenizer(folder, add_bos=True, pad_token="<pad>")
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B </s>",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")],
    )
    tokenizer.save_pretrained(folder)
    settings = {
        "vocab_size": len(tokenizer),
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 128,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "decoder_start_token_id": tokenizer.eos_token_id,
        "forced_eos_token_id": tokenizer.eos_token_id,
    }
    return _save(BartForConditionalGeneration, BartConfig(**{**settings, **config}), folder)


def save_tiny_vit(folder: str | Path, **processor: Any) -> str:
    """A two-layer ViT for images of 16 pixels; ``processor`` overrides any field of its image processor."""
    build_tiny(ViTForImageClassification).save_pretrained(folder)
    ViTImageProcessorPil(**{"size": {"height": 16, "width": 16}, **processor}).save_pretrained(folder)
    return str(folder)


def save_tiny_wav2vec2(folder: str | Path, **extractor: Any) -> str:
    """A two-layer Wav2Vec2 that hears 16 kHz; ``extractor`` overrides any field of its feature extractor."""
    config = Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=(32, 32, 32),
        conv_kernel=(10, 8, 4),
        conv_stride=(5, 4, 4),
        feat_extract_norm="layer",  # the other one, over time, makes of a sound what its batch is padded to
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        classifier_proj_size=32,
        mask_time_prob=0.0,  # sounds of the tests are shorter than the spans that it hides
    )
    Wav2Vec2FeatureExtractor(**extractor).save_pretrained(folder)
    return _save(Wav2Vec2ForSequenceClassification, config, folder)


def _save(model_class: type[PreTrainedModel], config: Any, folder: str | Path) -> str:
    with torch.random.fork_rng(devices=[]):  # the same weights in every test, whatever ran before
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder)
    return str(folder)


_WIDTH_32: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TINY: dict[str, dict[str, Any]] = {
    "albert": {**_WIDTH_32, "embedding_size": 16},
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_SPECIAL_IDS},
    "llama": {**_WIDTH_32, "num_key_value_heads": 2, **_SPECIAL_IDS},
    "t5": {
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    },
    "vit": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 16,
        "patch_size": 8,
    },
}


def build_tiny(model_class: type[PreTrainedModel], **config: Any) -> Any:
    """A two-layer model of width 32 and 64 tokens in memory, always the same; ``config`` overrides its fields."""
    config_class = model_class.config_class
    settings = {**_TINY.get(config_class.model_type, _WIDTH_32), **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config_class(**settings))
