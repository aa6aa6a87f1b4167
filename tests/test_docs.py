from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath

import pytest
import typer

import run
from hardware import catalog
from hardware.profile import Profile
from methods.cards import load_card
from models import loading
from models.base import Decoding
from runner import execute, manual, scaffold
from runner.registry import ROOT, Registry
from runner.request import UsageError
from runner.settings import build, from_table
from runner.suites import Suite, make_request
from tasks.base import Task, Unscored
from tests.models.toy import TableModel, cycle_table
from tests.runner.forked import forked_workers

PAGES = sorted(
    path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")) if path.is_file()
)


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_inside_the_project_leads_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_example_method_works_as_a_plugin(tmp_path):
    path = tmp_path / "again.py"
    path.write_text(blocks("docs/adding-a-method.md", "python")[0], encoding="utf-8")
    method = build(Registry(plugins=(path,)).load_method("again"), {"period": "3"}, "again")
    model = TableModel(cycle_table(3))
    profile = Profile(name="cpu", kind="cpu", label="CPU")
    decoding = Decoding(max_new_tokens=20)
    plain = model.generate([0, 1, 2, 0, 1, 2], decoding)
    with method.apply(model, profile) as changed:
        drafted = changed.generate([0, 1, 2, 0, 1, 2], decoding)
    assert drafted.token_ids == plain.token_ids
    assert len(drafted.trace.forwards) < len(plain.trace.forwards) / 2


def test_the_example_card_is_complete(tmp_path):
    path = tmp_path / "again.toml"
    path.write_text(blocks("docs/adding-a-method.md", "toml")[0], encoding="utf-8")
    assert load_card(path).claims[0].id == "AG-1"


def test_the_example_task_works_as_a_plugin(tmp_path):
    path = tmp_path / "echo.py"
    path.write_text(blocks("docs/adding-a-task.md", "python")[0], encoding="utf-8")
    cls = Registry(plugins=(path,)).load_task("echo")
    task = cls()
    assert isinstance(task, Task)
    items = list(task.items())
    assert len(items) == 6
    assert len(list(task.warmup_items())) >= 4
    assert task.score(items[0], " apple pie") == {"accuracy": 1.0}
    assert task.score(items[0], "pear") == {"accuracy": 0.0}
    assert isinstance(task.score(items[0], " ")["accuracy"], Unscored)
    assert len(task.content_hash()) == 64


def test_the_example_profile_is_complete_and_recognises_its_board(tmp_path):
    (tmp_path / "l4-example.toml").write_text(
        blocks("docs/adding-a-hardware-profile.md", "toml")[0]
    )
    [entry] = catalog.entries(tmp_path)
    assert entry.profile.bandwidth == 300e9
    assert catalog.recognise_gpu("NVIDIA L4", 24 * 2**30, [entry]) is entry
    assert catalog.recognise_gpu("NVIDIA L40S", 48 * 2**30, [entry]) is None


def test_every_command_that_a_page_names_exists_with_its_options():
    commands = typer.main.get_command(run.app).commands
    seen = set()
    for path in PAGES:
        if path.name in ("CHANGELOG.md", "log.md"):
            continue  # what was true then
        for found in re.finditer(r"python run\.py ([a-z-]+)([^`\n#|]*)", path.read_text("utf-8")):
            name, rest = found.groups()
            assert name in commands, f"{path}: run.py {name}"
            offered = {option for each in commands[name].params for option in each.opts}
            for option in re.findall(r"(?<!\S)--[a-z-]+", rest):
                assert option in offered, f"{path}: run.py {name} {option}"
            seen.add(name)
    assert len(seen) > 12


