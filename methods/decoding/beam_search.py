"""Beam search: keep the likeliest few texts instead of one.

Every step extends each of the beams by each token and keeps the best. Texts that end are put aside,
and the one with the best log-probability a token wins.

Source: arXiv 1409.3215, section 3.2, with the length normalisation and the rule for stopping of
transformers 5.23's `generate(num_beams=...)`, whose tokens come out (`early_stopping=False`).
Differs from it: the beams are the branches of one draft tree under the last token that all of them
share, so the common part is cached once and nothing is reordered, but what lies between it and the
tips is read again at every step; a stop string of the task ends a beam like end-of-text. Above
temperature 0 the extensions are drawn without replacement, by accumulated log-probability, as in
beam sampling; with one beam that is plain sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from hardware.profile import Profile
from methods.base import Method, Output
from methods.checks import require_count, require_number
from methods.decoding.common import require_text_generator, top_k
from methods.decoding.common_loops import NOTHING_EMITTED, LoopGenerator
from models.base import Decoding, Forward, Generation, Session, TextGenerator, Trace
from models.decode import check_fits, count_work, decode, greedy_choices
from models.draft_tree import DraftTree, TreeBuilder
from models.stopping import Stopper


class Beam(NamedTuple):
    """A text, and the sum of its tokens' log-probabilities."""

    tokens: tuple[int, ...]
    score: float

    def normalised(self, length_penalty: float) -> float:
        """Return the score over length ** length_penalty."""
        return float(self.score / len(self.tokens) ** length_penalty)


@dataclass(frozen=True, kw_only=True)
class BeamSearch(Method[TextGenerator]):
    """Length-normalised beam search.

    Attributes:
        num_beams: Texts that are kept; 1 is plain decoding.
        length_penalty: Power of the length that scores are divided by: 1 compares log-probability
            a token, 0 that of whole texts, which favours short ones.
    """

    capability = "TextGenerator"
    owns_loop = True
    output = Output.APPROXIMATE
    neutral = MappingProxyType({"num_beams": 1})

    num_beams: int = 3
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        require_count("num_beams", self.num_beams, 1, 64, "One is plain decoding.")
        require_number(
            "length_penalty",
            self.length_penalty,
            -10,
            10,
            "It is the power of the length that scores are divided by.",
        )

    @contextmanager
    def apply(self, model: TextGenerator, hardware: Profile) -> Iterator[TextGenerator]:
        """Yield the model with its texts searched for; the model itself is not touched."""
        require_text_generator(self, model)
        yield LoopGenerator(model, self._generate)

    def _generate(
        self, model: TextGenerator, prompt_ids: Sequence[int], decoding: Decoding
    ) -> Generation:
        if self.num_beams == 1:
            return decode(model, prompt_ids, decoding)
        return search(model, prompt_ids, decoding, self.num_beams, self.length_penalty)


def search(
    model: TextGenerator,
    prompt_ids: Sequence[int],
    decoding: Decoding,
    num_beams: int,
    length_penalty: float,
) -> Generation:
    """Continue a prompt by the best text that beam search finds.

    Returns:
        The text. The trace has one forward for each step of the search; those past the length of
        the text emitted nothing.

    Raises:
        models.base.Unsupported: Prompt and output do not fit the model's context.
        ValueError: The prompt is empty.
        models.base.InvalidOutput: The model returned NaN.
    """
    check_fits(model, prompt_ids, decoding)
    stopper = Stopper(model.tokenizer, decoding, model.facts.eos_ids)
    num_ends = 0 if decoding.ignore_eos else len(model.facts.eos_ids)
    # So many are ranked that enough go on, whatever number of them ends a text by end-of-text.
    num_ranked = max(2, 1 + num_ends) * num_beams
    noise = torch.Generator().manual_seed(decoding.seed) if decoding.temperature > 0 else None
    heat = decoding.temperature or 1.0
    trace = Trace()
    longest = len(prompt_ids) + decoding.max_new_tokens
    reader = _Reader(model.session(longest + 1 + num_beams * decoding.max_new_tokens), trace)
    running, rows = [Beam((), 0.0)], reader.read_prompt(prompt_ids)
    trace.mark("prefill", model.synchronize)
    finished: list[Beam] = []
    while True:
        going_on = []
        for place, beam in enumerate(best_extensions(running, rows / heat, num_ranked, noise)):
            if not stopper.find(beam.tokens, len(beam.tokens) - 1).finish:
                going_on.append(beam)
            elif place < num_beams:
                finished.append(beam)
        # Sorting keeps the older of equals first.
        finished.sort(key=lambda beam: -beam.normalised(length_penalty))
        finished, running = finished[:num_beams], going_on[:num_beams]
        if not running:
            break
        hope = running[0].normalised(length_penalty)
        if len(finished) == num_beams and hope <= finished[-1].normalised(length_penalty):
            break
        rows = reader.read(running)
    trace.mark("decode", model.synchronize)

    kept = finished[0].tokens
    emitting = len(kept) - 1
    trace.accepted = [0] * emitting + [NOTHING_EMITTED] * (len(trace.forwards) - emitting)
    count_work(trace, model)
    trace.notes["num_beams"] = num_beams
    trace.notes["read_again"] = reader.read_again
    trace.notes["log_probability_per_token"] = finished[0].score / len(kept)
    end = stopper.find(kept, emitting)
    return Generation(kept, stopper.text(kept), end.finish, trace)


