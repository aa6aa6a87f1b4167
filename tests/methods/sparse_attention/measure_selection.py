"""Print how well positions persist over the layers of a model, and what reusing them costs.

Run `python -m tests.methods.sparse_attention.measure_selection [MODEL [PART ...]]`; parts are those
of `PARTS`, all of them when none is named. The text is documentation that comes with Python;
its last 256 tokens are graded, each with the selection of its own decoding step. One forward over
all of them gives what decoding them one by one gives (test_tidaldecode.py), in a hundredth of the
time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pydoc_data import topics

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from methods.sparse_attention.tidaldecode import (
    Share,
    TidalDecode,
    TidalRule,
    attend_masked,
    choose,
    votes,
)
from models.attention import AttentionLM, AttentionRule, LayerCache, Rule
from models.base import TextGenerator, TextModelFacts, Tokenizer
from models.draft_tree import DraftTree
from models.loading import load

TOKENS = 1536
GRADED = 256
# Sets shared by all heads, with the ends of the text in them.
SHARED = TidalDecode(share="all", protect_sink=4, protect_recent=16)


def documentation(tokenizer: Tokenizer) -> list[int]:
    """Return the ids of the second to the fifth longest topic of Python's help."""
    longest = sorted(topics.topics.values(), key=len, reverse=True)
    return tokenizer.encode("\n\n".join(longest[1:5]))[:TOKENS]


class SwitchedRule(Rule):
    """Attends as whichever rule stands in it."""

    chunk = 2048

    def __init__(self) -> None:
        self.inner: AttentionRule = Rule()

    def attend(self, layer: int, queries: Tensor, cache: LayerCache) -> Tensor:
        """Pass on."""
        return self.inner.attend(layer, queries, cache)


class OracleRule(Rule):
    """Every head of every layer from `first` on attends to its own best positions only."""

    def __init__(self, budget: int, first: int = 2) -> None:
        self.budget, self.first = budget, first

    def attend(self, layer: int, queries: Tensor, cache: LayerCache) -> Tensor:
        """Score everything, attend to the best."""
        if layer < self.first:
            return cache.attend(queries)
        return attend_masked(queries, cache, choose(cache.scores(queries), self.budget))


class WatchingRule(Rule):
    """Attends to everything, and notes what each layer would choose.

    Attributes:
        masks: Of each layer, (sets, width, length), bool.
    """

    def __init__(self, budget: int, share: Share, num_kv_heads: int) -> None:
        self.budget, self.share, self.num_kv_heads = budget, share, num_kv_heads
        self.masks: list[Tensor] = []

    def attend(self, layer: int, queries: Tensor, cache: LayerCache) -> Tensor:
        """Attend, and choose for nobody."""
        attended, scores = cache.attend_with_scores(queries)
        chosen = choose(votes(scores, self.num_kv_heads, self.share), self.budget)
        mask = torch.zeros(*chosen.shape[:2], cache.length, dtype=torch.bool)
        self.masks.append(mask.scatter_(2, chosen, True))
        return attended


class Reading:
    """A text whose last tokens are graded again and again, over one reading of all before them.

    Attributes:
        facts: Of the model.
    """

    def __init__(self, model: TextGenerator, token_ids: Sequence[int], graded: int) -> None:
        self.facts: TextModelFacts = model.facts
        self._rule = SwitchedRule()
        self._graded = list(token_ids[-graded:])
        prompt = list(token_ids[:-graded])
        # Drafts that are never committed leave the cache as it was.
        self._session = AttentionLM(model, lambda: self._rule).session(len(token_ids))
        self._first = self._session.prefill(prompt)

    def watch(self, rule: AttentionRule) -> Tensor:
        """Return the logits that predict each graded token, (graded, vocab)."""
        rule.begin(self.facts)
        self._rule.inner = rule
        fed = DraftTree.chain(self._graded[0], self._graded[1:-1])
        return torch.cat([self._first, self._session.verify(fed)])

    def loss(self, rule: AttentionRule) -> float:
        """Return the mean loss of the graded tokens, nats."""
        logits = self.watch(rule)
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(self._graded)))

    def tidal(self, settings: TidalDecode) -> float:
        """Return the mean loss under the method, nats."""
        return self.loss(TidalRule(settings))


def overlap(reading: Reading, budget: int, share: Share) -> npt.NDArray[np.float64]:
    """Return |P_l & P_m| / k of the layers' own choices, mean over sets and tokens."""
    rule = WatchingRule(budget, share, reading.facts.num_kv_heads)
    reading.watch(rule)
    layers = len(rule.masks)
    total, tokens = np.zeros((layers, layers)), rule.masks[0].shape[1]
    for start in range(0, tokens, 32):
        rows = torch.stack([mask[:, start : start + 32].flatten() for mask in rule.masks]).float()
        total += (rows @ rows.T).double().numpy()
    shares: npt.NDArray[np.float64] = total / total[0, 0]
    return shares


