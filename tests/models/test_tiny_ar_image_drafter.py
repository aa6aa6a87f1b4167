"""The feature drafter of tiny-ar-image: its network, its loss, its measurement, its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.embedded.tiny_ar_image import train_drafter
from models.embedded.tiny_ar_image.drafter import FeatureDrafter, load_drafter
from models.embedded.tiny_ar_image.model import (
    DecoderConfig,
    ImageDecoder,
    ImageModelConfig,
    ImageTokenizer,
    KVCache,
    guided,
    load_image_model,
)
from models.embedded.tiny_ar_image.train import PRESETS
from models.embedded.tiny_ar_image.train_drafter import (
    LAW_WEIGHT,
    Encoded,
    acceptance_by_depth,
    drafting_loss,
    features_of,
)
from models.embedded.training import save_half

CONFIG = DecoderConfig(vocab_size=23, classes=5, grid=3, width=32, layers=2, heads=2)
FOLDER = Path(train_drafter.__file__).parent


@pytest.fixture(scope="module")
def target() -> ImageDecoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ImageDecoder(CONFIG)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def drafter() -> FeatureDrafter:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = FeatureDrafter(CONFIG)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def some_images(count: int) -> Encoded:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(CONFIG.vocab_size, (count, CONFIG.image_tokens), generator=generator)
    return Encoded(tokens.to(torch.int16), torch.arange(count) % CONFIG.classes)


def test_step_by_step_with_a_cache_equals_one_forward(
    target: ImageDecoder, drafter: FeatureDrafter
):
    images = some_images(2)
    tokens = images.tokens.long()
    features, _ = features_of(target, images.labels, tokens)
    embedded = target.embed_tokens(tokens)
    whole = drafter(embedded, features)
    cache = KVCache(drafter.config, 2, CONFIG.image_tokens)
    steps = [
        drafter(embedded[:, place : place + 1], features[:, place : place + 1], cache=cache)
        for place in range(CONFIG.image_tokens)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=1e-5)
    # The first step embeds token 0, which has a place in the image and so a key of its own.
    assert bool((drafter.rotation[1] != 0).any())


def test_the_loss_is_that_of_features_and_a_tenth_of_that_of_laws():
    torch.manual_seed(0)
    guesses, features = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    drafted, logits = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    apart = (guesses - features).abs()
    distance = torch.where(apart < 1, 0.5 * apart.square(), apart - 0.5).mean()
    crossing = torch.stack(
        [
            F.cross_entropy(drafted[row, place][None], logits[row, place].softmax(-1)[None])
            for row in range(2)
            for place in range(3)
        ]
    ).mean()
    found = drafting_loss(guesses, drafted, features, logits)
    assert float(found) == pytest.approx(float(distance + LAW_WEIGHT * crossing), rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_acceptance_by_depth_is_that_of_chains_drafted_one_by_one(
    target: ImageDecoder, drafter: FeatureDrafter, scale: float
):
    images = some_images(2)
    depths = 3
    found = acceptance_by_depth(
        target, drafter, images, depths=depths, guidance_scale=scale, batch=2
    )
    sums = torch.zeros(depths)
    counts = torch.zeros(depths)
    for row in range(2):
        tokens = images.tokens[row : row + 1].long()
        labels = images.labels[row : row + 1]
        if scale != 1:
            labels = torch.cat([labels, torch.tensor([CONFIG.classes])])
            tokens = tokens.repeat(2, 1)
        features, logits = features_of(target, labels, tokens)
        embedded = target.embed_tokens(tokens)

        def law(logits: Tensor) -> Tensor:
            return (guided(logits, scale) if scale != 1 else logits)[0].softmax(-1)

        for start in range(CONFIG.image_tokens - 1):
            given = features[:, : start + 1]
            for depth in range(depths):
                last = start + depth
                if last + 1 >= CONFIG.image_tokens:
                    break
                guesses = drafter(embedded[:, : last + 1], given)
                q = law(target.output(guesses[:, -1]))
                sums[depth] += torch.minimum(law(logits[:, last + 1]), q).sum()
                counts[depth] += 1
                given = torch.cat([given, guesses[:, -1:]], dim=1)
    for depth in range(depths):
        assert found[depth].acceptance == pytest.approx(
            float(sums[depth] / counts[depth]), abs=1e-5
        )


def test_it_learns_the_features_of_a_batch_by_heart(target: ImageDecoder):
    torch.manual_seed(0)
    images = some_images(4)
    tokens = images.tokens.long()
    features, logits = features_of(target, images.labels, tokens)
    drafter = FeatureDrafter(CONFIG)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        guesses = drafter(target.embed_tokens(tokens[:, :-1]), features[:, :-1])
        loss = drafting_loss(guesses, target.output(guesses), features[:, 1:], logits[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    least = float(drafting_loss(features, logits, features, logits))
    assert losses[-1] - least < 0.1 * (losses[0] - least)
    found = acceptance_by_depth(target, drafter.eval(), images, depths=1)[0]
    assert found.acceptance > 0.85


def test_the_recipe_runs_and_what_it_saves_is_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = PRESETS["smoke"].model
    folder, out = tmp_path / "target", tmp_path / "out"
    folder.mkdir()
    config.save(folder)
    torch.manual_seed(0)
    save_half(ImageDecoder(config.target).state_dict(), folder / "model.safetensors")
    save_half(ImageTokenizer(config.tokenizer).state_dict(), folder / "tokenizer.safetensors")
    monkeypatch.setattr(train_drafter, "SMOKE", train_drafter.SMOKE._replace(images=20, held_out=3))
    arguments = f"train_drafter --target {folder} --out {out} --device cpu --steps-scale 0.001"
    monkeypatch.setattr("sys.argv", arguments.split())
    train_drafter.main()
    found = json.loads((out / "drafter_quality.json").read_text(encoding="utf-8"))
    assert found["steps"] == 3
    assert 0 < found["guidance_1.5_depth_4_acceptance"] <= 1
    drafter = load_drafter(out, config.target)
    assert sum(parameter.numel() for parameter in drafter.parameters()) == found["parameters"]
    with pytest.raises(FileNotFoundError, match="no trained drafter"):
        load_drafter(folder, config.target)


def test_the_trained_drafter_foretells_most_of_the_targets_law():
    models = load_image_model(FOLDER)
    drafter = load_drafter(FOLDER, ImageModelConfig.load(FOLDER).target)
    images = train_drafter.encode_range(
        models.tokenizer,
        3,
        "validation",
        first=train_drafter.HELD_OUT_FIRST,
        batch=3,
        device=torch.device("cpu"),
    )
    found = acceptance_by_depth(models.target, drafter, images, depths=2, guidance_scale=1.5)
    published = json.loads((FOLDER / "drafter_quality.json").read_text(encoding="utf-8"))
    for depth, values in enumerate(found, 1):
        expected = published[f"guidance_1.5_depth_{depth}_acceptance"]
        assert values.acceptance == pytest.approx(expected, abs=0.05)


def test_all_weights_of_the_model_stay_within_twenty_mebibytes():
    assert sum(path.stat().st_size for path in FOLDER.glob("*.safetensors")) <= 20 * 2**20
