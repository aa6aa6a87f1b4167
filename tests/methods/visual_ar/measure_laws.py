"""Print the two laws of relaxed decoding, acceptance by place and age, and what a window costs.

    python -m tests.methods.visual_ar.measure_laws MODEL IMAGES
    python -m tests.methods.visual_ar.measure_laws text MODEL PASSAGES

For each setting, over places of images of the model: how often a draft stands, what the exact rule
would give, the excess, and how far the law of the token emitted is from the target's, computed over
all tokens. Drafts are those of the feature drafter one step ahead (LANTERN) and the distribution of
the same place with the token before it guessed (GSD's window, one iteration old).

For a few methods, over whole images: how many tokens a forward commits, and the acceptance of the
drafts by their place behind the last token and, in windows of guesses, by the forwards that have
redrawn them, each beside 1 - TV(p, q) of the same drafts.

Before that, how flat the model's law is (for contrast, the second command prints the same of a
language model on passages of bits-per-byte), t(W) / t(1) (what a forward over W tokens costs, in
forwards over one), and what judging a window costs by the exact rule and by ranked clusters.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from methods.visual_ar.common_drafts import feature_drafter_for
from methods.visual_ar.common_verification import (
    ClusterRule,
    ExactRule,
    NeighbourRule,
    Rule,
    Tested,
    output_law,
)
from methods.visual_ar.gsd import Gsd
from methods.visual_ar.lantern import Lantern
from methods.visual_ar.sjd import Sjd
from models.base import AutoregressiveImageModel, ImageSampling, Trace
from models.embedded.tiny_ar_image.model import guided
from models.image_generation import TokenPipeline, draw_tokens, generate_images
from models.loading import load
from runner.conformance_base import PROFILE
from tasks.bits_per_byte import BitsPerByte

SAMPLING = ImageSampling(guidance_scale=1.5)
WIDTHS = (1, 2, 4, 8, 16, 32, 59, 64)
PLACES = range(20, 250, 23)


def laws(
    model: AutoregressiveImageModel, label: int, seed: int
) -> Mapping[str, list[tuple[Tensor, Tensor]]]:
    """Return pairs (p, q) at some places of an image, by how the drafts came about."""
    pipeline = TokenPipeline(sampling=SAMPLING, constraints=model.constraints)
    made = model.generate([label], [seed], SAMPLING)
    tokens = torch.tensor(made.tokens, device=model.device)
    total = model.facts.image_tokens

    def read(fed: Tensor) -> tuple[Tensor, Tensor]:
        session = model.session([label], guided=True, capacity=total, trace=Trace())
        first = session.prefill()
        rest = session.forward(fed[:, :-1])
        hidden = torch.cat([first.hidden, rest.hidden], dim=1)
        found = torch.cat(
            [
                pipeline.probabilities(first, [0]),
                pipeline.probabilities(rest, range(1, total)),
            ],
            dim=1,
        )
        return found[0], hidden

    p, hidden = read(tokens)
    drafter = feature_drafter_for("own", model)
    embedded = model.embed(tokens[:, :-1]).expand(2, -1, -1)
    with torch.no_grad():
        guesses = drafter(embedded, hidden[:, :-1])
    drafted = guided(model.head(guesses), SAMPLING.guidance_scale)
    ahead = pipeline.from_logits(drafted[0], range(1, total))
    window: list[tuple[Tensor, Tensor]] = []
    generator = torch.Generator().manual_seed(seed)
    for place in PLACES:
        # The token before is another draw from its own law: what a window knew an iteration ago.
        other = tokens.clone()
        other[:, place - 1] = draw_tokens(p[place - 1], torch.rand((), generator=generator))
        window.append((p[place], read(other)[0][place]))
    return {"window": window, "tree": [(p[place], ahead[place - 1]) for place in PLACES]}


def report(name: str, rule: Rule, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Print one line: means over the pairs."""
    found = [output_law(rule, p, q) for p, q in pairs]
    rows = np.array([(each.acceptance, each.exact_acceptance, each.distance) for each in found])
    accepted, exact, distance = rows.mean(0)
    extra = ""
    if isinstance(rule, NeighbourRule):
        taken = [
            rule.borrowed(p[None].double(), torch.arange(len(p)))[2].sum(-1).double() @ q.double()
            for p, q in pairs
        ]
        extra = f"  neighbours taken {float(np.mean([float(each) for each in taken])):.0f}"
    print(
        f"{name:44} accepted {accepted:.3f}  exact {exact:.3f}  excess {accepted - exact:+.3f}  "
        f"TV(output, p) {distance:.3f}{extra}",
        flush=True,
    )


def breakdown(model: AutoregressiveImageModel, method: Sjd | Gsd | Lantern, images: int) -> None:
    """Print commits and acceptance by place and age over some images, made one by one."""
    sums: dict[str, dict[int, Tested]] = {"depth": {}, "age": {}}
    commits: Counter[int] = Counter()
    for number in range(images):
        loop = method.loop(model, PROFILE)
        made = generate_images(model, [7 * number % 20], [number], SAMPLING, loop)
        commits.update(accepted + 1 for accepted in made.trace.accepted)
        for kind, parts in (("depth", loop.tally.by_depth), ("age", loop.tally.by_age)):
            for key, part in parts.items():
                sums[kind][key] = sums[kind].get(key, Tested()).plus(part)
    total = commits.total()
    shares = " ".join(f"{size}:{count / total:.3f}" for size, count in sorted(commits.items()))
    print(f"{method}\n  committed by a forward, share of forwards  {shares}")
    for kind, parts in sums.items():
        if parts:
            cells = (
                f"{key}:{part.chance / part.tests:.2f}/{part.exact_chance / part.tests:.2f}"
                f"({part.tests:.0f})"
                for key, part in sorted(parts.items())
            )
            print(f"  by {kind}, accepted/exact (tests)  {' '.join(cells)}", flush=True)


