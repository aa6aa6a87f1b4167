"""The decode loop: draft a tree, verify it in one forward, accept a path, commit, go on.

Every text method of the harness and its baseline run this one loop; plain decoding is the loop with
a tree of one node. The convention throughout: the last committed token (the root) is not in the
cache, prefill emits the first root, and a step emits its accepted drafts and one bonus token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeGuard

import numpy as np
import torch
from torch import Tensor

from models.base import (
    Decoding,
    Forward,
    Generation,
    InvalidOutput,
    TextGenerator,
    TextModelFacts,
    Trace,
    Unsupported,
)
from models.draft_tree import DraftTree
from models.stopping import Stopper

NodeProbabilities = Callable[[int], Tensor]
"""Target distribution after a node, (vocab,): computed only for the nodes that are visited."""


class Accepted(NamedTuple):
    """What verification let through.

    Attributes:
        path: Node indices from the root to the last accepted draft, root included.
        bonus: The target's own next token after that node.
    """

    path: list[int]
    bonus: int


AcceptanceRule = Callable[[DraftTree, NodeProbabilities, "Draws"], Accepted]
"""Accepts a path of a verified tree by draws from the target's distributions."""


class Drafter(Protocol):
    """Proposes trees and learns from what became of them. One lives for one text.

    Attributes:
        max_nodes: The largest tree it ever proposes, root included.
        wants_prompt_logits: Whether `begin` needs the logits after every prompt token.
        notes: What it settled at run time; read when the text is finished, kept in the trace.
    """

    @property
    def max_nodes(self) -> int:
        """Largest tree it ever proposes, root included."""
        ...

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether `begin` needs the logits of every prompt token."""
        ...

    @property
    def notes(self) -> Mapping[str, float | int | str]:
        """What it settled at run time."""
        ...

    def begin(self, prompt_ids: Sequence[int], logits: Tensor) -> None:
        """See the prompt.

        Args:
            prompt_ids: The prompt's tokens.
            logits: Logits after the last one, (1, vocab), or with `wants_prompt_logits` after each,
                (tokens, vocab).
        """
        ...

    def draft(self, token_ids: Sequence[int], budget: int) -> DraftTree:
        """Propose a tree under the last of `token_ids` (prompt and output so far).

        Args:
            token_ids: All committed tokens; the last one is the tree's root.
            budget: Largest depth of the tree: tokens that may still be emitted, less the bonus.
                Deeper nodes could pass the model's last position.
        """
        ...

    def update(self, tree: DraftTree, logits: Tensor, accepted: Accepted) -> None:
        """Learn from a verified tree; `logits` are (nodes, vocab)."""
        ...


class NoDraft:
    """Proposes nothing: plain decoding."""

    max_nodes = 1
    wants_prompt_logits = False
    notes: Mapping[str, float | int | str] = {}

    def begin(self, prompt_ids: Sequence[int], logits: Tensor) -> None:
        """Nothing to prepare."""

    def draft(self, token_ids: Sequence[int], budget: int) -> DraftTree:
        """Return the root alone."""
        return DraftTree.root(token_ids[-1])

    def update(self, tree: DraftTree, logits: Tensor, accepted: Accepted) -> None:
        """Nothing to learn."""


class Draws:
    """The randomness of sampling, behind two calls so that tests can enumerate all outcomes.

    A token takes one number between 0 and 1, whatever the device. Plain sampling and
    `accept_sampled` draw once for each token of the text, so with equal seeds their texts are
    equal, up to floating point.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def token(self, probabilities: Tensor) -> int:
        """Draw an index of `probabilities`, (vocab,), which need not be normalised."""
        cumulative = probabilities.double().cumsum(0)
        level = self._uniform() * cumulative[-1]
        drawn = int(torch.searchsorted(cumulative, level, right=True))
        # The largest uniform number times the total may round to the total, past the last token.
        return drawn if drawn < len(cumulative) else int(probabilities.nonzero()[-1])

    def event(self, probability: float) -> bool:
        """Return True with this probability."""
        return float(self._uniform()) < probability

    def _uniform(self) -> Tensor:
        return torch.rand((), generator=self._generator, dtype=torch.float64)


def greedy_choices(logits: Tensor) -> list[int]:
    """Return the most likely token after each node; the lowest id among equals.

    Args:
        logits: (nodes, vocab).

    Raises:
        InvalidOutput: A logit is NaN.
    """
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        # NumPy's argmax is vectorised: a sixth of torch's time on a row of 49,152.
        scores = logits.detach().numpy()
        best = scores.argmax(axis=-1)
        is_nan = bool(np.isnan(scores[np.arange(len(best)), best]).any())
        choices: list[int] = best.tolist()
    else:
        values, indices = logits.max(dim=-1)
        is_nan = bool(torch.isnan(values).any())
        choices = indices.tolist()
    if is_nan:  # either function lets a NaN of any column win its row
        raise InvalidOutput("the model returned NaN logits.")
    return choices


