"""The regression head: its matching, its losses, its vocabulary, and the trained weights."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from methods.grounding.set_prediction import WEIGHTS
from models.embedded.scenes.generator import COLOUR_NAMES, SHAPES, SIZES, generate
from models.embedded.set_prediction import network, train
from models.embedded.set_prediction.network import (
    CLASS_WEIGHT,
    CORNER_WEIGHT,
    OVERLAP_WEIGHT,
    Found,
    Predictions,
    SetHead,
    Targets,
    assign,
    corners,
    generalised_overlap,
    names,
    read,
)

FOLDER = Path(train.__file__).parent


def drawn(seed: int, queries: int, objects: int) -> tuple[Predictions, Targets]:
    draws = torch.Generator().manual_seed(seed)
    counts = [len(words) for words in network.ATTRIBUTES]
    found = Predictions(
        torch.randn(1, queries, generator=draws),
        torch.randn(1, queries, sum(counts), generator=draws),
        0.2 + 0.5 * torch.rand(1, queries, 4, generator=draws),
    )
    attributes = [torch.randint(n, (1, objects), generator=draws) for n in counts]
    boxes = 0.2 + 0.5 * torch.rand(1, objects, 4, generator=draws)
    return found, Targets(torch.stack(attributes, -1), boxes, torch.tensor([objects]))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_predictions_and_objects_are_matched_as_cheaply_as_possible(seed, objects):
    found, targets = drawn(seed, 5, objects)
    ((query, item),) = assign(found, targets)
    counts = [len(words) for words in network.ATTRIBUTES]

    def price(q: int, t: int) -> float:
        box, wanted = found.boxes[0, q], targets.boxes[0, t]
        overlap = generalised_overlap(corners(box), corners(wanted))
        sure = float(found.objects[0, q].sigmoid())
        for logits, right in zip(
            found.attributes[0, q].split(counts), targets.attributes[0, t], strict=True
        ):
            sure += float(logits.softmax(-1)[right])
        apart = float((box - wanted).abs().sum())
        return CORNER_WEIGHT * apart - OVERLAP_WEIGHT * float(overlap) - CLASS_WEIGHT * sure

    best = min(
        sum(price(q, t) for t, q in enumerate(order))
        for order in itertools.permutations(range(5), objects)
    )
    assert sorted(item.tolist()) == list(range(objects))
    assert len(set(query.tolist())) == objects
    own = sum(price(q, t) for q, t in zip(query.tolist(), item.tolist(), strict=True))
    assert own == pytest.approx(best, abs=1e-4)


def test_generalised_overlap_is_iou_less_the_empty_share_of_the_hull():
    one = torch.tensor([0.0, 0.0, 2.0, 2.0])
    assert generalised_overlap(one, one) == pytest.approx(1.0)
    assert generalised_overlap(one, torch.tensor([1.0, 0.0, 3.0, 2.0])) == pytest.approx(1 / 3)
    # Nothing in common: -(hull - union) / hull = -(16 - 8) / 16, with a hull of 8 x 2.
    assert generalised_overlap(one, torch.tensor([6.0, 0.0, 8.0, 2.0])) == pytest.approx(-0.5)


def test_a_right_set_costs_next_to_nothing_in_any_order():
    _, targets = drawn(1, 4, 3)
    counts = [len(words) for words in network.ATTRIBUTES]
    sure = [
        40.0 * torch.nn.functional.one_hot(targets.attributes[0, :, kind], count)
        for kind, count in enumerate(counts)
    ]
    order = torch.tensor([2, 0, 1])
    right = Predictions(
        torch.tensor([[30.0, 30.0, 30.0, -30.0]]),
        torch.cat([torch.cat(sure, -1)[order], torch.zeros(1, sum(counts))])[None],
        torch.cat([targets.boxes[0, order], torch.full((1, 4), 0.5)])[None],
    )
    assert network.loss([right], targets) < 1e-4
    # An object told by two queries costs: one of them should be no object.
    twice = right._replace(objects=torch.full((1, 4), 30.0))
    assert network.loss([twice], targets) > 1.0


def test_phrases_name_objects_by_any_of_their_words():
    item = Found((0, 0, 1, 1), ("red", "star", "large"), 0.9, (0.8, 0.7, 0.6))
    assert names(item, "star") == pytest.approx(0.9 * 0.7)
    assert names(item, "large red object") == pytest.approx(0.9 * 0.8 * 0.6)
    assert names(item, "blue star") is None
    with pytest.raises(ValueError, match="'dog' of 'red dog' is no word of the head; it knows"):
        names(item, "red dog")


@pytest.mark.parametrize("patches", [(12, 12), (3, 6)])
def test_operations_are_those_that_torch_counts(patches):
    torch.manual_seed(0)
    head = SetHead(128, *patches).eval()
    count = patches[0] * patches[1]
    # The counter does not see the fused kernel's products.
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        head(torch.randn(1, count, 128))
    assert head.flops(count) == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_targets_are_the_scenes_objects():
    scene = generate("shapes", 96, "train", 3)
    targets = train.targets_of([scene])
    assert targets.counts.tolist() == [len(scene.objects)]
    for place, item in enumerate(scene.objects):
        colour, shape, size = targets.attributes[0, place].tolist()
        assert (COLOUR_NAMES[colour], SHAPES[shape], SIZES[size]) == (
            item.colour,
            item.shape,
            item.size,
        )
        x0, y0, x1, y1 = (96 * corners(targets.boxes[0, place])).tolist()
        assert (x0, y0, x1, y1) == pytest.approx(train.data.geometry(item, "box"), abs=1e-3)


def test_the_trained_head_finds_what_is_drawn():
    assert WEIGHTS.stat().st_size <= 2_000_000
    head = network.load_head(WEIGHTS)
    scenes = [generate("shapes", 96, "test", index) for index in range(8)]
    with torch.no_grad():
        found = head(train.features_of(scenes, torch.device("cpu")).float())[-1]
    right = told = 0
    for row, scene in enumerate(scenes):
        items = read(found, row, 0.5)
        told += len(items)
        wanted = sorted((item.colour, item.shape) for item in scene.objects)
        right += sum(item.words[:2] in wanted for item in items)
    truths = sum(len(scene.objects) for scene in scenes)
    assert 2 * right / (told + truths) >= 0.9


def test_the_folder_holds_what_was_measured():
    quality = json.loads((FOLDER / "quality.json").read_text())
    assert quality["parameters"] == sum(weight.numel() for weight in SetHead().parameters())
    assert quality["f1_50"] > 0.95
    assert (FOLDER / "curve.csv").stat().st_size > 0


def test_the_recipe_runs_and_is_repeatable(tmp_path):
    sizes = train.SMOKE
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        arguments = argparse.Namespace(out=tmp_path / name, seed=1, max_seconds=None)
        facts = train.train(arguments, torch.device("cpu"), sizes, 0.0)
        assert facts["steps"] == sizes.steps
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert train.evaluate(tmp_path / "one", torch.device("cpu"), sizes)["duplicates"] >= 0
