"""tiny-detector: its grammar, its requests, its scores, and its weights in transformers."""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.embedded.scenes import raster
from models.embedded.scenes.generator import SHAPES, Draws, generate
from models.embedded.scenes.questions import resolve
from models.embedded.tiny_detector import data, text, train
from models.embedded.tiny_detector.evaluate import (
    Reply,
    Request,
    ask,
    average_precision,
    boxes_of,
    intersection_over_union,
    matched,
    requests,
    score,
    score_points,
)
from models.embedded.tiny_detector.text import (
    ADDED,
    COMMA,
    FIRST_COORDINATE,
    NONE,
    VOCABULARY_SIZE,
    Found,
    encode_answer,
    encode_prompt,
    parse,
    position,
    prompt,
    quantise,
)
from models.embedded.tiny_detector.train import order_coordinates, take_over, write_files
from models.embedded.tiny_vlm.network import TinyVlm, llava_config
from models.embedded.tiny_vlm.text import EOS
from models.embedded.training import save_half
from tests.models.stopped import Stopped, check_same, stopping

FOLDER = Path(text.__file__).parent

PHRASES = st.sampled_from(["star", "red circle", "large blue square", "small object"])
BINS = st.integers(0, 999)


@given(
    st.lists(
        st.tuples(PHRASES, st.lists(st.tuples(BINS, BINS, BINS, BINS), max_size=4)),
        min_size=1,
        max_size=4,
    )
)
def test_an_answer_survives_writing_and_reading(content):
    found = [Found(phrase, sorted(boxes)) for phrase, boxes in content]
    ids = encode_answer(found)
    parsed = parse(ids, "box")
    assert parsed.found == found
    assert parsed.malformed == 0
    assert parsed.complete
    for (_, instances), spans in zip(parsed.found, parsed.spans, strict=True):
        for bins, (first, last) in zip(instances, spans, strict=True):
            assert [value - FIRST_COORDINATE for value in ids[first:last]] == list(bins)
    # Four tokens a box and a comma between, three markers and a closing one for each phrase.
    boxes = sum(len(instances) for _, instances in found)
    nothing = sum(not instances for _, instances in found)
    words = sum(len(phrase.split()) for phrase, _ in found)
    with_boxes = len(found) - nothing
    assert len(ids) == words + 4 * len(found) + 5 * boxes - with_boxes + nothing + len(found)


def test_an_answer_cut_short_keeps_its_whole_boxes():
    ids = encode_answer([Found("star", [(1, 2, 3, 4), (5, 6, 7, 8)])])
    parsed = parse(ids[:-4], "box")
    assert parsed.found == [Found("star", [(1, 2, 3, 4)])]
    assert not parsed.complete
    assert parsed.malformed == 1


def test_garbage_is_counted_and_skipped():
    ids = list(encode_answer([Found("star", [(1, 2, 3, 4), (5, 6, 7, 8)]), Found("cross", [])]))
    short = ids.copy()
    del short[4]
    parsed = parse(short, "box")
    assert parsed.found == [Found("star", [(5, 6, 7, 8)]), Found("cross", [])]
    assert parsed.malformed == 1
    assert parse([COMMA, NONE, EOS], "box") == ([], [], 1, True)
    assert parse([], "box").found == []


@settings(max_examples=60)
@given(st.floats(0, 96), st.floats(0, 96))
def test_quantising_is_monotone_and_loses_less_than_a_bin(first: float, second: float):
    low, high = sorted((first, second))
    assert quantise(low, 96) <= quantise(high, 96)
    lost = first - position(quantise(first, 96), 96)
    assert -1e-9 <= lost <= 96 / 999 + 1e-9


def test_the_ends_of_the_image_have_bins():
    assert quantise(0, 96) == 0
    assert quantise(96, 96) == 999
    assert quantise(-3, 96) == 0
    assert position(999, 96) == 96


def test_boxes_are_those_of_the_drawn_masks():
    for index in range(60):
        scene = generate("shapes", 96, "train", index)
        drawn = raster.render(scene)
        for place, item in enumerate(scene.objects):
            box = raster.box(raster.mask(drawn, place))
            assert data.geometry(item, "box") == box
            x, y = data.geometry(item, "point")
            assert (2 * x, 2 * y) == (box[0] + box[2], box[1] + box[3])


def test_an_outline_follows_the_border_of_its_shape():
    for index in range(30):
        scene = generate("shapes", 96, "train", index)
        drawn = raster.render(scene)
        for place, item in enumerate(scene.objects):
            inside = np.pad(raster.mask(drawn, place), 3)
            corners = np.array(data.geometry(item, "outline")).reshape(8, 2)
            for turn, (x, y) in enumerate(corners):
                step = np.array([np.sin(turn * np.pi / 4), -np.cos(turn * np.pi / 4)])
                # From just inside the corner to just outside of it the mask ends.
                inner, outer = (x, y) - 0.5 * step, (x, y) + 0.5 * step
                assert inside[int(inner[1]) + 3, int(inner[0]) + 3]
                assert not inside[int(np.floor(outer[1])) + 3, int(np.floor(outer[0])) + 3]


