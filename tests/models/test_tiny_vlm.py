"""tiny-vlm: the packed training network is transformers' Llava; text, labels and questions fit."""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.base import Decoding, VisualPrompt
from models.embedded.scenes.font import CHARACTERS
from models.embedded.scenes.generator import COLOUR_NAMES, SHAPES, WORDS, generate
from models.embedded.scenes.questions import (
    CATEGORIES,
    LETTERS,
    asked_of,
    caption,
    circular,
    held_out,
)
from models.embedded.scenes.raster import mask, render
from models.embedded.scenes.raster_torch import Renderer
from models.embedded.tiny_vlm import data, text, train
from models.embedded.tiny_vlm.batches import Mix, compose, numpy_rows, vision_labels
from models.embedded.tiny_vlm.evaluate import Examiner, prompt_start, visual_embeddings
from models.embedded.tiny_vlm.network import PATCHES, Layout, TinyVlm, llava_config
from models.embedded.tiny_vlm.train import words_entropy, write_files
from models.embedded.training import save_half
from models.loading import LoadSettings
from models.loading import load as load_model
from tasks.mmbench_data import decode_image
from tasks.mmbench_mini import MMBenchMini
from tests.models.stopped import Stopped, check_same, stopping

FOLDER = Path(text.__file__).parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network() -> TinyVlm:
    torch.manual_seed(0)
    model = TinyVlm()
    with torch.no_grad():
        # As the file holds them, so that both sides compute with the same numbers.
        for weight in model.parameters():
            weight.copy_(weight.half().float())
    return model.eval()


