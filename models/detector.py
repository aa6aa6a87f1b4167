"""Detectors that are vision-language models: phrases in, coordinate tokens out.

`CoordinateDetector` asks a model of `models.vision_language` in the words that it was trained with
and reads its answer by the grammar of `models.detector_format`. What is varied about that is a
`DetectionPlan`; the plain `detect` asks one phrase a request.

Supported is every model whose tokenizer has the markers and the coordinate tokens `<0>`, `<1>`, and
so on: Rex-Omni as it is published (Qwen2.5-VL, the last 1,000 tokens of its vocabulary re-purposed)
and tiny-detector (Llava). Prompts are Rex-Omni's, unless a folder brings `detector.json` with its
own.

Source: Rex-Omni, arXiv 2510.12798; IDEA-Research/Rex-Omni at 478e44f, `rex_omni/tasks.py`, whose
prompt for polygons of text serves for polygons of anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from models.base import (
    Decoding,
    DetectionOutput,
    Detections,
    DetectorFacts,
    Instance,
    Trace,
    Unsupported,
    VisualAnswer,
    VisualPrompt,
)
from models.detector_format import (
    BOX,
    POINT,
    Grammar,
    GrammarMask,
    Parsed,
    Piece,
    Writing,
    dequantise,
    parse,
    parse_keypoints,
    quantise,
)
from models.device import OnDevice
from models.loading import LoadSettings, ModelError
from models.vision_language import VisionLanguage, VisualPlan, load_vision_language
from models.vision_language_decoder import PromptTokens, PrunableDecoder
from models.wrapper import Wrapper

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_BOX_CLOSING = "Output the bounding box coordinates in [x0, y0, x1, y1] format."
_PROMPTS: Mapping[DetectionOutput, str] = {
    "box": f"Detect {{phrases}}. {_BOX_CLOSING}",
    "point": "Point to {phrases}.",
    "polygon": (
        "Can you detect all {phrases} in this image in polygon format like "
        "[x0, y0, x1, y1, x2, y2 ...]?"
    ),
    "keypoint": (
        "Can you detect each {phrases} in the image using a [x0, y0, x1, y1] box format, and then "
        "provide the coordinates of its {keypoints} as [x0, y0]? Output the answer in JSON format."
    ),
}
_READING = {
    "box": "Detect all {granularity} and recognize them.",
    "polygon": (
        "Can you detect all {granularity} in this image in polygon format like "
        "[x0, y0, x1, y1, x2, y2 ...] and then recognize them?"
    ),
}
_SIMILAR = (
    "Given reference boxes {boxes} indicating one or more objects, find all similar objects in the "
    "image and output their bounding boxes."
)
_COORDINATES: Mapping[str, int | None] = {"box": BOX, "point": POINT, "polygon": None}


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """The words in which a model is asked.

    Attributes:
        prompts: By output, with `{phrases}` and, for key points, `{keypoints}`; what is missing
            the model cannot give.
        most_phrases: Most phrases of a request that the model was trained with, by output; no
            limit where none is named.
    """

    prompts: Mapping[DetectionOutput, str] = field(default_factory=lambda: dict(_PROMPTS))
    most_phrases: Mapping[DetectionOutput, int] = field(default_factory=dict)


def read_dialect(folder: Path) -> Dialect:
    """Return the dialect of a model's folder: `detector.json`, or Rex-Omni's where there is none.

    Raises:
        ModelError: The file is not as it must be.
    """
    path = folder / "detector.json"
    if not path.is_file():
        return Dialect()
    outputs = get_args(DetectionOutput)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        dialect = Dialect(prompts=content["prompts"], most_phrases=content["most_phrases"])
        unknown = {*dialect.prompts, *dialect.most_phrases} - {*outputs}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} must hold prompts and most_phrases by output: {error}."
        ) from error
    if unknown:
        raise ModelError(
            f"{path}: there is no output {sorted(unknown)[0]!r}; there are {', '.join(outputs)}."
        )
    return dialect


@dataclass(frozen=True, kw_only=True)
class DetectionPlan:
    """How a detector is asked and how its answer is taken.

    Attributes:
        phrases_per_request: Phrases that one request names; None for as many as the model was
            trained with.
        scores: Whether instances get a score: exp of the mean log-probability of their coordinate
            tokens, under the model's own distribution.
        constrained: Whether tokens that the grammar does not allow are masked.
        repetition_penalty: What the logits of tokens that stand in the prompt or the answer are
            divided by where they are positive, and multiplied with where they are negative; 1 does
            nothing. As in CTRL (arXiv 1909.05858), section 4.1.
        writing: How the answer has its coordinates; the model must have learned it. In `digits`
            there is no grammar mask and there are no key points.
    """

    phrases_per_request: int | None = 1
    scores: bool = True
    constrained: bool = False
    repetition_penalty: float = 1.0
    writing: Writing = "tokens"


class CoordinateDetector(OnDevice):
    """A `models.base.Detector` over a vision-language model with coordinate tokens.

    Attributes:
        reader: The vision-language model; its decoder tells what it computes.
        name: Its id.
        facts: Its sizes.
        dialect: The words in which it is asked.
        grammar: The ids of its answers' parts.
    """

    def __init__(self, reader: VisionLanguage, dialect: Dialect | None = None) -> None:
        """Make a detector of a model.

        Args:
            reader: The model; it is not to be used for anything else.
            dialect: Rex-Omni's when None.

        Raises:
            models.base.Unsupported: Its tokenizer lacks markers or coordinate tokens.
        """
        self.reader = reader
        self.name = reader.name
        self.dialect = dialect or Dialect()
        self.grammar = grammar_of(reader)
        self._ear = _ListeningDecoder(reader.module)
        reader.decoder = self._ear
        sizes = reader.facts
        matrices = sizes.text.matrix_parameters + sizes.vision_parameters
        matrices += sizes.projector_parameters
        item_bytes = next(reader.module.parameters()).element_size()
        self.facts = DetectorFacts(
            outputs=tuple(each for each in get_args(DetectionOutput) if each in self.prompts),
            bins=len(self.grammar.coordinates),
            matrix_parameters=matrices,
            weight_bytes=matrices * item_bytes,
            dtype=sizes.dtype,
        )

    @property
    def module(self) -> Any:
        """The transformers model."""
        return self.reader.module

    @property
    def prompts(self) -> Mapping[DetectionOutput, str]:
        """What the model is asked, by output."""
        return self.dialect.prompts

    @property
    def bins(self) -> int:
        """Different values of a coordinate."""
        return len(self.grammar.coordinates)

    def planned(self, plan: DetectionPlan) -> PlannedDetector:
        """Return a detector that follows a plan; this one is not changed."""
        return PlannedDetector(self, plan)

    def detect(
        self,
        image: npt.NDArray[np.uint8],
        phrases: Sequence[str],
        output: DetectionOutput,
        decoding: Decoding,
        *,
        keypoints: Sequence[str] = (),
    ) -> Detections:
        """Find all instances of each phrase, one request a phrase; see `models.base.Detector`."""
        return self.run(image, phrases, output, decoding, DetectionPlan(), keypoints=keypoints)

    def run(
        self,
        image: npt.NDArray[np.uint8],
        phrases: Sequence[str],
        output: DetectionOutput,
        decoding: Decoding,
        plan: DetectionPlan,
        *,
        keypoints: Sequence[str] = (),
    ) -> Detections:
        """Find all instances of each phrase by a plan.

        Every request is run by itself, image and all, and may have `decoding.max_new_tokens`; the
        trace adds them up and notes how many there were.

        Raises:
            models.base.Unsupported: The model cannot give this output, or not under this plan.
            ValueError: Phrases are missing or the same to the model.
        """
        if output not in self.prompts:
            raise Unsupported(
                f"'{self.name}' finds {', '.join(self.facts.outputs)}, not {output!r}."
            )
        if output == "keypoint" and plan.constrained:
            raise Unsupported("the grammar mask knows boxes, points and polygons, no key points.")
        if plan.writing == "digits" and (output == "keypoint" or plan.constrained):
            raise Unsupported("digits have no key points and no grammar mask.")
        if (output == "keypoint") != bool(keypoints):
            raise ValueError("names of key points belong to the output 'keypoint' and to no other.")
        asked = [phrase_text(phrase) for phrase in phrases]
        if not asked or len({*asked}) != len(asked) or not all(asked):
            raise ValueError(f"phrases must be different and not empty, got {list(phrases)}.")
        size = plan.phrases_per_request or self.dialect.most_phrases.get(output) or len(asked)
        parts = []
        for first in range(0, len(asked), size):
            some = asked[first : first + size]
            text = self.prompts[output].format(
                phrases=", ".join(some), keypoints=", ".join(keypoints)
            )
            mask = None
            if plan.constrained:
                mask = GrammarMask(
                    self.grammar, some, _COORDINATES[output], decoding.max_new_tokens
                )
            answer, sure = self._ask(image, text, decoding, plan, mask)
            parts.append(
                self._read(answer, sure, some, output, image.shape, keypoints, plan.writing)
            )
        found = _joined(parts)
        instances = [each for phrase in found.found for each in phrase]
        found.trace.notes |= {
            "requests": len(parts),
            "instances": len(instances),
            "coordinate_tokens": sum(each.tokens for each in instances),
        }
        return found

    def read_text(
        self,
        image: npt.NDArray[np.uint8],
        decoding: Decoding,
        *,
        granularity: str = "word",
        output: DetectionOutput = "box",
    ) -> tuple[tuple[str, ...], Detections]:
        """Find text and read it: the names of the answer are what is written.

        Args:
            image: RGB, (height, width, 3), uint8.
            decoding: Length.
            granularity: What one instance is, `word` or `text line`.
            output: `box` or `polygon`.

        Returns:
            The texts, in the answer's order, and the instances of each.

        Raises:
            models.base.Unsupported: Points are asked for.
        """
        if output not in _READING:
            raise Unsupported(f"text is found in {' or '.join(_READING)}, not as {output!r}.")
        text = _READING[output].format(granularity=granularity)
        answer, sure = self._ask(image, text, decoding, DetectionPlan())
        parsed = parse(answer.token_ids, self.grammar, _COORDINATES[output])
        found = [self._instances(each.pieces, sure, output, image.shape) for each in parsed.found]
        names = tuple(each.name for each in parsed.found)
        return names, self._detections(answer, found, _all_errors(parsed))

    def detect_similar(
        self,
        image: npt.NDArray[np.uint8],
        boxes: Sequence[Sequence[float]],
        decoding: Decoding,
    ) -> Detections:
        """Find what looks like the things in some boxes: a visual prompt.

        Args:
            image: RGB, (height, width, 3), uint8.
            boxes: Reference boxes as edges x0, y0, x1, y1, pixels.
            decoding: Length.

        Returns:
            One tuple of instances, whatever the model calls them.
        """
        height, width = image.shape[:2]
        shown = ", ".join(
            "".join(
                f"<{quantise(value, height if place % 2 else width, self.bins)}>"
                for place, value in enumerate(box)
            )
            for box in boxes
        )
        answer, sure = self._ask(image, _SIMILAR.format(boxes=shown), decoding, DetectionPlan())
        parsed = parse(answer.token_ids, self.grammar, BOX)
        pieces = [piece for each in parsed.found for piece in each.pieces]
        found = [self._instances(pieces, sure, "box", image.shape)]
        return self._detections(answer, found, _all_errors(parsed))

    def _ask(
        self,
        image: npt.NDArray[np.uint8],
        text: str,
        decoding: Decoding,
        plan: DetectionPlan,
        mask: GrammarMask | None = None,
    ) -> tuple[VisualAnswer, list[float] | None]:
        """Run one request; return its answer and each token's log-probability."""
        penalty = plan.repetition_penalty
        seen = self.reader.prompt_ids(text, 1) if penalty != 1 else []
        self._ear.request = request = _Request(seen, penalty, mask, plan.scores)
        try:
            answer = self.reader.run(VisualPrompt(image=image, text=text), decoding, VisualPlan())
        finally:
            self._ear.request = None
        return answer, request.finish(answer.token_ids)

    def _read(
        self,
        answer: VisualAnswer,
        sure: list[float] | None,
        asked: Sequence[str],
        output: DetectionOutput,
        shape: Sequence[int],
        keypoints: Sequence[str],
        writing: Writing,
    ) -> Detections:
        found: list[list[Instance]] = [[] for _ in asked]
        places = {self._as_answered(phrase): place for place, phrase in enumerate(asked)}
        if output == "keypoint":
            poses = parse_keypoints(answer.token_ids, self.grammar, keypoints)
            errors = list(poses.errors)
            for pose in poses.found:
                # "person1" is an instance of "person".
                name = re.sub(r"[\s_]*\d+$", "", pose.name).replace("_", " ")
                if (place := places.get(_plain(name))) is None:
                    errors.append(f"{name[:40]!r} was not asked for")
                    continue
                points = [
                    None if bins is None else self._pixels(bins, shape)
                    for bins in pose.points.values()
                ]
                found[place].append(
                    Instance(
                        coordinates=_ordered(self._pixels(pose.box, shape)),
                        keypoints=tuple(
                            None if point is None else (point[0], point[1]) for point in points
                        ),
                        score=_score(sure, pose.places),
                        tokens=len(pose.places),
                    )
                )
            if not poses.complete:
                errors.append("the answer has no end")
            return self._detections(answer, found, errors)
        parsed = parse(answer.token_ids, self.grammar, _COORDINATES[output], writing)
        errors = _all_errors(parsed)
        missing = dict(places)
        for name, pieces in parsed.found:
            if (place := places.get(_plain(name))) is None:
                errors.append(f"{name[:40]!r} was not asked for")
                continue
            missing.pop(_plain(name), None)
            found[place] += self._instances(pieces, sure, output, shape)
        errors += [f"{asked[place]!r} was not answered" for place in missing.values()]
        return self._detections(answer, found, errors)

    def _instances(
        self,
        pieces: Sequence[Piece],
        sure: list[float] | None,
        output: DetectionOutput,
        shape: Sequence[int],
    ) -> list[Instance]:
        found = []
        for bins, first, end in pieces:
            pixels = self._pixels(bins, shape)
            found.append(
                Instance(
                    coordinates=_ordered(pixels) if output == "box" else pixels,
                    score=_score(sure, range(first, end)),
                    tokens=end - first,
                )
            )
        return found

    def _pixels(self, bins: Sequence[int], shape: Sequence[int]) -> tuple[float, ...]:
        """Return positions in the image as it was given: its resizing does not matter."""
        height, width = shape[:2]
        return tuple(
            dequantise(number, height if place % 2 else width, self.bins)
            for place, number in enumerate(bins)
        )

    def _as_answered(self, phrase: str) -> str:
        """Return a phrase as it comes back through the tokenizer."""
        return _plain(self.grammar.spell(self.grammar.encode(phrase)))

    def _detections(
        self, answer: VisualAnswer, found: Sequence[Sequence[Instance]], errors: Sequence[str]
    ) -> Detections:
        hub = self.reader.tokenizer.hub  # type: ignore[attr-defined]  # a HubTokenizer
        text = hub.decode(list(answer.token_ids), clean_up_tokenization_spaces=False)
        return Detections(
            token_ids=answer.token_ids,
            text=str(text),
            finish=answer.finish,
            trace=answer.trace,
            found=tuple(tuple(each) for each in found),
            format_errors=tuple(errors),
        )


