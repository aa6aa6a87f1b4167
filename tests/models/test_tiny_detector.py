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
from safetensors.torch import load_file

from models.detector_format import quantise
from models.embedded.scenes import raster
from models.embedded.scenes.generator import SHAPES, Draws, generate
from models.embedded.scenes.questions import resolve
from models.embedded.scenes.raster_torch import Renderer
from models.embedded.tiny_detector import data, post_train, text, train
from models.embedded.tiny_detector.evaluate import (
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
from models.embedded.tiny_detector.grpo import (
    Named,
    advantages,
    box_reward,
    divergence_terms,
    point_reward,
    policy_terms,
)
from models.embedded.tiny_detector.post_train import answer_log_probabilities, doubled
from models.embedded.tiny_detector.rollout import Reply, nucleus, rollout
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
    prompt,
)
from models.embedded.tiny_detector.train import order_coordinates, take_over, write_files
from models.embedded.tiny_vlm.evaluate import prompt_start, visual_embeddings
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
    assert (FOLDER / "model.safetensors").stat().st_size <= 15_000_000
    assert json.loads((FOLDER / "config.json").read_text()) == llava_config(VOCABULARY_SIZE)
    assert json.loads((FOLDER / "quality.json").read_text())["final"]
    assert json.loads((FOLDER / "detector.json").read_text()) == text.DIALECT
    quality = json.loads((FOLDER / "quality.json").read_text())
    assert quality["reached"] == {"ap50": True, "f1_50": True}
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
        settings = (torch.device("cpu"), 5, 0.0001, None, 0, False)
        recipe = train.Recipe(tmp_path / name, nowhere, *settings)

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


@cache
def trained() -> TinyVlm:
    return train.load(FOLDER, torch.device("cpu"))


@cache
def seen_requests() -> tuple[list[Request], torch.Tensor]:
    """Return requests of different lengths, and the embeddings of their images."""
    asked = requests("validation", 2, "box", all_shapes=False)
    packed = torch.from_numpy(np.stack([request.scene.pack() for request in asked]))
    image = Renderer(data.SIZE, "cpu").render(packed).image
    with torch.no_grad():
        return asked, visual_embeddings(trained(), image)


def test_log_probabilities_of_a_rollout_are_those_of_the_training_forward():
    asked, visual = seen_requests()
    start = prompt_start("cpu")
    prompts = [list(encode_prompt(prompt("box", each.phrases))) for each in asked]
    assert len({len(ids) for ids in prompts}) == 2
    replies = rollout(
        trained(),
        visual,
        start,
        prompts,
        limit=30,
        copies=2,
        temperature=1.0,
        top_p=0.99,
        draws=torch.Generator().manual_seed(3),
    )
    groups = [[reply.ids for reply in replies[:2]], [reply.ids for reply in replies[2:]]]
    with torch.no_grad():
        sure, where = answer_log_probabilities(trained(), visual, start, prompts, groups)
    for number, reply in enumerate(replies):
        row, column = divmod(number, 2)
        own = sure[row, column][where[row, column]]
        assert own.tolist() == pytest.approx(reply.log_probabilities, abs=2e-3)
    assert replies[0].ids != replies[1].ids


def test_the_nucleus_is_the_smallest_set_that_reaches_its_share():
    probabilities = torch.tensor([[0.5, 0.1, 0.3, 0.1]])
    assert nucleus(probabilities, 0.75).tolist() == [[0.5, 0.0, pytest.approx(0.3), 0.0]]
    assert nucleus(probabilities, 0.5).tolist() == [[0.5, 0.0, 0.0, 0.0]]
    assert nucleus(probabilities, 1.0) is probabilities


SQUARES = np.array([[0, 0, 10, 10], [40, 40, 60, 60], [10, 70, 30, 95]], float)


def test_the_released_reward_does_not_see_a_box_told_twice():
    truth = [Named("star", SQUARES), Named("cross", np.zeros((0, 4)))]
    twice = [Named("star", np.concatenate([SQUARES, SQUARES]))]
    for matching, expected in (("max", 1.0), ("one_to_one", 2 / 3)):
        assert box_reward(truth, truth, matching) == pytest.approx(1.0)
        assert box_reward(twice, truth, matching) == pytest.approx(expected)
    assert box_reward(twice, truth, "max", duplicate_penalty=0.4) == pytest.approx(0.8)


