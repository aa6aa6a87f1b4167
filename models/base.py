"""What a model can do: the capabilities that tasks call and methods change.

A capability is a typed protocol. A task asks for one, a method takes and yields one, and neither
knows which class stands behind it. Nothing here needs torch at import time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor

    from models.draft_tree import DraftTree


class Unsupported(Exception):
    """Something cannot do what was asked; the message says why. An answer, not a crash."""


class InvalidOutput(Exception):
    """A call returned something that cannot be a result: NaN logits, ids outside the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How text is to be continued.

    Attributes:
        max_new_tokens: Largest number of new tokens, at least 1.
        stop: Strings that end the text; the text is cut before the first of them.
        temperature: 0 takes the most likely token, above 0 samples.
        seed: Seed of the sampling, unused at temperature 0.
        ignore_eos: Go on past end-of-text and stop strings: the fixed-length scenario.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}.")


@dataclass(frozen=True)
class Forward:
    """One run of the target model: `width` tokens fed while `context` tokens were cached."""

    width: int
    context: int


@dataclass
class Trace:
    """What a call did, in countable terms. Filled in by the loop, read by the harness.

    Attributes:
        prefill: Forwards that read the prompt.
        forwards: Target forwards after the prefill, in order.
        accepted: Drafted tokens accepted by each of `forwards`; -1 for one that looked ahead and
            emitted nothing, not even its bonus token.
        draft_forwards: Forwards of a draft model.
        flops: Floating-point operations of all forwards; a multiply-add counts two.
        prefill_flops: Those of `prefill`; None where nobody tells them apart.
        kv_bytes: Bytes of cached keys and values that the forwards read.
        marks: End of each phase, in seconds of `time.perf_counter`. Only the harness turns them
            into durations.
        notes: What the method settled at run time (a calibrated tree size, a threshold).
    """

    prefill: list[Forward] = field(default_factory=list)
    forwards: list[Forward] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    draft_forwards: int = 0
    flops: float = 0.0
    prefill_flops: float | None = None
    kv_bytes: int = 0
    marks: dict[str, float] = field(default_factory=dict)
    notes: dict[str, float | int | str] = field(default_factory=dict)

    @property
    def accepted_drafts(self) -> int:
        """Drafted tokens accepted by all forwards."""
        return sum(count for count in self.accepted if count > 0)

    def mark(self, phase: str, synchronize: Callable[[], None] | None = None) -> None:
        """Note that `phase` ends now; `synchronize` waits for the device first."""
        if synchronize is not None:
            synchronize()
        self.marks[phase] = time.perf_counter()


@dataclass(frozen=True)
class Generation:
    """Text that a model produced.

    Attributes:
        token_ids: The new tokens, trimmed by `models.stopping.Stopper`; their number is the count.
        text: What they say, cut before a stop string.
        finish: Why it ended: `eos`, `stop` or `length`.
        trace: What was done to get there.
    """

    token_ids: tuple[int, ...]
    text: str
    finish: str
    trace: Trace


class Tokenizer(Protocol):
    """Text to ids and back."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, with the special tokens that the model expects in front."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`, special tokens left out, spaces untouched."""
        ...


