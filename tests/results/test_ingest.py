from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import socket
import threading
from math import nan
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from results import ingest as ingest_module
from results import schema
from results.ingest import exclusive, ingest, rebuild
from results.records import MetricRecord
from results.store import Store, StoreError
from tests.results.factory import (
    make_cell,
    make_corpus,
    make_experiment,
    make_run,
    make_sample,
    make_samples,
    make_store,
    write_shard,
)

ID = "experiment-1"

# Written out once more, so that a renamed or moved column is noticed: these names are public.
COMPARISON = (
    "run_id, task, model, hardware, scenario, seed, scale, method, params, family, status, error, "
    "metric, quality, quality_low, quality_high, baseline_quality, quality_delta, "
    "quality_delta_low, quality_delta_high, quality_verdict, speedup, speedup_low, speedup_high, "
    "speed_verdict, speedup_bound, seconds_per_item, tokens_per_second, tokens_per_forward, "
    "work_ratio, memory_ratio, output_check, items, repeats"
)
SAMPLES = (
    "cell_id, item_id, repeat, position, seconds, device_seconds, cpu_seconds, prefill_seconds, "
    "output_tokens, target_forwards, draft_forwards, accepted_tokens, flops, kv_bytes, peak_bytes, "
    "energy_j, score, output_digest, output"
)


def query(index: Path, sql: str) -> list[tuple[Any, ...]]:
    with duckdb.connect(str(index), read_only=True) as connection:
        return connection.execute(sql).fetchall()


def contents(index: Path) -> dict[str, list[tuple[Any, ...]]]:
    tables = [*schema.TABLES, "comparison"]
    with duckdb.connect(str(index), read_only=True) as connection:
        return {
            table: connection.execute(f"SELECT * FROM {table} ORDER BY ALL").fetchall()
            for table in tables
        }


def test_the_public_tables_and_columns_are_there_in_their_order(tmp_path: Path) -> None:
    index = ingest(tmp_path)
    assert index == tmp_path / "tokenmark.duckdb"
    tables = {row[0] for row in query(index, "SELECT table_name FROM duckdb_tables()")}
    assert tables >= {
        "runs",
        "environments",
        "experiments",
        "cells",
        "samples",
        "metrics",
        "claims",
        "verdicts",
    }
    for table, expected in (("comparison", COMPARISON), ("samples", SAMPLES)):
        columns = ", ".join(row[0] for row in query(index, f"DESCRIBE {table}"))
        assert columns.startswith(f"{expected}, ")


def test_every_record_arrives_in_its_table(tmp_path: Path) -> None:
    store = make_store(tmp_path, repeats=2)
    index = ingest(tmp_path)
    counts = {table: len(rows) for table, rows in contents(index).items()}
    assert counts == {
        "index_info": 1,
        "runs": 1,
        "run_cells": 2,
        "environments": 1,
        "experiments": 1,
        "cells": 2,
        "samples": 32,
        "scores": 16,
        "metrics": 2,
        "verdicts": 2,
        "interactions": 0,
        "claims": 0,
        "claim_verdicts": 0,
        "corpus": 0,
        "rescores": 0,
        "scorer_metrics": 0,
        "comparison": 2,
    }
    sample = next(store.samples(ID))
    (row,) = query(
        index,
        f"SELECT seconds, output, decode_tokens, bound_seconds, score FROM samples WHERE cell_id = "
        f"'{sample.cell_id}' AND item_id = '{sample.item_id}' AND repeat = {sample.repeat}",
    )
    score = next(
        score.value
        for score in store.scores(ID)
        if (score.cell_id, score.item_id) == (sample.cell_id, sample.item_id)
    )
    assert row == (
        sample.seconds,
        sample.output,
        sample.decode_tokens,
        sample.bound_seconds,
        score,
    )


def test_a_cell_that_failed_appears_with_its_reason_and_without_numbers(tmp_path: Path) -> None:
    store = Store(tmp_path)
    experiment = make_experiment()
    write_shard(
        store,
        experiment,
        [
            make_cell(experiment, "plain"),
            make_cell(experiment, "fast", status="timeout", error="60 s", output_check=None),
        ],
        make_samples(experiment, {"plain": 1.0, "fast": 2.0}),
    )
    rows = query(ingest(tmp_path), f"SELECT {COMPARISON} FROM comparison ORDER BY role")
    names = COMPARISON.split(", ")
    found = dict(zip(names, rows[1], strict=True))
    assert (found["method"], found["status"], found["error"]) == ("fast", "timeout", "60 s")
    numbers = names[names.index("quality") :]
    assert {name: found[name] for name in numbers} == dict.fromkeys(numbers)


