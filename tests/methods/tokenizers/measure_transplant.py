"""Bits per byte of a real model behind other tokenizers: `python -m …measure_transplant`.

No test: it takes minutes and needs the model. It prints what each way to make new rows costs on
the same passages, paired with the model's own tokenizer, and, without any text, how near held-out
shared tokens come to their true rows. docs/log.md has its numbers.

    python -m tests.methods.tokenizers.measure_transplant --donor python-bpe --passages 12
    python -m tests.methods.tokenizers.measure_transplant --donor tiny-draft --hide 0.1
    python -m tests.methods.tokenizers.measure_transplant --donor minilm-l6 --form lower --rows text
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hardware.profile import Profile
from methods.tokenizers.common import Space, VocabularyTransplant, align, find_donor
from methods.tokenizers.focus_like import FocusLike
from methods.tokenizers.mean_rows import MeanRows
from methods.tokenizers.native_tokenizer import NativeTokenizer
from methods.tokenizers.omp_transplant import OmpTransplant
from methods.tokenizers.random_rows import RandomRows
from methods.tokenizers.subword_mean import SubwordMean
from methods.tokenizers.wechsel_like import WechselLike
from methods.tokenizers.zero_rows import ZeroRows
from models.loading import load
from models.tokenized import CausalTokenizedLM
from tasks.bits_per_byte import BitsPerByte

PROFILE = Profile(name="measure", kind="cpu", label="Whatever runs this")
HELD_OUT = 256


def methods(
    donor: str, rows: str, hide: float, ks: Sequence[int]
) -> dict[str, VocabularyTransplant]:
    """Return the transplants that are compared, by what the table calls them."""
    common: dict[str, Any] = {"donor": donor, "rows": rows, "hide": hide}
    plain = (ZeroRows, MeanRows, RandomRows, SubwordMean, FocusLike, WechselLike)
    return {cls.__name__: cls(**common) for cls in plain} | {
        f"OmpTransplant k={k}": OmpTransplant(k=k, **common) for k in ks
    }


def measure(
    model: CausalTokenizedLM, named: dict[str, VocabularyTransplant], task: BitsPerByte
) -> None:
    """Print bits per byte of each, and the paired difference to the model's own tokenizer."""
    items = list(task.items())
    own = np.zeros(0)
    for name, method in {"NativeTokenizer": NativeTokenizer(), **named}.items():
        began = time.perf_counter()
        with method.apply(model, PROFILE) as changed:
            made = time.perf_counter()
            scores = [task.score(item, task.call(changed, item).text) for item in items]
        bits, back, size = (
            np.array([float(each[metric.name]) for each in scores])  # type: ignore[arg-type]
            for metric in task.metrics
        )
        own = bits if not len(own) else own
        spread = (bits - own).std(ddof=1) / len(items) ** 0.5
        print(
            f"{name:20} {bits.mean():.3f} bits/byte, "
            f"{(bits - own).mean():+.3f} ± {1.96 * spread:.3f}, "
            f"round trip {back.mean():.2f}, {size.mean():.2f} bytes/token, made in "
            f"{made - began:.1f} s, scored in {time.perf_counter() - made:.1f} s",
            flush=True,
        )


def diagnose(
    model: CausalTokenizedLM, named: dict[str, VocabularyTransplant], donor_name: str
) -> None:
    """Hide shared tokens, transfer them, and print how near they come to their true rows."""
    donor = find_donor(donor_name, model)
    alignment = align(model.vocabulary, donor.vocabulary)
    generator = torch.Generator().manual_seed(0)
    occurring = donor.input_rows[alignment.shared_donor].norm(dim=1) > 0
    places = torch.randperm(len(alignment.shared_donor), generator=generator)
    hidden = places[occurring[places]][:HELD_OUT]
    kept = torch.ones(len(places), dtype=torch.bool)
    kept[hidden] = False
    space = Space(
        donor.input_rows,
        model.input_rows.float(),
        alignment.shared_donor[kept],
        alignment.shared_base[kept],
        donor.vocabulary,
        model.vocabulary,
        model.tokenizer,
    )
    true_ids = alignment.shared_base[hidden]
    truth = space.base[true_ids]
    every = torch.nn.functional.normalize(space.base)
    for name, method in named.items():
        if isinstance(method, SubwordMean):
            continue  # the one piece of a hidden token would be that token
        rows = method.new_rows(space, alignment.shared_donor[hidden])
        cosine = torch.cosine_similarity(rows, truth).mean()
        nearest = (torch.nn.functional.normalize(rows) @ every.T).topk(10, dim=1).indices
        found = (nearest == true_ids[:, None]).any(dim=1).float().mean()
        print(f"{name:20} cosine to the true row {cosine:.3f}, among its 10 nearest {found:.2f}")


def main() -> None:
    """Measure on the command line's donor and texts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--donor", default="python-bpe")
    parser.add_argument("--form", default="plain", choices=("plain", "lower", "words"))
    parser.add_argument("--rows", default="all", choices=("all", "text"))
    parser.add_argument("--hide", type=float, default=0.0)
    parser.add_argument("--passages", type=int, default=12)
    parser.add_argument("--k", type=int, nargs="*", default=[4, 8, 16, 32, 64])
    parser.add_argument("--diagnose-only", action="store_true")
    chosen = parser.parse_args()
    model = load(chosen.model, offline=True, capability="TokenizedLM")
    assert isinstance(model, CausalTokenizedLM)
    named = methods(chosen.donor, chosen.rows, chosen.hide, chosen.k)
    diagnose(model, named, chosen.donor)
    if not chosen.diagnose_only:
        measure(model, named, BitsPerByte(passages=chosen.passages, form=chosen.form))


if __name__ == "__main__":
    main()
