"""The grammar in which vision-language detectors write coordinates: bins, parser, grammar mask.

A coordinate is one of a few tokens that stand for nothing else, `<0>` to `<999>`. An answer is

    <|object_ref_start|>NAME<|object_ref_end|><|box_start|>B,B,...<|box_end|>

for each name, joined by commas; B is four coordinate tokens for a box, two for a point, two for
each corner of a polygon, without anything between them, and the word None stands for no instance.
Key points come as JSON with the same tokens.

Models without such tokens write numbers as text, `[12, 40, 200, 280]`, many tokens for the same
four: `parse` reads these with `digits`, from the same markers.

Source: Rex-Omni, arXiv 2510.12798, section 3; IDEA-Research/Rex-Omni at 478e44f, `parser.py`.
Digits: Shikra, arXiv 2306.15195, section 3.2.
Differs from Rex-Omni's parser: what breaks the grammar is counted and named, not skipped in
silence; the corners of a box are put in order; the instances that are whole are kept from cut JSON
too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Rounding = Literal["floor", "round"]
Writing = Literal["tokens", "digits"]

BOX, POINT = 4, 2
# A polygon has three corners at least.
_LEAST_POLYGON = 6
NONE_WORD = "None"
UNSEEN_WORD = "unvisible"


def quantise(value: float, size: float, bins: int = 1000, rounding: Rounding = "floor") -> int:
    """Return the bin of a position, 0 to bins - 1.

    Args:
        value: Pixels from the left or upper edge; outside of the image it is clipped.
        size: Width or height of the image, pixels.
        bins: Different values; the first is the one edge and the last the other.
        rounding: `floor` is the released code's; `round` halves the largest error.
    """
    # Multiplied first: 999 * 32 / 96 is a whole number, 999 * (32 / 96) is a little less.
    scaled = min(max((bins - 1) * value / size, 0.0), bins - 1.0)
    return int(scaled if rounding == "floor" else scaled + 0.5)


def dequantise(number: int, size: float, bins: int = 1000) -> float:
    """Return the position of a bin, pixels.

    With `floor` it lies at most size / (bins - 1) before what was quantised, with `round` at most
    half of that to either side.
    """
    return number / (bins - 1) * size


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """The ids of an answer's parts.

    Attributes:
        name_start, name_end, box_start, box_end: Markers.
        coordinates: Bin of each coordinate token.
        ends: Ids that end a text.
        spell: Text of ids that are none of these.
        encode: Ids of a text, without anything in front.
    """

    name_start: int
    name_end: int
    box_start: int
    box_end: int
    coordinates: Mapping[int, int]
    ends: frozenset[int]
    spell: Callable[[Sequence[int]], str]
    encode: Callable[[str], Sequence[int]]

    @property
    def markers(self) -> frozenset[int]:
        """All markers."""
        return frozenset((self.name_start, self.name_end, self.box_start, self.box_end))


class Piece(NamedTuple):
    """An instance of an answer: its bins, and where its first token and what follows it stand."""

    bins: tuple[int, ...]
    first: int
    end: int


class Named(NamedTuple):
    """A name of an answer and its instances, in the answer's order."""

    name: str
    pieces: list[Piece]


@dataclass
class Parsed:
    """What an answer says.

    Attributes:
        found: Names with their instances, in the order of the answer.
        errors: What the grammar does not allow, an entry for each piece; these were skipped.
        complete: The answer ended by itself.
    """

    found: list[Named] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    complete: bool = False


def fits(count: int, coordinates: int | None) -> bool:
    """Say whether an instance may have so many coordinates; None asks for a polygon."""
    if coordinates is None:
        return count >= _LEAST_POLYGON and count % 2 == 0
    return count == coordinates


def parse(
    ids: Sequence[int],
    grammar: Grammar,
    coordinates: int | None,
    writing: Writing = "tokens",
) -> Parsed:
    """Read an answer.

    Args:
        ids: Tokens of the answer, with or without the one that ends it.
        grammar: What they mean.
        coordinates: Of one instance; None for a polygon.
        writing: Whether a coordinate is a token of its own, or a number in digits.

    Returns:
        What is well-formed, and what is not. An answer that was cut short keeps the instances that
        are whole; the piece that was being written is an error.
    """
    stop = next((place for place, token in enumerate(ids) if token in grammar.ends), None)
    parsed = Parsed(complete=stop is not None)
    ids = list(ids if stop is None else ids[:stop])
    place = 0
    while place < len(ids):
        if ids[place] != grammar.name_start:
            begin = place
            while place < len(ids) and ids[place] != grammar.name_start:
                place += 1
            text = _shown(ids[begin:place], grammar)
            if text.strip() not in ("", ",") or (text.strip() and not parsed.found):
                parsed.errors.append(f"{text.strip()[:40]!r} stands outside of the grammar")
            continue
        place = _read_block(ids, place, grammar, coordinates, parsed, _READERS[writing])
    return parsed