@dataclass(frozen=True, kw_only=True)
class TextModelFacts:
    """Sizes of a causal language model, for counting work.

    Attributes:
        vocab_size: Number of token ids.
        num_layers: Decoder layers.
        num_kv_heads: Key and value heads of a layer.
        head_dim: Size of one head.
        num_heads: Query heads of a layer.
        matrix_parameters: Weights that each token is multiplied with (output head included, input
            embedding not).
        head_parameters: Those of them in the output head, which a prompt needs once.
        weight_bytes: Bytes that one forward reads of them.
        kv_item_bytes: Bytes of one cached number.
        max_positions: Longest context that the model was made for. Prompts are cut to it, for the
            baseline and every method alike.
        eos_ids: Ids that end a text.
        dtype: Name of the weights' dtype, `float32` or the like.
        lifted_limit: Longest text that a method allows, where it lifts the model's own limit.
    """

    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    matrix_parameters: int
    head_parameters: int
    weight_bytes: int
    kv_item_bytes: int
    max_positions: int
    eos_ids: frozenset[int]
    dtype: str
    lifted_limit: int | None = None

    @property
    def longest_text(self) -> int:
        """Tokens that a text, prompt and all, may have."""
        return self.max_positions if self.lifted_limit is None else self.lifted_limit

    def flops(self, forward: Forward, logits: int | None = None) -> float:
        """Return the operations of one forward; a multiply-add counts two.

        Args:
            forward: Width and context.
            logits: Positions run through the output head; all of them when None.
        """
        headless = 0 if logits is None else forward.width - logits
        matrices = 2.0 * (self.matrix_parameters * forward.width - self.head_parameters * headless)
        # Scores and weighted values: two products of head_dim per query head and attended token.
        attended = forward.width * forward.context + forward.width * (forward.width + 1) / 2
        return matrices + 4.0 * self.num_layers * self.num_heads * self.head_dim * attended

    def kv_read(self, forward: Forward) -> int:
        """Return the bytes of cached keys and values that one forward reads."""
        per_token = 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.kv_item_bytes
        return per_token * (forward.context + forward.width)


@runtime_checkable
class Session(Protocol):
    """One text in progress: a cache of committed tokens and the forwards over it.

    The last committed token is never in the cache: it is the root of the next tree.
    """

    length: int
    capacity: int

    def prefill(self, token_ids: Sequence[int], *, all_logits: bool = False) -> Tensor:
        """Read tokens into the cache.

        Returns:
            Logits after the last token, (1, vocab), or with `all_logits` after each,
            (tokens, vocab); float32.
        """
        ...

    def verify(self, tree: DraftTree) -> Tensor:
        """Run one forward over a tree; its keys and values wait behind the cache for `commit`.

        Returns:
            Logits after each node, (nodes, vocab), float32.
        """
        ...

    def commit(self, path: Sequence[int]) -> None:
        """Keep the nodes of `path` (root first, ascending) and forget the others."""
        ...


@runtime_checkable
class TextGenerator(Protocol):
    """Continues a text, in one call or step by step."""

    name: str
    tokenizer: Tokenizer
    facts: TextModelFacts

    def generate(self, prompt_ids: Sequence[int], decoding: Decoding) -> Generation:
        """Continue `prompt_ids`."""
        ...

    def session(self, capacity: int) -> Session:
        """Open a cache for at most `capacity` tokens, drafts included."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has finished what it was given."""
        ...


@dataclass(frozen=True, kw_only=True)
class EncoderFacts:
    """Sizes of a text encoder, for counting work.

    Attributes:
        dimension: Numbers of an embedding.
        num_layers: Layers of the network.
        max_tokens: Tokens of a text that are read; what is longer is cut.
        matrix_parameters: Weights that each token is multiplied with.
        weight_bytes: Bytes that one forward reads of them.
        dtype: Name of the weights' dtype, `float32` or the like.
    """

    dimension: int
    num_layers: int
    max_tokens: int
    matrix_parameters: int
    weight_bytes: int
    dtype: str


@dataclass(frozen=True)
class Encoding:
    """Embeddings of some texts.

    Attributes:
        vectors: (texts, dimension), float32, not normalised.
        token_counts: Tokens of each text, those of a prompt around it included, padding not.
        trace: What was done; `prefill` holds one forward for each prompt, of which a text may have
            several (its tokens as `width`), and `tokenized` and `encoded` are marked.
    """

    vectors: npt.NDArray[np.float32]
    token_counts: tuple[int, ...]
    trace: Trace


@runtime_checkable
class TextEncoder(Protocol):
    """Turns texts into vectors whose cosine says how alike they are."""

    name: str
    facts: EncoderFacts

    def encode(self, texts: Sequence[str]) -> Encoding:
        """Embed texts; each vector depends on its own text alone, whatever stands beside it."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has finished what it was given."""
        ...


