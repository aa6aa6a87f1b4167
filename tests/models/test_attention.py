"""Attention by a rule: with full attention it is the model, and every row that is read is right."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.attention import (
    AttentionLM,
    AttentionSession,
    LayerCache,
    OpenSession,
    PromptMarks,
    Rule,
)
from models.base import Decoding, Forward, Trace, Unsupported
from models.draft_tree import DraftTree, Topology
from models.native.build import compiler
from models.text import CausalLM
from runner.conformance_base import sharpen
from tests.models.tiny import NumberTokenizer, tiny_model, tiny_module

PROMPT = [5, 17, 3, 88, 41, 2, 9, 63, 12, 30, 77, 51]
STEPS = [44, 7, 19, 60]
# Nine query heads on three key-value heads, as in SmolLM2.
_GROUPED = {
    "vocab_size": 97,
    "hidden_size": 144,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_OWN = {
    "llama-9-3": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "qwen2-sliding-window": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
}
ON_TORCH = ["llama", "qwen2", "mistral-sliding-window", *_OWN]
NATIVE = ["llama", "qwen2", "llama-9-3", "mistral"] if compiler() else []
MODELS = [(name, "transformers") for name in ON_TORCH] + [(name, "native") for name in NATIVE]
BOTH = ["transformers", *(["native"] if compiler() else [])]
on_models = pytest.mark.parametrize(("architecture", "kernels"), MODELS)
on_both = pytest.mark.parametrize("kernels", BOTH)


@functools.cache
def own_module(name: str) -> Any:
    class_name, extra = _OWN[name]
    model_class = getattr(transformers, class_name)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = model_class(model_class.config_class(**_GROUPED, **extra))
        sharpen(module, 6.0)
    return module.eval()


def model_of(architecture: str, kernels: Any) -> CausalLM:
    if architecture in _OWN:
        module = own_module(architecture)
        return CausalLM(module, NumberTokenizer(), architecture, kernels=kernels)
    return tiny_model(architecture, kernels=kernels)


class Full(Rule):
    """Full attention, by way of the rule."""

    def __init__(self, observes: int | None = 0, chunk: int = 512, rotated: bool = True) -> None:
        self.observes, self.chunk, self.rotated = observes, chunk, rotated


class Probe(Full):
    """Full attention; looks at one layer's cache in every forward that comes by."""

    def __init__(
        self,
        look: Callable[[Tensor, LayerCache], Tensor | None],
        layer: int = 1,
        observes: int | None = 0,
        chunk: int = 512,
        rotated: bool = True,
    ) -> None:
        super().__init__(observes, chunk, rotated)
        self.look, self.layer, self.looked = look, layer, 0

    def attend(self, layer: int, queries: Tensor, cache: LayerCache) -> Tensor:
        if layer == self.layer:
            self.looked += 1
            mixed = self.look(queries, cache)
            if mixed is not None:
                return mixed
        return cache.attend(queries)


def probed(
    model: CausalLM,
    look: Callable[[Tensor, LayerCache], Tensor | None],
    drafts: Sequence[int] = (),
    *,
    rotated: bool = True,
) -> AttentionSession:
    """Look at layer 1 in one step over `PROMPT`, with drafts behind its token."""
    rule = Probe(look, rotated=rotated)
    session = AttentionLM(model, lambda: rule).session(40)
    session.prefill(PROMPT)
    session.verify(DraftTree.chain(STEPS[0], drafts))
    assert rule.looked == 1
    return session


