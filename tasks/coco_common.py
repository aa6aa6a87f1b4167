"""What detection tasks have in common: items, the call, the stored answer, and the numbers.

An item is an image with the phrases that are asked about it and the truth of each. The stored
output is JSON: the instances of every phrase, what of the answer was malformed, the number of
tokens. A malformed answer is an outcome of its own (`format_errors`): what can be read of it is
scored, and where nothing can be read the image has no F1 of its own.

| metric | of what |
|---|---|
| `f1@0.5`, `f1@0.75`, `f1@0.95`, `f1@mIoU` | pooled, see `tasks/coco_scorers.py`; points: `f1` |
| `precision@0.5`, `recall@0.5` | of the same; points: `precision`, `recall` |
| `f1_macro@0.5`, `f1_macro@mIoU` | averaged over phrases that have truths |
| `f1_published@0.5`, `f1_published@mIoU` | as Rex-Omni's evaluation averages (boxes alone) |
| `AP`, `AP50`, ... | by the COCO tools; none for a detector without scores, or for points |
| `image_f1` | F1 of an image, at IoU 0.5, averaged; 1 where nothing is and nothing was found |
| `duplicates` | predictions that repeat an earlier one of their phrase |
| `absent_rejected` | phrases that name nothing and were answered so |
| `count_error` | mean of how far the number of instances of a phrase is off |
| `format_errors` | malformed answers |
| `tokens_per_instance` | tokens that say where an instance is |
| `answer_tokens_per_instance` | all tokens of answers, by instance |
| `ceiling_f1@0.95`, `ceiling_f1@mIoU` | F1 of the truth on the detector's own grid (boxes) |

A score of a coordinate-token detector is the exponential of the mean log-probability of an
instance's tokens. AP with it is a second number, not to be compared with that of detectors which
are trained to rank; F1 is the first.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from models.base import (
    Decoding,
    DetectionOutput,
    Detections,
    Detector,
    Instance,
    InvalidOutput,
    Trace,
)
from tasks import coco_scorers as rules
from tasks.base import Item, Metric, Scored, Scores, Task, Unscored
from tasks.checks import check_choice
from tasks.coco_data import Annotation, Category, ImageRecord, ResultKind
from tasks.resampling import draw_counts

Floats = rules.Floats
OUTPUTS: tuple[DetectionOutput, ...] = get_args(DetectionOutput)
_TOOL_KINDS: Mapping[DetectionOutput, ResultKind] = {
    "box": "bbox",
    "polygon": "segm",
    "keypoint": "keypoints",
}
_SHAPES = {"box": 4, "point": 2}
# Coordinates and scores are stored to so many decimals: outputs are compared by their text, and
# more would not survive another order of summation.
_PIXEL_DECIMALS = 4
_SCORE_DECIMALS = 6
_PUBLISHED_SCORE = 0.2
_CORNERS = 3


class Question(NamedTuple):
    """An image, what is asked about it, and the truth.

    Attributes:
        image: Its record; the file's name is the task's to read.
        phrases: Asked, all different.
        truths: Of all phrases, by the id of their category.
    """

    image: ImageRecord
    phrases: tuple[str, ...]
    truths: tuple[Annotation, ...]


class Asked(NamedTuple):
    """All that a task asks, and every phrase of it as a category."""

    questions: tuple[Question, ...]
    categories: tuple[Category, ...]


@dataclass(frozen=True)
class Detected:
    """Detections as the text that is stored and scored.

    Attributes:
        text: JSON, see `stored_text`.
        token_ids: The tokens of the answer.
        trace: What was done.
    """

    text: str
    token_ids: tuple[int, ...]
    trace: Trace


class Answer(NamedTuple):
    """A stored output as read again."""

    found: list[list[Instance]]
    format_errors: list[str]
    tokens: int
    bins: int | None


@dataclass(frozen=True, kw_only=True)
class DetectionTask(Task[Detector]):
    """Finding what phrases name in images.

    Attributes:
        output: What is asked for: `box`, `point`, `polygon` or `keypoint`.
        max_new_tokens: Longest answer of a detector that writes tokens.
        tool: What computes AP and AR: `hotcoco`, or `pycocotools` for the same numbers later.
    """

    output: DetectionOutput = "box"
    max_new_tokens: int = 2048
    tool: rules.Tool = "hotcoco"

    capability = "Detector"

    def __post_init__(self) -> None:
        check_choice("output", self.output, OUTPUTS)
        check_choice("tool", self.tool, rules.TOOLS)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")

    @abstractmethod
    def questions(self) -> Sequence[Question]:
        """Return the questions in the order in which they are asked, the same object every time."""

    @abstractmethod
    def categories(self) -> Sequence[Category]:
        """Return every phrase that is asked about any image as a category."""

    @abstractmethod
    def pixels(self, item: Item) -> npt.NDArray[np.uint8]:
        """Return an item's image, (height, width, 3)."""

    @property
    def buckets(self) -> tuple[float, float]:
        """Largest area of a small and of a medium truth, square pixels."""
        return rules.COCO_BUCKETS

    @property
    def mark(self) -> str:
        """What stands behind the sizes in names where they are not COCO's."""
        return ""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """See the module's table."""
        if self.output == "point":
            quality = ["f1", "precision", "recall", "f1_macro"]
        else:
            quality = [f"f1@{at}" for at in ("0.5", "0.75", "0.95", "mIoU")]
            quality += ["precision@0.5", "recall@0.5", "f1_macro@0.5", "f1_macro@mIoU"]
            quality += rules.stat_names(_TOOL_KINDS[self.output], self.mark)
        if self.output == "box":
            quality += ["f1_published@0.5", "f1_published@mIoU"]
            quality += ["ceiling_f1@0.95", "ceiling_f1@mIoU"]
        return (
            *(Metric(name=name, unit="fraction", kind="corpus") for name in quality),
            Metric(name="image_f1", unit="fraction", kind="mean"),
            _corpus("duplicates", "fraction", higher_is_better=False),
            _corpus("absent_rejected", "fraction", higher_is_better=True),
            _corpus("count_error", "instances", higher_is_better=False),
            Metric(name="format_errors", unit="fraction", kind="binary", higher_is_better=False),
            _corpus("tokens_per_instance", "tokens", higher_is_better=False),
            _corpus("answer_tokens_per_instance", "tokens", higher_is_better=False),
        )

    def items(self) -> Iterator[Item]:
        """Yield the images, each with its phrases and their truths."""
        categories = self.categories()
        for question in self.questions():
            yield self.item(str(question.image.id), question, categories)

    def item(self, item_id: str, question: Question, categories: Sequence[Category]) -> Item:
        """Return a question as an item; the categories are those of its truths."""
        names = {category.id: category.name for category in categories}
        image = question.image
        return Item(
            item_id,
            {
                "file": image.file_name,
                "width": image.width,
                "height": image.height,
                "phrases": list(question.phrases),
                "truths": [
                    {
                        "phrase": names[truth.category_id],
                        "bbox": list(truth.bbox),
                        "area": truth.area,
                        "iscrowd": int(truth.is_crowd),
                        **self._shape_of(truth),
                    }
                    for truth in question.truths
                ],
                **self.more_fields(question),
                **self._skeleton(categories),
            },
        )

    def more_fields(self, question: Question) -> Mapping[str, Any]:
        """Return what else an item holds."""
        return {}

    def _skeleton(self, categories: Sequence[Category]) -> dict[str, Any]:
        if self.output != "keypoint":
            return {}
        # The tools have one skeleton for all.
        skeleton = categories[0]
        return {"keypoints": list(skeleton.keypoints), "sigmas": list(skeleton.sigmas)}

    def _shape_of(self, truth: Annotation) -> dict[str, Any]:
        if self.output == "keypoint":
            return {"keypoints": list(truth.keypoints)}
        return {} if self.output == "box" else {"segmentation": truth.segmentation}

    def call(self, model: Detector, item: Item, *, fixed_length: bool = False) -> Detected:
        """Ask for everything at once; the image file is decoded by whoever is measured.

        Raises:
            models.base.InvalidOutput: What came back are no detections.
        """
        phrases = item.fields["phrases"]
        decoding = Decoding(max_new_tokens=self.max_new_tokens, ignore_eos=fixed_length)
        names = item.fields.get("keypoints", ())
        found = model.detect(self.pixels(item), phrases, self.output, decoding, keypoints=names)
        check_detections(found, len(phrases), self.output, len(names))
        found.trace.notes |= {
            "instances": sum(map(len, found.found)),
            "format_errors": len(found.format_errors),
        }
        return Detected(stored_text(found, model.facts.bins), found.token_ids, found.trace)

    def score(self, item: Item, output: str) -> Scores:
        """Return the scores of an image by itself; see the module's table."""
        return self.score_with_detail(item, output).scores

    def score_with_detail(self, item: Item, output: str) -> Scored:
        """Return the scores of an image, and in words what was right."""
        answer = read_text(output)
        counts = self._counts(item, answer)
        right = sum(each.right[0] for each in counts)
        predictions = sum(each.predictions - each.ignored[0] for each in counts)
        truths = sum(each.truths for each in counts)
        value: float | Unscored
        if answer.format_errors and not any(answer.found):
            value = Unscored(f"nothing of the answer can be read: {answer.format_errors[0]}")
        else:
            value = 2 * right / (predictions + truths) if predictions + truths else 1.0
        detail = f"{right:.0f} of {truths} found, {predictions - right:.0f} wrong"
        if answer.format_errors:
            detail += f"; {'; '.join(answer.format_errors)}"
        scores = {"image_f1": value, "format_errors": float(bool(answer.format_errors))}
        return Scored(scores, detail)

    def conditions(self) -> dict[str, str]:
        """Return which of the COCO tools computes AP, and its version."""
        return {"coco_tool": f"{self.tool} {version(self.tool)}"}

    def corpus(
        self, outputs: Mapping[str, str], draws: npt.NDArray[np.int64]
    ) -> Mapping[str, Floats]:
        """Return the metrics of all images together; see the module's table."""
        asked = {str(question.image.id): question for question in self.questions()}
        questions = [asked[name] for name in outputs]
        items = [self.item(name, asked[name], self.categories()) for name in outputs]
        answers = [read_text(output) for output in outputs.values()]
        drawn = draw_counts(draws, len(outputs))
        return {
            **self._without_scores(items, answers, drawn),
            **(self._by_tools(questions, answers, drawn) if self.output != "point" else {}),
            **(self._ceiling(questions, answers, drawn) if self.output == "box" else {}),
        }

    def results(self, outputs: Mapping[str, str]) -> list[dict[str, Any]]:
        """Return stored outputs as records of COCO's result format, with the ids of the files."""
        asked = {str(question.image.id): question for question in self.questions()}
        return [
            record
            for name, output in outputs.items()
            for record in self._records(asked[name], read_text(output))
        ]

    def _counts(self, item: Item, answer: Answer) -> list[rules.Counts]:
        """Return the counts of each phrase of an item."""
        fields = item.fields
        counted = []
        for phrase, found in zip(fields["phrases"], answer.found, strict=True):
            truths = [truth for truth in fields["truths"] if truth["phrase"] == phrase]
            # As for the tools, a skeleton without a labelled point need not be found either.
            crowd = [
                bool(truth["iscrowd"]) or not any(truth.get("keypoints", (1,) * 3)[2::3])
                for truth in truths
            ]
            overlap, duplicates = _OVERLAPS[self.output](_Case(fields, found, truths, crowd))
            counted.append(rules.count(overlap, crowd, duplicates))
        return counted

    def _without_scores(
        self, items: Sequence[Item], answers: Sequence[Answer], drawn: Floats
    ) -> dict[str, Floats]:
        """Return F1 and what is counted beside it."""
        place = {category.name: at for at, category in enumerate(self.categories())}
        steps = len(rules.THRESHOLDS)
        right = np.zeros((len(items), len(place), steps))
        predicted = np.zeros((len(items), len(place), steps))
        truths = np.zeros((len(items), len(place)))
        # duplicates, predictions, absent phrases, those rejected, errors of counts, phrases,
        # coordinate tokens, tokens.
        sums = np.zeros((len(items), 8))
        for row, (item, answer) in enumerate(zip(items, answers, strict=True)):
            counts = self._counts(item, answer)
            for phrase, each in zip(item.fields["phrases"], counts, strict=True):
                at = place[phrase]
                right[row, at], truths[row, at] = each.right, each.truths
                predicted[row, at] = each.predictions - each.ignored
                is_absent = not each.truths
                error = abs(each.predictions - each.truths)
                sums[row, :6] += (
                    each.duplicates,
                    each.predictions,
                    is_absent,
                    is_absent and not each.predictions,
                    error,
                    1,
                )
            tokens = sum(instance.tokens for found in answer.found for instance in found)
            sums[row, 6:] = tokens, answer.tokens
        hit, said = (
            (drawn @ values.reshape(len(items), -1)).reshape(-1, len(place), steps)
            for values in (right, predicted)
        )
        there = drawn @ truths
        micro = rules.f1(hit.sum(1), said.sum(1), there.sum(1)[:, None])
        by_phrase = rules.f1(hit, said, there[..., None])  # 0 or NaN where there is no truth
        with np.errstate(invalid="ignore", divide="ignore"):
            present = np.maximum((there > 0).sum(1), 1)[:, None]
            macro = np.nansum(by_phrase, axis=1) / present
            precision = hit.sum(1)[:, 0] / said.sum(1)[:, 0]
            recall = hit.sum(1)[:, 0] / there.sum(1)
            total = drawn @ sums
            found = {
                "duplicates": total[:, 0] / total[:, 1],
                "absent_rejected": total[:, 3] / total[:, 2],
                "count_error": total[:, 4] / total[:, 5],
                "tokens_per_instance": total[:, 6] / total[:, 1],
                "answer_tokens_per_instance": total[:, 7] / total[:, 1],
            }
        if self.output == "point":
            quality = {"f1": micro, "f1_macro": macro}
            found |= {name: values[:, 0] for name, values in quality.items()}
            return found | {"precision": precision, "recall": recall}
        found |= rules.at_thresholds("f1", micro)
        averaged = rules.at_thresholds("f1_macro", macro)
        found |= {name: averaged[name] for name in ("f1_macro@0.5", "f1_macro@mIoU")}
        return found | {"precision@0.5": precision, "recall@0.5": recall}

    def _by_tools(
        self, questions: Sequence[Question], answers: Sequence[Answer], drawn: Floats
    ) -> dict[str, Floats]:
        """Return AP and AR, the first row as the tool says, and the published F1."""
        kind = _TOOL_KINDS[self.output]
        names = rules.stat_names(kind, self.mark)
        records = [
            record
            for question, answer in zip(questions, answers, strict=True)
            for record in self._records(question, answer)
        ]
        found: dict[str, Floats] = {}
        if any(record["score"] is None for record in records):
            found |= {name: np.full(len(drawn), np.nan) for name in names}
        else:
            judged = self._judged(questions, records, kind)
            found |= rules.resampled_stats(judged, drawn, kind, self.mark)
            for name in names:
                found[name][0] = judged.stats[name]
        if self.output == "box":
            found |= self._published(questions, records, drawn)
        return found

    def _judged(
        self, questions: Sequence[Question], records: Sequence[Mapping[str, Any]], kind: ResultKind
    ) -> rules.Evaluation:
        return rules.evaluate(
            [question.image for question in questions],
            self.categories(),
            {question.image.id: question.truths for question in questions},
            records,
            kind,
            by=self.tool,
            buckets=self.buckets,
            mark=self.mark,
        )

    def _published(
        self, questions: Sequence[Question], records: Sequence[Mapping[str, Any]], drawn: Floats
    ) -> dict[str, Floats]:
        present = {(q.image.id, truth.category_id) for q in questions for truth in q.truths}
        plain = [
            {**record, "score": _PUBLISHED_SCORE}
            for record in records
            if (record["image_id"], record["category_id"]) in present
        ]
        judged = self._judged(questions, plain, "bbox")
        held = [
            curve
            for by_area in judged.matches
            if (curve := rules.curves(by_area[0], drawn, judged.most[-1])) is not None
        ]
        values = rules.published_f1(held, len(drawn))
        named = rules.at_thresholds("f1_published", values)
        return {name: named[name] for name in ("f1_published@0.5", "f1_published@mIoU")}

    def _ceiling(
        self, questions: Sequence[Question], answers: Sequence[Answer], drawn: Floats
    ) -> dict[str, Floats]:
        """Return F1 of truths on the grid of the detector's coordinates; 1 if it has none."""
        right = np.zeros((len(questions), len(rules.THRESHOLDS)))
        total = np.zeros(len(questions))
        for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            boxes = np.array([truth.bbox for truth in question.truths if not truth.is_crowd])
            total[row] = len(boxes)
            if not len(boxes):
                continue
            if answer.bins is None:
                right[row] = len(boxes)
                continue
            said = rules.nearest_on_grid(boxes, answer.bins, question.image)
            own = np.array(
                [rules.box_overlaps(a[None], b[None], [False])[0, 0]
                 for a, b in zip(said, boxes, strict=True)]
            )  # fmt: skip
            right[row] = (own[None] >= rules.THRESHOLDS[:, None]).sum(axis=1)
        pooled = (drawn @ total)[:, None]
        named = rules.at_thresholds("ceiling_f1", rules.f1(drawn @ right, pooled, pooled))
        return {name: named[name] for name in ("ceiling_f1@0.95", "ceiling_f1@mIoU")}

    def _records(self, question: Question, answer: Answer) -> Iterator[dict[str, Any]]:
        """Yield an answer's instances as records of COCO's result format."""
        ids = {category.name: category.id for category in self.categories()}
        size = rules.size_of(question.image)
        for phrase, instances in zip(question.phrases, answer.found, strict=True):
            for instance in instances:
                record: dict[str, Any] = {
                    "image_id": question.image.id,
                    "category_id": ids[phrase],
                    "score": instance.score,
                }
                if self.output == "box":
                    record["bbox"] = _as_box(instance)
                elif self.output == "polygon":
                    record["segmentation"] = _as_mask(instance, size)
                else:
                    # COCO writes a point that is not there as 0, 0 with visibility 0.
                    points = [(0.0, 0.0, 0) if each is None else (*each, 2)
                              for each in instance.keypoints]  # fmt: skip
                    record["keypoints"] = [number for point in points for number in point]
                yield record


