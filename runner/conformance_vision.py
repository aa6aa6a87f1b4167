"""Tiny random vision-language models of the architectures that visual-token methods run on."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from runner.conformance_base import byte_tokenizer, sharpen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from models.detector import CoordinateDetector
    from models.vision_language import VisionLanguage

Architecture = Literal["llava", "llava-next", "qwen2.5-vl"]
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)

_SIDE, _PATCH = 24, 4
_SPECIALS = ("<end>", "<image>", "<vision>", "</vision>")
_QWEN_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<vision><image></vision>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}:"
)
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": _SIDE,
    "patch_size": _PATCH,
    "projection_dim": 32,
    "hidden_act": "gelu",
}
_QWEN_VISION = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "out_hidden_size": 48,
    "patch_size": _PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    # Windows of 3 x 3 groups of four patches.
    "window_size": 24,
    "fullatt_block_indexes": [1, 3],
}


def _text(vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }


def tiny_vision(
    architecture: Architecture = "llava",
    attention: str = "sdpa",
    seed: int = 0,
    added: Sequence[str] = (),
) -> VisionLanguage:
    """Return a seeded random model of some hundred thousand weights that reads bytes.

    Args:
        architecture: `llava` has 36 visual tokens; `llava-next` adds crops and separators by the
            image's shape; `qwen2.5-vl` has one token for 8 x 8 pixels, and windows.
        attention: Kernel of transformers, `sdpa` or `eager`.
        seed: Of the weights.
        added: Tokens beyond the bytes and its own special ones.
    """
    from models.tokenization import HubTokenizer
    from models.vision_language import VisionLanguage

    tokenizer = byte_tokenizer((*_SPECIALS, *added))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = _module(architecture, len(tokenizer), attention)
        sharpen(module, 4, biases=0.1)
    template = _QWEN_TEMPLATE if architecture == "qwen2.5-vl" else None
    return VisionLanguage(
        module,
        HubTokenizer(tokenizer),
        _image_processor(architecture),
        f"tiny-random-{architecture}",
        template=template,
    )


def tiny_detector(architecture: Architecture = "llava", bins: int = 32) -> CoordinateDetector:
    """Return a random detector that writes coordinate tokens; see `tiny_vision`.

    Args:
        architecture: Of the model.
        bins: Different values of a coordinate.
    """
    from models.detector import CoordinateDetector

    markers = ("object_ref_start", "object_ref_end", "box_start", "box_end")
    added = [f"<|{marker}|>" for marker in markers] + [f"<{number}>" for number in range(bins)]
    return CoordinateDetector(tiny_vision(architecture, added=added))


def picture(text: str, height: int = _SIDE, width: int = _SIDE) -> npt.NDArray[np.uint8]:
    """Return noise in blocks of 4 x 4 pixels, a function of a text, (height, width, 3), uint8."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, 256, (-(-height // _PATCH), -(-width // _PATCH), 3), dtype=np.uint8)
    return blocks.repeat(_PATCH, 0).repeat(_PATCH, 1)[:height, :width]


def _module(architecture: Architecture, vocab_size: int, attention: str) -> Any:
    import transformers as library

    transformers: Any = library

    image = _SPECIALS.index("<image>")
    text = _text(vocab_size)
    if architecture == "qwen2.5-vl":
        text["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 2, 2],
        }
        qwen = transformers.Qwen2_5_VLConfig(
            text_config=text,
            vision_config=_QWEN_VISION,
            image_token_id=image,
            vision_start_token_id=_SPECIALS.index("<vision>"),
            vision_end_token_id=_SPECIALS.index("</vision>"),
            attn_implementation=attention,
        )
        return transformers.Qwen2_5_VLForConditionalGeneration(qwen)
    shared: dict[str, Any] = {
        "text_config": transformers.LlamaConfig(**text),
        "vision_config": transformers.CLIPVisionConfig(**_VISION),
        "image_token_index": image,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "attn_implementation": attention,
    }
    if architecture == "llava":
        return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**shared))
    side = _SIDE
    shapes = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    config = transformers.LlavaNextConfig(**shared, image_grid_pinpoints=shapes)
    return transformers.LlavaNextForConditionalGeneration(config)


def _image_processor(architecture: Architecture) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    values: dict[str, Any] = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    if architecture == "qwen2.5-vl":
        return Qwen2VLImageProcessorPil(
            patch_size=_PATCH,
            merge_size=2,
            temporal_patch_size=2,
            size={"shortest_edge": 256, "longest_edge": 65536},
            **values,
        )
    side = {"height": _SIDE, "width": _SIDE}
    if architecture == "llava":
        return CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False, **values)
    shapes = [[_SIDE, 2 * _SIDE], [2 * _SIDE, _SIDE], [2 * _SIDE, 2 * _SIDE]]
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": _SIDE}, crop_size=side, image_grid_pinpoints=shapes, **values
    )
