"""Train tokenizer, target and draft: `python -m models.embedded.tiny_ar_image.train --out DIR`.

Stages: a small classifier whose frozen features shape the tokenizer's loss (not the network that
scores, and not kept), the tokenizer, the tokens of all training images, the target, the draft.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.embedded.digits_cnn64.model import frechet_distance, load_extractor, read, weights_label
from models.embedded.tiny_ar_image.data import CLASSES, render_range
from models.embedded.tiny_ar_image.model import (
    DecoderConfig,
    ImageDecoder,
    ImageModel,
    ImageModelConfig,
    ImageTokenizer,
    TokenizerConfig,
    guided,
    load_image_model,
    sample_tokens,
    to_unit,
)
from models.embedded.training import (
    AveragedWeights,
    Clock,
    Curve,
    cosine,
    recipe_parser,
    save_half,
    seed_everything,
)

# Shares of --max-seconds; what is left over is for rendering and for the evaluation.
SHARES = {"loss network": 0.025, "tokenizer": 0.25, "tokens": 0.04, "target": 0.50, "draft": 0.09}
CHECKPOINT_SECONDS = 90.0


class LossNetwork(nn.Module):
    """A classifier of other shape, seed and training than the scoring one; features for a loss."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = (3, 32, 48, 64, 96)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride=1 if number == 0 else 2, padding=1),
                nn.GroupNorm(8, outputs),
                nn.GELU(),
            )
            for number, (inputs, outputs) in enumerate(itertools.pairwise(widths))
        )
        self.head = nn.Linear(widths[-1] * 4, classes)

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the maps of all stages."""
        maps = []
        for stage in self.stages:
            images = stage(images)
            maps.append(images)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, from averages over quarters of the image."""
        out: Tensor = self.head(F.adaptive_avg_pool2d(self.features(images)[-1], 2).flatten(1))
        return out


