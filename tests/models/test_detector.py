"""Detectors over vision-language models: requests, answers, scores, and the trained one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from models.base import Decoding, Detector, Unsupported, VisualAnswer
from models.detector import (
    CoordinateDetector,
    DetectionPlan,
    Dialect,
    _Request,
    phrase_text,
    read_dialect,
)
from models.embedded.scenes import raster
from models.embedded.scenes.generator import SHAPES
from models.embedded.tiny_detector import evaluate, text, train
from models.embedded.tiny_detector.evaluate import requests
from models.loading import ModelError, load
from models.vision_language_towers import Watch
from runner.conformance_vision import Architecture, picture, tiny_detector

KINDS: tuple[Architecture, ...] = ("llava", "qwen2.5-vl")
LONG = Decoding(max_new_tokens=10, ignore_eos=True)
WIDE = picture("a scene", 24, 48)
model_of = functools.cache(tiny_detector)


@functools.cache
def trained() -> CoordinateDetector:
    found = load("tiny-detector", capability="Detector")
    assert isinstance(found, CoordinateDetector)
    return found


def ids_of(model: CoordinateDetector, answer: str) -> tuple[int, ...]:
    """Return the ids of an answer with the token that ends it."""
    return (*model.grammar.encode(answer), min(model.grammar.ends))


def block(name: str, content: str) -> str:
    return f"<|object_ref_start|>{name}<|object_ref_end|><|box_start|>{content}<|box_end|>"


@pytest.fixture
def answering(monkeypatch):
    """Let a model say prepared answers, and note what it was asked."""

    def plant(model: CoordinateDetector, *answers: str) -> list[str]:
        real = model._ask
        asked: list[str] = []

        def ask(image: Any, question: str, *rest: Any) -> tuple[VisualAnswer, list[float]]:
            answer, _ = real(image, question, *rest)
            asked.append(question)
            told = ids_of(model, answers[len(asked) - 1])
            return replace(answer, token_ids=told), [-0.5] * len(told)

        monkeypatch.setattr(model, "_ask", ask)
        return asked

    return plant


def inputs_of(model: CoordinateDetector, question: str, image: np.ndarray) -> dict[str, Any]:
    """Return what transformers' own forward wants for a request."""
    pixels = model.reader.tower.prepare(image, 1)
    count = len(model.reader.tower.encode(pixels, Watch()).layout)
    ids = torch.tensor([model.reader.prompt_ids(question, count)])
    found = {"input_ids": ids, "pixel_values": pixels.values, "attention_mask": ids * 0 + 1}
    if "Qwen" in type(model.module).__name__:
        found["image_grid_thw"] = pixels.grid_thw
        found["mm_token_type_ids"] = (ids == model.module.config.image_token_id).int()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_vision_language_model_with_coordinate_tokens_is_a_detector(kind):
    model = model_of(kind)
    assert isinstance(model, Detector)
    assert model.facts.outputs == ("box", "point", "polygon", "keypoint")
    assert model.facts.bins == 32
    plan = DetectionPlan(phrases_per_request=None, constrained=True)
    for output, count in (("box", 4), ("point", 2)):
        found = model.run(WIDE, ["a", "b"], output, Decoding(max_new_tokens=60), plan)
        assert found.format_errors == ()
        assert found.finish == "eos"
        for instance in (each for phrase in found.found for each in phrase):
            assert len(instance.coordinates) == count == instance.tokens
            assert all(0 <= value <= 48 for value in instance.coordinates[::2])
            assert all(0 <= value <= 24 for value in instance.coordinates[1::2])
            assert instance.score is not None
            assert 0 < instance.score <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_transformers_own_forward(kind):
    model = model_of(kind)
    plan = DetectionPlan(phrases_per_request=None, constrained=True)
    found = model.run(WIDE, ["a"], "box", Decoding(max_new_tokens=40), plan)
    inputs = inputs_of(model, model.prompts["box"].format(phrases="a"), WIDE)
    told = torch.tensor([found.token_ids])
    begin = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], told], 1)
    inputs["attention_mask"] = inputs["input_ids"] * 0 + 1
    if "mm_token_type_ids" in inputs:
        kinds = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.cat([kinds, told.int() * 0], 1)
    with torch.no_grad():
        logits = model.module(**inputs).logits[0, begin - 1 : -1].float()
    sure = logits.log_softmax(-1).gather(1, told[0, :, None])[:, 0]
    is_coordinate = torch.tensor([token in model.grammar.coordinates for token in found.token_ids])
    runs = sure[is_coordinate].view(-1, 4)
    expected = runs.mean(1).exp().tolist()
    assert expected
    assert [each.score for each in found.found[0]] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_repetition_penalty_is_that_of_transformers(kind):
    model = model_of(kind)
    inputs = inputs_of(model, model.prompts["box"].format(phrases="a"), WIDE)
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    told = model.module.generate(**inputs, **options, repetition_penalty=1.4)
    theirs = told[0, inputs["input_ids"].shape[1] :].tolist()
    ours = model.run(WIDE, ["a"], "box", LONG, DetectionPlan(repetition_penalty=1.4))
    plain = model.run(WIDE, ["a"], "box", LONG, DetectionPlan())
    # transformers cannot end early here, the harness only goes on.
    if 0 not in ours.token_ids:
        assert list(ours.token_ids) == theirs
    assert ours.token_ids != plain.token_ids


