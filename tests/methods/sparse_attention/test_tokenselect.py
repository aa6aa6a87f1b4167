"""TokenSelect: votes by hand, one forward by loops, and its promises on random models."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hardware.profile import Profile
from methods.sparse_attention.tokenselect import (
    TokenSelect,
    TokenSelectRule,
    Vote,
    count_votes,
    rank,
    reference_order,
    summarise,
)
from models.attention import AttentionLM, AttentionSession, LayerCache
from models.base import Decoding, Unsupported
from models.draft_tree import DraftTree
from models.text import CausalLM
from runner.conformance import check_method, tiny_text_model
from tests.models.tiny import tiny_model

CPU = Profile(name="test", kind="cpu", label="test")
ARCHITECTURES = ("llama", "qwen2", "mistral-sliding-window")
VOTES: tuple[Vote, ...] = ("soft", "hard", "logits", "per_head")
# Acts on a few dozen tokens.
SMALL = TokenSelect(n_init=2, k=5, n_local=6, chunk=4, theta=1.0)
PROMPT = [11, 45, 3, 71, 22, 90, 8, 33, 60, 14, 5, 77, 29, 41, 18, 66, 2, 51, 83, 37, 12, 9, 64, 25]
CONTINUATION = [7, 31, 88, 19, 53, 4, 70, 16, 42, 95]


class Spy(TokenSelectRule):
    """Keeps what each layer was given and answered."""

    def __init__(self, method: TokenSelect, *, selects_always: bool = False) -> None:
        super().__init__(method)
        self.selects_always = selects_always
        self.seen: list[dict[str, Any]] = []
        self.watch: Callable[[Tensor, LayerCache], None] | None = None

    def attend(self, layer: int, queries: Tensor, cache: LayerCache) -> Tensor:
        self.selected.pop(layer, None)
        mixed = super().attend(layer, queries, cache)
        if self.watch:
            self.watch(queries, cache)
        record = {"layer": layer, "queries": queries, "keys": cache.keys, "values": cache.values}
        record |= {"mixed": mixed, "rows": self.selected.get(layer), "rotate": cache.rotate}
        self.seen.append({k: v.clone() if isinstance(v, Tensor) else v for k, v in record.items()})
        return mixed


def run(
    method: TokenSelect,
    model: CausalLM | None = None,
    *,
    prompt: Sequence[int] = PROMPT,
    continuation: Sequence[int] = CONTINUATION,
    selects_always: bool = False,
) -> tuple[Tensor, Spy, AttentionSession]:
    """Return logits of the prompt and of fed tokens, (tokens, vocab), the rule and the session."""
    spy = Spy(method, selects_always=selects_always)
    session = AttentionLM(model or tiny_model(), lambda: spy, longest_text=10_000).session(
        len(prompt) + len(continuation)
    )
    logits = [session.prefill(prompt, all_logits=True)]
    for token in continuation:
        logits.append(session.verify(DraftTree.root(token)))
        session.commit([0])
    return torch.cat(logits), spy, session


@functools.cache
def full_logits(architecture: str) -> Tensor:
    session = tiny_model(architecture).session(len(PROMPT) + len(CONTINUATION))
    return session.prefill(PROMPT + CONTINUATION, all_logits=True)


# --- where nothing is left out ---


@pytest.mark.parametrize("mode", ["compact", "absolute"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_budget_of_all_tokens_is_full_attention(architecture: str, mode: Any) -> None:
    method = replace(SMALL, k=40, rope_mode=mode)
    found, spy, _ = run(method, tiny_model(architecture))
    torch.testing.assert_close(found, full_logits(architecture), atol=1e-4, rtol=1e-4)
    assert all(each["rows"] is None for each in spy.seen)


@pytest.mark.parametrize("vote", VOTES)
@pytest.mark.parametrize("mode", ["compact", "absolute"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_selecting_all_tokens_of_the_middle_is_full_attention(
    architecture: str, mode: Any, vote: Vote
) -> None:
    # Compact positions are the true ones then, and votes decide nothing.
    method = replace(SMALL, k=40, rope_mode=mode, vote=vote)
    found, spy, _ = run(method, tiny_model(architecture), selects_always=True)
    torch.testing.assert_close(found, full_logits(architecture), atol=1e-4, rtol=1e-4)
    assert spy.seen[-1]["rows"].shape[1] == len(PROMPT + CONTINUATION)


def test_leaving_tokens_out_changes_the_logits() -> None:
    # Or the tests above could not fail.
    for mode in ("compact", "absolute"):
        found = run(replace(SMALL, rope_mode=mode))[0]  # type: ignore[arg-type]  # both are modes
        assert (found - full_logits("llama")).abs().max() > 0.1


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_attention_depends_on_distances_only(architecture: str) -> None:
    differences = []

    def watch(queries: Tensor, cache: LayerCache) -> None:
        rows = torch.arange(cache.length)
        here, there, stretched = (
            cache.attend_rows(queries, rows, positions=positions)
            for positions in (rows, rows + 17, 3 * rows)
        )
        torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-4)
        differences.append(float((here - stretched).abs().max()))

    spy = Spy(replace(SMALL, k=40))
    spy.watch = watch
    session = AttentionLM(tiny_model(architecture), lambda: spy).session(len(PROMPT))
    session.prefill(PROMPT)
    assert max(differences) > 0.01


# --- which rows ---


@settings(max_examples=25, deadline=None)
@given(
    n_init=st.integers(0, 4),
    k=st.integers(0, 9),
    n_local=st.integers(1, 8),
    theta=st.sampled_from([-1.0, 0.3, 0.9, 1.0]),
    vote=st.sampled_from(VOTES),
    carry=st.booleans(),
    block=st.sampled_from([1, 3]),
    pool_kernel=st.sampled_from([1, 3]),
)
def test_the_kept_rows_are_as_many_as_promised_and_in_order(
    n_init: int, k: int, n_local: int, vote: Vote, **others: Any
) -> None:
    method = TokenSelect(
        n_init=n_init, k=k, n_local=n_local, vote=vote, chunk=min(3, n_local), **others
    )
    _, spy, session = run(method)
    layers = 3
    for place, each in enumerate(spy.seen):
        length = each["keys"].shape[1]
        rows = each["rows"]
        if length <= method.budget:
            assert rows is None
            continue
        assert rows.shape == (4 if vote == "per_head" else 1, method.budget)
        assert (rows.diff(dim=-1) > 0).all()
        assert (rows[:, :n_init] == torch.arange(n_init)).all()
        assert (rows[:, -n_local:] == torch.arange(length - n_local, length)).all()
        assert each["layer"] == place % layers
    notes = spy.notes
    assert notes["attended_tokens"] == min(method.budget, session.length)
    assert int(notes["max_position"]) <= method.budget - 1


def test_a_forward_wider_than_the_local_window_sees_itself() -> None:
    spy = Spy(SMALL)
    session = AttentionLM(tiny_model(), lambda: spy).session(60)
    session.prefill(PROMPT)
    session.verify(DraftTree.chain(PROMPT[-1], CONTINUATION[:8]))
    rows = spy.seen[-1]["rows"][0]
    assert rows[-9:].tolist() == list(range(24, 33))
    assert len(rows) == 2 + 5 + 9


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("theta", [0.9, -1.0])
def test_no_position_lies_beyond_the_budget_however_long_the_text(
    theta: float, carry: bool
) -> None:
    method = replace(SMALL, theta=theta, carry=carry)
    places: set[int] = set()

    class Watching(Spy):
        def attend(self, layer: int, queries: Tensor, cache: LayerCache) -> Tensor:
            attend_rows = cache.attend_rows

            def watched(queries: Tensor, rows: Tensor, *, positions: Tensor) -> Tensor:
                places.update(positions.tolist())
                return attend_rows(queries, rows, positions=positions)

            cache.attend_rows = watched  # type: ignore[method-assign]  # watched for one call
            try:
                return super().attend(layer, queries, cache)
            finally:
                del cache.attend_rows

    spy = Watching(method)
    model = AttentionLM(tiny_model(), lambda: spy, longest_text=10_000)
    session = model.session(620)
    session.prefill((PROMPT * 30)[:600])
    for token in PROMPT[:20]:
        session.verify(DraftTree.root(token))
        session.commit([0])
    assert places == set(range(method.budget))
    assert spy.notes["max_position"] == method.budget - 1 == 12


def test_texts_longer_than_the_models_positions_run_where_positions_are_compact() -> None:
    model = tiny_model()
    prompt = (PROMPT * 20)[:400]
    decoding = Decoding(max_new_tokens=3)
    assert model.facts.max_positions < 400
    with pytest.raises(Unsupported, match="exceed the context"):
        model.generate(prompt, decoding)
    with SMALL.apply(model, CPU) as selected:
        found = selected.generate(prompt, decoding)
    assert found.trace.notes["max_position"] == SMALL.budget - 1
    with (
        replace(SMALL, rope_mode="absolute").apply(model, CPU) as selected,
        pytest.raises(Unsupported, match="exceed the context"),
    ):
        selected.generate(prompt, decoding)


def test_a_chunk_of_one_token_is_a_decoding_step() -> None:
    for mode in ("compact", "absolute"):
        method = replace(SMALL, chunk=1, rope_mode=mode, theta=0.5)  # type: ignore[arg-type]  # both are modes
        texts = PROMPT + CONTINUATION
        read, reader, _ = run(method, prompt=texts, continuation=[])
        fed, feeder, _ = run(method, prompt=texts[:1], continuation=texts[1:])
        torch.testing.assert_close(read, fed, atol=1e-5, rtol=1e-4)
        for one, other in zip(reader.seen, feeder.seen, strict=True):
            assert (one["rows"] is None) == (other["rows"] is None)
            assert one["rows"] is None or torch.equal(one["rows"], other["rows"])
        assert reader.notes == feeder.notes


# --- votes ---


def loop_votes(queries: Tensor, keys: Tensor) -> tuple[list[list[float]], list[float]]:
    """Return scores of each head and the soft vote, one number at a time."""
    heads, kv_heads = len(queries), len(keys)
    scores, votes = [], [0.0] * keys.shape[1]
    for head in range(heads):
        own = keys[head * kv_heads // heads]
        row = [sum(float(a * b) for a, b in zip(queries[head], key, strict=True)) for key in own]
        total = sum(math.exp(score) for score in row)
        for token, score in enumerate(row):
            votes[token] += math.exp(score) / total
        scores.append(row)
    return scores, votes


def products(queries: Tensor, keys: Tensor) -> Tensor:
    """Return queries, (heads, size), times keys, (kv_heads, tokens, size): (heads, tokens)."""
    own = keys.repeat_interleave(len(queries) // len(keys), dim=0)
    return torch.einsum("hd,hnd->hn", queries, own)


def test_votes_are_those_of_explicit_loops_and_add_up_to_the_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(4, 6, generator=generator)
    keys = torch.randn(2, 12, 6, generator=generator)
    expected_scores, expected_votes = loop_votes(queries, keys)
    scores = products(queries, keys)
    torch.testing.assert_close(scores, torch.tensor(expected_scores))
    votes = count_votes(scores, "soft", 3)
    torch.testing.assert_close(votes[0], torch.tensor(expected_votes))
    assert float(votes.sum()) == pytest.approx(4.0, abs=1e-5)
    best = [sorted(range(12), key=lambda token: -row[token])[:3] for row in expected_scores]
    counted = [sum(token in each for each in best) for token in range(12)]
    assert count_votes(scores, "hard", 3)[0].tolist() == counted
    sums = [sum(row[token] for row in expected_scores) for token in range(12)]
    torch.testing.assert_close(count_votes(scores, "logits", 3)[0], torch.tensor(sums))
    apart = count_votes(scores, "per_head", 3)
    assert rank(apart, 3).sort().values.tolist() == [sorted(each) for each in best]


def test_the_votes_disagree_where_they_should() -> None:
    # Token 0: one head is certain of it. Token 1: the second choice of all. Token 3: the largest
    # number, of a head that is no more certain than the first.
    scores = torch.tensor(
        [
            [9.0, 1.0, 0.0, 0.0, 0.0],
            [0.0, 1.0, 0.5, -9.0, 0.0],
            [0.0, 1.0, 0.5, -9.0, 0.0],
            [0.0, 41.0, 40.0, 80.0, 0.0],
        ]
    )
    first = {vote: int(rank(count_votes(scores, vote, 2), 1, is_tied=True)) for vote in VOTES[:3]}
    assert first == {"soft": 0, "hard": 1, "logits": 3}
    assert rank(count_votes(scores, "per_head", 1), 1)[:, 0].tolist() == [0, 1, 1, 3]


def test_a_needle_of_one_head_wins_the_soft_vote_and_loses_the_sum_of_logits() -> None:
    # Head 0 looks for the needle at row 20; the others' logits are large there, and the other way.
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(4, 40, 8, generator=generator)
    queries = torch.randn(4, 8, generator=generator)
    keys[0, 20] = 3.0 * queries[0]
    for head in (1, 2, 3):
        keys[head, 20] = -5.0 * queries[head]
    scores = products(queries, keys)
    assert int(scores[0].argmax()) == 20
    assert 20 in rank(count_votes(scores, "soft", 4), 4)
    assert 20 not in rank(count_votes(scores, "logits", 4), 20)


def test_the_reference_order_pairs_head_h_with_h_modulo_the_key_value_heads() -> None:
    for heads, kv_heads in ((4, 2), (9, 3), (32, 8), (4, 4)):
        order = reference_order(heads, kv_heads).tolist()
        assert sorted(order) == list(range(heads))
        group = heads // kv_heads
        assert all(head % kv_heads == place // group for place, head in enumerate(order))
    # With as many key-value heads as heads the quirk is none.
    assert reference_order(4, 4).tolist() == [0, 1, 2, 3]


def test_pooling_and_blocks_lend_votes_to_neighbours() -> None:
    scores = torch.full((1, 9), -5.0)
    scores[0, 4], scores[0, 8] = 3.0, 2.0
    pooled = count_votes(scores, "soft", 3, pool_kernel=3)[0]
    assert (pooled[3:6] == pooled[4]).all()
    assert (pooled[7:] == pooled[8]).all()
    assert pooled[2] < pooled[8] < pooled[4]
    blocks = count_votes(scores, "soft", 3, block=4)
    assert rank(blocks, 5, is_tied=True)[0].tolist() == [4, 5, 6, 7, 8]
    assert blocks.shape == (1, 9)


def test_equal_votes_go_to_the_earlier_token() -> None:
    votes = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]])
    assert rank(votes, 4, is_tied=True)[0].tolist() == [1, 3, 0, 2]


# --- one forward, by loops ---


def turned(vector: Tensor, position: int) -> Tensor:
    """Rotate one vector as Llama does, with base 10,000, pair by pair."""
    half = len(vector) // 2
    found = vector.clone().double()
    for pair in range(half):
        angle = position * 10_000.0 ** (-pair / half)
        a, b = float(vector[pair]), float(vector[pair + half])
        found[pair] = a * math.cos(angle) - b * math.sin(angle)
        found[pair + half] = b * math.cos(angle) + a * math.sin(angle)
    return found


def loop_rows(method: TokenSelect, queries: Tensor, keys: Tensor) -> list[int]:
    """Return the rows that one layer's queries select by the soft vote."""
    width, heads, head_dim = queries.shape
    kv_heads, length = keys.shape[:2]
    middle = range(method.n_init, length - method.n_local)
    votes = dict.fromkeys(middle, 0.0)
    for head in range(heads):
        mean = sum(turned(queries[i, head], method.n_local + i) for i in range(width)) / width
        group = head % kv_heads if method.reference_head_map else head * kv_heads // heads
        scale = head_dim**-0.5 if method.scale_scores else 1.0
        weights = {j: math.exp(scale * float(mean @ keys[group, j].double())) for j in middle}
        for j, weight in weights.items():
            votes[j] += weight / sum(weights.values())
    chosen = sorted(sorted(middle, key=lambda j: -votes[j])[: method.k])
    return [*range(method.n_init), *chosen, *range(length - method.n_local, length)]


