"""Coordinate digits: boxes written as numbers, a token a digit.

The rival of detectors with a token for each coordinate: the same model, the same grid of positions
and the same requests as `rex-omni`, but an answer has `[12, 40, 200, 280]`, some 17 tokens where
`rex-omni` has four. What that costs in steps, and what it does to the boxes, is all that differs.

The weights of `data` are low-rank changes of tiny-detector's decoder, learned by
models/embedded/coordinate_digits; its tower and its own weights stay as they are.

Source: Shikra, arXiv 2306.15195, section 3.2: coordinates as numbers in natural language, no new
tokens. Differs from it: whole numbers up to the grid's last where Shikra writes decimals between 0
and 1, and Rex-Omni's markers around them, so that the answers are told apart alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, get_args

from hardware.profile import Profile
from methods.base import Output
from methods.checks import require_choice, unsuited
from methods.grounding.common import DetectorMethod
from models.base import Detector, Unsupported
from models.detector import CoordinateDetector, DetectionPlan
from models.embedded.coordinate_digits.adapter import adapted, load_changes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

WEIGHTS = Path(__file__).parent / "data" / "coordinate_digits.safetensors"
Changes = Literal["trained", "none"]


@dataclass(frozen=True, kw_only=True)
class CoordinateDigits(DetectorMethod):
    """All categories in one request, coordinates in digits.

    Attributes:
        weights: `trained` are for tiny-detector; `none` changes nothing and is for models that
            write digits by themselves. Others then find nothing, on purpose.
    """

    weights: Changes = "trained"
    output = Output.APPROXIMATE
    # The battery's model has other sizes.
    trial = MappingProxyType({"weights": "none"})

    def __post_init__(self) -> None:
        require_choice("weights", self.weights, get_args(Changes))

    def changed(self, model: Detector) -> Detector:
        """Return the model, asked and read by the plan; its weights are `apply`'s."""
        if not isinstance(model, CoordinateDetector):
            raise unsuited(self, model, "a vision-language model that writes coordinates")
        if self.weights == "trained" and model.name != "tiny-detector":
            raise Unsupported(
                f"the trained weights belong to tiny-detector, not to '{model.name}': train some "
                "with models/embedded/coordinate_digits, or pass weights=none."
            )
        return model.planned(DetectionPlan(phrases_per_request=None, writing="digits"))

    @contextmanager
    def apply(self, model: Detector, hardware: Profile) -> Iterator[Detector]:
        """Change the decoder's weights inside the block; leave them as they were."""
        with super().apply(model, hardware) as planned:
            if self.weights == "none":
                yield planned
                return
            assert isinstance(model, CoordinateDetector)
            with adapted(model.module, _trained()):
                yield planned


@cache
def _trained() -> Mapping[str, Tensor]:
    return load_changes(WEIGHTS)
