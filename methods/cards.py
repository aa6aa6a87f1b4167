"""The cards: the `.toml` beside a method, read strictly into its paper and claims.

```toml
[paper]                     # once
title = "Attention Is Sometimes Needed"
arxiv = "2406.00001"
year = 2024

[[claim]]                   # once for each number or statement; none for baselines and controls
id = "C1"
metric = "speed-up"
value = "up to 2.5x"
number = 2.5                # where the claim is one number; then bound and unit say how it is meant
bound = "up-to"
unit = "x"
where = "abstract"
```
The other keys are the fields of `methods.base.Paper` and `methods.base.Claim`. Needs no torch.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from methods.base import Bound, Claim, Paper

_ARXIV = re.compile(r"(\d{2})(0[1-9]|1[0-2])\.\d{4,5}")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")
# A paper may appear years after it was posted, and a card may give either year.
_YEARS_TO_PRINT = 3

Table = TypeVar("Table", Paper, Claim)


class CardError(ValueError):
    """A card is not as it must be; the message names the file, the place and the key."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the `.toml` beside a method says.

    Attributes:
        paper: The publication it comes from.
        claims: In the order of the file; empty for methods nobody claims anything about.
    """

    paper: Paper
    claims: tuple[Claim, ...] = ()


def load_card(path: Path) -> Card:
    """Read a card.

    Raises:
        CardError: No TOML; a key is unknown, missing, of the wrong type or not allowed; two claims
            share an id; a number is not finite, or stands without its bound and unit; an uncertain
            claim has no note.
        OSError: The file cannot be read.
    """
    data = _parse(path.read_bytes(), path)
    _refuse_unknown(data, ("paper", "claim"), f"{path}")
    paper = _paper(data, path)
    tables = data.get("claim", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise CardError(f"{path}: claim must be an array of tables; write [[claim]], not [claim].")
    claims = tuple(
        _claim(table, f"{path}, [[claim]] {at} (id {table.get('id', '')!r})")
        for at, table in enumerate(tables, 1)
    )
    twice = [name for name, count in Counter(claim.id for claim in claims).items() if count > 1]
    if twice:
        raise CardError(
            f"{path}: the id {twice[0]!r} belongs to {sum(c.id == twice[0] for c in claims)} "
            "claims. Each claim needs its own: append a letter."
        )
    return Card(paper=paper, claims=claims)


def load_paper(path: Path) -> Paper:
    """Read only the paper of a card, which stands before its claims, without parsing those.

    For listings: ten times faster than `load_card`, and blind to what is wrong with the claims.

    Raises:
        CardError: As `load_card`, for the part before the first claim.
        OSError: The file cannot be read.
    """
    head = re.split(rb"(?m)^\[\[claim\]\]", path.read_bytes(), maxsplit=1)[0]
    return _paper(_parse(head, path), path)


def _parse(content: bytes, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(content.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CardError(f"{path} is no valid TOML: {error}.") from error


def _paper(data: Mapping[str, Any], path: Path) -> Paper:
    table = data.get("paper")
    if not isinstance(table, dict):
        raise CardError(f"{path}: the table [paper] is missing.")
    place = f"{path}, [paper]"
    paper = _build(Paper, table, place)
    if paper.code and not paper.code.startswith(("https://", "http://")):
        raise CardError(
            f"{place}: code must be a web address or empty, got {paper.code!r}. "
            "For owner/name on GitHub write https://github.com/owner/name."
        )
    posted = _ARXIV.fullmatch(paper.arxiv)
    if paper.arxiv and posted is None:
        raise CardError(
            f"{place}: arxiv must be an id without version such as 2408.08696, got {paper.arxiv!r}."
        )
    if posted is not None:
        first = 2000 + int(posted[1])
        if not first <= paper.year <= first + _YEARS_TO_PRINT:
            raise CardError(
                f"{place}: year must lie in [{first}, {first + _YEARS_TO_PRINT}], since "
                f"{paper.arxiv} was posted in {first}, got {paper.year}."
            )
    return paper


def _claim(table: Mapping[str, Any], place: str) -> Claim:
    claim = _build(Claim, table, place)
    if not _ID.fullmatch(claim.id):
        raise CardError(
            f"{place}: id must consist of letters, digits, '-' and '.', got {claim.id!r}."
        )
    if claim.number is None:
        for key in ("bound", "unit"):
            if key in table:
                raise CardError(f"{place}: {key} says how a number is meant, but there is none.")
    else:
        if not math.isfinite(claim.number):
            raise CardError(
                f"{place}: number must be finite, got {claim.number}. Leave it out where the "
                "claim is no single number."
            )
        for key in ("bound", "unit"):
            if key not in table:
                raise CardError(
                    f"{place}: a number needs its {key}. Allowed bounds: "
                    f"{', '.join(get_args(Bound))}; the unit is empty for a plain figure."
                )
    if claim.confidence == "uncertain" and not claim.note:
        raise CardError(f"{place}: an uncertain claim needs a note that says what is uncertain.")
    return claim


def _build(cls: type[Table], table: Mapping[str, Any], place: str) -> Table:
    """Make a dataclass from a TOML table; every field without a default must be there, filled."""
    hints = get_type_hints(cls)
    _refuse_unknown(table, hints, place)
    required = [each.name for each in fields(cls) if each.default is MISSING]
    for key in required:
        if key not in table:
            raise CardError(
                f"{place}: the key {key!r} is missing. Required: {', '.join(required)}."
            )
    values = {key: _checked(value, hints[key], f"{place}: {key}") for key, value in table.items()}
    for key in required:
        if not values[key].strip():
            raise CardError(f"{place}: {key} must not be empty.")
    return cls(**values)


def _checked(value: Any, hint: Any, what: str) -> Any:
    """Return a TOML value as the annotated type; whole numbers serve as floats."""
    options = (hint, *get_args(hint))
    choices = [
        choice for each in options if get_origin(each) is Literal for choice in get_args(each)
    ]
    if choices:
        if value not in choices:
            near = get_close_matches(str(value), choices, n=1)
            raise CardError(
                f"{what} must be one of {', '.join(choices)}, got {value!r}."
                + (f" Did you mean {near[0]!r}?" if near else "")
            )
        return value
    if float in options:
        # True is an int in Python and a type error here.
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CardError(f"{what} must be a number, got {value!r}.")
        return float(value)
    if type(value) is not hint:
        name = {str: "text", int: "a whole number"}[hint]
        raise CardError(f"{what} must be {name}, got {value!r}.")
    return value


def _refuse_unknown(keys: Iterable[str], allowed: Iterable[str], place: str) -> None:
    names = list(allowed)
    for key in keys:
        if key not in names:
            near = get_close_matches(key, names, n=1)
            raise CardError(
                f"{place}: no key named {key!r}. "
                + (f"Did you mean {near[0]!r}? " if near else "")
                + f"Allowed: {', '.join(names)}."
            )
