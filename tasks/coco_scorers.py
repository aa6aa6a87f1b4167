"""Quality of detections: AP and AR by the COCO tools, F1 for detectors that give no scores.

**AP and AR** come from hotcoco or pycocotools, whose numbers are the same (tested to 1e-9, as are
those of faster-coco-eval, which is none of the choices: it does not tell its matches). Both also
tell which detection took which truth, and from that `resampled_stats` gives the numbers of a
resampled set of images: an image that is drawn twice counts twice. Its numbers for the set itself
are the tools'. `tests/benchmarks/test_coco.py` compares the time that the three take.

**F1 at an IoU** needs no scores: of an image's predictions and truths of one phrase the pair with
the largest IoU is matched first, ties by their order; P = TP / predictions, R = TP / truths,
F1 = 2 TP / (predictions + truths), pooled over images and phrases (micro), or averaged over phrases
that have truths (macro). `f1@mIoU` is the mean over IoU 0.5, 0.55, ..., 0.95. As in COCO a crowd is
no truth that must be found, and what lies in one is not counted as wrong. A point is right when it
lies in a truth that no other point has taken.

Source: arXiv 1405.0312 and cocodataset/cocoapi at 8c9bcc3; F1 as arXiv 2510.12798 reports it, but
pooled where its evaluation averages over categories.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as masks

from models.base import Unsupported
from tasks.coco_data import Annotation, Category, ImageRecord, ResultKind

Floats = NDArray[np.float64]
Tool = Literal["hotcoco", "pycocotools"]
TOOLS: tuple[Tool, ...] = get_args(Tool)

# The thresholds of the COCO tools, to the bit.
THRESHOLDS: Floats = np.linspace(0.5, 0.95, 10)
_AT = {"0.5": 0, "0.75": 5, "0.95": 9}
_RECALLS: Floats = np.linspace(0.0, 1.0, 101)
_MOST = (1, 10, 100)
_MOST_PEOPLE = (20,)
_ALL_AREAS = 1e10
# COCO's limits between small, medium and large, square pixels.
COCO_BUCKETS = (32.0**2, 96.0**2)
# Predictions of one phrase that overlap by more are the same thing said twice.
DUPLICATE_IOU = 0.9
# Resamples that are accumulated at once, times detections: bounds the memory.
_ROOM = 20_000_000


class Size(NamedTuple):
    """Height and width of an image, as masks have them."""

    height: int
    width: int


def run_lengths(segmentation: Any, size: Size) -> Any:
    """Return polygons, or run lengths of either kind, as compressed run lengths."""
    if isinstance(segmentation, list):
        return masks.merge(masks.frPyObjects(segmentation, *size))
    if isinstance(segmentation["counts"], list):
        return masks.frPyObjects(segmentation, *size)
    return segmentation


def pixels_of(segmentation: Any, size: Size) -> NDArray[np.bool_]:
    """Return polygons or run lengths as a mask, (height, width)."""
    with warnings.catch_warnings():
        # pycocotools 2.0.11 hands numpy 2 an array in the way of numpy 1.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        found = masks.decode(run_lengths(segmentation, size))
    return np.asarray(found, bool)


# --- AP and AR by the COCO tools ---


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a COCO tool says.

    Attributes:
        stats: Its numbers by name, NaN where it has none (no truth of that size).
        precision: (thresholds, recalls, categories, areas, maxDets), -1 where there is no truth.
        recall: (thresholds, categories, areas, maxDets).
        read_matches: Gives `matches`.
        most: Detections of an image and category that count, ascending.
    """

    stats: dict[str, float]
    precision: Floats
    recall: Floats
    read_matches: Callable[[], Sequence[Sequence[Sequence[Match]]]]
    most: tuple[int, ...]

    @cached_property
    def matches(self) -> Sequence[Sequence[Sequence[Match]]]:
        """By category and area what was matched in each image that has any of it.

        Read when it is asked for: that takes longer than the numbers. faster-coco-eval has none.
        """
        return self.read_matches()


class Match(NamedTuple):
    """Detections of one category in an image, by falling score.

    Attributes:
        image: Its place.
        scores: (detections,).
        is_matched, is_ignored: (thresholds, detections).
        truths: Truths that count.
    """

    image: int
    scores: Floats
    is_matched: NDArray[np.bool_]
    is_ignored: NDArray[np.bool_]
    truths: int


