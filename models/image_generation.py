"""Autoregressive image generation: the pipeline from logits to probabilities, sessions, the loop.

A decoding method replaces the loop over tokens (`TokenLoop`); everything else is shared: the driver
opens the session, turns tokens into pixels and counts. Plain decoding in raster order is
`RasterLoop`.

Every probability that a method accepts or draws by comes from `TokenPipeline`, which treats a
window of places exactly as it treats one place after the other.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from models.base import (
    AutoregressiveImageModel,
    Condition,
    Forward,
    GeneratedImages,
    ImageSampling,
    ImageSession,
    ImageTokenFacts,
    InvalidOutput,
    PositionConstraints,
    Trace,
    Unsupported,
    WindowOutput,
)
from models.device import OnDevice, linear_parameters
from models.embedded.tiny_ar_image.model import ImageDecoder, ImageTokenizer, KVCache, guided
from models.wrapper import Around

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Of a reading at a time: a gigabyte in float32. Whole images of tiny models take less.
_MOST_LOGITS = 2**28

# --------------------------------------------------------------------------- logits to tokens


class AnywhereAnything:
    """Every token can stand at every place."""

    def forbidden(self, places: Tensor) -> None:
        """Forbid nothing."""


@dataclass(frozen=True, kw_only=True)
class TokenPipeline:
    """From logits to the probabilities that tokens are drawn by.

    In this order: guidance, u + s (c - u); what cannot stand at the place; temperature; top-k;
    top-p; softmax in float32.

    Attributes:
        sampling: Guidance, temperature, top-k, top-p.
        constraints: What cannot stand where.
    """

    sampling: ImageSampling
    constraints: PositionConstraints

    def probabilities(self, output: WindowOutput, places: Tensor | Sequence[int]) -> Tensor:
        """Return the distribution of the token at each place.

        Args:
            output: Of a session.
            places: Places that its logits are about (those fed, plus one), (width,).

        Returns:
            (rows, width, vocab), float32; at temperature 0 all is on the most likely token, the
            lowest id among equals.

        Raises:
            InvalidOutput: A logit is NaN.
            ValueError: There is not one place for each logit.
        """
        return self.from_logits(self.merged(output), places)

    def merged(self, output: WindowOutput) -> Tensor:
        """Return the logits after guidance, (rows, width, vocab).

        Raises:
            ValueError: Guidance is asked for and the session has no unconditional branch.
        """
        if output.is_guided:
            return guided(output.logits, self.sampling.guidance_scale)
        if self.sampling.is_guided:
            raise ValueError(
                f"guidance of {self.sampling.guidance_scale:g} needs a session with an "
                f"unconditional branch: open it with guided=True."
            )
        return output.logits

    def from_logits(self, merged: Tensor, places: Tensor | Sequence[int]) -> Tensor:
        """Return what `probabilities` does, from logits after guidance, (..., width, vocab)."""
        sampling = self.sampling
        about = torch.as_tensor(places, dtype=torch.int64, device=merged.device)
        if about.shape != merged.shape[-2:-1]:
            raise ValueError(
                f"there are {merged.shape[-2]} logits in the window, but {tuple(about.shape)} "
                f"places."
            )
        logits = merged.float()
        if (forbidden := self.constraints.forbidden(about)) is not None:
            logits = logits.masked_fill(forbidden.to(logits.device), -torch.inf)
        if sampling.temperature == 0:
            best, likeliest = logits.max(dim=-1)
            probabilities = nn.functional.one_hot(likeliest, logits.shape[-1]).float()
            # A maximum is NaN where any number is.
            return _without_nan(probabilities, best)
        logits = logits / sampling.temperature
        if 0 < sampling.top_k < logits.shape[-1]:
            least = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if sampling.top_p < 1:
            logits = _nucleus(logits, sampling.top_p)
        probabilities = logits.softmax(dim=-1)
        return _without_nan(probabilities, probabilities[..., 0])


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Leave the smallest set of most likely tokens whose probability reaches `top_p`."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    # A token is in the set if those before it do not reach the level yet; the first always is.
    before = probabilities.cumsum(dim=-1) - probabilities
    outside = (before >= top_p).scatter(-1, order, before >= top_p)
    return logits.masked_fill(outside, -torch.inf)


def _without_nan(probabilities: Tensor, witnesses: Tensor) -> Tensor:
    if bool(witnesses.isnan().any()):
        raise InvalidOutput("the model returned NaN logits.")
    return probabilities


class ImageDraws:
    """Random numbers of a batch: one stream a row, from its own seed alone.

    Numbers are drawn on the CPU, so that they are the same whatever the device.
    """

    def __init__(self, seeds: Sequence[int], stream: str = "") -> None:
        """Begin the streams.

        Args:
            seeds: One a row.
            stream: Numbers of another name are independent of these.
        """
        self.seeds = tuple(seeds)
        self._name = stream
        self._generators = []
        for seed in self.seeds:
            digest = hashlib.sha256(f"{stream}\0{seed}".encode()).digest()
            state = int.from_bytes(digest[:8], "big") >> 1
            self._generators.append(torch.Generator().manual_seed(state))

    def stream(self, name: str) -> ImageDraws:
        """Return other numbers of the same seeds, independent of these."""
        return ImageDraws(self.seeds, f"{self._name}/{name}")

    def uniform(self, row: int, *shape: int) -> Tensor:
        """Return the next numbers of one row, in [0, 1), float64."""
        return torch.rand(shape, generator=self._generators[row], dtype=torch.float64)

    def uniforms(self, *shape: int) -> Tensor:
        """Return the next numbers of every row, (rows, *shape)."""
        return torch.stack([self.uniform(row, *shape) for row in range(len(self.seeds))])


def draw_tokens(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a token from each distribution, by inversion in float64.

    Args:
        probabilities: (..., vocab); need not be normalised.
        uniforms: Numbers in [0, 1), (...).

    Returns:
        (...), int64. No token is drawn whose probability is 0.
    """
    cumulative = probabilities.double().cumsum(dim=-1)
    total = cumulative[..., -1:]
    # A number close to 1 times the total may round to the total, past the last token.
    highest = torch.nextafter(total, torch.zeros_like(total))
    levels = torch.minimum(uniforms.to(cumulative)[..., None] * total, highest)
    return torch.searchsorted(cumulative, levels, right=True)[..., 0]