def test_rewards_of_empty_degenerate_and_swapped_answers():
    truth = [Named("star", SQUARES)]
    nothing = [Named("star", np.zeros((0, 4)))]
    for matching in ("max", "one_to_one"):
        assert box_reward(nothing, nothing, matching) == 1.0
        assert box_reward(truth, nothing, matching) == 0.0
        assert box_reward(nothing, truth, matching) == 0.0
        flat = [Named("star", np.array([[5, 5, 5, 9]], float))]
        assert box_reward(flat, nothing, matching) == 1.0
        swapped = [Named("star", SQUARES[:, [2, 3, 0, 1]])]
        assert box_reward(swapped, truth, matching) == pytest.approx(1.0)
        assert box_reward([Named("cross", SQUARES)], truth, matching) == 0.0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_one_to_one_rewards_are_the_best_of_all_matchings(seed: int):
    draws = np.random.default_rng(seed)
    low = draws.uniform(0, 50, (2, 4, 2))
    boxes = np.concatenate([low, low + draws.uniform(5, 40, (2, 4, 2))], -1)
    told, truth = boxes[0][: draws.integers(1, 5)], boxes[1]
    overlap = intersection_over_union(told, truth)
    best = max(
        sum(overlap[i, j] for i, j in enumerate(order))
        for order in itertools.permutations(range(4), len(told))
    )
    reward = box_reward([Named("a", told)], [Named("a", truth)], "one_to_one")
    assert reward == pytest.approx(2 * best / (len(told) + 4))
    # Neither the order of the boxes nor the released reward's freedom makes it larger.
    shuffled = box_reward([Named("a", told[::-1])], [Named("a", truth[::-1])], "one_to_one")
    assert shuffled == pytest.approx(reward)
    assert box_reward([Named("a", told)], [Named("a", truth)], "max") >= reward - 1e-9


def test_a_point_counts_once_and_within_its_mask_alone():
    masks = np.zeros((2, 20, 20), bool)
    masks[0, 2:6, 2:6] = masks[1, 10:15, 10:15] = True
    regions = [("star", list(masks))]
    inside = np.array([[3.0, 5.9], [12.0, 12.0]])
    assert point_reward([Named("star", inside)], regions) == 1.0
    assert point_reward([Named("cross", inside)], regions) == 0.0
    both = np.array([[3.0, 3.0], [4.0, 4.0]])
    assert point_reward([Named("star", both)], regions) == 0.5
    outside = np.array([[6.0, 6.0], [40.0, 3.0], [12.0, 12.0]])
    assert point_reward([Named("star", outside)], regions) == pytest.approx(2 / 5)
    # Where two things overlap, a point is one of them.
    overlapping = [("star", [masks[0], masks[0]])]
    assert point_reward([Named("star", inside[:1])], overlapping) == pytest.approx(2 / 3)
    assert point_reward([], [("star", [])]) == 1.0
    assert point_reward([Named("star", inside)], [("star", [])]) == 0.0


def test_advantages_of_a_group_sum_to_nothing_and_equal_rewards_teach_nothing():
    found = advantages(torch.tensor([[0.1, 0.5, 0.9], [0.4, 0.4, 0.4]]))
    assert found.sum(-1).abs().max() < 1e-5
    assert found[0, 2] == pytest.approx(0.4 / 0.4, rel=1e-4)  # the unbiased deviation is 0.4
    assert found[1].abs().max() == 0.0


def test_at_the_first_step_the_gradient_is_that_of_reinforce():
    torch.manual_seed(0)
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([0, 3, 3, 5])
    advantage = torch.tensor([1.0, -0.5, 0.2, -0.7], dtype=torch.float64)
    sure = logits.log_softmax(-1)[tokens]
    policy_terms(sure, sure.detach(), advantage).mean().backward()
    assert logits.grad is not None
    found = logits.grad.clone()
    step = 1e-6
    for place in range(6):
        moved = []
        for sign in (step, -step):
            other = logits.detach().clone()
            other[place] += sign
            moved.append(float(-(advantage * other.log_softmax(-1)[tokens]).mean()))
        assert found[place] == pytest.approx((moved[0] - moved[1]) / (2 * step), abs=1e-6)


