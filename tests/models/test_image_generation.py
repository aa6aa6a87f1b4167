"""The pipeline, the sessions and the plain loop, each against a slow version."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.base import (
    AutoregressiveImageModel,
    Forward,
    ImageGenerator,
    ImageSampling,
    ImageSession,
    InvalidOutput,
    TextGenerator,
    Trace,
    Unsupported,
    WindowOutput,
)
from models.image_generation import (
    AnywhereAnything,
    AutoregressiveImages,
    ImageDraws,
    LoopedImages,
    RasterLoop,
    TokenPipeline,
    draw_tokens,
    generate_images,
    laws_in_parts,
    read_tokens,
)
from runner.conformance_base import snapshot
from runner.conformance_image import tiny_images
from runner.guards import Damage, WeightGuard

GUIDED = ImageSampling(guidance_scale=2.0)
LABELS, SEEDS = (0, 3), (11, 12)


@pytest.fixture(scope="module")
def model() -> AutoregressiveImages:
    return tiny_images()


@pytest.fixture(scope="module")
def images(model: AutoregressiveImages) -> Tensor:
    return torch.tensor(model.generate(LABELS, SEEDS, GUIDED).tokens)


def opened(model: AutoregressiveImages, *, guided: bool = True, capacity: int = 32) -> ImageSession:
    return model.session(LABELS, guided=guided, capacity=capacity, trace=Trace())


class RowEnds:
    """Token 0 ends a row of 4 and stands nowhere else."""

    def forbidden(self, places: Tensor) -> Tensor:
        is_end = (places % 4 == 3)[:, None]
        is_zero = torch.arange(48) == 0
        return is_end != is_zero


def pipeline(constrained: bool = False, **settings: float) -> TokenPipeline:
    constraints = RowEnds() if constrained else AnywhereAnything()
    return TokenPipeline(sampling=ImageSampling(**settings), constraints=constraints)


def slow_probabilities(logits: list[float], sampling: ImageSampling) -> list[float]:
    """One place's distribution by sorting a list."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    if sampling.temperature == 0:
        return [float(token == order[0]) for token in range(len(logits))]
    scaled = [logit / sampling.temperature for logit in logits]
    kept = [token for token in order if scaled[token] > -torch.inf]
    if sampling.top_k:
        kept = kept[: sampling.top_k]
    largest = scaled[kept[0]]

    def normalised(tokens: list[int]) -> dict[int, float]:
        weights = {token: float(torch.tensor(scaled[token] - largest).exp()) for token in tokens}
        return {token: weight / sum(weights.values()) for token, weight in weights.items()}

    shares, nucleus, mass = normalised(kept), [], 0.0
    for token in kept:
        if mass >= sampling.top_p:
            break
        nucleus.append(token)
        mass += shares[token]
    final = normalised(nucleus)
    return [final.get(token, 0.0) for token in range(len(logits))]


