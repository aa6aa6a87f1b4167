"""What a worker is told: one experiment as plain data, written to a file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from results.records import CellRecord, Status
from runner.request import Scenario

# Exit codes of a worker besides 0.
RESTART = 75  # a cell failed: start again for the others
BUSY = 76  # another worker holds the experiment


def now() -> str:
    """Return the time as records have it: ISO 8601, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True, kw_only=True)
class CellSpec:
    """One method of an experiment.

    Attributes:
        cell_id: Key over all that can change the answer.
        method: Spec, `name[:key=value,…]`, defaults left out.
        name: Its name alone.
        params: Its hyper-parameters.
        num_items: How many of the experiment's items it runs, the first ones.
        family, role, declared_output, parts: For the record.
    """

    cell_id: str
    method: str
    name: str
    params: dict[str, Any]
    num_items: int
    family: str
    role: str
    declared_output: str
    parts: list[str] = field(default_factory=list)

    def record(self, experiment_id: str, status: Status, **details: Any) -> CellRecord:
        """Return the cell's record, ended now.

        Args:
            experiment_id: Whose cell it is.
            status: How it ended.
            details: Other fields of the record.
        """
        return CellRecord(
            cell_id=self.cell_id,
            experiment_id=experiment_id,
            method=self.name,
            params=self.params,
            family=self.family,
            role=self.role,
            declared_output=self.declared_output,
            spec=self.method,
            parts=self.parts,
            status=status,
            finished=now(),
            **details,
        )


@dataclass(frozen=True, kw_only=True)
class ExperimentSpec:
    """One experiment: a baseline and its methods on the same task, model, hardware and seed.

    Attributes:
        experiment_id: Key of the whole; the shard's name.
        run_id: Run that asks for it.
        task, model: Specs.
        hardware: Profile name, already settled.
        items: Ids of the items to measure, in standard order.
        groups: Group of each item.
        cells: The baseline first.
        store: Folder of the results.
        plugins: Python files to load first.
        sample_timeout: Seconds that one sample may take.
        memory_bytes: Host memory of the worker; on its way to a fleet, 0 is what a machine has.
        cpu_seconds: Processor time of a worker process, all threads together; 0 for no limit. On
            its way to a fleet, of each core.
        audit: Whether to audit the cells.
        calibration_seconds: Budget for measuring lat(N).
        model_hash, task_hash, margin, quality_margin, scale: For the record.
    """

    experiment_id: str
    run_id: str
    task: str
    model: str
    hardware: str
    scenario: Scenario
    seed: int
    repeats: int
    items: list[str]
    groups: list[str]
    cells: list[CellSpec]
    store: str
    plugins: list[str] = field(default_factory=list)
    sample_timeout: float = 120.0
    memory_bytes: int = 0
    cpu_seconds: int = 0
    audit: bool = False
    calibration_seconds: float = 12.0
    offline: bool = False
    model_hash: str = ""
    task_hash: str = ""
    task_version: str = ""
    margin: float = 0.05
    quality_margin: float = 0.0
    scale: str = "embedded"

    @property
    def title(self) -> str:
        """Name for people."""
        return f"{self.task} with {self.model}"

    @property
    def num_samples(self) -> int:
        """Measurements of all cells together."""
        return self.repeats * sum(cell.num_items for cell in self.cells)

    def write(self, path: Path) -> None:
        """Write the spec as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def read(cls, path: Path) -> ExperimentSpec:
        """Read a spec that `write` wrote."""
        return cls.of(json.loads(path.read_text()))

    @classmethod
    def of(cls, data: dict[str, Any]) -> ExperimentSpec:
        """Return the spec that was made into plain data."""
        return cls(**{**data, "cells": [CellSpec(**cell) for cell in data["cells"]]})
