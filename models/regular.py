"""Regular languages over bytes, as constraints: regular expressions and JSON schemas.

Both become one nondeterministic automaton, and that a deterministic one, state by state when it is
needed. Every state of the automaton leads to its end, so a set of states that is not empty can be
completed: the check of a beginning is exact.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from itertools import pairwise
from typing import Any, Final

_HIGHEST: Final = 0x10FFFF
_UNKNOWN, _DEAD = -2, -1

Ranges = tuple[tuple[int, int], ...]
"""Code points, as ascending ranges with both ends included."""


class Nfa:
    """A nondeterministic automaton under construction; byte sets are 256-bit masks."""

    def __init__(self) -> None:
        self.edges: list[list[tuple[int, int]]] = [[]]
        self.silent: list[list[int]] = [[]]

    def state(self) -> int:
        """Return a new state."""
        self.edges.append([])
        self.silent.append([])
        return len(self.edges) - 1

    def closure(self, states: Iterable[int]) -> frozenset[int]:
        """Return the states that are reached without a byte."""
        found, waiting = set(states), list(states)
        while waiting:
            for target in self.silent[waiting.pop()]:
                if target not in found:
                    found.add(target)
                    waiting.append(target)
        return frozenset(found)


Expression = Callable[[Nfa, int], int]
"""Adds itself to an automaton behind a state and returns the state where it ends."""


def characters(ranges: Ranges) -> Expression:
    """Return one character out of `ranges`, in UTF-8.

    Raises:
        ValueError: There is none.
    """
    if not ranges:
        raise ValueError("a class of characters must hold at least one.")
    sequences = [sequence for low, high in ranges for sequence in _utf8_ranges(low, high)]

    def add(nfa: Nfa, start: int) -> int:
        end = nfa.state()
        for sequence in sequences:
            at = start
            for place, (low, high) in enumerate(sequence):
                target = end if place == len(sequence) - 1 else nfa.state()
                nfa.edges[at].append(((1 << high + 1) - (1 << low), target))
                at = target
        return end

    return add


def literal(text: str) -> Expression:
    """Return exactly this text."""
    return concatenation(*(characters(((ord(letter), ord(letter)),)) for letter in text))


def concatenation(*parts: Expression) -> Expression:
    """Return the parts in a row; the empty text for none."""
    return lambda nfa, start: reduce(lambda at, part: part(nfa, at), parts, start)


def alternatives(*parts: Expression) -> Expression:
    """Return one of the parts, of which there must be one at least."""
    if not parts:
        raise ValueError("alternatives need at least one part.")

    def add(nfa: Nfa, start: int) -> int:
        end = nfa.state()
        for part in parts:
            begin = nfa.state()
            nfa.silent[start].append(begin)
            nfa.silent[part(nfa, begin)].append(end)
        return end

    return add


def repetition(part: Expression, low: int, high: int | None) -> Expression:
    """Return `low` to `high` times the part; any number from `low` when None."""

    def add(nfa: Nfa, start: int) -> int:
        at = concatenation(*[part] * low)(nfa, start)
        end = nfa.state()
        nfa.silent[at].append(end)
        if high is None:
            begin = nfa.state()
            nfa.silent[at].append(begin)
            again = part(nfa, begin)
            nfa.silent[again] += [begin, end]
        else:
            for _ in range(high - low):
                begin = nfa.state()
                nfa.silent[at].append(begin)
                at = part(nfa, begin)
                nfa.silent[at].append(end)
        return end

    return add


def optional(part: Expression) -> Expression:
    """Return the part or nothing."""
    return repetition(part, 0, 1)


def language(expression: Expression) -> RegularState:
    """Return an expression as a constraint."""
    return _Dfa(expression).states[0]


class _Dfa:
    """The deterministic automaton, made as far as somebody has walked."""

    def __init__(self, expression: Expression) -> None:
        self._nfa = Nfa()
        self._end = expression(self._nfa, 0)
        self._ids: dict[frozenset[int], int] = {}
        self._sets: list[frozenset[int]] = []
        self.states: list[RegularState] = []
        self.next: list[list[int]] = []
        self._add(self._nfa.closure([0]))

    def _add(self, states: frozenset[int]) -> int:
        number = self._ids.setdefault(states, len(self._sets))
        if number == len(self._sets):
            self._sets.append(states)
            self.next.append([_UNKNOWN] * 256)
            self.states.append(RegularState(self, number, self._end in states))
        return number

    def step(self, number: int, byte: int) -> int:
        """Return the state after a byte, `_DEAD` if there is none."""
        reached = {
            target
            for state in self._sets[number]
            for mask, target in self._nfa.edges[state]
            if mask >> byte & 1
        }
        target = self._add(self._nfa.closure(reached)) if reached else _DEAD
        self.next[number][byte] = target
        return target


class RegularState:
    """A state of a regular language: a `models.constraints.Constraint`."""

    __slots__ = ("_dfa", "_number", "is_complete")

    def __init__(self, dfa: _Dfa, number: int, is_complete: bool) -> None:
        self._dfa = dfa
        self._number = number
        self.is_complete = is_complete

    def after(self, data: bytes) -> RegularState | None:
        """Return the state after more bytes; None if they leave the language."""
        number, dfa = self._number, self._dfa
        for byte in data:
            target = dfa.next[number][byte]
            if target == _UNKNOWN:
                target = dfa.step(number, byte)
            if target == _DEAD:
                return None
            number = target
        return dfa.states[number]


def _utf8_ranges(low: int, high: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Yield sequences of byte ranges that spell the code points from `low` to `high`."""
    for first, last in ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF)):
        if low <= last and high >= first:
            yield from _utf8_same_length(max(low, first), min(high, last))
    if high > 0xFFFF:
        yield from _utf8_same_length(max(low, 0x10000), high)


