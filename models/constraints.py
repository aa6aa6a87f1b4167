"""What a text must satisfy, checked while it is written.

A constraint is a state: it says whether the text so far is complete, and what state follows after
more bytes, or that no continuation can be completed any more. States never change, so particles and
search trees share them freely; the state of the empty text stands for the constraint itself.
Constraints see bytes, because tokens may split a character.

A request carries its constraint in `ConstrainedDecoding`. A method that knows no constraints takes
the request for an ordinary one and writes what it would have written anyway.

The languages themselves are in `models.regular` (regular expressions, JSON schemas) and
`models.python_syntax`.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

from models.base import Decoding, Tokenizer


class Constraint(Protocol):
    """The language of the texts that may follow what has been written; never changes."""

    @property
    def is_complete(self) -> bool:
        """Whether the text may end here."""
        ...

    def after(self, data: bytes) -> Constraint | None:
        """Return the state after more bytes; None if nothing can complete the text any more.

        Exact both ways: a state that comes back can be completed, a None cannot. A lax check only
        costs texts that die late; a strict one would bias every method that relies on it.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ConstrainedDecoding(Decoding):
    """A request for a text of a language.

    A text of the language ends with an end-of-text token, or before a stop string. The last of
    `max_new_tokens` can only be the end-of-text token, so a longer text cannot pass for a whole
    one. With `ignore_eos` a text is any viable beginning of `max_new_tokens` tokens.

    Attributes:
        constraint: The language, as the state of the empty text.
    """

    constraint: Constraint


def accepts(constraint: Constraint, text: str) -> bool:
    """Return whether a whole text satisfies a constraint."""
    end = constraint.after(text.encode())
    return end is not None and end.is_complete


@dataclass(frozen=True)
class Anything:
    """The language of all byte strings: a constraint that refuses nothing."""

    is_complete: bool = True

    def after(self, data: bytes) -> Anything:
        """Return itself."""
        return self


# --- stop strings ---------------------------------------------------------------------------------


class _Begun(NamedTuple):
    """A stop string of which a part has been written, behind a complete text."""

    stop: int
    written: int


