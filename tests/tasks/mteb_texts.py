"""Texts of a few words, and vectors that tell how near they are."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

WORDS = ("rain", "snow", "bread", "milk", "tree", "stone", "glass", "river", "moon", "chair")


def texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [f"{' '.join(draw.choices(WORDS, k=4))} {seed}.{place}" for place in range(count)]


def vector(text: str) -> Any:
    # A little of its own for each text, so that no two similarities are equal but for rounding.
    own = np.random.default_rng([ord(letter) for letter in text]).random(len(WORDS))
    return np.array([text.count(word) for word in WORDS], dtype=np.float32) + own.astype(np.float32)
