"""Image generators of transformers: Janus, Emu3, Chameleon, behind the same sessions as LlamaGen's.

All are language models that draw image tokens after a caption. Captions of a batch have different
lengths, so prompts are padded on the left; padding is hidden and not counted as a position.

| model | image tokens | without a condition | row ends |
|---|---|---|---|
| Janus | own embedding and head | padding between begin-of-text and begin-of-image | - |
| Emu3 | part of the vocabulary | the empty caption | a token behind each row of codes |
| Anole, Lumina-mGPT | part of the vocabulary | see `models/image_chameleon.py` | Lumina-mGPT's |

Emu3's tokens behind the last row (end of frame, end of image) are always
the same; they are neither drawn nor counted.

Source: transformers 5.23, `modeling_janus.py`, `modeling_emu3.py`, `processing_emu3.py`, whose own
image generation ours is held against in the tests.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.base import (
    Condition,
    GeneratedImages,
    ImageSampling,
    ImageTokenFacts,
    PositionConstraints,
    Trace,
    Unsupported,
    WindowOutput,
)
from models.device import OnDevice, linear_parameters
from models.embedded.tiny_ar_image.model import to_bytes
from models.image_generation import (
    AnywhereAnything,
    CountingSession,
    RasterLoop,
    captions_of,
    generate_images,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from models.base import AutoregressiveImageModel
    from models.loading import LoadSettings

# Emu3's own default, 720 x 720 pixels in patches of 8.
_EMU3_GRID = (90, 90)


class CaptionedImages(OnDevice):
    """What the models of this module share: a language model that goes on with image tokens.

    Attributes:
        name: For messages and tables.
        facts: Sizes.
        module: The model of transformers.
        constraints: Which tokens can stand where.
        kernels: What runs the forwards, for the record.
    """

    kernels = "transformers"
    facts: ImageTokenFacts
    constraints: PositionConstraints

    def __init__(self, module: Any, tokenizer: Any, name: str) -> None:
        """Wrap a model.

        Args:
            module: In evaluation mode, with `sdpa` attention.
            tokenizer: Of transformers, with the words around an image.
            name: For messages and tables.
        """
        self.module = module.eval().requires_grad_(False)
        self.tokenizer_of_captions = tokenizer
        self.name = name

    @property
    @abstractmethod
    def language_model(self) -> Any:
        """The transformer, from embeddings to hidden states behind its last norm."""

    @abstractmethod
    def prompt(self, caption: str, *, conditional: bool) -> list[int]:
        """Return the tokens in front of the image."""

    @abstractmethod
    def embed(self, tokens: Tensor) -> Tensor:
        """See `models.base.AutoregressiveImageModel.embed`."""

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """See `models.base.AutoregressiveImageModel.head`."""

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """See `models.base.AutoregressiveImageModel.codebook`."""

    @abstractmethod
    def codes(self, tokens: Tensor) -> Tensor:
        """See `models.base.AutoregressiveImageModel.codes`."""

    @abstractmethod
    def pixels(self, tokens: Tensor) -> npt.NDArray[np.uint8]:
        """See `models.base.AutoregressiveImageModel.pixels`."""

    def session(
        self, conditions: Sequence[Condition], *, guided: bool, capacity: int, trace: Trace
    ) -> CaptionSession:
        """See `models.base.AutoregressiveImageModel.session`."""
        captions = captions_of(conditions, self.name)
        prompts = [self.prompt(caption, conditional=True) for caption in captions]
        if guided:
            prompts += [self.prompt(caption, conditional=False) for caption in captions]
        return CaptionSession(self, prompts, rows=len(captions), capacity=capacity, trace=trace)

    def generate(
        self, conditions: Sequence[Condition], seeds: Sequence[int], sampling: ImageSampling
    ) -> GeneratedImages:
        """Make images plainly, one token a forward."""
        return generate_images(self, conditions, seeds, sampling, RasterLoop())

    def _facts(self, head: Any, grid: tuple[int, int], *, tokens: int, pixels: int) -> Any:
        """Return the sizes.

        Args:
            head: Module from hidden states to logits.
            grid: Rows and columns of codes.
            tokens: Image tokens in the sequence.
            pixels: To a code's side.
        """
        config = self.language_model.config
        weight = next(self.language_model.parameters())
        own = linear_parameters(head)
        matrices = linear_parameters(self.language_model) + own
        heads = config.num_attention_heads
        last = [part for part in head.modules() if isinstance(part, torch.nn.Linear)][-1]
        return ImageTokenFacts(
            vocab_size=last.out_features,
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", heads),
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            hidden_size=config.hidden_size,
            matrix_parameters=matrices,
            head_parameters=own,
            weight_bytes=matrices * weight.element_size(),
            kv_item_bytes=weight.element_size(),
            max_positions=config.max_position_embeddings,
            eos_ids=frozenset(),
            dtype=str(weight.dtype).removeprefix("torch."),
            image_tokens=tokens,
            grid=grid,
            image_size=(grid[0] * pixels, grid[1] * pixels),
            classes=0,
        )


class CaptionSession(CountingSession):
    """A session over a language model of transformers, prompts padded on the left."""

    def __init__(
        self,
        model: CaptionedImages,
        prompts: Sequence[Sequence[int]],
        *,
        rows: int,
        capacity: int,
        trace: Trace,
    ) -> None:
        """Open a session.

        Args:
            model: Whose.
            prompts: Of all conditional rows, then of the unconditional ones if there are any.
            rows: Images.
            capacity: Image tokens there may be in the cache.
            trace: See `models.base.AutoregressiveImageModel.session`.

        Raises:
            Unsupported: Prompt and image are longer than the model's context.
        """
        from transformers import DynamicCache

        super().__init__(
            model.facts,
            rows=rows,
            guided=len(prompts) > rows,
            capacity=capacity,
            trace=trace,
            synchronize=model.synchronize,
        )
        longest = max(len(prompt) for prompt in prompts)
        length = longest + model.facts.image_tokens
        if length > model.facts.max_positions:
            raise Unsupported(
                f"{longest} prompt tokens and {model.facts.image_tokens} image tokens exceed the "
                f"context of {model.facts.max_positions} tokens of '{model.name}'."
            )
        self._model = model
        device = model.device
        padding = [longest - len(prompt) for prompt in prompts]
        rows_ids = [[0] * pad + [*prompt] for pad, prompt in zip(padding, prompts, strict=True)]
        self._ids = torch.tensor(rows_ids, device=device)
        self._padding = torch.tensor(padding, device=device)
        self._cache: Any = DynamicCache(config=model.language_model.config)

    def _read_condition(self) -> tuple[WindowOutput, int]:
        embedded = self._model.module.get_input_embeddings()(self._ids)
        length = self._ids.shape[1]
        entries = torch.arange(length, device=self._ids.device)
        positions = (entries - self._padding[:, None]).clamp(min=0)
        hidden = self._forward(embedded, positions, entries[None] <= entries[:, None])[:, -1:]
        return WindowOutput(self._model.head(hidden), hidden, self.rows), length

    def _run(self, tokens: Tensor, places: Tensor, mask: Tensor | None) -> WindowOutput:
        device = self._ids.device
        width, held = tokens.shape[1], self._condition_tokens + self.length
        if mask is None:
            entries = torch.arange(held + width, device=device)
            mask = entries[None] <= entries[held:, None]
        positions = places.to(device) + self._condition_tokens - self._padding[:, None]
        hidden = self._forward(self._model.embed(tokens.to(device)), positions, mask.to(device))
        return WindowOutput(self._model.head(hidden), hidden, self.rows)

    @torch.no_grad()
    def _forward(self, embedded: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Run embeddings; `mask` is (width, entries), to which the padding is added."""
        entries = torch.arange(mask.shape[1], device=mask.device)
        is_prompt = entries >= self._padding[:, None]
        # A padded place that saw nothing at all would be NaN; what it sees is seen by nobody.
        itself = entries[-mask.shape[0] :, None] == entries
        seen = (mask & is_prompt[:, None]) | itself
        hidden: Tensor = self._model.language_model(
            inputs_embeds=embedded,
            attention_mask=seen[:, None],
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        return hidden

    def _crop(self, entries: int) -> None:
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :entries], layer.values[:, :, :entries]

    def _keep(self, start: int, path: Sequence[int]) -> None:
        kept = torch.tensor([*range(start), *(start + offset for offset in path)])
        for layer in self._cache.layers:
            places = kept.to(layer.keys.device)
            layer.keys, layer.values = layer.keys[:, :, places], layer.values[:, :, places]


