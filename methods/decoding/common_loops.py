"""Methods with a loop of their own: the wrapper around a model, and pausing to look ahead.

Looking ahead needs a cache that branches. A session has none, but it can verify trees: the
candidates and what is read behind them are the branches of one draft tree under the last token,
grown by a level a forward and then left uncommitted. That is what B rows on copies of the cache
would compute, runs on every session (compiled kernels included) and copies nothing. It costs that
a branch is read again at every level: with B = 3 and L = 5 forwards of 4, 7, 10, 13 and 16 tokens
instead of five of 3, all of them within the width that a forward has nearly for free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from methods.decoding.common import DraftedGenerator, top_k
from models.base import Decoding, Forward, Generation, Session, TextGenerator, Tokenizer, Trace
from models.decode import (
    Draws,
    NoDraft,
    check_fits,
    count_work,
    greedy_choices,
    next_token_probabilities,
)
from models.draft_tree import DraftTree, Topology
from models.stopping import Stopper

Loop = Callable[[TextGenerator, Sequence[int], Decoding], Generation]
"""Continues a prompt with a model."""

# What `Trace.accepted` holds for a forward that emitted no token, so that a forward's tokens are
# always one more: its own bonus, if there is one, is not used.
NOTHING_EMITTED = -1


class LoopGenerator(DraftedGenerator):
    """A text generator whose texts come from a loop of the method's own."""

    def __init__(self, model: TextGenerator, loop: Loop) -> None:
        super().__init__(model, NoDraft)
        self._loop = loop

    def generate(self, prompt_ids: Sequence[int], decoding: Decoding) -> Generation:
        """Continue `prompt_ids`."""
        return self._loop(self._model, prompt_ids, decoding)


# --- looking ahead --------------------------------------------------------------------------------


class PauseRule(Protocol):
    """Decides where to look ahead; asked once at every position of a text, in order."""

    def __call__(self, logits: Tensor) -> bool:
        """Return whether to pause before the token that `logits`, (vocab,), are for."""
        ...


class Branch:
    """A candidate and its greedy extension.

    Attributes:
        tokens: The candidate, then the extension.
        score: Sum of their log-probabilities.
        has_ended: Whether nothing more is read behind it.
    """

    def __init__(self, token: int, log_probability: float) -> None:
        self.tokens = [token]
        self.score = log_probability
        self.has_ended = False

    @property
    def normalised(self) -> float:
        """Log-probability a token: (a + S) / (1 + n)."""
        return self.score / len(self.tokens)


class Waiting(NamedTuple):
    """A verified tree that is not committed: where the text stands in it.

    Attributes:
        tree: Its root is the last token that is not in the cache.
        logits: After each node, (nodes, vocab).
        path: Nodes from the root to the last token of the text.
        forward: Number of the forward that read it.
    """

    tree: DraftTree
    logits: Tensor
    path: list[int]
    forward: int


@dataclass(frozen=True, kw_only=True)
class Lookahead:
    """How far and how wide to look.

    Attributes:
        candidates: B, the likeliest tokens that are compared.
        length: L, the most tokens read behind each.
        ends: Whether a branch ends, by the text before it and its tokens; checked after each
            token of an extension.
        reuse: Go on from the forwards of a lookahead where the text follows the winner.
    """

    candidates: int
    length: int
    ends: Callable[[BranchEnd], bool]
    reuse: bool = True


class BranchEnd(NamedTuple):
    """What a rule for ending branches may look at: ids of the output so far and of the branch."""

    tokenizer: Tokenizer
    prompt_ids: Sequence[int]
    output: Sequence[int]
    branch: Sequence[int]


def leaves_function_body(end: BranchEnd) -> bool:
    """Return whether a branch has left the body of the function that is being written.

    A line that does not begin with a space or tab leaves it, and so do four blank lines at the end.
    The first piece of text is no line of its own unless the prompt ends with a line break. Where
    the text has left the body before the branch, as chats do from the start, the rule says nothing.
    """
    if _is_outside(end.tokenizer, end.prompt_ids, end.output):
        return False
    return _is_outside(end.tokenizer, end.prompt_ids, [*end.output, *end.branch])


def never_ends(end: BranchEnd) -> bool:
    """Return False: branches end by length or end-of-text only."""
    return False


BRANCH_ENDS: Mapping[str, Callable[[BranchEnd], bool]] = {
    "function-body": leaves_function_body,
    "never": never_ends,
}
"""Where an extension ends besides end-of-text, by the name of the setting."""