# ------------------------------------------------------------------------------------ the loop


class TokenLoop(Protocol):
    """Draws all tokens of a batch of images; what a method brings. One lives for one batch.

    Attributes:
        headroom: Entries of the cache beyond an image's tokens that it needs.
        notes: What it settled at run time; read when the images are finished, kept in the trace.
    """

    @property
    def headroom(self) -> int:
        """Entries of the cache beyond an image's tokens that it needs."""
        ...

    @property
    def notes(self) -> Mapping[str, float | int | str]:
        """What it settled at run time."""
        ...

    def run(
        self,
        model: AutoregressiveImageModel,
        session: ImageSession,
        pipeline: TokenPipeline,
        draws: ImageDraws,
        conditions: Sequence[Condition],
    ) -> Tensor:
        """Draw the tokens.

        The session counts forwards; the loop appends to `session.trace.accepted`, once a row for
        each forward, the drafted tokens that it accepted, and counts its drafts.

        Args:
            model: Whose images they are.
            session: Fresh; its prefill emits the token at place 0.
            pipeline: The only source of probabilities.
            draws: The only source of randomness.
            conditions: Of the rows.

        Returns:
            (rows, image_tokens), int64.
        """
        ...


class RasterLoop:
    """Plain decoding: one token a forward, in the order of the sequence."""

    headroom = 0
    notes: Mapping[str, float | int | str] = {}

    def run(
        self,
        model: AutoregressiveImageModel,
        session: ImageSession,
        pipeline: TokenPipeline,
        draws: ImageDraws,
        conditions: Sequence[Condition],
    ) -> Tensor:
        """See `TokenLoop.run`; a token takes one number of its row."""
        count, rows = model.facts.image_tokens, session.rows
        # Moved at once: a copy for each token would wait for the device.
        uniforms = draws.uniforms(count).to(model.device)
        places = torch.arange(count, device=model.device)
        tokens = torch.empty(rows, count, dtype=torch.int64, device=model.device)
        output = session.prefill()
        for place in range(count):
            if place:
                output = session.forward(tokens[:, place - 1 : place])
                session.trace.accepted += [0] * rows
            probabilities = pipeline.probabilities(output, places[place : place + 1])[:, 0]
            tokens[:, place] = draw_tokens(probabilities, uniforms[:, place])
        return tokens


