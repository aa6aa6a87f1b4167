"""The phases of a vision-language model against transformers' own forward, one by one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from models.base import Decoding, InvalidOutput, Unsupported, VisualPrompt
from models.loading import load
from models.vision_language import Merged, VisionLanguage, VisualPlan
from models.vision_language_decoder import SEPARATOR, Stage, StageView
from models.vision_language_towers import Pixels, Watch, cut_tiles
from runner.conformance_vision import ARCHITECTURES, Architecture, picture, tiny_vision

model_of = functools.cache(tiny_vision)
# Wide, tall with padding that is cut off, and of one tile.
SHAPES: dict[str, tuple[int, int]] = {"wide": (24, 48), "padded": (64, 40), "square": (24, 24)}
LONG = Decoding(max_new_tokens=7, ignore_eos=True)


def prompt(text: str = "What is it?", shape: str = "padded", **settings: Any) -> VisualPrompt:
    return VisualPrompt(image=picture(text, *SHAPES[shape]), text=text, **settings)


def inputs_of(model: VisionLanguage, question: VisualPrompt) -> tuple[dict[str, Any], Pixels]:
    """Return what transformers' own forward wants for a prompt."""
    pixels = model.tower.prepare(question.image, 1)
    count = len(model.tower.encode(pixels, Watch()).layout)
    ids = torch.tensor([model.prompt_ids(question.text, count)])
    found: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kind = type(model.module).__name__
    found["pixel_values"] = pixels.values[None] if "Next" in kind else pixels.values
    if "Next" in kind:
        found["image_sizes"] = torch.tensor([pixels.size])
    if "Qwen" in kind:
        found["image_grid_thw"] = pixels.grid_thw
        found["mm_token_type_ids"] = (ids == model.module.config.image_token_id).int()
    return found, pixels


def recorded_logits(model: VisionLanguage, question: VisualPrompt, plan: VisualPlan) -> Tensor:
    """Return the logits of each step of an answer, (steps, vocab)."""
    rows: list[Tensor] = []
    plain = type(model.decoder)._logits

    def record(states: Tensor) -> Tensor:
        rows.append(plain(model.decoder, states))
        return rows[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.decoder, "_logits", record)
        model.run(question, LONG, plan)
    return torch.cat(rows)


# --- the empty plan is the model ---


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_tokens_give_the_logits_of_generate_to_the_bit(
    architecture: Architecture, shape: str, attention: str
) -> None:
    model = model_of(architecture, attention)
    question = prompt(shape=shape)
    inputs, _ = inputs_of(model, question)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.module.generation_config, "eos_token_id", None)
        output = model.module.generate(
            **inputs,
            max_new_tokens=LONG.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    answer = model.answer(question, LONG)
    assert list(answer.token_ids) == output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    ours = recorded_logits(model, question, VisualPlan())
    assert torch.equal(ours, torch.cat(output.logits))
    assert ours.std() > 0.2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_stand_in_the_order_of_the_models_own_features(
    architecture: Architecture, shape: str
) -> None:
    model = model_of(architecture)
    inputs, pixels = inputs_of(model, prompt(shape=shape))
    names = [name for name in inputs if name not in ("input_ids", "attention_mask")]
    names.remove("mm_token_type_ids") if "mm_token_type_ids" in names else None
    with torch.inference_mode():
        theirs = model.module.get_image_features(**{n: inputs[n] for n in names}).pooler_output
        encoded = model.tower.encode(pixels, Watch())
        ours = model.tower.project(encoded.features)
    theirs = torch.cat(list(theirs))
    layout = encoded.layout
    assert len(theirs) == len(layout)
    assert torch.allclose(theirs[layout.patches], ours, atol=1e-5)
    separators = theirs[layout.tile < 0]
    if architecture == "llava-next":
        assert len(separators)
        assert model.tower.separator is not None
        assert torch.equal(separators, model.tower.separator.expand_as(separators))
    else:
        assert not len(separators)


def test_padding_of_a_tiled_image_is_cut_off_and_every_line_of_crops_ends_in_a_separator() -> None:
    model = model_of("llava-next")
    _, pixels = inputs_of(model, prompt(shape="padded"))
    layout = model.tower.encode(pixels, Watch()).layout
    assert layout.num_tiles == 5
    assert tuple(layout.grid) == (6, 6)
    per_tile = torch.bincount(layout.patch_tile)
    assert per_tile[0] == 36
    assert per_tile[1:].sum() < 4 * 36
    lines = layout.line[layout.tile < 0]
    assert lines.tolist() == list(range(6, 18))  # the thumbnail's six lines have none
    for line in lines:
        members = (layout.line == line).nonzero().flatten()
        assert int(layout.tile[members[-1]]) == -1
        rows = layout.place[members[:-1]] // 6 + 6 * (layout.tile[members[:-1]] > 2)
        assert set(rows.tolist()) == {int(line) - 6}


def test_crops_are_cut_as_the_recipe_of_tiny_vlm_cuts_them() -> None:
    from models.embedded.scenes.raster_torch import tiles

    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    theirs = tiles(torch.from_numpy(image).permute(2, 0, 1)[None])[0]
    ours = torch.stack([torch.from_numpy(each).permute(2, 0, 1) for each in cut_tiles(image, 2)])
    assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="cannot be cut into 5 x 5"):
        cut_tiles(image, 5)


