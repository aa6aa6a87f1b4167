"""longbench-mini: ten kinds of generated long-context records, for small models and any machine.

Records have LongBench's form and are scored by its metrics (`tasks/longbench_scorers.py`); how they
are made and fitted to a length stands in `tasks/longbench_generator.py`. Answers are short, so
that a model of 135 M parameters has a chance, and each rests on a known span of the context: who
loses the span loses the answer. `count` (how many paragraphs differ) is at the floor for such
models and not in `score`. `continuation` has no answer: a given text is fed token by token, and its
loss is the result (`models/teacher_forcing.py`), the most sensitive measure of what a method took
away.

SmolLM2-135M-Instruct (float32, full attention, greedy, bare prompts, length 512) scores, on 14
records of each kind that no prompt was tuned on, 0.86 on summary, 0.79 on needle, 0.64 on few-shot,
0.63 on code, 0.54 on key-value, 0.29 on docqa and nothing on count. Of nine such records it scores
0.32 on multihop; of five 1.00 on retrieval. In version 1.0 both were at 0.07: the one asked
for the second hop alone, the other had its paragraphs in order. With its chat template the model
scored 0.19 on summary and nothing on the others tried.

One item:
    dataset "docqa"   prompt "Read the following ..."   answers ["Boston"]   evidence [[310, 344]]
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from models.base import Decoding, Generation, TextGenerator
from tasks.base import Dataset, Item, Metric, Scores, Task
from tasks.checks import check_choice
from tasks.longbench_generator import (
    CONTINUATION_TOKENS,
    GENERATOR_SEED,
    KINDS,
    WARM_UP,
    Shown,
    make_item,
)
from tasks.longbench_protocol import (
    CHATS,
    Chat,
    Prompting,
    in_turn,
    mark_prompt,
    prompt_ids,
    score_prediction,
)

ITEMS_OF_A_KIND = 20
LENGTHS = (384, 8192)
CONTINUATION = "continuation"
# Near chance for small models, so they would only add noise to the mean.
_NOT_IN_SCORE = frozenset({"count", CONTINUATION})


@dataclass(frozen=True, kw_only=True)
class LongBenchMini(Task[TextGenerator]):
    """Find, combine and continue what stands in a generated context of a given length.

    Attributes:
        task: Name of a kind (`docqa`, `multihop`, `summary`, `few-shot`, `retrieval`, `count`,
            `code`, `needle`, `key-value`, `continuation`) or `all`, in turn.
        length: Tokens of prompt and answer together, measured in SmolLM2's tokens; records come
            out at nine tenths of it to all of it, whatever the model's tokenizer.
        chat: `never` shows the model the bare prompt, which small models follow better; `auto` uses
            the tokenizer's chat template where it has one; `always` needs one. A continuation has
            none.
        context: What the prompt holds of its context: `whole`, the `evidence` alone (the best that
            keeping tokens can do), or `nothing` (what can be guessed). The frame around it stays.
        query_aware: Whether a method sees the question before it compresses the context. If not,
            models whose attention is restricted read the prompt up to the end of the context, and
            then the question, as NVIDIA/kvpress does by default; full attention gives the same
            answers either way.
        continuation_tokens: Tokens of a continuation, about, within `length`.
    """

    task: str = "all"
    length: int = 1024
    chat: Chat = "never"
    context: Shown = "whole"
    query_aware: bool = True
    continuation_tokens: int = CONTINUATION_TOKENS

    version = "1.1"
    data = Dataset(
        source="generated", revision=str(GENERATOR_SEED), split="test", license="Apache-2.0"
    )
    capability = "TextGenerator"
    speed_of = "decode"
    bound_by = "bytes"
    scale = "embedded"

    def __post_init__(self) -> None:
        check_choice("task", self.task, ("all", *KINDS))
        check_choice("chat", self.chat, CHATS)
        check_choice("context", self.context, get_args(Shown))
        if not isinstance(self.query_aware, bool):
            raise ValueError(f"query_aware must be true or false, got {self.query_aware!r}.")
        if not LENGTHS[0] <= self.length <= LENGTHS[1]:
            raise ValueError(
                f"length must lie in [{LENGTHS[0]}, {LENGTHS[1]}] tokens, got {self.length}."
            )
        if not 1 <= self.continuation_tokens <= self.length // 2:
            raise ValueError(
                f"continuation_tokens must lie in [1, {self.length // 2}], half the length, got "
                f"{self.continuation_tokens}."
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that are run."""
        return tuple(KINDS) if self.task == "all" else (self.task,)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The score, that of each kind where there are several, and the loss of continuations."""
        bits = Metric(name="bits_per_byte", unit="bits", kind="mean", higher_is_better=False)
        if self.task == CONTINUATION:
            return (bits,)
        if self.task != "all":
            return (_fraction("score"),)
        parts = (name for name in KINDS if name != CONTINUATION)
        return (_fraction("score"), *map(_fraction, parts), bits)

    def items(self) -> Iterator[Item]:
        """Yield the records, the kinds in turn, so that every prefix is balanced."""
        kinds = self.kinds
        for number in range(ITEMS_OF_A_KIND):
            yield from in_turn([[self._item(kind, number, "test")] for kind in kinds])

    def warmup_items(self) -> Iterator[Item]:
        """Yield records of the same kinds about other people, places and texts."""
        kinds = self.kinds
        for number in range(max(4, len(kinds))):
            yield self._item(kinds[number % len(kinds)], number, WARM_UP)

    def _item(self, kind: str, number: int, seed: str) -> Item:
        return make_item(
            kind,
            number,
            length=self.length,
            seed=seed,
            shown=self.context,
            continuation_tokens=self.continuation_tokens,
        )

    def call(self, model: TextGenerator, item: Item, *, fixed_length: bool = False) -> Generation:
        """Answer, or feed the continuation token by token.

        Raises:
            Unsupported: A continuation does not fit the model's context. Other prompts are cut in
                the middle.
        """
        fields = item.fields
        if fields["dataset"] == CONTINUATION:
            # It needs torch, which listing and planning tasks do without.
            from models.teacher_forcing import force, split_ids

            return force(model, *split_ids(model.tokenizer, fields["prompt"], fields["answers"][0]))
        kind = KINDS[fields["dataset"]]
        decoding = Decoding(
            max_new_tokens=kind.max_new_tokens, stop=kind.stop, ignore_eos=fixed_length
        )
        how = Prompting(
            # The chat template adds some 40 tokens.
            max_length=model.facts.max_positions
            - kind.max_new_tokens
            - 64 * (self.chat != "never"),
            truncation="middle",
            chat=self.chat,
        )
        prompt, context = fields["prompt"], fields["context"]
        mark_prompt(
            model,
            prompt,
            len(prompt) - prompt.index(context) - len(context),
            query_aware=self.query_aware,
            evidence=fields["evidence"],
            **how,
        )
        return model.generate(prompt_ids(model, prompt, **how), decoding)

    def score(self, item: Item, output: str) -> Scores:
        """Return the score of an answer by its kind's metric, or the loss of a continuation."""
        name = item.fields["dataset"]
        scorer = KINDS[name].scorer
        if scorer is None:
            return {"bits_per_byte": bits_per_byte(output)}
        value = score_prediction(
            scorer,
            output,
            item.fields["answers"],
            item.fields["all_classes"],
            only_first_line=name != "code",
        )
        if self.task != "all":
            return {"score": value}
        return {name: value} if name in _NOT_IN_SCORE else {"score": value, name: value}

    def conditions(self) -> dict[str, str]:
        """Return the version of Python, whose sources and help texts some records are cut from."""
        return {"python": platform.python_version()}


def bits_per_byte(output: str) -> float:
    """Return the loss of a continuation, from the text that `models.teacher_forcing.force` gives.

    Raises:
        ValueError: The text is not of that form.
    """
    found = json.loads(output)
    return float(sum(found["nats"]) / math.log(2) / found["bytes"])


def _fraction(name: str) -> Metric:
    return Metric(name=name, unit="fraction", kind="mean")
