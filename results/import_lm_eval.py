"""Results of lm-eval as experiments: its scores, by item, with the scorer named.

Read is what `run.py lm-eval --out` writes (lm-eval's results with their samples in one file), or a
`results_*.json` of lm-eval's own `--output_path … --log_samples` with its `samples_*.jsonl` beside
it. lm-eval takes no times that could be compared, so none are imported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from results.imported import ForeignError, Imported, Sample, write_run
from results.records import MetricRecord
from results.store import Store

SCENARIO = "lm-eval"
_READING = ("loglikelihood", "multiple_choice", "loglikelihood_rolling")
_TOLERANCE = 1e-9


def is_lm_eval(data: Mapping[str, Any]) -> bool:
    """Return whether a file holds results of lm-eval."""
    return {"results", "configs", "versions"} <= data.keys()


def take_in(data: Mapping[str, Any], path: Path, store: Store) -> list[str]:
    """Import a file of results into a store; return the ids of what came in.

    Args:
        data: What the file holds.
        path: The file; samples are looked for beside it if they are not in it.
        store: Where the experiments go.

    Raises:
        ForeignError: Samples are missing, or the file does not say what it must.
    """
    try:
        samples = data.get("samples") or _samples_beside(path, list(data["configs"]))
        when = datetime.fromtimestamp(float(data["date"]), UTC)
        program = f"lm-eval {data['lm_eval_version']}"
        found = [
            _experiment(data, task, samples[task], program)
            for task in data["configs"]
            if task in samples
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ForeignError(
            f"{path} is no complete result of lm-eval: {type(error).__name__} {error}."
        ) from error
    if not found:
        raise ForeignError(
            f"{path} holds no samples, and there are no samples_*.jsonl beside it: run lm-eval "
            "with --log_samples."
        )
    return write_run(store, found, when=when, source=path.name, program=program)


def _samples_beside(path: Path, tasks: Sequence[str]) -> dict[str, list[Any]]:
    """Return the samples that lm-eval wrote into files of their own, by task."""
    stamp = path.stem.removeprefix("results_")
    found = {}
    for task in tasks:
        file = path.with_name(f"samples_{task}_{stamp}.jsonl")
        if file.is_file():
            # Not splitlines: texts may hold other line separators unescaped.
            lines = file.read_text(encoding="utf-8").split("\n")
            found[task] = [json.loads(line) for line in lines if line.strip()]
    return found


def _experiment(
    data: Mapping[str, Any], task: str, logged: Sequence[Mapping[str, Any]], program: str
) -> Imported:
    config = data["configs"][task]
    filters = list(dict.fromkeys(sample["filter"] for sample in logged))
    by_item: dict[Any, dict[str, Any]] = {}
    for sample in logged:
        values = by_item.setdefault(sample["doc_id"], {"sample": sample, "values": {}})["values"]
        for metric in sample["metrics"]:
            values[_name(metric, sample["filter"], filters)] = sample[metric]
    order = sorted(by_item)
    metrics, corpus = _metrics(data, task, [by_item[number]["values"] for number in order], filters)
    means = [metric.name for metric in metrics if metric.kind != "corpus"]
    who = _model(data["config"])
    return Imported(
        task="lm-eval",
        task_params={"task": task, "folder": "", "num_fewshot": data["n-shot"].get(task)},
        task_version=str(data["versions"].get(task, "")),
        task_hash=str(data.get("task_hashes", {}).get(task, "")),
        scenario=SCENARIO,
        metrics=metrics,
        samples=[
            Sample(
                item=f"lm-eval/{task}/{number}",
                output=_output(by_item[number]["sample"], config.get("output_type", "")),
                scores={name: _score(by_item[number]["values"].get(name)) for name in means},
            )
            for number in order
        ],
        corpus=corpus,
        facts={
            "scorer": program,
            "lm_eval_version": f"{task} {data['versions'].get(task, '')}",
            "lm_eval_output_type": config.get("output_type", ""),
        },
        **who,
    )


def _metrics(
    data: Mapping[str, Any],
    task: str,
    rows: Sequence[Mapping[str, Any]],
    filters: Sequence[str],
) -> tuple[list[MetricRecord], dict[str, float | None]]:
    """Return the metrics that lm-eval reports, and the values of those of all items together.

    A metric is the mean of its items' numbers where that mean is the number that lm-eval reports.
    """
    metrics, corpus = [], {}
    for reported, value in data["results"][task].items():
        plain, comma, filter_name = reported.partition(",")
        if not comma or plain.endswith("_stderr") or not isinstance(value, int | float):
            continue
        name = _name(plain, filter_name, filters)
        numbers = [row.get(name) for row in rows]
        scores = [_score(number) for number in numbers]
        scored = [score for score in scores if score is not None]
        is_mean = (
            bool(scored)
            and len(scored) == len(rows)
            and math.isclose(
                sum(scored) / len(scored), value, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE
            )
        )
        is_binary = is_mean and set(scored) <= {0.0, 1.0}
        if not is_mean:
            corpus[name] = float(value) if math.isfinite(value) else None
        higher = data.get("higher_is_better", {}).get(task, {}).get(plain)
        metrics.append(
            MetricRecord(
                name=name,
                unit="fraction" if is_binary else "score",
                kind="binary" if is_binary else "mean" if is_mean else "corpus",
                higher_is_better=higher is not False,
            )
        )
    if not metrics:
        raise ValueError(f"no metric of {task!r}")
    return metrics, corpus


def _model(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return who answered, and how, as fields of `Imported`."""
    seed = int(config.get("random_seed") or 0)
    if facts := config.get("tokenmark"):
        names = ["model", "model_params", "model_hash", "method", "params", "spec", "family"]
        names += ["role", "declared_output", "hardware", "environment"]
        key = [facts["method_source"], facts["source"], facts["versions"]]
        return {**{name: facts[name] for name in names}, "seed": int(facts["seed"]), "key": key}
    arguments = config.get("model_args") or {}
    if isinstance(arguments, str):
        pairs = (pair.partition("=") for pair in arguments.split(",") if pair)
        arguments = {key: value for key, _, value in pairs}
    name = str(arguments.get("pretrained") or arguments.get("model") or config["model"])
    return {
        "model": name,
        "model_params": {str(key): str(value) for key, value in arguments.items()},
        "model_hash": str(config.get("model_sha") or ""),
        "method": str(config["model"]),
        "params": {},
        "spec": "",
        "family": "lm-eval",
        "role": "peer",
        "hardware": str(config.get("device") or "unknown"),
        "seed": seed,
        "environment": {},
        "key": [config.get("gen_kwargs"), config.get("limit")],
    }


def _output(sample: Mapping[str, Any], output_type: str) -> str:
    """Return a document's responses as the task `lm-eval` stores them."""
    responses = [each[0] if len(each) == 1 else each for each in sample["resps"]]
    if output_type in _READING:
        return json.dumps([_plain(response) for response in responses])
    return responses[0] if isinstance(responses[0], str) else json.dumps(responses[0])


def _plain(response: Any) -> Any:
    """Return a response as numbers; lm-eval's files hold some of them as text."""
    if isinstance(response, list):
        return [_plain(each) for each in response]
    if response in ("True", "False"):
        return response == "True"
    return float(response) if isinstance(response, str) else response


def _score(value: Any) -> float | None:
    is_number = isinstance(value, bool | int | float) and math.isfinite(value)
    return float(value) if is_number else None


def _name(metric: str, filter_name: str, filters: Sequence[str]) -> str:
    return metric if len(filters) == 1 else f"{metric},{filter_name}"
