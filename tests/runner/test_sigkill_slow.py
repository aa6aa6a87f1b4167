"""Two hundred SIGKILLs at random moments of a run: the worker, or the whole run with it."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from results.ingest import ingest
from results.store import Store
from results.verify import verify
from runner.plan import make_plan
from tests.runner.test_resume import Zygote, final_rows, request_for
from tests.runner.world import save_model

KILLS = 200


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_kills_change_nothing(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    draw = random.Random(200)
    zygote = Zygote()

    def spec_for(name: str) -> Path:
        [spec] = make_plan(request_for(tmp_path / name, model)).experiments
        path = tmp_path / f"{name}.json"
        spec.write(path)
        return path

    try:
        assert zygote.run(spec_for("undisturbed")) == 0
        expected = final_rows(Store(tmp_path / "undisturbed"))
        before = time.monotonic()
        assert zygote.run(spec_for("measured")) == 0
        whole_seconds = time.monotonic() - before
        kills, round_ = 0, 0
        while kills < KILLS:
            # A run that ends before its kill is checked, and the next one begins from nothing.
            spec, store = spec_for(f"disturbed-{round_}"), Store(tmp_path / f"disturbed-{round_}")
            round_ += 1
            is_over = False
            while not is_over and kills < KILLS:
                # From the first moment to past the end: loading, sampling, scoring, sealing.
                status = zygote.run(
                    spec, lambda: time.sleep(draw.uniform(0.0, 1.2 * whole_seconds))
                )
                is_over = not os.WIFSIGNALED(status)
                kills += not is_over
                for experiment_id in store.experiment_ids():
                    # Whatever is there can be read at any moment.
                    list(store.samples(experiment_id))
                    list(store.cells(experiment_id))
            if not is_over:
                assert zygote.run(spec) == 0
            assert final_rows(store) == expected
            ingest(store.path)
            assert verify(store.path) == []
        assert round_ > 3
    finally:
        zygote.close()
