r"""Images of Chameleon's class: Anole and Lumina-mGPT, and the way from their codes to pixels.

transformers' Chameleon reads images and writes text; it masks image tokens out of its logits and
has no decoder of codes. Here its transformer writes them, and the decoder, which is a VQGAN's, is
built of transformers' blocks. Its weights are looked for in the model's folder, in this order:

| file | of what |
|---|---|
| `vqgan.safetensors` | what `python -m models.image_chameleon` makes of the released `vqgan.ckpt` |
| `vqvae/model.safetensors` | a tokenizer of its own, as Anole's converted weights have it |
| `*.safetensors` | weights that begin with `model.vqmodel.decoder` |

    python -m models.image_chameleon --vqgan vqgan.ckpt --folder FOLDER \
        --layout lumina-mgpt --grid 48

writes the first, and `vqgan.json` with the layout of an image's tokens; without `--vqgan`, where
there is a decoder already, the layout alone:

| layout | in front of the codes, where B is begin-of-image |
|---|---|
| `anole` | begin-of-text, caption, B |
| `anole`, without a condition | begin-of-text, B |
| `lumina-mgpt` | begin-of-text, a sentence of size and caption, end-of-turn, B, rows, columns |
| `lumina-mgpt`, without a condition | B, rows, columns |

In images of `lumina-mgpt` a token stands behind each row of codes. Rows and columns are named in
steps of two codes. Lumina-mGPT draws them and begin-of-image itself; they follow from the size
asked for, so here they stand in the prompt. End-of-image is neither drawn nor counted. Codes are
decoded in float32.

Source: facebookresearch/chameleon at dbbe47f (`chameleon.py`, `vqgan.py`), Alpha-VLLM/Lumina-mGPT
at 104abe4 (`item_processor.py`, `inference_solver.py`), huggingface/transformers pull request 32013
(Anole's converted weights).
"""

from __future__ import annotations

import argparse
import functools
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.base import PositionConstraints, Unsupported
from models.embedded.tiny_ar_image.model import to_bytes
from models.image_loading import check_names, read_pickled_weights
from models.image_transformers import CodesAmongWords, OnlyCodes, RowEnds

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

WEIGHTS = "vqgan.safetensors"
LAYOUT = "vqgan.json"
_OWN_TOKENIZER = "vqvae/model.safetensors"
_INSIDE = "model.vqmodel."
_NEEDED = ("decoder.", "post_quant_conv.", "quantize.embedding.")