@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([1.0, 1.5, 4.0]),
    temperature=st.sampled_from([0.0, 0.7, 1.0, 1.3]),
    top_k=st.sampled_from([0, 1, 5, 100]),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
    constrained=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_a_window_gets_the_probabilities_that_its_places_get_one_by_one_and_slowly(
    seed: int, scale: float, temperature: float, top_k: int, top_p: float, constrained: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(4, 5, 48, generator=generator)
    places = torch.tensor([2, 3, 3, 0, 7])
    output = WindowOutput(logits, logits[..., :2], rows=2)
    pipe = pipeline(
        constrained, guidance_scale=scale, temperature=temperature, top_k=top_k, top_p=top_p
    )
    found = pipe.probabilities(output, places)
    assert found.shape == (2, 5, 48)
    for slot in range(5):
        one = WindowOutput(logits[:, slot : slot + 1], logits[:, :1, :2], rows=2)
        alone = pipe.probabilities(one, places[slot : slot + 1])
        assert torch.equal(alone[:, 0], found[:, slot])
        for row in range(2):
            merged = logits[2 + row, slot] + scale * (logits[row, slot] - logits[2 + row, slot])
            if constrained:
                merged = merged.masked_fill(RowEnds().forbidden(places)[slot], -torch.inf)
            expected = torch.tensor(slow_probabilities(merged.tolist(), pipe.sampling))
            torch.testing.assert_close(found[row, slot], expected, atol=2e-6, rtol=0)


def test_without_guidance_the_unconditional_half_is_neither_needed_nor_looked_at() -> None:
    logits = torch.randn(2, 1, 48)
    plain = WindowOutput(logits, logits, rows=2)
    doubled = WindowOutput(torch.cat([logits, 100 * logits]), logits, rows=2)
    pipe = pipeline()
    assert torch.equal(pipe.probabilities(plain, [0]), pipe.probabilities(doubled, [0]))
    with pytest.raises(ValueError, match="guided=True"):
        pipeline(guidance_scale=2.0).probabilities(plain, [0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_are_no_distribution(temperature: float) -> None:
    logits = torch.zeros(1, 2, 48)
    logits[0, 1, 7] = torch.nan
    with pytest.raises(InvalidOutput, match="NaN"):
        pipeline(temperature=temperature).probabilities(WindowOutput(logits, logits, 1), [0, 1])


def test_each_logit_needs_a_place() -> None:
    logits = torch.zeros(1, 2, 48)
    with pytest.raises(ValueError, match="2 logits"):
        pipeline().probabilities(WindowOutput(logits, logits, 1), [0])


def test_draws_invert_the_distribution_and_never_take_what_is_impossible() -> None:
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    levels = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53, 1.0], dtype=torch.float64)
    found = draw_tokens(probabilities.expand(7, -1), levels)
    assert found.tolist() == [1, 1, 3, 3, 4, 4, 4]


def test_the_numbers_of_a_row_depend_on_its_seed_and_the_name_of_the_stream_alone() -> None:
    together, alone = ImageDraws([3, 4]), ImageDraws([4])
    first = together.uniforms(5)
    assert torch.equal(first[1], alone.uniform(0, 5))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(alone.stream("drafts").uniform(0, 5), ImageDraws([4]).uniform(0, 5))
    again = ImageDraws([4]).stream("drafts").uniform(0, 5)
    assert torch.equal(alone.stream("drafts").uniform(0, 5), again)


# ------------------------------------------------------------------------------------ sessions


def test_a_window_returns_what_its_tokens_return_one_by_one(
    model: AutoregressiveImages, images: Tensor
) -> None:
    one, wide = opened(model), opened(model)
    first = one.prefill()
    assert torch.equal(first.logits, wide.prefill().logits)
    singles = [one.forward(images[:, place : place + 1]) for place in range(7)]
    windows = [wide.forward(images[:, :1]), wide.forward(images[:, 1:7])]
    for name in ("logits", "hidden"):
        expected = torch.cat([getattr(each, name) for each in singles], dim=1)
        found = torch.cat([getattr(each, name) for each in windows], dim=1)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(model.head(singles[0].hidden), singles[0].logits)
    assert singles[0].conditional.shape == (2, 1, 48)
    assert not torch.equal(singles[0].conditional, singles[0].unconditional)


def test_a_tree_sees_its_ancestors_alone_and_the_kept_path_is_as_if_fed_in_order(
    model: AutoregressiveImages, images: Tensor
) -> None:
    # Two prefixes of the image share a root; the second branch holds the image's own tokens.
    tree, plain = opened(model), opened(model)
    for session in (tree, plain):
        session.prefill()
        session.forward(images[:, :2])
    wrong = (images[:, 3:4] + 1) % 48
    window = torch.cat([images[:, 2:3], wrong, images[:, 3:4], images[:, 4:5]], dim=1)
    places = torch.tensor([2, 3, 3, 4])
    sees = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]).bool()
    found = tree.forward(window, places, sees)
    expected = plain.forward(images[:, 2:5])
    torch.testing.assert_close(found.logits[:, [0, 2, 3]], expected.logits)
    tree.keep(2, [0, 2, 3])
    assert tree.length == plain.length == 5
    torch.testing.assert_close(
        tree.forward(images[:, 5:6]).logits, plain.forward(images[:, 5:6]).logits
    )


