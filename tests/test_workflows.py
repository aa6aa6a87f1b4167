"""The workflow files: what they may do, and their shell steps, run here with stand-ins."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from results.store import Store
from runner.registry import ROOT
from tests.results.test_compare import write_run

FOLDER = ROOT / ".github" / "workflows"
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in FOLDER.glob("*.yml")}
SECRET = "a-secret-that-must-not-be-seen"

# Stands in for the interpreter of `.venv`: notes how it was called, and answers by what lies in
# the folder `answers`; `real` hands reading commands to the real run.py.
INTERPRETER = """#!/bin/bash
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [ "$1" = - ]; then exec REAL_PYTHON "$@"; fi
command="$2"
echo "$*" >> "$here/calls"
env > "$here/environment-$command"
case "$command" in
  run|fetch|doctor|pip) ;;
  pytest) [ -e "$here/answers/pytest.out" ] && cp "$here/answers/pytest.out" "${@: -1}" ;;
  *) if [ -e "$here/answers/real" ]; then exec REAL_PYTHON ROOT/run.py "${@:2}"; fi ;;
esac
[ "$command" != pytest ] && [ -e "$here/answers/$command.out" ] && \\
  cat "$here/answers/$command.out"
exit "$(cat "$here/answers/$command" 2> /dev/null || echo 0)"
"""


@dataclass
class Runner:
    """Does what GitHub's runner does with the shell steps of a job."""

    workspace: Path
    contexts: dict[str, str] = field(default_factory=dict)
    conclusions: dict[str, int] = field(default_factory=dict)
    output: str = ""

    def __post_init__(self) -> None:
        bin_folder = self.workspace / ".venv" / "bin"
        bin_folder.mkdir(parents=True)
        (self.workspace / "answers").mkdir()
        (self.workspace / "store").mkdir()
        python = bin_folder / "python"
        text = INTERPRETER.replace("REAL_PYTHON", sys.executable).replace("ROOT", str(ROOT))
        python.write_text(text)
        python.chmod(0o755)
        stubs = self.workspace / "stubs"
        stubs.mkdir()
        for name in ("python3", "make", "sudo"):
            (stubs / name).write_text(
                f'#!/bin/bash\necho "{name} $*" >> "{self.workspace}/calls"\n'
            )
            (stubs / name).chmod(0o755)
        shutil.copytree(ROOT / "suites", self.workspace / "suites")
        self.answer("sql", out="run_id\nrun-2\n")
        self.contexts |= {
            "secrets.HF_TOKEN": SECRET,
            "vars.TOKENMARK_STORE": str(self.workspace / "store"),
        }

    def answer(self, command: str, code: int = 0, out: str = "") -> None:
        (self.workspace / "answers" / command).write_text(str(code))
        (self.workspace / "answers" / f"{command}.out").write_text(out)

    @property
    def calls(self) -> list[str]:
        path = self.workspace / "calls"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def summary(self) -> str:
        return (self.workspace / "summary").read_text()

    @property
    def last_good(self) -> str:
        path = self.workspace / "store" / "last-good"
        return path.read_text().strip() if path.exists() else ""

    def run(self, workflow: str, job: str) -> int:
        """Run all steps of a job; return 1 if one of them failed."""
        content = WORKFLOWS[workflow]
        base = self._environment(content.get("env", {}))
        for step in content["jobs"][job]["steps"]:
            condition = step.get("if", "success()")
            if "run" not in step or not self._holds(condition):
                continue
            self.conclusions[step["name"]] = self._shell(step, base)
        return int(any(self.conclusions.values()))

    def _shell(self, step: dict[str, Any], base: dict[str, str]) -> int:
        outputs = self.workspace / "outputs"
        outputs.write_text("")
        (self.workspace / "summary").touch()
        script = self.workspace / "step.sh"
        script.write_text(step["run"])
        done = subprocess.run(
            # What `shell: bash` means there.
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            cwd=self.workspace,
            env={
                "PATH": f"{self.workspace / 'stubs'}:{os.environ['PATH']}",
                "HOME": str(self.workspace),
                "GITHUB_OUTPUT": str(outputs),
                "GITHUB_STEP_SUMMARY": str(self.workspace / "summary"),
                "GITHUB_TOKEN": SECRET,
                "ACTIONS_RUNTIME_TOKEN": SECRET,
                **base,
                **self._environment(step.get("env", {})),
            },
            capture_output=True,
            text=True,
            timeout=120,
        )
        self.output += done.stdout + done.stderr
        for line in outputs.read_text().splitlines():
            name, _, value = line.partition("=")
            self.contexts[f"steps.{step['id']}.outputs.{name}"] = value
        return done.returncode

    def _environment(self, wanted: dict[str, str]) -> dict[str, str]:
        return {
            name: re.sub(r"\$\{\{(.*?)\}\}", lambda found: self._value(found[1]), str(value))
            for name, value in wanted.items()
        }

    def _value(self, expression: str) -> str:
        """Return the first of the parts joined by || that is not empty."""
        for part in map(str.strip, expression.split("||")):
            value = part[1:-1] if part.startswith("'") else self.contexts.get(part, "")
            if value:
                return value
        return ""

    def _holds(self, condition: str) -> bool:
        parts = [part.strip() for part in condition.strip("${} ").split("&&")]
        held = []
        for part in parts:
            if part == "always()":
                held.append(True)
            elif part == "success()":
                held.append(not any(self.conclusions.values()))
            else:
                name, _, other = part.partition(" != ")
                held.append(self._value(name) != other.strip("'"))
        return all(held)


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


