"""The work of every method is what is on file, and would be anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import run
from runner import fingerprint
from runner.registry import Registry
from runner.request import UsageError

REGISTRY = Registry()
METHODS = fingerprint.methods(REGISTRY)
COMMITTED = fingerprint.committed()


@pytest.mark.parametrize("name", METHODS)
def test_the_work_of_a_method_is_what_is_on_file(name: str):
    assert name in COMMITTED, (
        f"{name} has no fingerprint on file. This adds it: {fingerprint.UPDATE}"
    )
    found = {name: fingerprint.fingerprint(REGISTRY.load_method(name))}
    changed = fingerprint.differences({name: COMMITTED[name]}, found)
    assert not changed, f"The work has changed. If it should: {fingerprint.UPDATE}\n" + "\n".join(
        f"{row['method']}, {row['text']}: {row['what']} {row['before']} -> {row['now']}"
        for row in changed
    )


def test_no_fingerprint_is_left_of_a_method_that_is_gone():
    assert COMMITTED.keys() <= set(METHODS), f"This removes them: {fingerprint.UPDATE}"


def test_peers_and_planned_methods_have_none():
    assert "autoregressive" in METHODS
    assert not {"hf-generate", "nar"} & set(METHODS)


def test_plain_decoding_counts_as_on_paper():
    counts = fingerprint.fingerprint(REGISTRY.load_method("autoregressive"))["llama greedy"]
    assert isinstance(counts["output_tokens"], int)
    prompts = [len(prompt) for prompt in fingerprint._PROMPTS]
    # Every token but the prefill's takes a forward, which sees one token more than the last one.
    forwards = fingerprint.LENGTH - 1
    assert counts["forwards"] == counts["forward_tokens"] == forwards * len(prompts)
    read = sum(p * (1 + forwards) + forwards * (forwards + 1) // 2 for p in prompts)
    # Keys and values, 2 layers, 2 heads of 8 numbers of 8 bytes.
    assert counts["kv_bytes"] == read * 2 * 2 * 2 * 8 * 8
    hidden, inner, vocabulary, key_size = 32, 64, 64, 16
    layer = 2 * hidden * hidden + 2 * hidden * key_size + 3 * hidden * inner
    tokens = sum(prompts) + forwards * len(prompts)
    heads = len(prompts) * fingerprint.LENGTH  # the head runs once a prompt, then for each forward
    pairs = sum(p * (p + 1) // 2 + forwards * p + forwards * (forwards + 1) // 2 for p in prompts)
    matrices = 2 * (2 * layer * tokens + hidden * vocabulary * heads)
    assert counts["flops"] == matrices + 4 * 2 * hidden * pairs


@pytest.mark.parametrize("name", ["token-recycling", "speculative", "prompt-lookup"])
def test_rounding_of_another_machine_would_change_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    exact = fingerprint.tiny_models

    def disturbed() -> dict[str, Any]:
        models = exact()
        draw = torch.Generator().manual_seed(0)
        for model in models.values():
            with torch.no_grad():
                for parameter in model.module.parameters():
                    noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
                    parameter.mul_(1 + 1e-10 * noise)
        return models

    monkeypatch.setattr(fingerprint, "tiny_models", disturbed)
    assert fingerprint.fingerprint(REGISTRY.load_method(name)) == COMMITTED[name]


def test_weights_are_exact_and_do_not_depend_on_torch_or_its_seed():
    torch.manual_seed(1)
    one = fingerprint.tiny_models()["llama"].module.state_dict()
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    other = fingerprint.tiny_models()["llama"].module.state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, weights in one.items():
        assert torch.equal(weights, other[name])
        if weights.ndim > 1:
            assert torch.equal(weights * 1024, (weights * 1024).round())


# --- the file and the command --------------------------------------------------------------------


def test_differences_name_the_number_that_changed():
    before = {"a": {"llama": {"flops": 1, "forwards": 2}}, "b": {}}
    after = {"a": {"llama": {"flops": 3, "forwards": 2}}, "c": {}}
    assert fingerprint.differences(before, after) == [
        {"method": "a", "text": "llama", "what": "flops", "before": "1", "now": "3"},
        {"method": "b", "text": "", "what": "gone", "before": "", "now": ""},
        {"method": "c", "text": "", "what": "new", "before": "", "now": ""},
    ]
    assert fingerprint.differences(before, before) == []


FORWARDS = COMMITTED["autoregressive"]["llama greedy"]["forwards"]
WRONG = f"forwards  {FORWARDS + 1}      {FORWARDS}"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the file of the fingerprints elsewhere; it holds one that is wrong."""
    path = tmp_path / "folder" / "work.json"
    wrong = json.loads(json.dumps({"autoregressive": COMMITTED["autoregressive"], "gone": {}}))
    wrong["autoregressive"]["llama greedy"]["forwards"] += 1
    fingerprint.write(wrong, path)
    monkeypatch.setattr(fingerprint, "PATH", path)
    monkeypatch.setattr(fingerprint, "committed", lambda: json.loads(path.read_text()))
    monkeypatch.setattr(
        fingerprint, "write", lambda found: path.write_text(json.dumps(found), encoding="utf-8")
    )
    return path


def test_the_command_shows_what_changed_and_ends_with_1(path: Path, capsys):
    before = path.read_text()
    assert run.main(["run", "--work-only", "--method", "autoregressive"]) == 1
    shown = capsys.readouterr()
    assert WRONG in shown.out
    assert fingerprint.UPDATE in shown.err
    assert path.read_text() == before


def test_updating_writes_what_was_asked_for_and_leaves_the_rest(path: Path, capsys):
    command = ["run", "--work-only", "--method", "autoregressive"]
    assert run.main([*command, "--update"]) == 0
    assert WRONG in capsys.readouterr().out
    assert json.loads(path.read_text()) == {
        "autoregressive": COMMITTED["autoregressive"],
        "gone": {},
    }
    assert run.main(command) == 0
    assert "the committed fingerprints hold" in capsys.readouterr().out


def test_updating_everything_drops_what_is_gone(path: Path, monkeypatch):
    monkeypatch.setattr(fingerprint, "methods", lambda registry: ["autoregressive"])
    assert run.main(["run", "--work-only", "--update"]) == 0
    assert json.loads(path.read_text()) == {"autoregressive": COMMITTED["autoregressive"]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--update"], "--update belongs to --work-only"),
        (["--work-only", "--method", "autoregressive:x=1"], "at a method's defaults"),
        (["--work-only", "--method", "hf-generate"], "no work fingerprint"),
        (["--work-only", "--method", "nar"], "planned"),
        (["--work-only", "--method", "autoregresive"], "Did you mean 'autoregressive'"),
    ],
)
def test_wrong_usage_is_named(arguments: list[str], words: str, capsys):
    assert run.main(["run", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_file_that_is_no_json_says_how_to_write_it_anew(tmp_path: Path):
    path = tmp_path / "work.json"
    path.write_text("{")
    with pytest.raises(UsageError, match="--work-only --update"):
        fingerprint.committed(path)
    assert fingerprint.committed(tmp_path / "missing.json") == {}
