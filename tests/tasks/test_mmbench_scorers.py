"""Reading an option from an answer, by two public rules, against answers worked out by hand."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.mmbench_scorers import EXTRACTIONS, circular, extract, likeliest, outcomes

OPTIONS = {"A": "a cat", "B": "a bird", "C": "a red fish", "D": "nothing"}


# What each rule makes of an answer, from the descriptions of the rules alone; "-" is no option.
@pytest.mark.parametrize(
    ("answer", "vlmevalkit", "lmms_eval"),
    [
        ("A", "A", "A"),
        ("A.", "A", "A"),
        ("(B)", "B", "B"),
        ("The answer is C.", "C", "C"),
        ("a cat", "A", "A"),
        ("A dog and B", "-", "-"),
        ("", "-", "-"),
        (" \n", "-", "-"),
        ("B\n", "B", "B"),
        ("[D]: nothing", "D", "D"),
        ("b", "-", "-"),
        ("E", "-", "E"),  # no option of the question, so one rule reads it and is wrong
        ("Z", "-", "-"),
        ("Z, a cat", "-", "A"),  # declining ends one rule
        ("I say B, not Z.", "B", "B"),
        ("The answer is C and Z one two three four", "C", "C"),
        ("**C**", "C", "-"),  # stars are stripped by one rule only
        ("B B", "B", "B"),
        # The letter stands sixth from the end, then fifth.
        ("B one two three four five", "-", "B"),
        ("B one two three four", "B", "B"),
        ("B one two three four B five", "B", "B"),
        ("The answer is D because of one two three", "D", "D"),
        ("the answer is Dreary one two three four", "-", "-"),
        ("The Answer is: (C), as I said one or two times", "C", "-"),
        # An article: both rules miss it in their own way.
        ("A fish is what I can see", "-", "-"),
        ("A small red ball", "A", "-"),
        ("A red ball", "A", "A"),
        ("I see a bird", "B", "B"),
        ("I SEE A BIRD", "A", "B"),
        ("a cat and a bird", "-", "-"),
        # All options together have 5 + 6 + 10 + 7 = 28 characters: 56 are still read, 57 are not.
        ("a red fish" + "x" * 46, "C", "C"),
        ("a red fish" + "x" * 47, "-", "C"),
        ("A, or maybe B", "-", "B"),
        ("(A) or maybe B.", "-", "A"),
    ],
)
def test_rules_read_answers_as_they_are_described(
    answer: str, vlmevalkit: str, lmms_eval: str
) -> None:
    found = [extract(rule, answer, OPTIONS) or "-" for rule in ("vlmevalkit", "lmms-eval")]
    assert found == [vlmevalkit, lmms_eval]


def test_only_letters_of_the_question_count() -> None:
    two = {"A": "yes", "B": "no"}
    assert extract("vlmevalkit", "C or B", two) == "B"
    assert extract("lmms-eval", "C or B", two) is None
    assert extract("vlmevalkit", "Yes", two) == "A"
    for rule in EXTRACTIONS:
        assert extract(rule, "yes", {"A": "Yes", "B": "No"}) == "A"


@pytest.mark.parametrize("rule", EXTRACTIONS)
@given(answer=st.text(alphabet="ABCDEZ abcdinotswr.,:()[]*\n", max_size=40))
def test_no_answer_is_guessed(rule: str, answer: str) -> None:
    found = extract(rule, answer, OPTIONS)
    assert found is None or found in "ABCDE"
    if found is not None:
        # There is a reason: the letter is written somewhere, or the option's text is.
        assert found in answer or OPTIONS[found].lower() in answer.lower()


@given(
    st.sampled_from("ABCD"),
    st.text(alphabet=".()[],:;!*#{} ", max_size=4),
    st.text(alphabet=".()[],:;!*#{} ", max_size=4),
)
def test_marks_around_a_letter_do_not_matter_to_vlmevalkit(
    letter: str, before: str, after: str
) -> None:
    assert extract("vlmevalkit", before + letter + after, OPTIONS) == letter


@given(st.integers(2, 4), st.sampled_from("ABCD"), st.integers(0, 3))
def test_a_constant_letter_is_right_in_one_rotation_and_never_circularly(
    count: int, letter: str, right: int
) -> None:
    right %= count
    letters = string.ascii_uppercase[:count]
    answers = [letters[(right - shift) % count] for shift in range(count)]
    found = outcomes([letter] * count, answers)
    assert found.count(True) == (letter in letters)
    assert circular(found) is False


def test_one_wrong_rotation_settles_a_question_and_an_unreadable_one_leaves_it_open() -> None:
    assert circular([True, True]) is True
    assert circular([True, False, True]) is False
    assert circular([True, None, True]) is None
    assert circular([None, False]) is False
    assert outcomes(["A", None, "B"], ["A", "A", "A"]) == [True, None, False]


def test_the_likeliest_letter_is_none_where_two_share_it() -> None:
    assert likeliest("ABC", [-2.0, -0.5, -1.0]) == "B"
    assert likeliest("ABC", [-0.5, -0.5, -1.0]) is None
    assert likeliest("AB", [-1e9, float("-inf")]) == "A"
