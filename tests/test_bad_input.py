"""Bad input of every kind ends in a sentence and an exit code, never in a traceback.

Commands run in this process, which is fast; what needs a file system of its own (full, read-only)
runs in one more process with namespaces of its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest

import run
from results import ingest
from results.store import Store
from runner.registry import ROOT
from tests.results.factory import make_store

SUITE = """
methods = ["autoregressive"]
models = ["smollm2-135m"]
[[task]]
spec = "humaneval-mini"
"""


def check_ending(code: int, error: str, expected: int, message: str) -> None:
    """Fail unless a command ended with the code, and with the message alone."""
    assert code == expected, error
    assert error.startswith("UsageError: " if expected == 2 else "Error: ")
    assert "Traceback" not in error
    assert re.search(message, error), error
    assert all(line.isprintable() for line in error.splitlines())


# Suite files

SUITES: dict[str, tuple[str | bytes, str]] = {
    "no toml": ("methods = [", "is no valid TOML"),
    "not text": (b"\xff\xfe\x00methods", "is no valid TOML: 'utf-8'"),
    "nothing": ("", "needs 'methods', 'models', 'task'"),
    "unknown key": (SUITE + "\n[extra]\na = 1\n", "has no key 'extra'"),
    "near key": ("model = []\n" + SUITE, r"Did you mean 'models'\?"),
    "unknown key of a task": (
        SUITE + "limitt = 3\n",
        r"task\[0\] has no key 'limitt'\. Did you mean 'limit'\?",
    ),
    "no models": (SUITE.replace('"smollm2-135m"', ""), "models is empty"),
    "no tasks": (SUITE.partition("[[task]]")[0], "needs 'task'"),
    "task as text": (
        SUITE.partition("[[task]]")[0] + 'task = "humaneval"\n',
        "task must be list of SuiteTask",
    ),
    "repeats as text": ('repeats = "3"\n' + SUITE, "repeats must be int, got '3'"),
    "repeats of nothing": ("repeats = 0\n" + SUITE, "repeats must be at least 1, got 0"),
    "timeout below zero": ("timeout = -1\n" + SUITE, "timeout must be a number of seconds above 0"),
    "endless timeout": ("timeout = inf\n" + SUITE, "got inf"),
    "limit of nothing": (SUITE + "limit = 0\n", "limit must be at least 1, got 0"),
    "two limits": (
        SUITE + 'limit = 3\n[[task]]\nspec = "humaneval-mini"\nlimit = 4\n',
        "humaneval-mini' (has two limits|stands there twice)",
    ),
    "unknown scenario": ('scenario = "latancy"\n' + SUITE, r"Did you mean 'latency'\?"),
    "unknown task": (
        SUITE.replace("humaneval-mini", "humaneval-min"),
        r"Did you mean 'humaneval-mini'\?",
    ),
    "unknown model": (
        SUITE.replace("smollm2-135m", "smollm2-135"),
        r"Did you mean 'smollm2-135m'\?",
    ),
    "unknown method": (
        SUITE.replace("autoregressive", "autoregresive"),
        r"Did you mean 'autoregressive'\?",
    ),
    "unknown hardware": ('hardware = "h10"\n' + SUITE, "no hardware profile named 'h10'"),
    "methods as text": (
        SUITE.replace('["autoregressive"]', '"autoregressive"'),
        "methods must be list of text",
    ),
    "negative seed": ("seed = -1\n" + SUITE, "seed must be 0 or more, got -1"),
}


@pytest.mark.parametrize("case", SUITES)
def test_a_wrong_suite_file(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = SUITES[case]
    path = tmp_path / "mine.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code = run.main(["plan", "--suite", str(path), "--offline"])
    check_ending(code, capsys.readouterr().err, 2, message)


# Parameters, ids and paths: arguments with TMP for a folder of the test, and the message

ARGUMENTS: dict[str, tuple[list[str], str]] = {
    "parameter below its range": (
        ["plan", "--method", "token-recycling:tree_nodes=-1"],
        "tree_nodes must be a whole number from 0 to 128, got -1",
    ),
    "parameter that is no number": (
        ["plan", "--method", "token-recycling:candidates=nan"],
        "candidates must be int, got 'nan'",
    ),
    "endless parameter": (
        ["plan", "--method", "token-recycling:candidates=1e999"],
        "candidates must be int, got '1e999'",
    ),
    "empty parameter": (
        ["plan", "--method", "token-recycling:tree_nodes="],
        "tree_nodes must be int or auto, got ''",
    ),
    "parameter twice": (
        ["plan", "--method", "token-recycling:candidates=4,candidates=8"],
        "'candidates' comes twice",
    ),
    "open quote": (["plan", "--task", 'humaneval:prompt="raw'], "a double quote stays open"),
    "open bracket": (["plan", "--task", "humaneval:prompt=[raw"], "a bracket stays open"),
    "colon alone": (["plan", "--method", ":"], "':' is no spec: write name"),
    "no name": (["plan", "--method", ""], "'' is no spec: write name"),
    "control characters": (["plan", "--method", "\x1b[31mred\x07"], r"\\x1b\[31mred\\x07"),
    "very long name": (["plan", "--method", "x" * 20_000], "no method named 'xxx"),
    "contradicting parameters": (
        ["plan", "--task", "humaneval:samples=2"],
        "samples above 1 need a temperature",
    ),
    "path as a name": (
        ["plan", "--method", "../../etc/passwd"],
        r"no method named '\.\./\.\./etc/passwd'",
    ),
    "timeout that is no number": (["plan", "--timeout", "nan"], "got nan"),
    "model folder that is empty": (["plan", "--model", "path:TMP"], "no model in "),
    "model that is a file": (
        ["plan", "--model", "path:TMP/file"],
        "holds config.json, tokenizer.json",
    ),
    "model without a name": (["plan", "--model", "path:"], "'path:' is no spec"),
    "suite that is a folder": (["plan", "--suite", "TMP/folder.toml"], "Is a directory"),
    "plug-in that is a folder": (["plan", "--plugin", "TMP"], "there is no such file"),
    "plug-in with a slip": (
        ["list", "methods", "--plugin", "TMP/slip.py"],
        r"SyntaxError: invalid syntax \(slip.py, line 1\)",
    ),
    "plug-in that fails": (["plan", "--plugin", "TMP/fails.py"], "RuntimeError: not today"),
    "store below a file": (["rebuild", "--store", "TMP/file/store"], "there is no store at"),
    "ingest of a file": (["ingest", "TMP/file", "--store", "TMP/new"], "holds no shards"),
    "ingest of nothing": (["ingest", "TMP/nowhere", "--store", "TMP/new"], "holds no shards"),
    "run outside the store": (
        ["table", "--run", "../../x", "--store", "STORE"],
        r"no run '\.\./\.\./x'",
    ),
    "empty run": (["table", "--run", "", "--store", "STORE"], "no run ''"),
    "empty cell": (["show", "cell", "", "--store", "STORE"], "2 cells begin with ''"),
    "empty query": (["sql", "", "--store", "STORE"], "expected one statement, got 0"),
    "two queries": (
        ["sql", "SELECT 1; SELECT 2", "--store", "STORE"],
        "expected one statement, got 2",
    ),
    "query that writes a file": (
        ["sql", "COPY runs TO 'x.csv'", "--store", "STORE"],
        "COPY is not allowed",
    ),
    "comparison with nothing": (
        ["compare", "", "latest", "--store", "STORE"],
        "no run, commit or folder ''",
    ),
    "scores of nothing": (["score", "--store", "TMP/nowhere"], "holds no results"),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("measured")
    make_store(path)
    assert run.main(["rebuild", "--store", str(path)]) == 0
    return path


@pytest.fixture
def store(measured: Path, tmp_path: Path) -> Store:
    """Return a store that a test may damage."""
    return Store(Path(shutil.copytree(measured, tmp_path / "store")))


@pytest.mark.parametrize("case", ARGUMENTS)
def test_wrong_arguments(
    case: str, measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = ARGUMENTS[case]
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "slip.py").write_text("def broken(:\n")
    (tmp_path / "fails.py").write_text("raise RuntimeError('not today')\n")
    filled = [
        word.replace("TMP", str(tmp_path)).replace("STORE", str(measured)) for word in arguments
    ]
    offline = ["--offline"] if filled[0] == "plan" else []
    capsys.readouterr()
    code = run.main([*filled, *offline])
    check_ending(code, capsys.readouterr().err, 2, message)


# Stores: what is done to one, the command, the exit code and the message

Damage = Callable[[Store], None]


def shard(store: Store) -> Path:
    return store.shard("experiment-1")


def change(name: str, **values: Any) -> Damage:
    """Return a damage that changes keys of a JSON file of the shard; None removes one."""

    def damage(store: Store) -> None:
        path = shard(store) / name
        content = {**json.loads(path.read_text()), **values}
        path.write_text(
            json.dumps({key: value for key, value in content.items() if value is not None})
        )

    return damage


def unsealed(damage: Damage) -> Damage:
    """Return a damage to a shard that is still growing, which no manifest speaks for."""

    def both(store: Store) -> None:
        (shard(store) / "manifest.json").unlink()
        damage(store)

    return both


def write(name: str, content: bytes) -> Damage:
    def damage(store: Store) -> None:
        (store.path / name).write_bytes(content)

    return damage


def remove(name: str) -> Damage:
    def damage(store: Store) -> None:
        (shard(store) / name).unlink()

    return damage


def flip_a_byte(store: Store) -> None:
    path = shard(store) / "samples.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def resealed(store: Store) -> None:
    """Write samples of another version and make the manifest agree."""
    path = shard(store) / "samples.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["seconds"]), path)
    manifest = json.loads((shard(store) / "manifest.json").read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest["files"]["samples.parquet"] = {"sha256": digest, "bytes": path.stat().st_size}
    (shard(store) / "manifest.json").write_text(json.dumps(manifest))


def journal(line: bytes) -> Damage:
    return unsealed(write("shards/experiment-1/samples.jsonl", line + b"\n"))


def with_checksum(record: bytes) -> bytes:
    return b'{"crc32":"%08x","record":%s}' % (zlib.crc32(record), record)


def index_of_another_version(store: Store) -> None:
    with duckdb.connect(str(store.index_path)) as connection:
        connection.execute("UPDATE index_info SET version = 0")


def index_is_a_folder(store: Store) -> None:
    store.index_path.unlink()
    store.index_path.mkdir()


EXPERIMENT = "shards/experiment-1/experiment.json"
CELL = "cells/cell-fast.json"
INDEX = "tokenmark.duckdb"
STORES: dict[str, tuple[Damage, list[str], int, str]] = {
    "experiment cut short": (
        unsealed(write(EXPERIMENT, b'{"experiment_id": ')),
        ["rebuild"],
        1,
        "is not JSON",
    ),
    "experiment that is a list": (
        unsealed(write(EXPERIMENT, b"[]")),
        ["rebuild"],
        1,
        "holds no JSON object",
    ),
    "experiment that is no text": (
        unsealed(write(EXPERIMENT, b"\xff\x00")),
        ["rebuild"],
        1,
        "is not JSON: 'utf-8'",
    ),
    "experiment without items": (
        unsealed(change("experiment.json", items=None)),
        ["rebuild"],
        1,
        r"missing \['items'\]",
    ),
    "experiment with a key of its own": (
        unsealed(change("experiment.json", more=1)),
        ["rebuild"],
        1,
        r"unknown \['more'\]",
    ),
    "experiment with a wrong type": (
        unsealed(change("experiment.json", seed="0")),
        ["rebuild"],
        1,
        "seed must be int, got '0'",
    ),
    "older schema": (
        unsealed(change("experiment.json", schema=0)),
        ["rebuild"],
        1,
        "written with schema 0, this version reads 1. Move the store aside",
    ),
    "newer schema": (
        unsealed(change("experiment.json", schema=99)),
        ["rebuild"],
        1,
        "schema 99, this version reads 1. Update tokenmark",
    ),
    "no schema": (unsealed(change("experiment.json", schema=None)), ["rebuild"], 1, "schema None"),
    "experiment of another shard": (
        unsealed(change("experiment.json", experiment_id="experiment-2")),
        ["rebuild"],
        1,
        "describes experiment 'experiment-2'",
    ),
    "cell with an unknown status": (
        unsealed(change(CELL, status="fine")),
        ["rebuild"],
        1,
        "status 'fine' is none of ok, failed",
    ),
    "cell of another experiment": (
        unsealed(change(CELL, experiment_id="other")),
        ["rebuild"],
        1,
        "of experiment 'other'",
    ),
    "cell cut short": (
        unsealed(write(f"shards/experiment-1/{CELL}", b"{")),
        ["rebuild"],
        1,
        "cell-fast.json: is not JSON",
    ),
    "missing samples": (remove("samples.parquet"), ["rebuild"], 1, "samples.parquet: is missing"),
    "sealed cell that changed": (
        change(CELL, status="failed"),
        ["rebuild"],
        1,
        "cell-fast.json: changed since it was sealed",
    ),
    "one changed byte": (
        flip_a_byte,
        ["rebuild"],
        1,
        "samples.parquet: changed since it was sealed",
    ),
    "manifest that is none": (
        write("shards/experiment-1/manifest.json", b'{"schema": 1}'),
        ["rebuild"],
        1,
        "is no manifest",
    ),
    "samples of another version": (resealed, ["rebuild"], 1, "was written by another version"),
    "damaged journal": (
        journal(b'{"crc32":"00000000","record":{}}'),
        ["rebuild"],
        1,
        "line 1 does not match its checksum",
    ),
    "journal of another version": (
        journal(with_checksum(b"{}")),
        ["rebuild"],
        1,
        r"line 1 has the fields \[\]",
    ),
    "run cut short": (write("runs/run-1.json", b"{"), ["rebuild"], 1, "run-1.json: is not JSON"),
    "run of another schema": (
        write("runs/run-1.json", b'{"schema": 0, "run_id": "run-1"}'),
        ["rebuild"],
        1,
        "run-1.json: was written with schema 0",
    ),
    "index that is none": (write(INDEX, b"no index"), ["table"], 2, "python run.py rebuild"),
    "empty index": (write(INDEX, b""), ["table"], 2, "python run.py rebuild"),
    "index of another version": (
        index_of_another_version,
        ["table"],
        2,
        "is no index of this version",
    ),
    "index that is a folder": (index_is_a_folder, ["table"], 2, "cannot be read"),
    "index that cannot be replaced": (
        index_is_a_folder,
        ["rebuild"],
        1,
        "cannot be written: Is a directory",
    ),
    "run cut short, compared": (
        write("runs/run-1.json", b"{"),
        ["compare", "latest", "run-0"],
        2,
        "run-1.json: is not JSON",
    ),
    "shard of a growing run": (
        remove("manifest.json"),
        ["ingest", "STORE"],
        2,
        "is not sealed: its run has not ended",
    ),
}


@pytest.mark.parametrize("case", STORES)
def test_a_damaged_store(
    case: str, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, command, expected, message = STORES[case]
    damage(store)
    arguments = [word.replace("STORE", str(store.path)) for word in command]
    target = tmp_path / "other" if command[0] == "ingest" else store.path
    capsys.readouterr()
    code = run.main([*arguments, "--store", str(target)])
    check_ending(code, capsys.readouterr().err, expected, message)


# The machine: locks, full and read-only disks


def test_an_index_that_another_process_writes(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("runner.indexing.rebuild", partial(ingest.rebuild, wait_seconds=0.1))
    with store.index_path.with_name("tokenmark.duckdb.lock").open("w") as lock:
        # A lock of another open file holds against us as one of another process does.
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(json.dumps({"pid": 4711, "host": "elsewhere", "since": "noon"}))
        lock.flush()
        code = run.main(["rebuild", "--store", str(store.path)])
    check_ending(code, capsys.readouterr().err, 1, "process 4711 on elsewhere, since noon, is writ")
    # Readers do not wait.
    assert run.main(["table", "--store", str(store.path)]) == 0


def test_a_run_that_another_process_measures(tmp_path: Path) -> None:
    from runner.system import exclusive

    store = Store(tmp_path)
    with exclusive(store, "experiment-1") as is_ours, exclusive(store, "experiment-1") as again:
        assert is_ours
        assert not again


# Runs in a process with file systems of its own: SMALL is nearly full, FIXED cannot be written.
ISOLATED = """
import contextlib, io, json, os, sys
from pathlib import Path
import run
from results.store import Store, StoreError
from tests.results.factory import make_experiment, make_run, make_sample

