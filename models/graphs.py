"""Sessions whose forwards are recorded once and replayed: CUDA graphs over static buffers.

A small model's step on a GPU takes as long as launching its few hundred kernels; a recorded graph
launches them at once. Baseline and methods get the same graphs. A graph has fixed shapes, so trees
are padded to a few widths and attention runs over the whole buffer under a mask.

The buffers and graphs of a model outlive its sessions and are handed from one to the next; the
first forward of a width pays for recording it, which warm-up is for.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.base import Unsupported
from models.draft_tree import DraftTree
from models.text import PreallocatedLayer, TransformersSession, attention_windows, tree_mask

WIDTHS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Nodes that a recorded forward may have; wider trees run unrecorded."""

_ROWS = 256  # buffers grow in steps of this many tokens, so that few sizes are ever recorded

# The others read a tensor's value in the forward, which a recording cannot.
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")

Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Takes a forward over static buffers and returns what replays it and gives the same tensor."""


def cuda_record(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record a forward as a CUDA graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no hint there
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # libraries allocate and choose kernels in their first calls
            forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = forward()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class GraphPool:
    """The recorded forwards of one model, lent to one session each.

    Args:
        module: A causal language model of transformers.
        record: How a forward is recorded.

    Raises:
        models.base.Unsupported: The model's forward cannot be recorded.
    """

    def __init__(self, module: Any, record: Record = cuda_record) -> None:
        config = module.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        kinds = {
            part["rope_type"]
            for part in (rope, *rope.values())
            if isinstance(part, dict) and "rope_type" in part
        }
        if odd := sorted(kinds - set(_STATIC_ROPE)):
            raise Unsupported(
                f"rotary positions of type {odd} depend on values: no graph holds them."
            )
        self._module = module
        self._record = record
        self._free: dict[int, list[_Recorded]] = {}

    def session(self, capacity: int) -> GraphSession:
        """Open a session for at most `capacity` tokens."""
        rows = -(-(capacity + WIDTHS[-1]) // _ROWS) * _ROWS
        free = self._free.setdefault(rows, [])
        recorded = free.pop() if free else _Recorded(self._module, rows, self._record)
        session = GraphSession(self._module, capacity, recorded)
        weakref.finalize(session, free.append, recorded).atexit = False
        return session


class GraphSession(TransformersSession):
    """A `models.base.Session` that replays its verify forwards."""

    def __init__(self, module: Any, capacity: int, recorded: _Recorded) -> None:
        super().__init__(module, capacity, recorded.layers)
        self._recorded = recorded
        for layer in recorded.layers:
            layer.length = 0

    @torch.inference_mode()
    def verify(self, tree: DraftTree) -> Tensor:
        """See `models.base.Session.verify`."""
        width = next((width for width in WIDTHS if width >= len(tree)), None)
        if width is None or not self._recorded.layers[0].is_initialized:
            return super().verify(tree)
        self._require_room(len(tree))
        logits = self._recorded.forward(tree, self.length, width)
        return logits[: len(tree)].to(torch.float32, copy=True)  # the next replay overwrites it

    def extend(self, tree: DraftTree, start: int) -> Tensor:
        """See `TransformersSession.extend`; replaying the whole tree costs less than launching."""
        return self.verify(tree)[start:]

    @torch.inference_mode()
    def commit(self, path: Sequence[int]) -> None:
        """See `models.base.Session.commit`."""
        stack = self._recorded.stack
        if stack is None or path[-1] == len(path) - 1:
            super().commit(path)
            return
        rows = torch.tensor(path, device=self._device) + self.length
        window = stack[:, :, :, self.length : self.length + len(path)]
        window.copy_(stack.index_select(3, rows))
        self._advance(len(path))


class _Recorded:
    """Static buffers of one session and the forwards recorded over them."""

    def __init__(self, module: Any, rows: int, record: Record) -> None:
        config = module.config.get_text_config()
        self.rows = rows
        self.stack: Tensor | None = None
        self.layers = [_StaticLayer(self, n) for n in range(config.num_hidden_layers)]
        self._module = module
        self._record = record
        self._config = config
        self._device = next(module.parameters()).device
        self._dtype = next(module.parameters()).dtype
        self._windows = attention_windows(config)
        self._widths: dict[int, _Width] = {}

    def forward(self, tree: DraftTree, length: int, width: int) -> Tensor:
        """Return the logits of a tree behind `length` cached tokens, padded, (width, vocab).

        Padding writes behind the tree, sees itself only and is overwritten by what comes next.
        """
        nodes, topology = len(tree), tree.topology
        offsets = np.arange(width)
        tokens = np.zeros(width, dtype=np.int64)
        tokens[:nodes] = tree.tokens
        positions = np.full(width, length)
        positions[:nodes] += topology.depths
        visible = np.zeros((width, self.rows), dtype=np.bool_)
        visible[:nodes, :length] = True
        visible[:nodes, length : length + nodes] = topology.ancestors
        visible[offsets[nodes:], length + offsets[nodes:]] = True
        columns = np.arange(self.rows)
        columns[length : length + nodes] = positions[:nodes]
        distance = positions[:, None] - columns[None]

        recorded = self._widths.get(width)
        is_new = recorded is None
        if recorded is None:
            recorded = self._widths[width] = _Width(width, self._device)
        recorded.tokens.copy_(torch.from_numpy(tokens)[None])
        recorded.positions.copy_(torch.from_numpy(positions)[None])
        recorded.written.copy_(torch.from_numpy(length + offsets))
        for kind, window in self._windows.items():
            seen = visible if window is None else visible & (distance < window)
            mask = tree_mask(seen, self._config._attn_implementation, self._dtype, self._device)
            if is_new:
                recorded.masks[kind] = mask.clone()
            else:
                recorded.masks[kind].copy_(mask)
        for layer in self.layers:
            layer.written = recorded.written
        try:
            if recorded.replay is None:
                recorded.replay = self._record(lambda: self._plain(recorded))
            return recorded.replay()
        finally:
            for layer in self.layers:
                layer.written = None

    def _plain(self, recorded: _Width) -> Tensor:
        masks = recorded.masks
        output = self._module(
            input_ids=recorded.tokens,
            position_ids=recorded.positions,
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            past_key_values=self._cache(),
            use_cache=True,
            logits_to_keep=0,
        )
        logits: Tensor = output.logits[0]
        return logits

    def _cache(self) -> Any:
        from transformers.cache_utils import Cache

        return Cache(layers=list(self.layers))


class _Width:
    """The inputs and the recording of one width."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.tokens = torch.zeros((1, width), dtype=torch.int64, device=device)
        self.positions = torch.zeros((1, width), dtype=torch.int64, device=device)
        self.written = torch.zeros(width, dtype=torch.int64, device=device)
        self.masks: dict[str, Tensor] = {}
        self.replay: Callable[[], Tensor] | None = None


