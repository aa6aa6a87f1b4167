"""Distil `tiny-draft`: `python -m models.embedded.tiny_draft.train --teacher DIR --out DIR`.

1. The teacher, SmolLM2-135M-Instruct, continues function stubs and chats, greedily and sampled; its
   most likely tokens are kept for every token that it reads or writes (`Texts`).
2. Windows of the standard library's sources, with the tokens that stand there as targets.
3. The student's embedding, tied to its head, starts as the best approximation of the teacher's
   logits of its rank (`initial_embedding`).
4. Training: cross-entropy against the teacher's most likely tokens, mixed with a share of the first
   of them, because a draft is verified greedily most of the time.

The recipe is a number of generated batches and of steps (`SIZES`: a GPU affords more than two cores
of a CPU); `--max-seconds` may end either early. The library's sources are those of the Python that
runs it; its version is in `quality.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.embedded.tiny_draft.data import Kind, Prompt, library_windows, prompts
from models.embedded.training import Clock, Curve, cosine, recipe_parser, save_half, seed_everything

HIDDEN_SIZE, INNER_SIZE, LAYERS, HEADS = 128, 512, 4, 4
LEARNING_RATE = 2e-3
# Of the learning rate: its rows are few numbers, already near their place.
EMBEDDING_RATE = 0.5
# Share of the teacher's argmax in the target.
HARD_SHARE = 0.2
# A prompt's own tokens teach less than what the teacher wrote.
PROMPT_WEIGHT = 0.3
# Most likely tokens that are kept of a distribution of 49,152; the rest weighs a few percent.
CANDIDATES = 32
# Share of the seconds for step 1.
GENERATION_SHARE = 0.35
# Chances of the temperatures, first pass over the prompts and later ones.
TEMPERATURES = (0.0, 0.7, 1.0)
CHANCES = ((0.6, 0.2, 0.2), (0.0, 0.5, 0.5))
LIBRARY_SHARE = 0.2
ENDS = (0, 2)
DRAFTS = 4
PRINT_EVERY_SECONDS, SAVE_EVERY_SECONDS = 20.0, 240.0
CURVE_COLUMNS = ("loss", "agreement", "held_out_agreement", "held_out_acceptance")


class Sizes(NamedTuple):
    """How much of everything; see `SIZES`.

    Attributes:
        code, chat: Prompts that the teacher continues.
        held_out_code, held_out_chat: Prompts that the quality is measured behind.
        new_tokens: Longest continuation.
        batches, batch_rows: Generated batches, and texts in each.
        windows, window: Windows of the library's sources, and tokens in each.
        steps: Of the optimizer.
        rows, library_rows: Texts or windows in a batch.
        positions: Of a batch that are trained on.
        chunk: Positions whose logits exist at a time.
        longest_prompt: Longer ones are left out.
        frequent, drawn: Tokens whose logits take part in a step: the most frequent ones, and as
            many of the others by lot; no `drawn` takes the whole vocabulary.
    """

    code: int
    chat: int
    held_out_code: int
    held_out_chat: int
    new_tokens: int
    batches: int
    batch_rows: int
    windows: int
    window: int
    steps: int
    rows: int
    library_rows: int
    positions: int
    chunk: int
    longest_prompt: int
    frequent: int
    drawn: int


SIZES = {
    "cuda": Sizes(
        code=4_800,
        chat=1_350,
        held_out_code=192,
        held_out_chat=96,
        new_tokens=144,
        batches=16,
        batch_rows=1024,
        windows=3_000,
        window=768,
        steps=8_000,
        rows=64,
        library_rows=24,
        positions=10_240,
        chunk=2560,
        longest_prompt=160,
        frequent=0,
        drawn=0,
    ),
    "cpu": Sizes(
        code=1_400,
        chat=300,
        held_out_code=16,
        held_out_chat=8,
        new_tokens=96,
        batches=40,
        batch_rows=48,
        windows=4_000,
        window=256,
        steps=5_000,
        rows=8,
        library_rows=4,
        positions=1_024,
        chunk=1024,
        longest_prompt=110,
        frequent=8_192,
        drawn=4_096,
    ),
}


class Texts(NamedTuple):
    """Token rows with the weight of each position, and what the teacher expects there.

    Attributes:
        ids: Padded on the right with 0, (rows, tokens), int64.
        weights: Of the prediction at each position, 0 where none counts, (rows, tokens).
        candidates: The teacher's most likely next tokens, best first, (rows, tokens, candidates),
            int32.
        shares: Their probabilities, (rows, tokens, candidates).
    """

    ids: Tensor
    weights: Tensor
    candidates: Tensor
    shares: Tensor


class Continuation(NamedTuple):
    """What the teacher wrote behind a prompt, and what it expected.

    Attributes:
        written: Tokens up to and with the first end token.
        candidates, shares: As in `Texts`, for every position of prompt and text but the last,
            (tokens, candidates).
        states: Last hidden states at the positions that were written from, (tokens, width).
    """

    written: list[int]
    candidates: Tensor
    shares: Tensor
    states: Tensor


class Teacher:
    """The model to learn from, and its tokenizer."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from tokenizers import Tokenizer
        from transformers import AutoModelForCausalLM

        self.device = device
        self.tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        module: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
        )
        self.module = module.to(device).eval().requires_grad_(False)
        # In float32: logits rounded to bfloat16 tie, and a tie is no answer.
        self.head: Tensor = self.module.lm_head.weight.float()

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of texts, without tokens that they do not spell out."""
        encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return [item.ids for item in encoded]

    def expected(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, (…, vocabulary), candidates and shares, after hidden states."""
        logits = states.float() @ self.head.T
        shares, candidates = logits.topk(CANDIDATES, dim=-1)
        shares = (shares - logits.logsumexp(-1, keepdim=True)).exp()
        return logits, candidates.int(), shares

    @torch.no_grad()
    def continue_(
        self,
        given: Sequence[Sequence[int]],
        temperatures: Tensor,
        new_tokens: int,
        generator: torch.Generator,
    ) -> list[Continuation]:
        """Return continuations, each up to and with its first end token.

        Args:
            given: Prompts.
            temperatures: One for each prompt; 0 takes the most likely token.
            new_tokens: Most tokens of a continuation.
            generator: On the device.
        """
        from transformers import DynamicCache

        width = max(map(len, given))
        ids = torch.zeros(len(given), width, dtype=torch.int64)
        mask = torch.zeros(len(given), width + new_tokens, dtype=torch.int64)
        for row, tokens in enumerate(given):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        temperatures = temperatures.to(self.device)[:, None]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        ends = torch.tensor(ENDS, device=self.device)
        cache = DynamicCache()
        finished = torch.zeros(len(given), dtype=torch.bool, device=self.device)
        written: list[Tensor] = []
        kept: list[tuple[Tensor, Tensor]] = []
        states: list[Tensor] = []
        fed = ids
        for step in range(new_tokens):
            seen = width + step
            hidden = self.module.model(
                input_ids=fed,
                attention_mask=mask[:, :seen],
                position_ids=positions[:, seen - fed.shape[1] : seen],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            for part in hidden[:, :-1].split(8, dim=1):  # of the prompt
                kept.append(self.expected(part)[1:])
            logits, candidates, shares = self.expected(hidden[:, -1])
            kept.append((candidates[:, None], shares[:, None]))
            states.append(hidden[:, -1])
            uniform = torch.rand(logits.shape, device=self.device, generator=generator)
            # Gumbel's trick; at temperature 0 the noise is gone and the argmax stays.
            noise = -torch.log(-torch.log(uniform.clamp_(1e-20, 1 - 1e-7)))
            chosen = (logits + temperatures * noise).argmax(-1)
            written.append(chosen)
            finished |= torch.isin(chosen, ends)
            fed = chosen[:, None]
            # Looking costs a wait for the device.
            if step % 16 == 15 and bool(finished.all()):
                break
        candidates, shares = (torch.cat(parts, dim=1) for parts in zip(*kept, strict=True))
        reached = torch.stack(states, dim=1)
        found = []
        for row, tokens in enumerate(torch.stack(written, dim=1).tolist()):
            text = tokens[: _first_end(tokens) + 1]
            part = slice(width - len(given[row]), width + len(text) - 1)
            found.append(
                Continuation(
                    text, candidates[row, part], shares[row, part], reached[row, : len(text)]
                )
            )
        return found


def _first_end(row: list[int]) -> int:
    return next((place for place, token in enumerate(row) if token in ENDS), len(row))


def new_student(vocabulary: int) -> Any:
    """Return a student with random weights; keys and sizes of transformers' Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INNER_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=1,
        eos_token_id=list(ENDS),
        pad_token_id=2,
    )
    return LlamaForCausalLM(config)


def initial_embedding(head: Tensor, states: Tensor, frequencies: Tensor, rank: int) -> Tensor:
    """Return the head whose logits come closest to the teacher's on its own hidden states.

    With teacher head W, (vocabulary, width), hidden states h of second moment C and token weights
    d, the best logits of a rank are those of the truncated singular value decomposition of
    D^(1/2) (W - mean) C^(1/2), mean under d, since softmax does not see a shift of all logits. The
    matching hidden states have unit second moment: the scale that a final RMSNorm gives them.

    Args:
        head: W, (vocabulary, width).
        states: Hidden states, (samples, width).
        frequencies: How often each token occurs, (vocabulary,).
        rank: Width of the student.

    Returns:
        (vocabulary, rank), float32.
    """
    head, states = head.double(), states.double()
    weights = frequencies.double() / frequencies.sum() + 1 / len(frequencies)
    weights = (weights / weights.sum())[:, None]
    centred = head - (weights * head).sum(0)
    values, vectors = torch.linalg.eigh(states.T @ states / len(states))
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shaped = centred @ root
    _, directions = torch.linalg.eigh(shaped.T @ (weights * shaped))
    return (shaped @ directions[:, -rank:]).float()


class DistillationLoss(torch.autograd.Function):
    """Cross-entropy of a tied head's softmax against candidates, without keeping the logits.

    The gradients at the logits, softmax minus target, are known in the forward pass, so nothing of
    the size of the vocabulary outlives a chunk of positions.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        embedding: Tensor,
        candidates: Tensor,
        targets: Tensor,
        weights: Tensor,
        chunk: int,
        columns: Tensor | None,
        correction: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted mean loss, and the share of argmaxes that are the first candidate.

        Args:
            ctx: Of autograd.
            hidden: The student's, (positions, width).
            embedding: The student's head, (vocabulary, width).
            candidates: Tokens, as places in `columns`, (positions, candidates), int64.
            targets: Their probabilities, each row sums to 1.
            weights: Of the positions, (positions,).
            chunk: Positions at a time.
            columns: Tokens whose logits take part; None for all.
            correction: Added to their logits: the logarithm of how many tokens each stands for.
        """
        weights = weights / weights.sum().clamp(min=1e-9)
        small = embedding.detach() if columns is None else embedding.detach()[columns]
        loss = hidden.new_zeros((), dtype=torch.float32)
        agreement = torch.zeros_like(loss)
        hidden_grad = torch.empty_like(hidden, dtype=torch.float32)
        small_grad = torch.zeros_like(small, dtype=torch.float32)
        for begin in range(0, len(hidden), chunk):
            part = slice(begin, begin + chunk)
            inputs, target, weight = hidden[part].float(), targets[part], weights[part]
            logits = inputs @ small.T
            if correction is not None:
                logits += correction
            normaliser = logits.logsumexp(-1, keepdim=True)
            chosen = logits.gather(1, candidates[part])
            loss -= ((target * (chosen - normaliser)).sum(-1) * weight).sum()
            agreement += ((logits.argmax(-1) == candidates[part, 0]).float() * weight).sum()
            gradient = logits.sub_(normaliser).exp_()
            gradient.scatter_add_(1, candidates[part], -target)
            gradient.mul_(weight[:, None])
            hidden_grad[part] = gradient @ small
            small_grad += gradient.T @ inputs
        embedding_grad = small_grad
        if columns is not None:
            embedding_grad = torch.zeros_like(embedding).index_copy_(0, columns, small_grad)
        ctx.save_for_backward(hidden_grad.to(hidden.dtype), embedding_grad)
        ctx.mark_non_differentiable(agreement)
        return loss, agreement

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the kept gradients, scaled."""
        hidden_grad, embedding_grad = ctx.saved_tensors
        return hidden_grad * gradients[0], embedding_grad * gradients[0], *[None] * 6


def texts_of(rows: Sequence[tuple[Sequence[int], Continuation]], length: int) -> Texts:
    """Return prompts with their continuations as rows, on the CPU.

    The last position's prediction is not counted: behind an end token there is nothing to draft.
    """
    texts = _empty(len(rows), length, CANDIDATES)
    for row, (given, found) in enumerate(rows):
        tokens = [*given, *found.written][:length]
        counted = len(tokens) - 1
        texts.ids[row, : len(tokens)] = torch.tensor(tokens)
        texts.weights[row, :counted] = 1.0
        texts.weights[row, : max(len(given) - 1, 0)] = PROMPT_WEIGHT
        texts.candidates[row, :counted] = found.candidates[:counted]
        texts.shares[row, :counted] = found.shares[:counted]
    return texts


def windows_of(windows: Sequence[Sequence[int]], length: int) -> Texts:
    """Return windows whose next tokens are the only candidates."""
    texts = _empty(len(windows), length, 1)
    for row, tokens in enumerate(windows):
        texts.ids[row, : len(tokens)] = torch.tensor(tokens)
        texts.weights[row, : len(tokens) - 1] = 1.0
    texts.candidates[:, :-1, 0] = texts.ids[:, 1:].int()
    texts.shares.fill_(1.0)
    return texts


def _empty(rows: int, length: int, candidates: int) -> Texts:
    return Texts(
        torch.zeros(rows, length, dtype=torch.int64),
        torch.zeros(rows, length),
        torch.zeros(rows, length, candidates, dtype=torch.int32),
        torch.zeros(rows, length, candidates),
    )


@torch.no_grad()
def quality_of(student: Any, texts: Texts) -> dict[str, float]:
    """Return how well the student foresees the teacher behind the prompts.

    Returns:
        `agreement`, share of positions with the same argmax; `acceptance`, mean overlap 1 - TV of
        the two distributions at temperature 1 on the teacher's candidates, so a little too small;
        `accepted_drafts`, mean number of the DRAFTS tokens of a greedy chain that the text has as
        well, from one verification to the next.
    """
    equal = total = 0
    overlap = 0.0
    accepted = verifications = 0
    device = student.model.embed_tokens.weight.device
    for row in range(0, len(texts.ids), 8):
        ids, weights, candidates, shares = (part[row : row + 8].to(device) for part in texts)
        counted = weights == 1.0
        logits = student(input_ids=ids, use_cache=False).logits.float()
        guess = logits.argmax(-1)
        equal += int(((guess == candidates[..., 0]) & counted).sum())
        total += int(counted.sum())
        own = (logits.gather(-1, candidates.long()) - logits.logsumexp(-1, keepdim=True)).exp()
        overlap += float((torch.minimum(own, shares).sum(-1) * counted).sum())
        hits = (guess[:, :-1] == ids[:, 1:]).tolist()
        for line, places in zip(hits, counted[:, :-1].tolist(), strict=True):
            right = [hit for hit, is_counted in zip(line, places, strict=True) if is_counted]
            gained, times = chain(right, DRAFTS)
            accepted += gained
            verifications += times
    return {
        "agreement": equal / max(total, 1),
        "acceptance": overlap / max(total, 1),
        "accepted_drafts": accepted / max(verifications, 1),
    }


def chain(right: Sequence[bool], drafts: int) -> tuple[int, int]:
    """Return accepted drafts and verifications of greedy chain drafting along a text.

    Args:
        right: Whether the draft model's most likely token is the text's next one, by position.
        drafts: Length of the chain.
    """
    place = accepted = verifications = 0
    while place < len(right):
        run = 0
        while run < drafts and place + run < len(right) and right[place + run]:
            run += 1
        accepted += run
        verifications += 1
        place += run + 1
    return accepted, verifications


def load_student(folder: Path, vocabulary: int) -> Any:
    """Return the saved student, float32, in evaluation mode."""
    student = new_student(vocabulary)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    student.load_state_dict({name: value.float() for name, value in weights.items()})
    student.tie_weights()
    return student.eval()


def save_student(student: Any, folder: Path) -> int:
    """Write the weights in float16, the tied head once; return the file's bytes."""
    state = {
        name: value for name, value in student.state_dict().items() if name != "lm_head.weight"
    }
    return save_half(state, folder / "model.safetensors")


class Recipe:
    """One run: its texts, its clock, its folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.begin = time.monotonic()
        self.arguments = arguments
        self.out: Path = arguments.out
        self.device = torch.device(arguments.device)
        self.scale: float = arguments.steps_scale
        self.on_gpu = self.device.type == "cuda"
        self.out.mkdir(parents=True, exist_ok=True)
        seed_everything(arguments.seed)
        self.teacher = Teacher(arguments.teacher, self.device)
        self.generator = torch.Generator(self.device).manual_seed(arguments.seed)
        self.sizes = SIZES[self.device.type]
        if self.scale < 0.05:  # a smoke test
            self.sizes = self.sizes._replace(new_tokens=12, window=64, rows=2, positions=64)
        self.length = self.sizes.longest_prompt + self.sizes.new_tokens
        self.log("teacher loaded")

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self.begin

    def log(self, text: str) -> None:
        """Print a line now."""
        print(f"tiny-draft {self.seconds:.0f}s {text}", flush=True)

    def scaled(self, count: int, least: int) -> int:
        """Return a count of the recipe at this run's scale."""
        return max(least, round(count * min(self.scale, 1)))

    def given(self, chosen: Sequence[Prompt]) -> list[list[int]]:
        """Return the ids of the prompts that are not too long."""
        encoded = self.teacher.encode([prompt.text for prompt in chosen])
        return [ids for ids in encoded if len(ids) <= self.sizes.longest_prompt]

    def held_out(self) -> dict[str, Texts]:
        """Return texts behind held-out prompts: `code greedy`, `code sampled`, and so for chats."""
        found = {}
        everything: list[tuple[str, list[int]]] = []
        for kind in ("code", "chat"):
            number = self.sizes.held_out_code if kind == "code" else self.sizes.held_out_chat
            count = self.scaled(number, 2)
            chosen = prompts(kind, count, held_out=True, seed=self.arguments.seed)
            everything += [
                (f"{kind} {way}", ids)
                for way in ("greedy", "sampled")
                for ids in self.given(chosen)
            ]
        names = [name for name, _ in everything]
        given = [ids for _, ids in everything]
        hot = torch.tensor([float(name.endswith("sampled")) for name in names])
        written = self.continued(given, hot)
        for name in dict.fromkeys(names):
            rows = [
                (ids, more)
                for ids, more, own in zip(given, written, names, strict=True)
                if own == name
            ]
            found[name] = texts_of(rows, self.length)
        self.log(f"held-out texts: {len(given)}")
        return found

    def continued(self, given: Sequence[Sequence[int]], temperatures: Tensor) -> list[Continuation]:
        """Return continuations of any number of prompts, those of like length together."""
        order = sorted(range(len(given)), key=lambda number: len(given[number]))
        found: dict[int, Continuation] = {}
        rows = self.sizes.batch_rows
        for begin in range(0, len(order), rows):
            numbers = order[begin : begin + rows]
            part = self.teacher.continue_(
                [given[number] for number in numbers],
                temperatures[numbers],
                self.sizes.new_tokens,
                self.generator,
            )
            found |= zip(numbers, part, strict=True)
        return [found[number] for number in range(len(given))]

    def generated(self) -> tuple[Texts, Tensor]:
        """Return the teacher's texts behind the training prompts, as many as there is time for.

        Returns:
            The texts, and the hidden states that they were written from, (tokens, width).
        """
        given: list[list[int]] = []
        numbers_of: dict[Kind, int] = {"code": self.sizes.code, "chat": self.sizes.chat}
        for kind, number in numbers_of.items():
            count = self.scaled(number, 3)
            chosen = prompts(kind, count, held_out=False, seed=self.arguments.seed)
            given += self.given(chosen)
        rng = np.random.default_rng(self.arguments.seed)
        seconds = self.arguments.max_seconds
        rows: list[tuple[list[int], Continuation]] = []
        waiting: list[list[int]] = []
        passes = tokens = 0
        batch_rows = min(self.sizes.batch_rows, len(given))
        for batch in range(self.scaled(self.sizes.batches, 1)):
            if batch and seconds is not None and self.seconds > GENERATION_SHARE * seconds:
                break
            if not waiting:
                # Prompts of like length share a batch; the batches come in any order.
                order = sorted(rng.permutation(len(given)).tolist(), key=lambda n: len(given[n]))
                waiting = [
                    order[begin : begin + batch_rows] for begin in range(0, len(order), batch_rows)
                ]
                rng.shuffle(waiting)
                passes += 1
            numbers = waiting.pop()
            chances = CHANCES[min(passes - 1, 1)]
            hot = torch.from_numpy(rng.choice(TEMPERATURES, size=len(numbers), p=chances)).float()
            part = [given[number] for number in numbers]
            written = self.teacher.continue_(part, hot, self.sizes.new_tokens, self.generator)
            rows += zip(part, written, strict=True)
            tokens += sum(len(more.written) for more in written)
            self.log(f"generated batch {batch}: {len(rows)} texts, {tokens} tokens")
        states = torch.cat([more.states for _, more in rows])
        return texts_of(rows, self.length), states

    def library(self) -> Texts:
        """Return windows of the standard library's sources."""
        windows = list(
            library_windows(
                self.teacher.encode,
                self.sizes.window,
                self.scaled(self.sizes.windows, 4),
                self.arguments.seed,
            )
        )
        texts = windows_of(windows, self.sizes.window)
        self.log(f"library windows: {len(texts.ids)}")
        return texts

    def measure(
        self, student: Any, held_out: dict[str, Texts], most: int | None = None
    ) -> dict[str, float]:
        """Return the quality by kind of text: greedy agreement, acceptance, accepted drafts."""
        quality = {}
        for name, texts in held_out.items():
            few = Texts(*(part[:most] for part in texts))
            kind, way = name.split()
            measured = quality_of(student, few)
            if way == "greedy":
                quality[f"{kind}_greedy_agreement"] = measured["agreement"]
                quality[f"{kind}_accepted_drafts_of_{DRAFTS}"] = measured["accepted_drafts"]
            else:
                quality[f"{kind}_acceptance_temperature_1"] = measured["acceptance"]
        return quality

    def run(self) -> None:
        """Do what the command line asks for."""
        held_out = self.held_out()
        vocabulary = len(self.teacher.head)
        if self.arguments.eval_only:
            facts = json.loads((self.out / "quality.json").read_text(encoding="utf-8"))
        else:
            facts = self.train(held_out)
        student = load_student(self.out, vocabulary).to(self.device)
        quality = self.measure(student, held_out)
        if not self.arguments.eval_only:
            facts["seconds"] = round(self.seconds, 1)
        self.write(facts | quality)
        self.log("done " + json.dumps(facts | quality))

    def write(self, values: dict[str, Any]) -> None:
        """Write `quality.json`."""
        text = json.dumps(values, indent=2) + "\n"
        (self.out / "quality.json").write_text(text, encoding="utf-8")

    def train(self, held_out: dict[str, Texts]) -> dict[str, Any]:
        """Train and save; return what is known about the run."""
        (generated, states), library = self.generated(), self.library()
        student = new_student(len(self.teacher.head))
        student.config.save_pretrained(self.out)
        student.generation_config.eos_token_id = list(ENDS)
        student.generation_config.save_pretrained(self.out)
        student.to(self.device).train()
        embedding: Tensor = student.model.embed_tokens.weight
        sample = states[:: max(1, len(states) // 100_000)]
        # What is read from the library counts too: an identifier may never be generated.
        tokens = torch.cat([part.ids[part.weights > 0] for part in (generated, library)])
        frequencies = torch.bincount(tokens, minlength=len(embedding)).to(self.device)
        with torch.no_grad():
            start = initial_embedding(self.teacher.head, sample, frequencies, HIDDEN_SIZE)
            embedding.copy_(start)
        self.log(f"embedding begins with rows of norm {float(start.norm(dim=1).mean()):.2f}")
        others = [value for value in student.parameters() if value is not embedding]
        optimizer = torch.optim.AdamW(
            [
                {"params": others, "factor": 1.0, "weight_decay": 0.02},
                {"params": [embedding], "factor": EMBEDDING_RATE, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.98),
            fused=self.on_gpu,
        )
        self.frequent = frequencies.argsort(descending=True)[: self.sizes.frequent]
        rng = np.random.default_rng(self.arguments.seed + 1)
        curve = Curve(self.out / "curve.csv", CURVE_COLUMNS)
        seconds = self.arguments.max_seconds
        if seconds is not None:
            seconds = max(2.0, 0.94 * seconds - self.seconds)
        clock = Clock(self.scaled(self.sizes.steps, 4), seconds)
        # Tensor cores with the exponent of float32; the teacher's bfloat16 states pass unrounded.
        torch.set_float32_matmul_precision("high")
        logged: list[Tensor] = []
        next_print, next_save = 0.0, SAVE_EVERY_SECONDS
        for step, progress in clock:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * group["factor"] * cosine(progress, warmup=0.03)
            of_library = rng.random() < LIBRARY_SHARE
            texts = library if of_library else generated
            rows = self.sizes.library_rows if of_library else self.sizes.rows
            chosen = torch.from_numpy(rng.integers(len(texts.ids), size=rows))
            loss, agreement = self.loss(student, texts, chosen)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            if not of_library:
                logged.append(torch.stack([loss.detach(), agreement]))
            if clock.seconds >= next_print and logged:
                mean = torch.stack(logged).mean(0).tolist()
                logged.clear()
                values = {"loss": mean[0], "agreement": mean[1]}
                if clock.seconds >= next_save:
                    save_student(student, self.out)
                    quality = self.measure(student, held_out, 32)
                    self.write({"unfinished_step": step, **quality})
                    values["held_out_agreement"] = quality["code_greedy_agreement"]
                    values["held_out_acceptance"] = quality["code_acceptance_temperature_1"]
                    next_save = clock.seconds + SAVE_EVERY_SECONDS
                curve.add("train", step, clock.seconds, **values)
                shown = " ".join(f"{name} {value:.4f}" for name, value in values.items())
                self.log(f"train {step} {shown}")
                next_print = clock.seconds + PRINT_EVERY_SECONDS
        size = save_student(student, self.out)
        torch.set_float32_matmul_precision("highest")
        return {
            "parameters": sum(value.numel() for value in student.parameters()),
            "bytes": size,
            "train_steps": clock.done,
            "train_seconds": round(clock.seconds, 1),
            "generated_texts": len(generated.ids),
            "generated_positions": int((generated.weights == 1).sum()),
            "library_positions": int((library.weights > 0).sum()),
            "seed": self.arguments.seed,
            "device": torch.cuda.get_device_name(self.device) if self.on_gpu else "cpu",
            "torch": torch.__version__,
            "python": platform.python_version(),
        }

    def loss(self, student: Any, texts: Texts, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and agreement of some rows, at POSITIONS of their counted positions."""
        ids, weights, candidates, shares = (part[chosen].to(self.device) for part in texts)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu):
            hidden = student.model(input_ids=ids, use_cache=False).last_hidden_state
        weights = weights.flatten()
        # A fixed number, so that the host need not wait to learn how many count.
        order = (weights > 0).float() + torch.rand(
            weights.shape, device=self.device, generator=self.generator
        )
        index = order.topk(min(self.sizes.positions, len(weights))).indices
        targets = shares.flatten(0, 1)[index]
        targets = (1 - HARD_SHARE) * targets / targets.sum(-1, keepdim=True).clamp(min=1e-9)
        targets[:, 0] += HARD_SHARE
        chosen_candidates = candidates.flatten(0, 1)[index].long()
        columns = correction = None
        if self.sizes.drawn:
            columns, correction, chosen_candidates = self.take_part(
                chosen_candidates, student.config.vocab_size
            )
        loss: Tensor
        loss, agreement = DistillationLoss.apply(
            hidden.flatten(0, 1)[index],
            student.model.embed_tokens.weight,
            chosen_candidates,
            targets,
            weights[index],
            self.sizes.chunk,
            columns,
            correction,
        )
        return loss, agreement

    def take_part(self, candidates: Tensor, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tokens of a step's softmax, their correction, and the candidates' places.

        The batch's candidates and the frequent tokens stand for themselves; those drawn from the
        rest stand for all of the rest, so that no token's logit is left alone for good.
        """
        certain = torch.zeros(vocabulary, dtype=torch.bool, device=self.device)
        certain[self.frequent] = True
        certain[candidates.flatten()] = True
        rest = (~certain).nonzero()[:, 0]
        lot = torch.rand(len(rest), device=self.device, generator=self.generator)
        drawn = rest[lot.topk(min(self.sizes.drawn, len(rest))).indices]
        columns = torch.cat([certain.nonzero()[:, 0], drawn])
        correction = torch.zeros(len(columns), device=self.device)
        correction[len(columns) - len(drawn) :] = math.log(max(1, len(rest)) / max(1, len(drawn)))
        places = torch.zeros(vocabulary, dtype=torch.int64, device=self.device)
        places[columns] = torch.arange(len(columns), device=self.device)
        return columns, correction, places[candidates]


def main() -> None:
    """Read the command line and run."""
    parser = recipe_parser("Distil tiny-draft.", compiles=False)
    parser.add_argument("--teacher", type=Path, required=True)
    Recipe(parser.parse_args()).run()


if __name__ == "__main__":
    main()
