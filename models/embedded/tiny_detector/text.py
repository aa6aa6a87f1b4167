"""The grammar of tiny-detector: coordinate tokens, prompts, answers and the parser of answers.

Tokens are those of tiny-vlm and, behind them, four markers, two brackets and `<0>` to `<999>`.
Answers follow Rex-Omni's grammar (arXiv 2510.12798): for each phrase in the order of the prompt

    <|object_ref_start|>red star<|object_ref_end|><|box_start|><12><40><200><280>,...<|box_end|>

joined by ", ", the boxes of a phrase ordered by their left edge, and the word None between the
box markers for a phrase that names nothing. A point is two coordinates, an outline sixteen.
"""

from __future__ import annotations

from typing import NamedTuple

from models.embedded.tiny_vlm.text import EOS, VOCABULARY, encode

BINS = 1000
MARKERS = ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>")
ADDED = (*MARKERS, "[", "]", *(f"<{number}>" for number in range(BINS)))
NAME_START, NAME_END, BOX_START, BOX_END, _LEFT_BRACKET, _RIGHT_BRACKET = range(
    len(VOCABULARY), len(VOCABULARY) + 6
)
FIRST_COORDINATE = len(VOCABULARY) + 6
VOCABULARY_SIZE = FIRST_COORDINATE + BINS
(COMMA,) = encode(",")
(NONE,) = encode("None")

# Coordinates of one instance by kind of answer; an outline has eight corners.
COORDINATES = {"box": 4, "point": 2, "outline": 16}
_REQUESTS = {
    "box": ("Detect", "Output the bounding box coordinates in [x0, y0, x1, y1] format."),
    "point": ("Point to", "Output the point coordinates in [x0, y0] format."),
    "outline": ("Find", "Output the corner coordinates in [x0, y0, x1, y1] format."),
}


def prompt(kind: str, phrases: list[str]) -> str:
    """Return the text after the image that asks for boxes, points or outlines of phrases."""
    verb, closing = _REQUESTS[kind]
    return f"{verb} {', '.join(phrases)}. {closing} ASSISTANT:"


def encode_prompt(text: str) -> tuple[int, ...]:
    """Return the ids of a prompt; brackets are tokens of their own."""
    brackets = {"[": _LEFT_BRACKET, "]": _RIGHT_BRACKET}
    found: list[int] = []
    for part in text.replace("[", "\0[\0").replace("]", "\0]\0").split("\0"):
        found += [brackets[part]] if part in brackets else encode(part)
    return tuple(found)


def quantise(value: float, size: int) -> int:
    """Return the bin of a coordinate in pixels: floor(999 value / size), within 0 to 999."""
    return min(max(int((BINS - 1) * value // size), 0), BINS - 1)


def position(number: int, size: int) -> float:
    """Return the pixel coordinate of a bin: at most size / 999 below what was quantised."""
    return number / (BINS - 1) * size


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


def parse(ids: list[int] | tuple[int, ...], kind: str) -> Parsed:
    """Read the ids of an answer; an instance with a wrong number of coordinates is skipped.

    An answer that was cut short keeps the instances that are whole.
    """
    count = COORDINATES[kind]
    found: list[Found] = []
    spans: list[list[tuple[int, int]]] = []
    malformed, place = 0, 0
    complete = EOS in ids
    ids = list(ids[: ids.index(EOS)] if complete else ids)
    while place < len(ids):
        if ids[place] == COMMA and found:
            place += 1
        if place >= len(ids) or ids[place] != NAME_START or NAME_END not in ids[place:]:
            malformed += 1
            break
        end = ids.index(NAME_END, place)
        words = ids[place + 1 : end]
        if not all(word < len(VOCABULARY) for word in words) or ids[end + 1 : end + 2] != [
            BOX_START
        ]:
            malformed += 1
            break
        found.append(Found(" ".join(VOCABULARY[word] for word in words), []))
        spans.append([])
        place = end + 2
        stop = ids.index(BOX_END, place) if BOX_END in ids[place:] else len(ids)
        start = place
        for at in range(place, stop + 1):
            if at < stop and ids[at] != COMMA:
                continue
            piece = ids[start:at]
            if len(piece) == count and all(value >= FIRST_COORDINATE for value in piece):
                found[-1].instances.append(tuple(value - FIRST_COORDINATE for value in piece))
                spans[-1].append((start, at))
            elif piece and piece != [NONE]:
                malformed += 1
            start = at + 1
        place = stop + 1
    return Parsed(found, spans, malformed, complete)
