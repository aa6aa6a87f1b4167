"""The network of LLaDA- and Dream-class checkpoints: a decoder without a causal mask.

Both are Llama-like (RoPE that rotates halves, RMSNorm, SwiGLU, grouped keys and values) and differ
in the names of their weights, in biases and in what the output at a position is about. One module
runs both, so that caches and decoders are written once; no code of a checkpoint is run.

Sources: LLaDA (arXiv 2502.09992), weights of GSAI-ML/LLaDA-8B; Dream (arXiv 2508.15487), weights of
Dream-org/Dream-v0-7B, which has the names and the biases of Qwen2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.base import Unsupported
from models.masked_diffusion_files import MODEL_TYPES, model_type


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Sizes and special ids, whatever a checkpoint calls them.

    Attributes:
        width: Of the residual stream.
        num_heads, num_kv_heads: Query heads; key and value heads.
        num_layers: Blocks.
        inner_width: Of the SwiGLU.
        vocab_size: Rows of the embedding, which may be more than there are tokens.
        rope_theta: Base of the rotary embedding.
        norm_epsilon: Of all norms.
        max_positions: Longest sequence of the training.
        mask_id: Stands for a token not yet decided.
        eos_ids: End a text.
        has_qkv_bias: Whether queries, keys and values have biases.
        is_tied: Whether the output head is the embedding.
        is_shifted: Whether the output at i is about the token at i + 1.
    """

    width: int
    num_heads: int
    num_kv_heads: int
    num_layers: int
    inner_width: int
    vocab_size: int
    rope_theta: float
    norm_epsilon: float
    max_positions: int
    mask_id: int
    eos_ids: frozenset[int]
    has_qkv_bias: bool
    is_tied: bool
    is_shifted: bool

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.width // self.num_heads

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by name, as configurations of transformers do."""
        return asdict(self)


class Kept(NamedTuple):
    """Keys and values of one layer at every position, (rows, kv_heads, positions, head_dim)."""

    keys: Tensor
    values: Tensor


class Network(nn.Module):
    """Token ids in, hidden states out; every position sees all others that are visible."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.norm = _RMSNorm(config.width, config.norm_epsilon)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.is_tied:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        token_ids: Tensor,
        first: int,
        kept: Sequence[Kept] | None,
        rows: Tensor | None,
        visible: Tensor | None,
    ) -> Tensor:
        """Return the hidden states that the output head reads.

        Args:
            token_ids: (rows, width), at positions `first`, `first + 1`, ...
            first: Position of the first of them.
            kept: Where each layer's keys and values are kept; those of the positions run are
                written there, and all of them are attended to. None to attend to the positions run
                alone.
            rows: Rows of `kept` that these are, (rows,); all when None.
            visible: True at positions that are seen, (rows, 1, 1, positions); all when None.

        Returns:
            (rows, width, config.width).
        """
        width = token_ids.shape[1]
        rotation = _rotation(
            first, width, self.config.head_dim, self.config.rope_theta, token_ids.device
        )
        hidden = self.embedding(token_ids)
        for number, layer in enumerate(self.layers):
            memory = kept[number] if kept is not None else None
            hidden = layer(hidden, rotation, first, memory, rows, visible)
        states: Tensor = self.norm(hidden)
        return states


class _RMSNorm(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        # In float32 at least and back, as both checkpoints' own code has it.
        normed = F.rms_norm(_wide(hidden), self.weight.shape, None, self.epsilon)
        return normed.to(hidden.dtype) * self.weight


class _Layer(nn.Module):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        width, kv_width = config.width, config.head_dim * config.num_kv_heads
        self.attention_norm = _RMSNorm(width, config.norm_epsilon)
        self.query = nn.Linear(width, width, bias=config.has_qkv_bias)
        self.key = nn.Linear(width, kv_width, bias=config.has_qkv_bias)
        self.value = nn.Linear(width, kv_width, bias=config.has_qkv_bias)
        self.output = nn.Linear(width, width, bias=False)
        self.mlp_norm = _RMSNorm(width, config.norm_epsilon)
        self.gate = nn.Linear(width, config.inner_width, bias=False)
        self.up = nn.Linear(width, config.inner_width, bias=False)
        self.down = nn.Linear(config.inner_width, width, bias=False)

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        first: int,
        kept: Kept | None,
        rows: Tensor | None,
        visible: Tensor | None,
    ) -> Tensor:
        normed = self.attention_norm(hidden)
        query = _rotate(self._heads(self.query(normed), self.num_heads), *rotation)
        key = _rotate(self._heads(self.key(normed), self.num_kv_heads), *rotation)
        value = self._heads(self.value(normed), self.num_kv_heads)
        if kept is not None:
            key, value = _replace(kept, key, value, first, rows)
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, enable_gqa=self.num_heads != self.num_kv_heads
        )
        hidden = hidden + self.output(attended.transpose(1, 2).flatten(2))
        normed = self.mlp_norm(hidden)
        inner: Tensor = self.down(F.silu(self.gate(normed)) * self.up(normed))
        return hidden + inner

    def _heads(self, states: Tensor, heads: int) -> Tensor:
        rows, tokens, _ = states.shape
        return states.view(rows, tokens, heads, self.head_dim).transpose(1, 2)


