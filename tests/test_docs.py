from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

import run
from hardware import catalog
from hardware.profile import Profile
from methods.cards import load_card
from models.base import Decoding
from runner import scaffold
from runner.registry import ROOT, Registry
from runner.settings import build, from_table
from runner.suites import Suite, make_request
from tasks.base import Task, Unscored
from tests.models.toy import TableModel, cycle_table

PAGES = sorted(
    path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")) if path.is_file()
)


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


def test_the_example_profile_is_complete():
    text = blocks("docs/adding-a-hardware-profile.md", "toml")[0]
    entry = catalog.parse("l4-example", text)
    assert entry.profile.bandwidth == 300e9


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
    monkeypatch.setattr(scaffold, "scaffold", lambda kind, name, year: [])
    for command in commands:
        if command[0] in ("list", "run", "doctor", "new") or command[:2] == ["show", "method"]:
            assert run.main(command) == 0, command
        elif command[0] in ("table", "sql", "show", "compare", "score"):
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
