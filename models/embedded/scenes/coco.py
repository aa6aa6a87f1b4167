"""Writes scenes in COCO's file format: boxes, masks, key points, captions, and the pictures.

Masks are the visible pixels as uncompressed run lengths, exact; `area` counts them; boxes are their
outer edges, so that a width is a number of pixels. Objects of the family `shapes` never cover one
another. Key points are the middles of a mask's first and last rows and columns. Ids count from 1:
the COCO tools take a truth with id 0 for unmatched, whatever is found.

Beside the format's own keys stand `scene_key` and `phrases` (what is asked about an image), and
of an annotation `attributes` and `expressions` (the shortest phrases that name this object alone).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.embedded.scenes.generator import SHAPES, Scene
from models.embedded.scenes.mmbench import png
from models.embedded.scenes.questions import caption, referring_phrases, resolve
from models.embedded.scenes.raster import box, extreme_points, mask, render

KEYPOINTS = ("top", "right", "bottom", "left")
# Tolerance of a key point as a share of the object's size, as COCO's sigmas: the point on a flat
# edge is as hard to tell as a wrist.
SIGMAS = (0.062,) * len(KEYPOINTS)
_VISIBLE = 2


def run_lengths(pixels: np.ndarray) -> dict[str, list[int]]:
    """Return a mask as COCO's uncompressed run lengths, columns first, beginning with zeros.

    Args:
        pixels: (height, width), bool.
    """
    flat = np.concatenate([[False], pixels.T.ravel()])
    changes = np.nonzero(flat[1:] != flat[:-1])[0]
    counts = np.diff(np.concatenate([[0], changes, [pixels.size]]))
    return {"size": list(pixels.shape), "counts": [int(count) for count in counts]}


def file_name(scene: Scene) -> str:
    """Return the name of a scene's picture."""
    return f"{scene.index:012}.png"


def instances(asked: Iterable[tuple[Scene, Sequence[str]]]) -> dict[str, Any]:
    """Return the contents of an instances file, which is a keypoints file too.

    Args:
        asked: Scenes, each with the phrases that are asked about it. Every phrase of any scene is a
            category, and an object has an annotation for each of its scene's phrases that names it.
    """
    pairs = [(scene, tuple(phrases)) for scene, phrases in asked]
    names = sorted({phrase for _, phrases in pairs for phrase in phrases})
    if set(names) == set(SHAPES):
        names = list(SHAPES)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (scene, phrases) in enumerate(pairs, start=1):
        images.append(
            {
                "id": image_id,
                "file_name": file_name(scene),
                "width": scene.size,
                "height": scene.size,
                "scene_key": scene.key,
                "phrases": list(phrases),
            }
        )
        raster = render(scene)
        for phrase in phrases:
            for place in resolve(scene, phrase):
                item, pixels = scene.objects[place], mask(raster, place)
                x0, y0, x1, y1 = box(pixels)
                points = [[float(x), float(y), _VISIBLE] for x, y in extreme_points(pixels)]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": names.index(phrase) + 1,
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": int(pixels.sum()),
                        "segmentation": run_lengths(pixels),
                        "iscrowd": 0,
                        "attributes": {
                            "shape": item.shape, "colour": item.colour, "size": item.size,
                        },
                        "expressions": referring_phrases(scene, place),
                        "keypoints": [number for point in points for number in point],
                        "num_keypoints": len(points),
                    }
                )  # fmt: skip
    categories = [
        {
            "id": number,
            "name": name,
            "keypoints": list(KEYPOINTS),
            "skeleton": [[1, 2], [2, 3], [3, 4], [4, 1]],
            "sigmas": list(SIGMAS),
        }
        for number, name in enumerate(names, start=1)
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def captions(scenes: Iterable[Scene]) -> dict[str, Any]:
    """Return the contents of a captions file: one caption for each scene."""
    images, annotations = [], []
    for number, scene in enumerate(scenes, start=1):
        name = file_name(scene)
        images.append({"id": number, "file_name": name, "width": scene.size, "height": scene.size})
        annotations.append({"id": number, "image_id": number, "caption": caption(scene)})
    return {"images": images, "annotations": annotations}


def write(folder: Path, split: str, asked: Iterable[tuple[Scene, Sequence[str]]]) -> None:
    """Write annotation files and pictures as COCO lays them out.

    Args:
        folder: Gets `annotations/instances_{split}.json`, `person_keypoints_{split}.json` and
            `captions_{split}.json`, and the pictures in a folder named after the split.
        split: What the files call it.
        asked: As for `instances`.
    """
    pairs = list(asked)
    scenes = [scene for scene, _ in pairs]
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / split).mkdir(exist_ok=True)
    found = instances(pairs)
    contents = {"instances": found, "person_keypoints": found, "captions": captions(scenes)}
    for kind, content in contents.items():
        path = folder / "annotations" / f"{kind}_{split}.json"
        path.write_text(json.dumps(content), encoding="utf-8")
    for scene in scenes:
        (folder / split / file_name(scene)).write_bytes(png(scene))
