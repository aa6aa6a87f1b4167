"""coco-mini: the scenes as a COCO file, what an answer is worth, and what is stored of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from models.base import Instance, InvalidOutput
from models.embedded.scenes.generator import SHAPES, generate, templates
from models.embedded.scenes.raster import mask, render
from models.embedded.tiny_detector.data import geometry
from results.statistics import corpus_draws
from tasks import coco_scorers as rules
from tasks.base import Item, Unscored
from tasks.coco_common import read_text
from tasks.coco_mini import NUM_IMAGES, CocoMini
from tests.tasks.coco_material import Said, Told, output_of, truth_of


def numbers(task: CocoMini, outputs: dict[str, str]) -> dict[str, float]:
    found = task.corpus(outputs, np.arange(len(outputs))[None])
    assert set(found) == {metric.name for metric in task.metrics if metric.kind == "corpus"}
    return {name: float(values[0]) for name, values in found.items()}


def some(task: CocoMini, count: int) -> list[Item]:
    return list(task.items())[:count]


@pytest.mark.parametrize("output", ["box", "point", "keypoint"])
def test_the_truth_has_every_score(output: Any) -> None:
    task = CocoMini(output=output)
    outputs = {item.id: output_of(task, item, truth_of(item, output)) for item in some(task, 12)}
    found = numbers(task, outputs)
    perfect = {"f1", "f1_macro", "precision", "recall"} if output == "point" else {
        "f1@0.5", "f1@0.95", "f1@mIoU", "f1_macro@mIoU", "precision@0.5", "recall@0.5", "AP", "AP75"
    }  # fmt: skip
    assert {name: found[name] for name in perfect} == pytest.approx(dict.fromkeys(perfect, 1.0))
    assert found["duplicates"] == found["count_error"] == 0
    assert found["absent_rejected"] == 1
    for item in some(task, 12):
        scored = task.score_with_detail(item, outputs[item.id])
        assert scored.scores == {"image_f1": 1.0, "format_errors": 0.0}
        assert scored.detail.endswith("found, 0 wrong")


def test_eight_corners_reach_the_stated_share_of_a_mask() -> None:
    task = CocoMini(output="polygon")
    shares: dict[str, list[float]] = {}
    for item in some(task, 60):
        for phrase, instances in truth_of(item, "polygon").items():
            for instance in instances:
                size = rules.Size(96, 96)
                said = rules.run_lengths([list(instance.coordinates)], size)
                truths = [
                    rules.run_lengths(truth["segmentation"], size)
                    for truth in item.fields["truths"]
                ]
                best = rules.mask_overlaps([said], truths, [False] * len(truths)).max()
                shares.setdefault(phrase, []).append(float(best))
    means = {phrase: np.mean(values) for phrase, values in shares.items()}
    every = [value for values in shares.values() for value in values]
    assert np.mean(every) == pytest.approx(0.85, abs=0.01)
    assert means["cross"] == pytest.approx(0.62, abs=0.02)
    assert means["star"] == pytest.approx(0.65, abs=0.02)
    assert means["square"] == 1.0


def test_a_missing_a_wrong_and_a_repeated_box_are_told_apart() -> None:
    task = CocoMini()
    item = next(i for i in task.items() if len(i.fields["truths"]) == 4)
    said = truth_of(item, "box")
    before = {phrase: len(instances) for phrase, instances in said.items()}
    present, absent = max(before, key=lambda p: before[p]), next(p for p in before if not before[p])
    again = said[present][0]
    said[present].append(again)
    wrong = Instance(coordinates=(0.0, 0.0, 3.0, 3.0), score=0.5, tokens=4)
    said[absent].append(wrong)
    other = next(phrase for phrase in said if before[phrase] and phrase != present)
    said[other].pop()
    output = output_of(task, item, said, tokens=30)
    assert task.score_with_detail(item, output).detail == "3 of 4 found, 2 wrong"
    found = numbers(task, {item.id: output})
    assert found["f1@0.5"] == pytest.approx(2 * 3 / (5 + 4))
    # Each phrase that is there by itself: one right of those said and those there.
    by_phrase = {phrase: 1.0 for phrase, count in before.items() if count}
    by_phrase[present] = 2 * before[present] / (2 * before[present] + 1)
    by_phrase[other] = 2 * (before[other] - 1) / (2 * before[other] - 1)
    assert found["f1_macro@0.5"] == pytest.approx(np.mean([*by_phrase.values()]))
    assert found["precision@0.5"] == pytest.approx(3 / 5)
    assert found["recall@0.5"] == pytest.approx(3 / 4)
    assert found["duplicates"] == pytest.approx(1 / 5)
    assert found["count_error"] == pytest.approx(3 / 6)
    assert found["tokens_per_instance"] == 4
    assert found["answer_tokens_per_instance"] == 6
    number_absent = sum(not count for count in before.values())
    assert found["absent_rejected"] == pytest.approx((number_absent - 1) / number_absent)


def test_what_is_found_of_an_absent_phrase_is_not_in_the_published_f1() -> None:
    task = CocoMini()
    outputs = {}
    for item in some(task, 12):
        said = truth_of(item, "box")
        # Phrases that are there in other scenes.
        for instances in said.values():
            if not instances:
                instances.append(Instance(coordinates=(0.0, 0.0, 9.0, 9.0), score=0.5))
        outputs[item.id] = output_of(task, item, said)
    found = numbers(task, outputs)
    assert found["f1@0.5"] < 1
    assert found["f1_published@0.5"] == pytest.approx(1.0)


def test_a_malformed_answer_is_its_own_outcome_and_its_readable_part_counts() -> None:
    task = CocoMini()
    item = next(iter(task.items()))
    partly = output_of(task, item, truth_of(item, "box"), errors=("three coordinates",))
    scored = task.score_with_detail(item, partly)
    assert scored.scores == {"image_f1": 1.0, "format_errors": 1.0}
    assert scored.detail.endswith("; three coordinates")
    nothing: Said = {phrase: [] for phrase in item.fields["phrases"]}
    unread = task.score(item, output_of(task, item, nothing, errors=("no box marker",)))
    assert unread["format_errors"] == 1.0
    assert unread["image_f1"] == Unscored("nothing of the answer can be read: no box marker")
    # Saying that nothing is there is an answer.
    assert task.score(item, output_of(task, item, nothing))["image_f1"] == 0.0


def test_a_detector_without_scores_has_f1_and_no_ap() -> None:
    task = CocoMini()
    outputs = {
        item.id: output_of(task, item, truth_of(item, "box", score=None)) for item in some(task, 3)
    }
    found = numbers(task, outputs)
    assert found["f1@0.5"] == 1.0
    assert np.isnan(found["AP"])
    assert np.isnan(found["AR100"])
    assert found["f1_published@0.5"] == pytest.approx(1.0)


def test_ap_follows_the_scores() -> None:
    task = CocoMini()
    item = next(i for i in task.items() if i.fields["truths"])
    values = []
    for right, wrong in ((0.9, 0.1), (0.1, 0.9)):
        said = truth_of(item, "box", score=right)
        phrase = item.fields["truths"][0]["phrase"]
        said[phrase].append(Instance(coordinates=(0.0, 0.0, 2.0, 2.0), score=wrong))
        values.append(numbers(task, {item.id: output_of(task, item, said)})["AP"])
    assert values[0] == pytest.approx(1.0)
    assert values[1] < 1


def test_the_ceiling_is_that_of_the_detectors_grid() -> None:
    task = CocoMini()
    found = []
    for bins in (None, 1000, 20):
        outputs = {
            item.id: output_of(task, item, truth_of(item, "box"), bins=bins)
            for item in some(task, 20)
        }
        found.append(numbers(task, outputs)["ceiling_f1@0.95"])
    assert found[0] == 1.0
    assert found[0] >= found[1] > 0.9 > 0.5 > found[2]


def test_a_resample_that_lacks_a_phrase_has_no_number_for_it_alone() -> None:
    task = CocoMini()
    outputs = {item.id: output_of(task, item, truth_of(item, "box")) for item in some(task, 40)}
    found = task.corpus(outputs, corpus_draws(40)[:50])
    for name in ("AP", "f1@0.5", "f1_macro@0.5", "f1_published@mIoU"):
        np.testing.assert_allclose(found[name], 1.0)
    assert np.isnan(found["APs*"]).all()


def test_a_second_point_in_the_same_shape_is_wrong_and_a_repetition() -> None:
    task = CocoMini(output="point")
    item = next(i for i in task.items() if len(i.fields["truths"]) > 2)
    said = truth_of(item, "point")
    phrase = item.fields["truths"][0]["phrase"]
    said[phrase] += said[phrase][:1]
    found = numbers(task, {item.id: output_of(task, item, said)})
    count = len(item.fields["truths"])
    assert found["precision"] == pytest.approx(count / (count + 1))
    assert found["duplicates"] == pytest.approx(1 / (count + 1))


def test_boxes_areas_and_masks_of_the_file_are_the_scenes() -> None:
    task = CocoMini(output="polygon")
    for item in some(task, 30):
        _, family, size, split, index = item.fields["file"].split("/")
        scene = generate(family, int(size), split, int(index))
        raster = render(scene)
        truths = [t for shape in SHAPES for t in item.fields["truths"] if t["phrase"] == shape]
        things = [
            (place, each)
            for shape in SHAPES
            for place, each in enumerate(scene.objects)
            if each.shape == shape
        ]
        assert len(truths) == len(things)
        for truth, (place, each) in zip(truths, things, strict=True):
            x, y, w, h = truth["bbox"]
            assert (x, y, x + w, y + h) == geometry(each, "box")
            pixels = rules.pixels_of(truth["segmentation"], rules.Size(96, 96))
            np.testing.assert_array_equal(pixels, mask(raster, place))
            # Nothing covers it: all of the shape is seen.
            assert truth["area"] == templates()[SHAPES.index(each.shape), each.radius].sum()


def test_phrases_name_what_the_truths_say_and_three_in_ten_name_nothing() -> None:
    task = CocoMini(phrases="mixed")
    asked = absent = 0
    for item in task.items():
        named = {truth["phrase"] for truth in item.fields["truths"]}
        assert named <= set(item.fields["phrases"])
        assert len(set(item.fields["phrases"])) == len(item.fields["phrases"])
        if set(item.fields["phrases"]) == set(SHAPES):
            continue
        asked += len(item.fields["phrases"])
        absent += len(set(item.fields["phrases"]) - named)
    assert 0.2 < absent / asked < 0.4


@pytest.mark.parametrize("objects", [1, 6])
def test_scenes_have_as_many_objects_as_are_asked(objects: int) -> None:
    items = list(CocoMini(objects=objects).items())
    assert len(items) == NUM_IMAGES
    assert {len(item.fields["truths"]) for item in items} == {objects}


def test_scenes_are_of_the_test_split_and_warm_up_is_not() -> None:
    task = CocoMini(phrases="mixed")
    assert {item.fields["file"].split("/")[3] for item in task.items()} == {"test"}
    warmup = list(task.warmup_items())
    assert len(warmup) == 4
    assert {item.fields["file"].split("/")[3] for item in warmup} == {"validation"}
    item = warmup[0]
    assert task.pixels(item).shape == (96, 96, 3)
    assert task.score(item, output_of(task, item, truth_of(item, "box")))["image_f1"] == 1.0


def test_the_detector_gets_the_picture_and_the_names() -> None:
    task = CocoMini(output="keypoint", max_new_tokens=7)
    item = next(iter(task.items()))
    said = truth_of(item, "keypoint")
    model = Told(lambda phrases: [said[phrase] for phrase in phrases])
    task.call(model, item, fixed_length=True)
    ((image, phrases, output, decoding, keypoints),) = model.asked
    np.testing.assert_array_equal(image, render(generate("shapes", 96, "test", 0)).image)
    assert phrases == SHAPES
    assert (output, keypoints) == ("keypoint", ("top", "right", "bottom", "left"))
    assert (decoding.max_new_tokens, decoding.ignore_eos) == (7, True)


def test_what_is_stored_is_read_again() -> None:
    instance = Instance(
        coordinates=(1.23456, 2.0, 3.0, 4.0), keypoints=((1.0, 2.0), None), score=0.12345678
    )
    task = CocoMini()
    item = next(iter(task.items()))
    said: Said = {phrase: [] for phrase in item.fields["phrases"]} | {"star": [instance]}
    model = Told(lambda phrases: [said[p] for p in phrases], bins=1000, tokens=3)
    text = task.call(model, item).text
    answer = read_text(text)
    (again,) = answer.found[SHAPES.index("star")]
    assert again.coordinates == (1.2346, 2.0, 3.0, 4.0)
    assert again.keypoints == ((1.0, 2.0), None)
    assert again.score == 0.123457
    assert (answer.tokens, answer.bins, json.loads(text)["answer"]) == (3, 1000, "told")


def wrong(**changes: Any) -> Instance:
    return Instance(**{"coordinates": (1.0, 1.0, 2.0, 2.0), **changes})


@pytest.mark.parametrize(
    ("output", "instance", "message"),
    [
        ("box", wrong(coordinates=(1.0, 2.0, 3.0)), "a box has 4 numbers"),
        ("box", wrong(coordinates=(1.0, 1.0, float("nan"), 2.0)), "NaN or infinity"),
        ("box", wrong(coordinates=(3.0, 1.0, 2.0, 2.0)), "left before its right"),
        ("box", wrong(score=1.5), "outside"),
        ("point", wrong(), "a point has 2 numbers"),
        ("polygon", wrong(), "at least three corners"),
        ("keypoint", wrong(keypoints=((1.0, 1.0),)), "4 key points and a box or nothing"),
    ],
)
def test_what_is_no_detection_is_an_invalid_output(
    output: Any, instance: Instance, message: str
) -> None:
    task = CocoMini(output=output)
    item = next(iter(task.items()))
    with pytest.raises(InvalidOutput, match=message):
        task.call(Told(lambda phrases: [[instance] for _ in phrases]), item)


def test_every_phrase_must_be_answered() -> None:
    task = CocoMini()
    with pytest.raises(InvalidOutput, match="6 phrases were asked, 1 were answered"):
        task.call(Told(lambda phrases: [[]]), next(iter(task.items())))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": "boxes"}, "Did you mean 'box'"),
        ({"phrases": "shape"}, "Did you mean 'shapes'"),
        ({"objects": 7}, "objects must be 1 to 6, or 0"),
        ({"max_new_tokens": 0}, "at least 1"),
    ],
)
def test_wrong_settings_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CocoMini(**settings)


def test_no_two_outputs_of_a_task_share_items() -> None:
    hashes: Sequence[str] = [
        CocoMini(output=output).content_hash() for output in ("box", "point", "polygon", "keypoint")
    ]
    assert len(set(hashes)) == 4


def test_items_are_the_known_ones() -> None:
    assert CocoMini().content_hash() == (
        "4ce5291ee1d060384162cf086845266aa5543e934df85ee55219411ee5381858"
    )
    assert CocoMini(phrases="mixed").content_hash() == (
        "aad538be8dacbc8de353d31e9ede2f61a46ceb5c10b0ead1ca8899810715e3fa"
    )


def test_the_record_says_which_tool_was_used() -> None:
    assert CocoMini().conditions()["coco_tool"].startswith("hotcoco ")
    assert CocoMini(tool="pycocotools").conditions()["coco_tool"].startswith("pycocotools ")
