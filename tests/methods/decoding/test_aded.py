"""ADED: its search against slow versions, its budget, and what it gives on known targets."""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.profile import Profile, StepCost
from methods.base import Output
from methods.decoding.aded import (
    CPU_NODES,
    PUBLISHED_NODES,
    Aded,
    AdedDrafter,
    accept_by_paths,
    expected_tokens_with,
    nucleus,
)
from methods.decoding.common_ngram_search import (
    Mode,
    Node,
    Pair,
    Search,
    SearchSettings,
    best_first_tree,
    drafted_sequences,
    exploration,
    find_draft,
    greedy_chain,
    modelled_tokens,
    monte_carlo_search,
    most_visited,
    released_trie,
    trie_within_budget,
)
from methods.decoding.common_ngrams import TrigramStore, TrigramTable
from models.base import Decoding, Generation, TextGenerator
from models.decode import accept_sampled, decode
from models.draft_tree import DraftTree
from tests.models.tiny import tiny_model
from tests.models.toy import TableModel, cycle_table, distribution, random_table, total_variation

CPU = Profile(name="test", kind="cpu", label="test")
GPU = Profile(name="test", kind="cuda", label="test")
Rows = Mapping[Pair, Mapping[int, float]]
SEARCHES: tuple[Search, ...] = ("mcts", "best_first", "greedy_chain")
MODES: tuple[Mode, ...] = ("paper", "released")


def store_of(rows: Rows, vocab_size: int = 10) -> TrigramStore:
    """Return a store with exactly these weights."""
    pairs = sorted(rows)
    ordered = [sorted(rows[pair].items(), key=lambda item: (-item[1], item[0])) for pair in pairs]
    return TrigramStore(
        TrigramTable(
            np.array([first * vocab_size + second for first, second in pairs], dtype=np.int64),
            np.cumsum([0, *map(len, ordered)]).astype(np.int64),
            np.array([token for row in ordered for token, _ in row], dtype=np.int32),
            np.array([weight for row in ordered for _, weight in row], dtype=np.float32),
            vocab_size,
        ),
        top=32,
    )


def random_rows(seed: int, vocab_size: int = 6, known: float = 0.8) -> dict[Pair, dict[int, float]]:
    """Return rows with few successors, some pairs unknown, some weights above 1 or equal."""
    rng = random.Random(seed)
    rows = {}
    for pair in itertools.product(range(vocab_size), repeat=2):
        if rng.random() < known:
            tokens = rng.sample(range(vocab_size), rng.randint(1, 4))
            rows[pair] = {token: rng.choice((0.125, 0.25, 0.3, 0.7, 1.5)) for token in tokens}
    return rows


# --- the search -----------------------------------------------------------------------------------


