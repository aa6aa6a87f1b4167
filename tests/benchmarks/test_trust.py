"""What the harness must show of itself on the embedded model; needs its weights and quiet cores.

`python -m pytest tests/benchmarks/test_trust.py -m weights -s` prints the figures.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import duckdb
import pytest

from models.base import Decoding
from models.loading import LoadSettings, is_fetched, load
from results.ingest import ingest
from runner.execute import execute
from runner.plan import make_plan
from runner.request import Request

pytestmark = [
    pytest.mark.weights,
    pytest.mark.slow,
    pytest.mark.skipif(not is_fetched("smollm2-135m"), reason="fetch smollm2-135m first"),
]

TWIN = '''
from contextlib import contextmanager
from dataclasses import dataclass
from methods.base import Method, Output

@dataclass(frozen=True, kw_only=True)
class Twin(Method):
    """The baseline under another name.

    Attributes:
        number: Which twin.
    """

    number: int = 0
    name = "twin"
    output = Output.IDENTICAL
    capability = "TextGenerator"

    @contextmanager
    def apply(self, model, hardware):
        yield model
'''
REPETITIONS = 20


@pytest.mark.timeout(3600)
def test_twins_of_the_baseline_are_never_called_different(tmp_path: Path) -> None:
    """A/A: twenty twins beside the baseline, 16 items each, interleaved with it."""
    plugin = tmp_path / "twin.py"
    plugin.write_text(TWIN)
    request = Request(
        methods=(
            "autoregressive",
            *(f"twin:number={number}" for number in range(1, REPETITIONS + 1)),
        ),
        tasks=("humaneval-mini:max_new_tokens=16",),
        models=("smollm2-135m",),
        limit=16,
        store=tmp_path / "store",
        plugins=(plugin,),
        offline=True,
    )
    outcome = execute(make_plan(request), lambda event: None)
    assert outcome.failed == 0
    with duckdb.connect(str(ingest(request.store)), read_only=True) as index:
        rows = index.execute(
            "SELECT speedup, speedup_low, speedup_high, speed_verdict FROM comparison "
            "WHERE method = 'twin' ORDER BY speedup"
        ).fetchall()
        share = index.execute("SELECT max(harness_share) FROM comparison").fetchall()[0][0]
    print()
    for row in rows:
        print("{:.3f} [{:.3f}, {:.3f}] {}".format(*row))
    print(f"the harness took {share:.2%} of the experiment's wall time")
    assert len(rows) == REPETITIONS
    assert {row[3] for row in rows} <= {"SAME", "INCONCLUSIVE"}
    assert share < 0.02


@pytest.mark.timeout(1200)
def test_the_baseline_beats_generate_and_nears_the_memory_roofline() -> None:
    """Interleaved with transformers' generate, greedy, same dtype, batch 1, 96 tokens."""
    import torch

    from hardware import ceilings, detect

    model = load("smollm2-135m", LoadSettings(), offline=True)
    bandwidth = ceilings.measured(detect.detect(), refresh=True).ceilings.read_bandwidth  # type: ignore[union-attr]  # just measured
    ids = model.tokenizer.encode('def is_prime(n):\n    """Return whether n is prime."""')
    prompt, tokens = torch.tensor([ids], device=model.device), 96

    def ours() -> float:
        started = time.perf_counter()
        result = model.generate(ids, Decoding(max_new_tokens=tokens, ignore_eos=True))
        assert len(result.token_ids) == tokens
        return time.perf_counter() - started

    def theirs() -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            output = model.module.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
            )
        assert output.shape[1] == len(ids) + tokens
        model.synchronize()
        return time.perf_counter() - started

    ours(), theirs()
    pairs = [(ours(), theirs()) for _ in range(5)]
    ratio = statistics.median(theirs_ / ours_ for ours_, theirs_ in pairs)
    fastest = min(seconds for seconds, _ in pairs)
    floor = tokens * model.facts.weight_bytes / bandwidth
    print(
        f"\n{model.kernels}: {tokens / fastest:.1f} tokens/s, "
        f"{ratio:.2f} times transformers' generate, {floor / fastest:.0%} of the roofline at "
        f"{bandwidth / 1e9:.1f} GB/s"
    )
    assert ratio >= 1.3
