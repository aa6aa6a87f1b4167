"""Tables and the view of the index. Names and columns are public: add, never rename."""

from __future__ import annotations

from typing import Final

# Raised whenever tables change or the same samples would give other numbers; older indexes are
# then rebuilt from the shards.
INDEX_VERSION: Final = 9

TABLES: Final[dict[str, dict[str, str]]] = {
    "index_info": {"version": "BIGINT"},
    "runs": {
        "run_id": "VARCHAR",
        "command": "VARCHAR",
        "started": "VARCHAR",
        "finished": "VARCHAR",
        "status": "VARCHAR",
        "git_commit": "VARCHAR",
        "skipped": "JSON",
    },
    # Which cells answer a run, in the order of its plan; cells found in the cache included.
    "run_cells": {
        "run_id": "VARCHAR",
        "place": "BIGINT",
        "experiment_id": "VARCHAR",
        "cell_id": "VARCHAR",
    },
    "environments": {"environment_id": "VARCHAR", "environment": "JSON"},
    "experiments": {
        "experiment_id": "VARCHAR",
        "run_id": "VARCHAR",
        "task": "VARCHAR",
        "task_params": "JSON",
        "task_version": "VARCHAR",
        "task_hash": "VARCHAR",
        "model": "VARCHAR",
        "model_params": "JSON",
        "model_hash": "VARCHAR",
        "hardware": "VARCHAR",
        "scenario": "VARCHAR",
        "seed": "BIGINT",
        "scale": "VARCHAR",
        "margin": "DOUBLE",
        "quality_margin": "DOUBLE",
        "items": "BIGINT",
        "repeats": "BIGINT",
        "baseline": "VARCHAR",
        "step_cost": "JSON",
        "environment_id": "VARCHAR",
        "facts": "JSON",
        "created": "VARCHAR",
        "manifest_sha256": "VARCHAR",  # NULL as long as the shard is not sealed
        "content_sha256": "VARCHAR",  # of all its files, to know whether it grew since
    },
    "cells": {
        "cell_id": "VARCHAR",
        "experiment_id": "VARCHAR",
        "method": "VARCHAR",
        "params": "JSON",
        "family": "VARCHAR",
        "role": "VARCHAR",
        "declared_output": "VARCHAR",
        "output_check": "VARCHAR",
        "divergences": "JSON",
        "status": "VARCHAR",
        "error": "VARCHAR",
        "log_tail": "VARCHAR",
        "notes": "JSON",
        "seconds": "JSON",
        "finished": "VARCHAR",
        "spec": "VARCHAR",
        "audit": "JSON",
        "parts": "JSON",  # specs of a stack's parts, in their order
    },
    "samples": {
        "cell_id": "VARCHAR",
        "item_id": "VARCHAR",
        "repeat": "BIGINT",
        "position": "BIGINT",
        "seconds": "DOUBLE",
        "device_seconds": "DOUBLE",
        "cpu_seconds": "DOUBLE",
        "prefill_seconds": "DOUBLE",
        "output_tokens": "BIGINT",
        "target_forwards": "BIGINT",
        "draft_forwards": "BIGINT",
        "accepted_tokens": "BIGINT",
        "flops": "DOUBLE",
        "kv_bytes": "BIGINT",
        "peak_bytes": "BIGINT",
        "energy_j": "DOUBLE",
        "score": "DOUBLE",  # of the headline metric; NULL if it could not be scored
        "output_digest": "VARCHAR",
        "output": "VARCHAR",
        "experiment_id": "VARCHAR",
        "decode_tokens": "BIGINT",
        "forward_tokens": "BIGINT",
        "bound_seconds": "DOUBLE",
        "tokenized_seconds": "DOUBLE",
        "evidence_kept": "DOUBLE",  # share of the marked evidence that decoding could attend to
        "prefill_flops": "DOUBLE",  # those of `flops` that read the prompt
    },
    "scores": {
        "experiment_id": "VARCHAR",
        "cell_id": "VARCHAR",
        "item_id": "VARCHAR",
        "metric": "VARCHAR",
        "value": "DOUBLE",
        "unscored": "VARCHAR",
        "detail": "VARCHAR",
    },
    # Metrics of kind `corpus` on all items and on resampled ones, as the task computed them.
    "corpus": {
        "experiment_id": "VARCHAR",
        "cell_id": "VARCHAR",
        "metric": "VARCHAR",
        "value": "DOUBLE",
        "resampled": "DOUBLE[]",
    },
    # What `score` found: stored outputs judged again, by several scorers.
    "rescores": {
        "experiment_id": "VARCHAR",
        "cell_id": "VARCHAR",
        "item_id": "VARCHAR",
        "metric": "VARCHAR",
        "scorer": "VARCHAR",
        "value": "DOUBLE",
        "unscored": "VARCHAR",
        "detail": "VARCHAR",
        "created": "VARCHAR",
    },
    # Each metric of each cell by each of those scorers.
    "scorer_metrics": {
        "experiment_id": "VARCHAR",
        "cell_id": "VARCHAR",
        "metric": "VARCHAR",
        "scorer": "VARCHAR",
        "is_headline": "BOOLEAN",
        "value": "DOUBLE",
        "low": "DOUBLE",
        "high": "DOUBLE",
        "scored": "BIGINT",
        "unscored": "BIGINT",
    },
    # Every metric of every finished cell, with its paired difference from the baseline.
    "metrics": {
        "experiment_id": "VARCHAR",
        "cell_id": "VARCHAR",
        "metric": "VARCHAR",
        "is_headline": "BOOLEAN",
        "unit": "VARCHAR",
        "kind": "VARCHAR",
        "higher_is_better": "BOOLEAN",
        "value": "DOUBLE",
        "low": "DOUBLE",
        "high": "DOUBLE",
        "scored": "BIGINT",  # items with a score; those that a corpus metric is made of
        "unscored": "BIGINT",
        "baseline_value": "DOUBLE",
        "difference": "DOUBLE",
        "difference_low": "DOUBLE",
        "difference_high": "DOUBLE",
        "difference_low_99": "DOUBLE",
        "difference_high_99": "DOUBLE",
        "mcnemar_p": "DOUBLE",
        "verdict": "VARCHAR",  # of the headline metric, the one with a margin
        "smallest_difference": "DOUBLE",
    },
    # One row a cell; NULL where the cell did not end well or there is nothing to compare with.
    "verdicts": {
        "experiment_id": "VARCHAR",
        "cell_id": "VARCHAR",
        "items": "BIGINT",
        "repeats": "BIGINT",
        "output_tokens": "BIGINT",
        "baseline_tokens": "BIGINT",
        "seconds_per_item": "DOUBLE",
        "tokens_per_second": "DOUBLE",
        "tokens_per_forward": "DOUBLE",
        "acceptance_rate": "DOUBLE",  # accepted over drafted tokens
        "joules_per_token": "DOUBLE",
        "overhead": "DOUBLE",  # decode seconds over the bound_seconds of the same forwards
        "draft_share": "DOUBLE",  # of the decode seconds, what the target's forwards do not explain
        "harness_share": "DOUBLE",  # of the experiment's wall time, the harness's own
        "speedup": "DOUBLE",
        "speedup_low": "DOUBLE",
        "speedup_high": "DOUBLE",
        "speedup_low_99": "DOUBLE",  # decides about FASTER
        "speedup_high_99": "DOUBLE",  # decides about SLOWER
        "speed_verdict": "VARCHAR",
        "speedup_geomean": "DOUBLE",
        "speedup_device": "DOUBLE",  # by the device's own clock
        "speedup_bound": "DOUBLE",
        "bound_ratio": "DOUBLE",  # speedup over speedup_bound
        "step_cost_ratio": "DOUBLE",  # a forward's bound_seconds over that of the baseline's
        "work_ratio": "DOUBLE",
        "memory_ratio": "DOUBLE",
        "smallest_speed_difference": "DOUBLE",
        # Prefill and decoding apart; NULL where a sample does not say when its prefill ended.
        "prefill_ratio": "DOUBLE",  # seconds of the prefill, method over baseline
        "prefill_ratio_low": "DOUBLE",
        "prefill_ratio_high": "DOUBLE",
        "decode_speedup": "DOUBLE",  # of the seconds of a token after the prefill
        "decode_speedup_low": "DOUBLE",
        "decode_speedup_high": "DOUBLE",
        "decode_speedup_low_99": "DOUBLE",
        "decode_speedup_high_99": "DOUBLE",
        "decode_verdict": "VARCHAR",
        "decode_bound": "DOUBLE",  # bound_seconds of such a token, baseline over method
    },
    # One row a stack whose parts were measured beside it, alone; NULL where one of the four did not
    # end well. docs/stacking.md says how to read it.
    "interactions": {
        "experiment_id": "VARCHAR",
        "cell_id": "VARCHAR",  # of the stack
        "first_cell": "VARCHAR",
        "second_cell": "VARCHAR",
        "items": "BIGINT",  # that all four measured
        "as_first": "BIGINT",  # of them, those on which the stack wrote what its first part wrote
        "speed": "DOUBLE",  # S(both) / (S(first) S(second)), 1 where gains multiply
        "speed_low": "DOUBLE",
        "speed_high": "DOUBLE",
        "speed_low_99": "DOUBLE",
        "speed_high_99": "DOUBLE",
        "speed_verdict": "VARCHAR",
        "speed_smallest": "DOUBLE",
        "decode": "DOUBLE",  # the same after the prefill
        "decode_low": "DOUBLE",
        "decode_high": "DOUBLE",
        "decode_low_99": "DOUBLE",
        "decode_high_99": "DOUBLE",
        "decode_verdict": "VARCHAR",
        "decode_smallest": "DOUBLE",
        "tokens_per_forward": "DOUBLE",  # the same ratio of theirs
        "tokens_per_forward_low": "DOUBLE",
        "tokens_per_forward_high": "DOUBLE",
        "tokens_per_forward_low_99": "DOUBLE",
        "tokens_per_forward_high_99": "DOUBLE",
        "tokens_per_forward_verdict": "VARCHAR",
        "tokens_per_forward_smallest": "DOUBLE",
        "metric": "VARCHAR",
        "quality": "DOUBLE",  # of the headline metric: both - first - second + neither
        "quality_low": "DOUBLE",
        "quality_high": "DOUBLE",
        "quality_low_99": "DOUBLE",
        "quality_high_99": "DOUBLE",
        "quality_verdict": "VARCHAR",
        "quality_smallest": "DOUBLE",
    },
    # As they stand on the papers' cards; `extra` keeps what has no column of its own.
    "claims": {
        "method": "VARCHAR",
        "claim_id": "VARCHAR",
        "metric": "VARCHAR",
        "value": "VARCHAR",
        "number": "DOUBLE",
        "baseline": "VARCHAR",
        "model": "VARCHAR",
        "task": "VARCHAR",
        "hardware": "VARCHAR",
        "conditions": "VARCHAR",
        "stated_in": "VARCHAR",
        "confidence": "VARCHAR",
        "extra": "JSON",
    },
    # One row a claim, made from claims and samples; docs/methodology.md explains each verdict.
    "claim_verdicts": {
        "method": "VARCHAR",
        "claim_id": "VARCHAR",
        "verdict": "VARCHAR",
        "detail": "VARCHAR",
        "missing": "JSON",
        "command": "VARCHAR",
        "scale": "VARCHAR",
        "measure": "VARCHAR",
        "measured": "DOUBLE",
        "measured_low": "DOUBLE",
        "measured_high": "DOUBLE",
        "expected": "DOUBLE",
        "items": "BIGINT",
        "evidence_experiment": "VARCHAR",
        "evidence_cell": "VARCHAR",
        "rival_cell": "VARCHAR",
    },
}

