"""The shared loop: blocks, caches, endings, batches, and what is counted."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.base import Decoding, Forward, InvalidOutput, Unsupported
from models.masked_diffusion import MaskedDiffusionModel
from models.masked_diffusion_decode import (
    Cache,
    Ending,
    NeverOver,
    OneAtATime,
    Procedure,
    Row,
    Rule,
    Step,
    View,
    decode,
    decode_rows,
    surest,
)
from tests.models.tiny_diffusion import (
    EOS,
    LONGEST,
    MASK,
    VOCABULARY,
    TableModel,
    tiny_diffusion,
)

PROMPTS = ([5, 9, 13, 7], [3, 8, 20, 11, 17, 4, 6], [12])
ANSWER = Decoding(max_new_tokens=12, ignore_eos=True)
BLOCKS = Procedure(block_length=4)


class SomeAtATime:
    """Writes the surest k of each row, a k that changes from step to step and row to row."""

    notes: Mapping[str, float | int | str] = {}

    def select(self, step: Step) -> Tensor:
        return surest(step.block, torch.tensor([1 + (row + step.number) % 3 for row in step.rows]))


@dataclass
class Watch:
    """Passes a rule's choices on and remembers what it saw."""

    rule: Rule
    steps: list[Step] = field(default_factory=list)
    notes: Mapping[str, float | int | str] = field(default_factory=dict)

    def select(self, step: Step) -> Tensor:
        self.steps.append(step)
        return self.rule.select(step)


class StopAt:
    """Is over behind the block that holds a token; cuts right behind the first one if told so."""

    def __init__(self, token: int, *, cuts: bool = False) -> None:
        self.token = token
        self.cuts = cuts
        self.looks_ahead = cuts

    def cut(self, step: Step, chosen: Tensor) -> Tensor | None:
        if not self.cuts:
            return None
        assert step.ahead is not None
        kept = []
        for row, (tokens, masks) in enumerate(
            zip(step.ahead.candidates, step.ahead.is_mask, strict=True)
        ):
            found = ((tokens == self.token) & masks).nonzero()[:, 0].tolist()
            last = found[0] + 1 if found else tokens.shape[0]
            # Never before what is written already.
            written = (~masks | torch.nn.functional.pad(chosen[row], (0, len(masks) - 4))).nonzero()
            last = max(last, int(written.max()) + 1 if len(written) else 0)
            kept.append(step.offset + last)
        return torch.tensor(kept)

    def is_over(self, block: Tensor) -> Tensor:
        return (block == self.token).any(dim=1)


def rows_of(
    model: MaskedDiffusionModel,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    decoding: Decoding = ANSWER,
    procedure: Procedure = BLOCKS,
    rule: Rule | None = None,
    ending: Ending | None = None,
) -> list[Row]:
    return decode_rows(
        model,
        prompts,
        decoding,
        rule=rule or SomeAtATime(),
        ending=ending,
        procedure=procedure,
    )


def plainly(
    model: MaskedDiffusionModel, prompt: Sequence[int], decoding: Decoding, block: int
) -> list[int]:
    """B0 as the note has it, step by step, without a cache, a batch or a view."""
    ids = [*prompt, *[MASK] * decoding.max_new_tokens]
    for start in range(len(prompt), len(ids), block):
        stop = min(start + block, len(ids))
        while MASK in ids[start:stop]:
            canvas = model.canvas((0,), len(ids), keeps=False)
            logits = canvas.denoise(torch.tensor([ids]), 0, range(len(ids)))[0].double()
            logits[:, MASK] = -torch.inf
            best = max(
                (place for place in range(start, stop) if ids[place] == MASK),
                key=lambda place: float(logits[place].softmax(0).max()),
            )
            ids[best] = int(logits[best].argmax())
    return ids[len(prompt) :]


# ---- what is written


