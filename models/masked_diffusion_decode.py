"""The shared loop of masked-diffusion decoding: blocks of masks, filled in from left to right.

The answer is a fixed number of masks behind the prompt. It is cut into blocks; inside a block each
forward names a candidate and a confidence for every mask, and a `Rule` says which are written. A
written token is never changed. What makes decoders differ is the rule (which masks, how many), the
`Cache` (what of the sequence is run again) and the `Ending` (which masks are left alone, because
the text is over).

Sources: LLaDA (arXiv 2502.09992), low-confidence remasking and semi-autoregressive blocks;
Fast-dLLM (arXiv 2505.22618), caches. Differs from both codes: [MASK] itself is never a candidate
(they write it back as a mask); whether a block is complete is asked before a forward, not after
one too many; a shifted model is fed the position before a window too, whose output is about the
window's first token (Fast-dLLM writes that token from the refresh instead).

A batch runs in lockstep: rows that are through with a block wait for the others, and are run no
more until then, so that each row's text and its forwards are those that it has alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from models.base import (
    Canvas,
    Decoding,
    Forward,
    Generation,
    InvalidOutput,
    MaskedDiffusionLM,
    Trace,
    Unsupported,
)
from models.stopping import Stopper

BLOCK_LENGTH = 32
"""Tokens of a block, of LLaDA's evaluations of math and code and of Fast-dLLM's."""

Confidence = Literal["probability", "margin", "entropy"]
Cache = Literal["none", "prefix", "dual"]


@dataclass(frozen=True, kw_only=True)
class Procedure:
    """What decoders that are compared must have in common, and what is run at a step.

    Attributes:
        block_length: Masks of a block; the last block holds what is left.
        cache: What a step runs but for the first of a block, which runs everything. `none`:
            everything. `prefix`: what is not before the block. `dual`: the block.
        confidence: `probability` of the candidate (LLaDA), its `margin` over the second best
            token's, or the negative `entropy` of the distribution (both Dream).
        defers_eos: Give a candidate that ends the text no confidence while there are others, as
            LLaDA's evaluation does on some tasks.
    """

    block_length: int = BLOCK_LENGTH
    cache: Cache = "none"
    confidence: Confidence = "probability"
    defers_eos: bool = False


PLAIN = Procedure()


class View(NamedTuple):
    """What a forward says about some positions; all (rows, positions).

    Behind the end of a row that was cut there is no mask, and confidence is 1.

    Attributes:
        candidates: The token that would be written, int64.
        confidence: How sure the model is of it, float64; also at positions that are written.
        is_mask: True where nothing is written yet.
    """

    candidates: Tensor
    confidence: Tensor
    is_mask: Tensor

    def among_masks(self) -> Tensor:
        """Return the confidences, -inf where there is no mask."""
        return self.confidence.masked_fill(~self.is_mask, -torch.inf)


@dataclass(frozen=True)
class Step:
    """What a rule and an ending see of one forward.

    Attributes:
        block: The current block. A rule that knows better (an oracle) may change its candidates in
            place.
        ahead: The block and all behind it that was run, where the ending asks for it; else None.
        rows: Which rows of the batch these are.
        offset: Place of the block's first token in the answer.
        number: Forwards that this block has had before, alike for all rows.
    """

    block: View
    ahead: View | None
    rows: tuple[int, ...]
    offset: int
    number: int


class Rule(Protocol):
    """Says which of a block's masks are written now. One lives for one batch of texts."""

    @property
    def notes(self) -> Mapping[str, float | int | str]:
        """What it settled at run time; kept in the trace."""
        ...

    def select(self, step: Step) -> Tensor:
        """Choose masks of `step.block`.

        Returns:
            (rows, positions), bool: at least one position of every row, and masks only.
        """
        ...


class Ending(Protocol):
    """Says where a text is over. One lives for one batch of texts.

    Attributes:
        looks_ahead: Whether `cut` needs `step.ahead`.
    """

    @property
    def looks_ahead(self) -> bool:
        """Whether `cut` needs `step.ahead`."""
        ...

    def cut(self, step: Step, chosen: Tensor) -> Tensor | None:
        """Shorten rows after a step's tokens are written.

        Args:
            step: What the rule saw; `is_mask` is from before the step.
            chosen: What was written, (rows, positions of the block), bool.

        Returns:
            Answer tokens that each row keeps, (rows,), int64; what is cut off counts as end of
            text, is run no more, and held nothing written but ends of the text. None for no change.
        """
        ...

    def is_over(self, block: Tensor) -> Tensor:
        """Return whether nothing is to be filled in behind a finished block.

        Args:
            block: Its tokens, (rows, positions).

        Returns:
            (rows,), bool.
        """
        ...