class JanusImages(CaptionedImages):
    """Janus (arXiv 2410.13848, 2501.17811)."""

    def __init__(self, module: Any, tokenizer: Any, name: str) -> None:
        """Wrap a `JanusForConditionalGeneration`; see `CaptionedImages`."""
        super().__init__(module, tokenizer, name)
        side = math.isqrt(module.model.vision_model.config.num_image_tokens)
        levels = len(module.config.vq_config.channel_multiplier)
        self.constraints = AnywhereAnything()
        self.facts = self._facts(
            module.model.generation_head, (side, side), tokens=side * side, pixels=2 ** (levels - 1)
        )
        settings = module.generation_config
        self._begin_text = settings.bos_token_id
        self._padding = settings.pad_token_id
        self._begin_image = (getattr(settings, "generation_kwargs", None) or {})["boi_token_id"]

    @property
    def language_model(self) -> Any:
        """See `CaptionedImages.language_model`."""
        return self.module.model.language_model

    def prompt(self, caption: str, *, conditional: bool) -> list[int]:
        """Return the caption in the chat template, if there is one, and begin-of-image."""
        tokenizer, text = self.tokenizer_of_captions, caption
        if tokenizer.chat_template:
            content = [{"type": "text", "text": caption}]
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        tokens = [*tokenizer(text)["input_ids"], self._begin_image]
        if conditional:
            return tokens
        kept = (self._begin_text, self._begin_image)
        return [token if token in kept else self._padding for token in tokens]

    def embed(self, tokens: Tensor) -> Tensor:
        """See `models.base.AutoregressiveImageModel.embed`."""
        found: Tensor = self.module.prepare_embeddings_for_image_generation(tokens)
        return found

    def head(self, hidden: Tensor) -> Tensor:
        """See `models.base.AutoregressiveImageModel.head`."""
        logits: Tensor = self.module.model.generation_head(hidden).float()
        return logits

    @property
    def codebook(self) -> Tensor:
        """See `models.base.AutoregressiveImageModel.codebook`."""
        table = self.module.model.vqmodel.quantize.embedding.weight
        return torch.nn.functional.normalize(table.detach().float(), dim=-1)

    def codes(self, tokens: Tensor) -> Tensor:
        """See `models.base.AutoregressiveImageModel.codes`: tokens are codes."""
        return tokens

    def pixels(self, tokens: Tensor) -> npt.NDArray[np.uint8]:
        """See `models.base.AutoregressiveImageModel.pixels`."""
        with torch.no_grad():
            images = self.module.decode_image_tokens(tokens.to(self.device))
        found: npt.NDArray[np.uint8] = to_bytes(images).cpu().numpy()
        return found