@pytest.fixture(scope="module")
def folder(network: TinyVlm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny_vlm")
    save_half(network.state_dict(), path / "model.safetensors")
    write_files(path)
    return path


@pytest.fixture(scope="module")
def rows() -> data.Items:
    return numpy_rows(data.make(("train", 96, 0, 24))[1], CPU)


def test_transformers_loads_the_folder_and_gives_the_same_logits(network, folder):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    llava, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert llava.dtype == torch.float32
    processor = AutoProcessor.from_pretrained(folder)
    scene, question = held_out("test", 96, 1)[3]
    drawn = render(scene).image
    asked = text.option_prompt(question)
    inputs = processor(
        images=Image.fromarray(drawn),
        text=f"{text.BEFORE_IMAGE}<image>\n{asked}",
        return_tensors="pt",
    )
    words = torch.tensor([text.encode(asked)])
    start = prompt_start("cpu")
    expected = [*start.tolist(), *[text.IMAGE] * PATCHES, *words[0].tolist()]
    assert inputs["input_ids"][0].tolist() == expected
    with torch.no_grad():
        theirs = llava.eval()(**inputs).logits[0, len(start) + PATCHES :]
        images = torch.from_numpy(drawn).permute(2, 0, 1)[None]
        layout = Layout(len(start) + PATCHES, [words.shape[1]], "cpu")
        ours = network.logits(visual_embeddings(network, images), start, words, layout)[0]
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert theirs.std() > 0.05


def test_five_tiles_are_five_images_of_one_prompt(network, folder):
    from transformers import LlavaForConditionalGeneration

    llava = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    scene = generate("shapes", 192, "test", 0)
    images = torch.from_numpy(render(scene).image).permute(2, 0, 1)[None]
    from models.embedded.scenes.raster_torch import tiles
    from models.embedded.tiny_vlm.network import normalise

    start, words = prompt_start("cpu"), torch.tensor([text.encode(text.caption_prompt())])
    ids = torch.cat([start, torch.full((5 * PATCHES,), text.IMAGE), words[0]])[None]
    with torch.no_grad():
        theirs = llava(input_ids=ids, pixel_values=normalise(tiles(images)[0])).logits
        layout = Layout(len(start) + 5 * PATCHES, [words.shape[1]], "cpu")
        ours = network.logits(visual_embeddings(network, images), start, words, layout)
    assert torch.allclose(ours[0], theirs[0, -words.shape[1] :], atol=1e-4)


def test_a_packed_question_is_what_it_is_alone(network, rows):
    mix = Mix(2, 2, 1.0, 1.0, 1.0)
    rates = torch.ones(len(CATEGORIES))
    torch.manual_seed(1)
    words = compose(rows, mix, rates, rates, torch.Generator().manual_seed(0))
    start = prompt_start("cpu")
    visual = visual_embeddings(network, Renderer(96, "cpu").render(rows.scene[:2]).image)
    packed = Layout(len(start) + PATCHES, mix.slots, "cpu")
    with torch.no_grad():
        together = network.logits(visual, start, words.tokens[:2], packed)
        begin = 0
        for length in mix.slots:
            alone = Layout(len(start) + PATCHES, [length], "cpu")
            slot = words.tokens[:2, begin : begin + length]
            single = network.logits(visual, start, slot, alone)
            assert torch.allclose(together[:, begin : begin + length], single, atol=1e-4)
            begin += length


def test_targets_are_the_answers_and_nothing_else(rows):
    mix = Mix(3, 3, 2.0, 3.0, 0.5)
    rates = torch.ones(len(CATEGORIES))
    words = compose(rows, mix, rates, rates, torch.Generator().manual_seed(0))
    letters = {text.encode(letter)[0] for letter in LETTERS}
    begin = 0
    for number, length in enumerate(mix.slots):
        part = slice(begin, begin + length)
        weights, targets = words.weights[:, part], words.targets[:, part]
        begin += length
        for row in range(len(weights)):
            counted = targets[row][weights[row] > 0].tolist()
            if number == 0:
                shown = caption(generate("shapes", 96, "train", row))
                assert counted == [*text.encode(shown), text.EOS]
            elif counted:
                # A scene with few questions leaves slots that do not count.
                assert counted[-1] == text.EOS
                assert text.EOS not in counted[:-1]
                if number <= mix.letters:
                    assert len(counted) == 2
                    assert counted[0] in letters
                ends = weights[row][weights[row] > 0]
                assert ends[-1] == ends[0] / 2
    assert torch.isfinite(words_entropy(torch.randn(*words.targets.shape, 7), small(words)))


def small(words):
    """The same words with targets that seven classes can hold."""
    return words._replace(targets=words.targets % 7)


def test_hard_categories_are_asked_more_often(rows):
    rates = torch.full((len(CATEGORIES),), 1e-9)
    rates[CATEGORIES.index("count")] = 1.0
    mix = Mix(1, 1, 1.0, 1.0, 1.0)
    words = compose(rows, mix, rates, rates, torch.Generator().manual_seed(0))
    stem = text.encode("How many objects are there?")
    begin = data.CAPTION_SLOT
    assert (words.tokens[:, begin : begin + len(stem)] == torch.tensor(stem)).all()


def test_vision_labels_say_what_each_patch_shows(rows):
    raster = Renderer(96, "cpu").render(rows.scene)
    labels = vision_labels(rows, raster)
    named = 0
    for row in range(len(rows.scene)):
        scene = generate("shapes", 96, "train", row)
        drawn = render(scene)
        owners = np.stack([mask(drawn, place) for place in range(len(scene.objects))])
        for patch in range(PATCHES):
            y, x = divmod(patch, 12)
            pixels = owners[:, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].sum((1, 2))
            best = int(pixels.argmax())
            if pixels[best] < 8:
                assert labels.shape[row, patch] == labels.colour[row, patch] == 0
                continue
            item = scene.objects[best]
            assert labels.shape[row, patch] == SHAPES.index(item.shape) + 1
            assert labels.colour[row, patch] == COLOUR_NAMES.index(item.colour) + 1
            assert labels.offset[row, patch].tolist() == [
                (item.x - 8 * x - 4) / 8,
                (item.y - 8 * y - 4) / 8,
            ]
            named += 1
        assert labels.others[row] == len(scene.objects) - 1
        assert labels.present[row].sum() == len(scene.objects)
        written = [int(code) - 1 for code in labels.character[row] if code > 0]
        expected = scene.text.text if scene.text else ""
        assert {CHARACTERS[code] for code in written} <= set(expected)
        # Every character's cell has a patch that it covers most of and by a quarter.
        assert len(set(written)) == len(set(expected))
    assert named > 100


def test_the_plain_encoder_is_the_tokenizer(folder):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab() == {word: number for number, word in enumerate(text.VOCABULARY)}
    texts = [caption(generate("shapes", 96, "train", index)) for index in range(20)]
    for index in range(20):
        for question in asked_of(generate("shapes", 96, "train", index)):
            texts += [text.option_prompt(question), text.direct_prompt(question)]
            texts.append(question.answer_text)
    texts += ["Isn't 90210 (unknown) xylophone, A-B?", *WORDS]
    for each in texts:
        assert tokenizer.encode(each, add_special_tokens=False).ids == list(text.encode(each))
    assert text.UNK not in {number for each in texts for number in text.encode(each)}
    assert tokenizer.decode(list(text.encode("the number 4271, a yak"))) == "the number 4271, a yak"
    assert len(text.VOCABULARY) < 400


def test_words_in_scenes_are_spelled_letter_by_letter():
    assert {len(text.encode(word)) for word in WORDS} == {3}


def test_every_prompt_and_answer_fits_its_slot():
    _, items = data.make(("train", 96, 100, 64))
    asked = [asked_of(generate("shapes", 96, "train", 100 + row)) for row in range(64)]
    for row, questions in enumerate(asked):
        assert (items.category[row] >= 0).sum() == len(questions)
        for place, question in enumerate(questions):
            start = items.letter_start[row, place]
            letter = text.encode(LETTERS[question.answer])[0]
            assert items.letter[row, place, start : start + 2].tolist() == [letter, text.EOS]
            assert items.direct[row, place, items.direct_end[row, place] - 1] == text.EOS


def test_the_examiner_marks_right_wrong_and_circular_answers():
    examiner = Examiner("validation", 96, 1, 4, CPU)
    originals = held_out("validation", 96, 1)
    assert [item for pair in originals for item in circular(pair[1])] == [
        question for _, question in examiner.items
    ]
    count = len(examiner.items)
    letters = np.ones(count, bool)
    letters[2] = False
    told = examiner.table(_answers(letters))
    assert told["letter"] == {**dict.fromkeys(CATEGORIES, 1.0), "all": 1.0}
    assert told["circular"][CATEGORIES[0]] == 0.0
    assert told["circular"]["all"] == pytest.approx(8 / 9)


def _answers(letters: np.ndarray):
    from models.embedded.tiny_vlm.evaluate import Answers

    return Answers(letters, letters, np.zeros(len(letters), int))


def test_the_examiner_reads_the_network_at_the_answers_place(network):
    class Oracle:
        """Says the next token of the words themselves: right everywhere, if read rightly."""

        model = network.model

        def vision(self, images, *, only_features):
            return network.vision(images, only_features=only_features)

        def project(self, features):
            return network.project(features)

        def logits(self, visual, start, words, layout):
            following = torch.nn.functional.pad(words[:, 1:], (0, 1))
            return torch.nn.functional.one_hot(following, len(text.VOCABULARY)).float()

    examiner = Examiner("validation", 96, 1, 1, CPU)
    table = examiner.table(examiner.ask(Oracle()))
    assert table["letter"]["all"] == table["direct"]["all"] == 1.0
    random = examiner.table(examiner.ask(network))
    assert random["direct"]["all"] < 0.5


def test_the_committed_folder_is_complete():
    assert (FOLDER / "model.safetensors").stat().st_size <= 15_000_000
    assert json.loads((FOLDER / "config.json").read_text()) == llava_config()
    quality = json.loads((FOLDER / "quality.json").read_text())
    assert quality["final"]
    assert set(quality["reached"]) == {"letter", "circular", "text"}
    assert all(quality["reached"].values())
    for name in ("curve.csv", "README.md", "sample.png", "tokenizer.json"):
        assert (FOLDER / name).stat().st_size > 0


def test_the_committed_weights_answer_questions_of_each_category():
    model = load_model("tiny-vlm", LoadSettings(), offline=True, capability="VisionLanguageModel")
    task = MMBenchMini()
    right = 0
    for item in itertools.islice(task.items(), len(CATEGORIES)):
        asked = item.fields["rotations"][0]
        prompt = VisualPrompt(
            image=decode_image(item.fields["image"]),
            text=asked["prompt"],
            options=tuple(asked["options"]),
        )
        answer = model.answer(prompt, Decoding(max_new_tokens=4))
        right += answer.text == asked["answer"]
        assert max(answer.option_log_probabilities) > -1
    # quality.json says 0.9985 of 1,350; one of nine may be wrong on another machine.
    assert right >= len(CATEGORIES) - 1


class _Examiner:
    """Marks that hang on the weights, without asking anything."""

    def __init__(self, *given: object) -> None:
        pass

    def ask(self, model: TinyVlm) -> float:
        return float(model.lm_head.weight.sum())

    def table(self, answers: float) -> dict[str, dict[str, float]]:
        # All is known but one category, which is then asked almost always.
        weak = CATEGORIES[int(abs(answers) * 1e3) % len(CATEGORIES)]
        marks = {name: float(name != weak) for name in (*CATEGORIES, "all")}
        return {"letter": marks, "direct": marks}


@pytest.mark.slow  # half a minute; the shared part is tested on smaller recipes
def test_a_training_stopped_in_several_stages_goes_on_bit_for_bit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "PRINT_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(train, "finish", lambda *given: None)
    monkeypatch.setattr(train, "Examiner", _Examiner)
    monkeypatch.setattr(train, "LARGE_EVERY", 99)
    monkeypatch.setattr(train, "SMOKE_BATCH", 1)
    monkeypatch.setattr(data, "make", cache(data.make))
    short = [stage.mix and stage.mix._replace(letters=2, directs=2) for stage in train.STAGES]
    stages = [stage._replace(mix=mix) for stage, mix in zip(train.STAGES, short, strict=True)]
    monkeypatch.setattr(train, "STAGES", tuple(stages))

    def run(name: str, *stop: Any) -> None:
        recipe = train.Recipe(tmp_path / name, CPU, 5, 0.0005, None, 0, False)

        def stage_now() -> str:
            return next(stage.name for stage in stages if stage.name not in recipe.stages_done)

        with stopping(stage_now, *stop):
            recipe.run()

    run("whole")
    for stop in (("vision", 3), ("joint", 2)):
        with pytest.raises(Stopped):
            run("parted", *stop)
        assert (tmp_path / "parted/checkpoint.safetensors").is_file()
    capsys.readouterr()
    run("parted")
    assert "joint step 2" in (said := capsys.readouterr().out)
    assert "joint step 1" not in said  # it goes on, and does not begin anew
    folders = [tmp_path / "whole", tmp_path / "parted"]
    check_same(*folders)
    facts = [json.loads((folder / "quality.json").read_text()) for folder in folders]
    for each in facts:
        assert [(stage["stage"], stage["steps"]) for stage in each["stages"]] == [
            (stage.name, 4) for stage in stages
        ]
    assert facts[0]["validation"] == facts[1]["validation"]
