"""Text encoders: sentence-transformers' models, and causal language models read through a prompt.

`load_encoder` makes one of a folder. `CausalEncoder.embed` is what methods build on: it runs the
layers up to the one that is read, lets a method change what goes into each of them, and can put one
token with an embedding of its own before the quoted sentence.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from models.base import EncoderFacts, Encoding, Forward, Trace, Unsupported
from models.device import OnDevice
from models.loading import LoadSettings, ModelError, load_causal_module, quiet_transformers
from models.tokenization import HubTokenizer

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PromptName = Literal["plain", "prompteol", "cot", "knowledge", "metaeol", "echo"]
Pooling = Literal["last", "mean"]

_EOL = 'this sentence :{placeholder} "{text}" means in one word:"'
# The eight tasks of MetaEOL, arXiv 2402.18458, two each of topic, sentiment, paraphrase and
# extraction. Wording as its users run it; it is a setting of the method and changes the numbers.
_META = (
    "you're presented with a text excerpt. Your task is to categorize the excerpt into a broad "
    "category such as 'Education', 'Technology', 'Health', 'Business', 'Environment', 'Politics', "
    "or 'Culture'. These categories help in organizing content for better accessibility and "
    'targeting. For this task, this sentence :{placeholder} "{text}" should be classified under '
    'one general category in one word:"',
    "you're given a statement and you need to determine whether it's presenting an 'Opinion' or a "
    "'Fact'. This distinction is vital for information verification, educational purposes, and "
    'content analysis. For this task, this sentence :{placeholder} "{text}" discriminates between '
    'opinion and fact in one word:"',
    "you're given a review from an online platform. Your task is to generate a rating for the "
    "product based on the review on a scale of 1-5, where 1 means 'extremely negative' and 5 means "
    "'extremely positive'. For this task, this sentence :{placeholder} \"{text}\" reflects the "
    'sentiment in one word:"',
    "you're reading a personal diary entry. Your task is to identify the predominant emotion "
    "expressed, such as joy, sadness, anger, fear, or love. For this task, this sentence "
    ':{placeholder} "{text}" conveys the emotion in one word:"',
    "you're presented with two sentences. Your task is to assess whether the sentences convey the "
    "same meaning. Use 'identical', 'similar', 'different', or 'unrelated' to describe the "
    f"relationship. To enhance the performance of this task, {_EOL}",
    "you're given a sentence and a phrase. Your task is to determine if the phrase can be a "
    "contextual synonym within the given sentence. Options include 'yes', 'no', or 'partially'. To "
    f"enhance the performance of this task, {_EOL}",
    "you're examining a news article. Your task is to extract the most critical fact from the "
    'article. For this task, this sentence :{placeholder} "{text}" encapsulates the key fact in '
    'one word:"',
    "you're reviewing a scientific abstract. Your task is to identify the main entities (e.g., "
    "proteins, diseases) and their relations (e.g., causes, treats). For this task, this sentence "
    ':{placeholder} "{text}" highlights the primary entity or relation in one word:"',
)
# `{text}` is the text, `{placeholder}` where a method's token goes. Several templates: the mean of
# their embeddings.
TEMPLATES: dict[PromptName, tuple[str, ...]] = {
    "plain": ("{placeholder}{text}",),
    # PromptEOL, arXiv 2307.16645.
    "prompteol": (f"T{_EOL[1:]}",),
    # Pretended chain of thought and knowledge enhancement, arXiv 2404.03921.
    "cot": (f"After thinking step by step , {_EOL}",),
    "knowledge": (
        "The essence of a sentence is often captured by its main subjects and actions, while "
        "descriptive terms provide additional but less central details. With this in mind , "
        f"{_EOL}",
    ),
    "metaeol": tuple(f"In this task, {task}" for task in _META),
    # Echo embeddings, arXiv 2402.15449: the second time a token has seen the whole text.
    "echo": ("Rewrite the sentence:{placeholder} {text}, rewritten sentence: {text}",),
}


@dataclass(frozen=True, kw_only=True)
class ReadOut:
    """Where a causal language model's embedding is read; all that its vectors depend on.

    Attributes:
        prompt: Template around the text, a key of `TEMPLATES`; `plain` is the bare text.
        layer: Index into the hidden states as transformers counts them: 0 is the embedding, k the
            input of layer k, and the number of layers the output after the final norm. Negative
            counts from that one, -1. Layers behind it are not run.
        pooling: `last` takes the prompt's last token, `mean` the mean over the text's tokens (of
            its last occurrence, without the prompt's).
        max_tokens: Tokens of the text that are kept; the prompt around it is never cut.
    """

    prompt: PromptName = "prompteol"
    layer: int = -1
    pooling: Pooling = "last"
    max_tokens: int = 128

    def __post_init__(self) -> None:
        if self.prompt not in TEMPLATES:
            raise ValueError(f"prompt must be one of {', '.join(TEMPLATES)}, got {self.prompt!r}.")
        if self.pooling not in get_args(Pooling):
            raise ValueError(f"pooling must be 'last' or 'mean', got {self.pooling!r}.")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}.")

    def depth(self, num_layers: int) -> int:
        """Return the index of the hidden state that is read, which is how many layers are run.

        Raises:
            ValueError: The model has no such layer.
        """
        depth = self.layer + num_layers + 1 if self.layer < 0 else self.layer
        if not 0 <= depth <= num_layers:
            raise ValueError(
                f"layer must lie in [{-num_layers - 1}, {num_layers}] for a model of {num_layers} "
                f"layers, got {self.layer}."
            )
        return depth


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How texts are put together for the device; it changes time, not vectors.

    Attributes:
        batch_size: Prompts of one forward.
        sort_by_length: Longest first, so that little is padded; otherwise as they come.
    """

    batch_size: int = 16
    sort_by_length: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}.")

    def batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yield the indices of each batch, for texts of the given numbers of tokens."""
        order = list(range(len(lengths)))
        if self.sort_by_length:
            order.sort(key=lambda index: -lengths[index])
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]


@dataclass(frozen=True)
class Prompt:
    """The tokens of one prompt.

    Attributes:
        ids: All of them.
        text_tokens: Indices of those of the text, its last occurrence.
        placeholder: Index of the placeholder, whose id is 0 and means nothing; None without one.
    """

    ids: list[int]
    text_tokens: range
    placeholder: int | None = None


@dataclass(frozen=True)
class PromptBatch:
    """Prompts padded on the left, so that the last column is each prompt's last token.

    Attributes:
        ids: (batch, tokens).
        mask: False on padding, (batch, tokens).
        positions: Counted from each prompt's own first token, (batch, tokens).
        placeholder: Column of each row's placeholder, (batch,); None without one.
        text_tokens: True on the tokens that `mean` averages, (batch, tokens).
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    placeholder: Tensor | None
    text_tokens: Tensor