def _utf8_same_length(low: int, high: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Split a range until first and last character differ in whole trailing bytes only."""
    for bits in (6, 12, 18):
        mask = (1 << bits) - 1
        if low | mask < high or (low & ~mask) != (high & ~mask):
            if high < 0x80:
                break
            if low & mask:
                yield from _utf8_same_length(low, low | mask)
                yield from _utf8_same_length((low | mask) + 1, high)
                return
            if high & mask != mask:
                yield from _utf8_same_length(low, (high & ~mask) - 1)
                yield from _utf8_same_length(high & ~mask, high)
                return
    yield tuple(zip(chr(low).encode(), chr(high).encode(), strict=True))


# --- sets of characters ---------------------------------------------------------------------------


def union(*several: Ranges) -> Ranges:
    """Return the characters of any."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(pair for ranges in several for pair in ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return tuple(merged)


def complement(ranges: Ranges) -> Ranges:
    """Return all other characters."""
    edges = [(-1, -1), *union(ranges), (_HIGHEST + 1, _HIGHEST + 1)]
    return tuple((one[1] + 1, two[0] - 1) for one, two in pairwise(edges) if one[1] + 1 < two[0])


def without(ranges: Ranges, removed: Ranges) -> Ranges:
    """Return the characters of `ranges` that are not in `removed`."""
    return complement(union(complement(ranges), removed))


def _of(letters: str) -> Ranges:
    return union(tuple((ord(letter), ord(letter)) for letter in letters))


# --- regular expressions --------------------------------------------------------------------------

_CLASSES = {
    "d": _of(string.digits),
    "w": _of(string.ascii_letters + string.digits + "_"),
    "s": _of(" \t\n\r\f\v"),
}
_CLASSES |= {name.upper(): complement(ranges) for name, ranges in list(_CLASSES.items())}
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}
_NOT_NEWLINE = complement(_of("\n"))
_MOST_REPEATS = 1000


def regex(pattern: str) -> RegularState:
    r"""Return the language of a regular expression, which the whole text must match.

    Literals, `.` (anything but a newline), classes with ranges and `^`, escapes `\d \w \s` and
    their opposites (ASCII, as with `re.ASCII`), `\n \t \r \f \v \xHH \uHHHH`, groups `(…)`
    and `(?:…)`, `|`, and `* + ? {m} {m,} {m,n}`. Not regular, or without meaning for whole texts,
    and therefore refused: anchors, look-around, back-references, lazy and possessive quantifiers.

    Raises:
        ValueError: The pattern is not of this form; the message says where.
    """
    return language(pattern_expression(pattern))


