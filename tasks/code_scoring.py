"""Judging generated functions by unit tests, and what tasks that do so have in common.

A program is prompt + completion; it is right if the test's `check(function)` returns. The program
runs in one sandboxed process and the test in another (`tasks/sandbox/child.py` says how values
travel between them), so that no program can forge a verdict.

Source of the protocol: arXiv 2107.03374, and openai/human-eval. Differs from its evaluator, which
runs program and test in one namespace with a wall-clock limit of 3 seconds: time is processor time
with a limit calibrated on the reference solution, no threads or processes can be made, packages
outside the standard library are not there, and an instance of the program's own class equals what
its builtin base would equal.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import select
import subprocess
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from models.base import Decoding, Generation, TextGenerator
from models.constraints import ConstrainedDecoding, Constraint
from models.python_syntax import python_program
from tasks.base import Item, Metric, Scored, Scores, Task
from tasks.sandbox import Level, Limits, require_level, start
from tasks.sandbox.child import decode, frame

if TYPE_CHECKING:
    from tasks.scorers import Scorer

# Where a function ends: the five strings of arXiv 2107.03374, section 3.2.
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

PromptForm = Literal["raw", "stripped"]
Outcome = Literal["passed", "failed", "error", "timeout", "killed", "protocol"]

SIGKILL_STATUS, SIGXCPU_STATUS = 128 + 9, 128 + 24


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A function to be written.

    Attributes:
        prompt: Imports, helpers, signature and docstring: a program by itself.
        entry_point: Name of the function.
        test: Source that defines `check(candidate)`, which raises if the function is wrong.
        reference: A right completion of the prompt.
    """

    prompt: str
    entry_point: str
    test: str
    reference: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a program.

    Attributes:
        outcome: `passed`; `failed`, an assertion of the test; `error`, an exception of the program
            or in the test because of what it returned; `timeout`, of processor or wall time;
            `killed`, by the memory limit or a signal; `protocol`, the program left its process or
            wrote to the channel what is no answer.
        detail: More about it, partly the program's own words: escape before showing.
        level: How it was isolated.
        cpu_seconds: Processor time of the program's process, as told by it; None unless passed.
            Only believed of references.
    """

    outcome: Outcome
    detail: str
    level: Level
    cpu_seconds: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the program is right."""
        return self.outcome == "passed"


def check(
    problem: Problem,
    completion: str,
    *,
    limits: Limits | None = None,
    level: Level | None = None,
) -> Verdict:
    """Run a completion against its test in the sandbox.

    Args:
        problem: What was asked.
        completion: What the model wrote after `problem.prompt`.
        limits: For each of the two processes; those of `calibrated_limits` by default.
        level: How to isolate; the best available by default.

    Raises:
        models.base.Unsupported: This machine has no sandbox.
        RuntimeError: The sandbox itself failed, so nothing can be said about the program.
    """
    level = level or require_level()
    limits = limits or calibrated_limits(problem, level)
    job = {
        "program": problem.prompt + completion,
        "prompt": problem.prompt,
        "entry_point": problem.entry_point,
        "test": problem.test,
    }
    request_read, request_write = os.pipe()
    reply_read, reply_write = os.pipe()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        try:
            candidate = start(level, "candidate", limits, stdin=request_read, stdout=reply_write)
            processes.append(candidate)
            checker = start(
                level,
                "checker",
                limits,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(reply_read, request_write),
            )
            processes.append(checker)
        finally:
            for descriptor in (request_read, request_write, reply_read, reply_write):
                os.close(descriptor)
        try:
            output, _ = checker.communicate(frame(job), timeout=limits.wall_seconds)
        except subprocess.TimeoutExpired:
            return Verdict(
                outcome="timeout", detail=f"wall time over {limits.wall_seconds} s", level=level
            )
        if not output:
            return _checker_ended(checker.returncode, level)
        report = decode(output[4:])
        if report["outcome"] == "ended":
            return _candidate_ended(candidate, level)
        return Verdict(level=level, **report)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _candidate_ended(process: subprocess.Popen[bytes], level: Level) -> Verdict:
    """Say why a candidate's process went away before the test was over."""
    descriptor = os.pidfd_open(process.pid)
    try:
        # It may have closed only its end of the pipe, and go on.
        over, _, _ = select.select([descriptor], [], [], 1.0)
    finally:
        os.close(descriptor)
    if not over:
        return Verdict(outcome="protocol", detail="the program closed the channel", level=level)
    status = process.wait()
    if status == SIGXCPU_STATUS:
        return Verdict(outcome="timeout", detail="processor time", level=level)
    if status == SIGKILL_STATUS:
        return Verdict(outcome="killed", detail="SIGKILL: out of time or memory", level=level)
    if status > 128:
        return Verdict(outcome="killed", detail=f"signal {status - 128}", level=level)
    return Verdict(outcome="protocol", detail=f"the process ended with {status}", level=level)


