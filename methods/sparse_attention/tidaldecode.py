"""TidalDecode: a few layers choose the tokens worth attending to, the layers above reuse them.

The first layers attend to the whole cache. The next one, a selection layer, does so too and notes
for each head the positions with the largest products of query and key; the layers above it attend
to these positions only, until another selection layer in the middle chooses anew. The prompt is
read with full attention, and every key and value is kept.

Source: arXiv 2410.05076, sections 3 and 4; DerrickYLJ/TidalDecode at d67a1bd. Follows that code's
kernels where they part from its simulation: the newest token is always attended to, as one of the
budget. Differs from both: a selection layer that no sparse layer follows scores nothing, and the
re-selection layer, which the code leaves to its user, has an `auto`. A forward of several tokens
gives each its own set, as the simulation does, by a mask that skips no work.

Ours, and off by default: sets shared by the heads, protected positions, more than one re-selection
layer. In SmolLM2-135M positions hardly persist head by head: over 1,280 tokens of documentation a
budget of 64 raises the loss from 1.85 to 2.94 nats a token at the best re-selection layer, and to
2.15 with one set for all heads, the first 4 and the latest 16 tokens in it, re-selected in layer
17. The best 64 of each head and layer would cost 0.03 only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from hardware.profile import Profile
from methods.sparse_attention.common import BudgetedAttention, require_tokens
from models.attention import LayerCache, OpenSession, Rule
from models.base import TextGenerator, TextModelFacts, Unsupported

Share = Literal["per_head", "per_kv_head", "all"]

# The layer that the paper re-selects in, by layers, query heads and key-value heads.
RESELECTION_LAYERS: Final[Mapping[tuple[int, int, int], int]] = MappingProxyType(
    {
        (32, 32, 32): 7,  # LLaMA-2-7B, and LongChat-7b, which is one
        (32, 32, 8): 13,  # Llama-3-8B and Llama-3.1-8B
        (28, 24, 8): 12,  # Llama-3.2-3B, where 13 does as well
        (80, 64, 8): 14,  # Llama-3-70B, where 31 does as well
    }
)
# Of other models, the depth at which Llama-3-8B re-selects. It is layer 12 of SmolLM2-135M, where
# 12 to 14 are the best for sets of single heads; for shared sets with both ends of the text
# protected 17 is (tests/methods/sparse_attention/measure_selection.py).
RESELECTION_DEPTH: Final = 13 / 32


def reselection_layer(facts: TextModelFacts, first_selection: int) -> tuple[int, ...]:
    """Return what `auto` means for a model: one layer, or none where it would change nothing.

    A layer next to the first selection, or the last layer, has no sparse layer on one side.
    """
    shape = (facts.num_layers, facts.num_heads, facts.num_kv_heads)
    layer = RESELECTION_LAYERS.get(shape, round(RESELECTION_DEPTH * facts.num_layers))
    return (layer,) if first_selection + 1 < layer < facts.num_layers - 1 else ()


def votes(scores: Tensor, num_kv_heads: int, share: Share) -> Tensor:
    """Return what the positions are ranked by: one row of votes for each set.

    A head's own logits rank as their softmax does. Several heads vote with their softmax, so that
    none counts for more because its logits are larger.

    Args:
        scores: Scaled products of queries and keys, (heads, width, length), -inf where invisible.
        num_kv_heads: Query heads are grouped by them, in order.
        share: Which heads share a set.

    Returns:
        (heads or kv_heads or 1, width, length), -inf where invisible.
    """
    if share == "per_head":
        return scores
    groups = num_kv_heads if share == "per_kv_head" else 1
    summed = scores.softmax(dim=-1).unflatten(0, (groups, -1)).sum(dim=1)
    # Visible positions may have a softmax of 0 too.
    return summed.masked_fill_(scores[0].isneginf(), -torch.inf)


def choose(votes: Tensor, budget: int, *, sink: int = 0, recent: int = 0) -> Tensor:
    """Return the positions with the most votes, protected ones first of all.

    Args:
        votes: (sets, width, length), -inf where invisible; the last `width` positions are those of
            the new tokens.
        budget: Positions of a set.
        sink: First positions that are always in it.
        recent: Last positions, counted back from each new token itself, that always are.

    Returns:
        (sets, width, min(budget, length)), ascending, int64. A token that sees fewer positions
        has invisible ones among them.
    """
    _, width, length = votes.shape
    if sink or recent:
        columns = torch.arange(length, device=votes.device)
        own = columns[length - width :, None]
        is_protected = (columns < sink) | ((columns <= own) & (columns > own - recent))
        votes = votes.masked_fill(is_protected & ~votes.isneginf(), torch.inf)
    return votes.topk(min(budget, length), dim=-1, sorted=False).indices.sort(dim=-1).values


def attend_masked(queries: Tensor, cache: LayerCache, chosen: Tensor) -> Tensor:
    """Attend to a set of positions for each new token; reads all of them and skips no work.

    Args:
        queries: (width, heads, head_dim).
        cache: Of the layer.
        chosen: Positions, (sets, width, chosen); the heads share the sets evenly, in order.

    Returns:
        (width, heads, head_dim).
    """
    scores = cache.scores(queries)
    _, width, length = scores.shape
    hidden = torch.ones(chosen.shape[0], width, length, dtype=torch.bool, device=scores.device)
    hidden.scatter_(2, chosen, False)
    scores = scores.unflatten(0, (chosen.shape[0], -1)).masked_fill(hidden[:, None], -torch.inf)
    weights = scores.flatten(0, 1).softmax(dim=-1).to(queries.dtype)
    values = cache.values
    attended = weights.unflatten(0, (values.shape[0], -1)) @ values[:, None]
    return attended.flatten(0, 1).transpose(0, 1)


class TidalRule(Rule):
    """Attention of one text; see `models.attention.AttentionRule`.

    `observes` stays 0: the prompt is read with full attention, as in the paper. Set to a number of
    tokens it gives the losses of that many decoded tokens in one forward.

    Attributes:
        settings: Of the method.
        layers: Selection layers, rising; none where nothing is sparse.
        chosen: Positions that the last selection layer chose, (sets, width, chosen), ascending;
            None where all are attended to.
    """

    def __init__(self, settings: TidalDecode) -> None:
        self.settings = settings
        self.layers: tuple[int, ...] = ()
        self.chosen: Tensor | None = None
        self._num_kv_heads = 1
        self._selecting: frozenset[int] = frozenset()
        self._uncorrected: list[int] = []
        self._corrections = 0
        self._reselections = 0
        # A tensor, so that a GPU is not waited for at every step.
        self._persistent: Tensor | float = 0.0

    def begin(self, facts: TextModelFacts) -> None:
        """Settle the selection layers.

        Raises:
            Unsupported: The model has no such layer.
        """
        self.layers = self.settings.selection_layers(facts)
        self._num_kv_heads = facts.num_kv_heads
        # A selection that no sparse layer follows would be for nobody.
        above = {*self.layers, facts.num_layers}
        self._selecting = frozenset(layer for layer in self.layers if layer + 1 not in above)

    def attend(self, layer: int, queries: Tensor, cache: LayerCache) -> Tensor:
        """Attend to everything, to everything while selecting, or to what was selected."""
        if layer == 0:
            self.chosen = None
        if cache.length <= self.settings.budget:
            return cache.attend(queries)
        if layer in self._selecting:
            attended, scores = cache.attend_with_scores(queries)
            self._keep(self.select(scores), cache.length)
            return attended
        if self.chosen is None or layer in self.layers:
            return cache.attend(queries)
        if cache.width > 1:
            return attend_masked(queries, cache, self.chosen)
        rows = self.chosen[:, 0]
        return cache.attend_rows(queries, rows[0] if self.settings.share == "all" else rows)

    def select(self, scores: Tensor) -> Tensor:
        """Return the positions of each set, (sets, width, chosen), ascending.

        Args:
            scores: Of a selection layer, (heads, width, length), -inf where invisible.
        """
        settings = self.settings
        ballot = votes(scores, self._num_kv_heads, settings.share)
        recent = max(settings.protect_recent, int(settings.always_current))
        return choose(ballot, settings.budget, sink=settings.protect_sink, recent=recent)

    def after_forward(self, session: OpenSession, new_tokens: Sequence[int]) -> None:
        """Every so many tokens, compute the keys and values of the latest with full attention."""
        period = self.settings.correct_every
        if not period or session.length <= session.prompt_length:
            return
        self._uncorrected += new_tokens
        if len(self._uncorrected) >= period:
            session.recompute(self._uncorrected, session.length - len(self._uncorrected))
            self._uncorrected = []
            self._corrections += 1

    @property
    def notes(self) -> Mapping[str, float | int | str]:
        """What was settled and seen: layers, re-selections and what they kept, corrections."""
        seen: dict[str, float | int | str] = {
            "selection_layers": " ".join(map(str, self.layers)),
            "corrections": self._corrections,
        }
        if self._reselections:
            seen["reselection_overlap"] = float(self._persistent) / self._reselections
        return seen

    def _keep(self, chosen: Tensor, length: int) -> None:
        """Take a selection over, and count the share of it that had been selected before."""
        if self.chosen is not None:
            was = torch.zeros(*chosen.shape[:2], length, dtype=torch.bool, device=chosen.device)
            was.scatter_(2, self.chosen, True)
            self._persistent = self._persistent + was.gather(2, chosen).float().mean()
            self._reselections += 1
        self.chosen = chosen


@dataclass(frozen=True, kw_only=True)
class TidalDecode(BudgetedAttention):
    """Positions selected in two layers, attended to in all above.

    Attributes:
        budget: Cached tokens that a head attends to in a sparse layer, the newest included.
        first_selection: The first selection layer; those below it see everything. At or above the
            model's number of layers nothing is sparse.
        reselection: Layer or layers that select anew; `auto` knows the models of the paper and
            takes the same depth in others, `none` keeps the first selection.
        share: Whose set it is: of one query head, of the heads of a key-value head, or of all.
            Heads that share vote with their softmax.
        always_current: Attend to the newest token whatever its score, as the paper's kernels do;
            their simulation does not.
        protect_sink: First tokens that are in every set.
        protect_recent: Latest tokens that are in every set.
        correct_every: Decoded tokens after which their keys and values are computed anew with full
            attention; 0 for never, as in the paper's measurements.
    """

    first_selection: int = 2
    reselection: int | tuple[int, ...] | Literal["auto", "none"] = "auto"
    share: Share = "per_head"
    always_current: bool = True
    protect_sink: int = 0
    protect_recent: int = 0
    correct_every: int = 0
    # The battery's model has two layers, and its texts are shorter than the default budget.
    trial = MappingProxyType({"budget": 4, "first_selection": 0, "reselection": "none"})

    def __post_init__(self) -> None:
        layers: Any = self.reselection
        if isinstance(layers, list):  # as JSON has it
            object.__setattr__(self, "reselection", tuple(layers))
        super().__post_init__()
        for name in ("protect_sink", "protect_recent", "correct_every"):
            require_tokens(name, getattr(self, name), 0)
        _require_layer("first_selection", self.first_selection, 0, "Layers are counted from 0.")
        if self.share not in get_args(Share):
            raise ValueError(
                f"share must be one of {', '.join(get_args(Share))}, got {self.share!r}."
            )
        kept = self.protect_sink + max(self.protect_recent, int(self.always_current))
        if kept > self.budget:
            raise ValueError(
                f"budget must be at least {kept}, got {self.budget}: the protected tokens, the "
                "newest one included, are part of it."
            )
        self._check_reselection()

    def _check_reselection(self) -> None:
        if isinstance(self.reselection, str):
            if self.reselection not in ("auto", "none"):
                raise ValueError(
                    f"reselection must be a layer, a list of layers, auto or none, got "
                    f"{self.reselection!r}."
                )
            return
        layers = self._reselected
        for layer in layers:
            _require_layer(
                "reselection",
                layer,
                self.first_selection + 1,
                f"It lies above the first selection, layer {self.first_selection}.",
            )
        if not layers or any(low >= high for low, high in itertools.pairwise(layers)):
            raise ValueError(
                f"reselection must name layers in rising order, got {list(layers)}; for no layer "
                "write none."
            )

    def rule(self) -> TidalRule:
        """Return the rule of one text."""
        return TidalRule(self)

    @contextmanager
    def apply(self, model: TextGenerator, hardware: Profile) -> Iterator[TextGenerator]:
        """Yield the model with its decoding steps sparse; the model itself is not touched."""
        if isinstance(model, TextGenerator) and not self.selection_layers(model.facts):
            yield model  # nothing is sparse in it
            return
        with super().apply(model, hardware) as applied:
            yield applied

    @property
    def _reselected(self) -> tuple[int, ...]:
        """Layers named in `reselection`."""
        if isinstance(self.reselection, str):
            return ()
        return self.reselection if isinstance(self.reselection, tuple) else (self.reselection,)

    def selection_layers(self, facts: TextModelFacts) -> tuple[int, ...]:
        """Return the selection layers in a model, rising; none if nothing is sparse in it.

        Raises:
            Unsupported: `reselection` names a layer that the model does not have.
        """
        if self.first_selection >= facts.num_layers:
            return ()
        again = self._reselected
        if self.reselection == "auto":
            again = reselection_layer(facts, self.first_selection)
        if again and again[-1] >= facts.num_layers:
            raise Unsupported(
                f"there is no layer {again[-1]} to re-select in: the model has "
                f"{facts.num_layers}, counted from 0."
            )
        return (self.first_selection, *again)


def _require_layer(name: str, value: object, low: int, meaning: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be a layer from {low} on, got {value!r}. {meaning}")