def _read_block(
    ids: list[int],
    place: int,
    grammar: Grammar,
    coordinates: int | None,
    parsed: Parsed,
    read: _Reader,
) -> int:
    """Read a name and its instances; return the place behind them."""
    end = place + 1
    special = grammar.markers | grammar.coordinates.keys()
    while end < len(ids) and ids[end] not in special:
        end += 1
    name = grammar.spell(ids[place + 1 : end]).strip()
    if ids[end : end + 2] != [grammar.name_end, grammar.box_start]:
        parsed.errors.append(f"the name {name[:40]!r} is not followed by instances")
        return end + (ids[end : end + 1] == [grammar.name_end])
    first = place = end + 2
    while place < len(ids) and ids[place] not in grammar.markers:
        place += 1
    pieces, wrong = read(ids, range(first, place), grammar, coordinates)
    parsed.found.append(Named(name, pieces))
    wanted = "an even number of 6 or more" if coordinates is None else str(coordinates)
    parsed.errors += [f"{what} for {name[:40]!r} where {wanted} are wanted" for what in wrong]
    if place < len(ids) and ids[place] == grammar.box_end:
        return place + 1
    if place < len(ids):
        parsed.errors.append(f"the instances of {name[:40]!r} have no end")
        # A new name may begin here; any other marker is swallowed.
        return place if ids[place] == grammar.name_start else place + 1
    return place


# Ids, the places of a block's content, the grammar and the coordinates of an instance to the
# instances and what is no instance.
_Reader = Callable[[list[int], range, Grammar, int | None], tuple[list[Piece], list[str]]]


def _read_tokens(
    ids: list[int], places: range, grammar: Grammar, coordinates: int | None
) -> tuple[list[Piece], list[str]]:
    """Read instances whose coordinates are tokens, separated by commas."""
    pieces: list[Piece] = []
    wrong: list[str] = []
    first = places.start
    run: list[int] = []
    strange: list[int] = []

    def close(after: int) -> None:
        """Take what stands between two commas."""
        said = grammar.spell(strange).strip()
        if run and fits(len(run), coordinates) and not said:
            pieces.append(Piece(tuple(run), first, after))
        elif run or said not in ("", NONE_WORD):
            wrong.append(f"{len(run)} coordinates" + (f" and {said[:40]!r}" if said else ""))

    for place in places:
        token = ids[place]
        if token in grammar.coordinates:
            run.append(grammar.coordinates[token])
        elif grammar.spell([token]).strip() == ",":
            close(place)
            run, strange, first = [], [], place + 1
        elif grammar.spell([token]).strip():
            strange.append(token)
        elif not run:
            first = place + 1  # a space in front belongs to no instance
    close(places.stop)
    return pieces, wrong


def _read_digits(
    ids: list[int], places: range, grammar: Grammar, coordinates: int | None
) -> tuple[list[Piece], list[str]]:
    """Read instances whose coordinates are numbers in brackets, separated by commas."""
    text, owners = "", list[int]()
    words, told = list[int](), 0
    for place in places:
        if (token := ids[place]) in grammar.coordinates:
            new = f"<{grammar.coordinates[token]}>"
        else:
            # A tokenizer may write a token otherwise at the beginning of a text.
            words.append(token)
            longer = grammar.spell(words)
            new, told = "".join(longer[told:].split()), len(longer)
        text, owners = text + new, owners + [place] * len(new)
    pieces: list[Piece] = []
    wrong: list[str] = []
    if text == NONE_WORD:
        return pieces, wrong
    for part in _BRACKETED.finditer(text):
        if part[1] is None:
            if part[0].strip(","):
                wrong.append(f"0 coordinates and {part[0][:40]!r}")
            continue
        bins = tuple(int(number) for number in part[1].split(","))
        if not fits(len(bins), coordinates) or max(bins) >= len(grammar.coordinates):
            wrong.append(f"{len(bins)} coordinates and {part[0][:40]!r}")
            continue
        pieces.append(Piece(bins, owners[part.start()], owners[part.end() - 1] + 1))
    return pieces, wrong


