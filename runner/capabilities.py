"""What the runner must know of each capability: baseline, unit, whether calls have steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """How experiments with models of one capability are measured.

    Attributes:
        baseline: Method that joins where a request names no baseline.
        output_unit: What times are divided by: the output `token`, or the whole item, named here.
        has_steps: Whether a call is a sequence of forwards over a cache, whose cost by width is
            measured before the items.
        answers: Other capabilities whose tasks a model of this one can run too, because it has what
            their calls use: a text task calls `generate`, whatever the model does to continue.
    """

    baseline: str
    output_unit: str
    has_steps: bool = False
    answers: tuple[str, ...] = ()


CONVENTIONS: Mapping[str, Conventions] = {
    "TextGenerator": Conventions(baseline="autoregressive", output_unit="token", has_steps=True),
    "TextEncoder": Conventions(baseline="encode", output_unit="text"),
    "TokenizedLM": Conventions(baseline="native-tokenizer", output_unit="text"),
    "MaskedDiffusionLM": Conventions(
        baseline="low-confidence", output_unit="token", has_steps=True, answers=("TextGenerator",)
    ),
    "VisionLanguageModel": Conventions(baseline="full-tokens", output_unit="answer"),
    "Detector": Conventions(baseline="detect", output_unit="image"),
    "ImageGenerator": Conventions(baseline="raster", output_unit="image", has_steps=True),
}


def taken_as(capability: str, offered: Sequence[str]) -> str:
    """Return the capability that a model is loaded as for a task.

    Args:
        capability: What the task's call takes.
        offered: What the model can be loaded as; none if that is not known.

    Returns:
        The task's own if the model has it; else the first that answers for it; else the task's own,
        which the model then lacks.
    """
    if capability in offered:
        return capability
    able = (each for each in offered if each in CONVENTIONS)
    return next((each for each in able if capability in CONVENTIONS[each].answers), capability)