def test_phrases_are_asked_in_requests_of_the_size_that_is_wanted(answering):
    model = tiny_detector()
    asked = answering(
        model,
        ", ".join([block("cat", "<0><0><31><31>"), block("dog", "None")]),
        block("cow", "<31><31><0><0>,<8><0><16><31>"),
    )
    plan = DetectionPlan(phrases_per_request=2)
    found = model.run(WIDE, ["cat", "dog", "cow"], "box", LONG, plan)
    assert [text.split(".")[0] for text in asked] == ["Detect cat, dog", "Detect cow"]
    assert found.format_errors == ()
    boxes = [[each.coordinates for each in phrase] for phrase in found.found]
    # Corners that were swapped are put in order; positions are those of the image as given.
    assert boxes[:2] == [[(0, 0, 48, 24)], []]
    assert boxes[2][0] == (0, 0, 48, 24)
    assert boxes[2][1] == pytest.approx((8 / 31 * 48, 0, 16 / 31 * 48, 24))
    assert found.trace.notes["requests"] == 2
    assert len(found.trace.prefill) == 2


def test_the_dialect_says_how_many_phrases_a_request_has(answering):
    model = CoordinateDetector(
        tiny_detector().reader,
        Dialect(prompts={"point": "Where is {phrases}?"}, most_phrases={"point": 2}),
    )
    assert model.facts.outputs == ("point",)
    asked = answering(model, block("a", "<1><2>"), block("c", "None"))
    plan = DetectionPlan(phrases_per_request=None)
    found = model.run(WIDE, ["a", "b", "c"], "point", LONG, plan)
    assert asked == ["Where is a, b?", "Where is c?"]
    assert found.format_errors == ("'b' was not answered",)
    with pytest.raises(Unsupported, match="finds point, not 'box'"):
        model.detect(WIDE, ["a"], "box", LONG)


def test_answers_about_other_things_are_format_errors(answering):
    model = tiny_detector()
    answering(model, ", ".join([block("Cat", "<1><2><3><4>"), block("bird", "<1><2><3><4>")]))
    plan = DetectionPlan(phrases_per_request=None)
    found = model.run(WIDE, ["cat", "dog"], "box", LONG, plan)
    assert [len(each) for each in found.found] == [1, 0]
    assert found.format_errors == ("'bird' was not asked for", "'dog' was not answered")


