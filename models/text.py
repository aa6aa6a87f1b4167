"""Causal language models: transformers' weights, and a session over them that can verify trees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.pytorch_utils import Conv1D

from models.base import Decoding, Generation, Session, TextModelFacts, Tokenizer, Unsupported
from models.decode import decode
from models.device import OnDevice
from models.draft_tree import DraftTree
from models.native.llama import NativeLlama, NativeSession

if TYPE_CHECKING:
    from models.graphs import GraphPool

Kernels = Literal["auto", "native", "graphs", "transformers"]

# Widest tree that a session makes room for before it sees one; wider ones grow the buffers once.
_USUAL_NODES = 16


class CausalLM(OnDevice):
    """A `models.base.TextGenerator` over a causal language model of transformers.

    Attributes:
        module: The transformers model, in evaluation mode.
        tokenizer: Text to ids and back.
        name: Id of the model, for messages and tables.
        facts: Its sizes.
        kernels: What runs the forwards: `native` (C, float32, CPU, Llama-class), `graphs`
            (transformers' forward as recorded CUDA graphs) or `transformers`.
    """

    def __init__(
        self, module: nn.Module, tokenizer: Tokenizer, name: str, *, kernels: Kernels = "auto"
    ) -> None:
        """Wrap a module.

        Args:
            module: A `…ForCausalLM` of transformers.
            tokenizer: Its tokenizer.
            name: Id of the model.
            kernels: `auto` takes the native ones where they support the model.

        Raises:
            models.base.Unsupported: `native` or `graphs` was asked for and does not support the
                model or its device, or the model's layers keep a state that is no cache of keys
                and values.
        """
        self.module: Any = module.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.facts = model_facts(self.module)
        self._native: NativeLlama | None = None
        self._graphs: GraphPool | None = None
        if kernels in ("auto", "native"):
            try:
                self._native = NativeLlama(module)
            except Unsupported:
                if kernels == "native":
                    raise
        if not self._native:
            _refuse_unless_plain_attention(self.module)
        if kernels == "graphs" or (kernels == "auto" and self.device.type == "cuda"):
            self._graphs = self._graph_pool(required=kernels == "graphs")
        self.kernels: Kernels = (
            "native" if self._native else "graphs" if self._graphs else "transformers"
        )

    def session(self, capacity: int) -> Session:
        """Open a cache for at most `capacity` tokens, drafts included."""
        if self._native:
            return _GrowingNativeSession(self._native, capacity, _USUAL_NODES)
        if self._graphs:
            return self._graphs.session(capacity)
        return TransformersSession(self.module, capacity)

    def _graph_pool(self, *, required: bool) -> GraphPool | None:
        from models.graphs import GraphPool  # it builds on this module's session

        try:
            if self.device.type != "cuda":
                raise Unsupported(f"graphs run on a GPU; the weights are on {self.device}.")
            return GraphPool(self.module)
        except Unsupported:
            if required:
                raise
            return None

    def generate(self, prompt_ids: Sequence[int], decoding: Decoding) -> Generation:
        """Continue `prompt_ids` plainly, one token a forward."""
        return decode(self, prompt_ids, decoding)


class TransformersSession:
    """A `models.base.Session` over any causal language model with a cache of keys and values.

    Sliding-window layers keep the whole text and see their window through the mask: nothing is
    dropped that a rollback would need.
    """

    def __init__(
        self, module: Any, capacity: int, layers: Sequence[PreallocatedLayer] | None = None
    ) -> None:
        """Open an empty cache.

        Args:
            module: A causal language model of transformers.
            capacity: Tokens that it holds at most, drafts included.
            layers: Memory to use, one a decoder layer; reserved here when None.
        """
        self._module = module
        self._config = module.config.get_text_config()
        self._device = next(module.parameters()).device
        self._dtype = next(module.parameters()).dtype
        self._layers = layers or [
            PreallocatedLayer(capacity) for _ in range(self._config.num_hidden_layers)
        ]
        self._cache = Cache(layers=list(self._layers))
        self._windows = attention_windows(self._config)
        self.length = 0
        self.capacity = capacity

    @torch.inference_mode()
    def prefill(self, token_ids: Sequence[int], *, all_logits: bool = False) -> Tensor:
        """See `models.base.Session.prefill`."""
        width = len(token_ids)
        # Without a mask and from an empty cache the model builds its own, which is the fastest.
        masks = (
            self._masks(np.tri(width, dtype=np.bool_), np.arange(width)) if self.length else None
        )
        logits = self._forward(
            np.asarray(token_ids, dtype=np.int64), np.arange(width), masks, 0 if all_logits else 1
        )
        self.commit(range(width))
        return logits

    def verify(self, tree: DraftTree) -> Tensor:
        """See `models.base.Session.verify`."""
        return self._run(tree, 0)

    def extend(self, tree: DraftTree, start: int) -> Tensor:
        """Run the nodes of a growing tree from `start` on; those before it wait already.

        For a tree that is drafted level by level: `commit` then keeps a path of all its nodes.

        Returns:
            Logits after each new node, (nodes - start, vocab), float32.
        """
        return self._run(tree, start)

    @torch.inference_mode()
    def commit(self, path: Sequence[int]) -> None:
        """See `models.base.Session.commit`."""
        kept = len(path)
        if path[-1] != kept - 1:
            rows = torch.tensor(path, device=self._device) + self.length
            for layer in self._layers:
                for states in (layer.keys, layer.values):
                    window = states[:, :, self.length : self.length + kept]
                    window.copy_(states.index_select(2, rows))
        self._advance(kept)

    def _advance(self, kept: int) -> None:
        self.length += kept
        self._set_cached(self.length)

    def cached(self) -> tuple[Tensor, Tensor]:
        """Return the committed keys and values, (layers, kv_heads, length, head_dim) each."""
        keys, values = (
            torch.stack([getattr(layer, name)[0, :, : self.length] for layer in self._layers])
            for name in ("keys", "values")
        )
        return keys, values

    @torch.inference_mode()
    def _run(self, tree: DraftTree, start: int) -> Tensor:
        topology = tree.topology
        self._require_room(len(tree))
        plain = len(tree) == 1 and not any(self._windows.values())
        masks = None if plain else self._masks(topology.ancestors, topology.depths, start)
        self._set_cached(self.length + start)
        try:
            return self._forward(tree.tokens[start:], topology.depths[start:], masks, 0)
        finally:
            self._set_cached(self.length)

    def _forward(
        self,
        tokens: npt.NDArray[np.int64],
        depths: npt.NDArray[np.int64],
        masks: Tensor | dict[str, Tensor] | None,
        logits_to_keep: int,
    ) -> Tensor:
        self._require_room(len(tokens))
        output = self._module(
            input_ids=torch.from_numpy(tokens).to(self._device)[None],
            position_ids=torch.from_numpy(depths + self.length).to(self._device)[None],
            attention_mask=masks,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        )
        logits: Tensor = output.logits[0].float()
        return logits

    def _require_room(self, tokens: int) -> None:
        if self.length + tokens > self.capacity:
            raise ValueError(
                f"{tokens} tokens do not fit behind {self.length} cached ones: the session "
                f"was opened for {self.capacity}."
            )

    def _set_cached(self, length: int) -> None:
        for layer in self._layers:
            layer.length = length

    def _masks(
        self, ancestors: npt.NDArray[np.bool_], depths: npt.NDArray[np.int64], start: int = 0
    ) -> Tensor | dict[str, Tensor]:
        """Return the mask of each layer type, or the one mask if there is one type.

        Its rows are the nodes from `start` on, its columns the cached tokens and all nodes.
        """
        positions = np.concatenate([np.arange(self.length), self.length + depths])
        visible = np.concatenate(
            [np.ones((len(depths), self.length), dtype=np.bool_), ancestors], axis=1
        )
        visible = visible[start:]
        distance = positions[self.length + start :, None] - positions[None]
        masks = {
            kind: tree_mask(
                visible if window is None else visible & (distance < window),
                self._config._attn_implementation,
                self._dtype,
                self._device,
            )
            for kind, window in self._windows.items()
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))


class _GrowingNativeSession(NativeSession):
    """A session of the native kernels that can run a tree as it grows, see `TransformersSession`.

    The C forward knows whole trees only, so waiting nodes are run again, without the output head:
    in a small draft model with a large vocabulary that head is most of the work.
    """

    def extend(self, tree: DraftTree, start: int) -> Tensor:
        """See `TransformersSession.extend`."""
        nodes = len(tree)
        self._check_room(nodes)
        self._reserve(nodes, self.capacity)
        logits = self._logits[: nodes - start]
        self._model.forward(
            tree.tokens,
            tree.topology.depths,
            tree.topology.ancestors,
            self.length,
            self._cache,
            self._scratch,
            logits,
            first_logit=start,
        )
        return logits


class PreallocatedLayer(CacheLayerMixin):
    """Keys and values of one layer in memory that is reserved once."""

    keys: Tensor
    values: Tensor

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers has no hint there
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Reserve memory like the states, (batch, kv_heads, tokens, head_dim)."""
        for name, states in (("keys", key_states), ("values", value_states)):
            batch, heads, _, size = states.shape
            setattr(self, name, states.new_empty(batch, heads, self.capacity, size))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new states behind the cached ones; return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length of the keys and the offset of the first."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return the tokens cached."""
        return self.length

    def get_max_length(self) -> int:
        """Return the tokens that fit."""
        return self.capacity


def tree_mask(
    visible: npt.NDArray[np.bool_], attention: str, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return a 4-D attention mask as an attention kernel of transformers wants it.

    Args:
        visible: True where the row's token attends to the column's, (nodes, cached + nodes).
        attention: `sdpa` (boolean mask) or `eager` (added to the scores).
        dtype: Of the added mask.
        device: Of the mask.

    Raises:
        models.base.Unsupported: The kernel takes no mask of this kind.
    """
    mask = torch.from_numpy(visible).to(device)[None, None]
    if attention == "sdpa":
        return mask
    if attention == "eager":
        added = torch.zeros(mask.shape, dtype=dtype, device=device)
        return added.masked_fill_(~mask, torch.finfo(dtype).min)
    raise Unsupported(
        f"attention kernel '{attention}' takes no tree mask; load the model with attention=sdpa or "
        f"attention=eager."
    )


def model_facts(module: Any) -> TextModelFacts:
    """Count a causal language model of transformers."""
    config = module.config.get_text_config()
    heads = config.num_attention_heads
    parameters = list(module.parameters())
    matrices = sum(
        layer.weight.numel() for layer in module.modules() if isinstance(layer, (nn.Linear, Conv1D))
    )
    item_bytes = parameters[0].element_size()
    eos: set[int] = set()
    for source in (module.generation_config.eos_token_id, config.eos_token_id):
        eos.update([source] if isinstance(source, int) else source or [])
    return TextModelFacts(
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        matrix_parameters=matrices,
        head_parameters=module.get_output_embeddings().weight.numel(),
        weight_bytes=matrices * item_bytes,
        kv_item_bytes=item_bytes,
        max_positions=config.max_position_embeddings,
        eos_ids=frozenset(eos),
        dtype=str(parameters[0].dtype).removeprefix("torch."),
    )


def attention_windows(config: Any) -> dict[str, int | None]:
    """Return the attention window of each layer type; None for full attention."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        # Without layer types a window, where the model has one at all, holds for every layer.
        windowed = window if getattr(config, "use_sliding_window", True) else None
        return {"full_attention": windowed}
    return {
        kind: window if kind == "sliding_attention" else None
        for kind in ("full_attention", "sliding_attention")
        if kind in kinds
    }


def _refuse_unless_plain_attention(module: Any) -> None:
    """Raise `Unsupported` for layers whose state is no cache of keys and values."""
    kinds = set(getattr(module.config.get_text_config(), "layer_types", None) or [])
    if odd := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise Unsupported(
            f"{type(module).__name__} has layers of type {odd}: their state cannot be rolled back."
        )
