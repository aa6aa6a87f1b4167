"""The decoder of a vision-language model, run layer by layer, with tokens leaving on the way.

`PrunableDecoder.prefill` reads a prompt of embeddings. Behind chosen layers a stage may drop visual
tokens or put others in their place; the layers behind it run on, and cache, the shorter sequence.
So each layer has a cache of its own length, and where tokens are numbered anew after a stage, the
tokens of the answer have other positions in the layers behind it than before it.

Operation for operation what the modules' own forward does, so without stages the logits are those
of `generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from models.base import InvalidOutput, PositionMode, Unsupported
from models.device import linear_parameters
from models.text import PreallocatedLayer, attention_windows, tree_mask
from models.vision_language_attention import attention_sums, sums_flops

TEXT_BEFORE, PATCH, SEPARATOR, TEXT_AFTER = range(4)

_DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen2_5_VLTextModel")


@dataclass(frozen=True)
class Positions:
    """The numbers by which a sequence's tokens are rotated.

    Attributes:
        values: (axes, tokens), int64. One axis for RoPE, three for M-RoPE, any number with
            `sections`.
        sections: Number of rotary frequencies that go by each axis, in order; None for the model's
            own way with its axes.
    """

    values: Tensor
    sections: tuple[int, ...] | None = None

    def take(self, index: Tensor) -> Positions:
        """Return those of some tokens."""
        return replace(self, values=self.values[:, index])

    def renumbered(self) -> Positions:
        """Return 0, 1, 2, ... on the model's own axes, for as many tokens."""
        axes, tokens = self.values.shape
        count = torch.arange(tokens, device=self.values.device)
        return Positions(count.expand(axes, tokens))

    @property
    def following(self) -> int:
        """The position of a token that comes after all of them, on every axis."""
        return int(self.values.max()) + 1


@dataclass(frozen=True)
class PromptTokens:
    """A prompt on its way through the decoder; every field has one entry a token.

    Attributes:
        states: (tokens, hidden).
        kind: TEXT_BEFORE, PATCH, SEPARATOR or TEXT_AFTER, (tokens,).
        tile: Tile of the image, -1 for all but patches, (tokens,).
        line: Line of the picture, -1 for text, (tokens,).
        origin: Which of the image's patches a token is or stands for, -1 for others, (tokens,).
        positions: See `Positions`.
    """

    states: Tensor
    kind: Tensor
    tile: Tensor
    line: Tensor
    origin: Tensor
    positions: Positions

    def __len__(self) -> int:
        return len(self.kind)

    def take(self, index: Tensor) -> PromptTokens:
        """Return some of the tokens, in the order of `index`."""
        return PromptTokens(
            self.states[index],
            self.kind[index],
            self.tile[index],
            self.line[index],
            self.origin[index],
            self.positions.take(index),
        )

    @property
    def patches(self) -> Tensor:
        """Places of the patches, ascending."""
        return (self.kind == PATCH).nonzero().flatten()

    def keeping(self, chosen: Tensor, separators: Separators) -> Tensor:
        """Return the places of the tokens that stay when some patches do.

        Args:
            chosen: Which of `patches`, ascending.
            separators: Which separators stay.
        """
        stays = (self.kind == TEXT_BEFORE) | (self.kind == TEXT_AFTER)
        stays[self.patches[chosen]] = True
        is_separator = self.kind == SEPARATOR
        if separators == "all":
            stays |= is_separator
        elif separators == "rows":
            lines = self.line[self.patches[chosen]]
            stays |= is_separator & torch.isin(self.line, lines)
        return stays.nonzero().flatten()


Separators = Literal["all", "rows", "none"]
"""Which separators stay when patches go: all, those of lines with a patch left, or none."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What happens to a prompt's visual tokens between two layers of the decoder.

    Attributes:
        after: Layers that run before it, at least 1.
        choose: Returns which patches stay, by their number among those that are left (ascending),
            or a whole new row of tokens, or None to change nothing.
        wanted: Patches that must be left, from how many the decoder got; not checked when None.
        keeps_positions: Tokens keep their numbers even where they were numbered anew in front of
            the decoder.
    """

    after: int
    choose: Callable[[StageView], Tensor | PromptTokens | None]
    wanted: Callable[[int], int] | None = None
    keeps_positions: bool = False


