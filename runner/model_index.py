"""Results as metadata of model cards: the `model-index` that the Hugging Face hub reads.

One card a model, with the metric of every method on every task, so that a page of the hub can show
it. The hub groups numbers by data set and configuration; the configuration here is the task's
settings, and each number names its method, its interval and how many items it stands on.

Source: huggingface_hub 2.4, `EvalResult` and `ModelCardData`, which also check what is written.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from results.export import Written
from results.tables import comparison_tables, settings_text
from runner.registry import Registry
from runner.request import UsageError

# What the hub calls the tasks of each capability.
_HUB_TASKS = {
    "TextGenerator": "text-generation",
    "MaskedDiffusionLM": "text-generation",
    "TokenizedLM": "text-generation",
    "TextEncoder": "feature-extraction",
    "VisionLanguageModel": "image-text-to-text",
    "Detector": "object-detection",
    "ImageGenerator": "text-to-image",
}
_OTHER = "other"


def write_cards(
    index_path: Path, folder: Path, registry: Registry, run: str | None, tasks: Sequence[str] = ()
) -> list[Written]:
    """Write a model card for each model, `<model>/README.md`.

    Args:
        index_path: As `ingest` returns it.
        folder: Where; made if missing.
        registry: Where tasks come from.
        run: A run's id; None for every cell, as it was last measured.
        tasks: Names of tasks to keep; all if empty.

    Raises:
        StoreError: There is no index, no such run, or no such task in it.
    """
    by_model: dict[str, list[EvalResult]] = {}
    for table in comparison_tables(index_path, run, tasks):
        for row in table.data:
            if row["status"] == "ok" and row["quality"] is not None:
                name = row["model"].removeprefix("hf:")
                by_model.setdefault(name, []).append(_result(row, registry))
    written = []
    for model, results in by_model.items():
        path = folder / re.sub(r"[^\w.-]+", "--", model).strip("-") / "README.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(card(model, results), encoding="utf-8")
        written.append(Written(path, len(results)))
    return written


def card(model: str, results: Sequence[EvalResult]) -> str:
    """Return a model card with results in its metadata.

    Raises:
        ValueError: What the hub would read is not what was meant.
    """
    metadata = ModelCardData(model_name=model, eval_results=list(results), tags=["tokenmark"])
    text = (
        f"---\n{metadata.to_yaml()}\n---\n\n# {model}\n\nMeasured by tokenmark: each metric names "
        "its method; its arguments hold the interval and the number of items.\n"
    )
    read = cast(ModelCardData, ModelCard(text).data).eval_results
    if read is None or len(read) != len(results):
        raise ValueError(f"the metadata of {model!r} do not hold its {len(results)} results.")
    return text


def _result(row: dict[str, Any], registry: Registry) -> EvalResult:
    capability, source, revision, split = "", row["task"], "", ""
    try:
        task = registry.load_task(row["task"])
        capability = task.capability
        source, revision, split = task.data.source, task.data.revision, task.data.split
    except UsageError:
        pass  # a task of a plug-in that is not at hand
    arguments = {
        "method": row["spec"] or row["method"],
        "items": row["items"],
        "low": row["quality_low"],
        "high": row["quality_high"],
        "speedup": row["speedup"],
        "scorer": row["scorer"],
    }
    kept = {
        key: value
        for key, value in arguments.items()
        if value is not None and not (isinstance(value, float) and not math.isfinite(value))
    }
    return EvalResult(
        task_type=_HUB_TASKS.get(capability, _OTHER),
        dataset_type=source,
        dataset_name=row["task"],
        dataset_config=settings_text(row["task_params"]) or "default",
        dataset_split=split or None,
        dataset_revision=revision or None,
        dataset_args=json.loads(row["task_params"]),
        metric_type=row["metric"],
        metric_name=f"{row['metric']} with {arguments['method']}",
        metric_value=row["quality"],
        metric_args=kept,
    )
