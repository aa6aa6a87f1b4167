"""What makes a cell another cell."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner import keys


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(keys, "ROOT", tmp_path)
    folder = tmp_path / "methods" / "decoding"
    (folder / "data").mkdir(parents=True)
    for name in ("one.py", "other.py", "common_loops.py", "data/filter.json", "data/README.md"):
        (folder / name).write_text(name)
    return folder


@pytest.mark.parametrize("name", ["one.py", "common_loops.py", "data/filter.json"])
def test_a_method_is_another_when_what_it_stands_on_changes(family: Path, name: str) -> None:
    before = keys.method_source(family / "one.py")
    (family / name).write_text("changed")
    assert keys.method_source(family / "one.py") != before


@pytest.mark.parametrize("name", ["other.py", "data/README.md"])
def test_its_neighbours_do_not_change_it(family: Path, name: str) -> None:
    before = keys.method_source(family / "one.py")
    (family / name).write_text("changed")
    assert keys.method_source(family / "one.py") == before


def test_a_plug_in_stands_alone(family: Path, tmp_path: Path) -> None:
    for name in ("plugin.py", "common_mine.py"):
        (tmp_path / name).write_text(name)
    before = keys.method_source(tmp_path / "plugin.py")
    (tmp_path / "common_mine.py").write_text("changed")
    assert keys.method_source(tmp_path / "plugin.py") == before
    assert keys.method_source(None) == ""
