"""Print what the claims of `localleap` rest on: curves, how late tokens are written, and decay.

Run `python -m tests.methods.diffusion_lm.measure_localleap [MODEL [PROBLEMS]]`, by default on
tiny-dllm with 200 held-out problems. Texts are decoded in batches, each row as alone, so forwards
and positions are those of single texts; time is for the harness to measure.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from methods.diffusion_lm.common import DiffusionMethod
from methods.diffusion_lm.fixed_k import FixedK
from methods.diffusion_lm.localleap import LocalLeap
from methods.diffusion_lm.low_confidence import LowConfidence
from methods.diffusion_lm.random_masks import RandomMasks
from methods.diffusion_lm.threshold import Threshold
from models.base import Decoding, MaskedDiffusionLM
from models.loading import load
from models.masked_diffusion_decode import NeverOver, Row, Step, decode_rows
from models.stopping import Stopper
from tasks.arithmetic_mini import ArithmeticMini
from tasks.base import Item

BATCH = 50
SHARES = (0.25, 0.5, 1.0)
FURTHEST = 16


def methods() -> Iterator[DiffusionMethod]:
    """Yield what is compared, the plain decoder first."""
    yield LowConfidence()
    yield LowConfidence(early_stop=True)
    yield LowConfidence(cache="prefix")
    yield LowConfidence(cache="dual")
    for count in (2, 4, 8):
        yield FixedK(tokens_per_step=count)
    for level in (0.5, 0.7, 0.8, 0.9, 0.95):
        yield Threshold(threshold=level)
    yield Threshold(early_stop=True)
    yield Threshold(cache="prefix")
    yield Threshold(cache="dual")
    for kappa in (0.85, 0.9, 0.95):
        for tau in (0.5, 0.65, 0.75):
            yield LocalLeap(threshold=kappa, relaxed_threshold=tau)
    for radius in (2, 8):
        yield LocalLeap(radius=radius)
    yield LocalLeap(neighbourhood="decay")
    yield LocalLeap(neighbourhood="written")
    yield LocalLeap(neighbourhood="transitive")
    yield LocalLeap(early_stop=True)
    yield LocalLeap(cache="dual")
    for count in (1, 4):
        yield RandomMasks(tokens_per_step=count)


class Point(NamedTuple):
    """What a method did on all problems.

    Attributes:
        right: Whether each answer is right.
        forwards, positions, tokens: Of each answer; tokens up to its end.
        answers: All tokens of each.
        written: How often a forward wrote so many tokens.
    """

    right: np.ndarray
    forwards: np.ndarray
    positions: np.ndarray
    tokens: np.ndarray
    answers: np.ndarray
    written: Counter[int]


def measure(
    model: MaskedDiffusionLM,
    task: ArithmeticMini,
    method: DiffusionMethod,
    items: Sequence[Item] | None = None,
) -> Point:
    """Decode problems of a task with a method, all of them unless `items` says which."""
    items = list(task.items()) if items is None else items
    decoding = Decoding(max_new_tokens=task.max_new_tokens)
    stopper = Stopper(model.tokenizer, decoding, model.facts.eos_ids)
    right, tokens, rows = [], [], []
    for start in range(0, len(items), BATCH):
        part = items[start : start + BATCH]
        found = decode_rows(
            model,
            [model.tokenizer.encode(item.fields["prompt"]) for item in part],
            decoding,
            rule=method.rule(model, decoding),
            ending=method.ending(model),
            procedure=method.procedure(),
        )
        for item, row in zip(part, found, strict=True):
            kept = row.answer[: stopper.find(row.answer).num_tokens]
            right.append(task.score(item, stopper.text(kept))["exact-match"] == 1.0)
            tokens.append(len(kept))
        rows += found
    return Point(
        np.array(right),
        np.array([len(row.forwards) for row in rows]),
        np.array([sum(forward.width for forward in row.forwards) for row in rows]),
        np.array(tokens),
        np.array([row.answer for row in rows]),
        Counter(len(each.places) for row in rows for each in row.written),
    )


@dataclass
class Witness(NeverOver):
    """Cuts nothing and remembers all that was foreseen."""

    looks_ahead: bool = True
    steps: list[Step] = field(default_factory=list)

    def cut(self, step: Step, chosen: Tensor) -> None:
        """Remember the step."""
        self.steps.append(step)


def delays(model: MaskedDiffusionLM, prompts: Sequence[Sequence[int]], length: int) -> list[int]:
    """Return how many steps before each token is written it was foreseen for good (claim C4)."""
    found = []
    for steps, row in _witnessed(model, prompts, length):
        foreseen = np.full((len(steps), length), -1)
        for number, step in enumerate(steps):
            assert step.ahead is not None
            ahead = step.ahead.candidates[0].numpy()
            foreseen[number, step.offset : step.offset + len(ahead)] = ahead
        for number, each in enumerate(row.written):
            for place, token in zip(each.places, each.tokens, strict=True):
                wrong = np.flatnonzero(foreseen[: number + 1, place] != token)
                found.append(number - (int(wrong[-1]) + 1 if len(wrong) else 0))
    return found


def decay(
    model: MaskedDiffusionLM,
    prompts: Sequence[Sequence[int]],
    length: int,
    threshold: float = 0.9,
    relaxed: float = 0.75,
) -> Mapping[int, tuple[int, int]]:
    """Return how often a candidate between both thresholds is what plain decoding writes.

    Returns:
        (right, all) by the distance to the nearest anchor; 0 where the block has no anchor.
    """
    counts: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for steps, row in _witnessed(model, prompts, length):
        final = torch.tensor(row.answer)
        for step in steps:
            view = step.block
            anchors = (view.is_mask & (view.confidence >= threshold))[0].nonzero()[:, 0]
            between = view.is_mask & (view.confidence >= relaxed) & (view.confidence < threshold)
            for place in between[0].nonzero()[:, 0].tolist():
                near = int((anchors - place).abs().min()) if len(anchors) else 0
                right = bool(view.candidates[0, place] == final[step.offset + place])
                counts[min(near, FURTHEST)][0] += right
                counts[min(near, FURTHEST)][1] += 1
    return {distance: (right, total) for distance, (right, total) in sorted(counts.items())}


def _witnessed(
    model: MaskedDiffusionLM, prompts: Sequence[Sequence[int]], length: int
) -> Iterator[tuple[list[Step], Row]]:
    method = LowConfidence()
    decoding = Decoding(max_new_tokens=length)
    for prompt in prompts:
        witness = Witness()
        (row,) = decode_rows(
            model,
            [prompt],
            decoding,
            rule=method.rule(model, decoding),
            ending=witness,
            procedure=method.procedure(),
        )
        yield witness.steps, row


def report(model: MaskedDiffusionLM, task: ArithmeticMini) -> None:
    """Print everything."""
    plain: Point | None = None
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    print(
        "method | right % | forwards | positions | tokens/forward | all/forward | = plain % | b c p"
    )
    for method in methods():
        point = measure(model, task, method)
        plain = plain or point
        lost, won = (int((one & ~other).sum()) for one, other in (
            (plain.right, point.right), (point.right, plain.right),
        ))  # fmt: skip
        p = float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0
        same = float((point.answers == plain.answers).mean())
        print(
            f"{method!r} | {100 * point.right.mean():.1f} | {point.forwards.mean():.2f} | "
            f"{point.positions.mean():.0f} | {point.tokens.sum() / point.forwards.sum():.2f} | "
            f"{task.max_new_tokens / point.forwards.mean():.2f} | {100 * same:.2f} | "
            f"{lost} {won} {p:.3f}"
        )
        if method.cache == "none" and not method.early_stop:
            place = (float(point.forwards.mean()), 100 * float(point.right.mean()))
            curves[type(method).__name__].append(place)
    print("right % at a share of the plain decoder's forwards, by linear interpolation")
    assert plain is not None
    full = (float(plain.forwards.mean()), 100 * float(plain.right.mean()))
    for name, places in curves.items():
        xs, ys = zip(*sorted({*places, full}), strict=True)
        at = [float(np.interp(share * full[0], xs, ys, left=np.nan)) for share in SHARES]
        print(f"{name}: " + ", ".join(f"{s:.0%} {y:.1f}" for s, y in zip(SHARES, at, strict=True)))
    prompts = [model.tokenizer.encode(item.fields["prompt"]) for item in task.items()][:BATCH]
    late = np.array(delays(model, prompts, task.max_new_tokens))
    print(f"written {late.mean():.1f} steps late; more than 10 late: {(late > 10).mean():.1%}")
    for distance, (right, total) in decay(model, prompts, task.max_new_tokens).items():
        where = f"at distance {distance}" if distance else "without an anchor"
        print(f"candidates in [0.75, 0.9) {where}: {right} of {total} right ({right / total:.1%})")


if __name__ == "__main__":
    name, problems = [*sys.argv[1:], *("tiny-dllm", "200")[len(sys.argv) - 1 :]]
    loaded = load(name, capability="MaskedDiffusionLM")
    report(loaded, ArithmeticMini(number=int(problems)))  # type: ignore[arg-type]  # it is one
