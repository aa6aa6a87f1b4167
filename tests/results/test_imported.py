"""Results of lm-eval and pytest-benchmark become experiments that compare like any other."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from results import compare as comparing
from results.import_lm_eval import take_in
from results.imported import ForeignError
from results.ingest import ingest
from results.store import Store, StoreError
from results.tables import comparison_tables
from results.verify import verify
from runner.indexing import take_in as take_in_path
from runner.request import UsageError

RESULTS = {
    "results": {
        "qa": {
            "alias": "qa",
            "exact_match,strict": 0.5,
            "exact_match_stderr,strict": 0.29,
            "exact_match,loose": 0.75,
            "f1,strict": 0.61,
        }
    },
    "configs": {"qa": {"output_type": "generate_until"}},
    "versions": {"qa": 3.0},
    "n-shot": {"qa": 5},
    "higher_is_better": {"qa": {"exact_match": True, "f1": True}},
    "config": {"model": "hf", "model_args": "pretrained=org/name,dtype=float32", "random_seed": 0},
    "task_hashes": {"qa": "abc"},
    "date": 1_760_000_000.5,
    "lm_eval_version": "0.4.13",
}
STRICT, LOOSE = (1.0, 0.0, 1.0, 0.0), (1.0, 1.0, 1.0, 0.0)
SAMPLES = [
    {
        "doc_id": number,
        "filter": name,
        "metrics": ["exact_match", "f1"] if name == "strict" else ["exact_match"],
        "exact_match": values[number],
        "f1": [1, number],
        "resps": [[f"answer {number}"]],
    }
    for name, values in (("strict", STRICT), ("loose", LOOSE))
    for number in range(4)
]


def test_results_of_lm_eval_with_samples_beside_them_come_in_with_the_scorer(tmp_path):
    path = tmp_path / "results_2025-10-09T08-53-20.5.json"
    path.write_text(json.dumps(RESULTS))
    lines = "\n".join(map(json.dumps, SAMPLES))
    (tmp_path / "samples_qa_2025-10-09T08-53-20.5.jsonl").write_text(lines + "\n")
    [experiment_id] = take_in_path(path, tmp_path / "store")
    store = Store(tmp_path / "store")
    record = store.experiment(experiment_id)
    assert (record.task, record.task_params["task"], record.model) == ("lm-eval", "qa", "org/name")
    assert [(metric.name, metric.kind) for metric in record.metrics] == [
        ("exact_match,strict", "binary"),
        ("exact_match,loose", "binary"),
        ("f1,strict", "corpus"),
    ]
    assert [sample.output for sample in store.samples(experiment_id)] == [
        f"answer {number}" for number in range(4)
    ]
    index = ingest(store.path)
    [row] = comparison_tables(index, None)[0].data
    assert (row["quality"], row["items"], row["scorer"]) == (0.5, 4, "lm-eval 0.4.13")
    assert (row["method"], row["role"], row["speedup"]) == ("hf", "peer", None)
    assert row["seconds_per_item"] is row["tokens_per_second"] is None
    assert verify(store.path) == []
    assert take_in_path(path, store.path) == []


def test_results_without_samples_are_refused(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(RESULTS))
    with pytest.raises(ForeignError, match="run lm-eval with --log_samples"):
        take_in(RESULTS, path, Store(tmp_path / "store"))
    undated = {name: value for name, value in RESULTS.items() if name != "date"}
    path.write_text(json.dumps({**undated, "samples": {"qa": SAMPLES}}))
    with pytest.raises(StoreError, match="is no complete result of lm-eval: KeyError 'date'"):
        take_in_path(path, tmp_path / "store")
    path.write_text("[1]")
    with pytest.raises(UsageError, match="holds no JSON object"):
        take_in_path(path, tmp_path / "store")
    path.write_text("{}")
    with pytest.raises(UsageError, match="no results of lm-eval and no benchmarks"):
        take_in_path(path, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def benchmarks(when: str, commit: str, seconds: dict[str, float], seed: int, rounds: int = 300):
    """Return what pytest-benchmark would have written."""
    random = np.random.default_rng(seed)
    return {
        "machine_info": {"node": "host", "machine": "x86_64", "cpu": {"brand_raw": "CPU"}},
        "commit_info": {"id": commit, "dirty": False},
        "datetime": when,
        "version": "5.3.1",
        "benchmarks": [
            {
                "fullname": f"tests/benchmarks/test_x.py::{name}",
                "param": name.partition("[")[2].rstrip("]") or None,
                "params": {"nodes": 16} if "[" in name else None,
                "stats": {"data": list(mean * random.lognormal(0, 0.02, rounds))},
            }
            for name, mean in seconds.items()
        ],
    }


@pytest.fixture
def judged(tmp_path):
    """Return a function that takes runs in and compares the last with the first of them."""

    def judge(*runs: dict):
        store = Store(tmp_path / "store")
        for number, data in enumerate(runs):
            path = tmp_path / f"{number}.json"
            path.write_text(json.dumps(data))
            assert take_in_path(path, store.path)
        names = store.run_ids()
        sides = [comparing.resolve(name, store) for name in (names[0], names[-1])]
        return comparing.compare(*sides)

    return judge


def test_a_benchmark_that_got_slower_is_a_regression_and_one_that_did_not_is_none(judged):
    before = {"test_walk": 1e-4, "test_tree[16]": 2e-5, "test_gone": 1e-5}
    now = {"test_walk": 1.5e-4, "test_tree[16]": 2e-5, "test_new": 1e-5}
    found = judged(
        *(
            benchmarks(f"2025-10-0{day}T00:00:00+00:00", "aaaa", before, seed=day)
            for day in range(1, 6)
        ),
        benchmarks("2025-10-09T00:00:00+00:00", "bbbb", now, seed=9),
    )
    verdicts = {(finding.method, finding.check): finding.verdict for finding in found.findings}
    assert verdicts["test_walk", "seconds"] == "REGRESSED"
    assert verdicts["test_tree", "seconds"] == "SAME"
    assert verdicts["test_gone", "cell"] == "MISSING"
    assert verdicts["test_new", "cell"] == "NEW"
    assert len(found.regressions) == 2
    [walk] = [
        each for each in found.findings if (each.method, each.check) == ("test_walk", "seconds")
    ]
    assert "repeated measurements" in walk.detail
    assert walk.experiment.startswith("pytest-benchmark")


def test_times_of_two_machines_are_not_compared(judged):
    first = benchmarks("2025-10-01T00:00:00+00:00", "aaaa", {"test_walk": 1e-4}, seed=1)
    other = benchmarks("2025-10-02T00:00:00+00:00", "aaaa", {"test_walk": 2e-4}, seed=2)
    other["machine_info"]["node"] = "another"
    assert {finding.check for finding in judged(first, other).findings}.isdisjoint({"seconds"})


def test_a_pause_of_the_scheduler_moves_no_block(tmp_path):
    data = benchmarks("2025-10-01T00:00:00+00:00", "aaaa", {"test_walk": 1e-4}, seed=1)
    spoilt = copy.deepcopy(data)
    spoilt["benchmarks"][0]["stats"]["data"][5] = 1.0
    medians = []
    for name, each in (("clean", data), ("spoilt", spoilt)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(each))
        [experiment_id] = take_in_path(path, tmp_path / name)
        samples = list(Store(tmp_path / name).samples(experiment_id))
        assert len(samples) == 30
        medians.append(sum(sample.seconds for sample in samples))
    assert math.isclose(*medians, rel_tol=0.01)


def test_benchmarks_without_rounds_are_refused_with_the_way_to_keep_them(tmp_path):
    data = benchmarks("2025-10-01T00:00:00+00:00", "aaaa", {"test_walk": 1e-4}, seed=1)
    del data["benchmarks"][0]["stats"]["data"]
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(data))
    with pytest.raises(StoreError, match="write it with --benchmark-json, which keeps every round"):
        take_in_path(path, tmp_path / "store")
    path.write_text(json.dumps({**data, "benchmarks": []}))
    with pytest.raises(StoreError, match="run pytest with --benchmark-enable"):
        take_in_path(path, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_what_pytest_benchmark_really_writes_comes_in(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('size', [3, 4])\n"
        "def test_sum(benchmark, size):\n"
        "    assert benchmark(sum, range(size)) >= 3\n"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"),
            *("--benchmark-json=out.json", "--benchmark-max-time=0.02"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        # Processes that share tests measure nothing, and this one is told that it is of that kind.
        env={key: value for key, value in os.environ.items() if "XDIST" not in key},
    )
    assert done.returncode == 0, done.stdout
    came = take_in_path(tmp_path / "out.json", tmp_path / "store")
    records = [Store(tmp_path / "store").experiment(each) for each in came]
    cells = [cell for each in came for cell in Store(tmp_path / "store").cells(each)]
    assert sorted(cell.params["size"] for cell in cells) == ["3", "4"]
    assert {cell.method for cell in cells} == {"test_sum"}
    assert all(record.environment["machine_id"] for record in records)
