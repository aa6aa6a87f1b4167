"""The way to the `lm-eval` package and back: its tasks as our items, our outputs as its responses.

`lm_eval` takes seconds to import and its list of tasks half a minute to read, so a task is found by
the text of its YAML file, and the package is imported only inside these functions.

Source: lm-eval 0.4.13, `lm_eval/evaluator.py` (how requests are built, answered and scored).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from models.base import Unsupported
from tasks.base import Metric, MetricKind
from tasks.packages import quietly

# Metrics that lm-eval itself computes as right or wrong; others may have values in between.
_BINARY = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")
# Numbers of all outputs together that are computed fast enough to be resampled.
_RESAMPLED = ("perplexity", "weighted_perplexity", "bits_per_byte", "median", "nanmean")
# Of the few-shot examples, as `lm_eval.simple_evaluate` seeds them.
_FEW_SHOT_SEED = 1234
_NAMED = re.compile(rb"^(task|group|tag)\s*:[ \t]*['\"]?([^'\"#\r\n]*[^'\"#\s])", re.MULTILINE)

Aggregation = Callable[[Sequence[Any]], float]


@dataclass(frozen=True)
class Loaded:
    """A task of lm-eval with its requests.

    Attributes:
        name: In lm-eval.
        task: The object itself.
        output_type: `generate_until`, `loglikelihood`, `multiple_choice`, `loglikelihood_rolling`.
        documents: By the number that lm-eval gives them.
        requests: The instances of each document, in order.
        metrics: Headline first; with several filters a metric is named as lm-eval's tables name it,
            `exact_match,strict-match`.
        aggregations: Of the metrics of all outputs together.
        task_version: As in its YAML.
    """

    name: str
    task: Any
    output_type: str
    documents: Mapping[int, Any]
    requests: Mapping[int, Sequence[Any]]
    metrics: tuple[Metric, ...]
    aggregations: Mapping[str, Aggregation]
    task_version: str


def lm_eval() -> AbstractContextManager[Any]:
    """Return the block in which the package is at hand, silent."""
    return quietly("lm_eval", "lm-eval")


def scorer() -> str:
    """Return the name and version of what scores, `lm-eval 0.4.13`."""
    return f"lm-eval {version('lm-eval')}"


@functools.cache
def load_lm_eval(name: str, folder: str = "", num_fewshot: int | None = None) -> Loaded:
    """Return a task of lm-eval with its data and requests, made once.

    Args:
        name: Of the task.
        folder: With YAML files of further tasks, which win over lm-eval's own; paths of data in
            them are relative to it. Empty for lm-eval's own tasks.
        num_fewshot: Solved examples in front of each question; the task's own number if None.

    Raises:
        ValueError: There is no such task or folder, or it is a group of tasks.
        models.base.Unsupported: lm-eval is not installed, the data are not to be had, or the task
            runs generated code, shows images, or samples several answers to each question.
    """
    with lm_eval():
        from lm_eval.tasks import TaskManager

        path = find_task(name, folder)
        try:
            with contextlib.chdir(folder or "."):
                loaded = TaskManager(include_defaults=False).load([str(path)])
                task = loaded["tasks"][name]
        except Exception as error:  # whatever a download, or somebody's files, may raise
            raise Unsupported(
                f"lm-eval's {name!r} cannot be loaded ({_first_line(error)}): run once with a "
                "network, put its data into the cache of the package 'datasets', or name the "
                "folder of a YAML file with local data: folder=…"
            ) from error
        _refuse(name, task)
        return _prepare(name, task, num_fewshot)


def _prepare(name: str, task: Any, num_fewshot: int | None) -> Loaded:
    """Return a task with its requests, as `lm_eval.simple_evaluate` makes them."""
    own = task.get_config("num_fewshot")
    # Where the task says 0, lm-eval keeps to it, whatever is asked for.
    if num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_FEW_SHOT_SEED)
    task.build_all_requests()
    requests: dict[int, list[Any]] = {}
    for instance in task.instances:
        requests.setdefault(instance.doc_id, []).append(instance)
    for instances in requests.values():
        instances.sort(key=lambda each: each.idx)
    metrics, aggregations = _metrics(task, next(iter(requests.values())))
    return Loaded(
        name=name,
        task=task,
        output_type=task.OUTPUT_TYPE,
        documents={number: instances[0].doc for number, instances in requests.items()},
        requests=requests,
        metrics=metrics,
        aggregations=aggregations,
        task_version=str(task.VERSION),
    )


def _refuse(name: str, task: Any) -> None:
    """Raise `Unsupported` for a task that cannot be run faithfully here."""
    if getattr(task, "UNSAFE_CODE", False):
        raise Unsupported(
            f"lm-eval's {name!r} runs generated code without a sandbox. Tasks that run code in "
            "one: humaneval, humaneval-mini."
        )
    if getattr(task, "MULTIMODAL", False):
        raise Unsupported(f"lm-eval's {name!r} shows images or sound; only texts are run here.")
    if (task.get_config("repeats") or 1) > 1:
        raise Unsupported(
            f"lm-eval's {name!r} scores {task.get_config('repeats')} answers to each question "
            "together: run it with `python run.py lm-eval`, where lm-eval counts them."
        )


def fields_of(loaded: Loaded, number: int) -> dict[str, Any]:
    """Return what an item of a document holds: all that decides about answers and scores."""
    with lm_eval():
        from lm_eval.utils import handle_non_serializable

        target = loaded.task.doc_to_target(loaded.documents[number])
        document = json.dumps(
            loaded.documents[number], default=handle_non_serializable, sort_keys=True
        )
        return {
            "document": number,
            "output_type": loaded.output_type,
            "requests": [list(instance.args) for instance in loaded.requests[number]],
            "target": json.dumps(target, default=handle_non_serializable),
            "document_sha256": hashlib.sha256(document.encode()).hexdigest(),
        }


def results_of(loaded: Loaded, number: int, responses: Sequence[Any]) -> dict[str, Any]:
    """Return what lm-eval makes of the responses to a document's requests, by metric.

    Values are numbers, or whatever the metric's aggregation takes.

    Args:
        loaded: The task.
        number: Of the document.
        responses: One to each request: a text, (nats, is greedy), or nats.
    """
    with lm_eval():
        return _process(loaded.task, loaded.requests[number], responses)


def _process(task: Any, requests: Sequence[Any], responses: Sequence[Any]) -> dict[str, Any]:
    # A copy each: filters write into instances, and some into documents.
    instances = []
    for request, response in zip(requests, responses, strict=True):
        instance = copy.copy(request)
        instance.resps, instance.filtered_resps = [response], {}
        instances.append(instance)
    for each in task._filters:
        each.apply(instances)
    found = {}
    for filter_name in instances[0].filtered_resps:
        filtered = [instance.filtered_resps[filter_name] for instance in instances]
        for metric, value in task.process_results(instances[0].doc, filtered).items():
            found[_name(metric, filter_name, len(instances[0].filtered_resps))] = value
    return found


def _name(metric: str, filter_name: str, number: int) -> str:
    return metric if number == 1 else f"{metric},{filter_name}"


def is_number(value: Any) -> bool:
    """Return whether a document's value of a metric is its share of the mean."""
    return isinstance(value, (bool, int, float)) or (
        getattr(value, "shape", None) == () and hasattr(value, "item")
    )


