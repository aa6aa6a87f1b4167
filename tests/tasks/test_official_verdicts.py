"""Verdicts on completions of HumanEval against those of the official evaluator's semantics."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tasks.code_scoring import Verdict, check_many, problem_of
from tasks.humaneval import HumanEval
from tests.tasks.official_semantics import (
    LIMITS,
    Case,
    completions,
    mutated,
    oracle,
    read_fixture,
)

PROBLEMS = {item.id: problem_of(item) for item in HumanEval().items()}


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return read_fixture()


@pytest.fixture(scope="module")
def verdicts(cases: list[Case]) -> list[Verdict]:
    jobs = [(PROBLEMS[case.task_id], case.completion) for case in cases]
    # The slowest canonical solution takes half a second; programs that do not end take all of it.
    return check_many(jobs, limits=replace(LIMITS, cpu_seconds=3))


def test_fixture_holds_the_completions_that_its_script_makes(cases: list[Case]) -> None:
    made = [(task_id, kind, completion) for task_id, _, kind, completion in completions()]
    assert [(case.task_id, case.kind, case.completion) for case in cases] == made


def test_fixture_holds_right_and_wrong_completions(cases: list[Case]) -> None:
    assert sum(case.passed for case in cases) > 200
    assert sum(not case.passed for case in cases) > 200


def test_all_164_canonical_solutions_pass(cases: list[Case], verdicts: list[Verdict]) -> None:
    canonical = [
        (case.task_id, verdict)
        for case, verdict in zip(cases, verdicts, strict=True)
        if case.kind == "canonical"
    ]
    assert len(canonical) == 164
    assert [pair for pair in canonical if not pair[1].passed] == []


def test_verdicts_equal_the_official_ones(cases: list[Case], verdicts: list[Verdict]) -> None:
    different = [
        (case.task_id, case.kind, case.passed, verdict)
        for case, verdict in zip(cases, verdicts, strict=True)
        if case.passed != verdict.passed
    ]
    assert different == []


def test_oracle_still_says_what_the_fixture_says(cases: list[Case]) -> None:
    sample = [case for case in cases if case.kind != "endless"][::18]
    jobs = [oracle(PROBLEMS[case.task_id], case.completion) for case in sample]
    now = [verdict.passed for verdict in check_many(jobs, limits=LIMITS)]
    assert now == [case.passed for case in sample]


def test_a_mutation_changes_the_program() -> None:
    problem = PROBLEMS["HumanEval/0"]
    assert mutated(problem, random.Random(0)) not in (None, problem.reference)
