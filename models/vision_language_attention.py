"""Reductions of attention maps, computed beside the fused attention and never as a whole map.

A method that ranks tokens by the attention they receive needs sums over a map of queries x keys,
not the map: for 2,880 visual tokens and 32 heads that would be a gigabyte. The sums are made of
blocks of queries, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Largest number of attention weights that exist at a time.
_BLOCK_WEIGHTS = 2**21


def attention_sums(
    queries: Tensor, keys: Tensor, *, scale: float, last_visible: Tensor | None = None
) -> Tensor:
    """Return how much attention each key receives from all queries together.

    Args:
        queries: (heads, rows, head_dim).
        keys: (kv_heads, columns, head_dim); query heads share them in order.
        scale: Factor of the scores.
        last_visible: Last column that each query attends to, (rows,); all columns when None.

    Returns:
        Sums over the queries of the softmax, by head, (heads, columns), float32; divided by the
        number of queries they are means.
    """
    heads, rows, _ = queries.shape
    columns = keys.shape[1]
    shared = keys.repeat_interleave(heads // len(keys), dim=0).float()
    total = torch.zeros(heads, columns, device=keys.device)
    block = max(1, _BLOCK_WEIGHTS // (heads * columns))
    places = torch.arange(columns, device=keys.device)
    for start in range(0, rows, block):
        part = slice(start, start + block)
        scores = queries[:, part].float() @ shared.transpose(1, 2) * scale
        if last_visible is not None:
            scores.masked_fill_(places > last_visible[part, None], -torch.inf)
        total += scores.softmax(-1).sum(1)
    return total


def sums_flops(heads: int, rows: int, columns: int, head_dim: int) -> float:
    """Return the operations of `attention_sums`: scores, and one addition for each weight."""
    return (2.0 * head_dim + 1) * heads * rows * columns


@contextmanager
def captured_output(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a module returns inside the block; its hook is gone afterwards."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        outputs.append(output)

    handle = module.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()