def _checker_ended(status: int, level: Level) -> Verdict:
    """Say why the checker ended without a report: what the program returned was too much for it."""
    if status in (SIGXCPU_STATUS, SIGKILL_STATUS):
        return Verdict(
            outcome="timeout", detail="processor time of the test on what was returned", level=level
        )
    raise RuntimeError(
        f"the checker's sandbox ({level}) ended with status {status} and without a report."
    )


# How often a right program may take the reference's time, and the least time it gets: that of the
# official evaluator, there in wall time.
CPU_FACTOR, CPU_FLOOR_SECONDS = 10, 3
# Processor time is what is limited; wall time only ends those that wait. On a machine that does
# other things a program gets a third of a core at the worst.
WALL_PER_CPU = 4


@functools.lru_cache(maxsize=4096)
def calibrated_limits(problem: Problem, level: Level) -> Limits:
    """Return limits for a problem from one run of its reference on this machine.

    Raises:
        RuntimeError: The reference does not pass its own test.
    """
    verdict = check(
        problem, problem.reference, limits=Limits(cpu_seconds=60, wall_seconds=240), level=level
    )
    if verdict.cpu_seconds is None:
        raise RuntimeError(
            f"the reference of '{problem.entry_point}' does not pass its own test: "
            f"{verdict.outcome}, {verdict.detail}."
        )
    cpu_seconds = max(CPU_FLOOR_SECONDS, math.ceil(CPU_FACTOR * verdict.cpu_seconds))
    return Limits(cpu_seconds=cpu_seconds, wall_seconds=WALL_PER_CPU * cpu_seconds)


def check_many(
    jobs: Iterable[tuple[Problem, str]],
    *,
    workers: int = 2,
    limits: Limits | None = None,
    level: Level | None = None,
) -> list[Verdict]:
    """Return the verdicts on (problem, completion) pairs, in their order, `workers` at a time."""
    level = level or require_level()
    with ThreadPoolExecutor(max_workers=workers) as pool:
        futures = [
            pool.submit(check, problem, completion, limits=limits, level=level)
            for problem, completion in jobs
        ]
        return [future.result() for future in futures]


@functools.lru_cache(maxsize=1024)
def _program_behind(prompt: str) -> Constraint:
    """Return the language of the texts that go on with a program."""
    return python_program(prompt)


