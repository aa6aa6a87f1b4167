"""LongBench: prompts, cuts, buckets, loading and aggregates, on a tiny folder laid out like it."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from string import Formatter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.attention import PromptMarks
from models.base import Decoding, Generation, Trace, Unsupported
from runner.corpus import corpus_records
from tasks.base import Item
from tasks.longbench import LongBench
from tasks.longbench_protocol import (
    BUCKETS,
    CATEGORIES,
    EVEN_TASKS,
    FIRST_LINE_TASKS,
    PLAIN_TASKS,
    PROTOCOLS,
    fit_prompt,
    length_bucket,
    read_records,
)
from tasks.longbench_v2 import LongBenchV2
from tests.models.tiny import NumberTokenizer


def record(number: int, **changed: Any) -> dict[str, Any]:
    return {
        "input": f"question {number}?",
        "context": f"context {number} {{braces}}",
        "answers": [f"answer {number}"],
        "length": 1000 * (number + 1),
        "dataset": "any",
        "language": "en",
        "all_classes": None,
        "_id": f"id{number}",
        **changed,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three records of hotpotqa, two of trec, and hotpotqa of LongBench-E."""
    data = tmp_path / "data"
    data.mkdir()
    labels = {"all_classes": ["place", "person"], "answers": ["place"]}
    files = {
        "hotpotqa": [record(n) for n in range(3)],
        "trec": [record(n, **labels) for n in range(2)],
        "hotpotqa_e": [record(n, length=length) for n, length in enumerate((3999, 4000, 8000))],
    }
    for name, records in files.items():
        text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records)
        (data / f"{name}.jsonl").write_text(text, encoding="utf-8")
    questions = [
        {
            "_id": f"q{n}",
            "domain": "Code Repository Understanding",
            "difficulty": ("easy", "hard")[n % 2],
            "length": ("short", "medium", "long")[n],
            "question": " Which one? ",
            "choice_A": "first",
            "choice_B": "$DOC$",
            "choice_C": "third\n",
            "choice_D": "fourth",
            "answer": "ABC"[n],
            "context": "some text\n",
        }
        for n in range(3)
    ]
    (tmp_path / "data.json").write_text(json.dumps(questions), encoding="utf-8")
    return tmp_path


class Recorder:
    """A model that keeps what it is asked, with a chat template if it is given one."""

    def __init__(self, chat: bool = False, window: int = 4096) -> None:
        self.name = "recorder"
        self.tokenizer = _Tokenizer(chat)
        self.facts = SimpleNamespace(max_positions=window)
        self.asked: list[tuple[str, Decoding]] = []

    def generate(self, prompt_ids: Sequence[int], decoding: Decoding) -> Generation:
        self.asked.append((self.tokenizer.decode(prompt_ids), decoding))
        return Generation((1,), "an answer", "length", Trace())


class _Tokenizer:
    """One token a character."""

    def __init__(self, chat: bool) -> None:
        self.hub = self
        self.chat_template = "yes" if chat else None

    def __call__(self, text: str, *, add_special_tokens: bool) -> SimpleNamespace:
        assert not add_special_tokens  # the template has them
        return SimpleNamespace(input_ids=self.encode(text))

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert add_generation_prompt
        assert not tokenize
        return f"<user>{messages[0]['content']}<assistant>"

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))


# --- protocol ------------------------------------------------------------------------------------


# Section 4 and table 1 of the paper, and the official configuration of lengths.
OFFICIAL = """
    narrativeqa single-doc-qa qa_f1 128
    qasper single-doc-qa qa_f1 128
    multifieldqa_en single-doc-qa qa_f1 64
    multifieldqa_zh single-doc-qa qa_f1_chinese 64
    hotpotqa multi-doc-qa qa_f1 32
    2wikimqa multi-doc-qa qa_f1 32
    musique multi-doc-qa qa_f1 32
    dureader multi-doc-qa rouge_l_chinese 128
    gov_report summarization rouge_l 512
    qmsum summarization rouge_l 512
    multi_news summarization rouge_l 512
    vcsum summarization rouge_l_chinese 512
    trec few-shot classification 64
    triviaqa few-shot qa_f1 32
    samsum few-shot rouge_l 128
    lsht few-shot classification 64
    passage_count synthetic count 32
    passage_retrieval_en synthetic retrieval 32
    passage_retrieval_zh synthetic retrieval_chinese 32
    lcc code code_similarity 64
    repobench-p code code_similarity 64
"""


