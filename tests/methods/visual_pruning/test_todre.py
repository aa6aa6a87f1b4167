"""ToDRE: the diverse choice by its pivot, and visual tokens that leave when attention has faded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from methods.visual_pruning.common import greedy_maxmin, greedy_maxsum, normalised
from methods.visual_pruning.full_tokens import FullTokens
from methods.visual_pruning.todre import ToDRE, attention_shares, select
from models.base import Decoding, Unsupported
from models.vision_language import VisualPlan
from models.vision_language_decoder import PATCH, SEPARATOR, TEXT_AFTER, TEXT_BEFORE, Stage
from tests.methods.visual_pruning.models import (
    ARCHITECTURES,
    answer_of,
    first_logits,
    model_of,
    question,
    reduced,
)


@pytest.mark.parametrize("selection", ["kcenter", "maxsum"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_choice_is_greedy_in_decoder_space_and_holds_its_pivot(
    architecture: Any, selection: Any
) -> None:
    method = ToDRE(keep_ratio=0.25, selection=selection)
    seen, found = reduced(method, architecture)
    assert isinstance(found, Tensor)
    encoded = seen.encoded
    if architecture == "qwen2.5-vl":
        pivot = encoded.received[4].argmax()
    else:
        scores = encoded.cls[5].mean(0)
        thumbnail = (seen.layout.patch_tile == 0).nonzero().flatten()
        pivot = thumbnail[scores[thumbnail].argmax()]
    greedy = greedy_maxmin if selection == "kcenter" else greedy_maxsum
    expected = greedy(normalised(seen.projected), pivot, method.budget(seen.num_patches))
    assert found.tolist() == sorted(expected.tolist())
    assert int(pivot) in found.tolist()
    assert found.tolist() == sorted(set(found.tolist()))


def test_a_tokens_length_does_not_change_the_choice() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 6, generator=draw)
    scales = torch.rand(20, 1, generator=draw) + 0.1
    for selection in ("kcenter", "maxsum"):
        plain, scaled = (
            select(normalised(each), torch.tensor(2), 7, selection)  # type: ignore[arg-type]
            for each in (rows, rows * scales)
        )
        assert plain.tolist() == scaled.tolist()


def test_pivots_are_what_they_say() -> None:
    firsts = {}
    for pivot in ("cls", "received", "medoid", "random"):
        method = ToDRE(keep_ratio=1 / 36, pivot=pivot)
        seen, found = reduced(method, "llava", "square")
        assert isinstance(found, Tensor)
        (firsts[pivot],) = found.tolist()
        if pivot == "received":
            assert firsts[pivot] == int(seen.encoded.received[5].argmax())
        if pivot == "medoid":
            vectors = normalised(seen.projected)
            mean = torch.nn.functional.cosine_similarity(vectors, vectors.mean(0), dim=1)
            assert firsts[pivot] == int(mean.argmax())
    assert len(set(firsts.values())) > 1
    with pytest.raises(Unsupported, match=r"pivot=cls needs a \[CLS\]"):
        answer_of(ToDRE(pivot="cls"), "qwen2.5-vl")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_second_stage_never_acts_at_tau_0_and_always_at_2(architecture: Any) -> None:
    settings = {"keep_ratio": 0.25, "check_layer": 4}
    never = answer_of(ToDRE(**settings, tau=0.0), architecture)
    always = answer_of(ToDRE(**settings, tau=2.0), architecture)
    alone = answer_of(ToDRE(**settings, stage2=False), architecture)
    assert never.token_ids == alone.token_ids
    assert never.work.layer_tokens == alone.work.layer_tokens
    first = never.work.layer_tokens[0]
    visual = never.work.kept_tokens + never.work.separator_tokens
    # Text alone behind layer 4; what comes after it is counted by the answer's own tokens.
    assert always.work.layer_tokens == (*[first] * 4, *[first - visual] * 2)
    assert always.trace.notes["dropped_after"] == 4
    assert never.trace.notes["dropped_after"] == 0
    assert always.work.decode_flops < never.work.decode_flops


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropping_tokens_that_nobody_attends_to_changes_nothing(architecture: Any) -> None:
    """In the last two layers visual tokens are hidden by a mask: with and without them is the same.

    The mask stands in for a model whose deep layers ignore the image; the words keep their places.
    """
    model = model_of(architecture)
    method = ToDRE(keep_ratio=0.25, check_layer=4, tau=2.0)
    dropped = first_logits(method, architecture)[0]
    plan = method.plan(model)
    hidden: dict[str, Any] = {}

    def look(view: Any) -> None:
        hidden["tokens"] = view.tokens

    stage = Stage(after=4, choose=look)
    with_all = VisualPlan(watch=plan.watch, reduce=plan.reduce, stages=(stage,), separators="rows")
    model.run(question(), Decoding(max_new_tokens=1), with_all)
    tokens = hidden["tokens"]
    is_text = (tokens.kind == TEXT_BEFORE) | (tokens.kind == TEXT_AFTER)
    language = model.module.model.language_model
    ids = tokens.positions.values
    with torch.inference_mode():
        states = tokens.states[None]
        rotary = language.rotary_emb(states, ids if len(ids) == 1 else ids[:, None])
        visible = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril() & is_text
        visible |= torch.eye(len(tokens), dtype=torch.bool)
        for layer in language.layers[4:]:
            states = layer(states, attention_mask=visible[None, None], position_embeddings=rotary)
        expected = model.module.lm_head(language.norm(states))[0, -1]
    assert torch.allclose(dropped, expected, atol=2e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_shares_are_those_of_the_eager_maps(architecture: Any) -> None:
    from runner.conformance_vision import tiny_vision
    from tests.models.test_vision_language import inputs_of

    model, eager = model_of(architecture), tiny_vision(architecture, "eager")
    prompt = question()
    inputs, _ = inputs_of(eager, prompt)
    with torch.inference_mode():
        attention = eager.module(**inputs, output_attentions=True).attentions[2][0].mean(0)
    found = {}

    def look(view: Any) -> None:
        found["shares"], found["kind"] = attention_shares(view), view.tokens.kind

    plan = VisualPlan(stages=(Stage(after=3, choose=look),))
    model.run(prompt, Decoding(max_new_tokens=1), plan)
    kind, shares = found["kind"], found["shares"]
    visual = (kind == PATCH) | (kind == SEPARATOR)
    tv = attention[kind == TEXT_AFTER][:, visual].sum(1).mean()
    before = attention[visual][:, kind == TEXT_BEFORE].sum(1).mean()
    assert shares.text_on_image == pytest.approx(float(tv), abs=1e-5)
    assert shares.image_on_text_before == pytest.approx(float(before), abs=1e-5)
    assert shares.image_on_text_after == 0
    for share in (shares.text_on_image, shares.image_on_text_before):
        assert 0 < share < 1


def test_one_share_or_both_must_have_faded() -> None:
    notes = answer_of(ToDRE(keep_ratio=0.25, check_layer=4)).trace.notes
    low, high = sorted((float(notes["alpha_tv"]), float(notes["alpha_vt_before"])))
    assert low < high
    between = (low + high) / 2
    text_first = float(notes["alpha_tv"]) == low
    one, both = (
        answer_of(ToDRE(keep_ratio=0.25, check_layer=4, tau=between, require_both=both))
        for both in (False, True)
    )
    assert both.trace.notes["dropped_after"] == 0
    assert one.trace.notes["dropped_after"] == (4 if text_first else 0)


def test_the_layer_is_seven_eighths_deep_or_found_by_looking_behind_each() -> None:
    assert list(ToDRE().layers(32)) == [28]
    assert list(ToDRE().layers(8)) == [7]
    assert list(ToDRE(check_layer=3).layers(8)) == [3]
    assert list(ToDRE(adaptive=True).layers(32)) == list(range(16, 32))
    adaptive = answer_of(ToDRE(adaptive=True, tau=2.0))
    assert adaptive.trace.notes["dropped_after"] == 3
    assert len(set(adaptive.work.layer_tokens[3:])) == 1
    late = answer_of(ToDRE(adaptive=True, tau=0.0))
    assert late.trace.notes["checked_layer"] == 5
    assert late.trace.notes["dropped_after"] == 0


def test_a_stage_alone_leaves_the_other_ones_part_untouched() -> None:
    full = answer_of(FullTokens()).work
    second = answer_of(ToDRE(stage1=False, tau=2.0, check_layer=5)).work
    assert second.kept_tokens == full.visual_tokens
    assert second.mean_visual_tokens == pytest.approx(full.visual_tokens * 5 / 6)
    neither = first_logits(ToDRE(stage1=False, stage2=False))
    assert torch.equal(neither, first_logits(FullTokens()))


def test_separators_of_lines_without_a_token_leave_with_them() -> None:
    method = ToDRE(keep_ratio=0.05, stage2=False)
    seen, found = reduced(method, "llava-next")
    assert isinstance(found, Tensor)
    layout = seen.layout
    lines = set(layout.line[layout.patches[found]].tolist())
    separators = layout.line[layout.tile < 0].tolist()
    expected = sum(line in lines for line in separators)
    assert 0 < expected < len(separators)
    assert answer_of(method, "llava-next").work.separator_tokens == expected


def test_words_keep_their_numbers_when_the_image_leaves() -> None:
    """`compact` numbers the first stage's tokens; the second stage numbers nothing anew."""
    model = model_of("llava")
    answer_of(ToDRE(keep_ratio=0.25, check_layer=4, tau=2.0))
    following = model.decoder._next
    assert len(set(following)) == 1


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="tau must be a share"):
        ToDRE(tau=-0.1)
    with pytest.raises(ValueError, match="selection must be one of kcenter, maxsum"):
        ToDRE(selection="kmeans")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ValueError, match="check_layer must be a whole number of at least 1"):
        ToDRE(check_layer=0)