def test_ratios_are_clipped_where_more_would_be_earned_and_bad_tokens_cost_a_bounded_price():
    ratios = torch.tensor([0.5, 1.0, 1.25, 2.0, 10.0])
    for advantage, expected in (
        (1.0, [-0.5, -1.0, -1.25, -1.3, -1.3]),
        (-1.0, [0.8, 1.0, 1.25, 2.0, 3.0]),
    ):
        found = policy_terms(ratios.log(), torch.zeros(5), torch.full((5,), advantage))
        assert found.tolist() == pytest.approx(expected)


def test_the_divergence_is_never_negative_and_nothing_between_equals():
    values = torch.linspace(-3, 0, 7)
    assert divergence_terms(values, values).abs().max() == 0.0
    assert (divergence_terms(values, values.flip(0)) >= 0).all()
    assert divergence_terms(torch.tensor(0.0), torch.tensor(1.0)) == pytest.approx(np.e - 2)


def test_a_policy_over_how_often_a_box_is_told_learns_to_tell_it_once():
    truth = [Named("a", SQUARES[:1])]
    rewards = {
        matching: torch.tensor(
            [box_reward([Named("a", SQUARES[[0] * n])], truth, matching) for n in (1, 2, 3)]
        )
        for matching in ("max", "one_to_one")
    }
    assert rewards["max"].tolist() == [1.0, 1.0, 1.0]
    logits = torch.zeros(3, requires_grad=True)
    draws = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD([logits], lr=0.5)
    for _ in range(60):
        told = torch.multinomial(logits.detach().softmax(-1), 8, True, generator=draws)
        sure = logits.log_softmax(-1)[told]
        advantage = advantages(rewards["one_to_one"][told][None])[0]
        optimizer.zero_grad()
        policy_terms(sure, sure.detach(), advantage).mean().backward()
        optimizer.step()
    assert logits.softmax(-1)[0] > 0.95


def test_a_doubled_answer_has_one_box_more_close_to_another():
    answer = [Found("star", [(100, 100, 300, 300), (600, 600, 700, 800)]), Found("cross", [])]
    found = doubled(answer, Draws("x"))
    assert [len(boxes) for _, boxes in found] == [3, 0]
    assert found[0].instances == sorted(found[0].instances)
    overlap = intersection_over_union(boxes_of(found[0].instances), boxes_of(found[0].instances))
    assert np.triu(overlap, 1).max() > 0.85
    assert doubled(answer[1:], Draws("x")) == answer[1:]


def test_a_repeat_costs_an_answer_the_penalty_that_the_recipe_names():
    scene = generate("shapes", 96, "test", 2)
    shape = scene.objects[0].shape
    box = tuple(quantise(edge, 96) for edge in data.geometry(scene.objects[0], "box"))
    request = Request(scene, "box", [shape], [Found(shape, [box])])
    replies = [
        Reply([*encode_answer([Found(shape, [box] * count)])], [0.0] * 99) for count in (1, 2)
    ]
    once, twice = (post_train.reward_of(request, reply, "max", 0.4) for reply in replies)
    assert once == pytest.approx(1.0)
    assert twice == pytest.approx(0.8)
    assert post_train.reward_of(request, replies[1], "max") == pytest.approx(1.0)


@pytest.mark.slow
def test_a_stopped_post_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(post_train, "PRINT_EVERY_SECONDS", 0.0)

    def run(name: str, stop: int | None = None) -> None:
        settings = (torch.device("cpu"), 5, 0.0001, "noisy", "grpo", "one_to_one", 0.0)
        recipe = post_train.PostTraining(tmp_path / name, FOLDER, *settings)
        recipe.checkpoint.EVERY_SECONDS = 0.0
        if stop is not None:
            real = recipe.reinforce
            calls = itertools.count()

            def reinforce(batch: Any) -> Any:
                if next(calls) == stop:
                    raise Stopped
                return real(batch)

            monkeypatch.setattr(recipe, "reinforce", reinforce)
        recipe.run()

    run("whole")
    with pytest.raises(Stopped):
        run("parted", 1)
    run("parted")
    whole, parted = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parted")
    )
    assert all(torch.equal(whole[name], parted[name]) for name in whole)
    quality = json.loads((tmp_path / "parted/quality.json").read_text())
    assert quality.keys() >= {"before", "noisy", "grpo"}
