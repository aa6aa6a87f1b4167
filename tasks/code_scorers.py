"""Other people's ways of judging a HumanEval completion, run in our sandbox.

One output, several scorers: where they agree, the number does not hang on ours.

| scorer | completion | judged by |
|---|---|---|
| `tokenmark` | as the run cut it | program and test in two processes (`tasks/code_scoring.py`) |
| `official` | as the run cut it | openai/human-eval: program, test and call in one namespace |
| `lm-eval` | cut at the first of each of five strings | the same, as in `code_eval` |
| `lm-eval-instruct` | cut at the first Markdown fence | the same |

Source: openai/human-eval, `execution.py` (check program and `exec_globals`, 3 s); lm-eval 0.4.13,
tasks `humaneval` and `humaneval_instruct` (`until`, `build_predictions`), whose stop strings are
applied one after the other, each to what the one before left. Differs from both: processor time is
limited instead of wall time, and nothing runs outside the sandbox.
"""

from __future__ import annotations

from tasks.base import Item, Scored
from tasks.code_scoring import CodeTask, Problem, check, problem_of
from tasks.sandbox import Limits
from tasks.scorers import Scorer, whole

# `until` of lm-eval's task `humaneval`, in its order.
LM_EVAL_UNTIL = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
MARKDOWN_FENCE = "```"
# The official limit is 3 s; one more for starting the interpreter, which is inside the limit here.
LIMITS = Limits(cpu_seconds=4, wall_seconds=60)


def official_scorers(task: CodeTask) -> list[Scorer]:
    """Return the scorers of a task beside its own."""

    def official(item: Item, output: str) -> Scored:
        return _official(task, item, output)

    return [
        Scorer("official", whole, official, "official", task),
        Scorer("lm-eval", cut_at_until, official, "official", task),
        Scorer("lm-eval-instruct", cut_at_fence, official, "official", task),
    ]


def cut_at_until(output: str) -> str:
    """Return what lm-eval's stop rules leave of an output."""
    for stop in LM_EVAL_UNTIL:
        output = output.split(stop)[0]
    return output


def cut_at_fence(output: str) -> str:
    """Return what stands before the first Markdown fence."""
    return output.split(MARKDOWN_FENCE)[0]


def official_program(problem: Problem, completion: str) -> str:
    """Return the text that the official evaluator executes."""
    return f"{problem.prompt}{completion}\n{problem.test}\ncheck({problem.entry_point})"


def _official(task: CodeTask, item: Item, output: str) -> Scored:
    """Execute program, test and call as one text in one empty namespace."""
    program = official_program(problem_of(item), output)
    # The sandbox knows candidates and checkers; here the candidate plays the whole evaluator.
    evaluator = (
        "\n    import builtins\n"
        "    builtins.exit = builtins.quit = None\n"
        "    try:\n        exec(program, {})\n"
        "    except BaseException as error:\n        return type(error).__name__\n"
        "    return 'passed'\n"
    )
    job = Problem(
        prompt='def evaluate(program):\n    """Run a check program."""',
        entry_point="evaluate",
        test=(
            "def check(candidate):\n"
            f"    outcome = candidate({program!r})\n"
            "    assert outcome == 'passed', outcome\n"
        ),
        reference=evaluator,
    )
    verdict = check(job, evaluator, limits=LIMITS)
    scores = {metric.name: float(verdict.passed) for metric in task.metrics}
    detail = verdict.detail.removeprefix("AssertionError: ")
    return Scored(scores, f"{verdict.outcome}: {detail}" if detail else verdict.outcome)
