"""Token masking: ask the constraint about every token, and sample among those it allows.

Known as locally constrained decoding, the way most libraries for structured output work. Each text
satisfies the constraint, but is not drawn from the model's distribution given that it does: a token
is taken by its own probability, however unlikely the texts that it leads to are. It is exact where
the constraint leaves no choice that matters, and biased elsewhere; the weight that would repair it,
the product of the masses of allowed tokens, is noted as `log_normaliser`.

`trie=True` is the same distribution with fewer checks: tokens are tried byte by byte along a trie
of the vocabulary, and what begins with a refused byte is not looked at. It needs a constraint that
can be asked about single bytes, which ours all can.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from methods.decoding.common_constraints import (
    Branches,
    ConstrainedMethod,
    Particle,
    Request,
    Written,
)
from models.constraints import Stoppable, TokenChecker, TokenState
from models.decode import Draws


@dataclass
class TrieNode:
    """Tokens by their bytes.

    Attributes:
        children: By the next byte.
        tokens: Those that end here.
    """

    children: dict[bytes, TrieNode] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)


@functools.lru_cache(maxsize=4)
def vocabulary_trie(pieces: tuple[bytes | None, ...]) -> TrieNode:
    """Return the trie of a vocabulary; tokens without bytes are not in it."""
    root = TrieNode()
    for token, piece in enumerate(pieces):
        node = root
        for at in range(len(piece or b"")):
            byte = (piece or b"")[at : at + 1]
            node = node.children.setdefault(byte, TrieNode())
        if piece:
            node.tokens.append(token)
    return root


def allowed_by_asking(checker: TokenChecker, state: TokenState) -> dict[int, TokenState]:
    """Return the allowed tokens with the states behind them, by a check of each."""
    found = {}
    for token, is_usable in enumerate(checker.usable):
        if is_usable and (after := checker.after(state, token)) is not None:
            found[token] = after
    return found


def allowed_by_trie(
    checker: TokenChecker, state: TokenState, root: TrieNode
) -> dict[int, TokenState]:
    """Return the same as `allowed_by_asking`; each byte that is tried counts as a check."""
    usable = checker.usable
    found = {}
    waiting = [(root, state.constraint)]
    while waiting:
        node, constraint = waiting.pop()
        for byte, child in node.children.items():
            checker.checks += 1
            after = constraint.after(byte)
            if after is None:
                continue
            is_over = isinstance(after, Stoppable) and after.is_stopped
            for token in child.tokens:
                if usable[token] and token != checker.eos:
                    found[token] = TokenState(after, is_over)
            waiting.append((child, after))
    if checker.eos is not None and (end := checker.end(state)) is not None:
        found[checker.eos] = end
    return found


@dataclass(frozen=True, kw_only=True)
class TokenMasking(ConstrainedMethod):
    """Locally constrained decoding over the whole vocabulary.

    Attributes:
        trie: Ask along a trie of the vocabulary instead of token by token.
    """

    trie: bool = False

    def write(self, request: Request) -> Written:
        """Write a text; the note `log_normaliser` sums the log masses of the allowed tokens."""
        checker, decoding = request.checker, request.decoding
        draws = Draws(decoding.seed)
        limit = decoding.max_new_tokens
        branches = Branches(request.model, request.prompt_ids, limit, request.trace)
        root = vocabulary_trie(tuple(checker.pieces)) if self.trie else None
        particle, log_normaliser = Particle((), checker.start), 0.0
        while len(particle.tokens) < limit and not particle.state.has_ended:
            (logits,) = branches.logits([particle.tokens])
            usable = request.vocabulary.usable(logits)
            if request.closes and len(particle.tokens) == limit - 1:
                extension = request.ending(usable, particle)
                if extension.particle is None:
                    return Written(particle, False)
                particle = extension.particle
                log_normaliser += extension.log_weight
                break
            allowed = (
                allowed_by_trie(checker, particle.state, root)
                if root is not None
                else allowed_by_asking(checker, particle.state)
            )
            token, mass = self._token(
                usable.probabilities, sorted(allowed), draws, decoding.temperature
            )
            if token is None:
                return Written(particle, False)
            log_normaliser += math.log(mass) + usable.log_mass
            particle = Particle((*particle.tokens, token), allowed[token])
        if decoding.temperature > 0:
            request.trace.notes["log_normaliser"] = log_normaliser
        return Written(particle, particle.state.has_ended or particle.state.constraint.is_complete)

    def _token(
        self, probabilities: np.ndarray, allowed: Sequence[int], draws: Draws, temperature: float
    ) -> tuple[int | None, float]:
        """Return a token and the mass of all that are allowed; None if they have none."""
        masses = probabilities[list(allowed)]
        total = float(masses.sum())
        if total == 0:
            return None, 0.0
        if temperature == 0:
            return allowed[int(masses.argmax())], total
        return allowed[draws.token(torch.from_numpy(masses))], total
