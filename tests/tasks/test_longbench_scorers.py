"""The scores, against numbers worked out by hand and against second implementations."""

from __future__ import annotations

import string
from collections.abc import Sequence

import pytest
import rouge
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.longbench_protocol import Scorer, score_prediction
from tasks.longbench_scorers import (
    choice_letter,
    classification,
    code_line,
    code_similarity,
    first_line,
    normalize_answer,
    qa_f1,
    rouge_l,
)

KINDS_OF_QUESTION = ("Human", "Human group", "Place")

# By hand: precision P and recall R of the tokens that are left, F = 2 P R / (P + R).
FROZEN: Sequence[tuple[Scorer, str, str, float]] = (
    ("qa_f1", "The cat.", "cat", 1.0),
    ("qa_f1", "a big cat", "cat", 2 / 3),  # P 1/2, R 1
    ("qa_f1", "yes", "no", 0.0),
    ("qa_f1", "", "cat", 0.0),
    ("qa_f1", "cat", "", 0.0),
    ("qa_f1", "cat cat cat", "cat", 1 / 2),  # P 1/3, R 1
    ("qa_f1", "cat dog", "dog cat", 1.0),
    ("qa_f1", "Miller v. California", "miller v california", 1.0),
    ("qa_f1", "It's Paris", "Paris", 2 / 3),
    ("qa_f1", "the the", "the", 0.0),  # nothing is left of either
    ("qa_f1", "1,000 men", "1000 men", 1.0),
    ("qa_f1", "New York City in 1990", "New York", 4 / 7),  # P 2/5, R 1
    ("qa_f1", "red blue red", "red red green", 2 / 3),
    ("qa_f1", "well-known", "well known", 0.0),  # punctuation goes, and leaves no space
    # Distinct words: L in the union of common subsequences, over m of the reference, n of ours.
    ("rouge_l", "a b c d", "a c e", 4 / 7),  # L 2, m 3, n 4
    ("rouge_l", "a a a", "a", 1.0),
    ("rouge_l", "", "a", 0.0),
    ("rouge_l", "a", "", 0.0),
    ("rouge_l", "A b", "a b", 1 / 2),  # case counts
    ("rouge_l", "one two. three four", "three four. one two", 1.0),  # sentence by sentence
    ("rouge_l", "one two three four", "three four one two", 1 / 2),
    ("rouge_l", "3.5 percent", "3.5 percent", 1.0),
    ("rouge_l", "3.5 percent", "3 percent", 4 / 5),  # sentences `3`, `5 percent`: L 2, m 2, n 3
    ("rouge_l", ".", "a", 0.0),
    ("rouge_l", " ", "a", 0.0),
    ("rouge_l", "a b", "b a", 1 / 2),
    ("rouge_l", "the cat sat", "the cat", 4 / 5),
    ("rouge_l", "b a. b", "a b", 1 / 2),  # of `b a` it is `b` that is common: L 1, m 2, n 2
    ("classification", "Human group", "Human group", 1.0),
    ("classification", "Human", "Human", 1.0),
    ("classification", "Human group", "Human", 1 / 2),  # both are named, none is part of `Human`
    ("classification", "Place or Human", "Place", 1 / 2),
    ("classification", "nothing", "Place", 0.0),
    ("classification", "", "Place", 0.0),
    ("count", "3 4 3", "3", 2 / 3),
    ("count", "", "3", 0.0),
    ("count", "There are 12.", "1", 0.0),
    ("count", "5 paragraphs", "5", 1.0),
    ("count", "05", "5", 0.0),
    ("retrieval", "Paragraph 3 or 4", "Paragraph 3", 1 / 2),
    ("retrieval", "3", "Paragraph 3", 1.0),
    ("retrieval", "Paragraph 30", "Paragraph 3", 0.0),
    ("retrieval", "none", "Paragraph 3", 0.0),
    ("retrieval", "3", "Of 30: Paragraph 3", 1.0),
    ("retrieval_chinese", "是段落7。", "段落7", 1.0),
    ("retrieval_chinese", "7 8 9", "段落7", 1 / 3),
    # 2 M / T in whole hundredths: M matched characters, T those of both lines.
    ("code_similarity", "# x\ny = 1", "y = 1", 1.0),
    ("code_similarity", "\n\nx = 1\nz", "x = 1", 1.0),
    ("code_similarity", "```python\nx", "x", 1.0),
    ("code_similarity", "", "x", 0.0),
    ("code_similarity", "abcd", "bcde", 0.75),
    ("code_similarity", "return x", "return y", 0.88),  # 87.5, half to even
    ("code_similarity", "a // b", "a // b", 0.0),  # no line is left
    ("code_similarity", "ab", "ba", 0.5),
    ("code_similarity", "x = foo(1)", "x = foo(2)", 0.9),
    ("code_similarity", "y" + "x" * 100, "x" * 199, 0.67),
    ("code_similarity", "y" + "x" * 100, "x" * 200, 0.0),  # too frequent in so long a line to count
)


@pytest.mark.parametrize(("scorer", "prediction", "reference", "expected"), FROZEN)
def test_frozen_predictions_score_as_worked_out_by_hand(
    scorer: Scorer, prediction: str, reference: str, expected: float
) -> None:
    found = score_prediction(scorer, prediction, [reference], KINDS_OF_QUESTION)
    assert found == pytest.approx(expected, abs=1e-7)


def test_the_best_answer_counts_and_no_answer_scores_nothing() -> None:
    assert score_prediction("qa_f1", "Rome", ["Paris", "in Rome", "Rome"]) == 1.0
    assert score_prediction("qa_f1", "Rome", []) == 0.0