@pytest.mark.parametrize("is_shifted", [False, True])
@pytest.mark.parametrize("block", [4, 5, 12, 40])
def test_the_plain_decoder_is_the_loop_of_the_papers(is_shifted: bool, block: int) -> None:
    model = tiny_diffusion(is_shifted=is_shifted)
    for prompt in PROMPTS:
        found = decode(model, prompt, ANSWER, procedure=Procedure(block_length=block))
        assert list(found.token_ids) == plainly(model, prompt, ANSWER, block)
        assert len(found.trace.forwards) == ANSWER.max_new_tokens


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_written_tokens_stay_and_each_step_writes_masks_of_the_current_block(cache: Cache) -> None:
    model, watch = tiny_diffusion(), Watch(SomeAtATime())
    procedure = Procedure(block_length=4, cache=cache)
    rows = rows_of(model, procedure=procedure, rule=watch)
    for row in rows:
        places = [place for each in row.written for place in each.places]
        assert sorted(places) == list(range(12))
        assert len(row.written) == len(row.forwards) <= 12
        assert [place // 4 for place in places] == sorted(place // 4 for place in places)
        # Replayed, what was written gives the answer.
        replayed = [-1] * 12
        for each in row.written:
            for place, token in zip(each.places, each.tokens, strict=True):
                assert replayed[place] == -1
                replayed[place] = token
        assert tuple(replayed) == row.answer
        assert MASK not in row.answer
    for step in watch.steps:
        assert step.block.is_mask.any(dim=1).all()
        assert step.block.confidence.dtype == torch.float64


def test_a_replay_of_the_choices_gives_the_same_answer() -> None:
    model = tiny_diffusion()
    (row,) = rows_of(model, PROMPTS[:1])

    class Replay:
        notes: Mapping[str, float | int | str] = {}

        def __init__(self) -> None:
            self.left = list(row.written)

        def select(self, step: Step) -> Tensor:
            chosen = torch.zeros_like(step.block.is_mask)
            for place in self.left.pop(0).places:
                chosen[0, place - step.offset] = True
            return chosen

    (again,) = rows_of(model, PROMPTS[:1], rule=Replay())
    assert (again.answer, again.written) == (row.answer, row.written)


def test_the_mask_is_never_a_candidate() -> None:
    """The table's own logit of the mask is the largest of all."""
    model = TableModel([torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]])])
    found = decode(model, [0, 1], Decoding(max_new_tokens=2))
    assert found.token_ids == (0, 1)


def test_a_table_is_filled_in_by_confidence_within_blocks() -> None:
    table = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.05, 0.9, 0.05], [0.8, 0.1, 0.1]])
    watch = Watch(OneAtATime())
    model = TableModel([table])
    (row,) = decode_rows(
        model, [[0]], Decoding(max_new_tokens=4), rule=watch, procedure=Procedure(block_length=2)
    )
    assert [each.places for each in row.written] == [(1,), (0,), (2,), (3,)]
    assert row.answer == (0, 2, 1, 0)
    assert torch.allclose(
        watch.steps[0].block.confidence, torch.tensor([[0.6, 0.7]]).double(), atol=1e-6
    )
    # Confidences are of written positions too, and of the block alone.
    assert [step.offset for step in watch.steps] == [0, 0, 2, 2]
    assert [step.number for step in watch.steps] == [0, 1, 0, 1]
    assert watch.steps[1].block.is_mask.tolist() == [[True, False]]
    assert watch.steps[1].block.confidence[0, 1] == pytest.approx(0.7)
    assert watch.steps[1].block.among_masks()[0, 1] == -torch.inf


def test_margin_and_entropy_are_what_dream_calls_so() -> None:
    table = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.05, 0.45]])
    expected = {
        "probability": [0.6, 0.5],
        "margin": [0.3, 0.05],
        "entropy": [float((part * part.log()).sum()) for part in table.double()],
    }
    for kind, numbers in expected.items():
        watch = Watch(OneAtATime())
        decode_rows(
            TableModel([table]),
            [[0]],
            Decoding(max_new_tokens=2),
            rule=watch,
            procedure=Procedure(confidence=kind),  # type: ignore[arg-type]  # one of the three
        )
        assert watch.steps[0].block.confidence[0].tolist() == pytest.approx(numbers, abs=1e-6)