def stat_names(kind: ResultKind, mark: str = "") -> tuple[str, ...]:
    """Return the names of the tools' numbers in their order.

    Args:
        kind: Of result.
        mark: Behind the sizes small, medium and large where they are not COCO's.
    """
    small, medium, large = (f"{size}{mark}" for size in "sml")
    if kind == "keypoints":
        return (
            "AP", "AP50", "AP75", f"AP{medium}", f"AP{large}",
            "AR", "AR50", "AR75", f"AR{medium}", f"AR{large}",
        )  # fmt: skip
    return (
        "AP", "AP50", "AP75", f"AP{small}", f"AP{medium}", f"AP{large}",
        "AR1", "AR10", "AR100", f"AR{small}", f"AR{medium}", f"AR{large}",
    )  # fmt: skip


def evaluate(
    images: Sequence[ImageRecord],
    categories: Sequence[Category],
    truths: Mapping[int, Sequence[Annotation]],
    results: Sequence[Mapping[str, Any]],
    kind: ResultKind,
    *,
    by: Tool | Literal["faster-coco-eval"],
    buckets: tuple[float, float] = COCO_BUCKETS,
    mark: str = "",
) -> Evaluation:
    """Let a COCO tool judge detections.

    Args:
        images: In the order of the items; their places are the last axis of `matches`.
        categories: All that are asked for.
        truths: Annotations by image id.
        results: Records of COCO's result format, each with a score.
        kind: What of them is compared: `bbox`, `segm` or `keypoints`.
        by: The tool.
        buckets: Largest area of a small and of a medium truth, square pixels.
        mark: See `stat_names`.
    """
    content = _dataset(images, categories, truths, kind)
    image_ids = {image.id: place for place, image in enumerate(images, start=1)}
    category_ids = {each.id: place for place, each in enumerate(categories, start=1)}
    renamed = [
        {
            **result,
            "image_id": image_ids[result["image_id"]],
            "category_id": category_ids[result["category_id"]],
        }
        for result in results
    ]
    make, evaluator_class, options = _tool(by)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        # Of settings that are not COCO's: sizes with limits of ours have names of their own.
        warnings.filterwarnings("ignore", "hotcoco: ", UserWarning)
        truth = make(content)
        # The tools cannot load an empty list.
        found = truth.loadRes(renamed) if renamed else make({**content, "annotations": []})
        evaluator = evaluator_class(truth, found, kind, **options)
        settings = evaluator.params
        settings.imgIds, settings.catIds = list(image_ids.values()), list(category_ids.values())
        settings.iouThrs, settings.recThrs = THRESHOLDS, _RECALLS
        small, medium = buckets
        limits = [[0, _ALL_AREAS], [0, small], [small, medium], [medium, _ALL_AREAS]]
        labels = ["all", "small", "medium", "large"]
        if kind == "keypoints":
            del limits[1], labels[1]
            settings.kpt_oks_sigmas = np.array(_sigmas(categories))
        settings.areaRng, settings.areaRngLbl = limits, labels
        settings.maxDets = list(_MOST_PEOPLE if kind == "keypoints" else _MOST)
        evaluator.params = settings
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    names = stat_names(kind, mark)
    stats = [float(number) for number in evaluator.stats[: len(names)]]
    return Evaluation(
        stats={
            name: number if number >= 0 else float("nan")
            for name, number in zip(names, stats, strict=True)
        },
        precision=np.asarray(evaluator.eval["precision"]),
        recall=np.asarray(evaluator.eval["recall"]),
        read_matches=lambda: _matches(by, evaluator.evalImgs, limits, len(categories)),
        most=tuple(settings.maxDets),
    )


def _tool(by: str) -> tuple[Callable[[dict[str, Any]], Any], Any, dict[str, Any]]:
    """Return what makes a tool's data of a content, its evaluator, and how that is called."""
    if by == "hotcoco":
        import hotcoco

        return hotcoco.COCO, hotcoco.COCOeval, {}
    data_class: Any
    if by == "faster-coco-eval":
        import faster_coco_eval

        data_class, evaluator = faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster
        options = {"rle_iou_max_workers": 1}
    else:
        from pycocotools import coco, cocoeval

        data_class, evaluator, options = coco.COCO, cocoeval.COCOeval, {}

    def make(content: dict[str, Any]) -> Any:
        found = data_class()
        found.dataset = content
        found.createIndex()
        return found

    return make, evaluator, options


