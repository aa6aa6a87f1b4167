"""Every drafting method on small random models of the architectures: the text stays the same."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from hardware.profile import Profile
from methods.decoding.autoregressive import Autoregressive
from methods.decoding.common import DecodingMethod
from methods.decoding.prompt_lookup import PromptLookup
from methods.decoding.random_drafts import RandomDrafts
from methods.decoding.token_recycling import TokenRecycling
from models.base import Decoding, Session
from models.decode import NoDraft, decode
from models.draft_tree import DraftTree, TreeBuilder
from models.native.build import compiler
from models.text import CausalLM
from tests.models.tiny import ARCHITECTURES, tiny_model

CPU = Profile(name="test", kind="cpu", label="test")
PROMPT = [5, 17, 3, 88, 41, 2, 9, 63, 12, 5, 17, 3]
MODELS = [(name, "transformers") for name in ARCHITECTURES] + [
    (name, "native") for name in ("llama", "qwen2") if compiler()
]
METHODS: list[DecodingMethod] = [
    PromptLookup(num_tokens=6),
    TokenRecycling(),
    TokenRecycling(tree_nodes=12, prompt_update=True, skip_unknown=True, state="session"),
    TokenRecycling(tree_nodes=12, update="accepted", dtype="int32"),
    RandomDrafts(tree_nodes=20),
]


def gaps(model: CausalLM, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
    """Return how far each emitted token's logit lies under the best, all read in one forward."""
    text = [*prompt, *output]
    with torch.inference_mode():
        logits = model.module(torch.tensor([text[:-1]])).logits[0, len(prompt) - 1 :].float()
    return logits.max(dim=-1).values - logits[range(len(output)), output]


@pytest.mark.parametrize(("architecture", "kernels"), MODELS)
def test_greedy_texts_are_the_models_own(architecture: str, kernels: str) -> None:
    model = tiny_model(architecture, kernels=kernels)
    decoding = Decoding(max_new_tokens=25, ignore_eos=True)
    plain = model.generate(PROMPT, decoding)
    assert gaps(model, PROMPT, plain.token_ids).max() <= 1e-3
    for method in METHODS:
        with method.apply(model, CPU) as changed:
            drafted = changed.generate(PROMPT, decoding)
        assert gaps(model, PROMPT, drafted.token_ids).max() <= 1e-3, method
        assert drafted.token_ids == plain.token_ids, method
        assert any(forward.width > 1 for forward in drafted.trace.forwards), method


@pytest.mark.parametrize(("architecture", "kernels"), MODELS)
def test_after_drafting_the_cache_is_that_of_a_fresh_prefill(
    architecture: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(architecture, kernels=kernels)
    opened: list[Session] = []
    session = model.session
    monkeypatch.setattr(
        model, "session", lambda capacity: opened.append(session(capacity)) or opened[-1]
    )
    decoding = Decoding(max_new_tokens=25, ignore_eos=True)
    truth = decode(model, PROMPT, decoding).token_ids
    drafted = decode(model, PROMPT, decoding, HiddenTruth([*PROMPT, *truth]))
    assert drafted.token_ids == truth
    assert max(drafted.trace.accepted) == 3
    fresh = session(100)
    fresh.prefill([*PROMPT, *truth][: opened[-1].length])
    assert opened[-1].length == fresh.length == len(PROMPT) + 24
    for found, expected in zip(opened[-1].cached(), fresh.cached(), strict=True):
        assert (found - expected).abs().max() < 1e-4


class HiddenTruth(NoDraft):
    """Drafts the true continuation three deep, last among wrong siblings at every level."""

    max_nodes = 12

    def __init__(self, text: Sequence[int]) -> None:
        self._text = text

    def draft(self, token_ids: Sequence[int], budget: int) -> DraftTree:
        builder, node = TreeBuilder(token_ids[-1]), 0
        for token in self._text[len(token_ids) : len(token_ids) + min(3, budget)]:
            for wrong in (1, 2):
                builder.add(node, (token + wrong) % 97)
            node = builder.add(node, token)
        return builder.build()


@pytest.mark.parametrize(
    "neutral",
    [
        Autoregressive(),
        PromptLookup(num_tokens=0),
        TokenRecycling(tree_nodes=0),
        RandomDrafts(tree_nodes=0),
    ],
    ids=lambda method: type(method).__name__,
)
@pytest.mark.parametrize("kernels", ["transformers", *(["native"] if compiler() else [])])
def test_a_tree_of_one_node_is_plain_decoding_to_the_bit(
    neutral: DecodingMethod, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(kernels=kernels)

    def logits_of(run: CausalLM) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        session = type(model.session(1))
        verify = session.verify
        with monkeypatch.context() as patch:
            patch.setattr(
                session,
                "verify",
                lambda self, tree: seen.append(verify(self, tree).clone()) or seen[-1],
            )
            run.generate(PROMPT, Decoding(max_new_tokens=20, ignore_eos=True))
        return seen

    plain = logits_of(model)
    with neutral.apply(model, CPU) as changed:
        drafted = logits_of(changed)
    assert len(plain) == len(drafted) == 19
    assert all(torch.equal(a, b) for a, b in zip(plain, drafted, strict=True))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_text_may_fill_the_context_to_its_last_position(
    method: DecodingMethod, architecture: str
) -> None:
    model = tiny_model(architecture)
    decoding = Decoding(max_new_tokens=30, ignore_eos=True)
    prompt = (PROMPT * 20)[: model.facts.max_positions - 30]
    with method.apply(model, CPU) as changed:
        assert (
            changed.generate(prompt, decoding).token_ids
            == model.generate(prompt, decoding).token_ids
        )
        one = changed.generate([7], decoding)
    assert one.token_ids == model.generate([7], decoding).token_ids


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_sampled_texts_with_equal_seeds_are_the_plain_ones(method: DecodingMethod) -> None:
    model = tiny_model()
    for seed in range(2):
        decoding = Decoding(max_new_tokens=20, temperature=0.8, seed=seed, ignore_eos=True)
        with method.apply(model, CPU) as changed:
            assert (
                changed.generate(PROMPT, decoding).token_ids
                == model.generate(PROMPT, decoding).token_ids
            )