class SlowSearch:
    """The search of the card, from dictionaries keyed by the whole path, every score anew."""

    def __init__(self, store: TrigramStore, root: Pair, mode: Mode, c1: float, c2: float) -> None:
        self.store, self.root, self.mode, self.c1, self.c2 = store, root, mode, c1, c2
        self.visits: dict[tuple[int, ...], int] = defaultdict(int)
        self.totals: dict[tuple[int, ...], float] = defaultdict(float)
        self.expanded: set[tuple[int, ...]] = set()

    def state(self, path: tuple[int, ...]) -> Pair:
        text = (*self.root, *path)
        return text[-2], text[-1]

    def successors(self, path: tuple[int, ...]) -> list[tuple[int, float]]:
        row = self.store.row(*self.state(path))
        if row is None:
            return []
        found = list(zip(row.tokens, row.weights, strict=True))
        return found[::-1] if self.mode == "released" else found

    def puct(self, parent: tuple[int, ...], token: int) -> float:
        child = (*parent, token)
        if not self.visits[child]:
            return math.inf
        weights = dict(self.successors(parent))
        share = 1.0 if self.mode == "released" else 1 / sum(weights.values())
        n = self.visits[parent]
        e = self.c1 + math.log((n + self.c2 + 1) / self.c2)
        return self.totals[child] / self.visits[child] + e * weights[token] * share * math.sqrt(
            n
        ) / (1 + self.visits[child])

    def value(self, path: tuple[int, ...]) -> float:
        total = 1.0
        for at, token in enumerate(path):
            state = self.state(path[:at])
            total += self.store.weight(*state, state[1] if self.mode == "released" else token)
        return total

    def run(self, iterations: int, length: int, draws: random.Random) -> None:
        for _ in range(iterations):
            path: tuple[int, ...] = ()
            while path in self.expanded and 1 + len(path) < length:
                tokens = [token for token, _ in self.successors(path)]
                path = (*path, max(tokens, key=lambda token: self.puct(path, token)))
            visited = path
            if 1 + len(path) < length and self.successors(path):
                self.expanded.add(path)
                visited = path = (*path, self.successors(path)[0][0])
                while 1 + len(path) < length:
                    row = self.store.row(*self.state(path))
                    if row is None:
                        break
                    level, at = draws.random() * sum(row.weights), 0
                    while sum(row.weights[: at + 1]) < level:
                        at += 1
                    path = (*path, row.tokens[at])
            value = self.value(path)
            for end in range(len(visited) + 1):
                self.visits[visited[:end]] += 1
                self.totals[visited[:end]] += value

    def prefixes(self, count: int) -> list[tuple[int, tuple[int, ...]]]:
        created = {()} | {
            (*path, token) for path in self.expanded for token, _ in self.successors(path)
        }

        def places(path: tuple[int, ...]) -> list[int]:
            return [
                [token for token, _ in self.successors(path[:at])].index(path[at])
                for at in range(len(path))
            ]

        ordered = sorted(created, key=lambda p: (-self.visits[p], len(p), places(p)))
        return [(self.visits[path], path) for path in ordered[:count]]


def paths_below(node: Node, path: tuple[int, ...] = ()) -> Iterable[tuple[tuple[int, ...], Node]]:
    yield path, node
    for index, token in enumerate(node.tokens):
        child = node.children[index]
        if child is not None:
            yield from paths_below(child, (*path, token))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(12))
def test_the_search_is_that_of_the_slow_version(seed: int, mode: Mode) -> None:
    store = store_of(random_rows(seed))
    length, c1 = 2 + seed % 4, (32.0, 2.0, 0.1)[seed % 3]
    slow = SlowSearch(store, (1, 2), mode, c1, 8.0)
    slow.run(80, length, random.Random(seed))
    tree = monte_carlo_search(
        store, (1, 2), random.Random(seed), iterations=80, length=length, c1=c1, mode=mode
    )
    found = dict(paths_below(tree))
    assert {path: node.visits for path, node in found.items()} == {
        path: visits for path, visits in slow.visits.items() if visits
    }
    for path, node in found.items():
        for index, token in enumerate(node.tokens):
            assert node.totals[index] == pytest.approx(slow.totals[*path, token], abs=1e-9)
    assert [(p.visits, p.tokens) for p in most_visited(tree, 24)] == slow.prefixes(24)


def test_puct_is_that_of_the_formula() -> None:
    node = Node((1, 2), 1)
    node.expand([3, 4, 5], [0.6, 0.3, 0.1], [0.6, 0.3, 0.1])
    node.visits = 5
    for index, values in enumerate([(1.6, 1.8, 1.4), (1.3,), (1.1,)]):
        for value in values:
            node.record(index, value)
    e = 32 + math.log((5 + 8 + 1) / 8)
    assert exploration(5, 32, 8) == e
    assert node.scores(e * math.sqrt(5)) == pytest.approx(
        [
            1.6 + e * 0.6 * math.sqrt(5) / 4,
            1.3 + e * 0.3 * math.sqrt(5) / 2,
            1.1 + e * 0.1 * math.sqrt(5) / 2,
        ]
    )


