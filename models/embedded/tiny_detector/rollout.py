"""Answers of tiny-detector token by token, with a cache of keys and values, many at a time.

For the recipes: evaluation is greedy, post-training samples several answers to one request, which
share the run over the image and the prompt. The layers are those of `TinyVlm`, run by hand because
its own forward keeps nothing; a test holds the tokens equal to transformers' `generate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.embedded.tiny_vlm.network import TEXT_HEADS, TinyVlm, rotate, rotation
from models.embedded.tiny_vlm.text import EOS


class Reply(NamedTuple):
    """Tokens and their log-probabilities, ended by the end token or the limit."""

    ids: list[int]
    log_probabilities: list[float]


class _Cache:
    """Keys and values of all layers, and the row's way through them."""

    def __init__(self, model: TinyVlm) -> None:
        # Torch's types know no attributes of modules in a list.
        self.language: Any = model.model.language_model
        self.head = model.lm_head
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def run(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Run new tokens, (rows, new, width), and keep their keys and values.

        Args:
            x: Embeddings.
            positions: (rows, new).
            mask: What the new tokens see, (rows, 1, new, all); None is causal, for a first run.
        """
        # The same for all heads.
        cos, sin = rotation(positions[:, None])
        is_first = not self.keys
        for number, layer in enumerate(self.language.layers):
            parts = layer.self_attn
            normed = layer.input_layernorm(x)
            heads = [
                parts[name](normed).unflatten(-1, (TEXT_HEADS, -1)).transpose(1, 2)
                for name in ("q_proj", "k_proj", "v_proj")
            ]
            query, key, value = heads
            query, key = (rotate(each, cos, sin) for each in (query, key))
            if is_first:
                self.keys.append(key)
                self.values.append(value)
            else:
                self.keys[number] = torch.cat([self.keys[number], key], 2)
                self.values[number] = torch.cat([self.values[number], value], 2)
            attended = F.scaled_dot_product_attention(
                query,
                self.keys[number],
                self.values[number],
                attn_mask=mask,
                is_causal=mask is None,
            )
            x = x + parts["o_proj"](attended.transpose(1, 2).flatten(2))
            mlp = layer.mlp
            normed = layer.post_attention_layernorm(x)
            x = x + mlp["down_proj"](F.silu(mlp["gate_proj"](normed)) * mlp["up_proj"](normed))
        return x

    def repeat(self, copies: int) -> None:
        """Give each row so many copies, side by side."""
        self.keys = [each.repeat_interleave(copies, 0) for each in self.keys]
        self.values = [each.repeat_interleave(copies, 0) for each in self.values]

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits after some states, float32."""
        found: Tensor = self.head(self.language.norm(states)).float()
        return found


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Return probabilities with the unlikeliest tokens set to 0, not normalised.

    What is kept is the smallest set of most likely tokens whose sum reaches `top_p`
    (arXiv 1904.09751).

    Args:
        probabilities: (rows, vocabulary).
        top_p: In (0, 1]; 1 keeps all.
    """
    if top_p >= 1:
        return probabilities
    ordered, places = probabilities.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(probabilities).scatter(
        -1, places, ordered.masked_fill(before >= top_p, 0.0)
    )


@torch.no_grad()
def rollout(
    model: TinyVlm,
    visual: Tensor,
    start: Tensor,
    prompts: Sequence[Sequence[int]],
    *,
    limit: int,
    copies: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    draws: torch.Generator | None = None,
) -> list[Reply]:
    """Answer requests, each `copies` times.

    Args:
        model: The network.
        visual: Embeddings of each request's image, (requests, patches, width).
        start: Tokens in front of the image.
        prompts: Tokens behind it.
        limit: Most tokens of an answer.
        copies: Answers to each request, side by side in the result.
        temperature: 0 is greedy.
        top_p: See `nucleus`.
        draws: Randomness of the sampling; on the CPU whatever the device.

    Returns:
        Answers with the log-probabilities that the model itself gives them, at temperature 1 and
        over its whole vocabulary.
    """
    device = visual.device
    lengths = torch.tensor([len(ids) for ids in prompts], device=device)
    longest, prefix = int(lengths.max()), len(start) + visual.shape[1]
    words = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    for row, ids in enumerate(prompts):
        words[row, : len(ids)] = torch.tensor(ids, device=device)
    cache = _Cache(model)
    embed = cache.language.embed_tokens
    first = embed(start).expand(len(prompts), -1, -1)
    x = torch.cat([first, visual.to(first.dtype), embed(words)], 1)
    positions = torch.arange(x.shape[1], device=device).expand(len(prompts), -1)
    states = cache.run(x, positions, None)
    at = (prefix + lengths - 1)[:, None, None].expand(-1, 1, states.shape[-1])
    logits = cache.logits(states.gather(1, at)[:, 0]).repeat_interleave(copies, 0)
    cache.repeat(copies)
    lengths = lengths.repeat_interleave(copies)
    rows = len(lengths)
    # Nobody sees the padding behind a short prompt.
    seen = torch.arange(prefix + longest, device=device)[None] < (prefix + lengths)[:, None]
    told = torch.full((rows, limit), EOS, device=device)
    scores = torch.zeros(rows, limit, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    for step in range(limit):
        sure = logits.log_softmax(-1)
        if temperature:
            kept = nucleus((logits / temperature).softmax(-1), top_p)
            token = torch.multinomial(kept.cpu(), 1, generator=draws)[:, 0].to(device)
        else:
            token = sure.argmax(-1)
        token = token.where(~ended, EOS)
        told[:, step] = token
        scores[:, step] = sure.gather(1, token[:, None])[:, 0]
        ended |= token == EOS
        if bool(ended.all()):
            break
        seen = torch.cat([seen, torch.ones(rows, 1, dtype=torch.bool, device=device)], 1)
        places = (prefix + lengths + step)[:, None]
        states = cache.run(embed(token)[:, None], places, seen[:, None, None])
        logits = cache.logits(states[:, 0])
    replies = []
    for ids, sure_row in zip(told.tolist(), scores.tolist(), strict=True):
        stop = ids.index(EOS) + 1 if EOS in ids else len(ids)
        replies.append(Reply(ids[:stop], sure_row[:stop]))
    return replies
