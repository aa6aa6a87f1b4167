"""What all models have whose weights are on a device, and how many weights those are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


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


def linear_parameters(module: nn.Module) -> int:
    """Return the number of weights in all matrices that a module multiplies with."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))