def _is_outside(tokenizer: Tokenizer, prompt_ids: Sequence[int], output: Sequence[int]) -> bool:
    lines = tokenizer.decode(list(output)).split("\n")
    if len(lines) >= 4 and not any(line.strip() for line in lines[-4:]):
        return True
    begins_line = tokenizer.decode(list(prompt_ids[-1:])).endswith("\n")
    whole = lines if begins_line else lines[1:]
    return any(line and not line.startswith((" ", "\t")) for line in whole)


@dataclass
class LookaheadCounts:
    """What a text took.

    Attributes:
        positions: Tokens that were decided.
        pauses: Positions that were looked ahead at.
        changes: Pauses that took another token than the likeliest.
        forwards: Forwards of lookaheads.
        read_again: Tokens that these forwards read although an earlier one had read them.
        reused: Positions whose logits a lookahead had computed already.
    """

    positions: int = 0
    pauses: int = 0
    changes: int = 0
    forwards: int = 0
    read_again: int = 0
    reused: int = 0


def decode_with_pauses(
    model: TextGenerator,
    prompt_ids: Sequence[int],
    decoding: Decoding,
    pause: PauseRule,
    lookahead: Lookahead,
    *,
    draws: Draws | None = None,
) -> Generation:
    """Continue a prompt greedily, and look ahead wherever `pause` says so.

    At a pause the candidate with the best log-probability a token, extension included, is taken;
    the extension itself is thrown away. Above temperature 0 tokens are drawn, and at a pause one
    of the candidates, with a probability that goes with exp(that / temperature).

    Returns:
        The text. The trace has a forward for every lookahead too, which emits nothing
        (`NOTHING_EMITTED`) unless a later token comes from its logits.

    Raises:
        models.base.Unsupported: Prompt and output do not fit the model's context.
        ValueError: The prompt is empty.
        models.base.InvalidOutput: The model returned NaN.
    """
    check_fits(model, prompt_ids, decoding)
    return _PausingText(model, prompt_ids, decoding, pause, lookahead, draws).run()


