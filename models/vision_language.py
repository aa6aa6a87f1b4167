"""Vision-language models of transformers, with every phase of an answer in the harness's hands.

An answer is: pixels, vision tower, choice of visual tokens, projector, prefill, decode. Each ends
with a mark in the trace, and each one's operations are counted. `VisionLanguage.run` takes a
`VisualPlan`, which is what a method is made of here: what it wants to see of the tower, how it
reduces the tokens in front of the decoder, and what happens between the decoder's layers. The empty
plan is the model itself.

Supported: `LlavaForConditionalGeneration` and `LlavaNextForConditionalGeneration` with a CLIP tower
and a Llama, Mistral or Qwen2 decoder, and `Qwen2_5_VLForConditionalGeneration`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from models.base import (
    Decoding,
    PositionMode,
    TextModelFacts,
    Tokenizer,
    Trace,
    Unsupported,
    VisionLanguageFacts,
    VisualAnswer,
    VisualPrompt,
    VisualWork,
)
from models.decode import decode
from models.device import OnDevice
from models.draft_tree import DraftTree
from models.loading import LoadSettings, ModelError, quiet_transformers
from models.text import model_facts
from models.tokenization import HubTokenizer
from models.vision_language_decoder import (
    PATCH,
    SEPARATOR,
    TEXT_AFTER,
    TEXT_BEFORE,
    Positions,
    PromptTokens,
    PrunableDecoder,
    Separators,
    Stage,
    check_choice,
    check_count,
)
from models.vision_language_towers import (
    ClipTower,
    Encoded,
    Grid,
    InnerMerging,
    Pixels,
    ProjectorParts,
    QwenTower,
    Tower,
    VisualLayout,
    Watch,
)
from models.wrapper import Wrapper

# Around a question where a folder brings no template of its own: LLaVA-1.5's.
_PLAIN_TEMPLATE = "USER: {image}\n{text} ASSISTANT:"

# Characters of a prompt's end that decide how what follows is cut into tokens.
_ENDING = 10

Numbering = Literal["auto", "compact", "original"]


@dataclass(frozen=True)
class Merged:
    """Tokens that stand for several patches each, or were made of them.

    Attributes:
        anchors: The patch in whose place each one stands, (tokens,); ascending, -1 for one that
            stands in front of all patches.
        features: What goes into the projector, (tokens, width); None with `embeddings`.
        embeddings: Embeddings of the decoder, (tokens, hidden); None with `features`.
        positions: Several positions for each token, with `multi` only: takes the positions of the
            patches, (axes, patches), and returns (rows, tokens).
        sections: Rotary frequencies that go by each of those rows.
    """

    anchors: Tensor
    features: Tensor | None = None
    embeddings: Tensor | None = None
    positions: Callable[[Tensor], Tensor] | None = None
    sections: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class VisualPlan:
    """What is done about an image's visual tokens. The default is nothing.

    Attributes:
        shrink: From the grid of a tile and the number of tiles, the smaller grid that the tower is
            to see: the image is made smaller in front of it.
        watch: What is wanted of the tower beside its features.
        merging: How tokens are merged inside the tower.
        wanted: Visual tokens that must enter the decoder, from the patches that there are; an
            answer with another number is invalid. None where the plan does not reduce them.
        reduce: Returns which patches enter the decoder (numbers, ascending) or tokens in their
            place.
        stages: What happens between the decoder's layers.
        positions: How tokens are numbered after a reduction: `auto` is `compact` for one axis of
            positions and `original` for three, as most papers have it. With `Merged.positions`
            the numbering is `multi`, whatever stands here.
        separators: Which separators stay.
    """

    shrink: Callable[[Grid, int], Grid] | None = None
    watch: Watch = field(default_factory=Watch)
    merging: InnerMerging | None = None
    wanted: Callable[[int], int] | None = None
    reduce: Callable[[Seen], Tensor | Merged] | None = None
    stages: tuple[Stage, ...] = ()
    positions: Numbering = "auto"
    separators: Separators = "all"


class Seen:
    """What a plan's `reduce` sees of an image.

    Attributes:
        encoded: Features and attention of the tower.
        text: Embeddings of the prompt's text, (tokens, hidden).
        image_key: A number that depends on the image's pixels alone.
        notes: What the method wants on record.
        flops: Operations of the choice, added up by `count`.
    """

    def __init__(
        self,
        tower: Tower,
        encoded: Encoded,
        text: Tensor,
        image_key: int,
        notes: dict[str, float | int | str],
        mark: Callable[[str], None],
    ) -> None:
        """Show an image.

        Args:
            tower: With its projector.
            encoded: What it made of the image.
            text: Embeddings of the prompt's text, (tokens, hidden).
            image_key: A number that tells images apart.
            notes: Where the method's go.
            mark: Told that a phase has ended.
        """
        self._tower = tower
        self._mark = mark
        self._projected: Tensor | None = None
        self.encoded = encoded
        self.text = text
        self.image_key = image_key
        self.notes = notes
        self.flops = 0.0
        self.projector_flops = 0.0

    @property
    def layout(self) -> VisualLayout:
        """Where the patches stand."""
        return self.encoded.layout

    @property
    def num_patches(self) -> int:
        """Patches of the image."""
        return len(self.encoded.features)

    @property
    def projected(self) -> Tensor:
        """Embeddings of all patches, (patches, hidden); the projector runs when first asked."""
        if self._projected is None:
            self._projected = self.project(self.encoded.features)
        return self._projected

    @property
    def is_projected(self) -> bool:
        """Whether the projector has run on all patches."""
        return self._projected is not None

    def project(self, features: Tensor) -> Tensor:
        """Run the projector on some features; counted as the projector's work."""
        self.projector_flops += 2.0 * self._tower.projector_parameters * len(features)
        projected = self._tower.project(features)
        self._mark("projected")
        return projected

    @property
    def projector_parts(self) -> ProjectorParts:
        """The projector taken apart; what is done with it is for the caller to count."""
        return self._tower.projector_parts()

    def count(self, flops: float) -> None:
        """Add operations of the choice."""
        self.flops += flops


