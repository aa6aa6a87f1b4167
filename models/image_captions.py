"""LlamaGen with captions: a T5 encoder's features of a sentence are the condition.

A folder holds what a class-conditional model's does (see `models/image_loading.py`) and the encoder
in `caption_encoder/`, laid out like `google/flan-t5-xl` on the hub. A caption takes as many
condition tokens as the decoder was trained with (120), padding in front: nobody sees it, and where
there is no condition the same places are hidden, as in the released code.

The encoder's operations are not counted: they are the same for every method. Its time is part of
the prefill. Captions are made plain (lower case, no symbols, one space); what the released code
also takes out of captions from the web (addresses, file names, dimensions) is left in.

Source: FoundationVision/LlamaGen at ce98ec4 (`language/t5.py`, `autoregressive/models/generate.py`,
`autoregressive/sample/sample_t2i.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from models.base import Condition, Trace
from models.image_generation import AutoregressiveImages, DecoderSession, captions_of

if TYPE_CHECKING:
    from models.embedded.tiny_ar_image.model import ImageDecoder, ImageTokenizer
    from models.loading import LoadSettings

ENCODER = "caption_encoder"
_SYMBOLS = re.compile(r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+")
_QUOTES = str.maketrans({**dict.fromkeys("`´«»“”¨", '"'), **dict.fromkeys("‘’", "'")})
_DASHES = re.compile(r"[‐-―−]")


class Captions(NamedTuple):
    """Encoded captions, padding in front.

    Attributes:
        texts: The captions.
        features: (captions, tokens, size), 0 where padding is.
        padding: True where it is, (captions, tokens).
    """

    texts: tuple[str, ...]
    features: Tensor
    padding: Tensor


class CaptionEncoder:
    """A T5 encoder with its tokenizer."""

    def __init__(self, module: Any, tokenizer: Any, tokens: int) -> None:
        """Wrap them.

        Args:
            module: A `T5EncoderModel` in evaluation mode.
            tokenizer: Its own.
            tokens: Of a caption; longer ones are cut.
        """
        self.module = module.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._tokens = tokens

    @property
    def size(self) -> int:
        """Of a token's features."""
        return int(self.module.config.d_model)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Captions:
        """Encode captions."""
        read = self._tokenizer(
            [plain(caption) for caption in captions],
            max_length=self._tokens,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        device = next(self.module.parameters()).device
        seen = read["attention_mask"].to(device).bool()
        features = self.module(
            input_ids=read["input_ids"].to(device), attention_mask=seen
        ).last_hidden_state
        # Padding comes first, so that the last condition token is the caption's end.
        order = seen.int().argsort(dim=1, stable=True)
        moved = features.gather(1, order[..., None].expand_as(features))
        padding = ~seen.gather(1, order)
        return Captions(tuple(captions), moved.masked_fill(padding[..., None], 0.0), padding)


def plain(caption: str) -> str:
    """Return a caption as the encoder was given captions in the training; see the module."""
    text = _DASHES.sub("-", caption.lower().translate(_QUOTES))
    text = re.sub(r"\s+\.\s+", " ", _SYMBOLS.sub(" ", text))
    text = re.sub(r"([^\W\d][,.])\b", r"\1 ", text)
    return " ".join(text.split())


class CaptionedLlamaGen(AutoregressiveImages):
    """A LlamaGen whose condition is a caption."""

    def __init__(
        self,
        decoder: ImageDecoder,
        image_tokenizer: ImageTokenizer,
        name: str,
        encoder: CaptionEncoder,
        *,
        lent: list[Captions] | None = None,
    ) -> None:
        """Wrap networks in evaluation mode.

        Args:
            decoder, image_tokenizer, name: See `AutoregressiveImages`.
            encoder: Of captions.
            lent: Captions that another model of the same encoder has just read, which this one
                drafts for; None reads them anew for each batch.

        Raises:
            ValueError: Encoder and decoder do not fit.
        """
        super().__init__(decoder, image_tokenizer, name)
        if encoder.size != decoder.config.caption_dim:
            raise ValueError(
                f"the encoder's features have the size {encoder.size}, the decoder takes "
                f"{decoder.config.caption_dim}."
            )
        self._encoder = encoder
        self._lent = lent
        self._read: list[Captions] = []

    def session(
        self, conditions: Sequence[Condition], *, guided: bool, capacity: int, trace: Trace
    ) -> DecoderSession:
        """See `models.base.AutoregressiveImageModel.session`."""
        texts = captions_of(conditions, self.name)
        if self._lent and self._lent[0].texts == texts:
            captions = self._lent[0]
        else:
            captions = self._encoder(texts)
            self._read[:] = [captions]
        weight = self.module.output.weight
        with torch.no_grad():
            embedded = self.module.embed_captions(captions.features.to(weight))
            if guided:
                nothing = self.module.embed_captions(self.module.no_caption)
                embedded = torch.cat([embedded, nothing.expand_as(embedded)])
        padding = captions.padding.repeat(2 if guided else 1, 1)
        return self._open(embedded, padding=padding, guided=guided, capacity=capacity, trace=trace)

    def with_decoder(self, decoder: ImageDecoder, name: str) -> CaptionedLlamaGen:
        """Return a draft that reads the captions which this model has read last."""
        return CaptionedLlamaGen(
            decoder, self.image_tokenizer, name, self._encoder, lent=self._read
        )


def load_caption_encoder(folder: Path, tokens: int, settings: LoadSettings) -> CaptionEncoder:
    """Load the encoder of a model's folder.

    Args:
        folder: Of the model.
        tokens: Of a caption.
        settings: Device and dtype; T5 overflows in float16 and runs in float32 then.

    Raises:
        FileNotFoundError: There is none.
    """
    import transformers

    from models.loading import quiet_transformers

    path = folder / ENCODER
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} holds no encoder of captions; LlamaGen's is google/flan-t5-xl: put its "
            f"config.json, tokenizer and *.safetensors there."
        )
    dtype = settings.dtype_name()
    with quiet_transformers():
        module: Any = transformers.T5EncoderModel.from_pretrained(
            path,
            dtype=getattr(torch, "float32" if dtype == "float16" else dtype),
            use_safetensors=True,
            local_files_only=True,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    module = module.to(device=settings.device_name())
    return CaptionEncoder(module, tokenizer, tokens)
