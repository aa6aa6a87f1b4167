"""The catalogue of hardware profiles: one TOML file each, read without importing torch.

The file's name is the profile's name. Units stand in the keys, as data sheets print them:

    kind = "cuda"                 # or "cpu"
    label = "NVIDIA L4 24 GB"
    match = '^NVIDIA L4$'         # found in the device's own name
    memory_gib = 24
    bandwidth_gb_per_s = 300      # 10^9 bytes
    power_watts = 72
    [peak_tera_ops]               # dense, by dtype; a multiply-add counts two
    float32 = 30.3
    [sources]                     # one for each number above
    memory_gib = "NVIDIA L4 Tensor Core GPU data sheet"

A class of CPUs has `architecture`, `needs_flags` and `[operations_per_core_cycle]` instead.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from hardware.profile import Profile

FOLDER = Path(__file__).parent / "profiles"
DTYPES = ("float32", "tf32", "float16", "bfloat16", "float8", "int8")

_TEXTS = ("kind", "label", "match", "architecture")
_NUMBERS = ("memory_gib", "bandwidth_gb_per_s", "power_watts")
_TABLES = ("peak_tera_ops", "operations_per_core_cycle")
_KEYS = (*_TEXTS, *_NUMBERS, *_TABLES, "needs_flags", "sources")


class ProfileError(ValueError):
    """A profile's file cannot be right; the message names the file and what is allowed."""


class UnknownProfileError(LookupError):
    """No profile has this name; the message gives the nearest."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A profile as its file tells it.

    Attributes:
        profile: What the rest of the suite uses.
        sources: Where each number comes from, by key of the file.
        architecture: For CPUs: `x86_64`, `aarch64`; empty fits all.
        needs_flags: For CPUs: flags of `/proc/cpuinfo` that the class must have.
        operations_per_core_cycle: For CPUs: the most that a core of the class does, by dtype.
    """

    profile: Profile
    sources: Mapping[str, str] = field(default_factory=dict)
    architecture: str = ""
    needs_flags: frozenset[str] = frozenset()
    operations_per_core_cycle: Mapping[str, float] = field(default_factory=dict)


def names(folder: Path = FOLDER) -> list[str]:
    """Return the names of all profiles, sorted."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def load(name: str, folder: Path = FOLDER) -> Entry:
    """Return one profile with its sources.

    Raises:
        UnknownProfileError: No file has this name.
        ProfileError: The file is not right.
    """
    known = names(folder)
    if name not in known:
        raise UnknownProfileError(
            f"no hardware profile named {name!r}.{_hint(name, known)} "
            "`python run.py list hardware` shows all of them."
        )
    return parse(name, (folder / f"{name}.toml").read_text(encoding="utf-8"))


def profile(name: str) -> Profile:
    """Return one profile by name; raises as `load` does."""
    return load(name).profile


def entries(folder: Path = FOLDER) -> list[Entry]:
    """Return all profiles, sorted by name."""
    return [load(name, folder) for name in names(folder)]


def parse(name: str, text: str) -> Entry:
    """Return the profile that `text` describes, checked.

    Raises:
        ProfileError: Broken TOML, an unknown key or dtype, a wrong type, a number that is not
            positive, a number without a source, or a pattern that does not compile.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ProfileError(f"hardware profile {name!r} is not valid TOML: {error}.") from None
    _check_keys(name, data, _KEYS, "key")
    kind = data.get("kind")
    if kind not in ("cpu", "cuda"):
        raise ProfileError(
            f"hardware profile {name!r}: kind must be 'cpu' or 'cuda', not {kind!r}."
        )
    for key in _TEXTS:
        if not isinstance(data.get(key, ""), str):
            raise ProfileError(f"hardware profile {name!r}: {key} must be text, got {data[key]!r}.")
    if not data.get("label"):
        raise ProfileError(f"hardware profile {name!r} needs a label, a name for people.")
    flags = data.get("needs_flags", [])
    if not isinstance(flags, list) or not all(isinstance(flag, str) for flag in flags):
        raise ProfileError(f"hardware profile {name!r}: needs_flags must be a list of texts.")
    try:
        re.compile(data.get("match", ""))
    except re.error as error:
        raise ProfileError(
            f"hardware profile {name!r}: match is no regular expression: {error}."
        ) from None
    numbers = {key: _number(name, key, data[key]) for key in _NUMBERS if key in data}
    tables = {key: _by_dtype(name, key, data.get(key, {})) for key in _TABLES}
    sources = data.get("sources", {})
    if not isinstance(sources, dict) or not all(isinstance(text, str) for text in sources.values()):
        raise ProfileError(f"hardware profile {name!r}: sources must be a table of texts.")
    given = [*numbers, *(key for key, table in tables.items() if table)]
    _check_keys(name, sources, given, "source")
    for key in given:
        if not sources.get(key):
            raise ProfileError(
                f'hardware profile {name!r}: {key} has no source. Add `{key} = "…"` to [sources].'
            )
    return Entry(
        profile=Profile(
            name=name,
            kind=cast("Literal['cpu', 'cuda']", kind),
            label=data["label"],
            memory_bytes=round(numbers.get("memory_gib", 0) * 2**30),
            bandwidth=numbers.get("bandwidth_gb_per_s", 0.0) * 1e9,
            peak_flops={dtype: value * 1e12 for dtype, value in tables["peak_tera_ops"].items()},
            power_watts=numbers.get("power_watts", 0.0),
            match=data.get("match", ""),
        ),
        sources=sources,
        architecture=data.get("architecture", ""),
        needs_flags=frozenset(flags),
        operations_per_core_cycle=tables["operations_per_core_cycle"],
    )


