"""What attention costs: `pytest tests/benchmarks/test_attention.py -m slow --benchmark-enable`.

One layer's attention of one token at the shapes of SmolLM2-135M, and the layer-by-layer forward
against the forward in one call.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models.attention import AttentionLM, AttentionWork, Rule
from models.attention_cache import CacheShape
from models.attention_native import NativeCache
from models.draft_tree import DraftTree
from models.native.build import compiler
from models.native.llama import packed
from tests.models.tiny import tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler() is None, reason="the native kernels need a C compiler"),
]

HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64


def layer_cache(context: int) -> tuple[NativeCache, Tensor]:
    """Return a cache of random rows with one token's forward open, and its queries."""
    model = tiny_model("llama", kernels="native")
    kernels = packed(model.module)
    assert kernels is not None
    random = torch.Generator().manual_seed(0)
    memory = torch.randn(2, KV_HEADS, context, HEAD_DIM, generator=random)
    layers = kernels.layerwise(1)
    layers.reserve(1, context)

    def no_rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones(len(positions), HEAD_DIM)
        return one, 0 * one

    cache = NativeCache(
        memory[0],
        memory[1],
        CacheShape(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5, None),
        layers=layers,
        rotated=True,
        rotary=no_rotary,
        work=AttentionWork(),
    )
    cache.rows = context - 1
    cache.open(1, context - 1)
    return cache, torch.randn(1, HEADS, HEAD_DIM, generator=random)


@pytest.mark.parametrize("context", [512, 2048, 8192])
def test_full_attention(benchmark: Any, context: int) -> None:
    cache, queries = layer_cache(context)
    assert benchmark(cache.attend, queries).shape == (1, HEADS, HEAD_DIM)


@pytest.mark.parametrize("context", [512, 2048, 8192])
@pytest.mark.parametrize("sets", [1, KV_HEADS, HEADS])
def test_attention_to_256_rows(benchmark: Any, context: int, sets: int) -> None:
    cache, queries = layer_cache(context)
    random = torch.Generator().manual_seed(1)
    order = torch.rand(sets, context, generator=random).topk(256).indices
    rows = order.sort(-1).values
    assert benchmark(cache.attend_rows, queries, rows).shape == (1, HEADS, HEAD_DIM)


@pytest.mark.parametrize("context", [512, 8192])
def test_scores_of_all_rows(benchmark: Any, context: int) -> None:
    cache, queries = layer_cache(context)
    assert benchmark(cache.scores, queries).shape == (HEADS, 1, context)


@pytest.mark.parametrize("way", ["whole", "layer by layer"])
def test_overhead_of_a_step_of_a_tiny_model(benchmark: Any, way: str) -> None:
    model = tiny_model("llama", kernels="native")
    session: Any = model.session(64) if way == "whole" else AttentionLM(model, Rule).session(64)
    session.prefill([5, 6, 7])
    assert benchmark(session.verify, DraftTree.root(8)).shape == (1, 97)
