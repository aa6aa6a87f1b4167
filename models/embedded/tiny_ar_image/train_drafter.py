"""Train the drafter.

    python -m models.embedded.tiny_ar_image.train_drafter --target DIR --out DIR

The target and the tokenizer of `--target` stay as they are. Training images are rendered and
encoded on the device, the target reads them with one class in ten dropped (so that its features
without a condition are learned too, for guidance), and the drafter learns its next feature:

    SmoothL1(guess, feature) + 0.1 * cross-entropy(target's law, law of the guess)

with uniform noise on the features it reads, as EAGLE does. Writes `drafter.safetensors` (fp16),
`drafter_curve.csv` and `drafter_quality.json`.

Source: the loss and its weights from jadohu/LANTERN at 3a56e45 (EAGLE, arXiv 2401.15077, section
4.2): AdamW (0.9, 0.95), gradients clipped at 0.5 by value, noise (rand - 0.5) * 0.2 * 512 / length.
Ours: a rate of 1e-3 with a cosine where a target of 775 million parameters had 1e-4 for 20 epochs,
and averaged weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.embedded.tiny_ar_image.data import render_range
from models.embedded.tiny_ar_image.drafter import FeatureDrafter, load_drafter
from models.embedded.tiny_ar_image.model import (
    ImageDecoder,
    ImageModelConfig,
    ImageTokenizer,
    KVCache,
    guided,
    load_weights,
)
from models.embedded.training import (
    AveragedWeights,
    Clock,
    Curve,
    cosine,
    recipe_parser,
    save_half,
    scaled,
    seed_everything,
)

LEARNING_RATE = 1e-3
CLASS_DROPPED = 0.1
LAW_WEIGHT = 0.1
CLIP_VALUE = 0.5
NOISE = 0.2
DEPTHS = 4
# Guidance scales that the quality is measured at.
GUIDANCE = (1.0, 1.5)
# Shares of --max-seconds: until the last image is encoded, and until the training ends.
ENCODED_BY, TRAINED_BY = 0.2, 0.88
PRINT_EVERY_SECONDS = 10.0
HELD_OUT_FIRST = 200_000


class Sizes(NamedTuple):
    """How much of everything; see `SIZES`.

    Attributes:
        images: Training images.
        held_out: Images that the quality is measured on.
        encoded: Images encoded at a time.
        batch: Images in a step.
        steps: Of the optimizer.
        autocast: Whether matrix products run in bfloat16.
    """

    images: int
    held_out: int
    encoded: int
    batch: int
    steps: int
    autocast: bool


SIZES = {
    "cuda": Sizes(
        images=300_000, held_out=1000, encoded=500, batch=128, steps=24_000, autocast=True
    ),
    "cpu": Sizes(images=5_000, held_out=200, encoded=50, batch=32, steps=3_000, autocast=False),
}
SMOKE = Sizes(images=40, held_out=20, encoded=20, batch=4, steps=0, autocast=False)


class Frozen(NamedTuple):
    """What the drafter is trained for, float32, in evaluation mode."""

    tokenizer: ImageTokenizer
    target: ImageDecoder


class Encoded(NamedTuple):
    """Images as tokens, (images, image_tokens), int16, and their classes, (images,)."""

    tokens: Tensor
    labels: Tensor


def load_frozen(folder: Path, device: torch.device) -> Frozen:
    """Load tokenizer and target of a folder; no draft need be there."""
    config = ImageModelConfig.load(folder)
    frozen = Frozen(ImageTokenizer(config.tokenizer), ImageDecoder(config.target))
    load_weights(frozen.tokenizer, folder / "tokenizer.safetensors", device)
    load_weights(frozen.target, folder / "model.safetensors", device)
    return frozen


def encode_range(
    tokenizer: ImageTokenizer,
    count: int,
    split: str,
    *,
    first: int = 0,
    batch: int,
    device: torch.device,
    until: float | None = None,
) -> Encoded:
    """Render and encode images `first` to `first + count`, fewer when the time is over.

    Args:
        tokenizer: Of the target.
        count, split, first: See `render_range`.
        batch: Images encoded at a time.
        device: Where to.
        until: `time.monotonic` after which no more are begun.
    """
    tokens, labels = list[Tensor](), list[Tensor]()
    have = 0
    while have < count and (not have or until is None or time.monotonic() < until):
        size = min(8 * batch, count - have)
        images, classes = render_range(size, split, first=first + have, device=device)
        tokens += [tokenizer.encode(part).to(torch.int16) for part in images.split(batch)]
        labels.append(classes)
        have += size
    return Encoded(torch.cat(tokens), torch.cat(labels))


def features_of(target: ImageDecoder, labels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return features and logits of whole images read at once.

    Args:
        target: The frozen target.
        labels: Class ids, (images,).
        tokens: (images, image_tokens).

    Returns:
        Features of [class, token 0, …] but the last token, (images, image_tokens, width), and the
        logits they give, those of token 0, 1, …, float32.
    """
    inputs = torch.cat([target.embed_classes(labels), target.embed_tokens(tokens[:, :-1])], 1)
    out = target(inputs)
    return out.hidden, out.logits