def test_unvisited_children_come_first_the_likeliest_of_them_before_the_others() -> None:
    store = store_of({(0, 1): {3: 0.1, 4: 0.7, 5: 0.2}})
    for iterations, counts in ((1, [1, 0, 0]), (2, [1, 1, 0]), (3, [1, 1, 1])):
        tree = monte_carlo_search(store, (0, 1), random.Random(0), iterations=iterations, length=2)
        assert tree.tokens == [4, 5, 3]
        assert tree.counts == counts


def test_exploration_alone_visits_by_the_priors() -> None:
    store = store_of({(0, 1): {3: 0.5, 4: 0.25, 5: 0.15, 6: 0.1}})
    tree = monte_carlo_search(store, (0, 1), random.Random(0), iterations=4000, length=2, c1=1e9)
    shares = np.array(tree.counts) / 4000
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.15, 0.1], rtol=0.05)


def test_of_equal_priors_the_best_value_is_visited_most() -> None:
    store = store_of(
        {(0, 1): {2: 0.5, 3: 0.5, 4: 0.5}, (1, 2): {5: 0.2}, (1, 3): {5: 2.5}, (1, 4): {5: 1.0}}
    )
    tree = monte_carlo_search(store, (0, 1), random.Random(0), length=3, c1=0.0)
    visits = dict(zip(tree.tokens, tree.counts, strict=True))
    assert visits[3] > visits[4] > visits[2]
    assert sum(visits.values()) == 150


@pytest.mark.parametrize("mode", MODES)
@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(2, 6))
def test_visits_add_up_and_every_prefix_is_known(
    mode: Mode, seed: int, iterations: int, length: int
) -> None:
    store = store_of(random_rows(seed))
    tree = monte_carlo_search(
        store, (1, 2), random.Random(seed), iterations=iterations, length=length, mode=mode
    )
    assert tree.visits == iterations
    for _, node in paths_below(tree):
        assert node.length <= length
        if node.tokens:
            assert node.visits >= sum(node.counts)
    prefixes = most_visited(tree, 24)
    visits = [prefix.visits for prefix in prefixes]
    assert visits == sorted(visits, reverse=True)
    assert len(prefixes) <= 24
    assert len({prefix.tokens for prefix in prefixes}) == len(prefixes)
    for prefix in prefixes:
        text = (1, 2, *prefix.tokens)
        assert prefix.pair == text[-2:]
        assert len(prefix.tokens) < length
        for at, token in enumerate(prefix.tokens):
            assert store.weight(text[at], text[at + 1], token) > 0


def test_the_released_value_looks_up_the_older_token_and_so_hardly_varies() -> None:
    rows = {(0, 1): {2: 0.9, 3: 0.1}, (1, 2): {4: 0.9}, (1, 3): {4: 0.1}}
    tree = monte_carlo_search(store_of(rows), (0, 1), random.Random(0), length=3, mode="released")
    assert tree.totals == pytest.approx(tree.counts)  # every value is 1
    rows[0, 1] = {2: 0.9, 1: 0.1}  # now the older token may follow again
    tree = monte_carlo_search(store_of(rows), (0, 1), random.Random(0), length=2, mode="released")
    assert tree.totals == pytest.approx([1.1 * count for count in tree.counts])


# --- extraction, trie and budget ------------------------------------------------------------------


def test_prefixes_are_extended_by_the_heaviest_token_and_the_root_gives_one_draft() -> None:
    store = store_of({(0, 1): {2: 0.9, 3: 0.1}, (1, 2): {4: 0.5, 5: 0.3}, (2, 4): {6: 1.0}})
    tree = monte_carlo_search(store, (0, 1), random.Random(0), length=3)
    prefixes = most_visited(tree, 4)
    assert [prefix.tokens for prefix in prefixes] == [(), (2,), (2, 4), (2, 5)]
    assert drafted_sequences(store, prefixes) == [(2,), (2, 4), (2, 4, 6), (2, 5)]


