"""Accuracy of tiny-vlm on held-out scenes: by option letter, circular, and in words."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.embedded.scenes.questions import CATEGORIES, LETTERS, circular, held_out
from models.embedded.scenes.raster_torch import Renderer, tiles
from models.embedded.tiny_vlm import data
from models.embedded.tiny_vlm.batches import numpy_rows
from models.embedded.tiny_vlm.network import PATCHES, Layout, TinyVlm
from models.embedded.tiny_vlm.text import BEFORE_IMAGE, BOS, encode


def prompt_start(device: torch.device | str) -> Tensor:
    """Return the tokens in front of the image."""
    return torch.tensor([BOS, *encode(BEFORE_IMAGE)], device=device)


def visual_embeddings(model: TinyVlm, images: Tensor) -> Tensor:
    """Return the embeddings of images of 96 pixels, or of all five tiles of images of 192."""
    if images.shape[-1] == 96:
        return model.project(model.vision(images, only_features=True).features)
    seen = model.vision(tiles(images).flatten(0, 1), only_features=True)
    return model.project(seen.features).unflatten(0, (len(images), -1)).flatten(1, 2)


class Answers(NamedTuple):
    """Which questions were answered rightly, and the letters' words.

    Attributes:
        letters: Greedy next token is the right letter, (questions,), bool.
        directs: Every token of the direct answer is the greedy one, (questions,), bool.
        tokens: The greedy token after the prompt with options, (questions,).
    """

    letters: np.ndarray
    directs: np.ndarray
    tokens: np.ndarray


class Examiner:
    """Held-out questions in their arrays, asked again at every evaluation.

    Args:
        split: Of the generator.
        size: 96, or 192 for five tiles.
        per_category: Questions of each category.
        rotations: 1 asks each question once, 4 also its circular copies.
        device: Where the model is.
        batch: Questions asked at once.
    """

    def __init__(
        self,
        split: str,
        size: int,
        per_category: int,
        rotations: int,
        device: torch.device,
        batch: int = 512,
    ) -> None:
        self.items = [
            (scene, copy)
            for scene, question in held_out(split, size, per_category)
            for copy in circular(question)[:rotations]
        ]
        self._rotations, self._device = rotations, device
        self._batch = batch if size == 96 else max(1, batch // 4)
        self._rows = numpy_rows(data.one_question_rows(self.items), device)
        self._renderer = Renderer(size, device)
        visual = PATCHES * (size // 96) ** 2 + (PATCHES if size > 96 else 0)
        self._start = prompt_start(device)
        slots = [data.LETTER_SLOT, data.DIRECT_SLOT]
        self._layout = Layout(len(self._start) + visual, slots, device)

    @torch.no_grad()
    def ask(self, model: TinyVlm) -> Answers:
        """Ask every question both ways."""
        parts = []
        for first in range(0, len(self.items), self._batch):
            rows = data.Items(*(part[first : first + self._batch] for part in self._rows))
            images = self._renderer.render(rows.scene).image
            visual = visual_embeddings(model, images)
            letter, direct = rows.letter[:, 0].long(), rows.direct[:, 0].long()
            words = torch.cat([letter, direct], 1)
            chosen = model.logits(visual, self._start, words, self._layout).argmax(-1)
            at = rows.letter_start.long()
            told = chosen.gather(1, at - 1)[:, 0]
            letters = told == letter.gather(1, at)[:, 0]
            place = torch.arange(1, data.DIRECT_SLOT, device=self._device)[None]
            asked = (place >= rows.direct_start) & (place < rows.direct_end)
            same = chosen[:, data.LETTER_SLOT : -1] == direct[:, 1:]
            parts.append((letters, (same | ~asked).all(1), told))
        return Answers(*(torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True)))

    def table(self, answers: Answers) -> dict[str, dict[str, float]]:
        """Return accuracies by category and over all, each category counting the same.

        `letter` is right on the unrotated questions, `circular` on all their copies, `direct`
        in words.
        """
        names = np.array([question.category for _, question in self.items])
        names = names.reshape(-1, self._rotations)[:, 0]
        letters = answers.letters.reshape(-1, self._rotations)
        found: dict[str, np.ndarray] = {
            "letter": letters[:, 0],
            "circular": np.asarray(letters.all(1)),
            "direct": answers.directs.reshape(-1, self._rotations)[:, 0],
        }
        table = {
            kind: {name: float(right[names == name].mean()) for name in CATEGORIES}
            for kind, right in found.items()
        }
        for shares in table.values():
            shares["all"] = float(np.mean(list(shares.values())))
        if self._rotations == 1:
            del table["circular"]
        return table


def letter_of(token: int) -> str:
    """Return the letter that a token stands for, or "?"."""
    ids = {encode(letter)[0]: letter for letter in LETTERS}
    return ids.get(token, "?")
