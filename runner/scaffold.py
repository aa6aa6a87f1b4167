"""`new method NAME` and `new task NAME`: a working start, made from the documentation's example.

The examples of docs/adding-a-method.md and docs/adding-a-task.md are executed as tests; what is
written here is the same text under another name, with a test beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from runner.registry import Registry
from runner.request import UsageError

Scaffolded = Literal["method", "task"]
FAMILY = "decoding"

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")

_CARD = """\
[paper]
title = "{title}: the title of the paper"
kind = "unpublished"  # until there is an arxiv id or the address of the code to name
year = {year}
family = "{family}"
task = "HumanEval"

# One table for each number that the paper claims; docs/adding-a-method.md shows a whole one.
"""

_METHOD_TEST = '''\
"""What must hold for {name}, beside what `python run.py conformance {name}` tests."""

from hardware.profile import Profile
from methods.{family}.{module} import {title}
from models.base import Decoding
from tests.models.toy import TableModel, cycle_table

PROFILE = Profile(name="cpu", kind="cpu", label="CPU")


def test_texts_are_the_baselines_in_fewer_forwards() -> None:
    model = TableModel(cycle_table(4))
    decoding = Decoding(max_new_tokens=20)
    plain = model.generate([0, 1, 2, 3, 0, 1, 2, 3], decoding)
    with {title}().apply(model, PROFILE) as changed:
        drafted = changed.generate([0, 1, 2, 3, 0, 1, 2, 3], decoding)
    assert drafted.token_ids == plain.token_ids
    assert len(drafted.trace.forwards) < len(plain.trace.forwards)
'''

_TASK_TEST = '''\
"""What must hold for {name}."""

from tasks.base import Unscored
from tasks.{module} import {title}


def test_items_are_the_same_each_time() -> None:
    assert list({title}().items()) == list({title}().items())


def test_right_wrong_and_unreadable_answers_are_told_apart() -> None:
    task = {title}()
    item = next(task.items())
    word = item.fields["word"]
    assert task.score(item, f" {{word}} and so on") == {{"accuracy": 1.0}}
    assert task.score(item, "something else") == {{"accuracy": 0.0}}
    assert isinstance(task.score(item, "")["accuracy"], Unscored)
'''


def scaffold(kind: Scaffolded, name: str, *, year: int, root: Path | None = None) -> list[Path]:
    """Write the files of a new method or task and return them, the one to edit first.

    A method that is planned already keeps its card.

    Args:
        kind: `method` or `task`.
        name: Lower case with hyphens.
        year: Of the card's paper, until somebody looks it up.
        root: Checkout to write into; this one when None.

    Raises:
        UsageError: The name cannot be one, is taken, or a file is in the way.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be the name of a {kind}: lower-case letters, digits and single "
            "hyphens, a letter first, such as 'my-method'."
        )
    registry = Registry() if root is None else Registry(root=root)
    known = registry.entries(kind).get(name)
    if known is not None and known.status == "ready":
        raise UsageError(f"there is a {kind} named {name!r} already: {known.source}.")
    if known is not None and known.family != FAMILY:
        raise UsageError(
            f"{name!r} is planned in the family {known.family!r}, for which there is no example to "
            f"start from; only {FAMILY!r} has one so far."
        )
    words = {
        "name": name,
        "module": name.replace("-", "_"),
        "title": "".join(part.capitalize() for part in name.split("-")),
        "family": FAMILY,
        "year": str(year),
    }
    files = _method(registry.root, words) if kind == "method" else _task(registry.root, words)
    if known is not None and known.card is not None:
        del files[known.card]
    for path in files:
        if path.exists():
            raise UsageError(f"{path} is in the way: move it, or choose another name.")
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return list(files)


def _method(root: Path, words: Mapping[str, str]) -> dict[Path, str]:
    folder = root / "methods" / words["family"]
    code = _example(root, "adding-a-method.md", "Again", "again", words)
    return {
        folder / f"{words['module']}.py": code,
        folder / f"{words['module']}.toml": _CARD.format(**words),
        root / "tests" / "methods" / words["family"] / f"test_{words['module']}.py": (
            _METHOD_TEST.format(**words)
        ),
    }


def _task(root: Path, words: Mapping[str, str]) -> dict[Path, str]:
    code = _example(root, "adding-a-task.md", "Echo", "echo", words)
    return {
        root / "tasks" / f"{words['module']}.py": code,
        root / "tests" / "tasks" / f"test_{words['module']}.py": _TASK_TEST.format(**words),
    }


def _example(root: Path, page: str, title: str, name: str, words: Mapping[str, str]) -> str:
    """Return a page's first Python block, with the example's names replaced."""
    path = root / "docs" / page
    try:
        found = re.search(r"^```python\n(.*?)^```", path.read_text("utf-8"), re.M | re.S)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read, and the start is made from it: {error}"
        ) from error
    if found is None:
        raise UsageError(f"{path} holds no Python example to start from.")
    code = re.sub(rf"\b{title}(?=\b|[A-Z])", words["title"], found[1])
    code = re.sub(rf"\b{name}(?=_)", words["module"], code)
    return re.sub(rf'^"""{name}\b', f'"""{words["name"]}', code)
