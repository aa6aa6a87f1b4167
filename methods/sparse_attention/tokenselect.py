"""TokenSelect: score every cached token with the new query, attend to the best few and both ends.

Each layer keeps all keys and values, keys without positions. A query, or a chunk of the prompt,
attends to the first tokens, to the tokens of the middle that its heads vote for, and to the last
tokens, at positions counted within this choice: the model never sees a distance that it was not
trained on, however long the text. One choice serves all heads of a layer, and the next query too
while it resembles the one that chose.

Source: arXiv 2411.02886, sections 3 and 4; pzs19/TokenSelect at 8e1e97f. Differs from that code:
query head h is scored with its own key-value head, where the original takes head h mod kv_heads
(`reference_head_map`); scores are divided by sqrt(head_dim) before the vote (`scale_scores`); the
Selection Cache works, where the original has it switched off and broken; a wide forward sees itself
whole; tokens selected together (`block`) are ours, as the control that the paper argues against.

What corresponds to the paged dot-product kernel: it reads the keys where they lie, through a table
of pages, and writes one score for each head and token. Here a layer's keys are one run of memory,
and `LayerCache.scores` reads them there: nothing is gathered or copied to be scored, and values are
not touched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from methods.sparse_attention.common import NOTHING_DROPPED, RuledAttention
from models.attention import LayerCache, Rule
from models.base import TextModelFacts

Vote = Literal["soft", "hard", "logits", "per_head"]
RopeMode = Literal["compact", "absolute"]

# Texts are no longer bounded by the model's positions then, but by memory.
UNBOUNDED: Final = 1 << 24


def summarise(queries: Tensor) -> Tensor:
    """Return the query that stands for a chunk, the mean of its queries, (heads, head_dim).

    Args:
        queries: (width, heads, head_dim), at the positions that they are to be scored at.
    """
    return queries[0] if len(queries) == 1 else queries.mean(dim=0)


def reference_order(heads: int, kv_heads: int) -> Tensor:
    """Return query heads in the order in which the released kernel meets the key-value heads.

    It scores query head h with key-value head h mod kv_heads. With the heads in this order, the
    grouped product of a model, number h // (heads / kv_heads), does the same.
    """
    return torch.arange(heads).view(-1, kv_heads).T.reshape(-1)


def count_votes(
    scores: Tensor, vote: Vote, budget: int, *, pool_kernel: int = 1, block: int = 1
) -> Tensor:
    """Return what the tokens are ranked by.

    Args:
        scores: (heads, tokens), -inf where a token is invisible.
        vote: `soft` adds up the heads' softmax, so that no head counts for more because its logits
            are larger; `hard` counts the heads that have a token among their `budget` best;
            `logits` adds up the scores; `per_head` leaves each head its own set.
        budget: Tokens of a hard vote.
        pool_kernel: Neighbours that lend each other their best vote, odd; 1 for none.
        block: Tokens that are taken or left together, counted from the first one.

    Returns:
        (1, tokens), or (heads, tokens) for `per_head`, float32.
    """
    tokens = scores.shape[1]
    if vote == "soft":
        votes = scores.softmax(dim=-1).sum(dim=0, keepdim=True)
    elif vote == "hard":
        best = scores.topk(min(budget, tokens), dim=-1, sorted=False).indices
        votes = torch.zeros_like(scores).scatter_(1, best, 1.0).sum(dim=0, keepdim=True)
    elif vote == "logits":
        votes = scores.sum(dim=0, keepdim=True)
    else:
        votes = scores.softmax(dim=-1)
    if pool_kernel > 1:
        votes = functional.max_pool1d(votes[None], pool_kernel, stride=1, padding=pool_kernel // 2)[
            0
        ]
    if block > 1:
        best_of = functional.max_pool1d(votes[None], block, stride=block, ceil_mode=True)[0]
        votes = best_of.repeat_interleave(block, dim=1)[:, :tokens]
    return votes


def rank(votes: Tensor, budget: int, *, is_tied: bool = False) -> Tensor:
    """Return the tokens with the most votes, the first of them first, (sets, budget), int64.

    Args:
        votes: (sets, tokens).
        budget: At most `tokens`.
        is_tied: Whether equal votes are common; the earlier token is taken then. Otherwise any may.
    """
    if is_tied:
        return votes.sort(dim=-1, descending=True, stable=True).indices[:, :budget]
    return votes.topk(budget, dim=-1).indices


class Selection(NamedTuple):
    """What a layer chose last.

    Attributes:
        query: The summary that chose, (heads, head_dim).
        ranked: Rows of the middle, the most voted first, (sets, k).
        start: First row of the local window then.
    """

    query: Tensor
    ranked: Tensor
    start: int


class TokenSelectRule(Rule):
    """Attention of one text; see `models.attention.AttentionRule`.

    Attributes:
        settings: Of the method.
        observes: All of the prompt goes through the selection.
        selects_always: Select also where everything fits into the budget; for tests.
        selected: Rows that the last selection or reuse of each layer attends to, (sets, rows).
    """

    observes: int | None = None

    def __init__(self, settings: TokenSelect) -> None:
        self.settings = settings
        self.rotated = settings.rope_mode == "absolute"
        self.chunk = settings.chunk
        self.selects_always = False
        self.selected: dict[int, Tensor] = {}
        self._held: dict[int, Selection] = {}
        # By layer, of decoding steps that had something to select.
        self._selections: Counter[int] = Counter()
        self._reuses: Counter[int] = Counter()
        self._max_position = self._attended_tokens = 0
        # Of decoding steps: tokens scored, attended to, and cached, summed over layers.
        self._scored = self._attended = self._cached = 0
        self._order: Tensor | None = None
        # Tensors, so that a GPU is not waited for at every step.
        self._runs: Tensor | int = 0
        self._run_tokens = 0

    def begin(self, facts: TextModelFacts) -> None:
        """Every decoder with rotary positions will do; the session refuses others."""
        if self.settings.reference_head_map:
            self._order = reference_order(facts.num_heads, facts.num_kv_heads)

    def attend(self, layer: int, queries: Tensor, cache: LayerCache) -> Tensor:
        """Attend to the first tokens, the selected ones and the last ones."""
        settings = self.settings
        # A forward wider than the local window, of somebody's drafts, still sees itself.
        start = cache.length - max(settings.n_local, cache.width)
        budget = min(settings.k, start - settings.n_init)
        is_whole = start - settings.n_init <= settings.k
        if budget < 0 or (is_whole and not self.selects_always):
            self._note(cache, cache.length, is_compact=False)
            return cache.attend(queries)
        rows = self._rows(layer, queries, cache, start, budget)
        chosen = rows.shape[-1]
        is_compact = settings.rope_mode == "compact"
        self._note(cache, chosen, is_compact=is_compact)
        self.selected[layer] = rows
        if rows.shape[0] == 1:
            rows = rows[0]
        if not is_compact:
            return cache.attend_rows(queries, rows)
        return cache.attend_rows(queries, rows, positions=torch.arange(chosen, device=rows.device))

    @property
    def notes(self) -> Mapping[str, float | int | str]:
        """Selections made and reused while decoding, and how far positions and rows went."""
        seen: dict[str, float | int | str] = {
            "selections": self._selections.total(),
            "reuses": self._reuses.total(),
            "max_position": self._max_position,
            "attended_tokens": self._attended_tokens,
        }
        if decided := self._selections.total() + self._reuses.total():
            seen["skip_rate"] = self._reuses.total() / decided
        if self._cached:
            # A score reads a key, attention a key and a value.
            read = self._scored + 2 * self._attended
            seen["rows_read_share"] = read / (2 * self._cached)
        if self._run_tokens:
            seen["tokens_per_run"] = self._run_tokens / int(self._runs)
        return seen

    @property
    def skip_rates(self) -> list[float]:
        """Share of decoding steps that reused a selection, of each layer that selects."""
        return [
            self._reuses[layer] / (self._reuses[layer] + selections)
            for layer, selections in sorted(self._selections.items())
        ]

    # --- how ---

    def _rows(
        self, layer: int, queries: Tensor, cache: LayerCache, start: int, budget: int
    ) -> Tensor:
        """Return the rows to attend to, ascending, (sets, n_init + budget + local)."""
        settings = self.settings
        summary = self._summary(queries, cache)
        held = self._held.get(layer) if cache.width == 1 else None
        if held is not None and self._is_alike(summary, held) and self._covers(held, start, budget):
            ranked = held.ranked
            self._reuses[layer] += 1
            if settings.carry and (left := start - held.start):
                fresh = torch.arange(held.start, start, device=ranked.device)
                # They take the places of the least voted, so that no position is exceeded.
                ranked = torch.cat([ranked[:, :-left], fresh.expand(len(ranked), -1)], dim=1)
        else:
            ranked = self._select(summary, cache, start, budget)
            self._held.pop(layer, None)
            if cache.width == 1 and budget:
                self._selections[layer] += 1
                self._scored += start - settings.n_init
                self._held[layer] = Selection(summary, ranked, start)
        middle = ranked.sort(dim=-1).values
        ends = torch.arange(cache.length, device=middle.device)
        sets = len(middle)
        return torch.cat(
            [ends[: settings.n_init].expand(sets, -1), middle, ends[start:].expand(sets, -1)], dim=1
        )

    def _summary(self, queries: Tensor, cache: LayerCache) -> Tensor:
        """Return the query that selects, (heads, head_dim).

        Keys have no position, so with the queries at n_local, n_local + 1, ... all tokens of the
        middle are looked at from the same distance, that of the local window's edge.
        """
        if not self.rotated:
            first = self.settings.n_local
            positions = torch.arange(first, first + cache.width, device=queries.device)
            queries = cache.rotate(queries, positions)
        return summarise(queries)

    def _is_alike(self, summary: Tensor, held: Selection) -> bool:
        theta = self.settings.theta
        if theta >= 1:
            return False
        both = summary.flatten().float(), held.query.flatten().float()
        # Rounding may take a cosine below -1.
        return theta <= -1 or float(functional.cosine_similarity(*both, dim=0)) >= theta

    def _covers(self, held: Selection, start: int, budget: int) -> bool:
        """Return whether a kept selection still fits: not after a rollback or a short middle."""
        left = start - held.start
        fits = left >= 0 and held.ranked.shape[1] == budget
        return fits and not (self.settings.carry and left >= budget)

    def _select(self, summary: Tensor, cache: LayerCache, start: int, budget: int) -> Tensor:
        """Return the rows of the middle with the most votes, (sets, budget)."""
        settings = self.settings
        heads, head_dim = summary.shape
        if budget == 0:
            sets = heads if settings.vote == "per_head" else 1
            return torch.empty(sets, 0, dtype=torch.int64, device=summary.device)
        order = None if self._order is None else self._order.to(summary.device)
        asked = summary if order is None else summary[order]
        scale = head_dim**-0.5 if settings.scale_scores else 1.0
        # One query stands for all new tokens. Rows beyond a layer's window are -inf; where all are,
        # a softmax would be NaN.
        seen = cache.scores(asked[None], scale=scale)[:, 0, settings.n_init : start]
        scores = seen.clamp(min=torch.finfo(torch.float32).min / heads)
        if order is not None:
            scores = torch.empty_like(scores).index_copy_(0, order, scores)
        votes = count_votes(
            scores,
            settings.vote,
            budget,
            pool_kernel=settings.pool_kernel,
            block=settings.block,
        )
        is_tied = settings.vote == "hard" or settings.block > 1 or settings.pool_kernel > 1
        ranked = rank(votes, budget, is_tied=is_tied)
        middle = ranked.sort(dim=-1).values
        self._runs = self._runs + (middle.diff(dim=-1) != 1).sum() + len(middle)
        self._run_tokens += middle.numel()
        return ranked + settings.n_init

    def _note(self, cache: LayerCache, attended: int, *, is_compact: bool) -> None:
        last = (attended if is_compact else cache.length) - 1
        self._max_position = max(self._max_position, last)
        self._attended_tokens = max(self._attended_tokens, attended)
        if cache.width == 1:
            self._attended += attended
            self._cached += cache.length


@dataclass(frozen=True, kw_only=True)
class TokenSelect(RuledAttention):
    """Attention to the tokens that the heads of a layer vote for together.

    Attributes:
        k: Tokens of the middle that are selected; 0 leaves both ends alone.
        n_init: First tokens that are always attended to.
        n_local: Last tokens that always are, the newest included; at least `chunk`, or a query
            would not see its own chunk.
        chunk: Tokens of the prompt that share a selection.
        theta: Cosine of two queries from which on the later one reuses the selection of the
            earlier; 1 or more selects at every step.
        vote: How heads agree, see `count_votes`.
        rope_mode: `compact` counts positions within what is attended to; `absolute` keeps true
            positions, for texts within the model's length.
        pool_kernel: Smoothing of the votes over neighbours, odd; 1 for none.
        carry: While a selection is reused, keep the tokens that have left the local window since,
            in the places of the least voted; otherwise they are out of sight until the next one.
        block: Tokens that are selected together; 1 is the paper's, larger ones its rivals'.
        scale_scores: Divide scores by sqrt(head_dim) before the vote; the released code does not.
        reference_head_map: Score query head h with key-value head h mod kv_heads, as the released
            kernel does; wrong for every model with fewer key-value heads than heads.
    """

    k: int = 2048
    n_init: int = 128
    n_local: int = 512
    chunk: int = 512
    theta: float = 0.9
    vote: Vote = "soft"
    rope_mode: RopeMode = "compact"
    pool_kernel: int = 1
    carry: bool = False
    block: int = 1
    scale_scores: bool = True
    reference_head_map: bool = False
    neutral = MappingProxyType({"k": NOTHING_DROPPED})
    # The battery's texts are shorter than the default budget.
    trial = MappingProxyType({"n_init": 1, "k": 3, "n_local": 4, "chunk": 4})

    def __post_init__(self) -> None:
        for name, low, meaning in (
            ("k", 0, "It is counted in tokens; 0 selects none."),
            ("n_init", 0, "It is counted in tokens."),
            ("n_local", 1, "It is counted in tokens, the newest included."),
            ("chunk", 1, "It is counted in tokens."),
            ("pool_kernel", 1, "It is counted in tokens; 1 is no smoothing."),
            ("block", 1, "It is counted in tokens; 1 selects each by itself."),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(
                    f"{name} must be a whole number from {low}, got {value!r}. {meaning}"
                )
        if self.n_local < self.chunk:
            raise ValueError(
                f"n_local must be at least chunk, got {self.n_local} and {self.chunk}: the queries "
                "of a chunk would not see their own tokens."
            )
        if self.pool_kernel % 2 == 0:
            raise ValueError(f"pool_kernel must be odd, got {self.pool_kernel}.")
        if not -1 <= self.theta <= 2:
            raise ValueError(
                f"theta must lie in [-1, 2], got {self.theta}. It is a cosine; 1 or more selects "
                "at every step."
            )
        for name, allowed in (("vote", get_args(Vote)), ("rope_mode", get_args(RopeMode))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}."
                )

    @property
    def budget(self) -> int:
        """Tokens that a query attends to at most."""
        return self.n_init + self.k + self.n_local

    @property
    def most_tokens(self) -> int:
        """The budget."""
        return self.budget

    @property
    def longest_text(self) -> int | None:
        """Bounded by memory where positions are counted within the choice."""
        return UNBOUNDED if self.rope_mode == "compact" else None

    def rule(self) -> TokenSelectRule:
        """Return the rule of one text."""
        return TokenSelectRule(self)