def test_a_shard_is_read_again_only_when_it_grew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = Store.sample_table

    def counted(store: Store, experiment_id: str) -> Any:
        read.append(experiment_id)
        return original(store, experiment_id)

    monkeypatch.setattr(Store, "sample_table", counted)
    store = make_store(tmp_path)
    growing = make_experiment(experiment_id="growing")
    write_shard(store, growing, [], [make_sample()], seal=False)
    index = ingest(tmp_path)
    ingest(tmp_path)
    assert read == [ID, "growing"]
    with store.samples_journal("growing") as journal:
        journal.append(make_sample(item_id="item-1"))
    ingest(tmp_path)
    assert read == [ID, "growing", "growing"]
    assert query(index, "SELECT count(*) FROM samples WHERE experiment_id = 'growing'") == [(2,)]
    store.seal("growing")
    ingest(tmp_path)
    ingest(tmp_path)
    assert read == [ID, "growing", "growing", "growing"]
    assert query(index, "SELECT count(*) FROM samples") == [(18,)]
    store.discard(ID)
    ingest(tmp_path)
    assert query(index, "SELECT DISTINCT experiment_id FROM samples") == [("growing",)]


def test_what_was_measured_before_a_kill_is_in_the_index(tmp_path: Path) -> None:
    store = make_store(tmp_path, seal=False)
    (store.shard(ID) / "cells" / "cell-fast.json").unlink()
    path = store.shard(ID) / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    store.write_run(make_run([store.experiment(ID)], status="interrupted", finished=""))
    index = ingest(tmp_path)
    assert query(index, "SELECT count(*) FROM samples") == [(15,)]
    assert query(index, "SELECT method, speedup FROM comparison") == [("plain", 1.0)]
    assert query(index, "SELECT status FROM runs") == [("interrupted",)]


def test_ingesting_step_by_step_gives_what_rebuilding_gives(tmp_path: Path) -> None:
    claims = [{"id": "T-1", "method": "fast", "number": 2.0, "value": "2x", "where": "Table 1"}]
    for number in range(3):
        store = make_store(
            tmp_path,
            experiment_id=f"experiment-{number}",
            seed=number,
            environment={"cores": number // 2, "load": float("nan")},
        )
        if number == 1:
            store.write_run(make_run([], run_id="run-2", status="running"))
        index = ingest(tmp_path, claims)
    step_by_step = contents(index)
    assert len(step_by_step["environments"]) == 2
    assert rebuild(tmp_path, claims) == index
    assert contents(index) == step_by_step
    rebuild(tmp_path)
    assert contents(index)["claims"] == []


def test_claims_are_replaced_only_when_given(tmp_path: Path) -> None:
    claim = {"method": "fast", "id": "T-1", "number": 2, "where": "Table 1", "year": 2024}
    index = ingest(tmp_path, [claim])
    ingest(tmp_path)
    assert query(
        index, "SELECT method, claim_id, number, stated_in, extra ->> 'year' FROM claims"
    ) == [("fast", "T-1", 2.0, "Table 1", "2024")]
    ingest(tmp_path, [])
    assert query(index, "SELECT * FROM claims") == []


def test_the_sandbox_level_becomes_a_column(tmp_path: Path) -> None:
    store = Store(tmp_path)
    experiment = make_experiment(facts={"sandbox": "landlock"})
    cells = [
        make_cell(experiment, "plain"),
        make_cell(experiment, "fast", notes={"sandbox": "bubblewrap"}),
    ]
    write_shard(store, experiment, cells, make_samples(experiment, {"plain": 1, "fast": 2}))
    assert query(ingest(tmp_path), "SELECT method, sandbox FROM comparison ORDER BY 1") == [
        ("fast", "bubblewrap"),
        ("plain", "landlock"),
    ]


@pytest.mark.parametrize("seal", [False, True])
def test_corpus_metrics_and_their_resamples_are_in_the_index(tmp_path: Path, seal: bool) -> None:
    metric = MetricRecord(name="total", unit="points", kind="corpus", higher_is_better=True)
    experiment = make_experiment(metrics=[metric])
    speeds = {"plain": 1.0, "fast": 2.0}
    corpus = [
        make_corpus(experiment, "plain", lambda drawn: float(drawn.sum())),
        # A draw whose first item is the last one has no number.
        make_corpus(experiment, "fast", lambda drawn: float(drawn.max()) if drawn[0] < 7 else nan),
    ]
    write_shard(
        Store(tmp_path),
        experiment,
        [make_cell(experiment, method) for method in speeds],
        make_samples(experiment, speeds),
        corpus=corpus,
        seal=seal,
    )
    index = ingest(tmp_path)
    assert query(
        index, "SELECT method, quality, baseline_quality, quality_delta FROM comparison ORDER BY 1"
    ) == [("fast", 7.0, 28.0, -21.0), ("plain", 28.0, None, None)]
    rows = query(index, "SELECT cell_id, metric, value, resampled FROM corpus ORDER BY 1")
    assert [row[:3] for row in rows] == [("cell-fast", "total", 7.0), ("cell-plain", "total", 28.0)]
    assert rows[1][3] == corpus[0].resampled
    np.testing.assert_array_equal(rows[0][3], corpus[1].resampled)
    before = contents(index)
    rebuild(tmp_path)
    np.testing.assert_equal(contents(index), before)


@pytest.mark.parametrize("damage", ["shard", "journal", "run"])
def test_damage_is_named_and_everything_else_is_in_the_index(tmp_path: Path, damage: str) -> None:
    store = make_store(tmp_path)
    other = make_experiment(experiment_id="other")
    write_shard(
        store, other, [], [make_sample(), make_sample(repeat=0, item_id="item-1")], seal=False
    )
    damaged = {
        "shard": store.shard(ID) / "samples.parquet",
        "journal": store.shard("other") / "samples.jsonl",
        "run": tmp_path / "runs" / "run-1.json",
    }[damage]
    content = bytearray(damaged.read_bytes())
    content[20] ^= 1
    damaged.write_bytes(content if damage != "run" else b"{")
    with pytest.raises(StoreError, match="everything else is in") as caught:
        ingest(tmp_path)
    assert str(damaged) in str(caught.value)
    index = store.index_path
    experiments = {row[0] for row in query(index, "SELECT experiment_id FROM experiments")}
    assert (
        experiments
        == {
            "shard": {"other"},
            "journal": {ID},
            "run": {ID, "other"},
        }[damage]
    )


@pytest.mark.parametrize("state", ["garbage", "older", "foreign"])
def test_an_index_that_cannot_be_continued_is_made_anew(tmp_path: Path, state: str) -> None:
    store = make_store(tmp_path)
    index = ingest(tmp_path)
    expected = contents(index)
    if state == "garbage":
        index.write_bytes(b"no database")
    else:
        index.unlink()
        with duckdb.connect(str(index)) as connection:
            connection.execute("CREATE TABLE index_info (version BIGINT)")
            if state == "older":
                connection.execute("INSERT INTO index_info VALUES (0)")
    ingest(store.path)
    assert contents(index) == expected


def test_a_killed_ingest_leaves_the_index_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path)
    index = ingest(tmp_path)
    before = contents(index)
    make_store(tmp_path, experiment_id="experiment-2")

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ingest_module, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            ingest(tmp_path)
    assert contents(index) == before
    ingest(tmp_path)
    assert len(contents(index)["experiments"]) == 2
    assert sorted(path.name for path in store.path.iterdir()) == [
        "runs",
        "shards",
        "tokenmark.duckdb",
        "tokenmark.duckdb.lock",
    ]


