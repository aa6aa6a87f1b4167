"""A LLaDA-shaped decoder without a causal mask: RoPE, RMSNorm, SwiGLU, logits in place.

Module names and configuration keys are those of LLaDA's checkpoints (arXiv 2502.09992), so that a
loader for them reads this one as well. The logits at position i are of the token *at* i. No time
embedding: the share of masks tells the time.

An own module and not transformers' Llama behind an open mask: caches that replace keys and values
in the middle need the layers' keys and values in hand, and the names stay ours.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and special ids, under LLaDA's names.

    Attributes:
        d_model: Width.
        n_heads: Query heads; `d_model` is a multiple of it.
        n_kv_heads: Key and value heads; `n_heads` is a multiple of it.
        n_layers: Blocks.
        mlp_hidden_size: Inner width of the SwiGLU.
        vocab_size: Ids.
        rope_theta: Base of the rotary embedding.
        rms_norm_eps: Of all norms.
        max_sequence_length: Longest sequence of the training.
        mask_token_id: What stands for a token not yet decoded.
        eos_token_id: End of text, an ordinary target behind an answer.
        pad_token_id: Left padding; never seen by another token.
    """

    d_model: int = 192
    n_heads: int = 6
    n_kv_heads: int = 6
    n_layers: int = 6
    mlp_hidden_size: int = 512
    vocab_size: int = 71
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_sequence_length: int = 304
    mask_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if self.d_model % self.n_heads:
            raise ValueError(
                f"d_model must be a multiple of n_heads, got {self.d_model} and {self.n_heads}."
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads must be a multiple of n_kv_heads, got {self.n_heads} and "
                f"{self.n_kv_heads}."
            )

    def to_json(self) -> str:
        """Return the text of `config.json`."""
        fixed = {
            "model_type": "llada",
            "architectures": ["MaskedDiffusionDecoder"],
            "block_type": "llama",
            "weight_tying": False,
        }
        return json.dumps({**fixed, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> DecoderConfig:
        """Read `config.json`; keys that are not fields are left out."""
        settings = json.loads(text)
        return cls(**{name: settings[name] for name in cls.__dataclass_fields__})


class MaskedDiffusionDecoder(nn.Module):
    """Token ids in, logits of the tokens at the same positions out."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        width, vocabulary = config.d_model, config.vocab_size
        parts: dict[str, nn.Module] = {
            "wte": nn.Embedding(vocabulary, width),
            "blocks": nn.ModuleList(_Block(config) for _ in range(config.n_layers)),
            "ln_f": _RMSNorm(width, config.rms_norm_eps),
            "ff_out": nn.Linear(width, vocabulary, bias=False),
        }
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(parts)})
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                # What is added to the residual stream starts smaller, the deeper the stream.
                residual = ".blocks." in name and ("attn_out" in name or "ff_out" in name)
                deviation = 0.02 / (2 * config.n_layers) ** 0.5 if residual else 0.02
                nn.init.normal_(parameter, std=deviation)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Return the logits of all positions.

        Args:
            token_ids: (batch, tokens), PAD only on the left. Padding changes no other row's and no
                other position's logits: it is never attended to and RoPE is relative.

        Returns:
            (batch, tokens, vocab_size).
        """
        transformer: Any = self.model["transformer"]
        padding = token_ids == self.config.pad_token_id
        # Padding attends too, else its rows would be NaN; nobody looks at them.
        visible = ~padding[:, None, None, :]
        rotation = _rotation(
            token_ids.shape[1],
            self.config.d_model // self.config.n_heads,
            self.config.rope_theta,
            token_ids.device,
        )
        hidden = transformer["wte"](token_ids)
        for block in transformer["blocks"]:
            hidden = block(hidden, visible, rotation)
        logits: Tensor = transformer["ff_out"](transformer["ln_f"](hidden))
        return logits


class _RMSNorm(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, self.weight.shape, self.weight.to(hidden.dtype), self.epsilon)


class _Block(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.n_heads, config.n_kv_heads
        width, inner = config.d_model, config.mlp_hidden_size
        self.head_dim = width // config.n_heads
        kv_width = self.head_dim * self.kv_heads
        self.attn_norm = _RMSNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_norm = _RMSNorm(width, config.rms_norm_eps)
        self.ff_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.ff_out = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor, visible: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        batch, tokens, width = hidden.shape
        normed = self.attn_norm(hidden)
        query, key, value = (
            project(normed).view(batch, tokens, heads, self.head_dim).transpose(1, 2)
            for project, heads in (
                (self.q_proj, self.heads),
                (self.k_proj, self.kv_heads),
                (self.v_proj, self.kv_heads),
            )
        )
        query, key = (_rotate(states, *rotation) for states in (query, key))
        groups = self.heads // self.kv_heads
        if groups > 1:
            key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        hidden = hidden + self.attn_out(attended.transpose(1, 2).reshape(batch, tokens, width))
        normed = self.ff_norm(hidden)
        inner: Tensor = self.ff_out(F.silu(self.ff_proj(normed)) * self.up_proj(normed))
        return hidden + inner


def _rotation(
    tokens: int, head_dim: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every position's angles, (tokens, head_dim) each, float32."""
    powers = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    angles = torch.outer(torch.arange(tokens, device=device, dtype=torch.float32), theta**-powers)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate halves, not neighbours, as Llama's checkpoints have it; in float32."""
    wide = states.float()
    first, second = wide.chunk(2, dim=-1)
    rotated = wide * cosine + torch.cat([-second, first], dim=-1) * sine
    return rotated.to(states.dtype)


def load(folder: Path) -> MaskedDiffusionDecoder:
    """Read `config.json` and `model.safetensors`; float32, in evaluation mode."""
    config = DecoderConfig.from_json((folder / "config.json").read_text(encoding="utf-8"))
    module = MaskedDiffusionDecoder(config)
    module.load_state_dict(load_file(folder / "model.safetensors"))
    return module.float().eval()
