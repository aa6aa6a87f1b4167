"""The training of Learn2PD's filter, after the model's and without touching it.

    python -m methods.diffusion_lm.common_learn2pd_training tiny-dllm

decodes calibration prompts one token at a time, replays them with the oracle, which records at each
forward how sure the model was at every position of the block and where it was right, and fits a
filter to that. Labels are the model's own decoding, never a task's solutions. The filters go into
`data` beside this file, one that reads blocks and one that reads single positions, each with a JSON
that says what is known about it: among other things whether it predicts better than the best single
threshold on the confidence does, without which nothing was learned that a threshold cannot do.

Embedded models are calibrated on their own training problems; for others `--prompts` names a file
of JSON lines with a `prompt` each (the paper took tasks of FLAN).

Source: arXiv 2509.25188; ims-kdks/Learning-to-Parallel-Decoding at 342293c (generation of data) and
22837cc (training). Differs from it: texts are split, not steps, so that no two steps of a text are
on different sides; training ends when the validation loss has not fallen for a while, and the best
weights are kept.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from methods.diffusion_lm.common_learn2pd import (
    DATA,
    FilterKind,
    LearnedFilter,
    OracleRule,
    Records,
    filter_path,
    new_filter,
    save_filter,
)
from models.base import Decoding, MaskedDiffusionLM
from models.masked_diffusion_decode import BLOCK_LENGTH, OneAtATime, Procedure, decode_rows

SEED = 1
NUM_TEXTS = 800
ANSWER_LENGTH = 96
HIDDEN = 32
EPOCHS = 40_000
LEARNING_RATE = 3e-3
# Epochs between two looks at the validation loss, and without a better one before training ends.
LOOK_EVERY, PATIENCE = 20, 3_000
# Probabilities at which it is counted how often what is accepted is wrong.
THRESHOLDS = (0.8, 0.9, 0.96, 0.99)
_GRID = 200


class Samples(NamedTuple):
    """Blocks as the filter sees them.

    Attributes:
        confidence: (samples, positions), float32.
        label: Whether the candidate was final, (samples, positions), float32, 0 or 1.
        text: Which text a sample is of, (samples,), int64.
    """

    confidence: Tensor
    label: Tensor
    text: Tensor

    def of(self, texts: Tensor) -> Samples:
        """Return the samples of some texts."""
        chosen = torch.isin(self.text, texts)
        return Samples(*(part[chosen] for part in self))


class Collected(NamedTuple):
    """What calibration saw.

    Attributes:
        samples: For the filter.
        plain_forwards, oracle_forwards: Of all texts, one token at a time and by the oracle.
    """

    samples: Samples
    plain_forwards: int
    oracle_forwards: int


class Trained(NamedTuple):
    """A fitted filter.

    Attributes:
        filter: With the weights of the best look.
        epoch: When that was.
        validation_loss: Then, mean binary cross-entropy in nats.
        curve: Epoch, training and validation loss of each look.
    """

    filter: LearnedFilter
    epoch: int
    validation_loss: float
    curve: list[tuple[int, float, float]]


class Split(NamedTuple):
    """Texts of each part, none in two of them."""

    train: Tensor
    validation: Tensor
    test: Tensor


class Judged(NamedTuple):
    """What accepting above a probability comes to.

    Attributes:
        accepted: Share of all positions that are accepted.
        wrong: Share of the accepted that are not final; NaN if none is accepted.
    """

    accepted: float
    wrong: float


def collect(
    model: MaskedDiffusionLM,
    prompts: Sequence[Sequence[int]],
    *,
    answer_length: int = ANSWER_LENGTH,
    block_length: int = BLOCK_LENGTH,
    batch: int = 32,
) -> Collected:
    """Decode prompts plainly, then by the oracle, and keep what the oracle sees.

    Greedy, without a cache and without an early stop: the filter is to know padding too.

    Args:
        model: Whose filter it is to be.
        prompts: Without [MASK].
        answer_length: Masks of each answer, a multiple of the block's length.
        block_length: Positions of a block.
        batch: Prompts at a time.
    """
    if answer_length % block_length:
        raise ValueError(
            f"answer_length must be a multiple of block_length, got {answer_length} and "
            f"{block_length}: a filter reads whole blocks."
        )
    decoding = Decoding(max_new_tokens=answer_length)
    procedure = Procedure(block_length=block_length)
    confidence: list[Tensor] = []
    label: list[Tensor] = []
    text: list[int] = []
    plain = oracle = 0
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        finals = decode_rows(model, part, decoding, rule=OneAtATime(), procedure=procedure)
        records = Records()
        rule = OracleRule([row.answer for row in finals], records)
        replayed = decode_rows(model, part, decoding, rule=rule, procedure=procedure)
        plain += sum(len(row.forwards) for row in finals)
        oracle += sum(len(row.forwards) for row in replayed)
        confidence += records.confidence
        label += records.label
        text += [start + row for row in records.text]
    samples = Samples(torch.stack(confidence), torch.stack(label).float(), torch.tensor(text))
    return Collected(samples, plain, oracle)


def split_texts(count: int, seed: int = SEED) -> Split:
    """Return a random split of `count` texts, 80 to 10 to 10.

    Raises:
        ValueError: A part would be empty.
    """
    if count < 10:
        raise ValueError(f"at least 10 texts can be split 80 to 10 to 10, got {count}.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    train, validation = int(0.8 * count), int(0.1 * count)
    return Split(order[:train], order[train : train + validation], order[train + validation :])


def train_filter(
    train: Samples,
    validation: Samples,
    *,
    kind: FilterKind = "block",
    hidden: int = HIDDEN,
    epochs: int = EPOCHS,
    patience: int = PATIENCE,
    seed: int = SEED,
) -> Trained:
    """Fit a filter: binary cross-entropy over all positions, AdamW, the whole set at once.

    Args:
        train: Fitted to.
        validation: Says when to stop, and which weights to keep.
        kind: See `LearnedFilter`.
        hidden: Units between the layers.
        epochs: At most.
        patience: Epochs without a better validation loss after which it ends.
        seed: Of the first weights.
    """
    block_length = train.confidence.shape[1]
    present = new_filter(kind, block_length, hidden, seed)
    for weights in present:
        weights.requires_grad_()
    optimizer = torch.optim.AdamW(list(present), lr=LEARNING_RATE)
    best, best_epoch, best_loss = present, 0, float("inf")
    curve: list[tuple[int, float, float]] = []
    for epoch in range(epochs):
        loss = F.binary_cross_entropy_with_logits(present.logits(train.confidence), train.label)
        if epoch % LOOK_EVERY == 0 or epoch == epochs - 1:
            found = validation_loss(present, validation)
            curve.append((epoch, float(loss.detach()), found))
            if found < best_loss:
                best = LearnedFilter(*(weights.detach().clone() for weights in present))
                best_epoch, best_loss = epoch, found
            elif epoch - best_epoch >= patience:
                break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Trained(best, best_epoch, best_loss, curve)


@torch.no_grad()
def validation_loss(judge: LearnedFilter, samples: Samples) -> float:
    """Return the mean binary cross-entropy of a filter, in nats."""
    logits = judge.logits(samples.confidence)
    return float(F.binary_cross_entropy_with_logits(logits, samples.label))


def threshold_loss(train: Samples, other: Samples) -> float:
    """Return the loss on other samples of the best single threshold on the confidence.

    A threshold says one probability above it and another below; these are the training set's
    shares, and the threshold is the one of a grid of its quantiles with the least training loss.
    """
    values, labels = train.confidence.flatten().double(), train.label.flatten().double()
    # torch's own quantiles refuse more than 16 million numbers.
    grid = np.unique(np.quantile(values.numpy(), np.linspace(0, 1, _GRID + 1)[:-1]))
    return min(
        (
            _two_level_loss(values, labels, train, threshold),
            _two_level_loss(values, labels, other, threshold),
        )
        for threshold in grid.tolist()
    )[1]


def _two_level_loss(values: Tensor, labels: Tensor, other: Samples, threshold: float) -> float:
    """Return the loss on `other` of the shares of `labels` at and above a threshold and below."""
    above = values >= threshold
    # An empty or unanimous side says nothing certain about the next sample.
    high, low = ((labels[side].sum() + 0.5) / (side.sum() + 1.0) for side in (above, ~above))
    said = torch.where(other.confidence >= threshold, high, low)
    return float(F.binary_cross_entropy(said, other.label.double()))


@torch.no_grad()
def judged(judge: LearnedFilter, samples: Samples, threshold: float) -> Judged:
    """Return what accepting above `threshold` comes to on samples."""
    accepted = judge.probabilities(samples.confidence) > threshold
    wrong = accepted & (samples.label == 0)
    count = int(accepted.sum())
    return Judged(count / accepted.numel(), int(wrong.sum()) / count if count else float("nan"))


def calibrate(
    collected: Collected,
    *,
    kind: FilterKind,
    hidden: int = HIDDEN,
    epochs: int = EPOCHS,
    seed: int = SEED,
) -> tuple[LearnedFilter, dict[str, Any]]:
    """Fit a filter to what was collected, and judge it on texts that it has not seen.

    Returns:
        The filter, and what is known about it: JSON-able.
    """
    samples = collected.samples
    texts = int(samples.text.max()) + 1
    split = split_texts(texts, seed)
    train, validation, test = (samples.of(part) for part in split)
    begin = time.monotonic()
    trained = train_filter(train, validation, kind=kind, hidden=hidden, epochs=epochs, seed=seed)
    seconds = time.monotonic() - begin
    by_threshold = threshold_loss(train, validation)
    facts: dict[str, Any] = {
        "kind": kind,
        "hidden": hidden,
        "block_length": samples.confidence.shape[1],
        "texts": texts,
        "samples": len(samples.text),
        "plain_forwards_per_text": collected.plain_forwards / texts,
        "oracle_forwards_per_text": collected.oracle_forwards / texts,
        "epoch": trained.epoch,
        "train_seconds": round(seconds, 1),
        "validation_loss": trained.validation_loss,
        "validation_loss_of_the_best_threshold": by_threshold,
        "beats_a_threshold": trained.validation_loss < by_threshold,
        "test_loss": validation_loss(trained.filter, test),
        "test": {
            f"{threshold:g}": judged(trained.filter, test, threshold)._asdict()
            for threshold in THRESHOLDS
        },
        "seed": seed,
        "curve": trained.curve[:: max(1, len(trained.curve) // 40)],
    }
    return trained.filter, facts


def calibration_prompts(
    model: MaskedDiffusionLM, count: int, file: Path | None = None
) -> list[list[int]]:
    """Return prompts to calibrate a model on, no two alike.

    Args:
        model: Whose tokenizer it is.
        count: How many at most.
        file: JSON lines with a `prompt` each; None takes training problems of `tiny-dllm`.
    """
    found = _problems(count) if file is None else _lines(model, file)
    prompts = list(dict.fromkeys(tuple(prompt) for prompt in found))
    return [list(prompt) for prompt in prompts[:count]]


def _problems(count: int) -> Iterator[list[int]]:
    from models.embedded.tiny_dllm.data import PAD, generate

    # Twice as many as wanted: short problems repeat.
    for row in generate(2 * count, steps=None, split="train", seed=SEED).prompts:
        yield row[row != PAD].tolist()


def _lines(model: MaskedDiffusionLM, file: Path) -> Iterator[list[int]]:
    # Not splitlines: texts may hold other line separators unescaped.
    for line in file.read_text(encoding="utf-8").split("\n"):
        if line.strip():
            yield model.tokenizer.encode(json.loads(line)["prompt"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the filters of the model named on the command line."""
    from models.loading import LoadSettings, load, weights_hash

    parser = argparse.ArgumentParser(description="Train Learn2PD's filters for a model.")
    parser.add_argument("model")
    parser.add_argument("--texts", type=int, default=NUM_TEXTS)
    parser.add_argument("--prompts", type=Path, help="JSON lines with a prompt each")
    parser.add_argument("--answer-length", type=int, default=ANSWER_LENGTH)
    parser.add_argument("--block-length", type=int, default=BLOCK_LENGTH)
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="at most")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=DATA)
    given = parser.parse_args(arguments)
    settings = LoadSettings(device=given.device)
    model: Any = load(given.model, settings, offline=True, capability="MaskedDiffusionLM")
    prompts = calibration_prompts(model, given.texts, given.prompts)
    begin = time.monotonic()
    collected = collect(
        model, prompts, answer_length=given.answer_length, block_length=given.block_length
    )
    run: dict[str, Any] = {
        "model": model.name,
        "weights_sha256": weights_hash(given.model, settings),
        "answer_length": given.answer_length,
        "collect_seconds": round(time.monotonic() - begin, 1),
    }
    for kind in get_args(FilterKind):
        found, facts = calibrate(collected, kind=kind, hidden=given.hidden, epochs=given.epochs)
        path = filter_path(model.name, kind, given.out)
        save_filter(found, path, run | facts)
        shown = {name: value for name, value in facts.items() if name != "curve"}
        print(f"{path.name} {json.dumps(shown, indent=2)}", flush=True)


if __name__ == "__main__":
    main()
