"""Methods on detectors: what they ask for, what they answer, and what they refuse."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from hardware.profile import Profile
from methods.base import Method
from methods.grounding.coordinate_digits import CoordinateDigits
from methods.grounding.detect import Detect
from methods.grounding.rex_omni import RexOmni
from methods.grounding.set_prediction import SetPrediction
from models.base import Decoding, Detections, Unsupported
from models.embedded.scenes import raster
from models.embedded.scenes.generator import SHAPES, generate
from models.embedded.tiny_detector import data
from models.embedded.tiny_detector.evaluate import intersection_over_union
from models.loading import load
from runner.conformance_base import PROFILE
from runner.conformance_vision import picture, tiny_detector

CPU: Profile = PROFILE
DECODING = Decoding(max_new_tokens=200)
IMAGE = picture("noise", 24, 48)
SCENE = generate("shapes", 96, "test", 2)


@cache
def random_detector() -> Any:
    return tiny_detector()


@cache
def trained() -> Any:
    return load("tiny-detector", capability="Detector")


def found_by(method: Method[Any], model: Any, *request: Any) -> Detections:
    with method.apply(model, CPU) as changed:
        found: Detections = changed.detect(*request)
    return found


@cache
def found_in_scene(method: Method[Any]) -> Detections:
    return found_by(method, trained(), raster.render(SCENE).image, list(SHAPES), "box", DECODING)


def test_all_phrases_are_in_one_request_where_the_baseline_asks_one_by_one():
    alone, together = found_in_scene(Detect()), found_in_scene(RexOmni())
    assert alone.trace.notes["requests"] == len(SHAPES)
    assert together.trace.notes["requests"] == 1
    assert together.trace.flops < alone.trace.flops / 3
    assert [len(each) for each in together.found] == [len(each) for each in alone.found]


def test_four_tokens_say_where_a_box_is():
    notes = found_in_scene(RexOmni()).trace.notes
    assert notes["coordinate_tokens"] == 4 * int(notes["instances"]) > 0


def test_a_box_in_digits_takes_some_four_times_the_tokens_of_a_box_in_coordinate_tokens():
    tokens, digits = found_in_scene(RexOmni()), found_in_scene(CoordinateDigits())
    assert [len(each) for each in digits.found] == [len(each) for each in tokens.found]
    overlaps: list[float] = []
    for written, read in zip(tokens.found, digits.found, strict=True):
        if written:
            one, other = (np.array([each.coordinates for each in some]) for some in (written, read))
            overlaps += intersection_over_union(one, other).max(1).tolist()
    # Trained for much less than the model that it changes: every other box is about right.
    assert np.mean(np.array(overlaps) > 0.5) >= 0.5
    instances = int(digits.trace.notes["instances"])
    assert 3.5 < int(digits.trace.notes["coordinate_tokens"]) / (4 * instances) < 4.5
    assert len(digits.token_ids) > 1.5 * len(tokens.token_ids)


def test_digits_change_the_detector_only_while_they_are_applied():
    before = found_by(RexOmni(), trained(), IMAGE, ("star",), "box", DECODING)
    assert found_by(CoordinateDigits(), trained(), IMAGE, ("star",), "box", DECODING)
    after = found_by(RexOmni(), trained(), IMAGE, ("star",), "box", DECODING)
    assert after.token_ids == before.token_ids
    with (
        pytest.raises(Unsupported, match="trained weights belong to tiny-detector"),
        CoordinateDigits().apply(random_detector(), CPU),
    ):
        pass
    request = (IMAGE, ("star",), "box", Decoding(max_new_tokens=40))
    free = found_by(CoordinateDigits(weights="none"), random_detector(), *request)
    assert free.token_ids == found_by(RexOmni(), random_detector(), *request).token_ids


def test_scores_as_published_are_none():
    found = found_in_scene(RexOmni(scores="none"))
    assert {each.score for phrase in found.found for each in phrase} == {None}
    assert found.token_ids == found_in_scene(RexOmni()).token_ids


def test_constrained_answers_are_well_formed_even_from_random_weights():
    request = (IMAGE, ("star", "red circle"), "box", Decoding(max_new_tokens=80))
    free = found_by(RexOmni(), random_detector(), *request)
    held = found_by(RexOmni(constrained=True), random_detector(), *request)
    assert free.format_errors
    assert held.format_errors == ()


def test_the_regression_head_finds_the_same_boxes_without_a_token():
    written, set_found = found_in_scene(RexOmni()), found_in_scene(SetPrediction())
    assert set_found.token_ids == ()
    assert set_found.trace.flops < written.trace.flops / 2
    for shape, instances in zip(SHAPES, set_found.found, strict=True):
        truth = [data.geometry(item, "box") for item in SCENE.objects if item.shape == shape]
        assert len(instances) == len(truth)
        if truth:
            boxes = np.array([each.coordinates for each in instances])
            assert (intersection_over_union(boxes, np.array(truth)).max(0) > 0.5).all()


def test_a_box_keeps_its_place_when_the_image_is_larger():
    image = raster.render(SCENE).image
    large = image.repeat(2, 0).repeat(3, 1)
    small = found_by(SetPrediction(), trained(), image, ["star", "object"], "point", DECODING)
    found = found_by(SetPrediction(), trained(), large, ["star", "object"], "point", DECODING)
    assert found.found[1]
    for one, other in zip(small.found[1], found.found[1], strict=True):
        x, y = one.coordinates
        assert other.coordinates == pytest.approx((3 * x, 2 * y), abs=2.0)


def test_the_regression_head_refuses_what_it_was_not_made_for():
    image = raster.render(SCENE).image
    with pytest.raises(Unsupported, match="'dog' of 'dog' is no word of the head"):
        found_by(SetPrediction(), trained(), image, ["dog"], "box", DECODING)
    with pytest.raises(Unsupported, match="boxes and points, not 'polygon'"):
        found_by(SetPrediction(), trained(), image, ["star"], "polygon", DECODING)
    with (
        pytest.raises(Unsupported, match="belongs to tiny-detector's tower"),
        SetPrediction().apply(random_detector(), CPU),
    ):
        pass


def test_methods_of_writing_detectors_refuse_others():
    class Other:
        name = "other"
        facts = trained().facts

        def detect(self, *given: Any, **options: Any) -> None: ...

        def synchronize(self) -> None: ...

    for method in (RexOmni(), SetPrediction(), CoordinateDigits()):
        with (
            pytest.raises(Unsupported, match=r"needs a vision-language model.*'other' is a Other"),
            method.apply(Other(), CPU),  # type: ignore[arg-type]  # what is tested
        ):
            pass
    with pytest.raises(Unsupported, match="'detect' needs a detector; 'int' is a int"):
        Detect().apply(3, CPU).__enter__()  # type: ignore[arg-type]  # what is tested


def test_settings_are_checked():
    with pytest.raises(ValueError, match="phrases_per_request must be a whole number of at least"):
        RexOmni(phrases_per_request=-1)
    with pytest.raises(ValueError, match="scores must be one of none, log-probability"):
        RexOmni(scores="yes")  # type: ignore[arg-type]  # what is tested
    for penalty in (0.9, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="repetition_penalty must be at least 1"):
            RexOmni(repetition_penalty=penalty)
    with pytest.raises(ValueError, match="head must be one of trained, untrained"):
        SetPrediction(head="big")  # type: ignore[arg-type]  # what is tested
    with pytest.raises(ValueError, match=r"threshold must lie in \[0, 1\)"):
        SetPrediction(threshold=1.0)