def test_the_least_visited_drafts_are_dropped_first() -> None:
    sequences = [(2,), (2, 4), (2, 4, 6), (3, 1), (2, 5)]
    assert trie_within_budget(1, sequences, 3).tokens.tolist() == [1, 2, 4, 6]
    tree = trie_within_budget(1, sequences, 4)
    assert tree.tokens.tolist() == [1, 2, 4, 6, 3]
    assert len(trie_within_budget(1, sequences, 64)) == 7


def test_the_released_cut_drops_the_longest_sequences_though_they_would_fit() -> None:
    sequences = [(2,), (2, 4), (2, 4, 6), (2, 4, 6, 6), (3, 1)]
    # Distinct tokens, path by path: 1 + 2 + 3 + 3 + 2 = 11, of a trie of 6 drafts.
    assert len(released_trie(1, sequences, 11)) == 7
    tree = released_trie(1, sequences, 10)
    assert sorted(tree.tokens[1:].tolist()) == [1, 2, 3, 4, 6, 6]
    assert tree.topology.max_depth == 4  # the first of the equally long ones went
    assert released_trie(1, sequences, 5).topology.max_depth == 2
    assert released_trie(1, [(2, 2, 2)], 2).tokens.tolist() == [1, 2, 2]  # breadth first


@given(
    st.integers(0, 10_000),
    st.integers(0, 20),
    st.integers(0, 6),
    st.sampled_from(SEARCHES),
    st.sampled_from(MODES),
)
def test_a_draft_keeps_its_budget_and_its_siblings_differ(
    seed: int, nodes: int, depth: int, search: Search, mode: Mode
) -> None:
    found = find_draft(
        store_of(random_rows(seed)),
        (1, 2),
        settings_of(search=search, mode=mode, tree_nodes=nodes, iterations=30),
        random.Random(seed),
        depth,
    )
    topology = found.topology
    assert found.tokens[0] == 2
    assert len(found) <= nodes + 1
    assert topology.max_depth <= min(depth, 4)
    for children in topology.children:
        tokens = [int(found.tokens[child]) for child in children]
        assert len(tokens) == len(set(tokens))


def settings_of(**changes: object) -> SearchSettings:
    chosen = {
        "search": "mcts",
        "mode": "paper",
        "tree_nodes": 64,
        "iterations": 150,
        "length": 4,
        "top_k": 24,
        "c1": 32.0,
        "c2": 8.0,
        **changes,
    }
    return SearchSettings(**chosen)  # type: ignore[arg-type]  # as in the class


def test_without_tri_grams_nothing_is_drafted_but_by_the_released_code() -> None:
    store, draws = store_of({}), random.Random(0)
    for search in SEARCHES:
        assert len(find_draft(store, (1, 2), settings_of(search=search), draws, 4)) == 1
    released = find_draft(store, (1, 2), settings_of(mode="released"), draws, 4)
    assert released.tokens.tolist() == [2, 0]


# --- the drafters compared ------------------------------------------------------------------------


def best_of_all_trees(store: TrigramStore, root: Pair, nodes: int, depth: int) -> float:
    """Return the most tokens that any tree of `nodes` drafts models, by enumeration."""
    best = 1.0

    def successors(path: tuple[int, ...]) -> list[tuple[int, float]]:
        text = (*root, *path)
        row = store.row(text[-2], text[-1]) if len(path) < depth else None
        return [] if row is None else list(zip(row.tokens, row.priors, strict=True))

    def grow(tokens: float, left: int, frontier: list[tuple[tuple[int, ...], float]]) -> None:
        nonlocal best
        best = max(best, tokens)
        # Each tree is met once: what was passed over stays out.
        for at, (path, share) in enumerate(frontier) if left else ():
            below = [((*path, token), share * p) for token, p in successors(path)]
            grow(tokens + share, left - 1, frontier[at + 1 :] + below)

    grow(1.0, nodes, [((token,), p) for token, p in successors(())])
    return best