class OneAtATime:
    """Write the mask whose candidate is surest: the plain decoder."""

    notes: Mapping[str, float | int | str] = {}

    def select(self, step: Step) -> Tensor:
        """See `Rule.select`."""
        return surest(step.block, 1)


class NeverOver:
    """Fill in every mask."""

    looks_ahead = False

    def cut(self, step: Step, chosen: Tensor) -> None:
        """Cut nothing."""

    def is_over(self, block: Tensor) -> Tensor:
        """Return False for all rows."""
        return torch.zeros(len(block), dtype=torch.bool, device=block.device)


def surest(view: View, count: int | Tensor) -> Tensor:
    """Choose the surest masks of each row; the first among equals.

    Args:
        view: Positions to choose from.
        count: How many, one number or one a row, (rows,); rows with fewer masks choose all.

    Returns:
        (rows, positions), bool.
    """
    order = view.among_masks().argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    wanted = torch.as_tensor(count, device=order.device).reshape(-1, 1)
    chosen = torch.zeros_like(view.is_mask).scatter_(1, order, places < wanted)
    return chosen & view.is_mask


class Written(NamedTuple):
    """What one forward wrote into a row: places in the answer, ascending, and tokens."""

    places: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass
class Row:
    """One text of a batch.

    Attributes:
        answer: All tokens of the answer, `max_new_tokens` many; those that were never filled in
            because the text was over are end-of-text.
        forwards: Denoiser runs for this row, in order; `width` counts its own positions, padding
            and what was cut off left out.
        written: What each of them wrote.
        logits: Positions run through the output head, in all.
    """

    answer: tuple[int, ...] = ()
    forwards: list[Forward] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)
    logits: list[int] = field(default_factory=list)


def decode(
    model: MaskedDiffusionLM,
    prompt_ids: Sequence[int],
    decoding: Decoding,
    *,
    rule: Rule | None = None,
    ending: Ending | None = None,
    procedure: Procedure = PLAIN,
) -> Generation:
    """Continue a prompt.

    Args:
        model: Runs the forwards.
        prompt_ids: Without [MASK].
        decoding: `max_new_tokens` is the number of masks that are filled in.
        rule: Which masks are written; one at a time when None.
        ending: Where the text is over; None fills in everything. Left out of account where
            `decoding` ignores ends of text.
        procedure: Blocks, cache, confidence.

    Returns:
        The trimmed text with its trace. Every forward is in `forwards`, its `width` the positions
        that were run and its `context` the others; there is no prefill.

    Raises:
        Unsupported: Prompt and answer do not fit the model's context.
        ValueError: The prompt holds [MASK], or rule or ending broke their contract.
        InvalidOutput: The model returned NaN.
    """
    rule = rule or OneAtATime()
    trace = Trace()
    trace.mark("prefill")  # there is none: all that follows is decoding
    (row,) = decode_rows(
        model, [prompt_ids], decoding, rule=rule, ending=ending, procedure=procedure
    )
    trace.mark("decode", model.synchronize)
    facts = model.facts
    trace.forwards = row.forwards
    # A forward emits what it writes: one token, and those that it writes beside it. What it writes
    # behind the end of the text is in vain, which only the text's own count tells.
    trace.accepted = [len(each.places) - 1 for each in row.written]
    for forward, logits in zip(row.forwards, row.logits, strict=True):
        trace.flops += facts.flops(forward, logits)
    if procedure.cache != "none":
        trace.kv_bytes = sum(facts.kv_read(forward) for forward in row.forwards)
    trace.notes.update({"prefill_tokens": 0, **rule.notes})
    stopper = Stopper(model.tokenizer, decoding, facts.eos_ids)
    end = stopper.find(row.answer)
    kept = row.answer[: end.num_tokens]
    return Generation(kept, stopper.text(kept), end.finish, trace)


@torch.inference_mode()
def decode_rows(
    model: MaskedDiffusionLM,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    rule: Rule,
    ending: Ending | None = None,
    procedure: Procedure = PLAIN,
) -> list[Row]:
    """Continue several prompts, each as it would be alone; arguments as in `decode`.

    For measuring quality: prompts are padded on the left, and a forward runs the rows that still
    have masks in the block at hand.
    """
    return _Batch(model, prompts, decoding, rule, ending or NeverOver(), procedure).run()