@dataclass(frozen=True)
class TextScore:
    """What it costs a model to code a text, in bits.

    Attributes:
        token_ids: The coded units in order: tokens, or whatever a tokenizer-level model predicts
            one after the other (characters of a word and its end). What merely stands in front of
            the text is not among them.
        bits: Minus the base-2 logarithm of each unit's probability; their sum is the text's code
            length, which models with different units can be compared by.
        num_bytes: Length of the text in UTF-8.
        decoded: What the units say, to see whether the text can be had back from them.
        trace: What was done.
    """

    token_ids: tuple[int, ...]
    bits: tuple[float, ...]
    num_bytes: int
    decoded: str
    trace: Trace

    @property
    def bits_per_byte(self) -> float:
        """Code length over text length; NaN for the empty text, which has neither."""
        return sum(self.bits) / self.num_bytes if self.num_bytes else float("nan")


@runtime_checkable
class TokenizedLM(Protocol):
    """A language model together with its tokenizer: text in, text or bits out.

    For methods that change what a token is, so nothing here speaks of ids that a caller could know.
    """

    name: str
    tokenizer: Tokenizer
    facts: TextModelFacts

    def score(self, text: str) -> TextScore:
        """Return what it costs to code `text` from its beginning."""
        ...

    def generate(self, prompt: str, decoding: Decoding) -> Generation:
        """Continue `prompt`."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has finished what it was given."""
        ...


PositionMode = Literal["compact", "original", "multi"]
"""How the tokens that are left of a prompt are numbered: anew from 0, by the places that they had,
or by several of those places at once, a share of the rotary frequencies each."""


@dataclass(frozen=True, kw_only=True)
class VisualPrompt:
    """A question about an image.

    Attributes:
        image: RGB, (height, width, 3), uint8.
        text: The question; the model's own template goes around it and the image.
        options: Answers whose log-probabilities are wanted where the answer begins.
        crops: 1 for the model's own way with an image; k for a thumbnail and k x k crops, each an
            image of its own. For models that do not tile by themselves.
    """

    image: npt.NDArray[np.uint8]
    text: str
    options: tuple[str, ...] = ()
    crops: int = 1

    def __post_init__(self) -> None:
        if self.image.ndim != 3 or self.image.shape[2] != 3 or self.image.dtype.name != "uint8":
            raise ValueError(
                f"image must be (height, width, 3) of uint8, got {self.image.shape} of "
                f"{self.image.dtype}."
            )
        if self.crops < 1:
            raise ValueError(f"crops must be at least 1, got {self.crops}.")


@dataclass(frozen=True, kw_only=True)
class VisualWork:
    """What an answer took, counted exactly; a multiply-add counts two operations.

    Attributes:
        positions: How the prompt's tokens were numbered.
        visual_tokens: Visual tokens that the image has; separators between them not counted.
        kept_tokens: Those of them, or merged ones in their place, that the decoder got.
        separator_tokens: Separators (LLaVA-NeXT's newlines) that the decoder got.
        layer_tokens: Tokens of the prompt in the cache of each decoder layer.
        mean_visual_tokens: Visual tokens that a decoder layer worked on, averaged over the layers.
        encoder_flops, projector_flops: Of the vision tower, and of what follows it.
        selector_flops: Of choosing or merging tokens: products and the sums over them.
        prefill_flops, decode_flops: Of the decoder, for the prompt and for the tokens after it.
        kv_cache_bytes: Keys and values of the prompt that all layers hold.
    """

    positions: PositionMode
    visual_tokens: int
    kept_tokens: int
    separator_tokens: int
    layer_tokens: tuple[int, ...]
    mean_visual_tokens: float
    encoder_flops: float
    projector_flops: float
    selector_flops: float
    prefill_flops: float
    decode_flops: float
    kv_cache_bytes: int

    @property
    def flops(self) -> float:
        """All operations together."""
        decoder = self.prefill_flops + self.decode_flops
        return self.encoder_flops + self.projector_flops + self.selector_flops + decoder