@pytest.mark.parametrize("seed", range(8))
def test_best_first_expects_as_much_as_the_best_of_all_trees(seed: int) -> None:
    store = store_of(random_rows(seed, 4), 4)
    for nodes in range(7):
        tree = best_first_tree(store, (1, 2), nodes, 4)
        best = best_of_all_trees(store, (1, 2), nodes, 4)
        assert modelled_tokens(store, (1, 2), tree) == pytest.approx(best)


def test_the_search_finds_the_best_tree_of_a_decided_table() -> None:
    weights = (0.7, 0.2, 0.08, 0.02)
    rows = {
        (u, v): {(u + v + rank) % 4: weight for rank, weight in enumerate(weights)}
        for u in range(4)
        for v in range(4)
    }
    store = store_of(rows, 4)
    for nodes in range(1, 7):
        tree = find_draft(store, (1, 2), settings_of(tree_nodes=nodes), random.Random(0), 4)
        best = best_of_all_trees(store, (1, 2), nodes, 4)
        assert modelled_tokens(store, (1, 2), tree) == pytest.approx(best)


@given(st.integers(0, 10_000), st.integers(1, 20), st.sampled_from(MODES))
@settings(max_examples=50)
def test_no_search_expects_more_than_best_first(seed: int, nodes: int, mode: Mode) -> None:
    store = store_of(random_rows(seed))
    best = modelled_tokens(store, (1, 2), best_first_tree(store, (1, 2), nodes, 4))
    for search in ("mcts", "greedy_chain"):
        chosen = settings_of(search=search, mode=mode, tree_nodes=nodes)
        tree = find_draft(store, (1, 2), chosen, random.Random(seed), 4)
        assert modelled_tokens(store, (1, 2), tree) <= best + 1e-9


def test_the_chain_follows_the_heaviest_successors() -> None:
    store = store_of({(0, 1): {2: 0.4, 3: 0.6}, (1, 3): {4: 1.0}, (3, 4): {5: 0.1}})
    assert greedy_chain(store, (0, 1), 2).tokens.tolist() == [1, 3, 4]
    assert greedy_chain(store, (0, 1), 8).tokens.tolist() == [1, 3, 4, 5]
    assert modelled_tokens(store, (0, 1), greedy_chain(store, (0, 1), 3)) == pytest.approx(2.8)


# --- the text stays the model's -------------------------------------------------------------------


def generate(
    method: Aded, model: TextGenerator, prompt: Sequence[int], length: int, **options: object
) -> Generation:
    decoding = Decoding(max_new_tokens=length, **options)  # type: ignore[arg-type]  # as there
    with method.apply(model, CPU) as changed:
        return changed.generate(prompt, decoding)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "method",
    [
        Aded(),
        Aded(mode="released", state="session"),
        Aded(search="best_first", tree_nodes=12, prompt_update=True),
        Aded(search="greedy_chain"),
        Aded(reference_compatible=True),
    ],
    ids=["default", "released", "best-first", "chain", "reference"],
)
def test_greedy_texts_are_the_models_own(architecture: str, method: Aded) -> None:
    model = tiny_model(architecture)
    for prompt in ([5, 17, 3, 88, 41, 5, 17, 3, 88], [7] * 8):
        plain = model.generate(prompt, Decoding(max_new_tokens=40, ignore_eos=True))
        found = generate(method, model, prompt, 40, ignore_eos=True)
        assert found.token_ids == plain.token_ids
        assert any(forward.width > 1 for forward in found.trace.forwards)


@pytest.mark.parametrize("kind", ["empty", "random", "adversarial"])
def test_whatever_the_store_holds_the_text_stays(kind: str) -> None:
    model = TableModel(random_table(8, 2, seed=4))
    plain = decode(model, [3, 1], Decoding(max_new_tokens=40))
    rows = {} if kind == "empty" else random_rows(3, 8, 1.0)
    if kind == "adversarial":  # always the second best
        rows = {
            (u, v): {int(model.table[u, v].argsort(descending=True)[1]): 3.0}
            for u in range(8)
            for v in range(8)
        }
    store = store_of(rows, 8)
    store.freeze()
    drafter = AdedDrafter(
        store, settings_of(), window=16, adaptive=True, prompt_update=False, seed=0
    )
    found = decode(model, [3, 1], Decoding(max_new_tokens=40), drafter)
    assert found.token_ids == plain.token_ids
    if kind == "adversarial":
        assert sum(found.trace.accepted) == 0
        assert all(forward.width > 1 for forward in found.trace.forwards[:-1])


