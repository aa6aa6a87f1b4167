"""The battery of methods that make images: tokens, counts and distributions beside the calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import kstest
from torch import Tensor

from methods.base import Method, Output
from models.base import AutoregressiveImageModel, GeneratedImages, ImageSampling
from models.image_generation import read_tokens
from runner.conformance_base import PROFILE, Broken, fresh
from runner.conformance_calls import CallBattery

# Images that a sampled distribution is judged by, and the level below which a difference is no
# accident; seeds are fixed, so a method passes always or never.
SAMPLES = 120
SIGNIFICANCE = 1e-4
_LABELS = (0, 3, 1)
_SEEDS = (5, 6, 7)
# With and without the unconditional half; greedy.
_GREEDY = tuple(ImageSampling(guidance_scale=scale, temperature=0.0) for scale in (1.0, 1.5))
_SAMPLED = ImageSampling(guidance_scale=1.5, top_k=12)


class ImageBattery(CallBattery):
    """The battery of one method whose capability is `ImageGenerator`."""

    def __init__(self, method: Method[Any], model: Any = None) -> None:
        """Get a model ready."""
        super().__init__(method, model)
        if not isinstance(self.model, AutoregressiveImageModel):
            raise TypeError(f"the battery needs an autoregressive model, got {self.model!r}.")
        self.tokens = self.model.facts.image_tokens

    def checks(self) -> dict[str, Callable[[], str]]:
        """Return the checks by name, in the order of the table."""
        checks = super().checks()
        last = {name: checks.pop(name) for name in list(checks)[-2:]}
        del checks["declared output holds"], checks["texts do not depend on those beside them"]
        return {
            **checks,
            "declared output holds when greedy": self.greedy_output,
            "declared output holds when sampling": self.sampled_output,
            "images are those of their tokens": self.images,
            "other seeds, other images": self.seeds,
            "trace accounts for every token": self.trace,
            **last,
        }

    def greedy_output(self) -> str:
        """Compare greedy images with plain ones, alone and in a batch."""
        declared = self.method.declared_output(0.0)
        if declared is not Output.IDENTICAL:
            return f"does not apply: it declares {declared.value} output"
        for sampling in _GREEDY:
            plain = self.model.generate(_LABELS, _SEEDS, sampling).tokens
            together = self._images(_LABELS, _SEEDS, sampling).tokens
            for row, (label, seed) in enumerate(zip(_LABELS, _SEEDS, strict=True)):
                (alone,) = self._images([label], [seed], sampling).tokens
                for what, found in (("alone", alone), ("in a batch", together[row])):
                    if found != plain[row]:
                        raise Broken(
                            f"at guidance {sampling.guidance_scale:g} the tokens of class {label} "
                            f"made {what} are not those of plain decoding."
                        )
        return f"{len(_LABELS)} images, alone and in a batch, with and without guidance"

    def sampled_output(self) -> str:
        """Compare sampled tokens with the probabilities that plain decoding would draw them by."""
        declared = self.method.declared_output(1.0)
        if declared is Output.APPROXIMATE:
            return f"does not apply: it declares {declared.value} output"
        label = _LABELS[0]
        rows = [self._images([label], [seed], _SAMPLED).tokens[0] for seed in range(SAMPLES)]
        tokens = torch.tensor(rows)
        laws = read_tokens(self.model, [label] * SAMPLES, tokens, _SAMPLED).double()
        if bool((laws.gather(-1, tokens[..., None]) == 0).any()):
            raise Broken("a token was drawn that plain decoding, behind the same tokens, never is.")
        p_value = float(kstest(_places_in(laws, tokens).numpy(), "uniform").pvalue)
        measured = f"p = {p_value:.2g} over {tokens.numel()} tokens of {SAMPLES} images"
        if p_value < SIGNIFICANCE:
            raise Broken(f"the tokens differ from those of plain sampling: {measured}.")
        return measured

    def images(self) -> str:
        """Turn the tokens into pixels once more."""
        found = self._images(_LABELS, _SEEDS, _SAMPLED)
        if [len(row) for row in found.tokens] != [self.tokens] * len(_LABELS):
            raise Broken(f"an image has {self.tokens} tokens, got {[*map(len, found.tokens)]}.")
        if not np.array_equal(self.model.pixels(torch.tensor(found.tokens)), found.pixels):
            raise Broken("pixels and tokens are not of the same images.")
        return f"{len(_LABELS)} images"

    def seeds(self) -> str:
        """Make images of one class with several seeds."""
        found = {self._images([0], [seed], _SAMPLED).tokens for seed in range(4)}
        if len(found) == 1:
            raise Broken("four seeds gave the same image: sampling ignores the seed.")
        return f"{len(found)} images of 4 seeds"

    def trace(self) -> str:
        """Add up what the forwards are said to have emitted."""
        for labels in (_LABELS[:1], _LABELS):
            found = self._images(labels, _SEEDS[: len(labels)], _SAMPLED)
            trace, rows = found.trace, len(labels)
            if len(trace.prefill) != rows:
                raise Broken(f"{len(trace.prefill)} prefills are recorded for {rows} images.")
            if len(trace.accepted) != len(trace.forwards):
                raise Broken(
                    f"{len(trace.forwards)} forwards, but accepted drafts of {len(trace.accepted)}."
                )
            emitted = rows + sum(trace.accepted) + len(trace.forwards)
            if emitted != rows * self.tokens:
                raise Broken(f"{emitted} tokens are accounted for, {rows * self.tokens} came out.")
            for forward, accepted in zip(trace.forwards, trace.accepted, strict=True):
                if accepted >= forward.width:
                    raise Broken(f"{accepted} drafts accepted by a forward {forward.width} wide.")
        return "one image and a batch"

    def _images(
        self, labels: Sequence[int], seeds: Sequence[int], sampling: ImageSampling
    ) -> GeneratedImages:
        with fresh(self.method).apply(self.model, PROFILE) as changed:
            found: GeneratedImages = changed.generate(labels, seeds, sampling)
        return found


def _places_in(laws: Tensor, tokens: Tensor) -> Tensor:
    """Return where in its law each token lies, from the likeliest on, by lot within its share.

    If the tokens were drawn from the laws, each given those before it, these numbers are
    independent and uniform on [0, 1], for whatever laws: the probability integral transform
    (Rosenblatt, Annals of Mathematical Statistics 23, 1952, p. 470), randomised as laws are
    discrete.

    Args:
        laws: Of each token given those before it, (images, tokens, vocab).
        tokens: (images, tokens), int64.

    Returns:
        (images * tokens,), float64.
    """
    shares, order = laws.sort(dim=-1, descending=True, stable=True)
    rank = (order == tokens[..., None]).double().argmax(-1, keepdim=True)
    share = shares.gather(-1, rank)
    before = shares.cumsum(-1).gather(-1, rank) - share
    lots = torch.rand(share.shape, generator=torch.Generator().manual_seed(0), dtype=share.dtype)
    return (before + lots * share).flatten()