class VisionLanguage(OnDevice):
    """A `models.base.VisionLanguageModel` over a model of transformers.

    Attributes:
        module: The transformers model, in evaluation mode.
        tokenizer: Its tokenizer.
        name: Id of the model, for messages and tables.
        tower: Its vision tower and projector.
        decoder: Its decoder.
        facts: Its sizes.
    """

    def __init__(
        self,
        module: Any,
        tokenizer: HubTokenizer,
        image_processor: Any,
        name: str,
        *,
        template: str | None = None,
    ) -> None:
        """Wrap a module.

        Args:
            module: A `…ForConditionalGeneration` of a supported kind.
            tokenizer: Its tokenizer.
            image_processor: What makes its pixels, of transformers.
            name: Id of the model.
            template: Chat template in Jinja; the tokenizer's own when None, and LLaVA-1.5's form
                where it has none.

        Raises:
            models.base.Unsupported: Another kind of model.
        """
        kind = type(module).__name__
        if kind in ("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration"):
            self.tower: Tower = ClipTower(module, image_processor)
        elif kind == "Qwen2_5_VLForConditionalGeneration":
            self.tower = QwenTower(module, image_processor)
        else:
            raise Unsupported(
                f"'{name}' is a {kind}; vision-language models are run here where they are Llava, "
                f"LlavaNext or Qwen2.5-VL models of transformers."
            )
        self.module: Any = module.eval()
        self.tokenizer: Tokenizer = tokenizer
        self._hub = tokenizer.hub
        self.name = name
        self.decoder = PrunableDecoder(module)
        self._template = template or getattr(tokenizer.hub, "chat_template", None)
        self._image_token = int(module.config.image_token_id)
        # First tokens of options that were asked for, by what stands in front of them.
        self._starts: dict[tuple[str, str], set[int]] = {}
        self.facts = self._facts()

    def answer(self, prompt: VisualPrompt, decoding: Decoding) -> VisualAnswer:
        """Answer a question with all visual tokens."""
        return self.run(prompt, decoding, VisualPlan())

    def planned(self, plan: VisualPlan) -> PlannedModel:
        """Return a model that answers by a plan; this one is not changed."""
        return PlannedModel(self, plan)

    def run(self, prompt: VisualPrompt, decoding: Decoding, plan: VisualPlan) -> VisualAnswer:
        """Answer a question by a plan.

        Raises:
            models.base.Unsupported: The model lacks what the plan needs, or the prompt exceeds its
                context.
            models.base.InvalidOutput: A budget was not met exactly, or logits are NaN.
            ValueError: Two options begin with the same token.
        """
        with torch.inference_mode():
            return self._run(prompt, decoding, plan)

    def prompt_text(self, text: str) -> str:
        """Return a question with the model's template around it and one image placeholder."""
        if self._template is None:
            image = self._hub.convert_ids_to_tokens(self._image_token)
            return _PLAIN_TEMPLATE.format(image=image, text=text)
        content = [{"type": "image"}, {"type": "text", "text": text}]
        return str(
            self._hub.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
            )
        )

    def prompt_ids(self, text: str, visual_tokens: int) -> list[int]:
        """Return the ids of a prompt, its placeholder repeated for each visual token.

        Raises:
            ValueError: The text holds the image placeholder itself.
        """
        ids = self._encode(self.prompt_text(text))
        if ids.count(self._image_token) != 1:
            raise ValueError(
                f"a prompt must hold one image placeholder, this one has "
                f"{ids.count(self._image_token)}: {text[:60]!r}."
            )
        place = ids.index(self._image_token)
        return [*ids[:place], *[self._image_token] * visual_tokens, *ids[place + 1 :]]

    def positions(self, ids: Sequence[int], pixels: Pixels) -> Tensor:
        """Return the positions of an unreduced prompt, (axes, tokens), int64."""
        if self.decoder.rotary_axes == 1:
            return torch.arange(len(ids), device=self.device)[None]
        row = torch.tensor([ids], device=self.device)
        kinds = (row == self._image_token).int()
        positions, _ = self.module.model.get_rope_index(
            row, mm_token_type_ids=kinds, image_grid_thw=pixels.grid_thw
        )
        result: Tensor = positions[:, 0]
        return result

    def _run(self, prompt: VisualPrompt, decoding: Decoding, plan: VisualPlan) -> VisualAnswer:
        trace = Trace()

        def mark(phase: str) -> None:
            trace.mark(phase, self.synchronize)

        pixels = self.tower.prepare(prompt.image, prompt.crops)
        if plan.shrink is not None:
            pixels = self.tower.shrunk(pixels, plan.shrink)
        mark("prepared")
        encoded = self.tower.encode(pixels, plan.watch, plan.merging)
        mark("encoded")
        ids = self.prompt_ids(prompt.text, len(encoded.layout))
        text_ids = torch.tensor(ids, device=self.device)
        is_image = text_ids == self._image_token
        text = self.module.get_input_embeddings()(text_ids[~is_image])
        image_key = zlib.crc32(prompt.image.tobytes())
        seen = Seen(self.tower, encoded, text, image_key, trace.notes, mark)
        positions = Positions(self.positions(ids, pixels))
        choice = self._choice(plan, seen)
        if plan.reduce:
            mark("selected")
        tokens, mode = self._reduced(plan, seen, choice, is_image, positions)
        continuation = _Continuation(self, tokens, plan, mode, trace.notes)
        generation = decode(continuation, [0] * len(tokens), decoding)
        counts = self.decoder.counts
        work = VisualWork(
            positions=mode,
            visual_tokens=encoded.full_patches,
            kept_tokens=len(tokens.patches),
            separator_tokens=int((tokens.kind == SEPARATOR).sum()),
            layer_tokens=tuple(counts.tokens),
            mean_visual_tokens=sum(counts.patches) / len(counts.patches),
            encoder_flops=encoded.flops,
            projector_flops=seen.projector_flops,
            selector_flops=seen.flops + encoded.watch_flops + continuation.stage_flops,
            prefill_flops=counts.prefill_flops,
            decode_flops=counts.decode_flops,
            kv_cache_bytes=self.decoder.kv_token_bytes * sum(counts.tokens),
        )
        done = generation.trace
        done.marks = {**trace.marks, **done.marks}
        done.notes = {**trace.notes, **done.notes, **_notes(work)}
        done.flops = work.flops
        done.kv_bytes = counts.kv_read_bytes
        return VisualAnswer(
            generation.token_ids,
            generation.text,
            generation.finish,
            done,
            work,
            self._option_log_probabilities(prompt, continuation.first_logits),
        )

    def _choice(self, plan: VisualPlan, seen: Seen) -> Tensor | Merged:
        """Return what enters the decoder, checked."""
        count = seen.num_patches
        choice = plan.reduce(seen) if plan.reduce else torch.arange(count, device=self.device)
        anchors = choice.anchors if isinstance(choice, Merged) else choice
        in_front = int((anchors < 0).sum()) if isinstance(choice, Merged) else 0
        check_choice(anchors[in_front:], count)
        if plan.wanted is not None:
            check_count(len(anchors), plan.wanted(seen.encoded.full_patches))
        return choice

    def _reduced(
        self,
        plan: VisualPlan,
        seen: Seen,
        choice: Tensor | Merged,
        is_image: Tensor,
        positions: Positions,
    ) -> tuple[PromptTokens, PositionMode]:
        """Return the decoder's input and how it is numbered."""
        layout, device = seen.layout, self.device
        visual = is_image.nonzero().flatten()
        first, last = int(visual[0]), int(visual[-1])
        patches = layout.patches
        merged = choice if isinstance(choice, Merged) else None
        anchors = choice.anchors if isinstance(choice, Merged) else choice
        embeddings = self._embeddings(seen, choice)

        # The layout's tokens in order, with merged ones in the places of their anchors.
        kind = torch.where(is_image, PATCH, TEXT_BEFORE)
        kind[visual[layout.tile < 0]] = SEPARATOR
        kind[last + 1 :] = TEXT_AFTER
        line = torch.full_like(kind, -1)
        line[visual] = layout.line
        tile = torch.full_like(kind, -1)
        tile[visual] = layout.tile
        origin = torch.full_like(kind, -1)
        origin[visual[patches]] = torch.arange(len(patches), device=device)
        states = embeddings.new_zeros(len(kind), embeddings.shape[1])
        states[~is_image] = seen.text.to(embeddings.dtype)
        if self.tower.separator is not None:
            states[kind == SEPARATOR] = self.tower.separator.to(embeddings.dtype)
        in_front = int((anchors < 0).sum())
        states[visual[patches[anchors[in_front:]]]] = embeddings[in_front:]
        tokens = PromptTokens(states, kind, tile, line, origin, positions)
        tokens = tokens.take(tokens.keeping(anchors[in_front:], plan.separators))
        mode: PositionMode = (
            plan.positions
            if plan.positions != "auto"
            else "compact"
            if self.decoder.rotary_axes == 1
            else "original"
        )
        if in_front:
            tokens = _put_in_front(tokens, embeddings[:in_front], first)
        if merged is not None and merged.positions is not None:
            return self._multiply(tokens, merged, positions.values[:, visual[patches]]), "multi"
        if mode == "compact" and (in_front or len(tokens) != len(is_image)):
            tokens = replace(tokens, positions=tokens.positions.renumbered())
        return tokens, mode

    def _embeddings(self, seen: Seen, choice: Tensor | Merged) -> Tensor:
        if isinstance(choice, Merged):
            if choice.embeddings is not None:
                return choice.embeddings
            assert choice.features is not None
            return seen.project(choice.features)
        if seen.is_projected:
            return seen.projected[choice]
        return seen.project(seen.encoded.features[choice])

    def _multiply(self, tokens: PromptTokens, merged: Merged, patches: Tensor) -> PromptTokens:
        """Give merged tokens several positions, and all others their own in every row."""
        assert merged.positions is not None
        assert merged.sections is not None
        values = merged.positions(patches)
        if sum(merged.sections) != self.decoder.rotary_frequencies:
            raise Unsupported(
                f"sections {merged.sections} do not add up to the decoder's "
                f"{self.decoder.rotary_frequencies} rotary frequencies."
            )
        rows = len(merged.sections)
        own = tokens.positions.values
        # A row goes by one of the model's axes: the one of its first frequency.
        axes = axes_of(merged.sections, self.decoder.rotary_sections)
        spread = own[axes].to(values.dtype)
        if values.shape != (rows, len(tokens.patches)):
            raise ValueError(
                f"positions of merged tokens must be {(rows, len(tokens.patches))}, got "
                f"{tuple(values.shape)}."
            )
        spread[:, tokens.patches] = values
        return replace(tokens, positions=Positions(spread, merged.sections))

    def _option_log_probabilities(
        self, prompt: VisualPrompt, logits: Tensor | None
    ) -> tuple[float, ...]:
        if not prompt.options:
            return ()
        assert logits is not None
        log_probabilities = logits[0].log_softmax(-1)
        starts = [self._first_tokens(prompt.text, option) for option in prompt.options]
        for place, option in enumerate(prompt.options):
            for other in range(place):
                if starts[place] & starts[other]:
                    raise ValueError(
                        f"options {prompt.options[other]!r} and {option!r} begin with the same "
                        f"token, so the first token cannot tell them apart."
                    )
        found = [log_probabilities[sorted(start)].logsumexp(0) for start in starts]
        return tuple(float(each) for each in found)

    def _first_tokens(self, text: str, option: str) -> set[int]:
        """Return the tokens with which an option can begin, with and without a space before it."""
        # What stands right in front decides; the template ends alike for every question.
        ending = self.prompt_text(text)[-_ENDING:]
        if (ending, option) in self._starts:
            return self._starts[ending, option]
        before = self._encode(ending)
        starts = set()
        for gap in ("", " "):
            after = self._encode(ending + gap + option)
            # The last token may have become another one where it meets the option.
            new = after[len(before) :] if after[: len(before)] == before else []
            # A tokenizer may set the space apart; that token says nothing yet.
            if new and self.tokenizer.decode(new[:1]).strip():
                starts.add(new[0])
        if not starts:
            raise ValueError(f"option {option!r} does not begin with a token of its own.")
        self._starts[ending, option] = starts
        return starts

    def _encode(self, text: str) -> list[int]:
        hub = self._hub
        begins = bool(hub.bos_token) and text.startswith(hub.bos_token)
        return list(hub(text, add_special_tokens=not begins).input_ids)

    def _facts(self) -> VisionLanguageFacts:
        text = model_facts(self.module)
        parameters = self.decoder.parameters
        item_bytes = next(self.module.parameters()).element_size()
        tower, projector = self.tower.parameters, self.tower.projector_parameters
        return VisionLanguageFacts(
            text=replace(text, matrix_parameters=parameters, weight_bytes=parameters * item_bytes),
            vision_layers=self.tower.num_layers,
            feature_layer=self.tower.feature_layer,
            has_cls=self.tower.has_cls,
            rotary_axes=self.decoder.rotary_axes,
            vision_parameters=tower,
            projector_parameters=projector,
            weight_bytes=(parameters + tower + projector) * item_bytes,
            dtype=text.dtype,
        )