@dataclass(frozen=True)
class VisualAnswer(Generation):
    """What a model said about an image.

    Attributes:
        work: Exact counts. The trace's notes hold the same by the same names, its marks end the
            phases `prepared`, `encoded`, `projected`, `selected`, `prefill` and `decode`.
        option_log_probabilities: Natural logarithm of the probability that the answer begins with
            each of the prompt's options.
    """

    work: VisualWork
    option_log_probabilities: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class VisionLanguageFacts:
    """Sizes of a vision-language model, for counting work.

    Attributes:
        text: Of the decoder alone.
        vision_layers: Layers of the vision tower.
        feature_layer: Layer whose output feeds the projector, counted from 1.
        has_cls: Whether the tower has a [CLS] token.
        rotary_axes: Axes of the decoder's positions: 1, or 3 for time, height and width.
        vision_parameters, projector_parameters: Weights of their matrices.
        weight_bytes: Bytes of all three.
        dtype: Name of the weights' dtype, `float32` or the like.
    """

    text: TextModelFacts
    vision_layers: int
    feature_layer: int
    has_cls: bool
    rotary_axes: int
    vision_parameters: int
    projector_parameters: int
    weight_bytes: int
    dtype: str

    @property
    def matrix_parameters(self) -> int:
        """Weights of the matrices of tower, projector and decoder."""
        return self.text.matrix_parameters + self.vision_parameters + self.projector_parameters


@runtime_checkable
class VisionLanguageModel(Protocol):
    """Answers questions about images."""

    name: str
    tokenizer: Tokenizer
    facts: VisionLanguageFacts

    def answer(self, prompt: VisualPrompt, decoding: Decoding) -> VisualAnswer:
        """Answer a question about an image."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has finished what it was given."""
        ...


@dataclass(frozen=True, kw_only=True)
class MaskedDiffusionFacts(TextModelFacts):
    """Sizes of a masked-diffusion language model.

    Attributes:
        mask_id: Id that stands for a token which is not yet decided.
        is_shifted: Whether the network's output at position i is about the token at i + 1, as in
            models that were made from causal ones (Dream); else about the token at i (LLaDA).
            A `Canvas` hides it: its logits at i are always about the token at i.
    """

    mask_id: int
    is_shifted: bool = False

    def flops(self, forward: Forward, logits: int | None = None) -> float:
        """Return the operations of one forward, in which every position sees every other.

        Args:
            forward: `width` positions run, beside `context` ones whose keys and values are kept.
            logits: Positions run through the output head; all of them when None.
        """
        headless = 0 if logits is None else forward.width - logits
        matrices = 2.0 * (self.matrix_parameters * forward.width - self.head_parameters * headless)
        attended = forward.width * (forward.context + forward.width)
        return matrices + 4.0 * self.num_layers * self.num_heads * self.head_dim * attended


@runtime_checkable
class Canvas(Protocol):
    """A batch of sequences of which every position sees all others, and forwards over parts.

    Attributes:
        length: Positions of every row, padding included.
    """

    length: int

    def denoise(
        self, token_ids: Tensor, first: int, wanted: range, rows: Sequence[int] | None = None
    ) -> Tensor:
        """Run positions from `first` on; the others are seen as they were when last run.

        The positions' keys and values replace those that are kept, if the canvas keeps any.

        Args:
            token_ids: Ids at `first`, `first + 1`, ..., (rows, width). Positions behind them that
                are kept are seen too.
            first: Place of the first of them. For a shifted model the one before `wanted` must be
                among them, if there is one.
            wanted: Positions whose logits are returned, all of them among those that are run.
            rows: Which rows of the batch these are; all when None.

        Returns:
            Logits about the tokens *at* the wanted positions, (rows, wanted, vocab), float32.
        """
        ...

    def cut(self, ends: Sequence[int]) -> None:
        """Let each row end before a position; what stands from there on is seen no more."""
        ...


