"""A continuation is judged as one plain forward over the whole text judges it."""

from __future__ import annotations

import pytest
import torch

from models import likelihood
from models.base import Decoding, InvalidOutput, TextGenerator, Trace, Unsupported
from models.likelihood import likelihoods
from models.native.build import compiler
from tests.models.tiny import tiny_model

KERNELS = ["transformers", *(["native"] if compiler() else [])]
CONTEXT = [5, 17, 3, 88, 41]
CONTINUATIONS = [[7], [9, 11], [9], [(13 * place) % 90 + 2 for place in range(40)], [20, 21, 22]]


def plainly(model: TextGenerator, continuation: list[int]) -> tuple[float, bool]:
    ids = [*CONTEXT, *continuation]
    logits = model.session(len(ids)).prefill(ids, all_logits=True)[len(CONTEXT) - 1 : -1]
    chosen = torch.tensor(continuation)
    logs = torch.log_softmax(logits.double(), -1).gather(1, chosen[:, None])
    return float(logs.sum()), bool((logits.argmax(-1) == chosen).all())


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("widest", [1, 7, 128])
def test_any_width_of_drafts_gives_the_numbers_of_one_forward(
    kernels: str, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "_WIDEST_DRAFT", widest)
    model = tiny_model(kernels=kernels)  # type: ignore[arg-type]  # one of its kinds
    greedy = list(model.generate(CONTEXT, Decoding(max_new_tokens=4, ignore_eos=True)).token_ids)
    trace = Trace()
    found = likelihoods(model, CONTEXT, [*CONTINUATIONS, greedy], trace)
    for continuation, (nats, is_greedy) in zip([*CONTINUATIONS, greedy], found, strict=True):
        expected = plainly(model, continuation)
        assert nats == pytest.approx(expected[0], abs=1e-4)
        assert is_greedy == expected[1]
    assert found[-1].is_greedy
    fed = sum(len(each) - 1 for each in (*CONTINUATIONS, greedy))
    assert sum(forward.width for forward in trace.forwards) == fed
    # The context is read again only where a continuation was kept in part.
    assert len(trace.prefill) == {1: 4, 7: 2, 128: 1}[widest]
    assert ("prefill" in trace.marks) == (len(trace.prefill) == 1)
    assert trace.flops > 0


def test_texts_that_are_empty_or_too_long_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="must hold at least one token each"):
        likelihoods(model, [], [[1]], Trace())
    with pytest.raises(ValueError, match="must hold at least one token each"):
        likelihoods(model, [1], [[1], []], Trace())
    # The last token is never fed: 256 positions hold 257 tokens.
    assert likelihoods(model, [3] * 250, [[5] * 7], Trace())[0].nats < 0
    with pytest.raises(Unsupported, match="250 prompt tokens and 7 continuation ones exceed"):
        likelihoods(model, [3] * 250, [[5] * 8], Trace())


def test_a_model_without_numbers_gives_no_likelihood(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    session = type(model.session(8))
    plain = session.prefill
    monkeypatch.setattr(
        session, "prefill", lambda self, ids, **options: plain(self, ids, **options) * float("nan")
    )
    with pytest.raises(InvalidOutput, match="logits are NaN"):
        likelihoods(model, [3, 4], [[5]], Trace())