class Begun(NamedTuple):
    """A batch of images with its first tokens.

    Attributes:
        tokens: (rows, image_tokens), int64; those at place 0 are drawn, the rest is room.
        law: That they were drawn from, (rows, 1, vocab).
    """

    tokens: Tensor
    law: Tensor


def begin_images(
    model: AutoregressiveImageModel,
    session: ImageSession,
    pipeline: TokenPipeline,
    draws: ImageDraws,
) -> Begun:
    """Read the conditions and draw the first token of each image; arguments as in `TokenLoop.run`.

    It takes one number of each row, as plain decoding does for the token.
    """
    shape = (session.rows, model.facts.image_tokens)
    tokens = torch.empty(shape, dtype=torch.int64, device=model.device)
    law = pipeline.probabilities(session.prefill(), [0])
    tokens[:, 0] = draw_tokens(law[:, 0], draws.uniforms().to(model.device))
    return Begun(tokens, law)


def generate_images(
    model: AutoregressiveImageModel,
    conditions: Sequence[Condition],
    seeds: Sequence[int],
    sampling: ImageSampling,
    loop: TokenLoop,
) -> GeneratedImages:
    """Make a batch of images with a loop.

    Args:
        model: Opens the session and turns tokens into pixels.
        conditions: One an image.
        seeds: One an image.
        sampling: How tokens are drawn.
        loop: Draws them; not used before.

    Raises:
        InvalidOutput: The loop returned tokens that are no image's.
        ValueError: There are no conditions, not one seed for each, or no such class.
        Unsupported: A condition is of a kind that the model does not take.
    """
    if not conditions:
        raise ValueError("there are no conditions; each image needs one.")
    if len(conditions) != len(seeds):
        raise ValueError(
            f"there are {len(conditions)} conditions and {len(seeds)} seeds; each image needs one "
            f"of either."
        )
    trace, facts = Trace(), model.facts
    session = model.session(
        conditions,
        guided=sampling.is_guided,
        capacity=facts.image_tokens + loop.headroom,
        trace=trace,
    )
    pipeline = TokenPipeline(sampling=sampling, constraints=model.constraints)
    tokens = loop.run(model, session, pipeline, ImageDraws(seeds), conditions)
    trace.mark("decode", model.synchronize)
    expected = (len(conditions), facts.image_tokens)
    if tuple(tokens.shape) != expected:
        raise InvalidOutput(f"tokens of {expected} were to be drawn, got {tuple(tokens.shape)}.")
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < facts.vocab_size:
        raise InvalidOutput(f"a token lies outside the vocabulary of {facts.vocab_size}.")
    pixels = model.pixels(tokens)
    trace.mark("pixels")
    trace.notes.update({"prefill_tokens": len(conditions), **loop.notes})
    return GeneratedImages(pixels, tuple(tuple(row) for row in tokens.tolist()), trace)


class LoopedImages(Around):
    """An autoregressive image model whose tokens another loop draws; all else is its own."""

    facts: ImageTokenFacts

    def __init__(self, model: AutoregressiveImageModel, make_loop: Callable[[], TokenLoop]) -> None:
        """Wrap a model; nothing in it is changed.

        Args:
            model: Any of the capability.
            make_loop: Makes a loop for each batch.
        """
        super().__init__(model)
        self._make_loop = make_loop

    def generate(
        self, conditions: Sequence[Condition], seeds: Sequence[int], sampling: ImageSampling
    ) -> GeneratedImages:
        """See `models.base.ImageGenerator.generate`."""
        return generate_images(self._model, conditions, seeds, sampling, self._make_loop())


