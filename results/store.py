"""The store: what runs leave behind, kept so that a kill at any moment loses one line at most.

While an experiment runs, samples and scores are appended to journals, a checksum in front of each
record. Once it has ended, `Store.seal` turns the journals into Parquet and writes a manifest with
the SHA-256 of every file. **The manifest decides**: without it the journals are the truth and
Parquet files beside them are leftovers of an interrupted sealing; with it the Parquet files are the
truth and journals are leftovers. `results.records` shows the layout.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import types
import typing
import zlib
from collections.abc import Collection, Hashable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from results.records import (
    SCHEMA_VERSION,
    CellRecord,
    CorpusRecord,
    ExperimentRecord,
    MetricRecord,
    RunRecord,
    SampleRecord,
    ScoreRecord,
    Status,
)

Record = TypeVar("Record", ExperimentRecord, CellRecord, RunRecord)

SAMPLES = "samples"
SCORES = "scores"
CORPUS = "corpus"
KINDS = (SAMPLES, SCORES, CORPUS)
# Shards without any such line have no such file, as those from before there were any.
_OPTIONAL = (CORPUS,)
MANIFEST = "manifest.json"

# What makes two lines the same measurement; the first one counts.
_KEYS: dict[str, tuple[str, ...]] = {
    SAMPLES: ("cell_id", "item_id", "repeat"),
    SCORES: ("cell_id", "item_id", "metric"),
    CORPUS: ("cell_id", "metric"),
}
_LINE_CLASSES: dict[str, type] = {
    SAMPLES: SampleRecord,
    SCORES: ScoreRecord,
    CORPUS: CorpusRecord,
}
_ARROW_TYPES: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    list[int]: pa.list_(pa.int64()),
    list[float]: pa.list_(pa.float64()),
}
_LINE_HEAD = b'{"crc32":"%08x","record":'
_HEAD_BYTES = len(_LINE_HEAD % 0)


class StoreError(Exception):
    """Something in a store cannot be read or written; names the file and what to do."""


class JournalContent(NamedTuple):
    """What a journal holds.

    Attributes:
        rows: Records as dictionaries, in order of writing, each key once.
        duplicates: Keys that came again; their first record is the one in `rows`.
        valid_bytes: Length of the journal without a torn last line.
        is_torn: Whether a last line cut short by a kill was left out.
    """

    rows: list[dict[str, Any]]
    duplicates: list[tuple[Any, ...]]
    valid_bytes: int
    is_torn: bool


class SealReport(NamedTuple):
    """What sealing found.

    Attributes:
        samples, scores: Rows kept.
        duplicates: Keys that a journal held more than once, as (journal, cell, item, repeat or
            metric); the first record of each was kept.
    """

    samples: int
    scores: int
    duplicates: list[tuple[Any, ...]]


class Journal:
    """An append-only file of records; a line is on the disk when `append` returns.

    A torn last line is cut off when the journal is opened.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self.kind = kind
        is_new = not path.exists()
        content = read_journal(path, kind)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        if content.is_torn:
            os.ftruncate(self._descriptor, content.valid_bytes)
            os.fsync(self._descriptor)
        if is_new:
            _sync_folder(path.parent)

    def append(self, record: SampleRecord | ScoreRecord | CorpusRecord) -> None:
        """Write one record and wait until it is on the disk.

        Raises:
            TypeError: The record is of another kind, or a field has the wrong type.
            UnicodeEncodeError: A text holds half a surrogate pair, which no file format takes.
            StoreError: The disk is full or cannot be written; the journal is as it was before.
        """
        _check_types(record, _LINE_CLASSES[self.kind])
        line = _encode_line(vars(record))
        before = os.fstat(self._descriptor).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, before)
            raise StoreError(
                f"{self.path}: cannot append a record: {error.strerror}. Everything before it is "
                "kept; make room or fix the permissions, and run again to go on from there."
            ) from error

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass(frozen=True)
class Store:
    """A folder of shards and runs. Nothing is created before something is written.

    Attributes:
        path: The folder; `results/store` by default on the command line.
    """

    path: Path

    @property
    def index_path(self) -> Path:
        """Where the index of this store lies."""
        return self.path / "tokenmark.duckdb"

    def shard(self, experiment_id: str) -> Path:
        """Return the folder of an experiment, which need not exist.

        Raises:
            ValueError: The id could name a place outside the store.
        """
        return self.path / "shards" / _checked_name(experiment_id)

    # Writing

    def write_experiment(self, record: ExperimentRecord) -> None:
        """Begin an experiment: create its shard and write `experiment.json`.

        Writing the same experiment again is fine and is how a run resumes.

        Raises:
            StoreError: The shard is sealed, or holds another experiment under this id.
        """
        self._refuse_sealed(record.experiment_id)
        shard = self.shard(record.experiment_id)
        path = shard / "experiment.json"
        if path.exists():
            before = self.experiment(record.experiment_id)
            changed = [
                field.name
                for field in dataclasses.fields(before)
                if field.name in ("items", "groups", "repeats", "baseline", "cells", "metrics")
                and getattr(before, field.name) != getattr(record, field.name)
            ]
            if changed:
                raise StoreError(
                    f"{path}: this experiment has been begun with other {', '.join(changed)}. "
                    "Discard the shard to measure it anew."
                )
        _make_folder(shard / "cells")
        _write_json(path, dataclasses.asdict(record))

    def write_cell(self, record: CellRecord) -> None:
        """Write how a cell ended; a later record of the same cell replaces it."""
        self._refuse_sealed(record.experiment_id)
        path = self.shard(record.experiment_id) / "cells" / f"{_checked_name(record.cell_id)}.json"
        _write_json(path, dataclasses.asdict(record))

    def write_run(self, record: RunRecord) -> None:
        """Write a run; a later record of the same run replaces it."""
        path = self.path / "runs" / f"{_checked_name(record.run_id)}.json"
        _make_folder(path.parent)
        _write_json(path, dataclasses.asdict(record))

    def samples_journal(self, experiment_id: str) -> Journal:
        """Open the journal of samples for appending."""
        return self._journal(experiment_id, SAMPLES)

    def scores_journal(self, experiment_id: str) -> Journal:
        """Open the journal of scores for appending."""
        return self._journal(experiment_id, SCORES)

    def corpus_journal(self, experiment_id: str) -> Journal:
        """Open the journal of numbers of whole cells for appending."""
        return self._journal(experiment_id, CORPUS)

    def seal(self, experiment_id: str) -> SealReport:
        """Turn the journals into Parquet, write the manifest, remove the journals.

        May be killed at any moment and called again; sealing a sealed shard only clears leftovers.

        Raises:
            StoreError: A journal is damaged, or the shard was never begun.
        """
        shard = self.shard(experiment_id)
        self.experiment(experiment_id)  # raises for a shard that was never begun
        if not self.is_sealed(experiment_id):
            duplicates: list[tuple[Any, ...]] = []
            for kind in KINDS:
                content = read_journal(shard / f"{kind}.jsonl", kind)
                duplicates += [(kind, *key) for key in content.duplicates]
                if content.rows or kind not in _OPTIONAL:
                    _write_parquet(shard / f"{kind}.parquet", _to_table(content.rows, kind))
            files = {name: _fingerprint(shard / name) for name in shard_files(shard)}
            _write_json(
                shard / MANIFEST,
                {
                    "schema": SCHEMA_VERSION,
                    "experiment_id": experiment_id,
                    "duplicates": [list(key) for key in duplicates],
                    "files": files,
                },
            )
        for leftover in _leftovers(shard):
            leftover.unlink()
        _sync_folder(shard)
        return SealReport(
            samples=_parquet_rows(shard / f"{SAMPLES}.parquet"),
            scores=_parquet_rows(shard / f"{SCORES}.parquet"),
            duplicates=[tuple(key) for key in self.manifest(experiment_id)["duplicates"]],
        )

    def discard(self, experiment_id: str) -> None:
        """Remove a shard, sealed or not; a kill leaves it whole or out of sight."""
        shard = self.shard(experiment_id)
        doomed = shard.with_name(f".{shard.name}.discarded-{os.getpid()}")
        shard.rename(doomed)
        _sync_folder(shard.parent)
        shutil.rmtree(doomed)

    # Reading

    def experiment_ids(self) -> list[str]:
        """Return the ids of all experiments that were begun, sorted."""
        shards = self.path / "shards"
        if not shards.is_dir():
            return []
        return sorted(
            folder.name
            for folder in shards.iterdir()
            if not folder.name.startswith(".") and (folder / "experiment.json").exists()
        )

    def is_sealed(self, experiment_id: str) -> bool:
        """Return whether the shard has a manifest and never changes again."""
        return (self.shard(experiment_id) / MANIFEST).exists()

    def manifest(self, experiment_id: str) -> dict[str, Any]:
        """Return the manifest of a sealed shard."""
        path = self.shard(experiment_id) / MANIFEST
        manifest = _read_json(path, "Restore it, or discard the shard.")
        _check_schema(path, manifest)
        if not isinstance(manifest.get("files"), dict) or "duplicates" not in manifest:
            raise StoreError(f"{path}: is no manifest. Restore it, or discard the shard.")
        return manifest

    def experiment(self, experiment_id: str) -> ExperimentRecord:
        """Return the description of an experiment."""
        path = self.shard(experiment_id) / "experiment.json"
        data = _read_json(path, "Restore it, or discard the shard and measure again.")
        metrics = data.get("metrics")
        if isinstance(metrics, list):
            data["metrics"] = [_metric(path, metric) for metric in metrics]
        record = _to_record(path, ExperimentRecord, data)
        if record.experiment_id != experiment_id:
            raise StoreError(
                f"{path}: describes experiment {record.experiment_id!r}, but lies in the shard of "
                f"{experiment_id!r}. A shard's folder is not to be renamed."
            )
        return record

    def experiments(self) -> Iterator[ExperimentRecord]:
        """Yield every experiment, by id."""
        for experiment_id in self.experiment_ids():
            yield self.experiment(experiment_id)

    def cells(self, experiment_id: str) -> Iterator[CellRecord]:
        """Yield the cells of an experiment that have ended, by id."""
        for path in sorted((self.shard(experiment_id) / "cells").glob("*.json")):
            if path.name.startswith("."):
                continue
            data = _read_json(path, "Remove it to measure this cell again.")
            record = _to_record(path, CellRecord, data)
            if record.cell_id != path.stem or record.experiment_id != experiment_id:
                raise StoreError(
                    f"{path}: describes cell {record.cell_id!r} of experiment "
                    f"{record.experiment_id!r}. Remove it to measure the cell again."
                )
            if record.status not in typing.get_args(Status):
                raise StoreError(
                    f"{path}: status {record.status!r} is none of "
                    f"{', '.join(typing.get_args(Status))}. Remove it to measure the cell again."
                )
            yield record

    def samples(self, experiment_id: str) -> Iterator[SampleRecord]:
        """Yield the samples of an experiment, sealed or not, each (cell, item, repeat) once."""
        for row in self.sample_table(experiment_id).to_pylist():
            yield SampleRecord(**row)

    def scores(self, experiment_id: str) -> Iterator[ScoreRecord]:
        """Yield the scores of an experiment, sealed or not, each (cell, item, metric) once."""
        for row in self.score_table(experiment_id).to_pylist():
            yield ScoreRecord(**row)

    def corpus(self, experiment_id: str) -> Iterator[CorpusRecord]:
        """Yield the numbers of whole cells, sealed or not, each (cell, metric) once."""
        for row in self.corpus_table(experiment_id).to_pylist():
            yield CorpusRecord(**row)

    def sample_table(self, experiment_id: str) -> pa.Table:
        """Return the samples as an Arrow table with the fields of `SampleRecord` as columns."""
        return self._table(experiment_id, SAMPLES)

    def num_samples(self, experiment_id: str) -> int:
        """Return how many samples there are, 0 of an experiment that was never begun."""
        if not (self.shard(experiment_id) / "experiment.json").exists():
            return 0
        return len(self.sample_table(experiment_id))

    def score_table(self, experiment_id: str) -> pa.Table:
        """Return the scores as an Arrow table with the fields of `ScoreRecord` as columns."""
        return self._table(experiment_id, SCORES)

    def corpus_table(self, experiment_id: str) -> pa.Table:
        """Return numbers of whole cells as an Arrow table with the fields of `CorpusRecord`."""
        return self._table(experiment_id, CORPUS)

    def run_ids(self) -> list[str]:
        """Return the ids of all runs, sorted."""
        folder = self.path / "runs"
        if not folder.is_dir():
            return []
        return sorted(path.stem for path in folder.glob("*.json") if not path.name.startswith("."))

    def runs(self) -> Iterator[RunRecord]:
        """Yield every run, by id."""
        for run_id in self.run_ids():
            yield self.run(run_id)

    def run(self, run_id: str) -> RunRecord:
        """Return one run."""
        path = self.path / "runs" / f"{_checked_name(run_id)}.json"
        return _to_record(
            path,
            RunRecord,
            _read_json(path, "Remove it: measurements lie in the shards and are not lost."),
        )

    def finished_cells(self, statuses: Collection[str] = ("ok",)) -> dict[str, str]:
        """Return the experiment of every cell that ended with one of the statuses.

        A cell that was measured in several experiments is found in that of the newest run, whose
        start the planner's clock gave: machines that measure for it may have other ideas of time.
        Damaged files are passed over here: such a cell is simply not finished.
        """
        started = {}
        for run_id in self.run_ids():
            with suppress(StoreError):
                started[run_id] = self.run(run_id).started
        newest: dict[str, tuple[str, str, str]] = {}
        for experiment_id in self.experiment_ids():
            try:
                experiment = self.experiment(experiment_id)
                cells = list(self.cells(experiment_id))
            except StoreError:
                continue
            for cell in cells:
                created = experiment.created
                candidate = (started.get(experiment.run_id, created), created, experiment_id)
                if cell.status in statuses and candidate > newest.get(cell.cell_id, ("", "", "")):
                    newest[cell.cell_id] = candidate
        return {cell_id: experiment_id for cell_id, (*_, experiment_id) in newest.items()}

    def content_sha256(self, experiment_id: str) -> str:
        """Return a hash that changes with the shard: of its manifest, or of all that may grow."""
        shard = self.shard(experiment_id)
        if self.is_sealed(experiment_id):
            return str(_fingerprint(shard / MANIFEST)["sha256"])
        names = ["experiment.json", *(f"{kind}.jsonl" for kind in KINDS)]
        names += [f"cells/{path.name}" for path in sorted((shard / "cells").glob("[!.]*.json"))]
        digest = hashlib.sha256()
        for name in names:
            if (shard / name).exists():
                digest.update(f"{name} {_fingerprint(shard / name)['sha256']} ".encode())
        return digest.hexdigest()

    def damage(self, experiment_id: str) -> list[str]:
        """Compare a sealed shard with its manifest; return a sentence for each difference."""
        shard = self.shard(experiment_id)
        expected: dict[str, dict[str, Any]] = self.manifest(experiment_id)["files"]
        present = set(shard_files(shard))
        problems = [f"{shard / name}: is missing." for name in sorted(expected.keys() - present)]
        problems += [
            f"{shard / name}: is not in the manifest." for name in sorted(present - expected.keys())
        ]
        for name in sorted(expected.keys() & present):
            found = _fingerprint(shard / name)
            if found != expected[name]:
                problems.append(
                    f"{shard / name}: changed since it was sealed: {found['bytes']} bytes with "
                    f"SHA-256 {found['sha256'][:12]}…, the manifest says "
                    f"{expected[name].get('bytes')} and {str(expected[name].get('sha256'))[:12]}…"
                )
        return problems

    def _table(self, experiment_id: str, kind: str) -> pa.Table:
        shard = self.shard(experiment_id)
        if not self.is_sealed(experiment_id):
            path = shard / f"{kind}.jsonl"
            # A reader may meet a shard between the manifest and the removal of its journals.
            rows = read_journal(path, kind).rows
            if rows or not self.is_sealed(experiment_id):
                return _to_table(rows, kind)
        path = shard / f"{kind}.parquet"
        if kind in _OPTIONAL and path.name not in self.manifest(experiment_id)["files"]:
            return _to_table([], kind)
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            raise StoreError(
                f"{path}: cannot be read: {error}. Restore it from a copy, or discard the shard "
                "and measure again."
            ) from error
        expected = arrow_schema(kind)
        # What was added to the records later is empty in older shards.
        added = [
            field for field in dataclasses.fields(_LINE_CLASSES[kind]) if field.default is None
        ]
        for field in added:
            if field.name not in table.schema.names:
                column = expected.field(field.name)
                table = table.append_column(column, pa.nulls(len(table), column.type))
        if not table.schema.equals(expected):
            raise StoreError(
                f"{path}: has the columns {table.schema.names}, expected {expected.names}: it was "
                "written by another version. Discard the shard and measure again."
            )
        return table

    def _journal(self, experiment_id: str, kind: str) -> Journal:
        self._refuse_sealed(experiment_id)
        self.experiment(experiment_id)  # raises for a shard that was never begun
        return Journal(self.shard(experiment_id) / f"{kind}.jsonl", kind)

    def _refuse_sealed(self, experiment_id: str) -> None:
        if self.is_sealed(experiment_id):
            raise StoreError(
                f"{self.shard(experiment_id)}: is sealed and never changes again. "
                "Discard the shard to measure the experiment anew."
            )


