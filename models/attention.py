"""Attention that a method may change: a decoder run layer by layer, with its cache open.

`AttentionLM` is a `models.base.TextGenerator` whose sessions ask a rule, layer by layer, what the
new tokens attend to. The rule sees the queries and the cache of one layer, and answers with the
attention's output; projections, norms and feed-forward parts are the model's own. Baseline and
rules run on the same kernels: the C ones on a CPU, torch's elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor

from models.attention_native import NativeLayers
from models.attention_torch import TorchLayers, layer_windows
from models.base import (
    Decoding,
    Generation,
    TextGenerator,
    TextModelFacts,
    Trace,
    Unsupported,
)
from models.decode import decode
from models.draft_tree import DraftTree
from models.native.llama import packed
from models.wrapper import Wrapper


@dataclass
class AttentionWork:
    """What attention read and computed, counted by the caches themselves.

    A row is one vector of `head_dim` numbers: the key or the value of one token in one key-value
    head of one layer.

    Attributes:
        key_rows: Rows of keys read, those that were only scored included.
        value_rows: Rows of values read.
        flops: Operations of scores and weighted sums; a multiply-add counts two.
        kept_rows: Rows of keys and values that the caches hold at the end.
    """

    key_rows: int = 0
    value_rows: int = 0
    flops: float = 0.0
    kept_rows: int = 0

    @property
    def rows(self) -> int:
        """Rows of keys and of values read."""
        return self.key_rows + self.value_rows


class PromptMarks(NamedTuple):
    """What a task knows about the tokens of a prompt; a rule is told nothing of it.

    Attributes:
        evidence: Positions of the tokens that the answer rests on.
        question: Position from which on the prompt is read apart, when a rule has already been
            told that the prompt ends: what stands before it is compressed without a sight of the
            question, as NVIDIA/kvpress does by default. None for one piece.
    """

    evidence: tuple[int, ...] = ()
    question: int | None = None


NO_MARKS = PromptMarks()


class TakesMarks(Protocol):
    """A text generator that may be told about the prompt that it is given next."""

    def mark(self, marks: PromptMarks) -> None:
        """Take note of a prompt's parts, for the next text only."""
        ...


def takes_marks(model: object) -> TypeGuard[TakesMarks]:
    """Return whether a model, or one that it is a wrapper around, takes marks."""
    # From Python 3.12 on, `isinstance` with a protocol does not see what a wrapper passes on.
    return hasattr(model, "mark")


