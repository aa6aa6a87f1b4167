"""COCO's files, every record checked: instances, key points, captions, and results.

Folders are laid out as the official archives unpack:

    annotations/instances_val2017.json   annotations/person_keypoints_val2017.json
    annotations/captions_val2017.json    val2017/000000000139.jpg ...

What the COCO tools would take in silence (a truth about an image that is not there, three numbers
for a box, NaN) is an error here that names the record.

Source: cocodataset/cocoapi at 8c9bcc3, written from a description of the format.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from models.base import Unsupported
from models.cache import cache_dir
from tasks.base import Item
from tasks.hub import hub_file

Kind = Literal["instances", "person_keypoints", "captions"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ResultKind = Literal["bbox", "segm", "keypoints"]
RESULT_KINDS: tuple[ResultKind, ...] = get_args(ResultKind)
_RESULT_KEYS: Mapping[ResultKind, str] = {
    "bbox": "bbox",
    "segm": "segmentation",
    "keypoints": "keypoints",
}
# Tolerances of the 17 points of a person, from the COCO tools.
PERSON_SIGMAS = (
    0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107,
    0.087, 0.087, 0.089, 0.089,
)  # fmt: skip


class ImageRecord(NamedTuple):
    """An image of a file; `phrases` are those asked about it, None where the file has none."""

    id: int
    file_name: str
    width: int
    height: int
    phrases: tuple[str, ...] | None = None


class Category(NamedTuple):
    """A category; key points with their tolerances where it has some."""

    id: int
    name: str
    keypoints: tuple[str, ...] = ()
    sigmas: tuple[float, ...] = ()


class Annotation(NamedTuple):
    """An instance.

    Attributes:
        bbox: x, y, width, height, pixels.
        area: Of the mask, square pixels, which decides about its size.
        is_crowd: Whether it is a group that any number of detections may lie in.
        segmentation: Polygons or run lengths as the file has them, None if it has none.
        keypoints: x, y, visibility of each, (); visibility 0 is unlabelled.
    """

    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, ...]
    area: float
    is_crowd: bool
    segmentation: Any
    keypoints: tuple[float, ...]


class CaptionRecord(NamedTuple):
    """A caption of an image."""

    image_id: int
    caption: str


@dataclass(frozen=True)
class AnnotationFile:
    """A checked file.

    Attributes:
        images, categories: By id, in the file's order; captions have no categories.
        annotations: By image id, in the file's order; images without any have an empty list.
        captions: By image id likewise.
    """

    images: Mapping[int, ImageRecord]
    categories: Mapping[int, Category]
    annotations: Mapping[int, Sequence[Annotation]]
    captions: Mapping[int, Sequence[CaptionRecord]]


def find_file(folder: str, data_set: str, name: str, revision: str) -> Path:
    """Return a file of a data set that is laid out as the official one.

    Args:
        folder: Where it lies; "" for `coco` in tokenmark's cache.
        data_set: Id on the hub of a data set with the same files, for what the folder lacks; ""
            for none.
        name: Path in the folder.
        revision: Of the data set on the hub.

    Raises:
        Unsupported: It is not there; says what to put where.
    """
    place = Path(folder).expanduser() if folder else cache_dir() / "coco"
    if (place / name).is_file():
        return place / name
    if not data_set:
        raise Unsupported(
            f"{place} holds no {name}. Unpack COCO's archives there (annotations and images, from "
            f"cocodataset.org), give another place as folder=, or a data set on the hub with the "
            f"same files as data_set=."
        )
    try:
        return hub_file(data_set, name, revision)
    except OSError as error:
        raise Unsupported(
            f"{place} holds no {name}, and the data set {data_set} did not give it: {error}"
        ) from error


class Stamped(NamedTuple):
    """A file as it is now: what was read from it holds as long as this is the same.

    Attributes:
        path: Of the file.
        modified_ns: Last change, nanoseconds since 1970.
        size: Bytes.
    """

    path: Path
    modified_ns: int
    size: int


@dataclass(frozen=True, kw_only=True)
class CocoFiles:
    """What tasks on COCO's files have in common: where the files are, and their pictures.

    Attributes:
        split: As the files call it.
        folder: Holds `annotations` and the split's images; empty for `coco` in tokenmark's cache.
        data_set: Id of a data set on the hub with the same files, for those that the folder lacks.
        revision: Of the data set on the hub; a commit is what reproduces.
    """

    split: str = "val2017"
    folder: str = ""
    data_set: str = ""
    revision: str = "main"

    def annotation_file(self, kind: Kind) -> Stamped:
        """Return the split's annotation file.

        Raises:
            Unsupported: It is not to be had; says what to do.
        """
        path = self._find(f"annotations/{kind}_{self.split}.json")
        state = path.stat()
        return Stamped(path, state.st_mtime_ns, state.st_size)

    def pixels(self, item: Item) -> npt.NDArray[np.uint8]:
        """Decode an item's image file.

        Raises:
            Unsupported: It is not to be had, or is no image of the size that the annotations say.
        """
        file, size = item.fields["file"], (item.fields["width"], item.fields["height"])
        if item.id.startswith("warmup/"):
            return plain_picture(file, size)
        return read_picture(self._find(file), size)

    def _find(self, name: str) -> Path:
        return find_file(self.folder, self.data_set, name, self.revision)


WARMUP_COLOURS = ("red", "green", "blue", "white")
"""Pictures for warming up: `pixels` of an item `warmup/...` is its file's name as a colour."""
WARMUP_SIZE = 640