class _Batch:
    """Texts in progress."""

    def __init__(
        self,
        model: MaskedDiffusionLM,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        rule: Rule,
        ending: Ending,
        procedure: Procedure,
    ) -> None:
        self.facts = model.facts
        self.decoding, self.rule, self.procedure = decoding, rule, procedure
        self.ending: Ending = NeverOver() if decoding.ignore_eos else ending
        _check(model, prompts, decoding)
        self.longest = max(len(prompt) for prompt in prompts)
        self.padding = [self.longest - len(prompt) for prompt in prompts]
        self.answer_length = decoding.max_new_tokens
        length = self.longest + self.answer_length
        # What stands on the left is seen by nobody; any id will do.
        self.ids = torch.full((len(prompts), length), self.facts.mask_id)
        self.is_mask = torch.zeros(len(prompts), length, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            self.ids[row, self.padding[row] : self.longest] = torch.tensor(
                list(prompt), dtype=torch.int64
            )
        self.is_mask[:, self.longest :] = True
        self.ends = torch.full((len(prompts),), length)
        self.canvas: Canvas = model.canvas(self.padding, length, keeps=procedure.cache != "none")
        self.rows = [Row() for _ in prompts]
        self.draws = [torch.Generator().manual_seed(decoding.seed) for _ in prompts]

    def run(self) -> list[Row]:
        end_of_text = min(self.facts.eos_ids, default=self.facts.mask_id)
        length, block = self.ids.shape[1], self.procedure.block_length
        for start in range(self.longest, length, block):
            self._fill(start, min(start + block, length))
        for row, found in enumerate(self.rows):
            self.ids[row, int(self.ends[row]) :] = end_of_text
            found.answer = tuple(self.ids[row, self.longest :].tolist())
        return self.rows

    def _fill(self, start: int, stop: int) -> None:
        """Fill in one block of all rows."""
        begun = [row for row in range(len(self.rows)) if self.ends[row] > start]
        number = 0
        while rows := [row for row in begun if self.is_mask[row, start:stop].any()]:
            self._step(rows, start, stop, number)
            number += 1
        if begun:
            is_over = self.ending.is_over(self.ids[begun, start:stop])
            over = [row for row, ended in zip(begun, is_over.tolist(), strict=True) if ended]
            self._end(over, [min(stop, int(self.ends[row])) for row in over])

    def _step(self, rows: list[int], start: int, stop: int, number: int) -> None:
        first, last = self._window(rows, start, stop, number)
        reach = last if self.ending.looks_ahead else min(stop, last)
        logits = self.canvas.denoise(self.ids[rows, first:last], first, range(start, reach), rows)
        view = self._view(logits, rows, start, reach)
        width = stop - start
        step = Step(
            block=View(
                *(_padded(part, width, fill) for part, fill in zip(view, _END, strict=True))
            ),
            ahead=view if self.ending.looks_ahead else None,
            rows=tuple(rows),
            offset=start - self.longest,
            number=number,
        )
        chosen = self.rule.select(step)
        _check_choice(chosen, step.block)
        self._write(rows, start, chosen, step.block.candidates)
        for row in rows:
            self._count(row, first, last, start, reach)
        kept = self.ending.cut(step, chosen)
        if kept is not None:
            self._end(rows, [self.longest + count for count in kept.tolist()])

    def _window(self, rows: list[int], start: int, stop: int, number: int) -> tuple[int, int]:
        """Return the positions to run: from the first, to before the last."""
        end = int(self.ends[rows].max())
        if number == 0 or self.procedure.cache == "none":
            return 0, end
        first = max(0, start - self.facts.is_shifted)
        return first, end if self.procedure.cache == "prefix" else min(stop, end)

    def _view(self, logits: Tensor, rows: list[int], start: int, stop: int) -> View:
        """Return candidates and confidences of the positions from `start` to `stop`."""
        logits[..., self.facts.mask_id] = -torch.inf
        if self.decoding.temperature:
            logits = logits.double()
            candidates = self._sampled(logits, rows)
        else:
            candidates = logits.argmax(dim=-1)
        confidence = _confidence(logits, candidates, self.procedure.confidence)
        if bool(confidence.isnan().any()):
            raise InvalidOutput("the model returned NaN logits.")
        candidates, confidence = candidates.cpu(), confidence.cpu()
        if self.procedure.defers_eos:
            ends = torch.tensor(sorted(self.facts.eos_ids))
            # Finite, so that an end is still written where nothing else is left.
            confidence = confidence.masked_fill(
                torch.isin(candidates, ends), torch.finfo(torch.float64).min
            )
        behind = torch.arange(start, stop) >= self.ends[rows][:, None]
        candidates = candidates.masked_fill(behind, min(self.facts.eos_ids, default=0))
        return View(candidates, confidence.masked_fill(behind, 1.0), self.is_mask[rows, start:stop])

    def _sampled(self, logits: Tensor, rows: list[int]) -> Tensor:
        """Draw candidates by the Gumbel maximum, in float64 (arXiv 2409.02908)."""
        uniform = torch.stack([self._uniform(row, logits.shape[1:]) for row in rows])
        uniform = uniform.to(logits.device).clamp_(min=torch.finfo(torch.float64).tiny)
        gumbel = -(-uniform.log()).log()
        return (logits + self.decoding.temperature * gumbel).argmax(dim=-1)

    def _uniform(self, row: int, shape: torch.Size) -> Tensor:
        """Return a row's own numbers for a step.

        How many positions a step looks at may depend on the rows beside it, so each step has a
        generator of its own: a position's numbers depend on those before it alone.
        """
        seed = int(torch.randint(2**62, (), generator=self.draws[row]))
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def _write(self, rows: list[int], start: int, chosen: Tensor, candidates: Tensor) -> None:
        stop = start + chosen.shape[1]
        self.ids[rows, start:stop] = torch.where(chosen, candidates, self.ids[rows, start:stop])
        self.is_mask[rows, start:stop] &= ~chosen
        for place, row in enumerate(rows):
            places = chosen[place].nonzero()[:, 0]
            self.rows[row].written.append(
                Written(
                    tuple((places + start - self.longest).tolist()),
                    tuple(candidates[place, places].tolist()),
                )
            )

    def _count(self, row: int, first: int, last: int, start: int, reach: int) -> None:
        """Count a forward of one row as if it were alone: no padding, nothing behind its end."""
        begin, end = self.padding[row], int(self.ends[row])
        width = min(last, end) - max(first, begin)
        self.rows[row].forwards.append(Forward(width, end - begin - width))
        self.rows[row].logits.append(min(reach, end) - start)

    def _end(self, rows: list[int], ends: list[int]) -> None:
        """Let rows end before positions."""
        shortened = [
            (row, end) for row, end in zip(rows, ends, strict=True) if end < self.ends[row]
        ]
        if not shortened:
            return
        eos = torch.tensor(sorted(self.facts.eos_ids))
        for row, end in shortened:
            tail = slice(end, int(self.ends[row]))
            lost = self.ids[row, tail][~self.is_mask[row, tail]]
            if end < self.longest or not bool(torch.isin(lost, eos).all()):
                raise ValueError(
                    f"an ending kept {end - self.longest} tokens of an answer and cut off others "
                    f"that were written; only masks and ends of the text may be."
                )
            self.ends[row] = end
            self.is_mask[row, end:] = False
        self.canvas.cut(self.ends.tolist())


# What stands behind a row's end: candidate, confidence, mask.
_END = (0, 1.0, False)


def _padded(part: Tensor, width: int, fill: float | bool) -> Tensor:
    """Return the first `width` columns, filled up where there are fewer."""
    missing = width - part.shape[1]
    return (
        torch.nn.functional.pad(part, (0, missing), value=fill) if missing > 0 else part[:, :width]
    )


def _confidence(logits: Tensor, candidates: Tensor, kind: Confidence) -> Tensor:
    """Return how sure a model is of its candidates, (rows, positions), float64.

    In float64, because float32 and below round many probabilities to 1 and ties decide nothing.
    """
    probabilities = logits.double().softmax(dim=-1)
    if kind == "entropy":
        entropy: Tensor = torch.special.entr(probabilities).sum(dim=-1)
        return -entropy
    chosen = probabilities.gather(-1, candidates[..., None])[..., 0]
    if kind == "margin":
        others = probabilities.scatter(-1, candidates[..., None], 0.0)
        return chosen - others.amax(dim=-1)
    return chosen


def _check(model: MaskedDiffusionLM, prompts: Sequence[Sequence[int]], decoding: Decoding) -> None:
    facts = model.facts
    for prompt in prompts:
        if facts.mask_id in prompt:
            raise ValueError(
                f"the prompt holds the id {facts.mask_id}, which stands for a mask in "
                f"'{model.name}'."
            )
        if len(prompt) + decoding.max_new_tokens > facts.longest_text:
            raise Unsupported(
                f"{len(prompt)} prompt tokens and {decoding.max_new_tokens} new ones exceed the "
                f"context of {facts.longest_text} tokens of '{model.name}'."
            )


def _check_choice(chosen: Tensor, block: View) -> None:
    """Refuse a choice that would stall the loop or overwrite a token."""
    if bool((chosen & ~block.is_mask).any()):
        raise ValueError("a rule chose a position that is no mask of the current block.")
    if not bool(chosen.any(dim=1).all()):
        raise ValueError("a rule chose no position, which would go on for ever.")