def shard_files(shard: Path) -> list[str]:
    """Return the files of a shard that a manifest covers, relative and sorted."""
    leftovers = set(_leftovers(shard))
    return sorted(
        path.relative_to(shard).as_posix()
        for path in shard.rglob("*")
        if path.is_file() and path not in leftovers and path != shard / MANIFEST
    )


def arrow_schema(kind: str) -> pa.Schema:
    """Return the columns of one of `KINDS` as they stand in Parquet."""
    return pa.schema(
        [
            pa.field(name, _ARROW_TYPES[base], nullable=nullable)
            for name, (base, nullable) in _field_types(_LINE_CLASSES[kind]).items()
        ]
    )


def read_journal(path: Path, kind: str) -> JournalContent:
    """Read a journal, which may be missing (then it is empty) or be growing.

    A last line without its line end was cut short by a kill and is left out. Any other line that
    does not match its checksum is damage.

    Raises:
        StoreError: A line is damaged, or holds other fields than this version writes.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = b""
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}.") from error
    complete, _, torn = data.rpartition(b"\n")
    fields = _field_types(_LINE_CLASSES[kind]).keys()
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    duplicates = []
    for number, line in enumerate(complete.split(b"\n") if complete else [], start=1):
        row = _decode_line(line)
        if row is None:
            raise StoreError(
                f"{path}: line {number} does not match its checksum. Delete that line to lose one "
                "record, which is then measured again, or discard the shard."
            )
        if row.keys() != fields:
            raise StoreError(
                f"{path}: line {number} has the fields {sorted(row)}, expected {sorted(fields)}: "
                "it was written by another version. Discard the shard and measure again."
            )
        key = tuple(row[name] for name in _KEYS[kind])
        if key in rows:
            duplicates.append(key)
        else:
            rows[key] = row
    return JournalContent(list(rows.values()), duplicates, len(data) - len(torn), bool(torn))


def _encode_line(row: Mapping[str, Any]) -> bytes:
    """Return `row` as one line, the CRC-32 of its JSON text in front."""
    body = json.dumps(row, separators=(",", ":"), ensure_ascii=False).encode()
    return _LINE_HEAD % zlib.crc32(body) + body + b"}\n"


def _decode_line(line: bytes) -> dict[str, Any] | None:
    """Return the row of a line without its line end; None if it is damaged."""
    body = line[_HEAD_BYTES:-1]
    if line != _LINE_HEAD % zlib.crc32(body) + body + b"}":
        return None
    try:
        row = json.loads(body)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


@cache
def _field_types(record_class: Hashable) -> dict[str, tuple[Any, bool]]:
    """Return the type of each field, with that of a list's elements, and whether it may be None."""
    kinds = {}
    for name, hint in typing.get_type_hints(record_class).items():
        is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
        options = typing.get_args(hint) if is_union else (hint,)
        base = next(option for option in options if option is not type(None))
        kinds[name] = (
            str if typing.get_origin(base) is typing.Literal else base,
            len(options) > 1,
        )
    return kinds


