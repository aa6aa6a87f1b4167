"""Chameleon's class: prompts, codes, pixels, and the files they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.base import ImageSampling, Unsupported
from models.image_chameleon import (
    ChameleonImages,
    CodesToPixels,
    convert_vqgan,
    main,
    read_decoder,
)
from models.loading import LoadSettings, ModelError, load, weights_hash
from tests.models.tiny_chameleon import (
    CODES,
    LAYOUTS,
    chameleon_module,
    chameleon_tokenizer,
    released_state,
    tiny_chameleon,
    twin_decoder,
)
from tests.models.tiny_images import Harmful

FLOAT32 = LoadSettings(device="cpu", dtype="float32")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model as transformers saves it, without a way to pixels."""
    chameleon_module().save_pretrained(tmp_path / "model")
    chameleon_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def released(path: Path, state: dict[str, Tensor], **more: Any) -> Path:
    """A checkpoint as it is published: encoder and training's losses beside the decoder."""
    rest = {"encoder.conv_in.weight": torch.ones(2), "loss.logvar": torch.zeros(1)}
    torch.save({"state_dict": {**state, **rest}, **more}, path)
    return path


def test_codes_become_the_pixels_of_a_decoder_written_otherwise() -> None:
    twin = twin_decoder()
    codes = torch.randint(CODES, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    vectors = twin.quantize.embedding.weight[codes]
    expected = twin.decoder(twin.post_quant_conv(vectors.permute(0, 3, 1, 2)))
    decoder = CodesToPixels(released_state(twin))
    found = decoder(codes)
    assert found.shape == (2, 3, 12, 20)
    assert decoder.factor == 4
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    # The order of levels matters, and the test would see it.
    names = {"decoder.up.0.block.0.": "decoder.up.1.block.0."}
    names |= {new: old for old, new in names.items()}
    swapped = {
        next((name.replace(old, new) for old, new in names.items() if old in name), name): value
        for name, value in released_state(twin).items()
        if "nin_shortcut" not in name
    }
    with pytest.raises(ValueError, match=r"was expected|do not agree"):
        CodesToPixels(swapped)


def test_the_released_decoder_is_known_by_its_shapes() -> None:
    def convolution(name: str, inputs: int, outputs: int, side: int) -> dict[str, Tensor]:
        return {
            f"{name}.weight": torch.empty(outputs, inputs, side, side),
            f"{name}.bias": torch.empty(outputs),
        }

    def norm(name: str, size: int) -> dict[str, Tensor]:
        return {f"{name}.weight": torch.empty(size), f"{name}.bias": torch.empty(size)}

    def block(name: str, inputs: int, outputs: int) -> dict[str, Tensor]:
        short = convolution(f"{name}.nin_shortcut", inputs, outputs, 1) if inputs != outputs else {}
        return {
            **norm(f"{name}.norm1", inputs),
            **convolution(f"{name}.conv1", inputs, outputs, 3),
            **norm(f"{name}.norm2", outputs),
            **convolution(f"{name}.conv2", outputs, outputs, 3),
            **short,
        }

    # ch 128, ch_mult 1 1 2 2 4, two blocks and one more, z_channels and embed_dim 256, 8192 codes.
    with torch.device("meta"):
        state = {
            "quantize.embedding.weight": torch.empty(8192, 256),
            **convolution("post_quant_conv", 256, 256, 1),
            **convolution("decoder.conv_in", 256, 512, 3),
            **block("decoder.mid.block_1", 512, 512),
            **norm("decoder.mid.attn_1.norm", 512),
            **block("decoder.mid.block_2", 512, 512),
            **norm("decoder.norm_out", 128),
            **convolution("decoder.conv_out", 128, 3, 3),
        }
        for part in ("q", "k", "v", "proj_out"):
            state |= convolution(f"decoder.mid.attn_1.{part}", 512, 512, 1)
        inputs = 512
        for level, outputs in ((4, 512), (3, 256), (2, 256), (1, 128), (0, 128)):
            for number in range(3):
                state |= block(f"decoder.up.{level}.block.{number}", inputs, outputs)
                inputs = outputs
            if level:
                state |= convolution(f"decoder.up.{level}.upsample.conv", outputs, outputs, 3)
        decoder = CodesToPixels(state)
    assert decoder.factor == 16
    # 42.5 million of its 69 million weights are the decoder's.
    assert sum(each.numel() for each in decoder.parameters()) == sum(
        value.numel() for value in state.values()
    )


def test_prompts_are_those_of_the_papers_code() -> None:
    words = chameleon_tokenizer()
    text = words("sea", add_special_tokens=False)["input_ids"]
    begin, break_ = 1, words.get_vocab()["<racm3:break>"]
    anole = tiny_chameleon("anole")
    assert anole.prompt("sea", conditional=True) == [begin, *text, break_]
    assert anole.prompt("sea", conditional=False) == [begin, break_]
    lumina = tiny_chameleon("lumina-mgpt")
    # Four rows and four columns are two steps each; 16 x 16 pixels.
    image = [break_, *[words.get_vocab()["<reserved08802>"]] * 2]
    sentence = "Generate an image of 16x16 according to the following prompt:\nsea"
    text = words(sentence, add_special_tokens=False)["input_ids"]
    end = words.get_vocab()["<reserved08706>"]
    assert lumina.prompt("sea", conditional=True) == [begin, *text, end, *image]
    assert lumina.prompt("sea", conditional=False) == image


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pixels_are_the_decoders_of_the_codes_that_the_words_name(layout: str) -> None:
    model = tiny_chameleon(layout)
    found = model.generate(["a red dog", "sea"], [0, 1], ImageSampling(guidance_scale=3.0))
    words = {token: word for word, token in chameleon_tokenizer().get_vocab().items()}
    twin, rows = twin_decoder(), 4
    for tokens, pixels in zip(found.tokens, found.pixels, strict=True):
        named = [words[token] for token in tokens]
        if layout == "lumina-mgpt":
            assert named[4::5] == ["<reserved08799>"] * rows
            del named[4::5]
        assert len(named) == 16
        assert all(word.startswith("IMGIMG") for word in named)
        digits = ["".join(str(ord(letter) - 65) for letter in word[6:-1]) for word in named]
        codes = torch.tensor([int(number) for number in digits]).view(1, rows, rows)
        vectors = twin.quantize.embedding.weight[codes].permute(0, 3, 1, 2)
        image = twin.decoder(twin.post_quant_conv(vectors))[0].permute(1, 2, 0)
        expected = ((image.clamp(-1, 1) + 1) * 127.5).round()
        assert (torch.from_numpy(pixels).float() - expected).abs().max() <= 1
    assert len(set(found.tokens)) == 2
    assert model.codebook.shape == (CODES, 4)


def test_the_decoder_of_codes_is_where_the_model_is() -> None:
    model = ChameleonImages(
        chameleon_module().to("meta"),
        chameleon_tokenizer(),
        "elsewhere",
        decoder=CodesToPixels(released_state(twin_decoder())),
        layout=LAYOUTS["anole"],
    )
    assert model.codebook.device == model.device == torch.device("meta")


@pytest.mark.parametrize("where", ["vqgan", "vqvae", "inside"])
def test_the_way_to_pixels_is_found_where_it_is_published(folder: Path, where: str) -> None:
    state = released_state(twin_decoder())
    other = {"encoder.conv_in.weight": torch.ones(2)}
    if where == "vqgan":
        convert_vqgan(released(folder.parent / "vqgan.ckpt", state), folder, LAYOUTS["anole"])
    elif where == "vqvae":
        (folder / "vqvae").mkdir()
        save_file(state | other, folder / "vqvae" / "model.safetensors")
    else:
        inside = {f"model.vqmodel.{name}": value for name, value in (state | other).items()}
        path = folder / "model.safetensors"
        save_file(load_file(path) | inside, path)
    found = read_decoder(folder)
    codes = torch.arange(CODES).view(1, 4, 6)
    torch.testing.assert_close(found(codes), CodesToPixels(state)(codes))


def test_a_folder_of_lumina_mgpt_makes_images(folder: Path) -> None:
    before = weights_hash(f"path:{folder}", FLOAT32)
    vqgan = released(folder.parent / "vqgan.ckpt", released_state(twin_decoder()), epoch=3)
    grid = ["--layout", "lumina-mgpt", "--grid", "4"]
    main(["--vqgan", str(vqgan), "--folder", str(folder), *grid])
    assert weights_hash(f"path:{folder}", FLOAT32) != before
    found = load(f"path:{folder}", FLOAT32, capability="ImageGenerator")
    assert isinstance(found, ChameleonImages)
    expected = tiny_chameleon("lumina-mgpt").generate(["sea"], [1], ImageSampling())
    images = found.generate(["sea"], [1], ImageSampling())
    assert images.tokens == expected.tokens
    assert (images.pixels == expected.pixels).all()


def test_weights_of_a_part_in_a_folder_of_its_own_are_in_the_hash(folder: Path) -> None:
    before = weights_hash(f"path:{folder}", FLOAT32)
    (folder / "vqvae").mkdir()
    save_file(released_state(twin_decoder()), folder / "vqvae" / "model.safetensors")
    first = weights_hash(f"path:{folder}", FLOAT32)
    save_file(released_state(twin_decoder(1)), folder / "vqvae" / "model.safetensors")
    assert len({before, first, weights_hash(f"path:{folder}", FLOAT32)}) == 3


def test_a_folder_that_lacks_something_says_what(folder: Path) -> None:
    def refused(match: str, kind: type[Exception] = Unsupported) -> None:
        with pytest.raises(kind, match=match):
            load(f"path:{folder}", FLOAT32, capability="ImageGenerator")

    refused(r"no way from codes to pixels: no vqgan.safetensors.*--vqgan vqgan.ckpt")
    (folder / "vqvae").mkdir()
    save_file(released_state(twin_decoder()), folder / "vqvae" / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))

    def write(**changes: Any) -> None:
        (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")

    write(architectures=["ChameleonXLLMXForConditionalGeneration"])
    refused(r"no vqgan.json says how many rows.*--grid 48")
    # The command that the message names.
    grid = ["--layout", "lumina-mgpt", "--grid", "4"]
    main(["--folder", str(folder), *grid])
    found = load(f"path:{folder}", FLOAT32, capability="ImageGenerator")
    assert isinstance(found, ChameleonImages)
    assert found.facts.image_tokens == 20
    (folder / "vqgan.json").unlink()
    write(vocabulary_map=None)
    refused("no vocabulary_map, which says what the image tokens are")
    write()
    (folder / "vqgan.json").write_text('{"layout": "emu"}', encoding="utf-8")
    refused("must be anole or lumina-mgpt", ModelError)
    text = json.dumps({"layout": "lumina-mgpt", "rows": 8, "columns": 8})
    (folder / "vqgan.json").write_text(text, encoding="utf-8")
    refused("has no <reserved08804>, which the layout 'lumina-mgpt' needs")
    (folder / "vqgan.json").unlink()
    state = released_state(twin_decoder())
    state["quantize.embedding.weight"] = state["quantize.embedding.weight"][:20].clone()
    save_file(state, folder / "vqvae" / "model.safetensors")
    refused("24 image tokens, its decoder 20 codes")
    del state["decoder.mid.attn_1.q.bias"]
    save_file(state, folder / "vqvae" / "model.safetensors")
    refused(r"do not agree about 1 weights, decoder.mid.attn_1.q.bias for one", ModelError)


def test_bad_checkpoints_and_layouts_are_refused_before_anything_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = released_state(twin_decoder())
    good = released(folder.parent / "good.ckpt", state)
    bad = folder.parent / "bad.ckpt"

    def refused(match: str, *more: str, file: Path = bad, to: Path = folder) -> None:
        with pytest.raises(SystemExit):
            main(["--vqgan", str(file), "--folder", str(to), *more])
        assert match in capsys.readouterr().err

    refused("No such file")
    torch.save({"state_dict": {"encoder.conv_in.weight": torch.ones(1)}}, bad)
    refused("is no VQGAN: it lacks a decoder or a table of codes")
    released(bad, {**state, "decoder.conv_out.bias": torch.ones(4)})
    refused("decoder.conv_out.bias of the decoder of codes is (4,), (3,) was expected")
    torch.save({"state_dict": Harmful()}, bad)
    refused("Weights only load failed")
    assert "run" not in capsys.readouterr().out
    refused("has no name", "--layout", "lumina-mgpt", "--grid", "7", file=good)
    refused("must be positive", "--grid", "0", file=good)
    refused("is no model's folder", file=good, to=folder.parent)
    with pytest.raises(SystemExit):
        main(["--folder", str(folder)])
    assert "no way from codes to pixels" in capsys.readouterr().err
    assert not (folder / "vqgan.safetensors").exists()
    assert not (folder / "vqgan.json").exists()