def logits_in_parts(
    model: AutoregressiveImageModel,
    conditions: Sequence[Condition],
    tokens: Tensor,
    sampling: ImageSampling,
    *,
    most: int = _MOST_LOGITS,
) -> Iterator[tuple[int, Tensor]]:
    """Read whole images once more, in as few forwards as their logits have room for.

    Args:
        model: The target.
        conditions: One an image.
        tokens: (images, image_tokens), int64.
        sampling: Its guidance alone matters.
        most: Logits that there may be at a time.

    Yields:
        Parts of the images, each with its first place: logits after guidance of each token given
        those before it, (images, places, vocab).
    """
    facts = model.facts
    count = facts.image_tokens
    session = model.session(conditions, guided=sampling.is_guided, capacity=count, trace=Trace())
    pipeline = TokenPipeline(sampling=sampling, constraints=model.constraints)
    yield 0, pipeline.merged(session.prefill())
    branches = 2 if sampling.is_guided else 1
    width = max(1, most // (branches * len(tokens) * facts.vocab_size))
    for start in range(0, count - 1, width):
        read = tokens[:, start : min(start + width, count - 1)]
        yield start + 1, pipeline.merged(session.forward(read.to(model.device)))


def laws_in_parts(
    model: AutoregressiveImageModel,
    conditions: Sequence[Condition],
    tokens: Tensor,
    sampling: ImageSampling,
    *,
    most: int = _MOST_LOGITS,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the distributions that tokens of whole images were drawn from, by their places.

    Arguments as in `logits_in_parts`; the distributions are (images, places, vocab), float32.
    """
    pipeline = TokenPipeline(sampling=sampling, constraints=model.constraints)
    for first, logits in logits_in_parts(model, conditions, tokens, sampling, most=most):
        places = range(first, first + logits.shape[1])
        yield slice(places.start, places.stop), pipeline.from_logits(logits, places)


def read_logits(
    model: AutoregressiveImageModel,
    conditions: Sequence[Condition],
    tokens: Tensor,
    sampling: ImageSampling,
) -> Tensor:
    """Return all that `logits_in_parts` yields, (images, image_tokens, vocab)."""
    parts = logits_in_parts(model, conditions, tokens, sampling)
    return torch.cat([logits for _, logits in parts], dim=1)


def read_tokens(
    model: AutoregressiveImageModel,
    conditions: Sequence[Condition],
    tokens: Tensor,
    sampling: ImageSampling,
) -> Tensor:
    """Return all that `laws_in_parts` yields, (images, image_tokens, vocab), float32."""
    return torch.cat(
        [laws for _, laws in laws_in_parts(model, conditions, tokens, sampling)], dim=1
    )


# -------------------------------------------------------------------------------- the sessions


class CountingSession(ABC):
    """What the sessions of all architectures share: checks, masks, and counting.

    Attributes:
        rows, is_guided, length, trace: See `models.base.ImageSession`.
    """

    def __init__(
        self,
        facts: ImageTokenFacts,
        *,
        rows: int,
        guided: bool,
        capacity: int,
        trace: Trace,
        synchronize: Callable[[], None],
    ) -> None:
        self.rows = rows
        self.is_guided = guided
        self.length = 0
        self.trace = trace
        self._facts = facts
        self._capacity = capacity
        self._synchronize = synchronize
        self._condition_tokens = 0

    @property
    def _branches(self) -> int:
        return 2 if self.is_guided else 1

    def prefill(self) -> WindowOutput:
        """See `models.base.ImageSession.prefill`."""
        if self._condition_tokens:
            raise ValueError("the condition was read already; a session is for one batch.")
        output, self._condition_tokens = self._read_condition()
        forward = Forward(self._condition_tokens, 0)
        self.trace.prefill += [forward] * self.rows
        self._count(forward, logits=1)
        self.trace.mark("prefill", self._synchronize)
        return output

    def forward(
        self, tokens: Tensor, places: Tensor | None = None, mask: Tensor | None = None
    ) -> WindowOutput:
        """See `models.base.ImageSession.forward`."""
        if not self._condition_tokens:
            raise ValueError("the condition is not read yet: call prefill first.")
        if tokens.ndim != 2 or len(tokens) != self.rows:
            raise ValueError(f"tokens must be ({self.rows}, width), got {tuple(tokens.shape)}.")
        width = tokens.shape[1]
        if self.length + width > self._capacity:
            raise ValueError(
                f"the cache has room for {self._capacity} image tokens, not for "
                f"{self.length + width}."
            )
        last = self._facts.image_tokens - 1
        if places is None:
            places = torch.arange(self.length, self.length + width, device=tokens.device)
            is_inside = self.length + width - 1 <= last  # without waiting for a device
        else:
            is_inside = 0 <= int(places.min()) <= int(places.max()) <= last
        if places.shape != (width,) or not is_inside:
            raise ValueError(f"there must be {width} places from 0 to {last}, got {places}.")
        if mask is not None:
            if mask.shape != (width, width):
                raise ValueError(f"mask must be {(width, width)}, got {tuple(mask.shape)}.")
            held = self._condition_tokens + self.length
            mask = torch.cat([mask.new_ones(width, held), mask], dim=1)
        output = self._run(tokens.repeat(self._branches, 1), places, mask)
        forward = Forward(width, self._condition_tokens + self.length)
        self.trace.forwards += [forward] * self.rows
        self._count(forward, logits=width)
        self.length += width
        return output

    def crop(self, length: int) -> None:
        """See `models.base.ImageSession.crop`."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length must lie in [0, {self.length}], got {length}.")
        self._crop(self._condition_tokens + length)
        self.length = length

    def keep(self, start: int, path: Sequence[int]) -> None:
        """See `models.base.ImageSession.keep`."""
        entries = self.length - start
        if not 0 <= start <= self.length or any(not 0 <= offset < entries for offset in path):
            raise ValueError(
                f"start must lie in [0, {self.length}] and path within the entries from there, "
                f"got {start} and {list(path)}."
            )
        self._keep(self._condition_tokens + start, path)
        self.length = start + len(path)

    def _count(self, forward: Forward, *, logits: int) -> None:
        times = self.rows * self._branches
        self.trace.flops += times * self._facts.flops(forward, logits)
        self.trace.kv_bytes += times * self._facts.kv_read(forward)

    @abstractmethod
    def _read_condition(self) -> tuple[WindowOutput, int]:
        """Read the condition; return what came out, of width 1, and the entries it takes."""

    @abstractmethod
    def _run(self, tokens: Tensor, places: Tensor, mask: Tensor | None) -> WindowOutput:
        """Run tokens of all branches, (branches * rows, width).

        Args:
            tokens: The window.
            places: (width,).
            mask: Who sees whom, (width, cached entries + width), the condition's among them; None
                for causal order.
        """

    @abstractmethod
    def _crop(self, entries: int) -> None:
        """Keep that many entries of the cache, the condition's among them."""

    @abstractmethod
    def _keep(self, start: int, path: Sequence[int]) -> None:
        """Keep of the entries from `start` (the condition's counted) those at offsets `path`."""


class DecoderSession(CountingSession):
    """A session over a LlamaGen-class decoder."""

    def __init__(
        self,
        network: ImageDecoder,
        facts: ImageTokenFacts,
        condition: Tensor,
        *,
        padding: Tensor | None = None,
        rows: int,
        guided: bool,
        capacity: int,
        trace: Trace,
        synchronize: Callable[[], None],
    ) -> None:
        """Open a session; see `models.base.AutoregressiveImageModel.session`.

        Args:
            network: The decoder.
            facts: Its sizes.
            condition: Embedded, of the conditional rows and then of the others if there are any,
                (branches * rows, condition tokens, width).
            padding: True where a condition token is padding that nobody sees, (branches * rows,
                condition tokens); None where none is.
            rows: Images.
            guided, capacity, trace, synchronize: See `CountingSession`.
        """
        super().__init__(
            facts,
            rows=rows,
            guided=guided,
            capacity=capacity,
            trace=trace,
            synchronize=synchronize,
        )
        self._network = network
        self._condition = condition
        self._visible = None if padding is None or not bool(padding.any()) else ~padding
        self._cache = KVCache(
            network.config,
            len(condition),
            condition.shape[1] + capacity,
            device=condition.device,
            dtype=condition.dtype,
        )

    @torch.no_grad()
    def _read_condition(self) -> tuple[WindowOutput, int]:
        count = self._condition.shape[1]
        mask = None
        if self._visible is not None:
            itself = torch.eye(count, dtype=torch.bool, device=self._condition.device)
            # Padding that saw nothing would be NaN.
            mask = (itself.cumsum(0).bool() & self._visible[:, None] | itself)[:, None]
        found = self._network(self._condition, cache=self._cache, mask=mask)
        return WindowOutput(found.logits[:, -1:], found.hidden[:, -1:], self.rows), count

    @torch.no_grad()
    def _run(self, tokens: Tensor, places: Tensor, mask: Tensor | None) -> WindowOutput:
        device = self._condition.device
        held, width = self._condition_tokens + self.length, tokens.shape[1]
        if self._visible is not None:
            entries = torch.arange(held + width, device=device)
            order = entries[None] <= entries[held:, None] if mask is None else mask.to(device)
            others = order.new_ones(len(self._visible), held + width - self._condition_tokens)
            mask = (order & torch.cat([self._visible, others], dim=1)[:, None])[:, None]
        positions = places.to(device) + self._condition_tokens
        found = self._network(
            self._network.embed_tokens(tokens), positions, cache=self._cache, mask=mask
        )
        return WindowOutput(found.logits, found.hidden, self.rows)

    def _crop(self, entries: int) -> None:
        self._cache.crop(entries)

    def _keep(self, start: int, path: Sequence[int]) -> None:
        self._cache.keep(start, path)


# ---------------------------------------------------------------------------------- the models


class AutoregressiveImages(OnDevice):
    """A `models.base.AutoregressiveImageModel` of the LlamaGen class.

    Attributes:
        name: For messages and tables.
        facts: Sizes.
        module: The decoder.
        image_tokenizer: Codes to pixels.
        networks: Both, for those who look whether weights have changed.
        constraints: None: every code can be everywhere.
        kernels: What runs the forwards, for the record.
    """

    kernels = "torch"

    def __init__(self, decoder: ImageDecoder, image_tokenizer: ImageTokenizer, name: str) -> None:
        """Wrap networks in evaluation mode.

        Args:
            decoder: Over the codes of the tokenizer.
            image_tokenizer: On the same device.
            name: For messages and tables.

        Raises:
            ValueError: They do not have the same codes.
        """
        codes = image_tokenizer.config.codebook_size
        if decoder.config.vocab_size != codes:
            raise ValueError(
                f"the decoder has {decoder.config.vocab_size} tokens and the tokenizer {codes} "
                f"codes; they must be the same."
            )
        self.module = decoder
        self.image_tokenizer = image_tokenizer
        self.networks = nn.ModuleDict({"decoder": decoder, "tokenizer": image_tokenizer})
        self.name = name
        self.facts = _facts(decoder, image_tokenizer)
        self.constraints: PositionConstraints = AnywhereAnything()

    @property
    def codebook(self) -> Tensor:
        """See `models.base.AutoregressiveImageModel.codebook`."""
        return self.image_tokenizer.codebook.detach().float()

    def session(
        self, conditions: Sequence[Condition], *, guided: bool, capacity: int, trace: Trace
    ) -> DecoderSession:
        """See `models.base.AutoregressiveImageModel.session`."""
        device = self.module.output.weight.device
        labels = torch.tensor(
            class_labels(conditions, self.facts.classes, self.name), device=device
        )
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, self.module.null_class)])
        with torch.no_grad():
            condition = self.module.embed_classes(labels)
        return self._open(condition, guided=guided, capacity=capacity, trace=trace)

    def _open(
        self,
        condition: Tensor,
        *,
        padding: Tensor | None = None,
        guided: bool,
        capacity: int,
        trace: Trace,
    ) -> DecoderSession:
        """Open a session behind an embedded condition; arguments as of `DecoderSession`."""
        return DecoderSession(
            self.module,
            self.facts,
            condition,
            padding=padding,
            rows=len(condition) // (2 if guided else 1),
            guided=guided,
            capacity=capacity,
            trace=trace,
            synchronize=self.synchronize,
        )

    def with_decoder(self, decoder: ImageDecoder, name: str) -> AutoregressiveImages:
        """Return a model of another decoder over the same codes and conditions."""
        return AutoregressiveImages(decoder, self.image_tokenizer, name)

    def embed(self, tokens: Tensor) -> Tensor:
        """See `models.base.AutoregressiveImageModel.embed`."""
        found: Tensor = self.module.embed_tokens(tokens)
        return found

    def head(self, hidden: Tensor) -> Tensor:
        """See `models.base.AutoregressiveImageModel.head`."""
        logits: Tensor = self.module.output(hidden).float()
        return logits

    def codes(self, tokens: Tensor) -> Tensor:
        """See `models.base.AutoregressiveImageModel.codes`: tokens are codes."""
        return tokens

    def pixels(self, tokens: Tensor) -> npt.NDArray[np.uint8]:
        """See `models.base.AutoregressiveImageModel.pixels`."""
        images = self.image_tokenizer.decode(tokens, rows=self.facts.grid[0])
        found: npt.NDArray[np.uint8] = images.permute(0, 2, 3, 1).cpu().contiguous().numpy()
        return found

    def generate(
        self, conditions: Sequence[Condition], seeds: Sequence[int], sampling: ImageSampling
    ) -> GeneratedImages:
        """Make images plainly, one token a forward."""
        return generate_images(self, conditions, seeds, sampling, RasterLoop())


