"""Checks of claims: each is answered by one of the cells that are measured for it, and no other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from results.claims import task_settings
from runner import reproduce
from runner.registry import Registry
from runner.settings import build, parse_spec

REGISTRY = Registry()


class Measured(NamedTuple):
    """A cell that `reproduce` measures: task and method with all their settings."""

    task: str
    task_params: dict[str, Any]
    method: str
    params: dict[str, Any]


def measured(name: str) -> list[Measured]:
    found = []
    for request in reproduce.requests(REGISTRY, [name], store=Path("nowhere")):
        for task_spec in request.tasks:
            task = parse_spec(task_spec)
            task_params = build(REGISTRY.load_task(task.name), task.params, task_spec).parameters()
            for spec in request.methods:
                method = parse_spec(spec)
                made = build(REGISTRY.load_method(method.name), method.params, spec)
                found.append(Measured(task.name, task_params, method.name, made.parameters()))
    return found


def has(params: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(params[key] == value for key, value in wanted.items())


@pytest.mark.parametrize("name", ["aded", "adadec", "awrs", "dyspec"])
def test_a_check_is_answered_by_one_cell_and_one_rival(name: str) -> None:
    cells, card = measured(name), REGISTRY.card(name)
    assert card is not None
    for claim in card.claims:
        if (check := claim.check) is None:
            continue
        task, wanted = task_settings(vars(check), "embedded")
        for method, params in ((name, check.params), (check.rival, check.rival_params)):
            fitting = [
                cell
                for cell in cells
                if (cell.task, cell.method) == (task, method)
                and has(cell.task_params, wanted)
                and has(cell.params, params)
            ]
            assert len(fitting) == bool(method), f"{claim.id}: {method} {dict(params)}: {fitting}"