def test_confidences_that_float32_rounds_to_one_are_told_apart() -> None:
    logits = torch.tensor([[0.0, -20.0], [0.0, -25.0]])
    model = TableModel([logits.double().exp()])
    watch = Watch(OneAtATime())
    (row,) = decode_rows(model, [[0]], Decoding(max_new_tokens=2), rule=watch)
    assert [each.places for each in row.written] == [(1,), (0,)]


def test_ends_of_the_text_are_deferred_while_there_is_anything_else() -> None:
    table = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.7, 0.3]])
    orders = {}
    for defers in (False, True):
        (row,) = decode_rows(
            TableModel([table], eos_id=1),
            [[0]],
            Decoding(max_new_tokens=3),
            rule=OneAtATime(),
            procedure=Procedure(defers_eos=defers),
        )
        orders[defers] = [each.places[0] for each in row.written]
        assert row.answer == (1, 0, 0)
    assert orders == {False: [0, 1, 2], True: [1, 2, 0]}


# ---- batches


@settings(max_examples=15, deadline=None)
@given(
    prompts=st.lists(
        st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=9), min_size=1, max_size=4
    ),
    cache=st.sampled_from(["none", "prefix", "dual"]),
    is_shifted=st.booleans(),
    temperature=st.sampled_from([0.0, 0.7]),
    ending=st.sampled_from(["never", "block", "cut"]),
    block=st.sampled_from([4, 5]),
)
def test_a_batch_decodes_each_row_as_alone(
    prompts: list[list[int]],
    cache: Cache,
    is_shifted: bool,
    temperature: float,
    ending: str,
    block: int,
) -> None:
    model = tiny_diffusion(is_shifted=is_shifted)
    decoding = Decoding(max_new_tokens=11, temperature=temperature, seed=3)
    procedure = Procedure(block_length=block, cache=cache)

    class ByLength:
        """A rule that looks at nothing of the batch but the step and the row's own view."""

        notes: Mapping[str, float | int | str] = {}

        def select(self, step: Step) -> Tensor:
            return surest(step.block, 1 + step.number % 2)

    def run(texts: list[list[int]]) -> list[Row]:
        endings = {"never": NeverOver(), "block": StopAt(EOS), "cut": CutAtEos()}
        return rows_of(model, texts, decoding, procedure, ByLength(), endings[ending])

    together = run(prompts)
    for prompt, row in zip(prompts, together, strict=True):
        (alone,) = run([prompt])
        assert row == alone


class CutAtEos:
    """Cuts behind the surest end of text among the masks ahead, or behind what is written."""

    looks_ahead = True

    def cut(self, step: Step, chosen: Tensor) -> Tensor:
        assert step.ahead is not None
        kept = []
        for row in range(len(step.rows)):
            view = View(*(part[row] for part in step.ahead))
            masks = view.is_mask.clone()
            masks[: chosen.shape[1]] &= ~chosen[row, : len(masks)]
            ends = masks & (view.candidates % 3 == EOS % 3)
            last = int(torch.where(ends, view.confidence, -1.0).argmax()) + 1
            if not ends.any():
                last = len(masks)
            written = (~masks & (view.confidence != 1.0)).nonzero()
            kept.append(step.offset + max(last, int(written.max()) + 1 if len(written) else 1))
        return torch.tensor(kept)

    def is_over(self, block: Tensor) -> Tensor:
        return torch.zeros(len(block), dtype=torch.bool)


