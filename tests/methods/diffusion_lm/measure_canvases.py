"""Print what cutting the canvas short costs: Learn2PD's end prediction, and the plain decoder.

Run `python -m tests.methods.diffusion_lm.measure_canvases [MODEL [PROBLEMS]]`, by default on
tiny-dllm with 24 problems of arithmetic-mini. End prediction runs alone, one token a step; the
plain decoder gets canvases that end so many tokens behind the answer that it writes on the whole
one, with no rule that cuts anything. Where both lose answers, it is the model that does not know
such canvases.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import islice

from methods.diffusion_lm.learn2pd import Learn2PD
from methods.diffusion_lm.low_confidence import LowConfidence
from models.base import MaskedDiffusionLM
from models.loading import load
from tasks.arithmetic_mini import ArithmeticMini
from tests.methods.diffusion_lm.measure_localleap import Point, measure

# Tokens between the end of the text and the end of the canvas.
SPARE = (0, 1, 3, 7, 15, 31)


def report(model: MaskedDiffusionLM, task: ArithmeticMini, problems: int) -> None:
    """Print how many answers to the first problems are right, and the forwards of each."""
    items = list(islice(task.items(), problems))
    print("method | right | forwards")

    def show(name: str, *points: Point) -> None:
        right = sum(int(point.right.sum()) for point in points)
        forwards = sum(int(point.forwards.sum()) for point in points)
        print(f"{name} | {right} of {len(items)} | {forwards / len(items):.1f}", flush=True)

    plain = measure(model, task, LowConfidence(), items)
    show("one token a step", plain)
    ends = Learn2PD(filter="confidence", accept_threshold=1.0)
    show("the same with end prediction", measure(model, task, ends, items))
    for spare in SPARE:
        # An end of text counts as one of the text's tokens.
        canvases = [min(int(tokens) + spare, task.max_new_tokens) for tokens in plain.tokens]
        points = [
            measure(model, replace(task, max_new_tokens=canvas), LowConfidence(), [item])
            for canvas, item in zip(canvases, items, strict=True)
        ]
        show(f"one token a step, the canvas ends {spare} behind the text", *points)


if __name__ == "__main__":
    name, problems = [*sys.argv[1:], *("tiny-dllm", "24")[len(sys.argv) - 1 :]]
    loaded = load(name, capability="MaskedDiffusionLM")
    report(loaded, ArithmeticMini(), int(problems))  # type: ignore[arg-type]  # it is one
