"""WeDLM's decoder: against a slow version without cache or trees, and its paper's invariants."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from methods.diffusion_lm.common_wedlm import (
    NOT_FILLED,
    Refill,
    entropies,
    leading_run,
    mask_token_of,
    reorder,
    restrict,
    select,
    window_tree,
)
from methods.diffusion_lm.wedlm import WeDLM
from models.base import (
    Decoding,
    Generation,
    InvalidOutput,
    Session,
    TextGenerator,
    Unsupported,
)
from models.draft_tree import DraftTree
from models.embedded.tiny_causal.train import dual_stream_mask, new_module
from models.embedded.tiny_dllm.data import MASK, PROMPT_LENGTH, VOCABULARY
from models.stopping import Stopper
from models.text import CausalLM
from models.wrapper import GeneratorWrapper
from runner.conformance_base import PROFILE, sharpen
from tests.models.tiny import NumberTokenizer, tiny_model
from tests.models.toy import TableModel, TableSession

PROMPT = [33, 30, 17, 11, 60, 9, 41]
HOLE = 96  # the mask of the tiny models
LENGTH = 20
SURE, UNSURE = 5.0, 0.05


def run(
    model: TextGenerator, prompt: Sequence[int] = PROMPT, length: int = LENGTH, **parameters: Any
) -> Generation:
    """Continue a prompt past end-of-text, so that all texts have the same length."""
    return decode(model, Decoding(max_new_tokens=length, ignore_eos=True), prompt, **parameters)


def decode(
    model: TextGenerator, decoding: Decoding, prompt: Sequence[int] = PROMPT, **parameters: Any
) -> Generation:
    with WeDLM(**{"mask_id": HOLE, **parameters}).apply(model, PROFILE) as changed:
        return changed.generate(prompt, decoding)


def slow_stream(
    module: Any,
    prompt: Sequence[int],
    length: int,
    *,
    window: int,
    threshold: float | None,
    penalty: float,
    refill: Refill,
    mask_id: int,
) -> tuple[list[int], list[int]]:
    """WeDLM without cache, sessions or trees: whole forwards over explicit positions.

    Returns:
        The tokens, and how many slots each forward held.
    """
    text: dict[int, int] = {}  # by place behind the prompt
    masks: set[int] = set(range(min(window, length)))
    committed, widths = 0, []
    while not all(place in text for place in range(length)):
        if refill == "before":
            begin = committed + len(masks) + sum(place >= committed for place in text)
            filled = next(n for n in itertools.count() if committed + n not in text)
            masks |= set(range(begin, min(begin + filled, length)))
        keep = next(n for n in itertools.count() if committed + n not in text)
        seen = sorted(place for place in text if place >= committed)
        hidden = sorted(masks)
        widths.append(len(seen) + len(hidden))
        ids = [*prompt, *(text[place] for place in range(committed))]
        ids += [*(text[place] for place in seen), *[mask_id] * len(hidden)]
        places = [*range(len(prompt) + committed)]
        places += [len(prompt) + place for place in [*seen, *hidden]]
        with torch.no_grad():
            logits = module(
                input_ids=torch.tensor([ids]),
                position_ids=torch.tensor([places]),
                # Said outright: positions out of order would be taken for packed texts.
                attention_mask=torch.ones(len(ids), len(ids), dtype=torch.bool).tril()[None, None],
                use_cache=False,
            ).logits[0]
        if hidden:
            rows = logits[len(ids) - len(hidden) :].double()
            probabilities = torch.softmax(rows, -1).numpy()
            costs = [
                float(scipy.stats.entropy(probabilities[n])) + penalty * (place - hidden[0])
                for n, place in enumerate(hidden)
            ]
            chosen = [n for n, cost in enumerate(costs) if threshold and cost < threshold]
            for n in chosen or [int(np.argmin(costs))]:
                rows[n, mask_id] = -math.inf
                text[hidden[n]] = int(rows[n].argmax())
                masks.remove(hidden[n])
        if refill != "block" or not hidden:
            committed += keep
            begin = committed + len(masks) + sum(place >= committed for place in text)
            if refill != "before":
                masks |= set(range(begin, min(begin + keep, length)))
    return [text[place] for place in range(length)], widths


# ---- the parts


def test_filled_slots_stand_before_masks_and_both_keep_their_order() -> None:
    order = reorder([4, NOT_FILLED, NOT_FILLED, 7, NOT_FILLED, 2])
    assert order.slots.tolist() == [0, 3, 5, 1, 2, 4]
    assert order.num_filled == 3


@given(st.lists(st.integers(-1, 5), min_size=1, max_size=12))
def test_a_window_tree_is_a_causal_chain_at_logical_positions(window: list[int]) -> None:
    order = reorder(window)
    tree = window_tree(window, order, HOLE)
    assert sorted(tree.topology.depths.tolist()) == list(range(len(window)))
    assert (tree.topology.ancestors == np.tri(len(window), dtype=bool)).all()
    for node, slot in enumerate(tree.topology.depths):
        assert tree.tokens[node] == (HOLE if window[slot] == NOT_FILLED else window[slot])
        assert (node < order.num_filled) == (window[slot] != NOT_FILLED)
    run_length = leading_run(window)
    assert NOT_FILLED not in window[:run_length]
    assert run_length == len(window) or window[run_length] == NOT_FILLED


def test_without_masks_the_order_is_the_text_and_the_logits_are_those_of_plain_reading() -> None:
    model = tiny_model("llama")
    window = [5, 6, 7, 8]
    session = model.session(20)
    session.prefill(PROMPT)
    logits = session.verify(window_tree(window, reorder(window), HOLE))
    whole = model.session(20).prefill([*PROMPT, *window], all_logits=True)
    torch.testing.assert_close(logits, whole[len(PROMPT) :], atol=1e-5, rtol=1e-5)


@given(st.lists(st.lists(st.floats(-9, 9), min_size=4, max_size=4), min_size=1, max_size=3))
def test_entropies_are_in_nats_over_the_whole_distribution(rows: list[list[float]]) -> None:
    logits = torch.tensor(rows)
    expected = scipy.stats.entropy(torch.softmax(logits.double(), -1).numpy(), axis=-1)
    np.testing.assert_allclose(entropies(logits).numpy(), expected, atol=1e-5)


def test_a_certain_distribution_has_no_entropy_and_nan_is_refused() -> None:
    assert float(entropies(torch.tensor([[0.0, -torch.inf, -torch.inf]]))[0]) == 0
    with pytest.raises(InvalidOutput, match="NaN"):
        entropies(torch.tensor([[0.0, 1.0], [torch.nan, 0.0]]))


@pytest.mark.parametrize(
    ("threshold", "penalty", "chosen"),
    [
        (0.5, 0.0, [0, 2]),
        (0.5, 0.02, [0]),  # 0.4 + 0.02 * 7 is too much, 0.4 + 0.02 * 2, by rank, was not
        (0.4, 0.0, [0]),  # strictly below
        (0.1, 0.0, [0]),  # none: the surest alone
        (None, 0.0, [0]),
        (None, 100.0, [0]),
        (math.inf, 0.0, [0, 1, 2]),
    ],
)
def test_masks_are_chosen_by_entropy_and_logical_distance(
    threshold: float | None, penalty: float, chosen: list[int]
) -> None:
    entropy = torch.tensor([0.3, 0.9, 0.4])
    found = select(entropy, [3, 4, 10], threshold=threshold, distance_penalty=penalty)
    assert found == chosen


def test_the_surest_mask_need_not_be_the_leftmost() -> None:
    entropy = torch.tensor([2.0, 1.9, 0.8, 0.8])
    assert select(entropy, [0, 1, 2, 3], threshold=0.5, distance_penalty=0.0) == [2]
    assert select(entropy, [0, 1, 2, 3], threshold=0.5, distance_penalty=0.7) == [0]


def test_candidates_are_cut_by_number_then_by_probability() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))

    def kept(top_k: int, top_p: float) -> list[int]:
        return (
            torch.isfinite(restrict(logits, top_k=top_k, top_p=top_p))[0].nonzero()[:, 0].tolist()
        )

    assert kept(0, 1.0) == [0, 1, 2, 3]
    assert kept(2, 1.0) == [1, 3]
    assert kept(0, 0.4) == [1]
    assert kept(0, 0.41) == [1, 3]
    assert kept(0, 0.89) == [1, 2, 3]
    # Of the three likeliest, 0.4 / 0.9 and 0.3 / 0.9 reach 0.75; of all four they do not.
    assert kept(3, 0.75) == [1, 3]
    assert kept(0, 0.75) == [1, 2, 3]


# ---- the loop


@pytest.mark.parametrize("refill", ["before", "after", "block"])
@pytest.mark.parametrize(
    ("window", "threshold", "penalty"),
    [(1, 0.4, 0.02), (4, 1.5, 0.0), (4, None, 0.3), (6, 2.5, 0.1), (16, 2.0, 0.02), (40, 3.0, 0.0)],
)
def test_the_text_and_the_forwards_are_those_of_the_slow_version(
    refill: Refill, window: int, threshold: float | None, penalty: float
) -> None:
    model = tiny_model("llama")
    found = run(
        model,
        window=window,
        entropy_threshold="none" if threshold is None else threshold,
        distance_penalty=penalty,
        refill=refill,
    )
    tokens, widths = slow_stream(
        model.module,
        PROMPT,
        LENGTH,
        window=window,
        threshold=threshold,
        penalty=penalty,
        refill=refill,
        mask_id=HOLE,
    )
    assert list(found.token_ids) == tokens
    assert [forward.width for forward in found.trace.forwards] == widths


@pytest.mark.parametrize(
    ("architecture", "kernels"),
    [
        ("llama", "native"),
        ("llama", "static"),
        ("qwen2", "native"),
        ("qwen2", "transformers"),
        ("mistral-sliding-window", "transformers"),
        ("gpt2", "transformers"),
    ],
)
def test_all_sessions_write_the_same_text(architecture: str, kernels: Any) -> None:
    parameters: dict[str, Any] = {"window": 5, "entropy_threshold": 2.0}
    found = run(tiny_model(architecture, kernels=kernels), **parameters)
    if kernels != "transformers":
        plain = run(tiny_model(architecture), **parameters)
        assert found.token_ids == plain.token_ids
        assert found.trace.forwards == plain.trace.forwards
    else:
        module = tiny_model(architecture).module
        tokens, _ = slow_stream(
            module,
            PROMPT,
            LENGTH,
            window=5,
            threshold=2.0,
            penalty=0.02,
            refill="before",
            mask_id=HOLE,
        )
        if architecture != "mistral-sliding-window":  # whose plain forward takes rows for positions
            assert list(found.token_ids) == tokens


class Watched(GeneratorWrapper):
    """A model whose sessions are held against fresh forwards after every commit."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__(model)
        self.commits: list[int] = []
        self.trees: list[DraftTree] = []

    def session(self, capacity: int) -> Session:
        return WatchedSession(self, self._model.session(capacity), self._model)


