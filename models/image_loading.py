"""Image generators from files: our own folders, LlamaGen's released weights, transformers' models.

A folder of the LlamaGen class holds `config.json` (`model_type` `tiny-ar-image` or `llamagen`), the
decoder in `model.safetensors` and the tokenizer in `tokenizer.safetensors`. LlamaGen releases
pickles; this makes a folder of two of them, reading tensors only:

    python -m models.image_loading --decoder c2i_B_256.pt --tokenizer vq_ds16_c2i.pt --out FOLDER

and `path:FOLDER` is then a model. With a decoder of captions (`t2i_XL_stage1_256.pt` and
`vq_ds16_t2i.pt`) the folder lacks their encoder still; see `models/image_captions.py`. Source of
the released files' layout: FoundationVision/LlamaGen at ce98ec4
(`autoregressive/sample/sample_c2i.py`, `tokenizer/tokenizer_image/vq_model.py`): weights lie under
`model`, `module` or `state_dict`, or are the file; the tokenizer's counter of used codes is no
weight.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.base import AutoregressiveImageModel
from models.embedded.tiny_ar_image.model import (
    DecoderConfig,
    ImageDecoder,
    ImageTokenizer,
    TokenizerConfig,
    load_weights,
)
from models.image_generation import AutoregressiveImages

if TYPE_CHECKING:
    from models.loading import LoadSettings

LLAMAGEN_TYPES = ("tiny-ar-image", "llamagen")
# Heads of LlamaGen's sizes by width; the weights do not tell.
_HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 2048: 32, 2560: 40, 3200: 32, 4096: 32}
_TABLE, _NO_CAPTION = "cls_embedding.embedding_table.weight", "cls_embedding.uncond_embedding"
_WRAPPERS = ("model", "module", "state_dict")
_COUNTER = "quantize.codebook_used"


def load_images(
    folder: Path, model_id: str, settings: LoadSettings, weights: str | None = None
) -> AutoregressiveImageModel:
    """Load an image generator from a folder.

    Args:
        folder: With config.json and *.safetensors.
        model_id: For messages and tables.
        settings: Device and dtype; images are decoded in float32 whatever the dtype.
        weights: File of the decoder, where the folder holds several.

    Raises:
        models.loading.ModelError: The files are not those of such a model.
        models.base.Unsupported: It is of a class that is not run here.
    """
    from models.loading import ModelError

    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = fields.get("model_type", "")
        if kind not in LLAMAGEN_TYPES:
            from models.image_transformers import load_transformers_images

            return load_transformers_images(folder, model_id, settings, kind)
        return _load_llamagen(folder, fields, model_id, settings, weights or "model.safetensors")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"'{model_id}' cannot be loaded: {error}") from error


def _load_llamagen(
    folder: Path, fields: Mapping[str, Any], model_id: str, settings: LoadSettings, weights: str
) -> AutoregressiveImages:
    part = "draft" if weights == "draft.safetensors" else "target"
    sizes = fields["tokenizer"]
    tokenizer = ImageTokenizer(
        TokenizerConfig(**{**sizes, "multipliers": tuple(sizes["multipliers"])})
    )
    decoder = ImageDecoder(DecoderConfig(**fields[part]))
    device = settings.device_name()
    load_weights(tokenizer, folder / "tokenizer.safetensors", device)
    load_weights(decoder, folder / weights, device)
    decoder.to(getattr(torch, settings.dtype_name()))
    if decoder.config.caption_dim:
        from models.image_captions import CaptionedLlamaGen, load_caption_encoder

        encoder = load_caption_encoder(folder, decoder.config.condition_tokens, settings)
        return CaptionedLlamaGen(decoder, tokenizer, model_id, encoder)
    return AutoregressiveImages(decoder, tokenizer, model_id)


def decoder_config(
    state: Mapping[str, Tensor], *, heads: int | None = None, grid: int | None = None
) -> DecoderConfig:
    """Return the sizes of a LlamaGen decoder by its weights.

    Args:
        state: By LlamaGen's names.
        heads: Attention heads; None for those of the released size of that width.
        grid: Tokens to a side; None for 16, of images of 256 pixels (24 for 384).

    Raises:
        ValueError: The weights are of another kind, or the width is no released one.
    """
    if _TABLE not in state and _NO_CAPTION not in state:
        raise ValueError(
            "the decoder has neither a table of classes nor features of a missing caption."
        )
    vocab_size, width = state["output.weight"].shape
    inner = state["layers.0.feed_forward.w1.weight"].shape[0]
    condition: dict[str, int] = {}
    if _NO_CAPTION in state:
        tokens, size = state[_NO_CAPTION].shape
        condition = {"condition_tokens": tokens, "caption_dim": size}
    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    if heads is None and width not in _HEADS:
        raise ValueError(
            f"no known decoder is {width} wide; name its heads with --heads. Known widths: "
            f"{', '.join(map(str, _HEADS))}."
        )
    if state["layers.0.attention.wqkv.weight"].shape[0] != 3 * width:
        raise ValueError(
            "the decoder has fewer heads for keys than for queries; none released has."
        )
    config = DecoderConfig(
        vocab_size=vocab_size,
        classes=state[_TABLE].shape[0] - 1 if _TABLE in state else 0,
        **condition,
        grid=grid or 16,
        width=width,
        layers=layers,
        heads=heads or _HEADS[width],
        # Inner sizes are rounded up to 256; a small model's is taken as it is.
        ffn_multiple=256 if inner % 256 == 0 else inner,
    )
    if config.inner_size != inner:
        raise ValueError(
            f"the decoder's feed-forward part is {inner} wide, {config.inner_size} was expected."
        )
    return config


def tokenizer_config(state: Mapping[str, Tensor], *, groups: int = 32) -> TokenizerConfig:
    """Return the sizes of a LlamaGen tokenizer by its weights.

    Args:
        state: By LlamaGen's names.
        groups: Of each group normalisation, which the weights do not tell.
    """
    channels = state["encoder.conv_in.weight"].shape[0]
    levels = 1 + max(
        int(name.split(".")[2]) for name in state if name.startswith("encoder.conv_blocks.")
    )
    blocks = 1 + max(
        int(name.split(".")[4]) for name in state if name.startswith("encoder.conv_blocks.0.res.")
    )
    outputs = [
        state[f"encoder.conv_blocks.{level}.res.0.conv1.weight"].shape[0] for level in range(levels)
    ]
    codes = state["quantize.embedding.weight"]
    return TokenizerConfig(
        codebook_size=codes.shape[0],
        code_dim=codes.shape[1],
        channels=channels,
        multipliers=tuple(size // channels for size in outputs),
        res_blocks=blocks,
        latent_channels=state["encoder.conv_out.weight"].shape[0],
        groups=groups,
    )


def convert_llamagen(
    decoder: Path,
    tokenizer: Path,
    out: Path,
    *,
    heads: int | None = None,
    grid: int | None = None,
    groups: int = 32,
) -> None:
    """Write a folder that `path:` reads from LlamaGen's two released files.

    Args:
        decoder: `c2i_B_256.pt`, or one of captions, `t2i_XL_stage1_256.pt`.
        tokenizer: `vq_ds16_c2i.pt`, or `vq_ds16_t2i.pt`.
        out: Folder; made if it is not there.
        heads, grid, groups: What the weights do not tell, see `decoder_config` and
            `tokenizer_config`.

    Raises:
        ValueError: The files hold something else than such weights.
    """
    from safetensors.torch import save_file

    states = {"model": read_pickled_weights(decoder), "tokenizer": read_pickled_weights(tokenizer)}
    states["tokenizer"].pop(_COUNTER, None)
    decoder_sizes = decoder_config(states["model"], heads=heads, grid=grid)
    tokenizer_sizes = tokenizer_config(states["tokenizer"], groups=groups)
    with torch.device("meta"):
        expected = {
            "model": ImageDecoder(decoder_sizes).state_dict(),
            "tokenizer": ImageTokenizer(tokenizer_sizes).state_dict(),
        }
    for part, state in states.items():
        check_names(part, state, expected[part])
    out.mkdir(parents=True, exist_ok=True)
    for part, state in states.items():
        tensors = {name: value.contiguous() for name, value in state.items()}
        save_file(tensors, out / f"{part}.safetensors")
    config = {
        "model_type": "llamagen",
        "tokenizer": asdict(tokenizer_sizes),
        "target": asdict(decoder_sizes),
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_pickled_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of a pickled file, of which nothing but tensors and numbers is read.

    Args:
        path: Weights by name, alone or under `model`, `module` or `state_dict`.

    Raises:
        ValueError: It holds no weights by name.
        pickle.UnpicklingError: It holds something that would have to be executed.
        OSError: It cannot be read.
    """
    # Some released files keep the arguments of the training beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in _WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
            break
    if not isinstance(found, dict) or not all(isinstance(each, Tensor) for each in found.values()):
        raise ValueError(f"{path} holds no weights by name.")
    return dict(found)


