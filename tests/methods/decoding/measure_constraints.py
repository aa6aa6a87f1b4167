"""Print how far constrained decoding is from the true conditional distribution.

Run `python -m tests.methods.decoding.measure_constraints [TEXTS]`. The model is a random table over
five tokens and the language one that half of what begins well cannot be finished in
(`tests/methods/decoding/languages.py`), so the model's distribution given the constraint is known
by enumeration. Distances are total variation between that and the satisfied ones of TEXTS written
texts; `exact draws` is the distance that as many draws from the truth itself have.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from methods.base import Method
from methods.decoding.awrs import Awrs
from methods.decoding.rejection_sampling import RejectionSampling
from methods.decoding.token_masking import TokenMasking
from models.base import TextGenerator
from tests.methods.decoding.languages import LanguageModel, local, request, target, write
from tests.models.toy import total_variation

Text = tuple[int, ...]
ROWS: Mapping[str, Method[TextGenerator]] = {
    "token-masking": TokenMasking(),
    "awrs:particles=1,proper_weights=false": Awrs(particles=1, proper_weights=False),
    "awrs:particles=1": Awrs(particles=1),
    "awrs": Awrs(),
    "awrs:particles=32": Awrs(particles=32),
    "rejection-sampling": RejectionSampling(),
}


def shares(counts: Mapping[Text, float]) -> dict[Text, float]:
    """Return counts as shares of their sum."""
    total = sum(counts.values())
    return {text: count / total for text, count in counts.items()}


def row(method: Method[TextGenerator], model: LanguageModel, texts: int) -> tuple[float, ...]:
    """Return distance to the truth, share of satisfied texts, and checks of a token."""
    counts: Counter[Text] = Counter()
    checks = []
    for seed in range(texts):
        found = write(method, model, request(seed))
        checks.append(float(found.trace.notes["checks_per_token"]))
        if found.trace.notes["is_satisfied"]:
            counts[found.token_ids] += 1
    distance = total_variation(shares(counts), target(model))
    return distance, counts.total() / texts, float(np.mean(checks))


def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    texts = int(arguments[0]) if arguments else 2000
    model = LanguageModel()
    exact = target(model)
    finished = shares({text: p for text, p in local(model).items() if text in exact})
    print(f"locally constrained decoding, enumerated: {total_variation(finished, exact):.3f}")
    drawn = np.random.default_rng(0).multinomial(texts, list(exact.values()))
    noise = total_variation(shares(dict(zip(exact, drawn.tolist(), strict=True))), exact)
    print(f"exact draws: {noise:.3f}\n\n| | distance | satisfied | checks a token |")
    print("|---|---|---|---|")
    for name, method in ROWS.items():
        distance, satisfied, checks = row(method, model, texts)
        print(f"| {name} | {distance:.3f} | {satisfied:.3f} | {checks:.2f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
