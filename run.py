"""The command line of tokenmark: parse, call, print.

Commands import what they need when they run, so that `--help` and `list` answer at once.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

try:
    import typer
except ModuleNotFoundError:
    sys.exit(
        "tokenmark is not installed for this Python: source .venv/bin/activate, or make install"
    )

from results.text import plain
from runner.request import Request, UsageError
from runner.settings import choose

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from runner.describe import Section
    from runner.execute import Outcome
    from runner.registry import Kind, Registry

LISTS = {
    "methods": "method",
    "tasks": "task",
    "models": "model",
    "hardware": "hardware",
    "suites": "suite",
}
TABLE_FORMATS = ("table", "json")
CTRL_C = 130  # what Typer makes of it outside a measurement; 1 in our contract
# Threads that wait for one another spin for some 30 microseconds, not for milliseconds as by
# default: where another process or the hypervisor takes a core, spinning slows a step tenfold.
SPIN_COUNT = "1000"
_SHOWN_FAILURES = 5
PLAIN_WIDTH = 1000  # columns of a table that goes to a file or pipe: nothing is folded there

app = typer.Typer(
    help="Benchmark token-level methods; without a command, run the embedded suite.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 120},
)

Suite = Annotated[str | None, typer.Option(help="Suite by name, or path of a .toml file.")]
Methods = Annotated[
    list[str] | None, typer.Option("--method", help="NAME[:key=value,…]; may be repeated.")
]
Tasks = Annotated[
    list[str] | None, typer.Option("--task", help="NAME[:key=value,…]; may be repeated.")
]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", help="Embedded name, hf:ID or path:FOLDER; may be repeated."),
]
Hardware = Annotated[str | None, typer.Option(help="auto, or a hardware profile's name.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Items of each task.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of order, sampling, resampling.")]
Repeats = Annotated[int | None, typer.Option(min=1, help="Measurements of each item and method.")]
ScenarioName = Annotated[
    str | None, typer.Option("--scenario", help="latency, throughput or fixed-length.")
]
Store = Annotated[Path, typer.Option(file_okay=False, help="Folder of the results.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure finished cells again.")]
Timeout = Annotated[float | None, typer.Option(help="Seconds that one sample may take.")]
Budget = Annotated[
    str | None, typer.Option(help="Time that the run may take, 90s, 30m or 2h; then it stops.")
]
Offline = Annotated[bool, typer.Option("--offline", help="Never reach for the network.")]
ExecutorOption = Annotated[
    str, typer.Option("--executor", help="Where experiments run: local, ray or slurm.")
]
Plugins = Annotated[
    list[Path] | None,
    typer.Option("--plugin", help="Python file that brings methods or tasks; may be repeated."),
]
TableFormat = Annotated[str, typer.Option("--format", help="table or json.")]
OnlyTasks = Annotated[list[str] | None, typer.Option(help="Only this task; may be repeated.")]
WhichRun = Annotated[
    str, typer.Option(help="Id of a run, latest, or all: cells as they were last measured.")
]


@app.callback(invoke_without_command=True)
def default(context: typer.Context) -> None:
    """Run the embedded suite if no command is named."""
    # Before torch is loaded, for this process and all that it starts; the user's own setting wins.
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    if context.invoked_subcommand is None:
        from runner.suites import make_request

        measure(make_request(registry()))


@app.command()
def run(
    suite: Suite = None,
    method: Methods = None,
    task: Tasks = None,
    model: Models = None,
    hardware: Hardware = None,
    limit: Limit = None,
    seed: Seed = None,
    repeats: Repeats = None,
    scenario: ScenarioName = None,
    store: Store = Request.store,
    fresh: Fresh = False,
    timeout: Timeout = None,
    budget: Budget = None,
    offline: Offline = False,
    executor: ExecutorOption = "local",
    plugin: Plugins = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Look for numbers that were not earned.")
    ] = False,
    work_only: Annotated[
        bool, typer.Option("--work-only", help="Count work on tiny models; no clock, no weights.")
    ] = False,
    update: Annotated[
        bool, typer.Option("--update", help="With --work-only: write the committed fingerprints.")
    ] = False,
) -> None:
    """Measure methods on tasks and models, then print the comparison tables."""
    from runner.suites import make_request

    if update and not work_only:
        raise UsageError("--update belongs to --work-only: it rewrites the committed fingerprints.")
    if work_only:
        count_work(method or [], update)
        return
    measure(
        make_request(
            registry(plugin),
            suite=suite,
            methods=method or (),
            tasks=task or (),
            models=model or (),
            hardware=hardware,
            limit=limit,
            seed=seed,
            repeats=repeats,
            scenario=scenario,
            store=store,
            fresh=fresh,
            audit=audit,
            timeout=timeout,
            budget=budget,
            offline=offline,
            executor=executor,
        )
    )


@app.command()
def plan(
    suite: Suite = None,
    method: Methods = None,
    task: Tasks = None,
    model: Models = None,
    hardware: Hardware = None,
    limit: Limit = None,
    seed: Seed = None,
    repeats: Repeats = None,
    scenario: ScenarioName = None,
    store: Store = Request.store,
    fresh: Fresh = False,
    timeout: Timeout = None,
    budget: Budget = None,
    offline: Offline = False,
    executor: ExecutorOption = "local",
    plugin: Plugins = None,
    format: TableFormat = "table",
) -> None:
    """Say what `run` would do: what is measured, cached, skipped and why, and how long it takes."""
    from runner.plan import make_plan
    from runner.suites import make_request

    choose("--format", format, TABLE_FORMATS)
    made = make_plan(
        make_request(
            registry(plugin),
            suite=suite,
            methods=method or (),
            tasks=task or (),
            models=model or (),
            hardware=hardware,
            limit=limit,
            seed=seed,
            repeats=repeats,
            scenario=scenario,
            store=store,
            fresh=fresh,
            timeout=timeout,
            budget=budget,
            offline=offline,
            executor=executor,
        )
    )
    show_rows(made.describe(), format)
    if format == "table" and (told := made.outlook()):
        typer.echo(told)


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help=", ".join(LISTS))],
    format: TableFormat = "table",
    plugin: Plugins = None,
) -> None:
    """List methods, tasks, models, hardware profiles or suites."""
    kind = cast("Kind", LISTS[choose("list", what, LISTS)])
    choose("--format", format, TABLE_FORMATS)
    entries = registry(plugin).entries(kind).values()
    if kind == "method":
        rows = [
            {"name": e.name, "family": e.family, "status": e.status, "title": e.title}
            for e in entries
        ]
    else:
        rows = [{"name": e.name, "title": e.title} for e in entries]
    show_rows(rows, format)


@app.command()
def show(
    kind: Annotated[str, typer.Argument(help="method, task, model, hardware, suite or cell.")],
    name: Annotated[str, typer.Argument(help="Its name; of a cell its id, or METHOD@TASK.")],
    store: Store = Request.store,
    plugin: Plugins = None,
) -> None:
    """Show everything about one."""
    from runner.describe import describe
    from runner.registry import KINDS

    if choose("show", kind, (*KINDS, "cell")) == "cell":
        from runner.describe import describe_cell

        with store_errors(2):
            sections = describe_cell(index_of(store), name)
    else:
        sections = describe(registry(plugin), cast("Kind", kind), name)
    for section in sections:
        if section.rows:
            show_section(section)


@app.command()
def table(
    task: OnlyTasks = None,
    run: WhichRun = "latest",
    format: Annotated[
        str, typer.Option("--format", help="table, md, csv, latex, json or html.")
    ] = "table",
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw quality against cost into this .svg, .png or .pdf instead."),
    ] = None,
    store: Store = Request.store,
) -> None:
    """Print the comparison tables of a run, or draw its curves."""
    from results import plots, tables

    choose("--format", format, ("table", *tables.FORMATS))
    index = index_of(store)
    chosen = None if run == "all" else run
    with store_errors(2):
        if plot is not None:
            try:
                count = plots.draw(index, plot, chosen, task or ())
            except (ValueError, plots.PlotUnavailable) as error:
                raise UsageError(f"--plot: {error}") from error
            typer.echo(f"{plot}: curves of {count} {'table' if count == 1 else 'tables'}")
            return
        if format == "table":
            output(tables.terminal(index, chosen, task or ()))
        else:
            typer.echo(tables.render(index, chosen, task or (), format).rstrip("\n"))


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help="One statement that only reads.")],
    format: Annotated[str, typer.Option("--format", help="table, json or csv.")] = "table",
    store: Store = Request.store,
) -> None:
    """Query the results."""
    from results.query import FORMATS, QueryError, run_sql

    choose("--format", format, FORMATS)
    with store_errors(2):
        try:
            typer.echo(run_sql(index_of(store), query, format).rstrip("\n"))
        except QueryError as error:
            raise UsageError(str(error)) from error


@app.command()
def ingest(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR|FILE…", help="Stores, shards, JSON of lm-eval or pytest-benchmark."
        ),
    ],
    store: Store = Request.store,
    plugin: Plugins = None,
) -> None:
    """Take in what was measured elsewhere, after checking all of it."""
    from runner.indexing import take_in, update_index

    known = registry(plugin)
    with store_errors(1):
        came = [each for source in sources for each in take_in(source, store, known)]
        typer.echo(f"{len(came)} new experiments; index: {update_index(store, known)}")


@app.command("lm-eval")
def lm_eval(
    task: Annotated[
        list[str], typer.Option(help="Task, group or tag of lm-eval; may be repeated.")
    ],
    model: Annotated[
        str, typer.Option(help="Embedded name, hf:ID or path:FOLDER.")
    ] = "smollm2-135m",
    method: Annotated[str, typer.Option(help="NAME[:key=value,…]; plain decoding if empty.")] = "",
    folder: Annotated[
        Path | None,
        typer.Option(help="YAML files of further tasks; their data are relative to it."),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Solved examples; the task's own number if not given.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampled texts.")] = 0,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of the longest text; the model's limit.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Write requests as the model's conversations.")
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(file_okay=False, help="Keep answers to requests in this folder.")
    ] = None,
    hardware: Annotated[str, typer.Option(help="auto, or a hardware profile's name.")] = "auto",
    offline: Offline = False,
    plugin: Annotated[Path | None, typer.Option(help="Python file that brings the method.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write lm-eval's results to this file.")] = None,
    store: Store = Request.store,
    format: TableFormat = "table",
) -> None:
    """Run tasks of lm-eval by lm-eval itself, our model and method answering."""
    from results.import_lm_eval import take_in
    from results.store import Store as Results
    from runner import lm_eval_run
    from runner.indexing import update_index

    choose("--format", format, TABLE_FORMATS)
    if offline:
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    asked = lm_eval_run.find_tasks(task, "" if folder is None else str(folder))
    answering = lm_eval_run.make_model(
        model=model,
        method=method,
        hardware=hardware,
        seed=seed,
        max_length=max_length,
        offline=offline,
        plugin="" if plugin is None else str(plugin),
    )
    found = lm_eval_run.evaluate(
        answering,
        asked,
        num_fewshot=num_fewshot,
        limit=limit,
        chat_template=chat_template,
        cache=cache,
    )
    if out is not None:
        write_text(out, json.dumps(found, ensure_ascii=False))
    with store_errors(1):
        take_in(found, out or Path("lm-eval"), Results(store))
        update_index(store, registry())
    show_rows(lm_eval_run.rows(found), format)


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="Folder of the files; made if missing.")],
    format: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="parquet, model-index, latex, csv, md, json or html; may be repeated.",
        ),
    ] = None,
    run: WhichRun = "all",
    task: OnlyTasks = None,
    store: Store = Request.store,
    plugin: Plugins = None,
) -> None:
    """Write results for other programs: raw rows as Parquet, tables, metadata of model cards."""
    from results import export as exporting

    formats = format or ["parquet"]
    for each in formats:
        choose("--format", each, ("parquet", "model-index", *exporting.TABLE_ENDINGS))
    if task and "parquet" in formats:
        raise UsageError("--task chooses tables; Parquet holds every row: filter it, or use sql.")
    index, chosen = index_of(store), None if run == "all" else run
    written = []
    with store_errors(2):
        for each in formats:
            if each == "parquet":
                written += exporting.write_parquet(index, out, chosen)
            elif each == "model-index":
                from runner.model_index import write_cards

                written += write_cards(index, out, registry(plugin), chosen, task or ())
            else:
                written.append(exporting.write_tables(index, out, each, chosen, task or ()))
    for path, rows in written:
        typer.echo(f"{path}: {rows}")


@app.command()
def rebuild(store: Store = Request.store) -> None:
    """Make the DuckDB index anew from the shards."""
    from runner.indexing import update_index

    if not store.is_dir():
        raise UsageError(f"there is no store at {store}.")
    with store_errors(1):
        typer.echo(f"index: {update_index(store, registry(), anew=True)}")


@app.command()
def verify(store: Store = Request.store, plugin: Plugins = None) -> None:
    """Check shards against their manifests, and published numbers against raw samples."""
    from results.verify import verify as find_problems
    from runner.corpus import recompute

    index_of(store)
    with store_errors(1):
        problems = find_problems(store)
        again = recompute(store, registry(plugin))
    problems += again.problems
    for line in (*problems, *again.left_out):
        typer.echo(plain(line))
    typer.echo(f"{len(problems)} problems" if problems else "every number follows from its samples")
    if problems:
        raise typer.Exit(1)


@app.command()
def compare(
    base: Annotated[str, typer.Argument(help="What was good: latest, a run, commit or folder.")],
    head: Annotated[str, typer.Argument(help="What is judged; FOLDER@RUN names both.")],
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML to this file.")] = None,
    github: Annotated[
        bool, typer.Option("--github", help="Print annotations, write the step summary.")
    ] = False,
    format: Annotated[str, typer.Option("--format", help="table, md or json.")] = "table",
    store: Store = Request.store,
) -> None:
    """Judge a run against an earlier one; ends with 1 on a regression."""
    from results import compare as comparing
    from results import junit as builds
    from results.store import Store as Results

    choose("--format", format, ("table", *comparing.FORMATS))
    with store_errors(2):
        sides = [comparing.resolve(name, Results(store)) for name in (base, head)]
        comparing.refuse_same(*sides)
    with store_errors(1):
        found = comparing.compare(*sides)
    if format == "table":
        if shown := comparing.rows(found, everything=False):
            show_rows(shown, format)
        for line in (*found.notes, found.summary):
            typer.echo(plain(line))
    else:
        typer.echo(comparing.render(found, format).rstrip("\n"))
    if junit is not None:
        write_text(junit, builds.junit(found))
    if github:
        for line in builds.github_annotations(found):
            typer.echo(line)
        if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
            write_text(Path(summary), comparing.render(found, "md"), append=True)
    if found.regressions:
        raise typer.Exit(1)


@app.command()
def reproduce(
    methods: Annotated[list[str] | None, typer.Argument(metavar="[METHOD]…")] = None,
    model: Annotated[
        str | None, typer.Option(help="Test at the paper's scale: hf:ID or path:FOLDER.")
    ] = None,
    limit: Limit = None,
    store: Store = Request.store,
    timeout: Timeout = None,
    offline: Offline = False,
    no_run: Annotated[bool, typer.Option("--no-run", help="Judge by what is there.")] = False,
    badges: Annotated[Path | None, typer.Option(help="Write a badge of each paper here.")] = None,
    format: Annotated[str, typer.Option("--format", help="table, md, json or html.")] = "table",
    plugin: Plugins = None,
) -> None:
    """Settle the claims of papers; for the methods named, measure first what is missing."""
    from results import claim_report
    from results.store import Store as Results
    from runner import reproduce as reproducing

    choose("--format", format, ("table", *claim_report.FORMATS))
    known, names = registry(plugin), methods or []
    reproducing.check_names(known, names)
    is_fine = True
    if names and not no_run:
        is_fine = measure_claims(
            known, names, model, limit=limit, store=store, timeout=timeout, offline=offline
        )
    with store_errors(1):
        reports = reproducing.settle_claims(known, names, Results(store).index_path)
    if badges is not None:
        try:
            claim_report.write_badges(reports, badges)
        except OSError as error:
            raise UsageError(f"cannot write badges to {badges}: {error.strerror}.") from error
    if format == "table":
        show_rows([row for report in reports for row in report.short_rows()], format)
        typer.echo(claim_report.summary(reports))
    else:
        typer.echo(claim_report.render(reports, format).rstrip("\n"))
    if not is_fine:
        raise typer.Exit(1)


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="Folder of the site; made if missing.")],
    store: Store = Request.store,
    plugin: Plugins = None,
) -> None:
    """Write the results as a static site: leaderboards, charts, papers, runs."""
    from results.report.site import ReportError
    from results.store import Store as Results
    from runner.report import write_report

    if store != Request.store and not store.is_dir():
        raise UsageError(f"there is no folder {store}, so there is nothing to report.")
    with store_errors(1):
        try:
            written = write_report(registry(plugin), Results(store), out)
        except ReportError as error:
            raise UsageError(str(error)) from error
    typer.echo(f"{written.page}: {written.num_cells} results on {written.num_pages} pages")


@app.command()
def score(
    run: Annotated[str, typer.Option(help="Run, commit, or latest.")] = "latest",
    task: OnlyTasks = None,
    format: TableFormat = "table",
    store: Store = Request.store,
    plugin: Plugins = None,
) -> None:
    """Judge stored outputs again, by several scorers; ends with 1 if ours changed its mind."""
    from runner import scoring
    from runner.indexing import update_index

    choose("--format", format, TABLE_FORMATS)
    known = registry(plugin)
    with store_errors(1):
        done = scoring.rescore(
            store, known, run=run, tasks=task or (), tell=lambda line: typer.echo(line, err=True)
        )
        rows = scoring.table_rows(done, store)
        update_index(store, known)
    disputed = scoring.disputed_rows(done)
    if format == "json":
        typer.echo(json.dumps({"cells": rows, "disputed": disputed}, indent=2, ensure_ascii=False))
    else:
        for shown in (rows, disputed):
            for names in dict.fromkeys(tuple(row) for row in shown):
                show_rows([row for row in shown if tuple(row) == names], format)
                typer.echo()
    changed = [change for each in done for change in each.changed]
    for cell_id, item_id, metric, before, now in changed:
        line = f"{item_id} of cell {cell_id[:12]}: {metric} was {before} in the run, is {now} now"
        typer.echo(plain(line), err=True)
    if changed:
        raise typer.Exit(1)


@app.command()
def fetch(
    names: Annotated[list[str] | None, typer.Argument(metavar="[MODEL|TASK]…")] = None,
    suite: Annotated[
        str | None, typer.Option(help="All models and tasks of a suite, by name or path.")
    ] = None,
    offline: Offline = False,
    plugin: Plugins = None,
) -> None:
    """Get what models and tasks need into the cache, so that runs need no network."""
    from models.base import Unsupported
    from models.loading import LoadSettings, ModelError
    from models.loading import fetch as fetch_model
    from runner.settings import build, parse_spec, unknown
    from runner.suites import load_suite

    known = registry(plugin)
    models, tasks = known.entries("model"), known.entries("task")
    wanted = dict.fromkeys(names or ())
    if suite is not None:
        wanted |= dict.fromkeys(load_suite(suite, known).needs())
    if not wanted:
        raise UsageError("name a model or a task, or a suite with --suite.")
    specs = [parse_spec(text) for text in wanted]
    for spec in specs:
        is_outside = spec.name.startswith(("hf:", "path:"))
        if spec.name not in models and spec.name not in tasks and not is_outside:
            raise unknown("model or task", spec.name, (*models, *tasks))
    for spec in specs:
        if spec.name in tasks:
            task = build(known.load_task(spec.name), spec.params, f"task {spec.name!r}")
            try:
                items = sum(1 for _ in task.items())
                digest = task.content_hash()
            except (Unsupported, ValueError) as error:
                raise typer.TyperException(f"{spec}: {error}") from error
            typer.echo(f"{spec}: {items} items, content {digest[:12]}")
            continue
        settings = build(LoadSettings, spec.params, f"model {spec.name!r}")
        try:
            folder = fetch_model(spec.name, offline=offline, revision=settings.revision)
        except ModelError as error:
            raise typer.TyperException(str(error)) from error
        typer.echo(f"{spec}: {folder}")


@app.command()
def doctor(format: TableFormat = "table") -> None:
    """Say what of this machine can be measured, what cannot, and what would help."""
    from hardware.doctor import checks

    choose("--format", format, TABLE_FORMATS)
    rows = [
        {
            "check": check.name,
            "state": "ok" if check.ok else "limited",
            "found": check.detail,
            "advice": check.advice,
        }
        for check in checks()
    ]
    show_rows(rows, format)


@app.command()
def new(
    kind: Annotated[str, typer.Argument(help="method or task.")],
    name: Annotated[str, typer.Argument(help="Lower case with hyphens, such as my-method.")],
) -> None:
    """Write the files of a new method or task: a working start, with its test."""
    from datetime import UTC, datetime

    from runner.scaffold import Scaffolded, scaffold

    chosen = cast("Scaffolded", choose("new", kind, ("method", "task")))
    paths = [os.path.relpath(path) for path in scaffold(chosen, name, year=datetime.now(UTC).year)]
    for path in paths:
        typer.echo(f"written: {path}")
    if chosen == "method":
        typer.echo(f"next: python run.py conformance {name}")
    typer.echo(
        f"its test: python -m pytest {paths[-1]} (needs pip install -e '.[dev]' -c constraints.txt)"
    )


@app.command()
def conformance(
    name: Annotated[str, typer.Argument(help="A method of the tree or of a plug-in.")],
    plugin: Plugins = None,
) -> None:
    """Check that a method keeps the contract; ends with 1 if it does not."""
    from runner.conformance import conformance as check_contract

    checks = check_contract(name, registry(plugin))
    rows = [
        {"check": check.name, "state": "ok" if check.ok else "broken", "found": check.detail}
        for check in checks
    ]
    show_rows(rows, "table")
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@app.command(hidden=True)
def experiment(
    job: Annotated[Path, typer.Option(help="Job of a fleet's run.")],
    deliver: Annotated[Path, typer.Option(help="Folder to make of what came of it.")],
) -> None:
    """Measure one experiment that was planned elsewhere; `run --executor` has it started."""
    from runner.executors import node

    with store_errors(1):
        try:
            node.main(job, deliver)
        except (node.Refused, OSError) as error:
            raise typer.TyperException(str(error)) from error


@app.command(hidden=True)
def worker(
    spec: Annotated[Path, typer.Option(help="Experiment to measure, as the runner wrote it.")],
    events: Annotated[int | None, typer.Option(help="File descriptor for progress.")] = None,
) -> None:
    """Measure one experiment in this process; `run` starts it."""
    from runner.worker import main as measure_experiment

    code = measure_experiment(spec, events)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # everything is on the disk; torch would take seconds to tear itself down


# --- helpers -------------------------------------------------------------------------------------


def measure(request: Request) -> None:
    """Run a request, print its tables, and end with 1 if a cell failed or the user stopped it."""
    from results import tables
    from runner.execute import execute
    from runner.indexing import update_index
    from runner.plan import make_plan
    from runner.progress import progress

    made = make_plan(request)
    if not made.cells:
        reasons = [
            "{method} on {task} with {model}: {reason}".format(**each) for each in made.skipped
        ]
        raise UsageError("\n".join(["nothing of this can be measured:", *reasons]))
    if request.budget is not None and (told := made.outlook()):
        typer.echo(told, err=True)
    with store_errors(1):
        with progress(console()) as listener:
            outcome = execute(made, listener)
        index = update_index(request.store, registry(request.plugins))
        output(tables.terminal(index, outcome.run_id))
    if outcome.interrupted:
        why = "The budget is spent" if outcome.out_of_time else "Stopped"
        typer.echo(
            f"{why}. All that was measured is kept in {request.store}, {made.num_kept} samples of "
            "what was under way; the same command goes on from there.",
            err=True,
        )
    elif outcome.failed:
        typer.echo(_failures(index, outcome, request.store), err=True)
    if outcome.failed or outcome.interrupted:
        raise typer.Exit(1)


def _failures(index: Path, outcome: Outcome, store: Path) -> str:
    """Say which cells of a run failed, and what shows their logs."""
    from results import tables

    count = "1 cell" if outcome.failed == 1 else f"{outcome.failed} cells"
    failed = [
        row
        for table in tables.comparison_tables(index, outcome.run_id)
        for row in table.data
        if row["status"] not in ("ok", "unsupported")
    ]
    where = "" if store == Request.store else f" --store {shlex.quote(str(store))}"
    if not failed:
        return f"{count} failed before anything was stored; the reasons stand above."
    shown = [
        f"  {row['spec'] or row['method']}: python run.py show cell {row['cell_id'][:12]}{where}"
        for row in failed[:_SHOWN_FAILURES]
    ]
    more = len(failed) - len(shown)
    rest = [f"  and {more} more: python run.py table{where}"] if more else []
    return "\n".join([f"{count} failed. Their logs:", *shown, *rest])


def count_work(specs: Sequence[str], is_update: bool) -> None:
    """Print the work of methods on tiny models and what differs from the committed fingerprints.

    Raises:
        UsageError: A method has no fingerprint, or is named with parameters.
        typer.Exit: With 1 if something differs and was not to be updated.
    """
    from runner import fingerprint

    if named := [spec for spec in specs if ":" in spec]:
        raise UsageError(f"work is counted at a method's defaults, got {named[0]!r}.")
    known, before = registry(), fingerprint.committed()
    found = fingerprint.fingerprints(known, specs)
    gone = set() if specs else before.keys() - found.keys()
    show_rows(fingerprint.rows(found), "table")
    seen = {name: before[name] for name in before if name in found or name in gone}
    changed = fingerprint.differences(seen, found)
    typer.echo()
    if not changed:
        typer.echo(f"{len(found)} methods: the committed fingerprints hold")
        return
    show_rows(changed, "table")
    if is_update:
        kept = {name: counts for name, counts in before.items() if name not in gone}
        fingerprint.write({**kept, **found})
        typer.echo(f"written: {fingerprint.PATH}")
        return
    typer.echo(f"The work has changed. If it should: {fingerprint.UPDATE}", err=True)
    raise typer.Exit(1)


def measure_claims(
    known: Registry, names: Sequence[str], model: str | None, **options: Any
) -> bool:
    """Measure what the claims of some methods need; return whether all of it ended well."""
    from runner import reproduce as reproducing
    from runner.indexing import update_index

    store: Path = options["store"]
    asked = list(reproducing.requests(known, names, model=model, **options))
    with store_errors(1):
        ended_well = [measure_quietly(request) for request in asked]
        if not asked or not store.is_dir():
            return all(ended_well)
        index = update_index(store, known)
        if model is None and (again := reproducing.apart(known, names, index, asked)):
            ended_well += [measure_quietly(request) for request in again]
            update_index(store, known)
    return all(ended_well)


def measure_quietly(request: Request) -> bool:
    """Measure a request and return whether all of it ended well; stdout stays free for verdicts."""
    from rich.console import Console

    from runner.execute import execute
    from runner.plan import make_plan
    from runner.progress import progress

    try:
        made = make_plan(request)
    except UsageError as error:
        typer.echo(f"not measured: {plain(str(error))}", err=True)
        return False
    width = None if sys.stderr.isatty() else PLAIN_WIDTH
    with progress(Console(stderr=True, width=width)) as listener:
        outcome = execute(made, listener)
    if outcome.interrupted:
        raise typer.Abort
    return not outcome.failed


def index_of(store: Path) -> Path:
    """Return the index of a store.

    Raises:
        UsageError: There is none.
    """
    from results.store import Store as Results

    index = Results(store).index_path
    if not index.exists():
        raise UsageError(
            f"{store} holds no results: `python run.py` measures some, "
            "`python run.py rebuild` makes the index where there are shards."
        )
    return index


def write_text(path: Path, text: str, *, append: bool = False) -> None:
    """Write a file that the user named.

    Raises:
        UsageError: It cannot be written.
    """
    try:
        with path.open("a" if append else "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}.") from error


def registry(plugins: Sequence[Path] | None = None) -> Registry:
    """Return what there is."""
    from runner.registry import Registry

    return Registry(plugins=tuple(plugins or ()))


def console() -> Console:
    """Return a console that cuts no table off where nobody can widen the window."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)


