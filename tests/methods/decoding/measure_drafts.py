"""Print what `auto` of the methods with a draft model knows.

Run `python -m tests.methods.decoding.measure_drafts [TARGET [DRAFT [PROMPTS]]]` after the draft
model has changed, and put what it prints in the places that it names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from scipy.stats import spearmanr

from methods.decoding.common_drafts import (
    AcceptanceCounter,
    MeasuredDrafts,
    ModelDrafter,
    ShareCounter,
    draft_for,
)
from methods.decoding.dyspec import DynamicDrafter, Mode
from methods.decoding.sequoia import StaticDrafter
from methods.decoding.specinfer import MEASURED_SEQUENCES, SequencesDrafter
from methods.decoding.speculative import ChainDrafter
from models.base import Decoding, TextGenerator
from models.decode import decode
from models.draft_tree import Topology
from models.loading import LoadSettings, load
from tests.methods.decoding.heads import DECODING, PROMPTS

TEMPERATURES = (0.0, 0.8)
DRAFT_TEMPERATURE = 0.6
ORDERS = 8
# Wide enough that the first two levels show the rate of every order.
RATES_TREE = Topology.from_rank_paths(
    [(n,) for n in range(ORDERS)] + [(0, n) for n in range(ORDERS)]
)


def decoding_at(heat: float) -> Decoding:
    """Return how the prompts are continued at a temperature."""
    return Decoding(max_new_tokens=DECODING.max_new_tokens, temperature=heat)


def run(
    model: TextGenerator,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    make: Callable[[], ModelDrafter],
) -> tuple[list[int], float]:
    """Return the drafts accepted by each step, and the draft forwards of a step."""
    accepted: list[int] = []
    forwards = 0
    for prompt in prompts:
        drafter = make()
        accepted += decode(model, prompt, decoding, drafter).trace.accepted
        forwards += len(drafter.draft_model.forwards) - 1
    return accepted, forwards / len(accepted)


def measure_chains(
    model: TextGenerator,
    draft: TextGenerator,
    prompts: Sequence[Sequence[int]],
    heat: float,
    lengths: Sequence[int] = (1, 2, 3, 4, 6, 8),
) -> MeasuredDrafts:
    """Return `speculative.MEASURED` at a temperature; shorter chains are the longest one, cut."""
    decoding = decoding_at(heat)
    make = partial(ChainDrafter, draft, decoding, lengths[-1], temperature=heat)
    accepted, _ = run(model, prompts, decoding, make)
    tokens = [round(1 + float(np.mean(np.minimum(accepted, n))), 3) for n in lengths]
    return MeasuredDrafts(tuple(lengths), tuple(tokens), tuple(float(n) for n in lengths))


def measure_sequences(
    model: TextGenerator,
    draft: TextGenerator,
    prompts: Sequence[Sequence[int]],
    heat: float,
    lengths: Sequence[int] = (1, 2, 4, 8),
) -> MeasuredDrafts:
    """Return `specinfer.MEASURED` at a temperature."""
    decoding = decoding_at(heat)
    found = [
        run(
            model,
            prompts,
            decoding,
            partial(
                SequencesDrafter,
                draft,
                decoding,
                MEASURED_SEQUENCES,
                length,
                temperature=DRAFT_TEMPERATURE,
            ),
        )
        for length in lengths
    ]
    return _table([MEASURED_SEQUENCES * length for length in lengths], found)


def measure_trees(
    model: TextGenerator,
    draft: TextGenerator,
    prompts: Sequence[Sequence[int]],
    heat: float,
    mode: Mode,
    sizes: Sequence[int] = (1, 4, 8, 16, 48),
) -> MeasuredDrafts:
    """Return `dyspec.MEASURED` of a mode at a temperature."""
    decoding = decoding_at(heat)
    found = [
        run(
            model,
            prompts,
            decoding,
            partial(
                DynamicDrafter,
                draft,
                decoding,
                size,
                mode=mode,
                threshold=1 / size,
                temperature=DRAFT_TEMPERATURE,
            ),
        )
        for size in sizes
    ]
    return _table(sizes, found)


def measure_rates(
    model: TextGenerator, draft: TextGenerator, prompts: Sequence[Sequence[int]], heat: float
) -> tuple[float, ...]:
    """Return `sequoia.RATES` at a temperature: made to fall, and nothing below 0.002."""
    decoding = decoding_at(heat)
    trials, hits = np.zeros(ORDERS), np.zeros(ORDERS)
    for prompt in prompts:
        drafter = StaticDrafter(draft, decoding, RATES_TREE, temperature=DRAFT_TEMPERATURE)
        counter = AcceptanceCounter(drafter, ORDERS)
        decode(model, prompt, decoding, counter)
        trials += counter.trials
        hits += counter.hits
    rates = np.maximum(hits / np.maximum(trials, 1), 0.002)
    return tuple(round(float(rate), 3) for rate in np.minimum.accumulate(rates))


def measure_correlation(
    model: TextGenerator, draft: TextGenerator, prompts: Sequence[Sequence[int]], heat: float
) -> float:
    """Return Spearman's correlation of draft probability, in tenths, and acceptance (DS-8)."""
    decoding = decoding_at(heat)
    trials, hits = np.zeros(10), np.zeros(10)
    for prompt in prompts:
        drafter = DynamicDrafter(
            draft, decoding, 16, mode="greedy", threshold=1.0, temperature=DRAFT_TEMPERATURE
        )
        counter = ShareCounter(drafter, len(trials))
        decode(model, prompt, decoding, counter)
        trials += counter.trials
        hits += counter.hits
    seen = trials >= 10
    return float(spearmanr(np.flatnonzero(seen), hits[seen] / trials[seen]).statistic)


def _table(sizes: Sequence[int], found: Sequence[tuple[list[int], float]]) -> MeasuredDrafts:
    tokens = tuple(round(1 + float(np.mean(accepted)), 3) for accepted, _ in found)
    return MeasuredDrafts(
        tuple(sizes), tuple(np.maximum.accumulate(tokens).tolist()), tuple(f for _, f in found)
    )


def main(target: str = "smollm2-135m", draft_id: str = "tiny-draft", prompts: int = 10) -> None:
    """Print all of them."""
    model = load(target, LoadSettings(), offline=True)
    draft = draft_for(draft_id, model)
    texts = [model.tokenizer.encode(prompt) for prompt in PROMPTS[:prompts]]
    for heat in TEMPERATURES:
        print(f"speculative.MEASURED[{heat}]", measure_chains(model, draft, texts, heat))
        print(f"sequoia.RATES[{heat}]", measure_rates(model, draft, texts, heat))
        print(f"specinfer.MEASURED[{heat}]", measure_sequences(model, draft, texts, heat))
        modes: tuple[Mode, Mode] = ("greedy", "threshold")
        for mode in modes:
            table = measure_trees(model, draft, texts, heat, mode)
            print(f"dyspec.MEASURED[{mode!r}][{heat}]", table, flush=True)
        print(f"DS-8 at {heat}", measure_correlation(model, draft, texts, heat), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:3], *(int(number) for number in sys.argv[3:4]))
