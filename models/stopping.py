"""Where a text ends. Every method's ids pass through `Stopper`, so tokens are counted one way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from models.base import Decoding, Tokenizer


class End(NamedTuple):
    """Where a text ends: the number of tokens kept, and why (`eos`, `stop`, `length` or ``)."""

    num_tokens: int
    finish: str


class Stopper:
    """Finds the end of a growing list of new tokens.

    The end is the shortest prefix of the ids that holds an end-of-text id or whose text holds a
    stop string, else `max_new_tokens`. The token that completes it counts: it had to be computed.
    Whether a prefix ends the text depends on that prefix alone, so a loop that looks after every
    token and one that looks after several find the same end.
    """

    def __init__(self, tokenizer: Tokenizer, decoding: Decoding, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._max_new_tokens = decoding.max_new_tokens
        self._eos_ids = frozenset() if decoding.ignore_eos else eos_ids
        self._stop = () if decoding.ignore_eos else tuple(text for text in decoding.stop if text)
        # A stop string spans at most one token a byte, split characters at both ends included.
        self._window = max((len(text.encode()) for text in self._stop), default=0) + 3
        self._has_text: dict[int, bool] = {}

    def find(self, token_ids: Sequence[int], checked: int = 0) -> End:
        """Return the end of `token_ids`, of which the first `checked` are known to go on."""
        limit = min(len(token_ids), self._max_new_tokens)
        eos = next(
            (n for n in range(checked + 1, limit + 1) if token_ids[n - 1] in self._eos_ids), 0
        )
        before_eos = eos - 1 if eos else limit
        # One look at all new tokens, and one at each only if that found something.
        if self._stop and self._has_stop(token_ids, checked, before_eos):
            for count in range(checked + 1, before_eos + 1):
                if self._has_stop(token_ids, count - 1, count):
                    return End(count, "stop")
        if eos:
            return End(eos, "eos")
        return End(limit, "length" if limit == self._max_new_tokens else "")

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text of trimmed ids, cut before the first stop string."""
        text = self._tokenizer.decode([token for token in token_ids if token not in self._eos_ids])
        cuts = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        return text[: min(cuts)] if cuts else text

    def _has_stop(self, token_ids: Sequence[int], checked: int, limit: int) -> bool:
        """Return whether a stop string ends after `checked`; decodes no more than it must."""
        start, missing = checked, self._window
        while start and missing:
            start -= 1
            missing -= self._shows(token_ids[start])  # special tokens take no place in the text
        tail = self._tokenizer.decode(list(token_ids[start:limit]))
        return any(stop in tail for stop in self._stop)

    def _shows(self, token: int) -> bool:
        if token not in self._has_text:
            self._has_text[token] = bool(self._tokenizer.decode([token]))
        return self._has_text[token]
