"""ToMe against loops and against the unmerged tower; down-sampling against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from methods.visual_pruning.downsampling import Downsampling, smaller_grid
from methods.visual_pruning.full_tokens import FullTokens
from methods.visual_pruning.tome import ToMe, match, match_flops, schedule
from models.base import Unsupported
from models.vision_language import Merged
from models.vision_language_towers import Encoded, Grid, InnerMerging, Watch
from tests.methods.visual_pruning.models import (
    answer_of,
    first_logits,
    model_of,
    question,
    reduced,
)


def keys_of(tokens: int, width: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


# --- the schedule ---


@given(st.integers(1, 800), st.integers(1, 12), st.data())
def test_a_schedule_leaves_what_is_asked_and_halves_at_most(tokens, layers, data) -> None:
    kept = data.draw(st.integers(-(-tokens >> layers), tokens))
    counts = schedule(tokens, kept, layers)
    left = tokens
    for count in counts:
        assert 0 <= count <= left // 2
        left -= count
    assert left == kept
    assert len(counts) == layers
    # Where no layer is at its limit the counts differ by one at most.
    if kept * 2 >= tokens:
        assert max(counts) - min(counts) <= 1


def test_a_schedule_that_halving_cannot_meet_is_refused_with_what_can_be_had() -> None:
    assert schedule(144, 72, 7) == [11, 11, 10, 10, 10, 10, 10]
    # The last layer can leave 16 of no more than 32.
    assert schedule(144, 16, 7) == [19, 19, 18, 18, 18, 20, 16]
    with pytest.raises(Unsupported, match="at least 2 of 144 tokens in 7 layers"):
        schedule(144, 1, 7)
    with pytest.raises(Unsupported, match="0 were asked for"):
        schedule(144, 0, 7)


# --- the matching ---


def matched_by_hand(keys: Tensor, count: int) -> list[set[int]]:
    """Return the groups of tokens that become one."""
    first, second = range(2, len(keys), 2), range(1, len(keys), 2)

    def likeness(one: int, other: int) -> float:
        return float(torch.nn.functional.cosine_similarity(keys[one], keys[other], dim=0))

    best = {one: max(second, key=lambda other: likeness(one, other)) for one in first}
    order = sorted(first, key=lambda one: -likeness(one, best[one]))
    groups = {other: {other} for other in second}
    for one in order[:count]:
        groups[best[one]].add(one)
    return [{0}, *({one} for one in order[count:]), *groups.values()]


@pytest.mark.parametrize(("tokens", "count"), [(9, 0), (9, 2), (9, 4), (10, 3), (10, 4), (37, 11)])
def test_tokens_are_paired_as_written_out_by_hand(tokens: int, count: int) -> None:
    keys = keys_of(tokens, seed=tokens + count)
    found = match(keys, count)
    assert len(found.stands_for) == tokens - count
    groups = [
        set((found.goes_to == number).nonzero().flatten().tolist())
        for number in range(len(found.stands_for))
    ]
    assert sorted(map(sorted, groups)) == sorted(map(sorted, matched_by_hand(keys, count)))
    assert groups[0] == {0}
    for group, stands in zip(groups, found.stands_for.tolist(), strict=True):
        assert stands in group
        assert len(group) == 1 or stands % 2 == 1


def test_matching_goes_by_direction_and_not_by_length() -> None:
    keys = keys_of(12)
    longer = keys * torch.rand(12, 1, generator=torch.Generator().manual_seed(1)).add(0.1)
    for one, other in zip(match(keys, 4), match(longer, 4), strict=True):
        assert torch.equal(one, other)


# --- inside the tower ---


def tower_and_states(pairs: bool) -> tuple[Any, Tensor]:
    """Return a tower and a tile's tokens; in pairs, each second patch is a copy of the first."""
    tower = model_of("llava").tower
    pixels = tower.prepare(question("square").image, 1)
    with torch.inference_mode():
        states = tower._tower.pre_layrnorm(tower._tower.embeddings(pixels.values))[0].clone()
        if pairs:
            states[2::2] = states[1::2]
    return tower, states


def plain_layers(tower: Any, states: Tensor) -> Tensor:
    for layer in tower._layers:
        states = layer(states[None], None)[0]
    return states


def merged_layers(tower: Any, states: Tensor, counts: list[int]) -> tuple[Tensor, Tensor, Encoded]:
    merging = InnerMerging(lambda layout, layers: [counts], match, match_flops)
    encoded = Encoded(states[None], None, 36)  # type: ignore[arg-type]  # no layout is needed here
    merged, part_of, stands = tower._merge_tile(states, merging, counts, encoded)
    assert torch.equal(part_of[stands], torch.arange(len(stands)))
    return torch.cat([merged[:1], merged[1 + part_of]]), part_of, encoded