def test_cropped_tokens_are_forgotten_by_both_halves(
    model: AutoregressiveImages, images: Tensor
) -> None:
    cropped, plain = opened(model), opened(model)
    cropped.prefill(), plain.prefill()
    cropped.forward((images[:, :6] + 5) % 48)
    cropped.crop(0)
    assert torch.equal(cropped.forward(images[:, :3]).logits, plain.forward(images[:, :3]).logits)


def test_a_session_counts_each_forward_for_each_row(model: AutoregressiveImages) -> None:
    trace, facts = Trace(), model.facts
    session = model.session(LABELS, guided=True, capacity=16, trace=trace)
    session.prefill()
    session.forward(torch.zeros(2, 3, dtype=torch.int64))
    assert trace.prefill == [Forward(1, 0)] * 2
    assert trace.forwards == [Forward(3, 1)] * 2
    # Two layers, by hand: qkv and output of 32 x 32, three of 32 x 96, the head of 32 x 48.
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 96)
    assert facts.matrix_parameters == matrices + 32 * 48
    prefill = 2 * (matrices + 32 * 48) + 4 * 2 * 32 * 1
    window = 3 * 2 * (matrices + 32 * 48) + 4 * 2 * 32 * (2 + 3 + 4)
    assert trace.flops == 4 * (prefill + window)
    assert trace.kv_bytes == 4 * (2 * 2 * 32 * 8) * (1 + 4)


WRONG: dict[str, tuple[Callable[[ImageSession], object], str]] = {
    "places beyond the image": (
        lambda session: session.forward(torch.zeros(2, 1, dtype=torch.int64), torch.tensor([16])),
        "0 to 15",
    ),
    "tokens of other rows": (
        lambda session: session.forward(torch.zeros(3, 1, dtype=torch.int64)),
        r"\(2, width\)",
    ),
    "a window for which there is no room": (
        lambda session: session.forward(torch.zeros(2, 6, dtype=torch.int64)),
        "room for 5",
    ),
    "a mask of another shape": (
        lambda session: session.forward(
            torch.zeros(2, 2, dtype=torch.int64), mask=torch.ones(2, 3).bool()
        ),
        "mask must be",
    ),
    "a second prefill": (lambda session: session.prefill(), "read already"),
    "a crop of what is not there": (lambda session: session.crop(1), "length must lie"),
    "a path out of the window": (lambda session: session.keep(0, [0]), "path within"),
}


@pytest.mark.parametrize("name", WRONG)
def test_sessions_refuse(model: AutoregressiveImages, name: str) -> None:
    session = opened(model, capacity=5)
    session.prefill()
    act, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        act(session)


# ------------------------------------------------------------------------------------ the loop


def test_plain_decoding_draws_each_token_given_all_before_it(
    model: AutoregressiveImages,
) -> None:
    sampling = ImageSampling(guidance_scale=1.5, temperature=0.9, top_k=20, top_p=0.95)
    found = model.generate(LABELS, SEEDS, sampling)
    tokens = torch.tensor(found.tokens)
    # The slow version reads the whole image anew, without a cache, for each token.
    laws = read_tokens(model, LABELS, tokens, sampling)
    uniforms = ImageDraws(SEEDS).uniforms(16)
    assert torch.equal(draw_tokens(laws, uniforms), tokens)
    assert found.trace.accepted == [0] * len(found.trace.forwards) == [0] * 30
    assert found.pixels.shape == (2, 8, 8, 3)
    assert list(found.trace.marks) == ["prefill", "decode", "pixels"]


