"""What embedding methods share: the way into a model that is read through a prompt, and checks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hardware.profile import Profile
from methods.base import Method, Output
from methods.checks import method_name, unsuited
from models.base import TextEncoder, Unsupported
from models.encoders import CausalEncoder, ReadOut


@dataclass(frozen=True, kw_only=True)
class PromptMethod(Method[TextEncoder]):
    """A method for causal language models, which are read through a prompt."""

    capability = "TextEncoder"
    output = Output.APPROXIMATE

    @abstractmethod
    def encoder(self, model: CausalEncoder) -> TextEncoder:
        """Return what embeds as the method does, over the weights of `model`, which is kept.

        Raises:
            models.base.Unsupported: The model lacks the layer that is to be read.
        """

    @contextmanager
    def apply(self, model: TextEncoder, hardware: Profile) -> Iterator[TextEncoder]:
        """Yield an encoder over the same weights; the model itself is not touched.

        Raises:
            models.base.Unsupported: The model is no causal language model that is read through a
                prompt, or has no such layer.
        """
        yield self.encoder(require_causal(self, model))


def require_causal(method: Method[Any], model: object) -> CausalEncoder:
    """Return the model, which must have layers to hook into and a prompt to put a token in.

    Raises:
        models.base.Unsupported: With what it is instead.
    """
    if isinstance(model, CausalEncoder):
        return model
    raise unsuited(method, model, "a causal language model that is read through a prompt")


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
