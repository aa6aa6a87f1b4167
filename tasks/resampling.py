"""What tasks need whose metrics are of all items together, to resample them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def draw_counts(draws: NDArray[np.int64], items: int) -> NDArray[np.float64]:
    """Return how often each item is drawn, (resamples, items).

    Args:
        draws: Places of items, (resamples, drawn).
        items: Number of items.
    """
    counts = np.zeros((len(draws), items))
    rows = np.repeat(np.arange(len(draws)), draws.shape[1])
    np.add.at(counts, (rows, draws.ravel()), 1.0)
    return counts