def loop_attention(rows: list[int], queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return the attention to chosen rows at positions 0, 1, 2, ..., causal."""
    width, heads, head_dim = queries.shape
    kv_heads, length = keys.shape[:2]
    found = torch.zeros(width, heads, head_dim, dtype=torch.float64)
    for i in range(width):
        for head in range(heads):
            group = head * kv_heads // heads
            query = turned(queries[i, head], len(rows) - width + i)
            seen = [(p, row) for p, row in enumerate(rows) if row <= length - width + i]
            weights = [
                math.exp(float(query @ turned(keys[group, row], p)) * head_dim**-0.5)
                for p, row in seen
            ]
            for weight, (_, row) in zip(weights, seen, strict=True):
                found[i, head] += weight / sum(weights) * values[group, row].double()
    return found.float()


@pytest.mark.parametrize("scale_scores", [True, False])
@pytest.mark.parametrize("reference_head_map", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_chunk_and_a_step_are_those_of_explicit_loops(
    architecture: str, scale_scores: bool, reference_head_map: bool
) -> None:
    method = replace(SMALL, scale_scores=scale_scores, reference_head_map=reference_head_map)
    _, spy, _ = run(method, tiny_model(architecture), continuation=[7])
    for each in spy.seen[-6:-1]:  # two layers of the last chunk, all of the step but one
        keys, values, queries = each["keys"], each["values"], each["queries"]
        rows = loop_rows(method, queries, keys)
        assert each["rows"][0].tolist() == rows
        expected = loop_attention(rows, queries, keys, values)
        torch.testing.assert_close(each["mixed"], expected, atol=1e-4, rtol=1e-3)


def test_absolute_positions_score_and_attend_with_rotated_rows() -> None:
    method = replace(SMALL, rope_mode="absolute")
    _, spy, _ = run(method, continuation=[7])
    for each in spy.seen[-6:]:  # the last chunk and the step
        keys, queries = each["keys"], each["queries"]
        summary = summarise(queries)
        length = keys.shape[1]
        products = torch.einsum("hd,hnd->hn", summary, keys.repeat_interleave(2, 0)) / 4.0
        votes = products[:, 2 : length - 6].softmax(-1).sum(0)
        chosen = (votes.topk(5).indices.sort().values + 2).tolist()
        assert each["rows"][0].tolist() == [0, 1, *chosen, *range(length - 6, length)]


# --- the Selection Cache ---


def steps(spy: Spy) -> dict[int, list[list[int]]]:
    """Return the rows of each decoding step, by layer."""
    found: dict[int, list[list[int]]] = {}
    for each in spy.seen:
        if len(each["queries"]) == 1 and each["rows"] is not None:
            found.setdefault(each["layer"], []).append(each["rows"][0].tolist())
    return found


def test_a_threshold_of_one_selects_at_every_step_and_of_minus_one_once() -> None:
    layers, tokens = 3, len(CONTINUATION)
    for theta, selections in ((1.0, tokens), (1.5, tokens), (-1.0, 1)):
        _, spy, _ = run(replace(SMALL, theta=theta))
        assert spy.notes["selections"] == layers * selections
        assert spy.notes["reuses"] == layers * (tokens - selections)
        assert spy.notes["skip_rate"] == pytest.approx(1 - selections / tokens)


def test_reuse_keeps_the_selection_and_moves_the_local_window() -> None:
    _, spy, _ = run(replace(SMALL, theta=-1.0))
    for rows in steps(spy).values():
        assert len(rows) == len(CONTINUATION)
        for number, row in enumerate(rows):
            length = len(PROMPT) + 1 + number
            assert row[2:7] == rows[0][2:7]
            assert row[7:] == list(range(length - 6, length))


def test_a_query_selects_anew_just_below_the_threshold() -> None:
    _, spy, _ = run(replace(SMALL, theta=1.0))
    records = [each for each in spy.seen if each["layer"] == 1 and len(each["queries"]) == 1]
    # As the rule sees them: at the edge of the local window.
    edge = torch.tensor([SMALL.n_local])
    first, second = (each["rotate"](each["queries"], edge).flatten() for each in records[:2])
    cosine = float(torch.nn.functional.cosine_similarity(first, second, dim=0))
    for theta, reuses in ((cosine - 1e-4, True), (cosine + 1e-4, False)):
        _, again, _ = run(replace(SMALL, theta=theta), continuation=CONTINUATION[:2])
        rows = steps(again)[1]
        chose = [
            each["rows"][0, 2:7].tolist()
            for each in spy.seen
            if each["layer"] == 1 and len(each["queries"]) == 1
        ]
        assert chose[0] != chose[1], "the example decides nothing"
        assert (rows[1][2:7] == rows[0][2:7]) == reuses


def test_without_carry_tokens_that_leave_the_window_are_lost_and_with_it_kept() -> None:
    lost, kept = (
        steps(run(replace(SMALL, theta=-1.0, carry=carry))[1])[0] for carry in (False, True)
    )
    first_start = len(PROMPT) + 1 - 6
    for number in range(1, 5):
        left = set(range(first_start, first_start + number))
        assert not left & set(lost[number])
        assert left <= set(kept[number])
        assert len(kept[number]) == SMALL.budget
        # The least voted made room: what remains of the first selection only shrinks.
        assert set(kept[number][2:7]) - left <= set(kept[number - 1][2:7])
    # Five carried tokens would leave nothing of the selection, so a new one is made.
    _, spy, _ = run(replace(SMALL, theta=-1.0, carry=True))
    assert spy.notes["selections"] == 3 * 2


def test_the_least_voted_tokens_make_room_for_carried_ones() -> None:
    _, spy, _ = run(replace(SMALL, theta=1.0), continuation=CONTINUATION[:1])
    record = spy.seen[-3]
    scores = products(
        record["rotate"](record["queries"], torch.tensor([6]))[0], record["keys"][:, 2:19]
    )
    ranked = (rank(count_votes(scores / 4.0, "soft", 5), 5)[0] + 2).tolist()
    _, spy, _ = run(replace(SMALL, theta=-1.0, carry=True), continuation=CONTINUATION[:3])
    assert steps(spy)[0][2][2:7] == sorted([*ranked[:3], 19, 20])


def test_a_chunk_forgets_the_selection_of_the_step_before() -> None:
    spy = Spy(replace(SMALL, theta=-1.0))
    session = AttentionLM(tiny_model(), lambda: spy).session(60)
    session.prefill(PROMPT)
    for chain in ([7], [7, 31, 88], [19], [53]):
        session.verify(DraftTree.chain(chain[0], chain[1:]))
        session.commit(list(range(len(chain))))
    assert (spy.notes["selections"], spy.notes["reuses"]) == (3 * 2, 3)


# --- counts ---


def test_work_is_that_of_the_rows_really_read() -> None:
    method = replace(SMALL, theta=-1.0)
    model = tiny_model()
    facts = model.facts
    new = 4
    with method.apply(model, CPU) as selected:
        trace = selected.generate(PROMPT, Decoding(max_new_tokens=new, ignore_eos=True)).trace
    layers, kv_heads = facts.num_layers, facts.num_kv_heads
    keys = values = 0
    for length in range(4, len(PROMPT) + 1, 4):  # chunks
        attended = min(length, 13)
        keys += attended + (length if length > 13 else 0)
        values += attended
    for step in range(new - 1):
        # The first step's scores pass over all keys; the others reuse its selection.
        keys += 13 + (len(PROMPT) + 1 if step == 0 else 0)
        values += 13
    row_bytes = facts.head_dim * facts.kv_item_bytes
    assert trace.kv_bytes == (keys + values) * layers * kv_heads * row_bytes
    cached = sum(len(PROMPT) + 1 + step for step in range(new - 1))
    scored = len(PROMPT) + 1 - 6 - 2
    assert trace.notes["rows_read_share"] == pytest.approx(
        (scored + 2 * 13 * (new - 1)) / (2 * cached)
    )
    assert trace.notes["skip_rate"] == pytest.approx(2 / 3)
    assert 1 <= float(trace.notes["tokens_per_run"]) <= 5


def test_a_run_is_a_row_of_neighbours() -> None:
    _, spy, _ = run(replace(SMALL, theta=1.0))
    runs = tokens = 0
    for each in spy.seen:
        if each["rows"] is None:
            continue
        middle = each["rows"][0, 2:7].tolist()
        tokens += 5
        runs += sum(row - 1 not in middle for row in middle)
    assert spy.notes["tokens_per_run"] == pytest.approx(tokens / runs)


def test_both_ends_alone_are_no_selection() -> None:
    _, spy, _ = run(replace(SMALL, k=0))
    assert (spy.notes["selections"], spy.notes["reuses"]) == (0, 0)
    assert "skip_rate" not in spy.notes
    assert spy.seen[-1]["rows"].tolist() == [[0, 1, *range(28, 34)]]


# --- settings ---


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": -1}, "k must be a whole number from 0, got -1"),
        ({"n_init": 1.5}, "n_init must be a whole number from 0, got 1.5"),
        ({"n_local": 0, "chunk": 0}, "n_local must be a whole number from 1"),
        ({"chunk": True}, "chunk must be a whole number from 1, got True"),
        ({"n_local": 511}, "n_local must be at least chunk, got 511 and 512"),
        ({"pool_kernel": 4}, "pool_kernel must be odd, got 4"),
        ({"theta": -1.1}, r"theta must lie in \[-1, 2\], got -1.1"),
        ({"theta": float("nan")}, "theta must lie in"),
        ({"vote": "loud"}, "vote must be one of soft, hard, logits, per_head, got 'loud'"),
        ({"rope_mode": "none"}, "rope_mode must be one of compact, absolute, got 'none'"),
        ({"block": 0}, "block must be a whole number from 1"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenSelect(**wrong)


def test_the_defaults_are_the_papers() -> None:
    method = TokenSelect()
    assert (method.n_init, method.k, method.n_local, method.chunk) == (128, 2048, 512, 512)
    assert (method.theta, method.vote, method.pool_kernel) == (0.9, "soft", 1)
    assert (method.rope_mode, method.carry) == ("compact", False)
    assert (method.reference_head_map, method.scale_scores, method.block) == (False, True, 1)


def test_a_budget_beyond_the_models_length_yields_the_model_itself() -> None:
    model = tiny_model()
    with TokenSelect().apply(model, CPU) as applied:
        assert applied is model
    with replace(SMALL, k=256 - 8 - 1).apply(model, CPU) as applied:
        assert applied is not model


def test_other_architectures_are_refused() -> None:
    with (
        pytest.raises(Unsupported, match="not in GPT2LMHeadModel"),
        SMALL.apply(tiny_model("gpt2"), CPU),
    ):
        pass


def test_the_battery_passes_for_each_kind_of_vote() -> None:
    for vote in ("soft", "per_head"):
        method = TokenSelect(**{**TokenSelect.trial, "vote": vote})
        failed = [each for each in check_method(method, tiny_text_model()) if not each.ok]
        assert failed == []


# --- on a real model ---


@pytest.mark.weights
def test_losses_on_real_prose_stand_in_the_order_of_the_votes() -> None:
    from models.loading import load
    from tests.methods.sparse_attention.measure_tokenselect import VARIANTS, loss_of, real_text

    model = load("smollm2-135m", offline=True)
    token_ids = real_text(model)
    found = {
        name: loss_of(model, token_ids, 128, variant)
        for name, variant in VARIANTS.items()
        if name in ("full", "soft", "hard", "logits", "head map", "window")
    }
    order = ["full", "soft", "hard", "logits", "head map", "window"]
    assert sorted(found, key=lambda name: found[name]) == order
