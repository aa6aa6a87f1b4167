"""Problems on the training device, drawn with a curriculum; tokenizer files; exact match."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.embedded.tiny_dllm.data import (
    ANSWER_LENGTH,
    EOT,
    MASK,
    MAX_STEPS,
    PAD,
    PROMPT_LENGTH,
    VOCABULARY,
    Problems,
    final_number,
    generate,
)

# Share of the training after which problems of one more step join in.
UNLOCK_EVERY = 0.08
# Long problems have more to learn in them.
STEP_WEIGHTS = (0.2, 0.25, 0.25, 0.3)


class Pool:
    """Training problems of each number of steps, on a device.

    Attributes:
        rows: Prompt and answer, (problems, PROMPT_LENGTH + ANSWER_LENGTH), uint8, by steps.
        generator: Of the draws.
    """

    def __init__(self, per_level: int, seed: int, device: torch.device) -> None:
        levels = [
            generate(per_level, steps=steps, split="train", seed=seed * MAX_STEPS + steps)
            for steps in range(1, MAX_STEPS + 1)
        ]
        rows = np.concatenate(
            [np.concatenate([level.prompts, level.answers], axis=1) for level in levels]
        )
        self.rows = torch.from_numpy(rows).to(device)
        self._per_level = per_level
        self.generator = torch.Generator(device).manual_seed(seed)
        self._weights = torch.tensor(STEP_WEIGHTS, device=device)
        self._ranks = torch.arange(MAX_STEPS, device=device)

    def draw(self, batch: int, progress: float, answer_length: int = ANSWER_LENGTH) -> Tensor:
        """Return rows of prompt and answer.

        Args:
            batch: How many.
            progress: Share of the training that is over; unlocks longer problems.
            answer_length: At least ANSWER_LENGTH; longer answers end in more EOT.

        Returns:
            (batch, PROMPT_LENGTH + answer_length), int64, on the pool's device.
        """
        unlocked = min(MAX_STEPS, 1 + int(progress / UNLOCK_EVERY))
        weights = torch.where(self._ranks < unlocked, self._weights, 0.0)
        level = torch.multinomial(weights, batch, replacement=True, generator=self.generator)
        place = torch.rand(batch, device=self.rows.device, generator=self.generator)
        index = level * self._per_level + (place * self._per_level).long()
        rows = self.rows[index.clamp_(max=len(self.rows) - 1)].long()
        if answer_length > ANSWER_LENGTH:
            rows = torch.nn.functional.pad(rows, (0, answer_length - ANSWER_LENGTH), value=EOT)
        return rows


def exact_match(answers: Tensor, problems: Problems) -> np.ndarray:
    """Return whether the number after `####` is right, (problems,), bool."""
    found = [final_number(row) for row in answers.tolist()]
    return np.array(
        [number == int(result) for number, result in zip(found, problems.results, strict=True)]
    )


def match_by_steps(matches: np.ndarray, problems: Problems) -> dict[str, float]:
    """Return the shares of right answers: overall, one and two steps, and each number of steps."""
    shares = {
        "exact_match": float(matches.mean()),
        "exact_match_1_2_steps": float(matches[problems.steps <= 2].mean()),
    }
    for steps in range(1, MAX_STEPS + 1):
        shares[f"exact_match_{steps}_steps"] = float(matches[problems.steps == steps].mean())
    return shares


def held_out(count: int) -> Problems:
    """Return the first problems of the held-out set, as many of each number of steps."""
    count = max(count, MAX_STEPS) // MAX_STEPS
    parts = [
        generate(count, steps=steps, split="held-out", seed=1) for steps in range(1, MAX_STEPS + 1)
    ]
    return Problems(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def save_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json` and its settings: words apart by spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {word: number for number, word in enumerate(VOCABULARY)}
    # No word is unknown that the generator writes; other text becomes PAD, which nobody sees.
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=VOCABULARY[PAD]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([VOCABULARY[PAD], VOCABULARY[MASK], VOCABULARY[EOT]])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": VOCABULARY[PAD],
        "mask_token": VOCABULARY[MASK],
        "eos_token": VOCABULARY[EOT],
        "clean_up_tokenization_spaces": False,
        "model_max_length": PROMPT_LENGTH + 256,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
