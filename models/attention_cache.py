"""Rows of keys and values of one layer: who they are, which are read, which are dropped.

The base of the caches of `models.attention`: everything but the model's own full attention, in
torch operations that run anywhere. The native kernels replace the operations, not the bookkeeping.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from models.attention import AttentionWork

Rotary = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Cosines and sines at positions, (tokens,) to (tokens, head_dim) twice, as the model has them."""


class CacheShape(NamedTuple):
    """Sizes of one layer's attention.

    Attributes:
        heads: Query heads.
        kv_heads: Key-value heads; query head h reads number h // (heads / kv_heads).
        head_dim: Size of a head.
        scale: Factor on the products of queries and keys.
        window: Tokens that a query sees, itself included; None for all.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None


class RowCache:
    """Rows of one layer; see `models.attention.LayerCache` for what a rule may do with it.

    Between forwards `rows` of the memory are in use. A forward opens the cache, which adds its
    tokens behind them, and closes it with the tokens that stay.

    Attributes:
        rows: Rows of committed tokens.
        length, width, in_prompt, ends_prompt: See `models.attention.LayerCache`.
        was_dropped: Whether rows have been dropped, so that a row's number is no longer its
            token's position.
        notes_reads: Whether `reads` is kept.
        reads: Positions that each attention read, (sets, rows); None where it read all tokens.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        shape: CacheShape,
        *,
        rotated: bool,
        rotary: Rotary,
        work: AttentionWork,
    ) -> None:
        """Take over memory.

        Args:
            keys, values: (kv_heads, capacity, head_dim).
            shape: Sizes.
            rotated: Whether keys are stored, and queries given, with their positions applied.
            rotary: The model's rotary embedding.
            work: Where all that is read is counted.
        """
        self._keys, self._values = keys, values
        self.shape = shape
        self.rotated = rotated
        self._rotary = rotary
        self._work = work
        self._group = shape.heads // shape.kv_heads
        self._counting = torch.arange(keys.shape[1], device=keys.device)
        self._owners = torch.arange(shape.heads, device=keys.device) // self._group
        self._places: Tensor | None = None  # positions of the rows, once they are not 0, 1, 2, ...
        self._kept: Tensor | None = None
        self._offset = 0
        self._position = 0
        self.rows = 0
        self.length = 0
        self.width = 0
        self.in_prompt = False
        self.ends_prompt = False
        self.notes_reads = False
        self.reads: list[Tensor | None] = []

    # --- for the session ---

    @property
    def was_dropped(self) -> bool:
        """Whether rows have been dropped."""
        return self._places is not None

    def open(self, width: int, position: int, offset: int | None = None) -> None:
        """Make room for the `width` tokens of a forward at positions `position`, ...

        Args:
            width: Tokens.
            position: Of the first of them.
            offset: First row that they take; behind all committed rows when None.
        """
        self._offset = self.rows if offset is None else offset
        self._position = position
        self._kept = None
        self.width = width
        self.length = self._offset + width
        if self._places is not None:
            self._places[:, self._offset : self.length] = torch.arange(
                position, position + width, device=self._places.device
            )

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Write the new tokens' rows, (kv_heads, width, head_dim) each."""
        self._keys[:, self._offset : self.length] = keys
        self._values[:, self._offset : self.length] = values

    def close(self, tokens: int | None) -> None:
        """End a forward.

        Args:
            tokens: New tokens that stay, the first ones; None leaves the committed rows alone.
        """
        if tokens is not None:
            self.rows = self._offset + tokens
            if self._kept is not None:
                self._drop(self._kept)
        self._kept = None
        self.length, self.width = self.rows, 0

    def adopt(self, tokens: int) -> None:
        """Count `tokens` rows that the model's own forward wrote behind the committed ones.

        Their keys are rotated; where this cache wants them without, the rotation is undone.
        """
        if not self.rotated:
            fresh = slice(self.rows, self.rows + tokens)
            states = self._keys[:, fresh].transpose(0, 1)
            self._keys[:, fresh] = self._unrotate(states, self._counting[fresh]).transpose(0, 1)
        pairs = tokens * (tokens + 1) // 2
        self._count(self.shape.kv_heads * tokens, self.shape.kv_heads * tokens, pairs, products=2)
        self.rows += tokens
        self.length = self.rows

    # --- for the rule ---

    @property
    def keys(self) -> Tensor:
        """Keys, (kv_heads, length, head_dim)."""
        return self._keys[:, : self.length]

    @property
    def values(self) -> Tensor:
        """Values, (kv_heads, length, head_dim)."""
        return self._values[:, : self.length]

    @property
    def positions(self) -> Tensor:
        """Position of each row's token, (kv_heads, length), int64."""
        if self._places is not None:
            return self._places[:, : self.length]
        return self._counting[: self.length].expand(self.shape.kv_heads, -1)

    def attend(self, queries: Tensor) -> Tensor:
        """See `models.attention.LayerCache.attend`."""
        self._count_all(values=True)
        return self._full(queries)

    def attend_with_scores(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """See `models.attention.LayerCache.attend_with_scores`."""
        mixed = self.attend(queries)
        if not self.rotated:
            queries = self.rotate(queries, self._own_positions())
            return mixed, self._products(queries, self._rotated_keys(), self.shape.scale)
        return mixed, self._products(queries, self.keys, self.shape.scale)

    def attend_rows(
        self, queries: Tensor, rows: Tensor, *, positions: Tensor | None = None
    ) -> Tensor:
        """See `models.attention.LayerCache.attend_rows`."""
        sets = self._checked(rows)
        visible = self._visible_rows(sets)
        keys, values = self._gather(self._keys, sets), self._gather(self._values, sets)
        if positions is not None:
            self._check_positions(sets, positions)
            queries, keys = self._moved(queries, keys, sets, positions)
        elif not self.rotated:
            queries = self.rotate(queries, self._own_positions())
            keys = self._rotate_rows(keys, self._places_of(sets))
        chosen = sets.shape[1]
        self._count_rows(sets, self._pairs(visible, chosen))
        return self._attend_gathered(queries, keys, values, visible, is_tail=positions is not None)

    def scores(self, queries: Tensor, *, scale: float | None = None) -> Tensor:
        """See `models.attention.LayerCache.scores`."""
        self._count_scores(queries)
        return self._products(queries, self.keys, self.shape.scale if scale is None else scale)

    def rotate(self, states: Tensor, positions: Tensor) -> Tensor:
        """See `models.attention.LayerCache.rotate`."""
        cos, sin = (each[:, None] for each in self._rotary(positions))
        return states * cos + _rotate_half(states) * sin

    def keep(self, rows: Tensor) -> None:
        """See `models.attention.LayerCache.keep`."""
        sets = self._checked(rows)
        if sets.shape[0] not in (1, self.shape.kv_heads):
            raise ValueError(
                f"rows are kept for a key-value head, of which there are {self.shape.kv_heads}; "
                f"got {sets.shape[0]} sets."
            )
        self._kept = sets

    # --- how ---

    def _full(self, queries: Tensor) -> Tensor:
        """Attend to all rows; the model's own attention, so subclasses bring it."""
        raise NotImplementedError

    def _own_positions(self) -> Tensor:
        """Return the positions of the new tokens, (width,)."""
        return self._counting[self._position : self._position + self.width]

    def _rotated_keys(self) -> Tensor:
        """Return the keys at their true positions, (kv_heads, length, head_dim)."""
        return self.keys if self.rotated else self._rotate_rows(self.keys, self.positions)

    def _rotate_rows(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Rotate keys, (sets, chosen, head_dim), at positions, (chosen,) or (sets, chosen)."""
        cos, sin = self._rotary(positions.reshape(-1))
        cos, sin = (each.view(*positions.shape, -1) for each in (cos, sin))
        return keys * cos + _rotate_half(keys) * sin

    def _unrotate(self, states: Tensor, positions: Tensor) -> Tensor:
        """Undo `rotate`. Some rotary embeddings also scale, hence the division."""
        cos, sin = (each[:, None] for each in self._rotary(positions))
        return (states * cos - _rotate_half(states) * sin) / (cos * cos + sin * sin)

    def _checked(self, rows: Tensor) -> Tensor:
        """Return row sets as (1, kv_heads or heads; chosen), all of them there and ascending.

        Values are looked at on a CPU only: elsewhere that would stop the device at every layer.
        """
        sets = self._shaped(rows)
        if sets.device.type == "cpu":
            if int(sets[:, 0].min()) < 0 or int(sets[:, -1].max()) >= self.length:
                raise ValueError(self._bad_rows())
            if bool((sets[:, 1:] <= sets[:, :-1]).any()):
                raise ValueError(self._bad_rows())
        return sets

    def _bad_rows(self) -> str:
        return f"rows must be ascending, each at most once, from 0 to {self.length - 1}."

    def _shaped(self, rows: Tensor) -> Tensor:
        """Return row sets as (1, kv_heads or heads; chosen), their values not looked at."""
        sets = rows[None] if rows.ndim == 1 else rows
        allowed = (1, self.shape.kv_heads, self.shape.heads)
        if sets.ndim != 2 or sets.dtype != torch.int64 or sets.shape[0] not in allowed:
            raise ValueError(
                f"rows are int64, (chosen,), ({self.shape.kv_heads}, chosen) or "
                f"({self.shape.heads}, chosen); got {rows.dtype}, {tuple(rows.shape)}."
            )
        if not sets.shape[1]:
            raise ValueError("no row was chosen; a query needs at least one.")
        return sets

    def _places_of(self, sets: Tensor) -> Tensor:
        """Return where the tokens of chosen rows stand, (kv_heads or heads, chosen)."""
        return self._gather(self.positions[..., None], sets)[..., 0]

    def _check_positions(self, sets: Tensor, positions: Tensor) -> None:
        chosen, width = sets.shape[1], self.width
        if positions.shape != (chosen,):
            raise ValueError(
                f"positions are those of the {chosen} chosen rows; got {tuple(positions.shape)}."
            )
        own = self._counting[self._offset : self.length]
        if chosen < width or not bool((sets[:, -width:] == own).all()):
            raise ValueError(
                "queries stand at the positions of their own rows, so these must be chosen."
            )

    def _moved(
        self, queries: Tensor, keys: Tensor, sets: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return queries and gathered keys, which may be written over, at other positions."""
        own = positions[-self.width :]
        if not self.rotated:
            return self.rotate(queries, own), self._rotate_rows(keys, positions)
        # Turning by a difference moves what has been turned before, backwards too.
        moves = positions - self._places_of(sets)
        columns: Tensor | slice = slice(None)
        if moves.device.type == "cpu":  # most rows stay where they are; elsewhere asking costs more
            columns = moves.any(0).nonzero()[:, 0]
        cos, sin = self._turns(moves[:, columns])
        some = keys[:, columns]
        keys[:, columns] = some * cos + _rotate_half(some) * sin
        cos, sin = self._turns(own - self._own_positions())
        return queries * cos[:, None] + _rotate_half(queries) * sin[:, None], keys

    def _turns(self, moves: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of moves, (..., head_dim) each, without any scaling."""
        cos, sin = (each.view(*moves.shape, -1) for each in self._rotary(moves.abs().reshape(-1)))
        scale = (cos * cos + sin * sin).sqrt()
        return cos / scale, sin * moves.sign()[..., None] / scale

    def _attend_gathered(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        visible: Tensor | None,
        *,
        is_tail: bool,
    ) -> Tensor:
        """Attend to gathered rows, (kv_heads or heads, chosen, head_dim).

        Args:
            queries: (width, heads, head_dim).
            keys, values: The rows.
            visible: See `_visible_rows`.
            is_tail: Whether the last `width` of them are the new tokens' own.
        """
        if keys.shape[0] != self.shape.heads:
            keys, values = (each.repeat_interleave(self._group, dim=0) for each in (keys, values))
        mixed = functional.scaled_dot_product_attention(
            queries.transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=None if visible is None else self._per_head(visible)[None],
            scale=self.shape.scale,
        )
        return mixed[0].transpose(0, 1)

    def _gather(self, states: Tensor, sets: Tensor) -> Tensor:
        """Return chosen rows of (kv_heads, rows, size): (kv_heads or heads, chosen, size)."""
        if sets.shape[0] == 1:
            return states.index_select(1, sets[0])
        if sets.shape[0] == self.shape.kv_heads:
            return states.gather(1, sets[..., None].expand(-1, -1, states.shape[2]))
        return states[self._owners[:, None], sets]

    @property
    def _reached_window(self) -> int | None:
        """Return the window where a query of the forward no longer sees its whole past."""
        window = self.shape.window
        return None if window is None or self._position + self.width <= window else window

    def _visible_rows(self, sets: Tensor) -> Tensor | None:
        """Return which chosen rows each query sees, (sets, width, chosen); None for all of them.

        Raises:
            ValueError: A query sees none.
        """
        window = self._reached_window
        if self.width == 1 and window is None:
            return None
        own = self._counting[self._offset : self.length]
        visible = sets[:, None] <= own[:, None]
        if window is not None:
            visible = visible & (
                self._own_positions()[:, None] - self._places_of(sets)[:, None] < window
            )
        if not bool(visible.any(-1).all()):
            raise ValueError("a query is left without any row that it may see.")
        return visible

    def _visible(self) -> Tensor | None:
        """Return which rows each query sees, (1 or kv_heads, width, length); None for all."""
        window = self._reached_window
        if self.width == 1 and window is None:
            return None
        own = self._counting[self._offset : self.length]
        visible = (self._counting[: self.length] <= own[:, None])[None]
        if window is not None:
            places = self.positions if self.was_dropped else self.positions[:1]
            visible = visible & (self._own_positions()[:, None] - places[:, None] < window)
        return visible

    def _per_head(self, visible: Tensor) -> Tensor:
        """Return a mask of sets or key-value heads for each query head, or for all."""
        if visible.shape[0] in (1, self.shape.heads):
            return visible
        return visible.repeat_interleave(self._group, dim=0)

    def _products(self, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
        kv_heads, group, width = self.shape.kv_heads, self._group, queries.shape[0]
        grouped = queries.transpose(0, 1).reshape(kv_heads, group * width, -1)
        products = (grouped @ keys.transpose(1, 2)).float() * scale
        products = products.view(kv_heads * group, width, self.length)
        visible = self._visible()
        if visible is None:
            return products
        return products.masked_fill_(~self._per_head(visible[:, -width:]), -torch.inf)

    def _drop(self, sets: Tensor) -> None:
        """Keep the rows of each key-value head that are chosen and committed."""
        if self.rows < self._offset + self.width:  # drafts were rejected
            stays = sets < self.rows
            counts = set(stays.sum(1).tolist())
            if len(counts) > 1:
                raise ValueError(
                    f"after {self.width} tokens of which not all stay, heads would keep "
                    f"{sorted(counts)} rows: they must keep equally many."
                )
            sets = sets[stays].view(sets.shape[0], counts.pop())
        if sets.shape[1] == self.rows:
            return
        if self._places is None:
            self._places = self._counting.expand(self.shape.kv_heads, -1).clone()
        kept = sets.shape[1]
        self._compact(sets)
        self._places[:, :kept] = self._gather(self._places[..., None], sets)[..., 0]
        self.rows = kept

    def _compact(self, sets: Tensor) -> None:
        """Move chosen rows, (1 or kv_heads, kept), to the front of the memory."""
        for states in (self._keys, self._values):
            states[:, : sets.shape[1]] = self._gather(states, sets)

    # --- counting ---

    def _count_all(self, *, values: bool) -> None:
        """Count a pass over all rows."""
        rows = self.shape.kv_heads * self.length
        # Pairs beyond a window are counted: the kernels visit them, and so does the baseline.
        pairs = self.width * self._offset + self.width * (self.width + 1) // 2
        self._count(rows, rows if values else 0, pairs, products=1 + values)
        if values and self.notes_reads:
            # Written over when rows are dropped, hence a copy.
            self.reads.append(self.positions.clone() if self.was_dropped else None)

    def _count_scores(self, queries: Tensor) -> None:
        """Count the scores of all rows for the new tokens, or for one query in their place.

        Raises:
            ValueError: There are as many queries as neither.
        """
        if queries.shape[0] == self.width:
            self._count_all(values=False)
        elif queries.shape[0] == 1:
            self._count(self.shape.kv_heads * self.length, 0, self.length, products=1)
        else:
            raise ValueError(
                f"scores are for the {self.width} new tokens or for one query in their place, got "
                f"{queries.shape[0]}."
            )

    def _pairs(self, visible: Tensor | None, chosen: int) -> float:
        """Return the pairs of query and row that are seen, in the mean over heads."""
        if visible is None:
            return self.width * chosen
        return float(visible.sum()) / visible.shape[0]

    def _count_rows(self, sets: Tensor, pairs: float) -> None:
        """Count attention to chosen rows; see `models.attention.LayerCache.attend_rows`."""
        rows = max(sets.shape[0], self.shape.kv_heads) * sets.shape[1]
        self._count(rows, rows, pairs, products=2)
        if self.notes_reads:
            self.reads.append(self._places_of(sets) if self.was_dropped else sets)

    def _count(self, key_rows: int, value_rows: int, pairs: float, *, products: int) -> None:
        self._work.key_rows += key_rows
        self._work.value_rows += value_rows
        self._work.flops += 2.0 * products * self.shape.heads * self.shape.head_dim * pairs


def _rotate_half(states: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
