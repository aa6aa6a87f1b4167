"""What tokenizer transplants share: matching two vocabularies, and tables for the new one.

A transplant keeps the body of a language model and exchanges its tokenizer for a donor's. Tokens
that both have keep their rows; the methods differ in where the rows of the others come from.
"""

from __future__ import annotations

import hashlib
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from hardware.profile import Profile
from methods.base import Method, Output
from methods.checks import require_choice, require_number, unsuited
from models.base import Decoding, Generation, TextScore, TokenizedLM, Tokenizer, Unsupported
from models.loading import ModelError
from models.tokenized import (
    ROLES,
    CausalTokenizedLM,
    Donor,
    ReplaceableVocabulary,
    TokenKey,
    Vocabulary,
    donor_of,
    load_donor,
)
from models.wrapper import Wrapper

Rows = Literal["all", "text"]
Table = Literal["embed", "lm_head"]


class Alignment(NamedTuple):
    """A donor's tokens beside those of the base.

    Attributes:
        size: Rows of the new tables.
        shared_donor, shared_base: Ids of the tokens that both have, (shared,), int64, by donor id.
        new: Ids of the donor's other tokens, (new,), int64, ascending.
    """

    size: int
    shared_donor: Tensor
    shared_base: Tensor
    new: Tensor


class Space(NamedTuple):
    """What a new row can be made of. Both tables are float32.

    Attributes:
        donor, base: Rows of one table each, (rows, width).
        shared_donor, shared_base: Ids of the tokens that both have, see `Alignment`.
        donor_vocabulary, base_vocabulary: Their tokens.
        base_tokenizer: Of the base.
        hidden: Base ids that may not be used, see `VocabularyTransplant.hide`.
    """

    donor: Tensor
    base: Tensor
    shared_donor: Tensor
    shared_base: Tensor
    donor_vocabulary: Vocabulary
    base_vocabulary: Vocabulary
    base_tokenizer: Tokenizer
    hidden: frozenset[int] = frozenset()

    @property
    def base_tokens(self) -> Tensor:
        """Rows of the base that a token has, (tokens, width), hidden ones included."""
        return self.base[: len(self.base_vocabulary)]


@dataclass(frozen=True, kw_only=True)
class TokenizerMethod(Method[TokenizedLM]):
    """A method that changes what a model's tokens are."""

    capability = "TokenizedLM"
    output = Output.APPROXIMATE


