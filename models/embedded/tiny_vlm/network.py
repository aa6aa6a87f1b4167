"""tiny-vlm's forward pass in plain torch, under the parameter names of transformers' Llava.

The recipe trains with this module: it packs several questions behind one image, and does not
depend on the version of transformers. The tests load its weights into
`LlavaForConditionalGeneration` and compare the logits. The sizes are those of `config.json`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.embedded.tiny_vlm.text import BOS, EOS, IMAGE, PAD, VOCABULARY

IMAGE_SIZE, PATCH = 96, 8
PATCHES = (IMAGE_SIZE // PATCH) ** 2
VISION_WIDTH, VISION_HIDDEN, VISION_LAYERS, VISION_HEADS = 128, 512, 8, 4
TEXT_WIDTH, TEXT_HIDDEN, TEXT_LAYERS, TEXT_HEADS = 160, 448, 8, 5
# As in LLaVA-1.5: the last vision layer but one feeds the projector, its [CLS] is dropped.
FEATURE_LAYER = -2
NORM_EPSILON = 1e-5
ROPE_THETA = 10000.0


def llava_config(vocabulary: int = len(VOCABULARY)) -> dict:
    """Return the config.json of `LlavaForConditionalGeneration` for this network."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": "float32",
        "image_token_index": IMAGE,
        "image_seq_length": PATCHES,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": FEATURE_LAYER,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": VISION_WIDTH,
            "intermediate_size": VISION_HIDDEN,
            "num_hidden_layers": VISION_LAYERS,
            "num_attention_heads": VISION_HEADS,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH,
            "projection_dim": VISION_WIDTH,
            "hidden_act": "gelu",
            "layer_norm_eps": NORM_EPSILON,
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": vocabulary,
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": TEXT_HIDDEN,
            "num_hidden_layers": TEXT_LAYERS,
            "num_attention_heads": TEXT_HEADS,
            "num_key_value_heads": TEXT_HEADS,
            "head_dim": TEXT_WIDTH // TEXT_HEADS,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "rms_norm_eps": NORM_EPSILON,
            "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            "tie_word_embeddings": False,
        },
    }


def rotation(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the rotary angles of positions, (..., head width)."""
    half = TEXT_WIDTH // TEXT_HEADS // 2
    rates = ROPE_THETA ** (-torch.arange(half, device=positions.device) / half)
    angles = positions[..., None] * rates
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys, (..., tokens, head width), by the angles of their positions."""
    low, high = heads.chunk(2, -1)
    return heads * cos.to(heads.dtype) + torch.cat([-high, low], -1) * sin.to(heads.dtype)


def _linear(modules: nn.ModuleDict, name: str) -> nn.Linear:
    module = modules[name]
    assert isinstance(module, nn.Linear)
    return module


class _VisionLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = VISION_WIDTH
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        )
        self.layer_norm1 = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.layer_norm2 = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, VISION_HIDDEN), "fc2": nn.Linear(VISION_HIDDEN, width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = [_linear(self.self_attn, name) for name in ("q_proj", "k_proj", "v_proj")]
        weight = torch.cat([part.weight for part in parts])
        bias = torch.cat([part.bias for part in parts])
        heads = F.linear(self.layer_norm1(x), weight, bias)
        heads = heads.unflatten(-1, (3, VISION_HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads.unbind(0))
        x = x + self.self_attn["out_proj"](attended.transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layer_norm2(x))))


class VisionOutput(NamedTuple):
    """Hidden states of the layer that feeds the projector and of the last one, [CLS] first."""

    features: Tensor
    last: Tensor


class _Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(VISION_WIDTH))
        self.patch_embedding = nn.Conv2d(3, VISION_WIDTH, PATCH, stride=PATCH, bias=False)
        self.position_embedding = nn.Embedding(PATCHES + 1, VISION_WIDTH)


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_VisionLayer() for _ in range(VISION_LAYERS))


class _VisionTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = _Embeddings()
        self.pre_layrnorm = nn.LayerNorm(VISION_WIDTH, eps=NORM_EPSILON)
        self.encoder = _Encoder()
        self.post_layernorm = nn.LayerNorm(VISION_WIDTH, eps=NORM_EPSILON)

    def forward(self, pixels: Tensor, *, only_features: bool = False) -> VisionOutput:
        """Encode normalised pixels, (batch, 3, 96, 96)."""
        patches = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.embeddings.class_embedding.expand(len(pixels), 1, -1)
        x = torch.cat([first.to(patches.dtype), patches], 1)
        x = self.pre_layrnorm(x + self.embeddings.position_embedding.weight)
        layers = list(self.encoder.layers)
        for layer in layers[: FEATURE_LAYER + 1]:
            x = layer(x)
        features = x
        if not only_features:
            for layer in layers[FEATURE_LAYER + 1 :]:
                x = layer(x)
        return VisionOutput(features, x)


class _RmsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(TEXT_WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (TEXT_WIDTH,), self.weight, NORM_EPSILON)


