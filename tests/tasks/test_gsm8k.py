"""GSM8K: its official extraction, its prompts, and where its problems may lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.base import Decoding, Generation, Trace, Unsupported
from tasks.gsm8k import Gsm8k, last_number, official_number, read_records

TRAIN = [
    {
        "question": f"What is {n} and {n}?",
        "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n}",
    }
    for n in range(1, 13)
]
TEST = [
    {"question": "How much are 1,000 twice?", "answer": "2 * 1,000 = 2,000\n#### 2,000"},
    {"question": "What is 3 less than 1?", "answer": "1 - 3 = -2\n#### -2"},
]  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_remembered() -> None:
    read_records.cache_clear()


def jsonl_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, records in (("train", TRAIN), ("test", TEST)):
        lines = "\n".join(json.dumps(record) for record in records) + "\n"
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def parquet_folder(folder: Path) -> Path:
    (folder / "main").mkdir(parents=True)
    for split, records in (("train", TRAIN), ("test", TEST)):
        table = pa.Table.from_pylist(records)
        pq.write_table(table, folder / "main" / f"{split}-00000-of-00001.parquet")
    return folder


# ---- reading answers


@pytest.mark.parametrize(
    ("text", "official", "last"),
    [
        ("So 18.\n#### 18", "18", "18"),
        ("#### 2,000", "2000", "2000"),
        ("#### -2", "-2", "-2"),
        ("#### 18 #### 19", "18", "19"),
        ("#### $18", None, "18"),
        ("####18", None, "18"),
        ("It costs $1,250.50.", None, "1250.50"),
        ("Nothing.", None, None),
        ("", None, None),
        ("#### 18.", "18.", "18"),
        ("3 apples and 5 pears", None, "5"),
    ],
)
def test_numbers_are_read_as_the_authors_and_lm_eval_read_them(
    text: str, official: str | None, last: str | None
) -> None:
    assert official_number(text) == official
    assert last_number(text) == last


def test_an_answer_without_a_number_is_wrong_by_both_readings(tmp_path: Path) -> None:
    task = Gsm8k(folder=str(jsonl_folder(tmp_path)), shots=0)
    item = next(task.items())
    assert item.fields["target"] == "2000"
    assert task.score(item, "#### 2000") == {"exact-match": 1.0, "flexible-match": 1.0}
    assert task.score(item, "It is 2,000.") == {"exact-match": 0.0, "flexible-match": 1.0}
    assert task.score(item, "#### 20") == {"exact-match": 0.0, "flexible-match": 0.0}
    assert task.score(item, "") == {"exact-match": 0.0, "flexible-match": 0.0}


# ---- prompts


def test_the_examples_in_front_are_the_first_training_problems(tmp_path: Path) -> None:
    task = Gsm8k(folder=str(jsonl_folder(tmp_path)), shots=2)
    first, second = task.items()
    assert first.fields["prompt"] == (
        "Question: What is 1 and 1?\nAnswer: 1+1=<<1+1=2>>2.\n#### 2\n\n"
        "Question: What is 2 and 2?\nAnswer: 2+2=<<2+2=4>>4.\n#### 4\n\n"
        "Question: How much are 1,000 twice?\nAnswer:"
    )
    assert (second.id, second.fields["target"]) == ("gsm8k/1", "-2")
    warmup = list(task.warmup_items())
    assert len(warmup) == 4
    assert warmup[0].fields["prompt"].endswith("Question: What is 3 and 3?\nAnswer:")


def test_the_model_is_asked_to_stop_at_the_next_question(tmp_path: Path) -> None:
    asked: list[Any] = []

    class Model:
        class tokenizer:  # noqa: N801  # stands for an attribute
            @staticmethod
            def encode(text: str) -> list[int]:
                return [len(text)]

        def generate(self, prompt_ids: list[int], decoding: Decoding) -> Generation:
            asked.append((prompt_ids, decoding))
            return Generation((), "", "eos", Trace())

    task = Gsm8k(folder=str(jsonl_folder(tmp_path)), shots=1, max_new_tokens=64)
    item = next(task.items())
    task.call(Model(), item)  # type: ignore[arg-type]  # as much of a model as it needs
    task.call(Model(), item, fixed_length=True)  # type: ignore[arg-type]  # the same
    assert asked[0] == (
        [len(item.fields["prompt"])],
        Decoding(max_new_tokens=64, stop=("Question:",)),
    )
    assert asked[1][1].ignore_eos


# ---- data


def test_the_authors_files_and_the_hubs_give_the_same_items(tmp_path: Path) -> None:
    folders = (
        jsonl_folder(tmp_path / "a"),
        jsonl_folder(tmp_path / "b" / "data").parent,
        parquet_folder(tmp_path / "c"),
    )
    found = [list(Gsm8k(folder=str(folder)).items()) for folder in folders]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 2


def test_the_cache_is_looked_at_where_no_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.gsm8k.cache_dir", lambda: tmp_path)
    with pytest.raises(Unsupported, match=r"not to be had from the hub.*gsm8k:folder=FOLDER"):
        list(Gsm8k().items())
    jsonl_folder(tmp_path / "gsm8k")
    read_records.cache_clear()
    assert len(list(Gsm8k().items())) == 2


def test_a_line_of_a_file_ends_at_a_line_feed_and_nowhere_else(tmp_path: Path) -> None:
    record = {"question": "one\u2028two", "answer": "#### 3"}
    jsonl_folder(tmp_path)
    (tmp_path / "test.jsonl").write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    (item,) = Gsm8k(folder=str(tmp_path)).items()
    assert item.fields["prompt"].endswith("Question: one\u2028two\nAnswer:")


def test_a_folder_without_the_problems_says_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"it needs train\.jsonl"):
        list(Gsm8k(folder=str(tmp_path)).items())


@pytest.mark.parametrize("content", ["no json", '{"question": "a"}', "[1]"])
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, content: str) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(content)
    with pytest.raises(Unsupported, match="holds no problems of GSM8K"):
        list(Gsm8k(folder=str(tmp_path)).items())
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 not")
    read_records.cache_clear()
    with pytest.raises(Unsupported, match="holds no problems of GSM8K"):
        list(Gsm8k(folder=str(tmp_path)).items())


def test_a_problem_without_a_result_is_refused(tmp_path: Path) -> None:
    jsonl_folder(tmp_path)
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "a", "answer": "b"}))
    with pytest.raises(Unsupported, match="gsm8k/0 of GSM8K has no result"):
        list(Gsm8k(folder=str(tmp_path)).items())


@pytest.mark.parametrize("wrong", [{"shots": -1}, {"max_new_tokens": 0}])
def test_wrong_settings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Gsm8k(**wrong)


def test_more_examples_than_there_are_is_a_wrong_setting(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shots must be at most 12"):
        list(Gsm8k(folder=str(jsonl_folder(tmp_path)), shots=13).items())