def best_extensions(
    beams: Sequence[Beam], rows: Tensor, count: int, noise: torch.Generator | None = None
) -> list[Beam]:
    """Return the `count` likeliest extensions of beams by one token, the likeliest first.

    Args:
        beams: The texts.
        rows: Logits after each, (beams, vocab).
        count: How many; fewer if there are fewer.
        noise: With it they are drawn without replacement instead, each with a probability
            proportional to that of its text: Gumbel noise is added before the best are taken.

    Raises:
        models.base.InvalidOutput: A logit is NaN.
    """
    greedy_choices(rows)  # refuses NaN
    log_probabilities = torch.log_softmax(rows.float(), dim=-1).cpu()
    keys = log_probabilities
    if noise is not None:
        uniform = torch.rand(rows.shape, generator=noise, dtype=torch.float64)
        keys = log_probabilities - (-uniform.log()).log()
    ids = top_k(keys, min(count, rows.shape[1]))
    ranked = [
        (
            beam.score + float(keys[index, token]),
            beam.score + float(log_probabilities[index, token]),
            index,
            token,
        )
        for index, beam in enumerate(beams)
        for token in ids[index].tolist()
    ]
    ranked.sort(key=lambda entry: (-entry[0], entry[2], entry[3]))
    chosen = [
        Beam((*beams[index].tokens, token), score) for _, score, index, token in ranked[:count]
    ]
    return sorted(chosen, key=lambda beam: -beam.score)


class _Reader:
    """Reads beams in one session, as branches under the last token that all of them share."""

    def __init__(self, session: Session, trace: Trace) -> None:
        self._session = session
        self._trace = trace
        self._shared = 0  # tokens of the output that are cached or the root
        self._tree: DraftTree
        self.read_again = 0

    def read_prompt(self, prompt_ids: Sequence[int]) -> Tensor:
        """Return the logits after the prompt, (1, vocab), its last token left out of the cache."""
        if len(prompt_ids) > 1:
            self._session.prefill(prompt_ids[:-1])
            self._trace.prefill.append(Forward(len(prompt_ids) - 1, 0))
        self._trace.prefill.append(Forward(1, self._session.length))
        self._tree = DraftTree.root(prompt_ids[-1])
        return self._session.verify(self._tree)

    def read(self, beams: Sequence[Beam]) -> Tensor:
        """Return the logits after each beam, (beams, vocab)."""
        self._commit_shared(beams)
        builder = TreeBuilder(int(self._tree.tokens[0]))
        tips = []
        for beam in beams:
            node = 0
            for token in beam.tokens[self._shared :]:
                node = builder.add(node, token)
            tips.append(node)
        self._tree = builder.build()
        self._trace.forwards.append(Forward(len(self._tree), self._session.length))
        self.read_again += len(self._tree) - len(beams)
        return self._session.verify(self._tree)[tips]

    def _commit_shared(self, beams: Sequence[Beam]) -> None:
        """Make the last token that all beams share the root; those before it go into the cache."""
        rest = [beam.tokens[self._shared :] for beam in beams]
        common = next(
            (at for at, tokens in enumerate(zip(*rest, strict=True)) if len(set(tokens)) > 1),
            len(rest[0]),
        )
        if not common:
            return
        path = [0]
        for token in rest[0][: common - 1]:
            children = self._tree.topology.children[path[-1]]
            path.append(next(child for child in children if self._tree.tokens[child] == token))
        self._session.commit(path)
        self._shared += common
        self._tree = DraftTree.root(rest[0][common - 1])
