"""A tiny random image model, and how the battery calls models that make images."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from models.base import ImageSampling

if TYPE_CHECKING:
    from models.image_generation import AutoregressiveImages

_CLASSES = 5
_GUIDED = ImageSampling(guidance_scale=1.5)


def tiny_images(seed: int = 0, *, grid: int = 4, codes: int = 48) -> AutoregressiveImages:
    """Return a random autoregressive image model whose weights are the same on every machine.

    Args:
        seed: Of the weights; another one gives what a draft model could be.
        grid: Tokens to a side of an image; a token is 2 x 2 pixels.
        codes: Size of the codebook.
    """
    from models.embedded.tiny_ar_image.model import (
        DecoderConfig,
        ImageDecoder,
        ImageTokenizer,
        TokenizerConfig,
    )
    from models.image_generation import AutoregressiveImages
    from runner.conformance_base import fill_exactly

    decoder = ImageDecoder(
        DecoderConfig(
            vocab_size=codes,
            classes=_CLASSES,
            grid=grid,
            width=32,
            layers=2,
            heads=2,
            ffn_multiple=32,
        )
    )
    tokenizer = ImageTokenizer(
        TokenizerConfig(
            codebook_size=codes, channels=8, multipliers=(1, 1), latent_channels=8, groups=4
        )
    )
    for number, module in enumerate((decoder, tokenizer)):
        fill_exactly(module, seed=2 * seed + number)
        module.eval().requires_grad_(False)
    return AutoregressiveImages(decoder, tokenizer, "tiny-random-images")


def make_images(model: Any, text: str) -> tuple[Any, dict[str, int]]:
    """Make two images that a text decides; return what came out, exactly, and the work."""
    digest = hashlib.sha256(text.encode()).digest()
    labels = [digest[0] % _CLASSES, digest[1] % _CLASSES]
    found = model.generate(labels, [digest[2], digest[3]], _GUIDED)
    trace = found.trace
    work = {
        "output_tokens": sum(len(tokens) for tokens in found.tokens),
        "prefill_tokens": sum(forward.width for forward in trace.prefill),
        "forwards": len(trace.forwards),
        "forward_tokens": sum(forward.width for forward in trace.forwards),
        "accepted_tokens": trace.accepted_drafts,
        "draft_forwards": trace.draft_forwards,
        "flops": int(trace.flops),
        "kv_bytes": trace.kv_bytes,
    }
    return (found.tokens, found.pixels.tobytes()), work
