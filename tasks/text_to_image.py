"""Images of captions: what their tokens cost, and how well CLIP finds the captions in them.

Image n is of caption n. The captions are those of a file:

| file | captions |
|---|---|
| `*.tsv` | the column `Prompt`; PartiPrompts, `PartiPrompts.tsv` of google-research/parti |
| `*.json` | COCO's `captions_val2017.json`: the first caption of each image, by the image's id |
| any other | one a line |

| metric | of what |
|---|---|
| `clip_score[clip@hash]` | 100 times the cosine of picture and caption, 0 where it is negative |
| `nll`, `entropy`, `unique_tokens`, `excess_acceptance` | see `tasks/image_common.py` |

Nothing is downloaded. In `text-to-image` in tokenmark's cache, or where `prompts` and `clip` say,
lie `PartiPrompts.tsv` and `clip/`, a CLIP laid out like `openai/clip-vit-large-patch14` on the hub.
With `clip=none` there is no score, and what the target says of the tokens is the headline.

Guidance 3 and the 2,000 likeliest tokens are what papers on Lumina-mGPT use; LlamaGen's are
`guidance_scale=7.5,top_k=1000`.
"""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from models.base import Unsupported
from models.cache import cache_dir
from tasks.base import Dataset, Item, Metric, Scores
from tasks.image_common import Floats, ImageTask, Pixels, read_output
from tasks.imagenet_fid import file_hash

if TYPE_CHECKING:
    from models.base import Condition

PROMPTS = "PartiPrompts.tsv"
CLIP = "clip"
_NO_CLIP = "none"


@dataclass(frozen=True, kw_only=True)
class TextToImage(ImageTask):
    """Captions in the order of their file.

    Attributes:
        images: How many; captions begin again where there are fewer.
        prompts: File of captions; empty for `PartiPrompts.tsv` in tokenmark's cache.
        clip: Folder of a CLIP; empty for the one in tokenmark's cache; `none` scores no pictures.
    """

    images: int = 1600
    guidance_scale: float = 3.0
    top_k: int = 2000
    prompts: str = ""
    clip: str = ""

    version = "1.0"
    conditions_field: ClassVar[str] = "captions"
    data = Dataset(
        source="google-research/parti or COCO",
        revision="the file, by its hash",
        split="PartiPrompts or val2017",
        license="Apache-2.0 or CC-BY-4.0",
    )

    @property
    def classes(self) -> int:
        """None."""
        return 0

    @property
    def quality_metrics(self) -> tuple[Metric, ...]:
        """The score of CLIP, if it is asked for."""
        if not self._is_scored:
            return ()
        return (Metric(name=self._name, unit="cosine x 100", kind="mean"),)

    def conditions(self) -> dict[str, str]:
        """Return the hashes of captions and CLIP.

        Raises:
            Unsupported: A file is not there.
        """
        if not self._prompts.is_file():
            raise Unsupported(
                f"task 'text-to-image' needs captions, and there is no {self._prompts}; `run.py "
                f"show task text-to-image` says what it may be."
            )
        if self._is_scored and not _holds_clip(self._clip):
            raise Unsupported(
                f"{self._clip} holds no CLIP, of which config.json, tokenizer, "
                f"preprocessor_config.json and *.safetensors are wanted; clip=none goes without."
            )
        clip = _clip_hash(self._clip) if self._is_scored else _NO_CLIP
        return {"prompts": file_hash(self._prompts), "clip": clip}

    def wanted(self, numbers: Sequence[int]) -> list[Condition]:
        """Return captions by the numbers of their images."""
        captions = read_prompts(self._prompts)
        return [captions[number % len(captions)] for number in numbers]

    def score(self, item: Item, output: str) -> Scores:
        """Return CLIP's score, the mean of a batch, and what is said of the tokens."""
        scores = dict(super().score(item, output))
        if self._is_scored:
            pixels = read_output(output).pixels
            found = clip_scores(self._clip, pixels, item.fields[self.conditions_field])
            scores[self._name] = float(found.mean())
        return scores

    @property
    def _prompts(self) -> Path:
        return Path(self.prompts).expanduser() if self.prompts else _home() / PROMPTS

    @property
    def _clip(self) -> Path:
        return Path(self.clip).expanduser() if self.clip else _home() / CLIP

    @property
    def _is_scored(self) -> bool:
        return self.clip != _NO_CLIP

    @property
    def _name(self) -> str:
        found = _clip_hash(self._clip)[:8] if _holds_clip(self._clip) else "missing"
        return f"clip_score[clip@{found}]"


def _home() -> Path:
    return cache_dir() / "text-to-image"


def _holds_clip(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _clip_hash(folder: Path) -> str:
    from models.loading import LoadSettings, weights_hash

    return weights_hash(f"path:{folder}", LoadSettings())


def read_prompts(path: Path) -> tuple[str, ...]:
    """Return the captions of a file; see the module's table.

    Raises:
        Unsupported: It holds none, or is damaged.
    """
    return _read_prompts(path, file_hash(path))


@functools.lru_cache(maxsize=4)
def _read_prompts(path: Path, digest: str) -> tuple[str, ...]:
    del digest  # a changed file is read anew
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".tsv":
            rows = csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
            found = [row["Prompt"] for row in rows]
        elif path.suffix == ".json":
            notes = sorted(
                json.loads(text)["annotations"], key=lambda note: (note["image_id"], note["id"])
            )
            first: dict[int, str] = {}
            for note in notes:
                first.setdefault(note["image_id"], note["caption"])
            found = list(first.values())
        else:
            found = text.splitlines()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unsupported(f"{path} holds no captions: {error!r}") from error
    captions = tuple(caption.strip() for caption in found if caption and caption.strip())
    if not captions:
        raise Unsupported(f"{path} holds no captions.")
    return captions


def clip_scores(folder: Path, pixels: Pixels, captions: Sequence[str]) -> Floats:
    """Return 100 times the cosine of each picture and its caption, at least 0, by the processor.

    Args:
        folder: Of the CLIP.
        pixels: (images, height, width, 3), uint8.
        captions: One for each; longer ones than CLIP reads are cut.
    """
    import torch

    model, tokenizer, processor = _load_clip(folder)
    read = tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt")
    seen = processor(images=list(pixels), return_tensors="pt", input_data_format="channels_last")
    with torch.no_grad():
        output = model(pixel_values=seen["pixel_values"], **read)
    cosines = (output.image_embeds * output.text_embeds).sum(-1).double()
    found: Floats = (100 * cosines.clamp(min=0)).numpy()
    return np.asarray(found, dtype=np.float64)


@functools.lru_cache(maxsize=1)
def _load_clip(folder: Path) -> tuple[Any, Any, Any]:
    import transformers

    from models.loading import quiet_transformers

    options: dict[str, Any] = {"local_files_only": True}
    with quiet_transformers():
        model = transformers.CLIPModel.from_pretrained(folder, use_safetensors=True, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        processor = transformers.CLIPImageProcessor.from_pretrained(folder, **options)
    return model.eval().requires_grad_(False), tokenizer, processor
