"""coco: files record by record, folders as archives unpack, and the same numbers as coco-mini."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.base import Unsupported
from models.embedded.scenes import coco as files
from models.embedded.scenes.generator import SHAPES, generate
from models.embedded.scenes.questions import caption, resolve
from models.embedded.scenes.raster import render
from tasks import coco_scorers as rules
from tasks.coco import Coco
from tasks.coco_data import (
    check_annotations,
    check_results,
    read_annotations,
    read_results,
)
from tasks.coco_mini import CocoMini
from tests.tasks.coco_material import Told, output_of, truth_of

COUNT = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return scenes as COCO's archives would unpack."""
    place = tmp_path_factory.mktemp("coco")
    scenes = [generate("shapes", 96, "test", index) for index in range(COUNT)]
    files.write(place, "test", [(scene, SHAPES) for scene in scenes])
    return place


@pytest.fixture
def content(folder: Path) -> Any:
    return json.loads((folder / "annotations" / "instances_test.json").read_text())


def task_of(folder: Path, **settings: Any) -> Coco:
    return Coco(folder=str(folder), split="test", **settings)


@pytest.mark.parametrize("output", ["box", "point", "keypoint"])
def test_a_folder_of_scenes_gives_the_numbers_of_coco_mini(folder: Path, output: Any) -> None:
    task, mini = task_of(folder, output=output), CocoMini(output=output)
    draw = np.random.default_rng(0)
    outputs, theirs = {}, {}
    minis = {item.id: item for item in list(mini.items())[:COUNT]}
    for item in task.items():
        assert item.fields["truths"] == minis[item.id].fields["truths"]
        np.testing.assert_array_equal(task.pixels(item), mini.pixels(minis[item.id]))
        said = truth_of(item, output)
        for phrase, instances in said.items():
            said[phrase] = [each for each in instances if draw.random() < 0.7]
        outputs[item.id] = output_of(task, item, said, bins=1000)
    theirs = {name: outputs[name] for name in minis}
    draws = np.arange(COUNT)[None]
    found, expected = task.corpus(outputs, draws), mini.corpus(theirs, draws)
    shared = [name for name in found if name in expected]
    assert len(shared) >= 9
    for name in shared:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-12, err_msg=name)


def test_results_of_a_run_are_a_file_that_the_tools_read(folder: Path, tmp_path: Path) -> None:
    task = task_of(folder)
    outputs = {item.id: output_of(task, item, truth_of(item, "box")) for item in task.items()}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(task.results(outputs)))
    truth = read_annotations(folder / "annotations" / "instances_test.json", "instances")
    results = read_results(path, "bbox", truth)
    stats = rules.evaluate(
        [*truth.images.values()],
        [*truth.categories.values()],
        truth.annotations,
        results,
        "bbox",
        by="pycocotools",
    ).stats
    assert stats["AP"] == pytest.approx(1.0)


def test_all_categories_are_asked_or_those_that_are_there(folder: Path) -> None:
    everything = list(task_of(folder).items())
    present = list(task_of(folder, phrases="present").items())
    assert all(item.fields["phrases"] == list(SHAPES) for item in everything)
    for item in present:
        named = {truth["phrase"] for truth in item.fields["truths"]}
        assert set(item.fields["phrases"]) == named


def test_images_come_in_an_order_drawn_from_their_ids(folder: Path, tmp_path: Path) -> None:
    ids = [item.id for item in task_of(folder).items()]
    assert sorted(ids) == [str(number) for number in range(1, COUNT + 1)] != ids
    # The same whatever the order of the file.
    content = json.loads((folder / "annotations" / "instances_test.json").read_text())
    content["images"].reverse()
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_test.json").write_text(json.dumps(content))
    assert [item.id for item in task_of(tmp_path).items()] == ids