def _metrics(
    task: Any, requests: Sequence[Any]
) -> tuple[tuple[Metric, ...], dict[str, Aggregation]]:
    """Return the metrics that the task reports, found by scoring an answer that says nothing."""
    from lm_eval.api.metrics import mean

    neutral: Any = {"generate_until": "", "loglikelihood_rolling": -1.0}.get(
        task.OUTPUT_TYPE, (-1.0, False)
    )
    values = _process(task, requests, [neutral] * len(requests))
    metrics, aggregations = [], {}
    is_own = task.get_config("process_results") is None and type(task).__module__ == (
        "lm_eval.api.task"
    )
    for name, value in values.items():
        plain = name.partition(",")[0]
        aggregation = task.aggregation().get(plain, mean)
        kind: MetricKind = "corpus"
        if is_number(value) and aggregation is mean:
            kind = "binary" if is_own and plain in _BINARY and value in (0, 1) else "mean"
        else:
            aggregations[name] = aggregation
        metrics.append(
            Metric(
                name=name,
                unit="fraction" if kind == "binary" else "score",
                kind=kind,
                higher_is_better=bool(task.higher_is_better().get(plain, True)),
            )
        )
    if not metrics:
        raise Unsupported(f"lm-eval's {task.task_name!r} reports no metric.")
    return tuple(metrics), aggregations


def aggregate(aggregation: Aggregation, values: Sequence[Any]) -> float:
    """Return the number of all documents together; NaN where there is none."""
    with lm_eval():
        try:
            return float(aggregation(list(values)))
        except (ZeroDivisionError, OverflowError, ValueError):
            return math.nan


def is_resampled(aggregation: Aggregation) -> bool:
    """Return whether an aggregation is fast enough for thousands of resamples."""
    return getattr(aggregation, "__name__", "") in _RESAMPLED


# Finding tasks


def find_task(name: str, folder: str) -> Path:
    """Return the file that defines a task.

    Raises:
        ValueError: There is none; names what has the nearest name.
    """
    roots = [Path(folder)] if folder else []
    if folder and not Path(folder).is_dir():
        raise ValueError(
            f"folder: there is no folder {folder}. It must hold YAML files of lm-eval."
        )
    package = find_spec("lm_eval")
    if package and package.submodule_search_locations:
        roots.append(Path(package.submodule_search_locations[0]) / "tasks")
    names: dict[str, str] = {}
    for kind, found, path in _definitions(roots, name):
        if found == name and kind == "task":
            return path.resolve()
        names.setdefault(found, kind)
    if name in names:
        raise ValueError(
            f"task: {name!r} is a {names[name]} of several tasks of lm-eval; name one of them, or "
            "run all with `python run.py lm-eval`."
        )
    tasks = [each for each, kind in names.items() if kind == "task"]
    nearest = ", ".join(get_close_matches(name, tasks, n=3, cutoff=0))
    raise ValueError(f"task: lm-eval has no task {name!r}. The nearest names: {nearest}.")


def _definitions(roots: Sequence[Path], name: str) -> Iterator[tuple[str, str, Path]]:
    """Yield kind, name and file of whatever YAML files define, likely places first."""
    start = re.split(r"[_\W]", name)[0].lower()
    for root in roots:
        files = sorted(root.rglob("*.yaml"))
        for path in sorted(files, key=lambda each: start not in str(each.relative_to(root))):
            for kind, found in _NAMED.findall(path.read_bytes()):
                yield kind.decode(), found.decode(errors="replace").strip(), path


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