# Called before each layer that is run, with its index, its input (batch, tokens, dimension) and the
# batch; returns the input to use instead, or None for no change.
BeforeLayer = Callable[[int, Tensor, PromptBatch], "Tensor | None"]


class _Reached(Exception):  # a signal, no error
    """Ends a forward where its hidden state is read, so that the layers behind it do not run."""


class _Layer(NamedTuple):
    module: nn.Module
    parameters: int


class CausalEncoder(OnDevice):
    """A `models.base.TextEncoder` over a causal language model of transformers.

    Attributes:
        module: The transformers model, in evaluation mode.
        tokenizer: Its tokenizer.
        name: Id of the model, for messages and tables.
        read_out: What `encode` reads.
        batching: How `encode` puts texts together.
        facts: Sizes, up to the layer that `read_out` names.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: HubTokenizer,
        name: str,
        *,
        read_out: ReadOut | None = None,
        batching: Batching | None = None,
    ) -> None:
        """Wrap a module.

        Args:
            module: A `…ForCausalLM` of transformers.
            tokenizer: Its tokenizer, one that knows where in the text each token stands.
            name: Id of the model.
            read_out: PromptEOL at the last layer when None.
            batching: The defaults when None.

        Raises:
            models.base.Unsupported: The decoder's layers cannot be found, or the tokenizer knows no
                places.
        """
        module.eval()
        self.module: Any = module
        self.tokenizer = tokenizer
        self.name = name
        if not getattr(tokenizer.hub, "is_fast", False):
            raise Unsupported(f"the tokenizer of '{name}' does not say where its tokens stand.")
        # Without the output head.
        self.body: Any = cast(Any, module).get_decoder()
        self._layers = [
            _Layer(layer, sum(matrix.weight.numel() for matrix in _matrices(layer)))
            for layer in _decoder_layers(self.body, name)
        ]
        self.batching = batching or Batching()
        self.read_out = read_out or ReadOut()
        self.facts = self._facts()

    def configured(
        self, *, read_out: ReadOut | None = None, batching: Batching | None = None
    ) -> CausalEncoder:
        """Return an encoder over the same weights with other settings; None keeps them."""
        changed = copy.copy(self)
        changed.read_out = read_out or self.read_out
        changed.batching = batching or self.batching
        changed.facts = changed._facts()
        return changed

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model, read or not."""
        return len(self._layers)

    @property
    def dimension(self) -> int:
        """Numbers of a hidden state."""
        return int(self.module.config.get_text_config().hidden_size)

    def encode(self, texts: Sequence[str]) -> Encoding:
        """Embed texts by `read_out`."""
        return self.embed(texts)

    def embed(
        self,
        texts: Sequence[str],
        *,
        before_layer: BeforeLayer | None = None,
        placeholder: Tensor | None = None,
    ) -> Encoding:
        """Embed texts by `read_out`, with the changes that a method makes.

        Args:
            texts: Any number of them.
            before_layer: See `BeforeLayer`; layer 0 included, layers that are not run left out.
            placeholder: Row of the embedding matrix for one new token, which goes to the template's
                place for it, (dimension,); None puts no token there. The prompt's other tokens are
                the same either way, so it is exactly one token longer.

        Raises:
            ValueError: A prompt is longer than the model's context, or `read_out` names a layer
                that the model does not have.
        """
        trace = Trace()
        templates = TEMPLATES[self.read_out.prompt]
        prompts = [
            self._prompt(template, text, with_placeholder=placeholder is not None)
            for text in (self._cut(text) for text in texts)
            for template in templates
        ]
        trace.mark("tokenized", self.synchronize)
        depth = self.read_out.depth(self.num_layers)
        vectors = np.zeros((len(prompts), self.dimension), dtype=np.float32)
        lengths = [len(prompt.ids) for prompt in prompts]
        padded = 0
        for rows in self.batching.batches(lengths):
            batch = self._padded([prompts[row] for row in rows])
            padded += batch.ids.numel()
            with torch.inference_mode():
                states = self._hidden_states(batch, depth, before_layer, placeholder)
                vectors[rows] = _pooled(states, batch, self.read_out.pooling).float().cpu().numpy()
        trace.mark("encoded", self.synchronize)
        trace.prefill = [Forward(length, 0) for length in lengths]
        trace.flops = sum(self._flops(length, depth) for length in lengths)
        trace.notes |= {"layers": depth, "padded_tokens": padded}
        per_text = len(templates)
        return Encoding(
            vectors=vectors.reshape(len(texts), per_text, self.dimension).mean(axis=1),
            token_counts=tuple(
                sum(lengths[start : start + per_text]) for start in range(0, len(lengths), per_text)
            ),
            trace=trace,
        )

    def prompts(self, text: str, *, with_placeholder: bool = False) -> list[Prompt]:
        """Return the prompts of a text, one for each template."""
        text = self._cut(text)
        return [
            self._prompt(template, text, with_placeholder=with_placeholder)
            for template in TEMPLATES[self.read_out.prompt]
        ]

    def _cut(self, text: str) -> str:
        """Return the text up to its last token that is kept."""
        ends = [end for start, end in self._tokens(text).places if end > start]
        limit = self.read_out.max_tokens
        return text[: ends[limit - 1]] if len(ends) > limit else text

    def _prompt(self, template: str, text: str, *, with_placeholder: bool) -> Prompt:
        if '"{text}"' in template:
            text = cleaned(text)
        before, after = template.split("{placeholder}")
        pieces = after.split("{text}")
        whole = before + text.join(pieces)
        end = len(whole) - len(pieces[-1])
        ids, places = self._tokens(whole)
        inside = [
            index
            for index, (first, last) in enumerate(places)
            if first < end and last > end - len(text) and last > first
        ]
        tokens = range(inside[0], inside[-1] + 1) if inside else range(len(ids) - 1, len(ids))
        if not with_placeholder:
            return Prompt(ids, tokens)
        # Before the token that holds the first character behind the mark that is no space: the
        # quotation mark, or the text where nothing is quoted.
        mark = len(before) + len(pieces[0]) - len(pieces[0].lstrip())
        index = next(
            (index for index, (first, last) in enumerate(places) if last > max(first, mark)),
            len(ids) - 1,
        )
        ids = [*ids[:index], 0, *ids[index:]]
        shift = index <= tokens.start
        return Prompt(ids, range(tokens.start + shift, tokens.stop + shift), index)

    def _tokens(self, text: str) -> _Tokens:
        """Return ids and places of a text, without special tokens behind it.

        A text without any token is read as one special token, for there is nothing else to read.
        """
        hub = self.tokenizer.hub
        found = hub(text, return_offsets_mapping=True, truncation=False, verbose=False)
        ids, places = list(found["input_ids"]), list(found["offset_mapping"])
        special = set(hub.all_special_ids)
        while len(ids) > 1 and ids[-1] in special and places[-1][0] == places[-1][1]:
            ids.pop()
            places.pop()
        if not ids:
            ends = (hub.bos_token_id, hub.eos_token_id, 0)
            ids, places = [next(each for each in ends if each is not None)], [(0, 0)]
        return _Tokens(ids, places)

    def _padded(self, prompts: Sequence[Prompt]) -> PromptBatch:
        longest = max(len(prompt.ids) for prompt in prompts)
        limit = self.module.config.get_text_config().max_position_embeddings
        if longest > limit:
            raise ValueError(
                f"a prompt has {longest} tokens, the context of '{self.name}' is {limit}: set "
                f"max_tokens, now {self.read_out.max_tokens}, lower."
            )
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask, text_tokens = (torch.zeros(ids.shape, dtype=torch.bool) for _ in range(2))
        placeholders = []
        for row, prompt in enumerate(prompts):
            start = longest - len(prompt.ids)
            ids[row, start:] = torch.tensor(prompt.ids)
            mask[row, start:] = True
            tokens = prompt.text_tokens
            text_tokens[row, start + tokens.start : start + tokens.stop] = True
            if prompt.placeholder is not None:
                placeholders.append(start + prompt.placeholder)
        device = self.device
        return PromptBatch(
            ids.to(device),
            mask.to(device),
            (mask.cumsum(1) - 1).clamp(min=0).to(device),
            torch.tensor(placeholders, device=device) if placeholders else None,
            text_tokens.to(device),
        )

    def _hidden_states(
        self,
        batch: PromptBatch,
        depth: int,
        before_layer: BeforeLayer | None,
        placeholder: Tensor | None,
    ) -> Tensor:
        """Return the hidden states at `depth`, (batch, tokens, dimension)."""
        reached: list[Tensor] = []

        def embedded(module: nn.Module, args: Any, states: Tensor) -> Tensor:
            assert placeholder is not None
            row = placeholder.to(states)
            # Gemma's embedding scales its rows; the new one is a row like them.
            row = row * torch.as_tensor(getattr(module, "embed_scale", 1.0)).to(states)
            states = states.clone()
            states[torch.arange(len(states), device=states.device), batch.placeholder] = row
            return states

        def hook(index: int) -> Callable[..., Any]:
            def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
                states = args[0] if args else kwargs["hidden_states"]
                if index == depth:
                    reached.append(states)
                    raise _Reached
                changed = before_layer(index, states, batch) if before_layer else None
                if changed is None:
                    return None
                if args:
                    return (changed, *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": changed}

            return before

        with ExitStack() as stack:
            if placeholder is not None:
                embedding = self.module.get_input_embeddings()
                stack.enter_context(_removed(embedding.register_forward_hook(embedded)))
            for index in range(min(depth + 1, self.num_layers)):
                if before_layer is None and index != depth:
                    continue
                handle = self._layers[index].module.register_forward_pre_hook(
                    hook(index), with_kwargs=True
                )
                stack.enter_context(_removed(handle))
            try:
                output = self.body(
                    input_ids=batch.ids,
                    attention_mask=batch.mask.long(),
                    position_ids=batch.positions,
                    use_cache=False,
                )
            except _Reached:
                return reached[0]
        states: Tensor = output.last_hidden_state
        return states

    def _flops(self, tokens: int, depth: int) -> float:
        config = self.module.config.get_text_config()
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        matrices = sum(layer.parameters for layer in self._layers[:depth])
        # Scores and weighted values, causal: token t sees t tokens.
        attention = 4.0 * depth * heads * head_dim * tokens * (tokens + 1) / 2
        return float(2.0 * matrices * tokens + attention)

    def _facts(self) -> EncoderFacts:
        depth = self.read_out.depth(self.num_layers)
        matrices = sum(layer.parameters for layer in self._layers[:depth])
        parameter = next(self.module.parameters())
        return EncoderFacts(
            dimension=self.dimension,
            num_layers=depth,
            max_tokens=self.read_out.max_tokens,
            matrix_parameters=matrices,
            weight_bytes=matrices * parameter.element_size(),
            dtype=str(parameter.dtype).removeprefix("torch."),
        )


class SentenceEncoder(OnDevice):
    """A `models.base.TextEncoder` over a model of sentence-transformers, with its own pooling.

    Attributes:
        module: The sentence-transformers model, in evaluation mode.
        name: Id of the model, for messages and tables.
        batching: How `encode` puts texts together.
        max_tokens: Tokens of a text that are read, special ones included.
        facts: Sizes.
    """

    def __init__(
        self,
        module: SentenceTransformer,
        name: str,
        *,
        max_tokens: int | None = None,
        batching: Batching | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            module: The model.
            name: Its id.
            max_tokens: The model's own limit when None; never more than that.
            batching: The defaults when None.
        """
        self.module: Any = module.eval()
        self.name = name
        self.batching = batching or Batching()
        self._limit = int(self.module.max_seq_length or 512)
        self.max_tokens = min(max_tokens or self._limit, self._limit)
        self.facts = self._facts()

    def configured(
        self, *, max_tokens: int | None = None, batching: Batching | None = None
    ) -> SentenceEncoder:
        """Return an encoder over the same weights with other settings; None keeps them."""
        changed = copy.copy(self)
        changed.batching = batching or self.batching
        changed.max_tokens = min(max_tokens or self.max_tokens, self._limit)
        changed.facts = replace(self.facts, max_tokens=changed.max_tokens)
        return changed

    def encode(self, texts: Sequence[str]) -> Encoding:
        """Embed texts by the model's own modules."""
        trace = Trace()
        vectors = np.zeros((len(texts), self.facts.dimension), dtype=np.float32)
        features = self._preprocessed(list(texts)) if texts else {"attention_mask": torch.zeros(0)}
        trace.mark("tokenized", self.synchronize)
        mask = features["attention_mask"].bool()
        lengths = mask.sum(-1).tolist() if texts else []
        padded = 0
        for rows in self.batching.batches(lengths):
            # Columns that are padding in all rows go, on whichever side they are.
            columns = mask[rows].any(0)
            batch = {
                name: _part(value, rows, columns, mask.shape) for name, value in features.items()
            }
            padded += len(rows) * int(columns.sum())
            with torch.inference_mode():
                found = self.module(batch)["sentence_embedding"]
            vectors[rows] = found.float().cpu().numpy()
        trace.mark("encoded", self.synchronize)
        trace.prefill = [Forward(length, 0) for length in lengths]
        trace.flops = sum(self._flops(length) for length in lengths)
        trace.notes |= {"layers": self.facts.num_layers, "padded_tokens": padded}
        return Encoding(vectors=vectors, token_counts=tuple(lengths), trace=trace)

    def _preprocessed(self, texts: list[str]) -> dict[str, Any]:
        before = self.module.max_seq_length
        self.module.max_seq_length = self.max_tokens
        try:
            features = self.module.preprocess(texts)
        finally:
            self.module.max_seq_length = before
        return {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in features.items()
        }

    def _flops(self, tokens: int) -> float:
        hidden = self.module[0].model.config.hidden_size
        # Every token sees every other one: two products of `hidden` numbers for each pair.
        attention = 4.0 * self.facts.num_layers * hidden * tokens * tokens
        return float(2.0 * self.facts.matrix_parameters * tokens + attention)

    def _facts(self) -> EncoderFacts:
        backbone = self.module[0].model
        # BERT's pooler sees one token, and its output is not used.
        pooler = set(_matrices(backbone.pooler)) if getattr(backbone, "pooler", None) else set()
        matrices = sum(
            matrix.weight.numel() for matrix in _matrices(backbone) if matrix not in pooler
        )
        parameter = next(self.module.parameters())
        return EncoderFacts(
            dimension=int(self.module.get_embedding_dimension()),
            num_layers=int(backbone.config.num_hidden_layers),
            max_tokens=self.max_tokens,
            matrix_parameters=matrices,
            weight_bytes=matrices * parameter.element_size(),
            dtype=str(parameter.dtype).removeprefix("torch."),
        )


def load_encoder(
    folder: Path, model_id: str, settings: LoadSettings, tokenizer_folder: Path
) -> CausalEncoder | SentenceEncoder:
    """Load a text encoder.

    A folder with sentence-transformers' `modules.json`, or with a model that is no causal language
    model, becomes a `SentenceEncoder` (by mean pooling where it names none); a causal language
    model without `modules.json` becomes a `CausalEncoder`.

    Args:
        folder: Laid out like the hub's.
        model_id: Name of the model.
        settings: Device, dtype and attention kernel.
        tokenizer_folder: Where a causal model's tokenizer is.

    Raises:
        models.loading.ModelError: The files cannot be read, or weights are pickled.
        models.base.Unsupported: The model cannot be an encoder.
    """
    architectures = json.loads((folder / "config.json").read_text())["architectures"] or [""]
    is_causal = architectures[0].endswith(("ForCausalLM", "LMHeadModel"))
    if is_causal and not (folder / "modules.json").is_file():
        module, tokenizer = load_causal_module(folder, model_id, settings, tokenizer_folder)
        return CausalEncoder(module, HubTokenizer(tokenizer), model_id)
    return _load_sentence(folder, model_id, settings)


def cleaned(text: str) -> str:
    """Return a sentence as the quoting templates want it.

    It ends in a full stop unless it ends in `.`, `?` or a quotation mark; double quotation marks
    become single ones; a question mark at its end becomes a full stop. Source: arXiv 2412.11556,
    the authors' evaluation code, which has it from PromptEOL's.
    """
    if text and text[-1] not in ".?\"'":
        text += "."
    text = text.replace('"', "'")
    return f"{text[:-1]}." if text.endswith("?") else text


class _Tokens(NamedTuple):
    ids: list[int]
    places: list[tuple[int, int]]


def _pooled(states: Tensor, batch: PromptBatch, pooling: Pooling) -> Tensor:
    """Return one vector for each row of hidden states, (batch, dimension)."""
    if pooling == "last":
        return states[:, -1]
    weights = batch.text_tokens.to(torch.float32)
    summed = torch.einsum("bt,btd->bd", weights, states.float())
    return summed / weights.sum(1, keepdim=True)


def _part(value: Any, rows: list[int], columns: Tensor, shape: torch.Size) -> Any:
    if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != shape[0]:
        return value
    return value[rows][:, columns] if value.shape == shape else value[rows]


def _matrices(module: nn.Module) -> list[Any]:
    return [each for each in module.modules() if isinstance(each, (nn.Linear, Conv1D))]


def _decoder_layers(body: Any, name: str) -> list[nn.Module]:
    for attribute in ("layers", "h"):
        if isinstance(layers := getattr(body, attribute, None), nn.ModuleList):
            return list(layers)
    raise Unsupported(f"'{name}' is a {type(body).__name__} whose layers cannot be found.")


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _load_sentence(folder: Path, model_id: str, settings: LoadSettings) -> SentenceEncoder:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise Unsupported(
            f"'{model_id}' needs the package 'sentence-transformers', which is not installed: "
            "pip install sentence-transformers"
        ) from error
    # A module's own weights (a dense layer behind the pooling) are loaded by its own code.
    for pickled in (*folder.glob("*/*.bin"), *folder.glob("*/*.pt")):
        if not any(pickled.parent.glob("*.safetensors")):
            raise ModelError(f"{pickled} is pickled and not loaded: convert it to safetensors.")
    options = {
        "dtype": getattr(torch, settings.dtype_name()),
        "attn_implementation": settings.attention,
        "use_safetensors": True,
    }
    try:
        with quiet_transformers():
            module = SentenceTransformer(
                str(folder),
                device=settings.device_name(),
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs=options,
            )
    except (OSError, ValueError) as error:
        raise ModelError(f"'{model_id}' cannot be loaded: {error}") from error
    return SentenceEncoder(module, model_id)
