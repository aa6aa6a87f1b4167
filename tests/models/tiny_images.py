"""Folders of tiny random image models, laid out as `path:` reads them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from models.embedded.tiny_ar_image.model import (
    DecoderConfig,
    ImageDecoder,
    ImageTokenizer,
    TokenizerConfig,
)

DECODER = DecoderConfig(
    vocab_size=40, classes=20, grid=4, width=32, layers=2, heads=2, ffn_multiple=96
)
TOKENIZER = TokenizerConfig(
    codebook_size=40, channels=8, multipliers=(1, 1, 2), latent_channels=8, groups=4
)


class Harmful:
    """What a pickle could hold besides weights."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


def networks(seed: int = 0) -> tuple[ImageDecoder, ImageTokenizer]:
    """A decoder of decided choices and its tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        decoder, tokenizer = ImageDecoder(DECODER), ImageTokenizer(TOKENIZER)
        for parameter in decoder.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return decoder.eval().requires_grad_(False), tokenizer.eval().requires_grad_(False)


def save_image_model(folder: Path, seed: int = 0) -> str:
    """Write a folder; return the model's id."""
    decoder, tokenizer = networks(seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(decoder.state_dict(), folder / "model.safetensors")
    save_file(tokenizer.state_dict(), folder / "tokenizer.safetensors")
    config = {"model_type": "llamagen", "tokenizer": asdict(TOKENIZER), "target": asdict(DECODER)}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return f"path:{folder}"


def decoder_shapes(width: int, layers: int, inner: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a released LlamaGen decoder, all but those of its condition."""
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (16384, width),
        "norm.weight": (width,),
        "output.weight": (16384, width),
    }
    for layer in range(layers):
        shapes |= {
            f"layers.{layer}.attention.wqkv.weight": (3 * width, width),
            f"layers.{layer}.attention.wo.weight": (width, width),
            f"layers.{layer}.feed_forward.w1.weight": (inner, width),
            f"layers.{layer}.feed_forward.w3.weight": (inner, width),
            f"layers.{layer}.feed_forward.w2.weight": (width, inner),
            f"layers.{layer}.attention_norm.weight": (width,),
            f"layers.{layer}.ffn_norm.weight": (width,),
        }
    return shapes
