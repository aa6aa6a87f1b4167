"""Prompts of no benchmark, by which the constants behind `auto` were measured."""

from __future__ import annotations

from models.base import Decoding

DECODING = Decoding(max_new_tokens=48)

_CODE = (
    ("count_words(text: str) -> dict", "Return how often each word occurs in text."),
    ("is_leap_year(year: int) -> bool", "Return whether a year has 366 days."),
    ("flatten(nested: list) -> list", "Return the leaves of a nested list in order."),
    ("digits_sum(number: int) -> int", "Return the sum of the decimal digits of number."),
    ("collatz(start: int) -> list[int]", "Return the Collatz sequence from start down to 1."),
    ("caesar(text: str, shift: int) -> str", "Shift every letter of text in the alphabet."),
)
_PROSE = (
    "The lighthouse keeper wrote a letter to his sister in the city. He told her that",
    "Water boils at a lower temperature on a mountain, because",
    "A short list of things to pack for a week of walking in the hills:",
    "The old bridge was closed in spring, and since then the villagers",
)
PROMPTS = (*(f'def {head}:\n    """{doc}"""\n' for head, doc in _CODE), *_PROSE)