def class_labels(conditions: Sequence[Condition], classes: int, name: str) -> list[int]:
    """Return conditions as class ids.

    Args:
        conditions: What was asked for.
        classes: Ids that there are.
        name: Of the model, for messages.

    Raises:
        Unsupported: One is a caption.
        ValueError: There is no such class.
    """
    labels = []
    for condition in conditions:
        if isinstance(condition, str):
            raise Unsupported(f"'{name}' takes class ids, not captions such as {condition!r}.")
        if not 0 <= condition < classes:
            raise ValueError(f"class ids of '{name}' lie in [0, {classes - 1}], got {condition}.")
        labels.append(condition)
    return labels


def captions_of(conditions: Sequence[Condition], name: str) -> tuple[str, ...]:
    """Return conditions as captions.

    Args:
        conditions: What was asked for.
        name: Of the model, for messages.

    Raises:
        Unsupported: One is a class id.
    """
    for condition in conditions:
        if not isinstance(condition, str):
            raise Unsupported(f"'{name}' takes captions, not class ids such as {condition}.")
    return tuple(str(condition) for condition in conditions)


def _facts(decoder: ImageDecoder, image_tokenizer: ImageTokenizer) -> ImageTokenFacts:
    config, weight = decoder.config, decoder.output.weight
    # A caption's projection is no matrix that a token of the image is multiplied with.
    matrices = linear_parameters(decoder) - linear_parameters(decoder.cls_embedding)
    side = config.grid * image_tokenizer.config.factor
    return ImageTokenFacts(
        vocab_size=config.vocab_size,
        num_layers=config.layers,
        num_heads=config.heads,
        num_kv_heads=config.heads,
        head_dim=config.head_dim,
        hidden_size=config.width,
        matrix_parameters=matrices,
        head_parameters=weight.numel(),
        weight_bytes=matrices * weight.element_size(),
        kv_item_bytes=weight.element_size(),
        max_positions=config.condition_tokens + config.image_tokens,
        eos_ids=frozenset(),
        dtype=str(weight.dtype).removeprefix("torch."),
        image_tokens=config.image_tokens,
        grid=(config.grid, config.grid),
        image_size=(side, side),
        classes=config.classes,
    )
