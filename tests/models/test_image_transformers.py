"""Janus, Emu3 and Chameleon, tiny and random: our loop and sessions against transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.base import AutoregressiveImageModel, ImageSampling, Trace, Unsupported
from models.image_chameleon import ChameleonImages
from models.image_transformers import CaptionedImages, Emu3Images, JanusImages
from models.loading import LoadSettings, load
from tests.models.tiny_captioned import (
    CAPTIONED,
    CODES,
    GRID,
    LANGUAGE_MODELS,
    emu3,
    janus,
    tiny_captioned,
    tiny_language_model,
    tokenizer,
)

CAPTIONS = ("a red dog", "sea")
GREEDY = ImageSampling(guidance_scale=2.0, temperature=0.0)


@pytest.fixture(scope="module", params=LANGUAGE_MODELS)
def model(request: pytest.FixtureRequest) -> CaptionedImages:
    return tiny_language_model(request.param)


def token_by_token(model: ChameleonImages, caption: str) -> list[int]:
    """Greedy tokens with guidance 2, the whole text read anew for each, by transformers' forward.

    Its logits of image tokens are masked, so the head is applied to its hidden states.
    """
    texts = [model.prompt(caption, conditional=conditional) for conditional in (True, False)]
    found: list[int] = []
    for place in range(model.facts.image_tokens):
        with_, without = (
            model.module.lm_head(model.module.model(torch.tensor([text + found]))[0][0, -1])
            for text in texts
        )
        forbidden = model.constraints.forbidden(torch.tensor([place]))
        assert forbidden is not None
        merged = (without + 2 * (with_ - without)).masked_fill(forbidden[0], -torch.inf)
        found.append(int(merged.argmax()))
    return found


def theirs(model: CaptionedImages, caption: str) -> list[int]:
    """Greedy tokens by transformers' own generation, with guidance 2."""
    if isinstance(model, ChameleonImages):
        return token_by_token(model, caption)
    prompt = torch.tensor([model.prompt(caption, conditional=True)])
    settings: dict[str, Any] = {"do_sample": False, "guidance_scale": 2.0}
    mask = torch.ones_like(prompt)
    if isinstance(model, JanusImages):
        found = model.module.generate(
            prompt, attention_mask=mask, generation_mode="image", **settings
        )
        return [int(token) for token in found[0]]
    codes = model.module.vocabulary_mapping.image_tokens

    def allowed(row: int, tokens: Tensor) -> list[int]:
        place = len(tokens) - prompt.shape[1]
        return [6] if place % (GRID[1] + 1) == GRID[1] else codes

    negative = torch.tensor([model.prompt(caption, conditional=False)])
    found = model.module.generate(
        prompt,
        attention_mask=mask,
        negative_prompt_ids=negative,
        negative_prompt_attention_mask=torch.ones_like(negative),
        prefix_allowed_tokens_fn=allowed,
        max_new_tokens=model.facts.image_tokens,
        **settings,
    )
    return [int(token) for token in found[0, prompt.shape[1] :]]


def test_plain_decoding_is_transformers_own_also_in_a_batch_of_unequal_captions(
    model: CaptionedImages,
) -> None:
    assert isinstance(model, AutoregressiveImageModel)
    found = model.generate(CAPTIONS, [0, 1], GREEDY)
    for caption, tokens in zip(CAPTIONS, found.tokens, strict=True):
        assert list(tokens) == theirs(model, caption)
    assert found.pixels.shape == (2, *model.facts.image_size, 3)
    assert len(set(found.tokens)) == 2