def accept_greedy(tree: DraftTree, logits: Tensor) -> Accepted:
    """Walk down to the child that is the target's most likely token, until there is none.

    Args:
        tree: Nodes that were verified.
        logits: (nodes, vocab).

    Raises:
        InvalidOutput: A logit is NaN.
    """
    return _walk(tree, greedy_choices(logits).__getitem__)


def accept_sampled(tree: DraftTree, probabilities: NodeProbabilities, draws: Draws) -> Accepted:
    """Draw once per visited node from the target; a child that was drawn is accepted.

    Exact for every tree whose tokens depend on nothing that is still to be drawn: n-grams,
    retrieved or top-k tokens, tokens from a random source of their own.

    Args:
        tree: Nodes that were verified.
        probabilities: Target distribution after a node.
        draws: Source of randomness.
    """
    return _walk(tree, lambda node: draws.token(probabilities(node)))


def accept_without_replacement(
    tree: DraftTree, probabilities: NodeProbabilities, draws: Draws
) -> Accepted:
    """Multi-candidate speculative sampling for children drawn without replacement.

    With R the target and D the draft distribution at a node, child y is accepted with probability
    min(1, R(y) / D(y)); otherwise R becomes norm(max(R - D, 0)), D loses y and is normalised, and
    the next sibling is tried. If all fail the bonus is drawn from the last R. One child is chain
    speculative sampling.

    Source: SpecInfer (arXiv 2305.09781), section 4.3; Sequoia (arXiv 2402.12374), algorithm 1.

    Args:
        tree: Nodes with the `draft_probabilities` that their children were drawn from.
        probabilities: Target distribution after a node.
        draws: Source of randomness.

    Raises:
        ValueError: The tree has no draft distributions, or a child that they exclude.
    """
    if tree.draft_probabilities is None:
        raise ValueError("a sampled tree needs the distributions its children were drawn from.")
    path = [0]
    while True:
        node = path[-1]
        target = probabilities(node).double()
        target = target / target.sum()
        draft = torch.from_numpy(tree.draft_probabilities[node])
        for child in tree.topology.children[node]:
            token = int(tree.tokens[child])
            if not draft[token] > 0:
                raise ValueError(f"token {token} cannot have been drawn: its probability is 0.")
            residual = (target - draft).clamp_(min=0)
            left = float(residual.sum())
            # No residual means that target and draft agree; a ratio below 1 is then rounding.
            if left == 0 or draws.event(float(target[token] / draft[token])):
                path.append(child)
                break
            target = residual / left
            draft = draft.clone()
            draft[token] = 0
            draft /= draft.sum().clamp_(min=torch.finfo(draft.dtype).tiny)
        else:
            return Accepted(path, draws.token(target))


def next_token_probabilities(logits: Tensor, decoding: Decoding) -> Tensor:
    """Return the distribution that sampling draws from, on the CPU, same shape as `logits`.

    Raises:
        InvalidOutput: A logit is NaN.
    """
    probabilities = torch.softmax(logits / decoding.temperature, dim=-1).cpu()
    if bool(torch.isnan(probabilities).any()):
        raise InvalidOutput("the model returned NaN logits.")
    return probabilities


def check_fits(model: TextGenerator, prompt_ids: Sequence[int], decoding: Decoding) -> None:
    """Raise unless the model can hold the prompt and all new tokens.

    Raises:
        Unsupported: They exceed the model's context.
        ValueError: The prompt is empty.
    """
    if not prompt_ids:
        raise ValueError("the prompt holds no token; a text needs at least one to continue.")
    check_room(model, len(prompt_ids), decoding.max_new_tokens, "new")


def check_room(model: TextGenerator, prompt_tokens: int, tokens: int, kind: str) -> None:
    """Raise unless the model can hold a text.

    Args:
        model: Whose limit it is.
        prompt_tokens: Tokens of the prompt.
        tokens: Those that follow it.
        kind: What those are, for the message.

    Raises:
        Unsupported: They exceed the model's context.
    """
    limit = model.facts.longest_text
    if prompt_tokens + tokens > limit:
        raise Unsupported(
            f"{prompt_tokens} prompt tokens and {tokens} {kind} ones exceed the context of {limit} "
            f"tokens of '{model.name}'."
        )


class AccountsItself(Protocol):
    """A model whose forwards cost other work than their shapes say: its attention reads less."""

    def account(self, trace: Trace) -> None:
        """Correct the operations and cache bytes of a counted trace of its last session.

        Raises:
            models.base.Unsupported: It does not know which session's work that is.
        """
        ...


def accounts_itself(model: object) -> TypeGuard[AccountsItself]:
    """Return whether a model, or one that it is a wrapper around, counts its own work."""
    # From Python 3.12 on, `isinstance` with a protocol does not see what a wrapper passes on.
    return hasattr(model, "account")


class HasFacts(Protocol):
    """A model of which only the sizes matter."""

    facts: TextModelFacts


