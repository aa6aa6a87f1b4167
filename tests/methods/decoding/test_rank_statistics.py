"""Where the constants behind `auto` come from: measured anew on the real model, they agree."""

from __future__ import annotations

import numpy as np
import pytest

from hardware.profile import Profile
from methods.decoding.common import measure_rank_statistics
from methods.decoding.common_trees import MEASURED_SIZES, rank_probabilities
from methods.decoding.prompt_lookup import MATCH_SHARE, SURVIVAL, PromptLookup
from methods.decoding.token_recycling import TokenRecycling
from models.base import Decoding, TextGenerator
from models.loading import LoadSettings, load

CPU = Profile(name="test", kind="cpu", label="test")
DECODING = Decoding(max_new_tokens=96)

# Written for this purpose; none of them is an item of a task.
HEADS = (
    ("count_words(text: str) -> dict", "Return how often each word occurs in text."),
    (
        "rotate_left(items: list, steps: int) -> list",
        "Return items rotated to the left by steps.",
    ),
    ("is_leap_year(year: int) -> bool", "Return whether a year has 366 days."),
    ("flatten(nested: list) -> list", "Return the leaves of a nested list in order."),
    ("celsius_to_fahrenheit(degrees: float) -> float", "Convert a temperature."),
    (
        "second_largest(numbers: list[int]) -> int",
        "Return the second largest of at least two different numbers.",
    ),
    (
        "caesar(text: str, shift: int) -> str",
        "Shift every letter of text by shift places in the alphabet.",
    ),
    (
        "transpose(matrix: list[list[float]]) -> list[list[float]]",
        "Return the matrix with rows and columns exchanged.",
    ),
    (
        "run_lengths(text: str) -> list[tuple[str, int]]",
        "Return each run of equal letters with its length.",
    ),
    (
        "binary_search(items: list[int], wanted: int) -> int",
        "Return the index of wanted in sorted items, or -1.",
    ),
    ("merge_sorted(a: list[int], b: list[int]) -> list[int]", "Merge two sorted lists into one."),
    ("digits_sum(number: int) -> int", "Return the sum of the decimal digits of number."),
    (
        "longest_common_prefix(words: list[str]) -> str",
        "Return the longest string that all words start with.",
    ),
    (
        "group_by_length(words: list[str]) -> dict[int, list[str]]",
        "Group words by their number of letters.",
    ),
    ("collatz(start: int) -> list[int]", "Return the Collatz sequence from start down to 1."),
    (
        "moving_average(values: list[float], width: int) -> list[float]",
        "Return the mean of every window of width values.",
    ),
)

pytestmark = [pytest.mark.weights, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def model() -> TextGenerator:
    return load("smollm2-135m", LoadSettings(), offline=True)


@pytest.fixture(scope="module")
def prompts(model: TextGenerator) -> list[list[int]]:
    return [model.tokenizer.encode(f'def {head}:\n    """{doc}"""') for head, doc in HEADS]


@pytest.mark.parametrize("nodes", MEASURED_SIZES)
def test_rank_statistics_of_token_recycling(
    nodes: int, model: TextGenerator, prompts: list[list[int]]
) -> None:
    method = TokenRecycling(tree_nodes=nodes)
    found = measure_rank_statistics(
        model, prompts, DECODING, lambda: method.drafter(model, CPU), depths=6, ranks=8
    )
    np.testing.assert_allclose(found[:3], rank_probabilities(nodes)[:3], atol=0.05)


def test_survival_of_looked_up_drafts(model: TextGenerator, prompts: list[list[int]]) -> None:
    accepted, steps = [], 0
    with PromptLookup().apply(model, CPU) as changed:
        for prompt in prompts:
            trace = changed.generate(prompt, DECODING).trace
            steps += len(trace.forwards)
            accepted += [
                drafts
                for forward, drafts in zip(trace.forwards, trace.accepted, strict=True)
                if forward.width > 1
            ]
    survival = [np.mean(np.array(accepted) >= depth) for depth in range(1, 11)]
    assert len(accepted) / steps == pytest.approx(MATCH_SHARE, abs=0.05)
    np.testing.assert_allclose(survival, SURVIVAL, atol=0.05)
