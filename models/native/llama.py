"""A Llama-class decoder on the CPU's own terms: packed weights and one C call a forward.

Baseline and methods run on it alike. What it computes is the same as transformers' modules up to
the order of float32 additions; `tests/models/test_native.py` holds the two against each other.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from models.base import Unsupported
from models.draft_tree import DraftTree
from models.native.build import load

_INT, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p

# Layer weights in the order in which a forward reads them, by their names in transformers.
_LAYER_WEIGHTS = {
    "input_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k": "self_attn.k_proj.weight",
    "k_bias": "self_attn.k_proj.bias",
    "v": "self_attn.v_proj.weight",
    "v_bias": "self_attn.v_proj.bias",
    "o": "self_attn.o_proj.weight",
    "post_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
_FUNCTIONS = {
    "lanes": [],
    "scratch_floats": [_POINTER, *[_INT] * 3],
    "forward": [_POINTER, *[_INT] * 5, *[_POINTER] * 6],
    "advance_floats": [_POINTER, *[_INT] * 2],
    "advance": [_POINTER, *[_INT] * 7, *[_POINTER] * 8],
    "attend_all": [*[_POINTER] * 6, *[_INT] * 7, _FLOAT, _INT],
    "attend_sets": [*[_POINTER] * 6, *[_INT] * 8, _FLOAT, _INT, _POINTER],
    "score_all": [*[_POINTER] * 3, *[_INT] * 6, _FLOAT, _INT],
    "compact": [*[_POINTER] * 2, *[_INT] * 5],
}
# Prompts are read in pieces: wide enough that weights are reused, small enough for the cache.
PREFILL_WIDTH = 96
_PACKED: weakref.WeakKeyDictionary[nn.Module, NativeLlama] = weakref.WeakKeyDictionary()


class _Layer(ctypes.Structure):
    _fields_ = [(name, _POINTER) for name in _LAYER_WEIGHTS]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, _INT) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim")),
        *((name, _INT) for name in ("intermediate", "vocab")),
        *((name, _FLOAT) for name in ("eps", "scale")),
        *((name, _POINTER) for name in ("embedding", "final_norm", "head", "cos", "sin", "layer")),
    ]


class NativeLlama:
    """The weights of a transformers module, packed, with the C forward over them.

    The module's parameters become views of the packed memory, so nothing is held twice and the
    module itself still works.
    """

    def __init__(self, module: nn.Module) -> None:
        """Pack `module`.

        Raises:
            models.base.Unsupported: Another architecture, dtype or device, or no C compiler.
        """
        self._library = load("llama_cpu.c")
        for name, argument_types in _FUNCTIONS.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = argument_types, _INT
        _refuse_unless_llama(module, int(self._library.lanes()))
        config: Any = module.config
        self._threads = torch.get_num_threads()
        self.num_heads: int = config.num_attention_heads
        self.num_layers: int = config.num_hidden_layers
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = _head_dim(config)
        self.vocab_size: int = config.vocab_size
        self.max_positions: int = config.max_position_embeddings
        self._packed = _pack(module)
        decoder: Any = module.model
        decoder_head: Any = module.lm_head
        self._layers = (_Layer * self.num_layers)()
        for structure, layer in zip(self._layers, decoder.layers, strict=True):
            for field, path in _LAYER_WEIGHTS.items():
                weight = _resolve(layer, path)
                setattr(structure, field, None if weight is None else weight.data_ptr())
        positions = torch.arange(self.max_positions)[None]
        cos, sin = decoder.rotary_emb(torch.zeros(1, dtype=torch.float32), positions)
        self._cos, self._sin = cos[0].float().contiguous(), sin[0].float().contiguous()
        self._model = _Model(
            self.num_layers,
            config.hidden_size,
            config.num_attention_heads,
            self.num_kv_heads,
            self.head_dim,
            config.intermediate_size,
            self.vocab_size,
            config.rms_norm_eps,
            self.head_dim**-0.5,
            decoder.embed_tokens.weight.data_ptr(),
            decoder.norm.weight.data_ptr(),
            decoder_head.weight.data_ptr(),
            self._cos.data_ptr(),
            self._sin.data_ptr(),
            ctypes.addressof(self._layers),
        )
        _PACKED[module] = self

    def scratch(self, nodes: int, capacity: int) -> Tensor:
        """Return working memory for forwards of at most `nodes` tokens."""
        size = self._library.scratch_floats(
            ctypes.addressof(self._model), nodes, capacity, self._threads
        )
        return torch.empty(size, dtype=torch.float32)

    def forward(
        self,
        tokens: npt.NDArray[np.int64],
        depths: npt.NDArray[np.int64],
        ancestors: npt.NDArray[np.bool_],
        length: int,
        cache: Tensor,
        scratch: Tensor,
        logits: Tensor,
        *,
        first_logit: int = 0,
    ) -> None:
        """Run the tokens behind `length` cached ones; keys, values and logits are written in place.

        Args:
            tokens, depths: (nodes,).
            ancestors: (nodes, nodes), C order.
            length: Committed tokens in the cache.
            cache: (2, layers, kv_heads, capacity, head_dim), float32.
            scratch: From `scratch`, for at least as many nodes.
            logits: (nodes - first_logit, vocab), float32.
            first_logit: First node whose logits are wanted.
        """
        self._library.forward(
            ctypes.addressof(self._model),
            len(tokens),
            length,
            cache.shape[3],
            self._threads,
            first_logit,
            tokens.ctypes.data,
            depths.ctypes.data,
            ancestors.ctypes.data,
            cache.data_ptr(),
            scratch.data_ptr(),
            logits.data_ptr(),
        )

    def layerwise(self, capacity: int, rotary: NativeRotary | None = None) -> NativeLayerwise:
        """Return the forward in pieces, for texts of at most `capacity` tokens.

        Args:
            capacity: Rows of a cache.
            rotary: Cosines and sines of positions, (positions, head_dim) each; the model's own
                when None.

        Raises:
            ValueError: The positions end before the capacity does.
        """
        cos, sin = rotary or (self._cos, self._sin)
        if len(cos) < capacity:
            raise ValueError(
                f"a text of {capacity} tokens needs as many positions, got {len(cos)}."
            )
        return NativeLayerwise(self, self._library, ctypes.addressof(self._model), cos, sin)

    @property
    def rotary(self) -> NativeRotary:
        """Cosines and sines of the model's positions, (max_positions, head_dim) each."""
        return self._cos, self._sin

    @property
    def threads(self) -> int:
        """Threads that a forward runs on."""
        return self._threads


