"""The recipe of the weights with which tiny-detector writes boxes in digits.

    python -m models.embedded.coordinate_digits.train --out DIR --device cpu --seed 0

The same requests as tiny-detector's for boxes, on scenes that its own training did not come to; the
answers have `[12, 40, 200, 280]` where its own have four coordinate tokens. Its weights stay as
they are; low-rank changes of the decoder and the rows of the tokens that are written learn. A
training that was stopped goes on when it is started again with the same arguments.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.detector_format import parse
from models.embedded.coordinate_digits.adapter import adapt, adapted, changes, load_changes
from models.embedded.scenes.generator import SHAPES, Draws, generate
from models.embedded.scenes.raster_torch import Renderer
from models.embedded.tiny_detector import data
from models.embedded.tiny_detector.evaluate import BoxScores, ask, boxes_of, reply_tokens, requests
from models.embedded.tiny_detector.text import (
    BOX_END,
    BOX_START,
    COMMA,
    COORDINATES,
    GRAMMAR,
    LEFT_BRACKET,
    NAME_END,
    NAME_START,
    NONE,
    RIGHT_BRACKET,
    Found,
    encode_prompt,
    prompt,
)
from models.embedded.tiny_detector.train import load
from models.embedded.tiny_vlm.evaluate import prompt_start
from models.embedded.tiny_vlm.network import Layout, TinyVlm
from models.embedded.tiny_vlm.text import EOS, encode
from models.embedded.training import (
    Checkpoint,
    Clock,
    Curve,
    cosine,
    run_recipe,
    save_half,
    seed_everything,
)

RATE, RANK = 2e-3, 16
REQUESTS = 4
PRINT_EVERY_SECONDS = 10.0
# Scenes that the supervised training did not come to, nor the post-training.
FIRST_SCENE = 3_000_000
DETECTOR = Path(__file__).parent.parent / "tiny_detector"
# What an answer is made of, besides the names.
TOKENS = sorted(
    {
        *(token for number in range(100) for token in encode(str(number))),
        *(NAME_START, NAME_END, BOX_START, BOX_END, LEFT_BRACKET, RIGHT_BRACKET, COMMA, NONE, EOS),
    }
)


class Sizes(NamedTuple):
    """How much of everything: steps, scenes of a step, test scenes, longest answer."""

    steps: int
    batch: int
    tested: int
    limit: int


SIZES_BY_DEVICE = {"cpu": Sizes(1500, 4, 300, 200), "cuda": Sizes(6000, 16, 300, 200)}
SMOKE = Sizes(3, 1, 2, 8)


def encode_digits(found: list[Found]) -> tuple[int, ...]:
    """Return the ids of an answer in digits with its end token."""
    ids: list[int] = []
    for number, (phrase, instances) in enumerate(found):
        ids += [COMMA] * bool(number) + [NAME_START, *encode(phrase), NAME_END, BOX_START]
        for place, bins in enumerate(sorted(instances)):
            ids += [COMMA] * bool(place)
            for at, value in enumerate(bins):
                ids += [COMMA if at else LEFT_BRACKET, *encode(str(value))]
            ids.append(RIGHT_BRACKET)
        ids += [BOX_END] if instances else [NONE, BOX_END]
    return (*ids, EOS)


class Batch(NamedTuple):
    """Images, and requests with their answers behind each.

    Attributes:
        features: Of the tower, [CLS] first, (scenes, 145, width).
        words: Tokens of the requests and answers, (scenes, REQUESTS, tokens).
        is_answer: Where a token belongs to an answer, the same shape.
    """

    features: Tensor
    words: Tensor
    is_answer: Tensor


@torch.no_grad()
def batch_of(model: TinyVlm, renderer: Renderer, place: int, count: int, seed: int) -> Batch:
    """Return fresh scenes with their requests, a function of the seed and the place."""
    scenes = [generate("shapes", data.SIZE, "train", FIRST_SCENE + place + n) for n in range(count)]
    texts = []
    for scene in scenes:
        draws = Draws(f"{scene.key}/{seed}/digits")
        for _ in range(REQUESTS):
            phrases, found = data.request(scene, "box", draws)
            texts.append((encode_prompt(prompt("box", phrases)), encode_digits(found)))
    longest = max(len(asked) + len(told) for asked, told in texts)
    words = torch.zeros(len(texts), longest, dtype=torch.long)
    is_answer = torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, (asked, told) in enumerate(texts):
        words[row, : len(asked) + len(told)] = torch.tensor([*asked, *told])
        is_answer[row, len(asked) : len(asked) + len(told)] = True
    device = model.lm_head.weight.device
    packed = torch.from_numpy(np.stack([scene.pack() for scene in scenes])).to(device)
    features = model.vision(renderer.render(packed).image, only_features=True).features
    shape = (count, REQUESTS, longest)
    return Batch(features, words.view(shape).to(device), is_answer.view(shape).to(device))


def loss_of(model: TinyVlm, start: Tensor, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of the answers' tokens."""
    visual, words = model.project(batch.features), batch.words
    layout = Layout(len(start) + visual.shape[1], [words.shape[2]] * REQUESTS, visual.device)
    logits = model.logits(visual, start, words.flatten(1), layout).unflatten(1, words.shape[1:])
    where = batch.is_answer[:, :, 1:]
    return F.cross_entropy(logits[:, :, :-1][where].float(), words[:, :, 1:][where])