def test_the_commands_of_the_readme_are_understood(monkeypatch):
    commands = [
        shlex.split(line, comments=True)[2:]
        for block in blocks("README.md", "bash")
        for line in block.splitlines()
        if line.startswith("python run.py")
    ]
    assert len(commands) > 5
    requests = []
    monkeypatch.setattr(run, "measure", requests.append)
    monkeypatch.setattr(run, "count_work", lambda methods, update: None)
    monkeypatch.setattr(scaffold, "scaffold", lambda kind, name, year: [Path("test_it.py")])

    def answering(**wanted):
        raise UsageError(f"{wanted['method']} is asked")

    monkeypatch.setattr("runner.lm_eval_run.make_model", answering)
    for command in commands:
        if command[0] in ("list", "run", "doctor", "new") or command[:2] == ["show", "method"]:
            assert run.main(command) == 0, command
        elif command[0] in ("table", "sql", "show", "compare", "score", "export", "lm-eval"):
            assert run.main([*command, "--store", "nowhere"]) == 2, command
        elif command[0] == "reproduce":
            offline = ["--no-run", "--store", "nowhere"]
            assert run.main([*command, *offline]) == 0, command
        else:
            assert command[:2] == ["plan", "--suite"], command
            assert make_request(Registry(), suite=command[2])
    assert requests[0].methods == ("token-recycling:tree_nodes=32", "prompt-lookup")


def test_the_suite_in_the_docstring_is_a_suite():
    from runner import suites

    text = re.search(r"```toml\n(.*?)```", suites.__doc__ or "", re.DOTALL)
    assert text is not None
    made = from_table(Suite, tomllib.loads(text[1]), "suite")
    [task] = made.task
    assert (task.limit, task.methods) == (16, ("autoregressive", "beam-search"))
    assert task.limits == {"beam-search": 8}


def test_the_example_model_runs_from_a_folder_and_as_an_embedded_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [script] = blocks("docs/adding-a-model.md", "python")
    exec(compile(script, "adding-a-model.md", "exec"), {})
    prompt = [5, 6, 7]
    from_folder = loading.load("path:my-model").generate(prompt, Decoding(max_new_tokens=4))
    assert len(from_folder.token_ids) == 4
    # The same files with the card of the page.
    monkeypatch.setattr(loading, "_EMBEDDED", tmp_path / "embedded")
    shutil.copytree("my-model", tmp_path / "embedded" / "my_model")
    (tmp_path / "embedded" / "my_model.toml").write_text(
        blocks("docs/adding-a-model.md", "toml")[0]
    )
    assert loading.embedded_models() == ["my-model"]
    assert loading.capabilities("my-model") == ("TextGenerator", "TokenizedLM")
    embedded = loading.load("my-model").generate(prompt, Decoding(max_new_tokens=4))
    assert embedded.token_ids == from_folder.token_ids
    [command] = re.findall(
        r"`python (run\.py run [^`]*path:my-model[^`]*)`", page("adding-a-model")
    )
    assert run.main(["plan", *shlex.split(command)[2:], "--store", "store"]) == 0


