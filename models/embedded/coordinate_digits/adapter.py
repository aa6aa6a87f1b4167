"""Low-rank changes of a decoder's weights, and new rows for a few of its tokens.

What a fine-tuning learned, small enough to ship beside the model that it changes: for each matrix
of the decoder `up @ down`, for the input and output embedding the rows of some tokens. Names are
those of transformers' Llava, which tiny-vlm's network shares.

Source: LoRA, arXiv 2106.09685, section 4.1, with alpha equal to the rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_DECODER = "model.language_model.layers."
_EMBEDDINGS = ("model.language_model.embed_tokens", "lm_head")


class LowRank(nn.Module):
    """Adds a matrix of low rank to a weight; nothing at first."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        # Drawn on the CPU, so that devices cannot differ.
        self.down = nn.Parameter((torch.randn(rank, in_features) / in_features**0.5).to(weight))
        self.up = nn.Parameter(torch.zeros(out_features, rank).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed weight."""
        return weight + self.up @ self.down


class Rows(nn.Module):
    """Adds to some rows of a weight; nothing at first."""

    ids: Tensor

    def __init__(self, weight: Tensor, ids: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("ids", torch.tensor(ids, device=weight.device))
        self.rows = nn.Parameter(torch.zeros(len(ids), weight.shape[1]).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed weight."""
        return weight.index_add(0, self.ids, self.rows)


def adapt(model: nn.Module, rank: int, ids: Sequence[int]) -> None:
    """Give a network trainable changes and freeze everything else.

    Args:
        model: With the names of transformers' Llava.
        rank: Of each change.
        ids: Tokens whose embeddings change, too.
    """
    model.requires_grad_(False)
    for name, part in [*model.named_modules()]:
        change: nn.Module
        if isinstance(part, nn.Linear) and name.startswith(_DECODER):
            change = LowRank(part.weight, rank)
        elif name in _EMBEDDINGS:
            change = Rows(part.get_parameter("weight"), ids)
        else:
            continue
        parametrize.register_parametrization(part, "weight", change)


def changes(model: nn.Module) -> dict[str, Tensor]:
    """Return what `adapt` added, by the name of the changed weight and the part of the change."""
    return {
        name.replace("parametrizations.weight.0.", "weight:"): value
        for name, value in model.state_dict().items()
        if ".parametrizations.weight.0." in name
    }


def load_changes(path: Path) -> dict[str, Tensor]:
    """Return saved changes, in float32.

    Raises:
        ValueError: The file holds something else.
    """
    from safetensors.torch import load_file

    found = load_file(path)
    if not found or any(":" not in name for name in found):
        raise ValueError(f"{path} holds no changes of weights.")
    return {
        name: value if value.dtype == torch.int64 else value.float()
        for name, value in found.items()
    }


@contextmanager
def adapted(model: nn.Module, found: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a network run with changed weights; the very same weights are back afterwards.

    Args:
        model: With the weights that the changes name.
        found: As `load_changes` returns them.

    Raises:
        ValueError: A weight that is changed is not there, or has another shape.
    """
    names = dict.fromkeys(name.partition(":")[0] for name in found)
    kept: dict[str, Tensor] = {}
    try:
        for name in names:
            try:
                weight = model.get_parameter(name)
            except AttributeError:
                raise ValueError(f"the model has no weight {name!r} to change.") from None
            changed = _changed(weight, name, found)
            kept[name] = weight.data
            weight.data = changed
        yield
    finally:
        for name, values in kept.items():
            model.get_parameter(name).data = values


def _changed(weight: Tensor, name: str, found: Mapping[str, Tensor]) -> Tensor:
    values = weight.detach().float()
    try:
        if f"{name}:up" in found:
            up, down = (found[f"{name}:{part}"].to(weight.device) for part in ("up", "down"))
            values = values + up @ down
        else:
            ids, rows = (found[f"{name}:{part}"].to(weight.device) for part in ("ids", "rows"))
            values = values.index_add(0, ids, rows)
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"{name!r} is {tuple(weight.shape)}: {error}.") from error
    return values.to(weight.dtype)
