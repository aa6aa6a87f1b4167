"""Captions: the scorers against the numbers of COCO's server, and the two tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.base import Trace, Unsupported, VisualAnswer, VisualPrompt
from models.embedded.scenes import coco as files
from models.embedded.scenes.generator import SHAPES, generate
from results.statistics import corpus_draws
from tasks import caption_scorers as rules
from tasks.captions_common import CaptionTask
from tasks.coco_captions import CocoCaptions
from tasks.coco_captions_mini import NUM_IMAGES, CocoCaptionsMini

REFERENCES = [
    ["a red dog runs on the mat", "the dog is red"],
    ["a cat sits", "a small cat sits on a mat"],
    ["two men see a big dog and a cat", "men and animals"],
]
CAPTIONS = [
    "a red dog is on the mat",
    "a cat",
    "the men see two animals and a big cat on the mat",
]


def words(text: str) -> list[str]:
    return text.split()


def split_references() -> list[list[list[str]]]:
    return [[words(text) for text in texts] for texts in REFERENCES]


def test_scores_are_those_of_cocos_server() -> None:
    # pycocoevalcap 1.2 on the texts above; 200 random sets of captions agreed to 1e-9 as well.
    references = split_references()
    rarity = rules.Rarity.of(references)
    pairs = list(zip(map(words, CAPTIONS), references, strict=True))
    assert [rules.cider(own, theirs, rarity) for own, theirs in pairs] == pytest.approx(
        [3.5347475356378473, 1.0637214087210474, 1.3562161951750051], abs=1e-12
    )
    assert [rules.rouge_l(own, theirs) for own, theirs in pairs] == pytest.approx(
        [0.8571428571428571, 0.7721518987341772, 0.5350877192982456], abs=1e-12
    )
    counts = np.array([rules.bleu_counts(own, theirs) for own, theirs in pairs])
    assert rules.bleu(counts.sum(axis=0)) == pytest.approx(4.5138669505820596e-05, rel=1e-9)


def test_a_caption_that_is_its_only_reference_has_every_score() -> None:
    references = [[["one", "two", "three", "four"]], [["five", "six", "seven", "eight"]]]
    rarity = rules.Rarity.of(references)
    (own,) = references[0]
    assert rules.cider(own, references[0], rarity) == pytest.approx(10)
    assert rules.rouge_l(own, references[0]) == pytest.approx(1)
    assert rules.bleu(rules.bleu_counts(own, references[0])) == pytest.approx(1)
    # Of what every image has, nothing is to be learned.
    same = rules.Rarity.of([references[0], references[0]])
    assert rules.cider(own, references[0], same) == 0
    for nothing in ([], ["nine"]):
        assert rules.cider(nothing, references[0], rarity) == 0
        assert rules.rouge_l(nothing, references[0]) == 0
        assert rules.bleu(rules.bleu_counts(nothing, references[0])) < 1e-6


def test_saying_a_word_again_gains_nothing() -> None:
    # The example of BLEU's paper, section 2.1: two of seven, and the reference of seven is nearer.
    the, references = (
        ["the"] * 7,
        [words("the cat is on the mat"), words("there is a cat on the mat")],
    )
    counts = rules.bleu_counts(the, references)
    assert (counts[0], counts[4], counts[-1]) == (2, 7, 7)
    assert rules.bleu_counts(words("a b c d e"), [["a"] * 2, ["a"] * 6])[-1] == 6
    assert rules.bleu_counts(words("a b c d e"), [["a"] * 6, ["a"] * 4])[-1] == 4
    # One of two words of the reference is there once.
    assert rules.rouge_l(["a"], [["a", "a"]]) == pytest.approx(2.44 * 0.5 / (0.5 + 1.44))
    assert rules.rouge_l(words("a a b"), [words("b a a")]) == pytest.approx(2 / 3)
    # Every n-gram weighs log 2: "dog" counts once of twice, over lengths of 2 and the root of 2.
    rarity = rules.Rarity.of([[words("dog cat")], [words("one two")]])
    found = rules.cider(words("dog dog"), [words("dog cat")], rarity)
    assert found == pytest.approx(10 / 4 / (2 * 2**0.5))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man, sitting.", "a man sitting"),
        ("The dog's bowl isn't empty!", "the dog 's bowl is n't empty"),
        ("They\u2019re 3.5 feet; black-and-white", "they 're 3.5 feet black-and-white"),
        ('"Stop" - (it) says...', "stop it says"),
        ("Un caf\u00e9", "un caf\u00e9"),
        (" \n", ""),
    ],
)
def test_words_are_lower_case_and_without_punctuation(text: str, expected: str) -> None:
    assert rules.words_of(text) == expected.split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return scenes as COCO's archives would unpack, two captions of the first one."""
    place = tmp_path_factory.mktemp("coco")
    scenes = [generate("shapes", 96, "test", index) for index in range(5)]
    files.write(place, "test", [(scene, SHAPES) for scene in scenes])
    path = place / "annotations" / "captions_test.json"
    content = json.loads(path.read_text())
    content["annotations"].append({"id": 99, "image_id": 1, "caption": "Another one."})
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] != 5]
    path.write_text(json.dumps(content))
    return place


