from __future__ import annotations

import pyarrow.parquet as pq
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

import run
from results.export import write_parquet, write_tables
from results.ingest import ingest
from results.store import Store, StoreError
from results.tables import comparison_tables
from runner.model_index import write_cards
from runner.registry import Registry
from tests.results.factory import make_run, make_store


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Return the index of a store with two experiments of two runs, on two models."""
    folder = tmp_path_factory.mktemp("export")
    make_store(folder, items=20)
    store = make_store(
        folder,
        {"base": 1.0, "quick": 2.0},
        items=12,
        experiment_id="experiment-2",
        run_id="run-2",
        model="hf:org/name",
    )
    second = store.experiment("experiment-2")
    store.write_run(make_run([store.experiment("experiment-1")]))
    store.write_run(make_run([second], run_id="run-2", started="2025-01-02T00:00:00+00:00"))
    return ingest(folder)


def test_parquet_holds_every_raw_row_and_the_view_with_full_precision(index, tmp_path):
    written = {each.path.stem: each.rows for each in write_parquet(index, tmp_path)}
    assert written["samples"] == 2 * (20 + 12)
    assert written["scores"] == 2 * (20 + 12)
    assert written["comparison"] == 4
    samples = pq.read_table(tmp_path / "samples.parquet")
    store = Store(index.parent)
    expected = {
        (each.cell_id, each.item_id): each.seconds for each in store.samples("experiment-1")
    }
    rows = [row for row in samples.to_pylist() if row["experiment_id"] == "experiment-1"]
    assert {(row["cell_id"], row["item_id"]): row["seconds"] for row in rows} == expected
    shown = [row for table in comparison_tables(index, None) for row in table.data]
    [fast] = [
        row
        for row in pq.read_table(tmp_path / "comparison.parquet").to_pylist()
        if row["method"] == "fast" and row["model"] == "tiny"
    ]
    [same] = [row for row in shown if row["method"] == "fast" and row["model"] == "tiny"]
    assert fast["speedup_low"] == same["speedup_low"]


def test_of_a_run_only_what_answers_it_is_written(index, tmp_path):
    written = {each.path.stem: each.rows for each in write_parquet(index, tmp_path, "latest")}
    assert written["runs"] == written["experiments"] == written["environments"] == 1
    assert written["samples"] == 2 * 12
    assert pq.read_table(tmp_path / "runs.parquet")["run_id"].to_pylist() == ["run-2"]
    with pytest.raises(StoreError, match="no run 'run-3'"):
        write_parquet(index, tmp_path, "run-3")


def test_a_model_card_says_what_the_hub_reads(index, tmp_path):
    cards = write_cards(index, tmp_path, Registry(), None)
    assert [each.path.parent.name for each in cards] == ["org--name", "tiny"]
    card = ModelCard.load(cards[0].path)
    assert card.data.model_name == "org/name"
    shown = {
        row["method"]: row
        for table in comparison_tables(index, None)
        for row in table.data
        if row["model"] == "hf:org/name"
    }
    results = {each.metric_args["method"]: each for each in card.data.eval_results}
    assert results.keys() == shown.keys() == {"base", "quick"}
    for method, result in results.items():
        assert result.metric_value == shown[method]["quality"]
        assert result.metric_type == "pass@1"
        assert result.dataset_config == "prompt=raw"
        assert result.metric_args["items"] == 12
        assert result.metric_args["low"] <= result.metric_value <= result.metric_args["high"]
    index_data = metadata_load(cards[0].path)["model-index"]
    assert index_data[0]["results"][0]["task"]["type"] == "other"  # no task of ours is named `toy`


def test_tables_are_those_that_are_printed(index, tmp_path):
    for format, begins in (("latex", "% needs"), ("csv", "run_id,"), ("md", "### toy")):
        written = write_tables(index, tmp_path, format, None)
        assert written.path.read_text().startswith(begins)
        assert written.rows == 2


def test_the_command_writes_several_formats_and_refuses_others(index, tmp_path, capsys):
    store = str(index.parent)
    arguments = ["export", "--store", store, "--out", str(tmp_path / "out")]
    assert run.main([*arguments, "--format", "parquet", "--format", "latex"]) == 0
    assert f"{tmp_path}/out/comparison.parquet: 4\n" in capsys.readouterr().out
    assert (tmp_path / "out" / "tables.tex").exists()
    assert run.main([*arguments, "--format", "parkett"]) == 2
    assert "Did you mean 'parquet'?" in capsys.readouterr().err
    assert run.main([*arguments, "--task", "toy"]) == 2
    assert run.main([*arguments, "--format", "csv", "--task", "toi"]) == 2
    assert "Did you mean 'toy'?" in capsys.readouterr().err