def persistence(matrix: npt.NDArray[np.float64], selections: Sequence[int]) -> float:
    """Return the mean recall of the sparse layers' own choices in what they are given."""
    given = [
        max(s for s in selections if s <= layer) for layer in range(selections[0], len(matrix))
    ]
    recalls = [
        matrix[selection, layer]
        for layer, selection in enumerate(given, selections[0])
        if layer not in selections
    ]
    return float(np.mean(recalls))


def print_overlap(reading: Reading) -> None:
    """TD-7: overlap of neighbours and of distant layers, recall with and without re-selection."""
    chance = TOKENS - GRADED / 2
    for share in ("per_head", "all"):
        for budget in (32, 128):
            matrix = overlap(reading, budget, share)
            layers = len(matrix)
            print(f"overlap, {share}, k={budget}; by chance {budget / chance:.2f}")
            for apart in (1, 2, 4, 8, 16):
                pairs = [matrix[n, n + apart] for n in range(2, layers - apart)]
                print(f"  {apart:2} layers apart: {np.mean(pairs):.3f}")
            alone = persistence(matrix, [2])
            with_one = {r: persistence(matrix, [2, r]) for r in range(4, layers - 1)}
            best = max(with_one, key=with_one.__getitem__)
            print(f"  recall: selected at 2 {alone:.3f}; again at 13 {with_one[13]:.3f}, ", end="")
            print(f"at 17 {with_one[17]:.3f}, at best ({best}) {with_one[best]:.3f}", flush=True)


def print_budgets(reading: Reading) -> None:
    """Loss against the budget, beside the oracle's."""
    print(f"full attention: {reading.loss(Rule()):.3f}")
    for budget in (16, 32, 64, 128, 256):
        found = {
            "oracle": reading.loss(OracleRule(budget)),
            "no re-selection": reading.tidal(TidalDecode(budget=budget, reselection="none")),
            "r=13": reading.tidal(TidalDecode(budget=budget, reselection=13)),
            "r=17": reading.tidal(TidalDecode(budget=budget, reselection=17)),
        }
        if budget > 20:
            found["shared, r=13"] = reading.tidal(replace(SHARED, budget=budget, reselection=13))
            found["shared, r=17"] = reading.tidal(replace(SHARED, budget=budget, reselection=17))
        line = ", ".join(f"{name} {loss:.3f}" for name, loss in found.items())
        print(f"k={budget}: {line}", flush=True)


def print_layers(reading: Reading) -> None:
    """TD-8: loss for every re-selection layer; the best one is what `auto` knows."""
    for name, settings in (("per head", TidalDecode()), ("shared, protected", SHARED)):
        for budget in (64, 256):
            losses = {
                layer: reading.tidal(replace(settings, budget=budget, reselection=layer))
                for layer in range(4, reading.facts.num_layers - 1)
            }
            best = min(losses, key=losses.__getitem__)
            line = " ".join(f"{layer}:{loss:.2f}" for layer, loss in losses.items())
            print(f"re-selection layer, {name}, k={budget}: best {best}; {line}", flush=True)


def print_selections(reading: Reading) -> None:
    """One to five selection layers where all read equally many rows, and where all have one k."""
    layers, length = reading.facts.num_layers, TOKENS - GRADED / 2
    several = ((), (17,), (9, 17), (7, 12, 17, 22))
    # As much as the five layers read with 32 tokens in the others.
    rows = 7 * length + (layers - 7) * 32
    for again in several:
        dense = 3 + len(again)
        equal = round((rows - dense * length) / (layers - dense))
        found = {
            budget: reading.tidal(replace(SHARED, budget=budget, reselection=again or "none"))
            for budget in (64, equal)
        }
        print(
            f"selection layers {(2, *again)}: k=64 {found[64]:.3f}; "
            f"k={equal}, at equal traffic, {found[equal]:.3f}",
            flush=True,
        )


def print_protection(reading: Reading) -> None:
    """What sharing and protected positions bring, k = 64."""
    for share in ("per_head", "per_kv_head", "all"):
        for sink, recent in ((0, 0), (4, 0), (0, 16), (4, 16)):
            for layer in (13, 17):
                settings = TidalDecode(
                    budget=64,
                    reselection=layer,
                    share=share,
                    protect_sink=sink,
                    protect_recent=recent,
                )
                found = reading.tidal(settings)
                print(f"{share}, sink {sink}, recent {recent}, r={layer}: {found:.3f}", flush=True)


PARTS: dict[str, Callable[[Reading], None]] = {
    "budgets": print_budgets,
    "layers": print_layers,
    "selections": print_selections,
    "protection": print_protection,
    "overlap": print_overlap,
}


def main(model_id: str = "smollm2-135m", *parts: str) -> None:
    """Print the parts."""
    model = load(model_id, offline=True)
    reading = Reading(model, documentation(model.tokenizer), GRADED)
    for part in parts or PARTS:
        start = time.perf_counter()
        PARTS[part](reading)
        print(f"({part}: {time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main(*sys.argv[1:])
