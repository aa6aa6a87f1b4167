"""ToDRE: keep visual tokens that differ from one another, and drop them all once they are read.

In front of the decoder a few tokens are chosen that are far apart, from a pivot that [CLS] attends
to most. Late in the decoder, when text and image have stopped attending to each other, every
visual token leaves all remaining layers. Training-free; only the second stage sees the question.

Source: arXiv 2505.18757; no code was released. Version 1 chooses by k-center, version 2 by the sum
of distances (`selection`). Open in the sources and settled here: the threshold `tau`, which has to
be calibrated; distances are 1 - cosine of the embeddings that the decoder gets; the pivot's
attention is that of the layer that feeds the projector, the last one that is run; attention shares
are means over heads and rows of the full attention row; of LLaVA-NeXT's separators those stay whose
line has a token left, and the second stage drops them with the rest. Numbers of the tokens do not
change in the second stage, for the distances between words must not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor

from methods.checks import require_choice, require_count
from methods.visual_pruning.common import (
    VisualTokenMethod,
    greedy_flops,
    greedy_maxmin,
    greedy_maxsum,
    normalised,
)
from models.base import Unsupported, VisionLanguageFacts
from models.vision_language import Seen, VisionLanguage, VisualPlan
from models.vision_language_decoder import (
    PATCH,
    SEPARATOR,
    TEXT_AFTER,
    TEXT_BEFORE,
    Stage,
    StageView,
)
from models.vision_language_towers import Watch

Selection = Literal["kcenter", "maxsum"]
Pivot = Literal["auto", "cls", "received", "medoid", "random"]


@dataclass(frozen=True, kw_only=True)
class ToDRE(VisualTokenMethod):
    """Diversity in front of the decoder, task relevance inside it.

    Attributes:
        keep_ratio: Share of the visual tokens that the first stage keeps.
        selection: `kcenter` takes the token whose nearest chosen one is farthest, `maxsum` the one
            with the smallest sum of similarities to the chosen ones.
        pivot: First token: most attended by `cls` (with tiles, of the thumbnail), most `received`
            attention, the `medoid` next to the mean, or `random`; `auto` is `cls` where there is
            one, else `received`.
        check_layer: Decoder layer behind which the second stage looks; `auto` is 7/8 of them.
        adaptive: Look behind every layer from half of them on, as version 1 does.
        tau: Share of attention under which text and image count as separate.
        require_both: Whether both shares must be under `tau`, or that of the text alone.
        stage1, stage2: Switches for the ablation.
    """

    neutral = MappingProxyType({"keep_ratio": 1.0, "stage2": False})
    # What a random model attends to is not known; with 2 the second stage always acts.
    trial = MappingProxyType({"tau": 2.0})

    keep_ratio: float = 0.1
    selection: Selection = "kcenter"
    pivot: Pivot = "auto"
    check_layer: int | Literal["auto"] = "auto"
    adaptive: bool = False
    tau: float = 0.05
    require_both: bool = True
    stage1: bool = True
    stage2: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("selection", self.selection, get_args(Selection))
        require_choice("pivot", self.pivot, get_args(Pivot))
        if self.check_layer != "auto":
            require_count("check_layer", self.check_layer, 1, None, "Layers count from 1.")
        if not 0 <= self.tau < math.inf:
            raise ValueError(f"tau must be a share of attention, 0 or more, got {self.tau}.")

    def plan(self, model: VisionLanguage) -> VisualPlan:
        """Return a plan with a choice in front of the decoder and one in it."""
        facts = model.facts
        pivot = self._pivot_of(facts, model.name)
        watch = Watch()
        if self.stage1 and pivot in ("cls", "received"):
            layer = (facts.feature_layer,)
            watch = Watch(cls=layer) if pivot == "cls" else Watch(received=layer)
        stages = [
            Stage(after=layer, choose=self._choose, keeps_positions=True)
            for layer in self.layers(facts.text.num_layers)
        ]
        return VisualPlan(
            watch=watch,
            wanted=self.budget if self.stage1 else None,
            reduce=(lambda seen: self._reduce(seen, pivot)) if self.stage1 else None,
            stages=tuple(stages) if self.stage2 else (),
            positions=self.positions,
            separators="rows",
        )

    def layers(self, num_layers: int) -> range:
        """Return the layers behind which the second stage looks, counted from 1."""
        if self.adaptive:
            return range(math.ceil(num_layers / 2), num_layers)
        layer = 7 * num_layers // 8 if self.check_layer == "auto" else self.check_layer
        return range(layer, layer + 1)

    def _pivot_of(self, facts: VisionLanguageFacts, name: str) -> Pivot:
        if self.pivot == "auto":
            return "cls" if facts.has_cls else "received"
        if self.pivot == "cls" and not facts.has_cls:
            raise Unsupported(f"todre:pivot=cls needs a [CLS] token; '{name}' has none.")
        return self.pivot

    def _reduce(self, seen: Seen, pivot: Pivot) -> Tensor:
        tokens, width = seen.projected.shape
        budget = self.budget(tokens)
        vectors = normalised(seen.projected)
        first = self._first(seen, pivot, vectors)
        seen.count(greedy_flops(tokens, width, budget))
        return select(vectors, first, budget, self.selection)

    def _first(self, seen: Seen, pivot: Pivot, vectors: Tensor) -> Tensor:
        """Return the pivot's number, without axes."""
        if pivot == "random":
            generator = torch.Generator().manual_seed(seen.image_key)
            return torch.randint(len(vectors), (), generator=generator).to(vectors.device)
        if pivot == "medoid":
            seen.count(2.0 * vectors.numel())
            return (vectors @ vectors.mean(0)).argmax()
        encoded = seen.encoded
        layer = next(iter(encoded.cls or encoded.received))
        scores = encoded.cls[layer].mean(0) if pivot == "cls" else encoded.received[layer]
        if pivot == "cls":
            scores = scores.masked_fill(seen.layout.patch_tile > 0, -torch.inf)
        return scores.argmax()

    def _choose(self, view: StageView) -> Tensor | None:
        if not len(view.tokens.patches):
            return None
        shares = attention_shares(view)
        view.notes["alpha_tv"] = shares.text_on_image
        view.notes["alpha_vt_before"] = shares.image_on_text_before
        view.notes["alpha_vt_after"] = shares.image_on_text_after
        view.notes["checked_layer"] = view.layer
        is_faded = shares.text_on_image < self.tau
        if self.require_both:
            back = shares.image_on_text_before + shares.image_on_text_after
            is_faded = is_faded and back < self.tau
        view.notes["dropped_after"] = view.layer if is_faded else 0
        return view.tokens.patches[:0] if is_faded else None


