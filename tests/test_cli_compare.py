"""`compare` as a user and as a build calls it."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import run
from results.store import Store
from tests.results.test_compare import write_run


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Return a store with the runs `good`, `same` and `worse`."""
    store = Store(tmp_path / "store")
    write_run(store, "good", day=1)
    write_run(store, "same", day=2)
    write_run(store, "worse", {"plain": 1.0, "fast": 1.2}, day=3)
    return store.path


def test_no_regression_ends_with_0_and_says_so(store, capsys):
    assert run.main(["compare", "good", "same", "--store", str(store)]) == 0
    shown = capsys.readouterr().out
    assert "no regression from good to same" in shown
    assert not shown.startswith("none")


def test_a_regression_ends_with_1_and_says_which(store, capsys):
    assert run.main(["compare", "good", "latest", "--store", str(store)]) == 1
    first = capsys.readouterr().out.splitlines()[2]
    assert first.startswith("REGRESSED")
    assert "fast" in first


def test_a_build_gets_xml_annotations_and_a_summary(store, tmp_path, monkeypatch, capsys):
    summary, xml = tmp_path / "summary.md", tmp_path / "compare.xml"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    arguments = ["compare", f"{store}@good", f"{store}@worse", "--junit", str(xml), "--github"]
    assert run.main(arguments) == 1
    shown = capsys.readouterr().out
    assert "::error title=speed REGRESSED::fast on toy" in shown
    assert summary.read_text().startswith("before\n### ")
    assert len(ElementTree.parse(xml).findall(".//failure")) >= 1


def test_json_is_alone_on_stdout(store, capsys):
    assert run.main(["compare", "good", "same", "--format", "json", "--store", str(store)]) == 0
    assert json.loads(capsys.readouterr().out)["regressions"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["good"], "Missing argument"),
        (["good", "sam1"], "Did you mean 'same'?"),
        (["good", "good"], "name two different runs"),
        (["good", "no/where"], "there is no such folder"),
        (["good", "same", "--format", "xml"], "must be one of table, md, json"),
        (["good", "same", "--junit", "/no/where/x.xml"], "cannot write /no/where/x.xml"),
    ],
)
def test_wrong_usage_of_compare_ends_with_2(store, arguments, message, capsys):
    assert run.main(["compare", *arguments, "--store", str(store)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("UsageError: ")
    assert message in error


def test_a_damaged_shard_ends_with_1_and_is_named(store, capsys):
    (store / "shards" / "experiment-same" / "samples.parquet").write_bytes(b"no parquet")
    assert run.main(["compare", "good", "same", "--store", str(store)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert "samples.parquet" in error
