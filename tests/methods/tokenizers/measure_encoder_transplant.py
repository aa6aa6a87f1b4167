"""An encoder behind the tokenizer of a language model: `python -m …measure_encoder_transplant`.

The pair for which the transplant's ordering can be looked at with a donor that is a pre-trained
language model: all-MiniLM-L6-v2 keeps its body and gets SmolLM2's tokenizer. Printed is Spearman's
correlation x100 with people's judgements of the 50 news texts of `mteb-mini:task=lee`, and for
pairs of ways to make rows the difference with its 95% interval, documents resampled. Texts are
lower-cased, as the model was trained; rows are made for the tokens that occur. docs/log.md has the
numbers.

    python -m tests.methods.tokenizers.measure_encoder_transplant
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods.tokenizers.common import Space, VocabularyTransplant, align
from methods.tokenizers.focus_like import FocusLike
from methods.tokenizers.mean_rows import MeanRows
from methods.tokenizers.omp_transplant import OmpTransplant
from methods.tokenizers.random_rows import RandomRows
from methods.tokenizers.subword_mean import SubwordMean
from methods.tokenizers.wechsel_like import WechselLike
from methods.tokenizers.zero_rows import ZeroRows
from models.encoders import SentenceEncoder
from models.loading import load
from models.tokenized import PlainTokenizer, load_donor, vocabulary_of
from tasks.mteb_data import PairMatrix
from tasks.mteb_mini import load_mini
from tasks.mteb_scorers import Floats
from tasks.resampling import draw_counts

MAX_TOKENS = 128
RESAMPLES = 2000
COMPARED = ("SubwordMean", "WechselLike", "FocusLike", "MeanRows", "ZeroRows")


@torch.inference_mode()
def embedded(backbone: Any, table: Tensor, batch: Sequence[Sequence[int]]) -> Floats:
    """Return the mean of the last hidden states over each text's tokens, (texts, dimension).

    Args:
        backbone: An encoder of transformers.
        table: A row for each token, (tokens, width).
        batch: Ids of each text, special tokens included.
    """
    found = []
    for ids in batch:
        states = backbone(inputs_embeds=table[torch.tensor([list(ids)])]).last_hidden_state
        found.append(states[0].mean(dim=0).double().numpy())
    return np.stack(found)


def correlations(data: PairMatrix, vectors: Floats, counts: Floats) -> Floats:
    """Return the correlation of all documents, and of each resample of them, x100."""
    units = {place: vector[None] for place, vector in enumerate(vectors)}
    return 100 * data.numbers(units, counts)["cosine_spearman"]


def ways(ks: Sequence[int]) -> dict[str, VocabularyTransplant]:
    """Return the ways to make rows that are compared, by what the table calls them."""
    plain = (ZeroRows, MeanRows, RandomRows, SubwordMean, FocusLike, WechselLike)
    return {cls.__name__: cls() for cls in plain} | {
        f"OmpTransplant k={k}": OmpTransplant(k=k) for k in ks
    }


def main() -> None:
    """Measure on the command line's pair."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--donor", default="smollm2-135m")
    parser.add_argument("--k", type=int, nargs="*", default=[4, 8, 16, 32, 64])
    chosen = parser.parse_args()
    encoder = load(chosen.model, offline=True, capability="TextEncoder")
    assert isinstance(encoder, SentenceEncoder)
    backbone = encoder.module[0].model
    base_rows: Tensor = backbone.get_input_embeddings().weight.detach().float()
    tokenizer = PlainTokenizer(encoder.module[0].tokenizer)
    vocabulary = vocabulary_of(tokenizer.hub)
    donor = load_donor(chosen.donor, offline=True)
    alignment = align(vocabulary, donor.vocabulary)

    data = load_mini("lee")
    assert isinstance(data, PairMatrix)
    draws = np.random.default_rng(0).integers(len(data.texts), size=(RESAMPLES, len(data.texts)))
    draws[0] = np.arange(len(data.texts))
    counts = draw_counts(draws, len(data.texts))

    def ids_of(kind: Any, roles: Any) -> list[list[int]]:
        return [
            [roles["start"], *kind.encode(text.lower())[: MAX_TOKENS - 2], roles["end"]]
            for text in data.texts
        ]

    own = ids_of(tokenizer, vocabulary.roles)
    found = {"own tokenizer": correlations(data, embedded(backbone, base_rows, own), counts)}
    theirs = ids_of(donor.tokenizer, donor.vocabulary.roles)
    running = torch.tensor([token for ids in theirs for token in ids])
    new = running.unique()[torch.isin(running.unique(), alignment.new)]
    share = 1 - torch.isin(running, alignment.new).float().mean()
    print(f"{len(alignment.shared_donor)} shared tokens, {share:.1%} of the running ones")
    print(f"{len(new)} new tokens occur")
    space = Space(
        donor.input_rows,
        base_rows,
        alignment.shared_donor,
        alignment.shared_base,
        donor.vocabulary,
        vocabulary,
        tokenizer,
    )
    for name, method in ways(chosen.k).items():
        table = torch.zeros(alignment.size, base_rows.shape[1])
        table[alignment.shared_donor] = base_rows[alignment.shared_base]
        table[new] = method.new_rows(space, new)
        found[name] = correlations(data, embedded(backbone, table, theirs), counts)
    for name, values in found.items():
        low, high = np.quantile(values[1:], [0.025, 0.975])
        print(f"{name:20} {values[0]:5.1f} [{low:.1f}, {high:.1f}]")
    for mine in (name for name in found if name.startswith("OmpTransplant")):
        for rival in COMPARED:
            gain = found[mine] - found[rival]
            low, high = np.quantile(gain[1:], [0.025, 0.975])
            print(f"{mine} against {rival:12} {gain[0]:+5.1f} [{low:+.1f}, {high:+.1f}]")


if __name__ == "__main__":
    main()