class PlannedModel(Wrapper):
    """A vision-language model that answers by a plan.

    Attributes:
        plan: What is done about the visual tokens.
    """

    facts: VisionLanguageFacts  # type: ignore[assignment]  # those of what is wrapped

    def __init__(self, model: VisionLanguage, plan: VisualPlan) -> None:
        super().__init__(model)
        self.plan = plan

    def answer(self, prompt: VisualPrompt, decoding: Decoding) -> VisualAnswer:
        """Answer a question by the plan."""
        answer: VisualAnswer = self._model.run(prompt, decoding, self.plan)
        return answer


class _Continuation:
    """A prompt that is read already, in the form in which the decode loop continues texts."""

    def __init__(
        self,
        model: VisionLanguage,
        tokens: PromptTokens,
        plan: VisualPlan,
        mode: PositionMode,
        notes: dict[str, float | int | str],
    ) -> None:
        self._model = model
        self._tokens = tokens
        self._plan = plan
        self._mode: PositionMode = mode
        self._notes = notes
        self.name = model.name
        self.tokenizer: Tokenizer = model.tokenizer
        self.facts: TextModelFacts = model.facts.text
        self.first_logits: Tensor | None = None
        self.stage_flops = 0.0
        self.length = 0
        self.capacity = 0

    def synchronize(self) -> None:
        self._model.synchronize()

    def session(self, capacity: int) -> _Continuation:
        self._model.decoder.open(capacity)
        self.capacity = capacity
        return self

    def generate(self, prompt_ids: Sequence[int], decoding: Decoding) -> Any:
        return decode(self, prompt_ids, decoding)

    def prefill(self, token_ids: Sequence[int], *, all_logits: bool = False) -> Tensor:
        logits, self.stage_flops = self._model.decoder.prefill(
            self._tokens,
            self._plan.stages,
            positions=self._mode,
            separators=self._plan.separators,
            notes=self._notes,
        )
        self.first_logits = logits
        self.length = len(token_ids)
        return logits

    def verify(self, tree: DraftTree) -> Tensor:
        return self._model.decoder.step(int(tree.tokens[0]))

    def commit(self, path: Sequence[int]) -> None:
        self.length += len(path)


