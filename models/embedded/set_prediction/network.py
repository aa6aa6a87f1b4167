"""Set prediction on tiny-detector's vision features: queries, boxes by regression, no tokens.

A DETR in small (arXiv 2005.12872): the frozen tower's patches are the memory; a few queries attend
to it and to one another and each says at once whether it is an object, of which colour, shape and
size, and where. Queries come from the memory itself, as in Deformable DETR's two-stage variant
(arXiv 2010.04159, section 4.2): every patch proposes a box, the surest patches become queries, and
each layer refines its query's box. Training matches predictions and objects one to one by the
Hungarian algorithm, so nothing has to be suppressed afterwards.

Its vocabulary is closed: the words of the scenes. That is what a regression head gives up.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from models.embedded.scenes.generator import COLOUR_NAMES, SHAPES, SIZES

FEATURES, GRID = 128, 12
WIDTH, INNER, HEADS, LAYERS, QUERIES = 128, 256, 4, 2, 16
# What can be said of an object, in the order of the outputs.
ATTRIBUTES = (COLOUR_NAMES, SHAPES, SIZES)
_COUNTS = [len(words) for words in ATTRIBUTES]
# DETR's weights of the terms, in the matching and in the loss; objects are rare among patches.
CLASS_WEIGHT, CORNER_WEIGHT, OVERLAP_WEIGHT = 1.0, 5.0, 2.0


class Predictions(NamedTuple):
    """What each query says.

    Attributes:
        objects: Logit of being an object, (batch, queries).
        attributes: Logits of colours, shapes and sizes side by side, (batch, queries, 17).
        boxes: Centre, width and height as shares of the image, (batch, queries, 4).
    """

    objects: Tensor
    attributes: Tensor
    boxes: Tensor


class Targets(NamedTuple):
    """The objects of scenes, padded.

    Attributes:
        attributes: Number of colour, shape and size, (batch, objects, 3), int64.
        boxes: As `Predictions.boxes`, (batch, objects, 4).
        counts: Objects of each scene, (batch,).
    """

    attributes: Tensor
    boxes: Tensor
    counts: Tensor


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Linear(4, WIDTH)
        self.among = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.memory = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.inner = nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))

    def forward(self, queries: Tensor, boxes: Tensor, memory: Tensor) -> Tensor:
        place = self.place(torch.logit(boxes, eps=1e-4))
        placed = queries + place
        queries = self.norms[0](
            queries + self.among(placed, placed, queries, need_weights=False)[0]
        )
        seen = self.memory(queries + place, memory, memory, need_weights=False)[0]
        queries = self.norms[1](queries + seen)
        return self.norms[2](queries + self.inner(queries))


class _Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Linear(WIDTH, 1 + sum(_COUNTS))
        last = nn.Linear(WIDTH, 4)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.boxes = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), last)

    def forward(self, x: Tensor, reference: Tensor) -> Predictions:
        classes = self.classes(x)
        boxes = (torch.logit(reference, eps=1e-4) + self.boxes(x)).sigmoid()
        return Predictions(classes[..., 0], classes[..., 1:], boxes)


class SetHead(nn.Module):
    """The head; its input is what feeds tiny-detector's projector.

    Args:
        features: Width of the input.
        rows, columns: Of the patches.
    """

    anchors: Tensor

    def __init__(self, features: int = FEATURES, rows: int = GRID, columns: int = GRID) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.take = nn.Linear(features, WIDTH)
        self.proposals = _Head()
        self.layers = nn.ModuleList(_Layer() for _ in range(LAYERS))
        self.heads = nn.ModuleList(_Head() for _ in range(LAYERS))
        steps = [(torch.arange(count) + 0.5) / count for count in (rows, columns)]
        y, x = torch.meshgrid(*steps, indexing="ij")
        size = torch.full((rows * columns,), 0.2)
        anchors = torch.stack([x.flatten(), y.flatten(), size, size], 1)
        self.register_buffer("anchors", anchors, persistent=False)

    def forward(self, features: Tensor) -> list[Predictions]:
        """Return what the patches propose and what each layer's queries say.

        Args:
            features: Of each patch row by row, (batch, patches, width).
        """
        memory = self.take(self.norm(features))
        proposed = self.proposals(memory, self.anchors.expand(len(memory), -1, -1))
        found = [proposed]
        count = min(QUERIES, memory.shape[1])
        chosen = proposed.objects.topk(count, 1).indices[..., None]
        queries = memory.gather(1, chosen.expand(-1, -1, WIDTH))
        boxes = proposed.boxes.detach().gather(1, chosen.expand(-1, -1, 4))
        for layer, head in zip(self.layers, self.heads, strict=True):
            queries = layer(queries, boxes, memory)
            found.append(head(queries, boxes))
            boxes = found[-1].boxes.detach()
        return found

    @property
    def matrix_parameters(self) -> int:
        """Weights of the matrices."""
        return sum(weight.numel() for weight in self.parameters() if weight.ndim > 1)

    def flops(self, patches: int) -> float:
        """Return the operations for an image of so many patches; a multiply-add counts two."""
        queries = min(QUERIES, patches)
        head = WIDTH * (1 + sum(_COUNTS)) + WIDTH * WIDTH + 4 * WIDTH
        proposals = patches * (self.take.weight.numel() + head)
        # Self-attention's four matrices, cross-attention's for the queries, and the two within.
        own = 4 * WIDTH + 4 * WIDTH**2 + 2 * WIDTH**2 + 2 * WIDTH * INNER
        layer = queries * (own + head) + patches * 2 * WIDTH**2
        attended = 2 * WIDTH * queries * (queries + patches)
        return 2.0 * (proposals + LAYERS * (layer + attended))


def corners(boxes: Tensor) -> Tensor:
    """Return edges x0, y0, x1, y1 of boxes given by centre and size, (..., 4)."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def generalised_overlap(first: Tensor, second: Tensor) -> Tensor:
    """Return the generalised IoU (arXiv 1902.09630) of edges, broadcast over (..., 4)."""
    low = torch.maximum(first[..., :2], second[..., :2])
    high = torch.minimum(first[..., 2:], second[..., 2:])
    both = (high - low).clamp(min=0).prod(-1)
    area = [(each[..., 2:] - each[..., :2]).clamp(min=0).prod(-1) for each in (first, second)]
    union = area[0] + area[1] - both
    hull = torch.maximum(first[..., 2:], second[..., 2:])
    hull = (hull - torch.minimum(first[..., :2], second[..., :2])).prod(-1)
    return both / union.clamp(min=1e-9) - (hull - union) / hull.clamp(min=1e-9)