def check_names(part: str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse a file's weights that are not a network's.

    Args:
        part: What the network is, for the message.
        state: Of the file, by name.
        expected: Of the network, by name; shapes alone matter.

    Raises:
        ValueError: Names or shapes differ; says which.
    """
    wrong = sorted(state.keys() ^ expected.keys())
    if wrong:
        raise ValueError(
            f"the {part} and its file do not agree about {len(wrong)} weights, {wrong[0]} for one."
        )
    for name, value in state.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"{name} of the {part} is {tuple(value.shape)}, {tuple(expected[name].shape)} was "
                f"expected."
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert LlamaGen's released files."""
    parser = argparse.ArgumentParser(description="Make a model folder of LlamaGen's weights.")
    parser.add_argument("--decoder", type=Path, required=True, help="c2i_B_256.pt or the like")
    parser.add_argument("--tokenizer", type=Path, required=True, help="vq_ds16_c2i.pt or the like")
    parser.add_argument("--out", type=Path, required=True, help="folder for `path:`")
    parser.add_argument("--heads", type=int, help="where the decoder is of no released width")
    parser.add_argument("--grid", type=int, help="tokens to a side; 16 if not given")
    parser.add_argument("--groups", type=int, default=32, help="of the tokenizer's norms")
    given = parser.parse_args(arguments)
    convert_llamagen(
        given.decoder,
        given.tokenizer,
        given.out,
        heads=given.heads,
        grid=given.grid,
        groups=given.groups,
    )


if __name__ == "__main__":
    main()
