"""The `generate` of transformers behind the interface of a text generator, as a peer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from methods.base import Method
from methods.checks import method_name
from methods.decoding.common import require_text_generator
from models.base import Decoding, Forward, Generation, Session, TextGenerator, Trace, Unsupported
from models.decode import check_fits, count_work
from models.stopping import Stopper


@contextmanager
def transformers_generator(
    method: Method[TextGenerator], model: TextGenerator, **settings: Any
) -> Iterator[TextGenerator]:
    """Yield the model with transformers' own loop; its generation defaults are back on exit.

    The defaults that a checkpoint brings along (top-k, repetition penalty, …) are put aside, since
    they would change the distribution that the other methods sample from.

    Args:
        method: Who asks, for messages.
        model: A text generator with the transformers model as `module`.
        **settings: Further fields of transformers' `GenerationConfig`.

    Raises:
        Unsupported: There is no such model behind the generator.
    """
    require_text_generator(method, model)
    module: Any = getattr(model, "module", None)
    is_transformers = isinstance(module, nn.Module) and hasattr(module, "generation_config")
    if not is_transformers:
        raise Unsupported(
            f"'{method_name(method)}' runs the generate of transformers; "
            f"'{model.name}' has no transformers model as its `module`."
        )
    defaults: Any = module.generation_config
    module.generation_config = GenerationConfig()
    try:
        yield TransformersGenerator(model, module, settings)
    finally:
        module.generation_config = defaults


class TransformersGenerator:
    """A text generator whose `generate` is transformers' own; the rest is the wrapped model's."""

    def __init__(
        self, model: TextGenerator, module: nn.Module, settings: Mapping[str, Any]
    ) -> None:
        self._model = model
        self._settings = settings
        self.module = module
        self.name = model.name
        self.tokenizer = model.tokenizer
        self.facts = model.facts

    def generate(self, prompt_ids: Sequence[int], decoding: Decoding) -> Generation:
        """Continue `prompt_ids`; ended and trimmed as the shared loop does it.

        The trace counts forwards by a hook. Where drafts ride along with the prompt, the forward
        that reads it may emit several tokens; their number is the note `prefill_tokens`.

        Raises:
            Unsupported: Prompt and output do not fit the model's context.
            ValueError: The prompt is empty.
        """
        check_fits(self, prompt_ids, decoding)
        stopper = Stopper(self.tokenizer, decoding, self.facts.eos_ids)
        trace = Trace()
        watch = _Watch(stopper, len(prompt_ids), trace, self)
        inputs = torch.tensor([list(prompt_ids)], device=next(self.module.parameters()).device)
        generate: Any = self.module.generate
        handle = self.module.register_forward_pre_hook(watch.before_forward, with_kwargs=True)
        try:
            with _seeded(decoding):
                sequences = generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    generation_config=self._config(decoding),
                    stopping_criteria=StoppingCriteriaList([watch]),
                )
        finally:
            handle.remove()
        output = sequences[0, len(prompt_ids) :].tolist()
        trace.mark("decode", self.synchronize)

        end = stopper.find(output)
        watch.fill(trace, end.num_tokens)
        count_work(trace, self._model)
        kept = tuple(output[: end.num_tokens])
        return Generation(kept, stopper.text(kept), end.finish, trace)

    def session(self, capacity: int) -> Session:
        """Open a cache of the wrapped model."""
        return self._model.session(capacity)

    def synchronize(self) -> None:
        """Wait until the device has finished what it was given."""
        self._model.synchronize()

    def _config(self, decoding: Decoding) -> GenerationConfig:
        eos_ids = sorted(self.facts.eos_ids)
        sampling: dict[str, Any] = {"do_sample": False}
        if decoding.temperature > 0:
            # transformers keeps the 50 best by default; we sample from the whole distribution.
            sampling = {"do_sample": True, "temperature": decoding.temperature, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=decoding.max_new_tokens,
            eos_token_id=None if decoding.ignore_eos else eos_ids or None,
            pad_token_id=eos_ids[0] if eos_ids else 0,  # unused at batch 1, but asked for
            use_cache=True,
            **sampling,
            **self._settings,
        )


class _Watch(StoppingCriteria):
    """Counts forwards, notes how the text grows, and ends it where `Stopper` says."""

    def __init__(
        self, stopper: Stopper, prompt_length: int, trace: Trace, model: TextGenerator
    ) -> None:
        self._stopper = stopper
        self._prompt_length = prompt_length
        self._trace = trace
        self._model = model
        self._forwards: list[Forward] = []
        self._lengths: list[int] = []

    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Note width and context of a forward that is about to run."""
        ids = args[0] if args else kwargs["input_ids"]
        cache = kwargs.get("past_key_values")
        self._forwards.append(Forward(ids.shape[1], cache.get_seq_length() if cache else 0))

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return whether the text has ended, (1,)."""
        checked = self._lengths[-1] if self._lengths else 0
        output = input_ids[0, self._prompt_length :].tolist()
        self._lengths.append(len(output))
        if not checked:
            self._trace.mark("prefill", self._model.synchronize)
        ended = bool(self._stopper.find(output, checked).finish)
        return torch.tensor([ended], device=input_ids.device)

    def fill(self, trace: Trace, num_tokens: int) -> None:
        """Write what was counted into the trace; tokens past `num_tokens` were in vain."""
        trace.prefill.append(self._forwards[0])
        trace.notes["prefill_tokens"] = min(self._lengths[0], num_tokens)
        trace.forwards.extend(self._forwards[1:])
        for before, after in zip(self._lengths, self._lengths[1:], strict=False):
            trace.accepted.append(min(after - before - 1, num_tokens - before))


def _seeded(decoding: Decoding) -> Any:
    """Return a context in which torch's global generator starts from the seed, if it is used."""
    return nullcontext() if decoding.temperature == 0 else _global_seed(decoding.seed)


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