def test_a_text_that_the_store_knows_is_accepted_to_full_depth() -> None:
    model = TableModel(cycle_table(11, 12))
    rows = {(u, (u + 1) % 11): {(u + 2) % 11: 1.0} for u in range(11)}
    drafter = AdedDrafter(
        store_of(rows, 12), settings_of(), window=16, adaptive=True, prompt_update=False, seed=0
    )
    found = decode(model, [0], Decoding(max_new_tokens=61), drafter)
    assert set(found.trace.accepted) == {4}  # five tokens a forward
    assert len(found.token_ids) == 61


@pytest.mark.parametrize("length", range(1, 12))
def test_limits_and_ends_inside_a_draft_are_kept(length: int) -> None:
    model = TableModel(cycle_table(5, 12), eos_ids=frozenset({4}), max_positions=2 + length)
    method = Aded(state="session", search="best_first")
    generate(method, TableModel(cycle_table(5, 12)), [0, 1], 20)
    for prompt in ([1, 2], [3, 0], [2]):
        plain = decode(model, prompt, Decoding(max_new_tokens=length))
        found = generate(method, model, prompt, length)
        assert (found.token_ids, found.finish) == (plain.token_ids, plain.finish)


def test_an_adaptive_store_drafts_a_text_that_comes_again_and_a_frozen_one_does_not() -> None:
    model = TableModel(cycle_table(40))
    for adaptive, more in ((True, True), (False, False)):
        method = Aded(state="session", adaptive=adaptive)
        first, second = (generate(method, model, [0], 39) for _ in range(2))
        assert first.token_ids == second.token_ids
        assert (sum(second.trace.accepted) > sum(first.trace.accepted)) is more
        assert sum(first.trace.accepted) == 0


def test_before_each_draft_the_last_window_is_learned() -> None:
    model = TableModel(cycle_table(30))
    method = Aded(state="session", window=4)
    found = generate(method, model, list(range(10)), 5)
    assert len(found.trace.forwards) == 4
    store = method.state_for(model, lambda: pytest.fail("the state was not kept"))
    # The first draft sees tokens 7 to 10, the last one 10 to 13: a triple stays for two of them.
    weights = [store.weight(at, at + 1, at + 2) for at in range(13)]
    expected = [0] * 7 + [1, 2, 2, 2, 1, 0]
    assert weights == pytest.approx([0.04 * count for count in expected])


def test_the_whole_prompt_is_learned_if_so_set() -> None:
    model = TableModel(cycle_table(30))
    method = Aded(state="session", window=4, prompt_update=True)
    generate(method, model, list(range(10)), 1)
    store = method.state_for(model, lambda: pytest.fail("the state was not kept"))
    weights = [store.weight(at, at + 1, at + 2) for at in range(9)]
    # The window moves on token by token, and the last triple has been in it once.
    assert weights == pytest.approx([0.08] * 7 + [0.04, 0])


def test_cold_texts_do_not_depend_on_those_before() -> None:
    model = TableModel(random_table(8, 2, seed=8, spread=3))

    def accepted(order: Sequence[int], **options: object) -> dict[int, list[int]]:
        method = Aded(**options)  # type: ignore[arg-type]  # as there
        return {start: generate(method, model, [start, 1], 40).trace.accepted for start in order}

    assert accepted([1, 5, 7]) == accepted([7, 5, 1])
    assert accepted([1, 5, 7], state="session") != accepted([7, 5, 1], state="session")


