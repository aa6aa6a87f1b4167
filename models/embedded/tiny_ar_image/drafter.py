"""A one-layer drafter in feature space, as EAGLE's, for image tokens.

It reads the target's hidden states ("features") and guesses the next one; the target's frozen head
turns a guess into a next-token law. One step, at index i of the sequence [class, token 0, …]:

    input    fc([embedding of element i + 1; feature of element i])
    output   a guess of the feature of element i + 1, whose logits are those of element i + 2

Behind the last feature that the target has computed it goes on with its own guesses.

Source: EAGLE (arXiv 2401.15077, section 4) as used for LlamaGen by LANTERN (arXiv 2410.03355;
jadohu/LANTERN at 3a56e45): `fc` has a bias, the layer has no norm at its input, embedding and head
are the target's and frozen, attention turns in two dimensions like the target's.

Two choices of our own. A step takes the rotation of element i + 1, the token it embeds: the class,
element 0, has none, and the first step's key would vanish. The feed-forward's inner size is 1.5
times the width, not the target's 2.75, so that all weights of the model stay within 20 MiB.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from models.embedded.tiny_ar_image.model import (
    DecoderConfig,
    KVCache,
    RotaryAttention,
    SwiGLU,
    load_weights,
    rotation_at,
    rotation_table,
    window_mask,
)


class _Layer(nn.Module):
    """A Llama block without the norm before its attention."""

    def __init__(self, config: DecoderConfig, inner: int) -> None:
        super().__init__()
        self.attention = RotaryAttention(config)
        self.feed_forward = SwiGLU(config.width, inner)
        self.ffn_norm = nn.RMSNorm(config.width, eps=1e-5)

    def forward(
        self, x: Tensor, rotation: Tensor, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        x = x + self.attention(x, rotation, mask, cache, 0)
        out: Tensor = x + self.feed_forward(self.ffn_norm(x))
        return out


class FeatureDrafter(nn.Module):
    """Guesses the target's next feature from its features so far and the tokens that followed.

    Attributes:
        config: The target's sizes with one layer; a `KVCache` of it holds the drafter's entries.

    Args:
        target: Sizes of the target.
        inner: Inner size of the feed-forward part; 1.5 times the width when None.
    """

    rotation: Tensor

    def __init__(self, target: DecoderConfig, inner: int | None = None) -> None:
        super().__init__()
        # What it reads of a condition is the feature behind it, one token whatever its length.
        self.config = config = replace(target, layers=1, condition_tokens=1, caption_dim=0)
        width = config.width
        self.fc = nn.Linear(2 * width, width)
        self.layers = nn.ModuleList([_Layer(config, 3 * width // 2 if inner is None else inner)])
        self.register_buffer("rotation", rotation_table(config), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)

    def forward(
        self,
        embedded: Tensor,
        features: Tensor,
        positions: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return guesses of the features of the embedded elements, (batch, tokens, width).

        Args:
            embedded: The target's embeddings of elements i + 1, (batch, tokens, width).
            features: Features of the elements i before them, (batch, tokens, width): the target's,
                after its final norm, or the drafter's own guesses.
            positions: Places i + 1 of the embedded elements in the sequence, (tokens,) or
                (batch, tokens); in succession from the cache's length + 1 when None.
            cache: The drafter's keys and values so far; the new ones are appended.
            mask: As `ImageDecoder.forward` takes it.
        """
        count = embedded.shape[1]
        held = cache.length if cache is not None else 0
        if positions is None:
            positions = torch.arange(held + 1, held + 1 + count, device=embedded.device)
        mask = window_mask(held, count, embedded.device) if mask is None else mask
        x = self.fc(torch.cat([embedded, features], -1))
        x = self.layers[0](x, rotation_at(self.rotation, positions), mask, cache)
        if cache is not None:
            cache.length += count
        out: Tensor = x
        return out


def load_drafter(
    folder: Path, target: DecoderConfig, device: torch.device | str = "cpu"
) -> FeatureDrafter:
    """Load `drafter.safetensors`, float32, in evaluation mode.

    Args:
        folder: Of the model.
        target: Sizes of the target that it was trained for.
        device: Where to.

    Raises:
        FileNotFoundError: The folder holds no drafter.
    """
    path = folder / "drafter.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"no trained drafter in {folder}: run "
            f"`python -m models.embedded.tiny_ar_image.train_drafter --target {folder} "
            f"--out {folder}`."
        )
    with safe_open(path, "pt") as file:
        inner = file.get_slice("layers.0.feed_forward.w1.weight").get_shape()[0]
    drafter = FeatureDrafter(target, inner)
    load_weights(drafter, path, device)
    return drafter
