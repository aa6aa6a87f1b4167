"""The recipe of tiny-detector: tiny-vlm's weights, then boxes, points and outlines as tokens.

    python -m models.embedded.tiny_detector.train --out DIR --device cuda --seed 0 --max-seconds 480

Begins with the weights of `--init` (tiny-vlm's by default): the tower already knows shapes,
colours and places. Where that folder has none, tiny-vlm's vision stage is trained first. Then one
stage trains everything on packed requests: three for boxes, one for points, one for outlines
behind each image. A training that was stopped goes on where it was, when it is started again with
the same arguments.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.embedded.scenes.generator import Scene
from models.embedded.scenes.raster import render
from models.embedded.scenes.raster_torch import Renderer
from models.embedded.tiny_detector import data
from models.embedded.tiny_detector.evaluate import (
    Request,
    ask,
    boxes_of,
    reply_tokens,
    requests,
    score,
    score_outlines,
    score_points,
)
from models.embedded.tiny_detector.rollout import Reply
from models.embedded.tiny_detector.text import (
    ADDED,
    BINS,
    DIALECT,
    FIRST_COORDINATE,
    VOCABULARY_SIZE,
    parse,
)
from models.embedded.tiny_vlm.batches import CHUNK, Store, VisionHeads, vision_labels
from models.embedded.tiny_vlm.evaluate import prompt_start
from models.embedded.tiny_vlm.network import PATCHES, TEXT_WIDTH, Layout, TinyVlm, llava_config
from models.embedded.tiny_vlm.text import BOS, EOS, PAD, write_tokenizer
from models.embedded.training import (
    AveragedWeights,
    Checkpoint,
    Clock,
    Curve,
    cosine,
    recipe_parser,
    save_half,
    seed_everything,
)

TARGET = {"ap50": 0.8, "f1_50": 0.85}
BATCH, RATE, VISION_RATE_SHARE, VISION_LOSS_WEIGHT = 64, 1.2e-3, 0.4, 0.1
STEPS, VISION_BATCH, VISION_STEPS, VISION_SHARE = 14_000, 256, 3_500, 0.2
SMOKE_BATCH = 2
PRINT_EVERY_SECONDS = 10.0
# Of the time that is allowed, for the last evaluation.
EVALUATION_SECONDS = 40.0


class Recipe:
    """The state of one training run; the arguments are those of the command line."""

    def __init__(
        self,
        out: Path,
        init: Path,
        device: torch.device,
        seed: int,
        steps_scale: float,
        max_seconds: float | None,
        workers: int,
        compiled: bool,
    ) -> None:
        began = time.monotonic()
        self.out, self.device, self.seed = out, device, seed
        self.scale, self.max_seconds = steps_scale, max_seconds
        self.small = steps_scale < 0.1
        out.mkdir(parents=True, exist_ok=True)
        seed_everything(seed)
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        self.model = TinyVlm(VOCABULARY_SIZE)
        order_coordinates(self.model)
        self.initialised = take_over(self.model, init)
        recipe = {
            "seed": seed,
            "device": device.type,
            "steps_scale": steps_scale,
            "initialised_from": self.initialised,
            "steps": (VISION_STEPS, STEPS),
        }
        self.checkpoint = Checkpoint(out, recipe)
        # As if there had been no interruption.
        self.begun = began - self.checkpoint.facts.get("seconds", 0.0)
        self.model.to(device)
        self.heads = VisionHeads().to(device)
        self.draws = torch.Generator(device).manual_seed(seed + 1)
        self.renderer = Renderer(data.SIZE, device)
        scenes = CHUNK * (2 if self.small else 800)
        work = [("train", first, CHUNK) for first in range(0, scenes, CHUNK)]
        self.store = Store(work, data.make, {data.SIZE: data.empty(scenes)}, workers, device)
        self.start = prompt_start(device)
        self.layout = Layout(
            len(self.start) + PATCHES, [data.SLOT_TOKENS[k] for k in data.SLOT_KINDS], device
        )
        self.watched = requests("validation", 4 if self.small else 192, "box", all_shapes=True)
        self.averaged: AveragedWeights | None = None
        self.vision, self.logits = self.model.vision, self.model.logits
        if compiled:
            self.vision = torch.compile(self.vision, dynamic=False)
            self.logits = torch.compile(self.logits, dynamic=False)
        columns = ("loss", "f1_50", "ap50")
        self.curve = Curve(out / "curve.csv", columns, self.checkpoint.kept)
        self.quality: dict[str, float] = self.checkpoint.facts.get("validation", {})

    @property
    def seconds(self) -> float:
        """Wall time since the recipe began, without interruptions, seconds."""
        return time.monotonic() - self.begun

    def say(self, text: str) -> None:
        """Print a line with the time."""
        print(f"[tiny_detector {self.seconds:6.1f}s] {text}", flush=True)

    def reduced(self) -> AbstractContextManager[object]:
        """bfloat16 on the GPU, float32 on the CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def run(self) -> None:
        """Train, then evaluate and write everything."""
        self.store.poll(until=64 if self.small else 4096, seconds=120)
        self.say(f"begins with {self.store.ready}; weights from {self.initialised or 'nowhere'}")
        if not self.initialised and "vision" not in self.stages_done:
            self.train("vision", VISION_STEPS, VISION_SHARE)
        self.averaged = AveragedWeights(self.model, 0.998)
        self.train("requests", STEPS, 1.0)
        self.averaged.copy_to(self.model)
        self.save()
        self.checkpoint.remove()
        self.store.close()
        finish(self.model, self.out, self.device, self.small, self.facts())

    @property
    def stages_done(self) -> dict[str, dict[str, float]]:
        """What is known about each stage that is over."""
        return self.checkpoint.facts.setdefault("stages", {})

    def keep(self, stage: str, done: int, clock: Clock, kept: dict, *, now: bool = False) -> None:
        """Write what is needed to go on, now and then or `now`."""
        self.checkpoint.facts |= {"seconds": self.seconds, "validation": self.quality}
        self.checkpoint.save(stage, done, clock, kept, now=now)

    def train(self, stage: str, steps: int, share: float) -> None:
        """Train the tower alone, or everything, for a share of the seconds that are left."""
        groups = self.groups(only_vision=stage == "vision")
        fused = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), fused=fused)
        bases = [group["lr"] for group in groups]
        parameters = [weight for group in groups for weight in group["params"]]
        batch = VISION_BATCH if stage == "vision" else BATCH
        batch = SMOKE_BATCH if self.small else batch
        clock = Clock(max(4, round(steps * self.scale)))
        kept: dict[str, object] = {
            "model": self.model,
            "heads": self.heads,
            "optimizer": optimizer,
            "draws": self.draws,
        }
        if self.averaged is not None:
            kept["average"] = self.averaged
        self.checkpoint.restore(stage, clock, kept)
        if self.max_seconds is not None:
            left = self.max_seconds - (self.seconds - clock.seconds) - EVALUATION_SECONDS
            clock.max_seconds = max(1.0, left * share)
        # The stage before is then in the file as well.
        self.keep(stage, clock.done, clock, kept, now=True)
        examined = saved = clock.seconds
        spoken, spoken_step = -PRINT_EVERY_SECONDS, clock.done
        for step, progress in clock:
            self.store.poll()
            factor = cosine(progress, warmup=0.03)
            for group, base in zip(optimizer.param_groups, bases, strict=True):
                group["lr"] = base * factor
            with self.reduced():
                loss, told = self.loss(batch, only_vision=stage == "vision")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
            optimizer.step()
            if self.averaged is not None:
                self.averaged.update(self.model)
            if clock.seconds - spoken >= PRINT_EVERY_SECONDS:
                value = loss.item()
                pace = (step - spoken_step) / max(clock.seconds - spoken, 1e-9)
                spoken, spoken_step = clock.seconds, step
                text = f"{stage} step {step} progress {progress:.2f} loss {value:.3f}"
                text += f" {pace:.1f} steps/s, {self.store.ready[data.SIZE]} scenes"
                text += "".join(f" {name} {float(share):.2f}" for name, share in told.items())
                self.say(text)
                self.curve.add(stage, step, self.seconds, loss=value)
            if stage == "requests" and clock.seconds - examined > 45:
                self.examine(stage, step)
                examined = clock.seconds
            if clock.seconds - saved > 90:
                self.save()
                saved = clock.seconds
            self.keep(stage, step + 1, clock, kept)
        self.stages_done[stage] = {
            "steps": clock.done,
            "batch": batch,
            "seconds": round(clock.seconds, 1),
        }
        self.say(f"{stage} ends after {clock.done} steps, {clock.seconds:.0f} s")

    def groups(self, *, only_vision: bool) -> list[dict]:
        """Return the parameters with their rates; norms and biases do not decay."""
        vision_rate = RATE if only_vision else RATE * VISION_RATE_SHARE
        parts: list[tuple[nn.Module, float]] = [
            (self.model.model.vision_tower, vision_rate),
            (self.heads, vision_rate),
        ]
        if not only_vision:
            parts += [
                (self.model.model.multi_modal_projector, RATE),
                (self.model.model.language_model, RATE),
                (self.model.lm_head, RATE),
            ]
        groups = []
        for part, rate in parts:
            for decay in (0.0, 0.03):
                chosen = [p for p in part.parameters() if (p.ndim > 1) == (decay > 0)]
                if chosen:
                    groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
        return groups

    def loss(self, batch: int, *, only_vision: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss on fresh images, and what to print beside it."""
        items = self.store.draw(data.SIZE, batch, self.draws)
        raster = self.renderer.render(items.scene)
        seen = self.vision(raster.image)
        pooled = self.model.model.vision_tower.post_layernorm(seen.last[:, 0])
        vision, told = self.heads.loss(seen, pooled, vision_labels(items, raster))
        if only_vision:
            return vision, told
        visual = self.model.project(seen.features)
        tokens = items.tokens.long()
        logits = self.logits(visual, self.start, tokens, self.layout)
        # Of two neighbours in different slots the second is no answer: slots begin with prompts.
        targets = tokens[:, 1:]
        each = F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none"
        )
        weights = items.answer[:, 1:].flatten().float()
        answers = (each * weights).sum() / weights.sum().clamp(min=1)
        return answers + VISION_LOSS_WEIGHT * vision, {"answers": answers.detach()}

    @torch.no_grad()
    def examine(self, stage: str, step: int) -> None:
        """Answer the validation requests and print their scores."""
        begun = time.monotonic()
        with self.reduced():
            replies = ask(self.model, self.watched, self.device, batch=192)
        self.quality = score(self.watched, replies)
        shown = " ".join(f"{name} {value:.3f}" for name, value in self.quality.items())
        self.say(f"  {shown} in {time.monotonic() - begun:.1f} s")
        self.curve.add(
            stage, step, self.seconds, f1_50=self.quality["f1_50"], ap50=self.quality["ap50"]
        )

    def save(self) -> None:
        """Write the weights so far, what transformers needs, and the quality so far."""
        save_half(self.model.state_dict(), self.out / "model.safetensors")
        write_files(self.out)
        content = {**self.facts(), "validation": self.quality, "final": False}
        (self.out / "quality.json").write_text(json.dumps(content, indent=1) + "\n")

    def facts(self) -> dict:
        """Return what is known about this run."""
        name = "cpu"
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        return {
            "seed": self.seed,
            "initialised_from": self.initialised,
            "hardware": name,
            "torch": torch.__version__,
            "seconds": round(self.seconds, 1),
            "stages": [{"stage": name, **facts} for name, facts in self.stages_done.items()],
        }


@torch.no_grad()
def order_coordinates(model: TinyVlm) -> None:
    """Begin with coordinate tokens that resemble their neighbours: random mixes of waves."""
    values = torch.arange(BINS)[:, None] / BINS
    rates = torch.pi * 2.0 ** torch.arange(0, 8)
    waves = torch.cat([(values * rates).sin(), (values * rates).cos()], 1)
    mix = torch.randn(waves.shape[1], TEXT_WIDTH) / waves.shape[1] ** 0.5
    drawn = waves @ mix
    drawn = drawn / drawn.std()
    model.model.language_model.embed_tokens.weight[FIRST_COORDINATE:] = 0.3 * drawn
    model.lm_head.weight[FIRST_COORDINATE:] = 0.02 * drawn


@torch.no_grad()
def take_over(model: TinyVlm, folder: Path) -> str | None:
    """Load tiny-vlm's weights; its words are the first rows. Return the folder's name or None."""
    path = folder / "model.safetensors"
    if not path.exists():
        return None
    from safetensors.torch import load_file

    own = model.state_dict()
    for name, value in load_file(path).items():
        own[name][: len(value)] = value.float()
    return folder.name


def write_files(out: Path) -> None:
    """Write config, tokenizer, processor and the words of a request."""
    (out / "config.json").write_text(json.dumps(llava_config(VOCABULARY_SIZE), indent=2) + "\n")
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    (out / "detector.json").write_text(json.dumps(DIALECT, indent=2) + "\n")
    write_tokenizer(out, ADDED)


def finish(
    model: TinyVlm, out: Path, device: torch.device, small: bool, facts: dict, count: int = 300
) -> dict[str, dict]:
    """Evaluate the weights as they are in the file, write quality.json and the sample."""
    model.eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.half().float())
    count = 4 if small else count
    limit = 40 if small else 110
    asked = requests("test", count, "box", all_shapes=True)
    replies = ask(model, asked, device, limit=limit)
    content = {**facts, "scenes": count, "shapes": score(asked, replies)}
    content["shapes"]["tokens"] = reply_tokens(replies)
    sheet(asked, replies, out / "sample.png")
    mixed = requests("test", count, "box", all_shapes=False)
    content["phrases"] = score(mixed, ask(model, mixed, device, limit=limit))
    content["phrases"].pop("ap50")
    for kind, scorer in (("point", score_points), ("outline", score_outlines)):
        some = requests("test", max(2, count // 2), kind, all_shapes=False)
        content[kind] = scorer(some, ask(model, some, device, limit=limit))
    content["target"] = TARGET
    content["reached"] = {name: content["shapes"][name] >= TARGET[name] for name in TARGET}
    content["final"] = True
    (out / "quality.json").write_text(json.dumps(content, indent=1) + "\n")
    for name in ("shapes", "phrases", "point", "outline"):
        shown = " ".join(f"{key} {value:.3f}" for key, value in content[name].items())
        print(f"[tiny_detector] test {name}: {shown}", flush=True)
    return content


def sheet(asked: list[Request], replies: list[Reply], path: Path) -> None:
    """Write a picture of scenes with the boxes that were answered."""
    from PIL import Image, ImageDraw

    colours = ("red", "lime", "deepskyblue", "yellow", "magenta", "white")
    columns, side = 6, 200
    count = min(18, len(asked))
    page = Image.new("RGB", (columns * side, -(-count // columns) * (side + 16)), "white")
    draw = ImageDraw.Draw(page)
    for number in range(count):
        row, column = divmod(number, columns)
        x, y = column * side, row * (side + 16)
        page.paste(_enlarged(asked[number].scene, side - 8), (x, y))
        scale = (side - 8) / data.SIZE
        parsed = parse(replies[number].ids, "box")
        for place, (_, instances) in enumerate(parsed.found):
            for box in boxes_of(instances):
                x0, x1 = sorted((x + box[0] * scale, x + box[2] * scale))
                y0, y1 = sorted((y + box[1] * scale, y + box[3] * scale))
                draw.rectangle((x0, y0, x1, y1), outline=colours[place % 6])
        names = ", ".join(f"{len(found)} {name}" for name, found in parsed.found if found)
        draw.text((x, y + side - 6), names[:36], fill="black")
    page.save(path, optimize=True)


def _enlarged(scene: Scene, side: int):
    from PIL import Image

    return Image.fromarray(np.asarray(render(scene).image)).resize((side, side))


def load(folder: Path, device: torch.device) -> TinyVlm:
    """Return the network with a folder's weights, in float32."""
    from safetensors.torch import load_file

    model = TinyVlm(VOCABULARY_SIZE)
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.to(device).eval()


def main() -> None:
    """Read the command line and train, or evaluate a folder's weights."""
    parser = recipe_parser(__doc__.partition("\n")[0])
    parser.add_argument("--init", type=Path, default=Path(__file__).parent.parent / "tiny_vlm")
    parser.add_argument("--workers", type=int, default=None)
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.eval_only:
        path = args.out / "quality.json"
        facts = json.loads(path.read_text()) if path.exists() else {}
        finish(load(args.out, device), args.out, device, args.steps_scale < 0.1, facts)
        return
    workers = args.workers
    if workers is None:
        workers = min(4, os.cpu_count() or 1) if device.type == "cuda" else 1
        if args.steps_scale < 0.1:
            workers = 0
    Recipe(
        args.out,
        args.init,
        device,
        args.seed,
        args.steps_scale,
        args.max_seconds,
        workers,
        args.compile,
    ).run()


if __name__ == "__main__":
    main()
