from __future__ import annotations

import shutil
from pathlib import Path

import duckdb
import pytest

from results import verify as verify_module
from results.ingest import ingest
from results.store import Store, StoreError
from results.verify import verify
from tests.results.factory import make_experiment, make_sample, make_store, write_shard

ID = "experiment-1"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = make_store(tmp_path_factory.mktemp("template"))
    ingest(store.path)
    return store.path


@pytest.fixture
def store(template: Path, tmp_path: Path) -> Store:
    """Return a sealed store with an index, to be damaged."""
    return Store(Path(shutil.copytree(template, tmp_path / "store")))


def test_a_sound_store_has_nothing_wrong_with_it(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    write_shard(store, make_experiment(experiment_id="growing"), [], [make_sample()], seal=False)
    ingest(tmp_path, [{"id": "T-1", "method": "fast"}])
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["samples.parquet", "scores.parquet", "experiment.json", "cells/cell-fast.json"]
)
def test_a_shard_changed_by_one_byte_is_found(store: Store, name: str) -> None:
    path = store.shard(ID) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    problems = verify(store.path)
    assert any(line.startswith(f"{path}: changed since it was sealed") for line in problems)


def test_every_changed_file_of_a_shard_is_named_once(store: Store) -> None:
    names = ["cells/cell-fast.json", "samples.parquet", "scores.parquet"]
    for name in names:
        with (store.shard(ID) / name).open("ab") as file:
            file.write(b" ")
    damage = [line for line in verify(store.path) if "changed since it was sealed" in line]
    assert [line.split(": ")[0] for line in damage] == [
        str(store.shard(ID) / name) for name in names
    ]


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("verdicts", "speedup", "9.5"),
        ("verdicts", "speedup_low", "NULL"),
        ("verdicts", "speed_verdict", "'SAME'"),
        ("metrics", "value", "0.99"),
        ("metrics", "verdict", "'BETTER'"),
        ("samples", "seconds", "0.001"),
        ("cells", "status", "'failed'"),
        ("scores", "value", "1.5"),
        ("runs", "command", "'other'"),
        ("experiments", "margin", "0.5"),
    ],
)
def test_a_number_changed_in_the_index_is_named(
    store: Store, table: str, column: str, value: str
) -> None:
    with duckdb.connect(str(store.index_path)) as connection:
        connection.execute(f"UPDATE {table} SET {column} = {value}")
    problems = verify(store.path)
    assert problems
    assert all(f": {table}: " in line for line in problems)
    assert any(f" {column} is " in line and ", recomputed " in line for line in problems)


def test_rounding_in_the_last_digit_is_no_difference(store: Store) -> None:
    index = store.index_path
    with duckdb.connect(str(index)) as connection:
        connection.execute("UPDATE verdicts SET speedup = speedup * (1 + 1e-14)")
    assert verify(store.path) == []
    with duckdb.connect(str(index)) as connection:
        connection.execute("UPDATE verdicts SET speedup = speedup * (1 + 1e-6)")
    assert len(verify(store.path)) == 2


def test_rows_too_many_and_too_few_are_named(store: Store) -> None:
    index = store.index_path
    with duckdb.connect(str(index)) as connection:
        connection.execute("DELETE FROM verdicts WHERE cell_id = 'cell-fast'")
        connection.execute("INSERT INTO runs (run_id) VALUES ('invented')")
    assert verify(store.path) == [
        f"{index}: runs: invented: is not in the shards.",
        f"{index}: verdicts: {ID}, cell-fast: is missing; `python run.py ingest` brings it in.",
    ]


def test_an_index_that_lags_behind_is_found(tmp_path: Path) -> None:
    store = make_store(tmp_path, seal=False)
    ingest(tmp_path)
    assert verify(tmp_path) == []
    with store.samples_journal(ID) as journal:
        journal.append(make_sample("cell-ghost"))
    ghost, content = sorted(verify(tmp_path), key=lambda line: "content_sha256" in line)
    assert "cell-ghost, item-0, 0: is missing" in ghost
    assert "content_sha256 is" in content


def test_the_list_of_differences_has_an_end(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "_MOST_LINES", 5)
    with duckdb.connect(str(store.index_path)) as connection:
        connection.execute("UPDATE samples SET seconds = 0")
    problems = verify(store.path)
    assert len(problems) == 6
    assert "and 11 more differences" in problems[-1]


def test_without_an_index_there_is_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is missing"):
        verify(Store(tmp_path).path)
