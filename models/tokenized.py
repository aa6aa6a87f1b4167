"""Language models together with their tokenizers, and surgery on what joins the two.

A causal language model is a body between two tables with a row for each token: the input embedding
and the output head, often one and the same. `CausalTokenizedLM.with_vocabulary` puts other tables
and another tokenizer around the same body. The wrapped weights are never written to: the new object
has tables of its own and shares everything else.

Whose tables are those of a *donor*: a tokenizer with an embedding, which need not be a language
model. Tokens of different tokenizers are compared by `TokenKey`, not by their spelling in a file.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from safetensors import safe_open
from torch import Tensor, nn

from models.base import (
    Decoding,
    Forward,
    Generation,
    InvalidOutput,
    TextScore,
    TokenizedLM,
    Tokenizer,
    Trace,
    Unsupported,
)
from models.constraints import byte_fallback, byte_level
from models.loading import (
    LoadSettings,
    ModelError,
    donor_folders,
    load_causal_module,
    quiet_transformers,
)
from models.text import CausalLM, model_facts
from models.tokenization import HubTokenizer

WINDOW = 512
"""Tokens of one forward when a text is scored. Half of each further window is context."""

_LOGIT_ROWS = 64  # rows of logits in double precision at a time

# Tokens that play one part each; a tokenizer may call it by several names.
ROLES: Mapping[str, tuple[str, ...]] = {
    "start": ("bos_token", "cls_token"),
    "end": ("eos_token", "sep_token"),
    "padding": ("pad_token",),
    "unknown": ("unk_token",),
    "mask": ("mask_token",),
}

# Where the tables lie in files of weights, by the ends of their names.
_INPUT_NAMES = (
    "embed_tokens.weight",
    "word_embeddings.weight",
    "wte.weight",
    "embed_in.weight",
    "shared.weight",
    "token_embedding.weight",
)
_OUTPUT_NAMES = ("lm_head.weight", "embed_out.weight", "predictions.decoder.weight")

# Donors that come with the project and are no models.


class TokenKey(NamedTuple):
    """What a token stands for, whatever its tokenizer writes it like.

    Attributes:
        kind: `word` begins a word (a space goes before it), `inner` goes on without a space,
            `byte` is the fallback for one byte, `special` has no text.
        content: The bytes that it adds, that space left out; of a special token its name.
    """

    kind: Literal["word", "inner", "byte", "special"]
    content: bytes


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens as keys.

    Attributes:
        keys: By id; None for ids that no token has. A tokenizer may have several ids for a key.
        roles: Ids of the tokens that play a part, by the names in `ROLES`. `start` is what texts
            begin with, see `start_token`.
    """

    keys: tuple[TokenKey | None, ...]
    roles: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.keys)


class Donor(NamedTuple):
    """A tokenizer and the tables that belong to it.

    Attributes:
        tokenizer: Text to ids.
        vocabulary: Its tokens.
        input_rows: Input embedding, (rows, width), float32; rows may be more than tokens.
        output_rows: Output head, (rows, width); None where there is none, or where it is the input
            embedding.
    """

    tokenizer: Tokenizer
    vocabulary: Vocabulary
    input_rows: Tensor
    output_rows: Tensor | None