class WatchedSession:
    def __init__(self, watched: Watched, session: Any, model: CausalLM) -> None:
        self._watched, self._session, self._model = watched, session, model
        self._text: list[int] = []
        self._rows: Tensor | None = None

    @property
    def length(self) -> int:
        return int(self._session.length)

    @property
    def capacity(self) -> int:
        return int(self._session.capacity)

    def prefill(self, token_ids: Sequence[int], *, all_logits: bool = False) -> Tensor:
        self._text = list(token_ids)
        logits: Tensor = self._session.prefill(token_ids, all_logits=all_logits)
        return logits

    def verify(self, tree: DraftTree) -> Tensor:
        self._watched.trees.append(tree)
        logits: Tensor = self._session.verify(tree)
        return logits

    def commit(self, path: Sequence[int]) -> None:
        tree = self._watched.trees[-1]
        self._session.commit(path)
        self._watched.commits.append(len(path))
        self._text += [int(tree.tokens[node]) for node in path]
        rows = torch.stack(self._session.cached())
        fresh: Any = self._model.session(len(self._text))
        fresh.prefill(self._text)
        torch.testing.assert_close(rows, torch.stack(fresh.cached()), atol=1e-5, rtol=1e-5)
        if self._rows is not None:  # what was cached has not been touched since
            assert torch.equal(rows[:, :, :, : self._rows.shape[3]], self._rows)
        self._rows = rows.clone()


