"""What makes a cell another cell."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner import keys
from runner.keys import PartialDigest, digest, written_pairs

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


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


@given(
    st.dictionaries(st.text(max_size=3), VALUES, max_size=6),
    st.dictionaries(st.text(max_size=3), VALUES, min_size=1, max_size=4),
    st.dictionaries(st.text(max_size=3), VALUES, min_size=1, max_size=4),
)
def test_a_digest_in_parts_is_the_digest_of_the_whole(common, first, second) -> None:
    partial = PartialDigest(common)
    for own in (first, second, first):
        assert partial(written_pairs(own)) == digest({**common, **own})