def pattern_expression(pattern: str, excluded: Ranges = ()) -> Expression:
    """Return a regular expression without its `excluded` characters."""
    return _PatternParser(pattern, excluded).parse()


class _PatternParser:
    def __init__(self, pattern: str, excluded: Ranges) -> None:
        self._pattern = pattern
        self._excluded = excluded
        self._at = 0

    def parse(self) -> Expression:
        expression = self._choice()
        if self._at < len(self._pattern):
            raise self._error("a group is closed that was never opened")
        return expression

    def _error(self, what: str) -> ValueError:
        return ValueError(f"regular expression {self._pattern!r}: {what} (position {self._at}).")

    def _peek(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _take(self) -> str:
        letter = self._peek()
        if not letter:
            raise self._error("it ends too early")
        self._at += 1
        return letter

    def _takes(self, text: str) -> bool:
        found = self._pattern.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _choice(self) -> Expression:
        parts = [self._sequence()]
        while self._takes("|"):
            parts.append(self._sequence())
        return parts[0] if len(parts) == 1 else alternatives(*parts)

    def _sequence(self) -> Expression:
        parts = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._repeated(self._atom()))
        return concatenation(*parts)

    def _repeated(self, part: Expression) -> Expression:
        letter = self._peek()
        if letter not in ("*", "+", "?", "{"):
            return part
        self._at += 1
        low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(letter) or self._bounds()
        if self._peek() in ("?", "+", "*", "{"):
            raise self._error("one quantifier behind another, lazy or possessive, is not supported")
        return repetition(part, low, high)

    def _bounds(self) -> tuple[int, int | None]:
        end = self._pattern.find("}", self._at)
        low, comma, high = self._pattern[self._at : max(end, 0)].partition(",")
        if not low.isdecimal() or (high and not high.isdecimal()):
            raise self._error("a bound must be {m}, {m,} or {m,n}; write a brace as \\{")
        self._at = end + 1
        most = int(high) if high else None if comma else int(low)
        if max(int(low), most or 0) > _MOST_REPEATS or (most is not None and most < int(low)):
            raise self._error(f"a bound must ascend and stay within {_MOST_REPEATS}")
        return int(low), most

    def _atom(self) -> Expression:
        letter = self._take()
        if letter == "(":
            if self._peek() == "?" and not self._takes("?:"):
                raise self._error("of the extensions (?…) only (?:…) is supported")
            inner = self._choice()
            if not self._takes(")"):
                raise self._error("a group is not closed")
            return inner
        if letter == "[":
            return self._characters(self._class())
        if letter == ".":
            return self._characters(_NOT_NEWLINE)
        if letter == "\\":
            return self._characters(self._escape())
        if letter in "^$":
            raise self._error(
                f"the whole text is matched, so {letter} has no place; write \\{letter}"
            )
        if letter in "*+?{":
            raise self._error(f"{letter} has nothing to repeat")
        return self._characters(_of(letter))

    def _characters(self, ranges: Ranges) -> Expression:
        allowed = without(ranges, self._excluded) if self._excluded else ranges
        if not allowed:
            raise self._error("no character is left here")
        return characters(allowed)

    def _escape(self) -> Ranges:
        letter = self._take()
        if letter in _CLASSES:
            return _CLASSES[letter]
        if letter in _CONTROLS:
            return _of(_CONTROLS[letter])
        if letter in "xu":
            digits = self._pattern[self._at : self._at + (2 if letter == "x" else 4)]
            if len(digits) < 2 or not all(digit in string.hexdigits for digit in digits):
                raise self._error(f"\\{letter} needs hexadecimal digits")
            self._at += len(digits)
            return _of(chr(int(digits, 16)))
        if letter.isalnum():
            raise self._error(f"\\{letter} is not supported")
        return _of(letter)

    def _class(self) -> Ranges:
        is_negated = self._takes("^")
        found: list[Ranges] = []
        while not (found and self._takes("]")):
            low = self._class_member()
            if self._peek() == "-" and self._pattern[self._at + 1 : self._at + 2] not in ("", "]"):
                self._at += 1
                high = self._class_member()
                single = [ranges[0] for ranges in (low, high) if len(ranges) == 1]
                if len(single) < 2 or any(one != two for one, two in single):
                    raise self._error("a range needs a character at either end")
                if single[0] > single[1]:
                    raise self._error("a range must ascend")
                low = ((single[0][0], single[1][0]),)
            found.append(low)
        ranges = union(*found)
        return complement(ranges) if is_negated else ranges

    def _class_member(self) -> Ranges:
        letter = self._take()
        return self._escape() if letter == "\\" else _of(letter)


