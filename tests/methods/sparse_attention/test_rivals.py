"""Rivals of sparse attention against a decoder of loops that keeps and drops rows by the papers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from methods.sparse_attention.common import (
    BudgetedAttention,
    best_and_recent,
    both_ends,
    by_kv_head,
)
from methods.sparse_attention.h2o import H2O
from methods.sparse_attention.oracle_top_k import OracleTopK
from methods.sparse_attention.random_tokens import RandomTokens, draw
from methods.sparse_attention.sliding_window import SlidingWindow
from methods.sparse_attention.snapkv import SnapKV, count_votes
from methods.sparse_attention.streaming_llm import StreamingLLM
from models.attention import AttentionLM, AttentionSession, PromptMarks
from models.base import Decoding, Unsupported
from models.draft_tree import DraftTree
from models.native.build import compiler
from tests.models.tiny import tiny_model, tiny_module

PROMPT = [5, 17, 3, 88, 41, 2, 9, 63, 12, 30, 77, 51, 8, 33, 90, 24]
STEPS = [44, 7, 19, 60, 2, 71]
BOTH = ["transformers", *(["native"] if compiler() else [])]
on_both = pytest.mark.parametrize("kernels", BOTH)
Row = dict[int, float]  # a number for each position


class SlowDecoder:
    """A Llama that reads token after token by loops, with keys before their rotation.

    Attributes:
        held: Positions of each layer and key-value head, ascending.
        weights: Attention of each token so far: layer, query head, token, position.
    """

    def __init__(self, *, compact: bool = False) -> None:
        self.module = tiny_module("llama")
        self.compact = compact
        config = self.module.config
        self.layers, self.heads = config.num_hidden_layers, config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.group = self.heads // self.kv_heads
        self.held: list[list[list[int]]] = [
            [[] for _ in range(self.kv_heads)] for _ in range(self.layers)
        ]
        self.rows: list[dict[tuple[int, int], tuple[Tensor, Tensor]]] = [{} for _ in self.held]
        self.weights: dict[tuple[int, int, int], Row] = {}
        self.length = 0

    def turn(self, state: Tensor, position: int) -> Tensor:
        cos, sin = self.module.model.rotary_emb(state[None, None], torch.tensor([[position]]))
        half = len(state) // 2
        return state * cos[0, 0] + torch.cat((-state[half:], state[:half])) * sin[0, 0]

    @torch.inference_mode()
    def read(
        self, token: int, select: Callable[[int, int, Row], list[int]] | None = None
    ) -> Tensor:
        """Read a token and return the logits after it; `select` narrows what a head attends to."""
        decoder = self.module.model
        x = decoder.embed_tokens(torch.tensor([token]))[0]
        for number, layer in enumerate(decoder.layers):
            part = layer.self_attn
            normed = layer.input_layernorm(x)
            q = part.q_proj(normed).view(self.heads, -1)
            k = part.k_proj(normed).view(self.kv_heads, -1)
            v = part.v_proj(normed).view(self.kv_heads, -1)
            mixed = torch.zeros_like(q)
            for g in range(self.kv_heads):
                self.rows[number][g, self.length] = (k[g], v[g])
                self.held[number][g].append(self.length)
            for h in range(self.heads):
                g = h // self.group
                mixed[h] = self._attend(number, h, g, q[h], select)
            x = x + part.o_proj(mixed.reshape(-1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        self.length += 1
        logits: Tensor = self.module.lm_head(decoder.norm(x))
        return logits

    def _attend(self, layer: int, h: int, g: int, query: Tensor, select: Any) -> Tensor:
        held = self.held[layer][g]
        place = {p: i if self.compact else p for i, p in enumerate(held)}
        turned = self.turn(query, place[self.length])
        scores = {
            p: float(turned @ self.turn(self.rows[layer][g, p][0], place[p])) / len(query) ** 0.5
            for p in held
        }
        if select is not None:
            scores = {p: scores[p] for p in select(layer, h, scores)}
        highest = max(scores.values())
        weights = {p: math.exp(score - highest) for p, score in scores.items()}
        total = sum(weights.values())
        weights = {p: weight / total for p, weight in weights.items()}
        self.weights[layer, h, self.length] = weights
        result = torch.zeros_like(query)
        for p, weight in weights.items():
            result = result + weight * self.rows[layer][g, p][1]
        return result

    def keep(self, choose: Callable[[int, int, list[int]], list[int]]) -> None:
        for layer in range(self.layers):
            for g in range(self.kv_heads):
                self.held[layer][g] = sorted(choose(layer, g, self.held[layer][g]))

    def votes(self, layer: int, g: int, tokens: Sequence[int], p: int) -> float:
        """Return the attention that position p received from tokens, all heads of g."""
        heads = range(g * self.group, (g + 1) * self.group)
        return sum(self.weights[layer, h, t].get(p, 0.0) for h in heads for t in tokens)


def check_against_loops(
    method: BudgetedAttention,
    kernels: Any,
    choose: Callable[[SlowDecoder, int, int, list[int]], list[int]],
    *,
    compact: bool = False,
    once: bool = False,
) -> None:
    """Compare logits and held rows of every step; `choose` says what a head keeps."""
    slow = SlowDecoder(compact=compact)
    for token in PROMPT:
        expected = slow.read(token)
    slow.keep(lambda layer, g, held: choose(slow, layer, g, held))
    session = AttentionLM(tiny_model("llama", kernels=kernels), method.rule).session(40)
    torch.testing.assert_close(session.prefill(PROMPT)[0], expected, atol=1e-4, rtol=1e-4)
    for token in STEPS:
        for cache, held in zip(session._layers.caches, slow.held, strict=True):
            assert cache.positions.tolist() == held
        expected = slow.read(token)
        if not once:
            slow.keep(lambda layer, g, held: choose(slow, layer, g, held))
        found = session.verify(DraftTree.root(token))[0]
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
        session.commit([0])
    for cache, held in zip(session._layers.caches, slow.held, strict=True):
        assert cache.positions.tolist() == held


# --- each against loops --------------------------------------------------------------------------


@on_both
def test_streaming_keeps_both_ends_at_positions_within_the_cache(kernels: str) -> None:
    def choose(slow: SlowDecoder, layer: int, g: int, held: list[int]) -> list[int]:
        return held[:2] + held[-5:]

    check_against_loops(StreamingLLM(budget=7, sinks=2), kernels, choose, compact=True)


@on_both
def test_a_window_keeps_the_latest_tokens(kernels: str) -> None:
    check_against_loops(SlidingWindow(budget=6), kernels, lambda slow, layer, g, held: held[-6:])


@on_both
@pytest.mark.parametrize("chunk", [1, 5, 128])
def test_heavy_hitters_are_those_that_received_most_attention(kernels: str, chunk: int) -> None:
    def choose(slow: SlowDecoder, layer: int, g: int, held: list[int]) -> list[int]:
        tokens = range(slow.length)
        before, recent = held[:-3], held[-3:]
        best = sorted(before, key=lambda p: -slow.votes(layer, g, tokens, p))
        return best[:4] + recent

    check_against_loops(H2O(budget=7, recent_share=0.4, chunk=chunk), kernels, choose)


@on_both
@pytest.mark.parametrize("kernel", [1, 3])
def test_the_end_of_a_prompt_votes_on_the_rest(kernels: str, kernel: int) -> None:
    def choose(slow: SlowDecoder, layer: int, g: int, held: list[int]) -> list[int]:
        window = held[-4:]
        votes = [slow.votes(layer, g, window, p) for p in held[:-4]]
        reach = kernel // 2
        pooled = [sum(votes[max(p - reach, 0) : p + reach + 1]) for p in range(len(votes))]
        return sorted(held[:-4], key=lambda p: -pooled[p])[:5] + window

    # Max-pooling leaves equal neighbours, of which any may stay: see the test of `count_votes`.
    method = SnapKV(budget=9, window=4, kernel=kernel, pooling="mean")
    check_against_loops(method, kernels, choose, once=True)


@on_both
def test_random_tokens_keep_those_with_the_largest_numbers(kernels: str) -> None:
    def choose(slow: SlowDecoder, layer: int, g: int, held: list[int]) -> list[int]:
        numbers = draw(torch.arange(40).expand(2, -1), layer, 3)[g].tolist()
        return sorted(held[:-2], key=lambda p: -numbers[p])[:3] + held[-2:]

    check_against_loops(RandomTokens(budget=5, recent_share=0.4, seed=3), kernels, choose)


@on_both
def test_the_oracle_attends_to_the_largest_scores_of_each_head(kernels: str) -> None:
    slow = SlowDecoder()
    for token in PROMPT:
        slow.read(token)

    def select(layer: int, h: int, scores: Row) -> list[int]:
        if layer < 1:
            return list(scores)
        return sorted(scores, key=lambda p: -scores[p])[:4]

    method = OracleTopK(budget=4, dense_layers=1)
    session = AttentionLM(tiny_model("llama", kernels=kernels), method.rule).session(40)
    session.prefill(PROMPT)
    for token in STEPS:
        found = session.verify(DraftTree.root(token))[0]
        torch.testing.assert_close(found, slow.read(token, select), atol=2e-4, rtol=2e-4)
        session.commit([0])
    assert session.kept_tokens == len(PROMPT) + len(STEPS)


@on_both
@pytest.mark.parametrize("compact", [True, False])
def test_a_streamed_prompt_never_sees_more_than_the_budget(kernels: str, compact: bool) -> None:
    slow = SlowDecoder(compact=compact)
    method: BudgetedAttention
    if compact:
        method = StreamingLLM(budget=6, sinks=2, prompt="streamed", chunk=1)
    else:
        method = SlidingWindow(budget=6, prompt="streamed", chunk=1)
    first = 2 if compact else 0
    session = AttentionLM(tiny_model("llama", kernels=kernels), method.rule).session(40)
    found = session.prefill(PROMPT, all_logits=True)
    for token, row in zip(PROMPT, found, strict=True):
        torch.testing.assert_close(slow.read(token), row, atol=2e-4, rtol=2e-4)
        slow.keep(lambda layer, g, held: held[:first] + held[first:][first - 6 :])
    found = session.verify(DraftTree.root(STEPS[0]))
    torch.testing.assert_close(found[0], slow.read(STEPS[0]), atol=2e-4, rtol=2e-4)
    row = 2 * 3 * 2 * 16 * 4  # keys and values, layers, heads, head_dim, bytes
    assert session.peak_kv_bytes == 7 * row


@on_both
def test_a_streamed_text_may_be_longer_than_the_context(kernels: str) -> None:
    model = tiny_model("llama", kernels=kernels)
    ids = [(5 * i * i + 1) % 97 for i in range(300)]  # of 256 positions
    decoding = Decoding(max_new_tokens=4, ignore_eos=True)
    texts = []
    for prompt in ("streamed", "dense"):
        with StreamingLLM(budget=8, sinks=2, prompt=prompt).apply(model, None) as changed:  # type: ignore[arg-type]  # no profile is needed
            if prompt == "dense":
                with pytest.raises(Unsupported, match="exceed the context of 256"):
                    changed.generate(ids, decoding)
            else:
                texts.append(changed.generate(ids, decoding))
    assert len(texts[0].token_ids) == 4
    assert texts[0].trace.notes["kept_tokens"] == 8


# --- prompts in two pieces -----------------------------------------------------------------------

QUESTION = 11  # where it begins in PROMPT


def read_apart(method: BudgetedAttention, kernels: Any) -> tuple[AttentionSession, Tensor]:
    """Read PROMPT with its question apart; return the session and the logits after it."""
    model = AttentionLM(tiny_model("llama", kernels=kernels), method.rule)
    model.mark(PromptMarks(question=QUESTION))
    session = model.session(40)
    return session, session.prefill(PROMPT)[0]


@on_both
def test_snapkv_votes_before_it_knows_the_question_and_never_again(kernels: str) -> None:
    def choose(layer: int, g: int, held: list[int]) -> list[int]:
        window = held[-3:]
        votes = {p: slow.votes(layer, g, window, p) for p in held[:-3]}
        return sorted(votes, key=lambda p: -votes[p])[:3] + window

    slow = SlowDecoder()
    for token in PROMPT[:QUESTION]:
        slow.read(token)
    slow.keep(choose)
    for token in PROMPT[QUESTION:]:
        expected = slow.read(token)
    session, found = read_apart(SnapKV(budget=6, window=3, kernel=1), kernels)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    for cache, held in zip(session._layers.caches, slow.held, strict=True):
        assert cache.positions.tolist() == held
    # The question stays, as what is written does, and a further prompt too.
    assert session.kept_tokens == 6 + len(PROMPT) - QUESTION
    session.verify(DraftTree.root(STEPS[0]))
    session.commit([0])
    session.prefill(STEPS[1:])
    assert session.kept_tokens == 6 + len(PROMPT) - QUESTION + len(STEPS)


def test_snapkv_does_not_vote_on_a_second_prompt_after_a_short_first_one() -> None:
    session, _ = read_apart(SnapKV(budget=12, window=3, kernel=1), "transformers")
    assert session.kept_tokens == len(PROMPT)


@on_both
def test_streaming_reads_a_question_at_positions_within_the_cache(kernels: str) -> None:
    slow = SlowDecoder(compact=True)
    for token in PROMPT[:QUESTION]:
        slow.read(token)
    slow.keep(lambda layer, g, held: held[:2] + held[-5:])
    for token in PROMPT[QUESTION:]:
        expected = slow.read(token)
    _, found = read_apart(StreamingLLM(budget=7, sinks=2, chunk=3), kernels)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


@on_both
def test_heavy_hitters_go_on_adding_up_over_the_question(kernels: str) -> None:
    def choose(layer: int, g: int, held: list[int]) -> list[int]:
        tokens = range(slow.length)
        best = sorted(held[:-3], key=lambda p: -slow.votes(layer, g, tokens, p))
        return best[:4] + held[-3:]

    slow = SlowDecoder()
    for number, token in enumerate(PROMPT, 1):
        expected = slow.read(token)
        if number in (QUESTION, len(PROMPT)):
            slow.keep(choose)
    session, found = read_apart(H2O(budget=7, recent_share=0.4), kernels)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    for cache, held in zip(session._layers.caches, slow.held, strict=True):
        assert cache.positions.tolist() == held


# --- evidence ------------------------------------------------------------------------------------


def kept_evidence(method: BudgetedAttention, evidence: tuple[int, ...]) -> float:
    with method.apply(tiny_model(), None) as changed:  # type: ignore[arg-type]  # no profile is needed
        changed.mark(PromptMarks(evidence=evidence))  # type: ignore[attr-defined]  # an AttentionLM
        decoding = Decoding(max_new_tokens=4, ignore_eos=True)
        kept: float = changed.generate(PROMPT, decoding).trace.notes["evidence_kept"]
        return kept


def test_evidence_at_either_end_or_between_is_kept_or_dropped() -> None:
    # Three steps: the sinks stay, the window moves on by one token a step.
    assert kept_evidence(StreamingLLM(budget=6, sinks=2), (0, 1)) == 1.0
    assert kept_evidence(StreamingLLM(budget=6, sinks=2), (5, 6)) == 0.0
    assert kept_evidence(StreamingLLM(budget=6, sinks=2), (12,)) == pytest.approx(1 / 3)
    assert kept_evidence(SlidingWindow(budget=6), (0,)) == 0.0


def test_the_oracle_keeps_more_evidence_with_a_larger_budget() -> None:
    shares = [kept_evidence(OracleTopK(budget=budget), (3, 8, 9)) for budget in (2, 6, 12)]
    assert 0 <= shares[0] < shares[1] < shares[2] < 1
    assert kept_evidence(OracleTopK(budget=6, dense_layers=3), (3, 8, 9)) == 1.0


# --- budgets -------------------------------------------------------------------------------------

RIVALS: dict[str, Callable[[int], BudgetedAttention]] = {
    "streaming-llm": lambda budget: StreamingLLM(budget=budget, sinks=min(4, budget - 1)),
    "sliding-window": lambda budget: SlidingWindow(budget=budget),
    "h2o": lambda budget: H2O(budget=budget),
    "snapkv": lambda budget: SnapKV(budget=budget, window=min(4, budget), kernel=3),
    "random-tokens": lambda budget: RandomTokens(budget=budget),
    "oracle-top-k": lambda budget: OracleTopK(budget=budget),
}
on_rivals = pytest.mark.parametrize("name", RIVALS)


@on_both
@on_rivals
@pytest.mark.parametrize("budget", [1, 5, 15, 16, 17])
def test_what_is_kept_is_the_budget_exactly(kernels: str, name: str, budget: int) -> None:
    model = tiny_model("llama", kernels=kernels)
    session = AttentionLM(model, RIVALS[name](budget).rule).session(40)
    session.prefill(PROMPT)
    for step, token in enumerate(["prompt", *STEPS]):
        if step:
            session.verify(DraftTree.root(int(token)))
            session.commit([0])
        length = len(PROMPT) + step
        expected = {
            "oracle-top-k": length,
            "snapkv": min(budget, len(PROMPT)) + step,
        }.get(name, min(budget, length))
        assert session.kept_tokens == expected
        assert session.work.kept_rows == 2 * 3 * 2 * expected


@on_both
@on_rivals
def test_a_budget_beyond_the_text_changes_nothing(kernels: str, name: str) -> None:
    model = tiny_model("llama", kernels=kernels)
    plain = model.session(40)
    ours = AttentionLM(model, RIVALS[name](len(PROMPT) + len(STEPS)).rule).session(40)
    pairs = [(ours.prefill(PROMPT), plain.prefill(PROMPT))]
    for token in STEPS:
        tree = DraftTree.root(token)
        pairs.append((ours.verify(tree).clone(), plain.verify(tree).clone()))
        ours.commit([0])
        plain.commit([0])
    for found, expected in pairs:
        if kernels == "native":
            assert torch.equal(found, expected)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@on_rivals
def test_a_budget_beyond_the_context_leaves_the_model_alone(name: str) -> None:
    model = tiny_model()
    with RIVALS[name](256).apply(model, None) as changed:  # type: ignore[arg-type]  # no profile is needed
        assert changed is model
    with RIVALS[name](255).apply(model, None) as changed:  # type: ignore[arg-type]  # as above
        assert isinstance(changed, AttentionLM)


@on_rivals
def test_a_smaller_budget_reads_less(name: str) -> None:
    model = tiny_model()
    decoding = Decoding(max_new_tokens=8, ignore_eos=True)
    read = []
    for budget in (4, 8, 12):
        with RIVALS[name](budget).apply(model, None) as changed:  # type: ignore[arg-type]  # as above
            read.append(changed.generate(PROMPT, decoding).trace.kv_bytes)
    assert read == sorted(set(read))


def test_the_oracle_counts_the_keys_it_scores() -> None:
    session = AttentionLM(tiny_model(), OracleTopK(budget=3).rule).session(40)
    session.prefill(PROMPT)
    before = (session.work.key_rows, session.work.value_rows)
    session.verify(DraftTree.root(1))
    # Three layers: two key-value heads are scored in full, four query heads gather three rows each.
    assert session.work.key_rows - before[0] == 3 * (2 * 17 + 4 * 3)
    assert session.work.value_rows - before[1] == 3 * 4 * 3


@pytest.mark.parametrize("name", [name for name in RIVALS if name != "snapkv"])
def test_drafts_are_refused_where_they_could_not_be_taken_back(name: str) -> None:
    session = AttentionLM(tiny_model(), RIVALS[name](5).rule).session(40)
    session.prefill(PROMPT)
    with pytest.raises(Unsupported, match=r"one token a(t a time| step)"):
        session.verify(DraftTree.chain(1, [2]))


def test_a_step_that_is_run_again_leaves_no_trace() -> None:
    sessions = [AttentionLM(tiny_model(), H2O(budget=6).rule).session(40) for _ in range(2)]
    logits = []
    for repeats, session in zip((1, 3), sessions, strict=True):
        session.prefill(PROMPT)
        for token in STEPS:
            for _ in range(repeats):
                found = session.verify(DraftTree.root(token))
            session.commit([0])
        logits.append(found)
    assert torch.equal(*logits)


# --- pure functions ------------------------------------------------------------------------------


@given(
    length=st.integers(1, 40), budget=st.integers(1, 40), first=st.integers(0, 40), data=st.data()
)
def test_both_ends_are_the_first_and_the_last_rows(
    length: int, budget: int, first: int, data: st.DataObject
) -> None:
    budget, first = min(budget, length), min(first, budget, length)
    rows = both_ends(length, budget, first).tolist()
    assert rows == [*range(first), *range(length - budget + first, length)]


@given(
    scores=st.lists(st.integers(0, 10_000), min_size=2, max_size=30, unique=True),
    data=st.data(),
)
def test_the_best_and_the_recent_rows_are_kept(scores: list[int], data: st.DataObject) -> None:
    budget = data.draw(st.integers(1, len(scores)))
    recent = data.draw(st.integers(0, budget))
    found = best_and_recent(torch.tensor([scores, scores[::-1]]).float(), budget, recent)
    for row, own in zip(found.tolist(), (scores, scores[::-1]), strict=True):
        older = sorted(range(len(own) - recent), key=lambda i: -own[i])[: budget - recent]
        assert row == sorted(older) + list(range(len(own) - recent, len(own)))


def test_heads_of_a_key_value_head_are_added() -> None:
    values = torch.arange(12.0).view(6, 2)
    assert by_kv_head(values, 2).tolist() == [[6, 9], [24, 27]]


def test_votes_spread_to_the_neighbours_of_a_peak() -> None:
    scores = torch.zeros(2, 3, 12)
    scores[:, :, 4] = 5
    for head in range(2):
        for query in range(3):
            scores[head, query, 9 + query + 1 :] = -torch.inf
    votes = count_votes(scores, 1, 3, "max")[0]
    assert votes.shape == (9,)
    assert votes[3] == votes[4] == votes[5] > votes[6] == votes[0]
    # Softmax first: window tokens are in its denominator, so votes are below the number of queries.
    expected = sum(2 * math.exp(5) / (math.exp(5) + 8 + query + 1) for query in range(3))
    assert float(votes[4]) == pytest.approx(expected, rel=1e-5)


def test_mean_votes_count_what_lies_beyond_the_ends_as_nothing() -> None:
    votes = count_votes(torch.zeros(2, 1, 10), 1, 3, "mean")[0]
    # Two heads give each of the ten rows a tenth; the first and the last row lack a neighbour.
    assert votes.tolist() == pytest.approx([2 / 3 * 0.2, *[0.2] * 7, 2 / 3 * 0.2])


def test_defaults_and_windows_are_those_of_the_authors() -> None:
    snapkv = SnapKV()
    assert (snapkv.window, snapkv.kernel, snapkv.pooling) == (32, 7, "max")
    # However long a window is, it goes through the rule in one piece: all of it votes.
    assert SnapKV(budget=900, window=800).rule().chunk == 800
    assert StreamingLLM().sinks == 4
    assert H2O().recent_share == RandomTokens().recent_share == 0.5


def test_numbers_of_random_tokens_are_spread_and_differ_between_layers_heads_and_seeds() -> None:
    positions = torch.arange(4000).expand(2, -1)
    numbers = draw(positions, 0, 0)
    above = (numbers > 0).double().mean(1)
    assert ((above - 0.5).abs() < 0.04).all()  # five deviations of 4000 coins
    largest = numbers.topk(400, dim=-1).indices
    assert ((largest.double().mean(1) / 2000 - 1).abs() < 0.15).all()
    for other in (draw(positions, 1, 0)[0], draw(positions, 0, 1)[0], numbers[1]):
        agreement = ((other > 0) == (numbers[0] > 0)).double().mean()
        assert abs(float(agreement) - 0.5) < 0.05
    assert torch.equal(draw(positions[:, [3, 700]], 0, 0), numbers[:, [3, 700]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlidingWindow(budget=0), "budget must be a whole number of at least 1, got 0"),
        (lambda: SlidingWindow(budget=True), "budget must be a whole number"),
        (
            lambda: SlidingWindow(prompt="dance"),
            "prompt must be one of dense, streamed, got 'dance'",
        ),
        (lambda: StreamingLLM(budget=4), "sinks must be fewer than budget, got 4 and 4"),
        (lambda: StreamingLLM(chunk=0), "chunk must be a whole number of at least 1"),
        (lambda: H2O(recent_share=1.5), r"recent_share must lie in \[0, 1\], got 1.5"),
        (lambda: H2O(chunk=0), "chunk must be a whole number of at least 1"),
        (lambda: SnapKV(kernel=4), "kernel must be odd, got 4"),
        (lambda: SnapKV(budget=16), "window must be at most budget, got 32 and 16"),
        (lambda: SnapKV(pooling="sum"), "pooling must be max or mean, got 'sum'"),
        (lambda: RandomTokens(seed=0.5), "seed must be a whole number"),
        (lambda: OracleTopK(dense_layers=-1), "dense_layers must be a whole number"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