class _PausingText:
    """One text in progress."""

    def __init__(
        self,
        model: TextGenerator,
        prompt_ids: Sequence[int],
        decoding: Decoding,
        pause: PauseRule,
        lookahead: Lookahead,
        draws: Draws | None,
    ) -> None:
        self.model = model
        self.prompt_ids = prompt_ids
        self.decoding = decoding
        self.pause = pause
        self.lookahead = lookahead
        self.draws = draws or Draws(decoding.seed)
        self.trace = Trace()
        self.counts = LookaheadCounts()
        self.output: list[int] = []
        self.ahead = min(lookahead.candidates, model.facts.vocab_size)
        room = 1 + self.ahead * lookahead.length
        longest = len(prompt_ids) + decoding.max_new_tokens
        self.session: Session = model.session(longest + room)

    def run(self) -> Generation:
        """Write the text."""
        stopper = Stopper(self.model.tokenizer, self.decoding, self.model.facts.eos_ids)
        row = self.session.prefill(self.prompt_ids)[0]
        self.trace.prefill.append(Forward(len(self.prompt_ids), 0))
        self.trace.mark("prefill", self.model.synchronize)
        token, waiting = self._decide(row, None)
        while True:
            self.output.append(token)
            end = stopper.find(self.output, len(self.output) - 1)
            if end.finish:
                break
            waiting = self._step(token, waiting)
            forward = waiting.forward
            token, waiting = self._decide(waiting.logits[waiting.path[-1]], waiting)
            self.trace.accepted[forward] += 1
        self.trace.mark("decode", self.model.synchronize)
        count_work(self.trace, self.model)
        counts = self.counts
        self.trace.notes.update(vars(counts))
        self.trace.notes["pause_rate"] = counts.pauses / counts.positions
        kept = tuple(self.output[: end.num_tokens])
        return Generation(kept, stopper.text(kept), end.finish, self.trace)

    def _step(self, token: int, waiting: Waiting | None) -> Waiting:
        """Return where the text stands after `token`, with the logits there."""
        if waiting is not None:
            tree, path = waiting.tree, waiting.path
            for child in tree.topology.children[path[-1]] if self.lookahead.reuse else ():
                if tree.tokens[child] == token:
                    self.counts.reused += 1
                    return waiting._replace(path=[*path, child])
            self.session.commit(path)
        return self._verify(DraftTree.root(token))

    def _decide(self, row: Tensor, waiting: Waiting | None) -> tuple[int, Waiting | None]:
        """Return the next token, and where the text stands before it."""
        self.counts.positions += 1
        if self.pause(row):
            return self._look_ahead(row, waiting)
        if self.decoding.temperature == 0:
            return greedy_choices(row[None])[0], waiting
        return self.draws.token(next_token_probabilities(row, self.decoding)), waiting

    def _look_ahead(self, row: Tensor, waiting: Waiting | None) -> tuple[int, Waiting | None]:
        """Extend the candidates, choose one, and return it with the tree that was read last."""
        self.counts.pauses += 1
        branches = self._candidates(row)
        eos_ids = frozenset() if self.decoding.ignore_eos else self.model.facts.eos_ids
        for branch in branches:
            branch.has_ended = branch.tokens[0] in eos_ids
        written = len(self.prompt_ids) + len(self.output)
        steps = min(self.lookahead.length, self.model.facts.longest_text - written)
        last = waiting
        for _ in range(steps):
            live = [branch for branch in branches if not branch.has_ended]
            if not live:
                break
            if last is None:
                # Behind the prompt there is no root: its last token is in the cache already.
                rows = torch.stack([self._read_chain(branch.tokens) for branch in live])
            else:
                if len(last.path) > 1:
                    # The last token becomes the root of the branches, which commits all before it.
                    self.session.commit(last.path[:-1])
                last, rows = self._read_branches(int(last.tree.tokens[last.path[-1]]), live)
            log_probabilities = torch.log_softmax(rows.float(), dim=-1)
            for branch, token, scores in zip(
                live, greedy_choices(rows), log_probabilities, strict=True
            ):
                branch.tokens.append(token)
                branch.score += float(scores[token])
                branch.has_ended = token in eos_ids or self.lookahead.ends(
                    BranchEnd(self.model.tokenizer, self.prompt_ids, self.output, branch.tokens)
                )
        winner = self._choose(branches)
        self.counts.changes += winner is not branches[0]
        return winner.tokens[0], last

    def _choose(self, branches: Sequence[Branch]) -> Branch:
        """Return the branch to follow by its first token."""
        if self.decoding.temperature == 0:
            return max(branches, key=lambda branch: branch.normalised)  # the likelier of equals
        scores = torch.tensor([branch.normalised for branch in branches], dtype=torch.float64)
        return branches[self.draws.token(torch.softmax(scores / self.decoding.temperature, 0))]

    def _candidates(self, row: Tensor) -> list[Branch]:
        """Return the likeliest tokens, the first of equals by id."""
        greedy_choices(row[None])  # refuses NaN
        ids = top_k(row[None], self.ahead)[0].tolist()
        log_probabilities = torch.log_softmax(row.float(), dim=-1)
        scores = {token: float(log_probabilities[token]) for token in ids}
        return [
            Branch(token, scores[token]) for token in sorted(ids, key=lambda i: (-scores[i], i))
        ]

    def _read_branches(self, root: int, live: Sequence[Branch]) -> tuple[Waiting, Tensor]:
        """Read the branches under the root; return the tree and the logits after each."""
        depth = len(live[0].tokens)  # branches that are read have been read to the same depth
        tokens = [root, *(token for branch in live for token in branch.tokens)]
        tree = DraftTree(branches_topology(len(live), depth), np.array(tokens, dtype=np.int64))
        self.counts.forwards += 1
        self.counts.read_again += len(tree) - len(live)
        waiting = self._verify(tree)
        ends = [depth * (number + 1) for number in range(len(live))]
        return waiting, waiting.logits[ends]

    def _read_chain(self, tokens: Sequence[int]) -> Tensor:
        """Read one branch directly behind the cache; return the logits after it."""
        self.counts.forwards += 1
        self.counts.read_again += len(tokens) - 1
        waiting = self._verify(DraftTree.chain(tokens[0], tokens[1:]))
        return waiting.logits[-1].clone()  # the next forward may write over them

    def _verify(self, tree: DraftTree) -> Waiting:
        self.trace.forwards.append(Forward(len(tree), self.session.length))
        self.trace.accepted.append(NOTHING_EMITTED)
        logits = self.session.verify(tree)
        return Waiting(tree, logits, [0], len(self.trace.forwards) - 1)


@cache
def branches_topology(count: int, depth: int) -> Topology:
    """Return a root with `count` chains of `depth` nodes under it, one chain after the other."""
    parents = [-1]
    for _ in range(count):
        parents += [0, *range(len(parents), len(parents) + depth - 1)]
    return Topology(parents)
