"""What embedding methods share: checks of settings and of what a model is."""

from __future__ import annotations

from typing import Any

from methods.base import Method
from models.base import Unsupported
from models.encoders import CausalEncoder, ReadOut


def require_causal(method: Method[Any], model: object) -> CausalEncoder:
    """Return the model, which must have layers to hook into and a prompt to put a token in.

    Raises:
        models.base.Unsupported: With what it is instead.
    """
    if isinstance(model, CausalEncoder):
        return model
    raise Unsupported(
        f"'{method_name(method)}' needs a causal language model that is read through a prompt; "
        f"'{getattr(model, 'name', type(model).__name__)}' is a {type(model).__name__}."
    )


def read_by(method: Method[Any], encoder: CausalEncoder, read_out: ReadOut) -> CausalEncoder:
    """Return an encoder over the same weights that is read as asked.

    Raises:
        models.base.Unsupported: The model has no such layer.
    """
    try:
        return encoder.configured(read_out=read_out)
    except ValueError as error:
        raise Unsupported(
            f"'{method_name(method)}' cannot read '{encoder.name}': {error}"
        ) from error


def method_name(method: Method[Any]) -> str:
    """Return what the method is called: its file's name."""
    return type(method).__module__.rpartition(".")[2].replace("_", "-")


def require_whole(name: str, value: object, meaning: str, low: int | None = None) -> None:
    """Raise ValueError unless `value` is a whole number, of at least `low` where one is given."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value!r}. {meaning}")
    if low is not None and value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}. {meaning}")