def loops(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Callable[[int, int], Sequence[int]],
    window: int | None = None,
) -> Tensor:
    """Attention by loops over tokens, heads and rows, in double precision.

    Args:
        rows: Of a query head and its key-value head; those behind a query are left out here.
    """
    width, heads, size = queries.shape
    group = heads // keys.shape[0]
    offset = keys.shape[1] - width
    out = torch.zeros(width, heads, size, dtype=torch.float64)
    for t in range(width):
        for h in range(heads):
            own = [
                row
                for row in rows(h, h // group)
                if row <= offset + t and (window is None or offset + t - row < window)
            ]
            scores = [
                float(queries[t, h].double() @ keys[h // group, row].double()) / size**0.5
                for row in own
            ]
            weights = np.exp(np.array(scores) - max(scores))
            for weight, row in zip(weights / weights.sum(), own, strict=True):
                out[t, h] += weight * values[h // group, row].double()
    return out


# --- with full attention it is the model ---------------------------------------------------------


@on_models
@pytest.mark.parametrize("observes", [0, 5, None])
@pytest.mark.parametrize("chunk", [3, 512])
@pytest.mark.parametrize("rotated", [True, False])
def test_full_attention_gives_the_logits_of_the_model(
    architecture: str, kernels: str, observes: int | None, chunk: int, rotated: bool
) -> None:
    model = model_of(architecture, kernels)
    ours = AttentionLM(model, lambda: Full(observes, chunk, rotated)).session(40)
    theirs = model.session(40)
    found = [ours.prefill(PROMPT, all_logits=True).clone()]
    expected = [theirs.prefill(PROMPT, all_logits=True).clone()]
    for tokens, kept in ((STEPS[:1], 1), (STEPS[1:], 2)):
        tree = DraftTree.chain(tokens[0], tokens[1:])
        found.append(ours.verify(tree).clone())
        expected.append(theirs.verify(tree).clone())
        path = list(range(min(kept, len(tokens))))
        ours.commit(path)
        theirs.commit(path)
    assert ours.length == theirs.length == len(PROMPT) + 3
    for mine, other in zip(found, expected, strict=True):
        if kernels == "native" and rotated:
            assert torch.equal(mine, other)
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(compiler() is None, reason="the native kernels need a C compiler")
@pytest.mark.parametrize("threads", [1, 2])
def test_native_layers_equal_the_whole_forward_to_the_bit_beyond_one_piece(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = tiny_model("llama", kernels="native", seed=2)
    finally:
        torch.set_num_threads(before)
    ids = [(7 * i * i + 3) % 97 for i in range(211)]
    expected = model.session(240).prefill(ids, all_logits=True)
    session = AttentionLM(model, lambda: Full(None)).session(240)
    assert torch.equal(session.prefill(ids, all_logits=True), expected)


@on_both
def test_a_prompt_without_all_logits_gives_those_of_its_last_token(kernels: str) -> None:
    model = tiny_model("llama", kernels=kernels)
    expected = model.session(40).prefill(PROMPT).clone()
    for observes in (0, 1, 5, None):
        session = AttentionLM(model, lambda n=observes: Full(n, 4)).session(40)
        logits = session.prefill(PROMPT)
        assert logits.shape == (1, 97)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@on_both
def test_a_prompt_may_be_read_in_two_calls(kernels: str) -> None:
    model = tiny_model("llama", kernels=kernels)
    expected = model.session(40).prefill(PROMPT).clone()
    session = AttentionLM(model, lambda: Full(2, 3)).session(40)
    session.prefill(PROMPT[:5])
    torch.testing.assert_close(session.prefill(PROMPT[5:]), expected, atol=1e-5, rtol=1e-5)
    assert session.prompt_length == session.length == len(PROMPT)


@on_models
def test_a_text_costs_what_the_baseline_costs(architecture: str, kernels: str) -> None:
    model = model_of(architecture, kernels)
    decoding = Decoding(max_new_tokens=8, ignore_eos=True)
    plain = model.generate(PROMPT, decoding)
    ours = AttentionLM(model, Full).generate(PROMPT, decoding)
    assert ours.token_ids == plain.token_ids
    assert ours.trace.flops == pytest.approx(plain.trace.flops, rel=1e-12)
    assert ours.trace.prefill_flops == pytest.approx(plain.trace.prefill_flops, rel=1e-12)
    assert plain.trace.prefill_flops == model.facts.flops(Forward(len(PROMPT), 0), 1)
    assert ours.trace.kv_bytes == plain.trace.kv_bytes
    assert ours.trace.forwards == plain.trace.forwards
    steps = sum(model.facts.kv_read(forward) for forward in plain.trace.forwards)
    assert ours.trace.notes["decode_kv_bytes"] == steps
    held = len(PROMPT) + 7
    assert ours.trace.notes["kept_tokens"] == held
    assert ours.trace.notes["kept_ratio"] == 1
    facts = model.facts
    a_token = 2 * facts.num_layers * facts.num_kv_heads * facts.head_dim * 4
    assert ours.trace.notes["peak_kv_bytes"] == held * a_token


def test_half_precision_runs_and_stays_near() -> None:
    module = transformers.LlamaForCausalLM(own_module("llama-9-3").config).eval()
    module.load_state_dict(own_module("llama-9-3").state_dict())
    model = CausalLM(module.to(torch.bfloat16), NumberTokenizer(), "half", kernels="transformers")
    for rotated in (True, False):
        session = AttentionLM(model, lambda turned=rotated: Full(None, 5, turned)).session(40)
        expected = model.session(40).prefill(PROMPT)
        logits = session.prefill(PROMPT)
        assert logits.dtype == torch.float32
        assert float((logits - expected).abs().max()) < 0.1 * float(expected.abs().max())


# --- chosen rows ---------------------------------------------------------------------------------


@st.composite
def row_sets(draw: st.DrawFn) -> tuple[int, str, list[list[int]]]:
    """Drafts, whose sets, and the sets, each with a row that the first query sees."""
    drafts = draw(st.integers(0, 3))
    whose = draw(st.sampled_from(["all", "kv_heads", "heads"]))
    length = len(PROMPT) + 1 + drafts
    count = {"all": 1, "kv_heads": 3, "heads": 9}[whose]
    size = draw(st.integers(1, length))
    sets = []
    for _ in range(count):
        order = draw(st.permutations(range(length)))
        chosen = sorted(order[:size])
        if chosen[0] > len(PROMPT):
            chosen[0] = draw(st.integers(0, len(PROMPT)))
        sets.append(chosen)
    return drafts, whose, sets


@on_both
@given(case=row_sets())
@settings(max_examples=25, deadline=None)
def test_attention_to_chosen_rows_equals_loops(
    kernels: str, case: tuple[int, str, list[list[int]]]
) -> None:
    drafts, whose, sets = case
    rows = torch.tensor(sets)

    def look(queries: Tensor, cache: LayerCache) -> None:
        found = cache.attend_rows(queries, rows[0] if whose == "all" else rows)
        number = {"all": lambda h, g: 0, "kv_heads": lambda h, g: g, "heads": lambda h, g: h}[whose]
        expected = loops(queries, cache.keys, cache.values, lambda h, g: sets[number(h, g)])
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)

    probed(model_of("llama-9-3", kernels), look, STEPS[1 : 1 + drafts])


@pytest.mark.parametrize("architecture", ["mistral-sliding-window", "qwen2-sliding-window"])
def test_a_window_holds_for_chosen_rows_and_scores_too(architecture: str) -> None:
    model = model_of(architecture, "transformers")

    def look(queries: Tensor, cache: LayerCache) -> None:
        rows = torch.tensor([0, 3, 7, 9, 12, 13])
        found = cache.attend_rows(queries, rows)
        expected = loops(queries, cache.keys, cache.values, lambda h, g: rows.tolist(), window=8)
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
        scores = cache.scores(queries)
        seen = [[12 + t - row in range(8) for row in range(14)] for t in range(2)]
        assert torch.equal(scores.isfinite(), torch.tensor(seen).expand_as(scores))

    probed(model, look, STEPS[1:2])


@on_both
def test_scores_are_products_of_queries_with_the_keys_of_their_own_head(kernels: str) -> None:
    def look(queries: Tensor, cache: LayerCache) -> None:
        mixed, fused = cache.attend_with_scores(queries)
        torch.testing.assert_close(mixed, cache.attend(queries), atol=1e-6, rtol=1e-6)
        for scale, found in ((None, cache.scores(queries)), (2.0, cache.scores(queries, scale=2))):
            assert found.shape == (9, 3, 15)
            for h in range(9):
                for t in range(3):
                    for row in range(15):
                        product = float(queries[t, h] @ cache.keys[h // 3, row])
                        expected = product * (scale or 0.25) if row <= 12 + t else -torch.inf
                        assert float(found[h, t, row]) == pytest.approx(expected, rel=1e-4)
        torch.testing.assert_close(fused, cache.scores(queries), atol=1e-5, rtol=1e-5)

    probed(model_of("llama-9-3", kernels), look, STEPS[1:3])


@pytest.mark.parametrize(("architecture", "kernels"), MODELS)
def test_one_query_in_the_place_of_all_sees_what_the_last_one_sees(
    architecture: str, kernels: str
) -> None:
    def look(queries: Tensor, cache: LayerCache) -> None:
        of_all, of_last = cache.scores(queries), cache.scores(queries[-1:])
        torch.testing.assert_close(of_last, of_all[:, -1:])
        assert of_last.shape == (len(of_all), 1, cache.length)
        with pytest.raises(ValueError, match=r"for the 3 new tokens or for one query .* got 2"):
            cache.scores(queries[:2])

    session = probed(model_of(architecture, kernels), look, STEPS[1:3])
    facts = model_of(architecture, kernels).facts
    # All rows once for the three queries, and once for the one.
    assert session.work.key_rows - session.work.value_rows == 2 * facts.num_kv_heads * 15


@pytest.mark.skipif(compiler() is None, reason="the native kernels need a C compiler")
def test_native_attention_without_memory_for_its_scores_is_refused() -> None:
    model = model_of("llama-9-3", "native")

    def look(queries: Tensor, cache: LayerCache) -> None:
        layers = AttentionLM(model, Rule).session(4)._layers._layers  # of a text not begun
        with pytest.raises(ValueError, match="attention to 15 rows was not reserved"):
            layers.attend(queries, cache.keys, cache.values, 12, 0.25)

    probed(model, look, STEPS[1:3])


CHOSEN = torch.tensor([0, 1, 5, 8, 12, 13])
PLACES = torch.arange(6) + 3


def test_rows_can_stand_at_other_positions() -> None:
    def look(queries: Tensor, cache: LayerCache) -> None:
        found = cache.attend_rows(queries, CHOSEN, positions=PLACES)
        keys = cache.rotate(cache.keys[:, CHOSEN].transpose(0, 1), PLACES).transpose(0, 1)
        turned = cache.rotate(queries, PLACES[-2:])
        expected = loops(turned, keys, cache.values[:, CHOSEN], lambda h, g: range(6))
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)

    probed(model_of("llama", "transformers"), look, STEPS[1:2], rotated=False)


@on_both
def test_rows_that_are_turned_on_stand_where_those_turned_once_do(kernels: str) -> None:
    found: list[Tensor] = []

    def look(queries: Tensor, cache: LayerCache) -> None:
        found.append(cache.attend_rows(queries, CHOSEN, positions=PLACES))

    probed(model_of("llama", "transformers"), look, STEPS[1:2], rotated=False)
    for rotated in (False, True):
        probed(model_of("llama", kernels), look, STEPS[1:2], rotated=rotated)
        torch.testing.assert_close(found[-1], found[0], atol=1e-4, rtol=1e-4)


@on_both
def test_an_unrotated_cache_attends_to_chosen_rows_at_their_true_positions(kernels: str) -> None:
    found: list[Tensor] = []
    rows = torch.tensor([0, 2, 3, 11, 12])

    def look(queries: Tensor, cache: LayerCache) -> Tensor:
        found.append(cache.attend_rows(queries, rows))
        return found[-1]

    for rotated in (True, False):
        probed(model_of("llama", kernels), look, STEPS[1:3], rotated=rotated)
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


@on_both
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([], dtype=torch.int64), "no row was chosen"),
        (torch.tensor([3, 3]), "ascending"),
        (torch.tensor([4, 3]), "ascending"),
        (torch.tensor([-1, 3]), "from 0 to 13"),
        (torch.tensor([3, 14]), "from 0 to 13"),
        (torch.tensor([13]), "without any row"),
        (torch.tensor([[13], [2]]), "without any row"),
        (torch.tensor([1, 2], dtype=torch.int32), "rows are int64"),
        (torch.zeros(3, 1, dtype=torch.int64), "rows are int64"),
    ],
)
def test_rows_that_do_not_fit_are_refused(kernels: str, rows: Tensor, message: str) -> None:
    def look(queries: Tensor, cache: LayerCache) -> None:
        with pytest.raises(ValueError, match=message):
            cache.attend_rows(queries, rows)

    probed(model_of("llama", kernels), look, STEPS[1:2])


@on_both
def test_positions_that_do_not_fit_are_refused(kernels: str) -> None:
    def look(queries: Tensor, cache: LayerCache) -> None:
        with pytest.raises(ValueError, match="those of the 2 chosen rows"):
            cache.attend_rows(queries, torch.tensor([3, 12]), positions=torch.arange(3))
        with pytest.raises(ValueError, match="so these must be chosen"):
            cache.attend_rows(queries, torch.tensor([3, 4]), positions=torch.arange(2))

    probed(model_of("llama", kernels), look)


# --- counting ------------------------------------------------------------------------------------


@on_both
def test_each_kind_of_reading_is_counted_as_it_is_gathered(kernels: str) -> None:
    counted: dict[str, tuple[int, int, float]] = {}
    held: list[AttentionSession] = []

    def look(queries: Tensor, cache: LayerCache) -> None:
        work = cache._work  # type: ignore[attr-defined]  # where it counts

        def count(name: str, call: Callable[[], Any]) -> None:
            before = (work.key_rows, work.value_rows, work.flops)
            call()
            after = (work.key_rows, work.value_rows, work.flops)
            counted[name] = tuple(b - a for a, b in zip(before, after, strict=True))  # type: ignore[assignment]  # three of them

        sets = torch.tensor([0, 4, 12, 13])  # the first of two queries does not see the last row
        count("all", lambda: cache.attend(queries))
        count("fused", lambda: cache.attend_with_scores(queries))
        count("scores", lambda: cache.scores(queries))
        count("shared", lambda: cache.attend_rows(queries, sets))
        count("kv_heads", lambda: cache.attend_rows(queries, sets.expand(3, -1)))
        count("heads", lambda: cache.attend_rows(queries, sets.expand(9, -1)))
        count("moved", lambda: cache.attend_rows(queries, sets, positions=torch.arange(4)))

    held.append(probed(model_of("llama-9-3", kernels), look, STEPS[1:2]))
    pair = 2 * 9 * 16  # one product of head_dim for each query head, a multiply-add counting two
    assert counted["all"] == (3 * 14, 3 * 14, 2 * pair * (13 + 14))
    assert counted["fused"] == counted["all"]
    assert counted["scores"] == (3 * 14, 0, pair * (13 + 14))
    assert counted["shared"] == (3 * 4, 3 * 4, 2 * pair * (3 + 4))
    assert counted["kv_heads"] == counted["moved"] == counted["shared"]
    assert counted["heads"] == (9 * 4, 9 * 4, 2 * pair * (3 + 4))


@on_both
def test_bytes_and_operations_of_a_trace_are_those_of_the_rows(kernels: str) -> None:
    class Few(Rule):
        def attend(self, layer: int, queries: Tensor, cache: LayerCache) -> Tensor:
            return cache.attend_rows(queries, torch.tensor([0, 1, cache.length - 1]))

    model = model_of("llama-9-3", kernels)
    trace = AttentionLM(model, Few).generate(PROMPT, Decoding(max_new_tokens=5)).trace
    steps, layers = len(trace.forwards), 2
    rows = layers * 3 * (len(PROMPT) + 3 * steps)
    assert trace.kv_bytes == 2 * rows * 16 * 4
    facts = model.facts
    dense = facts.flops(Forward(len(PROMPT), 0), 1)
    matrices = 2.0 * facts.matrix_parameters * steps
    assert trace.flops == dense + matrices + steps * layers * 4.0 * 9 * 16 * 3


def test_nothing_can_be_accounted_for_before_a_text() -> None:
    with pytest.raises(ValueError, match="nothing to account for"):
        AttentionLM(tiny_model(), Rule).account(Trace())


def test_the_work_of_several_caches_is_refused_and_not_that_of_the_last() -> None:
    model = AttentionLM(tiny_model(), Rule)
    for _ in range(2):
        model.session(8).prefill(PROMPT[:4])
    with pytest.raises(Unsupported, match="one cache a text; this one took 2"):
        model.account(Trace())
    assert model.generate(PROMPT, Decoding(max_new_tokens=2)).trace.flops > 0  # counted anew


# --- marks ---------------------------------------------------------------------------------------


class Seeing(Rule):
    """In layer 0 all heads see the same rows, in layer 1 each its own; layer 2 is left whole."""

    observes: int | None = 0

    def attend(self, layer: int, queries: Tensor, cache: LayerCache) -> Tensor:
        if layer == 0:
            return cache.attend_rows(queries, torch.tensor([1, 4, cache.length - 1]))
        if layer == 1:
            heads = queries.shape[1]
            first = torch.arange(heads)[:, None]  # heads 0, 1, 2, ... see row 0, 1, 2, ...
            last = torch.full((heads, 1), cache.length - 1)
            return cache.attend_rows(queries, torch.cat([first, last], dim=1))
        return cache.attend(queries)


@on_both
def test_the_share_of_the_evidence_that_decoding_sees_is_counted_by_heads(kernels: str) -> None:
    model = tiny_model("llama", kernels=kernels)  # three layers, four heads
    changed = AttentionLM(model, Seeing)
    changed.mark(PromptMarks(evidence=(0, 1, 4, 7)))
    trace = changed.generate(PROMPT, Decoding(max_new_tokens=4, ignore_eos=True)).trace
    # Of four tokens layer 0 sees two; heads 0 and 1 of four see one each in layer 1.
    assert trace.notes["evidence_kept"] == pytest.approx((2 / 4 + 2 / 4 / 4 + 1) / 3)
    # A mark is for one text.
    trace = changed.generate(PROMPT, Decoding(max_new_tokens=4)).trace
    assert "evidence_kept" not in trace.notes


class Dropping(Rule):
    """After the first step only positions 0, 3, 4 and the new token's are left."""

    def __init__(self, chosen: Sequence[int] | None) -> None:
        self.chosen = chosen  # rows of later steps; all where None
        self.is_done = False

    def attend(self, layer: int, queries: Tensor, cache: LayerCache) -> Tensor:
        if not self.is_done:
            cache.keep(torch.tensor([0, 3, 4, len(PROMPT)]))
        elif self.chosen:
            return cache.attend_rows(queries, torch.tensor(self.chosen))
        return cache.attend(queries)

    def after_forward(self, session: OpenSession, new_tokens: Sequence[int]) -> None:
        self.is_done = session.length > session.prompt_length


@on_both
@pytest.mark.parametrize(("chosen", "share"), [(None, 1 / 2), ([1, 3], 1 / 2), ([0, 2], 0)])
def test_dropped_evidence_is_not_seen_wherever_its_row_was(
    kernels: str, chosen: list[int] | None, share: float
) -> None:
    changed = AttentionLM(tiny_model("llama", kernels=kernels), lambda: Dropping(chosen))
    changed.mark(PromptMarks(evidence=(1, 3)))
    trace = changed.generate(PROMPT, Decoding(max_new_tokens=5, ignore_eos=True)).trace
    # The first of four steps sees both; row 1, which held position 1, holds position 3 from then.
    assert trace.notes["evidence_kept"] == pytest.approx((1 + 3 * share) / 4)


def test_what_is_computed_again_is_not_decoded_twice() -> None:
    class Correcting(Rule):
        def after_forward(self, session: OpenSession, new_tokens: Sequence[int]) -> None:
            if session.length > session.prompt_length:
                session.recompute(new_tokens, session.length - 1)

        def attend(self, layer: int, queries: Tensor, cache: LayerCache) -> Tensor:
            return cache.attend_rows(queries, torch.tensor([0, cache.length - 1]))

    changed = AttentionLM(tiny_model(), Correcting)
    changed.mark(PromptMarks(evidence=(0, 1)))
    trace = changed.generate(PROMPT, Decoding(max_new_tokens=4, ignore_eos=True)).trace
    assert trace.notes["evidence_kept"] == 0.5


def test_a_text_without_a_step_has_seen_nothing_and_missed_nothing() -> None:
    changed = AttentionLM(tiny_model(), Rule)
    changed.mark(PromptMarks(evidence=(0,)))
    trace = changed.generate(PROMPT, Decoding(max_new_tokens=1)).trace
    assert "evidence_kept" not in trace.notes


@on_both
@pytest.mark.parametrize("border", [1, 6, len(PROMPT) - 1])
def test_a_prompt_is_read_in_two_pieces_where_its_marks_say_so(kernels: str, border: int) -> None:
    ends: list[tuple[int, bool]] = []

    class Ending(Full):
        def attend(self, layer: int, queries: Tensor, cache: LayerCache) -> Tensor:
            if layer == 0 and cache.in_prompt:
                ends.append((cache.length, cache.ends_prompt))
            return cache.attend(queries)

    model = tiny_model("llama", kernels=kernels)
    expected = model.session(40).prefill(PROMPT, all_logits=True).clone()
    for all_logits in (True, False):
        changed = AttentionLM(model, lambda: Ending(1))
        changed.mark(PromptMarks(question=border))
        ends.clear()
        session = changed.session(40)
        found = session.prefill(PROMPT, all_logits=all_logits)
        assert ends == [(border, True), (len(PROMPT), True)]
        assert session.prompt_length == session.length == len(PROMPT)
        torch.testing.assert_close(found, expected[-len(found) :], atol=1e-5, rtol=1e-5)
        assert len(found) == (len(PROMPT) if all_logits else 1)
        assert session.prompt_rows == session.work.rows
        # Only the first prompt has a question of its own.
        session.prefill(STEPS[:3])
        assert ends[2:] == [(len(PROMPT) + 3, True)]


@pytest.mark.parametrize("border", [0, len(PROMPT), 99])
def test_a_question_that_is_all_or_nothing_leaves_the_prompt_in_one_piece(border: int) -> None:
    changed = AttentionLM(tiny_model(), lambda: Full(1))
    changed.mark(PromptMarks(question=border))
    session = changed.session(40)
    expected = AttentionLM(tiny_model(), lambda: Full(1)).session(40)
    assert torch.equal(session.prefill(PROMPT), expected.prefill(PROMPT))
    assert session.work.rows == expected.work.rows


# --- dropping rows -------------------------------------------------------------------------------


class Keeping(Rule):
    """Full attention over what is held; keeps given rows after the first step."""

    def __init__(self, rows: Tensor) -> None:
        self.rows: Tensor | None = rows
        self.looked: list[tuple[Tensor, LayerCache]] = []

    def attend(self, layer: int, queries: Tensor, cache: LayerCache) -> Tensor:
        if self.rows is not None:
            cache.keep(self.rows)
        elif layer == 1:
            found = cache.attend(queries)
            every = range(cache.length)
            expected = loops(queries, cache.keys, cache.values, lambda h, g: every)
            torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
        return cache.attend(queries)


@on_both
@pytest.mark.parametrize("per_head", [False, True])
def test_dropped_rows_are_gone_and_the_others_know_their_positions(
    kernels: str, per_head: bool
) -> None:
    model = model_of("llama-9-3", kernels)
    kept = torch.tensor([[0, 2, 5, 12], [1, 2, 3, 4], [8, 10, 11, 12]])
    rule = Keeping(kept if per_head else kept[0])
    session = AttentionLM(model, lambda: rule).session(40)
    session.prefill(PROMPT)
    session.verify(DraftTree.root(STEPS[0]))
    before = [cache.keys.clone() for cache in session._layers.caches]
    session.commit([0])
    assert session.kept_tokens == 4
    assert session.length == 13
    assert session.work.kept_rows == 2 * 2 * 3 * 4
    for cache, old in zip(session._layers.caches, before, strict=True):
        for head in range(3):
            rows = kept[head if per_head else 0]
            assert torch.equal(cache.keys[head], old[head, rows])
            assert cache.positions[head].tolist() == rows.tolist()
    rule.rows = None
    session.verify(DraftTree.chain(STEPS[1], STEPS[2:3]))
    session.commit([0, 1])
    assert session.kept_tokens == 6
    assert session._layers.caches[0].positions[1, -2:].tolist() == [13, 14]
    with pytest.raises(ValueError, match="rows were dropped"):
        session.recompute(STEPS[1:3], 13)


@on_both
def test_a_forward_that_is_not_committed_drops_nothing(kernels: str) -> None:
    model = tiny_model("llama", kernels=kernels)
    rule = Keeping(torch.tensor([0, 12]))
    session = AttentionLM(model, lambda: rule).session(40)
    session.prefill(PROMPT)
    session.verify(DraftTree.root(STEPS[0]))
    rule.rows = None
    session.verify(DraftTree.root(STEPS[0]))
    session.commit([0])
    assert session.kept_tokens == 13


def test_rows_of_rejected_drafts_go_whatever_was_kept() -> None:
    session = AttentionLM(
        tiny_model(), lambda: Keeping(torch.tensor([[0, 3, 12, 14], [1, 4, 12, 13]]))
    ).session(40)
    session.prefill(PROMPT)
    session.verify(DraftTree.chain(STEPS[0], STEPS[1:3]))
    session.commit([0])
    assert session._layers.caches[0].positions.tolist() == [[0, 3, 12], [1, 4, 12]]
    uneven = AttentionLM(
        tiny_model(), lambda: Keeping(torch.tensor([[0, 3, 12], [1, 4, 13]]))
    ).session(40)
    uneven.prefill(PROMPT)
    uneven.verify(DraftTree.chain(STEPS[0], STEPS[1:2]))
    with pytest.raises(ValueError, match="equally many"):
        uneven.commit([0])


def test_rows_are_kept_for_key_value_heads_only() -> None:
    def look(queries: Tensor, cache: LayerCache) -> None:
        with pytest.raises(ValueError, match="kept for a key-value head"):
            cache.keep(torch.zeros(4, 1, dtype=torch.int64))

    probed(tiny_model(), look)


# --- running tokens again ------------------------------------------------------------------------


class Sloppy(Rule):
    """Every step attends to two tokens only, so the rows of the layers above go astray."""

    def __init__(self, rotated: bool) -> None:
        self.rotated = rotated

    def attend(self, layer: int, queries: Tensor, cache: LayerCache) -> Tensor:
        return cache.attend_rows(queries, torch.tensor([cache.length - 3, cache.length - 1]))


@on_models
@pytest.mark.parametrize("rotated", [True, False])
def test_recomputed_rows_equal_those_of_a_fresh_prefill(
    architecture: str, kernels: str, rotated: bool
) -> None:
    model = model_of(architecture, kernels)
    session = AttentionLM(model, lambda: Sloppy(rotated)).session(40)
    fresh = AttentionLM(model, lambda: Full(None, 512, rotated)).session(40)
    session.prefill(PROMPT[:6])
    for token in PROMPT[6:]:
        session.verify(DraftTree.root(token))
        session.commit([0])
    fresh.prefill(PROMPT)
    for ours, theirs in zip(session.cached(), fresh.cached(), strict=True):
        assert not torch.allclose(ours, theirs, atol=1e-2)
    before = session.work.key_rows
    session.recompute(PROMPT[6:], 6)
    assert session.work.key_rows > before
    assert session.length == len(PROMPT)
    for ours, theirs in zip(session.cached(), fresh.cached(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for start, tokens in ((-1, [1]), (12, [1]), (11, [1, 2]), (3, [])):
        with pytest.raises(ValueError, match="not within the 12 committed"):
            session.recompute(tokens, start)


# --- rules and sessions --------------------------------------------------------------------------


@on_both
def test_each_text_gets_a_rule_of_its_own_and_leaves_nothing_to_the_next(kernels: str) -> None:
    model = tiny_model("llama", kernels=kernels)
    made: list[Rule] = []

    class Counting(Rule):
        def __init__(self) -> None:
            made.append(self)
            self.heard: list[tuple[int, int, list[int]]] = []

        def attend(self, layer: int, queries: Tensor, cache: LayerCache) -> Tensor:
            return cache.attend_rows(queries, torch.tensor([0, cache.length - 1]))

        def after_forward(self, session: Any, new_tokens: Sequence[int]) -> None:
            self.heard.append((session.length, session.prompt_length, list(new_tokens)))

    ours = AttentionLM(model, Counting)
    decoding = Decoding(max_new_tokens=6, ignore_eos=True)
    first = ours.generate(PROMPT, decoding)
    ours.generate(PROMPT[::-1], decoding)
    again = ours.generate(PROMPT, decoding)
    assert first.token_ids == again.token_ids
    assert first.trace.kv_bytes == again.trace.kv_bytes
    assert len(made) == 3
    tokens = list(first.token_ids)
    heard = [(12, 12, PROMPT)] + [(13 + i, 12, [token]) for i, token in enumerate(tokens[:5])]
    assert made[0].heard == heard  # type: ignore[attr-defined]  # of the class above


@on_both
def test_a_rule_knows_when_a_prompt_is_read_and_when_it_ends(kernels: str) -> None:
    seen: list[tuple[int, bool, bool]] = []

    def look(queries: Tensor, cache: LayerCache) -> None:
        seen.append((cache.width, cache.in_prompt, cache.ends_prompt))

    rule = Probe(look, observes=7, chunk=3)
    session = AttentionLM(tiny_model("llama", kernels=kernels), lambda: rule).session(40)
    session.prefill(PROMPT)
    session.verify(DraftTree.chain(1, [2]))
    assert seen == [(3, True, False), (3, True, False), (1, True, True), (2, False, False)]


@on_both
def test_queries_that_a_rule_keeps_are_not_written_over(kernels: str) -> None:
    kept: list[tuple[Tensor, Tensor]] = []

    class Collecting(Rule):
        def attend(self, layer: int, queries: Tensor, cache: LayerCache) -> Tensor:
            kept.append((queries, queries.clone()))
            return cache.attend(queries)

    AttentionLM(tiny_model("llama", kernels=kernels), Collecting).generate(
        PROMPT, Decoding(max_new_tokens=4, ignore_eos=True)
    )
    assert len(kept) == 9
    assert all(torch.equal(one, other) for one, other in kept)


def test_a_tree_that_branches_is_refused() -> None:
    session = AttentionLM(tiny_model(), Rule).session(40)
    session.prefill(PROMPT)
    tree = DraftTree(Topology([-1, 0, 0]), np.array([1, 2, 3], dtype=np.int64))
    with pytest.raises(Unsupported, match="chains of drafts"):
        session.verify(tree)


@on_both
def test_a_full_session_refuses_more(kernels: str) -> None:
    session = AttentionLM(tiny_model("llama", kernels=kernels), Rule).session(13)
    with pytest.raises(ValueError, match="do not fit behind 0 cached ones"):
        session.prefill(PROMPT + STEPS)
    session.prefill(PROMPT)
    with pytest.raises(ValueError, match="do not fit behind 12 cached ones"):
        session.verify(DraftTree.chain(1, [2]))


@on_both
def test_an_answer_of_the_wrong_shape_is_refused(kernels: str) -> None:
    class Wrong(Rule):
        def attend(self, layer: int, queries: Tensor, cache: LayerCache) -> Tensor:
            return cache.attend(queries)[:, :1]

    session = AttentionLM(tiny_model("llama", kernels=kernels), Wrong).session(40)
    session.prefill(PROMPT)
    with pytest.raises(ValueError, match=r"the rule returned \(1, 1, 16\)"):
        session.verify(DraftTree.root(1))


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [("gpt2", "not in GPT2LMHeadModel"), ("gemma2", "not in Gemma2ForCausalLM")],
)
def test_other_decoders_are_refused_with_the_reason(architecture: str, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        AttentionLM(tiny_model(architecture), Rule)


def test_positions_that_change_with_the_text_and_odd_kernels_are_refused() -> None:
    sizes = {**_GROUPED, "num_hidden_layers": 1}
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = transformers.LlamaConfig(**sizes, rope_parameters=rope)
    module = transformers.LlamaForCausalLM(config)
    model = CausalLM(module, NumberTokenizer(), "dynamic", kernels="transformers")
    with pytest.raises(Unsupported, match="type 'dynamic' change with the length"):
        AttentionLM(model, Rule)
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    module.config._attn_implementation = "flex_attention"
    with pytest.raises(Unsupported, match="takes no mask of single rows"):
        AttentionLM(CausalLM(module, NumberTokenizer(), "flex", kernels="transformers"), Rule)


def test_a_model_without_a_module_is_refused() -> None:
    class Other:
        name = "other"

    with pytest.raises(Unsupported, match="'other' is none"):
        AttentionLM(Other(), Rule)  # type: ignore[arg-type]  # that is the point


@pytest.mark.skipif(compiler() is None, reason="the native kernels need a C compiler")
@pytest.mark.parametrize("observes", [0, None])
def test_a_text_may_be_longer_than_the_models_positions(observes: int | None) -> None:
    ids = [(5 * i * i + 1) % 97 for i in range(150)]  # of 64 positions
    logits = []
    for kernels in ("transformers", "native"):
        model = model_of("llama-9-3", kernels)
        longer = AttentionLM(model, lambda: Full(observes, 40), longest_text=200)
        assert longer.facts.longest_text == 200
        # What a prompt is cut to stays the model's own, so that all methods get the same one.
        assert longer.facts.max_positions == model.facts.max_positions == 64
        session = longer.session(160)
        session.prefill(ids)
        logits.append(session.verify(DraftTree.root(3)).clone())
    torch.testing.assert_close(logits[0], logits[1], atol=2e-4, rtol=2e-4)


def test_eager_attention_gives_the_same() -> None:
    module = tiny_module("llama", 0, "eager")
    model = CausalLM(module, NumberTokenizer(), "eager", kernels="transformers")
    expected = model.session(40).prefill(PROMPT, all_logits=True)
    found = AttentionLM(model, lambda: Full(5, 3)).session(40).prefill(PROMPT, all_logits=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