class _TextLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = TEXT_WIDTH
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        self.self_attn = nn.ModuleDict({n: nn.Linear(width, width, bias=False) for n in names})
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(width, TEXT_HIDDEN, bias=False),
                "up_proj": nn.Linear(width, TEXT_HIDDEN, bias=False),
                "down_proj": nn.Linear(TEXT_HIDDEN, width, bias=False),
            }
        )
        self.input_layernorm = _RmsNorm()
        self.post_attention_layernorm = _RmsNorm()

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        parts = [_linear(self.self_attn, name).weight for name in ("q_proj", "k_proj", "v_proj")]
        heads = F.linear(self.input_layernorm(x), torch.cat(parts))
        heads = heads.unflatten(-1, (3, TEXT_HEADS, -1)).permute(2, 0, 3, 1, 4)
        turned = rotate(heads[:2], cos, sin)
        attended = F.scaled_dot_product_attention(turned[0], turned[1], heads[2], attn_mask=mask)
        x = x + self.self_attn["o_proj"](attended.transpose(1, 2).flatten(2))
        both = torch.cat([_linear(self.mlp, name).weight for name in ("gate_proj", "up_proj")])
        gate, up = F.linear(self.post_attention_layernorm(x), both).chunk(2, -1)
        return x + self.mlp["down_proj"](F.silu(gate) * up)


class Layout:
    """Where the parts of a packed sequence stand, and what each of them sees.

    The sequence is a prefix (start, "USER:", the image) and slots of fixed lengths behind it.
    A token sees the prefix and its own slot up to itself, and its position continues from the
    prefix, so that every slot is what it would be alone behind the image.

    Attributes:
        prefix: Tokens of the prefix.
        slots: Tokens of each slot.
        mask: What sees what, (1, 1, length, length), bool.
        positions: (length,), int64.
    """

    def __init__(self, prefix: int, slots: list[int], device: torch.device | str) -> None:
        self.prefix, self.slots = prefix, slots
        # The fused attention kernels want lengths in multiples of eight.
        padding = -(prefix + sum(slots)) % 8
        owner = [0] * prefix
        positions = list(range(prefix))
        for number, length in enumerate([*slots, padding]):
            owner += [number + 1] * length
            positions += range(prefix, prefix + length)
        self.padding = padding
        owners = torch.tensor(owner, device=device)
        causal = torch.ones(len(owner), len(owner), dtype=torch.bool, device=device).tril()
        mask = causal & ((owners[None] == 0) | (owners[None] == owners[:, None]))
        self.mask = mask[None, None]
        self.positions = torch.tensor(positions, device=device)


class _LanguageModel(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, TEXT_WIDTH)
        self.layers = nn.ModuleList(_TextLayer() for _ in range(TEXT_LAYERS))
        self.norm = _RmsNorm()


class _Llava(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vision_tower = _VisionTower()
        self.multi_modal_projector = nn.ModuleDict(
            {
                "linear_1": nn.Linear(VISION_WIDTH, TEXT_WIDTH),
                "linear_2": nn.Linear(TEXT_WIDTH, TEXT_WIDTH),
            }
        )
        self.language_model = _LanguageModel(vocabulary)


class TinyVlm(nn.Module):
    """The network; `state_dict` carries the names of transformers 5.23.

    Args:
        vocabulary: Number of tokens; a detector adds coordinates to the words.
    """

    def __init__(self, vocabulary: int = len(VOCABULARY)) -> None:
        super().__init__()
        self.model = _Llava(vocabulary)
        self.lm_head = nn.Linear(TEXT_WIDTH, vocabulary, bias=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                std = module.weight[0].numel() ** -0.5
                # Branches that add to the residual stream start small, by its depth.
                if name.endswith(("out_proj", "fc2")):
                    std /= math.sqrt(2 * VISION_LAYERS)
                elif name.endswith(("o_proj", "down_proj")):
                    std /= math.sqrt(2 * TEXT_LAYERS)
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.3)
        nn.init.normal_(self.model.vision_tower.embeddings.class_embedding, std=0.3)
        nn.init.normal_(self.lm_head.weight, std=0.02)

    def vision(self, images: Tensor, *, only_features: bool = False) -> VisionOutput:
        """Encode images, (batch, 3, 96, 96), uint8."""
        return self.model.vision_tower(normalise(images), only_features=only_features)

    def project(self, features: Tensor) -> Tensor:
        """Map vision features, [CLS] first, to visual embeddings, (batch, 144, TEXT_WIDTH)."""
        projector = self.model.multi_modal_projector
        return projector["linear_2"](F.gelu(projector["linear_1"](features[:, 1:])))

    def logits(self, visual: Tensor, start: Tensor, words: Tensor, layout: Layout) -> Tensor:
        """Return the logits behind the image.

        Args:
            visual: Visual embeddings, (batch, visual tokens, TEXT_WIDTH).
            start: The tokens in front of the image, (tokens,).
            words: The slots' tokens, one slot after the other, (batch, words).
            layout: Of `start`, the image and the slots.

        Returns:
            (batch, words, vocabulary).
        """
        language = self.model.language_model
        words = F.pad(words, (0, layout.padding))
        first = language.embed_tokens(start).expand(len(words), -1, -1)
        rest = language.embed_tokens(words)
        x = torch.cat([first, visual.to(first.dtype), rest], 1)
        cos, sin = rotation(layout.positions)
        for layer in language.layers:
            x = layer(x, layout.mask, cos, sin)
        x = x[:, layout.prefix : x.shape[1] - layout.padding]
        return self.lm_head(language.norm(x))


def normalise(images: Tensor) -> Tensor:
    """Return pixels as the image processor does: (value / 255 - 0.5) / 0.25, float."""
    return (images.float() / 255 - 0.5) / 0.25