def drafting_loss(guesses: Tensor, drafted: Tensor, features: Tensor, logits: Tensor) -> Tensor:
    """Return EAGLE's loss, a mean over all positions.

    Args:
        guesses: Guessed features, (…, width).
        drafted: Logits of the guesses, (…, vocabulary).
        features: The target's, (…, width).
        logits: The target's, (…, vocabulary).
    """
    distance = F.smooth_l1_loss(guesses.float(), features.float())
    law = logits.float().softmax(-1)
    crossing = -(law * drafted.float().log_softmax(-1)).sum(-1).mean()
    return distance + LAW_WEIGHT * crossing


def train(
    arguments: argparse.Namespace, device: torch.device, sizes: Sizes, begin: float
) -> dict[str, object]:
    """Train and save the drafter; return what is known about the run."""
    seed_everything(arguments.seed)
    out: Path = arguments.out
    limit: float | None = arguments.max_seconds
    frozen = load_frozen(arguments.target, device)
    target = frozen.target
    data = encode_range(
        frozen.tokenizer,
        sizes.images,
        "train",
        batch=sizes.encoded,
        device=device,
        until=None if limit is None else begin + ENCODED_BY * limit,
    )
    held_out = encode_range(
        frozen.tokenizer, 64, "validation", first=100_000, batch=sizes.encoded, device=device
    )
    print(f"{len(data.tokens)} images encoded, {time.monotonic() - begin:.0f} s", flush=True)
    drafter = FeatureDrafter(target.config).to(device)
    average = AveragedWeights(drafter)
    optimizer = torch.optim.AdamW(
        drafter.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=device.type == "cuda"
    )
    generator = torch.Generator(device).manual_seed(arguments.seed)

    def read(labels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return features_of(target, labels, tokens)

    def loss_of(tokens: Tensor, given: Tensor, features: Tensor, logits: Tensor) -> Tensor:
        guesses = drafter(target.embed_tokens(tokens[:, :-1]), given[:, :-1])
        drafted = target.output(guesses)
        return drafting_loss(guesses, drafted, features[:, 1:], logits[:, 1:])

    reader, loss_function = read, loss_of
    if arguments.compile:
        reader, loss_function = torch.compile(read), torch.compile(loss_of)
    spread = NOISE * 512 / target.config.image_tokens

    def batch_loss() -> Tensor:
        chosen = torch.randint(len(data.tokens), (sizes.batch,), device=device, generator=generator)
        tokens = data.tokens[chosen].long()
        dropped = torch.rand(sizes.batch, device=device, generator=generator) < CLASS_DROPPED
        labels = torch.where(dropped, target.null_class, data.labels[chosen])
        with torch.autocast(device.type, torch.bfloat16, enabled=sizes.autocast):
            with torch.no_grad():
                features, logits = reader(labels, tokens)
            noise = torch.rand(features.shape, device=device, generator=generator) - 0.5
            return loss_function(tokens, features + spread * noise, features, logits)

    # Compiles before the clock starts, so that the schedule knows only training.
    batch_loss().backward()
    optimizer.zero_grad(set_to_none=True)
    print(f"first loss after {time.monotonic() - begin:.0f} s", flush=True)
    curve = Curve(out / "drafter_curve.csv", ("loss", "held_out_acceptance"))
    left = None if limit is None else max(1.0, TRAINED_BY * limit - (time.monotonic() - begin))
    clock = Clock(sizes.steps, left)
    spoken = 0.0
    for step, progress in clock:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * cosine(progress, warmup=0.03)
        loss = batch_loss()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_value_(drafter.parameters(), CLIP_VALUE)
        optimizer.step()
        average.update(drafter)
        if step == 0 or clock.seconds - spoken > PRINT_EVERY_SECONDS:
            spoken = clock.seconds
            found = acceptance_by_depth(target, drafter, held_out, depths=1)[0].acceptance
            print(f"step {step} {spoken:.0f}s loss {loss.item():.4f} {found:.4f}", flush=True)
            curve.add("drafter", step, spoken, loss=loss.item(), held_out_acceptance=found)
    average.copy_to(drafter)
    size = save_half(drafter.state_dict(), out / "drafter.safetensors")
    return {
        "parameters": sum(parameter.numel() for parameter in drafter.parameters()),
        "bytes": size,
        "images": len(data.tokens),
        "steps": clock.done,
        "batch": sizes.batch,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
    }


class DepthQuality(NamedTuple):
    """How well guesses of one depth foretell the target's law on given images.

    Attributes:
        acceptance: Mean of 1 - TV(target's law, drafter's law): the chance that speculative
            sampling takes one drawn token.
        top1: Share of positions where both laws have the same most likely token.
        top10: Share where the target's most likely token is among the drafter's ten.
        loss: Drafter's negative log-likelihood of the images' tokens, nats a token.
        target_loss: The target's, at the same positions.
    """

    acceptance: float
    top1: float
    top10: float
    loss: float
    target_loss: float


@torch.no_grad()
def acceptance_by_depth(
    target: ImageDecoder,
    drafter: FeatureDrafter,
    images: Encoded,
    *,
    depths: int = DEPTHS,
    guidance_scale: float = 1.0,
    batch: int = 50,
) -> list[DepthQuality]:
    """Measure guesses 1, 2, … steps behind the target's last feature, on the images' own tokens.

    All positions at once: the guesses of depth d at index i see the target's features up to index
    i - d + 1 and their own chain of guesses, which is a mask of a triangle and diagonals.

    Args:
        target: The frozen target.
        drafter: Of its features.
        images: Held-out ones.
        depths: Chains' length.
        guidance_scale: Above 1 both laws are merged from a doubled batch.
        batch: Images at a time.

    Returns:
        One entry a depth.
    """
    device = target.output.weight.device
    doubled = guidance_scale != 1
    count = target.config.image_tokens - 1
    sums = torch.zeros(depths, 6, dtype=torch.float64)
    for part, classes in zip(images.tokens.split(batch), images.labels.split(batch), strict=True):
        tokens = part.long()
        labels = classes
        if doubled:
            labels = torch.cat([classes, torch.full_like(classes, target.null_class)])
        features, logits = features_of(target, labels, tokens.repeat(1 + doubled, 1))
        merged = guided(logits, guidance_scale) if doubled else logits
        laws = merged.softmax(-1)
        embedded = target.embed_tokens(tokens.repeat(1 + doubled, 1))
        cache = KVCache(drafter.config, len(labels), depths * count, device=device)
        past = torch.ones(count, count, dtype=torch.bool, device=device).tril()
        given = features[:, :-1]
        for depth in range(depths):
            # Row i reads token i + depth behind `depth` guesses: only rows that stay in the image.
            rows = count - depth
            own = torch.eye(rows, dtype=torch.bool, device=device)
            guesses = drafter(
                embedded[:, depth : depth + rows],
                given[:, :rows],
                torch.arange(rows, device=device) + 1 + depth,
                cache=cache,
                mask=torch.cat([past[:rows], own], 1) if depth else past,
            )
            given = guesses
            if depth:
                past = torch.cat([past[:rows], own], 1)
            drafted = target.output(guesses).float()
            drafted = guided(drafted, guidance_scale) if doubled else drafted
            law = laws[:, 1 + depth : 1 + depth + rows]
            wanted = tokens[:, 1 + depth : 1 + depth + rows, None]
            guess = drafted.softmax(-1)
            best = law.argmax(-1, keepdim=True)
            values = (
                torch.minimum(law, guess).sum(-1),
                drafted.argmax(-1, keepdim=True) == best,
                (drafted.topk(min(10, drafted.shape[-1])).indices == best).any(-1),
                -drafted.log_softmax(-1).gather(-1, wanted),
                -law.gather(-1, wanted).clamp_min(1e-30).log(),
                torch.ones(len(tokens), rows, device=device),
            )
            sums[depth] += torch.tensor([value.double().sum().item() for value in values])
    means = sums[:, :5] / sums[:, 5:]
    return [DepthQuality(*row) for row in means.tolist()]


def evaluate(frozen: Frozen, folder: Path, device: torch.device, sizes: Sizes) -> dict[str, float]:
    """Measure the saved fp16 weights on held-out images."""
    drafter = load_drafter(folder, frozen.target.config, device)
    images = encode_range(
        frozen.tokenizer,
        sizes.held_out,
        "validation",
        first=HELD_OUT_FIRST,
        batch=sizes.encoded,
        device=device,
    )
    quality = dict[str, float]()
    for scale in GUIDANCE:
        found = acceptance_by_depth(frozen.target, drafter, images, guidance_scale=scale)
        for depth, values in enumerate(found, 1):
            for name, value in values._asdict().items():
                quality[f"guidance_{scale:g}_depth_{depth}_{name}"] = value
    return quality


def main() -> None:
    """Run the recipe."""
    parser = recipe_parser(__doc__)
    parser.add_argument(
        "--target", type=Path, required=True, help="folder of the trained tokenizer and target"
    )
    arguments = parser.parse_args()
    begin = time.monotonic()
    out: Path = arguments.out
    device = torch.device(arguments.device)
    sizes = scaled(SIZES, SMOKE, device, arguments.steps_scale)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "drafter_quality.json"
    if arguments.eval_only:
        facts = json.loads(path.read_text(encoding="utf-8"))
    else:
        facts = train(arguments, device, sizes, begin)
        facts["seconds"] = round(time.monotonic() - begin, 1)
    quality = evaluate(load_frozen(arguments.target, device), out, device, sizes)
    text = json.dumps(facts | quality, indent=2) + "\n"
    path.write_text(text, encoding="utf-8")
    print(f"done {text}", flush=True)


if __name__ == "__main__":
    main()
