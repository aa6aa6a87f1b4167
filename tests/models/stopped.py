"""Trainings that are stopped on purpose, and held against one that was not."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.embedded.training import Checkpoint


class Stopped(Exception):
    """Stands for the signal that ends a process."""


@contextmanager
def stopping(stage_now: Callable[[], str], stage: str = "", steps: int = 0) -> Iterator[None]:
    """Let a training take only so many steps of a stage; its state is written after the last.

    Args:
        stage_now: Says in which stage the training is.
        stage: Where it is stopped; "" lets it run, and no state is written.
        steps: Of AdamW in that stage, at least 1 where one is named.
    """
    update = torch.optim.AdamW.step
    taken = Counter[str]()
    with pytest.MonkeyPatch.context() as patched:

        def step(optimizer: torch.optim.AdamW, *given: Any) -> Any:
            now = stage_now()
            taken[now] += 1
            if now == stage and taken[now] > steps:
                raise Stopped
            is_last = now == stage and taken[now] == steps
            patched.setattr(Checkpoint, "EVERY_SECONDS", 0.0 if is_last else 1e9)
            return update(optimizer, *given)

        patched.setattr(torch.optim.AdamW, "step", step)
        yield


def check_same(whole: Path, parted: Path) -> int:
    """Check that two trainings left the same weights, curve (but for times) and no checkpoint.

    Returns:
        The rows of the curve, its header not counted.
    """
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, parted))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (parted / "checkpoint.safetensors").exists()
    curves = [
        [row[:2] + row[3:] for row in csv.reader((folder / "curve.csv").read_text().splitlines())]
        for folder in (whole, parted)
    ]
    assert curves[0] == curves[1]
    return len(curves[0]) - 1