def _check_types(record: object, record_class: type) -> None:
    """Raise TypeError for a field of another type than declared, which Parquet would not take."""
    if not isinstance(record, record_class):
        raise TypeError(f"expected a {record_class.__name__}, got {type(record).__name__}.")
    for name, (hint, nullable) in _field_types(record_class).items():
        value, base = getattr(record, name), typing.get_origin(hint) or hint
        is_right = isinstance(value, (int, float) if base is float else base)
        if not (is_right and not isinstance(value, bool)) and not (nullable and value is None):
            raise TypeError(
                f"{record_class.__name__}.{name} must be {base.__name__}"
                f"{' or None' if nullable else ''}, got {value!r}."
            )


def _to_table(rows: list[dict[str, Any]], kind: str) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=arrow_schema(kind))


def _write_parquet(path: Path, table: pa.Table) -> None:
    temporary = temporary_path(path)
    pq.write_table(table, temporary, compression="zstd")
    publish(temporary, path)


def _parquet_rows(path: Path) -> int:
    rows: int = pq.read_metadata(path).num_rows
    return rows


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    text = json.dumps(data, indent=1, sort_keys=True)
    temporary = temporary_path(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        publish(temporary, path)
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be written: {error.strerror}. Make room or fix the permissions, and "
            "run again to go on from there."
        ) from error


