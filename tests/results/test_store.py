from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from results import store as store_module
from results.records import CorpusRecord, SampleRecord
from results.store import Store, StoreError, read_journal
from tests.results.factory import (
    make_cell,
    make_experiment,
    make_run,
    make_sample,
    make_samples,
    make_scores,
    make_store,
    write_shard,
)

ID = "experiment-1"


def test_records_come_back_as_they_were_written_sealed_or_not(tmp_path: Path) -> None:
    store = Store(tmp_path)
    experiment = make_experiment()
    cells = [make_cell(experiment, method) for method in ("fast", "plain")]
    samples = make_samples(experiment, {"plain": 1.0, "fast": 2.0})
    scores = make_scores(experiment, "fast", [1.0, None, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    write_shard(store, experiment, cells, samples, scores, seal=False)
    run = make_run(
        [experiment], skipped=[{"method": "m", "task": "t", "model": "x", "reason": "r"}]
    )
    store.write_run(run)
    for is_sealed in (False, True):
        assert store.is_sealed(ID) is is_sealed
        assert store.experiment(ID) == experiment
        assert list(store.experiments()) == [experiment]
        assert list(store.cells(ID)) == cells
        assert list(store.samples(ID)) == samples
        assert list(store.scores(ID)) == scores
        assert list(store.runs()) == [run]
        store.seal(ID)
    assert not list(store.shard(ID).glob("*.jsonl"))
    assert store.damage(ID) == []


def test_nothing_is_created_by_looking(tmp_path: Path) -> None:
    store = Store(tmp_path / "none")
    assert store.experiment_ids() == []
    assert list(store.runs()) == []
    assert store.finished_cells() == {}
    assert not store.path.exists()


def test_absent_values_and_odd_floats_survive_journal_and_parquet(tmp_path: Path) -> None:
    store = Store(tmp_path)
    odd = [
        make_sample(item_id="item-0", device_seconds=math.nan, flops=math.inf, energy_j=-math.inf),
        make_sample(item_id="item-1", device_seconds=None, flops=5e-324, prefill_seconds=-0.0),
        make_sample(
            item_id="item-2", target_forwards=None, output="\ud7ff\x00\n\u2028ü", output_ids=[]
        ),
        make_sample(item_id="item-3", kv_bytes=2**53 + 1, seconds=0.1 + 0.2),
    ]
    write_shard(store, make_experiment(), [], odd, seal=False)
    before = list(store.samples(ID))
    store.seal(ID)
    for found in (before, list(store.samples(ID))):
        assert math.isnan(found[0].device_seconds)  # type: ignore[arg-type]  # a NaN, not None
        assert (found[0].flops, found[0].energy_j) == (math.inf, -math.inf)
        assert str(found[1].prefill_seconds) == "-0.0"
        assert found[1:] == odd[1:]


def corpus_of(method: str = "fast") -> CorpusRecord:
    return CorpusRecord(
        cell_id=f"cell-{method}",
        metric="spearman",
        value=0.1 + 0.2,
        resampled=[0.5, math.nan, -math.inf, 5e-324],
    )


def test_numbers_of_whole_cells_come_back_sealed_or_not(tmp_path: Path) -> None:
    store = Store(tmp_path)
    nothing = CorpusRecord(cell_id="cell-plain", metric="spearman", value=None, resampled=[])
    write_shard(store, make_experiment(), [], [], corpus=[corpus_of(), nothing], seal=False)
    before = store.content_sha256(ID)
    with store.corpus_journal(ID) as journal:
        journal.append(dataclasses.replace(corpus_of(), value=9.0))  # the first one counts
    assert store.content_sha256(ID) != before
    for is_sealed in (False, True):
        assert store.is_sealed(ID) is is_sealed
        first, second = store.corpus(ID)
        assert repr(first) == repr(corpus_of())  # NaN is not equal to itself
        assert second == nothing
        store.seal(ID)
    assert store.manifest(ID)["duplicates"] == [["corpus", "cell-fast", "spearman"]]
    assert "corpus.parquet" in store.manifest(ID)["files"]
    assert not (store.shard(ID) / "corpus.jsonl").exists()
    assert store.damage(ID) == []
    (store.shard(ID) / "corpus.parquet").unlink()
    assert store.damage(ID) == [f"{store.shard(ID) / 'corpus.parquet'}: is missing."]
    with pytest.raises(StoreError, match=r"corpus\.parquet: cannot be read"):
        list(store.corpus(ID))


def test_a_shard_without_numbers_of_whole_cells_has_no_file_for_them(tmp_path: Path) -> None:
    store = make_store(tmp_path)  # as all shards from before there were any
    assert not (store.shard(ID) / "corpus.parquet").exists()
    assert list(store.corpus(ID)) == []
    assert store.corpus_table(ID).schema.names == ["cell_id", "metric", "value", "resampled"]


def test_a_number_of_a_whole_cell_cut_short_is_left_out(tmp_path: Path) -> None:
    store = Store(tmp_path)
    corpus = [corpus_of("plain"), corpus_of("fast")]
    write_shard(store, make_experiment(), [], [], corpus=corpus, seal=False)
    path = store.shard(ID) / "corpus.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert [each.cell_id for each in store.corpus(ID)] == ["cell-plain"]
    with store.corpus_journal(ID) as journal:
        journal.append(corpus[1])
    assert [each.cell_id for each in store.corpus(ID)] == ["cell-plain", "cell-fast"]


def test_a_last_line_cut_at_any_byte_is_left_out_and_written_anew(tmp_path: Path) -> None:
    store = Store(tmp_path)
    samples = [make_sample(item_id=f"item-{number}") for number in range(3)]
    write_shard(store, make_experiment(), [], samples, seal=False)
    path = store.shard(ID) / "samples.jsonl"
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for length in [*range(start, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert list(store.samples(ID)) == samples[:2]
        with store.samples_journal(ID) as journal:
            journal.append(samples[2])
        assert path.read_bytes() == whole


@given(
    position=st.integers(min_value=0),
    value=st.integers(1, 255),
    data=st.lists(st.text(), max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_no_changed_byte_of_a_journal_goes_unnoticed(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, data: list[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.jsonl"
    path.unlink(missing_ok=True)
    rows = [make_sample(item_id=str(place), output=text) for place, text in enumerate(["a", *data])]
    with store_module.Journal(path, "samples") as journal:
        for row in rows:
            journal.append(row)
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= value
    path.write_bytes(content)
    if content.endswith(b"\n"):
        with pytest.raises(StoreError, match="checksum"):
            read_journal(path, "samples")
    else:  # without its line end, the last line counts as torn
        found = read_journal(path, "samples")
        assert found.is_torn
        assert [SampleRecord(**row) for row in found.rows] == rows[:-1]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    store = make_store(tmp_path, seal=False)
    path = store.shard(ID) / "samples.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[1].replace(b"1", b"2", 1), *lines[2:]]))
    for act in (store.samples_journal, store.seal, lambda id: list(store.samples(id))):
        with pytest.raises(StoreError, match=r"samples\.jsonl: line 2 does not match its checksum"):
            act(ID)


def test_the_first_of_two_equal_samples_counts_and_the_other_is_reported(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, second = make_sample(seconds=1.0), make_sample(seconds=2.0)
    write_shard(store, make_experiment(), [], [first, second], seal=False)
    assert list(store.samples(ID)) == [first]
    report = store.seal(ID)
    assert report == (1, 0, [("samples", "cell-plain", "item-0", 0)])
    assert list(store.samples(ID)) == [first]
    assert store.seal(ID) == report


class Crash(BaseException):
    """Stands for a kill: nothing catches it."""


def crash_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let that many effects on the disk happen, and none after them."""
    left = [steps]

    def counted(function: Any) -> Any:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            if left[0] == 0:
                raise Crash
            left[0] -= 1
            return function(*arguments, **options)

        return wrapper

    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    monkeypatch.setattr(Path, "write_text", counted(Path.write_text))
    monkeypatch.setattr(pq, "write_table", counted(pq.write_table))
    monkeypatch.setattr(os, "fsync", counted(os.fsync))


def test_sealing_may_be_killed_between_any_two_steps(tmp_path: Path) -> None:
    template = make_store(tmp_path / "template", seal=False)
    undisturbed = make_store(tmp_path / "undisturbed")
    manifest = undisturbed.manifest(ID)
    samples = list(undisturbed.samples(ID))
    for steps in range(100):
        store = Store(Path(shutil.copytree(template.path, tmp_path / f"killed-{steps}")))
        with pytest.MonkeyPatch.context() as patch:
            crash_after(patch, steps)
            try:
                store.seal(ID)
                is_done = True
            except Crash:
                is_done = False
        assert list(store.samples(ID)) == samples
        assert len(list(store.scores(ID))) == 16
        store.seal(ID)
        assert store.damage(ID) == []
        # Parquet files name no time and no place, so even their hashes are those of an
        # undisturbed sealing.
        assert store.manifest(ID) == manifest
        names = {path.name for path in store.shard(ID).iterdir()}
        assert names == {
            "experiment.json",
            "cells",
            "samples.parquet",
            "scores.parquet",
            "manifest.json",
        }
        if is_done:
            break
    assert steps > 10


def write_forever(path: str) -> None:
    """Append samples until killed; run in a process of its own."""
    store = Store(Path(path))
    with store.samples_journal(ID) as journal:
        for number in range(10**9):
            journal.append(make_sample(item_id="item-0", repeat=number, output="x" * 5000))


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.05])
def test_a_killed_writer_loses_at_most_the_line_in_flight(tmp_path: Path, delay: float) -> None:
    store = Store(tmp_path)
    store.write_experiment(make_experiment(repeats=10**9))
    process = multiprocessing.get_context("fork").Process(
        target=write_forever, args=(str(tmp_path),)
    )
    process.start()
    path = store.shard(ID) / "samples.jsonl"
    while not path.exists() or path.stat().st_size < 20_000:
        process.join(0.002)
        assert process.exitcode is None
    process.join(delay)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    found = list(store.samples(ID))
    assert [sample.repeat for sample in found] == list(range(len(found)))
    with store.samples_journal(ID) as journal:
        journal.append(make_sample(repeat=10**6))
    assert len(list(store.samples(ID))) == len(found) + 1


def test_a_sealed_shard_takes_nothing_more(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    experiment = store.experiment(ID)
    for act in (
        lambda: store.samples_journal(ID),
        lambda: store.scores_journal(ID),
        lambda: store.write_experiment(experiment),
        lambda: store.write_cell(make_cell(experiment, "fast")),
    ):
        with pytest.raises(StoreError, match="is sealed"):
            act()


def test_a_discarded_shard_can_be_measured_anew(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.discard(ID)
    assert store.experiment_ids() == []
    assert list((tmp_path / "shards").iterdir()) == []
    make_store(tmp_path)
    assert store.experiment_ids() == [ID]


def test_an_experiment_is_not_resumed_with_other_cells(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_experiment(make_experiment(run_id="run-1"))
    store.write_experiment(make_experiment(run_id="run-2"))
    with pytest.raises(StoreError, match="begun with other cells"):
        store.write_experiment(make_experiment(("plain", "other")))


def test_a_sample_of_the_wrong_type_is_refused_before_it_is_written(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_experiment(make_experiment())
    with store.samples_journal(ID) as journal:
        for wrong in ({"seconds": "1"}, {"output_tokens": 1.5}, {"repeat": True}, {"output": None}):
            with pytest.raises(TypeError, match=next(iter(wrong))):
                journal.append(dataclasses.replace(make_sample(), **wrong))
        with pytest.raises(UnicodeEncodeError):
            journal.append(make_sample(output="\ud800"))
        with pytest.raises(TypeError, match="expected a SampleRecord"):
            journal.append(make_scores(make_experiment(items=1), "plain", [1.0])[0])
    assert list(store.samples(ID)) == []


def test_a_full_disk_leaves_the_journal_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path, seal=False)
    path = store.shard(ID) / "samples.jsonl"
    before = path.read_bytes()
    write = os.write

    def half(descriptor: int, data: bytes) -> int:
        if len(data) > 20:
            return write(descriptor, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with store.samples_journal(ID) as journal:
        monkeypatch.setattr(os, "write", half)
        with pytest.raises(StoreError, match="No space left on device"):
            journal.append(make_sample(item_id="item-7", repeat=5))
        monkeypatch.undo()
        assert path.read_bytes() == before
        journal.append(make_sample(item_id="item-7", repeat=5))
    assert len(list(store.samples(ID))) == 17


def test_finished_cells_come_from_the_newest_experiment(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name, created, status in (
        ("old", "2025-01-01", "ok"),
        ("new", "2025-02-01", "ok"),
        ("newest", "2025-03-01", "failed"),
    ):
        experiment = make_experiment(experiment_id=name, created=created)
        cells = [make_cell(experiment, "plain", status=status)]
        if name == "old":
            cells.append(make_cell(experiment, "fast", status="unsupported"))
        write_shard(store, experiment, cells, [], seal=name == "old")
    assert store.finished_cells() == {"cell-plain": "new"}
    assert store.finished_cells(("ok", "unsupported")) == {
        "cell-plain": "new",
        "cell-fast": "old",
    }
    (store.shard("new") / "experiment.json").write_text("{")
    assert store.finished_cells() == {"cell-plain": "old"}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("experiment.json", lambda data: data | {"schema": 0}, r"schema 0, this version reads 1"),
        ("experiment.json", lambda data: data | {"schema": 9}, r"Update tokenmark"),
        ("experiment.json", lambda data: data | {"novel": 1}, r"unknown \['novel'\]"),
        (
            "experiment.json",
            lambda data: data | {"experiment_id": "x"},
            r"describes experiment 'x'",
        ),
        ("experiment.json", lambda data: data | {"items": 3}, r"items must be list"),
        ("experiment.json", lambda data: data | {"metrics": [1]}, r"is no metric"),
        ("experiment.json", lambda data: [data], r"holds no JSON object"),
        (
            "cells/cell-fast.json",
            lambda data: {key: value for key, value in data.items() if key != "method"},
            r"missing \['method'\]",
        ),
        (
            "cells/cell-fast.json",
            lambda data: data | {"status": "fine"},
            r"status 'fine' is none of",
        ),
        ("cells/cell-fast.json", lambda data: data | {"cell_id": "x"}, r"describes cell 'x'"),
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(
    tmp_path: Path, name: str, change: Any, message: str
) -> None:
    store = make_store(tmp_path, seal=False)
    path = store.shard(ID) / name
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(StoreError, match=message) as caught:
        (store.experiment(ID), list(store.cells(ID)))
    assert str(path) in str(caught.value)


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    shard = store.shard(ID)
    (shard / "samples.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(StoreError, match=r"samples\.parquet: cannot be read"):
        list(store.samples(ID))
    (shard / "scores.parquet").unlink()
    with pytest.raises(StoreError, match=r"scores\.parquet: cannot be read"):
        list(store.scores(ID))
    (shard / "manifest.json").write_text("{}")
    with pytest.raises(StoreError, match=r"manifest\.json: was written with schema None"):
        store.damage(ID)
    with pytest.raises(StoreError, match=r"experiment\.json: is missing"):
        store.samples_journal("experiment-2")
    with pytest.raises(StoreError, match=r"nothing\.json: is missing"):
        store.run("nothing")


def test_parquet_of_another_version_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    path = store.shard(ID) / "samples.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["flops"]), path)
    with pytest.raises(StoreError, match="written by another version"):
        list(store.samples(ID))


@pytest.mark.parametrize("missing", [["prefill_flops"], ["evidence_kept", "prefill_flops"]])
def test_a_column_that_came_later_is_empty_in_an_older_shard(
    tmp_path: Path, missing: list[str]
) -> None:
    store = make_store(tmp_path)
    path = store.shard(ID) / "samples.parquet"
    before = list(store.samples(ID))
    pq.write_table(pq.read_table(path).drop_columns(missing), path)
    assert list(store.samples(ID)) == before


def test_every_byte_of_a_sealed_shard_is_watched(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    shard = store.shard(ID)
    for name in store.manifest(ID)["files"]:
        path = shard / name
        content = path.read_bytes()
        changed = bytearray(content)
        changed[len(changed) // 2] ^= 1
        path.write_bytes(changed)
        (problem,) = store.damage(ID)
        assert problem.startswith(f"{path}: changed since it was sealed")
        path.unlink()
        assert store.damage(ID) == [f"{path}: is missing."]
        path.write_bytes(content)
    (shard / "cells" / "extra.json").write_text("{}")
    assert store.damage(ID) == [f"{shard / 'cells' / 'extra.json'}: is not in the manifest."]


def test_output_files_beside_the_samples_are_sealed_too(tmp_path: Path) -> None:
    store = make_store(tmp_path, seal=False)
    image = store.shard(ID) / "outputs" / "item-0.png"
    image.parent.mkdir()
    image.write_bytes(b"pixels")
    store.seal(ID)
    assert "outputs/item-0.png" in store.manifest(ID)["files"]


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".hidden"])
def test_an_id_cannot_leave_the_store(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="plain file name"):
        Store(tmp_path).shard(name)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "shards").write_text("a file where a folder belongs")
    with pytest.raises(StoreError, match="cannot be created"):
        Store(tmp_path).write_experiment(make_experiment())
