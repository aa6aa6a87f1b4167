"""What all models have whose weights are on a device."""

from __future__ import annotations

from typing import Any

import torch


class OnDevice:
    """Weights that are somewhere.

    Attributes:
        module: The network; all its weights are on one device.
    """

    module: Any

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device  # type: ignore[no-any-return]  # a torch.device

    def synchronize(self) -> None:
        """Wait until the device has finished what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