COMPARISON: Final = """
CREATE VIEW comparison AS
SELECT
    e.run_id, e.task, e.model, e.hardware, e.scenario, e.seed, e.scale,
    c.method, c.params, c.family, c.status, c.error,
    m.metric,
    m.value AS quality, m.low AS quality_low, m.high AS quality_high,
    m.baseline_value AS baseline_quality,
    m.difference AS quality_delta,
    m.difference_low AS quality_delta_low, m.difference_high AS quality_delta_high,
    m.verdict AS quality_verdict,
    v.speedup, v.speedup_low, v.speedup_high, v.speed_verdict, v.speedup_bound,
    v.seconds_per_item, v.tokens_per_second, v.tokens_per_forward,
    v.work_ratio, v.memory_ratio,
    c.output_check, v.items, v.repeats,
    c.role, c.declared_output, c.experiment_id, c.cell_id, e.baseline AS baseline_cell_id,
    v.output_tokens, v.baseline_tokens,
    v.speedup_low_99, v.speedup_high_99,
    m.difference_low_99 AS quality_delta_low_99, m.difference_high_99 AS quality_delta_high_99,
    v.speedup_geomean, v.speedup_device, v.bound_ratio,
    v.step_cost_ratio, v.overhead, v.draft_share, v.acceptance_rate, v.joules_per_token,
    v.harness_share,
    v.smallest_speed_difference, m.smallest_difference AS smallest_quality_difference,
    m.mcnemar_p, m.unscored, m.unit AS quality_unit,
    coalesce(c.notes ->> 'sandbox', e.facts ->> 'sandbox') AS sandbox,
    e.margin, e.quality_margin, e.task_params, e.model_params, e.task_version,
    e.environment_id, e.created, e.manifest_sha256 IS NOT NULL AS is_sealed,
    c.audit ->> 'result' AS audit, c.spec,
    s.scorers, s.quality_spread, d.disputed_items,
    v.prefill_ratio, v.decode_speedup, v.decode_speedup_low, v.decode_speedup_high,
    v.decode_verdict, v.decode_bound,
    v.prefill_ratio_low, v.prefill_ratio_high, v.decode_speedup_low_99, v.decode_speedup_high_99,
    coalesce(e.facts ->> 'speed_of', 'call') AS speed_of,
    coalesce(e.facts ->> 'bound_by', 'step-cost') AS bound_by,
    (c.notes ->> 'mean_visual_tokens')::DOUBLE AS visual_tokens,
    -- Who scored, where that was not us: `lm-eval 0.4.13`.
    e.facts ->> 'scorer' AS scorer,
    c.parts
FROM cells c
JOIN experiments e USING (experiment_id)
LEFT JOIN verdicts v USING (experiment_id, cell_id)
LEFT JOIN metrics m
    ON m.experiment_id = c.experiment_id AND m.cell_id = c.cell_id AND m.is_headline
LEFT JOIN (
    -- The headline metric by every scorer, and how far they are apart.
    SELECT experiment_id, cell_id, max(value) - min(value) AS quality_spread,
        string_agg(scorer || ' ' || round(value, 4), ', ' ORDER BY scorer) AS scorers
    FROM scorer_metrics WHERE is_headline AND value IS NOT NULL GROUP BY ALL
) s ON s.experiment_id = c.experiment_id AND s.cell_id = c.cell_id
LEFT JOIN (
    SELECT experiment_id, cell_id, count(*) AS disputed_items
    FROM (
        SELECT experiment_id, cell_id, item_id
        FROM rescores JOIN (SELECT DISTINCT experiment_id, cell_id, metric FROM scorer_metrics
            WHERE is_headline) USING (experiment_id, cell_id, metric)
        GROUP BY ALL HAVING count(DISTINCT coalesce(value, -1e308)) > 1
    )
    GROUP BY ALL
) d ON d.experiment_id = c.experiment_id AND d.cell_id = c.cell_id
"""