def _read_json(path: Path, advice: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path}: is missing. {advice}") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}. {advice}") from error
    except ValueError as error:
        raise StoreError(f"{path}: is not JSON: {error}. {advice}") from error
    if not isinstance(data, dict):
        raise StoreError(f"{path}: holds no JSON object. {advice}")
    return data


def _check_schema(path: Path, data: Mapping[str, Any]) -> None:
    schema = data.get("schema")
    if schema != SCHEMA_VERSION:
        older = isinstance(schema, int) and schema < SCHEMA_VERSION
        advice = (
            "Move the store aside, or discard the shard and measure again."
            if older
            else "Update tokenmark to read it."
        )
        raise StoreError(
            f"{path}: was written with schema {schema!r}, this version reads {SCHEMA_VERSION}. "
            f"{advice}"
        )


def _to_record(path: Path, record_class: type[Record], data: dict[str, Any]) -> Record:
    _check_schema(path, data)
    fields = dataclasses.fields(record_class)
    unknown = sorted(data.keys() - {field.name for field in fields})
    missing = sorted(
        field.name
        for field in fields
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.name not in data
    )
    if unknown or missing:
        raise StoreError(
            f"{path}: is no {record_class.__name__}: missing {missing}, unknown {unknown}. "
            "Remove it to measure again."
        )
    record = record_class(**data)
    try:
        _check_types(record, record_class)
    except TypeError as error:
        raise StoreError(f"{path}: {error} Remove it to measure again.") from None
    return record