def output(renderable: RenderableType) -> None:
    """Print something of Rich's; without the padding at the ends of lines where nobody sees it."""
    screen = console()
    if screen.is_terminal:
        screen.print(renderable)
        return
    with screen.capture() as captured:
        screen.print(renderable)
    typer.echo("\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n")))


@contextmanager
def store_errors(code: int) -> Iterator[None]:
    """Turn what is wrong with a store into a message: 2 if a name was wrong, 1 if the store is."""
    from results.store import StoreError

    try:
        yield
    except StoreError as error:
        if code == 2:
            raise UsageError(str(error)) from error
        raise typer.TyperException(str(error)) from error


def show_section(section: Section) -> None:
    """Print a part of a description, facts as a list and everything else as a table."""
    if section.title:
        typer.echo(f"\n{section.title[0].upper()}{section.title[1:]}")
    if set(section.rows[0]) == {"key", "value"}:
        show_grid([list(row.values()) for row in section.rows])
    else:
        show_rows([without_empty(section.rows, row) for row in section.rows], "table")


def without_empty(rows: Sequence[Mapping[str, str]], row: Mapping[str, str]) -> dict[str, str]:
    """Return a row without the columns that are empty in all rows."""
    return {key: value for key, value in row.items() if any(each[key] for each in rows)}


