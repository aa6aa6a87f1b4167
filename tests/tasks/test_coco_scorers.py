"""The COCO tools against one another, and our own numbers against them and against loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from models.base import Unsupported
from tasks import coco_scorers as rules
from tasks.coco_data import PERSON_SIGMAS, RESULT_KINDS, Annotation, Category, ImageRecord
from tests.tasks.coco_material import SIGMAS, Material, material

STYLES = ("random", "crowded", "empty", "adversarial")


def judged(made: Material, kind: Any, by: rules.Tool = "pycocotools") -> rules.Evaluation:
    return rules.evaluate(*made, kind, by=by, buckets=(400.0, 2500.0))


def differences(one: rules.Evaluation, other: rules.Evaluation) -> float:
    stats = [np.nan_to_num([*each.stats.values()], nan=-1.0) for each in (one, other)]
    return max(
        float(np.abs(stats[0] - stats[1]).max()),
        float(np.abs(one.precision - other.precision).max()),
        float(np.abs(one.recall - other.recall).max()),
    )


@pytest.mark.parametrize("kind", RESULT_KINDS)
@pytest.mark.parametrize("style", STYLES)
def test_all_tools_give_the_same_numbers_and_matches(style: str, kind: Any) -> None:
    made = material(style, kind)
    one, other, third = (
        judged(made, kind, by) for by in ("pycocotools", "hotcoco", "faster-coco-eval")
    )
    assert differences(one, other) <= 1e-9
    assert differences(one, third) <= 1e-9
    for by_area, others in zip(one.matches, other.matches, strict=True):
        for matches, theirs in zip(by_area, others, strict=True):
            for match, their in zip(matches, theirs, strict=True):
                assert all(map(np.array_equal, match, their))


@pytest.mark.parametrize("kind", RESULT_KINDS)
@pytest.mark.parametrize("style", STYLES)
def test_numbers_of_every_image_once_are_the_tools(style: str, kind: Any) -> None:
    made = material(style, kind, seed=1)
    found = judged(made, kind)
    once = rules.resampled_stats(found, np.ones((1, len(made.images))), kind)
    assert list(once) == list(found.stats)
    for name, value in found.stats.items():
        assert once[name][0] == pytest.approx(value, abs=1e-12, nan_ok=True), name


@pytest.mark.parametrize("kind", RESULT_KINDS)
def test_an_image_drawn_twice_counts_as_two_images(kind: Any) -> None:
    made = material("random", kind, images=12, seed=2)
    counts = np.array([[0, 2, 1, 0, 3, 1, 1, 0, 2, 1, 1, 0], [1.0] * 11 + [5]])
    resampled = rules.resampled_stats(judged(made, kind), counts, kind)
    for row, count in enumerate(counts):
        images, truths, results = [], {}, []
        for image, times in zip(made.images, count, strict=True):
            for copy in range(int(times)):
                again = image._replace(id=image.id + 10_000 * copy)
                images.append(again)
                truths[again.id] = made.truths[image.id]
                results += [
                    {**each, "image_id": again.id}
                    for each in made.results
                    if each["image_id"] == image.id
                ]
        expected = judged(Material(images, made.categories, truths, results), kind).stats
        for name, value in expected.items():
            assert resampled[name][row] == pytest.approx(value, abs=1e-12, nan_ok=True), name


def test_all_resamples_are_computed_alike_whatever_fits_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = material("random", "bbox", seed=3)
    found = judged(made, "bbox")
    counts = np.random.default_rng(0).integers(0, 3, (7, len(made.images))).astype(float)
    together = rules.resampled_stats(found, counts, "bbox")
    monkeypatch.setattr(rules, "_ROOM", 1)
    apart = rules.resampled_stats(found, counts, "bbox")
    for name, values in together.items():
        np.testing.assert_array_equal(values, apart[name])


def one_box(*, truth_id: int = 0, score: float = 0.9) -> Material:
    truth = Annotation(truth_id, 0, 0, (10.0, 10.0, 20.0, 20.0), 400.0, False, None, ())
    found = {"image_id": 0, "category_id": 0, "bbox": [10, 10, 20, 20], "score": score}
    image = ImageRecord(0, "a", 100, 100)
    return Material([image], [Category(0, "thing")], {0: [truth]}, [found])


@pytest.mark.parametrize("by", rules.TOOLS)
def test_a_perfect_detection_of_a_truth_with_id_0_counts(by: rules.Tool) -> None:
    stats = rules.evaluate(*one_box(), "bbox", by=by).stats
    assert [stats[name] for name in ("AP", "AR1", "APs")] == pytest.approx([1.0] * 3)
    assert math.isnan(stats["APl"])


def test_a_tool_that_tells_no_matches_is_not_taken_for_one_without_any() -> None:
    found = rules.evaluate(*one_box(), "bbox", by="faster-coco-eval")
    with pytest.raises(Unsupported, match="ask hotcoco or pycocotools"):
        _ = found.matches


@pytest.mark.parametrize("by", rules.TOOLS)
def test_nothing_found_is_an_ap_of_0(by: rules.Tool) -> None:
    stats = rules.evaluate(*one_box()._replace(results=[]), "bbox", by=by).stats
    assert stats["AP"] == stats["AR100"] == 0.0


@pytest.mark.parametrize("by", rules.TOOLS)
def test_without_truths_there_is_no_ap(by: rules.Tool) -> None:
    made = one_box()
    found = rules.evaluate(*made._replace(truths={0: []}), "bbox", by=by)
    assert all(math.isnan(value) for value in found.stats.values())
    again = rules.resampled_stats(found, np.ones((2, 1)), "bbox")
    assert all(np.isnan(values).all() for values in again.values())


def test_a_size_is_decided_by_the_area_and_the_given_limits() -> None:
    limits = ((500.0, 600.0), (300.0, 500.0), (100.0, 300.0))
    for buckets, name in zip(limits, ("APs*", "APm*", "APl*"), strict=True):
        stats = rules.evaluate(
            *one_box(), "bbox", by="pycocotools", buckets=buckets, mark="*"
        ).stats
        assert [key for key in ("APs*", "APm*", "APl*") if stats[key] > 0.99] == [name]


def slow_pairs(overlap: Any) -> list[tuple[int, int]]:
    """Match the best pair of those left, one after the other."""
    left = [(-v, i, j) for i, row in enumerate(overlap) for j, v in enumerate(row) if v > 0]
    pairs: list[tuple[int, int]] = []
    for _, i, j in sorted(left):
        if all(i != a and j != b for a, b in pairs):
            pairs.append((i, j))
    return pairs


def test_greedy_matching_takes_the_best_pair_first_and_ties_in_order() -> None:
    draw = np.random.default_rng(0)
    for _ in range(200):
        overlap = draw.integers(0, 5, tuple(draw.integers(0, 6, 2))) / 4
        pairs = rules.greedy_pairs(overlap)
        assert [(pair.found, pair.truth) for pair in pairs] == slow_pairs(overlap)
        assert all(pair.overlap == overlap[pair.found, pair.truth] for pair in pairs)


def boxes_of(truths: list[Annotation]) -> Any:
    return np.array([truth.bbox for truth in truths], float).reshape(-1, 4)


@pytest.mark.parametrize("style", ["random", "crowded", "adversarial"])
def test_f1_is_that_of_the_tools_matches_when_they_go_by_overlap(style: str) -> None:
    made = material(style, "bbox", seed=4, categories=2)
    right, predictions, truths = np.zeros(10), np.zeros(10), 0
    ranked = []
    for image in made.images:
        for category in made.categories:
            there = [t for t in made.truths[image.id] if t.category_id == category.id]
            said = [
                each
                for each in made.results
                if (each["image_id"], each["category_id"]) == (image.id, category.id)
            ][:90]
            crowd = [truth.is_crowd for truth in there]
            found = np.array([each["bbox"] for each in said], float).reshape(-1, 4)
            overlap = rules.box_overlaps(found, boxes_of(there), crowd)
            counted = rules.count(overlap, crowd, 0)
            right += counted.right
            predictions += counted.predictions - counted.ignored
            truths += counted.truths
            single = overlap[:, ~np.array(crowd, bool)] if crowd else overlap
            rank = {pair.found: at for at, pair in enumerate(rules.greedy_pairs(single))}
            ranked += [
                {**each, "score": 1 - 0.001 * rank.get(at, 900)} for at, each in enumerate(said)
            ]
    judged_ = judged(made._replace(results=ranked), "bbox")
    matches = [each for by_area in judged_.matches for each in by_area[0]]
    hits = sum((m.is_matched & ~m.is_ignored).sum(1) for m in matches)
    said_ = sum((~m.is_ignored).sum(1) for m in matches)
    assert truths == sum(m.truths for m in matches) > 0
    assert right.sum() > 0
    theirs = 2 * hits / (said_ + truths)
    np.testing.assert_allclose(rules.f1(right, predictions, np.array(truths)), theirs, atol=1e-12)


def test_what_lies_in_a_crowd_is_neither_right_nor_wrong() -> None:
    # The first is right, though it lies in the crowd too.
    counted = rules.count(np.array([[0.9, 0.9], [0.0, 1.0], [0.0, 0.2]]), [False, True], 0)
    assert counted.truths == 1
    assert counted.right[0] == counted.ignored[0] == 1
    assert counted.predictions == 3


def test_boxes_are_edges_and_not_pixels() -> None:
    first, second = np.array([[0.0, 0.0, 2.0, 2.0]]), np.array([[1.0, 0.0, 2.0, 2.0]])
    assert rules.box_overlaps(first, second, [False])[0, 0] == pytest.approx(2 / 6)
    assert rules.box_overlaps(first, second, [True])[0, 0] == pytest.approx(2 / 4)


def test_keypoint_similarity_is_the_tools_own() -> None:
    from pycocotools.cocoeval import COCOeval

    made = material("random", "keypoints", seed=5, images=40)
    compared = unlabelled = 0
    for image in made.images:
        truths = made.truths[image.id]
        said = [each for each in made.results if each["image_id"] == image.id]
        if not truths or not said:
            continue
        evaluator: Any = COCOeval(iouType="keypoints")
        evaluator.params.kpt_oks_sigmas = np.array(SIGMAS)
        evaluator._gts[0, 0] = [
            {"keypoints": t.keypoints, "bbox": t.bbox, "area": t.area} for t in truths
        ]
        evaluator._dts[0, 0] = [{**each, "score": 1.0} for each in said][:20]
        expected = evaluator.computeOks(0, 0)
        found = np.array([each["keypoints"] for each in said[:20]]).reshape(-1, 3, 3)[..., :2]
        points = np.array([t.keypoints for t in truths]).reshape(-1, 3, 3)
        areas = np.array([t.area for t in truths])
        ours = rules.keypoint_similarity(found, points, boxes_of(truths), areas, SIGMAS)
        np.testing.assert_allclose(ours, expected, atol=1e-12)
        compared += expected.size
        unlabelled += int((points[..., 2] == 0).all(1).sum())
    assert compared > 100
    assert unlabelled > 0


def test_a_point_that_was_not_found_is_similar_to_nothing() -> None:
    truth = np.array([[[5.0, 5.0, 2], [9.0, 9.0, 2]]])
    found = np.array([[[5.0, 5.0], [np.nan, np.nan]]])
    box, area = np.array([[5.0, 5.0, 4.0, 4.0]]), np.array([16.0])
    assert rules.keypoint_similarity(found, truth, box, area, (0.05, 0.05))[0, 0] == 0.5


def test_tolerances_of_a_person_are_the_tools() -> None:
    from pycocotools.cocoeval import Params

    np.testing.assert_allclose(PERSON_SIGMAS, Params("keypoints").kpt_oks_sigmas, rtol=1e-12)


def test_a_point_lies_in_the_pixel_right_of_and_below_an_edge() -> None:
    mask = np.zeros((4, 6), bool)
    mask[1, 2] = mask[3, 5] = True
    points = np.array(
        [[2.0, 1.0], [2.99, 1.99], [3.0, 1.0], [1.99, 1.0], [6.0, 4.0], [6.1, 4.0], [-0.1, 0.0]]
    )
    assert rules.point_hits(points, [mask])[:, 0].tolist() == [1, 1, 0, 0, 1, 0, 0]


def test_repetitions_are_counted_once_each() -> None:
    overlap = np.array([[1.0, 0.95, 0.95], [0.95, 1.0, 0.95], [0.95, 0.95, 1.0]])
    assert rules.repeated(overlap) == 2
    assert rules.repeated(np.eye(3)) == 0


@pytest.mark.parametrize(
    ("bins", "side", "expected"),
    [(32, 0.1, 0.739), (64, 0.2, 0.924), (128, 0.1, 0.925), (256, 0.4, 0.990)],
)
def test_the_ceiling_of_a_grid_is_the_known_one(bins: int, side: float, expected: float) -> None:
    draw = np.random.default_rng(0)
    low = draw.uniform(0, 1 - side, (4000, 2))
    boxes = np.concatenate([low, np.full_like(low, side)], axis=1) * 1000
    image = ImageRecord(0, "a", 1000, 1000)
    said = rules.nearest_on_grid(boxes, bins, image)
    low, high = np.maximum(said[:, :2], boxes[:, :2]), said[:, :2] + said[:, 2:]
    both = (np.minimum(high, boxes[:, :2] + boxes[:, 2:]) - low).clip(0).prod(1)
    union = said[:, 2:].prod(1) + boxes[:, 2:].prod(1) - both
    assert (both / union).mean() == pytest.approx(expected, abs=0.006)


def slow_published(precision: Any, recall: Any) -> float:
    """Average the last positive precision and the recall of categories, without zeros."""
    last = [[v for v in each if v > 0][-1] for each in precision if any(v > 0 for v in each)]
    kept = [value for value in recall if value > 0]
    if not last or not kept:
        return 0.0
    p, r = sum(last) / len(last), sum(kept) / len(kept)
    return 2 * p * r / (p + r)


@pytest.mark.parametrize("style", STYLES)
def test_the_published_f1_is_that_of_a_loop_over_the_tools_curves(style: str) -> None:
    made = material(style, "bbox", seed=6, categories=6)
    made = made._replace(results=[{**each, "score": 0.2} for each in made.results])
    found = judged(made, "bbox")
    once = np.ones((3, len(made.images)))
    once[1] = 0  # nothing is drawn
    held = [c for by_area in found.matches if (c := rules.curves(by_area[0], once, 100))]
    ours = rules.published_f1(held, 3)
    for t in range(10):
        expected = slow_published(found.precision[t, :, :, 0, -1].T, found.recall[t, :, 0, -1])
        assert ours[0, t] == ours[2, t] == pytest.approx(expected, abs=1e-12)
    assert (ours[1] == 0).all()


def test_a_category_that_a_resample_lacks_is_left_out_of_the_published_f1() -> None:
    half = np.full((1, 10), 0.5)
    curves = [rules.Curve(np.array([True]), half, half, half)]
    curves.append(rules.Curve(np.array([False]), 2 * half, 2 * half, 2 * half))
    np.testing.assert_allclose(rules.published_f1(curves, 1), 0.5)
