"""Hot primitives of the decode loop: `pytest tests/benchmarks -m slow --benchmark-enable`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from models.decode import accept_greedy
from models.draft_tree import DraftTree, Topology
from models.native.build import compiler
from tests.models.tiny import tiny_model

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("nodes", [1, 16, 81])
def test_accept_greedy_over_a_real_vocabulary(benchmark: Any, nodes: int) -> None:
    tree = DraftTree(Topology.chain(nodes - 1), np.zeros(nodes, dtype=np.int64))
    logits = torch.randn(nodes, 49152, generator=torch.Generator().manual_seed(0))
    accepted = benchmark(accept_greedy, tree, logits)
    assert accepted.path[0] == 0


@pytest.mark.parametrize("kernels", ["transformers", *(["native"] if compiler() else [])])
def test_overhead_of_one_step_of_a_tiny_model(benchmark: Any, kernels: Any) -> None:
    session = tiny_model("llama", kernels=kernels).session(64)
    session.prefill([5, 6, 7])
    tree = DraftTree.chain(8, [9, 10, 11])
    logits = benchmark(session.verify, tree)
    assert logits.shape == (4, 97)


def test_ancestors_of_a_wide_tree(benchmark: Any) -> None:
    parents = [-1, *((node - 1) // 3 for node in range(1, 81))]
    matrix = benchmark(lambda: Topology(parents).ancestors)
    assert matrix.sum() == (Topology(parents).depths + 1).sum()
