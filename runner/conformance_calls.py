"""The battery for capabilities whose call is a function of its input: encoders, scored models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from methods.base import Method, Output
from models.base import Decoding, MaskedDiffusionLM, TextEncoder, TokenizedLM, VisualPrompt
from models.tokenization import HubTokenizer
from runner.conformance_base import (
    PROFILE,
    Battery,
    Broken,
    OnPurpose,
    byte_tokenizer,
    compare,
    fill_exactly,
    fresh,
    random_llama,
    snapshot,
)
from runner.conformance_image import make_images, tiny_images
from runner.conformance_vision import picture, tiny_detector, tiny_vision

TEXTS = (
    "the cat sat on the mat",
    "a b a b a b",
    "one",
    "rain falls on the hills and rivers run down to the sea",
)

# Largest change of a text's output by others beside it, relative to the largest number: a batch
# adds in another order.
_BATCH_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Found:
    """What a call returned, in a form that can be compared.

    Attributes:
        output: Exact.
        work: What was counted, whole numbers.
    """

    output: Any
    work: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Calls:
    """How the battery uses one capability.

    Attributes:
        model: Makes a tiny random model.
        call: Runs it on a text.
        alone: Whether several texts can be given at once; then each must come out as alone, as
            `together` runs them.
        together: Runs it on several texts; one result for each.
    """

    model: Callable[[], Any]
    call: Callable[[Any, str], Found]
    together: Callable[[Any, Sequence[str]], Sequence[Any]] | None = None


def tiny_encoder() -> TextEncoder:
    """Return a random Llama of four layers that reads bytes, as an encoder."""
    from models.encoders import CausalEncoder

    module, tokenizer = _tiny_model()
    return CausalEncoder(module, HubTokenizer(tokenizer), "tiny-random-llama")


def _encode(model: Any, text: str) -> Found:
    found = model.encode([text])
    work = {"tokens": sum(found.token_counts), "flops": int(found.trace.flops)}
    return Found(found.vectors.tobytes(), work)


def tiny_tokenized() -> TokenizedLM:
    """Return a random Llama of four layers that reads bytes, together with its tokenizer."""
    from models.tokenized import CausalTokenizedLM

    module, tokenizer = _tiny_model()
    return CausalTokenizedLM(module, HubTokenizer(tokenizer), "tiny-random-llama")


def _score(model: Any, text: str) -> Found:
    found = model.score(text)
    work = {"tokens": len(found.token_ids), "flops": int(found.trace.flops)}
    return Found((tuple(found.token_ids), tuple(found.bits)), work)


def tiny_masked_diffusion() -> MaskedDiffusionLM:
    """Return a masked-diffusion model of two layers that reads bytes.

    How many forwards it takes depends on its weights, so these are exact.
    """
    from models.masked_diffusion import MaskedDiffusionModel
    from models.masked_diffusion_network import Network, NetworkConfig

    tokenizer = byte_tokenizer()
    config = NetworkConfig(
        width=32,
        num_heads=4,
        num_kv_heads=2,
        num_layers=2,
        inner_width=64,
        vocab_size=len(tokenizer) + 1,
        rope_theta=10000.0,
        norm_epsilon=1e-5,
        max_positions=512,
        mask_id=len(tokenizer),
        eos_ids=frozenset({0}),
        has_qkv_bias=False,
        is_tied=False,
        is_shifted=False,
    )
    with torch.random.fork_rng(devices=[]):
        network = Network(config)
    fill_exactly(network)
    network.requires_grad_(False)
    network.head.weight.mul_(3)  # else it is sure of nothing
    return MaskedDiffusionModel(
        network.eval(), HubTokenizer(tokenizer), "tiny-random-masked-diffusion"
    )


def _fill_in(model: Any, text: str) -> Found:
    # More than one block of most methods, so that caches are used and refreshed.
    decoding = Decoding(max_new_tokens=40, ignore_eos=True)
    found = model.generate(model.tokenizer.encode(text), decoding)
    trace = found.trace
    work = {
        "output_tokens": len(found.token_ids),
        "forwards": len(trace.forwards),
        "forward_tokens": sum(forward.width for forward in trace.forwards),
        "flops": int(trace.flops),
        "kv_bytes": trace.kv_bytes,
    }
    return Found(found.token_ids, work)


def _answer(model: Any, text: str) -> Found:
    # A wide picture, so that a model that tiles images has crops and separators.
    prompt = VisualPrompt(image=picture(text, 24, 48), text=text, options=("A", "B"))
    found = model.answer(prompt, Decoding(max_new_tokens=8, ignore_eos=True))
    counts = found.work
    work = {
        "visual_tokens": counts.visual_tokens,
        "kept_tokens": counts.kept_tokens,
        "layer_tokens": sum(counts.layer_tokens),
        "encoder_flops": int(counts.encoder_flops),
        "projector_flops": int(counts.projector_flops),
        "selector_flops": int(counts.selector_flops),
        "prefill_flops": int(counts.prefill_flops),
        "decode_flops": int(counts.decode_flops),
    }
    return Found((found.token_ids, found.option_log_probabilities), work)


def _detect(model: Any, text: str) -> Found:
    # Words that a head with a closed vocabulary knows too.
    decoding = Decoding(max_new_tokens=24, ignore_eos=True)
    found = model.detect(picture(text, 24, 48), ("star", "red circle"), "box", decoding)
    work = {
        "output_tokens": found.output_tokens,
        "prefill_tokens": sum(forward.width for forward in found.trace.prefill),
        "forwards": len(found.trace.forwards),
        "flops": int(found.trace.flops),
        "kv_bytes": found.trace.kv_bytes,
    }
    return Found((found.token_ids, found.found), work)


def _make(model: Any, text: str) -> Found:
    return Found(*make_images(model, text))


CALLS: Mapping[str, Calls] = {
    "TextEncoder": Calls(
        model=tiny_encoder,
        call=_encode,
        together=lambda model, texts: model.encode(texts).vectors,
    ),
    "TokenizedLM": Calls(model=tiny_tokenized, call=_score),
    "VisionLanguageModel": Calls(model=tiny_vision, call=_answer),
    "Detector": Calls(model=tiny_detector, call=_detect),
    "MaskedDiffusionLM": Calls(model=tiny_masked_diffusion, call=_fill_in),
    "ImageGenerator": Calls(model=tiny_images, call=_make),
}


class CallBattery(Battery):
    """The battery of one method whose capability is in `CALLS`."""

    def __init__(self, method: Method[Any], model: Any = None) -> None:
        """Get a model ready.

        Raises:
            ValueError: The capability has no battery.
        """
        super().__init__(method)
        if method.capability not in CALLS:
            known = ", ".join(["TextGenerator", *CALLS])
            raise ValueError(f"no battery for a {method.capability}; there are those of {known}.")
        self.calls = CALLS[method.capability]
        self.model = model or self.calls.model()
        # What a model builds when it is first used is not the method's doing.
        self.plain = [self.calls.call(self.model, text) for text in TEXTS]

    def checks(self) -> dict[str, Callable[[], str]]:
        """Return the checks by name, in the order of the table."""
        return {
            "card is complete": self.card,
            "settings survive JSON": self.settings,
            "unsupported models are refused with a reason": self.refusal,
            "neutral setting equals the plain model to the bit": self.neutral,
            "it acts at these settings": self.acts,
            "declared output holds": self.declared,
            "texts do not depend on those beside them": self.beside,
            "same input, same output": self.repeats,
            "applications do not leak into each other": self.leaks,
            "model and global state are restored": self.restored,
            "they are restored after an exception too": self.restored_after_exception,
        }

    def neutral(self) -> str:
        """Compare the neutral setting with the plain model."""
        if self.method.neutral is None:
            return "does not apply: it declares no neutral setting"
        neutral = self.method.with_parameters({**self.method.parameters(), **self.method.neutral})
        for text, plain in zip(TEXTS, self.plain, strict=True):
            if self._call(neutral, text).output != plain.output:
                raise Broken(f"the output for {text!r} differs.")
        shown = ", ".join(f"{name}={value}" for name, value in self.method.neutral.items())
        return shown or "always"

    def acts(self) -> str:
        """Look for a difference from the plain model."""
        if self.method.role in ("baseline", "peer"):
            return f"does not apply: it is a {self.method.role}"
        for text, plain in zip(TEXTS, self.plain, strict=True):
            found = self._call(self.method, text)
            if found.output != plain.output:
                return "the output differs from the plain model's"
            if found.work != plain.work:
                return "the work differs from the plain model's"
        raise Broken("outputs and work are those of the plain model: it did nothing.")

    def declared(self) -> str:
        """Hold a method that promises identical output to it."""
        if self.method.output is not Output.IDENTICAL:
            return f"does not apply: it declares {self.method.output.value} output"
        for text, plain in zip(TEXTS, self.plain, strict=True):
            if self._call(self.method, text).output != plain.output:
                raise Broken(f"the output for {text!r} differs from the plain model's.")
        return f"{len(TEXTS)} texts"

    def beside(self) -> str:
        """Give all texts at once and one by one."""
        if self.calls.together is None:
            return "does not apply: a call takes one text"
        with fresh(self.method).apply(self.model, PROFILE) as changed:
            together = np.asarray(self.calls.together(changed, TEXTS))
            alone = np.concatenate([self.calls.together(changed, [text]) for text in TEXTS])
        furthest = float(np.abs(together - alone).max() / np.abs(alone).max())
        if furthest > _BATCH_TOLERANCE:
            raise Broken(f"a text's output changes by {furthest:.1g} of the largest beside others.")
        return f"within {furthest:.1g} of the largest number"

    def repeats(self) -> str:
        """Run the same text twice, from fresh methods."""
        for text in TEXTS:
            once, again = (self._call(fresh(self.method), text) for _ in range(2))
            if once != again:
                raise Broken(f"{text!r} gave two outputs.")
        return f"{len(TEXTS)} texts"

    def leaks(self) -> str:
        """Compare a used method with a fresh one."""
        if self.method.state_policy != "cold":
            return f"does not apply: it keeps state by its policy, {self.method.state_policy}"
        method = fresh(self.method)
        for text in TEXTS:
            if self._call(method, text) != self._call(fresh(self.method), text):
                raise Broken("an output depends on the texts before it, though its state is cold.")
        return f"{len(TEXTS)} texts"

    def restored(self) -> str:
        """Compare the model and what is global before and after."""
        before = snapshot(self.model)
        self._call(self.method, TEXTS[0])
        return compare(before, snapshot(self.model))

    def restored_after_exception(self) -> str:
        """Raise inside the method's block, and compare."""
        before = snapshot(self.model)
        try:
            with self.method.apply(self.model, PROFILE) as changed:
                self.calls.call(changed, TEXTS[0])
                raise OnPurpose
        except OnPurpose:
            return compare(before, snapshot(self.model))
        raise Broken("it swallowed an exception from inside its block.")

    def _call(self, method: Method[Any], text: str) -> Found:
        with method.apply(self.model, PROFILE) as changed:
            return self.calls.call(changed, text)


def _tiny_model() -> tuple[Any, Any]:
    """Return a random causal language model over bytes, and its tokenizer."""
    tokenizer = byte_tokenizer()
    return random_llama(vocab_size=len(tokenizer), layers=4, positions=512), tokenizer
