"""The checker and what code tasks share, apart from hostile programs and the official fixture."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

import pytest

from models.base import Decoding, Generation, Trace
from models.constraints import ConstrainedDecoding, accepts
from tasks import code_scoring
from tasks.code_scoring import (
    CPU_FLOOR_SECONDS,
    STOP,
    CodeTask,
    Problem,
    calibrated_limits,
    check,
    check_many,
    problem_of,
)
from tasks.humaneval import HumanEval
from tasks.humaneval_mini import HumanEvalMini
from tasks.sandbox import Limits, require_level

ADD = Problem(
    prompt='def add(a, b):\n    """ Return the sum."""',
    entry_point="add",
    test=(
        "def check(candidate):\n"
        "    assert candidate(1, 2) == 3\n    assert candidate([1], [2]) == [1, 2]\n"
    ),
    reference="\n    return a + b\n",
)
LIMITS = Limits()
TASKS: tuple[CodeTask, ...] = (HumanEval(), HumanEvalMini())


def _checking(
    body: str, assertion: str, prompt: str = 'def f(*args, **kwargs):\n    """Do."""'
) -> str:
    problem = Problem(
        prompt=prompt, entry_point="f", test=f"def check(candidate):\n{assertion}", reference=""
    )
    return check(problem, body, limits=LIMITS).outcome


def test_a_right_completion_passes_and_tells_its_time() -> None:
    verdict = check(ADD, ADD.reference, limits=LIMITS)
    assert verdict.passed
    assert verdict.level == require_level()
    assert verdict.cpu_seconds is not None
    assert 0 < verdict.cpu_seconds < 3


@pytest.mark.parametrize(
    ("completion", "outcome"),
    [
        ("\n    return a - b\n", "failed"),
        ("\n    return None\n", "failed"),
        ("\n    return a +\n", "error"),
        ("\n    return a + c\n", "error"),
        ("\n    raise AssertionError('no')\n", "error"),
        ("\n    return [a, b][9]\n", "error"),
    ],
)
def test_a_wrong_completion_is_told_from_a_broken_one(completion: str, outcome: str) -> None:
    assert check(ADD, completion, limits=LIMITS).outcome == outcome


def test_an_exception_of_the_candidate_reaches_the_test_as_the_same_type() -> None:
    assertion = (
        "    try:\n        candidate()\n    except KeyError:\n        return\n    assert False\n"
    )
    assert _checking("\n    return {}['x']\n", assertion) == "passed"
    assert _checking("\n    raise ValueError\n", assertion) == "error"


def test_keyword_arguments_reach_the_candidate() -> None:
    assert _checking("\n    return kwargs\n", "    assert candidate(a=1) == {'a': 1}\n") == "passed"


def test_state_of_the_program_lasts_from_call_to_call() -> None:
    body = "\n    calls.append(1)\n    return len(calls)\n\n\ncalls = []\n"
    assertion = "    assert candidate() == 1\n    assert candidate() == 2\n"
    assert _checking(body, assertion) == "passed"


def test_an_argument_that_cannot_travel_is_an_error() -> None:
    assert _checking("\n    return 1\n", "    assert candidate(print) == 1\n") == "error"


def test_helpers_of_the_prompt_are_the_trusted_ones() -> None:
    prompt = "def helper():\n    return 1\n\n\ndef f():\n    'Help.'"
    body = "\n    return helper()\n\n\ndef helper():\n    return 2\n"
    assert _checking(body, "    assert candidate() == helper()\n", prompt) == "failed"
    # The function under test, though, is the candidate's also by its own name.
    assert _checking(body, "    assert f() == 2\n", prompt) == "passed"


def test_tests_that_draw_their_inputs_draw_the_same_ones() -> None:
    assertion = "    import random\n    assert candidate(random.random()) == 0.8444218515250481\n"
    assert _checking("\n    return args[0]\n", assertion) == "passed"


def test_verdicts_come_in_the_order_of_the_jobs() -> None:
    completions = ["\n    return a + b\n", "\n    return a\n"] * 3
    verdicts = check_many([(ADD, text) for text in completions], limits=LIMITS, workers=3)
    assert [verdict.passed for verdict in verdicts] == [True, False] * 3


def test_limits_follow_the_reference() -> None:
    level = require_level()
    assert calibrated_limits(ADD, level).cpu_seconds == CPU_FLOOR_SECONDS
    slow = Problem(
        prompt='def f():\n    """Work."""',
        entry_point="f",
        test="def check(candidate):\n    candidate()\n",
        reference="\n    import time\n    while time.process_time() < 0.6:\n        pass\n",
    )
    assert calibrated_limits(slow, level).cpu_seconds >= 6


def test_a_reference_that_fails_its_test_is_reported() -> None:
    wrong = Problem(prompt=ADD.prompt, entry_point="add", test=ADD.test, reference="\n    pass\n")
    with pytest.raises(RuntimeError, match="reference of 'add' does not pass its own test: failed"):
        calibrated_limits(wrong, require_level())


def test_a_broken_sandbox_says_nothing_about_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    start = code_scoring.start

    def start_broken(level: Any, role: Any, limits: Limits, **rest: Any) -> Any:
        if role == "checker":
            limits = Limits(open_files=1)  # too few to begin with
        return start(level, role, limits, **rest)

    monkeypatch.setattr(code_scoring, "start", start_broken)
    with pytest.raises(RuntimeError, match="checker's sandbox"):
        check(ADD, ADD.reference, limits=LIMITS)


class EchoModel:
    """A model whose tokens are characters and which writes what it is told."""

    name = "echo"

    def __init__(self, completion: str) -> None:
        self.completion = completion
        self.tokenizer = self
        self.seen: list[tuple[str, Decoding]] = []

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    def generate(self, prompt_ids: Sequence[int], decoding: Decoding) -> Generation:
        self.seen.append((self.decode(prompt_ids), decoding))
        ids = tuple(map(ord, self.completion))
        return Generation(ids, self.completion, "stop", Trace())


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_the_call_completes_the_prompt_and_the_score_follows(task: CodeTask) -> None:
    item = next(task.items())
    model = EchoModel(item.fields["reference"])
    result = task.call(model, item)  # type: ignore[arg-type]  # it has what a call needs
    ((prompt, decoding),) = model.seen
    assert prompt == item.fields["prompt"]
    assert decoding.max_new_tokens == task.max_new_tokens
    assert decoding.stop[: len(STOP)] == STOP
    assert decoding.temperature == 0
    assert not decoding.ignore_eos
    assert task.score(item, result.text) == {"pass@1": 1.0}
    assert task.score(item, "\n    pass\n") == {"pass@1": 0.0}
    assert not task.judge(item, "\n    pass\n").passed


def test_a_fixed_length_call_goes_on_past_stops() -> None:
    task, model = HumanEvalMini(), EchoModel("")
    task.call(model, next(task.items()), fixed_length=True)  # type: ignore[arg-type]  # as above
    assert model.seen[0][1].ignore_eos


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_a_stripped_prompt_and_its_reference_are_the_raw_program(task: CodeTask) -> None:
    raw = type(task)(prompt="raw")
    for stripped, whole in zip(task.items(), raw.items(), strict=True):
        assert not stripped.fields["prompt"].endswith("\n")
        assert whole.fields["prompt"].endswith('"""\n') or whole.fields["prompt"].endswith("'''\n")
        programs = [item.fields["prompt"] + item.fields["reference"] for item in (stripped, whole)]
        assert programs[0] == programs[1]
        ast.parse(programs[0])
        ast.parse(stripped.fields["prompt"])  # the checker executes it for its helpers


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_samples_of_a_problem_form_a_group_and_have_their_own_seeds(task: CodeTask) -> None:
    sampled = type(task)(samples=3, temperature=0.8, k=2)
    items = list(sampled.items())
    problems = list(task.items())
    assert len(items) == 3 * len(problems)
    assert [item.id for item in items[:4]] == [
        *(f"{problems[0].id}#{number}" for number in range(3)),
        f"{problems[1].id}#0",
    ]
    assert [item.group for item in items[:4]] == [problems[0].id] * 3 + [problems[1].id]
    assert [(metric.name, metric.kind, metric.k) for metric in sampled.metrics] == [
        ("pass@2", "pass@k", 2),
        ("pass@1", "pass@k", 1),
    ]
    model = EchoModel("\n    pass")
    for item in items[:3] + items[:1]:
        sampled.call(model, item)  # type: ignore[arg-type]  # as above
    seeds = [decoding.seed for _, decoding in model.seen]
    assert len(set(seeds)) == 3
    assert seeds[0] == seeds[3]
    assert set(sampled.score(items[0], "\n    pass")) == {"pass@1", "pass@2"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "strip"}, "prompt must be 'raw' or 'stripped'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"samples": 2, "k": 3, "temperature": 1.0}, "k must lie in"),
        ({"samples": 2}, "need a temperature above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HumanEvalMini(**settings)


def test_warmup_functions_are_in_no_task_and_right() -> None:
    items = list(HumanEval().warmup_items())
    assert len(items) >= 4
    names = {item.fields["entry_point"] for task in TASKS for item in task.items()}
    assert not names & {item.fields["entry_point"] for item in items}
    jobs = [(problem_of(item), item.fields["reference"]) for item in items]
    assert all(verdict.passed for verdict in check_many(jobs, limits=LIMITS))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_no_test_reads_an_argument_after_the_call(task: CodeTask) -> None:
    """Arguments travel one way, so a test must not look for changes in them.

    An argument that is no name, a literal or a copy, cannot be read again.
    """
    names = set()
    for item in task.items():
        for node in ast.walk(ast.parse(item.fields["test"])):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("candidate", item.fields["entry_point"])
            ):
                names |= {(item.id, arg.id) for arg in node.args if isinstance(arg, ast.Name)}
    # Texts and integers, and in 151 a list that is not used any more.
    assert names <= {
        ("HumanEval/38", "encoded_str"),
        ("HumanEval/44", "x"),
        ("HumanEval/53", "x"),
        ("HumanEval/53", "y"),
        ("HumanEval/151", "lst"),
    }


class Recorder:
    """Keeps the request that a task makes."""

    def __init__(self) -> None:
        self.tokenizer = self
        self.seen: list[Decoding] = []

    def encode(self, text: str) -> list[int]:
        return [1]

    def generate(self, prompt_ids: Sequence[int], decoding: Decoding) -> Generation:
        self.seen.append(decoding)
        return Generation((), "", "length", Trace())


def test_a_constrained_request_holds_the_language_of_what_may_follow_the_prompt() -> None:
    recorder: Any = Recorder()
    task = HumanEval(constraint="python", max_new_tokens=9)
    item = next(task.items())
    task.call(recorder, item)
    HumanEval(max_new_tokens=9).call(recorder, item)
    constrained, plain = recorder.seen
    assert isinstance(constrained, ConstrainedDecoding)
    assert accepts(constrained.constraint, item.fields["reference"])
    assert not accepts(constrained.constraint, "\n    return )")
    assert {**vars(constrained), "constraint": None} == {**vars(plain), "constraint": None}


def test_an_unknown_constraint_is_refused() -> None:
    with pytest.raises(ValueError, match="'none' or 'python', got 'rust'"):
        HumanEval(constraint="rust")  # type: ignore[arg-type]  # that is the mistake
