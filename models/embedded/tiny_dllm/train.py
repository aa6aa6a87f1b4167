"""Train `tiny-dllm`: `python -m models.embedded.tiny_dllm.train --out DIR --device cuda`.

LLaDA's fine-tuning loss (arXiv 2502.09992, section 2.3 and the guidelines of its code): the prompt
is never noised, each token of the answer is masked with the probability p of its row, the loss is
cross-entropy at the masks over p and the answer's length. Answers are filled up with end-of-text
tokens, which are ordinary targets. The times of a batch are stratified: one per equal slice of
(0, 1), which lowers the variance of the 1 / p weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.embedded.tiny_dllm.batches import (
    Pool,
    exact_match,
    held_out,
    match_by_steps,
    save_tokenizer,
)
from models.embedded.tiny_dllm.data import (
    ANSWER_LENGTH,
    EOT,
    MASK,
    PAD,
    PROMPT_LENGTH,
    VOCABULARY,
    Problems,
    decode,
)
from models.embedded.tiny_dllm.model import (
    DecoderConfig,
    MaskedDiffusionDecoder,
    beginning,
    load,
)
from models.embedded.training import (
    AveragedWeights,
    Checkpoint,
    Clock,
    Curve,
    cosine,
    run_recipe,
    save_half,
    seed_everything,
)

LEARNING_RATE = 1.5e-3
LONG_ANSWER, LONG_SHARE = 256, 0.1
BLOCK_LENGTH = 32
EPSILON = 1e-3
CURVE_COLUMNS = ("loss", "exact_match", "exact_match_1_2_steps")
PRINT_EVERY_SECONDS = 10.0
# What the model must reach before any decoder is measured on it.
GATE_1_2_STEPS, GATE_OVERALL = 0.90, 0.75


class Sizes(NamedTuple):
    """How much of everything; see `SIZES`.

    Attributes:
        steps: Of the optimizer.
        batch: Problems in each step; half as many where answers are long.
        per_level: Training problems of each number of steps.
        held_out: Problems of the final measurement.
        few: Problems of the measurements of other settings.
        glance: Problems of the measurements while training.
        save_seconds: Between two of those.
    """

    steps: int
    batch: int
    per_level: int
    held_out: int
    few: int
    glance: int
    save_seconds: float


SIZES = {
    "cuda": Sizes(24_000, 256, 300_000, 2_000, 400, 256, 60.0),
    # Two cores take some 2 seconds a step; a forward of 2,000 problems would take them 18.
    "cpu": Sizes(3_000, 64, 100_000, 400, 40, 16, 600.0),
}
SMOKE = Sizes(0, 4, 200, 4, 4, 4, 600.0)


def diffusion_loss(
    module: Callable[[Tensor], Tensor],
    rows: Tensor,
    generator: torch.Generator,
    prefix_share: float = 0.0,
) -> Tensor:
    """Return the loss of one batch of rows of prompt and answer.

    Args:
        module: Ids to logits in place.
        rows: (batch, PROMPT_LENGTH + answer length).
        generator: Of the times and the masks, on the rows' device.
        prefix_share: Of the rows, in which the answer is there up to a random token of it, as when
            it is decoded in blocks.
    """
    batch, width = rows.shape
    answer_length = width - PROMPT_LENGTH
    slices = torch.arange(batch, device=rows.device)
    offset = torch.rand(1, device=rows.device, generator=generator)
    time_ = ((slices / batch + offset) % 1)[:, None]
    probability = (1 - EPSILON) * time_ + EPSILON
    draw = torch.rand(batch, answer_length, device=rows.device, generator=generator)
    masked = draw < probability
    if prefix_share:
        tokens = (rows[:, PROMPT_LENGTH:] != EOT).sum(1)
        chance = torch.rand(batch, 2, device=rows.device, generator=generator)
        known = (chance[:, 0] * tokens).long() * (chance[:, 1] < prefix_share)
        masked &= torch.arange(answer_length, device=rows.device) >= known[:, None]
    masked = F.pad(masked, (PROMPT_LENGTH, 0), value=False)
    logits = module(torch.where(masked, MASK, rows))[:, PROMPT_LENGTH:]
    entropy = F.cross_entropy(
        logits.float().flatten(0, 1), rows[:, PROMPT_LENGTH:].flatten(), reduction="none"
    ).view(batch, answer_length)
    weighted = entropy * masked[:, PROMPT_LENGTH:] / probability
    return weighted.sum() / (batch * answer_length)


@torch.no_grad()
def decode_one_at_a_time(
    module: torch.nn.Module, prompts: Tensor, answer_length: int, block_length: int
) -> Tensor:
    """Return answers decoded with the most confident token of each step (baseline B0).

    Blocks from left to right; inside a block, each step writes the most confident of the candidates
    at the masks. Confidences are float64: half precision saturates at 1.0 and ties.

    Args:
        module: Ids to logits in place.
        prompts: Left-padded, (batch, prompt length).
        answer_length: A multiple of `block_length`.
        block_length: Of the semi-autoregressive order.

    Returns:
        (batch, answer_length), int64.
    """
    if answer_length % block_length:
        raise ValueError(
            f"answer_length must be a multiple of block_length, got {answer_length} and "
            f"{block_length}."
        )
    prompt_length = prompts.shape[1]
    ids = F.pad(prompts.long(), (0, answer_length), value=MASK)
    row = torch.arange(len(ids), device=ids.device)
    for start in range(prompt_length, prompt_length + answer_length, block_length):
        remaining = torch.ones(len(ids), block_length, dtype=torch.bool, device=ids.device)
        for _ in range(block_length):
            logits = module(ids)[:, start : start + block_length]
            confidence, candidate = logits.double().softmax(-1).max(-1)
            place = confidence.masked_fill(~remaining, -math.inf).argmax(1)
            ids[row, start + place] = candidate[row, place]
            remaining[row, place] = False
    return ids[:, prompt_length:]


def match_of(
    module: torch.nn.Module,
    problems: Problems,
    device: torch.device,
    answer_length: int = ANSWER_LENGTH,
    block_length: int = BLOCK_LENGTH,
) -> tuple[dict[str, float], Tensor]:
    """Return the exact match of B0 by number of steps, and the answers."""
    prompts = torch.from_numpy(problems.prompts).to(device)
    answers = [
        decode_one_at_a_time(module, part, answer_length, block_length)
        for part in prompts.split(1000)
    ]
    joined = torch.cat(answers).cpu()
    return match_by_steps(exact_match(joined, problems), problems), joined


def evaluate(folder: Path, device: torch.device, sizes: Sizes) -> dict[str, float]:
    """Measure the saved weights, in float32, and write `sample.txt`."""
    module = load(folder).to(device)
    problems = held_out(sizes.held_out)
    quality, answers = match_of(module, problems, device)
    few = held_out(sizes.few)
    one_block, _ = match_of(module, few, device, ANSWER_LENGTH, ANSWER_LENGTH)
    quality["exact_match_one_block"] = one_block["exact_match"]
    # A smoke test has no minute to spend on 256 forwards.
    if sizes.few > SMOKE.few:
        long, _ = match_of(module, few, device, LONG_ANSWER, BLOCK_LENGTH)
        quality["exact_match_long"] = long["exact_match"]
    quality["held_out_problems"] = len(problems.results)
    lines = []
    for number in range(0, len(answers), max(1, len(answers) // 12)):
        lines += [decode(problems.prompts[number]), f"    {decode(answers[number].tolist())}"]
    (folder / "sample.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return quality


def main() -> None:
    """Train, save, measure."""
    run_recipe(
        "Train tiny-dllm.",
        sizes=SIZES,
        smoke=SMOKE,
        train=train,
        evaluate=evaluate,
        gate=lambda quality: (
            quality["exact_match_1_2_steps"] >= GATE_1_2_STEPS
            and quality["exact_match"] >= GATE_OVERALL
        ),
        options=_add_options,
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--init", type=Path, help="Weights to begin with, its own or the twin's.")
    parser.add_argument(
        "--prefix-share",
        type=float,
        default=0.0,
        help="Of the rows, whose answer is there up to a random token.",
    )


def train(
    arguments: argparse.Namespace, device: torch.device, sizes: Sizes, begin: float
) -> dict[str, object]:
    """Train and save; return what is known about the run."""
    out: Path = arguments.out
    on_gpu = device.type == "cuda"
    seed_everything(arguments.seed)
    config = DecoderConfig(
        vocab_size=len(VOCABULARY), mask_token_id=MASK, eos_token_id=EOT, pad_token_id=PAD
    )
    (out / "config.json").write_text(config.to_json(), encoding="utf-8")
    save_tokenizer(out)
    pool = Pool(sizes.per_level, arguments.seed, device)
    module = MaskedDiffusionDecoder(config)
    if arguments.init is not None:
        module.network.load_state_dict(beginning(arguments.init))
    module.to(device)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    averaged_module = MaskedDiffusionDecoder(config).to(device).eval()
    average = AveragedWeights(module, 0.999)
    optimizer = torch.optim.AdamW(
        module.parameters(),
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        fused=on_gpu,
    )
    generator = torch.Generator(device).manual_seed(arguments.seed + 1)
    recipe = {
        "seed": arguments.seed,
        "device": device.type,
        "sizes": sizes._asdict(),
        "prefix_share": arguments.prefix_share,
        "initialised_from": None if arguments.init is None else arguments.init.name,
    }
    checkpoint = Checkpoint(out, recipe)
    curve = Curve(out / "curve.csv", CURVE_COLUMNS, checkpoint.kept)
    glance = held_out(sizes.glance)
    seconds = arguments.max_seconds
    if seconds is not None:
        # The evaluation at the end, and what went before.
        seconds = max(1.0, seconds - (time.monotonic() - begin) - max(5.0, 0.08 * seconds))
    clock = Clock(sizes.steps, seconds)
    parts = {
        "module": module,
        "optimizer": optimizer,
        "average": average,
        "noise": generator,
        "draws": pool.generator,
    }
    checkpoint.restore("train", clock, parts)
    # Two shapes, so two compilations.
    forward = torch.compile(module, dynamic=False) if arguments.compile else module
    losses: list[Tensor] = []
    # The clock starts anew with the loop: the first step is always told.
    next_print, next_save = 0.0, clock.seconds + sizes.save_seconds
    for step, progress in clock:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * cosine(progress, warmup=0.02)
        is_long = step % round(1 / LONG_SHARE) == 0
        rows = pool.draw(
            sizes.batch // 2 if is_long else sizes.batch,
            # A model that is trained on knows all lengths of problems.
            progress if arguments.init is None else 1.0,
            LONG_ANSWER if is_long else ANSWER_LENGTH,
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            loss = diffusion_loss(forward, rows, generator, arguments.prefix_share)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        average.update(module)
        losses.append(loss.detach())
        if clock.seconds >= next_print:
            mean = float(torch.stack(losses).mean())
            losses.clear()
            values = {"loss": mean}
            if clock.seconds >= next_save:
                average.copy_to(averaged_module)
                save_half(averaged_module.checkpoint(), out / "model.safetensors")
                with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                    values |= match_of(averaged_module, glance, device)[0]
                values = {name: values[name] for name in CURVE_COLUMNS}
                text = json.dumps({"unfinished_step": step, **values}, indent=2)
                (out / "quality.json").write_text(text + "\n", encoding="utf-8")
                next_save = clock.seconds + sizes.save_seconds
            curve.add("train", step, clock.seconds, **values)
            shown = " ".join(f"{name} {value:.4f}" for name, value in values.items())
            print(f"tiny-dllm train {step} {clock.seconds:.0f}s {shown}", flush=True)
            next_print = clock.seconds + PRINT_EVERY_SECONDS
        checkpoint.save("train", step + 1, clock, parts)
    average.copy_to(averaged_module)
    size = save_half(averaged_module.checkpoint(), out / "model.safetensors")
    checkpoint.remove()
    return {
        "parameters": parameters,
        "bytes": size,
        "train_steps": clock.done,
        "train_seconds": round(clock.seconds, 1),
        "batch": sizes.batch,
        "seed": arguments.seed,
        "initialised_from": None if arguments.init is None else arguments.init.name,
        "prefix_share": arguments.prefix_share,
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
