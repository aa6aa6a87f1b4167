"""`reproduce`: settle the claims of papers, measuring first what a claim's check needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from duckdb import DuckDBPyConnection

from methods.base import Check, Claim
from methods.cards import load_paper
from results.claim_report import PaperReport
from results.claims import Measurements, settle, task_settings
from results.tables import connect
from runner.registry import Entry, Registry
from runner.request import Request, UsageError
from runner.settings import build, format_spec, from_table, parse_method, parse_spec, unknown
from runner.suites import DEFAULT_SUITE, Suite, load_suite, make_request


def check_names(registry: Registry, names: Sequence[str]) -> None:
    """Refuse methods that do not exist, or that nobody claims anything about.

    Raises:
        UsageError: With the name.
    """
    for name in names:
        card = registry.card(name)
        if card is None or not card.claims:
            raise UsageError(
                f"{name!r} has no claims to reproduce: it is a baseline, a control or a peer. "
                "`python run.py reproduce` lists what has."
            )


def settle_claims(
    registry: Registry, names: Sequence[str] = (), index_path: Path | None = None
) -> list[PaperReport]:
    """Return every claim of some papers, or of all, with its verdict; measures nothing.

    Args:
        registry: Where the cards are.
        names: Methods; all papers if empty.
        index_path: What was measured; None, or a file that does not exist, if nothing was.

    Raises:
        UsageError: As `check_names`, or a card is not as it must be.
        StoreError: The index cannot be read.
    """
    check_names(registry, names)
    claims: dict[str, list[dict[str, Any]]] = {}
    for claim in registry.claims():
        claims.setdefault(claim["method"], []).append(claim)
    with ExitStack() as stack:
        connection = None
        if index_path is not None and index_path.exists():
            connection = stack.enter_context(connect(index_path))
        return [
            _report(registry.find("method", name), claims[name], connection)
            for name in dict.fromkeys(names or claims)
        ]


def _report(
    entry: Entry, claims: list[dict[str, Any]], connection: DuckDBPyConnection | None
) -> PaperReport:
    assert entry.card is not None  # its claims were read from there
    paper = load_paper(entry.card)
    return PaperReport(
        method=entry.name,
        title=paper.title,
        arxiv=paper.arxiv,
        status=entry.status,
        claims=claims,
        settled=settle(claims, connection),
    )


def requests(
    registry: Registry,
    names: Sequence[str],
    *,
    model: str | None = None,
    **options: Any,
) -> Iterator[Request]:
    """Yield what has to be measured to settle the claims of some methods.

    Methods and rivals of one task and model go into one request, so that they are measured
    interleaved. What the store holds already is not measured again. Planned methods and claims
    without a check need nothing.

    Args:
        registry: Where methods and cards are.
        names: Methods.
        model: Model to test at the paper's scale with, in place of the embedded one; only the
            checks that name it.
        options: For `make_request`: store, limit, offline, timeout.

    Raises:
        UsageError: A name is unknown, or a check's settings or metric are not those of its method
            and task.
    """
    suite = load_suite(DEFAULT_SUITE, registry)
    limit = options.get("limit")
    wanted: dict[tuple[str, str], dict[str, None]] = {}
    for name, check in _checks(registry, names, model):
        params = check.params if model is None else check.paper_params or check.params
        sides = [(name, params)]
        if check.rival and registry.find("method", check.rival).status == "ready":
            sides.append((check.rival, check.rival_params))
        task = _task_spec(registry, check, suite if model is None else None, limit)
        _require_metric(registry, task, check.metric)
        specs = wanted.setdefault((task, model or check.model), {})
        for each, settings in sides:
            specs |= dict.fromkeys(_specs(registry, each, settings, suite.methods))
    for (task, model_id), specs in wanted.items():
        request = make_request(
            registry,
            # The suite's sizes are those of a small machine; a paper's are all items.
            suite=DEFAULT_SUITE if model is None else None,
            tasks=[task],
            models=[model_id],
            **options,
        )
        limits, few = dict(request.limits), dict(request.method_limits)
        if model is None and (form := _form(suite, task)) and form in limits:
            limits.setdefault(task, limits[form])
            if form in request.method_limits:
                few.setdefault(task, request.method_limits[form])
        # A bare name also stands for the suite's other forms of the task.
        yield replace(
            request,
            methods=tuple(specs),
            tasks=(task,) if task in request.tasks else request.tasks,
            task_methods={},
            limits=limits,
            method_limits=few,
        )


def apart(
    registry: Registry, names: Sequence[str], index_path: Path, asked: Sequence[Request]
) -> list[Request]:
    """Return the requests that must be measured afresh.

    A check with a rival needs both in one process. Where they were measured in different runs, the
    cache answers the request and not the check.
    """
    again: dict[int, Request] = {}
    suite = load_suite(DEFAULT_SUITE, registry)
    with connect(index_path) as connection:
        measurements = Measurements(connection)
        for name, check in _checks(registry, names):
            if not check.rival or measurements.find(name, vars(check), "embedded") is not None:
                continue
            for place, request in enumerate(asked):
                task = _task_spec(registry, check, suite, request.limit)
                if task in request.tasks and check.model in request.models:
                    again[place] = replace(request, fresh=True)
    return list(again.values())


def _checks(
    registry: Registry, names: Sequence[str], model: str | None = None
) -> Iterator[tuple[str, Check]]:
    """Yield the checks of the methods that can be run, or those for a model at a paper's scale.

    Raises:
        UsageError: No check names the model.
    """
    found = [
        (name, claim.check)
        for name in names
        if registry.find("method", name).status == "ready"
        for claim in _claims(registry, name)
        if claim.check is not None
    ]
    if model is None:
        yield from found
        return
    known = dict.fromkeys(check.paper_model for _, check in found if check.paper_model)
    if model not in known:
        raise UsageError(
            f"no claim of {', '.join(names)} is tested with the model {model!r}. "
            f"Tested with: {', '.join(known) or 'none'}."
        )
    yield from ((name, check) for name, check in found if check.paper_model == model)


def _claims(registry: Registry, name: str) -> Sequence[Claim]:
    card = registry.card(name)
    return card.claims if card is not None else ()


def _task_spec(
    registry: Registry, check: Check, suite: Suite | None, limit: int | None = None
) -> str:
    """Return the task of a check's measurement as `name[:key=value,…]`.

    Settings that the check leaves open are those of the suite's first form of the task: a small
    machine's length of text, say. Without a suite the measurement is at the paper's scale. Where
    more items are asked for than the settings make, the task gets room for them.

    Raises:
        UsageError: The task has no such setting, or not with such a value.
    """
    name, params = task_settings(vars(check), "embedded" if suite else "paper")
    form = suite and _form(suite, name)
    what = f"task_params of a check on {name!r}"
    cls = registry.load_task(name)
    try:
        base = build(cls, parse_spec(form or name).params, f"task {form or name!r}")
        asked = from_table(cls, dict(params), what) if params else base
        task = replace(base, **{key: getattr(asked, key) for key in params})
    except ValueError as error:
        raise UsageError(f"{what}: {error}") from error
    if limit is not None:
        task = task.with_room_for(limit)
    return form if form and task == base else format_spec(task, name)


def _require_metric(registry: Registry, task: str, metric: str) -> None:
    """Refuse a metric that a task does not have; "" is its headline.

    Raises:
        UsageError: With the nearest name.
    """
    spec = parse_spec(task)
    made = build(registry.load_task(spec.name), spec.params, f"task {task!r}")
    names = [each.name for each in made.metrics]
    if metric and metric not in names:
        raise unknown(f"metric of {task!r}", metric, names)


def _form(suite: Suite, spec: str) -> str | None:
    """Return the suite's first form of a task, the one that claims are held against."""
    name = parse_spec(spec).name
    return next((each.spec for each in suite.task if parse_spec(each.spec).name == name), None)


def _specs(
    registry: Registry, name: str, params: Mapping[str, Any], held: Sequence[str]
) -> list[str]:
    """Return a method with a check's settings as `name[:key=value,…]`.

    Without settings these are the suite's entries of that name: what it holds is measured anyway.
    """
    if not params:
        return [each for each in held if parse_method(each).name == name] or [name]
    method = from_table(registry.load_method(name), dict(params), f"check of {name!r}")
    return [format_spec(method, name)]
