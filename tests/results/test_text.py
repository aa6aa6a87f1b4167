from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from results import text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ""),
        (0, "0"),
        (1.2345, "1.23"),
        (12.345, "12.3"),
        (123.45, "123"),
        (12345.6, "12346"),
        (0.012345, "0.0123"),
        (9.996, "10.0"),
        (99.96, "100"),
        (-0.5, "-0.500"),
        (math.inf, "inf"),
    ],
)
def test_numbers_have_three_digits_and_no_exponent(value: float | None, expected: str) -> None:
    assert text.number(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(1.236, "1.24"), (0.0123, "0.0123"), (0, "0.00"), (12.3, "12.30")]
)
def test_ratios_have_two_decimals(value: float, expected: str) -> None:
    assert text.ratio(value) == expected
    assert text.ratio(None) == ""


@pytest.mark.parametrize(
    ("value", "expected"), [(0.05, "5%"), (0.1234, "12.3%"), (0, "0%"), (12.0, "1200%")]
)
def test_shares_are_percentages(value: float, expected: str) -> None:
    assert text.percent(value) == expected
    assert text.percent(None) == ""


def test_scores_depend_on_their_unit() -> None:
    assert text.score(0.45678, is_fraction=True) == "0.457"
    assert text.score(45.678, is_fraction=False) == "45.68"
    assert text.score(None, is_fraction=True) == ""


def test_an_interval_without_ends_has_no_brackets() -> None:
    assert text.interval("1.24", "1.18", "1.31") == "1.24 [1.18, 1.31]"
    assert text.interval("1.24", "", "") == "1.24"
    assert text.interval("", "", "") == ""


def test_control_characters_are_shown_and_not_obeyed() -> None:
    assert text.plain("a\x1b[31mb\r\n\t") == r"a\x1b[31mb\r\n\t"
    assert text.plain("\u202eevil\u2066") == r"\u202eevil\u2066"
    assert text.plain("a\u2028b\x85c") == r"a\u2028b\x85c"
    assert text.plain("\ud800") == r"\ud800"
    assert text.plain("grün 你好 🙂") == "grün 你好 🙂"


@given(st.text())
def test_plain_text_is_one_printable_line_and_stays_as_it_is(value: str) -> None:
    once = text.plain(value)
    assert text.plain(once) == once
    assert len(once.splitlines()) <= 1
    assert all(character.isprintable() or character.isspace() for character in once)
    once.encode()


@given(st.text(alphabet=st.sampled_from("a|\\`*_<>&[]()~\n\r")))
def test_markdown_cells_cannot_be_left(value: str) -> None:
    escaped = text.markdown(value)
    assert "\n" not in escaped
    assert "<" not in escaped
    unescaped = escaped.replace("\\\\", ".")
    assert unescaped.count("|") == unescaped.count("\\|")
    assert "](" not in unescaped


@given(st.text(alphabet=st.sampled_from('a\\{}$&#_%~^[*<>|"`')))
def test_latex_cells_hold_no_bare_special_character(value: str) -> None:
    escaped = text.latex(value)
    for command in sorted(text._LATEX.values(), key=len, reverse=True):
        escaped = escaped.replace(command, "")
    assert not set(escaped.removeprefix("{}")) & set('\\{}$&#_%~^<>|"`')


def test_latex_rows_do_not_begin_with_an_argument() -> None:
    assert text.latex("[1em]") == "{}[1em]"
    assert text.latex("*") == "{}*"


def test_json_is_strict() -> None:
    value = {"a": [math.nan, math.inf, -math.inf, 1.5, None], "b": (True, "x")}
    found = json.loads(text.json_text(value), parse_constant=lambda name: pytest.fail(name))
    assert found == {"a": ["nan", "inf", "-inf", 1.5, None], "b": [True, "x"]}