def _metric(path: Path, data: object) -> MetricRecord:
    try:
        return MetricRecord(**data)  # type: ignore[arg-type]  # wrong kinds are the error below
    except TypeError as error:
        raise StoreError(
            f"{path}: {data!r} is no metric: {error}. Restore the file, or discard the shard and "
            "measure again."
        ) from error


def _checked_name(name: str) -> str:
    if not name or name.startswith(".") or "/" in name or "\0" in name:
        raise ValueError(f"an id must be a plain file name without a leading dot, got {name!r}.")
    return name


def _leftovers(shard: Path) -> list[Path]:
    """Return what an interrupted write or sealing left: temporary files, and the journals."""
    journals = [shard / f"{kind}.jsonl" for kind in KINDS]
    temporary = [path for path in shard.rglob(".*.tmp") if path.is_file()]
    return [path for path in journals if path.exists()] + temporary


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}


def temporary_path(path: Path) -> Path:
    """Return the name under which a file is written before it is published; readers skip it."""
    return path.with_name(f".{path.name}.tmp")


def publish(temporary: Path, path: Path) -> None:
    """Give a written file its name, so that a reader sees the old or the new, never half of it."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _make_folder(folder: Path) -> None:
    """Create a folder, and make it and its parents last."""
    if not folder.is_dir():
        try:
            _make_folder(folder.parent)
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise StoreError(f"{folder}: cannot be created: {error.strerror}.") from error
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
