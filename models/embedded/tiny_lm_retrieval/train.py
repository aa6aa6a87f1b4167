"""Train `tiny-lm-retrieval`: `python -m models.embedded.tiny_lm_retrieval.train --out DIR`.

Next-token loss on recalled words only: everything else is drawn by lot and teaches nothing. Texts
begin short, where a few facts are soon told apart, and double in length each time nine in ten words
are recalled, up to `LENGTH` and never beyond: what happens on longer texts is extrapolation.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from models.embedded.tiny_lm_retrieval.data import (
    BEGIN,
    END,
    VALUES_PER_FACT,
    VOCABULARY,
    decode,
    draw_batch,
    draw_question,
    save_tokenizer,
)
from models.embedded.training import (
    AveragedWeights,
    Clock,
    Curve,
    cosine,
    run_recipe,
    save_half,
    seed_everything,
)

HIDDEN_SIZE, INNER_SIZE, LAYERS, HEADS, KV_HEADS, HEAD_SIZE = 128, 256, 4, 4, 2, 64
ROPE_BASE = 10_000.0
# Longest text of the training.
LENGTH = 256
FIRST_LENGTH = 64
# Spread of the embeddings' numbers, and the factor on what other heads and layers write at first.
SPREAD, QUIET = 0.02, 0.1
# Of `wire_recall`: the common number of all embeddings; factors of its weights; and what makes the
# logits of a tied embedding differ by more than one.
COMMON, LOOK, WRITE, MATCH, COPY, SHARPNESS = 0.06, 2.4, 0.03, 3.0, 0.3, 8.0
# A longer text comes when this share of the words of the last steps was recalled.
GROW_AT, GROW_STEPS = 0.9, 20
# Facts of a text at most, one for so many tokens.
TOKENS_PER_FACT = 11
# Share of the places that tell a fact, at least: dense while the text is still growing, because
# only recalled words teach; then as sparse as a needle.
DENSE_SHARE, SPARSE_SHARE = 0.6, 0.1
LEARNING_RATE = 1e-3
# What the model must reach at LENGTH before any method is measured on it.
GATE = 0.9
QUESTION_FACTS = 16
PRINT_EVERY_SECONDS, SAVE_EVERY_SECONDS = 15.0, 120.0
CURVE_COLUMNS = ("length", "loss", "recalled", "held_out_recall")


class Sizes(NamedTuple):
    """How much of everything; see `SIZES`.

    Attributes:
        steps: Of the optimizer.
        tokens: Of a batch.
        questions: Of the final measurement, for each number of facts.
        glance: Questions of the measurements while training.
    """

    steps: int
    tokens: int
    questions: int
    glance: int


SIZES = {
    "cuda": Sizes(8_000, 16_384, 500, 200),
    # One thread takes 0.2 seconds a step when it has a core for itself.
    "cpu": Sizes(6_000, 2_048, 500, 100),
}
SMOKE = Sizes(0, 512, 4, 4)


def new_module() -> Any:
    """Return the untrained network: transformers' Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=HIDDEN_SIZE,
            intermediate_size=INNER_SIZE,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_SIZE,
            # No bound of the architecture: a text of the training has LENGTH tokens at most.
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
            tie_word_embeddings=True,
            bos_token_id=BEGIN,
            eos_token_id=END,
            pad_token_id=None,
        )
    )


