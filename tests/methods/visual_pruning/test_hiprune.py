"""HiPrune's choice, hand-made and by its invariants; FastV's and VisionZip's against loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from methods.visual_pruning.common import top_k
from methods.visual_pruning.fastv import FastV
from methods.visual_pruning.full_tokens import FullTokens
from methods.visual_pruning.hiprune import HiPrune
from methods.visual_pruning.visionzip import VisionZip, merge
from models.base import Unsupported
from models.vision_language import Merged
from models.vision_language_decoder import StageView
from models.vision_language_towers import Grid
from tests.methods.visual_pruning.models import (
    ARCHITECTURES,
    answer_of,
    first_logits,
    model_of,
    question,
    reduced,
)

GRID = Grid(6, 6)
PLACES = torch.arange(36)


def scores(seed: int, count: int = 36) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def chosen(
    method: HiPrune, middle: Tensor, last: Tensor, budget: int, likeness: Tensor | None = None
) -> set[int]:
    likeness = torch.zeros(36) if likeness is None else likeness
    found = method.select(middle, last, likeness, PLACES, grid=GRID, budget=budget)
    assert found.tolist() == sorted(set(found.tolist()))
    assert len(found) == budget
    return set(found.tolist())


def test_an_anchor_brings_its_neighbours_and_the_rest_are_registers() -> None:
    middle, last = torch.zeros(36), scores(1)
    middle[14] = 1
    found = chosen(HiPrune(alpha=0.5), middle, last, 10)
    core = {14, 8, 13, 15, 20}
    assert core <= found
    others = [place for place in top_k(last, 36).tolist() if place not in core]
    assert found - core == set(others[:5])


def test_an_anchor_in_the_corner_has_two_neighbours_and_registers_take_the_room() -> None:
    middle, last = torch.zeros(36), scores(2)
    middle[0] = 1
    assert {0, 1, 6} <= chosen(HiPrune(alpha=0.5), middle, last, 10)
    end_of_row = torch.zeros(36)
    end_of_row[11] = 1
    last = torch.zeros(36)
    last[30:] = 1  # registers far away from what is looked at
    stops = chosen(HiPrune(alpha=0.5), end_of_row, last, 10)
    flat = chosen(HiPrune(alpha=0.5, edges="flat"), end_of_row, last, 10)
    assert 12 not in stops
    assert 12 in flat


def test_without_a_share_for_anchors_the_last_layer_decides_alone() -> None:
    middle, last = scores(3), scores(4)
    registers = set(top_k(last, 12).tolist())
    assert chosen(HiPrune(alpha=0.0), middle, last, 12) == registers
    assert chosen(HiPrune(parts="registers"), middle, last, 12) == registers
    assert chosen(HiPrune(parts="anchors"), middle, last, 12) == set(top_k(middle, 12).tolist())


def test_anchors_that_fill_the_budget_leave_no_room_for_registers() -> None:
    middle = torch.zeros(36)
    middle[[7, 10]] = 1
    first, second = (chosen(HiPrune(alpha=1.0), middle, scores(seed), 10) for seed in (5, 6))
    assert first == second == {7, 1, 6, 8, 13, 10, 4, 9, 11, 16}


def test_without_neighbours_anchors_take_their_share_of_the_budget() -> None:
    middle, last = scores(7), scores(8)
    found = chosen(HiPrune(alpha=0.25, parts="anchors+registers"), middle, last, 12)
    anchors = top_k(middle, 3).tolist()
    rest = [place for place in top_k(last, 36).tolist() if place not in anchors]
    assert found == {*anchors, *rest[:9]}


def test_tokens_like_the_text_take_their_share_from_the_registers() -> None:
    middle, last, likeness = torch.zeros(36), scores(20), -scores(21)
    middle[14] = 1
    likeness[[13, 2]] = 1  # one of them is a buffer already
    method = HiPrune(alpha=0.5, text_share=0.2)
    found = chosen(method, middle, last, 10, likeness)
    core = [14, 8, 13, 15, 20]
    like = [place for place in top_k(likeness, 36).tolist() if place not in core][:2]
    rest = [place for place in top_k(last, 36).tolist() if place not in (*core, *like)]
    assert 2 in like
    assert found == {*core, *like, *rest[:3]}
    # Without a share the text decides nothing; with all of it, what anchors and buffers leave.
    plain = HiPrune(alpha=0.5)
    assert chosen(plain, middle, last, 10, likeness) == chosen(plain, middle, last, 10)
    everything = chosen(HiPrune(alpha=0.5, text_share=1.0), middle, last, 10, likeness)
    other = chosen(HiPrune(alpha=0.5, text_share=1.0), middle, scores(22), 10, likeness)
    assert everything == other > {*core}


def test_the_text_is_compared_in_the_decoders_space() -> None:
    seen, found = reduced(HiPrune(alpha=0.0, keep_ratio=0.4, text_share=1.0), "llava")
    text = torch.nn.functional.normalize(seen.text.float(), dim=-1).mean(0)
    cosines = torch.nn.functional.cosine_similarity(seen.projected.float(), text[None])
    assert isinstance(found, Tensor)
    assert found.tolist() == sorted(top_k(cosines, len(found)).tolist())
    assert seen.flops >= 2 * seen.projected.numel()


def test_all_eight_neighbours_count_for_the_share() -> None:
    middle = torch.zeros(36)
    middle[14] = 1
    found = chosen(HiPrune(alpha=0.9, neighbourhood="square"), middle, scores(9), 10)
    assert {14, 7, 8, 9, 13, 15, 19, 20, 21} <= found


@pytest.mark.parametrize("budget", [1, 2, 4, 8, 13, 36])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.32, 1.0])
def test_the_budget_holds_where_anchors_would_exceed_it(alpha: float, budget: int) -> None:
    for parts in ("all", "anchors", "registers", "anchors+registers"):
        chosen(HiPrune(alpha=alpha, parts=parts), scores(1), scores(2), budget)


def test_anchors_far_apart_leave_room_for_all_their_neighbours_or_are_fewer() -> None:
    middle = torch.zeros(36)
    middle[[7, 28]] = 1
    # Eight tokens are one anchor and its neighbours, not two with ten.
    found = chosen(HiPrune(alpha=1.0), middle, scores(3), 8)
    assert {7, 1, 6, 8, 13} <= found


def test_neither_a_constant_nor_a_scale_changes_the_choice_and_ties_go_to_low_numbers() -> None:
    middle, last = scores(10), scores(11)
    plain = chosen(HiPrune(alpha=0.5), middle, last, 15)
    assert chosen(HiPrune(alpha=0.5), middle * 3 + 1, last * 2 + 5, 15) == plain
    # Below any number that stands for "chosen already".
    assert chosen(HiPrune(alpha=0.5), middle, last - 5, 15) == plain
    even = torch.ones(36)
    # The anchor 0 with its two neighbours, then the lowest numbers.
    assert chosen(HiPrune(alpha=0.5), even, even, 10) == {0, 1, 6, 2, 3, 4, 5, 7, 8, 9}


def test_neighbours_that_were_cut_off_are_not_kept() -> None:
    places = torch.arange(12, 30)  # rows 2 to 4 of six
    middle, last = torch.zeros(18), scores(12, 18)
    middle[0] = 1  # place 12, whose upper neighbour 6 is gone
    scored = (middle, last, torch.zeros(18))
    found = HiPrune(alpha=0.5).select(*scored, places, grid=GRID, budget=10)
    assert {0, 1, 6} <= set(found.tolist())
    assert len(found) == 10


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hiprune_reads_the_object_layer_and_the_layer_that_feeds_the_projector(
    architecture: Any,
) -> None:
    method = HiPrune(alpha=0.5, keep_ratio=0.4)
    model = model_of(architecture)
    middle_layer = {"llava": 2, "llava-next": 2, "qwen2.5-vl": 2}[architecture]
    last_layer = {"llava": 5, "llava-next": 5, "qwen2.5-vl": 4}[architecture]
    assert method.plan(model).watch.received == (middle_layer, last_layer)
    seen, found = reduced(method, architecture)
    layout, received = seen.layout, seen.encoded.received
    assert isinstance(found, Tensor)
    expected: list[int] = []
    count = layout.num_tiles
    for tile in range(count):
        own = (layout.patch_tile == tile).nonzero().flatten()
        share = int((layout.patch_tile[found] == tile).sum())
        places = layout.patch_place[own]
        picked = method.select(
            received[middle_layer][own],
            received[last_layer][own],
            torch.zeros(len(own)),
            places,
            grid=layout.grid,
            budget=share,
        )
        expected += own[picked].tolist()
    assert found.tolist() == sorted(expected)
    assert seen.encoded.watch_flops > 0


def test_the_cls_score_is_the_cls_row_and_needs_one() -> None:
    method = HiPrune(score="cls", parts="registers", keep_ratio=0.25)
    seen, found = reduced(method, "llava", "square")
    assert isinstance(found, Tensor)
    assert found.tolist() == sorted(top_k(seen.encoded.cls[5].mean(0), 9).tolist())
    with pytest.raises(Unsupported, match=r"needs a \[CLS\] token"):
        answer_of(method, "qwen2.5-vl")
    with pytest.raises(Unsupported, match="layers 1 to 5 are run"):
        answer_of(HiPrune(object_layer=6), "llava")


def test_hiprune_keeps_every_separator_and_equal_counts_of_equal_tiles() -> None:
    plain = answer_of(FullTokens(), "llava-next", "wide").work
    work = answer_of(HiPrune(keep_ratio=1 / 3), "llava-next", "wide").work
    assert work.separator_tokens == plain.separator_tokens == 6
    seen, found = reduced(HiPrune(keep_ratio=1 / 3), "llava-next", "wide")
    assert isinstance(found, Tensor)
    assert torch.bincount(seen.layout.patch_tile[found]).tolist() == [12, 12, 12]


# --- FastV ---


def test_fastv_keeps_what_the_last_token_attends_to_most() -> None:
    method = FastV(keep_ratio=0.25)
    stage = method.plan(model_of("llava")).stages[0]
    asked: list[tuple[list[int], Tensor]] = []

    class Recorder(StageView):
        def attention_from(self, rows: Tensor, **settings: Any) -> Tensor:
            found = super().attention_from(rows, **settings)
            asked.append((rows.tolist(), found))
            return found

    picked = []

    def choose(view: StageView) -> Any:
        view.__class__ = Recorder
        picked.append((stage.choose(view), view.tokens.patches, len(view.tokens)))
        return picked[-1][0]

    from dataclasses import replace

    from models.base import Decoding
    from models.vision_language import VisualPlan

    plan = VisualPlan(stages=(replace(stage, choose=choose),))
    model_of("llava").run(question("square"), Decoding(max_new_tokens=2), plan)
    (kept, patches, count), ((rows, attention),) = picked[0], asked
    assert stage.after == 2
    assert rows == [count - 1]
    assert kept.tolist() == sorted(top_k(attention[patches], 9).tolist())


def test_fastvs_queries_differ_and_both_keep_their_numbers() -> None:
    last, average = (first_logits(FastV(query=query)) for query in ("last", "average"))
    assert not torch.equal(last, average)
    assert answer_of(FastV()).work.positions == "original"
    assert answer_of(FastV(positions="compact")).work.positions == "compact"


def test_fastv_behind_the_last_layer_is_the_full_model() -> None:
    plain = first_logits(FullTokens())
    assert torch.equal(first_logits(FastV(after=6, keep_ratio=0.1)), plain)
    with pytest.raises(Unsupported, match="layers 1 to 6"):
        answer_of(FastV(after=7))


def test_fastvs_average_budget_is_the_average_over_layers() -> None:
    for keep_ratio in (0.5, 0.75):
        work = answer_of(FastV(keep_ratio=keep_ratio, budget_of="average"), shape="square").work
        assert work.mean_visual_tokens == pytest.approx(keep_ratio * 36, abs=1)
    with pytest.raises(Unsupported, match=r"exceed an average of 0\.3"):
        answer_of(FastV(keep_ratio=0.3, budget_of="average"))


def test_fastv_counts_the_row_that_it_reads() -> None:
    work = answer_of(FastV(), shape="square").work
    tokens = work.layer_tokens[0]
    # One query of 48 x 48 weights; its scores in 4 heads of 12 numbers, and one addition each.
    assert work.selector_flops == 2 * 48 * 48 + 4 * tokens * (2 * 12 + 1)


# --- VisionZip ---


def zipped_by_hand(
    received: Tensor, keys: Tensor, features: Tensor, dominant: int, contextual: int
) -> list[tuple[int, Tensor]]:
    count = len(received)
    kept = sorted(range(count), key=lambda i: (-float(received[i]), i))[:dominant]
    rest = [i for i in range(count) if i not in kept]
    step = max(1, len(rest) // contextual) if contextual else 1
    targets = [rest[n] for n in range(0, len(rest), step)][:contextual]
    assigned: dict[int, list[int]] = {target: [] for target in targets}
    for i in rest:
        if i not in targets and targets:
            likeness = [
                float(torch.nn.functional.cosine_similarity(keys[i], keys[t], dim=0))
                for t in targets
            ]
            assigned[targets[likeness.index(max(likeness))]].append(i)
    made = [(i, features[i]) for i in kept]
    for target, members in assigned.items():
        added = features[members].mean(0) if members else 0
        made.append((target, features[target] + added))
    return sorted(made, key=lambda each: each[0])


@pytest.mark.parametrize(("dominant", "contextual"), [(6, 3), (5, 0), (0, 4), (20, 4), (3, 11)])
def test_visionzip_merges_as_written_out_by_hand(dominant: int, contextual: int) -> None:
    draw = torch.Generator().manual_seed(dominant)
    received, keys, features = (torch.randn(24, n, generator=draw) for n in (1, 4, 5))
    expected = zipped_by_hand(received[:, 0], keys, features, dominant, contextual)
    found = merge(received[:, 0], keys, features, dominant=dominant, contextual=contextual)
    assert found.anchors.tolist() == [place for place, _ in expected]
    assert torch.allclose(found.features, torch.stack([row for _, row in expected]), atol=1e-5)


def test_visionzip_without_contextual_tokens_is_the_top_of_cls_attention() -> None:
    seen, found = reduced(VisionZip(keep_ratio=0.25, contextual_share=0.0), "llava", "square")
    assert isinstance(found, Merged)
    assert found.anchors.tolist() == sorted(top_k(seen.encoded.cls[5].sum(0), 9).tolist())
    assert found.features is not None
    assert torch.equal(found.features, seen.encoded.features[found.anchors])


@pytest.mark.parametrize(("budget", "contextual"), [(192, 30), (128, 20), (64, 10)])
def test_visionzips_share_of_merged_tokens_is_the_authors(budget: int, contextual: int) -> None:
    assert round(budget * VisionZip().contextual_share) == contextual


def test_visionzips_reference_keeps_cls_beyond_the_budget() -> None:
    plain = answer_of(VisionZip(keep_ratio=0.25), shape="square").work
    with_cls = answer_of(VisionZip(keep_ratio=0.25, keep_cls=True), shape="square").work
    assert (plain.kept_tokens, with_cls.kept_tokens) == (9, 10)
    seen, found = reduced(VisionZip(keep_ratio=0.25, keep_cls=True), "llava", "square")
    assert isinstance(found, Merged)
    assert found.features is not None
    assert seen.encoded.cls_features is not None
    assert torch.equal(found.features[:1], seen.encoded.cls_features)
    for architecture, reason in (("llava-next", "images of one tile"), ("qwen2.5-vl", "has none")):
        with pytest.raises(Unsupported, match=reason):
            answer_of(VisionZip(keep_cls=True), architecture)


def test_without_cls_visionzip_reads_the_attention_that_tokens_receive() -> None:
    seen, found = reduced(VisionZip(keep_ratio=0.25, contextual_share=0.0), "qwen2.5-vl")
    assert isinstance(found, Merged)
    count = len(found.anchors)
    assert found.anchors.tolist() == sorted(top_k(seen.encoded.received[4], count).tolist())
