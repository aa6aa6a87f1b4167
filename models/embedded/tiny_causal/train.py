"""Train `tiny-causal`: `python -m models.embedded.tiny_causal.train --out DIR --device cuda`.

Two stages, two files:

1. `model.safetensors`: transformers' Llama of the size of `tiny-dllm`, next-token loss on the
   answers of the same problems up to their end token. The matched autoregressive model.
2. `dual_stream.safetensors`: continued from it as WeDLM does (arXiv 2512.22737, section 4; its code
   at 0216110), so that masks behind observed tokens are predicted under the causal mask. A clean
   memory stream and a prediction stream of blocks, reordered inside each block to [observed |
   masked] with logical position ids; weights 1 / gamma, normalised over the batch; plus the
   next-token loss on the memory stream with weight 1. Only answers are cut into blocks, the first
   at the answer's start: the prompt is never masked.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
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
from models.embedded.tiny_dllm.train import SIZES, SMOKE, Sizes
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

LEARNING_RATE, DUAL_LEARNING_RATE = 1.5e-3, 7e-4
# Of the prediction stream; divides ANSWER_LENGTH.
DUAL_BLOCK = 16
# The first stage's share of the seconds.
CAUSAL_SHARE = 0.5
PRINT_EVERY_SECONDS = 10.0
CURVE_COLUMNS = ("loss", "masked_loss", "exact_match", "exact_match_masked")
# No answer is longer: 4 steps of at most 11 tokens, the marker, three digits, the end.
LONGEST_ANSWER = 52

# Steps of the two stages, of the sizes of `tiny_dllm.train.SIZES`.
STAGE_STEPS = {"cuda": (9_000, 6_000), "cpu": (1_500, 1_500)}


def new_module() -> Any:
    """Return the twin with random weights: sizes of `DecoderConfig`, transformers' Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=None,
        eos_token_id=EOT,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def causal_mask(token_ids: Tensor) -> Tensor:
    """Return which columns each row sees: itself, and what is before it but padding.

    Args:
        token_ids: (batch, tokens), PAD on the left.

    Returns:
        (batch, 1, tokens, tokens), bool, True where seen.
    """
    tokens = token_ids.shape[1]
    earlier = torch.ones(tokens, tokens, dtype=torch.bool, device=token_ids.device).tril()
    itself = torch.eye(tokens, dtype=torch.bool, device=token_ids.device)
    return earlier & (token_ids != PAD)[:, None, None, :] | itself


def next_token_loss(logits: Tensor, rows: Tensor) -> Tensor:
    """Return the mean cross-entropy of the answers' tokens up to the first end token.

    Args:
        logits: Of all positions, (batch, tokens, vocabulary).
        rows: Prompt and answer, (batch, tokens).
    """
    targets = rows[:, PROMPT_LENGTH:]
    ended = (targets == EOT).long().cumsum(1)
    entropy = F.cross_entropy(
        logits[:, PROMPT_LENGTH - 1 : -1].float().flatten(0, 1),
        targets.flatten(),
        reduction="none",
    ).view(targets.shape)
    counted = (ended <= 1).float()
    return (entropy * counted).sum() / counted.sum()