def flatness(laws_at: Tensor) -> None:
    """Print how flat laws are, (places, tokens): relaxed rules need tokens of like probability."""
    best = laws_at.double().topk(10).values
    top = best[:, 0]
    entropy = torch.special.entr(laws_at.double()).sum(1)
    print(
        f"top-1 mean {top.mean():.3f}, median {top.median():.3f}, below 0.1 at "
        f"{(top < 0.1).double().mean():.0%} of places, below 0.05 at "
        f"{(top < 0.05).double().mean():.0%}; top-10 mean {best.sum(1).mean():.3f}; "
        f"entropy mean {entropy.mean():.2f} nats",
        flush=True,
    )


def flatness_of_text(name: str, passages: int) -> None:
    """Print how flat a language model's laws are behind each token of some passages."""
    model = load(name, offline=True, capability="TextGenerator")
    found = []
    for item in islice(BitsPerByte().items(), passages):
        ids = model.tokenizer.encode(item.fields["text"])
        session = model.session(len(ids) + 1)
        found.append(torch.softmax(session.prefill(ids).double(), dim=-1))
    flatness(torch.cat(found))


def judging_cost(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Print what judging a window of 15 guesses costs, medians of 15."""
    p, q = (torch.stack([pair[side] for pair in pairs[:1] * 15]).double() for side in (0, 1))
    tokens = q.argmax(-1)
    for name, rule in (("exact", ExactRule()), ("ranked clusters", ClusterRule(14))):
        seconds = []
        for _ in range(15):
            begin = time.perf_counter()
            float(rule.acceptance(p, q, tokens).sum())  # waits for a device
            seconds.append(time.perf_counter() - begin)
        print(f"judging 15 guesses, {name}: {1000 * float(np.median(seconds)):.2f} ms", flush=True)


def window_cost(model: AutoregressiveImageModel) -> None:
    """Print what a forward over W tokens costs behind half an image; medians of 15."""
    total = model.facts.image_tokens

    def timed(width: int) -> float:
        session = model.session([0], guided=True, capacity=total + width, trace=Trace())
        session.prefill()
        held = total // 2
        session.forward(torch.zeros(1, held, dtype=torch.int64, device=model.device))
        tokens = torch.zeros(1, width, dtype=torch.int64, device=model.device)
        seconds = []
        for _ in range(15):
            model.synchronize()
            begin = time.perf_counter()
            session.forward(tokens)
            model.synchronize()
            seconds.append(time.perf_counter() - begin)
            session.crop(held)
        return float(np.median(seconds))

    one = timed(1)
    costs = ", ".join(f"W={width} {timed(width) / one:.2f}" for width in WIDTHS)
    print(f"t(1) = {1000 * one:.2f} ms with guidance; t(W)/t(1): {costs}", flush=True)


def main() -> None:
    """Measure and print."""
    if sys.argv[1] == "text":
        flatness_of_text(sys.argv[2], int(sys.argv[3]))
        return
    model = load(sys.argv[1], offline=True, capability="ImageGenerator")
    assert isinstance(model, AutoregressiveImageModel)
    window_cost(model)
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for number in range(int(sys.argv[2])):
        for kind, found in laws(model, 7 * number % 20, number).items():
            pairs.setdefault(kind, []).extend(found)
    flatness(torch.stack([p for p, _ in pairs["window"]]))
    judging_cost(pairs["window"])
    judged: Mapping[str, Callable[[], Rule]] = {
        **{
            f"window gsd {method.acceptance} G={method.group_size} {method.strength:g}": (
                lambda method=method: method.judge(model)
            )
            for method in (
                *(Gsd(group_size=size, distance_quantile=0.1) for size in (1, 3, 14, 25, 50)),
                Gsd(acceptance="by-p"),
                Gsd(acceptance="by-q"),
                Gsd(acceptance="static"),
                Gsd(acceptance="partition"),
                Gsd(acceptance="partition-group"),
                *(Gsd(acceptance="amplify", strength=factor) for factor in (1.5, 2.0, 3.0)),
            )
        },
        "tree exact": ExactRule,
        **{
            f"tree lantern delta={method.delta:g} k={method.neighbours} {method.metric}": (
                lambda method=method: method.judge(model)
            )
            for method in (
                *(Lantern(delta=delta) for delta in (0.05, 0.1, 0.2, 0.4)),
                *(Lantern(delta=0.1, neighbours=count) for count in (10, 100)),
                Lantern(delta=0.1, metric="random"),
            )
        },
    }
    for name, make in judged.items():
        report(name, make(), pairs[name.partition(" ")[0]])
    for method in (
        Sjd(),
        Gsd(distance_quantile=0.1),
        Lantern(delta=0.0, tree="chain"),
        Lantern(delta=0.0, tree="static"),
        Lantern(delta=0.0, tree="static-57"),
    ):
        breakdown(model, method, int(sys.argv[2]))


if __name__ == "__main__":
    main()