@runtime_checkable
class MaskedDiffusionLM(Protocol):
    """A language model that fills in masks anywhere, in any order and several at a time."""

    name: str
    tokenizer: Tokenizer
    facts: MaskedDiffusionFacts

    def generate(self, prompt_ids: Sequence[int], decoding: Decoding) -> Generation:
        """Continue `prompt_ids`, one token a forward; `max_new_tokens` masks are filled in."""
        ...

    def canvas(self, padding: Sequence[int], length: int, *, keeps: bool) -> Canvas:
        """Open a batch of rows.

        Args:
            padding: Positions at the left end of each row that nobody sees.
            length: Positions of a row, these included.
            keeps: Whether keys and values are kept for forwards over parts of the sequence.
        """
        ...

    def synchronize(self) -> None:
        """Wait until the device has finished what it was given."""
        ...


DetectionOutput = Literal["box", "point", "polygon", "keypoint"]
"""What a detector is asked for: boxes, one point in each thing, outlines, or named points of it."""


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One thing that a detector found.

    Positions are in pixels of the image as it was given, x to the right and y down; the left edge
    of the first pixel is 0.0 and the right edge of the last one is the image's width.

    Attributes:
        coordinates: Of a box x0, y0, x1, y1 (edges, x0 <= x1 and y0 <= y1), of a point x, y, of a
            polygon the corners x, y, x, y, ... in order and without the first one again, at least
            three. Asked for key points: the box around the thing, or () if none is given.
        keypoints: Asked for key points, (x, y) of each in the order of their names, None where the
            detector says that it cannot be seen; otherwise ().
        score: How sure the detector is, in [0, 1]; None if it does not say. For coordinates that
            are tokens the exponential of their mean log-probability.
        tokens: Output tokens that say where it is; 0 for a head that has none.
    """

    coordinates: tuple[float, ...]
    keypoints: tuple[tuple[float, float] | None, ...] = ()
    score: float | None = None
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Detections(Generation):
    """What a detector found in an image.

    `token_ids` is empty for a detector that writes no tokens; its `text` then says in words what
    it found.

    Attributes:
        found: The instances of each phrase, in the order of the phrases; () where it found none.
        format_errors: What in the answer was no answer, an entry for each piece: coordinates that
            are too few, a phrase that was not asked or that is missing, an end that never came. The
            rest of the answer is in `found`. Empty for a well-formed answer.
    """

    found: tuple[tuple[Instance, ...], ...]
    format_errors: tuple[str, ...] = ()

    @property
    def output_tokens(self) -> int:
        """Number of tokens of the answer."""
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class DetectorFacts:
    """Sizes of a detector, for counting work, and what it can say.

    Attributes:
        outputs: What it can be asked for.
        bins: Different values that a coordinate can have from one edge of the image to the other,
            both included; None if coordinates are continuous.
        matrix_parameters: Weights of its matrices.
        weight_bytes: Bytes of them.
        dtype: Name of the weights' dtype, `float32` or the like.
    """

    outputs: tuple[DetectionOutput, ...]
    bins: int | None
    matrix_parameters: int
    weight_bytes: int
    dtype: str


@runtime_checkable
class Detector(Protocol):
    """Finds things that are named in an image."""

    name: str
    facts: DetectorFacts

    def detect(
        self,
        image: npt.NDArray[np.uint8],
        phrases: Sequence[str],
        output: DetectionOutput,
        decoding: Decoding,
        *,
        keypoints: Sequence[str] = (),
    ) -> Detections:
        """Find all instances of each phrase.

        Args:
            image: RGB, (height, width, 3), uint8.
            phrases: Names of categories or descriptions, all different; some may name nothing.
            output: What is wanted of each instance.
            decoding: For detectors that write tokens.
            keypoints: Names of the points wanted, for the output `keypoint` alone.

        Raises:
            Unsupported: It cannot give this output.
        """
        ...

    def synchronize(self) -> None:
        """Wait until the device has finished what it was given."""
        ...


Condition = int | str
"""What an image is to show: a class id, or a caption for models that read one."""


@dataclass(frozen=True, kw_only=True)
class ImageSampling:
    """How the tokens of an image are drawn.

    Attributes:
        guidance_scale: s of classifier-free guidance, u + s (c - u) over conditional and
            unconditional logits; 1 runs no unconditional half.
        temperature: 0 takes the most likely token, above 0 samples.
        top_k: Number of most likely tokens that can be drawn; 0 for all.
        top_p: Probability of the smallest set of most likely tokens that can be drawn, in (0, 1].
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.guidance_scale >= 0:
            raise ValueError(f"guidance_scale must be 0 or more, got {self.guidance_scale}.")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}.")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 1, or 0 for no limit, got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}.")

    @property
    def is_guided(self) -> bool:
        """Whether the unconditional half is needed."""
        return self.guidance_scale != 1


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """Sizes of an image generator, for counting work.

    Attributes:
        image_size: Height and width of its images, pixels.
        classes: Number of class ids that it can be asked for; 0 if it reads captions.
        matrix_parameters: Weights of its matrices; of an autoregressive model those that each
            token is multiplied with.
        weight_bytes: Bytes of them.
        dtype: Name of the weights' dtype, `float32` or the like.
    """

    image_size: tuple[int, int]
    classes: int
    matrix_parameters: int
    weight_bytes: int
    dtype: str


