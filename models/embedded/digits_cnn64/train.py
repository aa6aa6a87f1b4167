"""Train the proxy extractor: `python -m models.embedded.digits_cnn64.train --out DIR`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from models.embedded.digits_cnn64.model import (
    DigitsCnn64,
    frechet_distance,
    load_extractor,
    moments,
    read,
    save_moments,
    weights_label,
)
from models.embedded.tiny_ar_image.data import CLASSES, render, render_range
from models.embedded.training import (
    AveragedWeights,
    Clock,
    Curve,
    cosine,
    recipe_parser,
    save_half,
    seed_everything,
)

TARGET_ACCURACY = 0.97
SMALLEST_RATIO = 20.0


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images in [-1, 1] slightly shifted, some blurred, some noisy.

    Light on purpose: a feature that never changes under noise could not measure it.
    """
    device, count = images.device, len(images)

    def uniform(low: float, high: float) -> Tensor:
        numbers = torch.rand(count, 1, 1, 1, device=device, generator=generator)
        return low + (high - low) * numbers

    # Where the image is sampled, in [-1, 1]: shifted by up to two pixels, reflected at the edges.
    size = images.shape[-1]
    centres = (torch.arange(size, device=device) + 0.5) * (2 / size) - 1
    shift = (torch.rand(count, 2, device=device, generator=generator) - 0.5).mul(5).round()
    columns = (centres + shift[:, :1] * (2 / size))[:, None].expand(-1, size, -1)
    rows = (centres + shift[:, 1:] * (2 / size))[:, :, None].expand(-1, -1, size)
    places = torch.stack([columns, rows], -1)
    images = F.grid_sample(images, places, padding_mode="reflection", align_corners=False)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    # Half of the images stay sharp, the others are mixed with their blurred form.
    images = torch.lerp(images, blurred, uniform(-0.6, 0.6).clamp(min=0))
    noise = torch.randn(images.shape, device=device, generator=generator)
    return images + uniform(-0.06, 0.06).clamp(min=0) * noise


def train_extractor(
    out: Path,
    *,
    device: str,
    seed: int,
    steps: int,
    batch: int,
    images: int,
    max_seconds: float | None,
    compiled: bool = False,
) -> DigitsCnn64:
    """Train, save `model.safetensors` and `curve.csv`, and return the averaged model."""
    seed_everything(seed)
    generator = torch.Generator(device).manual_seed(seed)
    pixels, labels = render_range(images, "train", device=device)
    print(f"digits-cnn64: {images} images rendered", flush=True)
    model = DigitsCnn64(len(CLASSES)).to(device)
    forward = torch.compile(model) if compiled else model
    average = AveragedWeights(model, 0.995)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-3, weight_decay=1e-2, fused=device != "cpu"
    )
    clock = Clock(steps, max_seconds)
    curve = Curve(out / "curve.csv", ("loss", "accuracy"))
    spoken = time.monotonic()
    for step, progress in clock:
        optimizer.param_groups[0]["lr"] = 3e-3 * cosine(progress, warmup=0.05)
        chosen = torch.randint(images, (batch,), device=device, generator=generator)
        inputs = augment(pixels[chosen].float() / 127.5 - 1, generator)
        logits = forward(inputs)
        loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.02)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        average.update(model)
        if step % 100 == 0 or time.monotonic() - spoken > 10:
            spoken = time.monotonic()
            accuracy = (logits.argmax(1) == labels[chosen]).float().mean().item()
            curve.add("extractor", step, clock.seconds, loss=loss.item(), accuracy=accuracy)
            print(f"extractor step {step} loss {loss.item():.3f} acc {accuracy:.3f}", flush=True)
    average.copy_to(model)
    model.eval()
    save_half(model.state_dict(), out / "model.safetensors")
    return model


