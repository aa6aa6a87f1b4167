"""Assisted generation of transformers: its own speculative decoding, with a draft model of ours.

The assistant drafts a chain until it has `num_draft_tokens` or is unsure of a token; one forward of
the target checks it. A peer of `speculative`.

Source: `assistant_model` of transformers' `generate`; defaults are those of its generation
configuration. Its confidence threshold adapts itself within a text when scikit-learn is there; it
starts anew for each text here, since the assistant gets a fresh configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from torch import nn
from transformers import GenerationConfig
from transformers.utils import logging

from hardware.profile import Profile
from methods.base import Method, Output
from methods.checks import require_count, require_number
from methods.decoding.common_drafts import draft_for, require_draft
from methods.decoding.common_transformers import TransformersGenerator, transformers_generator
from models.base import Decoding, Forward, Generation, TextGenerator, TextModelFacts, Unsupported


@dataclass(frozen=True, kw_only=True)
class HfAssisted(Method[TextGenerator]):
    """Assisted generation by transformers.

    Attributes:
        draft: The assistant, as for `speculative`.
        num_draft_tokens: Most drafted tokens in a step.
        confidence: A draft that the assistant is less sure of is the last one; 0 goes on always.
    """

    draft: str = "tiny-draft"
    num_draft_tokens: int = 20
    confidence: float = 0.4
    capability = "TextGenerator"
    owns_loop = True
    output = Output.IDENTICAL
    role = "peer"
    trial: ClassVar[Mapping[str, Any]] = MappingProxyType({"draft": "layers:1"})

    def __post_init__(self) -> None:
        require_draft(self.draft)
        require_count("num_draft_tokens", self.num_draft_tokens, 1, 64, "There is no 0 here.")
        require_number(
            "confidence",
            self.confidence,
            0,
            1,
            "It is the least probability of a draft after which drafting goes on.",
        )

    @contextmanager
    def apply(self, model: TextGenerator, hardware: Profile) -> Iterator[TextGenerator]:
        """Yield the model with transformers' loop and the assistant beside it."""
        with transformers_generator(self, model) as plain:
            draft = draft_for(self.draft, model)
            assistant: Any = getattr(draft, "module", None)
            if not isinstance(assistant, nn.Module):
                raise Unsupported(f"draft model '{draft.name}' is no transformers model.")
            settings = GenerationConfig(
                num_assistant_tokens=self.num_draft_tokens,
                num_assistant_tokens_schedule="constant",
                assistant_confidence_threshold=float(self.confidence),
            )
            module: Any = getattr(plain, "module", None)
            yield AssistedGenerator(model, module, assistant, settings, draft.facts)


class AssistedGenerator(TransformersGenerator):
    """Transformers' `generate` with an assistant, its work counted."""

    def __init__(
        self,
        model: TextGenerator,
        module: nn.Module,
        assistant: nn.Module,
        settings: GenerationConfig,
        facts: TextModelFacts,
    ) -> None:
        super().__init__(model, module, {})
        self.module: Any = _Assisted(module, assistant)
        self._assistant: Any = assistant
        self._assistant_settings = settings
        self._assistant_facts = facts

    def generate(self, prompt_ids: Sequence[int], decoding: Decoding) -> Generation:
        """Continue `prompt_ids`; see `TransformersGenerator.generate`."""
        forwards: list[Forward] = []

        def before_forward(
            module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
        ) -> None:
            ids = args[0] if args else kwargs["input_ids"]
            cache = kwargs.get("past_key_values")
            forwards.append(Forward(ids.shape[1], cache.get_seq_length() if cache else 0))

        handle = self._assistant.register_forward_pre_hook(before_forward, with_kwargs=True)
        defaults = self._assistant.generation_config
        self._assistant.generation_config = self._assistant_settings
        # It warns of the way in which it calls itself.
        level = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            result = super().generate(prompt_ids, decoding)
        finally:
            logging.set_verbosity(level)
            self._assistant.generation_config = defaults
            handle.remove()
        trace = result.trace
        for forward in forwards:
            trace.flops += self._assistant_facts.flops(forward, 1)
            trace.kv_bytes += self._assistant_facts.kv_read(forward)
        trace.draft_forwards += len(forwards)
        return result


class _Assisted:
    """A transformers model that always generates with its assistant."""

    def __init__(self, module: Any, assistant: Any) -> None:
        self._module = module
        self._assistant = assistant

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model's own `generate`."""
        return self._module.generate(*args, assistant_model=self._assistant, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also met before __init__ has run, when copied
            raise AttributeError(name)
        return getattr(self._module, name)
