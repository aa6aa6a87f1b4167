"""Checks of a task's settings: what was wrong, what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise unless `value` is allowed.

    Args:
        name: Of the setting.
        value: As given.
        allowed: All that it may be.

    Raises:
        ValueError: It is not; names the allowed values and the nearest.
    """
    if value in allowed:
        return
    near = get_close_matches(value, allowed, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.{hint}")
