"""Print what tiny-vlm's attention looks at: the structure that visual-token methods rest on.

Run `python -m tests.methods.visual_pruning.measure_attention [PART ...]`; parts are those of
`PARTS`, all when none is named. `objects` is HiPrune's claim, by the scenes' exact masks;
`migration` is ToDRE's, on the validation split, from which its `tau` for tiny-vlm was taken;
`sensitivity` asks whether ZOO-Prune's score says more than the length of a projected token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

import numpy as np
import torch
from scipy.stats import spearmanr

from methods.visual_pruning.common import top_k
from methods.visual_pruning.todre import ToDRE
from methods.visual_pruning.zoo_prune import ZooPrune
from models.base import Decoding, VisualPrompt
from models.embedded.scenes.questions import held_out
from models.embedded.scenes.raster import render
from models.loading import LoadSettings, load
from models.vision_language import VisionLanguage
from models.vision_language_towers import Watch
from tasks.mmbench_common import question_prompt
from tasks.mmbench_data import decode_image
from tasks.mmbench_mini import scene_questions

SCENES_OF_A_CATEGORY = 10
TOP_SHARE = 0.1
# A patch shows an object if half of its pixels do.
OBJECT_SHARE = 0.5


def _model() -> VisionLanguage:
    model = load("tiny-vlm", LoadSettings(), offline=True, capability="VisionLanguageModel")
    assert isinstance(model, VisionLanguage)
    return model


def objects() -> None:
    """Print, by vision layer, how the most attended patches overlap with the objects."""
    model = _model()
    layers = range(1, model.facts.feature_layer + 1)
    scenes = [scene for scene, _ in held_out("test", 96, SCENES_OF_A_CATEGORY)]
    found: dict[int, list[tuple[float, float, float]]] = {layer: [] for layer in layers}
    shares, chances = [], []
    for scene in scenes:
        drawn = render(scene)
        with torch.inference_mode():
            pixels = model.tower.prepare(drawn.image, 1)
            encoded = model.tower.encode(pixels, Watch(received=tuple(layers)))
        grid = encoded.layout.grid
        side = drawn.owner.shape[0] // grid.rows
        shown = (drawn.owner > 0).reshape(grid.rows, side, grid.columns, side).mean((1, 3))
        is_object = torch.from_numpy(shown >= OBJECT_SHARE).flatten()
        if not is_object.any():
            continue
        count = round(TOP_SHARE * len(is_object))
        area = int(is_object.sum())
        shares.append(area / len(is_object))
        expected = count * area / len(is_object)
        chances.append(expected / (count + area - expected))
        for layer in layers:
            top = top_k(encoded.received[layer], count)
            common = int(is_object[top].sum())
            rows, columns = (top // grid.columns).float(), (top % grid.columns).float()
            spread = float((rows.var() + columns.var()).sqrt())
            found[layer].append((common / (count + area - common), common / count, spread))
    print(f"{len(shares)} scenes; objects on {np.mean(shares):.3f} of the patches")
    print(f"a random choice: IoU {np.mean(chances):.3f}, on objects {np.mean(shares):.3f}")
    print("layer  IoU    on objects  spread of the top tenth, patches")
    for layer, rows_of in found.items():
        overlap, share, spread = np.mean(rows_of, axis=0)
        error = np.std([each[0] for each in rows_of], ddof=1) / len(rows_of) ** 0.5
        print(f"{layer:5}  {overlap:.3f} +- {error:.3f}  {share:.3f}  {spread:.2f}")


def migration() -> None:
    """Print, by decoder layer, the attention that text and image pay each other."""
    model = _model()
    print("layer  text on image: median, 90 %  image on text: median, 90 %")
    for layer in range(1, model.facts.text.num_layers):
        plan = ToDRE(stage1=False, check_layer=layer, tau=0.0).plan(model)
        shares = []
        for question in scene_questions("validation", 96, SCENES_OF_A_CATEGORY):
            prompt = VisualPrompt(
                image=decode_image(question.image),
                text=question_prompt(question.rotations[0], "llava"),
            )
            notes = model.run(prompt, Decoding(max_new_tokens=1), plan).trace.notes
            back = float(notes["alpha_vt_before"]) + float(notes["alpha_vt_after"])
            shares.append((float(notes["alpha_tv"]), back))
        (text, image), (text_high, image_high) = np.quantile(shares, (0.5, 0.9), axis=0)
        print(f"{layer:5}  {text:.3f}, {text_high:.3f}  {image:.3f}, {image_high:.3f}")


def sensitivity() -> None:
    """Print rank correlations of ZOO-Prune's score with itself and with the token's length."""
    model = _model()
    parts = model.tower.projector_parts()
    found = []
    for scene, _ in held_out("test", 96, SCENES_OF_A_CATEGORY):
        with torch.inference_mode():
            pixels = model.tower.prepare(render(scene).image, 1)
            encoded = model.tower.encode(pixels, Watch())
            lengths = model.tower.project(encoded.features).norm(dim=-1)
            first, second = (
                ZooPrune(estimator="mlp", seed=seed).sensitivity(parts, encoded.features)
                for seed in (0, 1)
            )
        found.append((spearmanr(first, second)[0], spearmanr(first, lengths)[0]))
    again, length = np.mean(found, axis=0)
    print(f"{len(found)} scenes; Spearman of two draws of 64 directions {again:.3f},")
    print(f"of sensitivity and length of the projected token {length:.3f}")


PARTS: Mapping[str, Callable[[], None]] = {
    "objects": objects,
    "migration": migration,
    "sensitivity": sensitivity,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or PARTS:
        print(f"--- {name}")
        PARTS[name]()
