"""What import-linter cannot say: which files of its own family a method may import."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from runner.registry import ROOT

FILES = sorted((ROOT / "methods").glob("*/*.py"))


def imported_modules(source: str) -> set[str]:
    """Return the modules that a file imports, wherever in it; relative ones start with a dot."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def forbidden(path: Path, source: str) -> set[str]:
    """Return the imports of a method file that its room does not allow."""
    family = path.parent.name
    return {
        name
        for name in imported_modules(source)
        if name.startswith(".")
        or (
            name.partition(".")[0] == "methods"
            and name not in ("methods.base", "methods.checks")
            and not name.startswith(f"methods.{family}.common")
        )
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_method_files_import_their_base_and_their_own_commons_only(path: Path):
    assert not forbidden(path, path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "line",
    [
        "from methods.decoding.autoregressive import Autoregressive",
        "import methods.decoding.autoregressive",
        "from methods.pruning.common import x",
        "from .common import x",
        "from methods.decoding import common",
    ],
)
def test_the_rule_sees_every_form_of_import(line: str):
    assert forbidden(ROOT / "methods/decoding/x.py", f"def f():\n    {line}\n")