@torch.no_grad()
def wire_recall(module: Any, generator: torch.Generator) -> None:
    """Start the network with the two heads in a row that recall takes.

    A head of layer 0 tells each token what stands before it; a head of layer 1 looks for the token
    whose predecessor is the present one, and copies it. From plain noise neither learns before the
    other has: two runs of 2,000 steps and more saw no recall beyond guessing among the values told.
    Wired, they are weak and blurred, and training does the rest, in all layers.

    Layer 0: all embeddings get one common number, so that queries and keys of the head have a part
    that is the same for all tokens; turned by their positions, these are aligned one token apart.
    Its values are a code of the token (`codes`), written in directions of their own (`written`).
    Layer 1: queries are the code of the token itself, keys what stands in those directions; only
    frequencies that turn by less than a radian in `LENGTH` tokens take part.

    Args:
        module: Fresh, its weights drawn already.
        generator: Of the codes, on the CPU.
    """
    embedding = module.model.embed_tokens.weight
    # Of one length, since a norm divides the common number by it.
    embedding *= (SPREAD**2 * HIDDEN_SIZE) ** 0.5 / embedding.norm(dim=1, keepdim=True)
    embedding[:, 0] = COMMON
    for layer in module.model.layers:
        # What the rest writes would drown it.
        layer.self_attn.o_proj.weight *= QUIET
        layer.mlp.down_proj.weight *= QUIET
    first, second = (layer.self_attn for layer in module.model.layers[:2])
    half = first.head_dim // 2
    frequencies = ROPE_BASE ** (-torch.arange(half) / half)
    codes, written, copied = (
        torch.linalg.qr(torch.randn(HIDDEN_SIZE, 2 * half, generator=generator))[0].to(embedding)
        for _ in range(3)
    )
    codes[0] = 0.0  # the common number tells no token from another
    # What else the head would see of the tokens is noise of the size of what it looks for.
    for project in (first.q_proj, first.k_proj, second.q_proj, second.k_proj):
        project.weight[: 2 * half] = 0.0
    fast = (frequencies > 0.1).nonzero()[:, 0]
    first.q_proj.weight[fast, 0] = LOOK
    # A query at p meets the key at p - 1: the key's part is turned ahead by one position.
    first.k_proj.weight[fast, 0] = LOOK * frequencies[fast].cos().to(embedding)
    first.k_proj.weight[fast + half, 0] = LOOK * frequencies[fast].sin().to(embedding)
    first.v_proj.weight[: 2 * half] = codes.T
    first.o_proj.weight[:, : 2 * half] = WRITE * written
    slow = (frequencies * LENGTH < 1).nonzero()[:, 0]
    rows = torch.cat([slow, slow + half])
    second.q_proj.weight[rows] = MATCH * codes.T[rows]
    second.k_proj.weight[rows] = MATCH * written.T[rows]
    second.v_proj.weight[: 2 * half] = copied.T
    second.o_proj.weight[:, : 2 * half] = COPY * copied
    module.model.norm.weight.fill_(SHARPNESS)