# What the files may do


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_asks_for_the_least(name: str) -> None:
    workflow = WORKFLOWS[name]
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["defaults"]["run"]["shell"] == "bash"
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        assert job["timeout-minutes"]
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout"):
                assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("name", WORKFLOWS)
def test_no_expression_is_pasted_into_a_shell(name: str) -> None:
    for job in WORKFLOWS[name]["jobs"].values():
        for step in job["steps"]:
            assert "${{" not in step.get("run", ""), step["name"]


def events(workflow: dict[Any, Any]) -> set[str]:
    return set(workflow[True])  # what YAML makes of `on`


def test_our_own_machine_never_works_for_a_pull_request() -> None:
    hosted_by_us = {
        name
        for name, workflow in WORKFLOWS.items()
        for job in workflow["jobs"].values()
        if "self-hosted" in job["runs-on"]
    }
    assert hosted_by_us == {"nightly"}
    assert events(WORKFLOWS["nightly"]) == {"schedule", "workflow_dispatch"}
    for job in WORKFLOWS["nightly"]["jobs"].values():
        assert "!github.event.repository.fork" in job["if"]
    assert not any("pull_request_target" in events(workflow) for workflow in WORKFLOWS.values())


def test_only_the_step_that_fetches_gets_a_secret() -> None:
    steps = WORKFLOWS["nightly"]["jobs"]["measure"]["steps"]
    assert [step["name"] for step in steps if "secrets." in str(step)] == ["Fetch weights"]
    assert "secrets." not in str({**WORKFLOWS["nightly"], "jobs": None})
    assert "secrets." not in str(WORKFLOWS["ci"])


def test_steps_name_commands_and_options_that_exist(runner: Runner, capsys) -> None:
    import run

    runner.run("nightly", "measure")
    runner.run("ci", "check")
    called = [call.split() for call in runner.calls if call.startswith("run.py ")]
    assert len({call[1] for call in called}) > 5
    for _, command, *arguments in called:
        assert run.main([command, "--help"]) == 0
        shown = capsys.readouterr().out
        for option in (word for word in arguments if word.startswith("--")):
            assert option in shown, f"{command} has no {option}"


# The nightly run


def test_a_good_night_becomes_the_good_run(runner: Runner) -> None:
    (runner.workspace / "store" / "last-good").write_text("run-1\n")
    assert runner.run("nightly", "measure") == 0, runner.output
    assert runner.last_good == "run-2"
    [compared] = [call for call in runner.calls if call.startswith("run.py compare")]
    assert compared.split()[2:4] == ["run-1", "run-2"]
    [measured] = [call for call in runner.calls if call.startswith("run.py run")]
    for option in ("--suite nightly", "--fresh", "--audit", "--offline"):
        assert option in measured
    assert (runner.workspace / "out" / "tables.html").exists()


def test_what_the_suite_needs_is_fetched(runner: Runner) -> None:
    runner.run("nightly", "measure")
    assert "run.py fetch --suite nightly" in runner.calls


def test_the_first_night_has_nothing_to_compare_with(runner: Runner) -> None:
    assert runner.run("nightly", "measure") == 0, runner.output
    assert not any(call.startswith("run.py compare") for call in runner.calls)
    assert runner.last_good == "run-2"


def test_what_measures_sees_no_secret(runner: Runner) -> None:
    runner.run("nightly", "measure")
    seen = (runner.workspace / "environment-run").read_text()
    assert SECRET not in seen
    assert "GITHUB_" not in seen
    assert f"HOME={runner.workspace}" in seen
    assert SECRET in (runner.workspace / "environment-fetch").read_text()


