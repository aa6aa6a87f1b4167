"""A tiny random Chameleon, its tokenizer, and its decoder of codes written a second time."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from models.embedded.tiny_ar_image.model import ImageTokenizer, TokenizerConfig
from models.image_chameleon import ChameleonImages, CodesToPixels, Layout
from runner.conformance_base import byte_tokenizer, sharpen

CODES = 24
GRID = (4, 4)
LAYOUTS = {
    name: Layout(layout=name, rows=GRID[0], columns=GRID[1])  # type: ignore[arg-type]
    for name in ("anole", "lumina-mgpt")
}
_SPECIALS = ("<end>", "<s>", "<pad>", "<image>", "<racm3:break>", "<reserved08706>")
_SIZES = ("<reserved08799>", "<reserved08801>", "<reserved08802>")
# As LlamaGen's class has it; 32 groups are what transformers' blocks have.
_SAME = TokenizerConfig(
    codebook_size=CODES,
    code_dim=4,
    channels=32,
    multipliers=(1, 1, 2),
    res_blocks=1,
    latent_channels=16,
    groups=32,
)


def code_words() -> list[str]:
    """Names of the codes as Chameleon spells numbers; the order is another than theirs."""
    spelt = ["".join(chr(ord("A") + int(digit)) for digit in str(n)) for n in range(CODES)]
    return [f"IMGIMG{word}Z" for word in reversed(spelt)]


def chameleon_tokenizer() -> Any:
    """Bytes behind special words and image tokens."""
    found = byte_tokenizer((*_SPECIALS, *_SIZES, *code_words()))
    found.add_special_tokens({"bos_token": "<s>", "pad_token": "<pad>"})
    return found


def chameleon_module(seed: int = 0) -> Any:
    """A random model of decided choices."""
    words = chameleon_tokenizer().get_vocab()
    config = transformers.ChameleonConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=2,
        vq_config={
            "embed_dim": 4,
            "num_embeddings": CODES,
            "latent_channels": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 2],
            "num_res_blocks": 1,
            "resolution": 16,
        },
        vocabulary_map=words,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = transformers.ChameleonForConditionalGeneration._from_config(
            config, attn_implementation="sdpa"
        )
        sharpen(module.model.requires_grad_(False), 3)
    return module


def twin_decoder(seed: int = 0) -> ImageTokenizer:
    """LlamaGen's tokenizer without the attention that Chameleon's lacks."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found = ImageTokenizer(_SAME).eval().requires_grad_(False)
        found.quantize.embedding.weight.normal_()
    found.decoder.conv_blocks[0].attn = nn.ModuleList()
    return found


def released_state(twin: ImageTokenizer) -> dict[str, Tensor]:
    """The twin's weights by the names of a released VQGAN, levels counted from the pixels."""
    levels = len(_SAME.multipliers)
    middle = {"0": "block_1", "1": "attn_1", "2": "block_2"}
    found = {}
    for name, value in twin.state_dict().items():
        parts = name.split(".")
        if parts[:2] == ["decoder", "conv_blocks"]:
            parts[1:3] = ["up", str(levels - 1 - int(parts[2]))]
            parts[3] = {"res": "block"}.get(parts[3], parts[3])
        elif parts[:2] == ["decoder", "mid"]:
            parts[2] = middle[parts[2]]
        if parts[0] in ("decoder", "post_quant_conv", "quantize"):
            found[".".join(parts)] = value
    return found


def tiny_chameleon(layout: str) -> ChameleonImages:
    """A model of one layout."""
    return ChameleonImages(
        chameleon_module(),
        chameleon_tokenizer(),
        f"tiny-{layout}",
        decoder=CodesToPixels(released_state(twin_decoder())),
        layout=LAYOUTS[layout],
    )