@pytest.mark.parametrize("refill", ["before", "after", "block"])
@pytest.mark.parametrize("kernels", ["transformers", "native", "static"])
def test_after_every_commit_the_cache_is_that_of_a_fresh_forward(
    refill: Refill, kernels: Any
) -> None:
    watched = Watched(tiny_model("llama", kernels=kernels))
    found = run(watched, window=6, entropy_threshold=2.4, refill=refill)
    assert len(watched.commits) > 2
    assert max(watched.commits) > 1
    assert sum(watched.commits) == found.trace.notes["cached_tokens"]


def test_out_of_order_tokens_are_filled_and_their_rows_wait_for_the_gap() -> None:
    watched = Watched(tiny_model("llama"))
    run(watched, window=6, entropy_threshold=2.4)
    orders = [tree.topology.depths.tolist() for tree in watched.trees]
    assert any(order != sorted(order) for order in orders)


def test_no_position_is_fed_again_once_it_is_committed() -> None:
    watched = Watched(tiny_model("llama"))
    found = run(watched, window=6, entropy_threshold=2.4)
    committed = 0
    assert found.trace.prefill[0].context == 0
    for tree, forward in zip(watched.trees, found.trace.forwards, strict=True):
        assert tree.topology.depths.min() == 0  # logical positions from the end of the cache on
        assert forward.context >= len(PROMPT) + committed
        committed = forward.context - len(PROMPT)


