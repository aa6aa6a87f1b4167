"""The generated records: fitted, balanced, the same everywhere, and answered by their evidence."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from models.attention import PromptMarks
from models.base import Decoding, Generation, Trace
from tasks.base import Item
from tasks.longbench_generator import (
    CONTINUATION_TOKENS,
    KINDS,
    WARM_UP,
    estimate_tokens,
    make_item,
)
from tasks.longbench_mini import ITEMS_OF_A_KIND, LongBenchMini, bits_per_byte
from tasks.longbench_protocol import tokens_of
from tests.models.toy import TableModel, random_table

# Kinds whose texts come from the tables alone, and so are the same under every Python.
GENERATED = [kind for kind in KINDS if kind not in ("code", "continuation")]
ANSWERED = [kind for kind in KINDS if kind != "continuation"]
LENGTHS = (512, 1024, 4096)


def records(kind: str, length: int = 1024, count: int = 8) -> list[dict[str, Any]]:
    return [dict(make_item(kind, n, length=length).fields) for n in range(count)]


def evidence(fields: dict[str, Any]) -> list[str]:
    return [fields["prompt"][start:end] for start, end in fields["evidence"]]


@pytest.mark.parametrize("kind", KINDS)
def test_records_have_longbenchs_fields_and_evidence_inside_the_context(kind: str) -> None:
    for fields in records(kind):
        assert fields["dataset"] == kind
        assert fields["prompt"].count(fields["context"]) == 1
        assert fields["length"] == len(fields["context"].split())
        assert fields["answers"]
        assert set(fields) >= {"_id", "input", "context", "answers", "language", "all_classes"}
        assert json.loads(json.dumps(fields)) == fields
        at = fields["prompt"].index(fields["context"])
        assert fields["evidence"]
        for start, end in fields["evidence"]:
            assert at <= start < end <= at + len(fields["context"])


@pytest.mark.parametrize("kind", ["docqa", "multihop", "needle", "key-value", "summary"])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_answer_stands_in_the_evidence_and_nowhere_else(kind: str, length: int) -> None:
    for fields in records(kind, length):
        (answer,) = fields["answers"]
        if kind == "multihop":  # the first hop is asked about, the second one stands alone
            answer = answer.split(" -> ")[1]
        word = rf"\b{re.escape(answer.removesuffix('.'))}\b"
        assert any(re.search(word, span) for span in evidence(fields))
        assert len(re.findall(word, fields["prompt"])) == 1


def test_what_is_asked_about_stands_in_the_evidence() -> None:
    for fields in records("docqa"):
        (span,) = evidence(fields)
        name = " ".join(span.split()[:2])
        assert name in fields["input"]
    for fields in records("multihop"):
        # One says who, the other where that one lives, in whatever order.
        who = next(span for span in evidence(fields) if span.startswith("The "))
        where = next(span for span in evidence(fields) if " lives in " in span)
        assert len(evidence(fields)) == 2
        second, city = where.removesuffix(".").split(" lives in ")
        assert second == who.removesuffix(".").split(" is ")[1]
        assert fields["answers"] == [f"{second} -> {city}"]
        assert who.split(" of ")[1].split(" is ")[0] in fields["input"].split("\n")[-1]
        # Another pair of passages, in the same context, shows how to answer.
        shown = fields["input"].split("\n")[1].removeprefix("Answer: ")
        link, home = shown.split(" -> ")
        assert f"{link}." in fields["context"]
        assert f"{link.split(' is ')[1]} lives in {home}." in fields["context"]
        assert home != city
    for kind in ("needle", "key-value"):
        assert all(fields["input"] in evidence(fields)[0] for fields in records(kind))


def test_a_sentence_belongs_to_the_paragraph_whose_number_is_the_answer() -> None:
    orders = set()
    for fields in records("retrieval"):
        paragraphs = fields["context"].split("\n\n")
        last = [text.removesuffix(".").split(". ")[-1] for text in paragraphs]
        numbers = [int(text.rsplit(" ", 1)[1]) for text in last]
        assert sorted(numbers) == list(range(1, len(paragraphs) + 1))
        orders.add(tuple(numbers))
        words = Counter(fields["input"].split())
        fitting = [
            f"Paragraph {n}"
            for n, text in zip(numbers, last, strict=True)
            if not words - Counter(text.split())
        ]
        assert fitting == fields["answers"]
        (span,) = evidence(fields)
        assert span.endswith(f" in {fields['answers'][0]}.")
        assert (Counter(span.split()) - words).total() == 3  # the word left out, and the label
    assert len(orders) > 4  # a model that goes on counting is not right


def test_as_many_paragraphs_differ_as_the_answer_says() -> None:
    for fields in records("count"):
        assert [str(len(set(fields["context"].split("\n\n"))))] == fields["answers"]


def test_few_shot_examples_show_all_classes_and_not_the_question() -> None:
    for fields in records("few-shot"):
        assert fields["answers"][0] in fields["all_classes"]
        shown = Counter(line for line in fields["context"].split("\n") if line.startswith("Type: "))
        assert {line.removeprefix("Type: ") for line in shown} == set(fields["all_classes"])
        assert max(shown.values()) - min(shown.values()) <= 1
        assert fields["input"] not in fields["context"]


def test_a_line_of_code_is_not_shown_and_its_name_is() -> None:
    for fields in records("code"):
        (line,) = fields["answers"]
        lines = [each.strip() for each in fields["context"].split("\n")]
        assert line.strip() not in lines
        assert not set("`#\"'") & set(line)
        for span in evidence(fields):
            assert set(re.findall(r"\w{4,}", span)) & set(re.findall(r"\w{4,}", line))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", LENGTHS)
def test_texts_are_fitted_to_the_length_they_were_asked_for(kind: str, length: int) -> None:
    aim = KINDS[kind].aim * (length - KINDS[kind].max_new_tokens)
    for fields in records(kind, length):
        # A sentence more or less, or a long line of code.
        assert abs(estimate_tokens(fields["prompt"]) - aim) < max(0.02 * aim, 30)
        if kind == "continuation":
            size = estimate_tokens(fields["answers"][0])
            assert abs(size - CONTINUATION_TOKENS) < 12


@pytest.mark.weights
@pytest.mark.parametrize("kind", KINDS)
def test_texts_have_the_length_in_smollm2s_tokens(kind: str) -> None:
    from models.loading import load

    tokenizer = load("smollm2-135m", offline=True).tokenizer
    loose = kind in ("code", "continuation")
    for length in (*LENGTHS, 8192):
        for fields in records(kind, length):
            answer = (
                len(tokenizer.encode(fields["answers"][0]))
                if kind == "continuation"
                else KINDS[kind].max_new_tokens
            )
            share = (len(tokenizer.encode(fields["prompt"])) + answer) / length
            assert (0.85 if loose else 0.93) < share < (1.05 if loose else 1.03)


def test_evidence_is_spread_over_the_context() -> None:
    for kind in ("docqa", "needle", "key-value"):
        places = [
            fields["evidence"][0][0] / len(fields["prompt"])
            for fields in records(kind, 2048, ITEMS_OF_A_KIND)
        ]
        assert min(places) < 0.2
        assert max(places) > 0.75
        thirds = Counter(int(3 * place) for place in places)
        assert min(thirds.values()) >= 3


def test_warm_up_shares_no_name_place_or_text_with_the_test() -> None:
    for kind in ("docqa", "multihop", "needle"):
        ours = {word for fields in records(kind) for word in fields["answers"]}
        theirs = {
            make_item(kind, n, length=512, seed=WARM_UP).fields["answers"][0] for n in range(9)
        }
        assert not ours & theirs
    for kind in ("code", "continuation"):
        warm = make_item(kind, 0, length=512, seed=WARM_UP).fields["context"]
        assert not any(warm[:200] in fields["context"] for fields in records(kind))


def test_the_first_records_of_the_kinds_have_their_evidence_at_different_depths() -> None:
    places = [
        fields["evidence"][0][0] / len(fields["prompt"])
        for kind in ("docqa", "retrieval", "needle", "key-value")
        for fields in records(kind, 1024, 1)
    ]
    assert min(places) < 0.2 < 0.6 < max(places)


@pytest.mark.parametrize("kind", KINDS)
def test_a_context_can_be_cut_down_to_its_evidence_or_to_nothing(kind: str) -> None:
    for number in range(4):
        whole, alone, nothing = (
            make_item(kind, number, length=1024, shown=shown).fields
            for shown in ("whole", "evidence", "nothing")
        )
        assert evidence(dict(alone)) == evidence(dict(whole))
        assert alone["context"] == "\n".join(evidence(dict(whole)))
        assert nothing["evidence"] == []
        assert not any(span in nothing["prompt"] for span in evidence(dict(whole)))
        frame = whole["prompt"].replace(whole["context"], "")
        assert nothing["prompt"] == (frame or "\n")
        for name in ("_id", "input", "answers", "all_classes"):
            assert alone[name] == nothing[name] == whole[name]


def test_without_its_evidence_a_prompt_does_not_hold_the_answer() -> None:
    for kind in ("docqa", "multihop", "needle", "key-value", "summary", "retrieval"):
        for number in range(4):
            fields = make_item(kind, number, length=512, shown="nothing").fields
            assert fields["answers"][0].split(" -> ")[-1] not in fields["prompt"]


def test_a_continuation_may_be_as_long_as_the_card_has_it() -> None:
    task = LongBenchMini(task="continuation", length=1024, continuation_tokens=256)
    for item in itertools.islice(task.items(), 4):
        assert abs(estimate_tokens(item.fields["answers"][0]) - 256) < 12
        together = estimate_tokens(item.fields["prompt"] + item.fields["answers"][0])
        assert abs(together - 0.96 * 1024) < 40
    with pytest.raises(ValueError, match=r"continuation_tokens must lie in \[1, 256\]"):
        LongBenchMini(length=512, continuation_tokens=257)


def test_kinds_come_in_turn_so_that_a_limit_is_balanced() -> None:
    items = list(LongBenchMini(length=512).items())
    assert len(items) == ITEMS_OF_A_KIND * len(KINDS) == len({item.id for item in items})
    assert [item.fields["dataset"] for item in items[: 2 * len(KINDS)]] == [*KINDS, *KINDS]
    alone = list(LongBenchMini(task="docqa", length=512).items())
    assert alone == [item for item in items if item.fields["dataset"] == "docqa"]
    warm = [item.fields["dataset"] for item in LongBenchMini(length=512).warmup_items()]
    assert warm == list(KINDS)
    assert len(list(LongBenchMini(task="count", length=512).warmup_items())) == 4


def test_generated_records_are_the_same_in_every_process() -> None:
    program = (
        "import hashlib, json; from tasks.longbench_generator import make_item;"
        f"print(hashlib.sha256(json.dumps([dict(make_item(k, 3, length=512).fields) for k in "
        f"{GENERATED!r}]).encode()).hexdigest())"
    )
    here = hashlib.sha256(
        json.dumps([dict(make_item(kind, 3, length=512).fields) for kind in GENERATED]).encode()
    ).hexdigest()
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)}
    there = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert there.stdout.strip() == here
    # Whoever changes a record changes the task's version with it.
    assert (here[:16], LongBenchMini.version) == ("85436df53e91bd87", "1.1")


# --- calls and scores ----------------------------------------------------------------------------


class Oracle:
    """A model that answers with a given text and keeps what it was asked."""

    def __init__(self, answer: str, window: int = 10**6) -> None:
        self.name, self.answer = "oracle", answer
        self.tokenizer = self
        self.facts = SimpleNamespace(max_positions=window)
        self.asked: list[tuple[int, Decoding]] = []

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    def generate(self, prompt_ids: Sequence[int], decoding: Decoding) -> Generation:
        self.asked.append((len(prompt_ids), decoding))
        return Generation((1,), self.answer, "stop", Trace())


@pytest.mark.parametrize("kind", ANSWERED)
def test_the_right_answer_scores_one_and_nothing_scores_nothing(kind: str) -> None:
    task = LongBenchMini(task=kind, length=512)
    item = next(task.items())
    answer = item.fields["answers"][0]
    right = task.call(Oracle(answer), item)  # type: ignore[arg-type]  # a stand-in
    assert task.score(item, right.text)["score"] == pytest.approx(1.0, abs=1e-6)
    assert task.score(item, "")["score"] == 0.0
    assert task.metrics[0].higher_is_better


def test_answers_are_short_and_stop_where_their_kind_says() -> None:
    for kind in ANSWERED:
        task = LongBenchMini(task=kind, length=512)
        model = Oracle("")
        task.call(model, next(task.items()), fixed_length=True)  # type: ignore[arg-type]
        ((_, decoding),) = model.asked
        assert decoding.max_new_tokens <= 16
        assert decoding.stop == KINDS[kind].stop
        assert decoding.ignore_eos


def test_a_prompt_that_does_not_fit_the_window_is_cut_in_the_middle() -> None:
    task = LongBenchMini(task="docqa", length=512)
    model = Oracle("", window=500)
    task.call(model, next(task.items()))  # type: ignore[arg-type]
    assert model.asked[0][0] == 500 - KINDS["docqa"].max_new_tokens


def test_with_all_kinds_the_score_leaves_out_what_is_at_the_floor() -> None:
    task = LongBenchMini(length=512)
    by_kind = {item.fields["dataset"]: item for item in list(task.items())[: len(KINDS)]}
    names = [metric.name for metric in task.metrics]
    assert names == ["score", *ANSWERED, "bits_per_byte"]
    assert task.score(by_kind["docqa"], "") == {"score": 0.0, "docqa": 0.0}
    assert task.score(by_kind["count"], "") == {"count": 0.0}
    assert task.score(by_kind["multihop"], "") == {"score": 0.0, "multihop": 0.0}
    told = json.dumps({"nats": [math.log(2)] * 6, "bytes": 3})
    assert task.score(by_kind["continuation"], told) == {"bits_per_byte": pytest.approx(2.0)}
    (metric,) = LongBenchMini(task="continuation").metrics
    assert (metric.name, metric.higher_is_better) == ("bits_per_byte", False)


class Marked(Oracle):
    """One that listens to what the parts of its prompt are."""

    def __init__(self, window: int = 10**6) -> None:
        super().__init__("", window)
        self.marks: list[PromptMarks] = []

    def mark(self, marks: PromptMarks) -> None:
        self.marks.append(marks)


@pytest.mark.parametrize("kind", ANSWERED)
@pytest.mark.parametrize("is_aware", [True, False])
def test_models_are_told_where_the_evidence_and_the_question_are(kind: str, is_aware: bool) -> None:
    task = LongBenchMini(task=kind, length=512, query_aware=is_aware)
    item, model = next(task.items()), Marked()
    task.call(model, item)  # type: ignore[arg-type]  # a stand-in
    (marks,) = model.marks
    prompt = item.fields["prompt"]
    places = {place for start, end in item.fields["evidence"] for place in range(start, end)}
    assert marks.evidence == tuple(sorted(places))  # a letter is a token here
    if is_aware:
        assert marks.question is None
    else:
        assert prompt[: marks.question].endswith(item.fields["context"])
        assert item.fields["input"] in prompt[marks.question :]


def test_of_a_prompt_that_was_cut_only_the_question_is_told() -> None:
    task = LongBenchMini(task="docqa", length=512, query_aware=False)
    item, model = next(task.items()), Marked(window=900)
    task.call(model, item)  # type: ignore[arg-type]  # a stand-in
    ((length, _),) = model.asked
    (marks,) = model.marks
    prompt = item.fields["prompt"]
    behind = len(prompt) - prompt.index(item.fields["context"]) - len(item.fields["context"])
    assert length == 900 - KINDS["docqa"].max_new_tokens < len(prompt)
    assert marks == PromptMarks((), length - behind)


def test_a_continuation_and_a_chat_are_not_marked() -> None:
    for settings in ({"task": "docqa", "chat": "auto"}, {"task": "docqa"}):
        task = LongBenchMini(length=512, **settings)  # type: ignore[arg-type]
        model = Marked()
        task.call(model, next(task.items()))  # type: ignore[arg-type]  # a stand-in
        assert bool(model.marks[0].evidence) == (settings.get("chat") is None)
    continuation = LongBenchMini(task="continuation", length=512)
    told = ByteModel()
    told.mark = pytest.fail  # type: ignore[attr-defined]
    continuation.call(told, next(continuation.items()))


class Pairs:
    """Two letters are a token, from the left."""

    def encode(self, text: str) -> list[int]:
        return [hash(text[at : at + 2]) for at in range(0, len(text), 2)]


def test_a_token_over_the_edge_of_a_span_belongs_to_it() -> None:
    spans = ((0, 2), (1, 2), (1, 3), (2, 3), (6, 7), (0, 7))
    found = tokens_of(Pairs(), "abcdefg", spans)  # type: ignore[arg-type]
    assert found == ((0,), (0,), (0, 1), (1,), (3,), (0, 1, 2, 3))


class ByteModel(TableModel):
    """A table model whose tokens are bytes."""

    def __init__(self) -> None:
        super().__init__(random_table(256), max_positions=10**5)
        self.tokenizer = self  # type: ignore[assignment]

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode()


def test_a_continuation_is_fed_and_its_loss_is_that_of_the_table() -> None:
    task = LongBenchMini(task="continuation", length=512)
    item = next(task.items())
    model = ByteModel()
    told = task.call(model, item)
    answer = item.fields["answers"][0].encode()
    text = item.fields["prompt"].encode() + answer
    assert bytes(told.token_ids) == answer
    rows = model.table.double().log_softmax(-1)
    nats = [-float(rows[one, other]) for one, other in itertools.pairwise(text)]
    expected = sum(nats[-len(answer) :]) / math.log(2) / len(answer)
    assert task.score(item, told.text)["bits_per_byte"] == pytest.approx(expected, abs=1e-6)
    assert bits_per_byte(told.text) == pytest.approx(expected, abs=1e-6)
    assert len(told.trace.forwards) == len(answer) - 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "doc-qa"}, "Did you mean 'docqa'"),
        ({"length": 100}, r"length must lie in \[384, 8192\] tokens, got 100"),
        ({"chat": "yes"}, "chat must be one of"),
        ({"context": "all"}, "context must be one of whole, evidence, nothing"),
        ({"query_aware": 1}, "query_aware must be true or false, got 1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LongBenchMini(**settings)


def test_every_length_that_is_allowed_can_be_made() -> None:
    for kind in KINDS:
        for length in (384, 8192):
            for seed in ("test", WARM_UP):
                item: Item = make_item(kind, 1, length=length, seed=seed)
                assert len(item.fields["prompt"]) > 2 * length
    assert np.isfinite(estimate_tokens("é ü 漢字 \t"))