def test_a_changed_file_is_read_again(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations" / "instances_test.json"
    content = json.loads((folder / "annotations" / "instances_test.json").read_text())
    path.write_text(json.dumps(content))
    before = task_of(tmp_path).content_hash()
    assert task_of(tmp_path).content_hash() == before
    content["annotations"].pop()
    path.write_text(json.dumps(content))
    assert task_of(tmp_path).content_hash() != before


def test_warm_up_asks_about_plain_pictures(folder: Path) -> None:
    task = task_of(folder)
    items = list(task.warmup_items())
    assert len(items) == 4
    for item in items:
        assert np.ptp(task.pixels(item).reshape(-1, 3), axis=0).tolist() == [0, 0, 0]
        assert task.call(Told(lambda phrases: [[] for _ in phrases]), item).text
        assert not item.fields["truths"]


def test_a_missing_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"holds no annotations/instances_val2017\.json\. Unpack"):
        list(Coco(folder=str(tmp_path)).items())


def test_pictures_must_be_those_of_the_annotations(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "test").mkdir()
    name = "annotations/instances_test.json"
    (tmp_path / name).write_text((folder / name).read_text())
    task = task_of(tmp_path)
    item = next(iter(task.items()))
    with pytest.raises(Unsupported, match=f"holds no {item.fields['file']}"):
        task.pixels(item)
    Image.new("RGB", (50, 40)).save(tmp_path / item.fields["file"])
    with pytest.raises(Unsupported, match="50 x 40 pixels, and its record says 96 x 96"):
        task.pixels(item)
    (tmp_path / item.fields["file"]).write_bytes(b"no picture")
    with pytest.raises(Unsupported, match="is no image"):
        task.pixels(item)


def test_captions_are_read(folder: Path) -> None:
    found = read_annotations(folder / "annotations" / "captions_test.json", "captions")
    for number in range(COUNT):
        (record,) = found.captions[number + 1]
        assert record.caption == caption(generate("shapes", 96, "test", number))


def test_pictures_and_expressions_are_the_scenes(folder: Path, content: Any) -> None:
    scene = generate("shapes", 96, "test", 3)
    with Image.open(folder / "test" / files.file_name(scene)) as image:
        np.testing.assert_array_equal(np.asarray(image), render(scene).image)
    for each in content["annotations"]:
        if each["image_id"] == 4:
            for expression in each["expressions"]:
                (place,) = resolve(scene, expression)
                assert scene.objects[place].colour == each["attributes"]["colour"]


def change(content: Any, path: str, value: Any) -> Any:
    """Return the contents with the value at a path like `annotations.2.bbox`; None removes it."""
    changed = copy.deepcopy(content)
    *way, last = path.split(".")
    place = changed
    for step in way:
        place = place[int(step) if step.isdigit() else step]
    key: Any = int(last) if last.isdigit() else last
    if value is None:
        del place[key]
    else:
        place[key] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("images", None, "FILE has no 'images'; it has annotations, categories"),
        ("images", {}, "FILE has images that are no list"),
        ("images.2", [], r"FILE, image 2 must be an object with named values, got \[\]"),
        ("images.2.width", None, r"image 2 \(id 3\) has no 'width'; it has"),
        ("images.2.width", "96", r"image 2 \(id 3\) has width '96'; it must be a whole number"),
        ("images.2.height", 0, r"image 2 \(id 3\) is 96 x 0 pixels"),
        ("images.2.id", 2, "two images of one id"),
        ("images.2.phrases", [1], r"phrases that are no list of texts: \[1\]"),
        ("categories.1.name", "circle", "two categories of one id or name"),
        ("categories.1.sigmas", [0.1], "4 keypoints and 1 sigmas"),
        ("annotations.4.image_id", 7, r"annotation 4 \(id 5\) has image_id 7, which is none of"),
        ("annotations.4.image_id", 66, "none of the 6 images. The nearest is 6"),
        ("annotations.4.category_id", 33, "none of the 6 categories. The nearest is 3"),
        ("annotations.4.id", 2, r"annotation 4 \(id 2\) has the id 2 of an earlier one"),
        ("annotations.4.bbox", [1, 2, 3], r"bbox \[1, 2, 3\]; it must be \[x, y, width, height\]"),
        ("annotations.4.bbox", [1, 2, 3, float("nan")], "four finite numbers"),
        ("annotations.4.bbox", [1, 2, -3, 4], "width or height is below 0"),
        ("annotations.4.area", True, "has area True; it must be a finite number"),
        ("annotations.4.area", -1, "has area -1.0; it must be 0 or more"),
        ("annotations.4.iscrowd", 2, "has iscrowd 2; it must be 0 or 1"),
        ("annotations.4.keypoints", [1, 2, 3], "has 4, so it must be 12 finite numbers"),
        ("annotations.4.segmentation", [[1, 2, 3, 4]], "at least three corners"),
        ("annotations.4.segmentation", "x", "it must be run lengths with size and counts"),
        ("annotations.4.segmentation.size", [9, 9], r"a mask of size \[9, 9\]; image \d is \[96"),
        ("annotations.4.segmentation.counts", [1, 2], "sum to the image's 9216 pixels"),
    ],
)
def test_a_damaged_record_is_named(content: Any, path: str, value: Any, message: str) -> None:
    check_annotations(content, "person_keypoints", "FILE")
    with pytest.raises(Unsupported, match=message) as error:
        check_annotations(change(content, path, value), "person_keypoints", "FILE")
    assert str(error.value).startswith("FILE")