class _StaticLayer(PreallocatedLayer):
    """A layer of the buffers; while `written` is set, it writes there and shows all of itself."""

    def __init__(self, recorded: _Recorded, number: int) -> None:
        super().__init__(recorded.rows)
        self.written: Tensor | None = None
        self._recorded = weakref.proxy(recorded)
        self._number = number

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, since what the mask hides still takes part as 0 x value: no NaN may lie there.
        batch, heads, _, size = key_states.shape
        shape = (batch, heads, self.capacity, size)
        if self._number == 0 and key_states.shape == value_states.shape:
            self._recorded.stack = key_states.new_zeros(
                (2, len(self._recorded.layers), heads, self.capacity, size)
            )
        stack = self._recorded.stack
        if (
            stack is not None
            and stack.shape[2:] == shape[1:] == value_states.shape[1:2] + shape[2:]
        ):
            self.keys, self.values = stack[0, self._number][None], stack[1, self._number][None]
        else:
            self._recorded.stack = None  # layers differ: each is compacted on its own
            self.keys = key_states.new_zeros(shape)
            self.values = value_states.new_zeros((*shape[:3], value_states.shape[3]))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.written is None:
            return super().update(key_states, value_states)
        self.keys.index_copy_(2, self.written, key_states)
        self.values.index_copy_(2, self.written, value_states)
        return self.keys, self.values