def test_a_token_merged_of_copies_counts_as_that_many_in_every_later_layer() -> None:
    tower, states = tower_and_states(pairs=True)
    with torch.inference_mode():
        expected = plain_layers(tower, states)
        found, part_of, _ = merged_layers(tower, states, [18, 0, 0, 0, 0])
    assert part_of.tolist() == [place // 2 for place in range(36)]
    assert torch.allclose(found, expected, atol=1e-5)
    assert expected.std(0).max() > 0.1


def test_where_nothing_leaves_the_layers_are_the_plain_ones() -> None:
    tower, states = tower_and_states(pairs=False)
    with torch.inference_mode():
        expected = plain_layers(tower, states)
        found, part_of, encoded = merged_layers(tower, states, [0] * 5)
    assert torch.equal(part_of, torch.arange(36))
    assert torch.allclose(found, expected, atol=1e-6)
    pixels = tower.prepare(question("square").image, 1)
    # 36 patches of 48 numbers become 32 in the embedding, which is counted once for all tiles.
    assert encoded.flops + 2 * 36 * 48 * 32 == tower._flops(pixels)


def test_a_merged_token_is_the_mean_by_the_number_of_its_patches() -> None:
    tower, states = tower_and_states(pairs=False)
    seen: list[Tensor] = []
    layer = tower._layers[1]

    def keep(module: Any, inputs: Any, keywords: Any = None) -> None:
        seen.append(inputs[0])

    handle = layer.layer_norm2.register_forward_pre_hook(keep)
    try:
        with torch.inference_mode():
            merged_layers(tower, states, [6, 5, 0, 0, 0])
            seen_merged = seen.pop()
            # The same two layers with the merging undone between them and all sizes kept by hand.
            first = tower._layers[0]
            attended, _ = first.self_attn(
                hidden_states=first.layer_norm1(states[None]), attention_mask=None
            )
            after = states + attended[0]
            keys = first.self_attn.k_proj(first.layer_norm1(states[None]))[0]
            pairing = match(keys.view(37, 4, 8).mean(1), 6)
            groups = [
                (pairing.goes_to == number).nonzero().flatten()
                for number in range(len(pairing.stands_for))
            ]
            merged = torch.stack([after[group].mean(0) for group in groups])
            merged = merged + first.mlp(first.layer_norm2(merged))
            sizes = torch.tensor([len(group) for group in groups]).float()
            attended, _ = layer.self_attn(
                hidden_states=layer.layer_norm1(merged[None]),
                attention_mask=sizes.log().expand(1, 1, len(sizes), -1),
            )
            after = merged + attended[0]
            keys = layer.self_attn.k_proj(layer.layer_norm1(merged[None]))[0]
            pairing = match(keys.view(len(sizes), 4, 8).mean(1), 5)
            expected = torch.stack(
                [
                    (after[group] * sizes[group, None]).sum(0) / sizes[group].sum()
                    for number in range(len(pairing.stands_for))
                    for group in [(pairing.goes_to == number).nonzero().flatten()]
                ]
            )
    finally:
        handle.remove()
    assert len(seen_merged) == 37 - 11
    assert torch.allclose(seen_merged, expected, atol=1e-5)


@pytest.mark.parametrize(("architecture", "shape"), [("llava", "square"), ("llava-next", "wide")])
@pytest.mark.parametrize("keep_ratio", [0.1, 1 / 3, 0.9])
def test_every_patch_ends_in_one_token_of_its_tile(
    architecture: Any, shape: str, keep_ratio: float
) -> None:
    method = ToMe(keep_ratio=keep_ratio)
    model = model_of(architecture)
    with torch.inference_mode():
        pixels = model.tower.prepare(question(shape).image, 1)
        encoded = model.tower.encode(pixels, Watch(), method.plan(model).merging)
    owner, layout = encoded.owner, encoded.layout
    assert owner is not None
    anchors = owner.unique()
    assert len(anchors) == method.budget(len(owner))
    assert torch.equal(owner[anchors], anchors)
    assert torch.equal(layout.patch_tile[owner], layout.patch_tile)
    assert torch.equal(encoded.features[owner], encoded.features)
    assert encoded.cls_features is not None
    assert len(encoded.cls_features) == layout.num_tiles
    assert encoded.watch_flops > 0


def test_merging_makes_the_tower_cheaper_and_meets_the_budget() -> None:
    plain = answer_of(FullTokens(), shape="square").work
    few = answer_of(ToMe(keep_ratio=0.25), shape="square").work
    assert (few.visual_tokens, few.kept_tokens) == (36, 9)
    assert few.encoder_flops < 0.8 * plain.encoder_flops
    assert 0 < few.selector_flops < 0.1 * few.encoder_flops


def test_all_tokens_kept_is_the_plain_tower_to_the_bit() -> None:
    assert torch.equal(first_logits(ToMe(keep_ratio=1.0)), first_logits(FullTokens()))
    assert not torch.equal(first_logits(ToMe(keep_ratio=0.9)), first_logits(FullTokens()))


def test_towers_and_images_that_cannot_be_merged_are_refused() -> None:
    with pytest.raises(Unsupported, match="windows of a fixed number of tokens"):
        answer_of(ToMe(), "qwen2.5-vl")
    with pytest.raises(Unsupported, match="padding is cut off"):
        answer_of(ToMe(), "llava-next", "padded")
    tower = model_of("llava").tower
    pixels = tower.prepare(question("square").image, 1)
    merging = ToMe().plan(model_of("llava")).merging
    with torch.inference_mode(), pytest.raises(Unsupported, match="cannot be watched"):
        tower.encode(pixels, Watch(received=(2,)), merging)


# --- down-sampling ---


@pytest.mark.parametrize("budget", range(1, 145))
def test_a_smaller_grid_has_exactly_as_many_places_in_the_best_shape(budget: int) -> None:
    shapes = [
        (max(rows / columns, columns / rows), Grid(rows, columns))
        for rows in range(1, 13)
        for columns in range(1, 13)
        if rows * columns == budget
    ]
    if shapes and min(shapes)[0] <= 2:
        found = smaller_grid(Grid(12, 12), budget)
        assert found.rows * found.columns == budget
        assert max(found) / min(found) == min(shapes)[0]
    else:
        with pytest.raises(Unsupported, match=f"no grid of {budget} patches"):
            smaller_grid(Grid(12, 12), budget)


def test_a_grid_keeps_the_proportions_of_the_towers() -> None:
    assert smaller_grid(Grid(6, 12), 18) == (3, 6)
    with pytest.raises(Unsupported, match="16 can be had"):
        smaller_grid(Grid(12, 12), 17)


def test_a_shrunk_image_is_what_transformers_makes_of_it() -> None:
    model = model_of("llava")
    tower = model.tower
    pixels = tower.prepare(question("square").image, 1)
    small = tower.shrunk(pixels, Downsampling(keep_ratio=0.25)._grid)
    assert small.values.shape == (1, 3, 12, 12)
    # Averages of 2 x 2 pixels, but for what antialiasing takes from their neighbours.
    blocks = torch.nn.functional.avg_pool2d(pixels.values, 2)
    assert torch.corrcoef(torch.stack([small.values.flatten(), blocks.flatten()]))[0, 1] > 0.95
    with torch.inference_mode():
        encoded = tower.encode(small, Watch())
        theirs = model.module.model.vision_tower(
            small.values, interpolate_pos_encoding=True, output_hidden_states=True
        )
    assert torch.allclose(encoded.features, theirs.hidden_states[-2][0, 1:], atol=1e-5)
    assert encoded.layout.grid == Grid(3, 3)
    assert encoded.full_patches == 36


def test_down_sampling_meets_the_budget_and_makes_the_tower_cheaper() -> None:
    plain = answer_of(FullTokens(), shape="square").work
    small = answer_of(Downsampling(keep_ratio=0.25), shape="square").work
    assert (small.visual_tokens, small.kept_tokens, small.mean_visual_tokens) == (36, 9, 9)
    assert small.encoder_flops < 0.27 * plain.encoder_flops
    assert small.projector_flops == plain.projector_flops / 4
    assert small.selector_flops == 0
    assert torch.equal(first_logits(Downsampling(keep_ratio=1.0)), first_logits(FullTokens()))


def test_every_tile_is_shrunk_alike_or_not_at_all() -> None:
    tower = model_of("llava").tower
    pixels = tower.prepare(question("wide").image.repeat(2, 0), 2)
    small = tower.shrunk(pixels, Downsampling(keep_ratio=0.25)._grid)
    assert small.values.shape == (5, 3, 12, 12)
    with pytest.raises(Unsupported, match="each of 5 tiles"):
        tower.shrunk(pixels, Downsampling(keep_ratio=0.2556)._grid)
    for architecture in ("llava-next", "qwen2.5-vl"):
        with pytest.raises(Unsupported):
            answer_of(Downsampling(), architecture, "square")


def test_what_the_tower_left_goes_to_the_projector_in_the_order_of_the_picture() -> None:
    method = ToMe(keep_ratio=0.25)
    model = model_of("llava")
    with torch.inference_mode():
        pixels = model.tower.prepare(question("square").image, 1)
        encoded = model.tower.encode(pixels, Watch(), method.plan(model).merging)
        from models.vision_language import Seen

        seen = Seen(model.tower, encoded, torch.zeros(0, 48), 7, {}, lambda phase: None)
        plan = method.plan(model)
        assert plan.reduce is not None
        found = plan.reduce(seen)
    assert isinstance(found, Merged)
    assert found.anchors.tolist() == sorted(set(encoded.owner.tolist()))
    assert found.features is not None
    assert torch.equal(found.features, encoded.features[found.anchors])
    assert isinstance(reduced(ToMe(keep_ratio=1.0), "llava", "square")[1], Tensor)
