"""The network of masked-diffusion models at the size of `tiny-dllm`, as it is trained.

Weights and configuration are saved under the names of LLaDA's checkpoints (arXiv 2502.09992), so
that it is loaded like one. The logits at position i are of the token *at* i. No time embedding: the
share of masks tells the time.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.masked_diffusion_network import (
    Network,
    checkpoint_names,
    own_names,
    read_config,
    read_network,
)


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

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `config.json`."""
        fixed = {
            "model_type": "llada",
            "architectures": ["MaskedDiffusionDecoder"],
            "block_type": "llama",
            "weight_tying": False,
        }
        return fixed | asdict(self)

    def to_json(self) -> str:
        """Return the text of `config.json`."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

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
        self.network = Network(read_config(config.to_dict()))
        for name, parameter in self.network.named_parameters():
            if parameter.ndim > 1:
                # What is added to the residual stream starts smaller, the deeper the stream.
                residual = ".output." in name or ".down." in name
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
        # Padding attends too, else its rows would be NaN; nobody looks at them.
        visible = (token_ids != self.config.pad_token_id)[:, None, None, :]
        logits: Tensor = self.network.head(self.network(token_ids, 0, None, None, visible))
        return logits

    def checkpoint(self) -> dict[str, Tensor]:
        """Return the weights by the names of LLaDA's checkpoints."""
        return checkpoint_names(self.network.state_dict(), "llada")


def load(folder: Path) -> MaskedDiffusionDecoder:
    """Read `config.json` and `model.safetensors`; float32, in evaluation mode."""
    config = DecoderConfig.from_json((folder / "config.json").read_text(encoding="utf-8"))
    module = MaskedDiffusionDecoder(config)
    module.network = read_network(folder, torch.float32, "cpu")
    return module.eval()


def beginning(folder: Path) -> dict[str, Tensor]:
    """Return the weights, float32, that a training is to begin with.

    Args:
        folder: Of this model, or of its causal twin, which has the same shapes and the same words
            (as Dream began with a causal model's weights, arXiv 2508.15487).
    """
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Llama's names are those of Dream's checkpoints.
    kind = "llada" if settings["model_type"] == "llada" else "dream"
    found = own_names(load_file(folder / "model.safetensors"), kind)
    return {name: weight.float() for name, weight in found.items()}