def test_each_of_the_21_tasks_has_its_category_score_and_length() -> None:
    assert [
        f"{name} {each.category} {each.scorer} {each.max_new_tokens}"
        for name, each in PROTOCOLS.items()
    ] == [line.strip() for line in OFFICIAL.strip().split("\n")]
    assert len(CATEGORIES) == 6
    assert {name for name in PROTOCOLS if PROTOCOLS[name].language == "zh"} == {
        "multifieldqa_zh",
        "dureader",
        "vcsum",
        "lsht",
        "passage_retrieval_zh",
    }


def test_longbench_e_has_13_tasks_none_of_which_is_chinese() -> None:
    left_out = {"narrativeqa", "musique", "qmsum"}
    assert set(EVEN_TASKS) == {
        name for name, each in PROTOCOLS.items() if each.language != "zh" and name not in left_out
    }
    assert len(EVEN_TASKS) == 13


def test_templates_have_their_fields_and_their_odd_endings() -> None:
    for name, protocol in PROTOCOLS.items():
        fields = {field for _, field, _, _ in Formatter().parse(protocol.template) if field}
        without_question = {"gov_report", "multi_news", "vcsum", "passage_count", "lcc"}
        assert fields == ({"context"} if name in without_question else {"context", "input"}), name
    assert PROTOCOLS["narrativeqa"].template.count("asconcisely") == 2
    assert PROTOCOLS["qasper"].template.count("as concisely") == 2
    assert "\n\n Answer the question based on the above article" in PROTOCOLS["qasper"].template
    assert PROTOCOLS["trec"].template.endswith("{context}\n{input}")
    assert PROTOCOLS["triviaqa"].template.endswith("{context}\n\n{input}")
    assert PROTOCOLS["passage_retrieval_en"].template.endswith("\n\nThe answer is: ")
    assert PROTOCOLS["passage_count"].template.endswith("\n\nThe final answer is: ")
    assert PROTOCOLS["lcc"].template == (
        "Please complete the code given below. \n{context}Next line of code:\n"
    )
    assert PROTOCOLS["hotpotqa"].template.endswith("\n\nQuestion: {input}\nAnswer:")
    assert PROTOCOLS["hotpotqa"].template == PROTOCOLS["musique"].template


@pytest.mark.parametrize(
    ("length", "bucket"), [(0, 0), (3999, 0), (4000, 1), (7999, 1), (8000, 2), (10**6, 2)]
)
def test_buckets_begin_at_4000_and_8000(length: int, bucket: int) -> None:
    assert length_bucket(length) == BUCKETS[bucket]


def cut(count: int, max_length: int, truncation: Any, *, joined: bool = False) -> list[int]:
    tokenizer = NumberTokenizer()
    text = tokenizer.decode(range(count))
    return tokenizer.encode(fit_prompt(tokenizer, text, max_length, truncation, joined=joined))


def test_the_middle_is_cut_and_both_ends_are_kept() -> None:
    assert cut(10, 6, "middle") == [0, 1, 2, 7, 8, 9]
    assert cut(10, 6, "right") == [0, 1, 2, 3, 4, 5]
    assert cut(10, 6, "left") == [4, 5, 6, 7, 8, 9]
    assert cut(6, 6, "middle") == [0, 1, 2, 3, 4, 5]
    # v1 takes int(max_length / 2) from both ends; v2's slice rounds the second half up.
    assert cut(10, 5, "middle") == [0, 1, 8, 9]
    assert cut(10, 5, "middle", joined=True) == [0, 1, 7, 8, 9]


