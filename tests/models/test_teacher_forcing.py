"""Teacher forcing: losses against tables and single forwards, work against that of decoding."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.base import Decoding, Forward, InvalidOutput, Trace, Unsupported
from models.decode import decode
from models.teacher_forcing import force, open_loss, split_ids
from tests.models.tiny import tiny_model
from tests.models.toy import LetterTokenizer, TableModel, random_table

PROMPT, CONTINUATION = [5, 17, 42, 3, 88, 9], [11, 60, 2, 2, 71, 33, 8, 19, 4, 27]


def test_losses_are_those_of_the_table() -> None:
    model = TableModel(np.log([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]]))
    losses = open_loss(model, [0], [1, 2, 0, 0])
    assert losses == pytest.approx([-math.log(p) for p in (0.25, 0.7, 0.3, 0.5)], abs=1e-6)
    assert losses.dtype == np.float64


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral-sliding-window"])
def test_fed_token_by_token_a_text_costs_what_one_forward_says(architecture: str) -> None:
    model = tiny_model(architecture)
    session = model.session(len(PROMPT) + len(CONTINUATION))
    logits = session.prefill(PROMPT + CONTINUATION, all_logits=True).double()
    rows = torch.log_softmax(logits, -1)[len(PROMPT) - 1 : -1]
    expected = -rows[torch.arange(len(CONTINUATION)), CONTINUATION]
    np.testing.assert_allclose(
        open_loss(model, PROMPT, CONTINUATION), expected.numpy(), atol=1e-4, rtol=0
    )


def test_the_work_is_that_of_decoding_the_same_tokens() -> None:
    model = tiny_model()
    decoded = decode(model, PROMPT, Decoding(max_new_tokens=12, ignore_eos=True))
    forced = force(model, PROMPT, decoded.token_ids)
    for name in ("prefill", "forwards", "accepted", "flops", "kv_bytes"):
        assert getattr(forced.trace, name) == getattr(decoded.trace, name), name
    assert forced.trace.forwards[0] == Forward(1, len(PROMPT))
    assert len(forced.trace.forwards) == 11  # the last token is fed to nobody
    assert list(forced.trace.marks) == ["prefill", "decode"]
    assert forced.trace.marks["prefill"] <= forced.trace.marks["decode"]
    assert forced.token_ids == decoded.token_ids


def test_the_text_holds_the_loss_of_each_token_and_their_bytes() -> None:
    model = TableModel(random_table(7))
    told = force(model, [0, 1], [2, 3, 4])
    found = json.loads(told.text)
    assert found["bytes"] == 3  # `cde`
    assert found["nats"] == pytest.approx(open_loss(model, [0, 1], [2, 3, 4]).tolist(), abs=1e-8)
    assert told.finish == "length"


def test_a_model_that_counts_its_own_attention_has_the_last_word() -> None:
    class Sparse(TableModel):
        def account(self, trace: Trace) -> None:
            assert trace.flops > 0  # the dense work was counted first
            trace.flops, trace.kv_bytes = 7.0, 3

    trace = force(Sparse(random_table(7)), [0], [1, 2]).trace
    assert (trace.flops, trace.kv_bytes) == (7.0, 3)


@pytest.mark.parametrize(
    ("prompt", "continuation", "what"), [([], [1], "prompt"), ([1], [], "continuation")]
)
def test_nothing_can_be_forced_upon_nothing(
    prompt: list[int], continuation: list[int], what: str
) -> None:
    with pytest.raises(ValueError, match=f"the {what} holds no token"):
        force(TableModel(random_table(7)), prompt, continuation)


def test_a_text_past_the_window_is_refused_before_anything_runs() -> None:
    model = TableModel(random_table(7), max_positions=4)
    assert len(open_loss(model, [0, 1], [2, 3])) == 2
    with pytest.raises(Unsupported, match="exceed the context of 4 tokens"):
        open_loss(model, [0, 1], [2, 3, 4])
    assert len(model.sessions) == 1


@pytest.mark.parametrize("score", [math.nan, -math.inf])
def test_a_loss_that_is_no_finite_number_is_no_result(score: float) -> None:
    with pytest.raises(InvalidOutput, match="no finite loss"):
        open_loss(TableModel([[0.0, score], [0.0, 0.0]]), [1], [0, 1])


def test_a_text_is_as_long_as_its_bytes_and_not_its_letters() -> None:
    class Accented(LetterTokenizer):
        def decode(self, token_ids: Sequence[int]) -> str:
            return "é" * len(token_ids)

    model = TableModel(random_table(7))
    model.tokenizer = Accented()
    assert json.loads(force(model, [0], [1, 2, 3]).text)["bytes"] == 6


class PairTokenizer:
    """Two letters are one token, from the left; a letter without a partner is one by itself."""

    def encode(self, text: str) -> list[int]:
        return [int.from_bytes(text[at : at + 2].encode()) for at in range(0, len(text), 2)]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(token.to_bytes(2 if token > 255 else 1).decode() for token in token_ids)


@given(st.text("abc", max_size=7), st.text("abc", min_size=1, max_size=7))
def test_a_token_over_the_border_belongs_to_the_continuation(prompt: str, follows: str) -> None:
    tokenizer = PairTokenizer()
    split = split_ids(tokenizer, prompt, follows)
    assert split.prompt_ids + split.continuation_ids == tokenizer.encode(prompt + follows)
    # An odd prompt's last letter goes with the letter behind the border.
    assert tokenizer.decode(split.prompt_ids) == prompt[: len(prompt) // 2 * 2]