def _corpus(name: str, unit: str, *, higher_is_better: bool) -> Metric:
    return Metric(name=name, unit=unit, kind="corpus", higher_is_better=higher_is_better)


def check_detections(
    found: Detections, phrases: int, output: DetectionOutput, keypoints: int
) -> None:
    """Raise unless detections are what was asked for.

    Args:
        found: What came back.
        phrases: Number of phrases that were asked.
        output: What was asked for.
        keypoints: Number of key points that were asked for.

    Raises:
        InvalidOutput: They are not; says what is wrong.
    """
    if len(found.found) != phrases:
        raise InvalidOutput(f"{phrases} phrases were asked, {len(found.found)} were answered.")
    for instance in (each for instances in found.found for each in instances):
        at = instance.coordinates
        said = [number for point in instance.keypoints if point is not None for number in point]
        if not all(map(math.isfinite, (*at, *said))):
            raise InvalidOutput(f"an instance lies at {at}, {instance.keypoints}: NaN or infinity.")
        if instance.score is not None and not 0 <= instance.score <= 1:
            raise InvalidOutput(f"an instance has the score {instance.score}, outside [0, 1].")
        if output == "keypoint":
            if len(instance.keypoints) != keypoints or len(at) not in (0, 4):
                raise InvalidOutput(
                    f"{keypoints} key points and a box or nothing were asked for, got "
                    f"{len(instance.keypoints)} and {len(at)} numbers."
                )
        elif output == "polygon":
            if len(at) < 2 * _CORNERS or len(at) % 2:
                raise InvalidOutput(f"a polygon has at least three corners x, y; got {at}.")
        elif len(at) != _SHAPES[output]:
            raise InvalidOutput(f"a {output} has {_SHAPES[output]} numbers, got {at}.")
        if output in ("box", "keypoint") and at and (at[0] > at[2] or at[1] > at[3]):
            raise InvalidOutput(f"a box has its left before its right edge, got {at}.")


