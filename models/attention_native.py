"""A decoder run layer by layer on the native kernels, its attention left to the caller.

The start of a prompt is read by the baseline's own forward, into the same memory. Everything else
goes through the same C functions one layer at a time, so that with full attention the logits are
those of the baseline to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from models.attention_cache import CacheShape, RowCache
from models.native.llama import PREFILL_WIDTH, NativeLayerwise, NativeLlama, NativeSession

if TYPE_CHECKING:
    from models.attention import AttentionWork
    from models.attention_torch import Attend


class NativeLayers:
    """Caches and layers of one text, on the native kernels; see `TorchLayers`.

    Attributes:
        caches: One a layer.
        work: What they have read.
    """

    def __init__(
        self,
        kernels: NativeLlama,
        module: Any,
        capacity: int,
        *,
        rotated: bool,
        work: AttentionWork,
    ) -> None:
        """Reserve memory for `capacity` tokens.

        Args:
            kernels: The model.
            module: The transformers module that it was packed from, for its rotary embedding.
            capacity: Tokens.
            rotated: Whether keys are stored with their positions applied.
            work: Where all that is read is counted.
        """
        self.work = work
        self._kernels = kernels
        self._rotated = rotated
        self._rotary_embedding = module.model.rotary_emb
        tables = kernels.rotary
        if capacity > len(tables[0]):
            tables = self._rotary(torch.arange(capacity))
        self._tables = tables
        self._layers = kernels.layerwise(capacity, tables)
        self._dense = NativeSession(kernels, capacity, 1)
        self._memory = self._dense.memory
        shape = CacheShape(
            kernels.num_heads,
            kernels.num_kv_heads,
            kernels.head_dim,
            kernels.head_dim**-0.5,
            None,
        )
        self.caches = [
            NativeCache(
                self._memory[0, number],
                self._memory[1, number],
                shape,
                layers=self._layers,
                rotated=rotated,
                rotary=self._rotary,
                work=work,
            )
            for number in range(kernels.num_layers)
        ]

    def read_densely(self, token_ids: Sequence[int], *, all_logits: bool) -> Tensor:
        """Read the start of a text with the baseline's own forward; see `Session.prefill`."""
        if len(token_ids) > self._kernels.max_positions:
            return self._read_far(list(token_ids), all_logits=all_logits)
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
        """Run tokens through all layers; see `TorchLayers.forward`."""
        layers, kernels, memory = self._layers, self._kernels, self._memory
        tokens = np.asarray(token_ids, dtype=np.int64)
        width = len(tokens)
        size = (width, kernels.num_heads, kernels.head_dim)
        mixed: Tensor | None = None
        layers.reserve(width, memory.shape[3])
        for number, cache in enumerate(self.caches):
            cache.open(width, position, offset)
            # New memory for each layer: a rule may keep its queries for the next forward.
            queries = torch.empty(size)
            layers.advance(
                number,
                tokens,
                position,
                cache.length - width,
                mixed,
                queries,
                memory,
                None,
                rotated=self._rotated,
            )
            mixed = attend(number, queries, cache)
            if mixed.shape != size:
                raise ValueError(f"attention is {size}, the rule returned {tuple(mixed.shape)}.")
            mixed = mixed.contiguous()
        logits = None
        if first_logit is not None:
            logits = torch.empty(width - first_logit, kernels.vocab_size)
        layers.advance(
            kernels.num_layers,
            tokens,
            position,
            0,
            mixed,
            None,
            memory,
            logits,
            first_logit=-1 if first_logit is None else first_logit,
        )
        return logits

    def _read_far(self, token_ids: list[int], *, all_logits: bool) -> Tensor:
        """Read a text beyond the positions that the model's own forward has tables for."""
        logits: list[Tensor] = []
        for start in range(0, len(token_ids), PREFILL_WIDTH):
            piece = token_ids[start : start + PREFILL_WIDTH]
            is_last = start + len(piece) == len(token_ids)
            first = 0 if all_logits else len(piece) - 1 if is_last else None
            found = self.forward(
                piece, start, lambda _, queries, cache: cache.attend(queries), first_logit=first
            )
            if found is not None:
                logits.append(found)
            for cache in self.caches:
                cache.close(len(piece))
        return torch.cat(logits)

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        tables = getattr(self, "_tables", None)
        if tables is not None and positions.numel() <= len(tables[0]):
            return tables[0][positions], tables[1][positions]
        cos, sin = self._rotary_embedding(torch.empty(0), positions[None])
        return cos[0], sin[0]


class NativeCache(RowCache):
    """A layer's rows with the attention of the native kernels."""

    def __init__(self, *arguments: Any, layers: NativeLayerwise, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._layers = layers

    def attend_with_scores(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """See `models.attention.LayerCache.attend_with_scores`."""
        self._count_all(values=True)
        raw = torch.empty(self.shape.heads, self.width, self.length)
        return self._full(queries, raw), raw

    def attend_rows(
        self, queries: Tensor, rows: Tensor, *, positions: Tensor | None = None
    ) -> Tensor:
        """See `models.attention.LayerCache.attend_rows`."""
        if positions is not None or not self.rotated:
            return super().attend_rows(queries, rows, positions=positions)
        sets = self._shaped(rows)
        mixed, pairs = self._layers.attend_sets(
            queries.contiguous(),
            self._keys,
            self._values,
            sets.contiguous(),
            self._offset,
            self.shape.scale,
        )
        self._count_rows(sets, pairs / sets.shape[0])
        return mixed

    def scores(self, queries: Tensor, *, scale: float | None = None) -> Tensor:
        """See `models.attention.LayerCache.scores`."""
        self._count_scores(queries)
        scale = self.shape.scale if scale is None else scale
        before = self.length - queries.shape[0]
        return self._layers.scores(queries.contiguous(), self._keys, before, scale)

    def _full(self, queries: Tensor, raw: Tensor | None = None) -> Tensor:
        keys = self._keys
        if not self.rotated:
            queries = self.rotate(queries, self._own_positions())
            keys = self._rotated_keys()
        return self._layers.attend(
            queries.contiguous(), keys, self._values, self._offset, self.shape.scale, raw=raw
        )

    def _attend_gathered(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        visible: Tensor | None,
        *,
        is_tail: bool,
    ) -> Tensor:
        if visible is not None and not is_tail:
            return super()._attend_gathered(queries, keys, values, visible, is_tail=is_tail)
        return self._layers.attend(
            queries.contiguous(), keys, values, keys.shape[1] - self.width, self.shape.scale
        )

    def _compact(self, sets: Tensor) -> None:
        rows = sets.contiguous()
        self._layers.compact(self._keys, rows)
        self._layers.compact(self._values, rows)