def select(vectors: Tensor, first: Tensor, budget: int, selection: Selection) -> Tensor:
    """Choose tokens that differ.

    Args:
        vectors: Of length 1, (tokens, width).
        first: Number of the pivot, without axes.
        budget: How many, the pivot included.
        selection: See `ToDRE`.

    Returns:
        Their numbers, ascending, (budget,).
    """
    greedy = greedy_maxmin if selection == "kcenter" else greedy_maxsum
    return greedy(vectors, first, budget).sort().values


@dataclass(frozen=True)
class Shares:
    """How much of their attention text and image pay each other, each in [0, 1].

    Attributes:
        text_on_image: Of the text behind the image, on visual tokens.
        image_on_text_before: Of the visual tokens, on the text in front of them.
        image_on_text_after: The same on the text behind them: 0 under a causal mask.
    """

    text_on_image: float
    image_on_text_before: float
    image_on_text_after: float


def attention_shares(view: StageView) -> Shares:
    """Return the shares of the layer that ran last, means over heads and rows."""
    kind = view.tokens.kind
    is_visual = (kind == PATCH) | (kind == SEPARATOR)
    from_text = view.attention_from((kind == TEXT_AFTER).nonzero().flatten())
    from_image = view.attention_from(is_visual.nonzero().flatten())
    return Shares(
        float(from_text[is_visual].sum()),
        float(from_image[kind == TEXT_BEFORE].sum()),
        float(from_image[kind == TEXT_AFTER].sum()),
    )