def stored_text(found: Detections, bins: int | None) -> str:
    """Return detections as the text that is stored and scored.

    Args:
        found: What the detector found.
        bins: Of its coordinates, see `models.base.DetectorFacts`.
    """
    return json.dumps(
        {
            "found": [[_stored(instance) for instance in each] for each in found.found],
            "format_errors": list(found.format_errors),
            "tokens": found.output_tokens,
            "bins": bins,
            "answer": found.text,
        },
        ensure_ascii=False,
    )


def _stored(instance: Instance) -> dict[str, Any]:
    stored: dict[str, Any] = {"at": [round(v, _PIXEL_DECIMALS) for v in instance.coordinates]}
    if instance.keypoints:
        stored["keypoints"] = [
            None if point is None else [round(v, _PIXEL_DECIMALS) for v in point]
            for point in instance.keypoints
        ]
    if instance.score is not None:
        stored["score"] = round(instance.score, _SCORE_DECIMALS)
    if instance.tokens:
        stored["tokens"] = instance.tokens
    return stored


@lru_cache(maxsize=16384)
def read_text(output: str) -> Answer:
    """Return what `stored_text` wrote."""
    content = json.loads(output)
    found = [
        [
            Instance(
                coordinates=tuple(each["at"]),
                keypoints=tuple(
                    None if point is None else (point[0], point[1])
                    for point in each.get("keypoints", ())
                ),
                score=each.get("score"),
                tokens=each.get("tokens", 0),
            )
            for each in instances
        ]
        for instances in content["found"]
    ]
    return Answer(found, content["format_errors"], content["tokens"], content["bins"])


