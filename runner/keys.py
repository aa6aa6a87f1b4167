"""Keys of cells: a hash over everything that can change an answer."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from runner.registry import ROOT

# Raise it when the way of measuring changes so that old rows no longer compare with new ones.
PROTOCOL_VERSION = 1

_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy")


def digest(value: Any) -> str:
    """Return a SHA-256 of JSON-able data; the order of keys does not matter."""
    return hashlib.sha256(_written(value).encode()).hexdigest()


class PartialDigest:
    """`digest` of a dictionary most of which stays the same: that part is written once.

    JSON with sorted keys begins with the common keys that sort before all others; what has been
    hashed of those goes on for each dictionary.
    """

    def __init__(self, common: Mapping[str, Any]) -> None:
        """Write the common part.

        Args:
            common: JSON-able data.
        """
        self._common = written_pairs(common)
        self._begun: dict[str, tuple[hashlib._Hash, dict[str, str]]] = {}

    def __call__(self, own: Mapping[str, str]) -> str:
        """Return the digest of the common part with `own` in it, whose values win.

        Args:
            own: As `written_pairs` returns it, at least one.
        """
        first = min(own)
        if first not in self._begun:
            before = [pair for key, pair in sorted(self._common.items()) if key < first]
            text = "{" + "".join(f"{pair}, " for pair in before)
            rest = {key: pair for key, pair in self._common.items() if key >= first}
            self._begun[first] = (hashlib.sha256(text.encode()), rest)
        begun, rest = self._begun[first]
        whole = {**rest, **own}
        found = begun.copy()
        found.update((", ".join([whole[key] for key in sorted(whole)]) + "}").encode())
        return found.hexdigest()


def written_pairs(values: Mapping[str, Any]) -> dict[str, str]:
    """Return each pair of a dictionary as it stands in its JSON."""
    return {key: f"{_written(key)}: {_written(value)}" for key, value in values.items()}


def _written(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def file_digest(paths: Iterable[Path]) -> str:
    """Return a SHA-256 over the contents of files, in the order of their names."""
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def method_source(source: Path | None) -> str:
    """Return a hash of a method's file and of what it stands on; "" for a package's own."""
    if source is None or source.suffix != ".py":
        return ""
    # A method in the tree stands on its family's common modules and on what was learned for them; a
    # plug-in stands alone.
    patterns = ["common*.py", "data/*.json", "data/*.safetensors"]
    if not source.is_relative_to(ROOT / "methods"):
        patterns = []
    return file_digest({source, *(path for each in patterns for path in source.parent.glob(each))})


@functools.cache
def shared_source() -> str:
    """Return a hash of the code that every cell runs: the models' room and the contracts."""
    models = ROOT / "models"
    return file_digest(
        [
            *models.glob("*.py"),
            *models.glob("native/*.py"),
            *models.glob("native/*.c"),
            # Networks that transformers lacks stand with their recipes.
            *models.glob("embedded/*/model.py"),
        ]
    )


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python and the libraries that can change an answer."""
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in _LIBRARIES
    }
