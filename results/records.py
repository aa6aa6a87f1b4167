"""The records that a run leaves behind: plain data, written by the runner, read by the index.

A store is a folder:

    shards/<experiment_id>/experiment.json      ExperimentRecord
                          /cells/<cell_id>.json CellRecord, written when the cell ends
                          /samples.jsonl        one SampleRecord a line, appended and fsynced
                          /samples.parquet      the same, sealed; the journal is then removed
                          /scores.jsonl         one ScoreRecord a line: (cell, item) scores
                          /scores.parquet       the same, sealed
                          /corpus.jsonl         one CorpusRecord a line: (cell, metric) numbers
                          /corpus.parquet       the same, sealed; both only where there are any
                          /manifest.json        SHA-256 of every file above; present once sealed
    runs/<run_id>.json                          RunRecord
    tokenmark.duckdb                            an index of all that

The folder is the truth. A journal's last line may be cut short by a kill; it is then ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 1

Status = Literal[
    "ok", "failed", "oom-device", "oom-host", "timeout", "killed", "unsupported", "invalid-output"
]
OutputCheck = Literal["identical", "tie", "violation", "same-distribution", "approximate"]


@dataclass(frozen=True, kw_only=True)
class MetricRecord:
    """A metric of the experiment's task; the first one is the headline.

    `kind` is `binary`, `mean`, `pass@k` or `corpus`, as in `tasks.base.Metric`.
    """

    name: str
    unit: str
    kind: str
    higher_is_better: bool
    k: int = 1


@dataclass(frozen=True, kw_only=True)
class ExperimentRecord:
    """Cells that were measured in one process, interleaved: a baseline and its methods.

    Attributes:
        experiment_id: Hash of everything below that can change an answer, and of the cells.
        run_id: Run that measured it first.
        task, task_params, task_version, task_hash: What was asked.
        model, model_params, model_hash: Who answered.
        hardware: Profile name; the machine itself is in `environment`.
        scenario: `latency`, `throughput` or `fixed-length`.
        scale: `embedded` or `paper`.
        margin: Relative difference below which two speeds are the same, 0.05 for 5%.
        quality_margin: Loss of the headline metric below which "no loss" holds, in its unit.
        items: Ids of the items, in standard order.
        groups: Group of each item (pass@k), same length.
        repeats: Measurements of each item and method.
        baseline: cell_id of the baseline.
        cells: cell_id of every cell, the baseline's included.
        metrics: Headline first.
        step_cost: Measured lat(N): {"widths": [...], "contexts": [...], "seconds": [[...]]}.
        environment: Machine, versions, ceilings: flat, JSON-able.
        facts: What else belongs to the experiment: weight_bytes, dtype, kernels, …
        created: ISO time, UTC.
    """

    experiment_id: str
    run_id: str
    task: str
    task_params: dict[str, Any]
    task_version: str
    task_hash: str
    model: str
    model_params: dict[str, Any]
    model_hash: str
    hardware: str
    scenario: str
    seed: int
    scale: str
    margin: float
    quality_margin: float
    items: list[str]
    groups: list[str]
    repeats: int
    baseline: str
    cells: list[str]
    metrics: list[MetricRecord]
    step_cost: dict[str, Any] | None
    environment: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    created: str = ""
    schema: int = SCHEMA_VERSION


@dataclass(frozen=True, kw_only=True)
class CellRecord:
    """One method of an experiment, and how it ended.

    Attributes:
        cell_id: Hash of what can change the method's answer, and of the experiment's conditions.
        parts: Of a stack, the `spec` of each part in the order in which they are applied; empty for
            a method alone.
        spec: What was asked for, `name[:key=value,…]` with defaults left out; "" in old shards.
        role: `method`, `baseline`, `control` or `peer`.
        declared_output: What the method promised: `identical`, `same-distribution`, `approximate`.
        output_check: What was found; None if it could not be checked.
        divergences: For each item that differs from the baseline: {"item_id", "position",
            "token", "baseline_token", "top2_gap", "verdict": "tie" or "violation"}.
        status, error, log_tail: How it ended; `error` is one line, "" if ok.
        notes: What the method settled at run time, and the state policy.
        audit: What `run --audit` found: {"result": "passed" or "failed", "checks": [{"check", "ok",
            "detail"}, …]}; None if the cell was not audited.
        seconds: Where time went: the cell's own "measured" calls and "apply"; the experiment's
            "loading", "calibrating", "warming up", "measuring", "scoring" and "certifying"; its
            "wall" time, and the "harness", what warm-up and measuring took beyond "measured" and
            "apply" of all cells. They overlap. Of the last attempt, where the experiment was
            interrupted.
    """

    cell_id: str
    experiment_id: str
    method: str
    params: dict[str, Any]
    family: str
    role: str
    declared_output: str
    status: Status
    error: str = ""
    log_tail: str = ""
    output_check: OutputCheck | None = None
    divergences: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    finished: str = ""
    spec: str = ""
    parts: list[str] = field(default_factory=list)
    audit: dict[str, Any] | None = None
    schema: int = SCHEMA_VERSION


@dataclass(frozen=True, kw_only=True)
class SampleRecord:
    """One measured call: one method on one item, once. Absent values are None.

    Attributes:
        position: Place in the item's random order of methods, from 0.
        seconds: Wall time with the device synchronised on both edges.
        device_seconds: CUDA events; None on a CPU.
        cpu_seconds: Process CPU time, all threads.
        prefill_seconds: Wall time to the end of the prefill; None if the method does not say.
        tokenized_seconds: Wall time until the texts of an encoder were tokens; the rest of
            `seconds` is encoding. None if the method does not say.
        output_tokens: Length of `output_ids`.
        decode_tokens: Output tokens that came after the prefill's own; those that
            tokens_per_forward counts.
        target_forwards: Target forwards after the prefill; None for peers that do not tell.
        forward_tokens: Tokens fed in them, drafts included.
        bound_seconds: The sample's forwards at the measured lat(N): sum of lat(width, context).
        peak_bytes: High-water mark of the device's memory, or of the host process; weights and what
            the process held before the call included.
        output: Text, or path of a file below the shard.
        output_digest: SHA-256 of the ids and the text.
        evidence_kept: Share of the evidence that the task marked in the prompt which the steps of
            decoding could attend to, in the mean over steps, layers and heads; None where nothing
            was marked or the model's own attention ran.
        prefill_flops: Operations that read the prompt, of the target; None where nobody tells.
    """

    cell_id: str
    item_id: str
    repeat: int
    position: int
    seconds: float
    device_seconds: float | None
    cpu_seconds: float
    prefill_seconds: float | None
    output_tokens: int
    decode_tokens: int
    target_forwards: int | None
    forward_tokens: int | None
    draft_forwards: int | None
    accepted_tokens: int | None
    flops: float | None
    kv_bytes: int | None
    peak_bytes: int | None
    energy_j: float | None
    bound_seconds: float | None
    output_digest: str
    output: str
    output_ids: list[int]
    tokenized_seconds: float | None = None
    evidence_kept: float | None = None
    prefill_flops: float | None = None


@dataclass(frozen=True, kw_only=True)
class ScoreRecord:
    """Score of one output under one metric; `value` is None when it could not be scored."""

    cell_id: str
    item_id: str
    metric: str
    value: float | None
    unscored: str = ""
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class CorpusRecord:
    """A metric of all outputs of a cell together, of which no item has a share of its own.

    Attributes:
        cell_id: Whose outputs; all items of the experiment are among them.
        metric: A metric of kind `corpus`.
        value: The metric; None where it has no number.
        resampled: The same on items drawn with replacement: row n is that of
            `results.statistics.corpus_draws` after its first. NaN where a draw has no number; empty
            where items are too few to be resampled.
    """

    cell_id: str
    metric: str
    value: float | None
    resampled: list[float]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One invocation of `run`: what was asked, and the cells that answer it, cached ones included.

    `cells` lists [experiment_id, cell_id] pairs in the order of the plan; `skipped` lists
    {"method", "task", "model", "reason"}.
    """

    run_id: str
    command: str
    started: str
    finished: str
    status: Literal["running", "finished", "interrupted"]
    cells: list[list[str]]
    skipped: list[dict[str, str]] = field(default_factory=list)
    git_commit: str = ""
    schema: int = SCHEMA_VERSION
