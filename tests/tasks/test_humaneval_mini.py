"""The generated functions: right, graded, told apart by their tests, the same everywhere."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.base import Item
from tasks.code_scoring import check_many, problem_of
from tasks.humaneval import HumanEval
from tasks.humaneval_mini import NUM_EXAMPLES, NUM_TESTS, HumanEvalMini
from tasks.sandbox import Limits

ITEMS = list(HumanEvalMini().items())


def test_there_are_48_functions_of_three_levels_in_turn() -> None:
    assert [item.fields["level"] for item in ITEMS] == [1, 2, 3] * 16
    assert len({item.id for item in ITEMS}) == 48
    assert len({item.fields["entry_point"] for item in ITEMS}) == 48


def test_every_reference_passes_its_test() -> None:
    jobs = [(problem_of(item), item.fields["reference"]) for item in ITEMS]
    verdicts = check_many(jobs, limits=Limits())
    assert [
        item.id for item, verdict in zip(ITEMS, verdicts, strict=True) if not verdict.passed
    ] == []


def _passes(item: Item, function: Callable[..., object]) -> bool:
    """Run a test on a function of ours, which needs no sandbox."""
    namespace: dict[str, Any] = {}
    exec(item.fields["test"], namespace)
    try:
        namespace["check"](function)
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ):
        return False
    return True


def _reference(item: Item) -> Callable[..., object]:
    namespace: dict[str, Any] = {}
    exec(item.fields["prompt"] + item.fields["reference"], namespace)
    function: Callable[..., object] = namespace[item.fields["entry_point"]]
    return function


def test_only_its_own_reference_passes_a_test() -> None:
    for item in ITEMS:
        assert [other.id for other in ITEMS if _passes(item, _reference(other))] == [item.id]


def test_no_constant_passes_a_test() -> None:
    for item in ITEMS:
        lines = item.fields["test"].splitlines()[1:] + item.fields["prompt"].splitlines()[3:6:2]
        for line in lines:
            answer = ast.literal_eval(line.rpartition(" == ")[2].strip())
            assert not _passes(item, lambda *args, answer=answer: answer)


def test_examples_are_true_and_no_test_repeats_one() -> None:
    for item in ITEMS:
        *_, signature, _, first, value, second, other_value, quotes = item.fields["prompt"].split(
            "\n"
        )
        assert signature.startswith(f"def {item.fields['entry_point']}(")
        assert quotes == '    """'
        assert value != other_value
        name = item.fields["entry_point"]
        calls = {
            line.strip().removeprefix(f">>> {name}(").removesuffix(")") for line in (first, second)
        }
        tested = {
            line.strip().removeprefix("assert candidate(").partition(") == ")[0]
            for line in item.fields["test"].splitlines()[1:]
        }
        assert len(calls) == NUM_EXAMPLES
        assert len(tested) == NUM_TESTS
        assert not calls & tested
        namespace: dict[str, object] = {}
        exec(item.fields["prompt"] + item.fields["reference"], namespace)  # our own functions
        for line, printed in ((first, value), (second, other_value)):
            assert repr(eval(line.removeprefix("    >>> "), namespace)) == printed.strip()


def test_yes_or_no_questions_are_tested_with_both_answers() -> None:
    for item in ITEMS:
        answers = Counter(
            line.rpartition(" == ")[2] for line in item.fields["test"].splitlines()[1:]
        )
        assert len(answers) >= 2


def test_no_function_is_one_of_humaneval() -> None:
    official = {item.fields["prompt"] for item in HumanEval().items()}
    assert not official & {item.fields["prompt"] for item in ITEMS}


def test_the_content_hash_stays_and_does_not_depend_on_string_hashes() -> None:
    expected = "d33f72a109eaac0478d676a2a94c02539ba0ac6b67ca8868047ba3aa7bf5c8bf"
    assert HumanEvalMini().content_hash() == expected
    script = "from tasks.humaneval_mini import HumanEvalMini; print(HumanEvalMini().content_hash())"
    for seed in ("1", "2"):
        printed = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        assert printed.stdout.strip() == expected
