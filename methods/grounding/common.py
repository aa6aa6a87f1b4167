"""What grounding methods share: the detector that they ask."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hardware.profile import Profile
from methods.base import Method
from methods.checks import unsuited
from models.base import Detector


@dataclass(frozen=True, kw_only=True)
class DetectorMethod(Method[Detector]):
    """A method that changes how a detector is asked, or what answers in its place."""

    capability = "Detector"

    @abstractmethod
    def changed(self, model: Any) -> Detector:
        """Return the detector that runs the method; `model` itself is not touched.

        Raises:
            models.base.Unsupported: The model lacks what the method needs.
        """

    @contextmanager
    def apply(self, model: Detector, hardware: Profile) -> Iterator[Detector]:
        """Yield the changed detector."""
        if not isinstance(model, Detector):
            raise unsuited(self, model, "a detector")
        yield self.changed(model)