@dataclass
class Counts:
    """What the decoder has done for a prompt.

    Attributes:
        tokens: Tokens of the prompt in each layer's cache.
        patches: Patches among them.
        prefill_flops, decode_flops: Operations.
        kv_read_bytes: Keys and values that the forwards after the prefill read.
    """

    tokens: list[int] = field(default_factory=list)
    patches: list[int] = field(default_factory=list)
    prefill_flops: float = 0.0
    decode_flops: float = 0.0
    kv_read_bytes: int = 0


class StageView:
    """What a stage sees: the tokens between two layers, and attention of either layer.

    Attributes:
        tokens: As they leave the layer.
        embedded: As they entered the decoder.
        num_patches: Patches that entered it.
        notes: What the method wants on record.
        flops: Operations of the choice, added up here by `attention_from` and `count`.
    """

    def __init__(
        self,
        decoder: PrunableDecoder,
        layer: int,
        inputs: Tensor,
        tokens: PromptTokens,
        embedded: PromptTokens,
        rotary: tuple[Tensor, Tensor],
        notes: dict[str, float | int | str],
    ) -> None:
        self._decoder = decoder
        self._layer = layer
        self._inputs = inputs
        self._rotary = rotary
        self.tokens = tokens
        self.embedded = embedded
        self.num_patches = int((embedded.kind == PATCH).sum())
        self.notes = notes
        self.flops = 0.0

    @property
    def layer(self) -> int:
        """Layers that have run."""
        return self._layer

    @property
    def num_layers(self) -> int:
        """Layers of the decoder."""
        return self._decoder.num_layers

    def count(self, flops: float) -> None:
        """Add operations of the choice."""
        self.flops += flops

    def attention_from(self, rows: Tensor, *, layer: Literal["this", "next"] = "this") -> Tensor:
        """Return the mean attention that tokens pay to each token, over heads and those tokens.

        Args:
            rows: Places of the tokens that attend, (rows,).
            layer: The layer that ran last, or the one that comes next, with its weights on the
                tokens as they are.

        Returns:
            Shares of the full causal attention row, (tokens,), float32.
        """
        decoder = self._decoder
        number = self._layer - 1 if layer == "this" else self._layer
        block = decoder.layers[number]
        attention = block.self_attn
        size = int(attention.head_dim)
        cos, sin = self._rotary
        source = self._inputs if layer == "this" else self.tokens.states
        queries = attention.q_proj(block.input_layernorm(source[rows])).unflatten(-1, (-1, size))
        self.count(2.0 * attention.q_proj.weight.numel() * len(rows))
        queries = queries.transpose(0, 1)[None]
        if layer == "this":
            queries, _ = apply_rotary_pos_emb(queries, queries, cos[:, rows], sin[:, rows])
            keys = decoder.cached_keys(number)
        else:
            keys = attention.k_proj(block.input_layernorm(source)).unflatten(-1, (-1, size))
            self.count(2.0 * attention.k_proj.weight.numel() * len(source))
            keys = keys.transpose(0, 1)[None]
            queries, _ = apply_rotary_pos_emb(queries, queries, cos[:, rows], sin[:, rows])
            keys, _ = apply_rotary_pos_emb(keys, keys, cos, sin)
            keys = keys[0]
        heads = queries.shape[1]
        self.count(sums_flops(heads, len(rows), keys.shape[1], size))
        sums = attention_sums(queries[0], keys, scale=float(attention.scaling), last_visible=rows)
        return sums.mean(0) / len(rows)


