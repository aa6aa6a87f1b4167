"""An autoregressive image model in the manner of LlamaGen: VQ tokenizer and Llama decoder.

Source: FoundationVision/LlamaGen (`gpt.py` at 5a50452, `vq_model.py` at 3786e6a), read and written
anew. Parameter names and shapes are LlamaGen's, so released weights load without renaming: the
decoder's from the entry `model` of a checkpoint, the tokenizer's likewise, whose buffer
`quantize.codebook_used` (a usage counter) is left out. A file of the decoder's weights holds

    cls_embedding.embedding_table.weight, tok_embeddings.weight, norm.weight, output.weight,
    layers.N.attention.{wqkv,wo}.weight, layers.N.feed_forward.{w1,w2,w3}.weight,
    layers.N.{attention_norm,ffn_norm}.weight

and, where captions are the condition, `cls_embedding.{uncond_embedding,cap_proj.{fc1,fc2}.weight}`
in place of the table of classes.

LlamaGen-B, -L, … are `DecoderConfig(vocab_size=16384, classes=1000, width=768, layers=12, heads=12,
ffn_multiple=256)`, …; its tokenizer is `TokenizerConfig(codebook_size=16384, channels=128,
multipliers=(1, 1, 2, 2, 4), res_blocks=2, latent_channels=256, groups=32)`.

Two details of LlamaGen that are easily missed: the rotation of condition tokens is zero in
cosine *and* sine, so their queries and keys are zero vectors and every token attends to them with
score zero; and codes are normalised to length one whenever they are looked up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Sizes of the VQ tokenizer.

    Attributes:
        codebook_size: Number of codes.
        code_dim: Size of a code; codes have length one.
        channels: Channels at full resolution.
        multipliers: Channels of each resolution over `channels`; each further one halves the side.
        res_blocks: Residual blocks of a resolution in the encoder; the decoder has one more.
        latent_channels: Channels between the networks and the projections to and from codes.
        groups: Groups of each group normalisation.
    """

    codebook_size: int = 1024
    code_dim: int = 8
    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2, 4)
    res_blocks: int = 1
    latent_channels: int = 64
    groups: int = 8

    @property
    def factor(self) -> int:
        """Pixels to a token's side."""
        return int(2 ** (len(self.multipliers) - 1))


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of the autoregressive decoder.

    Attributes:
        vocab_size: Number of codes.
        classes: Class conditions; id `classes` is the null class of classifier-free guidance. 0
            where captions are the condition.
        condition_tokens: Tokens of a condition, 1 for a class.
        caption_dim: Size of the features of a caption's token; 0 where classes are the condition.
        grid: Tokens to a side of the image.
        width: Size of the hidden states.
        layers: Llama blocks.
        heads: Query, key and value heads.
        ffn_multiple: The SwiGLU's inner size, two thirds of 4 * width, is rounded up to this.
        rope_base: Base of the rotation frequencies.
    """

    vocab_size: int = 1024
    classes: int = 20
    grid: int = 16
    width: int = 256
    layers: int = 6
    heads: int = 4
    ffn_multiple: int = 64
    rope_base: float = 10000.0
    condition_tokens: int = 1
    caption_dim: int = 0

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ValueError(
                f"width / heads must be a whole multiple of 4 for a rotation in two dimensions, "
                f"got {self.width} / {self.heads}."
            )

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.width // self.heads

    @property
    def inner_size(self) -> int:
        """Inner size of the SwiGLU."""
        inner = int(2 * 4 * self.width / 3)
        return -(-inner // self.ffn_multiple) * self.ffn_multiple

    @property
    def image_tokens(self) -> int:
        """Tokens of an image."""
        return self.grid * self.grid


# --------------------------------------------------------------------------------- tokenizer


class _ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=1e-6)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)
        self.changes_channels = inputs != outputs

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if self.changes_channels else x)


class _Attention2d(nn.Module):
    """Single-head attention over all places of a map."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(mixed)