def test_the_same_seed_gives_the_same_drafts_and_another_one_others() -> None:
    def drafts(seed: int) -> list[list[int]]:
        chosen = settings_of(tree_nodes=6, iterations=20, c1=0.1)
        store = store_of(random_rows(1, known=1.0))
        drafter = AdedDrafter(
            store, chosen, window=16, adaptive=False, prompt_update=False, seed=seed
        )
        return [drafter.draft([u, v], 4).tokens.tolist() for u in range(6) for v in range(6)]

    assert drafts(1) == drafts(1)
    assert drafts(1) != drafts(2)


# --- sampling -------------------------------------------------------------------------------------

TARGET = torch.tensor([[0.5, 0.2, 0.1, 0.15, 0.05]]).log()


@pytest.mark.parametrize("options", [{}, {"search": "best_first"}, {"mode": "released"}])
def test_sampling_keeps_the_models_distribution(options: dict[str, str]) -> None:
    model = TableModel(random_table(5, 2, seed=6))
    method = Aded(tree_nodes=6, state="session", iterations=20, **options)  # type: ignore[arg-type]
    generate(method, model, [0, 1, 2, 3] * 4, 20)
    decoding = Decoding(max_new_tokens=3, temperature=0.8)
    store = method.state_for(model, lambda: pytest.fail("the state was not kept"))

    def run(draws: object) -> tuple[int, ...]:
        drafter = AdedDrafter(
            store.snapshot(),
            method.search_settings(CPU),
            window=16,
            adaptive=True,
            prompt_update=False,
            seed=0,
        )
        return decode(model, [0, 1], decoding, drafter, draws=draws).token_ids  # type: ignore[arg-type]

    found = distribution(run)
    expected = {text: model.probability([0, 1], text, 0.8) for text in np.ndindex(5, 5, 5)}
    assert total_variation(found, expected) < 1e-6


def first_token(tree: DraftTree, rule: object) -> dict[int, float]:
    """Return the exact distribution of the first token that a rule emits."""
    probabilities = torch.softmax(TARGET[0], -1)

    def run(draws: object) -> int:
        accepted = rule(tree, lambda node: probabilities, draws)  # type: ignore[operator]
        return int([*tree.tokens[accepted.path[1:]].tolist(), accepted.bonus][0])

    return distribution(run)


def test_a_draw_for_each_path_prefers_drafts_and_one_for_each_node_does_not() -> None:
    tree = DraftTree.from_sequences(0, [(1,), (2,)])
    p = torch.softmax(TARGET[0], -1).tolist()
    exact = first_token(tree, accept_sampled)
    assert total_variation(exact, dict(enumerate(p))) < 1e-6
    found = first_token(tree, lambda *a: accept_by_paths(*a, top_p=1.0))
    a, b = p[1], p[2]
    neither = (1 - a) * (1 - b)
    assert found[1] == pytest.approx(a + neither * a, abs=1e-6)
    assert found[2] == pytest.approx((1 - a) * b + neither * b, abs=1e-6)
    assert total_variation(found, dict(enumerate(p))) > 0.1


def test_the_longest_agreeing_path_wins_and_each_path_has_its_own_draws() -> None:
    tree = DraftTree.from_sequences(0, [(1, 2), (1, 3)])
    p = torch.softmax(TARGET[0], -1).tolist()

    def run(draws: object) -> tuple[int, ...]:
        probabilities = torch.softmax(TARGET[0], -1)
        return tuple(accept_by_paths(tree, lambda node: probabilities, draws, 1.0).path)  # type: ignore[arg-type]

    found = distribution(run)
    assert found[0, 1, 2] == pytest.approx(p[1] * p[2], abs=1e-6)
    assert found[0, 1, 3] == pytest.approx((1 - p[1] * p[2]) * p[1] * p[3], abs=1e-6)


def test_the_nucleus_is_the_smallest_set_that_reaches_the_share() -> None:
    probabilities = torch.tensor([0.1, 0.5, 0.15, 0.25])
    assert nucleus(probabilities, 0.8).nonzero()[:, 0].tolist() == [1, 2, 3]
    assert nucleus(probabilities, 0.75).nonzero()[:, 0].tolist() == [1, 3]
    assert nucleus(probabilities, 0.3).nonzero()[:, 0].tolist() == [1]
    assert torch.equal(nucleus(probabilities, 1.0), probabilities)