def axes_of(sections: Sequence[int], model_sections: Sequence[int]) -> list[int]:
    """Return the model's axis that each section of frequencies belongs to.

    Raises:
        ValueError: A section reaches over two of the model's.
    """
    owner = [axis for axis, width in enumerate(model_sections) for _ in range(width)]
    found, start = [], 0
    for width in sections:
        axes = set(owner[start : start + width])
        if len(axes) != 1:
            raise ValueError(
                f"sections {tuple(sections)} do not lie within the model's {tuple(model_sections)}."
            )
        found.append(axes.pop())
        start += width
    return found


def _put_in_front(tokens: PromptTokens, embeddings: Tensor, place: int) -> PromptTokens:
    """Insert tokens in front of the visual ones, with the first one's position."""
    count = len(embeddings)
    index = torch.arange(len(tokens), device=embeddings.device)
    order = torch.cat([index[:place], index[place : place + 1].expand(count), index[place:]])
    grown = tokens.take(order)
    where = slice(place, place + count)
    for name, value in (("kind", PATCH), ("tile", -1), ("line", -1), ("origin", -1)):
        getattr(grown, name)[where] = value
    grown.states[where] = embeddings
    return grown


def _notes(work: VisualWork) -> dict[str, float | int | str]:
    """Return the counts as a trace's notes."""
    names = [each.name for each in fields(work)]
    names.remove("layer_tokens")  # a note is one number
    return {name: getattr(work, name) for name in names}


def load_vision_language(
    folder: Path, model_id: str, settings: LoadSettings, tokenizer_folder: Path
) -> VisionLanguage:
    """Load a vision-language model from a folder laid out like the hub's.

    Args:
        folder: With config.json, preprocessor_config.json and *.safetensors.
        model_id: For messages and tables.
        settings: Device, dtype, attention.
        tokenizer_folder: With tokenizer.json.

    Raises:
        ModelError: transformers cannot read it.
        models.base.Unsupported: Another kind of model.
    """
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    local: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet_transformers():
            module: Any = AutoModelForImageTextToText.from_pretrained(
                folder,
                dtype=getattr(torch, settings.dtype_name()),
                attn_implementation=settings.attention,
                use_safetensors=True,
                **local,
            )
            module.to(settings.device_name())
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, **local)
            # torchvision resizes a little differently and is not always there.
            processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **local)
    except (OSError, ValueError) as error:
        raise ModelError(f"'{model_id}' cannot be loaded: {error}") from error
    template = None
    if (path := folder / "chat_template.json").is_file():
        template = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
    return VisionLanguage(module, HubTokenizer(tokenizer), processor, model_id, template=template)