def test_readers_and_the_writer_do_not_wait_for_each_other(tmp_path: Path) -> None:
    make_store(tmp_path)
    index = ingest(tmp_path)
    reader = multiprocessing.get_context("fork").Process(target=hold_open, args=(str(index),))
    reader.start()
    try:
        while not (tmp_path / "reading").exists():
            reader.join(0.01)
            assert reader.exitcode is None
        make_store(tmp_path, experiment_id="experiment-2")
        ingest(tmp_path)
        assert query(index, "SELECT count(*) FROM experiments") == [(2,)]
        assert reader.is_alive()
    finally:
        reader.kill()
        reader.join()


def hold_open(index: str) -> None:
    with duckdb.connect(index, read_only=True) as connection:
        connection.execute("SELECT 1").fetchall()
        (Path(index).parent / "reading").touch()
        threading.Event().wait()


def test_a_second_writer_is_told_who_holds_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "tokenmark.duckdb.lock"
    with exclusive(lock, 0):
        with pytest.raises(StoreError) as caught:
            ingest(tmp_path, wait_seconds=0.1)
        assert f"process {os.getpid()} on {socket.gethostname()}, since 2" in str(caught.value)
    ingest(tmp_path, wait_seconds=0.1)


def test_a_writer_waits_for_the_other_one_to_finish(tmp_path: Path) -> None:
    lock = tmp_path / "tokenmark.duckdb.lock"
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    timer = threading.Timer(0.2, os.close, [descriptor])
    timer.start()
    ingest(tmp_path, wait_seconds=10)
    timer.join()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    lock = tmp_path / "tokenmark.duckdb.lock"
    process = multiprocessing.get_context("fork").Process(target=die_holding, args=(str(lock),))
    process.start()
    process.join()
    holder = json.loads(lock.read_text())
    assert holder["pid"] == process.pid
    ingest(tmp_path, wait_seconds=0)


def die_holding(lock: str) -> None:
    with exclusive(Path(lock), 0):
        os.kill(os.getpid(), 9)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        ingest(tmp_path / "file")