@torch.no_grad()
def assign(found: Predictions, targets: Targets) -> list[tuple[Tensor, Tensor]]:
    """Return for each scene the queries and the objects that belong together, cheapest in sum."""
    boxes = (found.boxes[:, :, None] - targets.boxes[:, None]).abs().sum(-1)
    edges = corners(found.boxes)[:, :, None], corners(targets.boxes)[:, None]
    cost = CORNER_WEIGHT * boxes - OVERLAP_WEIGHT * generalised_overlap(*edges)
    cost = cost - CLASS_WEIGHT * found.objects.sigmoid()[:, :, None]
    for logits, wanted in zip(
        found.attributes.split(_COUNTS, -1), targets.attributes.unbind(-1), strict=True
    ):
        own = logits.softmax(-1).gather(2, wanted[:, None].expand(-1, logits.shape[1], -1))
        cost = cost - CLASS_WEIGHT * own
    costs = cost.cpu().numpy()
    pairs = []
    for row, count in zip(costs, targets.counts.tolist(), strict=True):
        query, item = linear_sum_assignment(row[:, :count])
        pairs.append((torch.from_numpy(query), torch.from_numpy(item)))
    return pairs


def loss(found: list[Predictions], targets: Targets) -> Tensor:
    """Return the sum of all stages' losses; each is matched by itself."""
    total = found[0].objects.new_zeros(())
    for each in found:
        pairs = assign(each, targets)
        scene = torch.cat([torch.full_like(query, row) for row, (query, _) in enumerate(pairs)])
        query = torch.cat([query for query, _ in pairs])
        item = torch.cat([item for _, item in pairs])
        is_object = torch.zeros_like(each.objects)
        is_object[scene, query] = 1.0
        # Focal loss (arXiv 1708.02002), gamma 2, as Deformable DETR has it.
        raw = F.binary_cross_entropy_with_logits(each.objects, is_object, reduction="none")
        wrong = (each.objects.sigmoid() - is_object).abs()
        count = len(scene)
        total = total + 2 * CLASS_WEIGHT * (raw * wrong**2).sum() / count
        own, wanted = each.boxes[scene, query], targets.boxes[scene, item]
        total = total + CORNER_WEIGHT * (own - wanted).abs().sum(-1).mean()
        overlap = generalised_overlap(corners(own), corners(wanted))
        total = total + OVERLAP_WEIGHT * (1 - overlap).mean()
        said = each.attributes[scene, query].split(_COUNTS, -1)
        for logits, right in zip(said, targets.attributes[scene, item].unbind(-1), strict=True):
            total = total + CLASS_WEIGHT * F.cross_entropy(logits, right)
    return total