def test_a_window_of_one_does_not_mind_threshold_or_penalty() -> None:
    model = tiny_model("llama")
    texts = {
        run(model, window=1, entropy_threshold=threshold, distance_penalty=penalty).token_ids
        for threshold in ("none", 0.0, 0.4, math.inf)
        for penalty in (0.0, 5.0)
    }
    assert len(texts) == 1


def test_a_window_of_one_asks_for_each_token_by_one_mask_behind_the_text() -> None:
    model = tiny_model("llama")
    text = list(PROMPT)
    with torch.no_grad():
        for _ in range(LENGTH):
            logits = model.module(input_ids=torch.tensor([[*text, HOLE]])).logits[0, -1]
            logits[HOLE] = -torch.inf
            text.append(int(logits.argmax()))
    found = run(model, window=1)
    assert list(found.token_ids) == text[len(PROMPT) :]
    assert [forward.width for forward in found.trace.forwards] == [1] + [2] * (LENGTH - 1)


def test_a_large_penalty_alone_fills_from_left_to_right() -> None:
    watched = Watched(tiny_model("llama"))
    found = run(watched, window=4, entropy_threshold="none", distance_penalty=1e6)
    assert found.trace.accepted == [0] * LENGTH  # one token a forward
    for tree in watched.trees:
        assert tree.topology.depths.tolist() == list(range(len(tree)))


@pytest.mark.parametrize("window", [1, 4, 8])
def test_an_infinite_threshold_writes_a_window_a_forward(window: int) -> None:
    length = 4 * window
    found = run(tiny_model("llama"), length=length, window=window, entropy_threshold=math.inf)
    assert [count + 1 for count in found.trace.accepted] == [window] * 4
    assert [forward.width for forward in found.trace.forwards] == [window] + [2 * window] * 3
    assert found.trace.notes["slots"] == 7 * window
    assert found.trace.notes["cached_tokens"] == 3 * window


def test_refilling_after_the_forward_takes_two_forwards_a_window() -> None:
    found = run(
        tiny_model("llama"), length=16, window=4, entropy_threshold=math.inf, refill="after"
    )
    assert [count + 1 for count in found.trace.accepted] == [4, 0, 4, 0, 4, 0, 4]
    assert {forward.width for forward in found.trace.forwards} == {4}


def test_blocks_are_committed_whole_and_refilled_only_then() -> None:
    watched = Watched(tiny_model("llama"))
    run(watched, length=16, window=4, entropy_threshold=2.4, refill="block")
    assert watched.commits == [4, 4, 4]
    for tree in watched.trees:
        assert len(tree) == 4


@settings(max_examples=25, deadline=None)
@given(
    window=st.integers(1, 9),
    threshold=st.sampled_from(["none", 0.0, 1.0, 2.0, 3.0, math.inf]),
    penalty=st.sampled_from([0.0, 0.02, 0.5]),
    length=st.integers(1, 24),
    refill=st.sampled_from(["before", "after", "block"]),
)
def test_counts_add_up(
    window: int, threshold: Any, penalty: float, length: int, refill: Refill
) -> None:
    found = run(
        tiny_model("llama"),
        length=length,
        window=window,
        entropy_threshold=threshold,
        distance_penalty=penalty,
        refill=refill,
    )
    trace, notes = found.trace, found.trace.notes
    assert len(found.token_ids) == length
    assert HOLE not in found.token_ids
    assert sum(count + 1 for count in trace.accepted) == length
    assert notes["slots"] == sum(forward.width for forward in trace.forwards)
    assert notes["slots_per_token"] == pytest.approx(notes["slots"] / length)
    # A mask and a token: whatever is cached has been fed twice.
    assert notes["cached_tokens"] <= notes["slots"] / 2  # type: ignore[operator]  # both are numbers
    most = window if refill != "before" else 2 * window
    assert max(forward.width for forward in trace.forwards) <= most
    assert all(-1 <= count < window for count in trace.accepted)
    contexts = [forward.context for forward in trace.forwards]
    assert contexts == sorted(contexts)
    assert contexts[0] == len(PROMPT)


