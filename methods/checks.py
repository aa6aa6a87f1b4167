"""Checks of settings and models: what was wrong, what is allowed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from methods.base import Method
from models.base import Unsupported


def method_name(method: Method[Any]) -> str:
    """Return what the method is called: its file's name."""
    return type(method).__module__.rpartition(".")[2].replace("_", "-")


def unsuited(method: Method[Any], model: object, needs: str, lacks: str = "") -> Unsupported:
    """Return the refusal of a model that is not of the kind a method works on.

    Args:
        method: Who refuses.
        model: Any object.
        needs: What the method needs, with its article.
        lacks: What is said of the model; its type when empty.
    """
    kind = type(model).__name__
    name = getattr(model, "name", kind)
    return Unsupported(
        f"'{method_name(method)}' needs {needs}; '{name}' {lacks or f'is a {kind}'}."
    )


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


def require_number(
    name: str,
    value: object,
    low: float,
    high: float,
    meaning: str,
    *,
    above_low: bool = False,
    below_high: bool = False,
) -> None:
    """Raise ValueError unless `value` is a number within its limits.

    Args:
        name: Of the setting.
        value: As given.
        low, high: Limits, both included.
        meaning: A sentence that says what the number is.
        above_low, below_high: Whether that limit itself is not allowed.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        is_above = value > low if above_low else value >= low
        if is_above and (value < high if below_high else value <= high):
            return
    limits = f"{'(' if above_low else '['}{low:g}, {high:g}{')' if below_high else ']'}"
    raise ValueError(f"{name} must lie in {limits}, got {value!r}. {meaning}")