def test_crops_make_five_images_of_one_prompt() -> None:
    model = model_of("llava")
    question = VisualPrompt(image=picture("x", 48, 48), text="What?", crops=2)
    pixels = model.tower.prepare(question.image, 2)
    ids = torch.tensor([model.prompt_ids("What?", 5 * 36)])
    with torch.inference_mode():
        theirs = model.module(input_ids=ids, pixel_values=pixels.values, logits_to_keep=1).logits
    assert torch.equal(recorded_logits(model, question, VisualPlan())[:1], theirs[0])
    answer = model.answer(question, LONG)
    assert answer.work.visual_tokens == 180
    for other in ("llava-next", "qwen2.5-vl"):
        with pytest.raises(Unsupported, match="crops must be 1"):
            model_of(other).answer(question, LONG)


# --- attention summaries ---


@pytest.mark.parametrize("block", [7, 2**21])
def test_attention_sums_are_those_of_the_whole_map(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models import vision_language_attention as attention

    monkeypatch.setattr(attention, "_BLOCK_WEIGHTS", block)
    draw = torch.Generator().manual_seed(0)
    queries = torch.randn(4, 9, 8, generator=draw)
    keys = torch.randn(2, 13, 8, generator=draw)
    last = torch.arange(4, 13)
    scores = queries @ keys.repeat_interleave(2, 0).transpose(1, 2) * 0.7
    whole = attention.attention_sums(queries, keys, scale=0.7)
    assert torch.allclose(whole, scores.softmax(-1).sum(1), atol=1e-5)
    scores = scores.masked_fill(torch.arange(13) > last[:, None], -torch.inf)
    causal = attention.attention_sums(queries, keys, scale=0.7, last_visible=last)
    assert torch.allclose(causal, scores.softmax(-1).sum(1), atol=1e-5)


@pytest.mark.parametrize("architecture", ["llava", "llava-next"])
def test_a_clip_towers_summaries_equal_its_eager_attention(architecture: Architecture) -> None:
    model, eager = model_of(architecture), model_of(architecture, "eager")
    _, pixels = inputs_of(model, prompt(shape="wide"))
    with torch.inference_mode():
        watch = Watch(received=(2, 5), cls=(5,), keys=(3,))
        found = model.tower.encode(pixels, watch)
        output = eager.module.model.vision_tower(
            pixels.values, output_attentions=True, output_hidden_states=True
        )
        layout = found.layout
        for layer in (2, 5):
            maps = output.attentions[layer - 1]  # (tiles, heads, 37, 37)
            expected = maps.mean((1, 2))[:, 1:][layout.patch_tile, layout.patch_place]
            assert torch.allclose(found.received[layer], expected, atol=1e-5)
        rows = output.attentions[4][:, :, 0, 1:].transpose(1, 2)
        expected = rows[layout.patch_tile, layout.patch_place].T
        assert torch.allclose(found.cls[5], expected, atol=1e-5)
        block = eager.module.model.vision_tower.encoder.layers[2]
        keys = block.self_attn.k_proj(block.layer_norm1(output.hidden_states[2]))
        keys = keys.unflatten(-1, (4, 8)).mean(2)[:, 1:][layout.patch_tile, layout.patch_place]
        assert torch.allclose(found.keys[3], keys, atol=1e-5)
    assert found.cls_features is not None
    assert found.cls_features.shape[0] == layout.num_tiles
    assert set(found.received) == {2, 5}
    assert set(found.cls) == {5}
    assert set(found.keys) == {3}


def test_qwens_summaries_equal_its_eager_attention_put_back_into_the_order_of_the_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, eager = model_of("qwen2.5-vl"), model_of("qwen2.5-vl", "eager")
    _, pixels = inputs_of(model, prompt(shape="padded"))
    plain = modeling_qwen2_5_vl.eager_attention_forward
    seen: list[tuple[int, Tensor]] = []

    def record(module: Any, *args: Any, **settings: Any) -> Any:
        output, weights = plain(module, *args, **settings)
        seen.append((id(module), weights[0]))
        return output, weights

    with torch.inference_mode():
        found = model.tower.encode(pixels, Watch(received=(1, 2), keys=(2,)))
        monkeypatch.setattr(modeling_qwen2_5_vl, "eager_attention_forward", record)
        eager.tower.encode(pixels, Watch())
    assert pixels.grid_thw is not None
    _, height, width = pixels.grid_thw[0].tolist()
    rows, columns = height // 2, width // 2
    # The windows, written out: 3 x 3 groups each, row by row, cut off at the right and bottom.
    order = [
        (y, x)
        for top in range(0, rows, 3)
        for left in range(0, columns, 3)
        for y in range(top, min(top + 3, rows))
        for x in range(left, min(left + 3, columns))
    ]
    for layer in (1, 2):
        block = eager.module.model.visual.blocks[layer - 1]
        maps = [weights for module, weights in seen if module == id(block.attn)]
        assert (len(maps) > 1) == (layer == 1)
        received = torch.cat([weights.sum(1).mean(0) for weights in maps]) / (4 * rows * columns)
        expected = torch.zeros(rows, columns)
        for number, (y, x) in enumerate(order):
            expected[y, x] = received[4 * number : 4 * number + 4].mean()
        assert torch.allclose(found.received[layer], expected.flatten(), atol=1e-6)
    assert found.keys[2].shape == (rows * columns, 8)
    with pytest.raises(Unsupported, match=r"no \[CLS\]"):
        model.tower.encode(pixels, Watch(cls=(1,)))


def test_layers_behind_the_one_that_feeds_the_projector_cannot_be_watched() -> None:
    model = model_of("llava")
    assert (model.facts.vision_layers, model.facts.feature_layer) == (6, 5)
    _, pixels = inputs_of(model, prompt(shape="square"))
    with pytest.raises(Unsupported, match="layers 1 to 5 are run"):
        model.tower.encode(pixels, Watch(received=(6,)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_stage_sees_the_decoders_own_attention(architecture: Architecture) -> None:
    model, eager = model_of(architecture), model_of(architecture, "eager")
    question = prompt()
    inputs, _ = inputs_of(eager, question)
    with torch.inference_mode():
        maps = eager.module(**inputs, output_attentions=True).attentions
    checked = []

    def look(view: StageView) -> None:
        last = torch.tensor([len(view.tokens) - 1])
        text = (view.tokens.kind == 3).nonzero().flatten()
        for rows in (last, text):
            for layer, number in (("this", 2), ("next", 3)):
                found = view.attention_from(rows, layer=layer)  # type: ignore[arg-type]
                expected = maps[number - 1][0][:, rows].mean((0, 1))
                assert torch.allclose(found, expected, atol=1e-5)
                checked.append(float(found.sum()))
        assert view.flops > 0

    model.run(question, LONG, VisualPlan(stages=(Stage(after=2, choose=look),)))
    assert len(checked) == 4
    assert checked == pytest.approx([1.0] * 4, abs=1e-4)


# --- tokens leave ---


def half(view: StageView) -> Tensor:
    return torch.arange(0, len(view.tokens.patches), 2)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_that_left_behind_a_layer_are_as_if_hidden_from_the_layers_behind_it(
    architecture: Architecture, positions: Any
) -> None:
    """Two stages against every layer run on all tokens, with masks and positions of its own."""
    model = model_of(architecture)
    question = prompt()
    plan = VisualPlan(
        stages=(Stage(after=2, choose=half), Stage(after=4, choose=half)),
        positions=positions,
        separators="rows",
    )
    ours = recorded_logits(model, question, plan)
    answer = model.run(question, LONG, plan)
    inputs, pixels = inputs_of(model, question)
    ids = [*inputs["input_ids"][0].tolist(), *answer.token_ids[:-1]]
    layout = model.tower.encode(pixels, Watch()).layout
    image = (inputs["input_ids"][0] == model.module.config.image_token_id).nonzero().flatten()
    own = model.positions(inputs["input_ids"][0].tolist(), pixels)
    later = own.max() + 1 + torch.arange(len(answer.token_ids) - 1)
    own = torch.cat([own, later.expand(len(own), -1)], 1)
    stays = torch.ones(len(ids), dtype=torch.bool)
    alive = layout.patches
    language = model.module.model.language_model
    with torch.inference_mode():
        # The embeddings of a whole prompt, as the decoder gets them.
        encoded = model.tower.encode(pixels, Watch())
        states = model.module.get_input_embeddings()(torch.tensor(ids))
        states[image[layout.patches]] = model.tower.project(encoded.features)
        if model.tower.separator is not None:
            states[image[layout.tile < 0]] = model.tower.separator
        states = states[None]
        for number, layer in enumerate(language.layers):
            if number in (2, 4):
                alive = alive[::2]
                gone = torch.ones(len(layout), dtype=torch.bool)
                gone[alive] = False
                lines = layout.line[alive]
                gone &= ~((layout.tile < 0) & torch.isin(layout.line, lines))
                stays[image[gone]] = False
            numbers = own
            if positions == "compact" and not stays.all():
                numbers = (stays.cumsum(0) - 1).expand(len(own), -1)
            rotary = language.rotary_emb(states, numbers if len(own) == 1 else numbers[:, None])
            visible = torch.ones(len(ids), len(ids), dtype=torch.bool).tril() & stays[None]
            # A row without a column would be NaN; nobody reads what left.
            visible |= torch.eye(len(ids), dtype=torch.bool)
            states = layer(states, attention_mask=visible[None, None], position_embeddings=rotary)
        expected = model.module.lm_head(language.norm(states))[0, -len(answer.token_ids) :]
    assert torch.allclose(ours, expected, atol=2e-5)
    plain = recorded_logits(model, question, VisualPlan())
    assert not torch.allclose(plain[0], ours[0], atol=1e-3)
    work = answer.work
    lengths = [len(inputs["input_ids"][0])] * 2
    assert list(work.layer_tokens[:2]) == lengths
    assert len(set(work.layer_tokens)) == 3
    assert work.positions == positions
    assert work.kv_cache_bytes == model.decoder.kv_token_bytes * sum(work.layer_tokens)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_tokens_left_out_in_front_are_as_if_never_there(
    architecture: Architecture, positions: Any
) -> None:
    model = model_of(architecture)
    question = prompt()
    plan = VisualPlan(reduce=lambda seen: torch.arange(1, seen.num_patches, 3), positions=positions)
    ours = recorded_logits(model, question, plan)[0]
    inputs, pixels = inputs_of(model, question)
    ids = inputs["input_ids"][0]
    with torch.inference_mode():
        encoded = model.tower.encode(pixels, Watch())
        layout = encoded.layout
        states = model.module.get_input_embeddings()(ids)
        image = (ids == model.module.config.image_token_id).nonzero().flatten()
        states[image[layout.patches]] = model.tower.project(encoded.features)
        if model.tower.separator is not None:
            states[image[layout.tile < 0]] = model.tower.separator
        stays = torch.ones(len(ids), dtype=torch.bool)
        stays[image[layout.patches]] = False
        stays[image[layout.patches[1::3]]] = True
        numbers = model.positions(ids.tolist(), pixels)[:, stays]
        if positions == "compact":
            numbers = torch.arange(int(stays.sum())).expand(len(numbers), -1)
        output = model.module.model.language_model(
            inputs_embeds=states[stays][None],
            position_ids=numbers if len(numbers) == 1 else numbers[:, None],
            # Without it, gaps in the positions would be read as packed sequences.
            attention_mask=torch.ones(1, int(stays.sum())),
        )
        theirs = model.module.lm_head(output.last_hidden_state)[0, -1]
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_auto_positions_are_compact_for_rope_and_original_for_three_axes() -> None:
    plan = VisualPlan(reduce=lambda seen: torch.arange(0, seen.num_patches, 2))
    modes = {
        name: model_of(name).run(prompt(), LONG, plan).work.positions for name in ARCHITECTURES
    }
    assert modes == {"llava": "compact", "llava-next": "compact", "qwen2.5-vl": "original"}


@pytest.mark.parametrize(("policy", "kept"), [("all", 12), ("rows", 1), ("none", 0)])
def test_separators_stay_by_their_policy(policy: Any, kept: int) -> None:
    model = model_of("llava-next")
    # The thumbnail's first patch and the first one of the mosaic.
    plan = VisualPlan(reduce=lambda seen: torch.tensor([0, 36]), separators=policy)
    work = model.run(prompt(shape="padded"), LONG, plan).work
    assert (work.kept_tokens, work.separator_tokens) == (2, kept)


@pytest.mark.parametrize(
    "chosen", [[0, 1, 2], [0, 1, 1, 3], [3, 2, 1, 0], [-1, 0, 1, 2], [0, 1, 2, 36]]
)
def test_a_choice_that_is_not_the_budget_makes_the_answer_invalid(chosen: Sequence[int]) -> None:
    model = model_of("llava")
    plan = VisualPlan(reduce=lambda seen: torch.tensor(chosen), wanted=lambda tokens: 4)
    with pytest.raises(InvalidOutput, match=r"ascending numbers|the budget is 4"):
        model.run(prompt(shape="square"), LONG, plan)
    stage = Stage(after=2, choose=lambda view: torch.tensor(chosen), wanted=lambda tokens: 4)
    with pytest.raises(InvalidOutput, match=r"ascending numbers|the budget is 4"):
        model.run(prompt(shape="square"), LONG, VisualPlan(stages=(stage,)))


def test_a_stage_behind_the_last_layer_changes_nothing_and_a_later_one_is_refused() -> None:
    model = model_of("llava")
    question = prompt(shape="square")
    plan = VisualPlan(stages=(Stage(after=6, choose=half),))
    assert torch.equal(
        recorded_logits(model, question, plan), recorded_logits(model, question, VisualPlan())
    )
    with pytest.raises(Unsupported, match="layers 1 to 6"):
        model.run(question, LONG, VisualPlan(stages=(Stage(after=7, choose=half),)))


def test_a_merged_token_in_front_must_come_first() -> None:
    model = model_of("llava")

    def misplaced(seen: Any) -> Merged:
        return Merged(torch.tensor([2, -1, 5]), embeddings=seen.projected[:3])

    with pytest.raises(InvalidOutput, match="ascending numbers"):
        model.run(prompt(shape="square"), LONG, VisualPlan(reduce=misplaced))


def test_an_answer_that_would_pass_the_window_of_a_layer_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("llava")
    question = prompt(shape="square")
    tokens = model.answer(question, LONG).work.layer_tokens[0]
    # The prompt fits by itself, and so does an answer of two tokens.
    monkeypatch.setattr(model.decoder, "_window", tokens + 3)
    model.answer(question, Decoding(max_new_tokens=2, ignore_eos=True))
    with pytest.raises(Unsupported, match="prompt and answer exceed the decoder's attention win"):
        model.answer(question, LONG)


def test_merged_tokens_stand_in_the_place_of_their_anchors() -> None:
    """Every second patch, given as features and as embeddings, is the same as choosing it."""
    model = model_of("llava-next")
    question = prompt(shape="padded")
    plain = VisualPlan(reduce=lambda seen: torch.arange(0, seen.num_patches, 2))
    expected = recorded_logits(model, question, plain)

    def as_features(seen: Any) -> Merged:
        anchors = torch.arange(0, seen.num_patches, 2)
        return Merged(anchors, features=seen.encoded.features[anchors])

    def as_embeddings(seen: Any) -> Merged:
        anchors = torch.arange(0, seen.num_patches, 2)
        return Merged(anchors, embeddings=seen.projected[anchors])

    for reduce in (as_features, as_embeddings):
        found = recorded_logits(model, question, VisualPlan(reduce=reduce))
        assert torch.allclose(found, expected, atol=1e-5)


def test_a_token_in_front_of_the_patches_comes_right_after_the_text_before_them() -> None:
    model = model_of("llava")
    question = prompt(shape="square")

    def doubled(seen: Any) -> Merged:
        anchors = torch.tensor([-1, *range(1, 36)])
        return Merged(anchors, embeddings=torch.cat([seen.projected[:1], seen.projected[1:]]))

    found = model.run(question, LONG, VisualPlan(reduce=doubled))
    assert found.work.kept_tokens == 36
    assert torch.allclose(
        recorded_logits(model, question, VisualPlan(reduce=doubled)),
        recorded_logits(model, question, VisualPlan()),
        atol=1e-5,
    )


# --- counts ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_operations_are_those_that_torch_counts(architecture: Architecture) -> None:
    model = model_of(architecture, "eager")
    question = prompt()
    pixels = model.tower.prepare(question.image, 1)
    with torch.inference_mode():
        with FlopCounterMode(display=False) as encoder:
            encoded = model.tower.encode(pixels, Watch())
        with FlopCounterMode(display=False) as projector:
            model.tower.project(encoded.features)
        with FlopCounterMode(display=False) as whole:
            answer = model.answer(question, LONG)
    work = answer.work
    assert work.encoder_flops == encoder.get_total_flops()
    assert work.projector_flops == projector.get_total_flops()
    # The eager kernel multiplies the hidden half of the scores too, which we do not count.
    tokens, heads, size, layers = work.layer_tokens[0], 4, 12, 6
    hidden = 4 * heads * size * layers * (tokens**2 - tokens * (tokens + 1) / 2)
    assert work.flops + hidden == whole.get_total_flops()
    assert answer.trace.flops == work.flops
    assert work.decode_flops > 0
    assert work.selector_flops == 0


def test_the_operations_of_a_summary_are_the_selectors() -> None:
    model = model_of("llava")
    question = prompt(shape="square")
    plain = model.answer(question, LONG).work
    watching = model.run(question, LONG, VisualPlan(watch=Watch(received=(2,), cls=(5,)))).work
    # 4 heads of size 8, 37 tokens: scores, and one addition for each weight.
    assert watching.selector_flops == 4 * (2 * 8 + 1) * (37 * 37 + 37)
    assert watching.encoder_flops == plain.encoder_flops


def test_pruning_saves_cache_and_operations_in_proportion() -> None:
    model = model_of("llava")
    question = prompt(shape="square")
    plan = VisualPlan(stages=(Stage(after=3, choose=half),), positions="original")
    plain, pruned = model.answer(question, LONG), model.run(question, LONG, plan)
    assert pruned.work.mean_visual_tokens == (3 * 36 + 3 * 18) / 6
    saved = plain.work.kv_cache_bytes - pruned.work.kv_cache_bytes
    # Two kv heads of 12 float32 numbers, keys and values, 18 tokens in 3 layers.
    assert saved == 2 * 2 * 12 * 4 * 18 * 3
    steps = LONG.max_new_tokens - 1
    assert plain.trace.kv_bytes - pruned.trace.kv_bytes == steps * saved
    assert pruned.work.prefill_flops < plain.work.prefill_flops
    assert pruned.work.decode_flops < plain.work.decode_flops


def test_phases_are_marked_in_order_and_counts_are_in_the_notes() -> None:
    model = model_of("llava")
    question = prompt(shape="square")
    plan = VisualPlan(reduce=lambda seen: torch.arange(10))
    early = model.run(question, LONG, plan)
    assert list(early.trace.marks) == [
        "prepared",
        "encoded",
        "selected",
        "projected",
        "prefill",
        "decode",
    ]
    plan = VisualPlan(reduce=lambda seen: torch.arange(len(seen.projected))[:10])
    late = model.run(question, LONG, plan)
    order = sorted(late.trace.marks, key=late.trace.marks.__getitem__)
    assert order == ["prepared", "encoded", "projected", "selected", "prefill", "decode"]
    assert early.work.projector_flops * 36 == late.work.projector_flops * 10
    for name, value in late.trace.notes.items():
        assert getattr(late.work, name) == value
    assert late.trace.notes["kept_tokens"] == 10


# --- options, prompts, loading ---


def test_option_log_probabilities_are_those_of_the_first_answer_token() -> None:
    model = model_of("llava")
    question = prompt(shape="square", options=("A", "B", "Cat"))
    inputs, _ = inputs_of(model, question)
    with torch.inference_mode():
        expected = model.module(**inputs).logits[0, -1].log_softmax(-1)
    places = [model.tokenizer.encode(letter)[0] for letter in "ABC"]
    found = model.answer(question, LONG).option_log_probabilities
    assert found == pytest.approx(expected[places].tolist(), abs=1e-6)
    assert model.answer(prompt(shape="square"), LONG).option_log_probabilities == ()
    with pytest.raises(ValueError, match="begin with the same token"):
        model.answer(prompt(shape="square", options=("car", "cat")), LONG)


def test_a_prompt_that_holds_the_placeholder_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="one image placeholder, this one has 2"):
        model_of("llava").answer(prompt("<image>", shape="square"), LONG)


def test_an_image_that_is_no_picture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \(height, width, 3\) of uint8"):
        VisualPrompt(image=np.zeros((3, 8, 8), dtype=np.uint8), text="")
    with pytest.raises(ValueError, match="of float64"):
        VisualPrompt(image=np.zeros((8, 8, 3)), text="")  # type: ignore[arg-type]  # on purpose


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_laid_out_like_the_hubs_gives_the_same_answers(
    architecture: Architecture, tmp_path: Any
) -> None:
    model = model_of(architecture)
    model.module.save_pretrained(tmp_path)
    model.tokenizer.hub.save_pretrained(tmp_path)
    model.tower._processor.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    if model._template:
        (tmp_path / "chat_template.jinja").write_text(model._template)
    loaded = load(f"path:{tmp_path}", capability="VisionLanguageModel")
    assert isinstance(loaded, VisionLanguage)
    ours, theirs = (each.answer(prompt(), LONG) for each in (model, loaded))
    assert ours.token_ids == theirs.token_ids
    assert ours.work == theirs.work


def test_another_kind_of_model_is_refused() -> None:
    from runner.conformance_base import random_llama

    model = model_of("llava")
    with pytest.raises(Unsupported, match="is a LlamaForCausalLM"):
        VisionLanguage(random_llama(vocab_size=9, layers=1), model.tokenizer, None, "x")


def test_sampling_goes_by_its_seed() -> None:
    model = model_of("llava")
    hot = [
        model.answer(prompt(shape="square"), Decoding(max_new_tokens=6, temperature=2.0, seed=s))
        for s in (0, 0, 1)
    ]
    assert hot[0].token_ids == hot[1].token_ids != hot[2].token_ids


def test_a_separator_is_never_a_patch() -> None:
    model = model_of("llava-next")
    seen: list[Tensor] = []

    def look(view: StageView) -> None:
        seen.append(view.tokens.kind[view.tokens.patches])
        assert view.num_patches == 132 or view.num_patches == len(view.tokens.patches)

    model.run(prompt(), LONG, VisualPlan(stages=(Stage(after=1, choose=look),)))
    assert len(seen) == 1
    assert SEPARATOR not in seen[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_facts_count_the_weights_of_tower_projector_and_decoder(
    architecture: Architecture,
) -> None:
    model = model_of(architecture)
    weights = {
        name: value for name, value in model.module.named_parameters() if name.endswith("weight")
    }
    # Norms have one axis; tables of embeddings are looked up, no matrices.
    matrices = sum(
        value.numel()
        for name, value in weights.items()
        if value.ndim > 1 and "embed_tokens" not in name and "position_embedding" not in name
    )
    skipped = [
        value.numel()
        for name, value in weights.items()
        if value.ndim > 1
        and f"encoder.layers.{model.facts.vision_layers - 1}." in name
        and model.facts.feature_layer < model.facts.vision_layers
    ]
    assert model.facts.matrix_parameters == matrices - sum(skipped)
    assert model.facts.weight_bytes == 4 * model.facts.matrix_parameters
    # What a worker puts on an experiment's record.
    assert model.facts.dtype == "float32"