@given(st.integers(1, 60), st.integers(2, 60), st.sampled_from(["middle", "left", "right"]))
def test_a_cut_prompt_fits_and_keeps_its_order(count: int, limit: int, truncation: str) -> None:
    kept = cut(count, limit, truncation)
    assert len(kept) == min(count, limit) - (count > limit and limit % 2 and truncation == "middle")
    assert kept == sorted(set(kept))
    assert truncation == "left" or kept[0] == 0
    assert truncation == "right" or kept[-1] == count - 1


def test_v1_decodes_each_half_by_itself_and_v2_both_at_once() -> None:
    class Stripping(_Tokenizer):
        def decode(self, token_ids: Sequence[int]) -> str:
            return super().decode(token_ids).lstrip()

    tokenizer = Stripping(chat=False)
    assert fit_prompt(tokenizer, "abcdef gh", 6) == "abcgh"
    assert fit_prompt(tokenizer, "abcdef gh", 6, joined=True) == "abc gh"


# --- loading -------------------------------------------------------------------------------------


def test_records_become_prompts_tasks_in_turn(folder: Path) -> None:
    items = list(LongBench(task="hotpotqa", folder=str(folder)).items())
    assert [item.id for item in items] == ["hotpotqa/id0", "hotpotqa/id1", "hotpotqa/id2"]
    assert items[1].fields["prompt"].endswith("Question: question 1?\nAnswer:")
    assert "given passages.\ncontext 1 {braces}\n\nAnswer" in items[1].fields["prompt"]


def test_tasks_come_in_turn_so_that_a_prefix_is_balanced(folder: Path) -> None:
    for name in ("triviaqa", "samsum"):
        (folder / "data" / f"{name}.jsonl").write_text(json.dumps(record(0)))
    (folder / "data" / "lsht.jsonl").write_text(json.dumps(record(0, all_classes=["x"])))
    ids = [item.id for item in LongBench(task="few-shot", folder=str(folder)).items()]
    assert ids == ["trec/id0", "triviaqa/id0", "samsum/id0", "lsht/id0", "trec/id1"]


def test_missing_records_say_what_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Unsupported, match=r"data/hotpotqa\.jsonl.* like the archive of THUDM"):
        list(LongBench(task="hotpotqa", folder=str(tmp_path)).items())
    monkeypatch.setenv("TOKENMARK_CACHE", str(tmp_path))
    with pytest.raises(Unsupported, match=r"(?s)not to be had from the hub.*longbench:folder="):
        list(LongBench(task="hotpotqa").items())
    with pytest.raises(Unsupported, match=r"data\.json"):
        list(LongBenchV2().items())


def test_the_cache_folder_and_the_hubs_archive_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "cache" / "longbench"
    place.mkdir(parents=True)
    with zipfile.ZipFile(place / "data.zip", "w") as archive:
        archive.write(folder / "data" / "trec.jsonl", "data/trec.jsonl")
    monkeypatch.setenv("TOKENMARK_CACHE", str(tmp_path / "cache"))
    items = list(LongBench(task="trec").items())
    assert [item.fields["classes"] for item in items] == [["place", "person"]] * 2
    with pytest.raises(Unsupported, match=r"holds no data/lcc\.jsonl"):
        list(LongBench(task="lcc").items())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("not json", "holds no JSON records"),
        ("", "holds no records"),
        ('{"input": "?"}', "is none of LongBench's"),
        (json.dumps(record(0)) + "\n" + json.dumps(record(0)), "have the same _id"),
    ],
)
def test_files_that_are_no_records_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "lcc.jsonl").write_text(text)
    with pytest.raises(Unsupported, match=reason):
        list(LongBench(task="lcc", folder=str(tmp_path)).items())


def test_a_list_of_records_may_stand_below_an_empty_line(tmp_path: Path) -> None:
    (tmp_path / "lcc.jsonl").write_text("\n" + json.dumps([record(0)]))
    assert read_records("lcc", 1, folder=str(tmp_path), revision="main") == [record(0)]


