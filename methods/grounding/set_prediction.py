"""Set prediction: boxes by regression from a few queries, in the place of coordinate tokens.

The rival of a detector that writes: the same vision tower, then a small DETR that says all boxes at
once, continuous, with scores, without a token. What it gives up is the open vocabulary: it knows
the words that it was trained with, and refuses others.

Source: DETR, arXiv 2005.12872; queries from the patches as in Deformable DETR, arXiv 2010.04159.
Network and recipe: models/embedded/set_prediction; its weights are those of `data`.
Differs from DETR: 16 queries for images of 6 objects, two layers, no encoder layers (the tower is
one), attributes in the place of classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, get_args

import torch

from methods.base import Output
from methods.checks import require_choice, require_number, unsuited
from methods.grounding.common import DetectorMethod
from models.base import (
    Decoding,
    DetectionOutput,
    Detections,
    Detector,
    DetectorFacts,
    Instance,
    Trace,
    Unsupported,
)
from models.detector import CoordinateDetector
from models.embedded.set_prediction.network import (
    FEATURES,
    GRID,
    SetHead,
    load_head,
    names,
    read,
)
from models.vision_language_towers import Watch
from models.wrapper import Wrapper

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

WEIGHTS = Path(__file__).parent / "data" / "set_prediction.safetensors"
Head = Literal["trained", "untrained"]


@dataclass(frozen=True, kw_only=True)
class SetPrediction(DetectorMethod):
    """A DETR-like head on the vision tower.

    Attributes:
        head: `trained` is for tiny-detector's tower; `untrained` has random weights and fits any
            tower: it costs the same and finds nothing, on purpose.
        threshold: Least probability of being an object, in [0, 1).
    """

    head: Head = "trained"
    threshold: float = 0.5
    output = Output.APPROXIMATE
    # The battery's model has another tower.
    trial = MappingProxyType({"head": "untrained", "threshold": 0.0})

    def __post_init__(self) -> None:
        require_choice("head", self.head, get_args(Head))
        require_number(
            "threshold",
            self.threshold,
            0,
            1,
            "It is the least probability of being an object.",
            below_high=True,
        )

    def changed(self, model: Detector) -> Detector:
        """Return a detector that runs the model's tower and the head."""
        if not isinstance(model, CoordinateDetector):
            raise unsuited(self, model, "a vision-language model, for its tower")
        if self.head == "trained" and model.name != "tiny-detector":
            raise Unsupported(
                f"the trained head belongs to tiny-detector's tower, not to '{model.name}': train "
                "one with models/embedded/set_prediction, or pass head=untrained."
            )
        return SetDetector(model, self)


class SetDetector(Wrapper):
    """A detector made of another one's vision tower and a head.

    Attributes:
        facts: Sizes of the tower and the head for tiny-detector's patches.
    """

    facts: DetectorFacts  # type: ignore[assignment]  # its own

    def __init__(self, model: CoordinateDetector, method: SetPrediction) -> None:
        self._model = model
        self._method = method
        self.name = model.name
        tower = model.reader.facts.vision_parameters
        matrices = tower + _head("untrained", FEATURES, GRID, GRID).matrix_parameters
        self.facts = DetectorFacts(
            outputs=("box", "point"),
            bins=None,
            matrix_parameters=matrices,
            weight_bytes=matrices * next(model.module.parameters()).element_size(),
            dtype=model.facts.dtype,
        )

    @torch.inference_mode()
    def detect(
        self,
        image: npt.NDArray[np.uint8],
        phrases: Sequence[str],
        output: DetectionOutput,
        decoding: Decoding,
        *,
        keypoints: Sequence[str] = (),
    ) -> Detections:
        """Find all objects once, and tell those that a phrase names.

        Raises:
            models.base.Unsupported: Another output, or a word that the head does not know.
        """
        if output not in self.facts.outputs:
            raise Unsupported(f"a regression head finds boxes and points, not {output!r}.")
        trace = Trace()
        tower = self._model.reader.tower
        pixels = tower.prepare(image, 1)
        trace.mark("prepared", self.synchronize)
        encoded = tower.encode(pixels, Watch())
        trace.mark("encoded", self.synchronize)
        features = encoded.features
        grid = encoded.layout.grid
        head = _head(self._method.head, features.shape[1], grid.rows, grid.columns)
        head = head.to(features.device)
        items = read(head(features[None].float())[-1], 0, self._method.threshold)
        trace.mark("decode", self.synchronize)
        trace.flops = encoded.flops + head.flops(len(features))
        trace.notes["requests"] = 1
        height, width = image.shape[:2]
        found = []
        for phrase in phrases:
            try:
                told = [(item, names(item, phrase)) for item in items]
            except ValueError as error:
                raise Unsupported(str(error)) from error
            own = [(item.box, sure) for item, sure in told if sure is not None]
            found.append(
                tuple(
                    Instance(coordinates=_pixels(box, output, width, height), score=sure)
                    for box, sure in own
                )
            )
        shown = zip(phrases, found, strict=True)
        return Detections(
            token_ids=(),
            text=", ".join(f"{len(each)} {phrase}" for phrase, each in shown),
            finish="eos",
            trace=trace,
            found=tuple(found),
        )


def _pixels(
    box: tuple[float, float, float, float], output: DetectionOutput, width: int, height: int
) -> tuple[float, ...]:
    x0, y0, x1, y1 = box[0] * width, box[1] * height, box[2] * width, box[3] * height
    return (x0, y0, x1, y1) if output == "box" else ((x0 + x1) / 2, (y0 + y1) / 2)


@cache
def _head(kind: Head, features: int, rows: int, columns: int) -> SetHead:
    # Also what is loaded begins with random weights.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return load_head(WEIGHTS) if kind == "trained" else SetHead(features, rows, columns).eval()