class OnlyCodes:
    """Codes everywhere, words nowhere."""

    def __init__(self, codes: Tensor, vocab_size: int) -> None:
        """Lay the mask out.

        Args:
            codes: Ids of the tokens that are codes.
            vocab_size: Number of ids.
        """
        self._mask = torch.ones(vocab_size, dtype=torch.bool)
        self._mask[codes] = False

    def forbidden(self, places: Tensor) -> Tensor:
        """See `models.base.PositionConstraints.forbidden`."""
        return self._mask.to(places.device).expand(len(places), -1)


class RowEnds:
    """A token behind each row of codes, codes elsewhere, and nothing else anywhere."""

    def __init__(self, codes: Tensor, end: int, columns: int, vocab_size: int) -> None:
        """Lay the two masks out.

        Args:
            codes: Ids of the tokens that are codes.
            end: Id of the row's end.
            columns: Codes of a row.
            vocab_size: Number of ids.
        """
        self._columns = columns
        self._masks = torch.ones(2, vocab_size, dtype=torch.bool)
        self._masks[0, codes] = False
        self._masks[1, end] = False

    def forbidden(self, places: Tensor) -> Tensor:
        """See `models.base.PositionConstraints.forbidden`."""
        is_end = places % (self._columns + 1) == self._columns
        return self._masks.to(places.device)[is_end.long()]


class CodesAmongWords(CaptionedImages):
    """Models whose image tokens are part of the vocabulary."""

    def _number_codes(self, codes_by_token: Mapping[int, int], vocab_size: int) -> None:
        """Remember the code of each token that is one."""
        self._to_code = torch.full((vocab_size,), -1)
        for token, code in codes_by_token.items():
            self._to_code[token] = code

    def embed(self, tokens: Tensor) -> Tensor:
        """See `models.base.AutoregressiveImageModel.embed`."""
        found: Tensor = self.module.get_input_embeddings()(tokens)
        return found

    def head(self, hidden: Tensor) -> Tensor:
        """See `models.base.AutoregressiveImageModel.head`."""
        logits: Tensor = self.module.lm_head(hidden).float()
        return logits

    def codes(self, tokens: Tensor) -> Tensor:
        """See `models.base.AutoregressiveImageModel.codes`: words and row ends are none."""
        return self._to_code.to(tokens.device)[tokens]


