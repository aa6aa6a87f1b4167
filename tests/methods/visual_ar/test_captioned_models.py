"""Windows and trees on the papers' classes: Janus, Emu3, Anole, Lumina-mGPT, LlamaGen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from methods.visual_ar.common_geometry import (
    embedding_quantile,
    squared_distances,
    token_neighbours,
)
from methods.visual_ar.gsd import Gsd
from methods.visual_ar.lantern import Lantern
from methods.visual_ar.sjd import Sjd
from methods.visual_ar.speculative_image import SpeculativeImage
from models.base import AutoregressiveImageModel, ImageSampling, Unsupported
from runner.conformance_base import PROFILE
from tests.models.tiny_captioned import CAPTIONED, tiny_captioned
from tests.models.tiny_chameleon import (
    chameleon_module,
    chameleon_tokenizer,
    released_state,
    twin_decoder,
)

CAPTIONS = ("a red dog", "sea")
GREEDY = ImageSampling(guidance_scale=2.0, temperature=0.0)
EXACT = (
    Sjd(window=6),
    Sjd(window=4, initialisation="repeat-left"),
    Sjd(window=5, initialisation="sample-above"),
    Sjd(window=5, rule="equality"),
    Gsd(window=6, group_size=1),
)


@pytest.fixture(scope="module", params=CAPTIONED)
def model(request: pytest.FixtureRequest) -> AutoregressiveImageModel:
    return tiny_captioned(request.param)


@pytest.mark.parametrize("method", EXACT, ids=repr)
def test_greedy_images_are_those_of_plain_decoding_in_batches_of_unequal_captions(
    model: AutoregressiveImageModel, method: Any
) -> None:
    plain = model.generate(CAPTIONS, [0, 1], GREEDY)
    with method.apply(model, PROFILE) as changed:
        found = changed.generate(CAPTIONS, [0, 1], GREEDY)
    assert found.tokens == plain.tokens
    assert (found.pixels == plain.pixels).all()
    if method.window > 1 and getattr(method, "rule", "") != "equality":
        assert len(found.trace.forwards) <= len(plain.trace.forwards)


@pytest.mark.parametrize("method", [Sjd(window=6), Gsd(window=6, acceptance="static")], ids=repr)
def test_sampled_images_keep_row_ends_and_hold_no_words(
    model: AutoregressiveImageModel, method: Any
) -> None:
    sampling = ImageSampling(guidance_scale=2.0, top_k=12)
    with method.apply(model, PROFILE) as changed:
        found = changed.generate(CAPTIONS, [3, 4], sampling)
    places = torch.arange(model.facts.image_tokens)
    forbidden = model.constraints.forbidden(places)
    for tokens in found.tokens:
        assert len(tokens) == len(places)
        if forbidden is not None:
            assert not forbidden[places, torch.tensor(tokens)].any()


def test_neighbours_of_codes_are_codes_and_words_have_none(model: AutoregressiveImageModel) -> None:
    everything = torch.arange(model.facts.vocab_size)
    is_code = model.codes(everything) >= 0
    with torch.no_grad():
        embeddings = model.embed(everything[is_code])
    vectors: dict[Any, Tensor] = {
        "codebook": model.codebook[model.codes(everything[is_code])],
        "embeddings": embeddings,
    }
    for space, table in vectors.items():
        near = token_neighbours(model, 3, space=space)
        assert (near[~is_code] == -1).all()
        assert is_code[near[is_code]].all()
        apart = squared_distances(table, torch.arange(len(table))).fill_diagonal_(torch.inf)
        assert (everything[is_code][apart.argmin(-1)] == near[is_code, 0]).all()
    # Of all pairs of codes, and of no words.
    apart = squared_distances(embeddings, torch.arange(len(embeddings)))
    pairs = apart[torch.triu(torch.ones_like(apart), diagonal=1).bool()]
    assert embedding_quantile(model, 0.25) == pytest.approx(
        float(pairs.sort().values[len(pairs) // 4])
    )


def test_a_draft_of_the_same_class_writes_the_targets_greedy_images(tmp_path: Path) -> None:
    model = tiny_captioned("anole")
    chameleon_module(seed=1).save_pretrained(tmp_path)
    chameleon_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "vqgan.json").write_text('{"rows": 4, "columns": 4}', encoding="utf-8")
    save_file(released_state(twin_decoder()), tmp_path / "vqgan.safetensors")
    method = SpeculativeImage(draft=f"path:{tmp_path}", num_draft_tokens=3)
    with method.apply(model, PROFILE) as changed:
        found = changed.generate(CAPTIONS, [0, 1], GREEDY)
    assert found.tokens == model.generate(CAPTIONS, [0, 1], GREEDY).tokens
    assert found.trace.draft_forwards > 0


def test_trees_need_a_drafter_which_language_models_have_not() -> None:
    model = tiny_captioned("anole")
    with (
        pytest.raises(Unsupported, match="LlamaGen"),
        Lantern(drafter="random").apply(model, PROFILE) as changed,
    ):
        changed.generate(CAPTIONS, [0, 1], GREEDY)


@pytest.mark.parametrize(
    "method",
    [
        SpeculativeImage(draft="layers:1", num_draft_tokens=3),
        Lantern(drafter="random", delta=0.0),
        Lantern(drafter="random", delta=0.0, tree="static"),
        Lantern(drafter="random", delta=0.0, tree="chain"),
    ],
    ids=repr,
)
def test_drafts_behind_captions_write_the_targets_greedy_images(method: Any) -> None:
    model = tiny_captioned("llamagen")
    plain = model.generate(CAPTIONS, [0, 1], GREEDY)
    with method.apply(model, PROFILE) as changed:
        found = changed.generate(CAPTIONS, [0, 1], GREEDY)
    assert found.tokens == plain.tokens
    assert found.trace.draft_forwards > 0


def test_a_relaxed_tree_behind_captions_changes_images() -> None:
    model = tiny_captioned("llamagen")
    sampling = ImageSampling(guidance_scale=2.0)
    found = []
    for delta in (0.0, 1.0):
        method = Lantern(drafter="random", delta=delta, neighbours=8, tree="chain")
        with method.apply(model, PROFILE) as changed:
            found.append(changed.generate(CAPTIONS, [0, 1], sampling))
    assert sum(found[1].trace.accepted) > sum(found[0].trace.accepted)