def recall_loss(module: Any, ids: Tensor, recalled: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean loss of recalled words, and the share of them that the argmax hits.

    Args:
        module: The network.
        ids: (rows, length).
        recalled: As in `Batch`, (rows, length), bool.
    """
    wanted = recalled[:, 1:]
    hidden = module.model(ids).last_hidden_state[:, :-1][wanted]
    logits, targets = module.lm_head(hidden), ids[:, 1:][wanted]
    hits = (logits.argmax(-1) == targets).float().mean()
    return F.cross_entropy(logits.float(), targets), hits


@torch.no_grad()
def recall(module: Any, *, length: int, facts: int, count: int, seed: int = 1) -> float:
    """Return the share of questions that greedy decoding answers with all values.

    Args:
        module: The network.
        length: Tokens of the contexts.
        facts: Facts of a context.
        count: Questions.
        seed: Of the questions.
    """
    generator = np.random.default_rng([seed, length, facts])
    questions = [draw_question(generator, length, facts) for _ in range(count)]
    device = next(module.parameters()).device
    right = 0
    # Greedy decoding is right just where every argmax is, given the values before it.
    for part in range(0, count, 50):
        chosen = questions[part : part + 50]
        ids = torch.tensor([[*each.prompt, *each.values[:-1]] for each in chosen], device=device)
        hidden = module.model(ids).last_hidden_state[:, -VALUES_PER_FACT:]
        targets = torch.tensor([each.values for each in chosen], device=device)
        right += int((module.lm_head(hidden).argmax(-1) == targets).all(-1).sum())
    return right / count


def load(folder: Path) -> Any:
    """Return the network with the weights in a folder, float32."""
    module = new_module()
    state = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    missing, unexpected = module.load_state_dict(state, strict=False)
    if unexpected or missing != ["lm_head.weight"]:
        raise ValueError(f"weights do not fit: {unexpected} too many, {missing} missing.")
    module.tie_weights()
    return module.eval()


def save(module: Any, folder: Path) -> int:
    """Write weights, configuration and tokenizer as transformers reads them; return the bytes."""
    module.config.save_pretrained(folder)
    module.generation_config.save_pretrained(folder)
    save_tokenizer(folder)
    state = {name: value for name, value in module.state_dict().items() if name != "lm_head.weight"}
    return save_half(state, folder / "model.safetensors")


def evaluate(folder: Path, device: torch.device, sizes: Sizes) -> dict[str, float]:
    """Measure the saved weights, in float32, and write `sample.txt`."""
    module = load(folder).to(device)
    quality: dict[str, float] = {}
    for facts in (QUESTION_FACTS, 1):
        quality[f"recall_{LENGTH}_{facts}_facts"] = recall(
            module, length=LENGTH, facts=facts, count=sizes.questions
        )
    lines = []
    generator = np.random.default_rng(2)
    for _ in range(6):
        question = draw_question(generator, 48, 4)
        answer = module.generate(
            torch.tensor([question.prompt], device=device),
            max_new_tokens=VALUES_PER_FACT,
            do_sample=False,
            pad_token_id=END,
        )[0, len(question.prompt) :].tolist()
        lines += [decode(question.prompt), f"    {decode(answer)}"]
    (folder / "sample.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return quality


def train(
    arguments: argparse.Namespace, device: torch.device, sizes: Sizes, begin: float
) -> dict[str, object]:
    """Train and save; return what is known about the run."""
    out: Path = arguments.out
    seed_everything(arguments.seed)
    module = new_module().to(device)
    wire_recall(module, torch.Generator().manual_seed(arguments.seed))
    averaged_module = new_module().to(device).eval()
    average = AveragedWeights(module, 0.995)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    generator = np.random.default_rng(arguments.seed)
    curve = Curve(out / "curve.csv", CURVE_COLUMNS)
    seconds = arguments.max_seconds
    if seconds is not None:
        # The evaluation at the end, and what went before.
        seconds = max(1.0, seconds - (time.monotonic() - begin) - max(5.0, 0.05 * seconds))
    clock = Clock(sizes.steps, seconds)
    length, since = FIRST_LENGTH, 0
    losses: list[float] = []
    hits: list[float] = []
    next_print, next_save = 0.0, SAVE_EVERY_SECONDS
    for step, progress in clock:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * cosine(progress)
        batch = draw_batch(
            generator,
            max(1, sizes.tokens // length),
            length,
            max(2, length // TOKENS_PER_FACT),
            SPARSE_SHARE if length == LENGTH else DENSE_SHARE,
        )
        ids = torch.from_numpy(batch.ids).to(device)
        loss, hit = recall_loss(module, ids, torch.from_numpy(batch.recalled).to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        average.update(module)
        losses.append(float(loss.detach()))
        hits.append(float(hit))
        since += 1
        if (
            length < LENGTH
            and since >= GROW_STEPS
            and sum(hits[-GROW_STEPS:]) >= GROW_AT * GROW_STEPS
        ):
            length, since = 2 * length, 0
        if clock.seconds >= next_print:
            values = {
                "length": length,
                "loss": sum(losses) / len(losses),
                "recalled": sum(hits[-len(losses) :]) / len(losses),
            }
            losses.clear()
            if clock.seconds >= next_save:
                average.copy_to(averaged_module)
                save(averaged_module, out)
                values["held_out_recall"] = recall(
                    averaged_module, length=LENGTH, facts=QUESTION_FACTS, count=sizes.glance
                )
                next_save = clock.seconds + SAVE_EVERY_SECONDS
            curve.add("train", step, clock.seconds, **values)
            shown = " ".join(f"{name} {value:.4g}" for name, value in values.items())
            print(f"tiny-lm-retrieval {step} {clock.seconds:.0f}s {shown}", flush=True)
            next_print = clock.seconds + PRINT_EVERY_SECONDS
    average.copy_to(averaged_module)
    size = save(averaged_module, out)
    return {
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "bytes": size,
        "train_steps": clock.done,
        "train_seconds": round(clock.seconds, 1),
        "tokens_per_step": sizes.tokens,
        "longest_text": length,
        "seed": arguments.seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    """Train, save, measure."""
    run_recipe(
        "Train tiny-lm-retrieval.",
        sizes=SIZES,
        smoke=SMOKE,
        train=train,
        evaluate=evaluate,
        gate=lambda quality: quality[f"recall_{LENGTH}_{QUESTION_FACTS}_facts"] >= GATE,
        compiles=False,
    )


if __name__ == "__main__":
    main()
