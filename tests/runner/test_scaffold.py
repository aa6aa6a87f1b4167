"""`new` writes a method or task that works at once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runner.registry import ROOT, Registry
from runner.request import UsageError
from runner.scaffold import scaffold

PLANNED = next(e for e in Registry().entries("method").values() if e.status == "planned")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The parts of a checkout that a scaffold reads."""
    for part in ("docs", "methods", "tasks"):
        shutil.copytree(
            ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
    return tmp_path


def passes(test: Path, checkout: Path) -> None:
    """Run a written test with the written module, the rest from here."""
    script = (
        "import sys, pytest; import methods.decoding, tasks; "
        f"methods.decoding.__path__.insert(0, {str(checkout / 'methods/decoding')!r}); "
        f"tasks.__path__.insert(0, {str(checkout / 'tasks')!r}); "
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '--rootdir', {str(ROOT)!r}, "
        f"'-c', {str(ROOT / 'pyproject.toml')!r}, {str(test)!r}]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_new_method_is_found_and_passes_its_test(checkout: Path) -> None:
    files = scaffold("method", "my-pruner", year=2026, root=checkout)
    assert [path.relative_to(checkout).as_posix() for path in files] == [
        "methods/decoding/my_pruner.py",
        "methods/decoding/my_pruner.toml",
        "tests/methods/decoding/test_my_pruner.py",
    ]
    entry = Registry(root=checkout).entries("method")["my-pruner"]
    assert entry.status == "ready"
    assert entry.title.startswith("MyPruner: ")
    assert "Again" not in files[0].read_text()
    passes(files[-1], checkout)


def test_a_new_task_is_found_and_passes_its_test(checkout: Path) -> None:
    files = scaffold("task", "my-words", year=2026, root=checkout)
    entry = Registry(root=checkout).entries("task")["my-words"]
    assert entry.title.startswith("my-words: ")
    passes(files[-1], checkout)


def test_a_planned_method_keeps_its_card(checkout: Path) -> None:
    card = checkout / "methods" / "decoding" / "lud.toml"
    before = card.read_text()
    files = scaffold("method", "lud", year=2026, root=checkout)
    assert card not in files
    assert card.read_text() == before


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        ("method", "My_Pruner", "lower-case letters"),
        ("method", "token-recycling", "there is a method named 'token-recycling' already"),
        ("method", PLANNED.name, f"planned in the family '{PLANNED.family}'"),
        ("task", "humaneval", "there is a task named 'humaneval' already"),
    ],
)
def test_a_name_that_cannot_be_is_refused(
    checkout: Path, kind: str, name: str, reason: str
) -> None:
    before = sorted(checkout.rglob("*"))
    with pytest.raises(UsageError, match=reason):
        scaffold(kind, name, year=2026, root=checkout)  # type: ignore[arg-type]
    assert sorted(checkout.rglob("*")) == before


def test_nothing_is_overwritten(checkout: Path) -> None:
    blocking = checkout / "tests" / "methods" / "decoding" / "test_mine.py"
    blocking.parent.mkdir(parents=True)
    blocking.write_text("mine")
    with pytest.raises(UsageError, match=r"test_mine\.py is in the way"):
        scaffold("method", "mine", year=2026, root=checkout)
    assert not (checkout / "methods" / "decoding" / "mine.py").exists()