def test_names_of_categories_are_asked_as_they_were_trained(answering):
    assert phrase_text("dog_house") == "dog house"
    assert phrase_text("Mug/cup") == "mug"
    assert phrase_text("cup, red") == "cup red"
    model = tiny_detector()
    answering(model, block("dog house", "<1><2><3><4>"))
    assert len(model.detect(WIDE, ["dog_house"], "box", LONG).found[0]) == 1
    for phrases in ([], ["mug/cup", "mug"], ["cat", ","]):
        with pytest.raises(ValueError, match="different and not empty"):
            model.detect(WIDE, phrases, "box", LONG)


def test_key_points_come_in_the_order_of_their_names(answering):
    model = tiny_detector("qwen2.5-vl")
    asked = answering(
        model,
        '{"person1": {"bbox": " <0><0><31><31> ", "keypoints": {"nose": " <31><0> ", '
        '"left eye": "unvisible"}}, "bird1": {"bbox": "<1><2><3><4>", "keypoints": {}}}',
    )
    found = model.detect(WIDE, ["person"], "keypoint", LONG, keypoints=["left eye", "nose"])
    (person,) = found.found[0]
    assert person.coordinates == (0, 0, 48, 24)
    assert person.keypoints == (None, (48, 0))
    assert person.tokens == 6
    assert "coordinates of its left eye, nose as [x0, y0]" in asked[0]
    assert "'bird' was not asked for" in found.format_errors
    with pytest.raises(ValueError, match="belong to the output 'keypoint'"):
        model.detect(WIDE, ["person"], "keypoint", LONG)
    with pytest.raises(ValueError, match="belong to the output 'keypoint'"):
        model.detect(WIDE, ["person"], "box", LONG, keypoints=["nose"])


def test_text_is_read_where_it_stands(answering):
    model = tiny_detector("qwen2.5-vl")
    corners = "<0><0><31><0><31><31>"
    asked = answering(model, ", ".join([block("STOP", corners), block("é 7", corners)]))
    texts, found = model.read_text(WIDE, LONG, granularity="text line", output="polygon")
    assert texts == ("STOP", "é 7")
    assert [each.coordinates for each in found.found[0]] == [(0, 0, 48, 0, 48, 24)]
    assert asked[0].startswith("Can you detect all text line in this image in polygon format")
    with pytest.raises(Unsupported, match="box or polygon, not as 'point'"):
        model.read_text(WIDE, LONG, output="point")


def test_a_visual_prompt_shows_its_boxes_as_bins(answering):
    model = tiny_detector()
    asked = answering(model, block("object", "<1><2><3><4>,<0><0><31><31>"))
    found = model.detect_similar(WIDE, [(0, 0, 48, 24), (24, 12, 48, 24)], LONG)
    assert "<0><0><31><31>, <15><15><31><31>" in asked[0]
    assert len(found.found[0]) == 2


def test_an_answer_without_end_says_so():
    found = model_of("llava").detect(WIDE, ["a"], "box", Decoding(max_new_tokens=3))
    assert found.finish == "length"
    assert "the answer has no end" in found.format_errors


def test_scores_can_be_left_out_and_the_tokens_stay():
    model = model_of("llava")
    decoding = Decoding(max_new_tokens=40)
    silent, told = (
        model.run(WIDE, ["a"], "box", decoding, DetectionPlan(scores=sure, constrained=True))
        for sure in (False, True)
    )
    assert silent.token_ids == told.token_ids
    assert {each.score for each in silent.found[0]} <= {None}
    assert len(silent.found[0]) == len(told.found[0]) > 0


def test_models_without_coordinate_tokens_are_refused():
    with pytest.raises(Unsupported, match=r"has no token <\|object_ref_start\|>"):
        load(f"path:{train.Path(train.__file__).parents[1] / 'tiny_vlm'}", capability="Detector")


def test_a_wrong_dialect_is_refused(tmp_path):
    assert read_dialect(tmp_path) == Dialect()
    (tmp_path / "detector.json").write_text('{"prompts": {"boxes": "?"}, "most_phrases": {}}')
    with pytest.raises(ModelError, match="there is no output 'boxes'; there are box, point"):
        read_dialect(tmp_path)
    (tmp_path / "detector.json").write_text('{"prompts": {}}')
    with pytest.raises(ModelError, match="must hold prompts and most_phrases"):
        read_dialect(tmp_path)