NativeRotary = tuple[Tensor, Tensor]
"""Cosines and sines, (positions, head_dim) each, float32."""


class NativeLayerwise:
    """The forward of `NativeLlama` in pieces, with the attention of each layer left to the caller.

    One for a text: the states between two layers are in it.
    """

    def __init__(
        self, model: NativeLlama, library: ctypes.CDLL, address: int, cos: Tensor, sin: Tensor
    ) -> None:
        self._model = model  # holds what the addresses point to
        self._library = library
        self._address = address
        self._cos, self._sin = cos, sin
        self._nodes = 0
        self._lanes = int(library.lanes())
        self._states = torch.empty(0)
        self._scores = torch.empty(0)

    def reserve(self, nodes: int, rows: int) -> None:
        """Make room for forwards of `nodes` tokens over `rows` cached ones, these included."""
        if nodes > self._nodes:
            self._nodes = nodes
            floats = self._library.advance_floats(self._address, nodes, self._model.threads)
            self._states = torch.empty(floats)
        if (floats := self._score_floats(rows)) > len(self._scores):
            self._scores = torch.empty(floats)

    def _score_floats(self, rows: int) -> int:
        """Return the memory that all threads need for scores of so many rows each."""
        return self._model.threads * (rows + 2 * self._lanes)

    def _require_reserved(self, rows: int) -> None:
        if self._score_floats(rows) > len(self._scores):
            raise ValueError(f"attention to {rows} rows was not reserved: call reserve first.")

    def advance(
        self,
        layer: int,
        tokens: npt.NDArray[np.int64],
        position: int,
        row: int,
        mixed: Tensor | None,
        queries: Tensor | None,
        cache: Tensor,
        logits: Tensor | None,
        *,
        first_logit: int = -1,
        rotated: bool = True,
    ) -> None:
        """Run from the attention of layer `layer` - 1 to that of `layer`.

        Args:
            layer: From 0, which starts with the embedding, to the number of layers, which ends
                with the output head.
            tokens: In a row, (nodes,).
            position: Of the first token.
            row: Of the first token in the cache.
            mixed: Attention of the layer before, (nodes, heads, head_dim), contiguous.
            queries: Where this layer's go, (nodes, heads, head_dim).
            cache: (2, layers, kv_heads, capacity, head_dim); this layer's new rows are written.
            logits: Where they go, (nodes - first_logit, vocab).
            first_logit: First node whose logits are wanted; -1 for none.
            rotated: Whether queries and keys get the rotary embedding.
        """
        self._library.advance(
            self._address,
            layer,
            len(tokens),
            position,
            row,
            cache.shape[3],
            self._model.threads,
            first_logit,
            tokens.ctypes.data,
            None if mixed is None else mixed.data_ptr(),
            None if queries is None else queries.data_ptr(),
            self._cos.data_ptr() if rotated else None,
            self._sin.data_ptr() if rotated else None,
            cache.data_ptr(),
            self._states.data_ptr(),
            None if logits is None else logits.data_ptr(),
        )

    def attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        offset: int,
        scale: float,
        *,
        raw: Tensor | None = None,
    ) -> Tensor:
        """Attend to everything, causally: node t to the rows up to `offset` + t.

        Args:
            queries: (nodes, heads, head_dim), contiguous.
            keys, values: (kv_heads, rows, head_dim), the rows of each head one after the other.
            offset: Rows before the nodes' own.
            scale: Factor on the products.
            raw: Where the scores go, (heads, nodes, offset + nodes); nowhere when None.

        Returns:
            (nodes, heads, head_dim).
        """
        nodes, heads, head_dim = queries.shape
        self._require_reserved(offset + nodes)
        out = torch.empty_like(queries)
        self._library.attend_all(
            queries.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            out.data_ptr(),
            None if raw is None else raw.data_ptr(),
            self._scores.data_ptr(),
            heads,
            heads // keys.shape[0],
            nodes,
            offset,
            keys.stride(0),
            values.stride(0),
            head_dim,
            scale,
            self._model.threads,
        )
        return out

    def attend_sets(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: Tensor,
        offset: int,
        scale: float,
    ) -> tuple[Tensor, int]:
        """Attend to chosen rows, causally.

        Args:
            queries, keys, values, offset, scale: See `attend`; keys and values have equal strides.
            rows: (sets, chosen), int64, contiguous; each set serves heads / sets heads in a row.

        Returns:
            (nodes, heads, head_dim), and how many pairs of node and row there were in all sets.

        Raises:
            ValueError: Rows do not ascend or do not exist, or a node is left without any.
        """
        nodes, heads, head_dim = queries.shape
        self._require_reserved(rows.shape[1])
        out = torch.empty_like(queries)
        pairs = ctypes.c_int64()
        problem = self._library.attend_sets(
            queries.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            out.data_ptr(),
            rows.data_ptr(),
            self._scores.data_ptr(),
            heads,
            heads // keys.shape[0],
            *rows.shape,
            nodes,
            offset,
            keys.stride(0),
            head_dim,
            scale,
            self._model.threads,
            ctypes.addressof(pairs),
        )
        if problem == 1:
            raise ValueError(
                f"rows must be ascending, each at most once, from 0 to {offset + nodes - 1}."
            )
        if problem:
            raise ValueError("a query is left without any row that it may see.")
        return out, pairs.value

    def scores(self, queries: Tensor, keys: Tensor, offset: int, scale: float) -> Tensor:
        """Return the products of queries and keys, (heads, nodes, offset + nodes).

        Args:
            queries, keys, offset, scale: See `attend`.
        """
        nodes, heads, head_dim = queries.shape
        out = torch.empty(heads, nodes, offset + nodes)
        self._library.score_all(
            queries.data_ptr(),
            keys.data_ptr(),
            out.data_ptr(),
            heads,
            heads // keys.shape[0],
            nodes,
            offset,
            keys.stride(0),
            head_dim,
            scale,
            self._model.threads,
        )
        return out

    def compact(self, states: Tensor, rows: Tensor) -> None:
        """Move chosen rows of keys or values to the front, in place.

        Args:
            states: (kv_heads, capacity, head_dim), the rows of each head one after the other.
            rows: (1 or kv_heads, chosen), int64, ascending, contiguous.
        """
        kv_heads, _, head_dim = states.shape
        self._library.compact(
            states.data_ptr(),
            rows.data_ptr(),
            rows.shape[0],
            kv_heads,
            rows.shape[1],
            states.stride(0),
            head_dim,
        )