_BEGIN_IMAGE = "<racm3:break>"
_END_OF_TURN = "<reserved08706>"
_ROW_END = "<reserved08799>"
_SIZE = "<reserved{:05d}>"
_SIZE_ZERO = 8800
_CODES_TO_A_STEP = 2
_ANOLE_GRID = 32


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How an image's tokens are laid out.

    Attributes:
        layout: Whose; see the module's table.
        rows: Of codes.
        columns: Of codes.

    Raises:
        ValueError: Lumina-mGPT cannot name the size.
    """

    layout: Literal["anole", "lumina-mgpt"] = "anole"
    rows: int = _ANOLE_GRID
    columns: int = _ANOLE_GRID

    def __post_init__(self) -> None:
        if self.layout not in ("anole", "lumina-mgpt"):
            raise ValueError(f"layout must be anole or lumina-mgpt, got {self.layout!r}.")
        if min(self.rows, self.columns) < 1:
            raise ValueError(f"rows and columns must be positive, got {self.rows}, {self.columns}.")
        if self.has_row_ends and (self.rows % 2 or self.columns % 2):
            raise ValueError(
                f"Lumina-mGPT names sizes in steps of two codes, {self.rows} x {self.columns} has "
                f"no name."
            )

    @property
    def has_row_ends(self) -> bool:
        """Whether a token stands behind each row of codes."""
        return self.layout == "lumina-mgpt"

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self.rows * (self.columns + self.has_row_ends)


class CodesToPixels(nn.Module):
    """A VQGAN's decoder: codes, their vectors, pixels in about [-1, 1].

    Attributes:
        factor: Pixels to a code's side.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        """Build it of weights, of which it reads all its sizes.

        Args:
            state: By the names of the released checkpoint: `decoder.up.3.block.0.conv1.weight`, …,
                `post_quant_conv.weight`, `quantize.embedding.weight`.

        Raises:
            ValueError: They are not those of such a decoder.
        """
        from transformers.models.janus.configuration_janus import JanusVQVAEConfig
        from transformers.models.janus.modeling_janus import JanusVQVAEDecoder

        super().__init__()
        codes = state["quantize.embedding.weight"]
        sizes = _decoder_sizes(state)
        config = JanusVQVAEConfig(
            embed_dim=codes.shape[1], num_embeddings=codes.shape[0], out_channels=3, **sizes
        )
        self.decoder = JanusVQVAEDecoder(config)
        # As in the released decoder, each normalisation has 32 groups.
        # Janus attends at its lowest resolution too, this decoder between the blocks there alone.
        self.decoder.up[0].attn = nn.ModuleList()
        self.quantize = nn.Embedding(codes.shape[0], codes.shape[1])
        self.post_quant_conv = nn.Conv2d(codes.shape[1], config.latent_channels, 1)
        levels = len(config.channel_multiplier)
        self.factor: int = 2 ** (levels - 1)
        own = {_own_name(name, levels): value for name, value in state.items()}
        check_names("decoder of codes", own, self.state_dict())
        self.load_state_dict({name: value.float() for name, value in own.items()})
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, codes: Tensor) -> Tensor:
        """Return images, (images, 3, height, width), of codes (images, rows, columns)."""
        vectors = self.quantize(codes).permute(0, 3, 1, 2)
        images: Tensor = self.decoder(self.post_quant_conv(vectors))
        return images


def _decoder_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return channels, multipliers and blocks of a decoder by its weights."""
    levels = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("decoder.up."))
    blocks = 1 + max(
        int(name.split(".")[4]) for name in state if name.startswith("decoder.up.0.block.")
    )
    outputs = [
        state[f"decoder.up.{level}.block.{blocks - 1}.conv2.weight"].shape[0]
        for level in range(levels)
    ]
    base = outputs[0]
    if any(size % base for size in outputs):
        raise ValueError(f"the decoder's channels {outputs} are no multiples of the first.")
    return {
        "base_channels": base,
        "channel_multiplier": [size // base for size in outputs],
        "num_res_blocks": blocks - 1,
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
    }


def _own_name(name: str, levels: int) -> str:
    """Return what the released name is called here, where levels are counted as they are run."""
    parts = name.replace("quantize.embedding.", "quantize.").split(".")
    if parts[:2] == ["decoder", "up"]:
        parts[2] = str(levels - 1 - int(parts[2]))
    return ".".join(parts)


class ChameleonImages(CodesAmongWords):
    """Chameleon, its image tokens not masked out (arXiv 2405.09818, 2407.06135, 2408.02657)."""

    def __init__(
        self, module: Any, tokenizer: Any, name: str, *, decoder: CodesToPixels, layout: Layout
    ) -> None:
        """Wrap a `ChameleonForConditionalGeneration`.

        Args:
            module, tokenizer, name: See `CaptionedImages`.
            decoder: From codes to pixels.
            layout: Of an image's tokens.

        Raises:
            Unsupported: The tokenizer lacks a token of the layout, or the decoder has other codes.
        """
        super().__init__(module, tokenizer, name)
        mapping = module.model.vocabulary_mapping
        vocabulary = module.config.vocab_size
        self._layout, self._decoder = layout, decoder.to(self.device)
        self._number_codes(mapping.bpe2img, vocabulary)
        known = len(decoder.quantize.weight)
        if sorted(mapping.bpe2img.values()) != list(range(known)):
            raise Unsupported(
                f"'{name}' has {len(mapping.bpe2img)} image tokens, its decoder {known} codes."
            )
        codes = torch.tensor(mapping.image_tokens)
        self._begin_image = [self._token(_BEGIN_IMAGE)]
        self.constraints: PositionConstraints = OnlyCodes(codes, vocabulary)
        if layout.has_row_ends:
            row_end = self._token(_ROW_END)
            self.constraints = RowEnds(codes, row_end, layout.columns, vocabulary)
            self._begin_image += [
                self._token(_SIZE.format(_SIZE_ZERO + size // _CODES_TO_A_STEP))
                for size in (layout.rows, layout.columns)
            ]
        self.facts = self._facts(
            module.lm_head,
            (layout.rows, layout.columns),
            tokens=layout.tokens,
            pixels=decoder.factor,
        )

    @property
    def language_model(self) -> Any:
        """See `CaptionedImages.language_model`."""
        return self.module.model

    def prompt(self, caption: str, *, conditional: bool) -> list[int]:
        """Return the tokens in front of the image; see the module's table."""
        tokenizer = self.tokenizer_of_captions
        begin = [tokenizer.bos_token_id]
        if not self._layout.has_row_ends:
            text = tokenizer(caption, add_special_tokens=False)["input_ids"] if conditional else []
            return [*begin, *text, *self._begin_image]
        if not conditional:
            return [*self._begin_image]
        height, width = self.facts.image_size
        sentence = f"Generate an image of {width}x{height} according to the following prompt:\n"
        text = tokenizer(sentence + caption, add_special_tokens=False)["input_ids"]
        return [*begin, *text, self._token(_END_OF_TURN), *self._begin_image]

    @property
    def codebook(self) -> Tensor:
        """See `models.base.AutoregressiveImageModel.codebook`."""
        table: Tensor = self._decoder.quantize.weight
        return table.detach().float()

    def pixels(self, tokens: Tensor) -> npt.NDArray[np.uint8]:
        """See `models.base.AutoregressiveImageModel.pixels`."""
        rows, columns = self.facts.grid
        codes = self.codes(tokens).view(len(tokens), rows, -1)[:, :, :columns]
        images = self._decoder(codes.to(self.device))
        found: npt.NDArray[np.uint8] = (
            to_bytes(images).permute(0, 2, 3, 1).cpu().contiguous().numpy()
        )
        return found

    def _token(self, word: str) -> int:
        vocabulary = self.tokenizer_of_captions.get_vocab()
        if word not in vocabulary:
            raise Unsupported(
                f"the tokenizer of '{self.name}' has no {word}, which the layout "
                f"'{self._layout.layout}' needs."
            )
        return int(vocabulary[word])


def read_chameleon(folder: Path) -> Callable[[Any, Any, str], ChameleonImages]:
    """Return what makes an image generator of a model and its tokenizer, see `ChameleonImages`.

    Args:
        folder: Of the model, laid out like the hub's.

    Raises:
        Unsupported: Images need something that is not there.
        OSError, ValueError, TypeError: A file is damaged.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not config.get("vocabulary_map"):
        raise Unsupported(
            f"{folder / 'config.json'} has no vocabulary_map, which says what the image tokens are."
        )
    layout, decoder = _read_layout(folder, config), read_decoder(folder)
    return functools.partial(ChameleonImages, decoder=decoder, layout=layout)


def _read_layout(folder: Path, config: Mapping[str, Any]) -> Layout:
    path = folder / LAYOUT
    if path.is_file():
        return Layout(**json.loads(path.read_text(encoding="utf-8")))
    # The classes that Lumina-mGPT's weights were saved by are named so.
    if any("XLLMX" in name for name in config.get("architectures") or ()):
        raise Unsupported(
            f"{folder} has the row ends of Lumina-mGPT, and no {LAYOUT} says how many rows its "
            f"images have; `python -m models.image_chameleon --folder {folder} --layout "
            f"lumina-mgpt --grid 48` writes it for images of 768 pixels."
        )
    return Layout()


def read_decoder(folder: Path) -> CodesToPixels:
    """Return the decoder whose weights lie in a folder; see the module's table.

    Raises:
        Unsupported: There are none.
        ValueError: They are of another kind.
    """
    for file in (WEIGHTS, _OWN_TOKENIZER):
        if (folder / file).is_file():
            return CodesToPixels(_decoder_weights([folder / file], ""))
    inside = _decoder_weights(sorted(folder.glob("*.safetensors")), _INSIDE)
    if any(name.startswith("decoder.") for name in inside):
        return CodesToPixels(inside)
    raise Unsupported(
        f"{folder} has no way from codes to pixels: no {WEIGHTS}, no {_OWN_TOKENIZER} and no "
        f"weights named {_INSIDE}decoder. `python -m models.image_chameleon --vqgan vqgan.ckpt "
        f"--folder {folder}` makes the first of the tokenizer that Chameleon was released with."
    )


def _decoder_weights(files: Sequence[Path], prefix: str) -> dict[str, Tensor]:
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                if name.startswith(tuple(prefix + part for part in _NEEDED)):
                    found[name.removeprefix(prefix)] = tensors.get_tensor(name)
    return found


def convert_vqgan(vqgan: Path | None, folder: Path, layout: Layout) -> None:
    """Write the decoder of a released tokenizer and a layout into a model's folder.

    Args:
        vqgan: `vqgan.ckpt`, a pickle of which nothing but tensors and numbers is read; None where
            the folder has a decoder already.
        folder: Of the model.
        layout: Of an image's tokens.

    Raises:
        ValueError: The file holds something else, or the folder is no model's.
        pickle.UnpicklingError: The file holds something that would have to be executed.
        Unsupported: Without a file, the folder has no decoder.
        OSError: A file cannot be read or written.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no model's folder: it has no config.json.")
    if vqgan is None:
        read_decoder(folder)
    else:
        state = {
            name: value.contiguous()
            for name, value in read_pickled_weights(vqgan).items()
            if name.startswith(_NEEDED)
        }
        if "quantize.embedding.weight" not in state or "decoder.conv_in.weight" not in state:
            raise ValueError(f"{vqgan} is no VQGAN: it lacks a decoder or a table of codes.")
        CodesToPixels(state)
        save_file(state, folder / WEIGHTS)
    text = json.dumps(asdict(layout), indent=2) + "\n"
    (folder / LAYOUT).write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert Chameleon's released tokenizer."""
    parser = argparse.ArgumentParser(
        description="Add the way from codes to pixels to a Chameleon model's folder."
    )
    parser.add_argument("--vqgan", type=Path, help="the released vqgan.ckpt")
    parser.add_argument("--folder", type=Path, required=True, help="folder of the model")
    parser.add_argument("--layout", choices=("anole", "lumina-mgpt"), default="anole")
    parser.add_argument(
        "--grid", type=int, default=_ANOLE_GRID, help="codes to a side, a sixteenth of the pixels"
    )
    given = parser.parse_args(arguments)
    try:
        layout = Layout(layout=given.layout, rows=given.grid, columns=given.grid)
        convert_vqgan(given.vqgan, given.folder, layout)
    except (OSError, ValueError, pickle.UnpicklingError, Unsupported) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
