"""The program that runs genlm-control's AWRS, in an environment of its own (`common_genlm`).

Sampler, estimators, particles and resampling are genlm-control's; it asks us for the model's logits
and about the constraint. Imports nothing of ours: the environment does not have it.

One request after the other comes in; while one is worked on, questions go out and answers come in.
See `common_genlm.answer` for the other side.
"""

# mypy: ignore-errors
# The packages that this stands on are in the environment of the peer only.

from __future__ import annotations

import asyncio
import json
import platform
import sys
from importlib import metadata
from multiprocessing.connection import Connection

import numpy as np
import torch
from genlm.backend.llm.base import AsyncLM
from genlm.backend.tokenization import Token
from genlm.control import AWRS, EOS, Potential, PromptedLLM
from genlm.control.potential.built_in.llm import TokenMappings

_PACKAGES = ("genlm-control", "genlm-backend", "torch", "numpy")
# Answers of the constraint: the text is over behind a token that completes a stop string.
_OVER = 2


class Line:
    """The connection to the process that asked."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send(self, **message: object) -> None:
        """Send a message."""
        self._connection.send_bytes(json.dumps(message).encode())

    def receive(self) -> dict[str, object]:
        """Return the next message."""
        return json.loads(self._connection.recv_bytes())

    def rows(self) -> torch.Tensor:
        """Return the float32 rows that follow the next message, (rows, vocab)."""
        shape = self.receive()["shape"]
        data = np.frombuffer(self._connection.recv_bytes(), dtype=np.float32)
        return torch.from_numpy(data.reshape(shape).copy())


class ServedModel(AsyncLM):
    """A model whose logits come over the line; what is asked at the same time goes in one message.

    Texts are outputs without their prompt, which the other side knows.
    """

    def __init__(self, line: Line, names: list[bytes]) -> None:
        # Without the base's __init__, which reads the vocabulary of a tokenizer of transformers.
        self._line = line
        self.tokenizer = None
        self.byte_vocab = [Token(number, name) for number, name in enumerate(names)]
        self.str_vocab = []
        self._batch_queue = []
        self._batch_armed = False

    async def next_token_logprobs(self, token_ids, lora_name=None):
        """Return the log-probabilities behind a text, (vocab,)."""
        future = asyncio.get_running_loop().create_future()
        batch = await self._join_batch([(token_ids, future)])
        if batch is not None:
            texts = list(dict.fromkeys(tuple(text) for text, _ in batch))
            self._line.send(ask="logits", texts=texts)
            rows = torch.log_softmax(self._line.rows(), dim=-1)
            found = dict(zip(texts, rows, strict=True))
            for text, waiting in batch:
                waiting.set_result(found[tuple(text)])
        return await future

    def next_token_logprobs_sync(self, token_ids, lora_name=None):
        """Not needed by the sampler."""
        raise NotImplementedError


class ServedConstraint(Potential):
    """The constraint, asked over the line: 0 where it allows, -inf where it refuses."""

    def __init__(self, line: Line, tokens: list[Token]) -> None:
        super().__init__(tokens)
        self._line = line
        self._over: set[tuple[int, ...]] = set()

    async def prefix(self, context):
        """Return 0 if a text can be completed, else -inf."""
        [answer] = await self.batch_prefix([context])
        return answer

    async def complete(self, context):
        """Return 0 if a text is complete, else -inf."""
        [answer] = await self.batch_complete([context])
        return answer

    async def batch_prefix(self, contexts):
        """Return `prefix` of several texts, (texts,)."""
        return self._ask("prefix", contexts)

    async def batch_complete(self, contexts):
        """Return `complete` of several texts, (texts,)."""
        return self._ask("complete", contexts)

    async def logw_eos(self, context):
        """Return `complete`: what the constraint says to an end here."""
        # The default asks about every token of the vocabulary to find out about the end alone.
        return await self.complete(context)

    def is_over(self, context) -> bool:
        """Return whether a text has ended without an end-of-text token."""
        return tuple(token.token_id for token in context) in self._over

    def _ask(self, what, contexts):
        texts = [tuple(token.token_id for token in context) for context in contexts]
        self._line.send(ask=what, texts=texts)
        answers = self._line.receive()["answers"]
        self._over.update(
            text for text, answer in zip(texts, answers, strict=True) if answer == _OVER
        )
        return np.array([0.0 if answer else -np.inf for answer in answers])


def _nameless(number: int) -> bytes:
    return b"\xff<%d>" % number  # no text holds this byte


class Server:
    """Answers requests; the vocabulary, which is large, is kept from one to the next."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def vocabulary(self, message: dict[str, object]) -> None:
        """Keep a vocabulary: bytes of each token (hexadecimal; null if it has none), and ends."""
        ends = set(message["ends"])
        # Tokens without text need a name: genlm-control tells ends of text by their bytes.
        names = [
            _nameless(number) if piece is None or number in ends else bytes.fromhex(piece)
            for number, piece in enumerate(message["pieces"])
        ]
        end_names = [names[number] for number in sorted(ends)]
        if not ends:
            # It asks for an end; one beyond the logits has no probability and never comes.
            names.append(_nameless(len(names)))
            end_names = names[-1:]
        self._model = ServedModel(self._line, names)
        maps = TokenMappings.create(self._model.byte_vocab, end_names)
        self._prompted = PromptedLLM(self._model, prompt_ids=[], token_maps=maps)
        self._usable = [
            self._model.byte_vocab[number]
            for number, piece in enumerate(message["pieces"])
            if piece is not None and number not in ends
        ]

    async def sample(self, message: dict[str, object]) -> None:
        """Run sequential Monte Carlo with AWRS and send the weighted texts."""
        np.random.seed(message["seed"])  # the resampling's source
        condition = ServedConstraint(self._line, self._usable)
        sampler = AWRS(
            self._prompted.spawn(temperature=message["temperature"]),
            condition,
            seed=message["seed"],
            max_accepts=message["max_accepts"],
            proper_weights=message["proper_weights"],
        )
        limit, closes = message["max_tokens"], message["closes"]

        def is_over(context) -> bool:
            return condition.is_over(context) or (not closes and len(context) == limit)

        found = await sampler.smc(
            n_particles=message["particles"],
            ess_threshold=message["ess_threshold"],
            # A text that need not end is over one token before an end would be forced.
            max_tokens=limit if closes else limit + 1,
            resampling_method=message["resampling"],
            terminate_when=is_over,
        )
        await sampler.cleanup()
        self._line.send(
            texts=[[t.token_id for t in context if t is not EOS] for context in found.contexts],
            log_weights=[
                None if weight == -np.inf else float(weight) for weight in found.log_weights
            ],
        )


def main() -> None:
    """Tell the versions, then serve until the other side hangs up."""
    line = Line(Connection(int(sys.argv[1])))
    versions = {name: metadata.version(name) for name in _PACKAGES}
    line.send(versions={**versions, "python": platform.python_version()})
    server = Server(line)
    while True:
        try:
            message = line.receive()
        except EOFError:
            return
        if message["do"] == "vocabulary":
            server.vocabulary(message)
        else:
            asyncio.run(server.sample(message))


if __name__ == "__main__":
    main()