class PlannedDetector(Wrapper):
    """A detector that follows a plan.

    Attributes:
        plan: How it is asked, and how its answer is taken.
    """

    facts: DetectorFacts  # type: ignore[assignment]  # those of what is wrapped

    def __init__(self, model: CoordinateDetector, plan: DetectionPlan) -> None:
        self._model = model
        self.name = model.name
        self.facts = model.facts
        self.plan = plan

    def detect(
        self,
        image: npt.NDArray[np.uint8],
        phrases: Sequence[str],
        output: DetectionOutput,
        decoding: Decoding,
        *,
        keypoints: Sequence[str] = (),
    ) -> Detections:
        """Find all instances of each phrase by the plan."""
        found: Detections = self._model.run(
            image, phrases, output, decoding, self.plan, keypoints=keypoints
        )
        return found


class _Request:
    """One answer in progress: what changes its logits, and what is kept of them."""

    def __init__(
        self, seen: Sequence[int], penalty: float, mask: GrammarMask | None, scores: bool
    ) -> None:
        self._seen = set(seen)
        self._penalty = penalty
        self._mask = mask
        self._log_probabilities: list[float] | None = [] if scores else None
        self._row: Tensor | None = None

    def heard(self, logits: Tensor) -> Tensor:
        """Take the logits of the next token, (1, vocab); return those that decide."""
        if self._log_probabilities is not None:
            self._row = logits[0]
        if self._penalty != 1 and self._seen:
            ids = torch.tensor(sorted(self._seen), device=logits.device)
            some = logits[:, ids]
            weaker = torch.where(some > 0, some / self._penalty, some * self._penalty)
            logits = logits.index_copy(1, ids, weaker)
        allowed = self._mask.allowed() if self._mask is not None else None
        if allowed is not None:
            ids = torch.tensor(sorted(allowed), device=logits.device)
            only = torch.full_like(logits, -torch.inf)
            logits = only.index_copy(1, ids, logits[:, ids])
        return logits

    def chose(self, token: int) -> None:
        """Take note of the token that followed."""
        if self._log_probabilities is not None and self._row is not None:
            self._log_probabilities.append(float(self._row.log_softmax(-1)[token]))
            self._row = None
        self._seen.add(token)
        if self._mask is not None and self._mask.allowed() is not None:
            self._mask.advance(token)

    def finish(self, token_ids: Sequence[int]) -> list[float] | None:
        """Return the log-probability of each token of the answer; None if they are not kept."""
        if self._log_probabilities is None:
            return None
        if self._row is not None and len(self._log_probabilities) < len(token_ids):
            self.chose(token_ids[-1])
        return self._log_probabilities


