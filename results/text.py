"""Numbers and foreign text, made fit to be shown: the same figures in every format."""

from __future__ import annotations

import html
import json
import math
import re
import unicodedata
from typing import Any

_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "%": r"\%",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}",
    "×": r"$\times$",
    "·": r"$\cdot$",
}


def number(value: float | None, digits: int = 3) -> str:
    """Return `value` with so many significant digits, without an exponent; "" for None.

    Digits before the point are never cut: 12345 stays 12345.
    """
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    # Rounding may add a digit (9.996 to 10.0), so the magnitude is that of the rounded value.
    magnitude = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    return f"{value:.{max(0, digits - 1 - magnitude)}f}"


def ratio(value: float | None) -> str:
    """Return a ratio with two decimals, or three significant digits below 0.1; "" for None."""
    if value is None:
        return ""
    return number(value) if 0 < abs(value) < 0.1 else f"{value:.2f}"


def score(value: float | None, *, is_fraction: bool) -> str:
    """Return a quality: fractions with three decimals, others with four significant digits."""
    if value is None:
        return ""
    return f"{value:.3f}" if is_fraction else number(value, 4)


def percent(value: float | None) -> str:
    """Return a share as a percentage with up to three significant digits; "" for None."""
    return "" if value is None else f"{float(number(100 * value)):g}%"


def interval(value: str, low: str, high: str) -> str:
    """Join a value and the ends of its interval: `1.24 [1.18, 1.31]`; no ends, no brackets."""
    return f"{value} [{low}, {high}]" if value and low and high else value


def plain(text: str) -> str:
    r"""Return text that moves no cursor and hides nothing: control characters become `\x1b`.

    Also those that reverse the direction of reading, line separators and lone surrogates. Spaces of
    all widths stay.
    """
    return "".join(
        character
        if character.isprintable() or unicodedata.category(character) == "Zs"
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def markdown(text: str) -> str:
    """Return text for a cell of a Markdown table, where it can form no markup."""
    text = html.escape(plain(text), quote=False)
    # Our own intervals keep their brackets; a link needs `](` or a definition, and has neither.
    return re.sub(r"([\\|`*_~])", r"\\\1", text).replace("](", "]\\(")


def latex(text: str) -> str:
    """Return text for a cell of a LaTeX table."""
    escaped = "".join(_LATEX.get(character, character) for character in plain(text))
    # At the start of a row these would be read as an argument of the line break before it.
    return f"{{}}{escaped}" if escaped.startswith(("[", "*")) else escaped


def sql(text: str) -> str:
    """Return text as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def json_text(value: Any, indent: int | None = None) -> str:
    """Return strict JSON; NaN and infinities, which it lacks, become their names."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