def packed(module: nn.Module) -> NativeLlama | None:
    """Return the kernels that hold a module's weights, the ones packed last; None without any."""
    return _PACKED.get(module)


class NativeSession:
    """A `models.base.Session` over `NativeLlama`. The returned logits live until the next call."""

    def __init__(self, model: NativeLlama, capacity: int, max_nodes: int) -> None:
        self._model = model
        self._nodes = 0
        self._reserve(max_nodes, capacity)
        self._cache = torch.empty(
            2, model.num_layers, model.num_kv_heads, capacity, model.head_dim, dtype=torch.float32
        )
        self.length = 0
        self.capacity = capacity

    def prefill(self, token_ids: Sequence[int], *, all_logits: bool = False) -> Tensor:
        """See `models.base.Session.prefill`."""
        self._check_room(len(token_ids))
        # With all logits the pieces' rows go to one tensor; else only the last token's row matters.
        rows = len(token_ids) if all_logits else 1
        logits = torch.empty(rows, self._model.vocab_size, dtype=torch.float32)
        for start in range(0, len(token_ids), PREFILL_WIDTH):
            piece = np.asarray(token_ids[start : start + PREFILL_WIDTH], dtype=np.int64)
            width = len(piece)
            self._reserve(width, self.capacity)
            self._model.forward(
                piece,
                np.arange(width),
                np.tri(width, dtype=np.bool_),
                self.length,
                self._cache,
                self._scratch,
                logits[start:] if all_logits else logits,
                first_logit=0 if all_logits else width - 1,
            )
            self.length += width
        return logits

    def verify(self, tree: DraftTree) -> Tensor:
        """See `models.base.Session.verify`."""
        nodes = len(tree)
        self._check_room(nodes)
        self._reserve(nodes, self.capacity)
        logits = self._logits[:nodes]
        self._model.forward(
            tree.tokens,
            tree.topology.depths,
            tree.topology.ancestors,
            self.length,
            self._cache,
            self._scratch,
            logits,
        )
        return logits

    def commit(self, path: Sequence[int]) -> None:
        """See `models.base.Session.commit`."""
        kept = len(path)
        if path[-1] != kept - 1:
            rows = torch.tensor(path) + self.length
            window = self._cache[:, :, :, self.length : self.length + kept]
            window.copy_(self._cache.index_select(3, rows))
        self.length += kept

    @property
    def memory(self) -> Tensor:
        """All that is reserved, (2, layers, kv_heads, capacity, head_dim), keys first."""
        return self._cache

    def cached(self) -> tuple[Tensor, Tensor]:
        """Return the committed keys and values, (layers, kv_heads, length, head_dim) each."""
        keys, values = self._cache[:, :, :, : self.length]
        return keys, values

    def _reserve(self, nodes: int, capacity: int) -> None:
        if nodes > self._nodes:
            self._nodes = nodes
            self._scratch = self._model.scratch(nodes, capacity)
            self._logits = torch.empty(nodes, self._model.vocab_size, dtype=torch.float32)

    def _check_room(self, tokens: int) -> None:
        if self.length + tokens > self.capacity:
            raise ValueError(
                f"{tokens} tokens do not fit behind {self.length} cached ones: the session was "
                f"opened for {self.capacity}."
            )