def test_a_misspelt_key_is_answered_with_the_one_that_is_there(content: Any) -> None:
    content["annotations"][1]["bboxx"] = content["annotations"][1].pop("bbox")
    with pytest.raises(Unsupported, match=r"annotation 1 \(id 2\) has no 'bbox'.*'bboxx' meant"):
        check_annotations(content, "instances", "FILE")


GOOD = {
    "bbox": {"bbox": [1, 2, 3, 4]},
    "segm": {"segmentation": [[1, 2, 9, 2, 9, 9]]},
    "keypoints": {"keypoints": [1, 2, 1] * 4},
}


@pytest.mark.parametrize("kind", GOOD)
def test_a_damaged_result_is_named(content: Any, kind: Any) -> None:
    truth = check_annotations(content, "person_keypoints", "FILE")
    good = {"image_id": 1, "category_id": 2, "score": 0.5, **GOOD[kind]}
    assert check_results([good], kind, truth, "R") == [good]
    (key,) = GOOD[kind]
    for path, value, message in (
        ("1.image_id", 99, "^R, result 1 has image_id 99, which is none of the 6 images"),
        ("1.category_id", 0, "^R, result 1 has category_id 0"),
        ("1.score", None, "^R, result 1 has no 'score'"),
        ("1.score", float("inf"), "score inf; it must be a finite number"),
        (f"1.{key}", None, f"^R, result 1 has no '{key}'"),
        (f"1.{key}", [1], f"^R, result 1 has {key} "),
    ):
        with pytest.raises(Unsupported, match=message):
            check_results(change([good, dict(good)], path, value), kind, truth, "R")
    with pytest.raises(Unsupported, match="R must be a list of records"):
        check_results({}, kind, truth, "R")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (b'{"images": [', "is no JSON: .* in line 1, column"),
        (b"\xff", "is no UTF-8 text"),
        (None, "there is no file"),
        (b"[]", "must be an object with named values"),
    ],
)
def test_what_is_no_such_file_is_said(tmp_path: Path, written: Any, message: str) -> None:
    path = tmp_path / "instances.json"
    if written is not None:
        path.write_bytes(written)
    with pytest.raises(Unsupported, match=message):
        read_annotations(path, "instances")


def test_a_file_without_key_points_cannot_be_asked_for_them(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "annotations" / "instances_test.json").read_text())
    for category in content["categories"]:
        category["keypoints"] = []
        category["sigmas"] = []
    content["annotations"] = []
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "person_keypoints_test.json").write_text(json.dumps(content))
    with pytest.raises(Unsupported, match=r"no category of .* has key points"):
        list(task_of(tmp_path, output="keypoint").items())


def test_wrong_phrases_are_refused() -> None:
    with pytest.raises(ValueError, match="Did you mean 'present'"):
        Coco(phrases="presence")  # type: ignore[arg-type]  # that is what is tested
