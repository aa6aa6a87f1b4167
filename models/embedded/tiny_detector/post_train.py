"""Post-training of tiny-detector by geometric rewards, against supervised training alone.

    python -m models.embedded.tiny_detector.post_train --out DIR --device cpu --seed 0

1. `noisy`: supervised steps on answers of which a share tells one box twice, jittered, as noisy
   data engines do; the released model learned its duplicates so. `--start clean` leaves it out.
2. `grpo`: groups of answers are sampled, rewarded by `grpo.box_reward` and reinforced;
   `--reward max` is the released reward, `one_to_one` the one that sees duplicates. Or `sft`, the
   control: as many supervised steps on clean answers.

The file of quality holds the model before, after the first and after the second stage. A training
that was stopped goes on when it is started again with the same arguments.
Differs from the release, for a CPU's sake: the vision tower stays as it is, 4 prompts a step, and a
rate for a small network.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.embedded.scenes.generator import Draws, generate
from models.embedded.scenes.raster_torch import Renderer
from models.embedded.tiny_detector import data
from models.embedded.tiny_detector.evaluate import (
    Request,
    ask,
    boxes_of,
    intersection_over_union,
    matched,
    requests,
    score,
)
from models.embedded.tiny_detector.grpo import (
    Matching,
    Named,
    advantages,
    box_reward,
    divergence_terms,
    policy_terms,
)
from models.embedded.tiny_detector.rollout import Reply, rollout
from models.embedded.tiny_detector.text import (
    BINS,
    Found,
    encode_answer,
    encode_prompt,
    parse,
    prompt,
)
from models.embedded.tiny_detector.train import load, write_files
from models.embedded.tiny_vlm.evaluate import prompt_start
from models.embedded.tiny_vlm.network import Layout, TinyVlm
from models.embedded.training import (
    SMOKE_SCALE,
    Checkpoint,
    Clock,
    Curve,
    cosine,
    recipe_parser,
    save_half,
    seed_everything,
)

NOISY_STEPS, STEPS = 120, 120
NOISY_BATCH, PROMPTS, ANSWERS = 8, 4, 8
NOISE_SHARE, JITTER = 0.3, 8
TEMPERATURE, TOP_P, LIMIT = 1.0, 0.99, 90
NOISY_RATE, RATE, DIVERGENCE = 2e-4, 5e-5, 0.01
TESTED = 100
# Scenes that the supervised training did not come to.
FIRST_SCENE = 1_000_000
PRINT_EVERY_SECONDS = 10.0


class Batch(NamedTuple):
    """Requests, and what the tower makes of their images, [CLS] first."""

    asked: list[Request]
    features: Tensor


def doubled(found: list[Found], draws: Draws) -> list[Found]:
    """Tell one box twice, the second time up to JITTER bins off; nothing to double is left."""
    places = [(row, column) for row, (_, boxes) in enumerate(found) for column in range(len(boxes))]
    if not places:
        return found
    row, column = draws.pick(places)
    box = found[row].instances[column]
    off = tuple(min(max(value + draws.between(-JITTER, JITTER), 0), BINS - 1) for value in box)
    changed = Found(found[row].phrase, sorted([*found[row].instances, off]))
    return [*found[:row], changed, *found[row + 1 :]]


def reward_of(request: Request, reply: Reply, matching: Matching, penalty: float = 0.0) -> float:
    """Return the reward of an answer to a request for boxes; see `grpo.box_reward`."""
    parsed = parse(reply.ids, request.kind)
    told: dict[str, list[tuple[int, ...]]] = {}
    for phrase, boxes in parsed.found:
        told.setdefault(phrase, []).extend(boxes)
    mine = [Named(phrase, boxes_of(boxes)) for phrase, boxes in told.items()]
    right = [Named(phrase, boxes_of(boxes)) for phrase, boxes in request.answer]
    return box_reward(mine, right, matching, penalty)


def answer_log_probabilities(
    model: TinyVlm,
    visual: Tensor,
    start: Tensor,
    asked: list[list[int]],
    told: list[list[list[int]]],
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of every token of answers, several behind one image.

    Args:
        model: The network.
        visual: Of each request, (requests, patches, width).
        start: Tokens in front of the image.
        asked: Tokens of each request's prompt.
        told: Tokens of each request's answers, equally many for each.

    Returns:
        (requests, answers, tokens), and where there is a token, the same shape.
    """
    longest = max(
        len(ask) + len(ids) for ask, group in zip(asked, told, strict=True) for ids in group
    )
    count = len(told[0])
    words = torch.zeros(len(asked), count, longest, dtype=torch.long)
    is_answer = torch.zeros(len(asked), count, longest, dtype=torch.bool)
    for row, (ask_ids, group) in enumerate(zip(asked, told, strict=True)):
        for number, ids in enumerate(group):
            words[row, number, : len(ask_ids) + len(ids)] = torch.tensor([*ask_ids, *ids])
            is_answer[row, number, len(ask_ids) : len(ask_ids) + len(ids)] = True
    words, is_answer = words.to(visual.device), is_answer.to(visual.device)
    layout = Layout(len(start) + visual.shape[1], [longest] * count, visual.device)
    logits = model.logits(visual, start, words.flatten(1), layout).unflatten(1, (count, longest))
    targets = words[:, :, 1:]
    found = -F.cross_entropy(
        logits[:, :, :-1].float().flatten(0, 2), targets.flatten(), reduction="none"
    ).view(targets.shape)
    return found, is_answer[:, :, 1:]


