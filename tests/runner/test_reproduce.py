"""Every claim of every paper gets a verdict, and every check can be run."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import run
from methods.base import Check
from models.loading import embedded_models
from results.claim_report import PaperReport
from results.claims import VERDICTS, task_settings
from results.ingest import rebuild
from results.store import Store
from runner import reproduce
from runner.registry import Registry
from runner.request import Request, UsageError
from runner.settings import from_table
from runner.suites import Suite, SuiteTask
from tests.results.factory import make_cell, make_experiment, make_run, make_samples, write_shard

REGISTRY = Registry()
SUITE = Suite(
    methods=("token-recycling",),
    models=("smollm2-135m",),
    task=(
        SuiteTask(spec="humaneval:max_new_tokens=96", limit=16),
        SuiteTask(spec="humaneval-mini"),
    ),
)


@cache
def settled() -> list[PaperReport]:
    return reproduce.settle_claims(REGISTRY)


def checks() -> list[tuple[str, str, Check]]:
    """Return method, claim and check, for all methods that can be run."""
    return [
        (name, claim.id, claim.check)
        for name, entry in REGISTRY.entries("method").items()
        if entry.status == "ready" and (card := REGISTRY.card(name)) is not None
        for claim in card.claims
        if claim.check is not None
    ]


CHECKS = checks()
CHECK_IDS = [f"{name}-{claim}" for name, claim, _ in CHECKS]


# --- all papers ----------------------------------------------------------------------------------


def test_every_claim_of_all_57_papers_has_a_verdict():
    reports = settled()
    assert len(reports) == 57
    assert sum(len(report.settled) for report in reports) == 1070
    for report in reports:
        assert [claim["id"] for claim in report.claims] == [v.claim_id for v in report.settled]
        for verdict in report.settled:
            assert verdict.verdict in VERDICTS
            assert verdict.detail.endswith((".", "!", "?")), verdict


def test_what_cannot_be_tested_here_says_what_is_missing():
    for report in settled():
        for verdict in report.settled:
            if verdict.verdict == "not-testable-here":
                assert verdict.missing, verdict
            if verdict.verdict == "not-testable-here" and report.status == "planned":
                assert verdict.missing[0].startswith("implementation: ")
                assert verdict.command.startswith(f"python run.py reproduce {report.method}")


def test_without_measurements_only_arithmetic_and_protocols_decide():
    given = {v.verdict for report in settled() for v in report.settled}
    assert given == {"exceeds-bound", "protocol-differs", "not-testable-here"}


def test_the_claims_that_exceed_their_own_counts_are_these():
    exceeding = {
        (report.method, v.claim_id)
        for report in settled()
        for v in report.settled
        if v.verdict == "exceeds-bound"
    }
    assert exceeding == {
        ("dyspec", "DS-2"),
        ("dyspec", "DS-6a"),
        ("dyspec", "DS-6c"),
        ("gsd", "GSD-2c"),
        ("tokenpacker", "C6a"),
    }


def test_claims_with_stated_counts_are_held_against_them_also_where_they_hold():
    held = [
        claim for report in settled() for claim in report.claims if claim["ceiling"] is not None
    ]
    assert len(held) >= 20
    assert all(claim["ceiling_from"] for claim in held)
    (gsd,) = [claim for claim in held if claim["id"] == "GSD-2c"]
    assert gsd["ceiling"] == pytest.approx(2392 / 637)


# --- checks --------------------------------------------------------------------------------------


def test_the_methods_that_can_be_run_have_checks():
    assert len({name for name, _, _ in CHECKS}) >= 5
    assert sum(name == "token-recycling" for name, _, _ in CHECKS) >= 11


@pytest.mark.parametrize(("name", "claim", "check"), CHECKS, ids=CHECK_IDS)
def test_a_check_names_what_there_is(name: str, claim: str, check: Check):
    assert check.model in embedded_models()
    REGISTRY.load_task(check.task)
    if check.paper_task:
        REGISTRY.load_task(check.paper_task)
    for profile in check.paper_hardware:
        REGISTRY.find("hardware", profile)
    for scale, wanted in (("embedded", check.task_params), ("paper", check.paper_task_params)):
        name_of_task, _ = task_settings(vars(check), scale)  # type: ignore[arg-type]  # one of two
        task = from_table(REGISTRY.load_task(name_of_task), dict(wanted), name_of_task)
        assert {key: task.parameters()[key] for key in wanted} == dict(wanted)
        assert check.metric in ("", *(metric.name for metric in task.metrics))
    sides: list[tuple[str, Any]] = [(name, check.params), (name, check.paper_params)]
    if check.rival:
        sides.append((check.rival, check.rival_params))
    for method, params in sides:
        made = from_table(REGISTRY.load_method(method), dict(params), method)
        # A cell is found by the settings that its record holds.
        assert {key: made.parameters()[key] for key in params} == dict(params)


def test_all_that_a_task_and_model_need_is_one_request():
    (request,) = reproduce.requests(REGISTRY, ["token-recycling"], store=Path("somewhere"))
    (task,) = request.tasks
    assert task.startswith("humaneval:")
    assert "max_new_tokens=" in task
    assert request.task_methods == {}
    assert request.models == ("smollm2-135m",)
    assert request.store == Path("somewhere")
    assert request.limits[task] == 16
    assert sorted(request.methods) == [
        "prompt-lookup:num_tokens=auto",
        "token-recycling:state=session,tree_nodes=auto",
        "token-recycling:tree_nodes=auto",
    ]


def test_a_check_of_a_metric_that_its_task_lacks_is_refused():
    task = "coco-mini:output=point"
    reproduce._require_metric(REGISTRY, task, "f1")
    with pytest.raises(UsageError, match=r"'duplicate'\. Did you mean 'duplicates'\?"):
        reproduce._require_metric(REGISTRY, task, "duplicate")
    # Boxes have it, points do not.
    reproduce._require_metric(REGISTRY, "coco-mini", "f1@mIoU")
    with pytest.raises(UsageError, match="no metric of 'coco-mini:output=point' named 'f1@mIoU'"):
        reproduce._require_metric(REGISTRY, task, "f1@mIoU")


def made_check(**changes: Any) -> Check:
    return Check(measure="speedup", model="smollm2-135m", **{"task": "humaneval", **changes})


@pytest.mark.parametrize(
    ("changes", "is_suite", "expected"),
    [
        ({}, True, "humaneval:max_new_tokens=96"),
        ({}, False, "humaneval"),
        ({"task": "constrained-mini"}, False, "constrained-mini"),
        # What the check leaves open is as in the suite.
        (
            {"task_params": {"temperature": 0.6}},
            True,
            "humaneval:max_new_tokens=96,temperature=0.6",
        ),
        ({"task_params": {"max_new_tokens": 96}}, True, "humaneval:max_new_tokens=96"),
        ({"task_params": {"temperature": 0.6}}, False, "humaneval:temperature=0.6"),
        (
            {"task_params": {"temperature": 0.6}, "paper_task": "humaneval-mini"},
            False,
            "humaneval-mini",
        ),
        (
            {"paper_task": "humaneval", "paper_task_params": {"temperature": 0.2}},
            False,
            "humaneval:temperature=0.2",
        ),
    ],
)
def test_a_check_s_settings_of_the_task_are_measured(
    changes: dict[str, Any], is_suite: bool, expected: str
):
    suite = SUITE if is_suite else None
    assert reproduce._task_spec(REGISTRY, made_check(**changes), suite) == expected


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"temprature": 0.6}, "has no key 'temprature'. Did you mean 'temperature'?"),
        ({"temperature": "warm"}, "task_params of a check on 'humaneval': temperature must be"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_settings_that_the_task_does_not_take_are_named(params: dict[str, Any], words: str):
    with pytest.raises(UsageError, match=re.escape(words)):
        reproduce._task_spec(REGISTRY, made_check(task_params=params), SUITE)


def test_a_form_of_a_task_has_as_many_items_as_the_suite_s(monkeypatch):
    checks = [made_check(), made_check(task_params={"temperature": 0.6})]
    monkeypatch.setattr(
        reproduce, "_checks", lambda *arguments: (("token-recycling", each) for each in checks)
    )
    plain, warm = reproduce.requests(REGISTRY, ["token-recycling"])
    assert warm.tasks == (f"{plain.tasks[0]},temperature=0.6",)
    assert warm.limits[warm.tasks[0]] == plain.limits[plain.tasks[0]] == 16


def test_the_papers_model_takes_the_place_of_ours_and_all_items():
    model = "hf:lmsys/vicuna-7b-v1.3"
    (request,) = reproduce.requests(REGISTRY, ["token-recycling"], model=model)
    assert (request.models, request.tasks) == ((model,), ("humaneval",))
    assert (request.limits, request.limit) == ({}, None)
    with pytest.raises(UsageError, match=r"'hf:gpt2'. Tested with: hf:lmsys/vicuna-7b-v1.3"):
        list(reproduce.requests(REGISTRY, ["token-recycling"], model="hf:gpt2"))


def test_a_task_that_makes_its_items_makes_as_many_as_are_asked_for():
    def specs(names: list[str], limit: int | None) -> set[str]:
        return {
            task
            for request in reproduce.requests(REGISTRY, names, limit=limit)
            for task in request.tasks
        }

    few, many = specs(["sjd"], 50), specs(["sjd"], 300)
    assert not any("images=" in spec for spec in few)
    assert many == {spec + (":" if ":" not in spec else ",") + "images=300" for spec in few}
    # Data that have an end stay as they are.
    assert specs(["token-recycling"], 10**6) == specs(["token-recycling"], None)


def test_planned_methods_need_nothing_measured():
    assert list(reproduce.requests(REGISTRY, ["nar"])) == []


def test_a_check_with_a_rival_measured_elsewhere_is_measured_afresh(tmp_path: Path):
    (request,) = reproduce.requests(REGISTRY, ["token-recycling"], store=tmp_path)
    names = {"token-recycling": {"tree_nodes": "auto", "state": "cold"}, "prompt-lookup": {}}
    for number, (name, params) in enumerate(names.items()):
        experiment = make_experiment(
            ("autoregressive", name),
            experiment_id=f"e{number}",
            task="humaneval",
            model="smollm2-135m",
        )
        cells = [
            make_cell(experiment, "autoregressive"),
            make_cell(experiment, name, params={"num_tokens": "auto", **params}),
        ]
        samples = make_samples(experiment, {"autoregressive": 1.0, name: 1.5})
        write_shard(Store(tmp_path), experiment, cells, samples)
        Store(tmp_path).write_run(make_run([experiment], run_id=f"run-{number}"))
    index = rebuild(tmp_path, REGISTRY.claims())
    (again,) = reproduce.apart(REGISTRY, ["token-recycling"], index, [request])
    assert again.fresh
    assert again.methods == request.methods
    other = Request(methods=("x",), tasks=("humaneval-mini",), models=("smollm2-135m",))
    assert reproduce.apart(REGISTRY, ["token-recycling"], index, [other]) == []


# --- the command ---------------------------------------------------------------------------------


def test_the_command_lists_all_papers_without_a_store(tmp_path: Path, capsys):
    assert run.main(["reproduce", "--store", str(tmp_path / "none")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("57 papers, 1070 claims: 5 exceeds-bound, ")
    assert sum(" exceeds-bound " in line for line in lines) == 5
    assert len(lines) == 1070 + 3
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("format", ["md", "json", "html"])
def test_the_command_writes_other_formats_and_badges(format: str, tmp_path: Path, capsys):
    options = ["--no-run", "--format", format, "--badges", str(tmp_path / "badges")]
    assert run.main(["reproduce", "gsd", "--store", str(tmp_path), *options]) == 0
    shown = capsys.readouterr().out
    assert "GSD-2c" in shown
    if format == "json":
        assert json.loads(shown)[0]["verdicts"]["exceeds-bound"] == 1
    assert {path.name for path in (tmp_path / "badges").iterdir()} == {"gsd.svg", "gsd.json"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gds"], "Did you mean 'gsd'"),
        (["autoregressive"], "has no claims to reproduce"),
        (["gsd", "--format", "pdf"], "--format must be one of table, md, json, html"),
        (["gsd", "--model", "hf:a/b"], "no claim of gsd is tested with the model 'hf:a/b'"),
    ],
)
def test_wrong_usage_is_named(arguments: list[str], words: str, capsys):
    assert run.main(["reproduce", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_the_command_measures_what_is_missing_and_judges_it(tmp_path: Path, monkeypatch, capsys):
    """The measuring itself is `run`; here it leaves samples that decide the claims."""

    def measure(request: Request) -> bool:
        asked.append(request)
        store = Store(request.store)
        experiment = make_experiment(
            ("autoregressive", "token-recycling"),
            items=16,
            experiment_id=f"e{len(asked)}",
            task="humaneval",
            model="smollm2-135m",
        )
        params = {"tree_nodes": "auto", "state": "cold", "candidates": 8, "dtype": "int64"}
        cells = [
            make_cell(experiment, "autoregressive"),
            make_cell(
                experiment, "token-recycling", params=params, notes={"state_bytes": 49152 * 64}
            ),
        ]
        speeds = {"autoregressive": 1.0, "token-recycling": 1.8}
        write_shard(store, experiment, cells, make_samples(experiment, speeds, 0.01))
        store.write_run(make_run([experiment], run_id=f"run-{len(asked)}"))
        return len(asked) == 1  # the second one fails

    asked: list[Request] = []
    monkeypatch.setattr(run, "measure_quietly", measure)
    command = ["reproduce", "token-recycling", "--store", str(tmp_path), "--format", "json"]
    assert run.main(command) == 1  # a part of it failed, and the verdicts are printed all the same
    (paper,) = json.loads(capsys.readouterr().out)
    found = {claim["id"]: claim["verdict"] for claim in paper["claims"]}
    assert found["TR-1"] == found["TR-5b"] == found["TR-6a"] == "direction"
    assert found["TR-2"] == "reproduced"
    assert found["TR-3"] == "not-testable-here"  # its rival is in neither experiment
    assert [request.fresh for request in asked] == [False, True]


def test_no_run_judges_by_what_is_there(tmp_path: Path, monkeypatch):
    def measure(request: Request) -> bool:
        raise AssertionError(request)

    monkeypatch.setattr(run, "measure_quietly", measure)
    assert run.main(["reproduce", "token-recycling", "--no-run", "--store", str(tmp_path)]) == 0


def test_what_cannot_be_planned_is_said_and_the_verdicts_still_come(
    tmp_path: Path, monkeypatch, capsys
):
    def refuse(request: Request) -> None:
        raise UsageError("there are no weights")

    monkeypatch.setattr("runner.plan.make_plan", refuse)
    assert run.main(["reproduce", "token-recycling", "--store", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert "not measured: there are no weights" in shown.err
    assert "1 papers, 14 claims: 14 not-testable-here" in shown.out
