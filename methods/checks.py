"""Checks of settings: what was wrong, what is allowed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from methods.base import Method


def method_name(method: Method[Any]) -> str:
    """Return what the method is called: its file's name."""
    return type(method).__module__.rpartition(".")[2].replace("_", "-")


def require_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of the allowed words."""
    words = tuple(allowed)
    if value not in words:
        raise ValueError(f"{name} must be one of {', '.join(words)}, got {value!r}.")


def require_count(
    name: str, value: object, low: int | None, high: int | None, meaning: str
) -> None:
    """Raise ValueError unless `value` is a whole number within its limits.

    Args:
        name: Of the setting.
        value: As given.
        low, high: Limits, both included; None for none.
        meaning: A sentence that says what is counted.
    """
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if is_whole and (low is None or value >= low) and (high is None or value <= high):  # type: ignore[operator]  # it is a number
        return
    allowed = "a whole number"
    if low is not None:
        allowed += f" of at least {low}" if high is None else f" from {low} to {high}"
    raise ValueError(f"{name} must be {allowed}, got {value!r}. {meaning}")