class _Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class _Level(nn.Module):
    """Blocks of one resolution, attention after each at the lowest, then a change of resolution."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, groups: int, *, attends: bool
    ) -> None:
        super().__init__()
        self.res = nn.ModuleList(
            _ResBlock(inputs if block == 0 else outputs, outputs, groups) for block in range(blocks)
        )
        self.attn = nn.ModuleList(
            _Attention2d(outputs, groups) for _ in range(blocks if attends else 0)
        )

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[number](x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


def _middle(channels: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(
        [
            _ResBlock(channels, channels, groups),
            _Attention2d(channels, groups),
            _ResBlock(channels, channels, groups),
        ]
    )


class _Encoder(nn.Module):
    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        sizes = [config.channels * multiplier for multiplier in config.multipliers]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        inputs = config.channels
        for number, outputs in enumerate(sizes):
            last = number == len(sizes) - 1
            level = _Level(inputs, outputs, config.res_blocks, config.groups, attends=last)
            if not last:
                level.downsample = _Downsample(outputs)
            self.conv_blocks.append(level)
            inputs = outputs
        self.mid = _middle(inputs, config.groups)
        self.norm_out = nn.GroupNorm(config.groups, inputs, eps=1e-6)
        self.conv_out = nn.Conv2d(inputs, config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in (*self.conv_blocks, *self.mid):
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class _Decoder(nn.Module):
    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        sizes = [config.channels * multiplier for multiplier in reversed(config.multipliers)]
        inputs = sizes[0]
        self.conv_in = nn.Conv2d(config.latent_channels, inputs, 3, padding=1)
        self.mid = _middle(inputs, config.groups)
        self.conv_blocks = nn.ModuleList()
        for number, outputs in enumerate(sizes):
            blocks = config.res_blocks + 1
            level = _Level(inputs, outputs, blocks, config.groups, attends=number == 0)
            if number < len(sizes) - 1:
                level.upsample = _Upsample(outputs)
            self.conv_blocks.append(level)
            inputs = outputs
        self.norm_out = nn.GroupNorm(config.groups, inputs, eps=1e-6)
        self.conv_out = nn.Conv2d(inputs, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in (*self.mid, *self.conv_blocks):
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out


class _Codebook(nn.Module):
    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dim)
        with torch.no_grad():
            self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))


class ImageTokenizer(nn.Module):
    """Images to a grid of codes and back."""

    def __init__(self, config: TokenizerConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or TokenizerConfig()
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)
        self.quantize = _Codebook(config.codebook_size, config.code_dim)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_channels, 1)

    @property
    def codebook(self) -> Tensor:
        """Codes of length one, (codes, code_dim)."""
        return F.normalize(self.quantize.embedding.weight, dim=-1)

    def vectors(self, images: Tensor) -> Tensor:
        """Return the unquantised vectors of images, length one, float32.

        Args:
            images: Values in [-1, 1], (images, 3, height, width).

        Returns:
            (images, rows, columns, code_dim).
        """
        latent = self.quant_conv(self.encoder(images))
        return F.normalize(latent.float().permute(0, 2, 3, 1), dim=-1)

    def nearest(self, vectors: Tensor) -> Tensor:
        """Return the code nearest to each vector of length one, the leading shape of `vectors`."""
        # Between vectors of length one the largest product is the smallest distance.
        return (vectors @ self.codebook.T).argmax(-1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the tokens of images in raster order.

        Args:
            images: uint8, (images, 3, height, width).

        Returns:
            (images, rows * columns), int64.
        """
        return self.nearest(self.vectors(to_unit(images))).flatten(1)

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Return images in about [-1, 1] from code vectors (images, rows, columns, code_dim)."""
        out: Tensor = self.decoder(self.post_quant_conv(vectors.permute(0, 3, 1, 2)))
        return out

    @torch.no_grad()
    def decode(self, tokens: Tensor, *, rows: int | None = None) -> Tensor:
        """Return the images of tokens in raster order.

        Args:
            tokens: (images, rows * columns).
            rows: Rows of the grid; a square when None.

        Returns:
            uint8, (images, 3, rows * factor, columns * factor).
        """
        rows = rows or math.isqrt(tokens.shape[1])
        vectors = self.codebook[tokens.unflatten(1, (rows, tokens.shape[1] // rows))]
        return to_bytes(self.decode_vectors(vectors))


def to_unit(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """Return images in [-1, 1] as uint8: clamped, rounded, not truncated."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# ----------------------------------------------------------------------------------- decoder