def show_rows(rows: Sequence[Mapping[str, Any]], format: str) -> None:
    """Print rows that share their keys."""
    if format == "json":
        typer.echo(json.dumps(list(rows), indent=2, ensure_ascii=False))
        return
    if not rows:
        typer.echo("none")
        return
    cells = [["" if value is None else str(value) for value in row.values()] for row in rows]
    show_grid(cells, [column.replace("_", " ") for column in rows[0]])


def show_grid(cells: Sequence[Sequence[str]], heading: Sequence[str] = ()) -> None:
    """Print cells in columns; on a terminal they are folded to its width."""
    cells = [[plain(cell) for cell in row] for row in cells]
    if not sys.stdout.isatty():
        widths = [
            max(map(len, column))
            for column in zip(*cells, *([heading] if heading else []), strict=True)
        ]
        if heading:
            cells = [list(heading), ["-" * width for width in widths], *cells]
        for row in cells:
            padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            typer.echo("  ".join(padded).rstrip())
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD if heading else None, pad_edge=False, show_edge=False)
    grid.show_header = bool(heading)
    for place in range(len(cells[0])):
        grid.add_column(heading[place] if heading else "", overflow="fold")
    for row in cells:
        grid.add_row(*map(Text, row))  # never read as markup, whatever stands in it
    output(grid)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 fine; 1 a cell failed, or the user stopped it; 2 wrong usage.
    """
    try:
        code = app(
            args=None if arguments is None else list(arguments),
            prog_name="run.py",
            standalone_mode=False,
        )
    except UsageError as error:
        return complain("UsageError", str(error), 2)
    except typer.TyperException as error:
        kind = "UsageError" if error.exit_code == 2 else "Error"
        return complain(kind, explained(error), error.exit_code)
    except typer.Abort:
        return complain("Stopped", "nothing was being measured.", 1)
    if code == CTRL_C:
        return complain("Stopped", "nothing was being measured.", 1)
    return code if isinstance(code, int) else 0


def explained(error: typer.TyperException) -> str:
    """Return what was wrong; of an argument that is missing also what it may be."""
    message = error.format_message()
    allowed = getattr(getattr(error, "param", None), "help", None)
    return f"{message} It is: {allowed}" if allowed and message.startswith("Missing") else message


def complain(kind: str, message: str, code: int) -> int:
    """Say on stderr what was wrong, in as many lines as it has; returns the exit code."""
    typer.echo(f"{kind}: " + "\n".join(map(plain, message.splitlines())), err=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
