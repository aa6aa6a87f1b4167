"""Sessions over transformers and over the native kernels compute what the model computes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from models.base import Decoding, Forward, Unsupported
from models.decode import NoDraft
from models.draft_tree import DraftTree, Topology
from models.native.build import compiler
from models.text import CausalLM, TransformersSession, tree_mask
from tests.models.tiny import ARCHITECTURES, NumberTokenizer, tiny_model, tiny_module

PROMPT = [5, 17, 3, 88, 41, 2, 9, 63, 12, 30, 77, 51]
KERNELS = ["transformers", "static", *(["native"] if compiler() else [])]
SESSIONS = [(name, kernels) for name in ARCHITECTURES for kernels in ("transformers", "static")] + [
    (name, "native") for name in ("llama", "qwen2") if compiler()
]
TREE = DraftTree(
    Topology([-1, 0, 0, 1, 1, 2, 3]), np.array([11, 24, 55, 6, 70, 31, 8], dtype=np.int64)
)


def reference_logits(architecture: str, token_ids: list[int]) -> torch.Tensor:
    """All logits of a text by one plain forward without any cache."""
    with torch.inference_mode():
        return tiny_module(architecture)(torch.tensor([token_ids]), use_cache=False).logits[0]


def root_path(tree: DraftTree, node: int) -> list[int]:
    tokens: list[int] = []
    while node >= 0:
        tokens.insert(0, int(tree.tokens[node]))
        node = int(tree.topology.parents[node])
    return tokens


@pytest.mark.parametrize(("architecture", "kernels"), SESSIONS)
def test_prefill_gives_the_logits_of_a_plain_forward(architecture: str, kernels: str) -> None:
    model = tiny_model(architecture, kernels=kernels)
    expected = reference_logits(architecture, PROMPT)
    everything = model.session(40).prefill(PROMPT, all_logits=True)
    torch.testing.assert_close(everything, expected, atol=1e-4, rtol=1e-4)
    last = model.session(40).prefill(PROMPT)
    torch.testing.assert_close(last, expected[-1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("architecture", "kernels"), SESSIONS)
def test_each_node_of_a_tree_sees_its_own_path_only(architecture: str, kernels: str) -> None:
    session = tiny_model(architecture, kernels=kernels).session(40)
    session.prefill(PROMPT)
    logits = session.verify(TREE)
    for node in range(len(TREE)):
        expected = reference_logits(architecture, PROMPT + root_path(TREE, node))[-1]
        torch.testing.assert_close(logits[node], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("architecture", "kernels"), SESSIONS)
def test_committed_cache_equals_a_fresh_prefill(architecture: str, kernels: str) -> None:
    model = tiny_model(architecture, kernels=kernels)
    session = model.session(40)
    session.prefill(PROMPT)
    session.verify(TREE)
    session.commit([0, 2, 5])
    session.verify(DraftTree.chain(44, [1, 2]))
    session.commit([0])
    fresh = model.session(40)
    fresh.prefill([*PROMPT, 11, 55, 31, 44])
    assert session.length == fresh.length == len(PROMPT) + 4
    for ours, theirs in zip(session.cached(), fresh.cached(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("architecture", "kernels"), SESSIONS)
def test_plain_decoding_equals_generate(architecture: str, kernels: str) -> None:
    model = tiny_model(architecture, kernels=kernels)
    ours = model.generate(PROMPT, Decoding(max_new_tokens=24))
    theirs = tiny_module(architecture).generate(
        torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False, pad_token_id=0
    )
    expected = theirs[0, len(PROMPT) :].tolist()
    assert list(ours.token_ids) == expected
    assert len(ours.trace.forwards) == len(expected) - 1
    assert all(later.context == first.context + 1 for first, later in pairwise(ours.trace.forwards))


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_prompt_may_be_read_in_pieces(kernels: str) -> None:
    model = tiny_model("llama", kernels=kernels)
    session = model.session(40)
    session.prefill(PROMPT[:5])
    logits = session.prefill(PROMPT[5:], all_logits=True)
    torch.testing.assert_close(logits, reference_logits("llama", PROMPT)[5:], atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(compiler() is None, reason="the native kernels need a C compiler")
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 96, 97, 130])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_native_products_are_right_at_every_width(width: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = tiny_model("llama", kernels="native")
    finally:
        torch.set_num_threads(before)
    ids = [(7 * i * i + 3) % 97 for i in range(width)]
    logits = model.session(200).prefill(ids, all_logits=True)
    torch.testing.assert_close(logits, reference_logits("llama", ids), atol=2e-4, rtol=2e-4)


@pytest.mark.skipif(compiler() is None, reason="the native kernels need a C compiler")
def test_native_kernels_hand_on_nan() -> None:
    module = tiny_module("llama", seed=7)
    model = CausalLM(module, NumberTokenizer(), "tiny", kernels="native")
    kept = module.model.layers[1].mlp.up_proj.weight.data[3, 3].clone()
    module.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    try:
        assert bool(torch.isnan(model.session(20).prefill(PROMPT)).all())
    finally:
        module.model.layers[1].mlp.up_proj.weight.data[3, 3] = kept


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_full_session_refuses_more(kernels: str) -> None:
    session = tiny_model("llama", kernels=kernels).session(len(PROMPT) + 2)
    session.prefill(PROMPT)
    with pytest.raises(ValueError, match="do not fit behind 12 cached ones"):
        session.verify(DraftTree.chain(1, [2, 3]))


@pytest.mark.skipif(compiler() is None, reason="the native kernels need a C compiler")
@pytest.mark.parametrize(
    ("architecture", "reason"),
    [("gpt2", "not GPT2LMHeadModel"), ("mistral-sliding-window", "sliding-window")],
)
def test_native_kernels_refuse_with_the_reason(architecture: str, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        tiny_model(architecture, kernels="native")
    assert tiny_model(architecture, kernels="auto").kernels == "transformers"


def test_eager_attention_takes_the_tree_mask_added_to_the_scores() -> None:
    session = TransformersSession(tiny_module("llama", attention="eager"), 40)
    session.prefill(PROMPT)
    logits = session.verify(TREE)
    expected = reference_logits("llama", PROMPT + root_path(TREE, 6))[-1]
    torch.testing.assert_close(logits[6], expected, atol=1e-4, rtol=1e-4)


def test_a_kernel_without_tree_masks_is_refused() -> None:
    with pytest.raises(Unsupported, match="attention=sdpa"):
        tree_mask(
            np.ones((1, 1), dtype=np.bool_), "flash_attention_2", torch.float16, torch.device("cpu")
        )


def test_facts_count_what_a_forward_multiplies_with() -> None:
    module, facts = tiny_module("llama"), tiny_model("llama").facts
    embedding = module.model.embed_tokens.weight.numel()
    norms = sum(p.numel() for p in module.parameters() if p.ndim == 1)
    everything = sum(p.numel() for p in module.parameters())
    assert facts.matrix_parameters == everything - embedding - norms
    assert facts.head_parameters == embedding == 97 * 64
    body = facts.matrix_parameters - facts.head_parameters
    attended = 4 * 3 * 4 * 16 * (5 * 7 + 15)  # two products a layer, query head and pair of tokens
    assert facts.flops(Forward(5, 7)) == 2 * 5 * facts.matrix_parameters + attended
    assert facts.flops(Forward(5, 7), 1) == 2 * (5 * body + facts.head_parameters) + attended
    assert facts.eos_ids == {0}
    assert facts.weight_bytes == 4 * facts.matrix_parameters
    assert NoDraft.max_nodes == 1