class LayerCache(Protocol):
    """Keys and values of one layer while a forward runs, oldest row first, the new tokens last.

    Attributes:
        length: Rows held, those of the running forward included.
        width: Tokens of the running forward; they are the last `width` rows.
        keys, values: Views (kv_heads, length, head_dim); they must not be written to.
        positions: Position of each row's token in the text, (kv_heads, length), int64. It differs
            from `0..length-1` only where rows were dropped.
        in_prompt: Whether the running forward reads a prompt.
        ends_prompt: Whether it reads the last tokens of one.
    """

    length: int
    width: int
    in_prompt: bool
    ends_prompt: bool

    @property
    def keys(self) -> Tensor:
        """Keys of all rows."""
        ...

    @property
    def values(self) -> Tensor:
        """Values of all rows."""
        ...

    @property
    def positions(self) -> Tensor:
        """Positions of all rows."""
        ...

    def attend(self, queries: Tensor) -> Tensor:
        """Attend to every row, causally within the new tokens, as the model itself does.

        A cache that is not `rotated` turns queries and keys to their true positions by itself.

        Args:
            queries: (width, heads, head_dim).

        Returns:
            (width, heads, head_dim).
        """
        ...

    def attend_with_scores(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Attend to every row, as `attend` does and with its result, and return the scores too.

        The keys are read once, and counted once. Torch's fused kernels do not hand out their
        scores, so there the products are computed again.

        Returns:
            What `attend` returns, and the scores that its softmax was taken of,
            (heads, width, length), float32, -inf where a row lies behind its query.
        """
        ...

    def attend_rows(
        self, queries: Tensor, rows: Tensor, *, positions: Tensor | None = None
    ) -> Tensor:
        """Attend to chosen rows only; no other row is read. Causal within the new tokens.

        Rows are counted as they are gathered: once for each key-value head, or once for each query
        head where `rows` has a set for each, since heads with sets of their own share nothing.

        Args:
            queries: (width, heads, head_dim).
            rows: Row numbers, ascending, int64: (chosen,) for all heads, (kv_heads, chosen) for
                each key-value head, or (heads, chosen) for each query head.
            positions: Where the chosen rows' tokens are to stand, (chosen,), int64; where they
                truly stand when None. In a `rotated` cache they are turned on from there. The new
                tokens must be the last ones chosen then, and each query stands where its own row
                does.

        Returns:
            (width, heads, head_dim).

        Raises:
            ValueError: The rows do not fit, or a query is left without any row.
        """
        ...

    def scores(self, queries: Tensor, *, scale: float | None = None) -> Tensor:
        """Return the products of queries and keys as they are given and stored; read no value.

        A cache that is not `rotated` does not turn them: its keys all stand at position 0.

        Args:
            queries: (width, heads, head_dim), or one query in the place of all new tokens,
                (1, heads, head_dim), which sees what the last of them sees.
            scale: Factor; 1 / sqrt(head_dim), the model's own, when None.

        Returns:
            (heads, queries, length), float32, -inf where a row lies behind its query.

        Raises:
            ValueError: There is another number of queries.
        """
        ...

    def rotate(self, states: Tensor, positions: Tensor) -> Tensor:
        """Apply the model's rotary embedding.

        Args:
            states: (tokens, any heads, head_dim), not rotated.
            positions: (tokens,), int64.
        """
        ...

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows for good, once the forward has ended and its tokens are committed.

        A forward that is never committed drops nothing; of drafts that are rejected the rows go in
        any case.

        Args:
            rows: Ascending, int64: (kept,) or (kv_heads, kept). Those of the new tokens may be
                among them.
        """
        ...


class AttentionRule(Protocol):
    """What the layers of one text attend to. Made anew for each text.

    Attributes:
        rotated: Whether caches hold keys, and `attend` is given queries, with the rotary embedding
            of their true positions applied. A rule that wants other positions takes them without,
            and rotates by itself.
        observes: Last tokens of the prompt that go through `attend`; those before them are read
            by the model's own full attention, as in the baseline. 0 for none, None for all.
        chunk: Most tokens of a prompt that go through `attend` at once.
    """

    rotated: bool
    observes: int | None
    chunk: int

    def begin(self, facts: TextModelFacts) -> None:
        """Get ready for a text.

        Raises:
            models.base.Unsupported: The model lacks what the rule needs; the message says what.
        """
        ...

    def attend(self, layer: int, queries: Tensor, cache: LayerCache) -> Tensor:
        """Return the attention of the new tokens in one layer, (width, heads, head_dim).

        Layers are called in order, 0 first, within each forward. Keys and values of the new tokens
        are in the cache already.

        Args:
            layer: From 0.
            queries: (width, heads, head_dim), rotated or not as `rotated` says.
            cache: Of this layer.
        """
        ...

    def after_forward(self, session: OpenSession, new_tokens: Sequence[int]) -> None:
        """Take note that a forward's tokens are committed; rows may be recomputed here.

        Called after every forward: the dense one over the start of a prompt, each chunk of its
        rest, and each step, with the drafts that were accepted.
        """
        ...

    @property
    def notes(self) -> Mapping[str, float | int | str]:
        """What the rule settled and saw in the text, for its trace."""
        ...


class OpenSession(Protocol):
    """What a rule may ask of the session that it serves.

    Attributes:
        length: Tokens committed.
        prompt_length: Those of them that came by prefill; it is still growing while a prompt is
            read, so that `length > prompt_length` from the first step on.
    """

    length: int
    prompt_length: int

    def recompute(self, token_ids: Sequence[int], start: int) -> None:
        """Run the tokens at positions start, start + 1, ... again, as one dense chunk.

        Their keys and values in all layers are overwritten. No rows may have been dropped.

        Raises:
            ValueError: Rows were dropped, or the span is not within the committed tokens.
        """
        ...


class Rule:
    """An `AttentionRule` that changes nothing: a base for others, and the check of all of them."""

    rotated = True
    observes: int | None = 0
    chunk = 512

    def begin(self, facts: TextModelFacts) -> None:
        """Nothing to prepare."""

    def attend(self, layer: int, queries: Tensor, cache: LayerCache) -> Tensor:
        """Attend to everything."""
        return cache.attend(queries)

    def after_forward(self, session: OpenSession, new_tokens: Sequence[int]) -> None:
        """Nothing to note."""

    @property
    def notes(self) -> Mapping[str, float | int | str]:
        """Nothing to tell."""
        return {}


class AttentionSession:
    """A `models.base.Session` whose attention is a rule's. One rule serves one session.

    It verifies chains (a root alone is one). The rule sees every forward, also of drafts that are
    rejected later; what it must know of committed tokens only, it learns in `after_forward`.

    Attributes:
        length: Tokens committed, those whose rows were dropped included.
        capacity: Tokens that fit at most.
        prompt_length: Tokens that came by `prefill`.
        rule: What its layers attend to.
        work: What attention has read and computed so far.
        prompt_rows: Rows of keys and values that were read by `prefill`.
        prompt_flops: Operations of `prefill`.
        matrix_flops: Operations of everything else, as `TextModelFacts.flops` counts them.
        peak_kv_bytes: Most bytes of keys and values that the caches held at any time. Memory is
            reserved for `capacity` tokens from the start; that is not counted.
    """

    def __init__(
        self,
        layers: TorchLayers | NativeLayers,
        rule: AttentionRule,
        facts: TextModelFacts,
        capacity: int,
        marks: PromptMarks = NO_MARKS,
    ) -> None:
        """Start a text.

        Args:
            layers: The model, with caches for `capacity` tokens.
            rule: What its layers attend to; not used before.
            facts: Sizes of the model.
            capacity: Tokens.
            marks: Of its prompt.
        """
        self._marks = marks
        self._layers = layers
        self.rule = rule
        self._facts = facts
        self._waiting: list[int] = []
        self.length = 0
        self.capacity = capacity
        self.prompt_length = 0
        self.work = layers.work
        self.prompt_rows = 0
        self.prompt_flops = 0.0
        self.matrix_flops = 0.0
        self.peak_kv_bytes = 0
        with torch.inference_mode():
            rule.begin(facts)

    @property
    def flops(self) -> float:
        """Operations of attention and of everything else, so far."""
        return self.matrix_flops + self.work.flops

    @torch.inference_mode()
    def prefill(self, token_ids: Sequence[int], *, all_logits: bool = False) -> Tensor:
        """See `models.base.Session.prefill`.

        All but the last `observes` tokens are read by the model's own forward. Where something is
        cached already, they are read in chunks that attend to all that the caches still hold. The
        first prompt is read in two pieces where its marks say so.
        """
        ids = list(token_ids)
        self._check_room(len(ids))
        border = self._marks.question
        if border is None or self.length or not 0 < border < len(ids):
            return self._read(ids, all_logits=all_logits)
        logits = [self._read(part, all_logits=all_logits) for part in (ids[:border], ids[border:])]
        return torch.cat(logits) if all_logits else logits[-1]

    def _read(self, ids: list[int], *, all_logits: bool) -> Tensor:
        """Read a piece of a prompt; its logits as `prefill` returns them."""
        read_before, done_before = self.work.rows, self.flops
        observes = self.rule.observes
        dense = 0 if observes is None else max(len(ids) - observes, 0)
        logits: list[Tensor] = []
        start = 0
        if dense and not self.length:
            rows = self._layers.read_densely(ids[:dense], all_logits=all_logits)
            asked = dense if all_logits else int(dense == len(ids))
            if asked:
                logits.append(rows)
            self._count(dense, asked)
            self._committed(ids[:dense], is_prompt=True)
            start = dense
        while start < len(ids):
            attend = _attend_to_all if start < dense else self.rule.attend
            end = min(start + self.rule.chunk, dense if start < dense else len(ids))
            first = 0 if all_logits else end - start - 1 if end == len(ids) else None
            piece = ids[start:end]
            self._announce(in_prompt=True, ends_prompt=end == len(ids))
            found = self._layers.forward(piece, self.length, attend, first_logit=first)
            if found is not None:
                logits.append(found)
            self._count(len(piece), 0 if first is None else len(piece) - first)
            self._close(len(piece))
            self._committed(piece, is_prompt=True)
            start = end
        self.prompt_rows += self.work.rows - read_before
        self.prompt_flops += self.flops - done_before
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    @torch.inference_mode()
    def verify(self, tree: DraftTree) -> Tensor:
        """Run one forward over a chain of drafts; see `models.base.Session.verify`.

        Raises:
            models.base.Unsupported: The tree branches.
        """
        if not tree.topology.is_chain:
            raise Unsupported(
                f"attention by a rule verifies chains of drafts; a tree of {len(tree)} nodes with "
                f"{len(tree) - 1 - tree.topology.max_depth} of them off its longest path is none."
            )
        self._check_room(len(tree))
        self._waiting = tree.tokens.tolist()
        self._announce(in_prompt=False, ends_prompt=False)
        logits = self._layers.forward(self._waiting, self.length, self.rule.attend, first_logit=0)
        assert logits is not None
        self._count(len(tree), len(tree))
        return logits

    @torch.inference_mode()
    def commit(self, path: Sequence[int]) -> None:
        """See `models.base.Session.commit`."""
        kept = len(path)
        tokens = self._waiting[:kept]
        self._close(kept)
        self._committed(tokens, is_prompt=False)

    @torch.inference_mode()
    def recompute(self, token_ids: Sequence[int], start: int) -> None:
        """See `OpenSession.recompute`."""
        end = start + len(token_ids)
        if not 0 <= start < end <= self.length:
            raise ValueError(
                f"tokens {start} to {end} are not within the {self.length} committed ones."
            )
        if any(cache.was_dropped for cache in self._layers.caches):
            raise ValueError("rows were dropped, so tokens cannot be run again as they were.")
        for cache in self._layers.caches:
            cache.notes_reads = False  # these tokens are decoded already
        self._layers.forward(list(token_ids), start, _attend_to_all, offset=start, first_logit=None)
        self._count(len(token_ids), 0)
        self._close(None)

    def cached(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values held, (layers, kv_heads, rows, head_dim) each."""
        keys, values = (
            torch.stack([getattr(cache, name)[:, : cache.rows] for cache in self._layers.caches])
            for name in ("keys", "values")
        )
        return keys, values

    @property
    def kept_tokens(self) -> float:
        """Tokens whose rows are held, in the mean over layers."""
        return sum(cache.rows for cache in self._layers.caches) / len(self._layers.caches)

    def evidence_kept(self) -> float | None:
        """Return the share of the evidence that decoding could see, in [0, 1].

        A token is seen where it is among the rows that a head's attention reads. The share is the
        mean over the steps after the prompt, the layers and the heads; layers that a method leaves
        to full attention see everything. None without evidence or without a step.
        """
        if not self._marks.evidence:
            return None
        whole, by_sets = 0, dict[int, list[Tensor]]()
        for cache in self._layers.caches:
            for positions in cache.reads:
                if positions is None:
                    whole += 1
                else:
                    by_sets.setdefault(positions.shape[0], []).append(positions)
        steps = whole + sum(map(len, by_sets.values()))
        if not steps:
            return None
        seen = float(whole)
        evidence = list(self._marks.evidence)
        for sets, found in by_sets.items():
            # Millions of them in a long text, within the time of a call: `isin` takes ten times
            # as long.
            reads = torch.bincount(
                torch.cat([each.flatten() for each in found]), minlength=max(evidence) + 1
            )
            seen += int(reads[evidence].sum()) / sets / len(evidence)
        return seen / steps

    def _announce(self, *, in_prompt: bool, ends_prompt: bool) -> None:
        for cache in self._layers.caches:
            cache.in_prompt, cache.ends_prompt = in_prompt, ends_prompt
            cache.notes_reads = bool(self._marks.evidence) and not in_prompt

    def _close(self, kept: int | None) -> None:
        for cache in self._layers.caches:
            cache.close(kept)

    def _committed(self, tokens: list[int], *, is_prompt: bool) -> None:
        self.length += len(tokens)
        self.prompt_length += len(tokens) if is_prompt else 0
        self._waiting = []
        caches = self._layers.caches
        self.work.kept_rows = 2 * sum(cache.rows * cache.shape.kv_heads for cache in caches)
        self.rule.after_forward(self, tokens)

    def _count(self, width: int, logits: int) -> None:
        """Count a forward's matrices and what its caches hold."""
        facts = self._facts
        self.matrix_flops += 2.0 * (
            facts.matrix_parameters * width - facts.head_parameters * (width - logits)
        )
        rows = sum(cache.length * cache.shape.kv_heads for cache in self._layers.caches)
        held = 2 * rows * facts.head_dim * facts.kv_item_bytes
        self.peak_kv_bytes = max(self.peak_kv_bytes, held)

    def _check_room(self, tokens: int) -> None:
        if self.length + tokens > self.capacity:
            raise ValueError(
                f"{tokens} tokens do not fit behind {self.length} cached ones: the session was "
                f"opened for {self.capacity}."
            )


class AttentionLM(Wrapper):
    """A `models.base.TextGenerator` whose attention is a rule's; all else is the model's.

    Attributes:
        facts: The model's, with `lifted_limit` where that was asked for.
        last: The session that was opened last, with all that it counted.
    """

    def __init__(
        self,
        model: TextGenerator,
        make_rule: Callable[[], AttentionRule],
        *,
        longest_text: int | None = None,
    ) -> None:
        """Wrap a model; nothing in it is changed.

        Args:
            model: A `models.text.CausalLM`, or a wrapper that passes its attributes on. The C
                kernels run the layers where they run the model, torch elsewhere.
            make_rule: Makes the rule of one text.
            longest_text: Longest text, for rules that never show the model a distance beyond its
                own; the model's own when None.

        Raises:
            models.base.Unsupported: The model is no Llama, Mistral or Qwen2 decoder, or keeps its
                layers where a rule cannot reach them.
        """
        module = getattr(model, "module", None)
        if module is None:
            raise Unsupported(
                f"attention can be changed in a model of transformers; '{model.name}' is none."
            )
        layer_windows(module)
        super().__init__(model)
        self._make_rule = make_rule
        self._module = module
        self._kernels = packed(module) if getattr(model, "kernels", None) == "native" else None
        if longest_text is not None:
            self.facts = replace(model.facts, lifted_limit=longest_text)
        self.last: AttentionSession | None = None
        self._opened = 0  # sessions since the last account
        self._marks = NO_MARKS

    def mark(self, marks: PromptMarks) -> None:
        """See `TakesMarks`."""
        self._marks = marks

    def session(self, capacity: int) -> AttentionSession:
        """Open a cache for at most `capacity` tokens, with a new rule."""
        rule = self._make_rule()
        marks, self._marks = self._marks, NO_MARKS
        if self._kernels is not None:
            layers: TorchLayers | NativeLayers = NativeLayers(
                self._kernels,
                self._module,
                capacity,
                rotated=rule.rotated,
                work=AttentionWork(),
            )
        else:
            layers = TorchLayers(self._module, capacity, rotated=rule.rotated, work=AttentionWork())
        self.last = AttentionSession(layers, rule, self.facts, capacity, marks)
        self._opened += 1
        return self.last

    def generate(self, prompt_ids: Sequence[int], decoding: Decoding) -> Generation:
        """Continue `prompt_ids` plainly, and count what attention really did."""
        return decode(self, prompt_ids, decoding)

    def account(self, trace: Trace) -> None:
        """Replace a trace's operations and cache bytes by what the last session really did.

        Bytes are those of the rows of keys and values that attention gathered, `AttentionWork`;
        operations are those of attention and of the model's matrices. Notes are added:
        `decode_kv_bytes` (those of the bytes that no prefill read), `kept_tokens` (tokens held at
        the end, mean over layers), `kept_ratio` (of all committed ones), `peak_kv_bytes` (see
        `AttentionSession`), `evidence_kept` (see there) where a task has marked evidence, and those
        of the rule.

        Raises:
            ValueError: No session was opened.
            models.base.Unsupported: Several were opened since the last account: a text of several
                caches is not counted.
        """
        session, opened, self._opened = self.last, self._opened, 0
        if session is None:
            raise ValueError("no text has been run, so there is nothing to account for.")
        if opened > 1:
            raise Unsupported(
                f"attention by a rule counts the work of one cache a text; this one took {opened}."
            )
        facts, work = self.facts, session.work
        row_bytes = facts.head_dim * facts.kv_item_bytes
        trace.flops, trace.prefill_flops = session.flops, session.prompt_flops
        trace.kv_bytes = work.rows * row_bytes
        trace.notes["decode_kv_bytes"] = (work.rows - session.prompt_rows) * row_bytes
        trace.notes["kept_tokens"] = session.kept_tokens
        trace.notes["kept_ratio"] = session.kept_tokens / max(session.length, 1)
        trace.notes["peak_kv_bytes"] = session.peak_kv_bytes
        if (kept := session.evidence_kept()) is not None:
            trace.notes["evidence_kept"] = kept
        trace.notes.update(session.rule.notes)


def _attend_to_all(layer: int, queries: Tensor, cache: LayerCache) -> Tensor:
    return cache.attend(queries)
