"""The lossless certificate: where a method's text leaves the baseline's, and whether it may.

**Greedy** methods that promise identical output may differ from plain decoding only where the two
best tokens are as good as equal, because products of another width round differently. At the first
difference of each item the text before it is read once more, and the gap between the best logit and
the logits of both tokens decides: a tie, or a violation.

**Sampled** texts differ even where the distribution is the same. Each text of the method and of the
baseline is read once more by the target, and two sums over its tokens are compared, item by item:
how much more surprising they were than the distribution they should come from says on average, and
how much more often the likeliest token stood there. Both sums vary around the same mean if the
method keeps the distribution, however texts are stopped and trimmed; a sign-flip test over the
items decides. It cannot prove sameness: it prints the number of items, and the exact tests by
enumeration stand beside the methods.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from models.base import (
    AutoregressiveImageModel,
    Condition,
    Decoding,
    GeneratedImages,
    Generation,
    ImageSampling,
    Session,
    TextGenerator,
)
from tasks.base import Item, Task

# Largest gap that rounding explains, by the dtype that the model runs in.
TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}


# A sampled cell fails if one of its tests is less likely than this by chance.
DISTRIBUTION_LEVEL = 1e-3
_SIGN_FLIPS = 40_000
_IMPOSSIBLE = 1e-12


class Asked(NamedTuple):
    """What a task asks a model to continue for an item, and how."""

    prompt_ids: list[int]
    decoding: Decoding


class AskedImages(NamedTuple):
    """What images a task asks a model for, and how."""

    conditions: tuple[Condition, ...]
    sampling: ImageSampling


class Centred(NamedTuple):
    """Two sums over a text's tokens whose expectation is the same for every exact sampler.

    Attributes:
        surprise: -log p of the tokens, less the entropy of their distributions, nats.
        likeliest: Tokens that were the likeliest of all, less the sum of that one's probability.
    """

    surprise: float
    likeliest: float


class _Captured(Exception):  # a signal, no error
    def __init__(self, asked: Asked | AskedImages | None) -> None:
        super().__init__()
        self.asked = asked


class _ImageProbe:
    """Looks like an image generator and hands out what it is asked for."""

    def __init__(self, model: Any) -> None:
        self.name = model.name
        self.facts = model.facts

    def generate(
        self, conditions: Sequence[Condition], seeds: Sequence[int], sampling: ImageSampling
    ) -> GeneratedImages:
        raise _Captured(AskedImages(tuple(conditions), sampling))

    def synchronize(self) -> None:
        """Nothing is running."""


class _Probe:
    """Looks like a text generator and hands out the prompt it is given."""

    def __init__(self, model: TextGenerator) -> None:
        self.name = model.name
        self.tokenizer = model.tokenizer
        self.facts = model.facts

    def generate(self, prompt_ids: Sequence[int], decoding: Decoding) -> Generation:
        raise _Captured(Asked(list(prompt_ids), decoding))

    def session(self, capacity: int) -> Session:
        raise _Captured(None)

    def synchronize(self) -> None:
        """Nothing is running."""


def asked(task: Task[Any], model: Any, item: Item) -> Asked | AskedImages | None:
    """Return what a task asks a model to continue, or to make, for an item.

    None where it asks for neither: it feeds a text of its own, or runs another capability.
    """
    probes = {"TextGenerator": _Probe, "ImageGenerator": _ImageProbe}
    if task.capability not in probes:
        return None
    try:
        task.call(probes[task.capability](model), item)
    except _Captured as captured:
        return captured.asked
    raise ValueError(f"task {type(task).__name__} did not call generate for item {item.id!r}.")


def output_digest(token_ids: Sequence[int], text: str) -> str:
    """Return a SHA-256 of an output: of its tokens and its text.

    Tokens alone would not do: an encoder has none, and a task that feeds a text gives every method
    the same ones.
    """
    return hashlib.sha256(json.dumps([list(token_ids), text]).encode()).hexdigest()


def difference(
    model: Any,
    question: Asked | AskedImages | None,
    baseline: Sequence[int],
    method: Sequence[int],
) -> dict[str, Any] | None:
    """Compare two outputs, those without a prompt or without tokens included; see `divergence`.

    The tokens of several images stand one image after the other.

    Args:
        model: Judges where texts differ.
        question: What was to be continued; None where nothing was, and no tie can be told.
        baseline, method: Their tokens.
    """
    # A model without sessions cannot be asked for the logits behind an output.
    if isinstance(question, Asked) and baseline and method and isinstance(model, TextGenerator):
        return divergence(model, question.prompt_ids, baseline, method)
    if isinstance(question, AskedImages) and isinstance(model, AutoregressiveImageModel):
        return _image_divergence(model, question, baseline, method)
    return {
        "position": 0,
        "token": None,
        "baseline_token": None,
        "top2_gap": None,
        "verdict": "violation",
    }


def divergence(
    model: TextGenerator,
    prompt_ids: Sequence[int],
    baseline_ids: Sequence[int],
    method_ids: Sequence[int],
) -> dict[str, Any] | None:
    """Compare two outputs of one prompt.

    Returns:
        None if they are the same; else the first differing `position`, the `token` and
        `baseline_token` there (None past an end), `top2_gap` (largest logit less the smaller of
        the two tokens' logits; None where one text has ended) and the `verdict`, `tie` or
        `violation`.
    """
    shared = _first_difference(baseline_ids, method_ids)
    if shared is None:
        return None
    token = method_ids[shared] if shared < len(method_ids) else None
    baseline_token = baseline_ids[shared] if shared < len(baseline_ids) else None
    logits = None
    if token is not None and baseline_token is not None:
        context = [*prompt_ids, *baseline_ids[:shared]]
        logits = model.session(len(context)).prefill(context)[-1].to(torch.float32)
    return _verdict(shared, token, baseline_token, logits, model.facts.dtype)


def _image_divergence(
    model: AutoregressiveImageModel,
    question: AskedImages,
    baseline: Sequence[int],
    method: Sequence[int],
) -> dict[str, Any] | None:
    """Compare the images of one item; as `divergence`, with the logits after guidance."""
    from models.image_generation import logits_in_parts

    shared = _first_difference(baseline, method)
    if shared is None:
        return None
    if len(baseline) != len(method):
        return _verdict(shared, None, None, None, model.facts.dtype)
    row, place = divmod(shared, model.facts.image_tokens)
    first = row * model.facts.image_tokens
    image = torch.tensor([baseline[first : first + model.facts.image_tokens]])
    condition = question.conditions[row : row + 1]
    # What comes behind the place is not read.
    logits = next(
        logits[0, place - first]
        for first, logits in logits_in_parts(model, condition, image, question.sampling)
        if place < first + logits.shape[1]
    )
    return _verdict(shared, method[shared], baseline[shared], logits, model.facts.dtype)


def _first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """Return the first place where two lists differ, the end of the shorter one if nowhere else."""
    if list(first) == list(second):
        return None
    pairs = enumerate(zip(first, second, strict=False))
    shorter = min(len(first), len(second))
    return next((place for place, (one, other) in pairs if one != other), shorter)


def _verdict(
    position: int, token: int | None, baseline_token: int | None, logits: Any, dtype: str
) -> dict[str, Any]:
    """Return a difference with its gap, if there are logits (vocab,) to tell it by."""
    gap = None
    if logits is not None and token is not None and 0 <= token < len(logits):
        gap = float(logits.max() - min(logits[token], logits[baseline_token]))
    # A text that stops elsewhere, or an id out of range, has no gap and is no tie.
    is_tie = gap is not None and gap <= TOLERANCE.get(dtype, 0.0)
    return {
        "position": position,
        "token": token,
        "baseline_token": baseline_token,
        "top2_gap": gap,
        "verdict": "tie" if is_tie else "violation",
    }


def summary(
    divergences: Sequence[dict[str, Any]],
) -> Literal["identical", "tie", "violation"]:
    """Return `identical`, `tie` or `violation` for a cell."""
    verdicts = {found["verdict"] for found in divergences}
    return "violation" if "violation" in verdicts else "tie" if verdicts else "identical"


def centred(
    model: TextGenerator, prompt_ids: Sequence[int], output_ids: Sequence[int], temperature: float
) -> Centred:
    """Read a sampled text once more and return its centred sums.

    Args:
        model: The target.
        prompt_ids: What was continued.
        output_ids: The continuation, any length.
        temperature: Of the sampling, above 0.
    """
    if not output_ids:
        return Centred(0.0, 0.0)
    text = [*prompt_ids, *output_ids[:-1]]
    logits = model.session(len(text)).prefill(text, all_logits=True)[-len(output_ids) :]
    log_probabilities = torch.log_softmax(logits.float() / temperature, dim=-1).double()
    return _sums(log_probabilities, torch.tensor(output_ids, device=logits.device))


def centred_images(
    model: AutoregressiveImageModel, question: AskedImages, output_ids: Sequence[int]
) -> Centred:
    """Read an item's images once more and return their centred sums; see `centred`."""
    from models.image_generation import laws_in_parts

    tokens = torch.tensor(output_ids, device=model.device)
    images = tokens.reshape(-1, model.facts.image_tokens)
    sums = []
    for places, laws in laws_in_parts(model, question.conditions, images, question.sampling):
        # A token that cannot be drawn (outside top-k) is as good as impossible, but finite.
        log_probabilities = laws.flatten(0, 1).double().clamp_min(_IMPOSSIBLE).log()
        sums.append(_sums(log_probabilities, images[:, places].flatten()))
    return Centred(*(sum(column) for column in zip(*sums, strict=True)))


def reading(model: Any, question: Asked | AskedImages, output_ids: Sequence[int]) -> Centred:
    """Read a sampled output of either kind once more and return its centred sums."""
    if isinstance(question, AskedImages):
        return centred_images(model, question, output_ids)
    return centred(model, question.prompt_ids, output_ids, question.decoding.temperature)


def _sums(log_probabilities: torch.Tensor, token_ids: torch.Tensor) -> Centred:
    """Return the centred sums of tokens (tokens,) by their laws, (tokens, vocab)."""
    probabilities = log_probabilities.exp()
    entropy = -(probabilities * log_probabilities).nan_to_num(0.0).sum(dim=-1)
    tokens = token_ids[:, None]
    best, place = probabilities.max(dim=-1)
    return Centred(
        surprise=float((-log_probabilities.gather(1, tokens)[:, 0] - entropy).sum()),
        likeliest=float(((place == tokens[:, 0]).double() - best).sum()),
    )


def distribution_test(
    baseline: Sequence[Centred], method: Sequence[Centred], *, seed: int
) -> dict[str, float | int]:
    """Test whether two samplers' texts of the same items have the same centred sums.

    Args:
        baseline: One a text.
        method: The same items in the same order.
        seed: Of the sign flips, where there are too many to try them all.

    Returns:
        `items`, `surprise_difference` and `likeliest_difference` (means, method less baseline), and
        `p`, the smaller of both two-sided p-values times two.
    """
    # A second of every worker's start, and only sampled texts need it.
    from scipy import stats

    differences = np.asarray(method, dtype=float) - np.asarray(baseline, dtype=float)
    found: dict[str, float | int] = {"items": len(differences)}
    smallest = 1.0
    for name, column in zip(Centred._fields, differences.T, strict=True):
        found[f"{name}_difference"] = float(column.mean())
        if np.ptp(column) or column[0]:  # all alike and zero: nothing to test
            test = stats.permutation_test(
                (column,),
                np.mean,
                permutation_type="samples",
                n_resamples=_SIGN_FLIPS,
                rng=np.random.default_rng(seed),
            )
            smallest = min(smallest, float(test.pvalue))
    return {**found, "p": min(1.0, 2 * smallest)}
