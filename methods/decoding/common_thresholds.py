"""The entropy above which a model's next token is more often wrong than right.

A model is teacher-forced on reference solutions; a logistic regression predicts from the entropy of
each next-token distribution whether its most likely token is the reference's. The threshold is the
entropy at which its most accurate cut lies.

    python -m methods.decoding.common_thresholds smollm2-135m

learns the threshold of a model and writes it into `data/entropy_thresholds.json` beside this file.

Source: AdaDec, arXiv 2506.08980; SYSUSELab/AdaDec at d3c3be1. Differs from it: solutions are
functions of Python's standard library instead of BigCodeBench's; one forward reads a whole function
instead of one forward a token; the regression is fitted by Newton's method, without a penalty.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from methods.decoding.common_ngrams import standard_library
from models.base import TextGenerator

THRESHOLDS = Path(__file__).parent / "data" / "entropy_thresholds.json"

# Seed of the choice of functions, of the split and of the undersampling; the reference's.
SEED = 42
NUM_FUNCTIONS = 400
# Functions longer than this, prompt included, say little more and take long.
MOST_TOKENS = 192
_LINES = range(2, 16)


class Solution(NamedTuple):
    """A function: signature and docstring, without trailing space, and the rest."""

    prompt: str
    body: str


class Observation(NamedTuple):
    """What teacher forcing saw at each token of the reference bodies.

    Attributes:
        entropies: Of the next-token distribution, nats, (tokens,), float64.
        is_first: Whether the reference token was the most likely one, (tokens,), bool.
    """

    entropies: npt.NDArray[np.float64]
    is_first: npt.NDArray[np.bool_]


class Threshold(NamedTuple):
    """A learned threshold with the regression behind it.

    Attributes:
        tau: Entropy, nats: pause at or above it.
        slope: w of P(first | H) = sigmoid(w H + b); negative.
        intercept: b, on balanced classes.
        cut: The probability whose cut is the most accurate, one of 0.01, ..., 0.99.
        accuracy: Of that cut on the held-out part, in its natural mix of classes.
        share_first: Share of tokens whose reference is the most likely, in that mix.
        num_tokens: Tokens that were observed.
    """

    tau: float
    slope: float
    intercept: float
    cut: float
    accuracy: float
    share_first: float
    num_tokens: int


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of softmax(logits) along the last axis, in nats, over all of it."""
    log_probabilities = torch.log_softmax(logits, dim=-1)
    # A probability of exactly 0 adds nothing, where 0 times -inf would be NaN.
    return -torch.nansum(log_probabilities.exp() * log_probabilities, dim=-1)


def learned_threshold(model_name: str) -> float | None:
    """Return the threshold on file for a model, in nats; None if there is none."""
    found = _on_file().get(model_name)
    return None if found is None else float(found["tau"])


def fallback_threshold() -> float:
    """Return the median of the published thresholds, for a model without one of its own."""
    entries = _on_file().values()
    published = [float(entry["tau"]) for entry in entries if entry["source"] == "published"]
    return float(np.median(published))


@functools.cache
def _on_file() -> dict[str, dict[str, float | int | str]]:
    loaded: dict[str, dict[str, float | int | str]] = json.loads(
        THRESHOLDS.read_text(encoding="utf-8")
    )
    return loaded


def fit_logistic(
    x: npt.NDArray[np.float64], y: npt.NDArray[np.bool_], steps: int = 50
) -> tuple[float, float]:
    """Return slope and intercept of the maximum-likelihood logistic regression of y on x.

    Raises:
        ValueError: Fewer than two classes, or the classes do not overlap, so that there is none.
    """
    if y.all() or not y.any():
        raise ValueError("a regression needs tokens of both kinds, most likely and not.")
    design = np.stack([x, np.ones_like(x)], axis=1)
    weights = np.zeros(2)
    for _ in range(steps):
        predicted = 1 / (1 + np.exp(-np.clip(design @ weights, -500, 500)))
        curvature = design.T @ (design * (predicted * (1 - predicted))[:, None])
        if np.linalg.cond(curvature) > 1e12:
            break
        step = np.linalg.solve(curvature, design.T @ (y - predicted))
        # Newton's steps overshoot far from the optimum; the log-odds are of the order of ten.
        weights = weights + step * min(1.0, 5 / max(float(np.abs(step).max()), 1e-300))
        if np.abs(step).max() < 1e-9 * (1 + np.abs(weights).max()):
            return float(weights[0]), float(weights[1])
    raise ValueError("the classes do not overlap in entropy: the regression diverges.")


