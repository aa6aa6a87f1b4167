"""OMP transplant: new tokens are written as few shared tokens, by orthogonal matching pursuit.

A token that the base model lacks is a sparse combination of tokens that both vocabularies have, in
the donor's embedding; the same combination of the base model's rows is its new row. Training-free;
the transformer body is not touched.

Source: arXiv 2506.06607; `mergekit-tokensurgeon` of arcee-ai/mergekit at a6e40288.
Differs from that code: the pursuit ends early where nothing is left, see
`methods.tokenizers.common_pursuit`; tokens are compared by the bytes they stand for, so GPT-2's and
SentencePiece's spellings of one word match; switches of prefix and byte match do what they say
(there embed-only and head-only are exchanged); of ids with the same key the first counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor

from methods.checks import require_choice, require_count
from methods.tokenizers.common import (
    Space,
    Table,
    VocabularyTransplant,
    byte_matches,
    prefix_matches,
)
from methods.tokenizers.common_pursuit import orthogonal_matching_pursuit
from models.base import Unsupported
from models.tokenized import Vocabulary

Match = Literal["no", "embed", "lm_head", "yes"]

# Of the filter for badly trained tokens: quantile of the norms and of the cosines, and the cosine
# that is harmless whatever the quantile.
_TAIL, _HARMLESS_COSINE = 0.01, 0.5


@dataclass(frozen=True, kw_only=True)
class OmpTransplant(VocabularyTransplant):
    """Rows of new tokens as sparse combinations of shared tokens' rows.

    Attributes:
        k: Shared tokens that a new one is written with, at most their number and the width of the
            donor's embedding. Close to that width the donor's geometry is copied, noise included.
        prefix_match: Tables in which a new token takes over the row of its longest prefix among
            the base's tokens instead.
        byte_match: Tables in which a byte token and the character of that byte count as one.
        magikarp: Leave out tokens that look badly trained, see `well_trained`; those that look so
            in both embeddings get rows of zeros.
        batch: Tokens that are written at a time; their memory is batch times shared tokens.
    """

    k: int = 64
    prefix_match: Match = "no"
    byte_match: Match = "no"
    magikarp: bool = False
    batch: int = 512

    trial = MappingProxyType({"donor": "permuted", "k": 4})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("k", self.k, 1, None, "It is the number of shared tokens in a combination.")
        require_count("batch", self.batch, 1, None, "It is a number of tokens.")
        require_choice("prefix_match", self.prefix_match, get_args(Match))
        require_choice("byte_match", self.byte_match, get_args(Match))

    def new_rows(self, space: Space, token_ids: Tensor) -> Tensor:
        """Return the base's rows of the shared tokens, combined as the donor's combine."""
        shared_donor, shared_base = space.shared_donor, space.shared_base
        if self.magikarp:
            good = _good_shared(space).all(dim=0)
            shared_donor, shared_base = shared_donor[good], shared_base[good]
        width = space.donor.shape[1]
        if self.k > min(len(shared_donor), width):
            raise Unsupported(
                f"k = {self.k} is more than {len(shared_donor)} shared tokens of {width} numbers "
                f"allow: at most {min(len(shared_donor), width)}."
            )
        found = orthogonal_matching_pursuit(
            space.donor[shared_donor], space.donor[token_ids], self.k, batch=self.batch
        )
        atoms = space.base[shared_base]
        # The chosen rows exist once for each place of a combination: again a batch at a time.
        parts = (
            type(found)(*each) for each in zip(*(x.split(self.batch) for x in found), strict=True)
        )
        return torch.cat([part.combine(atoms) for part in parts])

    def copies(
        self, space: Space, table: Table, new: Sequence[int], *, is_tied: bool
    ) -> dict[int, int]:
        """Return the prefix and byte matches of this table; a byte match goes first."""
        found: dict[int, int] = {}
        for setting, name, match in (
            (self.prefix_match, "prefix_match", prefix_matches),
            (self.byte_match, "byte_match", byte_matches),
        ):
            if is_tied and setting in ("embed", "lm_head"):
                raise Unsupported(
                    f"{name}={setting} treats the two tables differently, and the model's are one; "
                    f"use yes or no."
                )
            if setting in ("yes", table):
                found |= match(space.base_vocabulary, space.donor_vocabulary, new)
        return found

    def cleared(self, space: Space) -> Tensor:
        """Return the shared tokens that look badly trained in both embeddings."""
        if not self.magikarp:
            return super().cleared(space)
        return space.shared_donor[~_good_shared(space).any(dim=0)]


def well_trained(rows: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Return which rows look trained, (rows,), bool.

    Not so do those shorter than the 1% quantile, and those whose cosine to the mean of the unused
    rows is above both 0.5 and the 99% quantile. Unused are rows without a token and those of tokens
    named `[unused…`; where there are none the length alone decides.

    Args:
        rows: A table, (rows, width).
        vocabulary: Its tokens.
    """
    lengths = rows.norm(dim=1)
    is_good = lengths >= torch.quantile(lengths, _TAIL)
    keys = [*vocabulary.keys, *[None] * (len(rows) - len(vocabulary))]
    unused = [
        number
        for number, key in enumerate(keys)
        if key is None or key.content.startswith(b"[unused")
    ]
    if not unused:
        return is_good
    cosines = torch.cosine_similarity(rows, rows[unused].mean(dim=0, keepdim=True))
    limit = torch.quantile(cosines, 1 - _TAIL).clamp(min=_HARMLESS_COSINE)
    return is_good & (cosines <= limit)


def _good_shared(space: Space) -> Tensor:
    """Return which shared tokens look trained in the donor and in the base, (2, shared), bool."""
    return torch.stack(
        [
            well_trained(space.donor, space.donor_vocabulary)[space.shared_donor],
            well_trained(space.base, space.base_vocabulary)[space.shared_base],
        ]
    )
