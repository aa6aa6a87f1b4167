"""The recipe of tiny-vlm: four stages over rendered scenes, some minutes on one GPU.

    python -m models.embedded.tiny_vlm.train --out DIR --device cuda --seed 0 --max-seconds 480

1. `vision`: the tower alone; every patch names the object and the character it shows, [CLS] the
   scene. Without it the decoder never learns to look.
2. `words`: the tower frozen; captions with positions and numbers, and answers in words.
3. `letters`: the tower frozen; questions with four options, answered by letter, beside both.
4. `joint`: everything, the tower at a fifth of the rate; one batch in four is of 192-pixel
   images in five tiles. The averaged weights of this stage are what is saved.

Categories that are answered worse are asked more often. A training that was stopped goes on where
it was, when it is started again with the same arguments.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.embedded.scenes.questions import CATEGORIES
from models.embedded.scenes.raster_torch import Renderer
from models.embedded.tiny_vlm import data
from models.embedded.tiny_vlm.batches import (
    AskedRates,
    Mix,
    Store,
    VisionHeads,
    Words,
    compose,
    jobs,
    question_room,
    vision_labels,
)
from models.embedded.tiny_vlm.evaluate import Examiner, letter_of, prompt_start, visual_embeddings
from models.embedded.tiny_vlm.network import PATCHES, Layout, TinyVlm, llava_config
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

TARGET = {"letter": 0.90, "circular": 0.75, "text": 0.75}


class Stage(NamedTuple):
    """One stage: its share of the time and of the steps, and what it optimises."""

    name: str
    seconds_share: float
    steps: int
    batch: int
    rate: float
    final_rate_share: float
    vision_rate_share: float
    mix: Mix | None


STAGES = (
    Stage("vision", 0.20, 3500, 256, 1.5e-3, 0.02, 1.0, None),
    Stage("words", 0.30, 5500, 96, 1.5e-3, 0.2, 0.0, Mix(0, 6, 0.0, 4.0, 1.0)),
    Stage("letters", 0.30, 5500, 96, 1.2e-3, 0.2, 0.0, Mix(4, 3, 8.0, 3.0, 0.3)),
    Stage("joint", 0.20, 3500, 96, 6e-4, 0.0, 0.2, Mix(4, 3, 8.0, 3.0, 0.3)),
)
# Of the joint stage: how often 192-pixel images come, and the weight of the vision stage's loss.
LARGE_EVERY = 4
VISION_LOSS_WEIGHT = 0.1
# Counted in steps, since the answers decide what is asked from then on.
EXAMINE_EVERY_STEPS = 300
PRINT_EVERY_SECONDS, SAVE_EVERY_SECONDS = 10.0, 90.0
SMOKE_BATCH = 4
# Of the time that is allowed, for the last evaluation.
EVALUATION_SECONDS = 30.0


class Recipe:
    """The state of one training run.

    Args:
        out: Folder of the results.
        device: cuda or cpu.
        seed: Of weights and batches; the scenes come from their keys.
        steps_scale: Factor of every stage's steps, and of the amount of data below 0.1.
        max_seconds: Wall time of everything, evaluation included; None trains all steps.
        workers: Processes that make scenes; 0 makes them before training.
        compiled: Compile the forward passes.
        init: Folder of weights, and of the stages that are over by its quality.json, to begin with.
    """

    def __init__(
        self,
        out: Path,
        device: torch.device,
        seed: int,
        steps_scale: float,
        max_seconds: float | None,
        workers: int,
        compiled: bool,
        init: Path | None = None,
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.checkpoint = Checkpoint(
            out,
            {
                "seed": seed,
                "device": device.type,
                "steps_scale": steps_scale,
                "stages": [tuple(stage) for stage in STAGES],
            },
        )
        # As if there had been no interruption.
        self.begun = time.monotonic() - self.checkpoint.facts.get("seconds", 0.0)
        self.out, self.device, self.seed = out, device, seed
        self.scale, self.max_seconds = steps_scale, max_seconds
        self.small = steps_scale < 0.1
        seed_everything(seed)
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        self.model = TinyVlm().to(device)
        if init is not None and not self.checkpoint.stage:
            self.model.load_state_dict(load(init, device).state_dict())
            done = json.loads((init / "quality.json").read_text())["stages"]
            self.checkpoint.facts["stages"] = {
                facts["stage"]: {name: facts[name] for name in ("steps", "batch", "seconds")}
                for facts in done
            }
        self.heads = VisionHeads().to(device)
        self.renderers = {size: Renderer(size, device) for size in (96, 192)}
        # Started before the examiner's scenes are made, so that both go on together.
        scenes = 1024 if self.small else 300_000
        work = list(jobs(scenes))
        self.store = Store(work, data.make, question_room(scenes), workers, device)
        each = 3 if self.small else 64
        self.examiner = Examiner("validation", 96, each, 1, device)
        self.large_examiner = Examiner("validation", 192, max(2, each // 4), 1, device)
        self.rates = AskedRates(device)
        self.draws = torch.Generator(device).manual_seed(seed + 1)
        self.start = prompt_start(device)
        self.averaged: AveragedWeights | None = None
        columns = ("loss", "shape", "character", "letter", "direct")
        self.curve = Curve(out / "curve.csv", columns, self.checkpoint.kept)
        self.last_table: dict[str, dict[str, float]] = self.checkpoint.facts.get("validation", {})
        self.next_save = self.seconds + SAVE_EVERY_SECONDS
        # Only what is trained on: the examiner's batches have many shapes.
        self.vision, self.logits = self.model.vision, self.model.logits
        if compiled:
            self.vision = torch.compile(self.vision, dynamic=False)
            self.logits = torch.compile(self.logits, dynamic=False)

    @property
    def seconds(self) -> float:
        """Wall time since the recipe began, without interruptions, seconds."""
        return time.monotonic() - self.begun

    def say(self, text: str) -> None:
        """Print a line with the time."""
        print(f"[tiny_vlm {self.seconds:6.1f}s] {text}", flush=True)

    def reduced(self) -> AbstractContextManager[object]:
        """bfloat16 on the GPU, float32 on the CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def run(self) -> None:
        """Train all stages, then evaluate and write everything."""
        self.store.poll(until=64 if self.small else 4096, seconds=120)
        self.say(f"begins with {self.store.ready} scenes, {self.store.chunks_left} chunks to come")
        shares = [stage.seconds_share for stage in STAGES]
        for number, stage in enumerate(STAGES):
            if stage.name == "joint":
                self.averaged = AveragedWeights(self.model, 0.998)
            if stage.name not in self.stages_done:
                self.train(stage, shares[number] / sum(shares[number:]))
        assert self.averaged is not None
        self.averaged.copy_to(self.model)
        self.save()
        self.checkpoint.remove()
        self.store.close()
        finish(self.model, self.out, self.device, self.small, self.facts())

    def train(self, stage: Stage, share: float) -> None:
        """Train one stage for its steps, or for its share of the seconds that are left."""
        tower = self.model.model.vision_tower
        tower.requires_grad_(stage.vision_rate_share > 0)
        groups = self.groups(stage)
        optimizer = torch.optim.AdamW(
            groups, lr=stage.rate, betas=(0.9, 0.98), fused=self.device.type == "cuda"
        )
        bases = [group["lr"] for group in groups]
        parameters = [weight for group in groups for weight in group["params"]]
        batch = SMOKE_BATCH if self.small else stage.batch
        clock = Clock(max(4, round(stage.steps * self.scale)))
        examine_every = max(3, round(EXAMINE_EVERY_STEPS * self.scale))
        kept: dict[str, object] = {
            "model": self.model,
            "heads": self.heads,
            "optimizer": optimizer,
            "rates": self.rates,
            "draws": self.draws,
        }
        if self.averaged is not None:
            kept["average"] = self.averaged
        self.checkpoint.restore(stage.name, clock, kept)
        if self.max_seconds is not None:
            left = self.max_seconds - (self.seconds - clock.seconds) - EVALUATION_SECONDS
            clock.max_seconds = max(1.0, left * share)
        # The stages before are then in the file as well.
        self.keep(stage, clock.done, clock, kept, now=True)
        layouts = (
            {}
            if stage.mix is None
            else {
                96: Layout(len(self.start) + PATCHES, stage.mix.slots, self.device),
                192: Layout(len(self.start) + 5 * PATCHES, stage.mix.slots, self.device),
            }
        )
        spoken, spoken_step = -PRINT_EVERY_SECONDS, clock.done
        for step, progress in clock:
            self.store.poll()
            factor = cosine(progress, warmup=0.04, floor=stage.final_rate_share)
            for group, base in zip(optimizer.param_groups, bases, strict=True):
                group["lr"] = base * factor
            with self.reduced():
                if stage.mix is None:
                    loss, shares = self.vision_loss(batch)
                else:
                    large = stage.name == "joint" and step % LARGE_EVERY == LARGE_EVERY - 1
                    size = 192 if large else 96
                    loss = self.words_loss(
                        stage, size, max(2, batch // 4) if large else batch, layouts[size]
                    )
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
                text = f"{stage.name} step {step} progress {progress:.2f} loss {value:.3f}"
                text += f" {pace:.1f} steps/s, {self.store.ready[96]} scenes"
                if stage.mix is None:
                    told = {name: float(share) for name, share in shares.items()}
                    text += "".join(f" {name} {share:.2f}" for name, share in told.items())
                    self.curve.add(
                        stage.name,
                        step,
                        self.seconds,
                        loss=value,
                        shape=told["shape"],
                        character=told["character"],
                    )
                else:
                    self.curve.add(stage.name, step, self.seconds, loss=value)
                self.say(text)
            if stage.mix is not None and (step + 1) % examine_every == 0:
                self.examine(stage.name, step)
            if self.seconds > self.next_save:
                self.save()
                self.next_save = self.seconds + SAVE_EVERY_SECONDS
            self.keep(stage, step + 1, clock, kept)
        if stage.mix is not None and clock.done % examine_every:
            self.examine(stage.name, clock.done)
        self.stages_done[stage.name] = {
            "steps": clock.done,
            "batch": batch,
            "seconds": round(clock.seconds, 1),
        }
        self.say(f"{stage.name} ends after {clock.done} steps, {clock.seconds:.0f} s")

    @property
    def stages_done(self) -> dict[str, dict[str, float]]:
        """What is known about each stage that is over."""
        return self.checkpoint.facts.setdefault("stages", {})

    def keep(self, stage: Stage, done: int, clock: Clock, kept: dict, *, now: bool = False) -> None:
        """Write what is needed to go on, now and then or `now`."""
        self.checkpoint.facts |= {"seconds": self.seconds, "validation": self.last_table}
        self.checkpoint.save(stage.name, done, clock, kept, now=now)

    def groups(self, stage: Stage) -> list[dict]:
        """Return the parameters of a stage with their rates; norms and biases do not decay."""
        tower = self.model.model.vision_tower
        rest = [self.model.model.multi_modal_projector, self.model.model.language_model]
        parts: list[tuple[nn.Module, float]] = []
        if stage.vision_rate_share:
            parts += [(tower, stage.rate * stage.vision_rate_share)]
            parts += [(self.heads, stage.rate * stage.vision_rate_share)]
        if stage.mix is not None:
            parts += [(part, stage.rate) for part in (*rest, self.model.lm_head)]
        groups = []
        for part, rate in parts:
            for decay in (0.0, 0.03):
                chosen = [p for p in part.parameters() if (p.ndim > 1) == (decay > 0)]
                if chosen:
                    groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
        return groups

    def vision_loss(self, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the vision stage on fresh images."""
        items = self.store.draw(96, batch, self.draws)
        raster = self.renderers[96].render(items.scene)
        seen = self.vision(raster.image)
        pooled = self.model.model.vision_tower.post_layernorm(seen.last[:, 0])
        return self.heads.loss(seen, pooled, vision_labels(items, raster))

    def words_loss(self, stage: Stage, size: int, batch: int, layout: Layout) -> Tensor:
        """Return the loss of captions and answers behind fresh images."""
        assert stage.mix is not None
        items = self.store.draw(size, batch, self.draws)
        raster = self.renderers[size].render(items.scene)
        loss = torch.zeros((), device=self.device)
        if stage.vision_rate_share and size == 96:
            seen = self.vision(raster.image)
            pooled = self.model.model.vision_tower.post_layernorm(seen.last[:, 0])
            loss, _ = self.heads.loss(seen, pooled, vision_labels(items, raster))
            loss = VISION_LOSS_WEIGHT * loss
            visual = self.model.project(seen.features)
        else:
            visual = visual_embeddings(self.model, raster.image)
        words = compose(items, stage.mix, self.rates.letter, self.rates.direct, self.draws)
        logits = self.logits(visual, self.start, words.tokens, layout)
        return loss + words_entropy(logits, words)

    @torch.no_grad()
    def examine(self, stage: str, step: int) -> None:
        """Ask the validation questions, print the accuracies, set the sampling by them."""
        with self.reduced():
            table = self.examiner.table(self.examiner.ask(self.model))
            if stage == "joint":
                large = self.large_examiner.table(self.large_examiner.ask(self.model))
                table["large"] = large["letter"]
        self.last_table = table
        for kind in table:
            shares = " ".join(f"{name} {share:.2f}" for name, share in table[kind].items())
            self.say(f"  {kind:7s} {shares}")
        self.curve.add(
            stage, step, self.seconds, letter=table["letter"]["all"], direct=table["direct"]["all"]
        )
        for rates, kind in ((self.rates.letter, "letter"), (self.rates.direct, "direct")):
            wrong = [1 - table[kind][name] for name in CATEGORIES]
            rates.copy_(torch.tensor(wrong).clamp(min=0.0) + 0.1)

    def save(self) -> None:
        """Write the weights so far, what transformers needs beside them, and the quality so far."""
        weights = self.model.state_dict()
        save_half(weights, self.out / "model.safetensors")
        write_files(self.out)
        content = {**self.facts(), "validation": self.last_table, "final": False}
        (self.out / "quality.json").write_text(json.dumps(content, indent=1) + "\n")

    def facts(self) -> dict:
        """Return what is known about this run."""
        name = "cpu"
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        return {
            "seed": self.seed,
            "hardware": name,
            "torch": torch.__version__,
            "seconds": round(self.seconds, 1),
            "stages": [{"stage": name, **facts} for name, facts in self.stages_done.items()],
        }


def words_entropy(logits: Tensor, words: Words) -> Tensor:
    """Return the weighted mean cross-entropy of the tokens that count."""
    each = F.cross_entropy(logits.float().flatten(0, 1), words.targets.flatten(), reduction="none")
    weights = words.weights.flatten()
    return (each * weights).sum() / weights.sum().clamp(min=1e-6)


def write_files(out: Path) -> None:
    """Write config, tokenizer and processor."""
    (out / "config.json").write_text(json.dumps(llava_config(), indent=2) + "\n")
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    write_tokenizer(out)


def finish(
    model: TinyVlm, out: Path, device: torch.device, small: bool, facts: dict
) -> dict[str, dict]:
    """Evaluate the weights as they are in the file, write quality.json and the sample.

    The weights are rounded to float16 first, and computed with in float32.
    """
    model.eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.half().float())
    each = 3 if small else 150
    tables = {}
    examiner = Examiner("test", 96, each, 4, device)
    answers = examiner.ask(model)
    tables["test"] = examiner.table(answers)
    large = Examiner("test", 192, max(2, each // 3), 4, device)
    tables["test_large"] = large.table(large.ask(model))
    shares = tables["test"]
    text = (shares["letter"]["number"] + shares["letter"]["word"]) / 2
    reached = {
        "letter": shares["letter"]["all"] >= TARGET["letter"],
        "circular": shares["circular"]["all"] >= TARGET["circular"],
        "text": text >= TARGET["text"],
    }
    content = {
        **facts,
        **tables,
        "questions_per_category": each,
        "text_letter": text,
        "target": TARGET,
        "reached": reached,
        "final": True,
    }
    (out / "quality.json").write_text(json.dumps(content, indent=1) + "\n")
    for name, table in tables.items():
        for kind, values in table.items():
            shown = " ".join(f"{key} {value:.3f}" for key, value in values.items())
            print(f"[tiny_vlm] {name} {kind}: {shown}", flush=True)
    sheet(examiner, answers.tokens, out / "sample.png")
    return tables


def sheet(examiner: Examiner, tokens, path: Path) -> None:
    """Write a picture of scenes, one of each category, with questions and given answers."""
    from PIL import Image, ImageDraw

    from models.embedded.scenes.raster import render

    chosen: list[int] = []
    for name in CATEGORIES:
        places = [
            place
            for place, (_, question) in enumerate(examiner.items)
            if question.category == name and place % 4 == 0
        ]
        # Of other scenes in each category, where there are enough.
        first = len(chosen)
        chosen += [places[(first + k) % len(places)] for k in range(2)]
    columns, width, height = 6, 220, 300
    rows = -(-len(chosen) // columns)
    page = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(page)
    for number, place in enumerate(chosen):
        scene, question = examiner.items[place]
        row, column = divmod(number, columns)
        x, y = column * width + 10, row * height + 6
        image = Image.fromarray(render(scene).image).resize((192, 192), Image.Resampling.NEAREST)
        page.paste(image, (x, y))
        letter = letter_of(int(tokens[place]))
        text = question.text
        if len(text) > 34:
            cut = text.rfind(" ", 0, 34)
            text = text[:cut] + "\n" + text[cut + 1 :]
        lines = [f"{mark}. {option}" for mark, option in zip("ABCD", question.options, strict=True)]
        right = "right" if letter == "ABCD"[question.answer] else "wrong"
        lines[0] += "   " + lines.pop(1)
        lines[1] += "   " + lines.pop(2)
        draw.text((x, y + 196), "\n".join([text, *lines]), fill="black")
        fill = "darkgreen" if right == "right" else "red"
        draw.text((x, y + 268), f"answer {letter}: {right}", fill=fill)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, optimize=True)


def load(folder: Path, device: torch.device) -> TinyVlm:
    """Return the network with a folder's weights, in float32."""
    from safetensors.torch import load_file

    model = TinyVlm()
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.to(device).eval()


def main() -> None:
    """Read the command line and train, or evaluate a folder's weights."""
    parser = recipe_parser(__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--init", type=Path, help="Weights and finished stages to begin with.")
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
        device,
        args.seed,
        args.steps_scale,
        args.max_seconds,
        workers,
        args.compile,
        args.init,
    ).run()


if __name__ == "__main__":
    main()