@dataclass(frozen=True, kw_only=True)
class CodeTask(Task[TextGenerator]):
    """A task whose items are functions to be completed.

    Subclasses yield their problems; prompts, sampling and scores are the same for all.

    Attributes:
        prompt: `stripped` cuts the line break after the docstring, so that the model writes it;
            `raw` keeps it, as the official protocol has it. Small models answer a raw prompt with
            a Markdown block, because the token for a line break and four spaces never begins there.
        max_new_tokens: Largest length of a completion.
        temperature: 0 takes the most likely token.
        samples: Completions of each problem; above 1 only with a temperature.
        k: The k of pass@k, at most `samples`.
        seed: Where the seed of each sample comes from, together with its id.
        constraint: `python` asks methods that know constraints for a completion that is Python as
            far as it goes; others see the same request as without.
    """

    prompt: PromptForm = "stripped"
    max_new_tokens: int = 512
    temperature: float = 0.0
    samples: int = 1
    k: int = 1
    seed: int = 0
    constraint: Literal["none", "python"] = "none"

    needs = ("sandbox",)
    capability = "TextGenerator"
    stop: ClassVar[tuple[str, ...]] = STOP

    def __post_init__(self) -> None:
        if self.prompt not in get_args(PromptForm):
            raise ValueError(f"prompt must be 'raw' or 'stripped', got {self.prompt!r}.")
        if self.constraint not in ("none", "python"):
            raise ValueError(f"constraint must be 'none' or 'python', got {self.constraint!r}.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}.")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}.")
        if not 1 <= self.k <= self.samples:
            raise ValueError(
                f"k must lie in [1, samples], got k={self.k} with samples={self.samples}. "
                "pass@k needs at least k samples of each problem."
            )
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                "samples above 1 need a temperature above 0: greedy samples are all the same."
            )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """pass@k, and pass@1 beside it where k is above 1."""
        if self.samples == 1:
            return (Metric(name="pass@1", unit="fraction", kind="binary"),)
        return tuple(
            Metric(name=f"pass@{k}", unit="fraction", kind="pass@k", k=k)
            for k in dict.fromkeys((self.k, 1))
        )

    @abstractmethod
    def problems(self) -> Iterator[Item]:
        """Yield one item a problem with the fields of `Problem`, the prompt in its raw form."""

    def items(self) -> Iterator[Item]:
        """Yield the samples of each problem, problem after problem."""
        for problem in self.problems():
            fields = self._formed(problem.fields)
            if self.constraint == "python":
                _program_behind(fields["prompt"])  # read here, outside the clock
            for sample in range(self.samples):
                if self.samples == 1:
                    yield Item(problem.id, fields)
                else:
                    yield Item(f"{problem.id}#{sample}", fields, group=problem.id)

    def warmup_items(self) -> Iterator[Item]:
        """Yield functions of the same form that are in no task."""
        for problem in WARMUP:
            yield Item(f"warmup/{problem.entry_point}", self._formed(vars(problem)))

    def call(self, model: TextGenerator, item: Item, *, fixed_length: bool = False) -> Generation:
        """Complete the item's prompt."""
        digest = hashlib.sha256(f"{self.seed} {item.id}".encode()).digest()
        decoding = Decoding(
            max_new_tokens=self.max_new_tokens,
            stop=self.stop,
            temperature=self.temperature,
            seed=int.from_bytes(digest[:4]),
            ignore_eos=fixed_length,
        )
        prompt = item.fields["prompt"]
        if self.constraint == "python":
            decoding = ConstrainedDecoding(**vars(decoding), constraint=_program_behind(prompt))
        return model.generate(model.tokenizer.encode(prompt), decoding)

    def judge(self, item: Item, output: str) -> Verdict:
        """Return the verdict on a completion, with its reason."""
        return check(problem_of(item), output)

    def conditions(self) -> dict[str, str]:
        """Return the level of the sandbox.

        Raises:
            Unsupported: There is none; names the package to install.
        """
        return {"sandbox": require_level()}

    def score(self, item: Item, output: str) -> Scores:
        """Return 1 if the completion passes the item's test, else 0."""
        return self.score_with_detail(item, output).scores

    def score_with_detail(self, item: Item, output: str) -> Scored:
        """Return the score with the verdict in words."""
        verdict = self.judge(item, output)
        scores = {metric.name: float(verdict.passed) for metric in self.metrics}
        return Scored(
            scores, f"{verdict.outcome}: {verdict.detail}" if verdict.detail else verdict.outcome
        )

    def other_scorers(self) -> Sequence[Scorer]:
        """Return the official evaluator and the two of lm-eval."""
        from tasks.code_scorers import official_scorers  # it builds on this module

        return official_scorers(self)

    def _formed(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return an item's fields in the prompt form; what the prompt loses the reference gains."""
        if self.prompt == "raw":
            return dict(fields)
        prompt = fields["prompt"].rstrip("\n")
        reference = fields["prompt"][len(prompt) :] + fields["reference"]
        return {**fields, "prompt": prompt, "reference": reference}


def problem_of(item: Item) -> Problem:
    """Return the problem that an item holds, in the item's prompt form."""
    fields = item.fields
    return Problem(
        prompt=fields["prompt"],
        entry_point=fields["entry_point"],
        test=fields["test"],
        reference=fields["reference"],
    )


def _warmup(entry_point: str, arguments: str, docstring: str, body: str, test: str) -> Problem:
    return Problem(
        prompt=f'def {entry_point}({arguments}:\n    """{docstring}\n    """\n',
        entry_point=entry_point,
        test=f"def check(candidate):\n    assert {test}\n",
        reference=f"    {body}\n",
    )


WARMUP = (
    _warmup(
        "seconds_in_days",
        "days: int) -> int",
        " Return the number of seconds in a number of days.\n"
        "    >>> seconds_in_days(1)\n    86400\n    >>> seconds_in_days(0)\n    0",
        "return days * 24 * 60 * 60",
        "candidate(2) == 172800",
    ),
    _warmup(
        "initials",
        "name: str) -> str",
        " Return the first letter of each word of a name, in upper case.\n"
        "    >>> initials('ada lovelace')\n    'AL'\n    >>> initials('grace')\n    'G'",
        "return ''.join(word[0].upper() for word in name.split())",
        "candidate('alan mathison turing') == 'AMT'",
    ),
    _warmup(
        "is_leap_year",
        "year: int) -> bool",
        " Tell whether a year of the Gregorian calendar is a leap year.\n"
        "    >>> is_leap_year(2024)\n    True\n    >>> is_leap_year(1900)\n    False",
        "return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)",
        "candidate(2000) is True",
    ),
    _warmup(
        "running_totals",
        "amounts: list) -> list",
        " Return the sums of the first, the first two, the first three ... amounts.\n"
        "    >>> running_totals([1, 2, 3])\n    [1, 3, 6]\n    >>> running_totals([])\n    []",
        "totals = []\n    for amount in amounts:\n"
        "        totals.append(amount + (totals[-1] if totals else 0))\n    return totals",
        "candidate([5, -5, 2]) == [5, 0, 2]",
    ),
    _warmup(
        "fahrenheit_to_celsius",
        "degrees: float) -> float",
        " Convert degrees Fahrenheit to degrees Celsius.\n"
        "    >>> fahrenheit_to_celsius(212.0)\n    100.0\n"
        "    >>> fahrenheit_to_celsius(32.0)\n    0.0",
        "return (degrees - 32) * 5 / 9",
        "candidate(-40.0) == -40.0",
    ),
    _warmup(
        "longest_word",
        "text: str) -> str",
        " Return the longest word of a text, the first one of those equally long.\n"
        "    >>> longest_word('a bee sees')\n    'sees'\n"
        "    >>> longest_word('one two')\n    'one'",
        "return max(text.split(), key=len)",
        "candidate('tea or coffee') == 'coffee'",
    ),
)
