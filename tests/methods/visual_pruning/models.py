"""Tiny models, prompts and plans for the tests of visual-token methods."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from methods.visual_pruning.common import VisualTokenMethod
from models.base import Decoding, VisualAnswer, VisualPrompt
from models.vision_language import Merged, Seen, VisionLanguage
from models.vision_language_decoder import PrunableDecoder
from runner.conformance_base import PROFILE
from runner.conformance_vision import ARCHITECTURES, picture, tiny_vision

__all__ = ["ARCHITECTURES", "answer_of", "first_logits", "model_of", "question", "reduced"]

model_of = functools.cache(tiny_vision)
# Wide, tall with padding that is cut off, and of one tile.
SHAPES = {"wide": (24, 48), "padded": (64, 40), "square": (24, 24)}


def question(shape: str = "padded", text: str = "What is it?") -> VisualPrompt:
    """Return a question about a picture of noise."""
    return VisualPrompt(image=picture(text, *SHAPES[shape]), text=text)


def answer_of(
    method: Any, architecture: Any = "llava", shape: str = "padded", tokens: int = 3
) -> VisualAnswer:
    """Answer by a method."""
    with method.apply(model_of(architecture), PROFILE) as changed:
        found: VisualAnswer = changed.answer(
            question(shape), Decoding(max_new_tokens=tokens, ignore_eos=True)
        )
    return found


def reduced(
    method: VisualTokenMethod, architecture: Any = "llava", shape: str = "padded"
) -> tuple[Seen, Tensor | Merged]:
    """Return what a method saw of an image and what it made of it in front of the decoder."""
    model: VisionLanguage = model_of(architecture)
    plan = method.plan(model)
    assert plan.reduce is not None
    prompt = question(shape)
    with torch.inference_mode():
        pixels = model.tower.prepare(prompt.image, 1)
        encoded = model.tower.encode(pixels, plan.watch, plan.merging)
        text = torch.randn(5, 48, generator=torch.Generator().manual_seed(3))
        seen = Seen(model.tower, encoded, text, 7, {}, lambda phase: None)
        return seen, plan.reduce(seen)


def first_logits(method: Any, architecture: Any = "llava", shape: str = "padded") -> Tensor:
    """Return the logits of every step of a short answer, (steps, vocab)."""
    rows: list[Tensor] = []
    decoder = model_of(architecture).decoder

    def record(states: Tensor) -> Tensor:
        rows.append(PrunableDecoder._logits(decoder, states))
        return rows[-1]

    decoder._logits = record  # type: ignore[method-assign]  # taken back below
    try:
        answer_of(method, architecture, shape)
    finally:
        del decoder._logits
    return torch.cat(rows)