_NUMBERS = r"\d{1,9}(?:,\d{1,9})*"
# Numbers in brackets, or anything up to the next such.
_BRACKETED = re.compile(rf"\[({_NUMBERS})\]|(?:(?!\[{_NUMBERS}\]).)+", re.ASCII)
_READERS: Mapping[Writing, _Reader] = {"tokens": _read_tokens, "digits": _read_digits}


def _shown(ids: Sequence[int], grammar: Grammar) -> str:
    """Return ids as text, markers and coordinates included."""
    return "".join(text for text, _ in _spelled(ids, grammar))


def _spelled(ids: Sequence[int], grammar: Grammar) -> Iterator[tuple[str, int]]:
    """Yield text and the place of its first token; coordinates and markers are on their own."""
    names = {
        grammar.name_start: "<|object_ref_start|>",
        grammar.name_end: "<|object_ref_end|>",
        grammar.box_start: "<|box_start|>",
        grammar.box_end: "<|box_end|>",
    }
    place = 0
    while place < len(ids):
        token, end = ids[place], place + 1
        if token in grammar.coordinates:
            yield f"<{grammar.coordinates[token]}>", place
        elif token in names:
            yield names[token], place
        else:
            while end < len(ids) and ids[end] not in names and ids[end] not in grammar.coordinates:
                end += 1
            yield grammar.spell(ids[place:end]), place
        place = end


class Posed(NamedTuple):
    """A thing with key points, as JSON says it: bins, and its coordinate tokens' places."""

    name: str
    box: tuple[int, ...]
    points: dict[str, tuple[int, int] | None]
    places: list[int]


class ParsedPoses(NamedTuple):
    """Things with key points, what was wrong, and whether the answer ended by itself."""

    found: list[Posed]
    errors: list[str]
    complete: bool


_ENTRY = re.compile(r'\s*,?\s*"([^"]*)"\s*:\s*')
_BIN = re.compile(r"<(\d+)>")


def parse_keypoints(ids: Sequence[int], grammar: Grammar, names: Sequence[str]) -> ParsedPoses:
    """Read key points in JSON: a box and named points of each thing.

        {"person1": {"bbox": " <1><36><987><984> ", "keypoints": {"nose": " <540><351> ",
         "left eye": "unvisible"}}}

    Args:
        ids: Tokens of the answer.
        grammar: What they mean.
        names: Points that were asked for; one that is missing is an error and counts as not seen.
    """
    stop = next((place for place, token in enumerate(ids) if token in grammar.ends), None)
    complete = stop is not None
    text, places = "", list[tuple[int, int]]()
    for part, place in _spelled(ids[:stop], grammar):
        if ids[place] in grammar.coordinates:
            places.append((len(text), place))
        text += part
    found: list[Posed] = []
    errors: list[str] = []
    at = text.find("{") + 1
    if not at:
        if text.strip() not in ("", NONE_WORD):
            errors.append(f"{text.strip()[:40]!r} is no JSON")
        return ParsedPoses(found, errors, complete)
    decoder = json.JSONDecoder()
    while entry := _ENTRY.match(text, at):
        try:
            content, end = decoder.raw_decode(text, entry.end())
        except json.JSONDecodeError:
            errors.append(f"the entry {entry[1][:40]!r} is no JSON")
            return ParsedPoses(found, errors, complete)
        own = [place for offset, place in places if entry.end() <= offset < end]
        posed, wrong = _posed(entry[1], content, names, own)
        errors += wrong
        if posed is not None:
            found.append(posed)
        at = end
    if not text[at:].lstrip().startswith("}"):
        errors.append("the JSON has no end")
    return ParsedPoses(found, errors, complete)


def _posed(
    name: str, content: Any, names: Sequence[str], places: list[int]
) -> tuple[Posed | None, list[str]]:
    errors: list[str] = []
    points = content.get("keypoints") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(points, dict):
        return None, [f"the entry {name[:40]!r} has no keypoints"]
    box = _bins(content.get("bbox"))
    if len(box) != BOX:
        return None, [f"the box of {name[:40]!r} has {len(box)} coordinates"]
    found: dict[str, tuple[int, int] | None] = {}
    for wanted in names:
        said = points.get(wanted)
        bins = _bins(said)
        if len(bins) == POINT:
            found[wanted] = (bins[0], bins[1])
            continue
        if said != UNSEEN_WORD:
            errors.append(f"{wanted!r} of {name[:40]!r} is {str(said)[:40]!r}")
        found[wanted] = None
    return Posed(name, box, found, places), errors


