"""Rex-Omni: detection as next-point prediction, a coordinate a token.

Boxes are four tokens, points two, polygons two a corner, key points JSON with the same tokens; the
model says what it sees in one pass over all categories. The coordinate tokens, the grammar and the
prompts are the model's own (`models.detector`); what this method sets is how it is asked: all
categories in one request where the baseline asks one by one, and how the answer is taken.

Inference as released: greedy, no scores. `scores` adds exp of the mean log-probability of an
instance's tokens, for average precision beside F1. `constrained` masks what the grammar forbids.

Source: arXiv 2510.12798; IDEA-Research/Rex-Omni at 478e44f. Supervised training of the embedded
model: models/embedded/tiny_detector/train.py, post-training by group-relative rewards:
models/embedded/tiny_detector/post_train.py.
Differs from that release: its defaults set a repetition penalty of 1.05, which also weakens
coordinates that two boxes share; ours is 1.0, the setting is there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from methods.base import Output
from methods.checks import require_choice, require_count, unsuited
from methods.grounding.common import DetectorMethod
from models.base import Detector
from models.detector import CoordinateDetector, DetectionPlan

Scores = Literal["none", "log-probability"]


@dataclass(frozen=True, kw_only=True)
class RexOmni(DetectorMethod):
    """All categories in one request.

    Attributes:
        phrases_per_request: Phrases that one request names; 0 for as many as the model was trained
            with, which for the published model is no limit.
        scores: What an instance's score is: `none` as published, or exp of the mean
            `log-probability` of its coordinate tokens.
        constrained: Mask tokens that the answer's grammar does not allow.
        repetition_penalty: Weakens tokens of the prompt and the answer so far, at least 1.
    """

    phrases_per_request: int = 0
    scores: Scores = "log-probability"
    constrained: bool = False
    repetition_penalty: float = 1.0
    output = Output.APPROXIMATE
    neutral = MappingProxyType(
        {
            "phrases_per_request": 1,
            "scores": "log-probability",
            "constrained": False,
            "repetition_penalty": 1.0,
        }
    )

    def __post_init__(self) -> None:
        require_count(
            "phrases_per_request",
            self.phrases_per_request,
            0,
            None,
            "0 is as many as the model was trained with.",
        )
        require_choice("scores", self.scores, get_args(Scores))
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty >= 1):
            raise ValueError(
                f"repetition_penalty must be at least 1, which does nothing, got "
                f"{self.repetition_penalty}."
            )

    def changed(self, model: Detector) -> Detector:
        """Return the model, asked by the plan."""
        if not isinstance(model, CoordinateDetector):
            raise unsuited(self, model, "a vision-language model that writes coordinate tokens")
        return model.planned(self.plan())

    def plan(self) -> DetectionPlan:
        """Return how the model is asked."""
        return DetectionPlan(
            phrases_per_request=self.phrases_per_request or None,
            scores=self.scores == "log-probability",
            constrained=self.constrained,
            repetition_penalty=self.repetition_penalty,
        )
