"""MMBench and its miniature: prompts, calls, scores and items, with numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.base import Decoding, Forward, InvalidOutput, Trace, VisualAnswer, VisualPrompt
from models.embedded.scenes.generator import SPLITS, bucket, generate
from models.embedded.scenes.questions import CATEGORIES, GROUPS, circular, held_out
from models.embedded.scenes.raster import render
from models.embedded.tiny_vlm.text import option_prompt
from tasks.base import Item, Unscored
from tasks.mmbench import MMBench
from tasks.mmbench_common import joined_trace, question_prompt
from tasks.mmbench_data import Rotation, decode_image
from tasks.mmbench_mini import QUESTIONS_OF_A_CATEGORY, MMBenchMini
from tests.tasks.test_mmbench_data import BLUE, fixture, tsv

CLOSING = "Answer with the option's letter from the given choices directly."


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Questions 3, 7 and 9 with 2, 3 and 4 options; see `fixture`."""
    path = tmp_path / "six.tsv"
    path.write_text(tsv(fixture()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def mini() -> list[Item]:
    return list(MMBenchMini().items())


def items_of(task: MMBench) -> dict[int, Item]:
    return {int(item.id.removeprefix("mmbench/")): item for item in task.items()}


def stored(answers: Sequence[str], log_probabilities: Sequence[Sequence[float]] = ()) -> str:
    values = log_probabilities or [[-1.0, -2.0]] * len(answers)
    return json.dumps({"answers": list(answers), "log_probabilities": list(values)})


class Model:
    """Answers with what it is given, call after call, and keeps what it was asked."""

    def __init__(self, answers: Sequence[tuple[str, Sequence[float]]]) -> None:
        self.name = "fake"
        self.tokenizer: Any = None
        self.facts: Any = None
        self.asked: list[tuple[VisualPrompt, Decoding]] = []
        self._answers = iter(answers)

    def answer(self, prompt: VisualPrompt, decoding: Decoding) -> VisualAnswer:
        self.asked.append((prompt, decoding))
        text, log_probabilities = next(self._answers)
        number = len(self.asked)
        trace = Trace(prefill=[Forward(100 + number, 0)], forwards=[Forward(1, 100)], flops=10.0)
        trace.mark("prefill")
        trace.notes |= {"kept_tokens": 144, "prefill_flops": 2.0 * number, "positions": "compact"}
        return VisualAnswer(
            (number, 0), text, "eos", trace, SimpleNamespace(), tuple(log_probabilities)
        )  # type: ignore[arg-type]  # no work is counted

    def synchronize(self) -> None:
        """Nothing is running."""


# --- prompts -------------------------------------------------------------------------------------


def test_prompts_are_worded_as_each_harness_has_them() -> None:
    plain = Rotation("What is it?", "", {"A": "a cat", "B": "a bird"}, "A")
    hinted = plain._replace(hint="It purrs.")
    lines = "A. a cat\nB. a bird\n"
    assert question_prompt(plain, "llava") == f"What is it?\n{lines}{CLOSING}"
    assert question_prompt(hinted, "llava") == f"It purrs.\nWhat is it?\n{lines}{CLOSING}"
    several = "There are several options:"
    assert question_prompt(plain, "lmms-eval") == f"What is it? {several}\n{lines}{CLOSING}"
    assert (
        question_prompt(hinted, "lmms-eval") == f"It purrs. What is it? {several}\n{lines}{CLOSING}"
    )
    select = "Please select the correct answer from the options above. \n"
    assert (
        question_prompt(plain, "vlmevalkit") == f"Question: What is it?\nOptions:\n{lines}{select}"
    )
    assert question_prompt(hinted, "vlmevalkit") == (
        f"Hint: It purrs.\nQuestion: What is it?\nOptions:\n{lines}{select}"
    )


def test_chinese_questions_close_in_chinese_where_the_harness_does() -> None:
    asked = Rotation("?", "", {"A": "x", "B": "y"}, "A")
    assert question_prompt(asked, "llava", "cn").endswith("B. y\n请直接回答选项字母。")
    assert question_prompt(asked, "lmms-eval", "cn").endswith(
        "B. y\n请直接使用所提供的选项字母作为答案回答。"
    )
    assert question_prompt(asked, "vlmevalkit", "cn") == question_prompt(asked, "vlmevalkit")


def test_the_hash_of_the_wording_is_among_the_conditions() -> None:
    hashes = {
        MMBench(prompt=wording, language=language).conditions()["prompt_hash"]
        for wording in ("llava", "lmms-eval", "vlmevalkit")
        for language in ("en", "cn")
    }
    assert len(hashes) == 5  # VLMEvalKit words both languages alike


# --- calls ---------------------------------------------------------------------------------------


def test_every_rotation_is_asked_with_its_own_letters(file: Path) -> None:
    task = MMBench(file=str(file), max_new_tokens=7)
    item = items_of(task)[7]
    model = Model([("C", [-3.0, -2.0, -0.12345]), ("B", [-1, -2, -3]), ("none", [-1, -2, -4])])
    result = task.call(model, item, fixed_length=True)
    texts = [prompt.text.splitlines() for prompt, _ in model.asked]
    assert [lines[2:5] for lines in texts] == [
        ["A. a cat", "B. a bird", "C. a fish"],
        ["A. a bird", "B. a fish", "C. a cat"],
        ["A. a fish", "B. a cat", "C. a bird"],
    ]
    assert all(lines[:2] == ["It purrs not.", "What sits there?"] for lines in texts)
    assert {prompt.options for prompt, _ in model.asked} == {("A", "B", "C")}
    assert {prompt.crops for prompt, _ in model.asked} == {1}
    assert {decoding for _, decoding in model.asked} == {
        Decoding(max_new_tokens=7, ignore_eos=True)
    }
    assert model.asked[0][0].image.tolist() == [[[255, 0, 0]]]
    assert json.loads(result.text) == {
        "answers": ["C", "B", "none"],
        "log_probabilities": [[-3.0, -2.0, -0.1235], [-1, -2, -3], [-1, -2, -4]],
    }
    assert result.token_ids == (1, 0, 2, 0, 3, 0)
    assert result.trace.prefill == [Forward(101, 0), Forward(102, 0), Forward(103, 0)]
    assert result.trace.flops == 30.0
    assert result.trace.notes == {
        "kept_tokens": 144,
        "prefill_flops": 4.0,
        "positions": "compact",
        "prefill_tokens": 3,
    }


def test_a_question_of_two_options_is_asked_twice(file: Path) -> None:
    task = MMBench(file=str(file))
    model = Model([("A", [-1.0, -2.0])] * 2)
    task.call(model, items_of(task)[3])
    assert [prompt.options for prompt, _ in model.asked] == [("A", "B")] * 2
    assert not model.asked[0][1].ignore_eos


@pytest.mark.parametrize("values", [[], [-1.0], [-1.0, math.nan]])
def test_missing_log_probabilities_are_no_result(file: Path, values: list[float]) -> None:
    task = MMBench(file=str(file))
    with pytest.raises(InvalidOutput, match="letters A, B"):
        task.call(Model([("A", values)]), items_of(task)[3])


def test_phases_of_rotations_are_added_up() -> None:
    # Begun at 10 and 20: encoding took 2 and 3 seconds, the prefill 1 and 1, decoding 4 and 0.5.
    first, second = Trace(), Trace()
    first.marks |= {"decode": 17.0, "prefill": 13.0, "encoded": 12.0}
    second.marks |= {"encoded": 23.0, "prefill": 24.0, "decode": 24.5}
    assert joined_trace([10.0, 20.0], [first, second]).marks == {
        "encoded": 15.0,
        "prefill": 17.0,
        "decode": 21.5,
    }


def test_notes_that_differ_are_averaged_if_they_are_numbers() -> None:
    traces = [
        Trace(notes={"flops": 1.0, "layers": "5 5", "prefill_tokens": 2}, accepted=[1], kv_bytes=3),
        Trace(notes={"flops": 4.0, "layers": "5 4"}, draft_forwards=2, kv_bytes=4),
    ]
    joined = joined_trace([0.0, 1.0], traces)
    assert joined.notes == {"flops": 2.5, "layers": "5 4", "prefill_tokens": 3}
    assert (joined.accepted, joined.draft_forwards, joined.kv_bytes) == ([1], 2, 7)


# --- scores --------------------------------------------------------------------------------------


# Right letters: question 3 A B, question 7 C B A, question 9 B A D C.
ANSWERS = {
    3: ["A.", "(B)"],
    7: ["The answer is C.", "a fish", ""],
    9: ["A dog and B", "A", "A", "C"],
}
PROBABILITIES = {
    3: [[-0.1, -2.0], [-2.0, -0.1]],
    7: [[-3.0, -2.0, -0.1], [-0.1, -2.0, -3.0], [-0.1, -2.0, -3.0]],
    9: [[-1.0, -1.0, -3.0, -4.0], [-1.0, -2, -3, -4], [-4, -3, -2, -1], [-4, -3, -1, -2]],
}


def scores_of(task: MMBench, number: int, change: Callable[[list[str]], None] | None = None) -> Any:
    answers = list(ANSWERS[number])
    if change:
        change(answers)
    return task.score_with_detail(items_of(task)[number], stored(answers, PROBABILITIES[number]))


def test_scores_are_those_worked_out_by_hand(file: Path) -> None:
    task = MMBench(file=str(file))
    day, cat, letter = (scores_of(task, number) for number in (3, 7, 9))
    assert day.scores == {
        "circular": 1.0,
        "circular_official": 1.0,
        "vanilla_0": 1.0,
        "vanilla_all": 1.0,
        "answered": 1.0,
        "circular_logprob": 1.0,
        "vanilla_0_logprob": 1.0,
    }
    assert day.detail == "A B"
    third = Unscored("no option can be told from the answer to rotation 2")
    first = Unscored("no option can be told from the answer to rotation 0")
    assert cat.scores == {
        "circular": third,  # the others are right: this one decides
        "circular_official": 0.0,
        "vanilla_0": 1.0,
        "vanilla_all": third,
        "answered": pytest.approx(2 / 3),
        "circular_logprob": 0.0,
        "vanilla_0_logprob": 1.0,
    }
    assert cat.detail == "C B -"
    assert letter.scores == {
        "circular": 0.0,  # settled by the wrong one
        "circular_official": 0.0,
        "vanilla_0": first,
        "vanilla_all": first,
        "answered": 0.75,
        "circular_logprob": first,  # two letters share the largest probability
        "vanilla_0_logprob": first,
        "category/ocr": 0.0,
    }
    assert letter.detail == "- A A C"


@pytest.mark.parametrize("place", range(2))
def test_one_wrong_rotation_zeroes_a_question(file: Path, place: int) -> None:
    def other(answers: list[str]) -> None:
        answers[place] = "B" if "A" in answers[place] else "A"

    scores = scores_of(MMBench(file=str(file)), 3, other).scores
    assert scores["circular"] == scores["circular_official"] == 0.0
    assert scores["vanilla_0"] == (0.0 if place == 0 else 1.0)
    assert scores["vanilla_all"] == 0.5
    # The likeliest letters are judged for themselves, and are right.
    assert scores["vanilla_0_logprob"] == scores["circular_logprob"] == 1.0


def test_the_numbers_of_all_questions_are_ratios_of_rotations(file: Path) -> None:
    task = MMBench(file=str(file))
    outputs = {
        f"mmbench/{number:04}": stored(ANSWERS[number], PROBABILITIES[number])
        for number in (3, 7, 9)
    }
    draws = np.array([[0, 1, 2], [0, 0, 0], [2, 2, 1]])
    found = task.corpus(outputs, draws)
    # Right: 2, 2 and 2; readable: 2, 2 and 3; asked: 2, 3 and 4.
    assert found["vanilla_all"].tolist() == pytest.approx([6 / 7, 1.0, 6 / 8])
    assert found["answered"].tolist() == pytest.approx([7 / 9, 1.0, 8 / 11])
    nothing = {"mmbench/0003": stored(["", ""])}
    found = task.corpus(nothing, np.array([[0]]))
    assert np.isnan(found["vanilla_all"]).all()
    assert found["answered"].tolist() == [0.0]


PAIRS = st.lists(st.sampled_from(["A", "B", "?"]), min_size=2, max_size=2)


@settings(max_examples=25, deadline=None)  # the questions are made in the first
@given(answers=st.lists(PAIRS, min_size=1, max_size=5))
def test_right_and_readable_shares_multiply_to_the_public_number(
    answers: list[list[str]], mini: list[Item]
) -> None:
    outputs, right = {}, 0
    for item, pair in zip(mini, answers, strict=False):
        letters = [*pair, "C", "D"]
        outputs[item.id] = stored(letters, [[0, -1, -2, -3]] * 4)
        key = [rotation["answer"] for rotation in item.fields["rotations"]]
        right += sum(one == other for one, other in zip(letters, key, strict=True))
    found = MMBenchMini().corpus(outputs, np.arange(len(outputs))[None])
    product = float(found["vanilla_all"][0] * found["answered"][0])
    assert product == pytest.approx(right / (4 * len(outputs)))


def test_without_answers_only_what_was_answered_is_known(tmp_path: Path) -> None:
    path = tmp_path / "test.tsv"
    path.write_text(tsv([{**row, "answer": ""} for row in fixture()]), encoding="utf-8")
    task = MMBench(file=str(path), split="test")
    scored = scores_of(task, 7)
    assert scored.detail == "C B -"
    assert scored.scores.pop("answered") == pytest.approx(2 / 3)
    assert all(isinstance(value, Unscored) for value in scored.scores.values())
    assert {"circular", "vanilla_0", "circular_logprob"} <= set(scored.scores)
    found = task.corpus({"mmbench/0003": stored(ANSWERS[3])}, np.array([[0]]))
    assert np.isnan(found["vanilla_all"]).all()
    assert found["answered"].tolist() == [1.0]


def test_an_output_of_another_number_of_rotations_is_no_output(file: Path) -> None:
    task = MMBench(file=str(file))
    item = items_of(task)[3]
    with pytest.raises(ValueError, match="2 rotations were asked, 3 answers"):
        task.score(item, stored(["A", "B", "C"]))


def test_the_other_public_rule_is_a_second_scorer(file: Path) -> None:
    task = MMBench(file=str(file))
    [other] = task.other_scorers()
    assert (other.name, other.judged_by) == ("lmms-eval", "lmms-eval")
    [back] = MMBench(file=str(file), extraction="lmms-eval").other_scorers()
    assert back.name == "vlmevalkit"
    item = items_of(task)[3]
    # Stars around letters: one rule strips them, the other sees no letter.
    output = stored(["*A*", "*B*"])
    assert task.score(item, output)["circular"] == 1.0
    assert isinstance(other.judge(item, other.cut(output)).scores["circular"], Unscored)
    assert back.judge(item, output).scores == task.score(item, output)


def test_every_score_belongs_to_a_metric(file: Path) -> None:
    task = MMBench(file=str(file))
    metrics = {metric.name: metric.kind for metric in task.metrics}
    assert next(iter(metrics)) == "circular"
    assert len(metrics) == len(task.metrics)
    for number in ANSWERS:
        assert set(scores_of(task, number).scores) <= set(metrics)
    assert {name for name, kind in metrics.items() if kind == "corpus"} == set(
        task.corpus({"mmbench/0003": stored(ANSWERS[3])}, np.array([[0]]))
    )


# --- items ---------------------------------------------------------------------------------------


def test_the_order_of_questions_does_not_follow_the_file(tmp_path: Path) -> None:
    rows = [
        {**fixture()[2], "index": str(number), "image": BLUE if number == 0 else "0"}
        for number in range(40)
    ]
    orders = []
    for name, part in (("all", rows), ("backwards", rows[::-1]), ("even", rows[::2])):
        path = tmp_path / f"{name}.tsv"
        path.write_text(tsv(part), encoding="utf-8")
        orders.append(list(items_of(MMBench(file=str(path)))))
    assert sorted(orders[0]) == list(range(40)) != orders[0]
    assert orders[1] == orders[0]
    assert orders[2] == [number for number in orders[0] if number % 2 == 0]


def test_a_file_that_changes_is_read_again(file: Path) -> None:
    task = MMBench(file=str(file))
    before = task.content_hash()
    assert task.content_hash() == before
    file.write_text(file.read_text().replace("Is it day?", "Is it night?"))
    assert task.content_hash() != before


@pytest.mark.parametrize("changes", [{"prompt": "lmms-eval"}, {"extraction": "lmms-eval"}])
def test_what_changes_an_answer_or_its_score_changes_the_hash(
    file: Path, changes: dict[str, Any]
) -> None:
    task = MMBench(file=str(file))
    assert dataclasses.replace(task, **changes).content_hash() != task.content_hash()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"prompt": "lava"}, "prompt must be one of llava.*Did you mean 'llava'"),
        ({"extraction": "exact"}, "extraction must be one of vlmevalkit, lmms-eval"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"split": "val"}, "split must be one of dev, test"),
        ({"language": "fr"}, "language must be one of en, cn"),
        ({"release": "2.0"}, "release must be one of 1.0, 1.1"),
    ],
)
def test_settings_are_refused_by_name(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MMBench(**values)
    with pytest.raises(ValueError, match="size must be 96 or 192 pixels, got 100"):
        MMBenchMini(size=100)  # type: ignore[arg-type]  # that is the point


def test_warm_up_questions_are_about_plain_colours(file: Path) -> None:
    items = list(MMBench(file=str(file)).warmup_items())
    assert len(items) == 4
    for item in items:
        [[colour]] = np.unique(decode_image(item.fields["image"]).reshape(-1, 3), axis=0)[None]
        first = item.fields["rotations"][0]
        named = first["options"][first["answer"]]
        assert (
            tuple(colour)
            == {
                "red": (255, 0, 0),
                "green": (0, 128, 0),
                "blue": (0, 0, 255),
                "white": (255, 255, 255),
            }[named]
        )


# --- the miniature -------------------------------------------------------------------------------


def test_the_miniature_asks_what_the_generator_knows_to_be_right(mini: list[Item]) -> None:
    asked = held_out("test", 96, QUESTIONS_OF_A_CATEGORY)
    expected = [asked[place::QUESTIONS_OF_A_CATEGORY] for place in range(QUESTIONS_OF_A_CATEGORY)]
    assert len(mini) == len(asked) == 360
    for item, (scene, question) in zip(
        mini, [pair for turn in expected for pair in turn], strict=True
    ):
        assert (decode_image(item.fields["image"]) == render(scene).image).all()
        assert item.fields["category"] == question.category
        assert item.fields["l2-category"] == GROUPS[question.category]
        rotations = item.fields["rotations"]
        # What tiny-vlm was trained on, letter for letter, without the template around it.
        assert [each["prompt"] + " ASSISTANT:" for each in rotations] == [
            option_prompt(copy) for copy in circular(question)
        ]
        assert {each["options"][each["answer"]] for each in rotations} == {question.answer_text}
        assert {each["answer"] for each in rotations} == set("ABCD")


def test_scenes_of_the_miniature_are_held_out_from_training(mini: list[Item]) -> None:
    shown = {scene.description for scene, _ in held_out("test", 96, QUESTIONS_OF_A_CATEGORY)}
    assert all(bucket(each) in SPLITS["test"] for each in shown)
    trained = {generate("shapes", 96, "train", index).description for index in range(2000)}
    assert not shown & trained
    pictures = {item.fields["image"] for item in mini}
    warm = list(MMBenchMini().warmup_items())
    assert len(warm) == 9
    assert not pictures & {item.fields["image"] for item in warm}
    assert not {item.id for item in mini} & {item.id for item in warm}


def test_every_prefix_of_the_miniature_is_balanced(mini: list[Item]) -> None:
    for limit in (9, 27, 180):
        counts = Counter(item.fields["category"] for item in mini[:limit])
        assert counts == dict.fromkeys(CATEGORIES, limit // 9)
    letters = Counter(item.fields["rotations"][0]["answer"] for item in mini)
    assert all(60 <= letters[letter] <= 120 for letter in "ABCD")  # 90 expected, 3.6 deviations


def test_large_scenes_are_asked_in_tiles() -> None:
    task = MMBenchMini(size=192)
    item = next(task.warmup_items())
    model = Model([("A", [-1.0, -2.0, -3.0, -4.0])] * 4)
    task.call(model, item)
    assert {(prompt.image.shape, prompt.crops) for prompt, _ in model.asked} == {((192, 192, 3), 2)}
    assert MMBenchMini().crops == 1


def test_the_content_of_the_miniature_has_not_changed() -> None:
    # Another hash is another version of the task; Pillow's way to compress has no part in it.
    assert MMBenchMini().content_hash() == MINI_HASH


def test_the_hash_is_of_pixels_and_not_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    task = MMBenchMini()
    some = list(task.items())[:3]
    before = _hash_of(task, some, monkeypatch)
    again, moved = [], []
    for item in some:
        picture = decode_image(item.fields["image"])
        again.append(_with_image(item, Image.fromarray(picture)))
        picture = picture.copy()
        picture[0, 0, 0] ^= 1
        moved.append(_with_image(item, Image.fromarray(picture)))
    assert again[0].fields["image"] != some[0].fields["image"]
    assert _hash_of(task, again, monkeypatch) == before
    assert _hash_of(task, moved, monkeypatch) != before


def _hash_of(task: MMBenchMini, items: list[Item], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(MMBenchMini, "items", lambda self: iter(items))
    return task.content_hash()


def _with_image(item: Item, picture: Any) -> Item:
    import base64

    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=0)
    image = base64.b64encode(buffer.getvalue()).decode("ascii")
    return dataclasses.replace(item, fields={**item.fields, "image": image})


MINI_HASH = "e9de09f56a35ae4217bc7bf6b54ef149536547d629258ed5b242b00a7072fea8"
