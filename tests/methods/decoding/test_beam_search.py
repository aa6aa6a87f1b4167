"""Beam search against transformers' own and against all texts there are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from hardware.profile import Profile
from methods.decoding.beam_search import Beam, BeamSearch, best_extensions
from models.base import Decoding, Generation, InvalidOutput, TextGenerator
from models.native.build import compiler
from models.text import CausalLM
from tests.models.tiny import tiny_model
from tests.models.toy import TableModel, random_table

CPU = Profile(name="test", kind="cpu", label="test")
MODELS = [("llama", "transformers"), ("qwen2", "transformers")] + [
    ("llama", "native") for _ in range(bool(compiler()))
]
PROMPTS = [[(11 * n + 5 * at * at) % 96 + 1 for at in range(1 + n % 7)] for n in range(10)]


def generate(
    method: BeamSearch, model: TextGenerator, prompt: Sequence[int], length: int, **options: Any
) -> Generation:
    with method.apply(model, CPU) as changed:
        return changed.generate(prompt, Decoding(max_new_tokens=length, **options))


class PatientTable(TableModel):
    """Forgets a tree that another follows, as caches of real models do."""

    def session(self, capacity: int) -> Any:
        session = super().session(capacity)
        verify = session.verify

        def patient(tree: Any) -> torch.Tensor:
            session._waiting = None
            return verify(tree)

        session.verify = patient  # type: ignore[method-assign]  # this one only
        return session


def peer(model: CausalLM, prompt: Sequence[int], length: int, **settings: Any) -> tuple[int, ...]:
    """Return what transformers' beam search emits, without the padding behind its end."""
    with torch.inference_mode():
        sequences = model.module.generate(
            torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=length,
            do_sample=False,
            **settings,
        )
    tokens = sequences[0, len(prompt) :].tolist()
    ends = settings.get("eos_token_id") or []
    end = next((at + 1 for at, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[:end])


@pytest.mark.filterwarnings("ignore::UserWarning")  # transformers on settings that it does not use
@pytest.mark.parametrize(("architecture", "kernels"), MODELS)
@pytest.mark.parametrize(
    ("num_beams", "length_penalty"), [(2, 1.0), (3, 1.0), (5, 1.0), (3, 0.0), (4, 2.0)]
)
def test_texts_are_those_of_transformers(
    architecture: str, kernels: Any, num_beams: int, length_penalty: float
) -> None:
    model = tiny_model(architecture, kernels=kernels)
    ends = set(range(0, 97, 9))  # often enough that texts end early
    model.facts = replace(model.facts, eos_ids=frozenset(ends))
    method = BeamSearch(num_beams=num_beams, length_penalty=length_penalty)
    finishes, unlike_greedy = set(), 0
    for prompt in PROMPTS:
        for ignore in (False, True):
            found = generate(method, model, prompt, 10, ignore_eos=ignore)
            expected = peer(
                model,
                prompt,
                10,
                num_beams=num_beams,
                length_penalty=length_penalty,
                eos_token_id=None if ignore else sorted(ends),
                pad_token_id=0,
            )
            assert found.token_ids == expected
            finishes.add(found.finish)
        unlike_greedy += found.token_ids != (
            model.generate(prompt, Decoding(max_new_tokens=10, ignore_eos=True)).token_ids
        )
    # A penalty of 2 rewards length itself.
    assert finishes >= ({"length"} if length_penalty > 1 else {"length", "eos"})
    assert unlike_greedy > 3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("length_penalty", [1.0, 0.0])
def test_with_enough_beams_the_best_of_all_texts_is_found(seed: int, length_penalty: float) -> None:
    model = PatientTable(random_table(4, 2, seed=seed))
    scores = {
        text: math.log(model.probability([1, 2], text, 1.0)) / 3**length_penalty
        for text in itertools.product(range(4), repeat=3)
    }
    method = BeamSearch(num_beams=64, length_penalty=length_penalty)
    found = generate(method, model, [1, 2], 3)
    assert found.token_ids == max(scores, key=lambda text: scores[text])
    assert found.trace.notes["log_probability_per_token"] == pytest.approx(
        max(scores.values()) * 3**length_penalty / 3, abs=1e-5
    )


def test_normalising_by_length_prefers_long_texts_and_a_penalty_of_0_short_ones() -> None:
    p = torch.full((4, 4), 1e-9)
    p[0, [3, 1]] = torch.tensor([0.6, 0.4])  # the end, or on with 1
    p[1, [1, 3]] = torch.tensor([0.95, 0.05])
    model = PatientTable(p.log(), eos_ids=frozenset({3}))
    short = generate(BeamSearch(length_penalty=0.0), model, [0], 8)
    assert (short.token_ids, short.finish) == ((3,), "eos")
    long = generate(BeamSearch(length_penalty=1.0), model, [0], 8)
    assert (long.token_ids, long.finish) == ((1,) * 8, "length")


def test_a_stop_string_ends_a_beam() -> None:
    p = torch.full((5, 5), 1e-9)
    p[0, [1, 2]] = torch.tensor([0.6, 0.4])
    p[1, 2] = p[2, 3] = p[3, 4] = p[4, 4] = 1.0
    model = PatientTable(p.log())
    found = generate(BeamSearch(), model, [0], 9, stop=("cd",))
    assert found.token_ids == (1, 2, 3)
    assert (found.text, found.finish) == ("b", "stop")


@pytest.mark.parametrize("heat", [0.0, 1.0])
def test_one_beam_is_plain_decoding(heat: float) -> None:
    model = tiny_model("llama")
    for prompt in PROMPTS[:4]:
        decoding = Decoding(max_new_tokens=12, temperature=heat, seed=5)
        plain = model.generate(prompt, decoding)
        found = generate(BeamSearch(num_beams=1), model, prompt, 12, temperature=heat, seed=5)
        assert found.token_ids == plain.token_ids
        assert found.trace.forwards == plain.trace.forwards


def test_the_shared_part_is_cached_once_and_only_what_differs_is_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    opened: list[Any] = []
    session = model.session
    monkeypatch.setattr(
        model, "session", lambda capacity: opened.append(session(capacity)) or opened[-1]
    )
    prompt = PROMPTS[6]
    found = generate(BeamSearch(), model, prompt, 30, ignore_eos=True)
    trace = found.trace
    assert [(each.width, each.context) for each in trace.prefill] == [
        (len(prompt) - 1, 0),
        (1, len(prompt) - 1),
    ]
    committed = opened[0].length
    assert len(prompt) < committed < len(prompt) + 30
    fresh = session(60)
    fresh.prefill([*prompt, *found.token_ids][:committed])
    for one, other in zip(opened[0].cached(), fresh.cached(), strict=True):
        assert (one - other).abs().max() < 1e-4
    # At most three tips and the root, when beams part only at their last token.
    widths = [forward.width for forward in trace.forwards]
    assert min(widths) <= 4
    assert trace.notes["read_again"] == sum(widths) - 3 * len(widths)
    assert len(widths) == 29


def test_forwards_past_the_length_of_the_text_emitted_nothing() -> None:
    p = torch.full((5, 5), 1e-9)
    p[0, [4, 1]] = torch.tensor([0.5, 0.5])
    p[1, [1, 2, 4]] = torch.tensor([0.5, 0.3, 0.2])
    p[2, [1, 2, 4]] = torch.tensor([0.4, 0.4, 0.2])
    model = PatientTable(p.log(), eos_ids=frozenset({4}))
    found = generate(BeamSearch(num_beams=2), model, [3, 0], 12)
    trace = found.trace
    assert found.token_ids == (4,)
    assert len(trace.forwards) > 1
    assert trace.accepted == [-1] * len(trace.forwards)


def test_sampled_beams_differ_by_seed_and_are_drawn_by_their_probability() -> None:
    model = PatientTable(random_table(30, seed=1))
    texts = {
        generate(BeamSearch(), model, [0], 6, temperature=1.0, seed=seed).token_ids
        for seed in range(20)
    }
    assert len(texts) > 5
    # One beam of the extensions, drawn often, has the distribution of the tokens.
    row = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    noise = torch.Generator().manual_seed(0)
    drawn = [best_extensions([Beam((), 0.0)], row, 1, noise)[0].tokens[0] for _ in range(3000)]
    for token, share in enumerate(torch.softmax(row[0], 0).tolist()):
        assert drawn.count(token) / 3000 == pytest.approx(share, abs=0.03)


def test_extensions_are_ranked_over_all_beams() -> None:
    rows = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.25, 0.25]]).log()
    beams = [Beam((7,), -1.0), Beam((8,), -0.5)]
    found = best_extensions(beams, rows, 4)
    assert [beam.tokens for beam in found] == [(8, 0), (7, 0), (8, 1), (8, 2)]
    assert [beam.score for beam in found] == pytest.approx(
        [-0.5 + math.log(0.5), -1 + math.log(0.6), -0.5 + math.log(0.25), -0.5 + math.log(0.25)]
    )
    rows[1, 2] = math.nan
    with pytest.raises(InvalidOutput, match="NaN"):
        best_extensions(beams, rows, 4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 0}, "num_beams must be a whole number from 1 to 64, got 0"),
        ({"num_beams": 65}, "from 1 to 64, got 65"),
        ({"length_penalty": 11.0}, r"length_penalty must lie in \[-10, 10\], got 11.0"),
        ({"length_penalty": math.nan}, "length_penalty must lie in"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        BeamSearch(**options)