def dual_stream_mask(token_ids: Tensor, prompt_length: int, block: int) -> Tensor:
    """Return which columns each row of [memory | prediction] sees.

    Memory sees memory causally, never the prediction stream. Prediction sees the prompt, the memory
    of earlier blocks, and of its own block what is not behind it.

    Args:
        token_ids: Memory stream, (batch, prompt + answer), PAD on the left.
        prompt_length: Columns of the prompt, padding included.
        block: Tokens of a block; the last one may be shorter.

    Returns:
        (batch, 1, prompt + 2 * answer, the same), bool, True where seen.
    """
    device = token_ids.device
    memory = torch.arange(token_ids.shape[1], device=device)
    prediction = memory[prompt_length:]
    # The prompt is block -1, whatever its length.
    memory_block = torch.div(memory - prompt_length, block, rounding_mode="floor").clamp(min=-1)
    blocks = memory_block[prompt_length:]
    upper = torch.cat(
        [
            memory[None] <= memory[:, None],
            torch.zeros(len(memory), len(prediction), dtype=torch.bool, device=device),
        ],
        dim=1,
    )
    lower = torch.cat(
        [
            memory_block[None] < blocks[:, None],
            (blocks[None] == blocks[:, None]) & (prediction[None] <= prediction[:, None]),
        ],
        dim=1,
    )
    seen = torch.cat([upper, lower])
    valid = F.pad(token_ids != PAD, (0, len(prediction)), value=True)
    itself = torch.eye(len(seen), dtype=torch.bool, device=device)
    return seen & valid[:, None, None, :] | itself