def recognise_gpu(device_name: str, memory_bytes: int, known: Iterable[Entry]) -> Entry | None:
    """Return the profile whose pattern is found in the device's name, or None.

    Boards that share a name (every Orin is called `Orin`) are told apart by their memory.
    """
    fitting = [
        entry
        for entry in known
        if entry.profile.kind == "cuda"
        and entry.profile.match
        and re.search(entry.profile.match, device_name)
    ]
    return min(
        fitting, key=lambda entry: abs(entry.profile.memory_bytes - memory_bytes), default=None
    )


def recognise_cpu(architecture: str, flags: frozenset[str], known: Iterable[Entry]) -> Entry | None:
    """Return the most demanding class of CPUs that has all it needs, or None."""
    fitting = [
        entry
        for entry in known
        if entry.profile.kind == "cpu"
        and entry.architecture in ("", architecture)
        and entry.needs_flags <= flags
    ]
    return max(fitting, key=lambda entry: len(entry.needs_flags), default=None)


def _check_keys(name: str, table: Mapping[str, Any], allowed: Iterable[str], what: str) -> None:
    allowed = list(allowed)
    for key in table:
        if key not in allowed:
            raise ProfileError(
                f"hardware profile {name!r}: unknown {what} {key!r}.{_hint(key, allowed)} "
                f"Allowed: {', '.join(allowed) or 'none, for the file gives no numbers'}."
            )


def _number(name: str, key: str, value: object) -> float:
    # bool is an int to Python, not to a data sheet; NaN fails the comparison.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < cast("float", value) < float("inf"):
        raise ProfileError(
            f"hardware profile {name!r}: {key} must be a number above 0, got {value!r}. "
            "Leave it out if it is unknown."
        )
    return float(cast("float", value))


def _by_dtype(name: str, key: str, table: object) -> dict[str, float]:
    if not isinstance(table, dict):
        raise ProfileError(f"hardware profile {name!r}: {key} must be a table of numbers by dtype.")
    _check_keys(name, table, DTYPES, f"dtype in {key}")
    return {dtype: _number(name, f"{key}.{dtype}", value) for dtype, value in table.items()}


def _hint(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