class _ListeningDecoder(PrunableDecoder):
    """A decoder whose logits a request hears, and may change, before a token is chosen."""

    request: _Request | None = None

    def prefill(self, tokens: PromptTokens, *args: Any, **options: Any) -> tuple[Tensor, float]:
        logits, flops = super().prefill(tokens, *args, **options)
        return logits if self.request is None else self.request.heard(logits), flops

    def step(self, token: int) -> Tensor:
        if self.request is None:
            return super().step(token)
        self.request.chose(token)
        return self.request.heard(super().step(token))


def grammar_of(reader: VisionLanguage) -> Grammar:
    """Return the grammar in a model's own ids.

    Raises:
        models.base.Unsupported: The tokenizer lacks markers or coordinate tokens.
    """
    hub = reader.tokenizer.hub  # type: ignore[attr-defined]  # a HubTokenizer
    vocabulary: Mapping[str, int] = hub.get_vocab()
    markers = {}
    for marker in ("object_ref_start", "object_ref_end", "box_start", "box_end"):
        if f"<|{marker}|>" not in vocabulary:
            raise Unsupported(f"'{reader.name}' has no token <|{marker}|> to write boxes with.")
        markers[marker] = vocabulary[f"<|{marker}|>"]
    coordinates: dict[int, int] = {}
    while (token := vocabulary.get(f"<{len(coordinates)}>")) is not None:
        coordinates[token] = len(coordinates)
    if len(coordinates) < 2:
        raise Unsupported(f"'{reader.name}' has no coordinate tokens <0>, <1>, ...")

    def spell(ids: Sequence[int]) -> str:
        return str(hub.decode(list(ids), clean_up_tokenization_spaces=False))

    def encode(text: str) -> list[int]:
        return list(hub(text, add_special_tokens=False).input_ids)

    return Grammar(
        name_start=markers["object_ref_start"],
        name_end=markers["object_ref_end"],
        box_start=markers["box_start"],
        box_end=markers["box_end"],
        coordinates=coordinates,
        ends=reader.facts.text.eos_ids,
        spell=spell,
        encode=encode,
    )