def dual_stream_batch(
    rows: Tensor, block: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the dual-stream input of rows of prompt and answer.

    Args:
        rows: (batch, PROMPT_LENGTH + answer).
        block: Divides the answer's length.
        generator: On the rows' device.

    Returns:
        Input ids and position ids, (batch, PROMPT_LENGTH + 2 * answer); targets, the tokens of the
        prediction stream in its physical order, and their weights, 0 at observed tokens and summing
        to 1, (batch, answer).
    """
    batch, width = rows.shape
    answer = width - PROMPT_LENGTH
    blocks = answer // block
    shape = (batch, blocks, block)
    # In (0, 1]; the clamp is the code's.
    gamma = (1 - torch.rand(batch, blocks, 1, device=rows.device, generator=generator)).clamp(1e-8)
    draw = torch.rand(shape, device=rows.device, generator=generator)
    rank = draw.argsort(-1).argsort(-1)
    masked = rank < (gamma * block).round()
    place = torch.arange(block, device=rows.device).expand(shape)
    order = (masked * block + place).argsort(-1)
    tokens = rows[:, PROMPT_LENGTH:].view(shape).gather(-1, order)
    positions = torch.arange(PROMPT_LENGTH, width, device=rows.device).view(blocks, block)
    positions = positions.expand(shape).gather(-1, order)
    masked = masked.gather(-1, order)
    weights = masked / gamma
    memory_positions = torch.arange(width, device=rows.device).expand(batch, width)
    return (
        torch.cat([rows, torch.where(masked, MASK, tokens).flatten(1)], dim=1),
        torch.cat([memory_positions, positions.flatten(1)], dim=1),
        tokens.flatten(1),
        (weights / weights.sum()).flatten(1),
    )


@torch.no_grad()
def decode_greedily(module: Any, prompts: Tensor, *, masked: bool = False) -> Tensor:
    """Return greedy answers, without a cache.

    Args:
        module: A causal language model.
        prompts: Left-padded, (batch, prompt length).
        masked: Ask for each token by a mask in its place, as WeDLM does with a window of one,
            instead of by the logits of the token before it.

    Returns:
        (batch, ANSWER_LENGTH), EOT from the first one on.
    """
    ids = prompts.long()
    for _ in range(LONGEST_ANSWER):
        given = F.pad(ids, (0, 1), value=MASK) if masked else ids
        logits = module(
            input_ids=given, attention_mask=causal_mask(given), use_cache=False, logits_to_keep=1
        ).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    answers = ids[:, prompts.shape[1] :]
    ended = (answers == EOT).long().cumsum(1) > 0
    answers = answers.masked_fill(ended, EOT)
    return F.pad(answers, (0, ANSWER_LENGTH - LONGEST_ANSWER), value=EOT)


def match_of(
    module: Any, problems: Problems, device: torch.device, *, masked: bool = False
) -> tuple[dict[str, float], Tensor]:
    """Return the exact match of greedy decoding by number of steps, and the answers."""
    prompts = torch.from_numpy(problems.prompts).to(device)
    answers = [decode_greedily(module, part, masked=masked) for part in prompts.split(1000)]
    joined = torch.cat(answers).cpu()
    return match_by_steps(exact_match(joined, problems), problems), joined


def evaluate(folder: Path, device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Measure the saved weights of both stages, in float32, and write `sample.txt`."""
    problems = held_out(sizes.held_out)
    module = new_module().to(device).eval()
    quality: dict[str, Any] = {"held_out_problems": len(problems.results)}
    lines: list[str] = []
    for file, modes in (
        ("model.safetensors", {"causal": False}),
        ("dual_stream.safetensors", {"dual_causal": False, "dual_masked": True}),
    ):
        if not (folder / file).is_file():
            continue
        module.load_state_dict(load_file(folder / file))
        for name, masked in modes.items():
            quality[name], answers = match_of(module, problems, device, masked=masked)
            lines.append(f"# {name}")
            for number in range(0, len(answers), max(1, len(answers) // 8)):
                lines.append(decode(problems.prompts[number]))
                lines.append(f"    {decode(answers[number].tolist())}")
    (folder / "sample.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return quality


def main() -> None:
    """Train both stages, save, measure."""
    run_recipe(
        "Train tiny-causal.",
        sizes=SIZES,
        smoke=SMOKE,
        train=train,
        evaluate=evaluate,
        options=lambda parser: parser.add_argument(
            "--init", type=Path, help="Folder whose first stage is over."
        ),
    )


def train(
    arguments: argparse.Namespace, device: torch.device, sizes: Sizes, begin: float
) -> dict[str, Any]:
    """Train both stages and save; return what is known about the run."""
    out: Path = arguments.out
    on_gpu = device.type == "cuda"
    seed_everything(arguments.seed)
    module = new_module()
    module.config.save_pretrained(out)
    module.generation_config.save_pretrained(out)
    save_tokenizer(out)
    module.to(device).train()
    pool = Pool(sizes.per_level, arguments.seed, device)
    recipe = {
        "seed": arguments.seed,
        "device": device.type,
        "sizes": sizes._asdict(),
        "stages": STAGE_STEPS[device.type],
    }
    checkpoint = Checkpoint(out, recipe)
    curve = Curve(out / "curve.csv", CURVE_COLUMNS, checkpoint.kept)
    seconds = arguments.max_seconds
    if seconds is not None:
        seconds = max(2.0, seconds - (time.monotonic() - begin) - max(5.0, 0.08 * seconds))
    facts: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "seed": arguments.seed,
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "torch": torch.__version__,
    }
    stages = zip(
        ("causal", "dual-stream"),
        STAGE_STEPS[device.type],
        (CAUSAL_SHARE, 1 - CAUSAL_SHARE),
        strict=True,
    )
    if arguments.init is not None and not checkpoint.stage:
        # Its first stage is over.
        state = load_file(arguments.init / "model.safetensors")
        module.load_state_dict(state)
        size = save_half(state, out / "model.safetensors")
        checkpoint.facts["causal"] = {"initialised_from": arguments.init.name, "bytes": size}
    for stage, steps, share in stages:
        if stage in checkpoint.facts:
            continue
        steps = max(3, round(steps * arguments.steps_scale))
        clock = Clock(steps, None if seconds is None else share * seconds)
        size = _train_stage(stage, module, pool, clock, curve, checkpoint, arguments, sizes)
        checkpoint.facts[stage] = {
            "train_steps": clock.done,
            "train_seconds": round(clock.seconds, 1),
            "bytes": size,
        }
    checkpoint.remove()
    return facts | {f"{stage} stage": value for stage, value in checkpoint.facts.items()}


def _train_stage(
    stage: str,
    module: Any,
    pool: Pool,
    clock: Clock,
    curve: Curve,
    checkpoint: Checkpoint,
    arguments: argparse.Namespace,
    sizes: Sizes,
) -> int:
    """Train one stage; leave the averaged weights in the module and its file, return its bytes."""
    dual = stage == "dual-stream"
    out: Path = arguments.out
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    peak = DUAL_LEARNING_RATE if dual else LEARNING_RATE
    file = out / ("dual_stream.safetensors" if dual else "model.safetensors")
    # On a CPU more steps are worth more than larger ones: the model knows the language already.
    batch = sizes.batch // 4 if dual and not on_gpu else sizes.batch
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01, fused=on_gpu
    )
    generator = torch.Generator(device).manual_seed(arguments.seed + 1 + dual)
    average = AveragedWeights(module, 0.999)
    averaged_module = new_module().to(device).eval()
    glance = held_out(sizes.glance)
    parts = {
        "module": module,
        "optimizer": optimizer,
        "average": average,
        "noise": generator,
        "draws": pool.generator,
    }
    checkpoint.restore(stage, clock, parts)
    # The stages before are then in the file as well.
    checkpoint.save(stage, clock.done, clock, parts, now=True)
    forward = torch.compile(module, dynamic=False) if arguments.compile else module
    losses: list[Tensor] = []
    # The clock starts anew with the loop: the first step is always told.
    next_print, next_save = 0.0, clock.seconds + sizes.save_seconds
    for step, progress in clock:
        for group in optimizer.param_groups:
            group["lr"] = peak * cosine(progress, warmup=0.02)
        # The second stage knows the language already.
        rows = pool.draw(batch, 1.0 if dual else progress)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            if dual:
                loss, masked_loss = _dual_losses(forward, rows, generator)
            else:
                logits = forward(
                    input_ids=rows, attention_mask=causal_mask(rows), use_cache=False
                ).logits
                loss = masked_loss = next_token_loss(logits, rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        average.update(module)
        losses.append(torch.stack([loss.detach(), masked_loss.detach()]))
        if clock.seconds >= next_print:
            mean = torch.stack(losses).mean(0).tolist()
            losses.clear()
            values = {"loss": mean[0]} | ({"masked_loss": mean[1]} if dual else {})
            if clock.seconds >= next_save:
                average.copy_to(averaged_module)
                save_half(averaged_module.state_dict(), file)
                with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                    values["exact_match"] = match_of(averaged_module, glance, device)[0][
                        "exact_match"
                    ]
                    if dual:
                        values["exact_match_masked"] = match_of(
                            averaged_module, glance, device, masked=True
                        )[0]["exact_match"]
                text = json.dumps({"unfinished_stage": stage, "step": step, **values}, indent=2)
                (out / "quality.json").write_text(text + "\n", encoding="utf-8")
                next_save = clock.seconds + sizes.save_seconds
            curve.add(stage, step, clock.seconds, **values)
            shown = " ".join(f"{name} {value:.4f}" for name, value in values.items())
            print(f"tiny-causal {stage} {step} {clock.seconds:.0f}s {shown}", flush=True)
            next_print = clock.seconds + PRINT_EVERY_SECONDS
        checkpoint.save(stage, step + 1, clock, parts)
    average.copy_to(module)
    return save_half(module.state_dict(), file)


def _dual_losses(module: Any, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the total loss, and the masked tokens' part of it."""
    ids, positions, targets, weights = dual_stream_batch(rows, DUAL_BLOCK, generator)
    logits = module(
        input_ids=ids,
        position_ids=positions,
        attention_mask=dual_stream_mask(rows, PROMPT_LENGTH, DUAL_BLOCK),
        use_cache=False,
    ).logits
    width = rows.shape[1]
    entropy = F.cross_entropy(
        logits[:, width:].float().flatten(0, 1), targets.flatten(), reduction="none"
    )
    masked_loss = (entropy * weights.flatten()).sum()
    return (masked_loss + next_token_loss(logits[:, :width], rows)) / 2, masked_loss


if __name__ == "__main__":
    main()