# --- JSON schemas ---------------------------------------------------------------------------------

_NO_CONTENT = union(((0, 0x1F),), _of('"\\'))
_STRING_CHARACTER = alternatives(
    characters(complement(_NO_CONTENT)),
    concatenation(literal("\\"), characters(_of('"\\/bfnrt'))),
)
_INTEGER = pattern_expression("-?(?:0|[1-9][0-9]*)")
_NUMBER = pattern_expression(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_COMMA, _COLON = (concatenation(literal(sign), optional(literal(" "))) for sign in ",:")
_KEYWORDS = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern"},
    "integer": {"minimum", "maximum"},
    "number": set(),
    "boolean": set(),
    "null": set(),
}
_EVERYWHERE = {"type", "title", "description"}


def json_schema(schema: Mapping[str, Any]) -> RegularState:
    r"""Return the language of the JSON texts that satisfy a schema, in the form models write them.

    Of JSON Schema: `const`; `enum`; `type` with one of `object` (`properties`, `required`;
    properties come in the order of the schema, and there are no others, so `additionalProperties`
    may only be false), `array` (`items`, `minItems`, `maxItems`), `string` (`minLength`,
    `maxLength`, or `pattern`, which here matches the whole string), `integer` (`minimum` and
    `maximum`, both or neither), `number`, `boolean`, `null`; `title` and `description` are passed
    over. Any other keyword is refused, above all `$ref`: nesting is as deep as the schema.

    Of the ways to write a value: no spaces but one, or none, after a comma or colon; no escapes in
    strings but `\" \\ \/ \b \f \n \r \t`, and none under `pattern`; integers without
    fraction and exponent. Every text of the language satisfies the schema; some texts that do are
    not of the language.

    Raises:
        ValueError: The schema is not of this form; the message says where.
    """
    return language(_value(schema, "schema"))


def _value(schema: Mapping[str, Any], place: str) -> Expression:
    if not isinstance(schema, Mapping):
        raise ValueError(f"{place} must be an object, got {schema!r}.")
    for keyword in ("const", "enum"):
        if keyword in schema:
            _refuse_others(schema, {keyword, *_EVERYWHERE}, place)
            values = [schema["const"]] if keyword == "const" else schema["enum"]
            return alternatives(*(_constant(value, place) for value in values))
    kind = schema.get("type")
    if kind not in _KEYWORDS:
        raise ValueError(
            f"{place}: type must be one of {', '.join(_KEYWORDS)}, or there is const or enum; got "
            f"{kind!r}."
        )
    _refuse_others(schema, _KEYWORDS[kind] | _EVERYWHERE, place)
    if kind == "object":
        return _object(schema, place)
    if kind == "array":
        return _array(schema, place)
    if kind == "string":
        return _string(schema, place)
    if kind == "integer":
        return _integer(schema, place)
    if kind == "number":
        return _NUMBER
    return literal("null") if kind == "null" else alternatives(literal("true"), literal("false"))


def _refuse_others(schema: Mapping[str, Any], allowed: set[str], place: str) -> None:
    if others := sorted(set(schema) - allowed):
        raise ValueError(
            f"{place}: keyword {others[0]!r} is not supported here; supported are "
            f"{', '.join(sorted(allowed))}."
        )


def _constant(value: Any, place: str) -> Expression:
    if not isinstance(value, (str, int, float, bool, type(None))):
        raise ValueError(f"{place}: const and enum hold single values, got {value!r}.")
    return literal(json.dumps(value, ensure_ascii=False))


