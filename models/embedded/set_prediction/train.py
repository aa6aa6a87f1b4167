"""The recipe of the set-prediction head on tiny-detector's frozen vision tower.

    python -m models.embedded.set_prediction.train --out DIR --device cpu --seed 0

1. The tower sees the training scenes once; its features stay in `--out/features.safetensors`.
2. The head is trained on them; it never changes the tower.

A training that was stopped goes on when it is started again with the same arguments. The file of
features is not part of the result.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.embedded.scenes.generator import (
    COLOUR_NAMES,
    MAX_OBJECTS,
    SHAPES,
    SIZES,
    Scene,
    generate,
)
from models.embedded.scenes.raster_torch import Renderer
from models.embedded.set_prediction.network import (
    SetHead,
    Targets,
    load_head,
    loss,
    names,
    read,
)
from models.embedded.tiny_detector import data
from models.embedded.tiny_detector.evaluate import BoxScores
from models.embedded.tiny_detector.train import load
from models.embedded.training import (
    Checkpoint,
    Clock,
    Curve,
    cosine,
    run_recipe,
    save_half,
    seed_everything,
)

RATE, THRESHOLD = 1e-3, 0.5
PRINT_EVERY_SECONDS = 10.0
DETECTOR = Path(__file__).parent.parent / "tiny_detector"


class Sizes(NamedTuple):
    """How much of everything: steps, scenes of a step, training scenes, test scenes."""

    steps: int
    batch: int
    scenes: int
    tested: int


SIZES_BY_DEVICE = {
    "cpu": Sizes(2600, 32, 8000, 300),
    "cuda": Sizes(12000, 64, 40000, 300),
}
SMOKE = Sizes(3, 2, 8, 4)


def targets_of(scenes: list[Scene]) -> Targets:
    """Return the objects of scenes."""
    attributes = torch.zeros(len(scenes), MAX_OBJECTS, 3, dtype=torch.long)
    boxes = torch.full((len(scenes), MAX_OBJECTS, 4), 0.5)
    for row, scene in enumerate(scenes):
        for place, item in enumerate(scene.objects):
            attributes[row, place] = torch.tensor(
                [
                    COLOUR_NAMES.index(item.colour),
                    SHAPES.index(item.shape),
                    SIZES.index(item.size),
                ]
            )
            x0, y0, x1, y1 = (edge / scene.size for edge in data.geometry(item, "box"))
            boxes[row, place] = torch.tensor([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
    return Targets(attributes, boxes, torch.tensor([len(scene.objects) for scene in scenes]))


@torch.no_grad()
def features_of(scenes: list[Scene], device: torch.device) -> Tensor:
    """Return what tiny-detector's tower makes of scenes, (scenes, 144, 128), float16."""
    tower, renderer = load(DETECTOR, device), Renderer(data.SIZE, device)
    parts = []
    for first in range(0, len(scenes), 32):
        packed = np.stack([scene.pack() for scene in scenes[first : first + 32]])
        image = renderer.render(torch.from_numpy(packed).to(device)).image
        parts.append(tower.vision(image, only_features=True).features[:, 1:].half().cpu())
    return torch.cat(parts)


def train(
    arguments: argparse.Namespace, device: torch.device, sizes: Sizes, begin: float
) -> dict[str, object]:
    """Train the head and save it."""
    out: Path = arguments.out
    seed_everything(arguments.seed)
    scenes = [generate("shapes", data.SIZE, "train", index) for index in range(sizes.scenes)]
    cache = out / "features.safetensors"
    features = load_file(cache)["features"] if cache.is_file() else torch.zeros(0)
    if len(features) != sizes.scenes:
        features = features_of(scenes, device)
        save_file({"features": features}, cache)
    seen = round(time.monotonic() - begin, 1)
    print(f"[set_prediction] {len(features)} scenes seen after {seen} s", flush=True)
    targets = targets_of(scenes)
    head = SetHead().to(device).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=1e-4)
    draws = torch.Generator().manual_seed(arguments.seed + 1)
    recipe = {"seed": arguments.seed, "device": device.type, "sizes": list(sizes)}
    checkpoint = Checkpoint(out, recipe)
    checkpoint.EVERY_SECONDS = 60.0
    parts = {"head": head, "optimizer": optimizer, "draws": draws}
    left = arguments.max_seconds
    clock = Clock(sizes.steps, None if left is None else max(1.0, left - seen))
    curve = Curve(out / "curve.csv", ("loss",), checkpoint.kept)
    checkpoint.restore("head", clock, parts)
    checkpoint.save("head", clock.done, clock, parts, now=True)
    spoken = -PRINT_EVERY_SECONDS
    for step, progress in clock:
        for group in optimizer.param_groups:
            group["lr"] = RATE * cosine(progress, warmup=0.03)
        rows = torch.randint(len(features), (sizes.batch,), generator=draws)
        found = head(features[rows].to(device).float())
        value = loss(found, Targets(*(each[rows].to(device) for each in targets)))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        if clock.seconds - spoken >= PRINT_EVERY_SECONDS:
            spoken = clock.seconds
            print(f"[set_prediction] step {step} loss {value.item():.3f}", flush=True)
            curve.add("head", step, clock.seconds, loss=value.item())
        checkpoint.save("head", step + 1, clock, parts)
    save_half(head.state_dict(), out / "model.safetensors")
    checkpoint.remove()
    return {
        "seed": arguments.seed,
        "device": device.type,
        "torch": torch.__version__,
        "steps": clock.done,
        "batch": sizes.batch,
        "scenes": sizes.scenes,
        "training_seconds": round(clock.seconds, 1),
    }


@torch.no_grad()
def evaluate(out: Path, device: torch.device, sizes: Sizes) -> dict[str, float]:
    """Return F1 and AP50 of all six shapes on scenes of the test split, as tiny-detector's."""
    head = load_head(out / "model.safetensors").to(device)
    scenes = [generate("shapes", data.SIZE, "test", index) for index in range(sizes.tested)]
    found = head(features_of(scenes, device).to(device).float())[-1]
    scores = BoxScores()
    for row, scene in enumerate(scenes):
        # Average precision wants the unsure ones too.
        items = read(found, row, 0.05)
        for shape in SHAPES:
            truth = np.array(
                [data.geometry(item, "box") for item in scene.objects if item.shape == shape], float
            ).reshape(-1, 4)
            told = [(item, names(item, shape)) for item in items]
            own = [(item, sure) for item, sure in told if sure is not None]
            boxes = np.array([item.box for item, _ in own], float).reshape(-1, 4) * data.SIZE
            is_told = np.array([item.objectness >= THRESHOLD for item, _ in own], bool)
            scores.add(boxes[is_told], truth)
            scores.rank(shape, boxes, [sure for _, sure in own], truth)
    parameters = sum(weight.numel() for weight in head.parameters())
    return scores.numbers() | {"parameters": parameters}


if __name__ == "__main__":
    run_recipe(
        __doc__.partition("\n")[0],
        sizes=SIZES_BY_DEVICE,
        smoke=SMOKE,
        train=train,
        evaluate=evaluate,
        compiles=False,
    )