class PlainTokenizer(HubTokenizer):
    """A tokenizer of transformers that puts nothing around a text and cuts nothing off."""

    def __init__(self, hub: Any) -> None:
        """Wrap a tokenizer, which is changed: no truncation, no padding, no prettier decoding."""
        super().__init__(hub)
        backend = getattr(hub, "backend_tokenizer", None)
        if backend is not None:
            from tokenizers import decoders

            decoder = json.loads(backend.to_str())["decoder"] or {}
            if decoder.get("type") == "WordPiece":
                # Its clean-up takes out spaces, which no byte count would forgive.
                backend.decoder = decoders.WordPiece(prefix=decoder["prefix"], cleanup=False)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` alone."""
        return list(self.hub(text, add_special_tokens=False).input_ids)


@runtime_checkable
class ReplaceableVocabulary(TokenizedLM, Protocol):
    """A tokenized language model whose tokens are rows of tables that can be exchanged."""

    is_tied: bool

    @property
    def vocabulary(self) -> Vocabulary:
        """Its tokens."""
        ...

    @property
    def input_rows(self) -> Tensor:
        """Input embedding, (rows, width). Not to be written to."""
        ...

    @property
    def output_rows(self) -> Tensor:
        """Output head, (rows, width); the input embedding itself where `is_tied`."""
        ...

    def with_vocabulary(
        self,
        tokenizer: Tokenizer,
        vocabulary: Vocabulary,
        input_rows: Tensor,
        output_rows: Tensor | None = None,
    ) -> CausalTokenizedLM:
        """Return the same body between other tables."""
        ...


class CausalTokenizedLM:
    """A `models.base.TokenizedLM` over a causal language model of transformers.

    Attributes:
        module: The transformers model, in evaluation mode.
        tokenizer: Text to ids and back.
        vocabulary: The tokenizer's tokens.
        name: Id of the model, for messages and tables.
        facts: Its sizes; `eos_ids` are those of this tokenizer.
        is_tied: Whether input embedding and output head are one table.
        window: Longest run of tokens that is fed at a time.
        absent: Ids that get no probability because there is no row for them; None for none.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Tokenizer,
        name: str,
        vocabulary: Vocabulary | None = None,
        *,
        window: int = WINDOW,
    ) -> None:
        """Wrap a module.

        Args:
            module: A `…ForCausalLM` of transformers.
            tokenizer: Its tokenizer.
            name: Id of the model.
            vocabulary: The tokenizer's tokens; read from one of transformers when None.
            window: Longest run of tokens that is fed at a time.

        Raises:
            models.base.Unsupported: Its output head has a bias, one number a token that no table
                of another tokenizer has; or its layers keep a state that is no cache.
        """
        self.module: Any = module.eval()
        self.tokenizer = tokenizer
        if vocabulary is None:
            vocabulary = vocabulary_of(getattr(tokenizer, "hub", None))
        self.vocabulary = vocabulary
        self.name = name
        embedding, head = _table_layers(module)
        if getattr(head, "bias", None) is not None:
            raise Unsupported(f"the output head of '{name}' has a bias, one number for each token.")
        self.is_tied = head.weight is embedding.weight
        self._generator = CausalLM(module, tokenizer, name, kernels="transformers")
        self.kernels = self._generator.kernels
        facts = model_facts(self.module)
        ends = {token for token in facts.eos_ids if token < len(vocabulary)}
        if "end" in vocabulary.roles:
            ends.add(vocabulary.roles["end"])
        self.facts = replace(facts, eos_ids=frozenset(ends))
        self._generator.facts = self.facts
        if window < 2:
            raise ValueError(f"window must be at least 2 tokens, got {window}.")
        self.window = min(window, self.facts.max_positions)
        self.absent: Tensor | None = None

    @property
    def input_rows(self) -> Tensor:
        """Input embedding, (rows, width). Not to be written to."""
        rows: Tensor = self.module.get_input_embeddings().weight
        return rows.detach()

    @property
    def output_rows(self) -> Tensor:
        """Output head, (rows, width); the input embedding itself where `is_tied`."""
        rows: Tensor = self.module.get_output_embeddings().weight
        return rows.detach()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._generator.device

    def synchronize(self) -> None:
        """Wait until the device has finished what it was given."""
        self._generator.synchronize()

    @torch.inference_mode()
    def score(self, text: str) -> TextScore:
        """Return what it costs to code `text`, its first token included.

        Every window begins with the start token, in front of the text or in the place of what was
        cut off. A text of at most `window` tokens is read in one forward. Of a longer one each
        further window holds half a window of known tokens as context before the new ones.

        Raises:
            InvalidOutput: The model gave a token no finite cost.
            Unsupported: The tokenizer has no token that a text could begin with.
        """
        start = self._start()
        token_ids = self.tokenizer.encode(text)
        trace = Trace()
        bits: list[Tensor] = []
        for window in windows(len(token_ids), self.window):
            fed = [start, *token_ids[window.begin : window.end - 1]]
            trace.prefill.append(Forward(len(fed), 0))
            logits = self._logits(fed)
            known = window.first - window.begin
            targets = torch.tensor(token_ids[window.first : window.end], device=logits.device)
            bits.append(_bits(logits[known:], targets))
        costs = torch.cat(bits).tolist() if bits else []
        trace.flops = sum(self.facts.flops(forward) for forward in trace.prefill)
        trace.kv_bytes = sum(self.facts.kv_read(forward) for forward in trace.prefill)
        trace.mark("prefill", self.synchronize)
        if not all(cost < float("inf") for cost in costs):  # NaN is not below either
            raise InvalidOutput(f"'{self.name}' gave a token of the text no finite cost.")
        return TextScore(
            tuple(token_ids),
            tuple(costs),
            len(text.encode()),
            self.tokenizer.decode(token_ids),
            trace,
        )

    def generate(self, prompt: str, decoding: Decoding) -> Generation:
        """Continue `prompt`, with the start token in front of it, greedily or sampled.

        Raises:
            Unsupported: Some tokens have no row.
        """
        if self.absent is not None and len(self.absent):
            raise Unsupported(f"{len(self.absent)} tokens of '{self.name}' have no row to write.")
        return self._generator.generate([self._start(), *self.tokenizer.encode(prompt)], decoding)

    def with_vocabulary(
        self,
        tokenizer: Tokenizer,
        vocabulary: Vocabulary,
        input_rows: Tensor,
        output_rows: Tensor | None = None,
    ) -> CausalTokenizedLM:
        """Return the same body between other tables; this object and its weights stay as they are.

        Args:
            tokenizer: Whose ids the rows belong to.
            vocabulary: Its tokens.
            input_rows: Input embedding, (rows, width); not copied where dtype and device fit.
            output_rows: Output head, (rows, width); None where it is the input embedding.

        Raises:
            ValueError: The tables do not fit the body, one another, or the vocabulary.
        """
        width = self.input_rows.shape[1]
        for name, rows in (("input_rows", input_rows), ("output_rows", output_rows)):
            if rows is not None and (
                rows.shape[0] != input_rows.shape[0] or rows.shape[1] != width
            ):
                raise ValueError(
                    f"{name} must be ({input_rows.shape[0]}, {width}), got {tuple(rows.shape)}."
                )
        if len(input_rows) < len(vocabulary):
            raise ValueError(f"{len(input_rows)} rows are too few for {len(vocabulary)} tokens.")
        module = _with_tables(self.module, input_rows, output_rows)
        ends = {self.vocabulary.keys[token] for token in self.facts.eos_ids}
        eos_ids = {
            number
            for number, key in enumerate(vocabulary.keys)
            if key is not None and key.kind == "special" and key in ends
        }
        _set_ids(module, len(input_rows), vocabulary.roles, eos_ids)
        return CausalTokenizedLM(module, tokenizer, self.name, vocabulary, window=self.window)

    def _start(self) -> int:
        if "start" not in self.vocabulary.roles:
            raise Unsupported(
                f"the tokenizer of '{self.name}' has no token that a text could begin with."
            )
        return self.vocabulary.roles["start"]

    def _logits(self, token_ids: Sequence[int]) -> Tensor:
        output = self.module(
            input_ids=torch.tensor([token_ids], device=self.device), use_cache=False
        )
        logits: Tensor = output.logits[0]
        if self.absent is not None:
            logits.index_fill_(1, self.absent.to(logits.device), -torch.inf)
        return logits


class Window(NamedTuple):
    """Tokens [begin, end) of a text are read at once, and those from `first` on are new."""

    begin: int
    first: int
    end: int


def windows(num_tokens: int, width: int) -> Iterator[Window]:
    """Yield the windows that a text is scored in: each token is new in exactly one of them.

    Args:
        num_tokens: Of the text.
        width: Tokens that are fed at a time, the start token included; at least 2. So the first
            window covers `width` tokens (the last of them is not fed), and a later one
            `width - width // 2` new ones behind `width // 2` known ones.
    """
    first = 0
    while first < num_tokens:
        begin = max(0, first - width // 2)
        end = min(begin + width, num_tokens)
        yield Window(begin, first, end)
        first = end


def vocabulary_of(hub: Any) -> Vocabulary:
    """Return the tokens of a fast tokenizer of transformers as keys.

    Read are byte-level alphabets (GPT-2's), SentencePiece's word mark, WordPiece's continuation
    mark and whole-word vocabularies. WordPiece does not say whether a mark of punctuation stands
    after a space; it is taken to stand after none, as most of them do.

    Raises:
        models.base.Unsupported: The tokenizer is none of `tokenizers`.
    """
    backend = getattr(hub, "backend_tokenizer", None)
    if backend is None:
        raise Unsupported(f"{type(hub).__name__} does not say how its tokens are written.")
    form = json.loads(backend.to_str())
    read = _reader(form)
    special = set(hub.all_special_ids) | {
        number for number, token in hub.added_tokens_decoder.items() if token.special
    }
    names = {number: name for name, number in hub.get_vocab().items()}
    keys: list[TokenKey | None] = [None] * (max(names, default=-1) + 1)
    for number, name in names.items():
        keys[number] = TokenKey("special", name.encode()) if number in special else read(name)
    return Vocabulary(tuple(keys), _roles(hub))


def start_token(hub: Any) -> int | None:
    """Return the token that texts begin with.

    That is the one which the tokenizer itself puts in front of a text. Where it puts none there,
    texts of the pre-training followed on the end of others: `<|endoftext|>` where there is one,
    else the beginning-of-text token, else the end-of-text token. None if there is nothing of these.
    """
    whole, bare = (list(hub("a", add_special_tokens=flag).input_ids) for flag in (True, False))
    if len(whole) > len(bare) and whole[0] in hub.all_special_ids:
        return int(whole[0])
    names = hub.get_vocab()
    candidates = (names.get("<|endoftext|>"), *(_id(hub, each) for each in ROLES["start"]))
    ends = (_id(hub, each) for each in ROLES["end"])
    return next((token for token in (*candidates, *ends) if token is not None), None)


def load_tokenized(
    folder: Path, model_id: str, settings: LoadSettings, tokenizer_folder: Path
) -> CausalTokenizedLM:
    """Load a causal language model with its tokenizer from folders.

    Forwards are transformers': the native kernels hold weights of their own, which tables of
    another tokenizer would not reach.

    Args:
        folder: With config.json and *.safetensors.
        model_id: For messages and tables.
        settings: Device, dtype, attention.
        tokenizer_folder: With tokenizer.json.

    Raises:
        models.loading.ModelError: transformers cannot read it.
        models.base.Unsupported: It is no causal language model with exchangeable tables, or other
            kernels were asked for.
    """
    if settings.kernels not in ("auto", "transformers"):
        raise Unsupported(
            f"a model with its tokenizer runs on transformers' kernels, not on {settings.kernels}."
        )
    module, hub = load_causal_module(folder, model_id, settings, tokenizer_folder)
    return CausalTokenizedLM(module, PlainTokenizer(hub), model_id)


def load_donor(donor_id: str, *, offline: bool = False) -> Donor:
    """Load a tokenizer and the embedding that belongs to it, without the rest of the model.

    Args:
        donor_id: A donor of `donors()`, or a model: an embedded one, `hf:<id>`, `path:<folder>`.
        offline: Never reach for the network.

    Raises:
        models.loading.ModelError: The files are not there or hold no embedding.
        models.base.Unsupported: Its tokenizer cannot be read.
    """
    folder, tokenizer_folder = donor_folders(donor_id, offline=offline)
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            hub = AutoTokenizer.from_pretrained(
                tokenizer_folder, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError) as error:
        raise ModelError(f"donor '{donor_id}': no tokenizer can be read: {error}") from error
    tokenizer = PlainTokenizer(hub)
    input_rows, output_rows = _read_tables(folder, donor_id)
    vocabulary = vocabulary_of(hub)
    if len(input_rows) < len(vocabulary):
        raise ModelError(
            f"donor '{donor_id}' has {len(vocabulary)} tokens and {len(input_rows)} rows: they do "
            f"not belong together."
        )
    return Donor(tokenizer, vocabulary, input_rows, output_rows)


def donor_of(model: ReplaceableVocabulary) -> Donor:
    """Return a model's own tokenizer and tables, as float32 copies."""
    output = None if model.is_tied else model.output_rows.float().cpu().clone()
    rows = model.input_rows.float().cpu().clone()
    return Donor(model.tokenizer, model.vocabulary, rows, output)


# --- how tokens are written -----------------------------------------------------------------------


def _reader(form: Mapping[str, Any]) -> Any:
    model = form["model"]
    around = json.dumps([form.get("pre_tokenizer"), form.get("decoder"), form.get("normalizer")])
    if model["type"] == "WordPiece":
        prefix = model["continuing_subword_prefix"]
        return lambda name: _read_word_piece(name, prefix)
    if model["type"] == "WordLevel":
        return lambda name: TokenKey("word", name.encode())
    if '"ByteLevel"' in around:
        return lambda name: _keyed(byte_level(name))
    return _read_sentence_piece


def _read_word_piece(name: str, prefix: str) -> TokenKey:
    if name.startswith(prefix) and len(name) > len(prefix):
        return TokenKey("inner", name.removeprefix(prefix).encode())
    # A single character that is neither letter nor digit nor mark is what BERT sets apart.
    is_punctuation = len(name) == 1 and not name.isalnum()
    return TokenKey("inner" if is_punctuation else "word", name.encode())


def _read_sentence_piece(name: str) -> TokenKey:
    content = byte_fallback(name)
    if len(name) == 6 and len(content) == 1:
        return TokenKey("byte", content)
    return _keyed(content)


def _keyed(content: bytes) -> TokenKey:
    if content.startswith(b" "):
        return TokenKey("word", content[1:])
    return TokenKey("inner", content)


def _id(hub: Any, role: str) -> int | None:
    name = getattr(hub, role, None)
    return None if name is None else hub.get_vocab().get(str(name))


def _roles(hub: Any) -> dict[str, int]:
    roles = {
        role: next((found for each in names if (found := _id(hub, each)) is not None), None)
        for role, names in ROLES.items()
    }
    roles["start"] = start_token(hub)
    return {role: number for role, number in roles.items() if number is not None}


# --- tables ---------------------------------------------------------------------------------------


def _bits(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cost of each target, (tokens,), float64, on the host."""
    costs = []
    for start in range(0, len(targets), _LOGIT_ROWS):
        rows = logits[start : start + _LOGIT_ROWS].double()
        wanted = targets[start : start + _LOGIT_ROWS, None]
        costs.append(rows.logsumexp(dim=-1) - rows.gather(1, wanted)[:, 0])
    return torch.cat(costs).cpu() / torch.log(torch.tensor(2.0, dtype=torch.float64))


def _table_layers(module: Any) -> tuple[Any, Any]:
    """Return the layers that hold input embedding and output head."""
    return module.get_input_embeddings(), module.get_output_embeddings()


def _with_tables(module: Any, input_rows: Tensor, output_rows: Tensor | None) -> Any:
    """Return a copy of a module's structure over the same weights, but for the two tables."""
    # What deepcopy finds in its memory it takes as copied: no weight is duplicated.
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    other = copy.deepcopy(module, shared)
    embedding, head = _table_layers(other)
    like = module.get_input_embeddings().weight
    table = nn.Parameter(input_rows.to(like.device, like.dtype), requires_grad=False)
    embedding.weight, embedding.num_embeddings, embedding.padding_idx = table, len(table), None
    head.weight = (
        table
        if output_rows is None
        else nn.Parameter(output_rows.to(like.device, like.dtype), requires_grad=False)
    )
    head.out_features = len(table)
    return other


def _set_ids(module: Any, vocab_size: int, roles: Mapping[str, int], eos_ids: Set[int]) -> None:
    """Give a module's configuration the size and the special ids of another vocabulary."""
    text_config = module.config.get_text_config()
    ends = sorted(eos_ids | {roles["end"]} if "end" in roles else eos_ids)
    for config in (module.config, text_config, module.generation_config):
        config.bos_token_id = roles.get("start")
        config.eos_token_id = ends or None
        config.pad_token_id = roles.get("padding")
    text_config.vocab_size = vocab_size


def _read_tables(folder: Path, donor_id: str) -> tuple[Tensor, Tensor | None]:
    """Return input embedding and output head of a folder's weights, in float32."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # it is no mapping
                for kind, ends in (("input", _INPUT_NAMES), ("output", _OUTPUT_NAMES)):
                    if kind not in found and any(f".{name}".endswith(f".{end}") for end in ends):
                        found[kind] = weights.get_tensor(name).float()
    if "input" not in found:
        raise ModelError(
            f"donor '{donor_id}': no *.safetensors in {folder} holds an input embedding (a tensor "
            f"whose name ends with {', '.join(_INPUT_NAMES)})."
        )
    output = found.get("output")
    # Some files hold a tied table twice.
    is_tied = output is not None and torch.equal(output, found["input"])
    return found["input"], None if is_tied else output
