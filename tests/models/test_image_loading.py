"""Image models from files: LlamaGen's released layout, our folders, and what is refused."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.base import AutoregressiveImageModel, ImageSampling, Unsupported
from models.embedded.tiny_ar_image.model import ImageDecoder, ImageTokenizer
from models.image_generation import AutoregressiveImages
from models.image_loading import (
    convert_llamagen,
    decoder_config,
    main,
    tokenizer_config,
)
from models.loading import LoadSettings, ModelError, load
from tests.models.tiny_images import (
    DECODER,
    TOKENIZER,
    Harmful,
    decoder_shapes,
    networks,
    save_image_model,
)

FLOAT32 = LoadSettings(device="cpu", dtype="float32")


def released(
    folder: Path, decoder: dict[str, Tensor], tokenizer: dict[str, Tensor], wrapper: str = "model"
) -> tuple[Path, Path]:
    """The two files as they are published: wrapped, with a counter and the training's arguments."""
    more = {"quantize.codebook_used": torch.zeros(65536)}
    content: dict[str, Any] = {wrapper: decoder, "steps": 7, "args": argparse.Namespace(lr=1e-4)}
    torch.save(content, folder / "decoder.pt")
    torch.save({"model": tokenizer | more}, folder / "tokenizer.pt")
    return folder / "decoder.pt", folder / "tokenizer.pt"


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict"])
def test_released_files_become_a_folder_that_makes_the_same_images(
    tmp_path: Path, wrapper: str
) -> None:
    decoder, tokenizer = networks()
    files = released(tmp_path, decoder.state_dict(), tokenizer.state_dict(), wrapper)
    arguments = ["--heads", "2", "--grid", "4", "--groups", "4", "--out", str(tmp_path / "model")]
    main(["--decoder", str(files[0]), "--tokenizer", str(files[1]), *arguments])
    model = load(f"path:{tmp_path / 'model'}", FLOAT32, capability="ImageGenerator")
    assert isinstance(model, AutoregressiveImageModel)
    assert model.module.config == DECODER
    expected = AutoregressiveImages(decoder, tokenizer, "same").generate(
        [3, 19], [0, 1], ImageSampling(guidance_scale=1.5)
    )
    found = model.generate([3, 19], [0, 1], ImageSampling(guidance_scale=1.5))
    assert found.tokens == expected.tokens
    assert (found.pixels == expected.pixels).all()


# Width, layers, heads and inner size of LlamaGen-B, -L, -XL, -XXL and -3B, from its own tables.
SIZES = [
    (768, 12, 12, 2048),
    (1024, 24, 16, 2816),
    (1280, 36, 20, 3584),
    (1536, 48, 24, 4096),
    (3200, 24, 32, 8704),
]


@pytest.mark.parametrize(("width", "layers", "heads", "inner"), SIZES)
def test_every_released_decoder_is_known_by_its_shapes(
    width: int, layers: int, heads: int, inner: int
) -> None:
    shapes = decoder_shapes(width, layers, inner)
    shapes["cls_embedding.embedding_table.weight"] = (1001, width)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = decoder_config(state)
    assert (config.heads, config.layers, config.grid, config.classes) == (heads, layers, 16, 1000)
    with torch.device("meta"):
        mine = ImageDecoder(config).state_dict()
    assert {name: tuple(value.shape) for name, value in mine.items()} == shapes


def test_the_released_tokenizer_is_known_by_its_shapes() -> None:
    from models.embedded.tiny_ar_image.model import TokenizerConfig

    config = TokenizerConfig(
        codebook_size=16384,
        channels=128,
        multipliers=(1, 1, 2, 2, 4),
        res_blocks=2,
        latent_channels=256,
        groups=32,
    )
    with torch.device("meta"):
        state = ImageTokenizer(config).state_dict()
    assert tokenizer_config(state) == config
    assert tokenizer_config(networks()[1].state_dict(), groups=4) == TOKENIZER


def test_files_that_are_no_llamagen_are_refused(tmp_path: Path) -> None:
    decoder, tokenizer = networks()
    weights = decoder.state_dict()
    settings = {"heads": 2, "grid": 4, "groups": 4}

    def convert(changed: dict[str, Tensor], **other: int | None) -> None:
        files = released(tmp_path, changed, tokenizer.state_dict())
        convert_llamagen(*files, tmp_path / "out", **{**settings, **other})

    with pytest.raises(ValueError, match="no known decoder is 32 wide"):
        convert(weights, heads=None)
    with pytest.raises(ValueError, match="do not agree about 1 weights"):
        convert({name: value for name, value in weights.items() if name != "norm.weight"})
    with pytest.raises(ValueError, match=r"norm.weight of the model is \(31,\)"):
        convert({**weights, "norm.weight": torch.ones(31)})
    with pytest.raises(ValueError, match="neither a table of classes nor features of a missing"):
        convert({"cls_embedding.cap_proj.fc1.weight": torch.ones(2, 2)})
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="no weights by name"):
        convert_llamagen(tmp_path / "list.pt", tmp_path / "list.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pickle_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pickle

    torch.save({"model": Harmful()}, tmp_path / "bad.pt")
    with pytest.raises(pickle.UnpicklingError):
        convert_llamagen(tmp_path / "bad.pt", tmp_path / "bad.pt", tmp_path / "out")
    assert "run" not in capsys.readouterr().out


def test_dtype_and_capability_are_heeded(tmp_path: Path) -> None:
    model_id = save_image_model(tmp_path / "model")
    half = load(model_id, LoadSettings(device="cpu", dtype="bfloat16"), capability="ImageGenerator")
    assert isinstance(half, AutoregressiveImages)
    assert half.facts.dtype == "bfloat16"
    assert half.facts.kv_item_bytes == 2
    # Pictures are decoded in float32 whatever the decoder runs in.
    assert next(half.image_tokenizer.parameters()).dtype == torch.float32
    assert half.generate([0], [0], ImageSampling()).pixels.shape == (1, 16, 16, 3)
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llamagen"}', encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(model_id, FLOAT32, capability="ImageGenerator")


def test_embedded_cards_load_target_and_draft_on_the_same_codes() -> None:
    target = load("tiny-ar-image", FLOAT32, capability="ImageGenerator")
    draft = load("tiny-ar-image-draft", FLOAT32, capability="ImageGenerator")
    assert isinstance(target, AutoregressiveImages)
    assert isinstance(draft, AutoregressiveImages)
    assert (target.facts.num_layers, draft.facts.num_layers) == (6, 2)
    assert torch.equal(target.codebook, draft.codebook)
    with pytest.raises(Unsupported, match="can be loaded as ImageGenerator"):
        load("tiny-ar-image", FLOAT32)


def test_architectures_that_cannot_make_pictures_say_so(tmp_path: Path) -> None:
    model_id = save_image_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    with pytest.raises(Unsupported, match="are tiny-ar-image, llamagen, janus, emu3, chameleon"):
        load(model_id, FLOAT32, capability="ImageGenerator")