def test_requests_are_answered_by_what_their_phrases_name():
    absent = asked = 0
    for index in range(80):
        scene = generate("shapes", 96, "train", index)
        phrases, found = data.request(scene, "box", Draws(f"{index}"))
        assert [item.phrase for item in found] == phrases
        assert len(set(phrases)) == len(phrases)
        for phrase, instances in found:
            places = resolve(scene, phrase)
            expected = [data.bins(scene.objects[place], "box") for place in places]
            assert sorted(instances) == sorted(expected)
            absent, asked = absent + (not places), asked + 1
    assert 0.2 < absent / asked < 0.6


def test_training_rows_hold_whole_requests_and_mark_their_answers():
    _, items = data.make(("train", 0, 40))
    begin = 0
    for kind in data.SLOT_KINDS:
        length = data.SLOT_TOKENS[kind]
        for row in range(40):
            tokens = items.tokens[row, begin : begin + length].tolist()
            marked = items.answer[row, begin : begin + length]
            ids = [token for token, mark in zip(tokens, marked, strict=True) if mark]
            parsed = parse(ids, kind)
            assert parsed.complete
            assert parsed.malformed == 0
            asked = prompt(kind, [found.phrase for found in parsed.found])
            assert tuple(tokens[: len(tokens) - int(marked[::-1].argmax()) - len(ids)]) == (
                encode_prompt(asked)
            )
        begin += length
    assert begin == data.WORDS