def _dataset(
    images: Sequence[ImageRecord],
    categories: Sequence[Category],
    truths: Mapping[int, Sequence[Annotation]],
    kind: ResultKind,
) -> dict[str, Any]:
    """Return truths in COCO's format, everything numbered from 1 in our order.

    The tools sort images and categories by id, and take a truth of id 0 for unmatched.
    """
    known = {category.id: place for place, category in enumerate(categories, start=1)}
    annotations: list[dict[str, Any]] = []
    for place, image in enumerate(images, start=1):
        for each in truths[image.id]:
            if each.category_id not in known:
                continue
            record: dict[str, Any] = {
                "id": len(annotations) + 1,
                "image_id": place,
                "category_id": known[each.category_id],
                "bbox": list(each.bbox),
                "area": each.area,
                "iscrowd": int(each.is_crowd),
            }
            if kind == "segm":
                record["segmentation"] = run_lengths(each.segmentation, size_of(image))
            if kind == "keypoints":
                record["keypoints"] = list(each.keypoints)
                record["num_keypoints"] = sum(v > 0 for v in each.keypoints[2::3])
            annotations.append(record)
    return {
        "info": {},
        "images": [
            {"id": place, "width": image.width, "height": image.height}
            for place, image in enumerate(images, start=1)
        ],
        "categories": [
            {"id": place, "name": each.name} for place, each in enumerate(categories, start=1)
        ],
        "annotations": annotations,
    }


def size_of(image: ImageRecord) -> Size:
    """Return an image's height and width."""
    return Size(image.height, image.width)


def _sigmas(categories: Sequence[Category]) -> tuple[float, ...]:
    """Return the tolerances of the key points, which all categories must share."""
    found = {category.sigmas for category in categories}
    if len(found) != 1:
        raise Unsupported("categories with key points must have the same ones.")
    return found.pop()


def _matches(
    by: str, images: Sequence[Any], areas: Sequence[Sequence[float]], num_categories: int
) -> list[list[list[Match]]]:
    """Return what a tool has matched, by category and area.

    Args:
        by: The tool.
        images: Its `evalImgs`, by category, area and image; None where there is nothing.
        areas: Limits of sizes.
        num_categories: Of the data.

    Raises:
        Unsupported: The tool tells none.
    """
    if by == "faster-coco-eval":
        raise Unsupported(f"{by} does not tell its matches: ask {' or '.join(TOOLS)}.")
    places = {tuple(map(float, limits)): place for place, limits in enumerate(areas)}
    found: list[list[list[Match]]] = [[[] for _ in areas] for _ in range(num_categories)]
    for each in images:
        if each is not None:
            match = Match(
                each["image_id"] - 1,
                np.array(each["dtScores"], float),
                np.asarray(each["dtMatches"]) != 0,
                np.asarray(each["dtIgnore"]).astype(bool),
                int(np.count_nonzero(np.asarray(each["gtIgnore"]) == 0)),
            )
            area = places[tuple(map(float, each["aRng"]))]
            found[each["category_id"] - 1][area].append(match)
    return found


def resampled_stats(
    found: Evaluation, counts: Floats, kind: ResultKind, mark: str = ""
) -> dict[str, Floats]:
    """Return the tools' numbers for resampled images.

    Args:
        found: Of the images, once each.
        counts: How often each image is drawn, (resamples, images).
        kind: Of result.
        mark: See `stat_names`.

    Returns:
        One number a resample by the names of `stat_names`, NaN where there is none.
    """
    means = _Means(len(counts))
    sizes = (
        ("all", "medium", "large") if kind == "keypoints" else ("all", "small", "medium", "large")
    )
    most = found.most[-1]
    for by_area in found.matches:
        for size, matches in zip(sizes, by_area, strict=True):
            for limit in found.most if size == "all" else (most,):
                curve = curves(matches, counts, limit, with_precision=limit == most)
                if curve is not None:
                    means.add(size, limit, curve)
    names = stat_names(kind, mark)
    if kind == "keypoints":
        numbers = [
            means.precision("all"), means.precision("all", 0), means.precision("all", 5),
            means.precision("medium"), means.precision("large"),
            means.recall("all", most), means.recall("all", most, 0), means.recall("all", most, 5),
            means.recall("medium", most), means.recall("large", most),
        ]  # fmt: skip
    else:
        numbers = [
            means.precision("all"), means.precision("all", 0), means.precision("all", 5),
            *(means.precision(size) for size in sizes[1:]),
            *(means.recall("all", limit) for limit in found.most),
            *(means.recall(size, most) for size in sizes[1:]),
        ]  # fmt: skip
    return dict(zip(names, numbers, strict=True))


