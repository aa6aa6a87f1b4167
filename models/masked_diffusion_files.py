"""Which folders hold masked-diffusion models; needs no torch, as plans ask it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODEL_TYPES = ("llada", "dream")
"""`model_type` of the checkpoints that can be read, in lower case."""


def model_type(settings: Mapping[str, Any]) -> str:
    """Return the class of checkpoint that a `config.json` is of, in lower case."""
    return str(settings.get("model_type", "")).lower()


def is_masked_diffusion(folder: Path) -> bool:
    """Return whether a folder's `config.json` says that it is a model of a known class."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return isinstance(settings, dict) and model_type(settings) in MODEL_TYPES
