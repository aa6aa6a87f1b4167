"""Models around models: what a wrapper does not bring itself is the wrapped model's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.base import Session, TextModelFacts, Tokenizer


class Around:
    """A model around another one of any capability.

    Attributes:
        name, facts: The wrapped model's.
    """

    name: str
    facts: Any

    def __init__(self, model: Any) -> None:
        """Wrap a model; nothing in it is changed.

        Args:
            model: Of any capability.
        """
        self._model = model
        self.name = model.name
        self.facts = model.facts

    def synchronize(self) -> None:
        """Wait until the device has finished what it was given."""
        self._model.synchronize()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also met before __init__ has run, when copied
            raise AttributeError(name)
        return getattr(self._model, name)


class Wrapper(Around):
    """A model around another one that has a tokenizer.

    Attributes:
        name, tokenizer, facts: The wrapped model's.
    """

    tokenizer: Tokenizer
    facts: TextModelFacts

    def __init__(self, model: Any) -> None:
        """Wrap a model; nothing in it is changed.

        Args:
            model: Of a capability with a tokenizer and facts.
        """
        super().__init__(model)
        self.tokenizer = model.tokenizer


class GeneratorWrapper(Wrapper):
    """A text generator around another one, with the wrapped model's own sessions."""

    def session(self, capacity: int) -> Session:
        """Open a cache of the wrapped model for at most `capacity` tokens, drafts included."""
        session: Session = self._model.session(capacity)
        return session