@pytest.mark.parametrize("kind", CAPTIONED)
def test_windows_trees_and_crops_return_what_single_tokens_return(kind: str) -> None:
    model = tiny_captioned(kind)
    tokens = torch.tensor(model.generate(CAPTIONS, [0, 1], ImageSampling(guidance_scale=2)).tokens)

    def opened() -> Any:
        session = model.session(CAPTIONS, guided=True, capacity=40, trace=Trace())
        session.prefill()
        return session

    single, wide, tree = opened(), opened(), opened()
    expected = torch.cat([single.forward(tokens[:, n : n + 1]).logits for n in range(6)], 1)
    wide.forward(tokens[:, 1:5])
    wide.crop(0)
    found = wide.forward(tokens[:, :6]).logits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    # Root, a wrong branch, and the image's own tokens on another.
    window = torch.stack([tokens[:, 0], tokens[:, 4], tokens[:, 1], tokens[:, 2]], 1)
    sees = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]).bool()
    branched = tree.forward(window, torch.tensor([0, 1, 1, 2]), sees).logits
    torch.testing.assert_close(branched[:, [0, 2, 3]], expected[:, :3], atol=2e-4, rtol=1e-4)
    tree.keep(0, [0, 2, 3])
    after = tree.forward(tokens[:, 3:4]).logits
    torch.testing.assert_close(after, expected[:, 3:4], atol=2e-4, rtol=1e-4)


def test_padding_beside_a_longer_caption_changes_no_logits(model: CaptionedImages) -> None:
    tokens = torch.tensor(model.generate(CAPTIONS, [0, 1], ImageSampling()).tokens)
    found = []
    for captions, ids in ((CAPTIONS, tokens), (CAPTIONS[1:], tokens[1:])):
        session = model.session(captions, guided=False, capacity=40, trace=Trace())
        first = session.prefill().logits[-1:]
        found.append(torch.cat([first, session.forward(ids[:, :6]).logits[-1:]], dim=1))
    torch.testing.assert_close(found[0], found[1], atol=2e-4, rtol=1e-4)


# It has no pixels of Chameleon's; see test_image_chameleon.py.
@pytest.mark.parametrize("model", ["janus", "emu3"], indirect=True)
def test_pixels_are_those_of_transformers(model: CaptionedImages) -> None:
    tokens = torch.tensor(model.generate(CAPTIONS, [0, 1], ImageSampling()).tokens)
    if isinstance(model, JanusImages):
        raw = model.module.decode_image_tokens(tokens)
        expected = ((raw.clamp(-1, 1) + 1) * 127.5).round()
    else:
        # Three tokens behind the last row, as it wants them.
        ended = torch.nn.functional.pad(tokens, (0, 3))
        raw = model.module.decode_image_tokens(image_tokens=ended, height=4, width=4)
        raw = raw.reshape(2, 3, 8, 8)
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
        deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
        expected = ((raw * deviation + mean).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    assert (torch.from_numpy(model.pixels(tokens)) - expected).abs().max() <= 1


def test_row_ends_stand_where_they_must_and_are_no_codes() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Emu3Images(emu3(), tokenizer(), "tiny-emu3", grid=GRID)
    tokens = torch.tensor(model.generate(["x"], [0], ImageSampling()).tokens)
    codes = model.codes(tokens).view(4, 5)
    assert (codes[:, -1] == -1).all()
    assert (codes[:, :-1] >= 0).all()
    assert model.facts.image_tokens == 20
    assert model.codebook.shape == (CODES, 4)


def test_labels_are_refused_and_so_are_prompts_without_room(model: CaptionedImages) -> None:
    with pytest.raises(Unsupported, match="takes captions"):
        model.generate([3], [0], ImageSampling())
    with pytest.raises(Unsupported, match="exceed the context of 256"):
        model.generate(["long " * 60], [0], ImageSampling())


def test_a_folder_loads_as_an_image_generator(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = janus()
    module.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    settings = LoadSettings(device="cpu", dtype="float32")
    found = load(f"path:{tmp_path}", settings, capability="ImageGenerator")
    assert isinstance(found, JanusImages)
    expected = JanusImages(module, tokenizer(), "same").generate(["sea"], [1], ImageSampling())
    assert found.generate(["sea"], [1], ImageSampling()).tokens == expected.tokens