def _replace(
    kept: Kept, key: Tensor, value: Tensor, first: int, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Write new keys and values over those kept; return those of all positions of the rows."""
    last = first + key.shape[2]
    found = []
    for memory, states in ((kept.keys, key), (kept.values, value)):
        if rows is None:
            memory[:, :, first:last] = states
            found.append(memory)
        else:
            memory[rows, :, first:last] = states
            found.append(memory[rows])
    return found[0], found[1]


def _rotation(
    first: int, tokens: int, head_dim: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the positions' angles, (tokens, head_dim) each, float32."""
    powers = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    places = torch.arange(first, first + tokens, device=device, dtype=torch.float32)
    angles = torch.outer(places, theta**-powers)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _wide(states: Tensor) -> Tensor:
    """Return the states in float32, or as they are where they are wider."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate halves, not neighbours; in float32 at least."""
    wide = _wide(states)
    front, back = wide.chunk(2, dim=-1)
    return (wide * cosine + torch.cat([-back, front], dim=-1) * sine).to(states.dtype)


# ---- checkpoints

# Settings of LLaDA's code for other networks than this one, and what they must be.
_LLADA_FIXED: Mapping[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "activation_type": ("silu", "swiglu"),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "rope_full_precision": (True,),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "block_group_size": (1,),
    "include_bias": (False,),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
    "clip_qkv": (None,),
}
_DREAM_FIXED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "use_sliding_window": (False,),
}

_LLADA_NAMES = {
    "model.transformer.wte": "embedding",
    "model.transformer.ln_f": "norm",
    "model.transformer.ff_out": "head",
}
_LLADA_LAYER = {
    "attn_norm": "attention_norm",
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "attn_out": "output",
    "ff_norm": "mlp_norm",
    "ff_proj": "gate",
    "up_proj": "up",
    "ff_out": "down",
}
_DREAM_NAMES = {
    "model.embed_tokens": "embedding",
    "model.norm": "norm",
    "lm_head": "head",
}
_DREAM_LAYER = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.o_proj": "output",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}


class _Naming(NamedTuple):
    """How a class of checkpoints names its weights: outside of the layers, their place, inside."""

    outside: Mapping[str, str]
    layers: str
    inside: Mapping[str, str]


_NAMING = {
    "llada": _Naming(_LLADA_NAMES, "model.transformer.blocks", _LLADA_LAYER),
    "dream": _Naming(_DREAM_NAMES, "model.layers", _DREAM_LAYER),
}


def read_config(settings: Mapping[str, Any]) -> NetworkConfig:
    """Read the content of a `config.json`.

    Raises:
        Unsupported: It is of another class of model, or of a variant that is not run here.
    """
    kind = model_type(settings)
    if kind not in MODEL_TYPES:
        raise Unsupported(
            f"no masked-diffusion model of type {kind!r} is known; there are those of type "
            f"{', '.join(MODEL_TYPES)}."
        )
    fixed = _LLADA_FIXED if kind == "llada" else _DREAM_FIXED
    for name, allowed in fixed.items():
        if settings.get(name, allowed[0]) not in allowed:
            raise Unsupported(f"a {kind} model with {name} = {settings[name]!r} is not run here.")
    return _llada(settings) if kind == "llada" else _dream(settings)


