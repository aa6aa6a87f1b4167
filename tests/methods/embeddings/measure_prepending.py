"""Print what Token Prepending gains over plain prompts, and what of it a token of noise explains.

Run `python -m tests.methods.embeddings.measure_prepending [TASK [MODEL [FOLDER [PROMPT…]]]]` for a
task of pairs of `mteb-mini`, `lee` or `wordsim`. Embeddings are kept in FOLDER, so that a second
run only prints. Numbers are Spearman's correlation x100 with people's judgements: the mean over
the seeds of the placeholder, and their range. Gains come with the 95% interval of a paired
bootstrap over documents (for word pairs, over pairs) of the mean over seeds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
from torch import Tensor

from methods.embeddings.common_placeholder import QuotingPrompt, placeholder_row
from methods.embeddings.token_prepending import TokenPrepending
from models.encoders import Batching, CausalEncoder, PromptBatch, ReadOut
from models.loading import LoadSettings, load
from tasks.mteb_data import EmbeddingData, distinct
from tasks.mteb_mini import MiniTask, load_mini
from tasks.mteb_scorers import Floats
from tasks.resampling import draw_counts

SEEDS = (3407, 1, 2, 3, 4)
EXITS = (0, 4, 7)  # 0: the placeholder is never overwritten
RESAMPLES = 2000
LAYERS: Mapping[str, tuple[int, ...]] = {"lee": (29, 30), "wordsim": (28, 30), "simlex": (28, 30)}


class Setting(NamedTuple):
    """One run: without placeholder (None) or with it up to an exit layer; the seed of its noise."""

    exit: int | None
    seed: int = 0

    @property
    def label(self) -> str:
        """What the run is called in the table."""
        if self.exit is None:
            return "no placeholder"
        return f"prepending, exit {self.exit}" if self.exit else "placeholder only"


SETTINGS = (Setting(None), *(Setting(exit_, seed) for exit_ in EXITS for seed in SEEDS))


class Measured(NamedTuple):
    """Embeddings at several layers, (layers, texts, dimension), and tokens of all prompts."""

    vectors: npt.NDArray[np.float32]
    tokens: int


def embeddings(
    encoder: CausalEncoder,
    texts: Sequence[str],
    prompt: QuotingPrompt,
    setting: Setting,
    layers: Sequence[int],
) -> Measured:
    """Return the embeddings of texts at several layers, all from one run."""
    overwrite, _ = TokenPrepending(exit=setting.exit or 0).before_layer(encoder)
    last = encoder.num_layers
    seen: dict[int, list[npt.NDArray[np.float32]]] = {layer: [] for layer in {*layers} - {last}}

    def before(layer: int, states: Tensor, batch: PromptBatch) -> Tensor | None:
        if layer in seen:
            seen[layer].append(states[:, -1].float().cpu().numpy())
        return None if overwrite is None else overwrite(layer, states, batch)

    # Longest first here, so that batches come in a known order and hold little padding.
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    row = placeholder_row(encoder.dimension, setting.seed, 1.0)
    found = encoder.configured(
        read_out=ReadOut(prompt=prompt, layer=last), batching=Batching(sort_by_length=False)
    ).embed(
        [texts[index] for index in order],
        before_layer=before,
        placeholder=None if setting.exit is None else row,
    )
    vectors = np.empty((len(layers), len(texts), encoder.dimension), dtype=np.float32)
    for place, layer in enumerate(layers):
        vectors[place, order] = found.vectors if layer == last else np.concatenate(seen[layer])
    return Measured(vectors, sum(found.token_counts))


def correlations(
    data: EmbeddingData, texts: Sequence[str], vectors: npt.NDArray[np.float32], counts: Floats
) -> Floats:
    """Return Spearman x100 by mteb-mini's scorer, (resamples,), of vectors (texts, dimension)."""
    places = {text: place for place, text in enumerate(texts)}
    by_unit = {
        number: vectors[[places[text] for text in unit]].astype(np.float64)
        for number, unit in enumerate(data.units())
    }
    return 100 * data.numbers(by_unit, counts)["cosine_spearman"]


def bootstrap_counts(units: int, resamples: int = RESAMPLES) -> Floats:
    """Return how often each unit is drawn, (1 + resamples, units); all of them once at first."""
    draws = np.random.default_rng(0).integers(units, size=(resamples, units))
    return np.concatenate([np.ones((1, units)), draw_counts(draws, units)])


def table(scores: Mapping[Setting, Floats]) -> list[str]:
    """Return a line for each kind of setting: its score, and its gains over the first two kinds.

    Args:
        scores: Of each setting, on all units first and then on the resamples, (1 + resamples,).
    """
    kinds = list(dict.fromkeys(setting.exit for setting in scores))
    by_kind = [
        np.stack([found for setting, found in scores.items() if setting.exit == kind])
        for kind in kinds
    ]
    lines = ["| | score [over seeds] | gain over no placeholder | over placeholder only |"]
    lines.append("|---|---|---|---|")
    for place, (kind, found) in enumerate(zip(kinds, by_kind, strict=True)):
        point = found[:, 0]
        cells = [Setting(kind).label, f"{point.mean():.1f} [{point.min():.1f}, {point.max():.1f}]"]
        for reference in range(2):
            cells.append("")
            if reference < place:
                gains = found.mean(0) - by_kind[reference].mean(0)
                low, high = np.quantile(gains[1:], [0.025, 0.975])
                cells[-1] = f"{gains[0]:+.1f} [{low:+.1f}, {high:+.1f}]"
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(arguments: Sequence[str]) -> None:
    """Measure what is not in the folder yet, and print the tables; see the module's docstring."""
    defaults = ("lee", "smollm2-135m", "")
    task, model, folder = (*arguments[:3], *defaults[len(arguments) :])
    prompts = cast("Sequence[QuotingPrompt]", arguments[3:] or ("prompteol", "knowledge"))
    data = load_mini(cast(MiniTask, task))
    texts = distinct([text for unit in data.units() for text in unit])
    counts = bootstrap_counts(len(data.units()))
    encoder: CausalEncoder | None = None
    for prompt in prompts:
        vectors = {}
        for setting in SETTINGS:
            name = f"{model}-{task}-{prompt}-{setting.exit}-{setting.seed}.npy"
            path = Path(folder) / name if folder else None
            if path is not None and path.is_file():
                vectors[setting] = np.load(path)
                continue
            if encoder is None:
                loaded = load(model, LoadSettings(), offline=True, capability="TextEncoder")
                encoder = cast(CausalEncoder, loaded)
            begin = time.perf_counter()
            found = embeddings(encoder, texts, prompt, setting, LAYERS[task])
            seconds = time.perf_counter() - begin
            print(f"{name}: {found.tokens} tokens, {seconds:.1f} s", file=sys.stderr, flush=True)
            vectors[setting] = found.vectors
            if path is not None:
                np.save(path, found.vectors)
        for place, layer in enumerate(LAYERS[task]):
            print(f"\n{task}, {prompt}, layer {layer}\n")
            scores = {
                setting: correlations(data, texts, found[place], counts)
                for setting, found in vectors.items()
            }
            print("\n".join(table(scores)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