def test_sampling_takes_each_row_through_its_own_draws_from_the_seed() -> None:
    model = tiny_diffusion()
    first, again, other = (
        decode(
            model,
            PROMPTS[0],
            Decoding(max_new_tokens=12, temperature=1.0, seed=seed, ignore_eos=True),
        ).token_ids
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_sampled_candidates_have_the_distribution_of_the_temperature() -> None:
    table = torch.tensor([[0.6, 0.3, 0.1]])
    temperature, draws = 0.5, 500
    counts = torch.zeros(3)
    for seed in range(draws):
        found = decode(
            TableModel([table]),
            [0],
            Decoding(max_new_tokens=1, temperature=temperature, seed=seed),
        )
        counts[found.token_ids[0]] += 1
    expected = (table[0].log() / temperature).softmax(0)
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((counts / draws - expected).abs() < 4 * deviation).all()


# ---- caches


@pytest.mark.parametrize("is_shifted", [False, True])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_refresh_before_every_step_equals_no_cache(cache: Cache, is_shifted: bool) -> None:
    model = tiny_diffusion(is_shifted=is_shifted)
    for prompt in PROMPTS:
        # Blocks of one token: every step is the first of its block.
        each = Procedure(block_length=1, cache=cache)
        plain, kept = Watch(OneAtATime()), Watch(OneAtATime())
        (expected,) = rows_of(model, [prompt], procedure=Procedure(block_length=1), rule=plain)
        (found,) = rows_of(model, [prompt], procedure=each, rule=kept)
        assert found.answer == expected.answer
        for ours, theirs in zip(kept.steps, plain.steps, strict=True):
            assert torch.allclose(ours.block.confidence, theirs.block.confidence, atol=1e-5)


@pytest.mark.parametrize("is_shifted", [False, True])
def test_a_prefix_cache_without_a_prefix_equals_no_cache(is_shifted: bool) -> None:
    model = tiny_diffusion(is_shifted=is_shifted)
    plain, kept = Watch(SomeAtATime()), Watch(SomeAtATime())
    (expected,) = rows_of(model, [[]], procedure=Procedure(block_length=12), rule=plain)
    procedure = Procedure(block_length=12, cache="prefix")
    (found,) = rows_of(model, [[]], procedure=procedure, rule=kept)
    assert found == expected
    for ours, theirs in zip(kept.steps, plain.steps, strict=True):
        assert torch.allclose(ours.block.confidence, theirs.block.confidence, atol=1e-6)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_caches_are_approximations_that_do_change_confidences(cache: Cache) -> None:
    model = tiny_diffusion()
    plain, kept = Watch(OneAtATime()), Watch(OneAtATime())
    rows_of(model, PROMPTS[:1], rule=plain)
    rows_of(model, PROMPTS[:1], procedure=Procedure(block_length=4, cache=cache), rule=kept)
    # The first step of the first block is a refresh, the second is not.
    first, second = (
        (ours.block.confidence - theirs.block.confidence).abs().max()
        for ours, theirs in zip(kept.steps[:2], plain.steps[:2], strict=True)
    )
    assert first < 1e-6
    assert second > 1e-4


@pytest.mark.parametrize(
    ("cache", "is_shifted", "widths"),
    [
        # Prompt 7, answer 12, blocks of 4: a refresh runs 19, a later step what its cache leaves.
        ("none", False, [19] * 12),
        ("prefix", False, [19, 12, 12, 12, 19, 8, 8, 8, 19, 4, 4, 4]),
        ("prefix", True, [19, 13, 13, 13, 19, 9, 9, 9, 19, 5, 5, 5]),
        ("dual", False, [19, 4, 4, 4] * 3),
        ("dual", True, [19, 5, 5, 5] * 3),
    ],
)
def test_every_position_that_is_run_is_counted(
    cache: Cache, is_shifted: bool, widths: list[int]
) -> None:
    model = tiny_diffusion(is_shifted=is_shifted)
    procedure = Procedure(block_length=4, cache=cache)
    found = decode(model, PROMPTS[1], ANSWER, procedure=procedure).trace
    assert found.forwards == [Forward(width, 19 - width) for width in widths]
    assert found.prefill == []
    assert found.accepted == [0] * 12
    assert found.notes["prefill_tokens"] == 0
    # The output head is run on what the rule may choose from: four positions a step.
    assert found.flops == sum(model.facts.flops(forward, 4) for forward in found.forwards)
    read = sum(model.facts.kv_read(forward) for forward in found.forwards)
    assert found.kv_bytes == (0 if cache == "none" else read)


def test_what_is_counted_is_what_is_run() -> None:
    model = tiny_diffusion()
    run: list[int] = []
    network = model.module
    handle = network.register_forward_pre_hook(lambda _, inputs: run.append(inputs[0].shape[1]))
    try:
        for cache in ("none", "prefix", "dual"):
            run.clear()
            trace = decode(
                model, PROMPTS[1], ANSWER, procedure=Procedure(block_length=4, cache=cache)
            ).trace
            assert run == [forward.width for forward in trace.forwards]
    finally:
        handle.remove()


# ---- endings


def test_a_text_that_is_over_is_filled_up_with_its_end_and_run_no_more() -> None:
    table = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.9, 0.1]])
    model = TableModel([table], eos_id=1)
    decoding = Decoding(max_new_tokens=6)
    procedure = Procedure(block_length=2)
    (row,) = decode_rows(
        model, [[0]], decoding, rule=OneAtATime(), ending=StopAt(1), procedure=procedure
    )
    assert row.answer == (0, 1, 1, 1, 1, 1)
    assert len(row.forwards) == 2
    (full,) = decode_rows(model, [[0]], decoding, rule=OneAtATime(), procedure=procedure)
    assert full.answer == (0, 1, 0, 0, 0, 0)
    assert len(full.forwards) == 6
    found = decode(model, [0], decoding, ending=StopAt(1), procedure=procedure)
    assert (found.token_ids, found.finish) == ((0, 1), "eos")