@dataclass(frozen=True)
class Stoppable:
    """A language whose texts end before a stop string: L, and L stop string anything.

    A text of L that contains a stop string is left out, since it would be cut there.

    Attributes:
        inner: What may still be written of L; None if only a begun stop string is left.
        stops: The stop strings.
        tail: The last bytes, one fewer than the longest stop string has.
        begun: Stop strings in progress.
        is_stopped: Whether a stop string has been written; then the text is over.
    """

    inner: Constraint | None
    stops: tuple[bytes, ...]
    tail: bytes = b""
    begun: frozenset[_Begun] = frozenset()
    is_stopped: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether the text may end here."""
        return self.is_stopped or (self.inner is not None and self.inner.is_complete)

    def after(self, data: bytes) -> Stoppable | None:
        """Return the state after more bytes."""
        if self.is_stopped:
            return self
        if self.inner and not self.begun and not self.tail and not self._may_stop(data):
            inner = self.inner.after(data)  # the usual token has nothing of a stop string
            return Stoppable(inner, self.stops) if inner else None
        state = self
        for at in range(len(data)):
            following = state._after_byte(data[at : at + 1])
            if following is None or following.is_stopped:
                return following
            state = following
        return state

    def _may_stop(self, data: bytes) -> bool:
        return any(stop[:1] in data for stop in self.stops)

    def _after_byte(self, byte: bytes) -> Stoppable | None:
        text = self.tail + byte
        ended = [number for number, stop in enumerate(self.stops) if text.endswith(stop)]
        before = self.begun
        if self.inner is not None and self.inner.is_complete:
            before |= {_Begun(number, 0) for number in range(len(self.stops))}
        begun = {
            _Begun(number, written + 1)
            for number, written in before
            if self.stops[number][written : written + 1] == byte
        }
        if ended:
            # The text is cut before the one that began first, and must be complete there.
            first = max(ended, key=lambda number: len(self.stops[number]))
            if _Begun(first, len(self.stops[first])) not in begun:
                return None
            return Stoppable(None, self.stops, is_stopped=True)
        inner = self.inner.after(byte) if self.inner is not None else None
        if inner is None and not begun:
            return None
        # Only what can still become a stop string is worth remembering.
        tail = next(
            (
                text[at:]
                for at in range(len(text))
                if any(stop.startswith(text[at:]) for stop in self.stops)
            ),
            b"",
        )
        return Stoppable(inner, self.stops, tail, frozenset(begun))


# --- what a token says ----------------------------------------------------------------------------

_PIECES: weakref.WeakKeyDictionary[Any, tuple[bytes | None, ...]] = weakref.WeakKeyDictionary()


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> tuple[bytes | None, ...]:
    """Return the bytes that each token adds to a text; None for tokens that add none or unknown.

    Byte-level tokenizers of transformers (GPT-2's alphabet) and those with byte fallback are read
    exactly. Of any other the text of the single token is taken; where that is no valid text, the
    token is None and cannot be used under a constraint. Remembered per tokenizer.

    Args:
        tokenizer: Whose tokens.
        vocab_size: Ids from 0; ids that the tokenizer does not know are None.
    """
    known = _PIECES.get(tokenizer)
    if known is None or len(known) != vocab_size:
        known = _PIECES[tokenizer] = tuple(_read_pieces(tokenizer, vocab_size))
    return known


def _read_pieces(tokenizer: Any, vocab_size: int) -> list[bytes | None]:
    hub = getattr(tokenizer, "hub", None)
    backend = getattr(hub, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str()).get("decoder") if backend is not None else None
    kinds = json.dumps(decoder) if decoder else ""
    if hub is not None and ('"ByteLevel"' in kinds or '"ByteFallback"' in kinds):
        read = byte_level if '"ByteLevel"' in kinds else byte_fallback
        special = set(hub.all_special_ids) | {
            number for number, token in hub.added_tokens_decoder.items() if token.special
        }
        names = hub.convert_ids_to_tokens(list(range(min(vocab_size, len(hub)))))
        pieces = [
            None if name is None or number in special else read(name) or None
            for number, name in enumerate(names)
        ]
        return pieces + [None] * (vocab_size - len(pieces))
    texts = (tokenizer.decode([token]) for token in range(vocab_size))
    return [None if not text or "\ufffd" in text else text.encode() for text in texts]


@cache
def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: printable Latin-1 stands for itself, the rest from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in shown}
    hidden = (byte for byte in range(256) if byte not in set(shown))
    return alphabet | {chr(0x100 + rank): byte for rank, byte in enumerate(hidden)}


def byte_level(name: str) -> bytes:
    """Return the bytes of a token of a byte-level vocabulary, as GPT-2 writes them."""
    alphabet = _byte_alphabet()
    if all(letter in alphabet for letter in name):
        return bytes(alphabet[letter] for letter in name)
    return name.encode()  # an added token, which is written as it stands


def byte_fallback(name: str) -> bytes:
    """Return the bytes of a token of a SentencePiece vocabulary with byte tokens."""
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes([int(name[3:5], 16)])
    return name.replace("▁", " ").encode()


# --- a constraint on tokens -----------------------------------------------------------------------


class TokenState(NamedTuple):
    """Where a text stands: what may follow, and whether it has ended."""

    constraint: Constraint
    has_ended: bool = False


class TokenChecker:
    """A constraint on texts as one on tokens, which counts how often it is asked.

    Attributes:
        pieces: Bytes of each token; None for those that can never be used.
        eos: The id that ends a text here; None if nothing does. Several end-of-text ids count as
            one, the lowest.
        merged: The other end-of-text ids, whose probability belongs to `eos`.
        checks: Calls of `after` and `end` so far.
    """

    def __init__(
        self,
        constraint: Constraint,
        pieces: Sequence[bytes | None],
        eos_ids: frozenset[int],
        decoding: Decoding,
    ) -> None:
        self.pieces = pieces
        ends = sorted(eos_ids) if not decoding.ignore_eos else []
        self.eos = ends[0] if ends else None
        self.merged = tuple(ends[1:])
        self.checks = 0
        stops = () if decoding.ignore_eos else tuple(s.encode() for s in decoding.stop if s)
        self._start = Stoppable(constraint, stops) if stops else constraint

    @property
    def start(self) -> TokenState:
        """The state of the empty text."""
        return TokenState(self._start)

    @property
    def usable(self) -> list[bool]:
        """Whether each token can occur at all, whatever the text, (vocab,)."""
        return [
            (piece is not None and token not in self.merged) or token == self.eos
            for token, piece in enumerate(self.pieces)
        ]

    def after(self, state: TokenState, token: int) -> TokenState | None:
        """Return the state after a token; None if the constraint refuses it."""
        if token == self.eos:
            return self.end(state)
        self.checks += 1
        piece = self.pieces[token]
        constraint = state.constraint.after(piece) if piece is not None else None
        if constraint is None:
            return None
        return TokenState(constraint, isinstance(constraint, Stoppable) and constraint.is_stopped)

    def end(self, state: TokenState) -> TokenState | None:
        """Return the state after the end-of-text token; None if the text is not complete."""
        self.checks += 1
        return TokenState(state.constraint, True) if state.constraint.is_complete else None