def _as_box(instance: Instance) -> list[float]:
    x0, y0, x1, y1 = instance.coordinates
    return [x0, y0, x1 - x0, y1 - y0]


def _as_mask(instance: Instance, size: rules.Size) -> Any:
    return rules.run_lengths([list(instance.coordinates)], size)


class _Case(NamedTuple):
    """One phrase of an image: the item's fields, what was found, what is there, what is a crowd."""

    fields: Mapping[str, Any]
    found: Sequence[Instance]
    truths: Sequence[Mapping[str, Any]]
    crowd: Sequence[bool]

    @property
    def size(self) -> rules.Size:
        return rules.Size(self.fields["height"], self.fields["width"])


# Of every prediction with every truth, and how many predictions repeat an earlier one.
_Overlap = tuple[Floats, int]


def _boxes(case: _Case) -> _Overlap:
    said = np.array([_as_box(instance) for instance in case.found], float).reshape(-1, 4)
    there = np.array([truth["bbox"] for truth in case.truths], float).reshape(-1, 4)
    itself = rules.box_overlaps(said, said, [False] * len(said))
    return rules.box_overlaps(said, there, case.crowd), rules.repeated(itself)


def _polygons(case: _Case) -> _Overlap:
    said = [_as_mask(instance, case.size) for instance in case.found]
    there = [rules.run_lengths(truth["segmentation"], case.size) for truth in case.truths]
    itself = rules.mask_overlaps(said, said, [False] * len(said))
    return rules.mask_overlaps(said, there, case.crowd), rules.repeated(itself)


