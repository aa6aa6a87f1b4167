"""Planning a large matrix: `pytest tests/benchmarks -m slow --benchmark-enable`."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from runner.plan import Plan, make_plan
from runner.request import Request
from tests.runner.world import save_model

pytestmark = pytest.mark.slow

MODELS, TASKS, METHODS = 10, 10, 1000
LIMIT_SECONDS = 5.0


@pytest.mark.benchmark(timer=time.process_time)
def test_a_hundred_thousand_cells_are_planned_within_five_seconds(
    benchmark: Any, tmp_path: Path
) -> None:
    save_model(tmp_path / "model-0")
    for number in range(1, MODELS):
        shutil.copytree(tmp_path / "model-0", tmp_path / f"model-{number}")
    request = Request(
        methods=(
            "autoregressive",
            *(f"streaming-llm:budget={budget}" for budget in range(8, 7 + METHODS)),
        ),
        tasks=tuple(f"arithmetic-mini:number={64 + number}" for number in range(TASKS)),
        models=tuple(f"path:{tmp_path}/model-{number}" for number in range(MODELS)),
        store=tmp_path / "store",
    )
    make_plan(Request(**{**vars(request), "tasks": request.tasks[:1]}))  # imports the methods

    def plan() -> Plan:
        made = make_plan(request)
        made.describe()
        return made

    before = time.process_time()
    made = benchmark.pedantic(plan, rounds=1)
    assert time.process_time() - before < LIMIT_SECONDS
    assert len(made.cells) == MODELS * TASKS * METHODS
