"""Teacher forcing: what a model thinks of a given continuation, read token by token as it decodes.

Greedy texts part after the first difference, and then say little about how close two models are; a
small model may not answer a question at all. The loss on a given text has neither problem. The
continuation is fed as decoding would feed it, one forward a token over the cache, so a method that
changes the decoding (sparse attention, a smaller cache) is graded on exactly what it changed; a
single forward over the whole text would run as a prefill, which most such methods leave alone.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.base import (
    Forward,
    Generation,
    InvalidOutput,
    TextGenerator,
    Tokenizer,
    Trace,
)
from models.decode import check_room, count_work
from models.draft_tree import DraftTree


class SplitText(NamedTuple):
    """Ids of a prompt and of what follows it."""

    prompt_ids: list[int]
    continuation_ids: list[int]


def split_ids(tokenizer: Tokenizer, prompt: str, continuation: str) -> SplitText:
    """Return the ids of a text, divided where the prompt ends.

    The text is encoded as a whole, as a real text is. Where a token reaches over the border, it and
    the prompt's tokens that it replaces count as continuation.

    Args:
        tokenizer: Of the model.
        prompt: Text that is given.
        continuation: Text whose loss is asked for.
    """
    prompt_ids = tokenizer.encode(prompt)
    token_ids = tokenizer.encode(prompt + continuation)
    shared = 0
    while shared < min(len(prompt_ids), len(token_ids)) and prompt_ids[shared] == token_ids[shared]:
        shared += 1
    return SplitText(token_ids[:shared], token_ids[shared:])


def force(
    model: TextGenerator, prompt_ids: Sequence[int], continuation_ids: Sequence[int]
) -> Generation:
    """Read a prompt, then feed a given continuation token by token.

    The last token is never fed, as the last token of a decoded text is not.

    Args:
        model: Opens the session that runs the forwards. If it has a method `account`, that
            replaces the operations and bytes counted here by those of its own attention.
        prompt_ids: At least one token.
        continuation_ids: At least one token.

    Returns:
        The fed ids, with a text of JSON: `nats`, the loss of each of them, and `bytes`, how long
        they are in UTF-8. Its trace is that of decoding them.

    Raises:
        Unsupported: Prompt and continuation do not fit the model's context.
        ValueError: One of them is empty.
        InvalidOutput: A loss is no finite number.
    """
    losses, trace = _run(model, prompt_ids, continuation_ids)
    size = len(model.tokenizer.decode(continuation_ids).encode())
    text = json.dumps({"nats": [round(loss, 9) for loss in losses.tolist()], "bytes": size})
    return Generation(tuple(continuation_ids), text, "length", trace)


def open_loss(
    model: TextGenerator, prompt_ids: Sequence[int], continuation_ids: Sequence[int]
) -> npt.NDArray[np.float64]:
    """Return the loss of each token of a continuation in nats, (tokens,), fed one by one.

    Args and errors are those of `force`.
    """
    return _run(model, prompt_ids, continuation_ids).losses


class _Run(NamedTuple):
    losses: npt.NDArray[np.float64]
    trace: Trace


def _run(model: TextGenerator, prompt_ids: Sequence[int], continuation_ids: Sequence[int]) -> _Run:
    for what, token_ids in (("prompt", prompt_ids), ("continuation", continuation_ids)):
        if not token_ids:
            raise ValueError(f"the {what} holds no token; teacher forcing needs at least one.")
    check_room(model, len(prompt_ids), len(continuation_ids), "given")
    length = len(prompt_ids) + len(continuation_ids)
    trace = Trace()
    session = model.session(length)
    logits = session.prefill(prompt_ids)
    trace.prefill.append(Forward(len(prompt_ids), 0))
    losses = [_loss(logits, continuation_ids[0])]
    trace.mark("prefill", model.synchronize)
    for token, following in itertools.pairwise(continuation_ids):
        context = session.length
        logits = session.verify(DraftTree.root(token))
        losses.append(_loss(logits, following))
        session.commit([0])
        trace.forwards.append(Forward(1, context))
        trace.accepted.append(0)
    # One copy from the device for all tokens: decoding, too, needs no more than the chosen ids.
    nats = torch.stack(losses).cpu().numpy()
    trace.mark("decode", model.synchronize)
    if not np.isfinite(nats).all():
        raise InvalidOutput("the model gave a token of the continuation no finite loss.")
    count_work(trace, model)
    return _Run(cast("npt.NDArray[np.float64]", nats), trace)


def _loss(logits: Tensor, token: int) -> Tensor:
    """Return the surprise of a token in nats, a float64 scalar on the device."""
    row = logits[-1].double()
    return torch.logsumexp(row, dim=-1) - row[token]