def test_the_tokenizer_reads_prompts_and_answers(tmp_path):
    from tokenizers import Tokenizer

    write_files(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == VOCABULARY_SIZE
    assert tokenizer.token_to_id("<999>") == FIRST_COORDINATE + 999
    assert [tokenizer.token_to_id(word) for word in ADDED[:2]] == [text.NAME_START, text.NAME_END]
    for kind in text.COORDINATES:
        asked = prompt(kind, ["red star", "circle"])
        assert tokenizer.encode(asked, add_special_tokens=False).ids == list(encode_prompt(asked))
    written = (
        "<|object_ref_start|>red star<|object_ref_end|><|box_start|><12><40><200><280>,"
        "<300><1><400><90><|box_end|>, <|object_ref_start|>circle<|object_ref_end|>"
        "<|box_start|>None<|box_end|>"
    )
    found = [Found("red star", [(12, 40, 200, 280), (300, 1, 400, 90)]), Found("circle", [])]
    ids = tokenizer.encode(written, add_special_tokens=False).ids
    assert [*ids, EOS] == list(encode_answer(found))


def replies_of(asked: list[Request]) -> list[Reply]:
    ids = [list(encode_answer(request.answer)) for request in asked]
    return [Reply(each, [-0.1] * len(each)) for each in ids]


def test_right_answers_score_one_and_empty_ones_nothing():
    asked = requests("test", 30, "box", all_shapes=True)
    perfect = score(asked, replies_of(asked))
    assert perfect["f1_50"] == perfect["f1_95"] == perfect["absent"] == 1.0
    assert perfect["ap50"] == pytest.approx(1.0)
    assert perfect["duplicates"] == perfect["malformed"] == 0.0
    nothing = [Reply([EOS], [0.0]) for _ in asked]
    silent = score(asked, nothing)
    assert silent["f1_50"] == silent["ap50"] == 0.0
    assert silent["malformed"] == 1.0
    points = requests("test", 20, "point", all_shapes=False)
    assert score_points(points, replies_of(points))["f1"] == 1.0


def test_a_box_told_twice_costs_precision_and_is_a_duplicate():
    scene = generate("shapes", 96, "test", 0)
    answer = data.answers(scene, "box", list(SHAPES))
    doubled = [Found(phrase, instances * 2) for phrase, instances in answer]
    request = Request(scene, "box", list(SHAPES), answer)
    ids = list(encode_answer(doubled))
    told = score([request], [Reply(ids, [-0.1] * len(ids))])
    assert told["f1_50"] == pytest.approx(2 / 3)
    assert told["duplicates"] == 0.5


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_greedy_matching_never_exceeds_the_best_one_to_one_matching(seed: int):
    draws = np.random.default_rng(seed)
    corners = draws.uniform(0, 60, (2, 4, 2))
    boxes = np.concatenate([corners, corners + draws.uniform(10, 40, (2, 4, 2))], -1)
    overlap = intersection_over_union(boxes[0], boxes[1])
    best = max(
        sum(overlap[i, j] >= 0.3 for i, j in enumerate(order))
        for order in itertools.permutations(range(4))
    )
    count = matched(overlap, 0.3)
    assert count <= best
    # Greedy finds at least half of what is possible, and all where no two boxes compete.
    assert 2 * count >= best
    grid = np.zeros((100, 100), bool), np.zeros((100, 100), bool)
    whole = boxes.round()
    for mask, box in zip(grid, (whole[0, 0], whole[1, 0]), strict=True):
        mask[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] = True
    drawn = (grid[0] & grid[1]).sum() / (grid[0] | grid[1]).sum()
    assert intersection_over_union(whole[:1, 0], whole[1:, 0])[0, 0] == pytest.approx(drawn)


def test_average_precision_is_the_area_under_the_stepped_curve():
    assert average_precision([(0.9, True), (0.8, True)], 2) == 1.0
    assert average_precision([(0.9, True)], 2) == pytest.approx(51 / 101)
    # Right, wrong, right of two: precision 1 up to a recall of one half, then 2/3.
    told = average_precision([(0.9, True), (0.8, False), (0.7, True)], 2)
    assert told == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert average_precision([], 3) == 0.0
    assert np.isnan(average_precision([], 0))


def test_greedy_answers_are_those_of_transformers(tmp_path):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    torch.manual_seed(0)
    model = TinyVlm(VOCABULARY_SIZE)
    order_coordinates(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.half().float())
        # Sharper logits, so that rounding does not decide between equal tokens.
        model.lm_head.weight *= 16
    save_half(model.state_dict(), tmp_path / "model.safetensors")
    write_files(tmp_path)
    asked = requests("test", 2, "box", all_shapes=False)
    ours = ask(model.eval(), asked, torch.device("cpu"), limit=6)
    llava = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    processor = AutoProcessor.from_pretrained(tmp_path)
    from PIL import Image

    for request, reply in zip(asked, ours, strict=True):
        inputs = processor(
            images=Image.fromarray(raster.render(request.scene).image),
            text=f"USER: <image>\n{prompt(request.kind, request.phrases)}",
            return_tensors="pt",
        )
        with torch.no_grad():
            told = llava.generate(**inputs, max_new_tokens=6, do_sample=False)
        theirs = told[0, inputs["input_ids"].shape[1] :].tolist()
        assert theirs[: len(reply.ids)] == reply.ids


def test_words_begin_with_the_weights_of_tiny_vlm(tmp_path):
    torch.manual_seed(0)
    small, large = TinyVlm(), TinyVlm(VOCABULARY_SIZE)
    save_half(small.state_dict(), tmp_path / "model.safetensors")
    before = large.lm_head.weight[400:].clone()
    assert take_over(large, tmp_path) == tmp_path.name
    rows = len(small.lm_head.weight)
    assert torch.allclose(large.lm_head.weight[:rows], small.lm_head.weight, atol=1e-3)
    assert torch.equal(large.lm_head.weight[400:], before)
    assert take_over(large, tmp_path / "nowhere") is None


def test_swapped_corners_do_not_make_boxes():
    assert (boxes_of([(500, 500, 100, 100)])[0, 2:] < boxes_of([(500, 500, 1, 1)])[0, :2]).all()
    overlap = intersection_over_union(boxes_of([(500, 500, 100, 100)]), boxes_of([(1, 1, 9, 9)]))
    assert overlap[0, 0] == 0.0


def test_the_committed_folder_is_complete():
    if not (FOLDER / "model.safetensors").exists():
        pytest.skip("the weights are not trained yet")
    assert (FOLDER / "model.safetensors").stat().st_size <= 15_000_000
    assert json.loads((FOLDER / "config.json").read_text()) == llava_config(VOCABULARY_SIZE)
    assert json.loads((FOLDER / "quality.json").read_text())["final"]
    for name in ("curve.csv", "README.md", "sample.png", "tokenizer.json"):
        assert (FOLDER / name).stat().st_size > 0


@pytest.mark.slow  # as that of tiny-vlm
def test_a_stopped_training_goes_on_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "PRINT_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(train, "SMOKE_BATCH", 1)
    monkeypatch.setattr(train, "finish", lambda *given: None)
    monkeypatch.setattr(data, "make", cache(data.make))

    def run(name: str, *stop: Any) -> None:
        nowhere = tmp_path / "no weights"
        recipe = train.Recipe(tmp_path / name, nowhere, torch.device("cpu"), 5, 0.0001, None, 0)

        def stage_now() -> str:
            return "requests" if "vision" in recipe.stages_done else "vision"

        with stopping(stage_now, *stop):
            recipe.run()

    run("whole")
    for stop in (("vision", 3), ("requests", 2)):
        with pytest.raises(Stopped):
            run("parted", *stop)
        assert (tmp_path / "parted/checkpoint.safetensors").is_file()
    run("parted")
    folders = [tmp_path / "whole", tmp_path / "parted"]
    assert check_same(*folders) == 4 + 4
    for folder in folders:
        stages = json.loads((folder / "quality.json").read_text())["stages"]
        assert [(each["stage"], each["steps"]) for each in stages] == [
            ("vision", 4),
            ("requests", 4),
        ]
