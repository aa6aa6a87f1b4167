"""Print what selecting tokens costs in quality, saves in time, and allows in length.

Run `python -m tests.methods.sparse_attention.measure_tokenselect [PART ...]`; parts are those of
`PARTS`, all when none is named. `votes` and `theta` grade the last tokens of a documentation that
comes with Python, fed one by one, with SmolLM2-135M; `times` clocks the attention of one layer, in
turn; `recall` asks tiny-lm-retrieval about texts longer than it was trained on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from hardware.profile import Profile
from methods.sparse_attention.tokenselect import TokenSelect, TokenSelectRule
from models.attention import AttentionLM, AttentionRule, Rule
from models.base import Decoding, TextGenerator
from models.embedded.tiny_lm_retrieval.data import Question, draw_question
from models.loading import load
from models.teacher_forcing import open_loss
from models.text import CausalLM
from tests.methods.sparse_attention.measure_selection import documentation
from tests.models.tiny import NumberTokenizer

GRADED = 256
# Read as the card's protocol has it: the prompt with full attention, true positions.
WITHIN_LENGTH = TokenSelect(n_init=4, n_local=64, k=64, chunk=64, rope_mode="absolute", theta=1.0)
VARIANTS: Mapping[str, TokenSelect | None] = {
    "full": None,
    "window": replace(WITHIN_LENGTH, k=0),
    "soft k=16": replace(WITHIN_LENGTH, k=16),
    "soft": WITHIN_LENGTH,
    "soft k=256": replace(WITHIN_LENGTH, k=256),
    "soft, released temperature": replace(WITHIN_LENGTH, scale_scores=False),
    "hard": replace(WITHIN_LENGTH, vote="hard"),
    "logits": replace(WITHIN_LENGTH, vote="logits"),
    "per head": replace(WITHIN_LENGTH, vote="per_head"),
    "head map": replace(WITHIN_LENGTH, reference_head_map=True),
    "pooled": replace(WITHIN_LENGTH, pool_kernel=3),
    "blocks of 16": replace(WITHIN_LENGTH, block=16),
}
THETAS = (0.7, 0.8, 0.9, 0.95)
# The settings that the recall of tiny-lm-retrieval is shown with.
SHORT = TokenSelect(n_init=8, n_local=64, k=64, chunk=32)
LENGTHS = (256, 384, 512, 1024, 2048, 4096)
# Query heads, key-value heads, head_dim.
SHAPES = {"SmolLM2-135M": (9, 3, 64), "Llama-3-8B": (32, 8, 128)}
CONTEXTS = (2048, 4096, 8192, 32768)
CPU = Profile(name="measure", kind="cpu", label="This machine")


class DenselyRead(TokenSelectRule):
    """Selects while decoding only: the prompt is read with full attention."""

    observes: int | None = 0


def selecting(model: CausalLM, method: TokenSelect) -> AttentionLM:
    """Return the model with its decoding steps selected, its prompt read densely."""
    return AttentionLM(model, lambda: DenselyRead(method))


def real_text(model: TextGenerator) -> list[int]:
    """Return the ids of the text that is graded."""
    return documentation(model.tokenizer)


def loss_of(
    model: CausalLM, token_ids: Sequence[int], graded: int, method: TokenSelect | None
) -> float:
    """Return the mean loss of the last `graded` tokens, nats; full attention without a method."""
    chosen = model if method is None else selecting(model, method)
    return float(open_loss(chosen, token_ids[:-graded], token_ids[-graded:]).mean())


def print_votes() -> None:
    """Print the loss of every variant."""
    model = load("smollm2-135m", offline=True)
    token_ids = real_text(model)
    for name, method in VARIANTS.items():
        print(f"{name:28}{loss_of(model, token_ids, GRADED, method):8.3f}", flush=True)


def print_theta() -> None:
    """Print skip rates, and the loss with and without carrying tokens over."""
    model = load("smollm2-135m", offline=True)
    token_ids = real_text(model)
    for theta in THETAS:
        for carry in (False, True):
            rules: list[DenselyRead] = []

            def make(method: TokenSelect, rules: list[DenselyRead] = rules) -> AttentionRule:
                rules.append(DenselyRead(method))
                return rules[-1]

            method = replace(WITHIN_LENGTH, theta=theta, carry=carry)
            selected = AttentionLM(model, lambda method=method, make=make: make(method))
            loss = float(open_loss(selected, token_ids[:-GRADED], token_ids[-GRADED:]).mean())
            notes = rules[-1].notes
            layers = rules[-1].skip_rates
            print(
                f"theta {theta} carry {carry!s:5} loss {loss:.3f} skipped {notes['skip_rate']:.1%} "
                f"(layers {min(layers):.0%} to {max(layers):.0%}, "
                f"median {float(np.median(layers)):.0%}) rows read {notes['rows_read_share']:.2f}",
                flush=True,
            )


def one_layer(heads: int, kv_heads: int, head_dim: int) -> CausalLM:
    """Return a random Llama of one layer with attention of a given shape, and little else."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16 * heads,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=1 << 17,
        bos_token_id=None,
        eos_token_id=0,
    )
    return CausalLM(LlamaForCausalLM(config), NumberTokenizer(), "one-layer")


