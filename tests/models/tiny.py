"""Tiny random models of real architectures, built from configs in code."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
import transformers

from models.graphs import GraphPool
from models.text import CausalLM, Kernels
from runner.conformance_base import sharpen

_SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_GPT2 = {
    "vocab_size": 97,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _SIZES),
    "qwen2": ("Qwen2ForCausalLM", _SIZES),
    "mistral-sliding-window": ("MistralForCausalLM", {**_SIZES, "sliding_window": 8}),
    "gemma": ("GemmaForCausalLM", _SIZES),
    "gemma2": ("Gemma2ForCausalLM", {**_SIZES, "sliding_window": 8}),
    "gpt2": ("GPT2LMHeadModel", _GPT2),
}
# What `tiny_module` keeps for all tests of a process, with the configuration that it was made with.
_MADE: dict[tuple[str, int, str | None], tuple[Any, dict[str, Any]]] = {}


class NumberTokenizer:
    """A tokenizer whose text is the ids themselves: `7 12 3`."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(f"{token} " for token in token_ids)


@functools.cache
def tiny_module(architecture: str, seed: int = 0, attention: str | None = None) -> Any:
    """Return a seeded random model in float32, weights large enough for decided argmaxes."""
    class_name, settings = ARCHITECTURES[architecture]
    model_class = getattr(transformers, class_name)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    config = model_class.config_class(**settings, attn_implementation=attention)
    # Kept for all tests: whoever asks first may be inside of inference mode.
    with torch.inference_mode(False):
        module = model_class(config)
        sharpen(module, 6.0, biases=0.1)
    torch.random.set_rng_state(state)
    _MADE[architecture, seed, attention] = module, _settings(module)
    return module.eval()


def _settings(module: Any) -> dict[str, Any]:
    """Return the configuration without what saving a module notes in it."""
    noted = ("architectures", "dtype")
    return {name: value for name, value in module.config.to_dict().items() if name not in noted}


def changed_modules() -> list[str]:
    """Return the shared modules whose configuration a test changed; then all are made anew."""
    changed = [
        f"{architecture} (seed {seed})"
        for (architecture, seed, _), (module, made) in _MADE.items()
        if _settings(module) != made
    ]
    if changed:
        tiny_module.cache_clear()
        _MADE.clear()
    return changed


def tiny_model(
    architecture: str = "llama",
    *,
    kernels: Kernels | Literal["static"] = "transformers",
    seed: int = 0,
) -> CausalLM:
    """Return a capability object over `tiny_module`.

    Kernels `static` are the forwards over static buffers that a GPU records, without recording.
    """
    module = tiny_module(architecture, seed)
    if kernels == "static":
        model = CausalLM(module, NumberTokenizer(), f"tiny-{architecture}", kernels="transformers")
        model._graphs = GraphPool(module, record=lambda forward: forward)
        return model
    return CausalLM(module, NumberTokenizer(), f"tiny-{architecture}", kernels=kernels)
