from __future__ import annotations

import dataclasses
import hashlib
import json

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from results.store import Store, StoreError, shard_files
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


def reseal(folder, experiment_id):
    """Make a manifest for a shard as it stands, as a forger would."""
    (Store(folder).shard(experiment_id) / "manifest.json").unlink()
    shard = Store(folder).shard(experiment_id)
    files = {
        name: {
            "sha256": hashlib.sha256((shard / name).read_bytes()).hexdigest(),
            "bytes": (shard / name).stat().st_size,
        }
        for name in shard_files(shard)
    }
    manifest = {"schema": 1, "experiment_id": experiment_id, "duplicates": [], "files": files}
    (shard / "manifest.json").write_text(json.dumps(manifest))


def two_shards(folder):
    """Write a store of two experiments, the second of which a test spoils; return that shard."""
    make_store(folder)
    make_store(folder, experiment_id="experiment-2", run_id="run-2")
    return folder / "shards" / "experiment-2"


def change_a_byte(shard):
    cell = shard / "cells" / "cell-fast.json"
    cell.write_text(cell.read_text().replace("fast", "best"))


def claim_another_schema(shard):
    record = json.loads((shard / "experiment.json").read_text())
    (shard / "experiment.json").write_text(json.dumps({**record, "schema": 99}))
    reseal(shard.parent.parent, shard.name)


def link_a_file(shard):
    (shard / "notes.txt").symlink_to("/etc/hostname")
    reseal(shard.parent.parent, shard.name)


def hide_a_cell(shard):
    record = json.loads((shard / "cells" / "cell-fast.json").read_text())
    (shard / "cells" / "stranger.json").write_text(json.dumps({**record, "cell_id": "stranger"}))
    reseal(shard.parent.parent, shard.name)


def name_another_item(shard):
    table = pq.read_table(shard / "samples.parquet")
    items = pa.array(["nobody"] * len(table), pa.string())
    pq.write_table(table.set_column(1, "item_id", items), shard / "samples.parquet")
    reseal(shard.parent.parent, shard.name)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (change_a_byte, r"cell-fast\.json: changed since it was sealed"),
        (claim_another_schema, "was written with schema 99, this version reads 1"),
        (link_a_file, r"notes\.txt: is a link"),
        (hide_a_cell, "cell 'stranger' is none of the experiment's cells"),
        (name_another_item, "written by another version|has no item 'nobody'"),
    ],
)
def test_a_strangers_store_is_taken_in_whole_or_not_at_all(tmp_path, spoil, reason):
    shard = two_shards(tmp_path / "there")
    assert take_in(tmp_path / "there", tmp_path / "fine") == ["experiment-1", "experiment-2"]
    spoil(shard)
    with pytest.raises(StoreError, match=reason) as error:
        take_in(tmp_path / "there", tmp_path / "here")
    assert str(error.value).endswith("was taken in.")
    assert not (tmp_path / "here").exists()


def test_a_run_that_differs_from_ours_of_the_same_name_is_refused(tmp_path):
    make_store(tmp_path / "there")
    make_store(tmp_path / "here")
    run = Store(tmp_path / "there").run("run-1")
    Store(tmp_path / "there").write_run(dataclasses.replace(run, command="another"))
    with pytest.raises(StoreError, match=r"run .run-1. of .* differs from the one that is there"):
        take_in(tmp_path / "there", tmp_path / "here")


def test_one_experiment_measured_twice_is_refused(tmp_path):
    make_store(tmp_path / "there", seed=1)
    make_store(tmp_path / "here", seed=2)
    with pytest.raises(StoreError, match="one experiment measured twice"):
        take_in(tmp_path / "there", tmp_path / "here")
