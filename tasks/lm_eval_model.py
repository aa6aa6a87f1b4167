"""A text generator as lm-eval sees models: loglikelihoods and greedy or sampled continuations.

Importing this module imports `lm_eval`, which takes seconds; whoever needs it does so late.

Texts become tokens as in lm-eval's own `hf` model, so that the same weights get the same numbers:
a context and its continuation are encoded as one text, spaces at the context's end count to the
continuation, an empty context is the model's first token (BOS, or else EOS), and what does not fit
is cut at the left.

Source: lm-eval 0.4.13, `lm_eval/models/huggingface.py` and `lm_eval/api/model.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from models.base import Decoding, TextGenerator, Trace, Unsupported
from models.likelihood import Likelihood, likelihoods

# New tokens where a task names no number, as in lm-eval's own models.
DEFAULT_NEW_TOKENS = 256
# Settings of sampling that change nothing as long as the likeliest token is taken.
_SAMPLING = ("top_p", "top_k", "min_p", "typical_p")
# Values at which further settings of a task's generation say what is done anyway.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_p": (None, 1, 1.0),
    "top_k": (None, 0, -1),
    "min_p": (None, 0, 0.0),
    "typical_p": (None, 1, 1.0),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "repetition_penalty": (None, 1, 1.0),
    "length_penalty": (None, 1, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "use_cache": (None, True, False),
    "early_stopping": (None, True, False),
}


class Question(NamedTuple):
    """What a generation request asks the model to continue, and how."""

    prompt_ids: list[int]
    decoding: Decoding


class GeneratorLM(TemplateLM):
    """Answers lm-eval's requests by a text generator.

    Attributes:
        tokenizer: Of transformers.
        max_length: Longest text in tokens, context and continuation.
        max_gen_toks: New tokens where a task names no number.
        trace: What all requests so far took.
        judged_ids: Tokens of all continuations that were judged, in the order of judging.
    """

    backend = "causal"

    def __init__(
        self,
        generator: TextGenerator,
        *,
        max_length: int | None = None,
        max_gen_toks: int = DEFAULT_NEW_TOKENS,
        seed: int = 0,
    ) -> None:
        """Wrap a generator.

        Args:
            generator: Of any kind; without sessions of its own it answers no loglikelihoods.
            max_length: Tokens of the longest text; the model's own limit if None.
            max_gen_toks: New tokens where a task names no number.
            seed: Of sampled texts.

        Raises:
            Unsupported: Its tokenizer is none of transformers.
            ValueError: `max_length` exceeds the model's own.
        """
        super().__init__()
        self.generator = generator
        self.tokenizer: Any = getattr(generator.tokenizer, "hub", None)
        if self.tokenizer is None:
            raise Unsupported(
                f"lm-eval needs a tokenizer of transformers; that of '{generator.name}' is a "
                f"{type(generator.tokenizer).__name__}."
            )
        limit = generator.facts.longest_text
        self.max_length = limit if max_length is None else max_length
        if not 2 <= self.max_length <= limit:
            raise ValueError(f"max_length must lie in [2, {limit}], got {max_length}.")
        self.max_gen_toks = max_gen_toks
        self.trace = Trace()
        self.judged_ids: list[int] = []
        self._seed = seed
        self._asked: dict[tuple[str, str], int] = {}

    @contextmanager
    def applied(self) -> Iterator[TextGenerator]:
        """Yield the generator for one request, with a method around it where there is one."""
        yield self.generator

    def read(self, output_type: str, requests: Sequence[Sequence[str]]) -> list[Any]:
        """Return the answers to requests that read texts.

        Args:
            output_type: `loglikelihood`, `multiple_choice` or `loglikelihood_rolling`.
            requests: Arguments of each, (context, continuation) or (text,).

        Returns:
            (nats, is greedy) of each continuation, or the nats of each text.
        """
        kind = "loglikelihood" if output_type == "multiple_choice" else output_type
        instances = [Instance(kind, {}, tuple(each), place) for place, each in enumerate(requests)]
        answer = {
            "loglikelihood": self.loglikelihood,
            "loglikelihood_rolling": self.loglikelihood_rolling,
        }[kind]
        return list(answer(instances, disable_tqdm=True))

    # What lm-eval asks about the model

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text."""
        return cast(int, self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Token that stands for an empty context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else cast(int, first)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, by which lm-eval caches requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as the model's template writes it."""
        return cast(
            str,
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            ),
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        """Return the ids of a text; special tokens as the tokenizer has them, but none twice."""
        first = self.tokenizer.decode([self.prefix_token_id])
        return self._encode(string, add_special_tokens, first)

    def _encode(self, text: str, add_special_tokens: bool | None, first: str | None) -> list[int]:
        if add_special_tokens is None and not has_bos_prefix(text, first):
            return list(self.tokenizer.encode(text))
        return list(self.tokenizer.encode(text, add_special_tokens=bool(add_special_tokens)))

    # Loglikelihoods

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **options: Any,
    ) -> list[tuple[float, bool]]:
        """Return log-probability and greediness of continuations; each context is read once."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for place, (_, context, continuation) in enumerate(requests):
            by_context.setdefault(self._fitting(context, continuation), []).append(place)
        found: dict[int, Likelihood] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="loglikelihood") as bar:
            for fitting, places in by_context.items():
                continuations = [requests[place][2] for place in places]
                with self.applied() as generator:
                    if not isinstance(generator, TextGenerator):
                        raise Unsupported(
                            f"'{generator.name}' does not read texts from left to right, so it "
                            "gives no loglikelihoods of continuations; lm-eval's generate_until "
                            "tasks run."
                        )
                    judged = likelihoods(generator, fitting, continuations, self.trace)
                found.update(zip(places, judged, strict=True))
                for place in places:
                    self.judged_ids += requests[place][2]
                    if requests[place][0] is not None:
                        self.cache_hook.add_partial(
                            "loglikelihood", requests[place][0], tuple(found[place])
                        )
                bar.update(len(places))
        return [(found[place].nats, found[place].is_greedy) for place in range(len(requests))]

    def _fitting(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[int, ...]:
        """Return the context without what does not fit at its left.

        Raises:
            ValueError: The continuation is empty.
            Unsupported: It is longer than any text may be.
        """
        if not continuation:
            raise ValueError("a continuation holds no token of its own behind its context.")
        if len(continuation) > self.max_length:
            raise Unsupported(
                f"a continuation of {len(continuation)} tokens exceeds the longest text, "
                f"{self.max_length} tokens."
            )
        # The last token is never fed, hence one more.
        room = self.max_length + 1 - len(continuation)
        return tuple(context[-room:])

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of whole texts, read in windows of the longest length.

        Each token is predicted once; every window but the first begins with the last token of the
        one before.
        """
        found = []
        for request in tqdm(requests, disable=disable_tqdm, desc="loglikelihood_rolling"):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            total = sum(nats for nats, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            found.append(total)
        return found

    # Generation

    def question(self, context: str, gen_kwargs: dict[str, Any]) -> Question:
        """Return what a generation request asks.

        Args:
            context: Text to continue.
            gen_kwargs: As a task's YAML has them.

        Raises:
            Unsupported: They ask for something else than greedy decoding or plain sampling, or for
                more new tokens than a text may have.
        """
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        stop = tuple(str(text) for text in kwargs.pop("until"))
        new_tokens = int(kwargs.pop("max_gen_toks"))
        samples = bool(kwargs.pop("do_sample", False))
        temperature = float(kwargs.pop("temperature", 0.0) or 0.0) * samples
        for name, value in kwargs.items():
            is_idle = name in _SAMPLING and not temperature
            if not is_idle and value not in _NEUTRAL.get(name, ()):
                raise Unsupported(
                    f"the task asks for {name}={value!r} in its generation_kwargs; texts are "
                    "decoded greedily, or sampled at a temperature."
                )
        room = self.max_length - new_tokens
        if room < 1:
            raise Unsupported(
                f"the task asks for {new_tokens} new tokens, and a text may have "
                f"{self.max_length}; name fewer with max_gen_toks in its generation_kwargs."
            )
        prompt_ids = self._encode(context, None, self.tokenizer.bos_token)
        key = (context, repr(sorted(gen_kwargs.items(), key=str)))
        repetition = self._asked[key] = self._asked.get(key, -1) + 1
        decoding = Decoding(
            max_new_tokens=new_tokens,
            stop=stop,
            temperature=temperature,
            seed=self._seed + repetition,
        )
        return Question(prompt_ids[-room:] or [self.prefix_token_id], decoding)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context, cut before the first of its stop strings."""
        found = []
        for request in tqdm(requests, disable=disable_tqdm, desc="generate_until"):
            context, gen_kwargs = request.args
            asked = self.question(context, gen_kwargs)
            with self.applied() as generator:
                text = generator.generate(asked.prompt_ids, asked.decoding).text
            self.cache_hook.add_partial("generate_until", request.args, text)
            found.append(text)
        return found