def load_head(path: Path) -> SetHead:
    """Return the head with a file's weights, in float32, for tiny-detector's patches."""
    head = SetHead()
    weights = load_file(path)
    head.load_state_dict({name: value.float() for name, value in weights.items()})
    return head.eval()


class Found(NamedTuple):
    """An object: its box as edges in shares of the image, and how sure the head is.

    Attributes:
        box: x0, y0, x1, y1.
        words: The most likely colour, shape and size.
        objectness: Probability of being an object.
        probabilities: Of each of the words.
    """

    box: tuple[float, float, float, float]
    words: tuple[str, str, str]
    objectness: float
    probabilities: tuple[float, float, float]


def read(found: Predictions, row: int, threshold: float) -> list[Found]:
    """Return the objects of one image, the surest first.

    Args:
        found: Of the last layer.
        row: Of the batch.
        threshold: Least objectness.
    """
    sure = found.objects[row].sigmoid()
    said = [part.softmax(-1) for part in found.attributes[row].split(_COUNTS, -1)]
    edges = corners(found.boxes[row]).clamp(0, 1)
    items = []
    for query in sure.argsort(descending=True).tolist():
        if sure[query] < threshold:
            break
        best = [part[query].max(-1) for part in said]
        x0, y0, x1, y1 = edges[query].tolist()
        colour, shape, size = (
            words[int(each.indices)] for words, each in zip(ATTRIBUTES, best, strict=True)
        )
        first, second, third = (float(each.values) for each in best)
        items.append(
            Found(
                (x0, y0, x1, y1),
                (colour, shape, size),
                float(sure[query]),
                (first, second, third),
            )
        )
    return items


def names(item: Found, phrase: str) -> float | None:
    """Return how sure the head is that a phrase names an object; None where it does not.

    Args:
        item: As found.
        phrase: At most one size, one colour and one shape; `object` is any shape.

    Raises:
        ValueError: A word is not of the head's vocabulary.
    """
    sure = item.objectness
    for word in phrase.split():
        if word == "object":
            continue
        kinds = [kind for kind, words in enumerate(ATTRIBUTES) if word in words]
        if not kinds:
            known = ", ".join([*(each for words in ATTRIBUTES for each in words), "object"])
            raise ValueError(f"{word!r} of {phrase!r} is no word of the head; it knows {known}.")
        if item.words[kinds[0]] != word:
            return None
        sure *= item.probabilities[kinds[0]]
    return sure
