"""WeDLM: recover masks in parallel under an ordinary causal mask, and commit the resolved prefix.

A window of masks stands behind the text. Every forward reads the window with its observed tokens
moved before its masks while their rotary positions stay, fills the masks that are sure enough, and
keeps the keys and values of the leading tokens that were filled before: they depend on the text
alone, so they are an ordinary cache. New masks follow on the fly.

It changes how a model is decoded, not the model: it needs one that was trained for it (dual-stream
continuation of a causal model) and that has a mask token. The same weights decoded by
`autoregressive` are the matched baseline. A token costs at least two slots, one as a mask and one
as a token, so there is never less computation, only fewer forwards.

Source: arXiv 2512.22737; Tencent/WeDLM at 0216110 (engine). Differs from that code: a text ends
when its end is resolved, without the forward that would only complete the cache; the mask is never
chosen as a token. The paper's listing refills after predicting, the code before the forward:
`refill` has both, and the block-wise decoding that the paper compares with (figure 4c).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from hardware.profile import Profile
from methods.base import Method, Output
from methods.checks import method_name, require_choice, require_count, require_number
from methods.diffusion_lm.common_wedlm import Refill, Settings, mask_token_of, stream
from models.base import Decoding, Generation, TextGenerator, Unsupported
from models.wrapper import GeneratorWrapper


class StreamedGenerator(GeneratorWrapper):
    """A text generator whose texts are streamed out of a window of masks."""

    def __init__(self, model: TextGenerator, settings: Settings) -> None:
        super().__init__(model)
        self._settings = settings

    def generate(self, prompt_ids: Sequence[int], decoding: Decoding) -> Generation:
        """Continue `prompt_ids`."""
        return stream(self._model, prompt_ids, decoding, self._settings)


@dataclass(frozen=True, kw_only=True)
class WeDLM(Method[TextGenerator]):
    """Streaming parallel decoding by topological reordering.

    Attributes:
        window: Slots that are masks or filled out of order, at least 1; 1 fills one mask a
            forward, from left to right.
        entropy_threshold: Masks whose entropy in nats, with the penalty, lies below it are filled;
            the least uncertain one always is. `none` fills that one alone: the paper's quality
            tables. 0.4 in its evaluation, 0.2 to 0.9 in its sweep.
        distance_penalty: Nats a token of distance from the leftmost mask, 0 or more.
        refill: When masks follow committed tokens: `before` the forward that commits them (the
            code), `after` it (the paper's listing), or only when a whole window is filled and
            committed, `block`: the control.
        top_k: When sampling, candidates at most; 0 for all.
        top_p: When sampling, probability of the candidates, before temperature, in (0, 1].
        mask_id: Id of the mask token; `auto` takes the tokenizer's or the configuration's.
    """

    window: int = 16
    entropy_threshold: float | Literal["none"] = 0.4
    distance_penalty: float = 0.02
    refill: Refill = "before"
    top_k: int = 0
    top_p: float = 1.0
    mask_id: int | Literal["auto"] = "auto"
    capability = "TextGenerator"
    owns_loop = True
    output = Output.APPROXIMATE
    # A random model has no mask token; this id is in no prompt of the batteries.
    trial = MappingProxyType({"mask_id": 38})

    def __post_init__(self) -> None:
        require_count("window", self.window, 1, 512, "It is counted in tokens.")
        if self.entropy_threshold != "none" and not self.entropy_threshold >= 0:
            raise ValueError(
                f"entropy_threshold must be 'none' or 0 or more, got {self.entropy_threshold}. It "
                "is an entropy in nats; the paper's lie between 0.2 and 0.9."
            )
        if not self.distance_penalty >= 0:
            raise ValueError(
                f"distance_penalty must be 0 or more, got {self.distance_penalty}. It is added to "
                "a mask's entropy in nats for each token of distance."
            )
        require_choice("refill", self.refill, get_args(Refill))
        require_count("top_k", self.top_k, 0, None, "It counts candidates; 0 means all.")
        require_number("top_p", self.top_p, 0, 1, "It is a probability.", above_low=True)
        if self.mask_id != "auto":
            require_count("mask_id", self.mask_id, 0, None, "It is a token's id, or 'auto'.")

    @contextmanager
    def apply(self, model: TextGenerator, hardware: Profile) -> Iterator[TextGenerator]:
        """Yield the model with its texts streamed; the model itself is not touched."""
        yield StreamedGenerator(model, self.settings_for(model))

    def settings_for(self, model: TextGenerator) -> Settings:
        """Return the settings of the decoder for a model.

        Raises:
            Unsupported: It is no text generator, or has no mask token.
        """
        name = getattr(model, "name", type(model).__name__)
        if not isinstance(model, TextGenerator):
            raise Unsupported(
                f"'{method_name(self)}' needs a causal text generator with a cache; '{name}' is "
                "none."
            )
        mask_id = mask_token_of(model) if self.mask_id == "auto" else self.mask_id
        if mask_id is None:
            raise Unsupported(
                f"'{method_name(self)}' needs a model that was trained to recover masks, and "
                f"neither the tokenizer nor the configuration of '{name}' names a mask token. If "
                "it has one, pass mask_id=ID."
            )
        if mask_id >= model.facts.vocab_size:
            raise Unsupported(
                f"'{method_name(self)}': the mask is token {mask_id}, but '{name}' has only "
                f"{model.facts.vocab_size}."
            )
        return Settings(
            window=self.window,
            entropy_threshold=None if self.entropy_threshold == "none" else self.entropy_threshold,
            distance_penalty=self.distance_penalty,
            refill=self.refill,
            top_k=self.top_k,
            top_p=self.top_p,
            mask_id=mask_id,
        )
