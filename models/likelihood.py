"""How likely given continuations of a text are to a model, as the model would decode them.

A context is read once for all its continuations; each of these is then verified as a draft, one
forward for many tokens. Where a method runs the forwards of decoding itself (sparse attention, a
smaller cache), a draft would be run otherwise than decoded tokens are, so there a continuation is
fed token by token, on a cache of its own: it is graded on exactly what the method changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.base import Forward, InvalidOutput, Session, TextGenerator, Trace
from models.decode import accounts_itself, check_room, count_work
from models.draft_tree import DraftTree

# Tokens of a continuation that are verified at once: a row of logits each is held.
_WIDEST_DRAFT = 128


class Likelihood(NamedTuple):
    """What a model thinks of a continuation.

    Attributes:
        nats: Natural logarithm of its probability, given the context.
        is_greedy: Whether each of its tokens is the model's most likely one there.
    """

    nats: float
    is_greedy: bool


def likelihoods(
    model: TextGenerator,
    context_ids: Sequence[int],
    continuations: Sequence[Sequence[int]],
    trace: Trace,
) -> list[Likelihood]:
    """Return how likely each continuation of a context is.

    The last token of a continuation is never fed, so a context and a continuation may be one token
    longer together than the model's longest text.

    Args:
        model: Opens the sessions that run the forwards.
        context_ids: At least one token.
        continuations: At least one token each; all are judged by the same context.
        trace: Gets the forwards, with their operations and bytes.

    Raises:
        Unsupported: A text does not fit the model's context.
        ValueError: The context or a continuation is empty.
        InvalidOutput: A probability is no number.
    """
    if not context_ids or not all(continuations):
        raise ValueError("a context and its continuations must hold at least one token each.")
    longest = max(map(len, continuations))
    check_room(model, len(context_ids), longest - 1, "continuation")
    step = 1 if accounts_itself(model) else _WIDEST_DRAFT
    found: list[Likelihood] = []
    while len(found) < len(continuations):
        own = Trace()
        session = model.session(len(context_ids) + longest)
        after_context = session.prefill(context_ids)[-1:].clone()  # drafts may use its memory again
        own.prefill.append(Forward(len(context_ids), 0))
        own.mark("prefill", model.synchronize)
        # What was kept of a continuation cannot be taken back: then the context is read again.
        while len(found) < len(continuations) and session.length == len(context_ids):
            found.append(_judge(session, after_context, continuations[len(found)], step, own))
        count_work(own, model)
        _add(trace, own)
    return found


def _judge(
    session: Session, after_context: Tensor, continuation: Sequence[int], step: int, trace: Trace
) -> Likelihood:
    """Judge a continuation in drafts of `step` tokens; the last one is kept only where it is one.

    A draft of one token is a step of decoding, after which nothing is as it was.
    """
    fed = continuation[:-1]
    nats, is_greedy = _rows(after_context, continuation[:1])
    for start in range(0, len(fed), step):
        piece = fed[start : start + step]
        trace.forwards.append(Forward(len(piece), session.length))
        trace.accepted.append(len(piece) - 1)
        # At once: a session may use the memory of its logits again.
        logits = session.verify(DraftTree.chain(piece[0], piece[1:]))
        more, are_greedy = _rows(logits, continuation[start + 1 : start + 1 + len(piece)])
        nats, is_greedy = nats + more, is_greedy and are_greedy
        if step == 1 or start + step < len(fed):
            session.commit(range(len(piece)))
    if math.isnan(nats):
        raise InvalidOutput("the model gave a continuation no probability: its logits are NaN.")
    return Likelihood(nats, is_greedy)


def _rows(logits: Tensor, token_ids: Sequence[int]) -> Likelihood:
    """Judge one token by each row of logits, (tokens, vocab)."""
    chosen = torch.tensor(token_ids, device=logits.device)
    logs = torch.log_softmax(logits.double(), dim=-1)
    nats = float(logs.gather(1, chosen[:, None]).sum())
    return Likelihood(nats, bool((logits.argmax(dim=-1) == chosen).all()))


def _add(trace: Trace, own: Trace) -> None:
    """Add what one cache was used for to the whole trace."""
    trace.prefill += own.prefill
    trace.forwards += own.forwards
    trace.accepted += own.accepted
    trace.flops += own.flops
    trace.kv_bytes += own.kv_bytes
    trace.notes.update(own.notes)
    if len(trace.prefill) == 1:
        trace.marks.update(own.marks)
    else:
        trace.marks.pop("prefill", None)  # several contexts have no common end of the prefill
