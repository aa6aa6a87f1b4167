"""Drafts of image tokens: a small model that writes ahead, or a layer that guesses features."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from methods.visual_ar.common_verification import ExactRule, Tally, verify_chain
from models.base import (
    AutoregressiveImageModel,
    Condition,
    Forward,
    ImageSession,
    ImageTokenFacts,
    Trace,
    Unsupported,
)
from models.device import linear_parameters
from models.embedded.tiny_ar_image.drafter import FeatureDrafter, load_drafter
from models.embedded.tiny_ar_image.model import DecoderConfig, ImageDecoder, KVCache, guided
from models.image_generation import (
    AutoregressiveImages,
    ImageDraws,
    TokenPipeline,
    begin_images,
    draw_tokens,
)
from models.loading import LoadSettings, ModelError, fetch, load

_LOADED: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()


# ----------------------------------------------------------------------------- a small draft model


def draft_for(draft_id: str, target: AutoregressiveImageModel) -> AutoregressiveImageModel:
    """Return a target's draft model, loaded when first asked for and then kept with the target.

    Args:
        draft_id: An id of `models.loading` (embedded, `hf:…`, `path:…`), or `layers:2` for the
            target's own first two layers under its own norm and head.
        target: What will verify the drafts; the draft takes its device.

    Raises:
        Unsupported: There is no such model, or its tokens are not the target's.
    """
    drafts = _LOADED.setdefault(target, {})
    if draft_id not in drafts:
        drafts[draft_id] = _load_draft(draft_id, target)
    found: AutoregressiveImageModel = drafts[draft_id]
    return found


def _load_draft(draft_id: str, target: AutoregressiveImageModel) -> AutoregressiveImageModel:
    kind, _, layers = draft_id.partition(":")
    if kind == "layers":
        return own_layers(target, layers)
    dtype = cast("Literal['float32', 'bfloat16', 'float16']", target.facts.dtype)
    settings = LoadSettings(device=str(target.device), dtype=dtype)
    # Loading may draw random numbers, which belong to the images.
    with torch.random.fork_rng(devices=[]):
        try:
            draft: Any = load(draft_id, settings, offline=True, capability="ImageGenerator")
        except ModelError as error:
            raise Unsupported(f"draft model '{draft_id}' cannot be loaded: {error}") from error
    if not isinstance(draft, AutoregressiveImageModel):
        raise Unsupported(f"draft model '{draft_id}' draws no tokens one after the other.")
    models: tuple[AutoregressiveImageModel, ...] = (draft, target)
    ours, theirs = (
        (model.facts.vocab_size, model.facts.image_tokens, model.facts.classes) for model in models
    )
    if ours != theirs:
        raise Unsupported(
            f"draft model '{draft_id}' has {ours[0]} tokens, {ours[1]} to an image, and {ours[2]} "
            f"classes; '{target.name}' has {theirs[0]}, {theirs[1]} and {theirs[2]}."
        )
    return draft


def own_layers(target: AutoregressiveImageModel, layers: str) -> AutoregressiveImages:
    """Return a model of the target's first layers under its own norm and head; weights are shared.

    It needs no training and no files, and drafts badly: for models without a draft, and for tests.

    Raises:
        Unsupported: The target is no LlamaGen-class model, or has no so many layers.
    """
    decoder = decoder_of(target, "a draft of its own layers")
    total = decoder.config.layers
    if not (layers.isdecimal() and 1 <= int(layers) < total):
        raise Unsupported(
            f"'layers:{layers}' must name 1 to {total - 1} of the {total} layers of "
            f"'{target.name}'."
        )
    with torch.device("meta"):
        shallow = ImageDecoder(replace(decoder.config, layers=int(layers)))
    shallow.load_state_dict(decoder.state_dict(), strict=False, assign=True)
    shallow.rotation = decoder.rotation
    shallow.eval().requires_grad_(False)
    of_its_class = cast("AutoregressiveImages", target)  # by its decoder
    return of_its_class.with_decoder(shallow, f"{target.name}:layers:{layers}")


def decoder_of(model: AutoregressiveImageModel, what: str) -> ImageDecoder:
    """Return the network of a LlamaGen-class model.

    Args:
        model: Any autoregressive image model.
        what: Needs it, for the message.

    Raises:
        Unsupported: It is of another class.
    """
    if not isinstance(model.module, ImageDecoder):
        raise Unsupported(
            f"{what} needs a LlamaGen-class decoder; '{model.name}' has a "
            f"{type(model.module).__name__}."
        )
    return model.module


class ChainLoop:
    """Draws images with chains of a small draft model.

    Rows of a batch stay in step: all commit as many tokens as the row with the fewest, and what
    other rows had accepted beyond that is drafted anew. The cut depends on nothing that comes after
    it, so every row's tokens keep the target's distribution.

    Attributes:
        headroom: None: drafts end with the image.
        tally: The drafts judged so far, by their place in the chain.
        notes: Acceptance, and the draft's share of the target's weights.
    """

    headroom = 0

    def __init__(self, draft: AutoregressiveImageModel, length: int) -> None:
        """Set up a loop for one batch.

        Args:
            draft: Writes ahead.
            length: Tokens drafted in a step; 0 decodes plainly.
        """
        self._draft = draft
        self._length = length
        self.tally = Tally()
        self._share = 0.0

    @property
    def notes(self) -> Mapping[str, float | int | str]:
        """What became of the drafts."""
        return {**self.tally.notes, "draft_share": self._share}

    def run(
        self,
        model: AutoregressiveImageModel,
        session: ImageSession,
        pipeline: TokenPipeline,
        draws: ImageDraws,
        conditions: Sequence[Condition],
    ) -> Tensor:
        """See `models.image_generation.TokenLoop.run`."""
        total, rows = model.facts.image_tokens, session.rows
        device = model.device
        self._share = self._draft.facts.weight_bytes / model.facts.weight_bytes
        tests, guesses = draws.stream("tests"), draws.stream("drafts")
        tokens, _ = begin_images(model, session, pipeline, draws)
        known = 1
        work = Trace()
        writer = self._draft.session(
            conditions, guided=session.is_guided, capacity=total, trace=work
        )
        if self._length:
            writer.prefill()
        while known < total:
            count = min(self._length, total - known - 1)
            numbers = guesses.uniforms(count).to(device)
            drafted, laws = self._drafts(writer, tokens[:, :known], count, numbers, pipeline)
            output = session.forward(torch.cat([tokens[:, known - 1 : known], drafted], dim=1))
            found = pipeline.probabilities(output, range(known, known + count + 1))
            uniforms = torch.cat([tests.uniforms(count), draws.uniforms(1)], dim=1).to(device)
            verified = verify_chain(ExactRule(), found, laws, drafted, uniforms)
            commit = int(verified.accepted.min()) + 1
            slots = torch.arange(count, device=device)
            judged = (slots <= verified.accepted[:, None]) & (slots < commit)
            self.tally.add_chain(verified, found, laws, judged)
            here = torch.cat([drafted, drafted[:, :1] if count else tokens[:, :1]], dim=1)
            here.scatter_(1, verified.accepted[:, None], verified.tokens[:, None])
            tokens[:, known : known + commit] = here[:, :commit]
            session.crop(known - 1 + commit)
            session.trace.accepted += [commit - 1] * rows
            known += commit
            writer.crop(min(writer.length, known - 1))
        count_drafting(session.trace, work)
        return tokens

    def _drafts(
        self,
        writer: ImageSession,
        tokens: Tensor,
        count: int,
        numbers: Tensor,
        pipeline: TokenPipeline,
    ) -> tuple[Tensor, Tensor]:
        """Draw the draft's continuation of what is committed, and return what it was drawn from."""
        rows, known = tokens.shape
        vocab = self._draft.facts.vocab_size
        drafted = torch.empty(rows, count, dtype=torch.int64, device=tokens.device)
        laws = torch.empty(rows, count, vocab, device=tokens.device)
        unread = tokens[:, writer.length :]
        for place in range(count):
            output = writer.forward(unread)
            last = output._replace(logits=output.logits[:, -1:], hidden=output.hidden[:, -1:])
            laws[:, place] = pipeline.probabilities(last, [known + place])[:, 0]
            drafted[:, place] = draw_tokens(laws[:, place], numbers[:, place])
            unread = drafted[:, place : place + 1]
        return drafted, laws