class PostTraining:
    """The state of one run; the arguments are those of the command line."""

    def __init__(
        self,
        out: Path,
        init: Path,
        device: torch.device,
        seed: int,
        steps_scale: float,
        start: str,
        arm: str,
        matching: Matching,
        penalty: float,
    ) -> None:
        self.penalty = penalty
        self.out, self.device, self.seed, self.arm, self.matching = out, device, seed, arm, matching
        self.begins = start
        self.small = steps_scale < SMOKE_SCALE
        self.steps = {
            "noisy": max(2, round(NOISY_STEPS * steps_scale)),
            arm: max(2, round(STEPS * steps_scale)),
        }
        out.mkdir(parents=True, exist_ok=True)
        seed_everything(seed)
        self.model = load(init, device)
        self.reference = load(init, device)
        # The tower stays as it is.
        self.model.model.vision_tower.requires_grad_(False)
        self.reference.requires_grad_(False)
        self.draws = torch.Generator().manual_seed(seed + 1)
        self.renderer, self.start = Renderer(data.SIZE, device), prompt_start(device)
        recipe = {"seed": seed, "device": device.type, "start": start, "arm": arm}
        recipe |= {"steps": self.steps, "reward": matching, "duplicate_penalty": penalty}
        self.checkpoint = Checkpoint(out, recipe)
        self.checkpoint.EVERY_SECONDS = 60.0
        self.recipe = recipe
        columns = ("loss", "reward", "divergence", "tokens")
        self.curve = Curve(out / "curve.csv", columns, self.checkpoint.kept)

    def run(self) -> None:
        """Train both stages, measure before and after each, write everything."""
        facts = self.checkpoint.facts.setdefault("quality", {})
        if "before" not in facts:
            facts["before"] = self.measure()
        stages = ["noisy", self.arm] if self.begins == "noisy" else [self.arm]
        for stage in stages:
            if stage in facts:
                continue
            self.train(stage)
            facts[stage] = self.measure()
        save_half(self.model.state_dict(), self.out / "model.safetensors")
        write_files(self.out)
        content = {**self.recipe, "torch": torch.__version__, "scenes": self.tested, **facts}
        (self.out / "quality.json").write_text(json.dumps(content, indent=1) + "\n")
        self.checkpoint.remove()
        print(f"[post_train] done {json.dumps(content)}", flush=True)

    @property
    def tested(self) -> int:
        """Scenes of the test split that are measured."""
        return 2 if self.small else TESTED

    def train(self, stage: str) -> None:
        """Run one stage."""
        rate = RATE if stage == "grpo" else NOISY_RATE
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01)
        clock = Clock(self.steps[stage])
        parts: dict[str, Any] = {
            "model": self.model,
            "reference": self.reference,
            "optimizer": optimizer,
            "draws": self.draws,
        }
        if stage == "grpo" and self.checkpoint.stage != stage:
            # What the second stage is held to is where it begins.
            self.reference.load_state_dict(self.model.state_dict())
        self.checkpoint.restore(stage, clock, parts)
        self.checkpoint.save(stage, clock.done, clock, parts, now=True)
        spoken = -PRINT_EVERY_SECONDS
        for step, progress in clock:
            for group in optimizer.param_groups:
                group["lr"] = rate * cosine(progress, warmup=0.05, floor=0.1)
            if stage == "grpo":
                loss, told = self.reinforce(self.batch(stage, step, PROMPTS))
            else:
                loss, told = self.imitate(self.batch(stage, step, NOISY_BATCH), step, stage)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            if clock.seconds - spoken >= PRINT_EVERY_SECONDS:
                spoken = clock.seconds
                shown = " ".join(f"{name} {value:.3f}" for name, value in told.items())
                print(f"[post_train {stage}] step {step} {shown}", flush=True)
                self.curve.add(stage, step, clock.seconds, **told)
            self.checkpoint.save(stage, step + 1, clock, parts)

    def batch(self, stage: str, step: int, count: int) -> Batch:
        """Return fresh requests for boxes, a function of seed, stage and step."""
        size = 2 if self.small else count
        asked = []
        for number in range(size):
            place = FIRST_SCENE * (1 + (stage != "noisy")) + step * count + number
            scene = generate("shapes", data.SIZE, "train", place)
            draws = Draws(f"{scene.key}/{self.seed}/{stage}")
            phrases, answer = data.request(scene, "box", draws)
            asked.append(Request(scene, "box", phrases, answer))
        packed = np.stack([request.scene.pack() for request in asked])
        with torch.no_grad():
            image = self.renderer.render(torch.from_numpy(packed).to(self.device)).image
            features = self.model.vision(image, only_features=True).features
        return Batch(asked, features)

    def imitate(self, batch: Batch, step: int, stage: str) -> tuple[Tensor, dict[str, float]]:
        """Return the supervised loss on answers, some of them with a box told twice."""
        answers = []
        for number, request in enumerate(batch.asked):
            draws = Draws(f"{request.scene.key}/{self.seed}/{step}/{number}")
            is_noisy = stage == "noisy" and draws.chance(NOISE_SHARE)
            found = doubled(request.answer, draws) if is_noisy else request.answer
            answers.append([list(encode_answer(found))])
        asked = [list(encode_prompt(prompt("box", each.phrases))) for each in batch.asked]
        sure, where = answer_log_probabilities(
            self.model, self.model.project(batch.features), self.start, asked, answers
        )
        loss = -sure[where].mean()
        return loss, {"loss": loss.item()}

    def reinforce(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Sample groups of answers and return the loss that reinforces the better ones."""
        asked = [list(encode_prompt(prompt("box", each.phrases))) for each in batch.asked]
        answers = 2 if self.small else ANSWERS
        visual = self.model.project(batch.features)
        replies = rollout(
            self.model,
            visual.detach(),
            self.start,
            asked,
            limit=8 if self.small else LIMIT,
            copies=answers,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            draws=self.draws,
        )
        groups = [replies[first : first + answers] for first in range(0, len(replies), answers)]
        rewards = torch.tensor(
            [
                [reward_of(request, reply, self.matching, self.penalty) for reply in group]
                for request, group in zip(batch.asked, groups, strict=True)
            ]
        )
        told = [[reply.ids for reply in group] for group in groups]
        sure, where = answer_log_probabilities(self.model, visual, self.start, asked, told)
        with torch.no_grad():
            shown = self.reference.project(batch.features)
            wanted, _ = answer_log_probabilities(self.reference, shown, self.start, asked, told)
        advantage = advantages(rewards).to(sure.device)[:, :, None].expand_as(sure)
        # One update for each sample, so the policy that sampled is this one.
        terms = policy_terms(sure, sure.detach(), advantage)
        divergence = divergence_terms(sure, wanted)
        loss = (terms + DIVERGENCE * divergence)[where].mean()
        return loss, {
            "loss": loss.item(),
            "reward": rewards.mean().item(),
            "divergence": divergence[where].mean().item(),
            "tokens": float(np.mean([len(reply.ids) for reply in replies])),
        }

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Return the quality of answers on held-out scenes, all six shapes asked.

        Of greedy answers, and of sampled ones as `sampled_...`: a model that was shown repeated
        boxes now and then repeats few when it is greedy.
        """
        begun = time.monotonic()
        asked = requests("test", self.tested, "box", all_shapes=True)
        quality: dict[str, float] = {}
        draws = torch.Generator().manual_seed(self.seed + 2)
        drawn = {"temperature": TEMPERATURE, "top_p": TOP_P, "draws": draws}
        for prefix, sampling in (("", {}), ("sampled_", drawn)):
            limit = 8 if self.small else 110
            replies = ask(self.model, asked, self.device, batch=50, limit=limit, **sampling)
            found = score(asked, replies) | missed_and_matched(asked, replies)
            quality |= {f"{prefix}{name}": value for name, value in found.items()}
        shown = " ".join(f"{name} {value:.3f}" for name, value in quality.items())
        print(f"[post_train] {shown} in {time.monotonic() - begun:.1f} s", flush=True)
        return quality


def missed_and_matched(asked: list[Request], replies: list[Reply]) -> dict[str, float]:
    """Return what boxes at IoU 0.5 say of the objects, each phrase by itself.

    Returns:
        missed (share of objects without a box), repeated (share of boxes behind the first one on
        the same object; a doubled box that is off by JITTER falls below the 0.9 of `duplicates`),
        matched_iou (mean of the best box of each object that has one).
    """
    truths = hits = boxes = repeated = 0
    overlaps = []
    for request, reply in zip(asked, replies, strict=True):
        told = dict(parse(reply.ids, request.kind).found)
        for phrase, instances in request.answer:
            overlap = intersection_over_union(boxes_of(told.get(phrase, [])), boxes_of(instances))
            truths, hits = truths + len(instances), hits + matched(overlap, 0.5)
            boxes += len(overlap)
            repeated += int(((overlap >= 0.5).sum(0) - 1).clip(min=0).sum())
            if overlap.size:
                best = overlap.max(0)
                overlaps += best[best >= 0.5].tolist()
    return {
        "missed": 1 - hits / max(truths, 1),
        "repeated": repeated / max(boxes, 1),
        "matched_iou": float(np.mean(overlaps)) if overlaps else float("nan"),
    }


def main() -> None:
    """Read the command line and train."""
    parser = recipe_parser(__doc__.partition("\n")[0], compiles=False)
    parser.add_argument("--init", type=Path, default=Path(__file__).parent)
    parser.add_argument("--start", choices=("noisy", "clean"), default="noisy")
    parser.add_argument("--arm", choices=("grpo", "sft"), default="grpo")
    parser.add_argument("--reward", choices=("max", "one_to_one"), default="one_to_one")
    parser.add_argument(
        "--duplicate-penalty", type=float, default=0.0, help="Taken off for an answer of repeats."
    )
    args = parser.parse_args()
    PostTraining(
        args.out,
        args.init,
        torch.device(args.device),
        args.seed,
        args.steps_scale,
        args.start,
        args.arm,
        args.reward,
        args.duplicate_penalty,
    ).run()


if __name__ == "__main__":
    main()