# Items on which the oracle of the same experiment kept more of the marked evidence, and scored
# more: of several oracles, the one with the smallest budget that did.
DROPPED_EVIDENCE: Final = """
CREATE VIEW dropped_evidence AS
SELECT
    s.experiment_id, s.cell_id, c.method, c.spec, s.item_id, s.repeat,
    s.evidence_kept, s.score,
    min((o.params ->> 'budget')::BIGINT) AS oracle_budget,
    arg_min(k.evidence_kept, (o.params ->> 'budget')::BIGINT) AS oracle_evidence_kept,
    arg_min(k.score, (o.params ->> 'budget')::BIGINT) AS oracle_score
FROM samples s
JOIN cells c USING (experiment_id, cell_id)
JOIN cells o ON o.experiment_id = s.experiment_id AND o.method = 'oracle-top-k'
JOIN samples k ON k.experiment_id = o.experiment_id AND k.cell_id = o.cell_id
    AND k.item_id = s.item_id AND k.repeat = s.repeat
WHERE k.evidence_kept > s.evidence_kept AND k.score > s.score
GROUP BY ALL
"""

# For each `reference` and each other method: of the items that the baseline answers and the
# reference does not, how many the method answers, with Wilson's interval. Results on equal items,
# prompts and weights count together, an item as it was last measured, wherever that was. An output
# that could not be scored is no answer.
WHERE_WRONG: Final = """
CREATE VIEW where_wrong AS
WITH graded AS (
    SELECT
        e.task, e.task_params, e.model, e.model_params, e.task_hash, e.model_hash,
        c.method, c.spec, s.item_id,
        bool_or(c.cell_id = e.baseline) AS is_baseline,
        arg_max(coalesce(s.score, 0) = 1, (e.created, e.experiment_id)) AS is_right
    FROM samples s
    JOIN cells c USING (experiment_id, cell_id)
    JOIN experiments e USING (experiment_id)
    JOIN metrics m USING (experiment_id, cell_id)
    WHERE s.repeat = 0 AND c.status = 'ok' AND m.is_headline AND m.kind = 'binary'
    GROUP BY ALL
), answerable AS (
    SELECT task_hash, model_hash, model_params, item_id
    FROM graded WHERE is_baseline GROUP BY ALL HAVING bool_and(is_right)
), counted AS (
    SELECT
        o.task, o.task_params, o.model, o.model_params, task_hash, model_hash,
        r.spec AS reference, o.method, o.spec,
        count(*) AS items, count(*) FILTER (o.is_right) AS solved
    FROM graded r
    JOIN answerable a USING (task_hash, model_hash, model_params, item_id)
    JOIN graded o USING (task_hash, model_hash, model_params, item_id)
    WHERE NOT r.is_right AND NOT r.is_baseline AND NOT o.is_baseline AND o.spec <> r.spec
    GROUP BY ALL
), ends AS (
    SELECT *, solved / items AS share, 1.959963984540054 AS z,
        (solved + z * z / 2) / (items + z * z) AS centre,
        z / (items + z * z) * sqrt(solved * (1 - solved / items) + z * z / 4) AS half
    FROM counted
)
SELECT * EXCLUDE (z, centre, half),
    if(solved = 0, 0, centre - half) AS low, if(solved = items, 1, centre + half) AS high
FROM ends
"""


def statements() -> list[str]:
    """Return the SQL that creates an empty index."""
    tables = [
        f"CREATE TABLE {table} ({', '.join(f'{name} {kind}' for name, kind in columns.items())})"
        for table, columns in TABLES.items()
    ]
    version = f"INSERT INTO index_info VALUES ({INDEX_VERSION})"
    return [*tables, version, COMPARISON, DROPPED_EVIDENCE, WHERE_WRONG]