@dataclass(frozen=True, kw_only=True)
class ImageTokenFacts(TextModelFacts, ImageFacts):
    """Sizes of an autoregressive image model; what is counted is counted for one row of a batch.

    Attributes:
        image_tokens: Tokens of an image in the sequence, row ends included where there are any.
        grid: Rows and columns of codes.
        hidden_size: Size of the hidden states.
    """

    image_tokens: int
    grid: tuple[int, int]
    hidden_size: int


@dataclass(frozen=True)
class GeneratedImages:
    """Images that a model made.

    Attributes:
        pixels: RGB, (images, height, width, 3), uint8.
        tokens: The tokens of each image in order; () for a model without tokens.
        trace: What was done, for all images together; a forward over a batch counts once for each
            image. The marks end `prefill`, `decode` and `pixels`.
    """

    pixels: npt.NDArray[np.uint8]
    tokens: tuple[tuple[int, ...], ...]
    trace: Trace


@runtime_checkable
class ImageGenerator(Protocol):
    """Makes images for conditions."""

    name: str

    @property
    def facts(self) -> ImageFacts:
        """Sizes of the model."""
        ...

    def generate(
        self, conditions: Sequence[Condition], seeds: Sequence[int], sampling: ImageSampling
    ) -> GeneratedImages:
        """Make one image for each condition.

        Args:
            conditions: What each image shows.
            seeds: Of the randomness of each image, which depends on nothing else in the batch.
            sampling: How tokens are drawn.

        Raises:
            Unsupported: A condition is of a kind that the model does not take.
            ValueError: There is not one seed for each condition, or no such class.
        """
        ...

    def synchronize(self) -> None:
        """Wait until the device has finished what it was given."""
        ...


class WindowOutput(NamedTuple):
    """What a forward over a window of image tokens returns.

    Where the window holds the token at place n, the logits are about the token at place n + 1.

    Attributes:
        logits: (branches * rows, width, vocab), float32; with guidance there are two branches, the
            conditional one first.
        hidden: Last hidden states, after the final norm, (branches * rows, width, hidden).
        rows: Images.
    """

    logits: Tensor
    hidden: Tensor
    rows: int

    @property
    def is_guided(self) -> bool:
        """Whether there is an unconditional branch."""
        return len(self.logits) == 2 * self.rows

    @property
    def conditional(self) -> Tensor:
        """Logits given the condition, (rows, width, vocab)."""
        return self.logits[: self.rows]

    @property
    def unconditional(self) -> Tensor | None:
        """Logits given none, (rows, width, vocab); None without guidance."""
        return self.logits[self.rows :] if self.is_guided else None

    @property
    def hidden_conditional(self) -> Tensor:
        """Hidden states given the condition, (rows, width, hidden)."""
        return self.hidden[: self.rows]

    @property
    def hidden_unconditional(self) -> Tensor | None:
        """Hidden states given none, (rows, width, hidden); None without guidance."""
        return self.hidden[self.rows :] if self.is_guided else None