def attention_step(model: CausalLM, rule: AttentionRule, context: int) -> Callable[[], None]:
    """Return what runs one decoding step's attention behind `context` random rows."""
    session = AttentionLM(model, lambda: rule).session(context + 1)
    cache = session._layers.caches[0]
    generator = torch.Generator().manual_seed(0)
    for states in (cache._keys, cache._values):
        states.normal_(generator=generator)
    cache.rows = context
    if kernels := getattr(session._layers, "_layers", None):  # native: a forward does it first
        kernels.reserve(1, context + 1)
    shape = (1, model.facts.num_heads, model.facts.head_dim)
    queries = torch.randn(shape, generator=generator)

    @torch.inference_mode()
    def step() -> None:
        cache.open(1, context)
        rule.attend(0, queries, cache)
        cache.close(0)

    return step


def interleaved_seconds(
    steps: Sequence[Callable[[], None]], rounds: int, repeats: int = 4
) -> npt.NDArray[np.float64]:
    """Return processor seconds of each step, (rounds, steps): in random order in each round."""
    order = np.random.default_rng(0)
    seconds = np.empty((rounds, len(steps)))
    for step in steps:
        step()
    for row in seconds:
        for place in order.permutation(len(steps)):
            begin = time.process_time()
            for _ in range(repeats):
                steps[place]()
            row[place] = (time.process_time() - begin) / repeats
    return seconds


def ratio(seconds: npt.NDArray[np.float64], method: int) -> str:
    """Return how many times faster than the first step a step is, with its 95% interval."""
    draws = np.random.default_rng(1).integers(len(seconds), size=(2000, len(seconds)))
    sums = seconds[draws].sum(axis=1)
    low, high = np.quantile(sums[:, 0] / sums[:, method], [0.025, 0.975])
    total = seconds.sum(axis=0)
    return f"{total[0] / total[method]:5.2f}x [{low:.2f}, {high:.2f}]"


def print_times(rounds: int = 30) -> None:
    """Print the time of attention, full, selected at each step and reused, and the formula's."""
    method = TokenSelect(n_init=128, n_local=512, k=2048, rope_mode="absolute")
    small = replace(method, n_init=4, n_local=64, k=188, chunk=64)
    print("processor ms a step; bound: 2n / ((1 - r) n + 2 n') of rows read at skip rate r")
    for name, shape in SHAPES.items():
        model = one_layer(*shape)
        for context in CONTEXTS:
            ways: list[tuple[str, AttentionRule, float]] = [("full", Rule(), 1.0)]
            for settings in (each for each in (method, small) if each.budget < context):
                for rate, theta in ((0, 1.0), (1, -1.0)):
                    rule = TokenSelectRule(replace(settings, theta=theta))
                    bound = 2 * context / ((1 - rate) * context + 2 * settings.budget)
                    ways.append((f"{settings.budget} of them, r={rate}", rule, bound))
            steps = [attention_step(model, rule, context) for _, rule, _ in ways]
            seconds = interleaved_seconds(steps, rounds)
            mean = 1e3 * seconds.mean(axis=0)
            print(f"{name}, {context} tokens: full {mean[0]:.3f} ms")
            for place, (what, _, bound) in enumerate(ways[1:], 1):
                print(
                    f"  {what:20} {mean[place]:8.3f} ms {ratio(seconds, place)} of {bound:.2f}x",
                    flush=True,
                )


def recalled(model: TextGenerator, questions: Sequence[Question]) -> float:
    """Return the share of questions answered with all values."""
    right = 0
    for question in questions:
        decoding = Decoding(max_new_tokens=len(question.values))
        right += model.generate(question.prompt, decoding).token_ids == question.values
    return right / len(questions)


def print_recall(count: int = 25) -> None:
    """Print the recall of full attention, of both ends alone, and of the selection."""
    model = load("tiny-lm-retrieval", offline=True)
    for facts in (16, 1):
        for length in LENGTHS:
            generator = np.random.default_rng([3, length, facts])
            questions = [draw_question(generator, length, facts) for _ in range(count)]
            shares = {"full": recalled(model, questions)}
            for name, method in (
                ("k=0", replace(SHORT, k=0)),
                ("k=16", replace(SHORT, k=16)),
                ("k=64", SHORT),
                ("k=64, blocks of 16", replace(SHORT, block=16)),
            ):
                with method.apply(model, CPU) as selected:
                    shares[name] = recalled(selected, questions)
            shown = " ".join(f"| {name} {share:.0%}" for name, share in shares.items())
            print(f"{facts:2} facts, {length:4} tokens {shown}", flush=True)


PARTS: Mapping[str, Callable[[], None]] = {
    "votes": print_votes,
    "theta": print_theta,
    "times": print_times,
    "recall": print_recall,
}


def main(*parts: str) -> None:
    """Print the named parts, or all of them."""
    if unknown := set(parts) - set(PARTS):
        raise SystemExit(f"no part named {sorted(unknown)}; there are {', '.join(PARTS)}.")
    for name in parts or PARTS:
        print(f"--- {name}", flush=True)
        PARTS[name]()


if __name__ == "__main__":
    main(*sys.argv[1:])
