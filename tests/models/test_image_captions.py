"""LlamaGen with captions: sessions against whole sequences without padding, and its files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.base import ImageSampling, Trace, Unsupported
from models.embedded.tiny_ar_image.model import ImageDecoder, rotation_table
from models.image_captions import CaptionedLlamaGen, CaptionEncoder, plain
from models.image_generation import AutoregressiveImages
from models.image_loading import convert_llamagen, decoder_config
from models.loading import LoadSettings, ModelError, load
from tests.models.tiny_captioned import (
    CAPTION_TOKENS,
    caption_encoder,
    llamagen_networks,
    tiny_llamagen,
    tokenizer,
)
from tests.models.tiny_images import decoder_shapes

CAPTIONS = ("a red dog", "sea")
FLOAT32 = LoadSettings(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def model() -> CaptionedLlamaGen:
    return tiny_llamagen()


def sequence_logits(model: CaptionedLlamaGen, caption: str, tokens: Sequence[int]) -> Tensor:
    """Logits of both branches, (2, tokens, vocab): one forward each, padding left out.

    Condition tokens are not rotated, so where they stand does not matter.
    """
    network = model.module
    words = tokenizer()(caption)["input_ids"][:CAPTION_TOKENS]
    features = caption_encoder().eval()(torch.tensor([words])).last_hidden_state
    # Without a condition, the places of the padding are left out all the same.
    nothing = network.no_caption[None, CAPTION_TOKENS - len(words) :]
    found = []
    for given in (features, nothing):
        embedded = torch.cat(
            [network.embed_captions(given), network.embed_tokens(torch.tensor([[*tokens][:-1]]))], 1
        )
        places = torch.arange(len(tokens) - 1) + CAPTION_TOKENS
        positions = torch.cat([torch.zeros(len(words), dtype=torch.int64), places])
        found.append(network(embedded, positions).logits[:, len(words) - 1 :])
    return torch.cat(found)


def opened(model: CaptionedLlamaGen, captions: Sequence[str] = CAPTIONS) -> Any:
    session = model.session(captions, guided=True, capacity=40, trace=Trace())
    return session, session.prefill().logits


def test_sessions_read_what_whole_sequences_without_padding_do(model: CaptionedLlamaGen) -> None:
    tokens = torch.tensor(model.generate(CAPTIONS, [0, 1], ImageSampling(guidance_scale=2)).tokens)
    session, first = opened(model)
    others = session.forward(tokens[:, :15]).logits
    found = torch.cat([first, others], dim=1)
    for row, caption in enumerate(CAPTIONS):
        expected = sequence_logits(model, caption, tokens[row].tolist())
        torch.testing.assert_close(found[[row, row + 2]], expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[0], found[1], atol=0.1)


def test_long_captions_are_cut_and_have_no_padding(model: CaptionedLlamaGen) -> None:
    long = "a very long caption of many words"
    tokens = torch.tensor(model.generate([long], [0], ImageSampling(guidance_scale=2)).tokens)
    session, first = opened(model, [long])
    found = torch.cat([first, session.forward(tokens[:, :15]).logits], dim=1)
    expected = sequence_logits(model, long, tokens[0].tolist())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert session.trace.prefill[0].width == CAPTION_TOKENS


def test_a_draft_of_the_same_captions_does_not_encode_them_again(model: CaptionedLlamaGen) -> None:
    class Counting(CaptionEncoder):
        calls: tuple[tuple[str, ...], ...] = ()

        def __call__(self, captions: Sequence[str]) -> Any:
            self.calls += (tuple(captions),)
            return super().__call__(captions)

    encoder = Counting(caption_encoder(), tokenizer(), CAPTION_TOKENS)
    target = CaptionedLlamaGen(*llamagen_networks(), "target", encoder)
    draft = target.with_decoder(target.module, "draft")
    assert isinstance(draft, AutoregressiveImages)
    expected = opened(model)[1]
    for _ in range(2):
        torch.testing.assert_close(opened(target)[1], expected)
        torch.testing.assert_close(opened(draft)[1], expected)
    # Each batch of the target reads anew, so that no method pays for another's captions.
    assert encoder.calls == (CAPTIONS, CAPTIONS)
    opened(draft, ["other"])
    assert encoder.calls[2:] == (("other",),)


def test_condition_tokens_are_not_rotated_and_images_are_as_behind_a_class() -> None:
    config = llamagen_networks()[0].config
    table = rotation_table(config)
    behind_class = rotation_table(replace(config, condition_tokens=1, caption_dim=0))
    assert (table[:CAPTION_TOKENS] == 0).all()
    assert torch.equal(table[CAPTION_TOKENS:], behind_class[1:])


def test_captions_are_made_plain() -> None:
    assert plain("  A “Red”  Dog — it's\nBIG!  ") == 'a "red" dog - it\'s big!'
    assert plain("a dog (big), cats/mice [#3] * © x") == "a dog big , cats mice 3 x"
    assert plain("one,two.three 1,000 2.5") == "one, two. three 1,000 2.5"
    assert plain("red . blue") == "red blue"


def test_labels_and_encoders_of_another_size_are_refused(model: CaptionedLlamaGen) -> None:
    with pytest.raises(Unsupported, match="takes captions, not class ids such as 3"):
        model.generate([3], [0], ImageSampling())
    decoder, pixels = llamagen_networks()
    small = CaptionEncoder(caption_encoder(), tokenizer(), CAPTION_TOKENS)
    small.module.config.d_model = 20
    with pytest.raises(ValueError, match="features have the size 20, the decoder takes 24"):
        CaptionedLlamaGen(decoder, pixels, "other", small)


def test_released_files_and_an_encoder_become_a_folder(
    tmp_path: Path, model: CaptionedLlamaGen
) -> None:
    decoder, pixels = llamagen_networks()
    state = {"model": decoder.state_dict(), "args": argparse.Namespace(lr=1e-4)}
    torch.save(state, tmp_path / "t2i.pt")
    torch.save({"model": pixels.state_dict()}, tmp_path / "vq.pt")
    folder = tmp_path / "model"
    convert_llamagen(tmp_path / "t2i.pt", tmp_path / "vq.pt", folder, heads=2, grid=4, groups=4)
    with pytest.raises(ModelError, match=r"no encoder of captions.*flan-t5-xl"):
        load(f"path:{folder}", FLOAT32, capability="ImageGenerator")
    caption_encoder().save_pretrained(folder / "caption_encoder")
    tokenizer().save_pretrained(folder / "caption_encoder")
    found = load(f"path:{folder}", FLOAT32, capability="ImageGenerator")
    assert isinstance(found, CaptionedLlamaGen)
    sampling = ImageSampling(guidance_scale=7.5)
    expected = model.generate(CAPTIONS, [0, 1], sampling)
    images = found.generate(CAPTIONS, [0, 1], sampling)
    assert images.tokens == expected.tokens
    assert (images.pixels == expected.pixels).all()
    # T5 overflows in float16.
    half = LoadSettings(device="cpu", dtype="float16")
    small: Any = load(f"path:{folder}", half, capability="ImageGenerator")
    assert next(small._encoder.module.parameters()).dtype == torch.float32
    assert small.module.output.weight.dtype == torch.float16


def test_the_released_decoder_of_captions_is_known_by_its_shapes() -> None:
    # GPT-XL: 36 layers of width 1280, 120 condition tokens of 2048 numbers.
    shapes = decoder_shapes(1280, 36, 3584) | {
        "cls_embedding.uncond_embedding": (120, 2048),
        "cls_embedding.cap_proj.fc1.weight": (1280, 2048),
        "cls_embedding.cap_proj.fc2.weight": (1280, 1280),
    }
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = decoder_config(state, grid=32)
    assert (config.heads, config.classes, config.condition_tokens) == (20, 0, 120)
    assert config.caption_dim == 2048
    with torch.device("meta"):
        mine = ImageDecoder(config)
    assert {name: tuple(value.shape) for name, value in mine.state_dict().items()} == shapes
    assert mine.rotation.shape == (120 + 1024, 32, 2)