class KVCache:
    """Keys and values of the positions read so far, in room given once.

    Attributes:
        length: Entries in use.
        capacity: Entries there is room for.
    """

    def __init__(
        self,
        config: DecoderConfig,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.layers, 2, batch, config.heads, capacity, config.head_dim)
        self._entries = torch.zeros(shape, device=device, dtype=dtype)
        self.capacity = capacity
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values behind `length`; return all up to there.

        The caller advances `length` once all layers have written.
        """
        end = self.length + keys.shape[2]
        if end > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} positions, not for {end}.")
        entries = self._entries[layer]
        entries[0, :, :, self.length : end] = keys
        entries[1, :, :, self.length : end] = values
        return entries[0, :, :, :end], entries[1, :, :, :end]

    def crop(self, length: int) -> None:
        """Forget the entries from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length must lie in [0, {self.length}], got {length}.")
        self.length = length

    def keep(self, start: int, path: Sequence[int]) -> None:
        """Keep of the entries from `start` on those at offsets `path`, in that order."""
        chosen = torch.as_tensor(path, dtype=torch.int64, device=self._entries.device) + start
        if len(chosen) and not start <= int(chosen.min()) <= int(chosen.max()) < self.length:
            raise ValueError(
                f"path must point into the {self.length - start} entries from {start}."
            )
        end = start + len(chosen)
        self._entries[..., start:end, :] = self._entries[..., chosen, :]
        self.length = end


class DecoderOutput(NamedTuple):
    """What a forward returns.

    Attributes:
        logits: Of the token after each position, (batch, tokens, vocab_size), float32.
        hidden: Last hidden states, after the final norm, (batch, tokens, width).
    """

    logits: Tensor
    hidden: Tensor


class RotaryAttention(nn.Module):
    """A Llama block's attention, with rotation in two dimensions and a cache."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        self.wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self, x: Tensor, rotation: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        """Mix values, (batch, tokens, width); `ImageDecoder` makes `rotation` and `mask`."""
        split = self.wqkv(x).unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        query, key = rotate(split[:2], rotation)
        value = split[2]
        if cache is not None:
            key, value = cache.append(layer, key, value)
        causal = mask is None and x.shape[1] > 1
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        out: Tensor = self.wo(mixed.transpose(1, 2).flatten(2))
        return out


class SwiGLU(nn.Module):
    """A Llama block's feed-forward part."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, width) from (…, width)."""
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class _Block(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention = RotaryAttention(config)
        self.feed_forward = SwiGLU(config.width, config.inner_size)
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.ffn_norm = nn.RMSNorm(config.width, eps=1e-5)

    def forward(
        self, x: Tensor, rotation: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, mask, cache, layer)
        out: Tensor = x + self.feed_forward(self.ffn_norm(x))
        return out


class _ClassEmbedding(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.classes + 1, config.width)


class _CaptionProjection(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.caption_dim, config.width, bias=False)
        self.fc2 = nn.Linear(config.width, config.width, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(features), approximate="tanh"))
        return out