def in_drawn_order(images: Iterable[ImageRecord]) -> list[ImageRecord]:
    """Return images in an order drawn from their ids, so that the first ones are a fair sample."""
    return sorted(images, key=lambda image: hashlib.sha256(f"coco {image.id}".encode()).digest())


def plain_picture(colour: str, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Return a picture of one colour, which is in no data set; size is width and height."""
    from PIL import Image

    return np.asarray(Image.new("RGB", size, colour))


def read_picture(path: Path, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Decode an image file to RGB, (height, width, 3).

    Args:
        path: Of the file.
        size: Width and height that its record says.

    Raises:
        Unsupported: It is no image, or none of that size.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except OSError as error:
        raise Unsupported(f"{path} is no image: {error}") from error
    if pixels.shape[1::-1] != size:
        raise Unsupported(
            f"{path} is {pixels.shape[1]} x {pixels.shape[0]} pixels, and its record says "
            f"{size[0]} x {size[1]}: the annotations are of other images."
        )
    return pixels


def read_annotations(path: Path, kind: Kind) -> AnnotationFile:
    """Return the contents of an annotation file.

    Raises:
        Unsupported: It is none, or a record is damaged; names the record.
    """
    return check_annotations(_json(path), kind, str(path))


def check_annotations(content: Any, kind: Kind, source: str) -> AnnotationFile:
    """Return the checked contents of an annotation file.

    Args:
        content: As JSON gives it.
        kind: What the annotations are.
        source: What messages call the file.

    Raises:
        Unsupported: A record is damaged; names it, what is allowed, and the nearest key or name.
    """
    top = _Record(content, source)
    images = {image.id: image for image in map(_image, top.records("images"))}
    if len(images) != len(content["images"]):
        raise top.error("has two images of one id; ids must differ.")
    if kind == "captions":
        captions: dict[int, list[CaptionRecord]] = {number: [] for number in images}
        for record in top.records("annotations"):
            image_id = _known(record, "image_id", images, "images")
            captions[image_id].append(CaptionRecord(image_id, record.text("caption")))
        return AnnotationFile(images, {}, {}, captions)
    categories = {each.id: each for each in map(_category, top.records("categories"))}
    names = [each.name for each in categories.values()]
    if len(names) != len(content["categories"]) or len(set(names)) != len(names):
        raise top.error("has two categories of one id or name; they must differ.")
    found: dict[int, list[Annotation]] = {number: [] for number in images}
    seen: set[int] = set()
    for record in top.records("annotations"):
        each = _annotation(record, images, categories, needs_keypoints=kind == "person_keypoints")
        if each.id in seen:
            raise record.error(f"has the id {each.id} of an earlier one; ids must differ.")
        seen.add(each.id)
        found[each.image_id].append(each)
    return AnnotationFile(images, categories, found, {})


def read_results(path: Path, kind: ResultKind, truth: AnnotationFile) -> list[dict[str, Any]]:
    """Return the detections of a result file; see `check_results`."""
    return check_results(_json(path), kind, truth, str(path))


def check_results(
    content: Any, kind: ResultKind, truth: AnnotationFile, source: str
) -> list[dict[str, Any]]:
    """Return the checked detections of a result file, a list of records.

    Args:
        content: As JSON gives it.
        kind: What the records hold besides image_id, category_id and score: `bbox`, `segm` or
            `keypoints`.
        truth: What they are about.
        source: What messages call the file.

    Raises:
        Unsupported: A record is damaged; names it.
    """
    if not isinstance(content, list):
        raise Unsupported(f"{source} must be a list of records, got {_shown(content)}.")
    found = []
    for number, each in enumerate(content):
        record = _Record(each, f"{source}, result {number}")
        image = truth.images[_known(record, "image_id", truth.images, "images")]
        category = truth.categories[_known(record, "category_id", truth.categories, "categories")]
        detection: dict[str, Any] = {
            "image_id": image.id,
            "category_id": category.id,
            "score": record.number("score"),
        }
        if kind == "bbox":
            detection["bbox"] = list(record.box("bbox"))
        elif kind == "segm":
            detection["segmentation"] = record.segmentation(image)
        else:
            detection["keypoints"] = list(record.points(category))
        found.append(detection)
    return found


def _image(record: _Record) -> ImageRecord:
    width, height = record.whole("width"), record.whole("height")
    if width < 1 or height < 1:
        raise record.error(f"is {width} x {height} pixels; both must be at least 1.")
    phrases = record.get("phrases")
    if phrases is not None and not (
        isinstance(phrases, list) and all(isinstance(each, str) for each in phrases)
    ):
        raise record.error(f"has phrases that are no list of texts: {_shown(phrases)}.")
    return ImageRecord(
        record.whole("id"),
        record.text("file_name"),
        width,
        height,
        None if phrases is None else tuple(phrases),
    )


def _category(record: _Record) -> Category:
    points = tuple(record.get("keypoints", ()))
    sigmas = tuple(record.get("sigmas", PERSON_SIGMAS if len(points) == 17 else ()))
    if points and len(sigmas) != len(points):
        raise record.error(
            f"has {len(points)} keypoints and {len(sigmas)} sigmas. Give each its tolerance as "
            f"'sigmas'; only the 17 points of a person have known ones."
        )
    return Category(record.whole("id"), record.text("name"), points, sigmas)


def _annotation(
    record: _Record,
    images: Mapping[int, ImageRecord],
    categories: Mapping[int, Category],
    *,
    needs_keypoints: bool,
) -> Annotation:
    image = images[_known(record, "image_id", images, "images")]
    category = categories[_known(record, "category_id", categories, "categories")]
    is_crowd = record.get("iscrowd", 0)
    if is_crowd not in (0, 1):
        raise record.error(f"has iscrowd {is_crowd!r}; it must be 0 or 1.")
    area = record.number("area")
    if area < 0:
        raise record.error(f"has area {area}; it must be 0 or more.")
    return Annotation(
        record.whole("id"),
        image.id,
        category.id,
        record.box("bbox"),
        area,
        bool(is_crowd),
        record.segmentation(image) if record.get("segmentation") else None,
        record.points(category) if needs_keypoints else (),
    )


def _known(record: _Record, key: str, known: Mapping[int, Any], what: str) -> int:
    number = record.whole(key)
    if number in known:
        return number
    near = get_close_matches(str(number), map(str, known), n=1, cutoff=0)
    hint = f" The nearest is {near[0]}." if near else ""
    raise record.error(f"has {key} {number}, which is none of the {len(known)} {what}.{hint}")


class _Record:
    """A JSON object that is read key by key, and says which one it is when something is wrong."""

    def __init__(self, content: Any, place: str) -> None:
        self.place = place
        if not isinstance(content, dict):
            raise Unsupported(f"{place} must be an object with named values, got {_shown(content)}")
        self.content = content

    def error(self, problem: str) -> Unsupported:
        return Unsupported(f"{self.place} {problem}")

    def get(self, key: str, default: Any = None) -> Any:
        return self.content.get(key, default)

    def value(self, key: str) -> Any:
        if key in self.content:
            return self.content[key]
        near = get_close_matches(key, self.content, n=1, cutoff=0.5)
        hint = f" Is {near[0]!r} meant to be it?" if near else ""
        raise self.error(f"has no {key!r}; it has {', '.join(self.content) or 'nothing'}.{hint}")

    def records(self, key: str) -> list[_Record]:
        values = self.value(key)
        if not isinstance(values, list):
            raise self.error(f"has {key} that are no list: {_shown(values)}.")
        name = {"images": "image", "categories": "category"}.get(key, "annotation")
        return [
            _Record(each, f"{self.place}, {name} {number}{_id_of(each)}")
            for number, each in enumerate(values)
        ]

    def whole(self, key: str) -> int:
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"has {key} {_shown(value)}; it must be a whole number.")
        return value

    def number(self, key: str) -> float:
        value = self.value(key)
        if not _is_number(value):
            raise self.error(f"has {key} {_shown(value)}; it must be a finite number.")
        return float(value)

    def text(self, key: str) -> str:
        value = self.value(key)
        if not isinstance(value, str):
            raise self.error(f"has {key} {_shown(value)}; it must be a text.")
        return value

    def box(self, key: str) -> tuple[float, ...]:
        value = self.value(key)
        if not (isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))):
            raise self.error(
                f"has {key} {_shown(value)}; it must be [x, y, width, height], four finite numbers."
            )
        if value[2] < 0 or value[3] < 0:
            raise self.error(f"has {key} {_shown(value)}, whose width or height is below 0.")
        return tuple(float(number) for number in value)

    def points(self, category: Category) -> tuple[float, ...]:
        value, count = self.value("keypoints"), len(category.keypoints)
        if not count:
            raise self.error(f"has keypoints, and its category {category.name!r} has none.")
        if not (
            isinstance(value, list) and len(value) == 3 * count and all(map(_is_number, value))
        ):
            raise self.error(
                f"has keypoints {_shown(value)}; {category.name!r} has {count}, so it must be "
                f"{3 * count} finite numbers: x, y and visibility of each."
            )
        return tuple(float(number) for number in value)

    def segmentation(self, image: ImageRecord) -> Any:
        """Return polygons, or run lengths that belong to the image."""
        value = self.value("segmentation")
        if isinstance(value, dict):
            size = value.get("size")
            if size != [image.height, image.width]:
                raise self.error(
                    f"has a mask of size {_shown(size)}; image {image.id} is "
                    f"[{image.height}, {image.width}], height first."
                )
            counts = value.get("counts")
            if isinstance(counts, list):
                is_right = all(
                    isinstance(count, int) and count >= 0 for count in counts
                ) and sum(counts) == image.height * image.width  # fmt: skip
            else:
                is_right = isinstance(counts, str) and bool(counts)
            if not is_right:
                raise self.error(
                    f"has run lengths {_shown(counts)}; they must be a text, or whole numbers that "
                    f"sum to the image's {image.height * image.width} pixels."
                )
            return value
        is_polygons = isinstance(value, list) and all(
            isinstance(ring, list)
            and len(ring) >= 6
            and len(ring) % 2 == 0
            and all(map(_is_number, ring))
            for ring in value
        )
        if not is_polygons or not value:
            raise self.error(
                f"has segmentation {_shown(value)}; it must be run lengths with size and counts, "
                f"or polygons, each of at least three corners x, y."
            )
        return value


def _id_of(content: Any) -> str:
    return f" (id {_shown(content['id'])})" if isinstance(content, dict) and "id" in content else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Unsupported(f"there is no file {path}.") from error
    except UnicodeDecodeError as error:
        raise Unsupported(f"{path} is no UTF-8 text: {error.reason}.") from error
    except json.JSONDecodeError as error:
        raise Unsupported(
            f"{path} is no JSON: {error.msg} in line {error.lineno}, column {error.colno}."
        ) from error
