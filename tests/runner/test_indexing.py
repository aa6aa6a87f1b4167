from __future__ import annotations

import duckdb
import pytest

from results.store import Store, StoreError
from runner.indexing import take_in, update_index
from runner.registry import Registry
from runner.request import UsageError
from tests.results.factory import make_store


def rows(index, sql):
    with duckdb.connect(str(index), read_only=True) as connection:
        return connection.execute(sql).fetchall()


def test_the_index_holds_measurements_and_the_claims_of_all_cards(tmp_path):
    make_store(tmp_path)
    index = update_index(tmp_path, Registry())
    assert rows(index, "SELECT count(*) FROM comparison") == [(2,)]
    expected = len(Registry().claims())
    assert expected > 100
    assert rows(index, "SELECT count(*) FROM claims") == [(expected,)]
    assert rows(index, "SELECT value FROM claims WHERE claim_id = 'TR-2'") == [("< 2 MB",)]


def test_an_index_made_anew_is_the_same(tmp_path):
    make_store(tmp_path)
    index = update_index(tmp_path, Registry())
    before = rows(index, "SELECT * FROM comparison ORDER BY cell_id")
    index.unlink()
    again = update_index(tmp_path, Registry(), anew=True)
    assert rows(again, "SELECT * FROM comparison ORDER BY cell_id") == before


def test_shards_and_runs_of_another_store_come_in_once(tmp_path):
    make_store(tmp_path / "there")
    assert take_in(tmp_path / "there", tmp_path / "here") == ["experiment-1"]
    here = Store(tmp_path / "here")
    assert here.damage("experiment-1") == []
    assert here.run_ids() == ["run-1"]
    assert take_in(tmp_path / "there", tmp_path / "here") == []
    assert [path.name for path in (tmp_path / "here").iterdir() if path.name[0] == "."] == []


def test_a_single_shard_comes_in_without_runs(tmp_path):
    make_store(tmp_path / "there")
    shard = tmp_path / "there" / "shards" / "experiment-1"
    assert take_in(shard, tmp_path / "here") == ["experiment-1"]
    assert Store(tmp_path / "here").run_ids() == []


def test_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no shards: name a store"):
        take_in(tmp_path, tmp_path / "here")


def test_a_shard_that_still_grows_is_refused(tmp_path):
    make_store(tmp_path / "there", seal=False)
    with pytest.raises(UsageError, match="is not sealed: its run has not ended"):
        take_in(tmp_path / "there", tmp_path / "here")


def test_a_damaged_shard_is_refused_and_leaves_nothing(tmp_path):
    make_store(tmp_path / "there")
    cell = tmp_path / "there" / "shards" / "experiment-1" / "cells" / "cell-fast.json"
    cell.write_text(cell.read_text().replace("fast", "best"))
    with pytest.raises(StoreError, match=r"is damaged and was not taken in: .*cell-fast\.json"):
        take_in(tmp_path / "there", tmp_path / "here")
    assert Store(tmp_path / "here").experiment_ids() == []


def test_one_experiment_measured_twice_is_refused(tmp_path):
    make_store(tmp_path / "there", seed=1)
    make_store(tmp_path / "here", seed=2)
    with pytest.raises(StoreError, match="one experiment measured twice"):
        take_in(tmp_path / "there", tmp_path / "here")