@dataclass(frozen=True, kw_only=True)
class VocabularyTransplant(TokenizerMethod):
    """Puts a donor's tokenizer around a model's body, with a row for each of the donor's tokens.

    The new tables depend on model, donor and settings alone. They are made when a model is first
    seen and kept as long as it lives; no sample changes them, so the state policy is `cold`.

    Attributes:
        donor: Tokenizer and embedding to take over: a donor of the project (`python-bpe`), a model
            (`minilm-l6`, `hf:…`, `path:…`), `same` (the model's own, so that nothing changes) or
            `permuted` (its own with shuffled ids and a rotated embedding: another donor to look at
            that says exactly the same).
        rows: `all` makes a row for every token of the donor. `text` makes only those that the
            scored text contains, for speed: its other new tokens get no probability, so the bits
            are a lower bound of those with all rows, and nothing can be generated.
        hide: Share of the common tokens (but special ones), drawn by lot, that are treated as if
            the base lacked them. With a donor that has the base's own tokenizer (`tiny-draft` for
            SmolLM2) the difference to the native tokenizer is then what making rows costs, and
            nothing else.
    """

    donor: str = "python-bpe"
    rows: Rows = "all"
    hide: float = 0.0
    _kept: list[tuple[weakref.ref[Any], Transplanted]] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    neutral = MappingProxyType({"donor": "same"})
    # A tiny model has no tokens that a real tokenizer knows.
    trial = MappingProxyType({"donor": "permuted"})

    def __post_init__(self) -> None:
        require_choice("rows", self.rows, get_args(Rows))
        if not self.donor:
            raise ValueError("donor must name a tokenizer with an embedding, got an empty text.")
        require_number("hide", self.hide, 0, 1, "It is a share of tokens.", below_high=True)

    @abstractmethod
    def new_rows(self, space: Space, token_ids: Tensor) -> Tensor:
        """Return rows for donor tokens that the base does not have, (tokens, width), float32.

        Each row depends on its own token alone, whatever stands beside it.

        Args:
            space: What they can be made of.
            token_ids: Ids of the donor, (tokens,).

        Raises:
            models.base.Unsupported: The tables are too small for the settings.
        """

    def copies(
        self, space: Space, table: Table, new: Sequence[int], *, is_tied: bool
    ) -> dict[int, int]:
        """Return new tokens that take over the row of a base token as it is; none by default."""
        return {}

    def cleared(self, space: Space) -> Tensor:
        """Return donor ids whose rows are set to zero at the end; none by default."""
        return torch.empty(0, dtype=torch.int64)

    @contextmanager
    def apply(self, model: TokenizedLM, hardware: Profile) -> Iterator[TokenizedLM]:
        """Yield the model with the donor's tokenizer; the model itself is not touched."""
        if not isinstance(model, ReplaceableVocabulary):
            wanted = ("vocabulary", "input_rows", "output_rows", "with_vocabulary", "score")
            missing = ", ".join(name for name in wanted if not hasattr(model, name))
            raise unsuited(
                self, model, "a model whose tables of tokens it can exchange", f"has no {missing}"
            )
        self._kept[:] = [pair for pair in self._kept if pair[0]() is not None]
        kept = next((made for known, made in self._kept if known() is model), None)
        if kept is None:
            kept = self.transplant(model)
            self._kept.append((weakref.ref(model), kept))
        yield kept

    def transplant(self, model: ReplaceableVocabulary) -> Transplanted:
        """Return the model between the new tables.

        Raises:
            models.base.Unsupported: The donor is not there, has too little in common with the
                model, or the settings do not fit.
        """
        donor = find_donor(self.donor, model)
        alignment = align(model.vocabulary, donor.vocabulary)
        alignment, hidden = without(alignment, donor.vocabulary, self.hide)
        if donor.vocabulary == model.vocabulary and not self.hide:
            # The same tokens: also rows that no token has, or that several share, stay as they are.
            every = torch.arange(len(model.input_rows))
            alignment = Alignment(len(every), every, every, alignment.new)
        if not len(alignment.shared_donor):
            raise Unsupported(f"'{model.name}' and donor '{self.donor}' share no token.")
        # A tied base stays tied: its one table is made in the donor's input embedding, whether or
        # not the donor's own head is another one. An untied base takes the donor's head, which is
        # the input embedding where the donor ties them.
        sources = [("embed", model.input_rows, donor.input_rows)]
        if not model.is_tied:
            head = donor.input_rows if donor.output_rows is None else donor.output_rows
            sources.append(("lm_head", model.output_rows, head))
        tables = [
            _Table.of(self, name, model, Space(
                donor_rows,
                base_rows.detach().float().cpu(),
                alignment.shared_donor,
                alignment.shared_base,
                donor.vocabulary,
                model.vocabulary,
                model.tokenizer,
                hidden,
            ), alignment)
            for name, base_rows, donor_rows in sources
        ]  # fmt: skip
        notes: dict[str, float | int | str] = {
            "donor_tokens": len(donor.vocabulary),
            "shared_tokens": len(alignment.shared_donor),
            "new_tokens": len(alignment.new),
            "donor_digest": _digest(donor.input_rows),
        }
        if self.rows == "all":
            for table in tables:
                table.fill(alignment.new.tolist())
                table.finish()
        made = model.with_vocabulary(
            donor.tokenizer, donor.vocabulary, *(table.rows for table in tables)
        )
        return Transplanted(made, tables if self.rows == "text" else [], alignment.new, notes)