def _refuse_unless_llama(module: nn.Module, lanes: int) -> None:
    """Raise `Unsupported` for anything that the C file does not compute."""
    config: Any = module.config
    kind = type(module).__name__
    if kind not in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"):
        raise Unsupported(f"the native kernels run Llama, Mistral and Qwen2 decoders, not {kind}.")
    parameter = next(module.parameters())
    if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
        raise Unsupported(
            f"the native kernels need float32 on a CPU, got {parameter.dtype} on "
            f"{parameter.device}."
        )
    layer_types = getattr(config, "layer_types", None) or ["full_attention"]
    windowed = getattr(config, "sliding_window", None) and kind == "MistralForCausalLM"
    if windowed or set(layer_types) != {"full_attention"}:
        raise Unsupported("the native kernels have no sliding-window attention.")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ("default", "linear", "llama3"):
        raise Unsupported(f"the native kernels need a fixed rotary embedding, not '{rope}'.")
    if config.hidden_act != "silu" or getattr(config, "mlp_bias", False):
        raise Unsupported("the native kernels need a silu gate without biases.")
    if getattr(module.model.layers[0].self_attn.o_proj, "bias", None) is not None:  # type: ignore[union-attr,index]  # checked by class name
        raise Unsupported("the native kernels have no bias on the attention output.")
    sizes = (config.hidden_size, config.intermediate_size, _head_dim(config))
    if any(size % lanes for size in sizes):
        raise Unsupported(
            f"the native kernels need hidden, intermediate and head sizes in multiples of {lanes}, "
            f"got {sizes}."
        )