@torch.no_grad()
@pytest.mark.parametrize("block", [4, 16])
def test_the_first_window_is_what_training_shows_a_block_that_is_all_masked(block: int) -> None:
    torch.manual_seed(0)
    module = new_module().eval()
    sharpen(module, 4)
    width = PROMPT_LENGTH + 2 * block
    ids = torch.randint(3, len(VOCABULARY), (1, width))
    masks = torch.full((1, block), MASK)
    # The memory of the two blocks, the first of them observed, the second all masked.
    joined = torch.cat([ids, ids[:, PROMPT_LENGTH : width - block], masks], dim=1)
    positions = torch.cat([torch.arange(width), torch.arange(PROMPT_LENGTH, width)])[None]
    trained = module(
        input_ids=joined,
        position_ids=positions,
        attention_mask=dual_stream_mask(ids, PROMPT_LENGTH, block),
        use_cache=False,
    ).logits[0, -block:]
    session = CausalLM(module, NumberTokenizer(), "twin", kernels="transformers").session(200)
    session.prefill(ids[0, : width - block].tolist())
    window = [NOT_FILLED] * block
    logits = session.verify(window_tree(window, reorder(window), MASK))
    torch.testing.assert_close(logits, trained, atol=1e-5, rtol=1e-5)


# ---- texts with an end, and sampling


class Scripted(TableModel):
    """A model whose logits at a place depend on the place alone: what to write, and how surely."""

    def __init__(self, script: Mapping[int, tuple[int, float]], eos_id: int = 0) -> None:
        super().__init__(np.zeros((10, 10)), eos_ids=frozenset({eos_id}), name="scripted")
        self.script = script
        self.trees: list[DraftTree] = []

    def session(self, capacity: int) -> ScriptedSession:
        return ScriptedSession(self, capacity)


class ScriptedSession(TableSession):
    def __init__(self, model: Scripted, capacity: int) -> None:
        super().__init__(model, capacity)
        self._scripted = model

    def verify(self, tree: DraftTree) -> Tensor:
        self._waiting = None  # a window is read again as long as nothing of it can be committed
        super().verify(tree)
        self._scripted.trees.append(tree)
        logits = torch.zeros(len(tree), 10)
        for node, depth in enumerate(tree.topology.depths.tolist()):
            token, margin = self._scripted.script[self.length - 1 + depth]
            logits[node, token] = margin
        return logits


def states(model: Scripted) -> list[str]:
    """What each forward was fed, in physical order: token (`_` for a mask) @ slot."""
    return [
        " ".join(
            f"{'_' if token == 9 else token}@{slot}"
            for token, slot in zip(tree.tokens, tree.topology.depths, strict=True)
        )
        for tree in model.trees
    ]


def test_a_known_schedule_is_followed_step_by_step() -> None:
    script = {0: (1, SURE), 1: (2, UNSURE), 2: (3, SURE), 3: (4, SURE), 4: (5, SURE), 5: (6, SURE)}
    model = Scripted(script)
    found = decode(
        model,
        Decoding(max_new_tokens=6),
        [7],
        mask_id=9,
        window=3,
        entropy_threshold=0.5,
        distance_penalty=0.0,
    )
    assert found.token_ids == (1, 2, 3, 4, 5, 6)
    assert states(model) == [
        "_@0 _@1 _@2",  # fills 0 and 2
        "1@0 3@2 _@1 _@3",  # commits 0, fills 3, not yet 1: something else is sure
        "3@1 4@2 _@0",  # fills 1 for want of another
        "2@0 3@1 4@2 _@3 _@4",  # commits three and fills the rest
    ]
    assert found.trace.accepted == [0, -1, 2, 1]


