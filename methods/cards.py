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
ceiling = "2392 / 637"      # optional: the most that the paper's own counts allow
ceiling_from = "forwards of plain decoding over forwards of the method"

[claim.check]               # optional, after its claim: how a measurement of ours tests it
measure = "speedup"
task = "humaneval"
model = "smollm2-135m"
```
The other keys are the fields of `methods.base.Paper`, `methods.base.Claim` and
`methods.base.Check`. Numbers may be written as arithmetic where the claim's own number is not
meant. Needs no torch.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from methods.base import Bound, Check, Claim, Paper, Setting

_ARXIV = re.compile(r"(\d{2})(0[1-9]|1[0-2])\.\d{4,5}")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")
# A paper may appear years after it was posted, and a card may give either year.
_YEARS_TO_PRINT = 3

_OPERATORS: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
# Fields that may be written as arithmetic, so that the card shows where a number comes from.
_ARITHMETIC = ("ceiling", "expected", "times")

Table = TypeVar("Table", Paper, Claim, Check)
_HINTS: Mapping[type, dict[str, Any]] = {cls: get_type_hints(cls) for cls in (Paper, Claim, Check)}


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
    _ceiling(claim, place)
    if claim.check is not None:
        _check(claim, claim.check, f"{place}, [claim.check]")
    return claim


def _ceiling(claim: Claim, place: str) -> None:
    if (claim.ceiling is None) != (not claim.ceiling_from):
        raise CardError(f"{place}: ceiling and ceiling_from belong together; one is missing.")
    if claim.ceiling is None:
        return
    if claim.number is None or claim.bound == "at-most":
        raise CardError(
            f"{place}: a ceiling is held against a number, which must be there and no at-most."
        )
    if not claim.ceiling > 0:
        raise CardError(f"{place}: ceiling must be above 0, got {claim.ceiling}.")


def _check(claim: Claim, check: Check, place: str) -> None:
    is_computed = check.measure == "computed"
    if (check.measure in ("computed", "note")) == (not check.quantity):
        raise CardError(
            f"{place}: quantity names what is counted; it belongs to measure = 'computed' or "
            "'note' and to no other."
        )
    if check.metric and check.measure != "quality":
        raise CardError(
            f"{place}: metric names what quality is; it belongs to measure = 'quality' and to no "
            "other."
        )
    if not is_computed and (check.per or check.times != 1):
        raise CardError(f"{place}: per and times belong to measure = 'computed'.")
    if is_computed and (check.rival or check.rival_params or check.direction != "above"):
        raise CardError(
            f"{place}: measure = 'computed' compares with the claim's number, so it has neither "
            "rival nor direction."
        )
    if is_computed and check.expected is None and claim.number is None:
        raise CardError(f"{place}: measure = 'computed' needs the claim's number, or expected.")
    if check.rival_params and not check.rival:
        raise CardError(f"{place}: rival_params need a rival.")
    if check.measure in ("acceptance_rate", "note") and not check.rival:
        raise CardError(
            f"{place}: measure = {check.measure!r} needs a rival; the baseline has nothing of the "
            "kind."
        )
    if not 0 <= check.tolerance < 1:
        raise CardError(f"{place}: tolerance must lie in [0, 1), got {check.tolerance}.")
    if check.paper_model and not check.paper_model.startswith(("hf:", "path:")):
        raise CardError(
            f"{place}: paper_model must be hf:OWNER/NAME or path:FOLDER, got {check.paper_model!r}."
        )
    for key in ("paper_task", "paper_params", "paper_task_params", "paper_hardware"):
        if getattr(check, key) and not check.paper_model:
            raise CardError(f"{place}: {key} without paper_model says nothing.")


def _build(cls: type[Table], table: Mapping[str, Any], place: str) -> Table:
    """Make a dataclass from a TOML table; every field without a default must be there, filled."""
    hints = _HINTS[cls]
    _refuse_unknown(table, hints, place)
    required = [
        each.name
        for each in fields(cls)
        if each.default is MISSING and each.default_factory is MISSING
    ]
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
    if Check in options:
        if not isinstance(value, dict):
            raise CardError(f"{what} must be a table; write [claim.check] after its claim.")
        return _build(Check, value, what)
    if get_origin(hint) is tuple:
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise CardError(f"{what} must be a list of texts, got {value!r}.")
        return tuple(value)
    if get_origin(hint) is Mapping:
        return _settings(value, what)
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
        if isinstance(value, str) and what.rpartition(" ")[2] in _ARITHMETIC:
            return arithmetic(value, what)
        # True is an int in Python and a type error here.
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CardError(f"{what} must be a number, got {value!r}.")
        return float(value)
    if type(value) is not hint:
        name = {str: "text", int: "a whole number"}[hint]
        raise CardError(f"{what} must be {name}, got {value!r}.")
    return value


def _settings(value: Any, what: str) -> dict[str, Setting]:
    if not isinstance(value, dict):
        raise CardError(f"{what} must be a table of settings, got {value!r}.")
    for name, setting in value.items():
        if not isinstance(setting, str | int | float | bool):
            raise CardError(f"{what}: {name} must be text, a number or a boolean, got {setting!r}.")
    return dict(value)


def arithmetic(text: str, what: str = "arithmetic") -> float:
    """Return the value of numbers joined by + - * / ** and parentheses.

    Raises:
        CardError: It is anything else, or has no finite value; `what` is named.
    """

    def value(node: ast.expr) -> float:
        if isinstance(node, ast.Constant):
            number = node.value
            if isinstance(number, int | float) and not isinstance(number, bool):
                return float(number)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError("only numbers, + - * / ** and parentheses are allowed")

    try:
        result = value(ast.parse(text.strip(), mode="eval").body)
        if not math.isfinite(result):
            raise ValueError("it is not finite")
    except (SyntaxError, ValueError, ArithmeticError, TypeError) as error:
        raise CardError(f"{what} must be a number or arithmetic, got {text!r}: {error}.") from None
    return result


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