def train(
    arguments: argparse.Namespace, device: torch.device, sizes: Sizes, begin: float
) -> dict[str, object]:
    """Train the changes and save them."""
    del begin
    out: Path = arguments.out
    seed_everything(arguments.seed)
    model = load(DETECTOR, device)
    adapt(model, RANK, TOKENS)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    recipe = {"seed": arguments.seed, "device": device.type, "sizes": list(sizes)}
    checkpoint = Checkpoint(out, recipe)
    checkpoint.EVERY_SECONDS = 60.0
    parts = {"model": model, "optimizer": optimizer}
    clock = Clock(sizes.steps, arguments.max_seconds)
    curve = Curve(out / "curve.csv", ("loss",), checkpoint.kept)
    checkpoint.restore("digits", clock, parts)
    checkpoint.save("digits", clock.done, clock, parts, now=True)
    renderer, start = Renderer(data.SIZE, device), prompt_start(device)
    spoken = -PRINT_EVERY_SECONDS
    for step, progress in clock:
        for group in optimizer.param_groups:
            group["lr"] = RATE * cosine(progress, warmup=0.03)
        batch = batch_of(model, renderer, step * sizes.batch, sizes.batch, arguments.seed)
        value = loss_of(model, start, batch)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if clock.seconds - spoken >= PRINT_EVERY_SECONDS:
            spoken = clock.seconds
            print(f"[coordinate_digits] step {step} loss {value.item():.3f}", flush=True)
            curve.add("digits", step, clock.seconds, loss=value.item())
        checkpoint.save("digits", step + 1, clock, parts)
    save_half(changes(model), out / "model.safetensors")
    checkpoint.remove()
    return {
        "seed": arguments.seed,
        "device": device.type,
        "torch": torch.__version__,
        "steps": clock.done,
        "batch": sizes.batch * REQUESTS,
        "parameters": sum(weight.numel() for weight in weights),
        "training_seconds": round(clock.seconds, 1),
    }


@torch.no_grad()
def evaluate(out: Path, device: torch.device, sizes: Sizes) -> dict[str, float]:
    """Return F1 and AP50 of all six shapes on scenes of the test split, as tiny-detector's."""
    model = load(DETECTOR, device)
    asked = requests("test", sizes.tested, "box", all_shapes=True)
    with adapted(model, load_changes(out / "model.safetensors")):
        replies = ask(model, asked, device, batch=50, limit=sizes.limit)
    scores, malformed = BoxScores(), 0
    for request, reply in zip(asked, replies, strict=True):
        parsed = parse(reply.ids, GRAMMAR, COORDINATES["box"], "digits")
        told = dict(parsed.found)
        malformed += bool(parsed.errors) or not parsed.complete or [*told] != request.phrases
        for phrase, instances in request.answer:
            pieces = told.get(phrase, [])
            guess, truth = boxes_of([piece.bins for piece in pieces]), boxes_of(instances)
            scores.add(guess, truth)
            if phrase in SHAPES:
                sure = [reply.log_probabilities[piece.first : piece.end] for piece in pieces]
                scores.rank(phrase, guess, [float(np.exp(np.mean(some))) for some in sure], truth)
    rates = {"malformed": malformed / len(asked), "tokens": reply_tokens(replies)}
    return scores.numbers() | rates


if __name__ == "__main__":
    run_recipe(
        __doc__.partition("\n")[0],
        sizes=SIZES_BY_DEVICE,
        smoke=SMOKE,
        train=train,
        evaluate=evaluate,
        compiles=False,
    )
