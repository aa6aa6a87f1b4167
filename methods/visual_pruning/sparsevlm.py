"""SparseVLM: words that speak of the image rate its tokens; the best of the rest is merged.

Before the first layer the words are found that visual tokens resemble more than the average: the
raters. Behind three layers the visual tokens are ranked by the raters' attention, and as many stay
as the authors list. Of the others the better 30 % are clustered, and each cluster's mean is put
behind the visual tokens. Training-free; sees the question.

Source: arXiv 2410.04417; the authors' code at 26a5f48, version 1, which numbers the tokens anew.
The authors give three lists, for averages of 192, 128 and 64 of 576 tokens; between them, and on
decoders of other depths, lists are interpolated so that the average over layers, merged tokens
included, is `keep_ratio`. Clusters are those of DPC-KNN without its random noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType

import torch
from torch import Tensor

from methods.checks import require_count, require_number
from methods.visual_pruning.common import VisualTokenMethod, top_k
from methods.visual_pruning.common_merging import dpc_flops, dpc_knn
from models.base import Unsupported
from models.vision_language import Numbering, VisionLanguage, VisualPlan
from models.vision_language_decoder import (
    TEXT_AFTER,
    PromptTokens,
    Stage,
    StageView,
)

# Layers in front of the stages, of 32, and the tokens that stay of 576 by the authors' lists.
_AFTER = (2, 6, 15)
_LISTS = ((576, 576, 576), (300, 200, 110), (303, 110, 36), (66, 30, 17))


@dataclass(frozen=True, kw_only=True)
class SparseVLM(VisualTokenMethod):
    """Rating by words, in three steps, with recycling.

    Attributes:
        keep_ratio: Share of the visual tokens that a layer sees, averaged over layers, in (0, 1].
        positions: `compact` numbers the tokens anew behind each step, as version 1 does; with
            `original` a merged token stands where its cluster's centre did.
        recycled: Share of the dropped tokens that is merged, in [0, 1].
        knn: Neighbours of the density when clustering.
    """

    trial = MappingProxyType({"keep_ratio": 0.6})

    positions: Numbering = "compact"
    recycled: float = 0.3
    knn: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("recycled", self.recycled, 0, 1, "It is a share of the tokens removed.")
        require_count("knn", self.knn, 1, None, "It counts tokens.")

    def plan(self, model: VisionLanguage) -> VisualPlan:
        """Return a plan with three stages in the decoder."""
        layers = model.facts.text.num_layers
        after: list[int] = []
        for layer in _AFTER:
            # In a shallow decoder each step comes at least a layer after the one before.
            after.append(max(round(layer * layers / 32), 1 + (after[-1] if after else 0)))
        if after[-1] >= layers:
            raise Unsupported(
                f"sparsevlm needs room for three steps; '{model.name}' has {layers} layers."
            )
        stages = [self._stage(number, tuple(after), layers) for number in range(len(after))]
        return VisualPlan(stages=tuple(stages), positions=self.positions, separators="rows")

    def _stage(self, number: int, after: tuple[int, ...], layers: int) -> Stage:
        def counts(tokens: int) -> Counts:
            return schedule(self.keep_ratio, tokens, after, layers, self.recycled)[number]

        return Stage(
            after=after[number],
            choose=lambda view: self._choose(view, counts(view.num_patches)),
            wanted=lambda tokens: counts(tokens).kept + counts(tokens).merged,
        )

    def _choose(self, view: StageView, counts: Counts) -> Tensor | PromptTokens | None:
        tokens = view.tokens
        places = tokens.patches
        if counts.kept == len(places):
            return None
        rating = raters(view.embedded)
        # Words stand behind the image, so what left moved them all by the same number.
        words = (tokens.kind == TEXT_AFTER).nonzero().flatten()
        view.notes["raters"] = len(rating)
        view.count(2.0 * view.num_patches * len(words) * tokens.states.shape[1])
        scores = view.attention_from(words[rating])[places]
        ranked = top_k(scores, len(places))
        chosen = ranked[: counts.kept].sort().values
        kept = tokens.take(tokens.keeping(chosen, "rows"))
        if not counts.merged:
            return kept
        again = ranked[counts.kept : counts.kept + counts.candidates].sort().values
        rest = tokens.take(places[again])
        clusters = dpc_knn(rest.states, counts.merged, self.knn)
        view.count(dpc_flops(*rest.states.shape))
        made = replace(rest.take(clusters.centres), states=clusters.means(rest.states))
        return insert(kept, made, int((kept.kind != TEXT_AFTER).sum()))


@dataclass(frozen=True)
class Counts:
    """Tokens of one step.

    Attributes:
        kept: Tokens that stay.
        candidates: Dropped tokens that are merged.
        merged: Tokens that they become.
    """

    kept: int
    candidates: int
    merged: int


def raters(embedded: PromptTokens) -> Tensor:
    """Return which of the words behind the image resemble visual tokens more than the average.

    Args:
        embedded: The prompt as it enters the decoder.

    Returns:
        Their numbers among the words, ascending.
    """
    words = embedded.states[embedded.kind == TEXT_AFTER].float()
    likeness = embedded.states[embedded.patches].float() @ words.T
    share = likeness.softmax(1).mean(0)
    found = (share > share.mean()).nonzero().flatten()
    # All words alike: none is above the average, so all of them rate.
    return found if len(found) else torch.arange(len(share), device=share.device)


def insert(tokens: PromptTokens, others: PromptTokens, place: int) -> PromptTokens:
    """Return tokens with others put in front of the one at `place`."""
    index = torch.arange(len(tokens), device=tokens.kind.device)
    first, last = tokens.take(index[:place]), tokens.take(index[place:])
    parts = (first, others, last)
    return PromptTokens(
        torch.cat([part.states for part in parts]),
        torch.cat([part.kind for part in parts]),
        torch.cat([part.tile for part in parts]),
        torch.cat([part.line for part in parts]),
        torch.cat([part.origin for part in parts]),
        replace(tokens.positions, values=torch.cat([part.positions.values for part in parts], 1)),
    )


@cache
def schedule(
    keep_ratio: float, tokens: int, after: tuple[int, ...], layers: int, recycled: float
) -> tuple[Counts, ...]:
    """Return the tokens of each step, for an average over the layers.

    Searched once for each number of tokens: stages ask for it while the clock runs.

    Args:
        keep_ratio: The average.
        tokens: Visual tokens of the image.
        after: Layers in front of each step.
        layers: Of the decoder.
        recycled: Share of the dropped tokens that is merged.

    Raises:
        models.base.Unsupported: The shortest list has more tokens on average, by more than the
            one by which the authors' own lists exceed their budgets.
    """
    widths = [end - start for start, end in zip(after, [*after[1:], layers], strict=True)]

    def average(steps: Sequence[Counts]) -> float:
        seen = sum(width * (s.kept + s.merged) for width, s in zip(widths, steps, strict=True))
        return (after[0] * tokens + seen) / (layers * tokens)

    low, high = 0.0, float(len(_LISTS) - 1)
    if average(_steps(high, tokens, recycled)) > keep_ratio + 1 / tokens:
        raise Unsupported(
            f"the authors' shortest list keeps {average(_steps(high, tokens, recycled)):.3f} of "
            f"the tokens on average over {layers} layers, more than keep_ratio={keep_ratio:g}."
        )
    for _ in range(40):
        middle = (low + high) / 2
        too_many = average(_steps(middle, tokens, recycled)) > keep_ratio + 1e-9
        low, high = (middle, high) if too_many else (low, middle)
    return _steps(high, tokens, recycled)


def _steps(place: float, tokens: int, recycled: float) -> tuple[Counts, ...]:
    """Return the steps at a place between the authors' lists, 0 for all tokens."""
    number = min(int(place), len(_LISTS) - 2)
    share = place - number
    found: list[Counts] = []
    present = tokens
    for one, other in zip(_LISTS[number], _LISTS[number + 1], strict=True):
        wanted = round((one + share * (other - one)) / _LISTS[0][0] * tokens)
        kept = min(max(1, wanted), present)
        candidates = int((present - kept) * recycled)
        # As many clusters as the authors make; none of nothing.
        merged = min(candidates // 10 + 1, candidates)
        found.append(Counts(kept, candidates, merged))
        present = kept + merged
    return tuple(found)
