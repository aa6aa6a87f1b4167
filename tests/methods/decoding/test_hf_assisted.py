"""Transformers' assisted generation with a draft of ours: same text, all work counted."""

from __future__ import annotations

import pytest
import torch

from hardware.profile import Profile
from methods.decoding import common_drafts
from methods.decoding.hf_assisted import HfAssisted
from methods.decoding.speculative import Speculative
from models.base import Decoding, Unsupported
from models.text import CausalLM
from runner.conformance import check_method, tiny_text_model
from tests.methods.decoding.drafts import noisy_copy, tiny_llama
from tests.models.toy import TableModel, cycle_table

CPU = Profile(name="test", kind="cpu", label="test")
PROMPT = [5, 17, 3, 88, 41, 5, 17, 3, 63]


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> CausalLM:
    model = tiny_llama("llama-grouped")
    draft = noisy_copy(model, 0.02)
    monkeypatch.setattr(common_drafts, "load_draft", lambda draft_id, target: draft)
    return model


def test_greedy_texts_are_those_of_transformers_and_ours(target: CausalLM) -> None:
    decoding = Decoding(max_new_tokens=30, ignore_eos=True)
    with HfAssisted(num_draft_tokens=5).apply(target, CPU) as changed:
        found = changed.generate(PROMPT, decoding)
    draft = common_drafts.draft_for("tiny-draft", target)
    ids = torch.tensor([PROMPT])
    expected = target.module.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=30,
        eos_token_id=None,
        pad_token_id=0,
        do_sample=False,
        assistant_model=draft.module,
    )
    assert list(found.token_ids) == expected[0, len(PROMPT) :].tolist()
    assert found.token_ids == target.generate(PROMPT, decoding).token_ids


def test_the_trace_counts_both_models(target: CausalLM) -> None:
    decoding = Decoding(max_new_tokens=30, ignore_eos=True)
    with HfAssisted(num_draft_tokens=4, confidence=0.0).apply(target, CPU) as changed:
        trace = changed.generate(PROMPT, decoding).trace
    assert sum(trace.accepted) > 0
    assert max(forward.width for forward in trace.forwards) == 5
    # Four drafts are four forwards of the assistant; the last steps have less to draft.
    steps = 1 + len(trace.forwards)
    assert 4 * (steps - 3) <= trace.draft_forwards <= 4 * steps
    own = sum(target.facts.flops(each) for each in (*trace.prefill, *trace.forwards))
    assert trace.flops > own
    emitted = sum(trace.accepted) + len(trace.forwards) + int(trace.notes["prefill_tokens"])
    assert emitted == 30


def test_an_unsure_assistant_drafts_less(target: CausalLM) -> None:
    decoding = Decoding(max_new_tokens=30, ignore_eos=True)
    forwards = []
    for confidence in (0.0, 1.0):
        with HfAssisted(num_draft_tokens=6, confidence=confidence).apply(target, CPU) as changed:
            forwards.append(changed.generate(PROMPT, decoding).trace.draft_forwards)
    assert forwards[1] < forwards[0]


def test_it_keeps_pace_with_our_own_chain(target: CausalLM) -> None:
    decoding = Decoding(max_new_tokens=40, ignore_eos=True)
    with HfAssisted(num_draft_tokens=4, confidence=0.0).apply(target, CPU) as changed:
        theirs = changed.generate(PROMPT, decoding).trace
    with Speculative(num_draft_tokens=4).apply(target, CPU) as changed:
        ours = changed.generate(PROMPT, decoding).trace
    # They draft before the first forward, so one step is hidden in the prefill.
    assert abs(len(theirs.forwards) + 1 - len(ours.forwards)) <= 2


def test_the_assistant_is_left_as_it_was(target: CausalLM) -> None:
    draft = common_drafts.draft_for("tiny-draft", target)
    before = draft.module.generation_config
    settings = before.to_dict()
    with HfAssisted().apply(target, CPU) as changed:
        once = changed.generate(PROMPT, Decoding(max_new_tokens=20, ignore_eos=True))
        again = changed.generate(PROMPT, Decoding(max_new_tokens=20, ignore_eos=True))
    assert once.trace.draft_forwards == again.trace.draft_forwards  # no threshold was kept
    assert draft.module.generation_config is before
    assert before.to_dict() == settings
    assert not draft.module._forward_pre_hooks


def test_it_keeps_the_contract() -> None:
    method = HfAssisted(draft="layers:1", num_draft_tokens=4)
    assert [check for check in check_method(method, tiny_text_model()) if not check.ok] == []


def test_a_model_that_is_not_of_transformers_is_refused() -> None:
    with (
        pytest.raises(Unsupported, match="'table' has no transformers model as its `module`"),
        HfAssisted().apply(TableModel(cycle_table(3)), CPU),
    ):
        pass


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"num_draft_tokens": 0}, "num_draft_tokens must be a whole number from 1 to 64, got 0"),
        ({"confidence": 1.5}, r"confidence must lie in \[0, 1\], got 1.5"),
        ({"draft": ""}, "draft must be the id of a model, got ''"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        HfAssisted(**wrong)  # type: ignore[arg-type]  # what is tested
