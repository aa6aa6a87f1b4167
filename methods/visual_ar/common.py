"""What decoding methods of autoregressive image models share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hardware.profile import Profile
from methods.base import Method
from methods.checks import unsuited
from models.base import AutoregressiveImageModel, ImageGenerator
from models.image_generation import LoopedImages, TokenLoop


@dataclass(frozen=True, kw_only=True)
class VisualARMethod(Method[ImageGenerator]):
    """A method that is a loop over the tokens of images."""

    capability = "ImageGenerator"
    owns_loop = True

    @abstractmethod
    def loop(self, model: AutoregressiveImageModel, hardware: Profile) -> TokenLoop:
        """Return a loop for one batch of images.

        Raises:
            models.base.Unsupported: The model lacks what the loop needs.
        """

    @contextmanager
    def apply(self, model: ImageGenerator, hardware: Profile) -> Iterator[ImageGenerator]:
        """Yield the model with its tokens drawn by the loop; it is not touched itself."""
        if not isinstance(model, AutoregressiveImageModel):
            raise unsuited(self, model, "a model that draws one image token after the other")
        self.loop(model, hardware)  # a refusal comes before anything is made
        yield LoopedImages(model, lambda: self.loop(model, hardware))
