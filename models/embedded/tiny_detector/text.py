"""The grammar of tiny-detector: coordinate tokens, prompts, answers and the parser of answers.

Tokens are those of tiny-vlm and, behind them, four markers, two brackets and `<0>` to `<999>`.
Answers follow Rex-Omni's grammar (arXiv 2510.12798): for each phrase in the order of the prompt

    <|object_ref_start|>red star<|object_ref_end|><|box_start|><12><40><200><280>,...<|box_end|>

joined by ", ", the boxes of a phrase ordered by their left edge, and the word None between the
box markers for a phrase that names nothing. A point is two coordinates, an outline sixteen.
"""

from __future__ import annotations

from typing import NamedTuple

from models import detector_format
from models.embedded.tiny_vlm.text import EOS, VOCABULARY, encode

BINS = 1000
MARKERS = ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>")
ADDED = (*MARKERS, "[", "]", *(f"<{number}>" for number in range(BINS)))
NAME_START, NAME_END, BOX_START, BOX_END, LEFT_BRACKET, RIGHT_BRACKET = range(
    len(VOCABULARY), len(VOCABULARY) + 6
)
FIRST_COORDINATE = len(VOCABULARY) + 6
VOCABULARY_SIZE = FIRST_COORDINATE + BINS
(COMMA,) = encode(",")
(NONE,) = encode("None")

# Coordinates of one instance by kind of answer; an outline has eight corners.
COORDINATES = {"box": 4, "point": 2, "outline": 16}
# The words of a request and the most phrases that training puts into one: `detector.json`.
PROMPTS = {
    "box": "Detect {phrases}. Output the bounding box coordinates in [x0, y0, x1, y1] format.",
    "point": "Point to {phrases}. Output the point coordinates in [x0, y0] format.",
    "polygon": "Find {phrases}. Output the corner coordinates in [x0, y0, x1, y1] format.",
}
MOST_PHRASES = {"box": 6, "point": 6, "polygon": 2}
DIALECT = {"prompts": PROMPTS, "most_phrases": MOST_PHRASES}
# What the capability calls this recipe's kinds of answer.
OUTPUTS = {"box": "box", "point": "point", "outline": "polygon"}


def prompt(kind: str, phrases: list[str]) -> str:
    """Return the text after the image that asks for boxes, points or outlines of phrases."""
    return PROMPTS[OUTPUTS[kind]].format(phrases=", ".join(phrases)) + " ASSISTANT:"


def encode_prompt(text: str) -> tuple[int, ...]:
    """Return the ids of a prompt; brackets are tokens of their own."""
    brackets = {"[": LEFT_BRACKET, "]": RIGHT_BRACKET}
    found: list[int] = []
    for part in text.replace("[", "\0[\0").replace("]", "\0]\0").split("\0"):
        found += [brackets[part]] if part in brackets else encode(part)
    return tuple(found)


class Found(NamedTuple):
    """A phrase and its instances, each a tuple of bins."""

    phrase: str
    instances: list[tuple[int, ...]]


def encode_answer(found: list[Found]) -> tuple[int, ...]:
    """Return the ids of an answer with its end token."""
    ids: list[int] = []
    for number, (phrase, instances) in enumerate(found):
        if number:
            ids.append(COMMA)
        ids += [NAME_START, *encode(phrase), NAME_END, BOX_START]
        for place, bins in enumerate(sorted(instances)):
            if place:
                ids.append(COMMA)
            ids += [FIRST_COORDINATE + value for value in bins]
        if not instances:
            ids.append(NONE)
        ids.append(BOX_END)
    return (*ids, EOS)


class Parsed(NamedTuple):
    """What an answer says.

    Attributes:
        found: Phrases with their instances, in the order of the answer.
        spans: For each phrase the places of each instance's tokens in the ids, as (first, last+1).
        malformed: Pieces that the grammar does not allow; they were skipped.
        complete: The answer ended by itself.
    """

    found: list[Found]
    spans: list[list[tuple[int, int]]]
    malformed: int
    complete: bool


GRAMMAR = detector_format.Grammar(
    name_start=NAME_START,
    name_end=NAME_END,
    box_start=BOX_START,
    box_end=BOX_END,
    coordinates={FIRST_COORDINATE + value: value for value in range(BINS)},
    ends=frozenset((EOS,)),
    # Pieces of a number follow one another without a space.
    spell=lambda ids: " ".join((*VOCABULARY, *ADDED)[number] for number in ids).replace(" ##", ""),
    encode=encode,
)


def parse(ids: list[int] | tuple[int, ...], kind: str) -> Parsed:
    """Read the ids of an answer; see `models.detector_format.parse`."""
    read = detector_format.parse(ids, GRAMMAR, COORDINATES[kind])
    return Parsed(
        [Found(name, [piece.bins for piece in pieces]) for name, pieces in read.found],
        [[(piece.first, piece.end) for piece in pieces] for _, pieces in read.found],
        len(read.errors),
        read.complete,
    )