def test_an_end_behind_a_gap_is_no_end_until_the_gap_is_filled() -> None:
    # Place 2 is end-of-text from the start, place 1 is filled last, place 3 in vain.
    script = {0: (1, SURE), 1: (2, UNSURE), 2: (0, SURE), 3: (4, SURE), 4: (5, 0.1), 5: (5, 0.1)}
    model = Scripted(script)
    found = decode(
        model,
        Decoding(max_new_tokens=6),
        [7],
        mask_id=9,
        window=4,
        entropy_threshold=0.5,
        distance_penalty=1.0,
    )
    assert (found.token_ids, found.finish) == ((1, 2, 0), "eos")
    assert len(model.trees) > 1
    assert sum(count + 1 for count in found.trace.accepted) == 3


def test_texts_end_like_those_of_every_other_method() -> None:
    model = tiny_model("llama")
    free = run(model, window=4, entropy_threshold=2.0)
    stop = NumberTokenizer().decode(free.token_ids[4:6])
    for decoding in (
        Decoding(max_new_tokens=1),
        Decoding(max_new_tokens=LENGTH, stop=(stop,)),
        Decoding(max_new_tokens=LENGTH),
    ):
        found = decode(model, decoding, window=4, entropy_threshold=2.0)
        stopper = Stopper(model.tokenizer, decoding, model.facts.eos_ids)
        assert (len(found.token_ids), found.finish) == stopper.find(found.token_ids)
        assert found.text == stopper.text(found.token_ids)
        assert found.token_ids == free.token_ids[: len(found.token_ids)]


def test_sampling_draws_from_the_cut_distribution_of_every_mask() -> None:
    # One mask a text, of known logits: log-odds 2 to 1 to 0 between three tokens.
    class Skewed(ScriptedSession):
        def verify(self, tree: DraftTree) -> Tensor:
            logits = torch.full((len(tree), 10), -20.0)
            logits[:, [3, 4, 5]] = torch.tensor([2.0, 1.0, 0.0])
            logits[:, 9] = 30.0  # the mask itself, which is no token of a text
            return logits

    class Model(Scripted):
        def session(self, capacity: int) -> ScriptedSession:
            return Skewed(self, capacity)

    counts = {
        top_k: np.bincount(
            [
                decode(
                    Model({}),
                    Decoding(max_new_tokens=1, temperature=0.5, seed=seed),
                    [7],
                    mask_id=9,
                    top_k=top_k,
                ).token_ids[0]
                for seed in range(400)
            ],
            minlength=10,
        )
        for top_k in (0, 2)
    }
    weights = np.exp(np.array([4.0, 2.0, 0.0]))
    expected = 400 * weights / weights.sum()
    assert scipy.stats.chisquare(counts[0][[3, 4, 5]], expected).pvalue > 1e-3
    assert counts[2][5] == 0
    assert counts[2][4] > 0
    assert counts[0][9] == 0


# ---- settings and models


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"window": 0}, "window must be a whole number from 1 to 512"),
        ({"entropy_threshold": -0.1}, "entropy_threshold must be 'none' or 0 or more"),
        ({"entropy_threshold": math.nan}, "entropy_threshold must be"),
        ({"distance_penalty": -1.0}, "distance_penalty must be 0 or more"),
        ({"refill": "never"}, "refill must be one of before, after, block"),
        ({"top_k": -1}, "top_k must be"),
        ({"top_p": 0.0}, "top_p must lie in"),
        ({"mask_id": -5}, "mask_id must be"),
    ],
)
def test_impossible_settings_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeDLM(**parameters)


def test_models_without_a_mask_or_with_too_few_tokens_are_refused_with_the_reason() -> None:
    model = tiny_model("llama")
    for parameters, message in (
        ({"mask_id": "auto"}, "names a mask token"),
        ({"mask_id": 97}, "has only 97"),
    ):
        with pytest.raises(Unsupported, match=message), WeDLM(**parameters).apply(model, PROFILE):  # type: ignore[arg-type]  # of two types
            pass
    with pytest.raises(ValueError, match="holds the mask"):
        run(model, prompt=[4, HOLE, 5])


def test_the_mask_is_found_in_the_tokenizer_or_in_the_configuration() -> None:
    class Named(NumberTokenizer):
        hub = type("Hub", (), {"mask_token_id": 42})

    module = tiny_model("llama").module
    assert mask_token_of(CausalLM(module, NumberTokenizer(), "plain")) is None
    assert mask_token_of(CausalLM(module, Named(), "named")) == 42
    module.config.mask_token_id = 43
    try:
        assert mask_token_of(CausalLM(module, NumberTokenizer(), "configured")) == 43
        assert mask_token_of(CausalLM(module, Named(), "both")) == 42
    finally:
        del module.config.mask_token_id