class Emu3Images(CodesAmongWords):
    """Emu3 (arXiv 2409.18869)."""

    def __init__(
        self,
        module: Any,
        tokenizer: Any,
        name: str,
        *,
        grid: tuple[int, int] = _EMU3_GRID,
        scaling: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Wrap an `Emu3ForConditionalGeneration`.

        Args:
            module, tokenizer, name: See `CaptionedImages`.
            grid: Rows and columns of codes.
            scaling: `image_mean` and `image_std` of the image processor, three numbers each; None
                for those of Emu3's, which are CLIP's.
        """
        from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        super().__init__(module, tokenizer, name)
        mapping = module.vocabulary_mapping
        rows, columns = grid
        vocabulary = module.config.text_config.vocab_size
        self._number_codes(mapping.bpe2img, vocabulary)
        self.constraints = RowEnds(
            torch.tensor(mapping.image_tokens), mapping.eol_token_id, columns, vocabulary
        )
        self.facts = self._facts(
            module.lm_head,
            grid,
            tokens=rows * (columns + 1),
            pixels=module.model.vqmodel.vision_spatial_factor,
        )
        self._scaling = scaling or {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}

    @property
    def language_model(self) -> Any:
        """See `CaptionedImages.language_model`."""
        return self.module.model.text_model

    def prompt(self, caption: str, *, conditional: bool) -> list[int]:
        """Return the caption and the words that say how large an image begins."""
        tokenizer = self.tokenizer_of_captions
        rows, columns = self.facts.grid
        text = (
            f"{tokenizer.bos_token}{caption if conditional else ''}"
            f"{tokenizer.boi_token}{rows}*{columns}{tokenizer.image_wrapper_token}"
        )
        return [*tokenizer(text, add_special_tokens=False)["input_ids"]]

    @property
    def codebook(self) -> Tensor:
        """See `models.base.AutoregressiveImageModel.codebook`."""
        table: Tensor = self.module.model.vqmodel.quantize.embedding.weight
        return table.detach().float()

    def pixels(self, tokens: Tensor) -> npt.NDArray[np.uint8]:
        """See `models.base.AutoregressiveImageModel.pixels`."""
        rows, columns = self.facts.grid
        codes = self.codes(tokens).view(len(tokens), rows, columns + 1)[:, :, :-1]
        with torch.no_grad():
            images = self.module.model.vqmodel.decode(codes.to(self.device)).float()
        images = images.reshape(len(tokens), 3, *self.facts.image_size)
        mean, deviation = (
            torch.tensor(self._scaling[name], device=images.device)[:, None, None]
            for name in ("image_mean", "image_std")
        )
        unit = (images * deviation + mean) * 2 - 1
        found: npt.NDArray[np.uint8] = to_bytes(unit).permute(0, 2, 3, 1).cpu().contiguous().numpy()
        return found


def load_transformers_images(
    folder: Path, model_id: str, settings: LoadSettings, kind: str
) -> AutoregressiveImageModel:
    """Load an image generator of transformers from a folder laid out like the hub's.

    Args:
        folder: With config.json, a tokenizer and *.safetensors.
        model_id: For messages and tables.
        settings: Device and dtype.
        kind: `model_type` of its configuration.

    Raises:
        Unsupported: It is unknown here, or lacks what images need.
        OSError, ValueError: Files are missing or damaged.
    """
    from models.loading import quiet_transformers

    names = {"janus": "Janus", "emu3": "Emu3", "chameleon": "Chameleon"}
    if kind not in names:
        raise Unsupported(
            f"'{model_id}' is of the type {kind or 'unknown'!r}; image generators here are "
            f"tiny-ar-image, llamagen, {', '.join(names)}."
        )
    import transformers

    chameleon = None
    if kind == "chameleon":
        from models.image_chameleon import read_chameleon

        chameleon = read_chameleon(folder)  # before the large files
    name = f"{names[kind]}ForConditionalGeneration"
    with quiet_transformers():
        module = getattr(transformers, name).from_pretrained(
            folder,
            dtype=getattr(torch, settings.dtype_name()),
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    module.to(settings.device_name())
    if kind == "janus":
        return JanusImages(module, tokenizer, model_id)
    if chameleon is not None:
        return chameleon(module, tokenizer, model_id)
    path = folder / "preprocessor_config.json"
    fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    scaling = {name: fields[name] for name in ("image_mean", "image_std") if name in fields}
    return Emu3Images(module, tokenizer, model_id, scaling=scaling or None)