class _CaptionEmbedding(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.cap_proj = _CaptionProjection(config)
        nothing = torch.randn(config.condition_tokens, config.caption_dim)
        self.uncond_embedding = nn.Parameter(nothing / math.sqrt(config.caption_dim))


class ImageDecoder(nn.Module):
    """Llama blocks over [condition, token 0, token 1, …]; a class is a condition of one token.

    Behind a condition of c tokens, position c + n holds the token at place n of the raster, and its
    logits are those of place n + 1.
    """

    rotation: Tensor

    def __init__(self, config: DecoderConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DecoderConfig()
        kind = _CaptionEmbedding if config.caption_dim else _ClassEmbedding
        self.cls_embedding: Any = kind(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.output = nn.Linear(config.width, config.vocab_size, bias=False)
        self.register_buffer("rotation", rotation_table(config), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)

    @property
    def null_class(self) -> int:
        """Class id that stands for no condition."""
        return self.config.classes

    def embed_classes(self, labels: Tensor) -> Tensor:
        """Return the condition tokens of class ids, (batch, 1, width)."""
        out: Tensor = self.cls_embedding.embedding_table(labels)[:, None]
        return out

    def embed_captions(self, features: Tensor) -> Tensor:
        """Return the condition tokens of captions' features, (batch, tokens, caption_dim)."""
        out: Tensor = self.cls_embedding.cap_proj(features)
        return out

    @property
    def no_caption(self) -> Tensor:
        """The features that stand for no condition, (condition_tokens, caption_dim)."""
        found: Tensor = self.cls_embedding.uncond_embedding
        return found

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of codes, (batch, tokens, width)."""
        out: Tensor = self.tok_embeddings(tokens)
        return out

    def forward(
        self,
        inputs: Tensor,
        positions: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
    ) -> DecoderOutput:
        """Run embedded tokens at given positions; with a cache, behind what it holds.

        Args:
            inputs: From `embed_classes` or `embed_captions`, and `embed_tokens`, (batch, tokens,
                width).
            positions: Place of each token in the sequence, (tokens,) or (batch, tokens); in
                succession from the cache's length when None.
            cache: Keys and values so far; the new ones are appended.
            mask: True where a token (row) may attend to an entry (column), broadcastable to
                (batch, heads, tokens, entries), entries counting the cached ones and the new;
                causal when None.
        """
        count = inputs.shape[1]
        held = cache.length if cache is not None else 0
        if positions is None:
            positions = torch.arange(held, held + count, device=inputs.device)
        mask = window_mask(held, count, inputs.device) if mask is None else mask
        rotation = rotation_at(self.rotation, positions)
        x = inputs
        for number, layer in enumerate(self.layers):
            x = layer(x, rotation, mask, cache, number)
        if cache is not None:
            cache.length += count
        hidden = self.norm(x)
        return DecoderOutput(self.output(hidden).float(), hidden)

    def sequence_logits(self, labels: Tensor, tokens: Tensor) -> Tensor:
        """Return the logits of every token given those before it and the class.

        Args:
            labels: (batch,), the null class allowed.
            tokens: Whole images, (batch, image_tokens).

        Returns:
            (batch, image_tokens, vocab_size), float32.
        """
        inputs = torch.cat([self.embed_classes(labels), self.embed_tokens(tokens[:, :-1])], 1)
        return self(inputs).logits


def rotation_table(config: DecoderConfig) -> Tensor:
    """Return cosine and sine for each position, (condition + image tokens, head_dim / 2, 2).

    The first half of a head's pairs turns with the row, the second with the column. The condition's
    positions are zero in both: their queries and keys vanish.
    """
    half = config.head_dim // 2
    frequencies = config.rope_base ** (-torch.arange(0, half, 2).float() / half)
    angles = torch.outer(torch.arange(config.grid).float(), frequencies)
    rows = angles[:, None].expand(-1, config.grid, -1)
    columns = angles[None].expand(config.grid, -1, -1)
    both = torch.cat([rows, columns], -1).flatten(0, 1)
    turned = torch.stack([both.cos(), both.sin()], -1)
    return torch.cat([torch.zeros(config.condition_tokens, *turned.shape[1:]), turned])


def rotation_at(table: Tensor, positions: Tensor) -> Tensor:
    """Return the rows of `rotation_table` at positions (tokens,) or (batch, tokens), for `rotate`.

    Returns:
        (tokens, head_dim / 2, 2) or (batch, 1, tokens, head_dim / 2, 2).
    """
    rotation = table[positions]
    return rotation[:, None] if rotation.ndim == 4 else rotation


def window_mask(held: int, count: int, device: torch.device) -> Tensor | None:
    """Return who attends to whom when `count` tokens follow `held` cached ones, (count, all).

    None where attention needs no mask: one token sees everything, and without cached tokens plain
    causal attention is meant.
    """
    if not held or count == 1:
        return None
    entries = torch.arange(held + count, device=device)
    return entries[None] <= entries[held:, None]


def rotate(vectors: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair of neighbouring numbers of `vectors`, (…, tokens, head_dim).

    Args:
        rotation: Cosine and sine, broadcastable to (…, tokens, head_dim / 2, 2).
    """
    first, second = vectors.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = rotation.to(vectors.dtype).unbind(-1)
    turned = torch.stack([first * cosine - second * sine, second * cosine + first * sine], -1)
    return turned.flatten(-2)


def guided(logits: Tensor, guidance_scale: float) -> Tensor:
    """Merge a doubled batch, conditional rows first: u + s (c - u).

    Args:
        logits: (2 * batch, …).
        guidance_scale: 1 returns the conditional logits.

    Returns:
        (batch, …).
    """
    conditional, unconditional = logits.chunk(2)
    if guidance_scale == 1:
        return conditional
    return unconditional + guidance_scale * (conditional - unconditional)


@torch.no_grad()
def sample_tokens(
    model: ImageDecoder,
    labels: Tensor,
    *,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample whole images token by token: the plain baseline.

    Args:
        model: The decoder.
        labels: Class ids, (batch,).
        guidance_scale: Above 1 runs a doubled batch, half of it with the null class.
        temperature: 0 takes the most likely token.
        uniforms: Random numbers in [0, 1) that decide each token, (batch, image_tokens); drawn
            from `generator` when None.
        generator: Of the model's device.

    Returns:
        (batch, image_tokens), int64.
    """
    count, batch = model.config.image_tokens, len(labels)
    doubled = guidance_scale != 1
    device = labels.device
    if uniforms is None:
        uniforms = torch.rand(batch, count, generator=generator, device=device)
    rows = torch.cat([labels, torch.full_like(labels, model.null_class)]) if doubled else labels
    dtype = model.output.weight.dtype
    cache = KVCache(model.config, len(rows), count, device=device, dtype=dtype)
    inputs = model.embed_classes(rows)
    tokens = torch.empty(batch, count, dtype=torch.int64, device=device)
    for place in range(count):
        logits = model(inputs, cache=cache).logits[:, -1]
        if doubled:
            logits = guided(logits, guidance_scale)
        tokens[:, place] = choose(logits, temperature, uniforms[:, place])
        if place + 1 < count:
            inputs = model.embed_tokens(tokens[:, place : place + 1])
            if doubled:
                inputs = inputs.repeat(2, 1, 1)
    return tokens


def choose(logits: Tensor, temperature: float, uniforms: Tensor) -> Tensor:
    """Return one token a row, by inversion of the cumulative distribution; greedy at 0."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)
    # The last sum may miss 1 by rounding; scaling keeps the choice inside the vocabulary.
    target = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


# --------------------------------------------------------------------------------- the folder


@dataclass(frozen=True, kw_only=True)
class ImageModelConfig:
    """Tokenizer, target and draft of one folder."""

    tokenizer: TokenizerConfig = TokenizerConfig()
    target: DecoderConfig = DecoderConfig()
    draft: DecoderConfig = DecoderConfig(width=192, layers=2, heads=3)

    def save(self, folder: Path) -> None:
        """Write `config.json`."""
        text = json.dumps({"model_type": "tiny-ar-image", **asdict(self)}, indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> ImageModelConfig:
        """Read `config.json`."""
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tokenizer = {
            **fields["tokenizer"],
            "multipliers": tuple(fields["tokenizer"]["multipliers"]),
        }
        return cls(
            tokenizer=TokenizerConfig(**tokenizer),
            target=DecoderConfig(**fields["target"]),
            draft=DecoderConfig(**fields["draft"]),
        )


class ImageModel(NamedTuple):
    """The three networks of a folder, float32, in evaluation mode."""

    tokenizer: ImageTokenizer
    target: ImageDecoder
    draft: ImageDecoder


def load_image_model(folder: Path, device: torch.device | str = "cpu") -> ImageModel:
    """Load `tokenizer.safetensors`, `model.safetensors` (the target) and `draft.safetensors`.

    Raises:
        FileNotFoundError: The folder holds no weights.
    """
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no trained weights in {folder}: run "
            f"`python -m models.embedded.tiny_ar_image.train --out {folder}`."
        )
    config = ImageModelConfig.load(folder)
    parts = ImageModel(
        ImageTokenizer(config.tokenizer), ImageDecoder(config.target), ImageDecoder(config.draft)
    )
    for part, name in zip(parts, ("tokenizer", "model", "draft"), strict=True):
        load_weights(part, folder / f"{name}.safetensors", device)
    return parts


def load_weights(module: nn.Module, path: Path, device: torch.device | str = "cpu") -> None:
    """Fill a module from a file, float32, and ready it for evaluation on a device."""
    module.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    module.to(device).eval().requires_grad_(False)