def learn_threshold(observed: Observation, seed: int = SEED) -> Threshold:
    """Learn the threshold: fit on balanced classes, choose the cut on the natural mix.

    Args:
        observed: Tokens of the reference solutions.
        seed: Of the split, 80 to 20, and of the undersampling of the larger class.

    Raises:
        ValueError: One class is missing, or a higher entropy does not mean more errors.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(observed.entropies))
    train, test = np.split(order, [int(0.8 * len(order))])
    right, wrong = (train[observed.is_first[train] == kind] for kind in (True, False))
    smaller = min(len(right), len(wrong))
    chosen = np.concatenate([rng.choice(side, smaller, replace=False) for side in (right, wrong)])
    slope, intercept = fit_logistic(observed.entropies[chosen], observed.is_first[chosen])
    if slope >= 0:
        raise ValueError(
            f"a higher entropy should mean more errors, but the slope is {slope:.3g}: "
            f"no threshold can be learned from these {len(order)} tokens."
        )
    predicted = 1 / (1 + np.exp(-(slope * observed.entropies[test] + intercept)))
    cuts = np.arange(1, 100) / 100
    accuracies = [float(np.mean((predicted >= cut) == observed.is_first[test])) for cut in cuts]
    best = int(np.argmax(accuracies))
    cut = float(cuts[best])
    return Threshold(
        tau=(float(np.log(cut / (1 - cut))) - intercept) / slope,
        slope=slope,
        intercept=intercept,
        cut=cut,
        accuracy=accuracies[best],
        share_first=float(observed.is_first[test].mean()),
        num_tokens=len(order),
    )


def observe(model: TextGenerator, prompt: Sequence[int], body: Sequence[int]) -> Observation:
    """Read a prompt and its reference body once, and look at every token of the body."""
    text = [*prompt, *body]
    session = model.session(len(text))
    logits = session.prefill(text[:-1], all_logits=True)[len(prompt) - 1 :]
    reference = torch.tensor(list(body), device=logits.device)
    return Observation(
        entropy(logits.double()).cpu().numpy(),
        (logits.argmax(dim=-1) == reference).cpu().numpy(),
    )


def solutions() -> list[Solution]:
    """Return documented functions of the standard library, in the order of their files."""
    return [each for text in standard_library() for each in functions_of(text)]


def functions_of(source: str) -> Iterator[Solution]:
    """Yield the documented top-level functions of a module that have a few lines of body."""
    try:
        module = ast.parse(source)
    except SyntaxError:  # templates and files for other versions
        return
    lines = source.splitlines()
    for node in module.body:
        if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node):
            continue
        documented = node.body[0].end_lineno or 0
        body = lines[documented : node.end_lineno]
        if len(node.body) > 1 and len(body) in _LINES:
            prompt = lines[node.lineno - 1 : documented]
            # Prompts end without space, as those of the tasks; the body brings its line break.
            yield Solution("\n".join(prompt).rstrip(), "\n" + "\n".join(body) + "\n")


def observe_solutions(
    model: TextGenerator, chosen: Sequence[Solution], most_tokens: int = MOST_TOKENS
) -> tuple[Observation, str]:
    """Observe a model on solutions, those that are too long left out.

    Returns:
        All tokens, and a SHA-256 of the texts.
    """
    digest, parts = hashlib.sha256(), []
    front = len(model.tokenizer.encode(""))
    for solution in chosen:
        prompt = model.tokenizer.encode(solution.prompt)
        body = model.tokenizer.encode(solution.body)[front:]
        if len(prompt) + len(body) <= most_tokens:
            digest.update(f"{solution.prompt}\0{solution.body}\0".encode())
            parts.append(observe(model, prompt, body))
    return Observation(*(np.concatenate(column) for column in zip(*parts, strict=True))), (
        digest.hexdigest()
    )


def main() -> None:
    """Learn the threshold of the model named on the command line."""
    from models.loading import load

    parser = argparse.ArgumentParser(description="Learn the entropy threshold of a model.")
    parser.add_argument("model")
    parser.add_argument("--functions", type=int, default=NUM_FUNCTIONS)
    parser.add_argument("--observations", type=Path, help="also keep the observations, as .npz")
    arguments = parser.parse_args()
    model = load(arguments.model, offline=True)
    chosen = random.Random(SEED).sample(solutions(), arguments.functions)
    observed, digest = observe_solutions(model, chosen)
    if arguments.observations:
        np.savez(arguments.observations, **observed._asdict())
    found = learn_threshold(observed)
    rounded = {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in found._asdict().items()
    }
    entry = {"source": "standard library", **rounded, "texts_sha256": digest}
    entries = json.loads(THRESHOLDS.read_text(encoding="utf-8"))
    entries[model.name] = entry
    THRESHOLDS.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(entry, indent=2))


if __name__ == "__main__":
    main()
