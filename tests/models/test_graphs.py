"""Forwards over static buffers, and on a GPU their recordings.

That they compute what the model computes is tested with the other sessions in test_text.py.
"""

from __future__ import annotations

import copy
import gc

import numpy as np
import pytest
import torch

from models.base import Decoding, Unsupported
from models.draft_tree import DraftTree, Topology
from models.graphs import WIDTHS, GraphPool
from models.text import CausalLM, TransformersSession
from tests.models.tiny import ARCHITECTURES, NumberTokenizer, tiny_model, tiny_module

PROMPT = [5, 17, 3, 88, 41, 2, 9, 63, 12, 30, 77, 51]


def test_a_forward_is_recorded_once_a_width_and_lent_on() -> None:
    recorded: list[int] = []

    def record(forward):  # type: ignore[no-untyped-def]
        recorded.append(len(recorded))
        return forward

    pool = GraphPool(tiny_module("llama"), record=record)
    for _ in range(3):
        session = pool.session(60)
        session.prefill(PROMPT)
        for nodes in (1, 3, 4, 1):
            session.verify(DraftTree.chain(7, list(range(1, nodes))))
            session.commit([0])
        del session
        gc.collect()
    assert len(recorded) == 2  # widths 1 and 4


def test_two_open_sessions_share_no_buffer() -> None:
    pool = GraphPool(tiny_module("llama"), record=lambda forward: forward)
    first, second = pool.session(60), pool.session(60)
    first.prefill(PROMPT)
    second.prefill(PROMPT[::-1])
    expected = TransformersSession(tiny_module("llama"), 60)
    expected.prefill(PROMPT)
    tree = DraftTree.chain(7, [1, 2])
    torch.testing.assert_close(first.verify(tree), expected.verify(tree), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("nodes", [1, 2, 5, 16, 17, 128, 131])
def test_padding_changes_nothing(nodes: int) -> None:
    """A tree of any size gives what it gives unpadded; one wider than all runs unrecorded."""
    assert WIDTHS[-1] == 128
    topology = Topology([-1, *(max(0, node - 2) for node in range(1, nodes))])
    tree = DraftTree(topology, np.arange(nodes, dtype=np.int64) % 97)
    sessions = [
        GraphPool(tiny_module("llama"), record=lambda forward: forward).session(160),
        TransformersSession(tiny_module("llama"), 160),
    ]
    logits = []
    for session in sessions:
        session.prefill(PROMPT)
        session.verify(DraftTree.chain(3, [4, 5, 6]))  # leaves drafts behind the committed tokens
        session.commit([0, 1])
        logits.append(session.verify(tree))
    assert logits[0].shape == (nodes, 97)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_a_session_refuses_what_does_not_fit() -> None:
    session = GraphPool(tiny_module("llama"), record=lambda forward: forward).session(13)
    session.prefill(PROMPT)
    session.verify(DraftTree.chain(1, []))
    with pytest.raises(ValueError, match="2 tokens do not fit behind 12"):
        session.verify(DraftTree.chain(1, [2]))


def test_graphs_need_a_gpu_and_positions_that_stand_still() -> None:
    with pytest.raises(Unsupported, match="graphs run on a GPU"):
        tiny_model(kernels="graphs")
    module = copy.deepcopy(tiny_module("llama"))
    module.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(Unsupported, match="dynamic"):
        GraphPool(module)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recorded_forwards_give_what_unrecorded_ones_give(architecture: str) -> None:
    module = copy.deepcopy(tiny_module(architecture)).to("cuda")
    graphs = CausalLM(module, NumberTokenizer(), "tiny", kernels="auto")
    plain = CausalLM(module, NumberTokenizer(), "tiny", kernels="transformers")
    assert graphs.kernels == "graphs"
    decoding = Decoding(max_new_tokens=24)
    for prompt in (PROMPT, PROMPT[::-1], PROMPT[3:]):
        assert (
            graphs.generate(prompt, decoding).token_ids
            == plain.generate(prompt, decoding).token_ids
        )
    tree = DraftTree(Topology([-1, 0, 0, 1, 1, 2]), np.array([11, 24, 55, 6, 70, 31]))
    logits = []
    for model in (graphs, plain):
        session = model.session(40)
        session.prefill(PROMPT)
        session.verify(tree)
        session.commit([0, 2, 5])
        logits.append(session.verify(tree))
    torch.testing.assert_close(*logits, atol=1e-3, rtol=1e-3)
