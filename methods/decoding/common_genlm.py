"""genlm-control as a peer: its program, its environment, and our side of the conversation.

    python -m methods.decoding.common_genlm

makes the environment (half a gigabyte). The sampler AWRS with its estimators, the particles and
their resampling are genlm-control's. The model's logits are ours, out of the caches that our own
constrained methods use, and so is the constraint, which counts how often it is asked. So rows
differ by the sampler alone; genlm-control's own model back ends are not measured.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from methods.decoding.common_constraints import Branches, Particle, Request, WeightedTexts
from models.base import InvalidOutput
from models.constraints import TokenState
from models.peers import Peer, PeerProcess

GENLM = Peer(
    name="genlm-control",
    requirements=(
        "genlm-control==0.4.1",
        "genlm-backend==0.3.1",
        "genlm-bytes==0.2.0",
        "genlm-grammar==0.2.0",
        "arsenal==3.1.3",
    ),
    program=Path(__file__).with_name("common_genlm_server.py"),
    maker="methods.decoding.common_genlm",
)


class Genlm:
    """The running program; texts are sampled one after the other."""

    def __init__(self, who: str) -> None:
        """Start it.

        Raises:
            models.base.Unsupported: It has no environment.
            models.peers.PeerError: It does not start.
        """
        self._process: PeerProcess = GENLM.start(who)
        self._vocabulary: tuple[Sequence[bytes | None], tuple[int, ...]] | None = None

    @property
    def versions(self) -> str:
        """What it runs with, in words."""
        return ", ".join(f"{name} {version}" for name, version in self._process.versions.items())

    def sample(
        self, request: Request, branches: Branches, settings: dict[str, Any]
    ) -> WeightedTexts:
        """Sample weighted texts.

        Args:
            request: What to write; its checker counts the questions.
            branches: Logits of the texts.
            settings: Of the sampler: particles, ess_threshold, resampling, max_accepts and
                proper_weights.

        Raises:
            models.base.InvalidOutput: The model returned NaN.
            models.peers.PeerError: The program failed.
        """
        checker, decoding = request.checker, request.decoding
        ends = () if checker.eos is None else (checker.eos, *checker.merged)
        if self._vocabulary is None or (
            self._vocabulary[0] is not checker.pieces or self._vocabulary[1] != ends
        ):
            pieces = [None if piece is None else piece.hex() for piece in checker.pieces]
            self._process.send({"do": "vocabulary", "pieces": pieces, "ends": ends})
            self._vocabulary = checker.pieces, ends
        self._process.send(
            {
                "do": "sample",
                "seed": decoding.seed,
                "temperature": decoding.temperature,
                "max_tokens": decoding.max_new_tokens,
                "closes": request.closes,
                **settings,
            }
        )
        states: dict[tuple[int, ...], TokenState] = {(): checker.start}
        try:
            message = self._converse(request, branches, states)
        except BaseException:
            # It waits for an answer, and would take the next request for one.
            self._process.close()
            genlm.cache_clear()
            raise
        log_weights = np.array(
            [-math.inf if weight is None else weight for weight in message["log_weights"]]
        )
        particles = []
        for text, weight in zip(message["texts"], log_weights, strict=True):
            particles.append(_particle(request, states, tuple(text), weight > -math.inf))
        return WeightedTexts(tuple(particles), log_weights)

    def _converse(
        self, request: Request, branches: Branches, states: dict[tuple[int, ...], TokenState]
    ) -> dict[str, Any]:
        """Answer the program's questions and return what it says when it has no more."""
        while "ask" in (message := self._process.receive()):
            texts = [tuple(text) for text in message["texts"]]
            if message["ask"] == "logits":
                rows = torch.stack(branches.logits(texts)).float().cpu().numpy()
                if np.isnan(rows).any():
                    raise InvalidOutput("the model returned NaN logits.")
                self._process.send({"shape": rows.shape}, rows.tobytes())
            else:
                answers = [answer(request, states, message["ask"], text) for text in texts]
                self._process.send({"answers": answers})
        return message


def answer(
    request: Request, states: dict[tuple[int, ...], TokenState], what: str, text: tuple[int, ...]
) -> int:
    """Return what the constraint says to a text: 0 refused, 1 allowed, 2 allowed and over.

    Each answer is one check, but for the empty text, which is no question about a token.

    Args:
        request: With the constraint.
        states: Of the texts allowed so far; filled in.
        what: `prefix` or `complete`.
        text: Output tokens; all but the last are in `states`.
    """
    if what == "complete":
        return int(request.checker.end(states[text]) is not None)
    if text:
        # Asked again for another particle, it is asked again: nobody here shares answers.
        state = request.checker.after(states[text[:-1]], text[-1])
        if state is None:
            return 0
        states[text] = state
    return 2 if states[text].has_ended else 1


def _particle(
    request: Request,
    states: dict[tuple[int, ...], TokenState],
    text: tuple[int, ...],
    is_alive: bool,
) -> Particle:
    """Return a text with its state, ended by end-of-text where nothing else has ended it."""
    if not is_alive:
        while text not in states:  # behind it stands a token that was refused
            text = text[:-1]
        return Particle(text, states[text])
    state = states[text]
    eos = request.checker.eos
    if eos is None or state.has_ended:
        return Particle(text, state)
    return Particle((*text, eos), TokenState(state.constraint, True))


@functools.cache
def genlm(who: str) -> Genlm:
    """Return the program, started once in a process.

    Raises:
        models.base.Unsupported: It has no environment.
    """
    return Genlm(who)


if __name__ == "__main__":
    GENLM.create()