def distortions(images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the sets that a usable extractor must tell from real images, uint8.

    Noise has its standard deviation in units of the [-1, 1] range; patches are 16 pixels wide.
    """
    values = images.float()
    noise = torch.randn(values.shape, generator=generator)
    padded = F.pad(values, (1, 1, 1, 1), mode="reflect")
    patches = F.unfold(values, 16, stride=16)
    order = torch.rand(len(images), 1, patches.shape[2], generator=generator).argsort(-1)
    shuffled = patches.gather(2, order.expand(-1, patches.shape[1], -1))
    side = images.shape[-1]

    def stored(changed: Tensor) -> Tensor:
        return changed.clamp(0, 255).round().to(torch.uint8)

    return {
        "blur 3x3": stored(F.avg_pool2d(padded, 3, stride=1)),
        "noise 0.1": stored(values + 0.1 * 127.5 * noise),
        "noise 0.3": stored(values + 0.3 * 127.5 * noise),
        "patch shuffle": stored(F.fold(shuffled, side, 16, stride=16)),
    }


def calibrate(model: DigitsCnn64, *, count: int, device: str = "cpu") -> dict[str, float]:
    """Return the floor (real against real) and the distance of each distorted set.

    Args:
        model: The extractor.
        count: Images a set; the reference has as many.
        device: Where to render; the images are then read on the host in parts.
    """
    reference = read(model, render_range(count, "reference", device=device)[0]).features
    real = render_range(count, "validation", device=device)[0]
    distances = {"floor": frechet_distance(read(model, real).features, reference)}
    generator = torch.Generator().manual_seed(0)
    for name, changed in distortions(real.cpu(), generator).items():
        distances[name] = frechet_distance(read(model, changed).features, reference)
    # As many images of class 3 alone.
    singles = torch.arange(count) * len(CLASSES) + 3
    one = torch.cat([render(part, "validation", device=device)[0] for part in singles.split(2000)])
    distances["one class only"] = frechet_distance(read(model, one).features, reference)
    return distances


def evaluate(
    out: Path, *, device: str, count: int, seconds: float | None = None
) -> dict[str, object]:
    """Measure the saved fp16 weights; write and return `quality.json`."""
    model = load_extractor(out, device)
    images, labels = render_range(count, "validation", device=device)
    predicted = read(model, images).logits.argmax(1)
    correct = predicted == labels.cpu()
    distances = calibrate(model, count=count, device=device)
    ratios = {name: value / distances["floor"] for name, value in distances.items()}
    quality = {
        "model": weights_label(out),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "images": count,
        "accuracy": correct.float().mean().item(),
        "accuracy_by_class": {
            name: correct[labels.cpu() == label].float().mean().item()
            for label, name in enumerate(CLASSES)
        },
        "distances": distances,
        "times_floor": ratios,
        "gates": {
            f"accuracy >= {TARGET_ACCURACY}": correct.float().mean().item() >= TARGET_ACCURACY,
            "each distortion >= 20 floors": min(
                ratio for name, ratio in ratios.items() if name != "floor"
            )
            >= SMALLEST_RATIO,
            "noise 0.3 > noise 0.1": distances["noise 0.3"] > distances["noise 0.1"],
        },
        "training_seconds": seconds,
    }
    earlier = out / "quality.json"
    if seconds is None and earlier.is_file():
        found = json.loads(earlier.read_text(encoding="utf-8"))
        quality["training_seconds"] = found.get("training_seconds")
    size = 2 * count
    reference = read(model, render_range(size, "reference", device=device)[0]).features
    save_moments(moments(reference), out / "reference.safetensors")
    (out / "quality.json").write_text(json.dumps(quality, indent=2) + "\n", encoding="utf-8")
    return quality


def main() -> None:
    """Run the recipe."""
    parser = recipe_parser(__doc__)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    scale = arguments.steps_scale
    on_cpu = arguments.device == "cpu"
    begun = time.monotonic()
    if not arguments.eval_only:
        train_extractor(
            arguments.out,
            device=arguments.device,
            seed=arguments.seed,
            steps=max(2, round((1500 if on_cpu else 3000) * scale)),
            batch=32 if scale < 0.05 else 64 if on_cpu else 512,
            images=max(200, round((20_000 if on_cpu else 60_000) * min(scale, 1.0))),
            max_seconds=arguments.max_seconds,
            compiled=arguments.compile,
        )
    seconds = None if arguments.eval_only else round(time.monotonic() - begun, 1)
    count = 5000 if scale >= 0.05 else 200
    quality = evaluate(arguments.out, device=arguments.device, count=count, seconds=seconds)
    print(json.dumps(quality["gates"]), json.dumps(quality["times_floor"]), flush=True)


if __name__ == "__main__":
    main()