class Transplanted(Wrapper):
    """A model behind its new tokenizer, which notes what was exchanged."""

    def __init__(
        self,
        model: CausalTokenizedLM,
        open_tables: Sequence[_Table],
        new: Tensor,
        notes: Mapping[str, float | int | str],
    ) -> None:
        super().__init__(model)
        self._open_tables = open_tables
        self._new = new
        self._notes = notes
        if open_tables:
            model.absent = new

    def score(self, text: str) -> TextScore:
        """Return what it costs to code `text`, see `VocabularyTransplant.rows`."""
        if self._open_tables:
            self._make_rows(text)
        scored = self._model.score(text)
        scored.trace.notes.update(self._notes)
        return scored

    def generate(self, prompt: str, decoding: Decoding) -> Generation:
        """Continue `prompt` in the donor's tokens.

        Raises:
            models.base.Unsupported: There are rows for the tokens of scored texts only.
        """
        generation = self._model.generate(prompt, decoding)
        generation.trace.notes.update(self._notes)
        return generation

    def _make_rows(self, text: str) -> None:
        used = sorted(set(self._model.tokenizer.encode(text)))
        inputs, outputs = self._model.input_rows, self._model.output_rows
        for table, rows in zip(self._open_tables, (inputs, outputs), strict=False):
            made = table.fill(used)
            rows[made] = table.rows[made].to(rows.device, rows.dtype)
        mine = torch.tensor(used, dtype=torch.int64)
        # Whatever other texts had rows made for: a text's cost does not depend on them.
        self._model.absent = self._new[~torch.isin(self._new, mine)]


class _Table:
    """One of the new tables, of which some rows may still be missing."""

    def __init__(
        self,
        rows: Tensor,
        missing: set[int],
        make: Callable[[Tensor], Tensor],
    ) -> None:
        self.rows = rows
        self._missing = missing
        self._make = make

    @classmethod
    def of(
        cls,
        method: VocabularyTransplant,
        name: Any,
        model: ReplaceableVocabulary,
        space: Space,
        alignment: Alignment,
    ) -> _Table:
        rows = torch.zeros(alignment.size, space.base.shape[1])
        rows[alignment.shared_donor] = space.base[alignment.shared_base]
        new = alignment.new.tolist()
        copies = method.copies(space, name, new, is_tied=model.is_tied)
        for token, source in copies.items():
            rows[token] = space.base[source]
        rows[method.cleared(space)] = 0
        missing = set(new) - copies.keys()
        return cls(rows, missing, lambda ids: method.new_rows(space, ids))

    def fill(self, token_ids: Iterable[int]) -> list[int]:
        """Make the rows among these that are missing, and return their ids."""
        wanted = sorted(self._missing.intersection(token_ids))
        if wanted:
            ids = torch.tensor(wanted, dtype=torch.int64)
            self.rows[ids] = self._make(ids).float()
            self._missing.difference_update(wanted)
        return wanted

    def finish(self) -> None:
        """Let go of what the rows were made of."""
        self._make = _nothing


def _nothing(token_ids: Tensor) -> Tensor:
    raise AssertionError("every row has been made")


# --- vocabularies ---------------------------------------------------------------------------------


def first_ids(vocabulary: Vocabulary) -> dict[TokenKey, int]:
    """Return the lowest id of each key."""
    numbered = reversed(list(enumerate(vocabulary.keys)))
    return {key: number for number, key in numbered if key is not None}


def align(base: Vocabulary, donor: Vocabulary) -> Alignment:
    """Match the tokens of two vocabularies.

    A special token matches the one that plays the same part, else one of the same name; other
    tokens match by their keys. Several ids of the base for a key: the lowest counts (the released
    code keeps the last).
    """
    ids = first_ids(base)
    by_role = {
        donor.roles[role]: base.roles[role]
        for role in reversed(tuple(ROLES))  # the first of several parts decides, so it comes last
        if role in donor.roles and role in base.roles
    }
    pairs, new = [], []
    for number, key in enumerate(donor.keys):
        if key is None:
            continue
        match = by_role.get(number, ids.get(key))
        if match is None:
            new.append(number)
        else:
            pairs.append((number, match))
    shared = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return Alignment(len(donor), shared[:, 0], shared[:, 1], torch.tensor(new, dtype=torch.int64))