@runtime_checkable
class ImageSession(Protocol):
    """A batch of images in progress, in lockstep: a cache of tokens and forwards over windows.

    A token has a place, its index in the image in the order of the sequence. Both branches of
    guidance get the same tokens and keep the same cache. The last token that is settled need not be
    in the cache: it is the first of the next window.

    Attributes:
        rows: Images; the unconditional branch is not counted.
        is_guided: Whether there is an unconditional branch.
        length: Image tokens in the cache; the condition is not counted.
        trace: The session counts its prefill, forwards, operations and cache bytes into it, each
            forward once a row.
    """

    rows: int
    is_guided: bool
    length: int
    trace: Trace

    def prefill(self) -> WindowOutput:
        """Read the condition; called once, before all else.

        Returns:
            Logits about place 0, of width 1.
        """
        ...

    def forward(
        self, tokens: Tensor, places: Tensor | None = None, mask: Tensor | None = None
    ) -> WindowOutput:
        """Run a window of tokens; their keys and values are appended to the cache.

        Args:
            tokens: (rows, width), int64.
            places: Place of each, (width,), best on the CPU; None for those that follow the cache.
            mask: True where a token of the window (row) may see another one or itself (column),
                (width, width); None for those before it and itself. What is cached all of them see.

        Raises:
            ValueError: A place is not in the image, or the cache has no room.
        """
        ...

    def crop(self, length: int) -> None:
        """Forget the cached image tokens from `length` on."""
        ...

    def keep(self, start: int, path: Sequence[int]) -> None:
        """Of the entries from `start` on keep those at the offsets `path`, in that order."""
        ...


class PositionConstraints(Protocol):
    """Which tokens cannot stand at a place: row ends inside a row, text inside an image."""

    def forbidden(self, places: Tensor) -> Tensor | None:
        """Return True where a token cannot be, (places, vocab); None if all can be anywhere.

        Args:
            places: (places,), int64.
        """
        ...


@runtime_checkable
class AutoregressiveImageModel(ImageGenerator, Protocol):
    """An image generator that draws one token after the other: what decoding methods change.

    Attributes:
        constraints: Which tokens can stand where.
        module: The network.
    """

    constraints: PositionConstraints
    module: Any

    @property
    def facts(self) -> ImageTokenFacts:
        """Sizes of the model."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    @property
    def codebook(self) -> Tensor:
        """Vectors of the codes, (codes, code_dim), float32."""
        ...

    def session(
        self, conditions: Sequence[Condition], *, guided: bool, capacity: int, trace: Trace
    ) -> ImageSession:
        """Open a batch of images.

        Args:
            conditions: One an image.
            guided: Whether an unconditional branch runs beside.
            capacity: Image tokens that the cache has room for, drafts included.
            trace: Where the session counts what it does.

        Raises:
            Unsupported: A condition is of a kind that the model does not take.
            ValueError: There is no such class.
        """
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the decoder's embeddings of image tokens, (..., hidden)."""
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states as sessions return them, (..., vocab), float32."""
        ...

    def codes(self, tokens: Tensor) -> Tensor:
        """Return the code of each token, the shape of `tokens`; -1 for one that is no code."""
        ...

    def pixels(self, tokens: Tensor) -> npt.NDArray[np.uint8]:
        """Return the images of tokens, (rows, image_tokens) to (rows, height, width, 3)."""
        ...
