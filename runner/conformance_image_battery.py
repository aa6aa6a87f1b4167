"""The battery of methods that make images: tokens, counts and distributions beside the calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import chi2_contingency

from methods.base import Method, Output
from models.base import AutoregressiveImageModel, GeneratedImages, ImageSampling
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
        """Compare the tokens of each place, and neighbouring pairs, with those of plain draws."""
        declared = self.method.declared_output(1.0)
        if declared is Output.APPROXIMATE:
            return f"does not apply: it declares {declared.value} output"
        label = _LABELS[0]
        plain = self.model.generate([label] * SAMPLES, range(SAMPLES), _SAMPLED).tokens
        # Other seeds, so that a method that couples its draws to the baseline's is judged no more
        # gently than one that does not.
        found = [
            self._images([label], [SAMPLES + seed], _SAMPLED).tokens[0] for seed in range(SAMPLES)
        ]
        smallest, tests = 1.0, 0
        for place in range(self.tokens):
            p_value = _difference([row[place] for row in plain], [row[place] for row in found])
            if p_value is not None:
                smallest, tests = min(smallest, p_value), tests + 1
        if not tests:
            return "does not apply: the model is too sure of its tokens"
        if smallest * tests < SIGNIFICANCE:
            raise Broken(
                f"{SAMPLES} images and as many of plain sampling differ: p = "
                f"{smallest * tests:.2g} over {tests} places."
            )
        return f"p = {min(1.0, smallest * tests):.2g} over {SAMPLES} images, {tests} places"

    def images(self) -> str:
        """Turn the tokens into pixels once more."""
        found = self._images(_LABELS, _SEEDS, _SAMPLED)
        if [len(row) for row in found.tokens] != [self.tokens] * len(_LABELS):
            raise Broken(f"an image has {self.tokens} tokens, got {[*map(len, found.tokens)]}.")
        import torch

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


def _difference(first: Sequence[int], second: Sequence[int]) -> float | None:
    """Return the p-value of a chi-square test that two lists are of one distribution.

    None where one value is nearly all there is.
    """
    counts = Counter(first), Counter(second)
    both = counts[0] + counts[1]
    common = [value for value in both if both[value] >= 10]
    rare = [value for value in both if both[value] < 10]
    columns = [[each[value] for each in counts] for value in common]
    if rare:
        columns.append([sum(each[value] for value in rare) for each in counts])
    if len(columns) < 2:
        return None
    return float(chi2_contingency(np.transpose(columns)).pvalue)