def without(
    alignment: Alignment, donor: Vocabulary, share: float, seed: int = 0
) -> tuple[Alignment, frozenset[int]]:
    """Treat a share of the common tokens as new; special ones stay.

    Args:
        alignment: Of the two vocabularies.
        donor: The donor's.
        share: Of the common tokens, in [0, 1).
        seed: Of the draw.

    Returns:
        The alignment without them, and their ids in the base.
    """
    keys = [donor.keys[token] for token in alignment.shared_donor.tolist()]
    plain = torch.tensor(
        [at for at, key in enumerate(keys) if key is not None and key.kind != "special"],
        dtype=torch.int64,
    )
    order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(seed))
    drawn = plain[order[: round(share * len(plain))]]
    stays = torch.ones(len(keys), dtype=torch.bool)
    stays[drawn] = False
    new = torch.cat([alignment.new, alignment.shared_donor[drawn]]).sort().values
    return (
        Alignment(alignment.size, alignment.shared_donor[stays], alignment.shared_base[stays], new),
        frozenset(alignment.shared_base[drawn].tolist()),
    )


def prefix_matches(base: Vocabulary, donor: Vocabulary, token_ids: Iterable[int]) -> dict[int, int]:
    """Return for donor tokens the base token that is their longest proper prefix, where one is."""
    ids = first_ids(base)
    found = {}
    for token in token_ids:
        key = donor.keys[token]
        if key is None or key.kind not in ("word", "inner"):
            continue
        for end in range(len(key.content) - 1, 0, -1):
            if (match := ids.get(TokenKey(key.kind, key.content[:end]))) is not None:
                found[token] = match
                break
    return found


def byte_matches(base: Vocabulary, donor: Vocabulary, token_ids: Iterable[int]) -> dict[int, int]:
    """Return for donor tokens of one byte the base token of that byte, `<0x41>` for `A` or back."""
    ids = first_ids(base)
    other = {"byte": "inner", "inner": "byte"}
    found = {}
    for token in token_ids:
        key = donor.keys[token]
        if key is None or key.kind not in other or len(key.content) != 1:
            continue
        match = ids.get(TokenKey(other[key.kind], key.content))  # type: ignore[arg-type]  # a kind
        if match is not None:
            found[token] = match
    return found


def key_text(key: TokenKey) -> str | None:
    """Return the text that a token adds; None where it is special or not whole characters."""
    if key.kind == "special":
        return None
    try:
        text = key.content.decode()
    except UnicodeDecodeError:
        return None
    return f" {text}" if key.kind == "word" else text


# --- donors ---------------------------------------------------------------------------------------


def find_donor(name: str, model: ReplaceableVocabulary) -> Donor:
    """Return the donor of that name, see `VocabularyTransplant.donor`.

    Raises:
        models.base.Unsupported: It is not there.
    """
    if name == "same":
        return donor_of(model)
    if name == "permuted":
        return permuted(donor_of(model))
    try:
        return load_donor(name)
    except ModelError as error:
        raise Unsupported(str(error)) from error


def permuted(donor: Donor, seed: int = 0) -> Donor:
    """Return a donor that says the same in other ids and another basis of its embedding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = len(donor.vocabulary)
    order = torch.randperm(tokens, generator=generator)  # new id -> old id
    new_id = order.argsort().tolist()

    def turned(rows: Tensor) -> Tensor:
        width = rows.shape[1]
        square = torch.randn(width, width, generator=generator, dtype=torch.float64)
        rotation = torch.linalg.qr(square).Q
        return (rows[order].double() @ rotation).float()

    return Donor(
        PermutedTokenizer(donor.tokenizer, order.tolist()),
        Vocabulary(
            tuple(donor.vocabulary.keys[old] for old in order.tolist()),
            {role: new_id[number] for role, number in donor.vocabulary.roles.items()},
        ),
        turned(donor.input_rows),
        None if donor.output_rows is None else turned(donor.output_rows),
    )


class PermutedTokenizer:
    """A tokenizer whose ids are shuffled."""

    def __init__(self, tokenizer: Tokenizer, old_ids: Sequence[int]) -> None:
        """Wrap a tokenizer; `old_ids[new]` is its id for the new one."""
        self._tokenizer = tokenizer
        self._old_ids = list(old_ids)
        self._new_ids = {old: new for new, old in enumerate(old_ids)}

    def encode(self, text: str) -> list[int]:
        """Return the shuffled ids of `text`."""
        return [self._new_ids[token] for token in self._tokenizer.encode(text)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of shuffled ids."""
        return self._tokenizer.decode([self._old_ids[token] for token in token_ids])


def _digest(rows: Tensor) -> str:
    return hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest()[:16]