def test_the_released_sampling_promises_nothing_and_is_what_runs() -> None:
    assert Aded().declared_output(0.8) is Output.SAME_DISTRIBUTION
    assert Aded(mode="released").declared_output(0.8) is Output.SAME_DISTRIBUTION
    released = Aded(reference_compatible=True)
    assert released.declared_output(0.0) is Output.IDENTICAL
    assert released.declared_output(0.8) is Output.APPROXIMATE
    model = TableModel(random_table(6, seed=1))
    texts = {
        method: [
            generate(method, model, [1, 2, 1, 2], 12, temperature=0.8, seed=seed).token_ids
            for seed in range(6)
        ]
        for method in (Aded(), released)
    }
    assert texts[Aded()] == [
        decode(
            model, [1, 2, 1, 2], Decoding(max_new_tokens=12, temperature=0.8, seed=seed)
        ).token_ids
        for seed in range(6)
    ]
    assert texts[released] != texts[Aded()]


# --- the size of the tree, notes, settings --------------------------------------------------------


def test_auto_takes_the_size_that_the_measured_cost_favours() -> None:
    sizes = []
    for per_node in (0.0, 0.002, 0.02, 0.1, 2.0):
        cost = StepCost((1, 101), (128,), ((1, 1 + 100 * per_node),))
        profile = Profile(name="test", kind="cpu", label="test", step_cost=cost)
        sizes.append(Aded(tree_nodes="auto").chosen_nodes(profile))
        rates = [
            expected_tokens_with(nodes) / cost.at(1 + round(0.8 * nodes), 128)
            for nodes in range(PUBLISHED_NODES + 1)
        ]
        assert sizes[-1] == int(np.argmax(rates))
    assert sizes[0] == PUBLISHED_NODES
    assert sizes[-1] == 0
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 3


def test_without_a_measured_cost_auto_knows_only_the_kind_of_device() -> None:
    assert Aded(tree_nodes="auto").chosen_nodes(GPU) == PUBLISHED_NODES
    assert Aded(tree_nodes="auto").chosen_nodes(CPU) == CPU_NODES


def test_a_larger_tree_is_expected_to_emit_more() -> None:
    expected = [expected_tokens_with(nodes) for nodes in range(PUBLISHED_NODES + 1)]
    assert expected[0] == 1
    assert (np.diff(expected) > 0).all()


def test_the_trace_tells_the_size_of_the_store() -> None:
    notes = generate(Aded(), TableModel(cycle_table(5)), [0, 1, 2], 9).trace.notes
    assert notes["tree_nodes"] == 64
    assert notes["state_entries"] == 5  # the five tri-grams of the cycle
    assert notes["state_bytes"] == 5 * 24 + 8
    assert 0 < notes["mean_drafts"] <= 4


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tree_nodes": 65}, "tree_nodes must be a whole number from 0 to 64, got 65"),
        ({"search": "mtcs"}, "search must be one of mcts, best_first, greedy_chain, got 'mtcs'"),
        ({"mode": "fixed"}, "mode must be one of paper, released"),
        ({"corpus": "stack"}, "corpus must be one of stdlib, none"),
        ({"successors": 33}, "successors must be a whole number from 1 to 32"),
        ({"window": 2}, "window must be a whole number from 3"),
        ({"iterations": 0}, "iterations must be a whole number from 1"),
        ({"length": 9}, "length must be a whole number from 2 to 8"),
        ({"increment": -0.1}, r"increment must lie in \[0, 1\], got -0.1"),
        ({"cap": True}, "cap must lie in"),
        ({"c2": 0}, "c2 must lie in"),
        ({"state": "warm"}, "state must be one of cold, session, hot"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Aded(**options)  # type: ignore[arg-type]  # what is tested