def _points(case: _Case) -> _Overlap:
    said = np.array([instance.coordinates for instance in case.found], float).reshape(-1, 2)
    there = [rules.pixels_of(truth["segmentation"], case.size) for truth in case.truths]
    hits = rules.point_hits(said, there)
    # A second point in the same truth says the same thing twice.
    first = hits[:, ~np.array(case.crowd, bool).reshape(-1)]
    taken = np.cumsum(first, axis=0) - first > 0
    is_repeated = (first.astype(bool) & taken).any(axis=1)
    return hits, int(is_repeated.sum())


def _skeletons(case: _Case) -> _Overlap:
    points = len(case.fields["keypoints"])
    said = np.array(
        [[(np.nan, np.nan) if p is None else p for p in each.keypoints] for each in case.found],
        float,
    ).reshape(-1, points, 2)
    there = np.array([truth["keypoints"] for truth in case.truths], float).reshape(-1, points, 3)
    overlap = rules.keypoint_similarity(
        said,
        there,
        np.array([truth["bbox"] for truth in case.truths], float).reshape(-1, 4),
        np.array([truth["area"] for truth in case.truths], float),
        case.fields["sigmas"],
    )
    boxes = np.array([_around(each) for each in case.found], float).reshape(-1, 4)
    return overlap, rules.repeated(rules.box_overlaps(boxes, boxes, [False] * len(boxes)))


def _around(instance: Instance) -> list[float]:
    """Return the box of a skeleton: as said, else around its points; x, y, width, height."""
    if instance.coordinates:
        return _as_box(instance)
    points = np.array([point for point in instance.keypoints if point is not None])
    if not len(points):
        return [0.0] * 4
    low, high = points.min(axis=0), points.max(axis=0)
    return [*low, *(high - low)]


_OVERLAPS: Mapping[DetectionOutput, Callable[[_Case], _Overlap]] = {
    "box": _boxes,
    "point": _points,
    "polygon": _polygons,
    "keypoint": _skeletons,
}