def test_whole_images_are_read_as_the_network_itself_reads_them(
    model: AutoregressiveImages, images: Tensor
) -> None:
    logits = model.module.sequence_logits(torch.tensor(LABELS), images)
    found = read_tokens(model, LABELS, images, ImageSampling())
    torch.testing.assert_close(found, logits.softmax(-1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("places", [1, 4, 15, 16, 40])
def test_images_are_read_in_parts_as_they_are_at_once(
    model: AutoregressiveImages, images: Tensor, places: int
) -> None:
    sampling = ImageSampling(guidance_scale=1.5)
    whole = read_tokens(model, LABELS, images, sampling)
    room = 2 * len(LABELS) * model.facts.vocab_size * places
    parts = list(laws_in_parts(model, LABELS, images, sampling, most=room + 1))
    assert [place for part, _ in parts for place in range(16)[part]] == list(range(16))
    # The law of the first token comes from the condition and takes no forward.
    assert max(laws.shape[1] for _, laws in parts) <= places
    assert len(parts) == 1 + -(-15 // places)
    found = torch.cat([laws for _, laws in parts], dim=1)
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=1e-5)


def test_an_image_does_not_depend_on_those_beside_it(model: AutoregressiveImages) -> None:
    together = model.generate((0, 3, 1), (11, 12, 13), GUIDED)
    for row, (label, seed) in enumerate(((0, 11), (3, 12), (1, 13))):
        assert model.generate([label], [seed], GUIDED).tokens[0] == together.tokens[row]


def test_guidance_1_runs_half_and_gives_what_a_doubled_batch_gives(
    model: AutoregressiveImages,
) -> None:
    plain = model.generate(LABELS, SEEDS, ImageSampling())
    session = model.session(LABELS, guided=True, capacity=16, trace=Trace())
    doubled = RasterLoop().run(model, session, pipeline(), ImageDraws(SEEDS), LABELS)
    assert doubled.tolist() == [list(row) for row in plain.tokens]
    assert session.trace.flops == 2 * plain.trace.flops


def test_the_model_is_an_image_generator_and_no_text_generator(model: AutoregressiveImages) -> None:
    for each in (model, LoopedImages(model, RasterLoop)):
        assert isinstance(each, ImageGenerator)
        assert isinstance(each, AutoregressiveImageModel)
        assert not isinstance(each, TextGenerator)


class Cut(RasterLoop):
    """A loop that forgets the last token."""

    def run(self, *arguments: object) -> Tensor:
        return super().run(*arguments)[:, :-1]  # type: ignore[arg-type]  # passed on


class Beyond(RasterLoop):
    """A loop that draws a token that is none."""

    def run(self, *arguments: object) -> Tensor:
        return super().run(*arguments) + 48  # type: ignore[arg-type]  # passed on


@pytest.mark.parametrize(("loop", "message"), [(Cut(), "were to be drawn"), (Beyond(), "outside")])
def test_loops_that_return_no_images_are_found_out(
    model: AutoregressiveImages, loop: RasterLoop, message: str
) -> None:
    with pytest.raises(InvalidOutput, match=message):
        generate_images(model, LABELS, SEEDS, GUIDED, loop)


def test_requests_that_make_no_sense_are_refused(model: AutoregressiveImages) -> None:
    with pytest.raises(Unsupported, match="not captions"):
        model.generate(["a dog"], [0], GUIDED)
    with pytest.raises(ValueError, match=r"\[0, 4\], got 5"):
        model.generate([5], [0], GUIDED)
    with pytest.raises(ValueError, match="2 seeds"):
        model.generate([0], [0, 1], GUIDED)
    with pytest.raises(ValueError, match="no conditions"):
        model.generate([], [], GUIDED)
    for name, value in {
        "guidance_scale": -1.0,
        "temperature": float("nan"),
        "top_k": -1,
        "top_p": 0.0,
    }.items():
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(GUIDED, **{name: value})


def test_changed_weights_of_either_network_are_seen() -> None:
    for part in ("decoder", "tokenizer"):
        model = tiny_images()
        guard, before = WeightGuard(model), snapshot(model)
        guard.check_all()
        weight = next(iter(model.networks[part].parameters()))
        with torch.no_grad():
            weight += 1
        with pytest.raises(Damage, match="weight"):
            guard.check()
        assert snapshot(model)["weights"] != before["weights"]
