"""What grounding methods share: the detector that they ask."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hardware.profile import Profile
from methods.base import Method
from methods.checks import method_name
from models.base import Detector, Unsupported


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
            raise Unsupported(
                f"'{method_name(self)}' needs a detector; "
                f"'{getattr(model, 'name', type(model).__name__)}' is a {type(model).__name__}."
            )
        yield self.changed(model)


def needs(method: Method[Any], model: Any, kind: str) -> Unsupported:
    """Return the refusal of a detector that is not of the kind a method works on."""
    return Unsupported(
        f"'{method_name(method)}' needs {kind}; '{model.name}' is a {type(model).__name__}."
    )