small, fixed, measured = map(Path, sys.argv[1:])
found = {}

def command(name, *arguments):
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        code = run.main(list(arguments))
    found[name] = [code, error.getvalue()]

def refused(name, action):
    try:
        action()
    except StoreError as error:
        found[name] = [1, f"Error: {error}\\n"]

command("index on a full disk", "rebuild", "--store", str(small / "copy"))
command("ingest on a full disk", "ingest", str(measured), "--store", str(small / "new"))
store, experiment = Store(small / "store"), make_experiment(("plain",), 400)
store.write_experiment(experiment)
kept = 0
with store.samples_journal(experiment.experiment_id) as journal:
    def fill():
        global kept
        for item in experiment.items:
            journal.append(make_sample("cell-plain", item, output="x" * 20000))
            kept += 1
    refused("samples on a full disk", fill)
rows = len(list(store.samples(experiment.experiment_id)))
found["kept"] = [kept, rows]
(small / "filler").write_bytes(b"")
with contextlib.suppress(OSError), (small / "filler").open("wb", 0) as file:
    while True:
        file.write(bytes(4096))
refused("run on a full disk", lambda: store.write_run(make_run([experiment])))
command("index in a read-only store", "rebuild", "--store", str(fixed))
command("ingest into a read-only store", "ingest", str(measured), "--store", str(fixed / "new"))
refused("run in a read-only store", lambda: Store(fixed).write_run(make_run([experiment])))
command("table of a read-only store", "table", "--store", str(fixed))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def isolated(measured: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Return how commands ended on a full and on a read-only file system."""
    folder = tmp_path_factory.mktemp("isolated")
    small, fixed = folder / "small", folder / "fixed"
    small.mkdir()
    fixed.mkdir()
    inside = (
        'mount -t tmpfs -o size=512k none "$1" && cp -r "$3/shards" "$1/" && mkdir "$1/copy" && '
        'mv "$1/shards" "$1/copy/" && mount --bind "$3" "$2" && '
        'mount -o remount,bind,ro "$2" && '
        'exec "$PYTHON" -c "$CODE" "$1" "$2" "$3"'
    )
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("this machine gives us no file system of our own (unshare)")
    done = subprocess.run(
        [*unshare, inside, "sh", str(small), str(fixed), str(measured)],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "CODE": ISOLATED},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("index on a full disk", "tokenmark.duckdb: cannot be written.*safe in the shards"),
        ("ingest on a full disk", "[Nn]o space left"),
        (
            "samples on a full disk",
            "cannot append a record: No space left.*Everything before it is kept",
        ),
        ("run on a full disk", "cannot be written: No space left"),
        ("index in a read-only store", "cannot be written"),
        ("ingest into a read-only store", "Read-only file system"),
        ("run in a read-only store", "Read-only file system"),
    ],
)
def test_a_disk_that_cannot_be_written(
    isolated: dict[str, list[Any]], case: str, message: str
) -> None:
    code, error = isolated[case]
    check_ending(code, error, 1, message)


def test_what_was_measured_before_the_disk_was_full_is_kept(
    isolated: dict[str, list[Any]],
) -> None:
    kept, rows = isolated["kept"]
    assert kept == rows > 3


def test_a_read_only_store_can_be_read(isolated: dict[str, list[Any]]) -> None:
    assert isolated["table of a read-only store"] == [0, ""]
