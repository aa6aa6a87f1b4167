"""What sparse attention with a budget of tokens shares: the wrapper, and rules that evict.

A rule that evicts attends to all that a cache still holds and then drops what it will not need
again. `budget` is what stays after each forward, so a new token attends to `budget` tokens and
itself, as in the papers' own code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from hardware.profile import Profile
from methods.base import Method, Output
from methods.checks import require_choice, require_count, unsuited
from models.attention import AttentionLM, AttentionRule, LayerCache, OpenSession, Rule
from models.base import TextGenerator, Unsupported

NOTHING_DROPPED: Final = 1_000_000
"""A budget that no text exceeds."""

PromptMode = Literal["dense", "streamed"]
"""How a prompt is read: with full attention and then cut down, or within the budget throughout."""


@dataclass(frozen=True, kw_only=True)
class RuledAttention(Method[TextGenerator]):
    """A method that is a rule for attention."""

    capability = "TextGenerator"
    output = Output.APPROXIMATE

    @abstractmethod
    def rule(self) -> AttentionRule:
        """Return the rule of one text."""

    @property
    @abstractmethod
    def most_tokens(self) -> int:
        """Tokens up to which a text loses none; a model whose longest text fits is left alone."""

    @property
    def longest_text(self) -> int | None:
        """Most tokens of a text, where the method lifts the model's own limit."""
        return None

    @contextmanager
    def apply(self, model: TextGenerator, hardware: Profile) -> Iterator[TextGenerator]:
        """Yield the model with its attention restricted; the model itself is not touched."""
        if not isinstance(model, TextGenerator):
            raise unsuited(self, model, "a text generator", "is none")
        # Where no text is long enough to lose a token, the model's own sessions are the answer.
        if self.most_tokens >= model.facts.max_positions:
            yield model
        else:
            yield AttentionLM(model, self.rule, longest_text=self.longest_text)


@dataclass(frozen=True, kw_only=True)
class BudgetedAttention(RuledAttention):
    """A rule for attention with a budget of tokens.

    Attributes:
        budget: Tokens of a text that count; the method says how. A model whose longest text fits
            is left alone.
    """

    budget: int = 256
    neutral = MappingProxyType({"budget": NOTHING_DROPPED})

    def __post_init__(self) -> None:
        require_tokens("budget", self.budget, 1)

    @property
    def most_tokens(self) -> int:
        """The budget."""
        return self.budget


@dataclass(frozen=True, kw_only=True)
class LatestAttention(BudgetedAttention):
    """A budget for the latest tokens, within which a prompt may be read too.

    Attributes:
        prompt: `dense` reads a prompt with full attention and then cuts it down; `streamed` reads
            it within the budget too, and texts may be longer than the model's context. A task that
            cuts prompts to the context then cuts this method's later than the baseline's; give the
            task a `max_length` to compare the two on the same tokens.
        chunk: Tokens of a streamed prompt that are read at once, on top of the budget.
    """

    prompt: PromptMode = "dense"
    chunk: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require_tokens("chunk", self.chunk, 1)
        require_choice("prompt", self.prompt, get_args(PromptMode))

    @property
    def longest_text(self) -> int | None:
        """No limit for streamed texts: no distance ever exceeds the budget."""
        return NOTHING_DROPPED if self.prompt == "streamed" else None


@dataclass(frozen=True, kw_only=True)
class SharedBudget(BudgetedAttention):
    """A budget that the latest tokens share with chosen ones from before them.

    Attributes:
        recent_share: Share of the budget that goes to the latest tokens, in [0, 1].
    """

    recent_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        share: object = self.recent_share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(
                f"recent_share must lie in [0, 1], got {share!r}. It is a share of the budget."
            )

    @property
    def recent(self) -> int:
        """Latest tokens that stay in any case."""
        return round(self.budget * self.recent_share)