def count_work(trace: Trace, model: HasFacts, *, prompt_logits: bool = False) -> None:
    """Add the operations and cache bytes of a trace's forwards to it.

    Args:
        trace: Counted so far; changed in place.
        model: What ran the forwards. One that `AccountsItself` has the last word: the shapes of its
            forwards do not say what they read.
        prompt_logits: Whether the prompt's logits were computed for all of its tokens.

    Raises:
        models.base.Unsupported: The model does not know what the text cost.
    """
    facts = model.facts
    asked = None if prompt_logits else 1
    trace.prefill_flops = sum(facts.flops(forward, asked) for forward in trace.prefill)
    trace.flops += trace.prefill_flops
    for forward in trace.forwards:
        trace.flops += facts.flops(forward)
    trace.kv_bytes += sum(facts.kv_read(each) for each in (*trace.prefill, *trace.forwards))
    if accounts_itself(model):
        model.account(trace)


def decode(
    model: TextGenerator,
    prompt_ids: Sequence[int],
    decoding: Decoding,
    drafter: Drafter | None = None,
    *,
    draws: Draws | None = None,
    rule: AcceptanceRule | None = None,
) -> Generation:
    """Continue a prompt.

    Args:
        model: Opens the session that runs the forwards.
        prompt_ids: At least one token.
        decoding: Length, stop strings, temperature.
        drafter: Proposes trees; None decodes plainly.
        draws: Randomness of the sampling; by default from the seed of `decoding`.
        rule: How a tree is accepted when sampling; by default the exact one for its kind.

    Returns:
        The trimmed text with its trace. Greedy output does not depend on the drafter, up to
        floating-point ties; sampled output has the target's distribution.

    Raises:
        Unsupported: Prompt and output do not fit the model's context.
        ValueError: The prompt is empty, or the drafter broke its contract.
        InvalidOutput: The model returned NaN.
    """
    check_fits(model, prompt_ids, decoding)
    drafter = drafter or NoDraft()
    stopper = Stopper(model.tokenizer, decoding, model.facts.eos_ids)
    draws = draws or Draws(decoding.seed)
    trace = Trace()
    longest = len(prompt_ids) + decoding.max_new_tokens
    session = model.session(longest + drafter.max_nodes)

    def accept(tree: DraftTree, logits: Tensor) -> Accepted:
        if decoding.temperature == 0:
            return accept_greedy(tree, logits)
        exact = accept_sampled if tree.draft_probabilities is None else accept_without_replacement
        return (rule or exact)(
            tree, lambda node: next_token_probabilities(logits[node], decoding), draws
        )

    prompt_logits = session.prefill(prompt_ids, all_logits=drafter.wants_prompt_logits)
    trace.prefill.append(Forward(len(prompt_ids), 0))
    output = [accept(DraftTree.root(prompt_ids[-1]), prompt_logits[-1:]).bonus]
    drafter.begin(prompt_ids, prompt_logits)
    del prompt_logits  # with all of a long prompt's logits, hundreds of megabytes
    token_ids = [*prompt_ids, output[0]]
    trace.mark("prefill", model.synchronize)

    end = stopper.find(output)
    while not end.finish:
        budget = decoding.max_new_tokens - len(output) - 1
        tree = drafter.draft(token_ids, budget)
        _check_tree(tree, token_ids[-1], budget, drafter.max_nodes)
        context = session.length
        logits = session.verify(tree)
        accepted = accept(tree, logits)
        new = tree.tokens[accepted.path[1:]].tolist()
        new.append(accepted.bonus)
        session.commit(accepted.path)
        drafter.update(tree, logits, accepted)
        trace.forwards.append(Forward(len(tree), context))
        checked = len(output)
        output += new
        token_ids += new
        end = stopper.find(output, checked)
        # Drafts behind the end of the text were accepted in vain and do not count.
        trace.accepted.append(min(len(new) - 1, end.num_tokens - checked))
    trace.mark("decode", model.synchronize)

    count_work(trace, model, prompt_logits=drafter.wants_prompt_logits)
    trace.notes.update(drafter.notes)
    kept = tuple(output[: end.num_tokens])
    return Generation(kept, stopper.text(kept), end.finish, trace)


def _walk(tree: DraftTree, wanted_after: Callable[[int], int]) -> Accepted:
    """Follow the wanted tokens down the tree; the first one that no child holds is the bonus."""
    path, tokens, children = [0], tree.tokens, tree.topology.children
    while True:
        wanted = wanted_after(path[-1])
        for child in children[path[-1]]:
            if tokens[child] == wanted:
                path.append(child)
                break
        else:
            return Accepted(path, wanted)


def _check_tree(tree: DraftTree, root: int, budget: int, max_nodes: int) -> None:
    """Refuse a tree that would corrupt the text, the cache or the positions."""
    if tree.tokens[0] != root:
        raise ValueError(f"the tree's root is token {tree.tokens[0]}, the text ends in {root}.")
    if tree.topology.max_depth > budget:
        raise ValueError(f"a tree of depth {tree.topology.max_depth} exceeds the budget {budget}.")
    if len(tree) > max_nodes:
        raise ValueError(f"a tree of {len(tree)} nodes exceeds the drafter's own {max_nodes}.")
