"""`run --audit`: is the number what the method earned?

An audited run measures the items in an order of its own, then runs some of them again, timed and
untimed. A method that remembers answers, treats timed calls otherwise, miscounts its tokens or
writes less than the baseline is found out; its cell fails, and every row carries the result.

After the audit tests of MLPerf inference, which look for caching of repeated samples (TEST04),
unequal answers in performance and accuracy mode (TEST01) and shortened outputs (TEST06, mean length
within 10%).
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from models.base import Decoding, Generation, TextGenerator
from models.constraints import ConstrainedDecoding
from models.stopping import Stopper
from results.records import SampleRecord
from runner.certificate import Asked, AskedImages, difference

# Items that are run again, timed and untimed.
NUM_ITEMS = 8
# A repeated prompt may take this share of its first time, relative to the baseline's own change.
_SMALLEST_REPEAT_SHARE = 0.5
# What is remembered is quick on every prompt; one of so many may be an accident of the clock.
_PROMPTS_PER_ACCIDENT = 7
# Largest relative difference of the mean length from the baseline's.
_LENGTH_TOLERANCE = 0.10


class Again(NamedTuple):
    """One item once more: `seconds` is None where it was not timed."""

    item_id: str
    token_ids: Sequence[int]
    digest: str
    target_forwards: int | None
    seconds: float | None


@dataclass
class Evidence:
    """What the audit saw of one cell.

    Attributes:
        repeated: Items timed a second time.
        untimed: Items run without the clock.
        miscounts: Complaints about tokens and ends of measured samples.
        counted: Samples whose tokens and ends were looked at.
    """

    repeated: list[Again] = field(default_factory=list)
    untimed: list[Again] = field(default_factory=list)
    miscounts: list[str] = field(default_factory=list)
    counted: int = 0


def shuffled(items: Sequence[Any], seed: int) -> list[Any]:
    """Return the items in the audited order, which depends on the seed alone."""
    order = list(items)
    random.Random(f"audit order {seed}").shuffle(order)
    return order


def chosen(items: Sequence[Any], seed: int) -> list[Any]:
    """Return the items that are run again."""
    draw = random.Random(f"audit sample {seed}")
    return draw.sample(list(items), min(NUM_ITEMS, len(items)))


def miscount(generation: Generation, decoding: Decoding, model: TextGenerator) -> str:
    """Return what is wrong with a text's tokens, its end and its text; "" if nothing is.

    The ids must be the shortest prefix that ends the text, and the text must be what they say.

    Args:
        generation: What a call returned.
        decoding: How the text was to be continued.
        model: Whose tokenizer it is.
    """
    stopper = Stopper(model.tokenizer, decoding, model.facts.eos_ids)
    count = len(generation.token_ids)
    end = stopper.find(generation.token_ids)
    if end.num_tokens != count:
        return f"{count} tokens are reported, but the text ended after {end.num_tokens}."
    # Under a constraint a text may die: nothing that is allowed follows, and it says so.
    has_died = isinstance(decoding, ConstrainedDecoding) and not generation.finish
    if not end.finish and not has_died:
        return (
            f"the text ends after {count} of {decoding.max_new_tokens} tokens without an "
            "end-of-text token or a stop string."
        )
    if stopper.text(generation.token_ids) != generation.text:
        return f"the text is not what its {count} tokens say."
    return ""


def overcount(generation: Generation) -> str:
    """Return what is wrong with the trace, "" if nothing is: a forward emits its drafts and one."""
    trace = generation.trace
    if not trace.forwards or len(trace.accepted) != len(trace.forwards):
        return ""  # it does not tell, or works in another way
    first = int(trace.notes.get("prefill_tokens", 1))
    emitted = first + sum(trace.accepted) + len(trace.forwards)
    count = len(generation.token_ids)
    if count > emitted:
        return f"{count} tokens are reported, but its forwards could emit only {emitted}."
    wide = [
        f"{accepted} accepted of {forward.width} fed"
        for accepted, forward in zip(trace.accepted, trace.forwards, strict=True)
        if accepted >= forward.width
    ]
    return f"a forward accepted more than it was fed: {wide[0]}." if wide else ""


class Verdict(NamedTuple):
    """One check of an audit."""

    check: str
    is_ok: bool
    detail: str


def settle(
    evidence: Evidence,
    reference: Evidence,
    samples: Sequence[SampleRecord],
    baseline: Sequence[SampleRecord],
    *,
    model: TextGenerator,
    questions: Mapping[str, Asked | AskedImages | None],
    keeps_state: bool,
    is_baseline: bool,
) -> dict[str, Any]:
    """Return the result of a cell's audit, as `CellRecord.audit` keeps it.

    Args:
        evidence: What was seen of the cell.
        reference: What was seen of the baseline.
        samples: The cell's measured samples.
        baseline: The baseline's.
        model: Judges differences: a tie of the best logits is none.
        questions: What each item that was run again asks for, see `runner.certificate.asked`.
        keeps_state: Whether the method declares that it learns from one text to the next; then a
            repeated prompt may be faster.
        is_baseline: Whether the cell is the baseline.
    """
    first = {sample.item_id: sample for sample in samples if sample.repeat == 0}
    plain_first = {sample.item_id: sample for sample in baseline if sample.repeat == 0}
    items = len({sample.item_id for sample in samples})
    verdicts = [
        Verdict("shuffled items", True, f"{items} items in an order drawn from the seed"),
        _outputs("duplicated prompts", evidence.repeated, first, model, questions),
        _outputs("untimed outputs", evidence.untimed, first, model, questions),
        Verdict(
            "token counts",
            not evidence.miscounts,
            evidence.miscounts[0] if evidence.miscounts else f"{evidence.counted} texts",
        ),
    ]
    if not keeps_state:
        verdicts.append(_remembers(evidence.repeated, reference.repeated, first, plain_first))
    if not is_baseline:
        verdicts.append(_length(first, plain_first))
    return {
        "result": "passed" if all(verdict.is_ok for verdict in verdicts) else "failed",
        "checks": [
            {"check": verdict.check, "ok": verdict.is_ok, "detail": verdict.detail}
            for verdict in verdicts
        ],
    }


def failure(audit: Mapping[str, Any]) -> str:
    """Return the first check that failed, with its reason; "" if none did."""
    for check in audit["checks"]:
        if not check["ok"]:
            return f"audit: {check['check']}: {check['detail']}"
    return ""


def _outputs(
    check: str,
    again: Sequence[Again],
    first: Mapping[str, SampleRecord],
    model: TextGenerator,
    questions: Mapping[str, Asked | AskedImages | None],
) -> Verdict:
    """Compare outputs with those of the timed run."""
    ties = 0
    for each in again:
        measured = first[each.item_id]
        if each.digest == measured.output_digest:
            continue
        question = questions[each.item_id]
        found = difference(model, question, measured.output_ids, list(each.token_ids))
        if found is None:
            continue
        if found["verdict"] == "tie":
            ties += 1
            continue
        detail = f"another output for {each.item_id}, from token {found['position']} on"
        return Verdict(check, False, detail)
    same = f"{len(again)} outputs as in the timed run"
    return Verdict(check, True, f"{same}, {ties} up to a tie" if ties else same)


def _remembers(
    again: Sequence[Again],
    plain_again: Sequence[Again],
    first: Mapping[str, SampleRecord],
    plain_first: Mapping[str, SampleRecord],
) -> Verdict:
    """Look for a method that does less for a prompt that it has seen."""
    check = "work of duplicated prompts"
    for each in again:
        measured = first[each.item_id]
        is_same = each.digest == measured.output_digest
        if is_same and each.target_forwards != measured.target_forwards:
            return Verdict(
                check,
                False,
                f"{each.item_id} took {each.target_forwards} forwards the second time, "
                f"{measured.target_forwards} the first",
            )
    plain_shares = _shares(plain_again, plain_first)
    own_shares = _shares(again, first)
    shares = sorted(
        share / plain_shares[item_id]
        for item_id, share in own_shares.items()
        if item_id in plain_shares
    )
    if not shares:
        return Verdict(check, True, f"{len(again)} prompts, no times to compare")
    slow = shares[len(shares) - 1 - len(shares) // _PROMPTS_PER_ACCIDENT]
    detail = f"{len(shares)} prompts, {statistics.median(shares):.2f} of the first time"
    return Verdict(check, slow >= _SMALLEST_REPEAT_SHARE, detail)


def _shares(again: Sequence[Again], first: Mapping[str, SampleRecord]) -> dict[str, float]:
    """Return second time over first time by item."""
    return {
        each.item_id: each.seconds / first[each.item_id].seconds
        for each in again
        if each.seconds is not None and each.item_id in first
    }


def _length(first: Mapping[str, SampleRecord], plain: Mapping[str, SampleRecord]) -> Verdict:
    """Compare the mean length with the baseline's, over the items of both."""
    check = "mean length"
    shared = [item for item in first if item in plain]
    reference = sum(plain[item].output_tokens for item in shared)
    if not reference:
        return Verdict(check, True, "the baseline has no output to compare with")
    ratio = sum(first[item].output_tokens for item in shared) / reference
    is_ok = abs(ratio - 1) <= _LENGTH_TOLERANCE
    return Verdict(check, is_ok, f"{ratio:.3f} of the baseline's, over {len(shared)} items")