def _head_dim(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _resolve(module: nn.Module, path: str) -> Tensor | None:
    """Return the parameter at a dotted path; None where the layer has none."""
    *modules, name = path.split(".")
    for part in modules:
        module = getattr(module, part)
    return getattr(module, name, None)


def _weights(module: nn.Module) -> Iterator[Tensor]:
    """Yield every weight once, in the order in which a forward reads them."""
    decoder: Any = module.model
    for layer in decoder.layers:
        for path in _LAYER_WEIGHTS.values():
            if (weight := _resolve(layer, path)) is not None:
                yield weight
    yield decoder.norm.weight
    head: Any = module.lm_head
    yield head.weight
    if decoder.embed_tokens.weight is not head.weight:
        yield decoder.embed_tokens.weight


def _pack(module: nn.Module) -> Tensor:
    """Move the weights into one block of memory, in reading order, on huge pages if there are any.

    Returns:
        The block, (weights,), float32. It must outlive the module.
    """
    weights = list(_weights(module))
    count = sum(weight.numel() for weight in weights)
    memory = mmap.mmap(-1, count * 4)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    packed = torch.frombuffer(memory, dtype=torch.float32, count=count)
    offset = 0
    with torch.no_grad():
        for weight in weights:
            place = packed[offset : offset + weight.numel()].view_as(weight)
            place.copy_(weight)
            weight.data = place
            offset += weight.numel()
    return packed