def _bins(text: object) -> tuple[int, ...]:
    return tuple(int(each) for each in _BIN.findall(text)) if isinstance(text, str) else ()


class GrammarMask:
    """Allows, token by token, only what keeps an answer well-formed and within its length.

    The answer then names the phrases as they were asked, in order. What the grammar forces is one
    allowed token; what it leaves open (a coordinate or None, another instance or the end) is for
    the model. An instance is only begun where it and all that must follow still fit.
    """

    def __init__(
        self,
        grammar: Grammar,
        phrases: Sequence[str],
        coordinates: int | None,
        limit: int,
    ) -> None:
        """Begin an answer.

        Args:
            grammar: Of the answer.
            phrases: That are asked.
            coordinates: Of an instance; None for a polygon.
            limit: Tokens that the answer may have, its end included.

        Raises:
            ValueError: Not even an answer without instances has room.
        """
        self._grammar = grammar
        self._coordinates = coordinates
        self._none = tuple(grammar.encode(NONE_WORD))
        self._comma = tuple(grammar.encode(","))
        self._whole = coordinates or _LEAST_POLYGON
        # The word may be longer than a point.
        self._shortest = min(len(self._none), self._whole)
        between = tuple(grammar.encode(", "))
        self._openings = [
            (
                *(between if number else ()),
                grammar.name_start,
                *grammar.encode(phrase),
                grammar.name_end,
                grammar.box_start,
            )
            for number, phrase in enumerate(phrases)
        ]
        self._left = limit
        self._block = 0
        self._run = 0
        self._forced: list[int] = []
        # `open` right behind box_start, `coordinates` within an instance, `end` when all is said.
        self._state: Literal["open", "coordinates", "end"] = "open"
        if limit < (need := len(self._openings[0]) + self._shortest + self._rest()):
            raise ValueError(
                f"max_new_tokens = {limit} cannot hold an answer about {len(phrases)} phrases, "
                f"which takes {need} tokens at least."
            )
        self._force(self._openings[0])

    def allowed(self) -> frozenset[int] | None:
        """Return the ids that may come next; None once the answer is over."""
        grammar = self._grammar
        if self._forced:
            return frozenset((self._forced[0],))
        if self._state == "end":
            return None
        coordinates = frozenset(grammar.coordinates)
        if self._state == "open":
            left = self._left - self._rest()
            nothing = frozenset((self._none[0],) if left >= len(self._none) else ())
            return nothing | (coordinates if left >= self._whole else frozenset())
        if not fits(self._run, self._coordinates):
            return coordinates
        further = frozenset((grammar.box_end,))
        if self._left >= len(self._comma) + self._whole + self._rest():
            further |= {self._comma[0]}
        # A corner has two coordinates.
        if self._coordinates is None and self._left >= 2 + self._rest():
            further |= coordinates
        return further

    def advance(self, token: int) -> None:
        """Take note of the token that was chosen."""
        self._left -= 1
        if self._forced:
            self._forced.pop(0)
        elif self._state == "open" and token == self._none[0]:
            self._forced = [*self._none[1:]]
            self._close()
        elif token in self._grammar.coordinates:
            self._state, self._run = "coordinates", self._run + 1
        elif token == self._comma[0]:
            self._forced = [*self._comma[1:]]
            self._run = 0
        else:
            self._block_over()

    def _close(self) -> None:
        """Force the end of the block."""
        self._forced.append(self._grammar.box_end)
        self._block_over()

    def _block_over(self) -> None:
        self._block += 1
        self._state, self._run = "open", 0
        if self._block == len(self._openings):
            self._state = "end"
            self._force((min(self._grammar.ends),))
        else:
            self._force(self._openings[self._block])

    def _force(self, ids: Sequence[int]) -> None:
        self._forced += ids

    def _rest(self) -> int:
        """Return the tokens of the shortest end from within the present block's instances on."""
        blocks = self._openings[self._block + 1 :]
        return 1 + sum(len(opening) + self._shortest + 1 for opening in blocks) + 1
