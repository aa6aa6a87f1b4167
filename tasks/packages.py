"""Packages of others that bring tasks: imported late, run in silence, and leaving no trace."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from models.base import Unsupported


@contextmanager
def quietly(package: str, requirement: str) -> Iterator[Any]:
    """Yield a package, silent, and put back the random states that it sets.

    Args:
        package: As it is imported.
        requirement: As pip installs it.

    Raises:
        models.base.Unsupported: It is not installed.
    """
    import torch

    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        # What goes wrong is raised; progress bars of data sets heed no setting.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            try:
                module = importlib.import_module(package)
            except ImportError as error:
                raise Unsupported(
                    f"this task needs the package {package!r}, which is not installed: "
                    f"pip install {requirement}"
                ) from error
            yield module
    finally:
        logging.disable(level)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
