"""A decoder of transformers run layer by layer with torch, its attention left to the caller.

Operation for operation what the modules' own forward does, so that with the model's own attention
the logits are those of `models.text.TransformersSession`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from models.attention_cache import CacheShape, RowCache
from models.base import Unsupported
from models.text import PreallocatedLayer, TransformersSession, attention_windows

if TYPE_CHECKING:
    from models.attention import AttentionWork, LayerCache

Attend = Callable[[int, Tensor, "LayerCache"], Tensor]
"""Attention of a layer: number, queries (width, heads, head_dim) and cache to the same shape."""

_DECODERS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
# The others change their frequencies with the longest position seen.
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")


class TorchLayers:
    """Caches and layers of one text, on torch.

    Attributes:
        caches: One a layer.
        work: What they have read.
    """

    def __init__(self, module: Any, capacity: int, *, rotated: bool, work: AttentionWork) -> None:
        """Reserve memory for `capacity` tokens.

        Raises:
            models.base.Unsupported: Another architecture than `layer_windows` knows.
        """
        windows = layer_windows(module)
        config = module.config
        self.work = work
        self._module = module
        self._decoder = module.model
        parameter = next(module.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        memory = [PreallocatedLayer(capacity) for _ in windows]
        self._dense = TransformersSession(module, capacity, memory)
        self._rotated = rotated
        attention = self._decoder.layers[0].self_attn
        kv_heads, head_dim = config.num_key_value_heads, int(attention.head_dim)
        empty = torch.empty(1, kv_heads, 0, head_dim, device=self._device, dtype=self._dtype)
        self.caches: list[TorchCache] = []
        for number, (layer, window) in enumerate(zip(memory, windows, strict=True)):
            layer.lazy_initialization(empty, empty)
            attention = self._decoder.layers[number].self_attn
            self.caches.append(
                TorchCache(
                    layer.keys[0],
                    layer.values[0],
                    CacheShape(
                        config.num_attention_heads,
                        kv_heads,
                        head_dim,
                        float(attention.scaling),
                        window,
                    ),
                    attention=attention,
                    rotated=rotated,
                    rotary=self._rotary,
                    work=work,
                )
            )

    def read_densely(self, token_ids: Sequence[int], *, all_logits: bool) -> Tensor:
        """Read the start of a text with the baseline's own forward; see `Session.prefill`."""
        logits = self._dense.prefill(token_ids, all_logits=all_logits)
        for cache in self.caches:
            cache.adopt(len(token_ids))
        return logits

    def forward(
        self,
        token_ids: Sequence[int],
        position: int,
        attend: Attend,
        *,
        offset: int | None = None,
        first_logit: int | None = 0,
    ) -> Tensor | None:
        """Run tokens through all layers; the caches stay open for `RowCache.close`.

        Args:
            token_ids: In a row.
            position: Of the first of them.
            attend: Attention of each layer.
            offset: First row that they take; behind the committed rows when None.
            first_logit: First token whose logits are wanted; None for no logits at all.

        Returns:
            (tokens - first_logit, vocab), float32.
        """
        width = len(token_ids)
        positions = torch.arange(position, position + width, device=self._device)
        states = self._decoder.embed_tokens(torch.tensor([token_ids], device=self._device))
        cos, sin = self._decoder.rotary_emb(states, positions[None])
        for number, (layer, cache) in enumerate(
            zip(self._decoder.layers, self.caches, strict=True)
        ):
            attention = layer.self_attn
            normed = layer.input_layernorm(states)
            queries, keys, values = (
                project(normed).view(1, width, -1, attention.head_dim).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            if self._rotated:
                queries, keys = apply_rotary_pos_emb(queries, keys, cos, sin)
            cache.open(width, position, offset)
            cache.append(keys[0], values[0])
            queries = queries[0].transpose(0, 1)
            mixed = attend(number, queries, cache)
            if mixed.shape != queries.shape:
                raise ValueError(
                    f"attention is {tuple(queries.shape)}, the rule returned {tuple(mixed.shape)}."
                )
            states = states + attention.o_proj(mixed.reshape(1, width, -1))
            states = states + layer.mlp(layer.post_attention_layernorm(states))
        if first_logit is None:
            return None
        logits: Tensor = self._module.lm_head(self._decoder.norm(states)[:, first_logit:])
        return logits[0].float()

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        probe = torch.empty(0, device=self._device, dtype=self._dtype)
        cos, sin = self._decoder.rotary_emb(probe, positions[None])
        return cos[0], sin[0]


class TorchCache(RowCache):
    """A layer's rows with the attention function that the model itself calls."""

    def __init__(self, *arguments: Any, attention: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._attention = attention
        self._kernel = attention.config._attn_implementation
        self._function: Any = ALL_ATTENTION_FUNCTIONS.get_interface(
            self._kernel, eager_attention_forward
        )

    def _full(self, queries: Tensor) -> Tensor:
        if not self.rotated:
            queries = self.rotate(queries, self._own_positions())
        mixed, _ = self._function(
            self._attention,
            queries.transpose(0, 1)[None],
            self._rotated_keys()[None],
            self.values[None],
            self._mask(),
            dropout=0.0,
            scaling=self.shape.scale,
            sliding_window=self.shape.window,
        )
        result: Tensor = mixed[0]
        return result

    def _mask(self) -> Tensor | None:
        """Return the mask of the model's attention function; None where it needs none."""
        visible = self._visible()
        window = self.shape.window
        if visible is None:
            return None
        is_causal = self._offset == 0 and (window is None or self.width <= window)
        if self._kernel == "sdpa" and is_causal:
            return None  # the function is causal by itself, as in a forward without a cache
        mask = self._per_head(visible)[None]
        if self._kernel == "sdpa":
            return mask
        added = torch.zeros(mask.shape, dtype=self.keys.dtype, device=mask.device)
        return added.masked_fill_(~mask, torch.finfo(added.dtype).min)


def layer_windows(module: Any) -> list[int | None]:
    """Return the attention window of each layer, None for full attention.

    Raises:
        models.base.Unsupported: The layers are not those of a Llama, Mistral or Qwen2 decoder, or
            their attention cannot be taken over.
    """
    kind = type(module).__name__
    if kind not in _DECODERS:
        raise Unsupported(
            f"attention can be changed in Llama, Mistral and Qwen2 decoders, not in {kind}."
        )
    config = module.config
    kernel = config._attn_implementation
    if kernel not in ("sdpa", "eager"):
        raise Unsupported(
            f"attention kernel '{kernel}' takes no mask of single rows; load the model with "
            f"attention=sdpa or attention=eager."
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _FIXED_ROPE:
        raise Unsupported(
            f"rotary positions of type '{rope}' change with the length of the text, so cached "
            f"keys cannot be turned to other positions."
        )
    windows = attention_windows(config)
    kinds = getattr(config, "layer_types", None) or (
        [next(iter(windows))] * config.num_hidden_layers
    )
    if odd := sorted(set(kinds) - set(windows)):
        raise Unsupported(f"{kind} has layers of type {odd}: they have no cache of rows.")
    return [windows[each] for each in kinds]
