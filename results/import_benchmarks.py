"""pytest-benchmark's JSON as experiments: one a benchmark, its rounds as items, in blocks.

A benchmark has thousands of short rounds, of which neighbours are alike. They are cut into at most
`MOST_BLOCKS` blocks of consecutive rounds, and an item is the median of a block, which a
scheduler's pause does not move. So `compare` treats a benchmark like any cell: matched by name and
parameters, block by block, an interval, and a threshold from repeated measurements of one commit on
one machine.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from results.imported import ForeignError, Imported, Sample, write_run
from results.store import Store

TASK = "pytest-benchmark"
SCENARIO = "benchmark"
MOST_BLOCKS = 30
# Of the machine: what decides about speed, and nothing that says whose it is.
_MACHINE = ("system", "machine", "processor", "python_implementation", "python_version")


def is_benchmarks(data: Mapping[str, Any]) -> bool:
    """Return whether a file holds benchmarks of pytest-benchmark."""
    return {"benchmarks", "machine_info", "commit_info"} <= data.keys()


def take_in(data: Mapping[str, Any], path: Path, store: Store) -> list[str]:
    """Import a file of benchmarks into a store; return the ids of what came in.

    Args:
        data: What the file holds.
        path: Where it is, for messages and the record.
        store: Where the experiments go.

    Raises:
        ForeignError: It holds no benchmark, or one without its rounds.
    """
    try:
        when = datetime.fromisoformat(data["datetime"])
        found = [_experiment(data, each) for each in data["benchmarks"]]
        program = f"pytest-benchmark {data['version']}"
    except (KeyError, TypeError, ValueError) as error:
        raise ForeignError(
            f"{path} is no complete file of pytest-benchmark ({type(error).__name__} {error}): "
            "write it with --benchmark-json, which keeps every round."
        ) from error
    if not found:
        raise ForeignError(f"{path} holds no benchmark: run pytest with --benchmark-enable.")
    return write_run(store, found, when=when, source=path.name, program=program)


def _experiment(data: Mapping[str, Any], benchmark: Mapping[str, Any]) -> Imported:
    machine = data["machine_info"]
    cpu = machine.get("cpu") or {}
    facts = {name: str(machine.get(name, "")) for name in _MACHINE}
    facts["cpu_model"] = str(cpu.get("brand_raw") or "")
    identity = json.dumps([facts, machine.get("node"), cpu.get("count")], sort_keys=True)
    commit = data["commit_info"]
    name = str(benchmark["fullname"])
    params = benchmark.get("params") or {}
    if params:
        name = name.removesuffix(f"[{benchmark['param']}]")
    return Imported(
        task=TASK,
        task_params={},
        task_version=str(data["version"]),
        task_hash="",
        model="none",
        model_params={},
        model_hash="",
        method=name.rpartition("::")[2],
        params={"file": name.partition("::")[0], **{k: str(v) for k, v in params.items()}},
        spec=str(benchmark["fullname"]),
        family="benchmarks",
        role="peer",
        hardware=facts["cpu_model"] or facts["machine"] or "unknown",
        scenario=SCENARIO,
        seed=0,
        environment={
            **facts,
            "cpu_available_cores": cpu.get("count"),
            # Tells machines apart without saying their names.
            "machine_id": hashlib.sha256(identity.encode()).hexdigest()[:16],
        },
        metrics=[],
        samples=[
            Sample(item=f"block-{place:02d}", seconds=seconds, scores={})
            for place, seconds in enumerate(_blocks(benchmark["stats"]["data"]))
        ],
        corpus={},
        facts={"rounds": len(benchmark["stats"]["data"]), "git_commit": commit.get("id")},
        key=[identity, commit.get("id"), bool(commit.get("dirty"))],
    )


def _blocks(rounds: Sequence[float]) -> list[float]:
    """Return the median seconds of consecutive blocks of rounds, of about the same size.

    Raises:
        ValueError: There is no round.
    """
    if not rounds:
        raise ValueError("a benchmark without rounds")
    number = min(MOST_BLOCKS, len(rounds))
    edges = [place * len(rounds) // number for place in range(number + 1)]
    return [statistics.median(rounds[start:end]) for start, end in itertools.pairwise(edges)]