def phrase_text(phrase: str) -> str:
    """Return a phrase as Rex-Omni's training has it: commas, which separate, are left out.

    Underscores become spaces and what follows a slash is dropped: names of categories come as
    `dog_house` or `mug/cup`.
    """
    return " ".join(phrase.partition("/")[0].replace("_", " ").replace(",", " ").split()).lower()


def _plain(text: str) -> str:
    return " ".join(text.split()).lower()


def _ordered(box: tuple[float, ...]) -> tuple[float, ...]:
    """Return a box with its corners in order."""
    x0, y0, x1, y1 = box
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


def _score(sure: list[float] | None, places: Sequence[int]) -> float | None:
    if sure is None:
        return None
    some = torch.tensor([sure[place] for place in places], dtype=torch.float64)
    return float(some.mean().exp())


def _all_errors(parsed: Parsed) -> list[str]:
    return parsed.errors + ([] if parsed.complete else ["the answer has no end"])


def _joined(parts: Sequence[Detections]) -> Detections:
    """Return the answers of several requests as one; their times of phases are the last one's."""
    if len(parts) == 1:
        return parts[0]
    trace = Trace()
    for part in parts:
        trace.prefill += part.trace.prefill
        trace.forwards += part.trace.forwards
        trace.accepted += part.trace.accepted
        trace.flops += part.trace.flops
        trace.kv_bytes += part.trace.kv_bytes
    # The phases of several requests alternate, so only the end of the whole is a phase.
    trace.marks = {"decode": parts[-1].trace.marks["decode"]}
    cut = next((part.finish for part in parts if part.finish != "eos"), "eos")
    return replace(
        parts[0],
        token_ids=tuple(token for part in parts for token in part.token_ids),
        text="\n".join(part.text for part in parts),
        finish=cut,
        trace=trace,
        found=tuple(each for part in parts for each in part.found),
        format_errors=tuple(error for part in parts for error in part.format_errors),
    )


def load_detector(
    folder: Path, model_id: str, settings: LoadSettings, tokenizer_folder: Path
) -> CoordinateDetector:
    """Load a detector from a folder laid out like the hub's; see `load_vision_language`.

    Raises:
        ModelError: transformers cannot read it, or `detector.json` is not as it must be.
        models.base.Unsupported: Another kind of model, or one without coordinate tokens.
    """
    reader = load_vision_language(folder, model_id, settings, tokenizer_folder)
    return CoordinateDetector(reader, read_dialect(folder))