@pytest.mark.timeout(600)
def test_the_tutorial_leads_to_a_leaderboard_with_ones_own_method(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for language, name in (("python", "again.py"), ("toml", "again.toml")):
        example = blocks("docs/adding-a-method.md", language)[0]
        Path(name).write_text(example, encoding="utf-8")
    real = execute.execute

    def briefly(plan, listener):
        quick = [dataclasses.replace(e, calibration_seconds=0.1) for e in plan.experiments]
        return real(dataclasses.replace(plan, experiments=quick), listener)

    monkeypatch.setattr(execute, "execute", briefly)
    commands = [
        shlex.split(line, comments=True)
        for block in blocks("docs/tutorial.md", "bash")
        for line in block.splitlines()
    ]
    ours = [command[2:] for command in commands if command[:2] == ["python", "run.py"]]
    assert {command[0] for command in commands} == {"git", "make", "source", "pip", "python"}
    assert [command[0] for command in ours].count("run") == 2
    printed = {}
    with forked_workers():
        for command in ours:
            assert run.main(command) == 0, command
            printed[command[0]] = capsys.readouterr().out
    assert "autoregressive" in printed["plan"]
    assert "every number follows from its samples" in printed["verify"]
    assert "again" in printed["run"]
    site = Path("page")
    assert (site / "index.html").is_file()
    assert any("again" in path.read_text() for path in site.rglob("*.html"))


def test_the_commands_of_the_fleet_page_are_understood(monkeypatch):
    requests = []
    monkeypatch.setattr(run, "measure", requests.append)
    for block in blocks("docs/fleet.md", "bash"):
        for line in block.splitlines():
            command = shlex.split(line, comments=True)
            if command[:3] == ["python", "run.py", "run"]:
                assert run.main(command[2:]) == 0, command
    assert {request.executor for request in requests} == {"ray", "slurm"}
    assert requests[-1].budget == 8 * 3600


# The manual as a site


def test_every_command_has_a_page_with_every_option():
    commands = typer.main.get_command(run.app).commands
    shown = {name for name, command in commands.items() if not command.hidden}
    pages = manual.command_pages(commands, "python run.py")
    assert pages.keys() == shown
    assert {"worker", "experiment"} & pages.keys() == set()
    for name, text in pages.items():
        assert f"python run.py {name}" in text
        for parameter in commands[name].params:
            if parameter.param_type_name == "option":
                assert f"`{parameter.opts[0]}" in text, (name, parameter.name)
            assert (parameter.help or "") in text.replace("\\|", "|"), (name, parameter.name)


def test_a_decision_without_its_number_is_refused(tmp_path):
    (tmp_path / "0003-a-title.md").write_text("# 4. A title\n")
    with pytest.raises(ValueError, match=r"must begin with `# 3\. Title`"):
        manual.decision_titles(tmp_path)


def test_links_out_of_the_manual_lead_to_the_source(tmp_path):
    docs = tmp_path / "docs"
    (docs / "sub").mkdir(parents=True)
    (tmp_path / "card.toml").write_text("a = 1\n")
    (tmp_path / "NOTE.md").write_text(
        "[in](docs/sub/page.md#x) [out](card.toml) [web](https://x.y)"
    )
    text = "[card](../../card.toml) [note](../../NOTE.md#part) [own](page.md) [no](../../gone.md)"
    place = PurePosixPath("sub/page.md")
    (docs / place).write_text(text)
    linked = set(manual.linked_sources(text, place, tmp_path, docs))
    assert linked == {tmp_path / "card.toml", tmp_path / "NOTE.md"}
    assert manual.with_source_links(text, place, tmp_path, docs) == (
        "[card](../source/card.toml.md) [note](../source/NOTE.md#part) [own](page.md) "
        "[no](../../gone.md)"
    )
    assert manual.source_text(tmp_path / "card.toml", tmp_path, docs) == (
        "# card.toml\n\n`````toml\na = 1\n\n`````\n"
    )
    assert manual.source_text(tmp_path / "NOTE.md", tmp_path, docs) == (
        "[in](../sub/page.md#x) out [web](https://x.y)"
    )


class Loaded(HTMLParser):
    """What a page makes a browser load."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag in ("script", "img", "iframe", "source") and values.get("src"):
            self.found.append(values["src"])
        if tag == "link" and values.get("rel") != "canonical":
            self.found.append(values["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The manual, built as CI builds it: a warning is an error."""
    folder = tmp_path_factory.mktemp("manual")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout + done.stderr == ""
    return folder


def test_the_manual_holds_every_page_and_loads_nothing_from_elsewhere(site):
    built = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    for path in (ROOT / "docs").rglob("*.md"):
        assert path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() in built
    for name in manual.command_pages(typer.main.get_command(run.app).commands, ""):
        assert f"commands/{name}.html" in built
    assert "decisions/index.html" in built
    assert "source/methods/decoding/token_recycling.toml.html" in built
    for path in site.rglob("*.html"):
        if path.name == "404.html":
            continue  # only a host shows it, for any address, so its own are from the root
        parser = Loaded()
        parser.feed(path.read_text(encoding="utf-8"))
        for target in parser.found:
            assert "//" not in target, f"{path} loads {target}"
            with contextlib.suppress(ValueError):
                assert (path.parent / target.split("?")[0].split("#")[0]).exists(), (path, target)
    assert "@import" not in (site / "index.html").read_text()


def test_the_manual_can_be_searched(site):
    found = json.loads((site / "search" / "search_index.json").read_text())
    places = {entry["location"] for entry in found["docs"]}
    assert {"tutorial.html", "commands/run.html", "fleet.html"} <= places
