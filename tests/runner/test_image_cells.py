"""Image generators in the runner: planned, priced, killed and resumed, scored again, certified."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from models.base import ImageSampling
from models.image_generation import (
    AutoregressiveImages,
    ImageDraws,
    LoopedImages,
    RasterLoop,
    TokenPipeline,
    read_logits,
)
from results.store import Store
from runner.certificate import (
    DISTRIBUTION_LEVEL,
    AskedImages,
    asked,
    difference,
    distribution_test,
    reading,
)
from runner.corpus import recompute
from runner.plan import make_plan
from runner.registry import Registry
from runner.request import Request
from runner.spec import ExperimentSpec
from runner.worker import calibrate
from tasks.imagenet_fid_mini import ImagenetFidMini
from tests.models.tiny_images import networks, save_image_model
from tests.runner.test_resume import Zygote, final_rows, zygote

__all__ = ["zygote"]  # a fixture

SAMPLED = ImageSampling(guidance_scale=1.5)


@pytest.fixture(scope="module")
def model() -> AutoregressiveImages:
    return AutoregressiveImages(*networks(), "tiny")


def planned(tmp_path: Path, model_id: str, store: str, limit: int | None = None) -> ExperimentSpec:
    request = Request(
        methods=("raster",),
        tasks=("imagenet-fid-mini:images=24,batch=2",),
        models=(model_id,),
        store=tmp_path / store,
        limit=limit,
        offline=True,
    )
    [spec] = make_plan(request).experiments
    return spec


def test_a_limit_is_part_of_the_task_and_of_its_metrics(tmp_path: Path) -> None:
    model_id = save_image_model(tmp_path / "model")
    spec = planned(tmp_path, model_id, "store", limit=3)
    assert len(spec.items) == 3
    assert "images=6" in spec.task
    assert spec.task != planned(tmp_path, model_id, "store").task


@pytest.mark.timeout(300)
def test_a_killed_run_goes_on_and_its_stored_pictures_give_the_scores_again(
    tmp_path: Path, zygote: Zygote
) -> None:
    model_id = save_image_model(tmp_path / "model")
    specs = {}
    for name in ("undisturbed", "disturbed"):
        specs[name] = tmp_path / f"{name}.json"
        planned(tmp_path, model_id, name).write(specs[name])
    store = Store(tmp_path / "disturbed")

    def after_some_batches() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            journals = list(store.path.glob("shards/*/samples.jsonl"))
            if journals and journals[0].read_bytes().count(b"\n") >= 4:
                return
            time.sleep(0.002)

    assert os.WIFSIGNALED(zygote.run(specs["disturbed"], after_some_batches))
    [experiment_id] = store.experiment_ids()
    before = {sample.item_id: sample.seconds for sample in store.samples(experiment_id)}
    assert 4 <= len(before) < 12
    assert zygote.run(specs["disturbed"]) == 0
    assert zygote.run(specs["undisturbed"]) == 0
    after = {sample.item_id: sample.seconds for sample in store.samples(experiment_id)}
    # What was there is not measured again.
    assert before.items() <= after.items()
    assert final_rows(store) == final_rows(Store(tmp_path / "undisturbed"))
    [corpus] = [each for each in store.corpus(experiment_id) if each.metric.startswith("kid")]
    assert corpus.value is not None
    # All numbers come from the stored pictures alone.
    again = recompute(store.path, Registry())
    assert (again.problems, again.left_out) == ([], [])
    samples = {sample.item_id: sample for sample in store.samples(experiment_id)}
    task = ImagenetFidMini(images=24, batch=2)
    scores = {(score.item_id, score.metric): score.value for score in store.scores(experiment_id)}
    for item in task.items():
        for metric, value in task.score(item, samples[item.id].output).items():
            assert scores[item.id, metric] == value
    # Less than the raw bytes of the pictures and what base64 adds to them.
    sample = next(iter(samples.values()))
    assert len(sample.output) < 2 * 16 * 16 * 3 * 4 / 3 + 1000
    assert sample.output_tokens == 32
    assert sample.target_forwards == sample.decode_tokens == 30


def test_the_cost_of_a_window_is_measured_by_width(model: AutoregressiveImages) -> None:
    curve = calibrate(model, 0.01, 0)
    assert curve.widths == (1, 2, 4, 8, 16)
    assert all(seconds > 0 for row in curve.seconds for seconds in row)


def test_what_a_task_asks_for_can_be_asked_again(model: AutoregressiveImages) -> None:
    task = ImagenetFidMini(images=3, batch=3, temperature=0.5)
    found = asked(task, model, next(task.items()))
    assert found == AskedImages((0, 1, 2), ImageSampling(guidance_scale=1.5, temperature=0.5))


def test_a_greedy_difference_is_a_tie_only_where_logits_are_as_good_as_equal(
    model: AutoregressiveImages,
) -> None:
    greedy = ImageSampling(guidance_scale=1.5, temperature=0.0)
    question = AskedImages((3, 7), greedy)
    rows = model.generate((3, 7), (0, 0), greedy).tokens
    plain = [*rows[0], *rows[1]]
    assert difference(model, question, plain, plain) is None
    for place in (5, 16 + 9):
        changed = list(plain)
        changed[place] = (changed[place] + 1) % 40
        found = difference(model, question, plain, changed)
        assert found is not None
        assert (found["position"], found["verdict"]) == (place, "violation")
        row = place // 16
        image = torch.tensor([plain[16 * row : 16 * row + 16]])
        logits = read_logits(model, question.conditions[row : row + 1], image, greedy)[
            0, place % 16
        ]
        gap = float(logits.max() - min(logits[changed[place]], logits[plain[place]]))
        assert found["top2_gap"] == pytest.approx(gap)
        assert gap > 1e-3
    # A head whose two best tokens are the same makes them a tie.
    decoder, tokenizer = networks()
    twins = AutoregressiveImages(decoder, tokenizer, "twins")
    other = (plain[5] + 1) % 40
    decoder.output.weight[other] = decoder.output.weight[plain[5]]
    rows = twins.generate((3, 7), (0, 0), greedy).tokens
    base = [*rows[0], *rows[1]]
    place = next(n for n, token in enumerate(base) if token in (plain[5], other))
    changed = list(base)
    changed[place] = plain[5] + other - base[place]
    found = difference(twins, question, base, changed)
    assert found is not None
    assert (found["position"], found["verdict"]) == (place, "tie")


class Stale(RasterLoop):
    """A wrong sampler: tokens are drawn by the conditional law alone, whatever the guidance."""

    def run(
        self,
        model: object,
        session: object,
        pipeline: TokenPipeline,
        draws: ImageDraws,
        conditions: Sequence[object],
    ) -> torch.Tensor:
        unguided = TokenPipeline(
            sampling=ImageSampling(temperature=1.3), constraints=pipeline.constraints
        )
        return super().run(model, session, unguided, draws, conditions)  # type: ignore[arg-type]


def test_the_test_of_sampled_images_passes_the_right_sampler_and_finds_the_wrong_one(
    model: AutoregressiveImages,
) -> None:
    labels = [0, 5, 9]
    question = AskedImages(tuple(labels), SAMPLED)

    def sums(sampler: object, first: int) -> list[object]:
        found = []
        for number in range(24):
            seeds = [first + 3 * number + row for row in range(3)]
            made = sampler.generate(labels, seeds, SAMPLED)  # type: ignore[attr-defined]
            ids = [token for row in made.tokens for token in row]
            found.append(reading(model, question, ids))
        return found

    plain = sums(model, 0)
    right = distribution_test(plain, sums(model, 1000), seed=0)  # type: ignore[arg-type]
    wrong = distribution_test(plain, sums(LoopedImages(model, Stale), 1000), seed=0)  # type: ignore[arg-type]
    assert right["p"] > DISTRIBUTION_LEVEL
    assert wrong["p"] < DISTRIBUTION_LEVEL
    # The sums are centred: their mean over exact samples is nothing.
    surprise = np.array([each.surprise for each in plain])  # type: ignore[attr-defined]
    assert abs(surprise.mean()) < 4 * surprise.std() / np.sqrt(24)
