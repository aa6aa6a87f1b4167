"""Other people's scorers, against verdicts that are known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.code_scorers import LM_EVAL_UNTIL, cut_at_fence, cut_at_until
from tasks.humaneval import HumanEval
from tasks.longbench_mini import LongBenchMini
from tasks.scorers import scorers
from tests.tasks.official_semantics import Case, read_fixture

TASK = HumanEval(prompt="raw")
ITEMS = {item.id: item for item in TASK.items()}


def sampled_cases() -> list[Case]:
    """Return one case of each kind of completion; what does not end takes its whole limit."""
    by_kind = {case.kind: case for case in read_fixture() if case.kind != "endless"}
    return list(by_kind.values())


@pytest.mark.parametrize("case", sampled_cases()[::3], ids=lambda case: case.kind)
def test_official_scorer_says_what_the_official_evaluator_says(case: Case) -> None:
    [official] = [scorer for scorer in scorers(TASK) if scorer.name == "official"]
    scored = official.judge(ITEMS[case.task_id], official.cut(case.completion))
    assert scored.scores == {"pass@1": float(case.passed)}, scored.detail


@given(st.text(alphabet="\nclasdef#ifprnt x`", max_size=60))
def test_lm_eval_leaves_the_text_before_the_first_of_its_strings(output: str) -> None:
    cut = cut_at_until(output)
    assert output.startswith(cut)
    assert not any(stop in cut for stop in LM_EVAL_UNTIL)
    # Nothing more is cut than what begins with one of them.
    assert cut == output or any(output[len(cut) :].startswith(stop) for stop in LM_EVAL_UNTIL)


@pytest.mark.parametrize(
    ("output", "left"),
    [
        ("    return 1\n\n\ndef g():\n    pass\n", "    return 1\n\n"),
        ("\nclass A:\n    pass", ""),
        ("    return 1\n```\nThis", "    return 1\n```\nThis"),
        ("    return 1\n    # no stop\n", "    return 1\n    # no stop\n"),
    ],
)
def test_lm_eval_cuts_as_its_rules_say(output: str, left: str) -> None:
    assert cut_at_until(output) == left


def test_the_instruct_variant_cuts_at_the_fence() -> None:
    assert cut_at_fence("    return 1\n```\nThis") == "    return 1\n"
    assert cut_at_fence("    return 1\n") == "    return 1\n"


def test_a_task_without_programs_has_its_own_scorer_alone() -> None:
    assert [scorer.name for scorer in scorers(LongBenchMini())] == ["tokenmark"]
