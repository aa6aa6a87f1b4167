"""Where generated code runs: isolated processes, and the two programs that live in them."""

from tasks.sandbox.isolation import (
    LEVELS,
    Level,
    Limits,
    available_levels,
    level,
    require_level,
    start,
)

__all__ = ["LEVELS", "Level", "Limits", "available_levels", "level", "require_level", "start"]
