"""Batches of tiny-vlm's recipe, composed on the device from a store that worker processes fill."""

from __future__ import annotations

import multiprocessing
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.embedded.scenes.font import CELL
from models.embedded.scenes.generator import COLOUR_NAMES, MAX_CHARACTERS, MAX_OBJECTS, SHAPES
from models.embedded.scenes.questions import CATEGORIES
from models.embedded.scenes.raster_torch import RasterBatch
from models.embedded.tiny_vlm import data
from models.embedded.tiny_vlm.network import PATCH, VISION_WIDTH, VisionOutput

CHUNK = 256
# Moved to the device between two training steps, where other processes make them.
CHUNKS_A_POLL = 2
GRID = 12


def jobs(scenes: int, large_share: int = 8) -> Iterator[tuple[str, int, int, int]]:
    """Yield chunks of training scenes; one in `large_share` is of 192-pixel images."""
    small = large = 0
    for number in range(scenes // CHUNK):
        if number % large_share == 1:
            yield "train", 192, large, CHUNK
            large += CHUNK
        else:
            yield "train", 96, small, CHUNK
            small += CHUNK


def question_room(scenes: int) -> dict[int, data.Items]:
    """Return empty arrays for what `jobs` makes, by image size."""
    counts = {96: 0, 192: 0}
    for _, size, _, count in jobs(scenes):
        counts[size] += count
    return {size: data.empty(count) for size, count in counts.items()}


class Store:
    """Scenes with their texts on the device, growing while training runs.

    With workers, other processes make the scenes and a thread collects them; `poll` moves what
    has arrived. Without, everything is made here and now.

    Args:
        work: Arguments of `make`, each the work for one chunk.
        make: Returns the image size and the arrays of a chunk, a named tuple.
        room: Arrays of the final length for each image size.
        workers: Processes.
        device: Where the arrays are kept.
    """

    def __init__(
        self,
        work: list[tuple],
        make: Callable[[Any], tuple[int, Any]],
        room: dict[int, Any],
        workers: int,
        device: torch.device,
    ) -> None:
        self._device = device
        self._items = {
            size: type(items)(*(torch.from_numpy(part).to(device) for part in items))
            for size, items in room.items()
        }
        self.ready = dict.fromkeys(room, 0)
        self._arrived: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._pool = None
        self.chunks_left = len(work)
        if workers:
            self._pool = multiprocessing.get_context("spawn").Pool(workers)
            made = self._pool.imap_unordered(make, work)
            threading.Thread(target=self._collect, args=(made,), daemon=True).start()
        else:
            for job in work:
                self._arrived.put(make(job))

    def _collect(self, made: Iterator[tuple[int, Any]]) -> None:
        try:
            for chunk in made:
                self._arrived.put(chunk)
        except Exception as error:  # noqa: BLE001 - the pool may be closed before it is done
            print(f"[data] no more scenes: {error!r}", flush=True)

    def poll(self, *, until: int = 0, seconds: float = 60.0) -> None:
        """Move what has arrived to the device; wait until a size holds `until` scenes.

        A few chunks at most, so that a training step waits for none that are still being made.
        """
        moved = 0
        while self.chunks_left:
            waiting = max(self.ready.values()) < until
            if moved >= CHUNKS_A_POLL and not waiting and self._pool is not None:
                return
            moved += 1
            try:
                size, items = self._arrived.get(timeout=seconds if waiting else 0.0)
            except queue.Empty:
                if waiting:
                    raise RuntimeError(f"no scenes arrived within {seconds} s.") from None
                return
            start = self.ready[size]
            for stored, part in zip(self._items[size], items, strict=True):
                stored[start : start + len(part)] = torch.from_numpy(part).to(self._device)
            self.ready[size] = start + len(items.scene)
            self.chunks_left -= 1

    def draw(self, size: int, count: int, generator: torch.Generator) -> Any:
        """Return random rows as tensors of the device, in the named tuple of `make`.

        Equal generators draw equal rows once the same scenes are there: at once without workers.
        """
        rows = torch.randint(self.ready[size], (count,), device=self._device, generator=generator)
        items = self._items[size]
        return type(items)(*(part[rows] for part in items))

    def close(self) -> None:
        """End the worker processes."""
        if self._pool is not None:
            self._pool.terminate()
            self._pool = None


class Words(NamedTuple):
    """Packed slots: tokens, what each should predict, and how much that counts, (batch, words)."""

    tokens: Tensor
    targets: Tensor
    weights: Tensor


class Mix(NamedTuple):
    """What stands behind one image, and the weight of each kind's answer tokens."""

    letters: int
    directs: int
    letter_weight: float
    direct_weight: float
    caption_weight: float

    @property
    def slots(self) -> list[int]:
        """Tokens of the slots, in the order of `compose`."""
        return (
            [data.CAPTION_SLOT]
            + [data.LETTER_SLOT] * self.letters
            + [data.DIRECT_SLOT] * self.directs
        )


def compose(
    items: data.Items,
    mix: Mix,
    letter_rates: Tensor,
    direct_rates: Tensor,
    generator: torch.Generator,
) -> Words:
    """Choose questions for each scene, more of those with a high rate, and pack them.

    Args:
        items: Rows of the store as tensors.
        mix: How many of each kind.
        letter_rates: Sampling weight of each category asked with options, (categories,).
        direct_rates: The same for direct questions.
        generator: Chooses, on the items' device.
    """
    slots = [_slot(items.caption, data.CAPTION_START, items.caption_end, mix.caption_weight, None)]
    rows = torch.arange(len(items.scene), device=items.scene.device)[:, None]
    exists = items.category >= 0
    category = items.category.long().clamp(min=0)

    def choose(count: int, rates: Tensor) -> Tensor:
        # Scenes with few questions have less than `count`: those chosen for nothing do not count.
        return torch.multinomial(rates[category] * exists + 1e-6, count, generator=generator)

    if mix.letters:
        picked = choose(mix.letters, letter_rates)
        start = items.letter_start[rows, picked]
        tokens, real = items.letter[rows, picked], exists[rows, picked]
        slots += _slots(tokens, start, start + 2, mix.letter_weight, real)
    if mix.directs:
        picked = choose(mix.directs, direct_rates)
        start, end = items.direct_start[rows, picked], items.direct_end[rows, picked]
        tokens, real = items.direct[rows, picked], exists[rows, picked]
        slots += _slots(tokens, start, end, mix.direct_weight, real)
    return Words(*(torch.cat(parts, 1) for parts in zip(*slots, strict=True)))


def _slots(tokens: Tensor, start: Tensor, end: Tensor, weight: float, real: Tensor) -> list[Words]:
    return [
        _slot(tokens[:, k], start[:, k], end[:, k], weight, real[:, k])
        for k in range(tokens.shape[1])
    ]


def _slot(
    tokens: Tensor, start: Tensor | int, end: Tensor, weight: float, real: Tensor | None
) -> Words:
    """Return a slot's tokens with targets for those in [start, end); the end token counts half."""
    tokens = tokens.long()
    targets = F.pad(tokens[:, 1:], (0, 1))
    place = torch.arange(tokens.shape[1], device=tokens.device)[None] + 1
    first = start[:, None] if isinstance(start, Tensor) else start
    weights = weight * ((place >= first) & (place < end[:, None])).float()
    weights = torch.where(place == end[:, None] - 1, 0.5 * weights, weights)
    if real is not None:
        weights = weights * real[:, None]
    return Words(tokens, targets, weights)


class VisionLabels(NamedTuple):
    """What the vision tower is asked in its own stage.

    Attributes:
        shape: Shape counted from 1 of the object that owns most of each patch, 0 for none or
            less than an eighth of it, (batch, 144).
        colour: Its colour, counted from 1.
        offset: From the patch's centre to the object's, in units of the patch, (batch, 144, 2).
        character: Character counted from 1 whose cell covers most of a patch, at least a quarter.
        present: Which of the 48 pairs of shape and colour the scene holds, (batch, 48), float.
        others: Objects less one, (batch,).
        pattern: Index of the background's pattern, (batch,).
        length: Characters of the text, (batch,).
    """

    shape: Tensor
    colour: Tensor
    offset: Tensor
    character: Tensor
    present: Tensor
    others: Tensor
    pattern: Tensor
    length: Tensor


@torch.no_grad()
def vision_labels(items: data.Items, raster: RasterBatch) -> VisionLabels:
    """Return the labels of 96-pixel scenes."""
    scene = items.scene.long()
    batch = len(scene)
    objects = scene[:, 17:].view(batch, MAX_OBJECTS, 7)
    exists = objects[:, :, 1] > 0
    shapes = (objects[:, :, 0] + 1) * exists
    colours = items.attributes[:, :, 0].long()
    owner = raster.owner.view(batch, GRID, PATCH, GRID, PATCH).transpose(2, 3).flatten(3)
    owner = owner.flatten(1, 2)
    covered = torch.stack([(owner == k + 1).sum(-1) for k in range(MAX_OBJECTS)], -1)
    most, which = covered.max(-1)
    seen = most * 8 >= PATCH * PATCH
    centre = PATCH * torch.arange(GRID, device=scene.device) + PATCH // 2
    centres = torch.stack([centre.repeat(GRID), centre.repeat_interleave(GRID)], -1)
    to_object = objects[:, :, 2:4].gather(1, which[..., None].expand(-1, -1, 2)) - centres

    length, (left, top) = scene[:, 8], scene[:, 13:15].unbind(1)
    edges = centre - PATCH // 2
    starts = left[:, None] + CELL * torch.arange(MAX_CHARACTERS, device=scene.device)
    wide = _overlap(edges[None, :, None], starts[:, None, :])
    wide = wide * (torch.arange(MAX_CHARACTERS, device=scene.device) < length[:, None])[:, None]
    tall = _overlap(edges[None], top[:, None])
    area, place = (tall[:, :, None, None] * wide[:, None]).max(-1)
    codes = scene[:, 9:13].gather(1, place.flatten(1)) + 1

    pairs = (shapes - 1) * len(COLOUR_NAMES) + colours - 1
    present = torch.zeros(batch, len(SHAPES) * len(COLOUR_NAMES) + 1, device=scene.device)
    present.scatter_(1, torch.where(exists, pairs, present.shape[1] - 1), 1.0)
    return VisionLabels(
        shape=shapes.gather(1, which) * seen,
        colour=colours.gather(1, which) * seen,
        offset=to_object / PATCH,
        character=codes * (area.flatten(1) * 4 >= PATCH * PATCH),
        present=present[:, :-1],
        others=exists.sum(1) - 1,
        pattern=scene[:, 0],
        length=length,
    )


def _overlap(first: Tensor, second: Tensor) -> Tensor:
    """Return how far two stretches of eight pixels overlap."""
    return (PATCH - (first - second).abs()).clamp(min=0)


class VisionHeads(nn.Module):
    """Linear readings of patches and of [CLS], used in training only."""

    def __init__(self) -> None:
        super().__init__()
        self._patch_sizes = (len(SHAPES) + 1, len(COLOUR_NAMES) + 1, 37, 2)
        self._scene_sizes = (len(SHAPES) * len(COLOUR_NAMES), MAX_OBJECTS, 4, 5)
        self.norm = nn.LayerNorm(VISION_WIDTH)
        self.patch = nn.Linear(VISION_WIDTH, sum(self._patch_sizes))
        self.scene = nn.ModuleList(
            nn.Linear(VISION_WIDTH, sum(self._scene_sizes)) for _ in range(2)
        )

    def loss(
        self, seen: VisionOutput, pooled: Tensor, labels: VisionLabels
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and the share of object patches read correctly by kind of label."""
        features = self.norm(seen.features)
        shape, colour, character, offset = (
            self.patch(features[:, 1:]).float().split(self._patch_sizes, -1)
        )
        loss = (
            _patch_loss(shape, labels.shape, 12)
            + _patch_loss(colour, labels.colour, 12)
            + _patch_loss(character, labels.character, 30)
        )
        on_object = (labels.shape > 0).float()[..., None]
        distance = (offset - labels.offset).abs() * on_object
        loss = loss + distance.sum() / on_object.sum().clamp(min=1)
        # [CLS] is read where the projector reads patches and at the end: its attention is what
        # some pruning methods go by, so it has to look at something in both places.
        for head, state in zip(self.scene, (features[:, 0], pooled), strict=True):
            present, count, pattern, length = head(state).float().split(self._scene_sizes, -1)
            loss = loss + 4 * F.binary_cross_entropy_with_logits(present, labels.present)
            loss = loss + 0.5 * F.cross_entropy(count, labels.others)
            loss = loss + 0.5 * F.cross_entropy(pattern, labels.pattern)
            loss = loss + 0.5 * F.cross_entropy(length, labels.length)
        with torch.no_grad():
            shares = {
                "shape": _share(shape, labels.shape),
                "colour": _share(colour, labels.colour),
                "character": _share(character, labels.character),
                "count": (count.argmax(-1) == labels.others).float().mean(),
                "pattern": (pattern.argmax(-1) == labels.pattern).float().mean(),
            }
        return loss, shares


def _patch_loss(logits: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Cross-entropy in which a patch with a label counts `weight` times one without."""
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    weights = torch.where(labels.flatten() > 0, weight, 1.0)
    return (each * weights).sum() / weights.sum()


def _share(logits: Tensor, labels: Tensor) -> Tensor:
    right = (logits.argmax(-1) == labels) & (labels > 0)
    return right.sum() / (labels > 0).sum().clamp(min=1)


class AskedRates(nn.Module):
    """How often each category is asked: no parameters, but part of a training's state.

    Attributes:
        letter: Sampling weight of each category with options, (categories,).
        direct: The same of direct questions.
    """

    letter: Tensor
    direct: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("letter", even_rates(device))
        self.register_buffer("direct", even_rates(device))


def even_rates(device: torch.device) -> Tensor:
    """Return the sampling weights of the beginning: harder categories first."""
    hard = {"relation": 2.0, "number": 3.0, "word": 3.0, "quadrant": 1.5, "largest": 1.5}
    return torch.tensor([hard.get(name, 1.0) for name in CATEGORIES], device=device)


def numpy_rows(items: data.Items, device: torch.device) -> data.Items:
    """Move arrays to the device."""
    return data.Items(*(torch.from_numpy(np.asarray(part)).to(device) for part in items))
