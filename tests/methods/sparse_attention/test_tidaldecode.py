"""TidalDecode: its sets, its layers, and what they give on random models of the paper's kinds."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hardware.profile import Profile
from methods.sparse_attention.tidaldecode import (
    RESELECTION_LAYERS,
    Share,
    TidalDecode,
    TidalRule,
    attend_masked,
    choose,
    reselection_layer,
    votes,
)
from models.attention import AttentionLM, AttentionSession, Rule
from models.base import Decoding, Session, TextModelFacts, Unsupported
from models.draft_tree import DraftTree
from models.text import CausalLM, Kernels
from runner.conformance import check_method, tiny_text_model
from runner.conformance_base import sharpen
from tests.models.tiny import NumberTokenizer, tiny_model

CPU = Profile(name="test", kind="cpu", label="test")
SHARES: tuple[Share, ...] = ("per_head", "per_kv_head", "all")
# Settings that act on a few dozen tokens and a few layers.
SMALL = TidalDecode(budget=6, first_selection=1, reselection=3)


def facts(layers: int = 6, heads: int = 4, kv_heads: int = 2, head_dim: int = 8) -> TextModelFacts:
    return TextModelFacts(
        vocab_size=50,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        matrix_parameters=1,
        head_parameters=0,
        weight_bytes=4,
        kv_item_bytes=4,
        max_positions=1000,
        eos_ids=frozenset(),
        dtype="float32",
    )


class ListedCache:
    """A cache of one layer that attends by loops, and notes what it was asked."""

    def __init__(self, keys: Tensor, values: Tensor, width: int = 1) -> None:
        self.keys, self.values = keys, values
        self.length, self.width = keys.shape[1], width
        self.in_prompt = self.ends_prompt = False
        self.positions = torch.arange(self.length).expand(keys.shape[0], -1)
        self.asked: list[str] = []
        self.rows: list[Tensor] = []
        self.rows_read = 0

    @classmethod
    def random(
        cls, length: int, *, kv_heads: int = 2, head_dim: int = 8, width: int = 1, seed: int = 0
    ) -> ListedCache:
        generator = torch.Generator().manual_seed(seed)
        keys, values = torch.randn(2, kv_heads, length, head_dim, generator=generator)
        return cls(keys, values, width)

    def attend(self, queries: Tensor) -> Tensor:
        self.asked.append("all")
        return self._attend(queries)

    def attend_with_scores(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        self.asked.append("all with scores")
        return self._attend(queries), self._products(queries)

    def attend_rows(
        self, queries: Tensor, rows: Tensor, *, positions: Tensor | None = None
    ) -> Tensor:
        self.asked.append("rows")
        self.rows.append(rows)
        assert positions is None
        assert (rows.diff(dim=-1) > 0).all()
        sets = rows.reshape(-1, rows.shape[-1])
        self._count(max(len(sets), len(self.keys)) * sets.shape[1])
        every_head = sets.repeat_interleave(queries.shape[1] // len(sets), dim=0)
        return loop_attention(
            queries, self.keys, self.values, every_head[:, None].expand(-1, self.width, -1)
        )

    def scores(self, queries: Tensor, *, scale: float | None = None) -> Tensor:
        assert scale is None
        self.asked.append("scores")
        return self._products(queries)

    def _attend(self, queries: Tensor) -> Tensor:
        self._count(len(self.keys) * self.length)
        every = torch.arange(self.length).expand(queries.shape[1], self.width, -1)
        return loop_attention(queries, self.keys, self.values, every)

    def _products(self, queries: Tensor) -> Tensor:
        group = queries.shape[1] // len(self.keys)
        found = torch.einsum("whd,hnd->hwn", queries, self.keys.repeat_interleave(group, 0))
        behind = torch.ones(self.width, self.length, dtype=torch.bool)
        hidden = behind.triu(self.length - self.width + 1)
        scaled: Tensor = found * self.keys.shape[2] ** -0.5
        return scaled.masked_fill(hidden, -torch.inf)

    def rotate(self, states: Tensor, positions: Tensor) -> Tensor:
        raise AssertionError("keys and queries are rotated")

    def keep(self, rows: Tensor) -> None:
        raise AssertionError("every row is kept")

    def _count(self, rows: int) -> None:
        self.rows_read += 2 * rows  # of keys and of values


def loop_attention(queries: Tensor, keys: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """Attend one token, one head, one row at a time.

    Args:
        queries: (width, heads, head_dim).
        keys, values: (kv_heads, length, head_dim).
        rows: (heads, width, chosen); those behind their query are skipped.
    """
    width, heads, head_dim = queries.shape
    result = torch.zeros(width, heads, head_dim, dtype=torch.float64)
    for place in range(width):
        for head in range(heads):
            shared = head * len(keys) // heads
            seen = [
                row for row in rows[head, place].tolist() if row <= keys.shape[1] - width + place
            ]
            logits = [
                float(queries[place, head].double() @ keys[shared, row].double()) / head_dim**0.5
                for row in seen
            ]
            most = max(logits)
            weights = [math.exp(each - most) for each in logits]
            for row, weight in zip(seen, weights, strict=True):
                result[place, head] += weight / sum(weights) * values[shared, row].double()
    return result.to(queries.dtype)


def random_queries(width: int = 1, heads: int = 4, head_dim: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(width, heads, head_dim, generator=torch.Generator().manual_seed(seed))


# --- the sets -------------------------------------------------------------------------------------

SCORES = st.builds(
    lambda seed, heads, length: torch.from_numpy(
        np.random.default_rng(seed).normal(scale=3, size=(heads, 1, length)).astype(np.float32)
    ),
    st.integers(0, 10_000),
    st.sampled_from([1, 2, 4, 6]),
    st.integers(1, 40),
)


@given(scores=SCORES, budget=st.integers(1, 45))
def test_a_set_holds_the_positions_with_the_most_votes(scores: Tensor, budget: int) -> None:
    chosen = choose(scores, budget)
    for head, row in enumerate(scores[:, 0].tolist()):
        best = sorted(range(len(row)), key=lambda place: -row[place])[:budget]
        assert chosen[head, 0].tolist() == sorted(best)


@given(
    scores=SCORES,
    budget=st.integers(1, 45),
    sink=st.integers(0, 6),
    recent=st.integers(0, 6),
    width=st.integers(1, 4),
)
def test_protected_positions_come_first_and_the_budget_is_met_exactly(
    scores: Tensor, budget: int, sink: int, recent: int, width: int
) -> None:
    length = scores.shape[-1]
    width = min(width, length)
    scores = scores.repeat(1, width, 1)
    for place in range(width):
        scores[:, place, length - width + place + 1 :] = -torch.inf
    chosen = choose(scores, budget, sink=sink, recent=recent)
    assert chosen.shape == (len(scores), width, min(budget, length))
    for head in range(len(scores)):
        for place in range(width):
            own = length - width + place
            row = scores[head, place].tolist()
            protected = {p for p in range(own + 1) if p < sink or p > own - recent}
            seen = {p for p in chosen[head, place].tolist() if p <= own}
            assert len(seen) == len(chosen[head, place][chosen[head, place] <= own])
            if len(protected) <= budget:
                assert protected <= seen
                rest = sorted(set(range(own + 1)) - protected, key=lambda p: -row[p])
                assert seen == protected | set(rest[: budget - len(protected)])
            else:
                assert seen <= protected


@given(scores=SCORES, budget=st.integers(1, 45))
def test_the_largest_logits_are_the_largest_probabilities(scores: Tensor, budget: int) -> None:
    # In double precision: in single, far logits underflow to equal probabilities.
    assert torch.equal(choose(scores, budget), choose(scores.double().softmax(dim=-1), budget))


@pytest.mark.parametrize("share", SHARES)
def test_heads_that_share_a_set_vote_with_their_softmax(share: Share) -> None:
    scores = ListedCache.random(12, kv_heads=3).scores(random_queries(heads=9))
    found = votes(scores, 3, share)
    assert found.shape == ({"per_head": 9, "per_kv_head": 3, "all": 1}[share], 1, 12)
    for place, row in enumerate(found[:, 0]):
        mine = {
            "per_head": [place],
            "per_kv_head": range(3 * place, 3 * place + 3),
            "all": range(9),
        }
        if share == "per_head":
            assert torch.equal(row, scores[place, 0])
            continue
        expected = [0.0] * 12
        for head in mine[share]:
            weights = [math.exp(each) for each in scores[head, 0].tolist()]
            for column, weight in enumerate(weights):
                expected[column] += weight / sum(weights)
        assert row.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("share", SHARES)
def test_positions_behind_a_token_get_no_vote_however_small_the_others(share: Share) -> None:
    scores = torch.full((4, 2, 6), -500.0)
    scores[:, :, 0] = 500.0  # the other probabilities are zero
    scores[:, 0, 5] = -torch.inf
    found = votes(scores, 2, share)
    assert found[:, 0, 5].isneginf().all()
    assert found[:, 0, :5].isfinite().all()
    assert (choose(found, 5)[:, 0] == torch.arange(5)).all()


# --- attention over a set -------------------------------------------------------------------------


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("width", [1, 3])
def test_attention_over_a_set_equals_loops_and_a_mask_of_minus_infinity(
    share: Share, width: int
) -> None:
    cache = ListedCache.random(15, kv_heads=3, width=width)
    queries = random_queries(width, heads=9)
    chosen = choose(votes(cache.scores(queries), 3, share), 5, recent=1)
    found = attend_masked(queries, cache, chosen)
    every_head = chosen.repeat_interleave(9 // len(chosen), dim=0)
    by_loops = loop_attention(queries, cache.keys, cache.values, every_head)
    torch.testing.assert_close(found, by_loops, atol=1e-6, rtol=1e-5)
    bias = torch.full((9, width, 15), -torch.inf).scatter(2, every_head, 0.0)
    masked = (cache.scores(queries) + bias).softmax(-1) @ cache.values.repeat_interleave(3, 0)
    torch.testing.assert_close(found, masked.transpose(0, 1), atol=1e-6, rtol=1e-5)
    if width == 1:
        rows = chosen[0, 0] if share == "all" else chosen[:, 0]
        gathered = cache.attend_rows(queries, rows)
        torch.testing.assert_close(found, gathered, atol=1e-6, rtol=1e-5)


# --- the layers -----------------------------------------------------------------------------------


def step(
    rule: TidalRule, length: int, layers: int = 6, *, width: int = 1, heads: int = 4, seed: int = 0
) -> tuple[list[ListedCache], list[Tensor], list[Tensor]]:
    """Run the layers of one forward over random caches; return them with queries and outputs."""
    caches = [
        ListedCache.random(length, width=width, seed=100 * seed + layer) for layer in range(layers)
    ]
    queries = [random_queries(width, heads, seed=100 * seed + layer) for layer in range(layers)]
    outputs = [rule.attend(layer, queries[layer], cache) for layer, cache in enumerate(caches)]
    return caches, queries, outputs


def begun(settings: TidalDecode = SMALL, **shape: int) -> TidalRule:
    rule = TidalRule(settings)
    rule.begin(facts(**shape))
    return rule


def test_layers_below_the_first_selection_and_selection_layers_see_everything() -> None:
    caches, queries, outputs = step(begun(), 20)
    assert [cache.asked for cache in caches] == [
        ["all"],
        ["all with scores"],
        ["rows"],
        ["all with scores"],
        ["rows"],
        ["rows"],
    ]
    for layer in (0, 1, 3):
        full = ListedCache.random(20, seed=layer).attend(queries[layer])
        assert torch.equal(outputs[layer], full)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("always_current", [True, False])
def test_each_layer_reads_what_the_last_selection_below_it_chose(
    share: Share, always_current: bool
) -> None:
    settings = replace(SMALL, share=share, always_current=always_current)
    caches, queries, _ = step(begun(settings), 20)
    for layer, selecting in ((2, 1), (4, 3), (5, 3)):
        ballot = votes(caches[selecting].scores(queries[selecting]), 2, share)
        expected = choose(ballot, 6, recent=int(always_current))[:, 0]
        (rows,) = caches[layer].rows
        assert torch.equal(rows.reshape(expected.shape), expected)
        assert rows.shape == {"per_head": (4, 6), "per_kv_head": (2, 6), "all": (6,)}[share]
        assert not always_current or (rows[..., -1] == 19).all()


def test_the_newest_token_is_read_only_if_chosen_when_so_set() -> None:
    current = []
    for seed in range(6):
        caches, _, _ = step(begun(replace(SMALL, always_current=False)), 20, seed=seed)
        current += (caches[2].rows[0] == 19).any(dim=-1).tolist()
    assert any(current)
    assert not all(current)


def test_every_query_head_of_a_grouped_model_has_its_own_set() -> None:
    rule = begun(replace(SMALL, budget=4), heads=9, kv_heads=3)
    cache = ListedCache.random(40, kv_heads=3)
    chosen = rule.select(cache.scores(random_queries(heads=9)))[:, 0]
    assert len({tuple(each) for each in chosen.tolist()}) == 9


@pytest.mark.parametrize("budget", [20, 21, 500])
def test_a_budget_that_holds_the_text_changes_nothing(budget: int) -> None:
    caches, _, _ = step(begun(replace(SMALL, budget=budget)), 20)
    assert all(cache.asked == ["all"] for cache in caches)


def test_a_first_selection_above_the_model_changes_nothing() -> None:
    caches, _, _ = step(begun(TidalDecode(budget=1, first_selection=6)), 20)
    assert all(cache.asked == ["all"] for cache in caches)


def test_a_selection_that_no_sparse_layer_follows_scores_nothing() -> None:
    settings = TidalDecode(budget=6, first_selection=1, reselection=(2, 5))
    caches, _, _ = step(begun(settings), 20)
    asked = [cache.asked for cache in caches]
    assert asked == [["all"], ["all"], ["all with scores"], ["rows"], ["rows"], ["all"]]


def test_nothing_is_carried_from_one_forward_to_the_next() -> None:
    rule = begun(TidalDecode(budget=6, first_selection=1, reselection="none"))
    step(rule, 20, seed=1)
    again, _, outputs = step(rule, 21, seed=2)
    alone, _, expected = step(begun(rule.settings), 21, seed=2)
    assert [cache.asked for cache in again] == [cache.asked for cache in alone]
    assert all(map(torch.equal, outputs, expected))
    # A forward in which the text still fits must not read the sets of a longer one.
    short, _, _ = step(rule, 6, seed=3)
    assert all(cache.asked == ["all"] for cache in short)


@pytest.mark.parametrize("share", SHARES)
def test_each_token_of_a_wider_forward_has_its_own_set(share: Share) -> None:
    settings = replace(SMALL, share=share)
    caches, queries, outputs = step(begun(settings), 20, width=3)
    for place in range(3):
        rule, length = begun(settings), 18 + place
        for layer, cache in enumerate(caches):
            alone = ListedCache(cache.keys[:, :length], cache.values[:, :length])
            found = rule.attend(layer, queries[layer][place : place + 1], alone)
            torch.testing.assert_close(outputs[layer][place], found[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("length", "budget"), [(50, 6), (50, 49), (7, 6)])
def test_the_rows_read_are_those_of_the_papers_count(length: int, budget: int) -> None:
    settings = replace(SMALL, budget=budget)
    caches, _, _ = step(begun(settings, heads=2, kv_heads=2), length, heads=2)
    # (a + 2) n + (Lm - a - 2) k, with a = 1 and Lm = 6; rows of keys and of values in each head.
    expected = 3 * length + 3 * budget
    assert sum(cache.rows_read for cache in caches) == 2 * 2 * expected


# --- cache correction -----------------------------------------------------------------------------


class ListedSession:
    """A session that notes what it is asked to compute again."""

    def __init__(self, length: int) -> None:
        self.length = self.prompt_length = length
        self.recomputed: list[tuple[list[int], int]] = []

    def recompute(self, token_ids: Sequence[int], start: int) -> None:
        self.recomputed.append((list(token_ids), start))


def test_decoded_tokens_are_computed_again_every_so_many_steps() -> None:
    rule = begun(replace(SMALL, correct_every=3))
    session = ListedSession(30)
    rule.after_forward(session, list(range(30)))  # the prompt, read densely
    for token in range(100, 108):
        session.length += 1
        step(rule, session.length)
        rule.after_forward(session, [token])
    assert session.recomputed == [([100, 101, 102], 30), ([103, 104, 105], 33)]
    assert rule.notes["corrections"] == 2


def test_nothing_is_computed_again_unless_asked_for() -> None:
    rule, session = begun(), ListedSession(30)
    session.length += 1
    step(rule, 31)
    rule.after_forward(session, [1])
    assert session.recomputed == []


# --- notes ----------------------------------------------------------------------------------------


def test_the_note_on_reselection_is_the_share_that_was_chosen_before() -> None:
    rule, shares = begun(), []
    for seed in range(3):
        caches, _, _ = step(rule, 20, seed=seed)
        for before, after in zip(
            caches[2].rows[0].tolist(), caches[4].rows[0].tolist(), strict=True
        ):
            shares.append(len(set(before) & set(after)) / 6)
    assert 0 < np.mean(shares) < 1
    assert rule.notes["reselection_overlap"] == pytest.approx(np.mean(shares))
    assert rule.notes["selection_layers"] == "1 3"


# --- on models ------------------------------------------------------------------------------------

PROMPT = [3, 17, 42, 8, 8, 25, 31, 4, 17, 42, 9, 11, 2, 38, 40, 5, 3, 17]
ARCHITECTURES = ("llama", "llama-native", "qwen2", "mistral", "mistral-window")


@functools.cache
def random_model(architecture: str = "llama", attention: str | None = None) -> CausalLM:
    """Return a seeded model of six layers, nine query heads and three key-value heads."""
    family, _, variant = architecture.partition("-")
    name = {"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral"}[family]
    settings: dict[str, Any] = (
        {"sliding_window": 14 if variant else None} if name != "Llama" else {}
    )
    model_class = getattr(transformers, f"{name}ForCausalLM")
    config = model_class.config_class(
        vocab_size=50,
        hidden_size=72,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
        attn_implementation=attention,
        **settings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = model_class(config)
        sharpen(module, 5)
    kernels: Kernels = "native" if variant == "native" and not attention else "transformers"
    try:
        return CausalLM(module, NumberTokenizer(), architecture, kernels=kernels)
    except Unsupported as refused:  # a processor that the C kernels do not know
        pytest.skip(str(refused))


class SlowTidal:
    """TidalDecode as an attention function for transformers' own forward, one head at a time."""

    def __init__(self, settings: TidalDecode) -> None:
        self.settings = settings
        self.sets: list[list[int]] = []

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        """Attend from (1, heads, width, head_dim) to (1, kv_heads, length, head_dim)."""
        heads, width, head_dim = query.shape[1:]
        length, group = key.shape[2], heads // key.shape[1]
        window = getattr(module.config, "sliding_window", None) or length
        products = query[0] @ key[0].repeat_interleave(group, dim=0).transpose(1, 2)
        logits = products / head_dim**0.5
        for place in range(width):
            own = length - width + place
            logits[:, place, own + 1 :] = -torch.inf
            logits[:, place, : max(0, own - window + 1)] = -torch.inf
        is_decoding = width == 1
        reselection = self.settings.reselection
        if is_decoding and module.layer_idx in (self.settings.first_selection, reselection):
            self.sets = [self.choose(logits[:, 0], head, group) for head in range(heads)]
        elif is_decoding and module.layer_idx > self.settings.first_selection:
            for head, chosen in enumerate(self.sets):
                hidden = [row for row in range(length) if row not in chosen]
                logits[head, 0, hidden] = -torch.inf
        weights = logits.softmax(dim=-1)
        found = torch.stack([weights[h] @ value[0, h // group] for h in range(heads)], dim=1)
        return found[None], None

    def choose(self, logits: Tensor, head: int, group: int) -> list[int]:
        """Return the positions of a head's set, by sorting."""
        settings, length = self.settings, logits.shape[1]
        first = head // group * group
        voters = {
            "per_head": [head],
            "per_kv_head": list(range(first, first + group)),
            "all": list(range(len(logits))),
        }[settings.share]
        shares = logits.softmax(-1).tolist()
        rank = [sum(shares[voter][place] for voter in voters) for place in range(length)]
        recent = max(settings.protect_recent, int(settings.always_current))
        for place in range(length):
            if place < settings.protect_sink or place >= length - recent:
                rank[place] += len(logits)
        visible = [p for p in range(length) if bool(logits[0, p].isfinite())]
        return sorted(visible, key=lambda p: -rank[p])[: settings.budget]


def decoded(session: Session, token_ids: Sequence[int]) -> Tensor:
    """Return the logits after each token of a text that is fed one by one, (tokens, vocab)."""
    rows = []
    for token in token_ids:
        rows.append(session.verify(DraftTree.root(token))[-1].clone())
        session.commit([0])
    return torch.stack(rows)


def opened(
    model: CausalLM, settings: TidalDecode, prompt: Sequence[int] = PROMPT
) -> AttentionSession:
    session = AttentionLM(model, lambda: TidalRule(settings)).session(100)
    session.prefill(prompt)
    return session


FED = [30, 12, 44, 7, 19, 23, 41, 6]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "settings",
    [
        SMALL,
        replace(SMALL, always_current=False, share="all"),
        replace(SMALL, share="per_kv_head", protect_sink=1, protect_recent=3),
    ],
    ids=["per_head", "all", "per_kv_head, protected"],
)
def test_decoding_equals_a_slow_version_inside_transformers(
    architecture: str, settings: TidalDecode, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = transformers.AttentionInterface._global_mapping
    monkeypatch.setitem(registry, "slow-tidal", SlowTidal(settings))
    slow = random_model(architecture, "slow-tidal").module
    cache = transformers.DynamicCache()  # told no configuration, it drops nothing at a window
    expected = []
    with torch.inference_mode():
        slow(input_ids=torch.tensor([PROMPT]), past_key_values=cache)
        for token in FED:
            output = slow(input_ids=torch.tensor([[token]]), past_key_values=cache)
            expected.append(output.logits[0, -1])
    session = opened(random_model(architecture), settings)
    found = decoded(session, FED)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)
    dense = random_model(architecture).session(100)
    dense.prefill(PROMPT)
    assert (decoded(dense, FED) - found).abs().max() > 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "settings",
    [
        TidalDecode(budget=1, first_selection=6),
        TidalDecode(budget=1, first_selection=99),
        TidalDecode(budget=26, first_selection=0, reselection=1),
        TidalDecode(budget=99, first_selection=1, reselection=4, share="all"),
    ],
    ids=["above the layers", "far above", "budget of the text", "larger budget"],
)
def test_without_sparse_layers_or_with_a_large_budget_logits_are_those_of_full_attention(
    architecture: str, settings: TidalDecode
) -> None:
    model = random_model(architecture)
    plain = AttentionLM(model, Rule).session(100)
    expected = [plain.prefill(PROMPT), decoded(plain, FED)]
    session = AttentionLM(model, lambda: TidalRule(settings)).session(100)
    assert torch.equal(session.prefill(PROMPT), expected[0])
    assert torch.equal(decoded(session, FED), expected[1])
    own = model.session(100)
    own.prefill(PROMPT)
    torch.testing.assert_close(decoded(own, FED), expected[1], atol=1e-4, rtol=1e-4)


def test_without_sparse_layers_the_model_itself_is_yielded() -> None:
    model = random_model()
    with TidalDecode(budget=8, first_selection=6).apply(model, CPU) as applied:
        assert applied is model
    with TidalDecode(budget=128).apply(model, CPU) as applied:
        assert applied is model  # no text of this model is longer
    with TidalDecode(budget=127, first_selection=5).apply(model, CPU) as applied:
        assert applied is not model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_prompt_is_read_as_ever_and_the_first_step_is_the_first_to_differ(
    architecture: str,
) -> None:
    model = random_model(architecture)
    plain = model.session(100)
    session = AttentionLM(model, lambda: TidalRule(SMALL)).session(100)
    assert torch.equal(
        session.prefill(PROMPT, all_logits=True), plain.prefill(PROMPT, all_logits=True)
    )
    assert not torch.allclose(decoded(session, FED[:1]), decoded(plain, FED[:1]), atol=1e-2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("share", SHARES)
def test_one_forward_over_a_text_gives_what_decoding_it_step_by_step_gives(
    architecture: str, share: Share
) -> None:
    settings = replace(SMALL, share=share, protect_sink=1)
    model = random_model(architecture)

    def observing() -> TidalRule:
        rule = TidalRule(settings)
        rule.observes = len(FED)
        return rule

    whole = AttentionLM(model, observing).session(100)
    together = whole.prefill([*PROMPT, *FED], all_logits=True)[len(PROMPT) :]
    alone = opened(model, settings)
    torch.testing.assert_close(together, decoded(alone, FED), atol=1e-4, rtol=1e-4)
    for one, other in zip(whole.cached(), alone.cached(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("period", [1, 3])
def test_corrected_rows_are_those_of_a_fresh_prefill(period: int) -> None:
    model = random_model()
    session = opened(model, replace(SMALL, correct_every=period))
    polluted = opened(model, SMALL)
    for count, token in enumerate(FED, 1):
        decoded(session, [token])
        decoded(polluted, [token])
        fresh = AttentionLM(model, Rule).session(100)
        fresh.prefill([*PROMPT, *FED[:count]])
        clean = len(PROMPT) + count - count % period
        for mine, theirs, dirty in zip(
            session.cached(), fresh.cached(), polluted.cached(), strict=True
        ):
            torch.testing.assert_close(mine[:, :, :clean], theirs[:, :, :clean], atol=1e-4, rtol=0)
            # What was decoded since is polluted still, in the layers above the first sparse one.
            assert count % period == 0 or not torch.allclose(
                mine[3:, :, clean:], theirs[3:, :, clean:], atol=1e-2
            )
            assert not torch.allclose(dirty[3:], theirs[3:], atol=1e-2)


def test_after_a_correction_full_attention_goes_on_as_if_nothing_had_been_sparse() -> None:
    model = random_model()
    rules: list[TidalRule] = []

    def make_rule() -> TidalRule:
        rules.append(TidalRule(replace(SMALL, correct_every=1)))
        return rules[-1]

    for count in range(1, len(FED)):
        session = AttentionLM(model, make_rule).session(100)
        session.prefill(PROMPT)
        decoded(session, FED[:count])
        rules[-1].settings = replace(SMALL, budget=100)
        plain = model.session(100)
        plain.prefill([*PROMPT, *FED[:count]])
        torch.testing.assert_close(
            decoded(session, FED[count : count + 1]),
            decoded(plain, FED[count : count + 1]),
            atol=1e-4,
            rtol=1e-4,
        )


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("reselection", ["none", 3, (2, 4)])
def test_the_bytes_of_a_text_are_those_of_the_papers_count(
    share: Share, reselection: Literal["none"] | int | tuple[int, ...]
) -> None:
    settings = replace(SMALL, share=share, reselection=reselection)
    with settings.apply(random_model(), CPU) as applied:
        found = applied.generate(PROMPT, Decoding(max_new_tokens=9, ignore_eos=True))
    dense = 1 + {"none": 1, 3: 2, (2, 4): 3}[reselection]
    # Heads with sets of their own gather more than once from a key-value head that they share.
    readers = 9 if share == "per_head" else 3
    prompt = 6 * 3 * len(PROMPT)
    steps = sum(
        dense * 3 * length + (6 - dense) * readers * 6
        for length in range(len(PROMPT) + 1, len(PROMPT) + 9)
    )
    assert found.trace.kv_bytes == 2 * 8 * 4 * (prompt + steps)


def test_a_text_notes_what_was_selected() -> None:
    with replace(SMALL, correct_every=4).apply(random_model(), CPU) as applied:
        notes = applied.generate(PROMPT, Decoding(max_new_tokens=9, ignore_eos=True)).trace.notes
    assert notes["selection_layers"] == "1 3"
    assert notes["corrections"] == 2
    assert notes["kept_ratio"] == 1
    assert 1 / 6 < float(notes["reselection_overlap"]) < 1  # the newest token is in both


@pytest.mark.parametrize(
    "settings", [TidalDecode(**TidalDecode.trial), TidalDecode()], ids=["trial", "default"]
)
def test_the_battery_passes(settings: TidalDecode) -> None:
    checks = check_method(settings, tiny_text_model())
    failed = {check.name: check.detail for check in checks if not check.ok}
    # The battery's model has two layers, all of which are full at the default.
    expected = set() if settings.first_selection == 0 else {"it acts at these settings"}
    assert failed.keys() == expected, failed


def test_models_without_the_layers_or_the_attention_are_refused() -> None:
    beyond = TidalDecode(budget=8, first_selection=1, reselection=6).apply(random_model(), CPU)
    other = TidalDecode(budget=8, first_selection=1).apply(tiny_model("gpt2"), CPU)
    for refused, reason in ((beyond, "no layer 6"), (other, "Llama, Mistral and Qwen2")):
        with pytest.raises(Unsupported, match=reason), refused:
            pass


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "heads", "kv_heads", "expected"),
    [
        (32, 32, 32, 7),
        (32, 32, 8, 13),
        (28, 24, 8, 12),
        (80, 64, 8, 14),
        (30, 9, 3, 12),  # SmolLM2, by depth
        (48, 40, 8, 20),  # 13 / 32 of 48 is 19.5, and half goes to even
        (16, 32, 8, 6),
    ],
)
def test_auto_reselects_where_the_paper_does_or_at_the_same_depth(
    layers: int, heads: int, kv_heads: int, expected: int
) -> None:
    shape = facts(layers=layers, heads=heads, kv_heads=kv_heads)
    assert TidalDecode().selection_layers(shape) == (2, expected)


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 6, 8, 9])
def test_auto_reselects_only_between_sparse_layers(layers: int) -> None:
    found = reselection_layer(facts(layers=layers), 2)
    assert all(3 < layer < layers - 1 for layer in found)
    assert bool(found) == (layers > 8)