def _llada(settings: Mapping[str, Any]) -> NetworkConfig:
    heads = settings["n_heads"]
    return NetworkConfig(
        width=settings["d_model"],
        num_heads=heads,
        num_kv_heads=settings.get("n_kv_heads") or heads,
        num_layers=settings["n_layers"],
        inner_width=settings["mlp_hidden_size"],
        vocab_size=settings.get("embedding_size") or settings["vocab_size"],
        rope_theta=settings["rope_theta"],
        norm_epsilon=settings["rms_norm_eps"],
        max_positions=settings["max_sequence_length"],
        mask_id=settings["mask_token_id"],
        eos_ids=_ids(settings["eos_token_id"]),
        has_qkv_bias=bool(settings.get("include_qkv_bias", False)),
        is_tied=bool(settings.get("weight_tying", False)),
        is_shifted=False,
    )


def _dream(settings: Mapping[str, Any]) -> NetworkConfig:
    heads = settings["num_attention_heads"]
    return NetworkConfig(
        width=settings["hidden_size"],
        num_heads=heads,
        num_kv_heads=settings.get("num_key_value_heads") or heads,
        num_layers=settings["num_hidden_layers"],
        inner_width=settings["intermediate_size"],
        vocab_size=settings["vocab_size"],
        rope_theta=settings["rope_theta"],
        norm_epsilon=settings["rms_norm_eps"],
        max_positions=settings["max_position_embeddings"],
        mask_id=settings["mask_token_id"],
        eos_ids=_ids(settings["eos_token_id"]),
        has_qkv_bias=True,
        is_tied=bool(settings.get("tie_word_embeddings", False)),
        is_shifted=True,
    )


def _ids(value: int | Sequence[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset([value] if isinstance(value, int) else value)


def read_network(folder: Path, dtype: torch.dtype, device: str) -> Network:
    """Read `config.json` and `*.safetensors` of a LLaDA- or Dream-class checkpoint.

    Raises:
        Unsupported: See `read_config`.
        ValueError: A weight is missing, too much, or of another shape.
    """
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = read_config(settings)
    with torch.device("meta"):
        network = Network(config)
    # Filled in place of the empty ones, so that no weight is in memory twice.
    naming, expected = _NAMING[model_type(settings)], network.state_dict()
    found: dict[str, Tensor] = {}
    for key, weight in _weights(folder, device):
        name = _our_name(key, naming)
        if name not in expected:
            if key.endswith("rotary_emb.inv_freq"):
                continue  # a table that follows from `rope_theta`
            raise ValueError(f"{folder} holds a weight {key!r} that the network has no place for.")
        if weight.shape != expected[name].shape:
            raise ValueError(
                f"{key!r} of {folder} is {tuple(weight.shape)}; by config.json it should be "
                f"{tuple(expected[name].shape)}."
            )
        found[name] = weight.to(dtype)
    if config.is_tied:
        found["head.weight"] = found.get("embedding.weight", found.get("head.weight"))  # type: ignore[assignment]  # a missing one is reported below
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"{folder} lacks {len(missing)} weights, {missing[0]!r} among them.")
    network.load_state_dict(found, assign=True)
    network.requires_grad_(False)
    return network.eval()


def _weights(folder: Path, device: str) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt", device=device) as file:
            for key in file.keys():  # noqa: SIM118  # a file of safetensors is no mapping
                yield key, file.get_tensor(key)


def checkpoint_names(weights: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Return a network's weights by the names that a class of checkpoints has for them.

    Args:
        weights: By name in `Network`.
        kind: One of `MODEL_TYPES`.
    """
    naming = _NAMING[kind]
    outside = {ours: theirs for theirs, ours in naming.outside.items()}
    inside = {ours: theirs for theirs, ours in naming.inside.items()}
    found = {}
    for name, weight in weights.items():
        stem, _, part = name.rpartition(".")
        if stem in outside:
            theirs = outside[stem]
        else:
            _, number, ours = stem.split(".", 2)
            theirs = f"{naming.layers}.{number}.{inside[ours]}"
        found[f"{theirs}.{part}"] = weight
    return found


def own_names(weights: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Return a checkpoint's weights by their names in `Network`, as `checkpoint_names` reversed."""
    return {_our_name(key, _NAMING[kind]): weight for key, weight in weights.items()}


def _our_name(key: str, naming: _Naming) -> str:
    """Return what a checkpoint's weight is called in `Network`; the key itself if unknown."""
    stem, _, kind = key.rpartition(".")
    if stem in naming.outside:
        return f"{naming.outside[stem]}.{kind}"
    inside = re.fullmatch(re.escape(naming.layers) + r"\.(\d+)\.(.+)", stem)
    if inside and inside[2] in naming.inside:
        return f"layers.{inside[1]}.{naming.inside[inside[2]]}.{kind}"
    return key