def feature_distance(network: LossNetwork, first: Tensor, second: Tensor) -> Tensor:
    """Return the mean squared distance of feature maps, channels scaled to length one."""
    total = torch.zeros((), device=first.device)
    with torch.no_grad():
        wanted = network.features(second)
    for a, b in zip(network.features(first), wanted, strict=True):
        total = (
            total
            + (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(1).mean()
        )
    return total


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Sizes of a run.

    Attributes:
        model: Sizes of the three networks.
        images: Rendered images that the tokenizer sees.
        token_images: Images whose tokens the decoders see, the former among them.
        tokenizer_batch: Images a step of the tokenizer.
        decoder_batch: Images a step of the decoders.
        steps: Steps of each stage.
        samples: Images sampled for each score.
        reference: Images of the reference of the distances.
        autocast: Whether matrix products run in bfloat16.
    """

    model: ImageModelConfig
    images: int
    token_images: int
    tokenizer_batch: int
    decoder_batch: int
    steps: Mapping[str, int]
    samples: int
    reference: int
    autocast: bool = True


PRESETS = MappingProxyType(
    {
        "gpu": Preset(
            model=ImageModelConfig(),
            images=60_000,
            token_images=400_000,
            tokenizer_batch=128,
            decoder_batch=128,
            steps={"loss network": 800, "tokenizer": 10_000, "target": 16_000, "draft": 6_000},
            samples=2000,
            reference=10_000,
        ),
        # A night on two cores; a fifth of the target's parameters and a tenth of its images.
        # In single precision: bfloat16 took seven times as long where no matrix unit was used.
        "cpu": Preset(
            model=ImageModelConfig(
                tokenizer=TokenizerConfig(channels=16, latent_channels=32),
                target=DecoderConfig(width=128, layers=4, heads=4),
                draft=DecoderConfig(width=96, layers=1, heads=3),
            ),
            images=20_000,
            token_images=40_000,
            tokenizer_batch=32,
            decoder_batch=32,
            steps={"loss network": 400, "tokenizer": 3_000, "target": 6_000, "draft": 3_000},
            samples=2000,
            reference=10_000,
            autocast=False,
        ),
        "smoke": Preset(
            model=ImageModelConfig(
                tokenizer=TokenizerConfig(
                    codebook_size=64,
                    channels=8,
                    multipliers=(1, 1, 2),
                    latent_channels=16,
                    groups=4,
                ),
                target=DecoderConfig(vocab_size=64, width=32, layers=2, heads=2),
                draft=DecoderConfig(vocab_size=64, width=16, layers=1, heads=1),
            ),
            images=200,
            token_images=400,
            tokenizer_batch=8,
            decoder_batch=4,
            steps={"loss network": 800, "tokenizer": 10_000, "target": 16_000, "draft": 6_000},
            samples=40,
            reference=400,
            autocast=False,
        ),
    }
)


class Recipe:
    """Settings and state that the stages share."""

    def __init__(
        self,
        out: Path,
        *,
        device: str,
        seed: int,
        preset: Preset,
        steps_scale: float = 1.0,
        max_seconds: float | None = None,
        compiled: bool = False,
    ) -> None:
        self.out = out
        self.device = device
        self.preset = preset
        self.steps_scale = steps_scale
        self.max_seconds = max_seconds
        self.compiled = compiled
        self.begun = time.monotonic()
        self.generator = torch.Generator(device).manual_seed(seed)
        self.curve: Curve | None = None
        self.stage_seconds: dict[str, float] = {}
        self.stage_steps: dict[str, int] = {}

    @property
    def seconds(self) -> float:
        """Wall time since the start."""
        return time.monotonic() - self.begun

    def allowed(self, stage: str) -> float | None:
        """Return the seconds that a stage may take; None when there is no limit."""
        return None if self.max_seconds is None else SHARES[stage] * self.max_seconds

    def clock(self, stage: str) -> Clock:
        """Return the clock of a stage."""
        steps = max(2, round(self.preset.steps[stage] * self.steps_scale))
        return Clock(steps, self.allowed(stage))

    def finish(self, stage: str, clock: Clock) -> None:
        """Note what a stage took."""
        self.stage_seconds[stage] = round(clock.seconds, 1)
        self.stage_steps[stage] = clock.done
        print(f"{stage}: {clock.done} steps in {clock.seconds:.1f} s", flush=True)

    def autocast(self) -> AbstractContextManager[object]:
        """Return bfloat16 autocast, if the preset wants it."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.preset.autocast)

    def optimizer(self, module: nn.Module, rate: float, decay: float) -> torch.optim.AdamW:
        """Return AdamW with decay on matrices only."""
        groups = [
            {"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in module.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=self.device != "cpu")

    def report(self, stage: str, clock: Clock, step: int, **values: float) -> None:
        """Print a line and add it to the curve."""
        text = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(f"{stage} step {step} {clock.seconds:.0f}s {text}", flush=True)
        if self.curve is not None:
            self.curve.add(stage, step, clock.seconds, **values)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def train_loss_network(recipe: Recipe, pixels: Tensor, labels: Tensor) -> LossNetwork:
    """Train the classifier behind the feature loss and freeze it."""
    network = LossNetwork(len(CLASSES)).to(recipe.device)
    optimizer = recipe.optimizer(network, 2e-3, 0.01)
    clock = recipe.clock("loss network")
    batch = 2 * recipe.preset.tokenizer_batch
    for step, progress in clock:
        set_rate(optimizer, 2e-3 * cosine(progress, warmup=0.05))
        chosen = _choose(recipe, len(pixels), batch)
        with recipe.autocast():
            logits = network(to_unit(pixels[chosen]))
        loss = F.cross_entropy(logits.float(), labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 200 == 0:
            recipe.report("loss network", clock, step, loss=loss.item())
    recipe.finish("loss network", clock)
    return network.eval().requires_grad_(False)


def _choose(recipe: Recipe, count: int, batch: int) -> Tensor:
    return torch.randint(count, (batch,), device=recipe.device, generator=recipe.generator)


class CodebookAverages:
    """Codes as running means of the vectors that chose them; unused codes start again.

    The running mean is brought back to length one. It needs no codebook loss and settles faster
    than a gradient; a code whose running use falls under a hundredth of its fair share becomes a
    vector of the present batch.
    """

    def __init__(self, tokenizer: ImageTokenizer, decay: float = 0.99) -> None:
        weight = tokenizer.quantize.embedding.weight
        self.decay = decay
        self.sums = weight.detach().clone()
        self.uses = torch.ones(len(weight), device=weight.device)

    @torch.no_grad()
    def start(self, tokenizer: ImageTokenizer, vectors: Tensor, generator: torch.Generator) -> None:
        """Place all codes on vectors of a batch."""
        self._replace(torch.ones_like(self.uses, dtype=torch.bool), vectors, generator)
        tokenizer.quantize.embedding.weight.copy_(F.normalize(self.sums, dim=-1))

    @torch.no_grad()
    def update(
        self,
        tokenizer: ImageTokenizer,
        vectors: Tensor,
        tokens: Tensor,
        generator: torch.Generator,
        *,
        restart: bool,
    ) -> None:
        """Move the codes towards the vectors (places, code_dim) that chose them."""
        uses = torch.zeros_like(self.uses).index_add_(
            0, tokens, torch.ones_like(tokens, dtype=self.uses.dtype)
        )
        sums = torch.zeros_like(self.sums).index_add_(0, tokens, vectors)
        # In units of the fair share of a batch, so that the threshold knows no batch size.
        fair = len(tokens) / len(self.uses)
        self.uses.lerp_(uses / fair, 1 - self.decay)
        self.sums.lerp_(sums / fair, 1 - self.decay)
        if restart:
            self._replace(self.uses < 0.01, vectors, generator)
        tokenizer.quantize.embedding.weight.copy_(F.normalize(self.sums, dim=-1))

    def _replace(self, dead: Tensor, vectors: Tensor, generator: torch.Generator) -> None:
        chosen = torch.randint(
            len(vectors), (len(self.uses),), device=vectors.device, generator=generator
        )
        fresh = F.normalize(
            vectors[chosen]
            + 0.01 * torch.randn(self.sums.shape, device=vectors.device, generator=generator),
            dim=-1,
        )
        self.sums = torch.where(dead[:, None], fresh, self.sums)
        self.uses = torch.where(dead, torch.ones_like(self.uses), self.uses)


def train_tokenizer(
    recipe: Recipe, pixels: Tensor, network: LossNetwork, held_out: Tensor
) -> ImageTokenizer:
    """Train the tokenizer: L1 + MSE + feature loss + commitment; return the averaged weights."""
    tokenizer = ImageTokenizer(recipe.preset.model.tokenizer).to(recipe.device)
    if recipe.device != "cpu":
        tokenizer = tokenizer.to(memory_format=torch.channels_last)
    tokenizer.quantize.requires_grad_(False)
    averages = CodebookAverages(tokenizer)
    weights = AveragedWeights(tokenizer, 0.998)
    trained = [parameter for parameter in tokenizer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=8e-4, betas=(0.9, 0.95), weight_decay=1e-3, fused=recipe.device != "cpu"
    )
    encode, decode = tokenizer.vectors, tokenizer.decode_vectors
    if recipe.compiled:
        encode, decode = torch.compile(encode), torch.compile(decode)
    clock = recipe.clock("tokenizer")
    batch = recipe.preset.tokenizer_batch
    spoken = saved = 0.0
    for step, progress in clock:
        set_rate(optimizer, 8e-4 * cosine(progress, warmup=0.02))
        images = to_unit(pixels[_choose(recipe, len(pixels), batch)])
        if recipe.device != "cpu":
            images = images.contiguous(memory_format=torch.channels_last)
        with recipe.autocast():
            vectors = encode(images)
        flat = vectors.detach().flatten(0, 2)
        if step == 0:
            averages.start(tokenizer, flat, recipe.generator)
        with torch.no_grad():
            tokens = tokenizer.nearest(vectors)
            codes = tokenizer.codebook[tokens]
        straight = vectors + (codes - vectors).detach()
        with recipe.autocast():
            rebuilt = decode(straight)
            perceived = feature_distance(network, rebuilt, images)
        rebuilt = rebuilt.float()
        pixel = (rebuilt - images).abs().mean() + 2 * (rebuilt - images).square().mean()
        commitment = (vectors - codes).square().sum(-1).mean()
        loss = pixel + 0.25 * perceived + 0.1 * commitment
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        restart = step % 50 == 49 and progress < 0.7
        averages.update(tokenizer, flat, tokens.flatten(), recipe.generator, restart=restart)
        weights.update(tokenizer)
        if step == 0 or clock.seconds - spoken > 10:
            spoken = clock.seconds
            used = (averages.uses > 0.01).float().mean().item()
            recipe.report(
                "tokenizer", clock, step, loss=loss.item(), detail=pixel.item(), validation=used
            )
        if clock.seconds - saved > CHECKPOINT_SECONDS:
            saved = clock.seconds
            save_half(tokenizer.state_dict(), recipe.out / "tokenizer.safetensors")
    # Encoder, codes and decoder are averaged alike, so they still fit each other.
    weights.copy_to(tokenizer)
    tokenizer = tokenizer.eval().requires_grad_(False)
    with torch.no_grad():
        weight = tokenizer.quantize.embedding.weight
        weight.copy_(F.normalize(weight, dim=-1))
    save_half(tokenizer.state_dict(), recipe.out / "tokenizer.safetensors")
    # The decoders must learn the codes of the weights that are kept.
    halved = {
        name: value.half().float() if value.is_floating_point() else value
        for name, value in tokenizer.state_dict().items()
    }
    tokenizer.load_state_dict(halved)
    tokens = encode_all(recipe, tokenizer, held_out)
    error = (
        (to_unit(tokenizer.decode(tokens[:500].long())) - to_unit(held_out[:500])).square().mean()
    )
    recipe.report("tokenizer", clock, clock.done, validation=error.item())
    recipe.finish("tokenizer", clock)
    return tokenizer


@torch.no_grad()
def encode_all(recipe: Recipe, tokenizer: ImageTokenizer, pixels: Tensor) -> Tensor:
    """Return the tokens of uint8 images, (images, tokens), int16, in single precision."""
    batch = 50 if recipe.device == "cpu" else 500
    return torch.cat([tokenizer.encode(part).to(torch.int16) for part in pixels.split(batch)])


def gather_tokens(
    recipe: Recipe, tokenizer: ImageTokenizer, pixels: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Encode the images at hand, then render and encode more while the time lasts."""
    clock = Clock(1)
    allowed = recipe.allowed("tokens")
    tokens, classes = [encode_all(recipe, tokenizer, pixels)], [labels]
    wanted = recipe.preset.token_images
    have = len(pixels)
    while have < wanted and (allowed is None or clock.seconds < allowed):
        more, more_labels = render_range(
            min(4000, wanted - have), "train", first=have, device=recipe.device
        )
        tokens.append(encode_all(recipe, tokenizer, more))
        classes.append(more_labels)
        have += len(more)
    print(f"tokens of {have} images in {clock.seconds:.1f} s", flush=True)
    recipe.stage_seconds["tokens"] = round(clock.seconds, 1)
    recipe.stage_steps["tokens"] = have
    return torch.cat(tokens), torch.cat(classes)


def train_decoder(
    recipe: Recipe,
    stage: str,
    config: DecoderConfig,
    name: str,
    rate: float,
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
) -> ImageDecoder:
    """Train a decoder on tokens, one class in ten dropped; save and return averaged weights."""
    model = ImageDecoder(config).to(recipe.device)
    average = AveragedWeights(model, 0.999)
    optimizer = recipe.optimizer(model, rate, 0.05)
    run: Callable[[Tensor, Tensor], Tensor] = model.sequence_logits
    if recipe.compiled:
        run = torch.compile(run)
    clock = recipe.clock(stage)
    tokens, labels = train
    batch = recipe.preset.decoder_batch
    spoken = saved = 0.0
    for step, progress in clock:
        set_rate(optimizer, rate * cosine(progress, warmup=0.02))
        chosen = _choose(recipe, len(tokens), batch)
        wanted = tokens[chosen].long()
        dropped = torch.rand(batch, device=recipe.device, generator=recipe.generator) < 0.1
        condition = torch.where(dropped, model.null_class, labels[chosen])
        with recipe.autocast():
            logits = run(condition, wanted)
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model)
        if step == 0 or clock.seconds - spoken > 10:
            spoken = clock.seconds
            with torch.no_grad(), recipe.autocast():
                some = held_out[0][:256].long()
                checked = F.cross_entropy(
                    model.sequence_logits(held_out[1][:256], some).flatten(0, 1), some.flatten()
                )
            recipe.report(stage, clock, step, loss=loss.item(), validation=checked.item())
        if clock.seconds - saved > CHECKPOINT_SECONDS:
            saved = clock.seconds
            _save_average(average, config, recipe.out / f"{name}.safetensors")
    average.copy_to(model)
    save_half(model.state_dict(), recipe.out / f"{name}.safetensors")
    recipe.finish(stage, clock)
    return model.eval().requires_grad_(False)


def _save_average(average: AveragedWeights, config: DecoderConfig, path: Path) -> None:
    copy = ImageDecoder(config)
    average.copy_to(copy)
    save_half(copy.state_dict(), path)


# -------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def token_statistics(
    model: ImageDecoder, tokens: Tensor, labels: Tensor, guidance_scale: float = 1.0
) -> dict[str, float]:
    """Return how flat the next-token laws are on given images.

    Returns:
        `median_top1`, shares of positions under 0.1 and 0.05, mean entropy and mean negative
        log-likelihood in nats a token.
    """
    tops, entropies, losses = [], [], []
    for part, condition in zip(tokens.long().split(50), labels.split(50), strict=True):
        if guidance_scale == 1:
            logits = model.sequence_logits(condition, part)
        else:
            null = torch.full_like(condition, model.null_class)
            doubled = model.sequence_logits(torch.cat([condition, null]), part.repeat(2, 1))
            logits = guided(doubled, guidance_scale)
        logs = logits.log_softmax(-1)
        tops.append(logs.amax(-1).exp().flatten().cpu())
        entropies.append(-(logs.exp() * logs).sum(-1).mean().cpu())
        losses.append(-logs.gather(-1, part[..., None]).mean().cpu())
    top = torch.cat(tops)
    return {
        "median_top1": top.median().item(),
        "share_top1_below_0.1": (top < 0.1).float().mean().item(),
        "share_top1_below_0.05": (top < 0.05).float().mean().item(),
        "entropy": torch.stack(entropies).mean().item(),
        "nll": torch.stack(losses).mean().item(),
    }


@torch.no_grad()
def swapped_images(
    tokenizer: ImageTokenizer, tokens: Tensor, share: float = 0.1
) -> tuple[Tensor, Tensor, Tensor]:
    """Return images decoded as they are, with neighbouring codes, and with random codes.

    The same places, `share` of all, are swapped in both.
    """
    tokens = tokens.long()
    codebook = tokenizer.codebook
    likeness = codebook @ codebook.T
    likeness.fill_diagonal_(-2)
    neighbour = likeness.argmax(-1)
    generator = torch.Generator().manual_seed(0)
    swap = (torch.rand(tokens.shape, generator=generator) < share).to(tokens.device)
    step = torch.randint(1, len(codebook), tokens.shape, generator=generator).to(tokens.device)
    # A random code that is not the code itself.
    other = (tokens + step) % len(codebook)
    return (
        tokenizer.decode(tokens),
        tokenizer.decode(torch.where(swap, neighbour[tokens], tokens)),
        tokenizer.decode(torch.where(swap, other, tokens)),
    )


def change(first: Tensor, second: Tensor) -> float:
    """Return the root mean squared difference of uint8 images, in [0, 255]."""
    return (first.float() - second.float()).square().mean().sqrt().item()


def draw(
    models: ImageModel,
    which: ImageDecoder,
    count: int,
    guidance_scale: float,
    *,
    batch: int,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample images of classes in turn; return images, tokens and labels."""
    device = which.output.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    labels = torch.arange(count, device=device) % which.config.classes
    tokens = torch.cat(
        [
            sample_tokens(which, part, guidance_scale=guidance_scale, generator=generator)
            for part in labels.split(batch)
        ]
    )
    images = torch.cat([models.tokenizer.decode(part) for part in tokens.split(100)])
    return images, tokens, labels


def evaluate(recipe: Recipe, extractor_folder: Path) -> dict[str, object]:
    """Measure the saved fp16 weights, write `quality.json` after each part, and the sheets."""
    models = load_image_model(recipe.out, recipe.device)
    count = recipe.preset.samples
    quality: dict[str, object] = {
        "target_parameters": sum(p.numel() for p in models.target.parameters()),
        "draft_parameters": sum(p.numel() for p in models.draft.parameters()),
        "tokenizer_parameters": sum(p.numel() for p in models.tokenizer.parameters()),
        "stage_seconds": recipe.stage_seconds,
        "stage_steps": recipe.stage_steps,
    }
    earlier = recipe.out / "quality.json"
    if not recipe.stage_seconds and earlier.is_file():
        found = json.loads(earlier.read_text(encoding="utf-8"))
        quality.update({key: found.get(key, {}) for key in ("stage_seconds", "stage_steps")})

    def write() -> None:
        text = json.dumps(quality, indent=2) + "\n"
        (recipe.out / "quality.json").write_text(text, encoding="utf-8")

    images, labels = render_range(count, "validation", device=recipe.device)
    tokens = encode_all(recipe, models.tokenizer, images)
    rebuilt = torch.cat([models.tokenizer.decode(part.long()) for part in tokens.split(100)])
    error = (to_unit(rebuilt) - to_unit(images)).square().mean()
    plain, near, far = swapped_images(models.tokenizer, tokens[:100])
    near_change, far_change = change(plain, near), change(plain, far)
    quality["tokenizer"] = {
        "images": count,
        "psnr_db": (10 * torch.log10(4 / error)).item(),
        "codebook_usage": len(tokens.unique()) / models.tokenizer.config.codebook_size,
        "neighbour_swap_change": near_change,
        "random_swap_change": far_change,
    }
    write()
    few = min(count, 400)
    laws = {
        "target": token_statistics(models.target, tokens[:few], labels[:few]),
        "target_guidance_1.5": token_statistics(models.target, tokens[:few], labels[:few], 1.5),
        "draft": token_statistics(models.draft, tokens[:few], labels[:few]),
    }
    quality["token_laws"] = laws
    flat = laws["target"]
    gates: dict[str, bool] = {
        "median top-1 < 0.3": flat["median_top1"] < 0.3,
        "30 % of positions with top-1 < 0.1": flat["share_top1_below_0.1"] >= 0.3,
        "codebook usage > 0.8": len(tokens.unique()) > 0.8 * models.tokenizer.config.codebook_size,
        "neighbour swap changes less than random swap": near_change < far_change,
    }
    quality["gates"] = gates
    write()
    contact_sheet([plain[:20], near[:20], far[:20]], recipe.out / "swaps.png")
    contact_sheet(
        [images[:20], rebuilt[:20], images[20:40], rebuilt[20:40]],
        recipe.out / "reconstructions.png",
    )

    batch = 500 if recipe.device != "cpu" else 50
    drawn = {}
    for label, which, scale in (
        ("target w=1.5", models.target, 1.5),
        ("target w=1", models.target, 1.0),
        ("draft w=1.5", models.draft, 1.5),
    ):
        begun = time.monotonic()
        drawn[label] = draw(models, which, count, scale, batch=batch)
        print(f"sampled {count} images, {label}, {time.monotonic() - begun:.1f} s", flush=True)
        if label == "target w=1.5":
            contact_sheet(list(drawn[label][0][:200].split(20)), recipe.out / "samples.png")
    quality["sampled_nll"] = {
        label: token_statistics(models.target, some[:few], classes[:few])["nll"]
        for label, (_, some, classes) in drawn.items()
    }
    write()
    if not (extractor_folder / "model.safetensors").is_file():
        print(f"no extractor in {extractor_folder}: distances are left out", flush=True)
        return quality
    extractor = load_extractor(extractor_folder, recipe.device)
    size = recipe.preset.reference
    reference = read(extractor, render_range(size, "reference", device=recipe.device)[0]).features
    distances, accuracies = {}, {}
    sets = {
        "originals": images,
        "reconstructions": rebuilt,
        **{label: made[0] for label, made in drawn.items()},
    }
    for label, some in sets.items():
        reading = read(extractor, some)
        if len(some) >= 128:
            distances[label] = frechet_distance(reading.features, reference)
        accuracies[label] = (reading.logits.argmax(1) == labels.cpu()).float().mean().item()
    quality["fd"] = {
        "name": f"fd[{weights_label(extractor_folder)} | ref=reference:{size} | n={count}]",
        **distances,
    }
    quality["class_accuracy"] = accuracies
    gates["class accuracy at w=1.5 >= 0.85"] = accuracies["target w=1.5"] >= 0.85
    gates["accuracy on reconstructions within 2 points"] = (
        abs(accuracies["originals"] - accuracies["reconstructions"]) <= 0.02
    )
    if distances:
        bound = 2 * distances["reconstructions"]
        gates["fd at w=1 <= 2 rfd"] = distances["target w=1"] <= bound
        gates["fd at w=1.5 <= 2 rfd"] = distances["target w=1.5"] <= bound
    write()
    return quality


def contact_sheet(rows: list[Tensor], path: Path) -> None:
    """Write rows of images of equal size as a PNG."""
    from PIL import Image

    sheet = torch.cat([torch.cat(list(row.cpu()), dim=2) for row in rows], dim=1)
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(path, optimize=True)


def main() -> None:
    """Run the recipe."""
    parser = recipe_parser(__doc__)
    parser.add_argument(
        "--extractor",
        type=Path,
        default=Path(__file__).parents[1] / "digits_cnn64",
        help="folder of the extractor that scores samples",
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), help="by the device when left out")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    seed_everything(arguments.seed)
    name = arguments.preset
    if name is None:
        # A run this short is a test of the recipe; it need not hold the real sizes.
        by_device = "cpu" if arguments.device == "cpu" else "gpu"
        name = "smoke" if arguments.steps_scale < 0.05 else by_device
    recipe = Recipe(
        arguments.out,
        device=arguments.device,
        seed=arguments.seed,
        preset=PRESETS[name],
        steps_scale=arguments.steps_scale,
        max_seconds=arguments.max_seconds,
        compiled=arguments.compile,
    )
    if not arguments.eval_only:
        recipe.curve = Curve(arguments.out / "curve.csv", ("loss", "detail", "validation"))
        train(recipe)
    quality = evaluate(recipe, arguments.extractor)
    print(json.dumps(quality.get("gates"), indent=1), flush=True)
    print(f"done in {recipe.seconds:.0f} s", flush=True)


def train(recipe: Recipe) -> None:
    """Run all stages."""
    preset = recipe.preset
    preset.model.save(recipe.out)
    pixels, labels = render_range(preset.images, "train", device=recipe.device)
    # Far from the images that the evaluation scores.
    held_out, held_out_labels = render_range(
        min(1000, preset.samples), "validation", first=100_000, device=recipe.device
    )
    print(f"{preset.images} images rendered, {recipe.seconds:.1f} s since the start", flush=True)
    network = train_loss_network(recipe, pixels, labels)
    tokenizer = train_tokenizer(recipe, pixels, network, held_out)
    held_out_tokens = encode_all(recipe, tokenizer, held_out)
    data = gather_tokens(recipe, tokenizer, pixels, labels)
    del pixels
    checked = (held_out_tokens, held_out_labels)
    train_decoder(recipe, "target", preset.model.target, "model", 1e-3, data, checked)
    train_decoder(recipe, "draft", preset.model.draft, "draft", 2e-3, data, checked)


if __name__ == "__main__":
    main()