@functools.cache
def answers_of_both() -> tuple[list[evaluate.Request], list[evaluate.Reply], Sequence[Any]]:
    """Return the same requests answered by the recipe's loop and by the harness's."""
    asked = [*requests("test", 5, "box", all_shapes=True)]
    asked += requests("test", 2, "outline", all_shapes=False)
    model = trained()
    network = train.load(train.Path(train.__file__).parent, torch.device("cpu"))
    theirs = evaluate.ask(network, asked, torch.device("cpu"))
    plan = DetectionPlan(phrases_per_request=None)
    ours = [
        model.run(
            raster.render(each.scene).image,
            each.phrases,
            "polygon" if each.kind == "outline" else "box",
            Decoding(max_new_tokens=110),
            plan,
        )
        for each in asked
    ]
    return asked, theirs, ours


def test_the_trained_detector_answers_as_in_its_recipe():
    _, theirs, ours = answers_of_both()
    assert [list(each.token_ids) for each in ours] == [reply.ids for reply in theirs]


def test_the_trained_detector_finds_what_is_drawn():
    asked, _, ours = answers_of_both()
    hits = truths = told = 0
    for request, found in zip(asked, ours, strict=True):
        if request.kind != "box":
            continue
        for (_, bins), instances in zip(request.answer, found.found, strict=True):
            boxes = np.array([each.coordinates for each in instances], float).reshape(-1, 4)
            overlap = evaluate.intersection_over_union(boxes, evaluate.boxes_of(bins))
            hits += evaluate.matched(overlap, 0.5)
            truths, told = truths + len(bins), told + len(instances)
    assert 2 * hits / (truths + told) >= 0.8


def test_the_mask_changes_nothing_where_the_answer_was_well_formed():
    asked, _, ours = answers_of_both()
    for request, found in list(zip(asked, ours, strict=True))[:2]:
        assert found.format_errors == ()
        again = trained().run(
            raster.render(request.scene).image,
            request.phrases,
            "box",
            Decoding(max_new_tokens=110),
            DetectionPlan(phrases_per_request=None, constrained=True),
        )
        assert again.token_ids == found.token_ids


def test_the_trained_detectors_words_are_those_of_its_recipe():
    model = trained()
    assert model.dialect.prompts == text.PROMPTS
    assert model.dialect.most_phrases == text.MOST_PHRASES
    assert model.facts.outputs == ("box", "point", "polygon")
    prompt = model.reader.prompt_ids(model.prompts["box"].format(phrases=", ".join(SHAPES)), 1)
    behind = prompt[prompt.index(model.module.config.image_token_id) + 1 :]
    assert tuple(behind) == text.encode_prompt(text.prompt("box", list(SHAPES)))


def test_a_box_in_digits_takes_four_times_the_tokens():
    model = trained()
    boxes = [
        bins
        for request in requests("test", 40, "box", all_shapes=True)
        for _, instances in request.answer
        for bins in instances
    ]
    tokens = [len(model.grammar.encode("".join(f"<{value}>" for value in box))) for box in boxes]
    digits = [len(model.grammar.encode(str(list(box)))) for box in boxes]
    assert set(tokens) == {4}
    # Two brackets, three commas, a token a digit.
    assert digits == [5 + sum(len(str(value)) for value in box) for box in boxes]
    assert np.mean(digits) == pytest.approx(16.7, abs=0.05)


def test_negative_logits_are_weakened_too():
    logits = torch.linspace(-3, 3, 8)[None]
    request = _Request([1, 2, 6], 1.5, None, scores=False)
    request.chose(7)
    theirs = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([[1, 2, 6, 7]]), logits.clone())
    assert torch.equal(request.heard(logits), theirs)
