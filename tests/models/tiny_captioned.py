"""Tiny random image generators of transformers' classes."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from models.base import AutoregressiveImageModel
from models.embedded.tiny_ar_image.model import (
    DecoderConfig,
    ImageDecoder,
    ImageTokenizer,
    TokenizerConfig,
)
from models.image_captions import CaptionedLlamaGen, CaptionEncoder
from models.image_transformers import CaptionedImages, Emu3Images, JanusImages
from runner.conformance_base import byte_tokenizer, sharpen
from tests.models.tiny_chameleon import LAYOUTS, tiny_chameleon

GRID = (4, 4)
CODES = 24
LANGUAGE_MODELS = ("janus", "emu3", *LAYOUTS)
CAPTIONED = (*LANGUAGE_MODELS, "llamagen")
CAPTION_TOKENS = 12
_SPECIALS = ("<end>", "<s>", "<pad>", "<image>", "<boi>", "<wrap>", "<eol>")


def tokenizer() -> Any:
    """Bytes behind special words, with the names that Emu3's processor uses."""
    found = byte_tokenizer((*_SPECIALS, *(f"<|visual token {n:06d}|>" for n in range(CODES))))
    found.add_special_tokens({"bos_token": "<s>", "pad_token": "<pad>"})
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=found.backend_tokenizer,
        bos_token="<s>",
        eos_token="<end>",
        pad_token="<pad>",
        extra_special_tokens={"boi_token": "<boi>", "image_wrapper_token": "<wrap>"},
    )


def _text_sizes(vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": 2,
    }


def janus() -> Any:
    """A random Janus."""
    config = transformers.JanusConfig(
        text_config=transformers.LlamaConfig(**_text_sizes(len(tokenizer()))),
        vision_config=transformers.JanusVisionConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
            projection_dim=32,
            num_image_tokens=16,
        ),
        vq_config={
            "embed_dim": 4,
            "num_embeddings": CODES,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1],
            "num_res_blocks": 1,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
        },
        image_token_id=3,
    )
    module = transformers.JanusForConditionalGeneration._from_config(
        config, attn_implementation="sdpa"
    )
    settings = module.generation_config
    settings.bos_token_id, settings.pad_token_id, settings.eos_token_id = 1, 2, 0
    settings.generation_kwargs = {"boi_token_id": 4}
    settings._from_model_config = False  # as in the published file, so that it is read as it is
    return module


def emu3() -> Any:
    """A random Emu3."""
    words = tokenizer().get_vocab()
    vocabulary_map = {
        word: place for word, place in words.items() if word.startswith("<|visual token")
    }
    config = transformers.Emu3Config(
        text_config=_text_sizes(len(words)),
        vq_config={
            "codebook_size": CODES,
            "embed_dim": 4,
            "latent_channels": 4,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "hidden_size": 32,
            "temporal_downsample_factor": 1,
        },
        vocabulary_map={**vocabulary_map, "<|extra_200|>": 6, "<image>": 3},
    )
    return transformers.Emu3ForConditionalGeneration._from_config(
        config, attn_implementation="sdpa"
    )


def caption_encoder() -> Any:
    """A random T5 encoder."""
    sizes = {"d_model": 24, "d_kv": 6, "num_heads": 4, "d_ff": 32, "num_layers": 2}
    config = transformers.T5Config(vocab_size=len(tokenizer()), pad_token_id=2, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.T5EncoderModel(config)


def llamagen_networks() -> tuple[ImageDecoder, ImageTokenizer]:
    """A random decoder of captions and a tokenizer."""
    decoder_sizes = DecoderConfig(
        vocab_size=CODES,
        classes=0,
        grid=GRID[0],
        width=32,
        layers=2,
        heads=2,
        ffn_multiple=96,
        condition_tokens=CAPTION_TOKENS,
        caption_dim=24,
    )
    tokenizer_sizes = TokenizerConfig(
        codebook_size=CODES, channels=8, multipliers=(1, 1), latent_channels=8, groups=4
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        decoder, pixels = ImageDecoder(decoder_sizes), ImageTokenizer(tokenizer_sizes)
        for parameter in decoder.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return decoder.eval().requires_grad_(False), pixels.eval().requires_grad_(False)


def tiny_llamagen() -> CaptionedLlamaGen:
    """A LlamaGen of captions."""
    encoder = CaptionEncoder(caption_encoder(), tokenizer(), CAPTION_TOKENS)
    return CaptionedLlamaGen(*llamagen_networks(), "tiny-llamagen", encoder)


def tiny_captioned(kind: str) -> AutoregressiveImageModel:
    """A model of one of the classes in `CAPTIONED`, of decided choices."""
    return tiny_llamagen() if kind == "llamagen" else tiny_language_model(kind)


def tiny_language_model(kind: str) -> CaptionedImages:
    """A model of one of the classes in `LANGUAGE_MODELS`."""
    if kind in LAYOUTS:
        return tiny_chameleon(kind)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = janus() if kind == "janus" else emu3()
        # The networks before the pixels stay as they are: only tokens must be decided.
        sharpen(module.model.language_model if kind == "janus" else module.model, 3)
        if kind == "janus":
            sharpen(module.model.generation_head, 4)
    if kind == "janus":
        return JanusImages(module, tokenizer(), "tiny-janus")
    return Emu3Images(module, tokenizer(), "tiny-emu3", grid=GRID)