def test_named_layers_are_taken_as_they_are() -> None:
    shape = facts(layers=30, heads=9, kv_heads=3)
    assert TidalDecode(reselection="none").selection_layers(shape) == (2,)
    assert TidalDecode(reselection=5).selection_layers(shape) == (2, 5)
    assert TidalDecode(reselection=(9, 17)).selection_layers(shape) == (2, 9, 17)
    assert TidalDecode(first_selection=30).selection_layers(shape) == ()
    with pytest.raises(Unsupported, match="no layer 30 to re-select in: the model has 30, counted"):
        TidalDecode(reselection=30).selection_layers(shape)


def test_every_layer_of_the_table_lies_inside_its_model() -> None:
    assert all(3 < layer < layers - 1 for (layers, _, _), layer in RESELECTION_LAYERS.items())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"budget": 0}, "budget must be a whole number of at least 1, got 0"),
        ({"budget": 2.0}, "budget must be a whole number of at least 1, got 2.0"),
        ({"budget": True}, "budget must be a whole number of at least 1, got True"),
        ({"first_selection": -1}, "first_selection must be a layer from 0 on, got -1"),
        ({"protect_sink": -1}, "protect_sink must be a whole number of at least 0"),
        ({"protect_recent": -1}, "protect_recent must be a whole number of at least 0"),
        ({"correct_every": -1}, "correct_every must be a whole number of at least 0"),
        ({"share": "head"}, "share must be one of per_head, per_kv_head, all, got 'head'"),
        ({"budget": 8, "protect_sink": 4, "protect_recent": 5}, "budget must be at least 9, got 8"),
        ({"budget": 4, "protect_sink": 4}, "budget must be at least 5, got 4"),
        (
            {"reselection": 2},
            "reselection must be a layer from 3 on, got 2. It lies above",
        ),
        ({"reselection": "last"}, "a layer, a list of layers, auto or none, got 'last'"),
        ({"reselection": (9, 9)}, r"layers in rising order, got \[9, 9\]"),
        ({"reselection": (17, 9)}, r"layers in rising order, got \[17, 9\]"),
        ({"reselection": ()}, r"got \[\]; for no layer write none"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TidalDecode(**settings)  # type: ignore[arg-type]  # what is tested


def test_a_set_without_the_newest_token_may_be_all_sinks() -> None:
    assert TidalDecode(budget=4, protect_sink=4, always_current=False).budget == 4


def test_a_list_of_layers_survives_json() -> None:
    method = TidalDecode(reselection=(9, 17))
    assert TidalDecode(**json.loads(json.dumps(method.parameters()))) == method
