"""PPE: clusters against loops, rotations against the model's own, and positions dealt out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.visual_pruning.common_merging import dpc_knn
from methods.visual_pruning.full_tokens import FullTokens
from methods.visual_pruning.ppe import Ppe, Sections, choose_members, clusters_of, deal_out, merge
from models.base import Decoding, Unsupported
from models.vision_language import Merged, axes_of
from models.vision_language_decoder import (
    PATCH,
    TEXT_AFTER,
    TEXT_BEFORE,
    Positions,
    PromptTokens,
    Stage,
    StageView,
)
from tests.methods.visual_pruning.models import (
    ARCHITECTURES,
    answer_of,
    first_logits,
    model_of,
    question,
    reduced,
)
from tests.models.test_vision_language import inputs_of

DRAW = torch.Generator().manual_seed(0)


def naive_clusters(vectors: Tensor, count: int, neighbours: int) -> tuple[list[int], list[int]]:
    """Return centres, best first, and each token's centre, all with loops."""
    tokens, width = vectors.shape
    distance = [
        [float((vectors[i] - vectors[j]).norm()) / math.sqrt(width) for j in range(tokens)]
        for i in range(tokens)
    ]
    density = []
    for row in distance:
        nearest = sorted(row)[:neighbours]
        density.append(math.exp(-sum(each**2 for each in nearest) / len(nearest)))
    largest = max(max(row) for row in distance)
    apart = [
        min((distance[i][j] for j in range(tokens) if density[j] > density[i]), default=largest)
        for i in range(tokens)
    ]
    order = sorted(range(tokens), key=lambda i: -density[i] * apart[i])[:count]
    belongs = [i if i in order else min(order, key=lambda c: distance[i][c]) for i in range(tokens)]
    return order, belongs


def test_a_token_lies_at_no_distance_from_itself() -> None:
    vectors = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) + 1024
    # Far from the origin distances by a product round.
    assert float(torch.cdist(vectors[None], vectors[None])[0].diagonal().max()) > 0
    found = dpc_knn(vectors, 40, 5)
    assert not found.distance.any()


@pytest.mark.parametrize("seed", range(5))
def test_clusters_are_those_of_the_loops(seed: int) -> None:
    vectors = torch.randn(14, 4, generator=torch.Generator().manual_seed(seed))
    for count in (1, 5, 14):
        found = dpc_knn(vectors, count, 5)
        order, belongs = naive_clusters(vectors, count, 5)
        assert found.centres.tolist() == order
        assert found.centres[found.member_of].tolist() == belongs
        assert found.member_of[found.centres].tolist() == list(range(count))
        assert torch.bincount(found.member_of).min() > 0
        means = found.means(vectors)
        for cluster in range(count):
            members = found.members(cluster)
            assert torch.allclose(means[cluster], vectors[members].mean(0), atol=1e-6)


def test_equal_tokens_are_told_apart_without_noise() -> None:
    vectors = torch.zeros(6, 3)
    found = dpc_knn(vectors, 3, 5)
    assert sorted(found.centres.tolist())[0] == 0
    assert len(set(found.centres.tolist())) == 3
    assert found.member_of[found.centres].tolist() == [0, 1, 2]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("groups", [1, 2])
def test_keeping_all_tokens_with_several_positions_is_the_model_to_the_bit(
    architecture: Any, groups: int
) -> None:
    method = Ppe(keep_ratio=1.0, groups=groups)
    assert torch.equal(first_logits(method, architecture), first_logits(FullTokens(), architecture))
    assert answer_of(method, architecture).work.positions == "multi"
    by_score = first_logits(Ppe(keep_ratio=1.0, groups=groups, order="score"), architecture)
    assert not torch.allclose(by_score, first_logits(FullTokens(), architecture), atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_token_at_one_place_turns_as_the_models_own(architecture: Any) -> None:
    """All members at one position, for every K: the rotation of that position; text likewise."""
    decoder = model_of(architecture).decoder
    axes = decoder.rotary_sections
    own = torch.randint(0, 90, (len(axes), 11), generator=DRAW)
    states = torch.zeros(11, 48)
    with torch.inference_mode():
        expected = decoder._angles(states, Positions(own))
        for groups in (1, 2) if architecture == "qwen2.5-vl" else (1, 2, 3, 4, 6):
            sections = Sections.split(axes, groups)
            rows = sections.rows(own[:, None].expand(-1, groups, -1))
            found = decoder._angles(states, Positions(rows, sections.widths))
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])