def test_a_regression_fails_with_the_reason_and_keeps_the_good_run(runner: Runner) -> None:
    (runner.workspace / "store" / "last-good").write_text("run-1\n")
    runner.answer("compare", code=1, out="REGRESSED speed\n")
    runner.answer("table", out="the table\n")
    assert runner.run("nightly", "measure") == 1
    assert runner.conclusions["Verdict"] == 1
    assert "::error title=regression::run run-2 is worse than run-1" in runner.output
    assert runner.last_good == "run-1"
    # The page is published all the same.
    assert "the table" in runner.summary
    assert (runner.workspace / "out" / "tables.html").read_text() == "the table\n"


def test_failed_cells_fail_with_the_reason(runner: Runner) -> None:
    runner.answer("run", code=1)
    assert runner.run("nightly", "measure") == 1
    assert "::error title=cells failed::cells of run run-2" in runner.output
    assert runner.last_good == ""


def test_a_run_that_does_not_start_ends_the_job(runner: Runner) -> None:
    runner.answer("run", code=2)
    assert runner.run("nightly", "measure") == 1
    assert runner.conclusions["Measure"] == 2
    assert "(exit code 2)" in runner.output
    assert "Verdict" not in runner.conclusions
    assert runner.last_good == ""


def test_a_comparison_that_cannot_be_made_is_no_success(runner: Runner) -> None:
    (runner.workspace / "store" / "last-good").write_text("gone\n")
    runner.answer("compare", code=2)
    assert runner.run("nightly", "measure") == 1
    assert "::error title=comparison::run run-2 could not be compared with gone" in runner.output
    assert runner.last_good == "gone"


def test_benchmarks_are_held_against_those_of_the_last_good_night(runner: Runner) -> None:
    runner.answer("pytest", out="{}")
    assert runner.run("nightly", "measure") == 0, runner.output
    assert "run.py ingest out/benchmarks.json --store" in " ".join(runner.calls)
    good = runner.workspace / "store" / "benchmarks" / "last-good"
    assert good.read_text() == "run-2\n"
    good.write_text("run-1\n")
    runner.answer("compare", code=1)
    (runner.workspace / "store" / "last-good").unlink()
    assert runner.run("nightly", "measure") == 1
    assert "::error title=benchmarks::" in runner.output
    assert good.read_text() == "run-1\n"


def test_damaged_shards_fail_the_night(runner: Runner) -> None:
    runner.answer("verify", code=1)
    assert runner.run("nightly", "measure") == 1
    assert runner.conclusions["Page and tables"] == 1
    assert runner.last_good == ""


def test_somebody_may_accept_what_changed(runner: Runner) -> None:
    (runner.workspace / "store" / "last-good").write_text("run-1\n")
    runner.answer("compare", code=1)
    runner.contexts["inputs.accept"] = "true"
    assert runner.run("nightly", "measure") == 0
    assert runner.last_good == "run-2"


@pytest.mark.timeout(290)
def test_a_real_regression_is_found_by_the_real_commands(runner: Runner) -> None:
    store = Store(runner.workspace / "store")
    write_run(store, "run-1", day=1)
    write_run(store, "run-2", {"plain": 1.0, "fast": 1.2}, day=2)
    (store.path / "last-good").write_text("run-1\n")
    subprocess.run(
        [sys.executable, "run.py", "rebuild", "--store", str(store.path)], cwd=ROOT, check=True
    )
    (runner.workspace / "answers" / "real").touch()
    assert runner.run("nightly", "measure") == 1
    assert runner.conclusions["Page and tables"] == 0, runner.output
    assert "::error title=speed REGRESSED::fast on toy" in runner.output
    assert "::error title=regression::run run-2 is worse than run-1" in runner.output
    assert "REGRESSED" in runner.summary
    assert "<failure" in (runner.workspace / "out" / "compare.xml").read_text()
    assert "FASTER" in (runner.workspace / "out" / "tables.md").read_text()
    page = runner.workspace / "out" / "page"
    assert "toy" in (page / "index.html").read_text()
    assert "FASTER" in (page / "tasks" / "toy.html").read_text()
    assert runner.last_good == "run-1"


# Every change


def test_a_change_is_checked_tested_and_its_work_compared(runner: Runner) -> None:
    assert runner.run("ci", "check") == 0, runner.output
    assert runner.calls == [
        "make check PYTHON=python",
        "make docs PYTHON=python",
        "sudo make sandbox",
        "make test",
        "run.py run --work-only",
    ]


def test_changed_work_fails_with_the_reason(runner: Runner) -> None:
    runner.answer("run", code=1, out="token-recycling: forwards 31 -> 35\n")
    assert runner.run("ci", "check") == 1
    assert "::error title=work::" in runner.output
    assert "forwards 31 -> 35" in runner.summary