def _object(schema: Mapping[str, Any], place: str) -> Expression:
    if schema.get("additionalProperties", False) is not False:
        raise ValueError(f"{place}: additionalProperties may only be false.")
    properties = schema.get("properties", {})
    required = set(schema.get("required", ()))
    if unknown := sorted(required - set(properties)):
        raise ValueError(f"{place}: required property {unknown[0]!r} is not among the properties.")
    members = [
        concatenation(
            literal(json.dumps(name, ensure_ascii=False)),
            _COLON,
            _value(value, f"{place}.properties.{name}"),
        )
        for name, value in properties.items()
    ]
    is_required = [name in required for name in properties]

    def rest(at: int, is_first: bool) -> Expression:
        """The members from `at` on; a comma stands before each but the first."""
        if at == len(members):
            return concatenation()
        here = members[at] if is_first else concatenation(_COMMA, members[at])
        if is_required[at]:
            return concatenation(here, rest(at + 1, False))
        if is_first:
            taken = concatenation(here, rest(at + 1, False))
            return alternatives(taken, rest(at + 1, True))
        return concatenation(optional(here), rest(at + 1, False))

    return concatenation(literal("{"), rest(0, True), literal("}"))


def _array(schema: Mapping[str, Any], place: str) -> Expression:
    item = _value(schema.get("items", {}), f"{place}.items")
    low, high = _sizes(schema, "minItems", "maxItems", place)
    more = repetition(
        concatenation(_COMMA, item), max(low - 1, 0), None if high is None else max(high - 1, 0)
    )
    filled = concatenation(item, more)
    if high == 0:
        return literal("[]")
    return concatenation(literal("["), filled if low else optional(filled), literal("]"))


def _string(schema: Mapping[str, Any], place: str) -> Expression:
    quote = literal('"')
    if "pattern" in schema:
        if schema.keys() & {"minLength", "maxLength"}:
            raise ValueError(f"{place}: give either pattern or lengths.")
        pattern = schema["pattern"].removeprefix("^").removesuffix("$")
        return concatenation(quote, pattern_expression(pattern, _NO_CONTENT), quote)
    low, high = _sizes(schema, "minLength", "maxLength", place)
    return concatenation(quote, repetition(_STRING_CHARACTER, low, high), quote)


def _sizes(schema: Mapping[str, Any], least: str, most: str, place: str) -> tuple[int, int | None]:
    low, high = schema.get(least, 0), schema.get(most)
    if low < 0 or (high is not None and high < low):
        raise ValueError(f"{place}: {least} must not be negative and not above {most}.")
    return low, high


def _integer(schema: Mapping[str, Any], place: str) -> Expression:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is None and high is None:
        return _INTEGER
    if low is None or high is None or low > high:
        raise ValueError(f"{place}: minimum and maximum come together, the smaller first.")
    parts = []
    if low < 0:
        parts.append(concatenation(literal("-"), _naturals(max(1, -high), -low)))
    if high >= 0:
        parts.append(_naturals(max(0, low), high))
    return alternatives(*parts)


def _naturals(low: int, high: int) -> Expression:
    """Return the whole numbers from `low` to `high` in decimal notation."""
    parts = []
    for length in range(len(str(low)), len(str(high)) + 1):
        least, most = (10 ** (length - 1) if length > 1 else 0), 10**length - 1
        parts.append(_same_length(str(max(low, least)), str(min(high, most))))
    return alternatives(*parts)


def _same_length(low: str, high: str) -> Expression:
    """Return the digit strings from `low` to `high`, all equally long."""
    if not low:
        return concatenation()
    first, last = int(low[0]), int(high[0])
    if first == last:
        return concatenation(literal(low[0]), _same_length(low[1:], high[1:]))
    zeros, nines = "0" * (len(low) - 1), "9" * (len(low) - 1)
    parts = [
        concatenation(literal(low[0]), _same_length(low[1:], nines)),
        concatenation(literal(high[0]), _same_length(zeros, high[1:])),
    ]
    if last - first > 1:
        middle = characters(((ord("0") + first + 1, ord("0") + last - 1),))
        digits = repetition(characters(_of(string.digits)), len(zeros), len(zeros))
        parts.append(concatenation(middle, digits))
    return alternatives(*parts)