def test_a_fixed_length_has_no_ending() -> None:
    table = torch.tensor([[0.1, 0.9]] * 4)
    model = TableModel([table], eos_id=1)
    decoding = Decoding(max_new_tokens=4, ignore_eos=True)
    found = decode(model, [0], decoding, ending=StopAt(1), procedure=Procedure(block_length=2))
    assert len(found.token_ids) == len(found.trace.forwards) == 4
    assert found.finish == "length"


def test_a_cut_shortens_what_is_run_and_shows_no_mask_behind_it() -> None:
    model = tiny_diffusion()

    class CutToSeven:
        looks_ahead = False

        def cut(self, step: Step, chosen: Tensor) -> Tensor:
            return torch.full((len(step.rows),), 7)

        def is_over(self, block: Tensor) -> Tensor:
            return torch.zeros(len(block), dtype=torch.bool)

    watch = Watch(OneAtATime())
    decoding = Decoding(max_new_tokens=12)
    (row,) = decode_rows(
        model, [PROMPTS[0]], decoding, rule=watch, ending=CutToSeven(), procedure=BLOCKS
    )
    assert row.answer[7:] == (EOS,) * 5
    assert len(row.forwards) == 7
    # The first forward knew of no cut: 4 and 12 positions; the others run 4 and 7.
    assert [forward.width for forward in row.forwards] == [16] + [11] * 6
    assert all(forward.context == 0 for forward in row.forwards)
    last = watch.steps[-1].block
    assert last.is_mask.shape == (1, 4)
    assert last.confidence[0, 3] == 1.0
    assert not last.is_mask[0, 3]
    # What is cut off is not there: the rest is decoded as with an answer of seven masks.
    (short,) = decode_rows(
        model, [PROMPTS[0]], Decoding(max_new_tokens=7, ignore_eos=True), rule=OneAtATime(),
        procedure=BLOCKS,
    )  # fmt: skip
    second, other = watch.steps[1].block, None
    canvas = model.canvas((0,), 11, keeps=False)
    ids = [*PROMPTS[0], *[MASK] * 7]
    ids[4 + row.written[0].places[0]] = row.written[0].tokens[0]
    other = canvas.denoise(torch.tensor([ids]), 0, range(4, 8)).double()
    other[..., MASK] = -torch.inf
    assert torch.allclose(second.confidence, other.softmax(-1).amax(-1), atol=1e-5)
    assert len(short.answer) == 7