class EvictingRule(Rule, ABC):
    """Attends to all rows held; then keeps the `budget` that `choose` names.

    The last token of a prompt goes through the rule, so that the prompt is cut down at its end.
    Drafts are refused: what a rejected one has pushed out could not be brought back.
    """

    observes: int | None = 1

    def __init__(self, budget: int, *, prompt: PromptMode = "dense", chunk: int = 512) -> None:
        """Start a text.

        Args:
            budget: Rows that each key-value head keeps.
            prompt: How a prompt is read.
            chunk: Most tokens of a prompt at once.
        """
        self.budget = budget
        self.chunk = chunk
        self._evicts_in_prompt = prompt == "streamed"
        if self._evicts_in_prompt:
            self.observes = None

    def attend(self, layer: int, queries: Tensor, cache: LayerCache) -> Tensor:
        """Attend to all rows, then drop what is beyond the budget."""
        if cache.width > 1 and not cache.in_prompt:
            raise Unsupported(
                "a cache that evicts takes one token a step: a rejected draft could not bring back "
                "what it has pushed out."
            )
        mixed = self.mix(layer, queries, cache)
        is_due = cache.ends_prompt or not cache.in_prompt or self._evicts_in_prompt
        if is_due and cache.length > self.budget:
            cache.keep(self.choose(layer, cache))
        return mixed

    def mix(self, layer: int, queries: Tensor, cache: LayerCache) -> Tensor:
        """Attend to all rows held, (width, heads, head_dim)."""
        return cache.attend(queries)

    @abstractmethod
    def choose(self, layer: int, cache: LayerCache) -> Tensor:
        """Return the rows to keep, ascending, (budget,) or (kv_heads, budget)."""


class EndsRule(EvictingRule):
    """Keeps the first tokens and the latest ones.

    With `moves` the distances between them close up when tokens in between are dropped: positions
    are those within the cache. Since only distances matter to a rotary embedding, the latest tokens
    stay where they are and the first ones are moved up to them.
    """

    def __init__(
        self, budget: int, *, sinks: int, moves: bool, prompt: PromptMode, chunk: int
    ) -> None:
        super().__init__(budget, prompt=prompt, chunk=chunk)
        self._sinks = sinks
        self._moves = moves and sinks > 0
        self._is_dropping = False
        self._dropped = 0

    def mix(self, layer: int, queries: Tensor, cache: LayerCache) -> Tensor:
        """Attend to all rows held, at positions within the cache."""
        self._is_dropping = False
        if not (self._moves and self._dropped):
            return cache.attend(queries)
        rows = torch.arange(cache.length, device=queries.device)
        return cache.attend_rows(queries, rows, positions=rows + self._dropped)

    def choose(self, layer: int, cache: LayerCache) -> Tensor:
        """Return both ends."""
        self._is_dropping = True
        return both_ends(cache.length, self.budget, self._sinks).to(cache.keys.device)

    def after_forward(self, session: OpenSession, new_tokens: Sequence[int]) -> None:
        """Note how many tokens are gone."""
        # A prompt that is read with full attention loses its tokens only at its end.
        if self._is_dropping:
            self._dropped = session.length - self.budget
            self._is_dropping = False
            if self._moves:
                self.observes = None  # where more is read behind it, that is moved too


def both_ends(length: int, budget: int, first: int) -> Tensor:
    """Return the `first` rows and the last ones, `budget` in all, ascending, int64.

    Args:
        length: Rows there are, at least `budget`.
        budget: Rows to return, at least `first`.
        first: Rows from the start.
    """
    return torch.cat([torch.arange(first), torch.arange(length - budget + first, length)])


def best_and_recent(scores: Tensor, budget: int, recent: int) -> Tensor:
    """Return the last rows of each head and the best of those before, (heads, budget), int64.

    Args:
        scores: (heads, rows); those of the last `recent` rows do not matter.
        budget: Rows to return of each head, at least `recent`.
        recent: Last rows that are returned in any case.

    Returns:
        Ascending; of equal scores any may be taken.
    """
    heads, rows = scores.shape
    best = scores[:, : rows - recent].topk(budget - recent, dim=-1).indices.sort(dim=-1).values
    last = torch.arange(rows - recent, rows, device=scores.device).expand(heads, -1)
    return torch.cat([best, last], dim=-1)


def by_kv_head(values: Tensor, kv_heads: int) -> Tensor:
    """Sum over the query heads of each key-value head: (heads, ...) to (kv_heads, ...)."""
    return values.unflatten(0, (kv_heads, -1)).sum(1)


def require_tokens(name: str, value: object, low: int) -> None:
    """Raise ValueError unless `value` is a whole number of tokens, at least `low`."""
    require_count(name, value, low, None, "It is counted in tokens.")
