"""The end of a text: one rule, found the same however often one looks."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from models.base import Decoding
from models.stopping import End, Stopper
from tests.models.toy import LetterTokenizer

EOS = 200  # special tokens stand from 100 on and have no text
PAD = 150
tokens_lists = st.lists(st.sampled_from([0, 1, 2, PAD, EOS]), max_size=24)


def stopper(*, stop: tuple[str, ...] = (), limit: int = 100, ignore_eos: bool = False) -> Stopper:
    decoding = Decoding(max_new_tokens=limit, stop=stop, ignore_eos=ignore_eos)
    return Stopper(LetterTokenizer(), decoding, frozenset({EOS}))


def slow_end(token_ids: list[int], stop: tuple[str, ...], limit: int) -> End:
    """Grow the text token by token and decode all of it every time."""
    for count in range(1, min(len(token_ids), limit) + 1):
        if token_ids[count - 1] == EOS:
            return End(count, "eos")
        text = LetterTokenizer().decode(token_ids[:count])
        if any(string in text for string in stop):
            return End(count, "stop")
    count = min(len(token_ids), limit)
    return End(count, "length" if count == limit else "")


@given(
    tokens_lists, st.sampled_from([(), ("ab",), ("abc", "b"), ("aab", "cc")]), st.integers(1, 24)
)
@example([0] + [PAD] * 20 + [1], ("ab",), 30)
def test_the_end_is_where_a_slow_search_finds_it(
    token_ids: list[int], stop: tuple[str, ...], limit: int
) -> None:
    assert stopper(stop=stop, limit=limit).find(token_ids) == slow_end(token_ids, stop, limit)


@given(tokens_lists, st.lists(st.integers(1, 6), min_size=24, max_size=24))
def test_the_end_does_not_depend_on_how_many_tokens_come_at_once(
    token_ids: list[int], sizes: list[int]
) -> None:
    stop, limit = ("ab", "cca"), 20
    finder, checked, end = stopper(stop=stop, limit=limit), 0, End(0, "")
    for size in sizes:
        if end.finish or checked >= len(token_ids):
            break
        end = finder.find(token_ids[: checked + size], checked)
        checked = min(checked + size, len(token_ids))
    assert end == slow_end(token_ids, stop, limit)


def test_a_stop_string_beats_an_end_of_text_behind_it() -> None:
    assert stopper(stop=("b",)).find([0, 1, EOS]) == End(2, "stop")
    assert stopper(stop=("b",)).find([0, EOS, 1]) == End(2, "eos")


def test_a_stop_string_that_completes_at_the_limit_is_a_stop() -> None:
    assert stopper(stop=("b",), limit=2).find([0, 1, 2]) == End(2, "stop")
    assert stopper(stop=("c",), limit=2).find([0, 1, 2]) == End(2, "length")


def test_natural_ends_are_passed_over_at_fixed_length() -> None:
    assert stopper(stop=("b",), limit=4, ignore_eos=True).find([1, EOS, 1]) == End(3, "")


def test_the_text_is_cut_before_the_first_stop_string() -> None:
    finder = stopper(stop=("cc", "b"))
    assert finder.text([0, 0, 1]) == "aa"
    assert finder.text([0, 2, 2, EOS]) == "a"
    assert finder.text([0, 2, EOS]) == "ac"
    assert stopper(stop=("b",), ignore_eos=True).text([0, 1, 0]) == "aba"


@pytest.mark.parametrize("stop", [("",), ()])
def test_an_empty_stop_string_stops_nothing(stop: tuple[str, ...]) -> None:
    assert stopper(stop=stop).find([0, 1]) == End(2, "")


class SplitCharacters:
    """A tokenizer of single UTF-8 bytes: a character may be spread over several tokens."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token_ids).decode(errors="replace")


@given(st.text(st.sampled_from("aé漢😀"), max_size=8), st.sampled_from(["é", "漢😀", "aa漢"]))
def test_a_stop_string_of_split_characters_is_found(text: str, stop: str) -> None:
    tokenizer = SplitCharacters()
    token_ids = tokenizer.encode(text)
    finder = Stopper(tokenizer, Decoding(max_new_tokens=100, stop=(stop,)), frozenset())
    end = End(0, "")
    for count in range(1, len(token_ids) + 1):
        end = finder.find(token_ids[:count], count - 1)
        if end.finish:
            break
    at = text.find(stop)
    cut = text[: at + len(stop)] if at >= 0 else text
    assert end == End(len(tokenizer.encode(cut)), "stop" if at >= 0 else "")
