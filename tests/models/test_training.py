"""Tests of what the recipes share: a stopped training goes on as if it had not been stopped."""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from models.embedded.tiny_causal import train as tiny_causal
from models.embedded.tiny_dllm import train as tiny_dllm
from models.embedded.training import AveragedWeights, Checkpoint, Clock, Curve
from tests.models.stopped import Stopped


def arguments(out: Path) -> argparse.Namespace:
    out.mkdir(exist_ok=True)
    return argparse.Namespace(
        out=out,
        device="cpu",
        seed=3,
        steps_scale=0.002,
        max_seconds=None,
        eval_only=False,
        compile=False,
        init=None,
        prefix_share=0.0,
    )


def train(recipe: Any, out: Path) -> dict[str, Any]:
    steps = recipe.SMOKE._replace(steps=4)
    return recipe.train(arguments(out), torch.device("cpu"), steps, time.monotonic())


@pytest.mark.parametrize(
    ("recipe", "loss", "calls", "files"),
    [
        (tiny_dllm, "diffusion_loss", 3, ("model",)),
        # Three steps of next-token loss, then two calls in a step of two streams.
        (tiny_causal, "next_token_loss", 2, ("model", "dual_stream")),
        (tiny_causal, "_dual_losses", 2, ("model", "dual_stream")),
    ],
)
def test_a_stopped_training_goes_on_bit_for_bit(
    recipe: Any,
    loss: str,
    calls: int,
    files: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Checkpoint, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr(recipe, "PRINT_EVERY_SECONDS", 0.0)
    train(recipe, tmp_path / "whole")
    made = getattr(recipe, loss)
    remaining = iter(range(calls - 1))

    def failing(*given: Any) -> Any:
        if next(remaining, None) is None:
            raise Stopped
        return made(*given)

    with monkeypatch.context() as patched:
        patched.setattr(recipe, loss, failing)
        with pytest.raises(Stopped):
            train(recipe, tmp_path / "stopped")
    assert (tmp_path / "stopped/checkpoint.safetensors").is_file()
    facts = train(recipe, tmp_path / "stopped")
    for file in files:
        whole = load_file(tmp_path / f"whole/{file}.safetensors")
        parted = load_file(tmp_path / f"stopped/{file}.safetensors")
        assert all(torch.equal(whole[name], parted[name]) for name in whole)
    assert not (tmp_path / "stopped/checkpoint.safetensors").exists()
    curves = [
        [
            (row["stage"], row["step"], row["loss"])
            for row in csv.DictReader((tmp_path / name / "curve.csv").read_text().splitlines())
        ]
        for name in ("whole", "stopped")
    ]
    assert curves[0] == curves[1]
    if recipe is tiny_causal:
        assert {facts[f"{stage} stage"]["train_steps"] for stage in ("causal", "dual-stream")} == {
            3
        }


def parts() -> dict[str, Any]:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    return {
        "module": module,
        "optimizer": torch.optim.AdamW(module.parameters(), lr=0.1),
        "average": AveragedWeights(module, 0.9),
        "noise": torch.Generator().manual_seed(1),
    }


def step(own: dict[str, Any]) -> None:
    draw = torch.randn(4, 3, generator=own["noise"])
    own["optimizer"].zero_grad()
    own["module"](draw).square().sum().backward()
    own["optimizer"].step()
    own["average"].update(own["module"])


def test_every_part_of_the_state_comes_back(tmp_path: Path) -> None:
    first, clock = parts(), Clock(10)
    for _ in range(3):
        step(first)
    clock.go_on(3, 50.0)
    Checkpoint(tmp_path, {"seed": 1}).save("only", 3, clock, first, now=True)
    second, later = parts(), Clock(10)
    checkpoint = Checkpoint(tmp_path, {"seed": 1})
    assert checkpoint.kept == ("only", 3)
    checkpoint.restore("only", later, second)
    assert later.done == 3
    assert later.seconds == pytest.approx(50.0, abs=5.0)
    assert next(iter(later)) == (3, 0.3)
    for own in (first, second):
        step(own)
    assert torch.equal(first["module"].weight, second["module"].weight)
    averages = [own["average"].state_dict() for own in (first, second)]
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])


def test_another_stage_is_left_alone(tmp_path: Path) -> None:
    Checkpoint(tmp_path, {}).save("first", 3, Clock(10), parts(), now=True)
    clock, own = Clock(10), parts()
    before = own["module"].weight.clone()
    Checkpoint(tmp_path, {}).restore("second", clock, own)
    assert clock.done == 0
    assert torch.equal(own["module"].weight, before)


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    Checkpoint(tmp_path, {"seed": 1}).save("only", 3, Clock(10), parts(), now=True)
    with pytest.raises(ValueError, match=r"is of another recipe: \{'seed': 1\}, not \{'seed': 2\}"):
        Checkpoint(tmp_path, {"seed": 2})


def test_it_is_saved_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tmp_path, {})
    checkpoint.save("only", 1, Clock(10), parts())
    assert not checkpoint.path.exists()
    monkeypatch.setattr(Checkpoint, "EVERY_SECONDS", 0.0)
    checkpoint.save("only", 1, Clock(10), parts())
    assert checkpoint.path.is_file()


def test_facts_of_earlier_stages_stay(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, {})
    checkpoint.facts["first"] = {"train_steps": 5}
    checkpoint.save("second", 0, Clock(10), parts(), now=True)
    again = Checkpoint(tmp_path, {})
    assert json.loads(json.dumps(again.facts)) == {"first": {"train_steps": 5}}
    assert (again.stage, again.done) == ("second", 0)


def test_the_curve_is_written_again_from_the_checkpoint_on(tmp_path: Path) -> None:
    path = tmp_path / "curve.csv"
    curve = Curve(path, ("loss",))
    for stage, at in (("a", 0), ("a", 5), ("b", 0), ("b", 5), ("b", 9)):
        curve.add(stage, at, 1.0, loss=at)
    curve = Curve(path, ("loss",), ("b", 5))
    curve.add("b", 6, 2.0, loss=7.0)
    rows = [row[:2] for row in list(csv.reader(path.read_text().splitlines()))[1:]]
    assert rows == [["a", "0"], ["a", "5"], ["b", "0"], ["b", "6"]]
    Curve(path, ("loss",))
    assert len(list(csv.reader(path.read_text().splitlines()))) == 1