# ------------------------------------------------------------------------------ a feature drafter


def feature_drafter_for(drafter_id: str, target: AutoregressiveImageModel) -> FeatureDrafter:
    """Return the drafter of a target's features, loaded once and then kept with the target.

    Args:
        drafter_id: `own` for the one in the folder of the target's weights, `path:DIR` for that of
            another folder, `random` for one that was never trained: a control, and for tests.
        target: Whose features it reads.

    Raises:
        Unsupported: The target is no LlamaGen-class model, or there is no such drafter.
    """
    drafters = _LOADED.setdefault(target, {})
    key = f"features {drafter_id}"
    if key not in drafters:
        decoder = decoder_of(target, "a drafter of features")
        drafter = _load_feature_drafter(drafter_id, decoder.config, target)
        weight = decoder.output.weight
        drafter.to(weight.device, weight.dtype).eval().requires_grad_(False)
        drafters[key] = drafter
    found: FeatureDrafter = drafters[key]
    return found


def _load_feature_drafter(
    drafter_id: str, config: DecoderConfig, target: AutoregressiveImageModel
) -> FeatureDrafter:
    if drafter_id == "random":
        return _untrained(config)
    try:
        folder = fetch(target.name if drafter_id == "own" else drafter_id, offline=True)
        with torch.random.fork_rng(devices=[]):
            return load_drafter(folder, config)
    except (ModelError, FileNotFoundError) as error:
        raise Unsupported(f"'{target.name}' has no drafter: {error}") from error
    except RuntimeError as error:
        raise Unsupported(
            f"the drafter '{drafter_id}' is not of the sizes of '{target.name}': {error}"
        ) from error


