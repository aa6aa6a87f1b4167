"""text-to-image: captions from files, CLIP's score against its definition, and a whole cell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from models.base import AutoregressiveImageModel, Unsupported
from runner.conformance_base import byte_tokenizer, sharpen
from runner.plan import make_plan
from runner.request import Request
from tasks.image_common import read_output
from tasks.imagenet_fid_mini import ImagenetFidMini
from tasks.text_to_image import TextToImage, clip_scores, read_prompts
from tests.models.tiny_captioned import tiny_captioned, tiny_llamagen

PROMPTS = "a red dog\n\n  the sea  \n"


def clip_folder(folder: Path, seed: int = 0) -> Path:
    """A random CLIP as transformers saves it."""
    words = byte_tokenizer(("<end>", "<pad>"))
    words.add_special_tokens({"pad_token": "<pad>"})
    words.model_max_length = 16
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    }
    config = transformers.CLIPConfig(
        text_config={
            **sizes,
            "vocab_size": len(words),
            "max_position_embeddings": 16,
            "eos_token_id": 0,
            "bos_token_id": 0,
            "pad_token_id": 1,
        },
        vision_config={**sizes, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.CLIPModel(config).requires_grad_(False)
        sharpen(model, 5)
        model.save_pretrained(folder)
    words.save_pretrained(folder)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text(PROMPTS, encoding="utf-8")
    return path


def test_captions_are_read_from_the_files_that_papers_use(tmp_path: Path) -> None:
    table = tmp_path / "PartiPrompts.tsv"
    lines = "Prompt\tCategory\ta\nbond\tAbstract\tx\na \"quoted' thing\tWorld\ty\n"
    table.write_text(lines, encoding="utf-8")
    assert read_prompts(table) == ("bond", "a \"quoted' thing")
    notes = [
        {"image_id": 9, "id": 1, "caption": "nine"},
        {"image_id": 4, "id": 7, "caption": "four, later"},
        {"image_id": 4, "id": 2, "caption": " four\n"},
    ]
    coco = tmp_path / "captions_val2017.json"
    coco.write_text(json.dumps({"annotations": notes}), encoding="utf-8")
    assert read_prompts(coco) == ("four", "nine")
    lines_file = tmp_path / "lines.txt"
    lines_file.write_text(PROMPTS, encoding="utf-8")
    assert read_prompts(lines_file) == ("a red dog", "the sea")
    # A changed file is read anew.
    lines_file.write_text("other\n", encoding="utf-8")
    assert read_prompts(lines_file) == ("other",)


def test_files_without_captions_are_refused_by_name(tmp_path: Path) -> None:
    for name, content in (
        ("empty.txt", "\n \n"),
        ("other.tsv", "Text\tCategory\nx\ty\n"),
        ("list.json", "[1]"),
        ("broken.json", "{"),
    ):
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        with pytest.raises(Unsupported, match=f"{name} holds no captions"):
            read_prompts(path)
    missing = TextToImage(prompts=str(tmp_path / "none.tsv"))
    with pytest.raises(Unsupported, match=r"no .*none.tsv.*show task text-to-image"):
        missing.conditions()


def test_images_take_the_captions_in_turn_with_seeds_of_their_own(prompts: Path) -> None:
    task = TextToImage(images=5, batch=2, prompts=str(prompts), seed=3)
    items = list(task.items())
    captions = [caption for item in items for caption in item.fields["captions"]]
    assert captions == ["a red dog", "the sea", "a red dog", "the sea", "a red dog"]
    seeds = [seed for item in items for seed in item.fields["seeds"]]
    assert seeds == [3_000_000 + number for number in range(5)]
    warm = [seed for item in task.warmup_items() for seed in item.fields["seeds"]]
    assert not set(warm) & set(seeds)
    assert task.limited(1).images == 2


def test_the_score_is_a_hundred_cosines_and_never_negative(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "clip")
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (6, 12, 12, 3), dtype=np.uint8)
    captions = ["a red dog", "sea", "a caption that is longer than sixteen bytes", "x", "yy", "z"]
    found = clip_scores(folder, pixels, captions)
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)
    scale = transformers.CLIPImageProcessor.from_pretrained(folder)
    for number, caption in enumerate(captions):
        read = words(caption, truncation=True, return_tensors="pt")
        image = scale(pixels[number], return_tensors="pt", input_data_format="channels_last")
        with torch.no_grad():
            text = model.get_text_features(**read)
            seen = model.get_image_features(**image)
        text, seen = (getattr(each, "pooler_output", each)[0] for each in (text, seen))
        cosine = torch.nn.functional.cosine_similarity(text, seen, dim=0)
        assert found[number] == pytest.approx(max(0.0, 100 * float(cosine)), abs=1e-3)
    assert found.max() > found.min() == 0


@pytest.mark.parametrize("kind", ["llamagen", "emu3", "lumina-mgpt"])
def test_a_batch_is_made_stored_and_scored(tmp_path: Path, prompts: Path, kind: str) -> None:
    model: Any = tiny_captioned(kind)
    clip = clip_folder(tmp_path / "clip")
    task = TextToImage(images=2, batch=2, top_k=12, prompts=str(prompts), clip=str(clip))
    [item] = task.items()
    result = task.stored(model, item, task.call(model, item))
    scores = task.score(item, result.text)
    pixels = read_output(result.text).pixels
    assert (pixels == result.made.pixels).all()
    name = task.metrics[0].name
    assert name.startswith("clip_score[clip@")
    assert scores[name] == pytest.approx(clip_scores(clip, pixels, ["a red dog", "the sea"]).mean())
    assert scores.keys() == {metric.name for metric in task.metrics}
    assert 0 < scores["entropy"] < np.log(model.facts.vocab_size)
    # Another CLIP is another metric; where none is asked for there is no score.
    other = clip_folder(tmp_path / "other", seed=1)
    assert TextToImage(prompts=str(prompts), clip=str(other)).metrics[0].name != name
    bare = TextToImage(prompts=str(prompts), clip="none")
    assert [metric.name for metric in bare.metrics] == [metric.name for metric in task.metrics][1:]
    assert bare.score(item, result.text).keys() == scores.keys() - {name}
    assert task.conditions()["clip"] != bare.conditions()["clip"]


def test_classes_and_captions_are_told_apart(prompts: Path) -> None:
    model: AutoregressiveImageModel = tiny_llamagen()
    task = ImagenetFidMini(images=1)
    with pytest.raises(Unsupported, match="of 20 classes; 'tiny-llamagen' makes them of captions"):
        task.call(model, next(task.items()))
    from runner.conformance_image import tiny_images

    other = TextToImage(images=1, prompts=str(prompts))
    with pytest.raises(Unsupported, match=r"are of captions; .* makes them of 5 classes"):
        other.call(tiny_images(), next(other.items()))
    with pytest.raises(Unsupported, match=r"holds no CLIP.*clip=none goes without"):
        TextToImage(prompts=str(prompts), clip=str(prompts.parent)).conditions()
    assert TextToImage(prompts=str(prompts), clip="x").metrics[0].name == "clip_score[clip@missing]"


def test_captions_and_clip_are_part_of_a_cell(tmp_path: Path, prompts: Path) -> None:
    def key() -> str:
        request = Request(
            methods=("raster",),
            tasks=(f"text-to-image:images=2,clip=none,prompts={prompts}",),
            models=("tiny-ar-image",),
            store=tmp_path / "store",
            offline=True,
        )
        [spec] = make_plan(request).experiments
        return spec.cells[0].cell_id

    before = key()
    prompts.write_text("another\n", encoding="utf-8")
    assert key() != before