def test_few_shot_answers_are_scored_by_their_first_line() -> None:
    text = "\n\nPlace\nHuman"
    assert first_line(text) == "Place"
    assert first_line(" \nPlace") == " "  # only line breaks are left out
    scored = [
        score_prediction("classification", text, ["Place"], KINDS_OF_QUESTION, only_first_line=only)
        for only in (True, False)
    ]
    assert scored == [1.0, 0.5]


def test_the_official_classification_steps_over_a_name_and_the_corrected_one_does_not() -> None:
    classes = ("a", "ab", "abc")
    # `a` is dropped while the list is walked through, so `ab` is never looked at.
    assert classification("abc", "abc", classes) == 1 / 2
    assert classification("abc", "abc", classes, corrected=True) == 1.0


def test_a_reference_without_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="names no 'Paragraph' with a number"):
        score_prediction("retrieval", "3", ["three"])


def test_articles_go_after_punctuation() -> None:
    assert normalize_answer("The  A.N. (an) other THE") == "other"


def test_chinese_answers_are_compared_word_by_word() -> None:
    assert score_prediction("qa_f1_chinese", "北京大学。", ["北京大学"]) == 1.0
    assert score_prediction("qa_f1_chinese", "上海", ["北京"]) == 0.0
    # Words 我 爱 北京 天安门 against 北京 天安门: P 2/4, R 1.
    assert score_prediction("qa_f1_chinese", "我爱北京天安门", ["北京天安门"]) == pytest.approx(
        2 / 3
    )
    assert score_prediction("rouge_l_chinese", "我爱北京天安门", ["北京天安门"]) == pytest.approx(
        2 / 3
    )
    assert score_prediction("rouge_l_chinese", "", ["北京"]) == 0.0


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("The correct answer is (B).", "B"),
        ("**The correct answer is C**", "C"),
        ("The correct answer is **(B)**", "B"),
        ("So the correct answer is C", ""),
        ("The correct answer is A, not (B). The correct answer is (D)", "D"),  # brackets first
        ("I think it is B", ""),
        ("The correct answer is (E)", ""),
        ("", ""),
    ],
)
def test_a_choice_is_read_as_the_official_script_reads_it(response: str, letter: str) -> None:
    assert choice_letter(response) == letter


# --- second implementations ----------------------------------------------------------------------

TEXTS = st.text(alphabet="abcA 3.,\n", max_size=24)
LINES = st.text(alphabet="abc=(1) ", max_size=14)


def slow_f1(prediction: str, reference: str) -> float:
    """Take each word of ours from the reference's words, one by one."""

    def words(text: str) -> list[str]:
        bare = "".join(c for c in text.lower() if c not in string.punctuation)
        return [word for word in bare.split() if word not in ("a", "an", "the")]

    ours, theirs = words(prediction), words(reference)
    left, shared = list(theirs), 0
    for word in ours:
        if word in left:
            left.remove(word)
            shared += 1
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0


@given(TEXTS, TEXTS)
def test_token_f1_equals_its_slow_version(prediction: str, reference: str) -> None:
    assert qa_f1(prediction, reference) == pytest.approx(slow_f1(prediction, reference))


@settings(max_examples=300)
@given(TEXTS, TEXTS)
def test_rouge_l_equals_the_package(prediction: str, reference: str) -> None:
    try:
        scores = rouge.Rouge().get_scores([prediction], [reference], avg=True)
        expected = scores["rouge-l"]["f"]
    except ValueError:  # an empty text; the official script scores 0
        expected = 0.0
    assert rouge_l(prediction, reference) == pytest.approx(expected, abs=1e-12)


def matched(first: str, second: str) -> int:
    """Return the characters that Ratcliff and Obershelp match: the longest block, then both sides.

    Among equally long ones it is the earliest block in the first text, then in the second.
    """
    best = (0, 0, 0)
    for i in range(len(first)):
        for j in range(len(second)):
            size = 0
            while first[i : i + size + 1] == second[j : j + size + 1] and (
                i + size < len(first) and j + size < len(second)
            ):
                size += 1
            if size > best[0]:
                best = (size, i, j)
    size, i, j = best
    if not size:
        return 0
    return size + matched(first[:i], second[:j]) + matched(first[i + size :], second[j + size :])


@given(LINES, LINES)
def test_code_similarity_equals_ratcliff_and_obershelp(line: str, reference: str) -> None:
    total = len(line) + len(reference)
    expected = round(200 * matched(line, reference) / total) / 100 if total else 1.0
    assert code_line(line) == line
    assert code_similarity(line, reference) == expected


@given(st.lists(st.sampled_from(["a", "b", "ab", "bc", "abc", "abcd"]), max_size=6), TEXTS)
def test_classification_equals_a_list_changed_while_it_is_read(
    classes: list[str], prediction: str
) -> None:
    for gold in classes:
        named = [name for name in classes if name in prediction]
        for name in named:  # the official loop, changed list and all
            if name in gold and name != gold:
                named.remove(name)
        expected = 1 / len(named) if gold in named else 0.0
        assert classification(prediction, gold, classes) == expected


@pytest.mark.parametrize(
    "scorer", ["qa_f1", "rouge_l", "classification", "count", "retrieval", "code_similarity"]
)
def test_an_empty_prediction_scores_nothing(scorer: Scorer) -> None:
    assert score_prediction(scorer, "", ["Paragraph 1"], ["Paragraph 1"]) == 0.0