class Curve(NamedTuple):
    """Precision and recall of one category in resampled images.

    Attributes:
        has_truths: (resamples,).
        precision: Its mean over the 101 recalls, (resamples, thresholds); None if not wanted.
        last: At the largest of the recalls that is reached, likewise; 0 where nothing is right.
        recall: The largest, (resamples, thresholds).
    """

    has_truths: NDArray[np.bool_]
    precision: Floats | None
    last: Floats | None
    recall: Floats


class _Means:
    """Sums over the categories that have truths, by size and number of detections."""

    def __init__(self, resamples: int) -> None:
        self._resamples = resamples
        self._sums: dict[tuple[str, str, int], Floats] = {}
        self._counts: dict[tuple[str, str, int], Floats] = {}

    def add(self, size: str, limit: int, curve: Curve) -> None:
        if curve.precision is not None:
            self._add(("precision", size, 0), curve.precision, curve.has_truths)
        self._add(("recall", size, limit), curve.recall, curve.has_truths)

    def _add(
        self, key: tuple[str, str, int], values: Floats, has_truths: NDArray[np.bool_]
    ) -> None:
        zero = np.zeros((self._resamples, len(THRESHOLDS)))
        part = np.where(has_truths[:, None], values, 0.0)
        self._sums[key] = self._sums.get(key, zero) + part
        self._counts[key] = self._counts.get(key, np.zeros(self._resamples)) + has_truths

    def precision(self, size: str, threshold: int | None = None) -> Floats:
        return self._mean(("precision", size, 0), threshold)

    def recall(self, size: str, limit: int, threshold: int | None = None) -> Floats:
        return self._mean(("recall", size, limit), threshold)

    def _mean(self, key: tuple[str, str, int], threshold: int | None) -> Floats:
        if key not in self._sums:
            return np.full(self._resamples, np.nan)
        sums = self._sums[key]
        values = sums.mean(axis=1) if threshold is None else sums[:, threshold]
        with np.errstate(invalid="ignore", divide="ignore"):
            return values / self._counts[key]


