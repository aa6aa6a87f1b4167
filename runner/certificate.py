"""The lossless certificate: where a method's text leaves the baseline's, and whether it may.

Greedy methods that promise identical output may differ from plain decoding only where the two best
tokens are as good as equal, because products of another width round differently. At the first
difference of each item the text before it is read once more, and the gap between the best logit and
the logits of both tokens decides: a tie, or a violation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from models.base import Decoding, Generation, Session, TextGenerator
from tasks.base import Item, Task

# Largest gap that rounding explains, by the dtype that the model runs in.
TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}


class _Captured(Exception):  # a signal, no error
    def __init__(self, prompt_ids: Sequence[int]) -> None:
        super().__init__()
        self.prompt_ids = list(prompt_ids)


class _Probe:
    """Looks like a text generator and hands out the prompt it is given."""

    def __init__(self, model: TextGenerator) -> None:
        self.name = model.name
        self.tokenizer = model.tokenizer
        self.facts = model.facts

    def generate(self, prompt_ids: Sequence[int], decoding: Decoding) -> Generation:
        raise _Captured(prompt_ids)

    def session(self, capacity: int) -> Session:
        raise AssertionError("a task generates; it opens no session")

    def synchronize(self) -> None:
        """Nothing is running."""


def prompt_of(task: Task[Any], model: TextGenerator, item: Item) -> list[int]:
    """Return the ids that a task asks a model to continue for an item."""
    try:
        task.call(_Probe(model), item)
    except _Captured as captured:
        return captured.prompt_ids
    raise ValueError(f"task {type(task).__name__} did not call generate for item {item.id!r}.")


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
    if list(baseline_ids) == list(method_ids):
        return None
    shared = next(
        (
            position
            for position, (ours, theirs) in enumerate(zip(baseline_ids, method_ids, strict=False))
            if ours != theirs
        ),
        min(len(baseline_ids), len(method_ids)),
    )
    token = method_ids[shared] if shared < len(method_ids) else None
    baseline_token = baseline_ids[shared] if shared < len(baseline_ids) else None
    gap = None
    if token is not None and baseline_token is not None:
        context = [*prompt_ids, *baseline_ids[:shared]]
        logits = model.session(len(context)).prefill(context)[-1].to(torch.float32)
        if 0 <= token < len(logits):
            gap = float(logits.max() - min(logits[token], logits[baseline_token]))
    # A text that stops elsewhere, or an id out of range, has no gap and is no tie.
    is_tie = gap is not None and gap <= TOLERANCE.get(model.facts.dtype, 0.0)
    return {
        "position": shared,
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