def test_line_separators_inside_a_record_do_not_cut_it(tmp_path: Path) -> None:
    text = json.dumps(record(0, input="a\u2028b\x85c"), ensure_ascii=False)
    (tmp_path / "lcc.jsonl").write_text(text, encoding="utf-8")
    found = read_records("lcc", 1, folder=str(tmp_path), revision="main")
    assert [each["input"] for each in found] == ["a\u2028b\x85c"]


def test_a_folders_own_templates_are_used_on_demand(folder: Path) -> None:
    task = LongBench(task="hotpotqa", folder=str(folder), template="folder")
    with pytest.raises(Unsupported, match="which is not there"):
        list(task.items())
    (folder / "config").mkdir()
    (folder / "config" / "dataset2prompt.json").write_text('{"hotpotqa": "{input} <{context}>"}')
    assert next(task.items()).fields["prompt"] == "question 0? <context 0 {braces}>"
    with pytest.raises(Unsupported, match="no prompt for 'trec'"):
        list(LongBench(task="trec", folder=str(folder), template="folder").items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "hotpotq"}, "Did you mean 'hotpotqa'"),
        ({"task": "zh", "e": True}, "no task of 'zh'"),
        ({"task": "narrativeqa", "e": True}, "task must be one of"),
        ({"truncation": "centre"}, "truncation must be one of middle, left, right"),
        ({"max_length": 1}, "max_length must be 0 or at least 2"),
        ({"chat": "on"}, "chat must be one of"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LongBench(**settings)


# --- calls ---------------------------------------------------------------------------------------


def item_of(task: str, prompt: str) -> Item:
    fields = {
        "task": task,
        "prompt": prompt,
        "answers": ["x"],
        "classes": ["x"],
        "length": 1,
        "behind": 0,
    }
    return Item(f"{task}/0", fields)


def test_few_shot_and_code_prompts_go_without_the_chat_template() -> None:
    for name, protocol in PROTOCOLS.items():
        model = Recorder(chat=True)
        LongBench().call(model, item_of(name, "prompt"))  # type: ignore[arg-type]  # a stand-in
        ((asked, decoding),) = model.asked
        assert asked == ("prompt" if name in PLAIN_TASKS else "<user>prompt<assistant>")
        assert decoding == Decoding(max_new_tokens=protocol.max_new_tokens)
    assert sorted(FIRST_LINE_TASKS) == ["lsht", "samsum", "trec", "triviaqa"]
    assert FIRST_LINE_TASKS | {"lcc", "repobench-p"} == PLAIN_TASKS


def test_prompts_are_cut_before_the_template_is_put_around_them() -> None:
    model = Recorder(chat=True)
    task = LongBench(max_length=6, max_new_tokens=5)
    task.call(model, item_of("hotpotqa", "0123456789"), fixed_length=True)  # type: ignore[arg-type]
    assert model.asked == [("<user>012789<assistant>", Decoding(max_new_tokens=5, ignore_eos=True))]


def test_by_default_a_prompt_leaves_500_tokens_of_the_window_or_what_the_answer_needs() -> None:
    for name, kept in (("hotpotqa", 3596), ("gov_report", 4096 - 612)):
        model = Recorder()
        LongBench().call(model, item_of(name, "x" * 5000))  # type: ignore[arg-type]
        assert len(model.asked[0][0]) == kept


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("name", ["hotpotqa", "lcc", "gov_report"])
def test_a_method_may_have_to_compress_before_it_knows_the_question(
    folder: Path, name: str, chat: bool
) -> None:
    class Marked(Recorder):
        def mark(self, marks: PromptMarks) -> None:
            self.marks = marks

    (folder / "data" / f"{name}.jsonl").write_text(json.dumps(record(3)))
    for is_aware, max_length in ((True, 0), (False, 0), (False, 400)):
        task = LongBench(task=name, folder=str(folder), query_aware=is_aware, max_length=max_length)
        model = Marked(chat)
        item = next(task.items())
        task.call(model, item)  # type: ignore[arg-type]  # a stand-in
        ((asked, _),) = model.asked
        assert model.marks.evidence == ()
        if is_aware:
            assert model.marks.question is None
            continue
        behind = PROTOCOLS[name].template.split("{context}")[1].replace("{input}", "question 3?")
        ending = "<assistant>" if chat and name not in PLAIN_TASKS else ""
        assert asked[model.marks.question :] == behind + ending
    right = LongBench(
        task=name, folder=str(folder), query_aware=False, max_length=50, truncation="right"
    )
    model = Marked(chat)
    right.call(model, next(right.items()))  # type: ignore[arg-type]  # a stand-in
    assert model.marks.question is None


def test_a_chat_template_that_must_be_there_and_is_not_is_said() -> None:
    with pytest.raises(Unsupported, match="no chat template"):
        LongBench(chat="always").call(Recorder(), item_of("hotpotqa", "prompt"))  # type: ignore[arg-type]


# --- scores --------------------------------------------------------------------------------------


# One record of each task in the form that the archive has it: what is asked, the answers, the
# classes, the language, and an output that earns the full score.
FORMS: dict[str, tuple[str, list[str], list[str] | None, str]] = {
    "narrativeqa": ("Who is the narrator?", ["a sailor", "Ishmael"], None, "Ishmael"),
    "qasper": ("Which data set?", ["unanswerable"], None, "Unanswerable."),
    "multifieldqa_en": ("When?", ["In 1999."], None, "in 1999"),
    "multifieldqa_zh": ("什么时候？", ["一九九九年。"], None, "一九九九年"),
    "hotpotqa": ("Which one?", ["Miller v. California"], None, "Miller v California"),
    "2wikimqa": ("Are both alive?", ["no"], None, "No."),
    "musique": ("When was it?", ["1,954", "nineteen fifty-four"], None, "1954"),
    "dureader": ("如何学习？", ["每天学习", "多读书"], None, "多读书"),
    "gov_report": ("", ["It was found. It was reported."], None, "It was reported. It was found."),
    "qmsum": ("What was said?", ["They agreed on the budget"], None, "They agreed on the budget"),
    "multi_news": ("", ["The two met on Monday"], None, "The two met on Monday"),
    "vcsum": ("", ["会议讨论了预算"], None, "会议讨论了预算"),
    "trec": (
        "Question: Who wrote it?\nType:",
        ["Group or organization of person"],
        ["Group or organization of person", "Individual", "Other location"],
        " Group or organization of person\nQuestion: What?",
    ),
    "triviaqa": ("Passage:\nText.\nQuestion:\nWho?\nAnswer:\n", ["Bach", "J. Bach"], None, "Bach"),
    "samsum": ("Dialogue: A: hi\nSummary:", ["A says hi"], None, "\nA says hi\nDialogue: B"),
    "lsht": ("新闻内容：……\n类别：", ["体育"], ["体育", "军事"], "体育\n新闻"),
    "passage_count": ("", ["17"], None, "17"),
    "passage_retrieval_en": ("An abstract.", ["Paragraph 15"], None, "Paragraph 15"),
    "passage_retrieval_zh": ("一个摘要", ["段落15"], None, "段落15"),
    "lcc": ("", ["    return self.x"], None, "\n# here\n    return self.x\n"),
    "repobench-p": ("def f(x):\n", ["    return x"], None, "    return x"),
}  # fmt: skip


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A folder like the whole archive: two records of each of the 21 tasks, one of each of E's."""
    data = tmp_path / "data"
    data.mkdir()
    for name, (asked, answers, classes, _) in FORMS.items():
        fields = {
            "input": asked,
            "answers": answers,
            "all_classes": classes,
            "dataset": name,
            "language": "zh" if PROTOCOLS[name].language == "zh" else "en",
            "context": f"context of {name}\n",
        }
        for suffix, count in (("", 2), ("_e", 1)):
            if suffix and name not in EVEN_TASKS:
                continue
            rows = [record(n, **fields, _id=f"{n:048x}") for n in range(count)]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (data / f"{name}{suffix}.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def needs_jieba(name: str) -> bool:
    return PROTOCOLS[name].scorer in ("qa_f1_chinese", "rouge_l_chinese")


def test_all_21_forms_of_records_become_prompts_and_their_answers_score(archive: Path) -> None:
    assert list(FORMS) == list(PROTOCOLS)
    task = LongBench(folder=str(archive))
    items = list(task.items())
    assert [item.fields["task"] for item in items] == 2 * list(FORMS)
    assert len({item.id for item in items}) == 42
    assert json.loads(json.dumps([item.fields for item in items])) == [i.fields for i in items]
    for item in items[:21]:
        name = item.fields["task"]
        asked, answers, classes, output = FORMS[name]
        prompt = item.fields["prompt"]
        assert f"context of {name}\n" in prompt
        assert asked in prompt
        assert "{" not in prompt
        assert item.fields["answers"] == answers
        assert item.fields["classes"] == (classes or [])
        if asked and name in PLAIN_TASKS - {"lcc", "repobench-p"}:
            assert prompt.endswith(asked)
        assert task.score(item, output)[name] == pytest.approx(1.0, abs=1e-6), name
        assert task.score(item, "")[name] == 0.0
    even = LongBench(e=True, folder=str(archive))
    assert [item.id for item in even.items()] == [f"{name}_e/{0:048x}" for name in EVEN_TASKS]


def test_scores_count_for_their_task_category_and_mean(archive: Path) -> None:
    task = LongBench(task="en", folder=str(archive))
    names = [metric.name for metric in task.metrics]
    english = [name for name in PROTOCOLS if PROTOCOLS[name].language != "zh"]
    assert names == ["score", "by-category", *CATEGORIES, *english]
    rows = [item for item in task.items() if item.fields["task"] in ("hotpotqa", "musique", "trec")]
    outputs = {item.id: "no" for item in rows}
    for item in rows:
        if item.id.startswith("musique"):
            outputs[item.id] = "1954"
    first = rows[0]
    assert first.id.startswith("hotpotqa")
    outputs[first.id] = "Miller v. California"
    assert task.score(first, outputs[first.id]) == {"hotpotqa": 1.0}
    # Every item once; hotpotqa's right record twice and trec's; nothing but the first musique.
    draws = np.array([range(6), [0, 0, 0, 2, 2, 2], [1] * 6])
    found = task.corpus(outputs, draws)
    assert set(found) == {"score", "by-category", *CATEGORIES}
    np.testing.assert_allclose(found["score"], [(0.5 + 1 + 0) / 3, (1 + 0) / 2, 1.0])
    np.testing.assert_allclose(found["multi-doc-qa"], [0.75, 1.0, 1.0])
    np.testing.assert_allclose(found["few-shot"], [0.0, 0.0, np.nan])
    np.testing.assert_allclose(found["by-category"], [0.375, 0.5, 1.0])
    assert np.isnan(found["code"]).all()


def test_lengths_of_several_tasks_are_means_over_tasks(archive: Path) -> None:
    task = LongBench(task="code", e=True, folder=str(archive))
    for name, lengths in (("lcc", (10, 20, 5000)), ("repobench-p", (30, 4000, 7999))):
        rows = [
            record(n, input="", answers=["x = 1"], length=length, context="y\n")
            for n, length in enumerate(lengths)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (archive / "data" / f"{name}_e.jsonl").write_text(text)
    items = list(task.items())
    right = {"lcc_e/id0", "repobench-p_e/id0", "repobench-p_e/id1"}
    found = task.corpus(
        {item.id: "x = 1" if item.id in right else "" for item in items},
        np.arange(6)[None],
    )
    np.testing.assert_allclose(found["score"], [(1 / 3 + 2 / 3) / 2])
    np.testing.assert_allclose(found["0-4k"], [(1 / 2 + 1) / 2])
    np.testing.assert_allclose(found["4-8k"], [(0 + 1 / 2) / 2])
    assert np.isnan(found["8k+"]).all()
    assert set(found) == {"score", *BUCKETS}


@pytest.mark.parametrize("settings", [{}, {"task": "en"}, {"task": "code"}, {"e": True}])
def test_every_metric_of_all_outputs_together_is_computed(
    archive: Path, settings: dict[str, Any]
) -> None:
    # The worker refuses a task that leaves one out, so no cell would end.
    task = LongBench(folder=str(archive), **settings)
    items = [item for item in task.items() if not needs_jieba(item.fields["task"])]
    outputs = {"cell": {item.id: "an answer" for item in items}}
    records = list(corpus_records(task, [item.id for item in items], outputs))
    assert {each.metric for each in records} == {m.name for m in task.metrics if m.kind == "corpus"}


def test_even_lengths_are_scored_by_bucket(folder: Path) -> None:
    task = LongBench(task="hotpotqa", e=True, folder=str(folder))
    assert [metric.name for metric in task.metrics] == ["score", *BUCKETS]
    scored = [dict(task.score(item, "answer 1")) for item in task.items()]
    assert scored == [
        {"score": 0.5, "0-4k": 0.5},  # `answer` of `answer 0`
        {"score": 1.0, "4-8k": 1.0},
        {"score": 0.5, "8k+": 0.5},
    ]


def test_only_the_first_line_of_a_label_counts_and_corrected_is_passed_on() -> None:
    fields = item_of("trec", "").fields | {"classes": ["a", "ab", "abc"], "answers": ["abc"]}
    item = Item("trec/0", fields)
    assert LongBench(task="trec").score(item, "\nabc\nab") == {"score": 0.5}
    assert LongBench(task="trec", corrected=True).score(item, "\nabc\nab") == {"score": 1.0}


def test_warm_up_records_are_none_of_the_task(folder: Path) -> None:
    for task in (LongBench(task="hotpotqa", folder=str(folder)), LongBenchV2(folder=str(folder))):
        warm = list(task.warmup_items())
        assert len({item.fields["prompt"] for item in warm}) == len(warm) >= 4
        assert not {item.id for item in warm} & {item.id for item in task.items()}
        assert task.score(warm[0], "x").keys() <= {metric.name for metric in task.metrics}


# --- version 2 -----------------------------------------------------------------------------------


def test_a_choice_is_asked_for_in_the_official_form(folder: Path) -> None:
    first = next(LongBenchV2(folder=str(folder)).items())
    assert first.id == "longbench-v2/q0"
    prompt = first.fields["prompt"]
    assert prompt.startswith(
        "Please read the following text and answer the question below.\n\n<text>"
    )
    assert (
        "<text>\nsome text\n</text>\n\nWhat is the correct answer to this question: Which" in prompt
    )
    assert "Choices:\n(A) first\n(B) $DOC$\n(C) third\n(D) fourth\n\nFormat" in prompt


def test_choices_are_scored_and_an_unread_answer_is_wrong(folder: Path) -> None:
    task = LongBenchV2(folder=str(folder))
    items = list(task.items())
    assert task.score(items[0], "The correct answer is (A)") == {
        "accuracy": 1.0,
        "answered": 1.0,
        "easy": 1.0,
        "short": 1.0,
    }
    assert task.score(items[1], "perhaps B")["accuracy"] == 0.0
    assert task.score(items[1], "perhaps B")["answered"] == 0.0
    assert task.score_with_detail(items[1], "perhaps B").detail == "no letter"
    assert [each.id[-2:] for each in LongBenchV2(part="hard", folder=str(folder)).items()] == ["q1"]
    assert [each.id[-2:] for each in LongBenchV2(part="long", folder=str(folder)).items()] == ["q2"]


def test_a_sampled_choice_has_a_seed_of_its_own(folder: Path) -> None:
    task = LongBenchV2(folder=str(folder), temperature=0.1, max_length=9)
    model = Recorder()
    for item in list(task.items())[:2]:
        task.call(model, item)  # type: ignore[arg-type]
    (first, one), (_, other) = model.asked
    assert len(first) == 9  # 4 from the front, 5 from the back
    assert one.seed != other.seed
    assert one.temperature == 0.1