def rotate(vector: Tensor, angle: Tensor) -> Tensor:
    """Turn pairs (i, i + half) of a head's numbers by an angle each, written out."""
    half = len(vector) // 2
    low, high = vector[:half], vector[half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([low * cos - high * sin, high * cos + low * sin])


def test_a_product_of_turned_heads_is_the_sum_over_groups_of_single_positions() -> None:
    decoder = model_of("qwen2.5-vl").decoder
    axes = decoder.rotary_sections
    assert axes == (2, 2, 2)
    sections = Sections.split(axes, 2)
    frequencies = decoder._language.rotary_emb.inv_freq
    slots = torch.randint(0, 40, (2, 3, 2), generator=DRAW)  # two tokens, axes, slots
    query, key = torch.randn(2, 12, generator=DRAW)
    owner = [each for each, width in enumerate(sections.widths) for _ in range(width)]
    rows = torch.stack([sections.rows(each[..., None])[:, 0] for each in slots])
    turned = [rotate(vector, rows[n][owner] * frequencies) for n, vector in enumerate((query, key))]
    whole = float(turned[0] @ turned[1])
    total = 0.0
    for section in range(len(sections.widths)):
        dims = [i for i in range(6) if owner[i] == section]
        dims += [i + 6 for i in dims]
        axis, slot = sections.axis[section], sections.slot[section]
        single = [
            rotate(vector, slots[n, axis, slot] * frequencies)
            for n, vector in enumerate((query, key))
        ]
        total += float(single[0][dims] @ single[1][dims])
    assert whole == pytest.approx(total, abs=1e-4)
    with torch.inference_mode():
        cos, sin = decoder._angles(torch.zeros(2, 48), Positions(rows.T, sections.widths))
    for n, vector in enumerate((query, key)):
        half = torch.cat([-vector[6:], vector[:6]])
        assert torch.allclose(vector * cos[0, n] + half * sin[0, n], turned[n], atol=1e-5)


def test_sections_add_up_and_fall_back_to_single_frequencies() -> None:
    qwen = Sections.split((16, 24, 24), 8)
    assert qwen.widths == (2,) * 8 + (3,) * 16
    assert qwen.axis == (0,) * 8 + (1,) * 8 + (2,) * 8
    assert qwen.slot == tuple(range(8)) * 3
    odd = Sections.split((4, 6, 6), 4)
    assert odd.widths == (1,) * 16
    assert odd.slot == (0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 0, 1)
    for axes, groups in (((16, 24, 24), 8), ((4, 6, 6), 4), ((64,), 32), ((6,), 1)):
        sections = Sections.split(axes, groups)
        assert sum(sections.widths) == sum(axes)
        assert list(sections.axis) == axes_of(sections.widths, axes)
        slots = torch.randint(0, 99, (len(axes), groups, 5), generator=DRAW)
        assert torch.equal(sections.slots(sections.rows(slots)), slots)
    with pytest.raises(ValueError, match="do not lie within"):
        axes_of((3, 3), (2, 4))
    with pytest.raises(Unsupported, match="8 positions do not fit an axis"):
        answer_of(Ppe(), "qwen2.5-vl")


def test_members_are_chosen_by_their_rules() -> None:
    distance = torch.tensor([0.3, 0.0, 0.2, 0.9, 0.1])
    generator = torch.Generator().manual_seed(0)

    def members(rule: Any, groups: int, count: int = 5) -> list[int]:
        return choose_members(distance[:count], groups, rule, generator).tolist()

    assert members("spaced", 2) == [1, 3]
    assert members("spaced", 5) == [0, 1, 2, 3, 4]
    assert members("spaced", 4, count=2) == [0, 0, 1, 1]
    assert members("cyclic_reference", 7) == [4, 3, 2, 1, 0, 4, 3]
    assert members("nearest", 3) == [1, 4, 2]
    assert sorted(members("random", 5)) == [0, 1, 2, 3, 4]
    for rule in ("spaced", "cyclic_reference", "nearest", "random"):
        assert members(rule, 3, count=1) == [0, 0, 0]


def test_positions_are_dealt_out_as_in_the_papers_figure() -> None:
    first, second = torch.tensor([[2, 2, 6, 6]]), torch.tensor([[7, 5, 9, 14]])
    assert deal_out([first, second]).tolist() == [[2, 7, 6, 5]]
    # A token that is merged with no other keeps each position in its slot.
    assert deal_out([first]).tolist() == [[2, 2, 6, 6]]
    # A position is one number of every axis; they are never mixed.
    grid = torch.tensor([[0, 0, 0, 0], [1, 1, 2, 2], [3, 4, 3, 4]])
    other = grid + 10
    assert deal_out([grid, other]).T.tolist() == [[0, 1, 3], [10, 11, 13], [0, 1, 4], [10, 11, 14]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("placement", ["ppe", "centre", "mean"])
def test_a_merged_token_stands_at_its_members_places(architecture: Any, placement: Any) -> None:
    method = Ppe(keep_ratio=0.3, groups=2, placement=placement)
    seen, found = reduced(method, architecture)
    assert isinstance(found, Merged)
    assert found.positions is not None
    axes = len(model_of(architecture).decoder.rotary_sections)
    patches = torch.randint(0, 500, (axes, seen.num_patches), generator=DRAW)
    rows = found.positions(patches)
    merging = merge(
        seen.projected,
        seen.layout.patch_tile,
        len(found.anchors),
        neighbours=5,
        order="first_member",
    )
    assert found.embeddings is not None
    for cluster, members in enumerate(merging.members):
        mean = seen.projected[members].mean(0)
        assert torch.allclose(found.embeddings[cluster], mean, atol=1e-5)
        places = patches[:, members]
        column = rows[:, cluster].view(axes, -1)
        if placement == "mean":
            assert torch.allclose(column[:, 0], places.double().mean(1))
        elif placement == "centre":
            assert torch.equal(column[:, 0], patches[:, merging.centres[cluster]])
        else:
            count = len(members)
            picked = [(2 * turn + 1) * count // 4 for turn in range(2)]
            assert torch.equal(column, places[:, picked])
    assert found.anchors.tolist() == [int(members[0]) for members in merging.members]
    everyone = torch.cat(merging.members).sort().values
    assert everyone.tolist() == list(range(seen.num_patches))


def test_tiles_are_merged_one_by_one() -> None:
    seen, _ = reduced(Ppe(keep_ratio=0.3, groups=2), "llava-next")
    tile = seen.layout.patch_tile
    merging = merge(seen.projected, tile, 40, neighbours=5, order="first_member")
    assert all(len(set(tile[members].tolist())) == 1 for members in merging.members)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_where_tokens_stand_costs_nothing(architecture: Any) -> None:
    placements = ("ppe", "renumber", "centre", "mean")
    works = {
        placement: answer_of(Ppe(groups=2, placement=placement), architecture).work
        for placement in placements
    }
    assert len({work.flops for work in works.values()}) == 1
    assert len({work.kept_tokens for work in works.values()}) == 1
    assert works["renumber"].positions == "compact"
    logits = [first_logits(Ppe(groups=2, placement=each), architecture) for each in placements]
    for number, one in enumerate(logits):
        for other in logits[:number]:
            assert not torch.equal(one, other)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("placement", ["ppe", "renumber", "centre", "mean"])
def test_the_cascade_merges_again_between_layers(architecture: Any, placement: Any) -> None:
    method = Ppe(keep_ratio=0.5, groups=2, placement=placement, cascade=(2, 4), cascade_ratio=0.5)
    answer = answer_of(method, architecture, "square")
    first = answer.work.kept_tokens
    counts = [first, clusters_of(0.5, first), clusters_of(0.5, clusters_of(0.5, first))]
    assert answer.work.mean_visual_tokens == pytest.approx(sum(counts) / 3)
    plain = first_logits(Ppe(keep_ratio=0.5, groups=2, placement=placement), architecture, "square")
    merged = first_logits(method, architecture, "square")
    assert not torch.equal(plain, merged)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("placement", ["ppe", "centre", "mean"])
def test_what_a_cascade_merges_stands_where_its_members_stood(
    monkeypatch: pytest.MonkeyPatch, architecture: Any, placement: Any
) -> None:
    method = Ppe(keep_ratio=0.5, groups=2, placement=placement, cascade=(2,), cascade_ratio=0.5)
    seen: list[tuple[Any, Any, Sections]] = []
    original = Ppe._merge_again

    def watched(self: Ppe, view: Any, sections: Sections) -> Any:
        before = view.tokens
        seen.append((before, original(self, view, sections), sections))
        return seen[-1][1]

    monkeypatch.setattr(Ppe, "_merge_again", watched)
    answer_of(method, architecture, "square", tokens=1)
    before, after, sections = seen[0]
    places = before.patches
    merging = merge(
        before.states[places],
        before.tile[places],
        clusters_of(0.5, len(places)),
        neighbours=method.cascade_knn,
        order=method.order,
    )
    own = sections.slots(before.positions.values[:, places])
    found = sections.slots(after.positions.values[:, after.patches])
    assert found.shape[-1] == len(merging.members) < len(places)
    for cluster, members in enumerate(merging.members):
        wanted = {
            "mean": lambda members=members: own[:, :, members].double().mean(-1),
            "centre": lambda cluster=cluster: own[:, :, merging.centres[cluster]],
            "ppe": lambda members=members: deal_out([own[:, :, each] for each in members]),
        }[placement]()
        assert torch.equal(found[:, :, cluster].double(), wanted.double())
    words = (before.kind != PATCH).nonzero().flatten()
    kept = (after.kind != PATCH).nonzero().flatten()
    text = before.positions.values[:, words].double()
    assert torch.equal(text, after.positions.values[:, kept].double())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("placement", "groups"), [("centre", 1), ("ppe", 1), ("ppe", 2)])
def test_a_cascade_that_merges_nothing_changes_nothing(
    architecture: Any, placement: Any, groups: int
) -> None:
    method = Ppe(keep_ratio=0.3, groups=groups, placement=placement)
    kept = replace(method, cascade=(3,), cascade_ratio=1.0)
    assert torch.equal(first_logits(method, architecture), first_logits(kept, architecture))


def test_a_cascade_leaves_a_token_that_stays_alone_at_all_its_places() -> None:
    """Three slots: each position once, in turn, would be (1, 2, 1) for (1, 1, 2)."""
    method = Ppe(keep_ratio=0.3, groups=3)
    kept = replace(method, cascade=(3,), cascade_ratio=1.0)
    assert torch.equal(first_logits(method), first_logits(kept))


def test_the_answer_goes_on_from_the_position_that_the_words_have() -> None:
    for architecture in ARCHITECTURES:
        model = model_of(architecture)
        answer_of(Ppe(keep_ratio=0.3, groups=2), architecture, tokens=1)
        after = list(model.decoder._next)
        answer_of(FullTokens(), architecture, tokens=1)
        assert after == list(model.decoder._next)
        answer_of(Ppe(keep_ratio=0.3, groups=2, placement="renumber"), architecture, tokens=1)
        # With one axis an image takes as many positions as it has tokens; with three, far fewer.
        assert (model.decoder._next[0] < after[0]) == (architecture != "qwen2.5-vl")


def test_clusters_are_rounded_up() -> None:
    assert [clusters_of(ratio, 144) for ratio in (1.0, 0.45, 0.25)] == [144, 65, 36]
    assert clusters_of(0.07, 100) == 7  # the product lies a rounding above
    assert clusters_of(0.01, 5) == 1


def test_settings_come_back_from_lists_and_wrong_ones_are_refused() -> None:
    assert Ppe(cascade=[2, 4]).cascade == (2, 4)  # type: ignore[arg-type]  # as JSON has it
    with pytest.raises(ValueError, match="positions must be one of auto"):
        Ppe(positions="compact")
    with pytest.raises(ValueError, match="cascade must be a whole number of at least 1"):
        Ppe(cascade=(0,))
    with pytest.raises(ValueError, match=r"cascade_ratio must lie in \(0, 1\]"):
        Ppe(cascade_ratio=0.0)


def test_random_members_go_by_the_image() -> None:
    method = Ppe(keep_ratio=0.2, groups=2, members="random")
    assert torch.equal(first_logits(method), first_logits(method))
    assert not torch.equal(first_logits(method), first_logits(Ppe(keep_ratio=0.2, groups=2)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_decoder_turns_merged_tokens_by_their_members_and_words_by_their_own(
    architecture: Any,
) -> None:
    model = model_of(architecture)
    method = Ppe(keep_ratio=0.3, groups=2)
    plan = method.plan(model)
    inputs, pixels = inputs_of(model, question())
    ids = inputs["input_ids"][0]
    own = model.positions(ids.tolist(), pixels)
    image = (ids == model.module.config.image_token_id).nonzero().flatten()
    seen, merged = reduced(method, architecture)
    assert isinstance(merged, Merged)
    assert merged.positions is not None
    looked: list[PromptTokens] = []

    def look(view: StageView) -> None:
        looked.append(view.tokens)

    watching = replace(plan, stages=(Stage(after=1, choose=look),))
    model.run(question(), Decoding(max_new_tokens=1), watching)
    (tokens,) = looked
    values, patches = tokens.positions.values, tokens.patches
    assert torch.equal(values[:, patches], merged.positions(own[:, image[seen.layout.patches]]))
    words = torch.cat([own[:, : image[0]], own[:, image[-1] + 1 :]], 1)
    is_word = (tokens.kind == TEXT_BEFORE) | (tokens.kind == TEXT_AFTER)
    axes = list(Sections.split(model.decoder.rotary_sections, 2).axis)
    assert torch.equal(values[:, is_word], words[axes])
