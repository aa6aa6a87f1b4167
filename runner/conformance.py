"""The battery that every method must pass, whoever wrote it: does it keep the contract?

It needs no weights and no task: methods run on a tiny random model built in code, where plain
decoding says what the output must be. A check that does not apply passes and says why.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import chi2_contingency
from torch import Tensor

from methods.base import Method, Output
from models.base import Decoding, Generation, Session, TextGenerator
from models.decode import decode
from models.draft_tree import DraftTree
from models.stopping import Stopper
from models.wrapper import Wrapper
from runner.certificate import divergence
from runner.conformance_base import (
    PROFILE,
    Battery,
    Broken,
    Check,
    OnPurpose,
    compare,
    fresh,
    judge,
    random_llama,
    snapshot,
)
from runner.conformance_calls import CallBattery
from runner.conformance_image_battery import ImageBattery
from runner.registry import Registry
from runner.settings import parse_method
from runner.stacking import Stack, made_of

# Tokens of each text, and texts that a sampled distribution is judged by.
LENGTH = 24
SAMPLES = 100
# Below this a difference between two sampled distributions is no accident; seeds are fixed, so a
# method passes always or never.
SIGNIFICANCE = 1e-4


def conformance(name: str, registry: Registry) -> list[Check]:
    """Check a method of the tree or of a plug-in, or a stack.

    Args:
        name: As on the command line, without settings; the parts of a stack may have some, and
            those that have none take their `trial`.
        registry: Where methods are found.

    Raises:
        runner.request.UsageError: There is no such method, it cannot be loaded, or such a stack
            cannot be.
    """
    asked = parse_method(name)
    if len(asked.parts) == 1:
        return check_method(registry.load_method(name))
    stack = made_of(asked, registry).method
    assert isinstance(stack, Stack)
    return check_method(
        stack.with_parameters(
            {
                spec.name: part.parameters() | (dict(part.trial) if spec.is_bare else {})
                for spec, part in zip(asked.parts, stack.parts, strict=True)
            }
        )
    )


def check_method(
    method: Method[Any] | type[Method[Any]], model: TextGenerator | None = None
) -> list[Check]:
    """Run the whole battery of the method's capability.

    Args:
        method: A class, judged at its defaults but for its `trial` settings, or an instance.
        model: A small model with weights that are not worth keeping; one made here when None.

    Returns:
        One check for each promise, in a fixed order; none is left out when another fails.
    """
    if isinstance(method, type):
        try:
            method = method(**getattr(method, "trial", {}))
        except TypeError as error:
            return [Check("settings have defaults", False, str(error))]
    battery = _battery(method, model)
    return [judge(name, check) for name, check in battery.checks().items()]


def _battery(method: Method[Any], model: Any) -> _TextBattery | CallBattery:
    if method.capability == "TextGenerator":
        return _TextBattery(method, model or tiny_text_model())
    if method.capability == "ImageGenerator":
        return ImageBattery(method, model)
    return CallBattery(method, model)


class _TextBattery(Battery):
    def __init__(self, method: Method[Any], model: TextGenerator) -> None:
        super().__init__(method)
        self.model = model
        self.prompts = _prompts(model)
        self.greedy = Decoding(max_new_tokens=LENGTH)
        # What a model builds when it is first used is not the method's doing.
        self.plain = [model.generate(prompt, self.greedy) for prompt in self.prompts]

    def checks(self) -> dict[str, Callable[[], str]]:
        """Return the checks by name, in the order of the table."""
        return {
            "card is complete": self.card,
            "settings survive JSON": self.settings,
            "unsupported models are refused with a reason": self.refusal,
            "neutral setting equals plain decoding to the bit": self.neutral,
            "it acts at these settings": self.acts,
            "declared output holds when greedy": self.greedy_output,
            "declared output holds when sampling": self.sampled_output,
            "texts end where they must": self.ends,
            "trace accounts for every token": self.trace,
            "same seed, same output": self.seeds,
            "applications do not leak into each other": self.leaks,
            "model and global state are restored": self.restored,
            "they are restored after an exception too": self.restored_after_exception,
        }

    # --- what it does to the text ---

    def neutral(self) -> str:
        if self.method.neutral is None:
            return "does not apply: it declares no neutral setting"
        settings = {**self.method.parameters(), **self.method.neutral}
        neutral = self.method.with_parameters(settings)
        for heat in (0.0, 1.0):
            decoding = Decoding(max_new_tokens=LENGTH, temperature=heat, seed=1)
            for prompt in self.prompts:
                plain, changed = _Recorder(self.model), _Recorder(self.model)
                expected = decode(plain, prompt, decoding)
                with neutral.apply(changed, PROFILE) as applied:
                    found = applied.generate(prompt, decoding)
                if found.token_ids != expected.token_ids:
                    raise Broken(f"the text differs at temperature {heat:g}.")
                if len(plain.seen) != len(changed.seen) or not all(
                    map(torch.equal, plain.seen, changed.seen)
                ):
                    raise Broken(f"logits differ at temperature {heat:g}.")
        return (
            ", ".join(f"{name}={value}" for name, value in self.method.neutral.items()) or "always"
        )

    def acts(self) -> str:
        if self.method.role in ("baseline", "peer"):
            return f"does not apply: it is a {self.method.role}"
        for prompt, plain in zip(self.prompts, self.plain, strict=True):
            found = self._generate(prompt, self.greedy)
            if found.token_ids != plain.token_ids:
                return "the text differs from plain decoding"
            if _work(found) != _work(plain):
                forwards = found.trace.forwards
                widest = max((forward.width for forward in forwards), default=0)
                return (
                    f"{len(plain.trace.forwards)} forwards became {len(forwards)}, up to {widest} "
                    "tokens wide"
                )
        raise Broken("texts and traces are those of plain decoding: it did nothing.")

    def greedy_output(self) -> str:
        declared = self.method.declared_output(0.0)
        if declared is not Output.IDENTICAL:
            return f"does not apply: it declares {declared.value} output"
        ties = 0
        for prompt, plain in zip(self.prompts, self.plain, strict=True):
            found = self._generate(prompt, self.greedy)
            difference = divergence(self.model, prompt, plain.token_ids, found.token_ids)
            if difference is None:
                continue
            if difference["verdict"] == "violation":
                gap = difference["top2_gap"]
                raise Broken(
                    f"token {difference['position']} is {difference['token']} where plain decoding "
                    f"has {difference['baseline_token']}"
                    + (f", {gap:.3g} in logits below the best." if gap is not None else ".")
                )
            ties += 1
        return f"{len(self.prompts)} texts, {ties} of them with a numerical tie"

    def sampled_output(self) -> str:
        declared = self.method.declared_output(1.0)
        if declared is Output.APPROXIMATE:
            return f"does not apply: it declares {declared.value} output"
        # Other seeds for the method, so that a method that couples its draws to the baseline's is
        # judged no more gently than one that does not.
        expected = Counter(self._sampled(self.model.generate, 0))
        found = Counter(self._sampled(self._generate, SAMPLES))
        both = expected + found
        common = sorted(place for place in both if both[place] >= 10)
        rare = [place for place in both if both[place] < 10]
        columns = [[expected[place], found[place]] for place in common]
        columns += [[sum(e[place] for place in rare) for e in (expected, found)]] if rare else []
        if len(columns) <= 3:  # one for each position: every token is certain
            return "does not apply: the model is too sure of its tokens"
        p_value = float(chi2_contingency(np.transpose(columns)).pvalue)
        if p_value < SIGNIFICANCE:
            raise Broken(
                f"{SAMPLES} samples and as many of plain sampling differ: p = {p_value:.2g}."
            )
        return f"p = {p_value:.2g} over {SAMPLES} samples"

    def ends(self) -> str:
        prompt, plain = self.prompts[0], self.plain[0]
        tokens, middle = plain.token_ids, len(plain.token_ids) // 2
        text = self.model.tokenizer.decode(tokens)
        stop = text[len(text) // 2 :][:4]
        decodings = [Decoding(max_new_tokens=limit) for limit in (1, 2, middle)]
        decodings += [Decoding(max_new_tokens=LENGTH, stop=(stop,))] if stop else []
        decodings += [Decoding(max_new_tokens=LENGTH, ignore_eos=True, stop=(stop,))]
        for decoding in decodings:
            found = self._generate(prompt, decoding)
            stopper = Stopper(self.model.tokenizer, decoding, self.model.facts.eos_ids)
            end = stopper.find(found.token_ids)
            if (len(found.token_ids), found.finish) != end:
                raise Broken(
                    f"{len(found.token_ids)} tokens that ended by {found.finish!r}, where "
                    f"{decoding} ends them after {end.num_tokens} by {end.finish!r}."
                )
            if found.text != stopper.text(found.token_ids):
                raise Broken(f"the text is not that of its tokens: {found.text!r}.")
        return f"{len(decodings)} limits and stop strings"

    def trace(self) -> str:
        for prompt in self.prompts:
            found = self._generate(prompt, self.greedy)
            trace = found.trace
            if not trace.prefill:
                raise Broken("no prefill is recorded.")
            if len(trace.accepted) != len(trace.forwards):
                raise Broken(
                    f"{len(trace.forwards)} forwards, but accepted drafts of {len(trace.accepted)}."
                )
            first = int(trace.notes.get("prefill_tokens", 1))
            emitted = first + sum(trace.accepted) + len(trace.forwards)
            # The last forward's own token may stand behind the end of the text.
            if emitted - len(found.token_ids) not in (0, 1):
                raise Broken(
                    f"{emitted} tokens are accounted for, {len(found.token_ids)} came out."
                )
            for forward, accepted in zip(trace.forwards, trace.accepted, strict=True):
                if accepted >= forward.width:
                    raise Broken(f"{accepted} drafts accepted by a forward {forward.width} wide.")
        return f"{len(self.prompts)} texts"

    # --- what it leaves behind ---

    def seeds(self) -> str:
        texts = set()
        for seed in range(4):
            decoding = Decoding(max_new_tokens=LENGTH, temperature=1.0, seed=seed)
            once, again = (
                self._fresh_generate(self.prompts[0], decoding).token_ids for _ in range(2)
            )
            if once != again:
                raise Broken(f"seed {seed} gave two texts.")
            texts.add(once)
        if len(texts) == 1:
            raise Broken("four seeds gave the same text: sampling ignores the seed.")
        return f"{len(texts)} texts of 4 seeds"

    def leaks(self) -> str:
        if self.method.state_policy != "cold":
            return f"does not apply: it keeps state by its policy, {self.method.state_policy}"
        method = fresh(self.method)
        for prompt in self.prompts:
            after = _generate(method, self.model, prompt, self.greedy)
            alone = self._fresh_generate(prompt, self.greedy)
            if after.token_ids != alone.token_ids or _work(after) != _work(alone):
                raise Broken("a text depends on the texts before it, though its state is cold.")
        return f"{len(self.prompts)} texts"

    def restored(self) -> str:
        before = snapshot(self.model)
        self._generate(self.prompts[0], self.greedy)
        self._generate(self.prompts[0], Decoding(max_new_tokens=4, temperature=1.0))
        return compare(before, snapshot(self.model))

    def restored_after_exception(self) -> str:
        before = snapshot(self.model)
        for fails_inside in (False, True):
            try:
                with self.method.apply(self.model, PROFILE) as changed:
                    if fails_inside:
                        changed.generate([], self.greedy)  # an empty prompt is refused
                    changed.generate(self.prompts[0], self.greedy)
                    raise OnPurpose
            except (OnPurpose, ValueError):
                continue
            raise Broken("it swallowed an exception from inside its block.")
        return compare(before, snapshot(self.model))

    # --- helpers ---

    def _generate(self, prompt: Sequence[int], decoding: Decoding) -> Generation:
        return _generate(self.method, self.model, prompt, decoding)

    def _fresh_generate(self, prompt: Sequence[int], decoding: Decoding) -> Generation:
        return _generate(fresh(self.method), self.model, prompt, decoding)

    def _sampled(
        self, generate: Callable[[Sequence[int], Decoding], Generation], first_seed: int
    ) -> Iterator[tuple[int, int]]:
        """Yield position and token of each sample; the third is where drafts have had their say."""
        for seed in range(first_seed, first_seed + SAMPLES):
            decoding = Decoding(max_new_tokens=3, temperature=1.0, seed=seed, ignore_eos=True)
            yield from enumerate(generate(self.prompts[0], decoding).token_ids)


class _Recorder(Wrapper):
    """A model that keeps the logits of its verifications."""

    def __init__(self, model: TextGenerator) -> None:
        super().__init__(model)
        self.seen: list[Tensor] = []

    def generate(self, prompt_ids: Sequence[int], decoding: Decoding) -> Generation:
        return decode(self, prompt_ids, decoding)

    def session(self, capacity: int) -> Session:
        return _RecordedSession(self._model.session(capacity), self.seen)


class _RecordedSession:
    def __init__(self, session: Session, seen: list[Tensor]) -> None:
        self._session = session
        self._seen = seen
        self.capacity = session.capacity

    @property
    def length(self) -> int:
        return self._session.length

    @length.setter
    def length(self, value: int) -> None:
        self._session.length = value

    def prefill(self, token_ids: Sequence[int], *, all_logits: bool = False) -> Tensor:
        return self._session.prefill(token_ids, all_logits=all_logits)

    def verify(self, tree: DraftTree) -> Tensor:
        logits = self._session.verify(tree)
        self._seen.append(logits.clone())
        return logits

    def commit(self, path: Sequence[int]) -> None:
        self._session.commit(path)


def tiny_text_model() -> TextGenerator:
    """Return a random Llama of 30 thousand weights; its text is its token ids."""
    from models.text import CausalLM

    return CausalLM(random_llama(vocab_size=40, layers=2), _Numbers(), "tiny-random-llama")


class _Numbers:
    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(f"{token} " for token in token_ids)


def _prompts(model: TextGenerator) -> list[list[int]]:
    """Return prompts of several kinds without end-of-text: repetitive, mixed, a single token."""
    ids = [token for token in range(model.facts.vocab_size) if token not in model.facts.eos_ids]
    mixed = random.Random(0).choices(ids, k=12)
    return [(mixed[:4] * 4)[:14], mixed, mixed[:1], [ids[0]] * 6]


def _generate(
    method: Method[Any], model: TextGenerator, prompt: Sequence[int], decoding: Decoding
) -> Generation:
    with method.apply(model, PROFILE) as changed:
        found = changed.generate(prompt, decoding)
    if not isinstance(found, Generation):
        raise Broken(f"generate returned {type(found).__name__}, not a Generation.")
    return found


def _work(generation: Generation) -> tuple[Any, ...]:
    trace = generation.trace
    return trace.prefill, trace.forwards, trace.accepted, trace.draft_forwards