def test_a_folder_gives_images_with_all_their_captions(folder: Path) -> None:
    task = CocoCaptions(folder=str(folder), split="test")
    items = {item.id: item for item in task.items()}
    # The fifth has none and is not asked.
    assert sorted(items) == ["1", "2", "3", "4"]
    assert len(items["1"].fields["references"]) == 2
    assert items["1"].fields["references"][1] == "Another one."
    assert list(items) != ["1", "2", "3", "4"]  # drawn
    with Image.open(folder / items["3"].fields["file"]) as image:
        np.testing.assert_array_equal(task.pixels(items["3"]), np.asarray(image))
    assert [task.pixels(item).shape for item in task.warmup_items()] == [(640, 640, 3)] * 4
    mini = {item.id: item for item in CocoCaptionsMini().items()}
    assert items["2"].fields["references"] == mini["2"].fields["references"]
    np.testing.assert_array_equal(task.pixels(items["2"]), CocoCaptionsMini().pixels(mini["2"]))


def test_a_file_without_captions_and_a_damaged_one_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(Unsupported, match=r"holds no annotations/captions_val2017\.json\. Unpack"):
        list(CocoCaptions(folder=str(tmp_path)).items())
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations" / "captions_test.json"
    content = json.loads((folder / "annotations" / "captions_test.json").read_text())
    path.write_text(json.dumps({**content, "annotations": []}))
    task = CocoCaptions(folder=str(tmp_path), split="test")
    with pytest.raises(Unsupported, match="holds no caption"):
        list(task.items())
    content["annotations"][2]["caption"] = 7
    path.write_text(json.dumps(content))
    with pytest.raises(
        Unsupported, match=r"annotation 2 \(id 3\) has caption 7; it must be a text"
    ):
        list(task.items())


class Teller:
    """Says the first reference of the image that it is shown."""

    def __init__(self, task: CaptionTask) -> None:
        self.told = {task.pixels(i).tobytes(): i.fields["references"][0] for i in task.items()}
        self.asked: list[VisualPrompt] = []

    def answer(self, prompt: VisualPrompt, decoding: Any) -> VisualAnswer:
        self.asked.append(prompt)
        text = self.told[prompt.image.tobytes()]
        return VisualAnswer((1,), text, "eos", Trace(), None, ())  # type: ignore[arg-type]  # unused


def test_the_descriptions_themselves_have_every_score(folder: Path) -> None:
    task = CocoCaptions(folder=str(folder), split="test", prompt="Tell.")
    model: Any = Teller(task)
    items = list(task.items())
    outputs = {item.id: task.call(model, item).text for item in items}
    assert {prompt.text for prompt in model.asked} == {"Tell."}
    scores = {item.id: task.score(item, outputs[item.id]) for item in items}
    assert [scores[name]["cider"] for name in ("2", "3", "4")] == pytest.approx([10] * 3)
    assert 4 < float(scores["1"]["cider"]) < 6  # type: ignore[arg-type]  # two references, one met
    assert [values["rouge_l"] for values in scores.values()] == pytest.approx([1] * 4)
    draws = np.array([[0, 1, 2, 3], [0, 0, 0, 0]])
    assert task.corpus(outputs, draws)["bleu@4"] == pytest.approx([1, 1])


def test_bleu_is_resampled_over_images() -> None:
    task = CocoCaptionsMini()
    items = list(task.items())[:6]
    texts = [item.fields["references"][0] for item in items]
    outputs = {item.id: texts[place // 2] for place, item in enumerate(items)}
    found = task.corpus(outputs, corpus_draws(6)[:40])["bleu@4"]
    for row, drawn in enumerate(corpus_draws(6)[:40]):
        counts = [
            rules.bleu_counts(rules.words_of(outputs[items[at].id]), [rules.words_of(texts[at])])
            for at in drawn
        ]
        assert found[row] == pytest.approx(rules.bleu(np.sum(counts, axis=0)))
    assert len({round(value, 6) for value in found}) > 10


def test_the_mini_shows_held_out_scenes_and_hashes_their_pixels() -> None:
    task = CocoCaptionsMini()
    items = list(task.items())
    assert len(items) == NUM_IMAGES
    assert len({item.fields["pixels"] for item in items}) == NUM_IMAGES
    assert {item.fields["file"].split("/")[3] for item in items} == {"test"}
    assert {i.fields["file"].split("/")[3] for i in task.warmup_items()} == {"validation"}
    # Weights of words come from all images, whatever is run of them.
    (first, *_) = items
    assert task.score(first, first.fields["references"][0])["cider"] == pytest.approx(10)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        CocoCaptionsMini(max_new_tokens=0)
    with pytest.raises(ValueError, match="prompt must ask for something"):
        CocoCaptionsMini(prompt=" ")