def curves(
    matches: Sequence[Match], counts: Floats, limit: int, *, with_precision: bool = True
) -> Curve | None:
    """Return precision and recall of a category and size in resampled images.

    An image that is drawn n times has each of its detections n times, one behind the other. That
    gives the same curve as n separate images but for the order of equal scores: of n hits in a row
    the last has the best precision and the largest recall, of n misses the first counts.

    Args:
        matches: Of the images that have any.
        counts: How often each is drawn, (resamples, images).
        limit: Detections of an image that count.
        with_precision: Whether the precisions are wanted too.

    Returns:
        None if no image has a truth.
    """
    truths = np.zeros(counts.shape[1])
    truths[[match.image for match in matches]] = [match.truths for match in matches]
    if not truths.any():
        return None
    total = counts @ truths
    has_truths = total > 0
    total = np.where(has_truths, total, 1.0)
    image = np.concatenate([np.full(len(m.scores[:limit]), m.image) for m in matches])
    scores = np.concatenate([m.scores[:limit] for m in matches])
    # The tools' sorting, which keeps the order of equal scores.
    order = np.argsort(-scores, kind="stable")
    image = image[order]
    hit, wrong = (
        np.concatenate([each[:, :limit] for each in parts], axis=1)[:, order]
        for parts in (
            [m.is_matched & ~m.is_ignored for m in matches],
            [~m.is_matched & ~m.is_ignored for m in matches],
        )
    )
    recall = (counts[:, image] @ hit.T.astype(float)) / total[:, None]
    if not with_precision:
        return Curve(has_truths, None, None, recall)
    precision, last = np.zeros_like(recall), np.zeros_like(recall)
    step = max(1, _ROOM // max(1, hit.size))
    for first in range(0, len(counts) if len(image) else 0, step):
        part = slice(first, first + step)
        drawn = counts[part, None, image]
        found = np.cumsum(drawn * hit, axis=2)
        missed = np.cumsum(drawn * wrong, axis=2)
        height = found / (missed + found + np.spacing(1))
        height = np.maximum.accumulate(height[:, :, ::-1], axis=2)[:, :, ::-1]
        # How many of the recalls are reached; each has the precision where it first is.
        along = found / total[part, None, None]
        reached = np.searchsorted(_RECALLS, along, side="right")
        weight = np.diff(reached, axis=2, prepend=0) / len(_RECALLS)
        precision[part] = (height * weight).sum(axis=2)
        end = (reached == reached[..., -1:]).argmax(axis=2)
        last[part] = np.take_along_axis(height, end[..., None], axis=2)[..., 0]
    return Curve(has_truths, precision, last, recall)


# --- F1 without scores ---


def box_overlaps(found: Floats, truths: Floats, is_crowd: Sequence[bool]) -> Floats:
    """Return the IoU of every found box with every truth, (found, truths).

    Args:
        found: x, y, width, height, (found, 4).
        truths: The same, (truths, 4).
        is_crowd: Of each truth: then it is the share of the found box that lies in it.
    """
    if not len(found) or not len(truths):
        return np.zeros((len(found), len(truths)))
    return np.asarray(masks.iou(found, truths, [int(each) for each in is_crowd]))


def mask_overlaps(found: Sequence[Any], truths: Sequence[Any], is_crowd: Sequence[bool]) -> Floats:
    """Return the IoU of masks as compressed run lengths; see `box_overlaps`."""
    if not found or not truths:
        return np.zeros((len(found), len(truths)))
    return np.asarray(masks.iou(list(found), list(truths), [int(each) for each in is_crowd]))


def keypoint_similarity(
    found: Floats, truths: Floats, boxes: Floats, areas: Floats, sigmas: Sequence[float]
) -> Floats:
    """Return the object keypoint similarity of every found skeleton with every truth.

    exp(-d² / (2 area (2 sigma)²)), averaged over the points that are labelled in the truth. For a
    truth without labelled points d is how far a point lies outside the truth's box, which is made
    three times as wide and high. A point that was not found (NaN) is similar to nothing.

    Args:
        found: x, y of each point, (found, points, 2).
        truths: x, y, visibility of each point, (truths, points, 3).
        boxes: x, y, width, height of the truths, (truths, 4).
        areas: Of the truths, square pixels, (truths,).
        sigmas: Tolerance of each point.
    """
    labelled = truths[..., 2] > 0
    is_labelled: NDArray[np.bool_] = np.asarray(labelled.any(axis=1))
    offsets = np.abs(found[:, None] - truths[None, :, :, :2])
    low = boxes[:, None, :2] - boxes[:, None, 2:]
    high = boxes[:, None, :2] + 2 * boxes[:, None, 2:]
    outside = np.maximum(0, low - found[:, None]) + np.maximum(0, found[:, None] - high)
    offsets = np.where(is_labelled[:, None, None], offsets, outside)
    variances = (2 * np.asarray(sigmas)) ** 2
    near = np.exp(-(offsets**2).sum(-1) / variances / (areas[:, None] + np.spacing(1)) / 2)
    counted = labelled | ~is_labelled[:, None]
    return (np.nan_to_num(near, nan=0.0) * counted).sum(-1) / np.maximum(counted.sum(-1), 1)


def point_hits(found: Floats, truths: Sequence[NDArray[np.bool_]]) -> Floats:
    """Return 1 where a point lies in a truth's mask, else 0, (found, truths).

    Args:
        found: x, y, (found, 2); a point on an edge between pixels is in the right or lower one.
        truths: Masks (height, width).
    """
    hits = np.zeros((len(found), len(truths)))
    for column, mask in enumerate(truths):
        height, width = mask.shape
        # The right and lower edges of the image belong to its last pixels.
        x = np.minimum(np.floor(found[:, 0]), width - 1).astype(int)
        y = np.minimum(np.floor(found[:, 1]), height - 1).astype(int)
        inside = (found >= 0).all(1) & (found[:, 0] <= width) & (found[:, 1] <= height)
        hits[inside, column] = mask[y[inside], x[inside]]
    return hits


class Pair(NamedTuple):
    """A prediction and a truth that were matched, and how much they overlap."""

    found: int
    truth: int
    overlap: float


def greedy_pairs(overlap: Floats) -> list[Pair]:
    """Return a one-to-one matching, the largest overlap first; equal ones by their order.

    Pairs that do not overlap are none. The matching at a threshold is the pairs that reach it.

    Args:
        overlap: (found, truths).
    """
    rest, pairs = overlap.copy(), []
    while rest.size:
        found, truth = (int(place) for place in np.unravel_index(rest.argmax(), rest.shape))
        if rest[found, truth] <= 0:
            break
        pairs.append(Pair(found, truth, float(overlap[found, truth])))
        rest[found], rest[:, truth] = -1.0, -1.0
    return pairs


class Counts(NamedTuple):
    """Of one phrase in one image.

    Attributes:
        right: Predictions matched, at each threshold, (thresholds,).
        ignored: Predictions that are neither right nor wrong, at each threshold, (thresholds,).
        predictions: Of them all.
        truths: That must be found.
        duplicates: Predictions that repeat an earlier one.
    """

    right: Floats
    ignored: Floats
    predictions: int
    truths: int
    duplicates: int


def count(overlap: Floats, is_crowd: Sequence[bool], duplicates: int) -> Counts:
    """Count what is right.

    Args:
        overlap: Of every prediction with every truth, (found, truths).
        is_crowd: Of each truth.
        duplicates: Predictions that repeat an earlier one.
    """
    crowd = np.array(is_crowd, bool).reshape(-1)
    single, crowds = overlap[:, ~crowd], overlap[:, crowd]
    limits = np.minimum(THRESHOLDS, 1 - 1e-10)
    pairs = greedy_pairs(single)
    reached = np.array([[pair.overlap >= limit for pair in pairs] for limit in limits])
    reached = reached.reshape(len(limits), len(pairs))
    ignored = np.zeros(len(limits))
    if crowds.shape[1]:
        matched = np.zeros((len(limits), len(overlap)), bool)
        matched[:, [pair.found for pair in pairs]] = reached
        within = crowds.max(axis=1)[None] >= limits[:, None]
        ignored = (within & ~matched).sum(axis=1).astype(float)
    return Counts(
        reached.sum(axis=1).astype(float),
        ignored,
        len(overlap),
        int((~crowd).sum()),
        duplicates,
    )


def repeated(overlap: Floats) -> int:
    """Return the predictions that overlap an earlier one by more than `DUPLICATE_IOU`.

    Args:
        overlap: Of every prediction with every other, (found, found).
    """
    return int((np.triu(overlap, 1) > DUPLICATE_IOU).any(axis=0).sum())


def f1(right: Floats, predictions: Floats, truths: Floats) -> Floats:
    """Return 2 right / (predictions + truths); NaN where there is neither."""
    return _ratio(2 * right, predictions + truths)


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(numerator, float) / np.asarray(denominator, float)


def at_thresholds(name: str, by_threshold: Floats) -> dict[str, Floats]:
    """Return a number at IoU 0.5, 0.75 and 0.95 and its mean over all thresholds, by name.

    Args:
        name: What stands before the @.
        by_threshold: (resamples, thresholds).
    """
    found = {f"{name}@{label}": by_threshold[:, place] for label, place in _AT.items()}
    found[f"{name}@mIoU"] = by_threshold.mean(axis=1)
    return found


def published_f1(held: Sequence[Curve], resamples: int) -> Floats:
    """Return F1 as Rex-Omni's evaluation computes it from the curves of a COCO tool.

    A category's precision is the last positive one of its 101, its recall the largest; both are
    averaged over categories without the zeros, and F1 is that of the two means. Detections have one
    score, and those of categories that are not in the image are left out, by the caller.

    Source: IDEA-Research/Rex-Omni at 478e44f, from a description. A category without any positive
    precision counts as 0 here, where the released code takes the value of the category before.

    Args:
        held: Curves of the categories that have truths.
        resamples: Number of rows.

    Returns:
        (resamples, thresholds); 0 where nothing is right.
    """
    sums, numbers = np.zeros((2, 2, resamples, len(THRESHOLDS)))
    for curve in held:
        for at, values in enumerate((curve.last, curve.recall)):
            assert values is not None
            kept = np.where(curve.has_truths[:, None], values, 0.0)
            sums[at] += kept
            numbers[at] += kept > 0
    precision, recall = sums / np.maximum(numbers, 1)
    return 2 * precision * recall / np.maximum(precision + recall, np.spacing(1))


def nearest_on_grid(boxes: Floats, bins: int, image: ImageRecord) -> Floats:
    """Return boxes with every edge moved to the nearest of the positions that can be said.

    Args:
        boxes: x, y, width, height, pixels, (boxes, 4).
        bins: Positions from one edge of the image to the other, both included.
        image: Whose.
    """
    edges = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    extent = np.array([image.width, image.height] * 2, float)
    rounded = np.round((edges / extent).clip(0, 1) * (bins - 1)) / (bins - 1) * extent
    return np.concatenate([rounded[:, :2], rounded[:, 2:] - rounded[:, :2]], axis=1)