def test_an_ending_that_cuts_off_a_written_token_is_refused() -> None:
    class Cruel(NeverOver):
        def cut(self, step: Step, chosen: Tensor) -> Tensor:  # type: ignore[override]  # it cuts
            return torch.zeros(len(step.rows), dtype=torch.int64)

    with pytest.raises(ValueError, match="cut off others that were written"):
        rows_of(tiny_diffusion(), ending=Cruel(), decoding=Decoding(max_new_tokens=12))


def test_an_ending_sees_ahead_what_was_run() -> None:
    seen: dict[Cache, list[int]] = {}
    for cache in ("none", "prefix", "dual"):

        class Look(NeverOver):
            looks_ahead = True

            def cut(self, step: Step, chosen: Tensor) -> None:
                assert step.ahead is not None
                seen.setdefault(cache, []).append(step.ahead.candidates.shape[1])  # noqa: B023  # used at once

        decoding = Decoding(max_new_tokens=8)
        procedure = Procedure(block_length=4, cache=cache)
        decode(tiny_diffusion(), [5], decoding, ending=Look(), procedure=procedure)
    assert seen == {
        "none": [8, 8, 8, 8, 4, 4, 4, 4],
        "prefix": [8, 8, 8, 8, 4, 4, 4, 4],
        "dual": [8, 4, 4, 4, 4, 4, 4, 4],
    }


# ---- contracts


class Empty:
    notes: Mapping[str, float | int | str] = {}

    def select(self, step: Step) -> Tensor:
        return torch.zeros_like(step.block.is_mask)


class Everything(Empty):
    def select(self, step: Step) -> Tensor:
        return torch.ones_like(step.block.is_mask) if step.number else surest(step.block, 1)


@pytest.mark.parametrize(("rule", "words"), [(Empty(), "for ever"), (Everything(), "is no mask")])
def test_a_rule_that_breaks_its_contract_is_refused(rule: Rule, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rows_of(tiny_diffusion(), rule=rule)


def test_a_prompt_with_masks_or_beyond_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match=f"the prompt holds the id {MASK}"):
        decode(tiny_diffusion(), [5, MASK], ANSWER)
    with pytest.raises(Unsupported, match=f"context of {LONGEST}"):
        decode(tiny_diffusion(), [5] * (LONGEST - 11), ANSWER)
    assert decode(tiny_diffusion(), [5] * (LONGEST - 12), ANSWER).token_ids


def test_logits_that_are_no_numbers_are_no_output() -> None:
    with pytest.raises(InvalidOutput, match="NaN"):
        decode(TableModel([torch.tensor([[torch.nan, 0.5]])]), [0], Decoding(max_new_tokens=1))


def test_the_surest_masks_are_chosen_first_ones_among_equals() -> None:
    for count, size in itertools.product(range(1, 5), range(1, 5)):
        confidence = torch.tensor([[0.5] * size, [0.1 * place for place in range(size)]]).double()
        is_mask = torch.ones(2, size, dtype=torch.bool)
        is_mask[1, -1] = size == 1
        chosen = surest(View(torch.zeros(2, size).long(), confidence, is_mask), count)
        assert chosen[0].nonzero()[:, 0].tolist() == list(range(min(count, size)))
        left = [place for place in range(size) if bool(is_mask[1, place])]
        assert chosen[1].nonzero()[:, 0].tolist() == sorted(left[-count:])