def _untrained(config: DecoderConfig) -> FeatureDrafter:
    """Return a drafter whose weights are by lot, the same numbers everywhere."""
    with torch.random.fork_rng(devices=[]):
        drafter = FeatureDrafter(config)
    lot = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.ndim > 1:
                drawn = lot.integers(-64, 65, size=tuple(parameter.shape)) / 1024
                parameter.copy_(torch.from_numpy(drawn))
    return drafter


class Guess(NamedTuple):
    """What the drafter says of some elements.

    Attributes:
        features: Guessed, (branches, elements, width).
        logits: Of the token after each, guidance merged, (elements, vocab), float32.
    """

    features: Tensor
    logits: Tensor


class FeatureDrafting:
    """A drafter on one image: what it has read, and the branches that it is growing.

    Attributes:
        facts: Sizes of the drafter with the target's head, for counting work.
        work: Its forwards so far, with their operations and cache bytes, of both branches.
    """

    def __init__(
        self,
        drafter: FeatureDrafter,
        target: AutoregressiveImageModel,
        *,
        guidance_scale: float,
        guided_session: bool,
        headroom: int,
    ) -> None:
        """Open its cache.

        Args:
            drafter: The network.
            target: Lends embeddings and head.
            guidance_scale: For the merge of both branches.
            guided_session: Whether there is an unconditional branch.
            headroom: Nodes of a tree that it reads at most.
        """
        self._drafter = drafter
        self._target = target
        self._scale = guidance_scale
        self._branches = 2 if guided_session else 1
        self._cache = KVCache(
            drafter.config,
            self._branches,
            target.facts.image_tokens + headroom,
            device=target.device,
            dtype=drafter.fc.weight.dtype,
        )
        self._read = 0
        self._sees = torch.zeros(0, 0, dtype=torch.bool, device=target.device)
        self.facts = drafter_facts(drafter, target.facts)
        self.work = Trace()

    def begin_step(self, tokens: Tensor, features: Tensor) -> Guess:
        """Read committed tokens behind the target's features, and guess what follows the last.

        Branches of the step before are forgotten.

        Args:
            tokens: Committed since, the last one the root of the next tree, (new,).
            features: Of the elements before each, (branches, new, width): the target's own.
        """
        self._cache.crop(self._read)
        guess = self._run(tokens, features, None, None)
        self._read = self._cache.length
        self._sees = torch.zeros(0, 0, dtype=torch.bool, device=tokens.device)
        return Guess(guess.features[:, -1:], guess.logits[-1:])

    def expand(
        self, tokens: Tensor, features: Tensor, parents: Sequence[int], depth: int
    ) -> tuple[Guess, list[int]]:
        """Read nodes of a tree and guess what follows each.

        Args:
            tokens: Of the nodes, (nodes,).
            features: Guessed before each of them, (branches, nodes, width).
            parents: Number of each node's parent among those read in this step; -1 under the root.
            depth: Of the nodes, at least 1.

        Returns:
            The guesses, and the numbers of the nodes for later calls.
        """
        held, count = len(self._sees), len(tokens)
        sees = torch.zeros(held + count, held + count, dtype=torch.bool, device=tokens.device)
        sees[:held, :held] = self._sees
        for row, parent in enumerate(parents):
            if parent >= 0:
                sees[held + row] = sees[parent]
            sees[held + row, held + row] = True
        self._sees = sees
        committed = sees.new_ones(count, self._read)
        mask = torch.cat([committed, sees[held:]], dim=1)
        positions = torch.full((count,), self._read + depth, device=tokens.device)
        return self._run(tokens, features, positions, mask), list(range(held, held + count))

    @torch.no_grad()
    def _run(
        self, tokens: Tensor, features: Tensor, positions: Tensor | None, mask: Tensor | None
    ) -> Guess:
        embedded = self._target.embed(tokens)[None].expand(self._branches, -1, -1)
        guessed = self._drafter(embedded, features, positions, cache=self._cache, mask=mask)
        logits = self._target.head(guessed)
        merged = guided(logits, self._scale) if self._branches == 2 else logits
        forward = Forward(len(tokens), self._cache.length - len(tokens))
        self.work.forwards.append(forward)
        self.work.flops += self._branches * self.facts.flops(forward)
        self.work.kv_bytes += self._branches * self.facts.kv_read(forward)
        return Guess(guessed, merged[0])


def drafter_facts(drafter: FeatureDrafter, target: ImageTokenFacts) -> ImageTokenFacts:
    """Return the sizes of a feature drafter under its target's head: what a forward of it costs."""
    config = drafter.config
    matrices = linear_parameters(drafter) + target.head_parameters
    weight_bytes = matrices * drafter.fc.weight.element_size()
    return replace(
        target,
        num_layers=config.layers,
        num_heads=config.heads,
        num_kv_heads=config.heads,
        head_dim=config.head_dim,
        matrix_parameters=matrices,
        weight_bytes=weight_bytes,
    )


def count_drafting(trace: Trace, work: Trace) -> None:
    """Add the work of a draft to the trace of its target's session."""
    trace.draft_forwards += len(work.prefill) + len(work.forwards)
    trace.flops += work.flops
    trace.kv_bytes += work.kv_bytes
