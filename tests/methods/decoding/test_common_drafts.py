"""Draft models: their caches follow the text, and what is drawn from them is what is said."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from hardware.profile import Profile, StepCost
from methods.decoding import common_drafts
from methods.decoding.common_drafts import (
    STEP_OVERHEAD,
    AcceptanceCounter,
    DraftModel,
    DraftModelMethod,
    DraftRow,
    MeasuredDrafts,
    ShareCounter,
    best_size,
    chooser,
    draft_for,
    draft_share,
)
from methods.decoding.dyspec import DySpec
from methods.decoding.sequoia import Sequoia
from methods.decoding.specinfer import SpecInfer
from methods.decoding.speculative import ChainDrafter, Speculative
from models.base import Decoding, Forward, InvalidOutput, TextGenerator, Unsupported
from models.decode import decode
from models.draft_tree import DraftTree
from models.native.build import compiler
from models.text import CausalLM, Kernels
from models.tokenization import HubTokenizer
from tests.methods.decoding.drafts import (
    TableDraft,
    Watched,
    noisy_copy,
    tiny_llama,
)
from tests.models.tiny import tiny_model
from tests.models.toy import TableModel, cycle_table, random_table

CPU = Profile(name="test", kind="cpu", label="test")
PROMPT = [5, 17, 3, 88, 41, 2, 9, 63, 12, 5, 17, 3]
KERNELS: list[Kernels] = ["transformers", *(["native"] if compiler() else [])]  # type: ignore[list-item]
METHODS: list[DraftModelMethod] = [
    Speculative(num_draft_tokens=4),
    SpecInfer(sequences=3, num_draft_tokens=3),
    Sequoia(tree_nodes=9, depth=4),
    DySpec(tree_nodes=9),
    DySpec(tree_nodes=9, mode="threshold"),
]


def ids(method: DraftModelMethod) -> str:
    return f"{type(method).__name__}-{getattr(method, 'mode', '')}"


@pytest.fixture
def use_draft(monkeypatch: pytest.MonkeyPatch):
    """Make a model the draft of every target."""

    def use(draft: TextGenerator) -> None:
        monkeypatch.setattr(common_drafts, "load_draft", lambda draft_id, target: draft)

    return use


# --- the text and the cache -----------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=ids)
@pytest.mark.parametrize("like", ["llama-2", "llama-grouped"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_greedy_texts_are_the_targets_own(
    method: DraftModelMethod, like: str, kernels: Kernels, use_draft
) -> None:
    target = tiny_llama(like, kernels=kernels)
    decoding = Decoding(max_new_tokens=30, ignore_eos=True)
    plain = target.generate(PROMPT, decoding)
    # A stranger that is never right, and a copy that often is.
    for draft in (tiny_llama("llama-68m", kernels=kernels, seed=5), noisy_copy(target)):
        use_draft(draft)
        common_drafts._LOADED.clear()
        with method.apply(target, CPU) as changed:
            drafted = changed.generate(PROMPT, decoding)
        assert drafted.token_ids == plain.token_ids
        assert drafted.trace.draft_forwards > 10
    assert len(drafted.trace.forwards) < 20
    assert max(drafted.trace.accepted) >= 1


@pytest.mark.parametrize("method", METHODS, ids=ids)
@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "mistral-sliding-window"])
def test_greedy_texts_of_other_architectures_are_their_own_too(
    method: DraftModelMethod, architecture: str, use_draft
) -> None:
    target = tiny_model(architecture)
    use_draft(noisy_copy(target, 0.02))
    decoding = Decoding(max_new_tokens=25, ignore_eos=True)
    with method.apply(target, CPU) as changed:
        drafted = changed.generate(PROMPT, decoding)
    assert drafted.token_ids == target.generate(PROMPT, decoding).token_ids
    assert sum(drafted.trace.accepted) > 5


@pytest.mark.parametrize("method", METHODS, ids=ids)
@pytest.mark.parametrize("kernels", [*KERNELS, "static"])
@pytest.mark.parametrize("heat", [0.0, 0.9])
def test_the_drafts_cache_is_that_of_a_fresh_prefill(
    method: DraftModelMethod, kernels: str, heat: float
) -> None:
    target = tiny_model(kernels=kernels)  # type: ignore[arg-type]  # or static
    draft = tiny_model(kernels=kernels)  # type: ignore[arg-type]
    draft = noisy_copy(draft) if kernels != "static" else draft
    decoding = Decoding(max_new_tokens=30, temperature=heat, seed=1, ignore_eos=True)
    size = method.chosen_size(CPU, target.facts, draft.facts, decoding)
    watched = Watched(method.model_drafter(draft, size, decoding))
    result = decode(target, PROMPT, decoding, watched)
    paths = [accepted.path for _, accepted in watched.steps]
    assert isinstance(method, Speculative) or any(path[-1] >= len(path) for path in paths)
    text = [*PROMPT, *result.token_ids]
    found = watched.inner.draft_model._session
    assert len(PROMPT) + 20 < found.length <= len(text) - 1
    fresh = draft.session(100)
    fresh.prefill(text[: found.length])
    for ours, theirs in zip(found.cached(), fresh.cached(), strict=True):
        assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("kernels", [*KERNELS, "static"])
def test_a_tree_read_level_by_level_gives_the_logits_of_reading_it_at_once(kernels: str) -> None:
    model = tiny_model(kernels=kernels)  # type: ignore[arg-type]  # or static
    text = [*PROMPT, 7, 8]
    tree = DraftTree.from_sequences(8, [[4, 5, 6], [4, 9], [11, 5], [11, 6, 1]])
    order = np.argsort(tree.topology.depths, kind="stable").tolist()
    whole = model.session(60)
    whole.prefill(text[:-1])
    expected = whole.verify(tree).clone()
    draft = DraftModel(model, 60)
    draft.begin(PROMPT)
    assert torch.allclose(draft.root(text), expected[0], atol=1e-4)
    for level in (1, 2, 3):
        nodes = [node for node in order if tree.topology.depths[node] == level]
        parents = tree.topology.parents[nodes].tolist()
        found = draft.expand(nodes, parents, tree.tokens[nodes].tolist())
        assert torch.allclose(found, expected[nodes], atol=1e-4)
    path = [0, *[node for node in range(len(tree)) if tree.tokens[node] in (11, 1)]]
    path.insert(2, int(tree.topology.parents[path[-1]]))
    draft.follow(path)
    assert draft.length == len(text) + 3
    assert [(forward.width, forward.context) for forward in draft.forwards] == [
        (12, 0),
        (2, 12),
        (2, 14),
        (4, 16),
        (2, 20),
    ]


def test_a_draft_that_was_skipped_or_not_followed_catches_up() -> None:
    draft = TableDraft(random_table(6, 2))
    model = DraftModel(draft, 40)
    model.begin([1, 2, 3])
    for text in ([1, 2, 3, 4], [1, 2, 3, 4, 5, 0, 1], [1, 2, 3, 4, 5, 0, 1, 2]):
        assert torch.equal(model.root(text), draft.logits_after(text))
        model.follow([0])
        assert model.length == len(text)


def test_a_text_beyond_the_drafts_context_is_decoded_plainly(use_draft) -> None:
    target = TableModel(random_table(6, 2))
    use_draft(TableDraft(random_table(6, 1, seed=1), max_positions=12))
    decoding = Decoding(max_new_tokens=20)
    for method in METHODS:
        for prompt, drafts in (([1, 2], True), ([1] * 11, False), ([1] * 30, False)):
            with method.apply(target, CPU) as changed:
                result = changed.generate(prompt, decoding)
            assert result.token_ids == decode(target, prompt, decoding).token_ids
            assert result.trace.forwards[-1].width == 1
            assert (result.trace.draft_forwards > 1) == drafts


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_the_trace_counts_the_drafts_work(method: DraftModelMethod, use_draft) -> None:
    target, draft = TableModel(random_table(6, 2)), TableDraft(random_table(6, 1, seed=1))
    use_draft(draft)
    decoding = Decoding(max_new_tokens=15, temperature=0.7)
    with method.apply(target, CPU) as changed:
        trace = changed.generate([1, 2], decoding).trace
    own = [*trace.prefill, *trace.forwards]
    assert trace.draft_forwards > 0
    assert trace.flops > sum(target.facts.flops(forward) for forward in own)
    assert trace.kv_bytes > sum(target.facts.kv_read(forward) for forward in own)
    assert trace.notes["draft"] == "table"
    assert float(trace.notes["draft_seconds"]) > 0


def test_settings_that_draft_nothing_need_no_draft_model() -> None:
    target = TableModel(random_table(6, 2))
    for method in (
        Speculative(num_draft_tokens=0, draft="nowhere"),
        SpecInfer(num_draft_tokens=0, draft="nowhere"),
        Sequoia(tree_nodes=0, draft="nowhere"),
        DySpec(tree_nodes=0, draft="nowhere"),
    ):
        with method.apply(target, CPU) as changed:
            trace = changed.generate([1], Decoding(max_new_tokens=5)).trace
        assert (len(trace.forwards), trace.draft_forwards) == (4, 0)


# --- which model ----------------------------------------------------------------------------------


def test_a_folder_is_a_draft_model_and_is_loaded_once(tmp_path: Path) -> None:
    target, draft = tiny_llama("llama-grouped"), tiny_llama("llama-68m", seed=5)
    draft.module.save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    loaded = draft_for(f"path:{tmp_path}", target)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert draft_for(f"path:{tmp_path}", target) is loaded
    assert loaded.tokenizer is target.tokenizer
    found, expected = (model.session(20).prefill(PROMPT) for model in (loaded, draft))
    assert torch.allclose(found, expected, atol=1e-4)


def test_another_vocabulary_is_refused_with_both_sizes(tmp_path: Path) -> None:
    tiny_llama("llama-68m", vocab=50).module.save_pretrained(tmp_path)
    target = tiny_llama("llama-2")
    reason = r"has a vocabulary of 50 tokens, 'tiny-llama-2' one of 97"
    with (
        pytest.raises(Unsupported, match=reason),
        DySpec(draft=f"path:{tmp_path}").apply(target, CPU),
    ):
        pass


def words(*order: str) -> PreTrainedTokenizerFast:
    ids = {word: place for place, word in enumerate(order)}
    backend = Tokenizer(WordLevel(ids, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")


def test_a_tokenizer_of_equal_size_that_splits_otherwise_is_refused(tmp_path: Path) -> None:
    target = tiny_llama("llama-2")
    target.tokenizer = HubTokenizer(words("?", "def", "return"))
    for order, same in ((("?", "def", "return"), True), (("?", "return", "def"), False)):
        folder = tmp_path / order[1]
        tiny_llama("llama-68m").module.save_pretrained(folder)
        words(*order).save_pretrained(folder)
        if same:
            draft_for(f"path:{folder}", target)
        else:
            with pytest.raises(Unsupported, match="splits texts into other tokens"):
                draft_for(f"path:{folder}", target)


@pytest.mark.parametrize(
    ("draft", "reason"),
    [
        ("no-such-draft", "draft model 'no-such-draft': no embedded model named 'no-such-draft'"),
        ("path:/nowhere", "no model in /nowhere"),
        ("layers:3", "'layers:3' must name 1 to 2 of the 3 layers of 'tiny-llama-2'"),
        ("layers:x", "'layers:x' must name"),
    ],
)
def test_a_draft_that_is_not_there_is_unsupported(draft: str, reason: str) -> None:
    with (
        pytest.raises(Unsupported, match=reason),
        Speculative(draft=draft).apply(tiny_llama("llama-2"), CPU),
    ):
        pass


def test_a_model_that_cannot_read_a_growing_tree_cannot_draft() -> None:
    with pytest.raises(Unsupported, match="'table' cannot draft: its sessions have no 'extend'"):
        DraftModel(TableModel(cycle_table(4)), 20)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("kernels", ["auto", "transformers"])
def test_the_targets_own_layers_draft_and_leave_it_as_it_is(
    architecture: str, kernels: Kernels
) -> None:
    target = tiny_model(architecture, kernels=kernels)
    target = CausalLM(copy.deepcopy(target.module), target.tokenizer, "copy", kernels=kernels)
    decoding = Decoding(max_new_tokens=10, ignore_eos=True)
    before = {name: value.data_ptr() for name, value in target.module.named_parameters()}
    plain = target.generate(PROMPT, decoding).token_ids
    draft = draft_for("layers:2", target)
    assert draft.facts.num_layers == 2
    assert {n: p.data_ptr() for n, p in target.module.named_parameters()} == before
    assert target.generate(PROMPT, decoding).token_ids == plain
    # Without its last layer's contributions the target is the draft.
    silent = copy.deepcopy(target.module)
    stack = silent.transformer.h if architecture == "gpt2" else silent.model.layers
    del stack[2:]
    silent.config.num_hidden_layers = 2
    expected = silent(torch.tensor([PROMPT])).logits[0, -1]
    assert torch.allclose(draft.session(20).prefill(PROMPT)[-1], expected, atol=1e-4)


def test_a_target_without_layers_has_none_to_draft() -> None:
    with pytest.raises(Unsupported, match="'table' has no transformers model whose layers"):
        draft_for("layers:1", TableModel(cycle_table(4)))


# --- drawing --------------------------------------------------------------------------------------


def row_of(weights: list[float]) -> DraftRow:
    probabilities = np.array(weights)
    return DraftRow(probabilities / probabilities.sum())


@settings(max_examples=60)
@given(st.integers(0, 500), st.integers(3, 200), st.integers(1, 8))
def test_draws_are_those_of_the_distribution_without_what_was_drawn(
    seed: int, vocab: int, draws: int
) -> None:
    random = np.random.default_rng(seed)
    row = row_of(list(random.exponential(size=vocab) ** 4))
    whole = row.probabilities.copy()
    for _ in range(min(draws, vocab - 1)):
        slow = whole.copy()
        slow[row.drawn] = 0
        level = random.random()
        expected = int(np.searchsorted(np.cumsum(slow / slow.sum()), level, side="right"))
        token = row.at(level)
        assert token == expected
        assert row.share(token) == pytest.approx(slow[token] / slow.sum())
        np.testing.assert_allclose(row.remaining(), slow / slow.sum())
        row.take(token)
        assert row.left == pytest.approx(whole.sum() - whole[row.drawn].sum())
    assert len(set(row.drawn)) == len(row.drawn)
    assert np.array_equal(row.probabilities, whole)


def test_the_rest_of_a_sure_distribution_is_still_a_distribution() -> None:
    weights = [0.0] * 200
    weights[70], weights[71], weights[150] = 1.0, 3e-19, 1e-19
    row = row_of(weights)
    row.take(70)
    assert row.share(71) == pytest.approx(0.75)
    assert [row.at(level) for level in (0.0, 0.7, 0.8, 1 - 2**-53)] == [71, 71, 150, 150]
    row.take(71)
    row.take(150)
    assert row.is_spent


def test_a_draw_never_lands_on_what_cannot_come() -> None:
    row = row_of([0.0, 0.5, 0.0, 0.5, 0.0])
    assert {row.at(level) for level in (0.0, 0.3, 0.6, 1 - 2**-53, 1.0)} == {1, 3}


def test_draws_follow_the_distribution_and_their_seed() -> None:
    weights = np.array([0.05, 0.4, 0.25, 0.3])
    choose = chooser(3)
    counts = np.bincount([choose(row_of(list(weights))) for _ in range(3000)], minlength=4)
    assert chisquare(counts, 3000 * weights).pvalue > 0.01
    drawn = [[chooser(seed)(row_of([1.0] * 500)) for _ in range(4)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_draft_that_returns_nan_is_an_invalid_output(use_draft) -> None:
    table = random_table(6, 1)
    table[:, 3] = float("nan")
    use_draft(TableDraft(table))
    for method in METHODS:
        for heat in (0.0, 0.8):
            with (
                method.apply(TableModel(random_table(6, 2)), CPU) as changed,
                pytest.raises(InvalidOutput, match="NaN"),
            ):
                changed.generate([1], Decoding(max_new_tokens=9, temperature=heat))
        common_drafts._LOADED.clear()


# --- how large ------------------------------------------------------------------------------------


def test_the_best_size_counts_the_drafts_own_cost() -> None:
    measured = MeasuredDrafts((1, 4, 12), (1.5, 2.1, 2.5), (1, 3, 6))
    target, draft = tiny_llama("llama-2").facts, tiny_llama("llama-68m").facts
    for kind in ("cpu", "cuda"):
        cost = StepCost((1, 11), (128, 384), ((1.0, 1.6), (1.2, 1.9)))
        profile = Profile(name="test", kind=kind, label="test", step_cost=cost)  # type: ignore[arg-type]
        share = draft.weight_bytes / target.weight_bytes
        if kind == "cuda":
            share = max(share, 2 / 3)
        assert draft_share(profile, target, draft) == pytest.approx(STEP_OVERHEAD * share)

        def rate(n: int, cost: StepCost = cost, share: float = share) -> float:
            tokens = np.interp(n, (0, 1, 4, 12), (1, 1.5, 2.1, 2.5))
            forwards = np.interp(n, (0, 1, 4, 12), (0, 1, 3, 6))
            width = round(n / forwards) if n else 1
            drafting = forwards * STEP_OVERHEAD * share * cost.at(width, 256)
            return float(tokens / (cost.at(n + 1, 256) + drafting))

        assert best_size(measured, profile, target, draft) == max(range(13), key=rate)
    assert best_size(measured, CPU, target, draft) is None


def test_a_draft_that_costs_as_much_as_the_target_is_not_asked() -> None:
    measured = MeasuredDrafts((1, 4), (1.4, 1.9), (1, 4))
    cost = StepCost((1, 11), (128,), ((1.0, 1.1),))
    profile = Profile(name="test", kind="cpu", label="test", step_cost=cost)
    facts = tiny_llama("llama-2").facts
    assert best_size(measured, profile, facts, facts) == 0


def test_acceptance_is_counted_by_the_order_of_siblings() -> None:
    # After 0 comes 1, then 2, and so on; the draft's first child is right after even tokens only.
    class Alternating(ChainDrafter):
        def propose(self, token_ids: list[int], depth: int) -> DraftTree:
            right = (token_ids[-1] + 1) % 8
            wrong = (token_ids[-1] + 3) % 8
            pair = [[right], [wrong]] if token_ids[-1] % 2 == 0 else [[wrong], [right]]
            return DraftTree.from_sequences(token_ids[-1], pair)

    decoding = Decoding(max_new_tokens=12)
    inner = Alternating(TableDraft(cycle_table(8)), decoding, 2, temperature=0.0)
    counter = AcceptanceCounter(inner, 3)
    decode(TableModel(cycle_table(8)), [0], decoding, counter)
    # Steps begin after 1, 3, 5, 7, 1: always odd, so it is the second child that is accepted.
    assert counter.trials.tolist() == [5, 5, 0]
    assert counter.hits.tolist() == [0, 5, 0]


def test_forwards_are_counted_once_each() -> None:
    draft = TableDraft(cycle_table(8))
    decoding = Decoding(max_new_tokens=9)
    drafter = ChainDrafter(draft, decoding, 3, temperature=0.0)
    decode(TableModel(cycle_table(8)), [0, 1], decoding, drafter)
    # The prompt; then three reads a step: the root with what was not read yet, and two drafts.
    assert drafter.draft_model.forwards == [
        Forward(2, 0),
        *(Forward(1, 2), Forward(1, 3), Forward(1, 4)),
        *(Forward(2, 5), Forward(1, 7), Forward(1, 8)),
    ]


def test_acceptance_is_counted_by_the_probability_of_the_draw() -> None:
    # With the draft equal to the target, first draws are always accepted, whatever they had.
    table = random_table(6)
    decoding = Decoding(max_new_tokens=60, temperature=0.9)
    method = DySpec(tree_nodes=6, draft_temperature=0.9)
    counter = ShareCounter(method.model_drafter(TableDraft(table), 6, decoding), 5)
    result = decode(TableModel(table), [0], decoding, counter)
    assert counter.trials.sum() == counter.hits.sum() == sum(result.trace.accepted)
    # A draft that knows nothing draws all tokens with 1/6, then 1/5 and so on.
    even = ShareCounter(method.model_drafter(TableDraft(table * 0), 6, decoding), 5)
    result = decode(TableModel(table), [0], decoding, even)
    assert even.hits.sum() == sum(result.trace.accepted) < even.trials.sum()
    assert even.trials[0] >= len(result.trace.forwards) - 1
