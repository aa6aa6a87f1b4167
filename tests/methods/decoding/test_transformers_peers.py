"""The peers are transformers' own loops, ended and counted as ours."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from hardware.profile import Profile
from methods.base import Method
from methods.decoding.hf_generate import HfGenerate
from methods.decoding.hf_prompt_lookup import HfPromptLookup
from methods.decoding.prompt_lookup import PromptLookup
from models.base import Decoding, Forward, Generation, TextGenerator, Unsupported
from models.text import CausalLM
from tests.models.tiny import tiny_model
from tests.models.toy import TableModel, cycle_table

CPU = Profile(name="test", kind="cpu", label="test")
PROMPT = [5, 17, 3, 88, 41, 5, 17, 3, 63]
PEERS = [HfGenerate(), HfPromptLookup()]


def generate(
    method: Method[TextGenerator],
    model: CausalLM,
    decoding: Decoding,
    prompt: Sequence[int] = PROMPT,
) -> Generation:
    with method.apply(model, CPU) as changed:
        return changed.generate(prompt, decoding)


def by_hand(model: CausalLM, length: int, **settings: object) -> list[int]:
    """Call transformers as its documentation says."""
    ids = torch.tensor([PROMPT])
    sequences = model.module.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=length,
        pad_token_id=0,
        **settings,
    )
    return sequences[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_greedy_texts_are_those_of_transformers(architecture: str) -> None:
    model = tiny_model(architecture)
    decoding = Decoding(max_new_tokens=24)
    plain = generate(HfGenerate(), model, decoding)
    assert list(plain.token_ids) == by_hand(model, 24, do_sample=False)
    looked_up = generate(HfPromptLookup(num_tokens=4), model, decoding)
    assert list(looked_up.token_ids) == by_hand(
        model, 24, do_sample=False, prompt_lookup_num_tokens=4
    )
    assert plain.token_ids == looked_up.token_ids == model.generate(PROMPT, decoding).token_ids


def test_sampled_texts_are_those_of_transformers_over_the_whole_vocabulary() -> None:
    model = tiny_model()
    torch.manual_seed(7)
    expected = by_hand(model, 24, do_sample=True, temperature=0.9, top_k=0)
    state = torch.random.get_rng_state()
    decoding = Decoding(max_new_tokens=24, temperature=0.9, seed=7)
    found = generate(HfGenerate(), model, decoding)
    assert list(found.token_ids) == expected[: len(found.token_ids)]
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is untouched
    other = Decoding(max_new_tokens=24, temperature=0.9, seed=8)
    assert generate(HfGenerate(), model, other).token_ids != found.token_ids


def test_a_plain_trace_has_one_forward_a_token() -> None:
    model = tiny_model()
    decoding = Decoding(max_new_tokens=12, ignore_eos=True)
    ours, theirs = model.generate(PROMPT, decoding), generate(HfGenerate(), model, decoding)
    assert theirs.trace.prefill == ours.trace.prefill == [Forward(len(PROMPT), 0)]
    assert theirs.trace.forwards == ours.trace.forwards
    assert theirs.trace.accepted == ours.trace.accepted
    assert theirs.trace.flops == ours.trace.flops
    assert list(theirs.trace.marks) == ["prefill", "decode"]


def test_looked_up_drafts_show_in_the_trace() -> None:
    model = tiny_model()
    decoding = Decoding(max_new_tokens=60, ignore_eos=True)
    trace = generate(HfPromptLookup(), model, decoding).trace
    assert any(forward.width > 1 for forward in trace.forwards)
    assert sum(trace.accepted) > 0
    emitted = sum(trace.accepted) + len(trace.forwards) + int(trace.notes["prefill_tokens"])
    assert emitted == 60
    # The same drafts as ours, once both have the same text before them.
    with PromptLookup().apply(model, CPU) as changed:
        ours = changed.generate(PROMPT, decoding).trace
    assert abs(len(ours.forwards) - len(trace.forwards)) <= 1


@pytest.mark.parametrize("peer", PEERS)
def test_stop_strings_end_the_text_where_ours_end(peer: Method[TextGenerator]) -> None:
    model = tiny_model()
    free = model.generate(PROMPT, Decoding(max_new_tokens=30)).token_ids
    stop = (f"{free[6]} {free[7]}",)
    decoding = Decoding(max_new_tokens=30, stop=stop)
    expected = model.generate(PROMPT, decoding)
    found = generate(peer, model, decoding)
    assert expected.finish == "stop"
    assert (found.token_ids, found.text, found.finish) == (
        expected.token_ids,
        expected.text,
        expected.finish,
    )


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_end_of_text_ends_the_text_where_ours_end(
    peer: Method[TextGenerator], ignore_eos: bool
) -> None:
    model = tiny_model()
    free = model.generate(PROMPT, Decoding(max_new_tokens=30, ignore_eos=True)).token_ids
    # Any token may play the end of the text.
    model.facts = type(model.facts)(**{**vars(model.facts), "eos_ids": frozenset({free[9]})})
    decoding = Decoding(max_new_tokens=30, ignore_eos=ignore_eos)
    expected, found = model.generate(PROMPT, decoding), generate(peer, model, decoding)
    assert (found.token_ids, found.text, found.finish) == (
        expected.token_ids,
        expected.text,
        expected.finish,
    )
    assert found.finish == ("length" if ignore_eos else "eos")


def test_a_checkpoints_own_generation_defaults_are_put_aside_and_come_back() -> None:
    model = tiny_model()
    plain = model.generate(PROMPT, Decoding(max_new_tokens=20))
    own = model.module.generation_config
    own.repetition_penalty, own.top_k = 5.0, 1
    try:
        assert (
            generate(HfGenerate(), model, Decoding(max_new_tokens=20)).token_ids == plain.token_ids
        )
        with pytest.raises(RuntimeError, match="on purpose"), HfGenerate().apply(model, CPU):
            raise RuntimeError("on purpose")
        assert model.module.generation_config is own
        assert (own.repetition_penalty, own.top_k) == (5.0, 1)
    finally:
        own.repetition_penalty, own.top_k = None, None
    assert not model.module._forward_pre_hooks


def test_the_context_is_kept_as_in_our_loop() -> None:
    with pytest.raises(Unsupported, match="exceed the context of 256 tokens"):
        generate(HfGenerate(), tiny_model(), Decoding(max_new_tokens=250))
    with pytest.raises(ValueError, match="at least one"):
        generate(HfGenerate(), tiny_model(), Decoding(max_new_tokens=5), [])


@pytest.mark.parametrize("peer", PEERS)
def test_a_model_that_is_not_of_transformers_is_refused(peer: Method[TextGenerator]) -> None:
    with (
        pytest.raises(Unsupported, match="'table' has no transformers model as its `module`"),
        peer.apply(TableModel(cycle_table(3)), CPU),
    ):
        pass


def test_lookup_of_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="num_tokens must be a whole number from 1 to 64, got 0"):
        HfPromptLookup(num_tokens=0)