class PrunableDecoder:
    """A decoder of transformers and its caches, for one prompt at a time.

    Attributes:
        layers: The module's layers.
        counts: What was done since the last `open`.
    """

    def __init__(self, module: Any) -> None:
        """Take the language model of a vision-language model.

        Args:
            module: A `…ForConditionalGeneration` with `model.language_model` and `lm_head`.

        Raises:
            models.base.Unsupported: Other layers, or another attention kernel than sdpa or eager.
        """
        self._language = module.model.language_model
        self._head = module.lm_head
        kind = type(self._language).__name__
        if kind not in _DECODERS:
            raise Unsupported(
                f"tokens can leave decoders of the kinds {', '.join(_DECODERS)}, not a {kind}."
            )
        config = self._language.config
        self._kernel = config._attn_implementation
        if self._kernel not in ("sdpa", "eager"):
            raise Unsupported(f"the decoder's attention must be sdpa or eager, not {self._kernel}.")
        self.layers = self._language.layers
        self.num_layers = len(self.layers)
        windows = [each for each in attention_windows(config).values() if each is not None]
        self._window = min(windows, default=None)
        self.rotary_axes = 3 if kind == "Qwen2_5_VLTextModel" else 1
        attention = self.layers[0].self_attn
        size = int(attention.head_dim)
        self._head_numbers = int(config.num_attention_heads) * size
        item = next(self._language.parameters()).element_size()
        self.kv_token_bytes = 2 * int(config.num_key_value_heads) * size * item
        self._layer_parameters = [linear_parameters(layer) for layer in self.layers]
        self.counts = Counts()

    @property
    def parameters(self) -> int:
        """Weights of all matrices, the output head included."""
        return sum(self._layer_parameters) + int(self._head.weight.numel())

    def open(self, capacity: int) -> None:
        """Forget the last prompt and make room for `capacity` tokens in each layer.

        Raises:
            models.base.Unsupported: So many do not fit the window of a layer: its cache has none.
        """
        if self._window is not None and capacity > self._window:
            raise Unsupported(
                f"{capacity} tokens of prompt and answer exceed the decoder's attention window of "
                f"{self._window}."
            )
        self._memory = [PreallocatedLayer(capacity) for _ in self.layers]
        self._cache = Cache(layers=list(self._memory))
        # Position of the next token of the answer, by layer.
        self._next = [0] * self.num_layers
        self.counts = Counts()

    def cached_keys(self, layer: int) -> Tensor:
        """Return the rotated keys that a layer holds, (kv_heads, tokens, head_dim)."""
        memory = self._memory[layer]
        return memory.keys[0, :, : memory.length]

    def prefill(
        self,
        tokens: PromptTokens,
        stages: Sequence[Stage],
        *,
        positions: PositionMode,
        separators: Separators,
        notes: dict[str, float | int | str],
    ) -> tuple[Tensor, float]:
        """Read a prompt.

        Args:
            tokens: The prompt.
            stages: What happens on the way; at most one behind each layer. Behind the last one
                nothing is left to save, so a stage there is not run.
            positions: With `compact` the tokens left by a stage are numbered anew.
            separators: Which separators stay behind a stage.
            notes: What stages put on record; changed in place.

        Returns:
            Logits after the last token, (1, vocab), float32, and the operations of the stages.

        Raises:
            models.base.Unsupported: A stage stands behind a layer that does not exist.
            models.base.InvalidOutput: A stage left another number of patches than it had to.
        """
        by_layer = {stage.after: stage for stage in stages}
        if wrong := [layer for layer in by_layer if not 1 <= layer <= self.num_layers]:
            raise Unsupported(
                f"tokens cannot leave behind layer {wrong[0]}: the decoder has layers 1 to "
                f"{self.num_layers}."
            )
        embedded, stage_flops = tokens, 0.0
        rotary = self._rotate(tokens)
        for number, layer in enumerate(self.layers, start=1):
            inputs = tokens.states
            tokens = replace(tokens, states=self._run(number - 1, layer, inputs, rotary))
            count = len(tokens)
            self._memory[number - 1].length = count
            self._next[number - 1] = tokens.positions.following
            self.counts.tokens.append(count)
            self.counts.patches.append(len(tokens.patches))
            self.counts.prefill_flops += self._flops(number - 1, count, 0)
            if number < self.num_layers and (stage := by_layer.get(number)):
                view = StageView(self, number, inputs, tokens, embedded, rotary, notes)
                changed = self._apply(stage, view, separators)
                stage_flops += view.flops
                if changed is not tokens:
                    renumbers = positions == "compact" and not stage.keeps_positions
                    if renumbers and len(changed) != count:
                        changed = replace(changed, positions=changed.positions.renumbered())
                    tokens, rotary = changed, self._rotate(changed)
        self.counts.prefill_flops += 2.0 * self._head.weight.numel()
        return self._logits(tokens.states[-1:]), stage_flops

    def step(self, token: int) -> Tensor:
        """Read one token of the answer; return the logits after it, (1, vocab), float32."""
        states = self._language.embed_tokens(torch.tensor([token], device=self._device))
        rotary: dict[int, tuple[Tensor, Tensor]] = {}
        for number, layer in enumerate(self.layers):
            position, memory = self._next[number], self._memory[number]
            if position not in rotary:
                values = torch.full((self.rotary_axes, 1), position, device=self._device)
                rotary[position] = self._angles(states, Positions(values))
            self.counts.decode_flops += self._flops(number, 1, memory.length)
            self.counts.kv_read_bytes += self.kv_token_bytes * (memory.length + 1)
            states = self._run(number, layer, states, rotary[position])
            memory.length += 1
            self._next[number] = position + 1
        self.counts.decode_flops += 2.0 * self._head.weight.numel()
        return self._logits(states)

    @property
    def _device(self) -> torch.device:
        return self._language.embed_tokens.weight.device  # type: ignore[no-any-return]  # a torch.device

    def _apply(self, stage: Stage, view: StageView, separators: Separators) -> PromptTokens:
        tokens, chosen = view.tokens, stage.choose(view)
        if chosen is None:
            return tokens
        if isinstance(chosen, Tensor):
            check_choice(chosen, len(tokens.patches))
            changed = tokens.take(tokens.keeping(chosen, separators))
        else:
            changed = chosen
        if stage.wanted is not None:
            check_count(len(changed.patches), stage.wanted(view.num_patches))
        return changed

    def _run(
        self, number: int, layer: Any, states: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        width = len(states)
        mask = None
        if width > 1 and self._kernel == "eager":
            visible = np.tri(width, dtype=np.bool_)
            mask = tree_mask(visible, self._kernel, states.dtype, states.device)
        output: Tensor = layer(
            states[None],
            attention_mask=mask,
            position_embeddings=rotary,
            position_ids=None,
            past_key_values=self._cache,
            use_cache=True,
        )
        return output[0]

    def _logits(self, states: Tensor) -> Tensor:
        logits: Tensor = self._head(self._language.norm(states[None]))
        return logits[0].float()

    def _rotate(self, tokens: PromptTokens) -> tuple[Tensor, Tensor]:
        return self._angles(tokens.states, tokens.positions)

    def _angles(self, states: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, (1, tokens, head_dim) each."""
        rotary = self._language.rotary_emb
        if positions.sections is None:
            values = positions.values
            ids = values if self.rotary_axes == 1 else values[:, None]
            cos, sin = rotary(states[None], ids)
            return cos, sin
        owner = torch.arange(len(positions.sections), device=states.device)
        owner = owner.repeat_interleave(torch.tensor(positions.sections, device=states.device))
        angles = positions.values[owner].T.float() * rotary.inv_freq.float()
        angles = torch.cat([angles, angles], -1)[None]
        scaling = rotary.attention_scaling
        return (angles.cos() * scaling).to(states.dtype), (angles.sin() * scaling).to(states.dtype)

    @property
    def rotary_frequencies(self) -> int:
        """Number of frequencies by which a head's numbers are rotated."""
        return len(self._language.rotary_emb.inv_freq)

    @property
    def rotary_sections(self) -> tuple[int, ...]:
        """Number of frequencies that go by each axis, in the order of the frequencies."""
        if self.rotary_axes == 1:
            return (self.rotary_frequencies,)
        return tuple(self._language.rotary_emb.mrope_section)

    def _flops(self, layer: int, width: int, context: int) -> float:
        """Return the operations of a layer; causal pairs of tokens are counted exactly."""
        pairs = width * context + width * (width + 1) / 2
        return 2.0 * self._layer_parameters[layer] * width + 4.0 * self._head_numbers * pairs


def check_choice(chosen: Tensor, available: int) -> None:
    """Raise unless these are ascending numbers of patches.

    Raises:
        models.base.InvalidOutput: They are not.
    """
    is_ascending = bool((chosen[1:] > chosen[:-1]).all())
    if not is_ascending or (len(chosen) and not 0 <= int(chosen[0]) <= int(chosen[-1]) < available):
        raise InvalidOutput(
            f"a choice of visual tokens must be ascending numbers from 0 to {available - 1}, each "
            f"at most once."
        )


def check_count(found: int, wanted: int) -> None:
    """Raise unless as many visual tokens are left as were asked for.

    Raises:
        models.base.InvalidOutput: They are not.
    """
    if found != wanted:
        raise InvalidOutput(
            f"{found} visual tokens are left where the budget is {wanted}: the result would not be "
            f"that of the budget."
        )
