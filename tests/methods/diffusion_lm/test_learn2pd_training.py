"""How Learn2PD's filter is trained: what it is told, on which texts, and whether it learned."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.diffusion_lm.common_learn2pd import FilterKind, filter_path, load_filter
from methods.diffusion_lm.common_learn2pd_training import (
    Collected,
    Samples,
    calibrate,
    calibration_prompts,
    collect,
    judged,
    main,
    split_texts,
    threshold_loss,
    train_filter,
    validation_loss,
)
from methods.diffusion_lm.learn2pd import Learn2PD
from models.base import Decoding
from models.embedded.tiny_dllm.data import PAD, generate
from models.masked_diffusion_decode import OneAtATime, Procedure, decode_rows
from runner.conformance_base import PROFILE
from tests.models.tiny_diffusion import save_tiny_llada, tiny_diffusion

POSITIONS = 6
BLOCK = 8


def neighbourly(texts: int, seed: int) -> Samples:
    """Blocks in which a candidate is final if it and the position before it are sure.

    A threshold on the confidence alone is right about most of them, a position's neighbour tells
    the rest.
    """
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(8 * texts, POSITIONS, generator=generator)
    before = torch.cat([torch.ones(len(confidence), 1), confidence[:, :-1]], dim=1)
    label = ((confidence > 0.5) & (before > 0.4)).float()
    return Samples(confidence, label, torch.arange(texts).repeat_interleave(8))


def trained_loss(kind: FilterKind, train: Samples, validation: Samples) -> float:
    return train_filter(
        train, validation, kind=kind, hidden=24, epochs=700, patience=300
    ).validation_loss


def test_labels_are_the_models_own_decoding_and_blocks_its_confidences() -> None:
    model = tiny_diffusion()
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [3]]
    collected = collect(model, prompts, answer_length=16, block_length=BLOCK, batch=2)
    finals = decode_rows(
        model,
        prompts,
        Decoding(max_new_tokens=16),
        rule=OneAtATime(),
        procedure=Procedure(block_length=BLOCK),
    )
    samples = collected.samples
    assert samples.confidence.shape == samples.label.shape == (len(samples.text), BLOCK)
    assert sorted(set(samples.text.tolist())) == [0, 1, 2]
    assert collected.plain_forwards == sum(len(row.forwards) for row in finals) == 48
    # One sample a forward of the oracle, which is the last to know a block: all is right then.
    assert collected.oracle_forwards == len(samples.text) < 48
    assert ((samples.confidence > 0) & (samples.confidence <= 1)).all()
    assert 0.02 < float(samples.label.mean()) < 0.98
    with pytest.raises(ValueError, match="multiple of block_length"):
        collect(model, prompts, answer_length=20, block_length=BLOCK)


def test_collecting_in_batches_is_collecting_text_by_text() -> None:
    model = tiny_diffusion()
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [3]]
    together, alone = (
        collect(model, prompts, answer_length=8, block_length=BLOCK, batch=batch).samples
        for batch in (3, 1)
    )
    order = together.text.argsort(stable=True)
    torch.testing.assert_close(together.confidence[order], alone.confidence, atol=1e-4, rtol=1e-4)
    assert torch.equal(together.label[order], alone.label)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(10, 200), seed=st.integers(0, 5))
def test_no_text_is_in_two_parts_of_a_split(count: int, seed: int) -> None:
    parts = [set(part.tolist()) for part in split_texts(count, seed)]
    assert parts[0] | parts[1] | parts[2] == set(range(count))
    assert sum(map(len, parts)) == count
    assert all(parts)
    assert len(parts[0]) == int(0.8 * count)
    assert [set(part.tolist()) for part in split_texts(count, seed)] == parts


def test_samples_of_a_text_stay_together() -> None:
    samples = neighbourly(40, 0)
    split = split_texts(40)
    parts = [samples.of(part) for part in split]
    assert sum(len(part.text) for part in parts) == len(samples.text)
    for part, texts in zip(parts, split, strict=True):
        assert set(part.text.tolist()) == set(texts.tolist())
        assert len(part.text) == 8 * len(texts)
    with pytest.raises(ValueError, match="at least 10 texts"):
        split_texts(9)


def test_no_calibration_prompt_comes_twice_and_none_is_padded(tmp_path: Path) -> None:
    model = tiny_diffusion()
    prompts = calibration_prompts(model, 300)
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts) == 300
    assert not any(PAD in prompt for prompt in prompts)
    held_out = generate(2000, steps=None, split="held-out", seed=1).prompts
    assert not {tuple(prompt) for prompt in prompts} & {
        tuple(row[row != PAD].tolist()) for row in held_out
    }
    file = tmp_path / "prompts.jsonl"
    # A line separator inside a prompt, unescaped as JSON allows, ends no line of the file.
    lines = '{"prompt": "5 6 7"}\n\n{"prompt": "8\u20289"}\n{"prompt": "5 6 7"}\n'
    file.write_text(lines, encoding="utf-8")
    assert calibration_prompts(model, 9, file) == [[5, 6, 7], [8, 9]]


def test_a_filter_that_reads_blocks_learns_what_no_threshold_can() -> None:
    train, validation = neighbourly(120, 1), neighbourly(40, 2)
    by_threshold = threshold_loss(train, validation)
    by_block = trained_loss("block", train, validation)
    by_position = trained_loss("shared", train, validation)
    assert by_block < 0.7 * by_threshold
    # Each position by itself cannot know its neighbour.
    assert by_position > 0.9 * by_threshold


def test_the_best_threshold_is_found_and_said_as_two_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(400, POSITIONS, generator=generator)
    noise = torch.rand(400, POSITIONS, generator=generator) < 0.1
    label = ((confidence > 0.7) ^ noise).float()
    samples = Samples(confidence, label, torch.arange(400))
    # About one in ten is wrong on either side: the entropy of two such coins.
    coins = 0.0
    for side in (confidence > 0.7, confidence <= 0.7):
        wrong = float(noise[side].float().mean())
        coin = -(wrong * math.log(wrong) + (1 - wrong) * math.log(1 - wrong))
        coins += coin * float(side.float().mean())
    assert threshold_loss(samples, samples) == pytest.approx(coins, abs=0.01)
    # Said of others whose mix is another one, the same probabilities cost more.
    others = samples._replace(label=(confidence > 0.7).float())
    assert threshold_loss(samples, others) == pytest.approx(-math.log(0.9), abs=0.02)


def test_the_best_weights_are_kept_and_training_ends_without_progress() -> None:
    train, validation = neighbourly(20, 1), neighbourly(20, 2)
    # Labels of another world: what is learned from the one is wrong in the other before long.
    validation = validation._replace(label=1 - validation.label)
    found = train_filter(train, validation, hidden=8, epochs=4000, patience=200)
    losses = [loss for _, _, loss in found.curve]
    assert found.validation_loss == min(losses) < losses[-1]
    assert found.curve[-1][0] == found.epoch + 200
    assert validation_loss(found.filter, validation) == pytest.approx(found.validation_loss)
    again = train_filter(train, validation, hidden=8, epochs=4000, patience=200)
    assert all(map(torch.equal, found.filter, again.filter))


def test_what_is_accepted_and_wrong_is_counted() -> None:
    samples = Samples(
        torch.tensor([[0.2, 0.95, 0.99, 0.97]]),
        torch.tensor([[0.0, 1.0, 0.0, 1.0]]),
        torch.zeros(1),
    )
    from tests.methods.diffusion_lm.test_learn2pd import threshold_filter

    judge = threshold_filter(1e4, 0.9, width=4)
    assert judged(judge, samples, 0.5) == (0.75, pytest.approx(1 / 3))
    accepted, wrong = judged(judge, samples._replace(confidence=torch.zeros(1, 4)), 0.5)
    assert accepted == 0
    assert math.isnan(wrong)


def test_what_is_known_about_a_filter_is_measured_on_texts_it_has_not_seen() -> None:
    samples = neighbourly(100, 1)
    judge, facts = calibrate(Collected(samples, 9600, 1000), kind="block", epochs=500)
    test = samples.of(split_texts(100).test)
    assert facts["test_loss"] == pytest.approx(validation_loss(judge, test))
    assert facts["beats_a_threshold"]
    assert facts["validation_loss"] < facts["validation_loss_of_the_best_threshold"]
    assert (facts["plain_forwards_per_text"], facts["oracle_forwards_per_text"]) == (96, 10)
    assert facts["test"]["0.96"] == judged(judge, test, 0.96)._asdict()
    json.dumps(facts)


def test_the_recipe_runs_from_a_checkpoint_to_a_filter_that_decodes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from models.loading import LoadSettings, load

    folder = tmp_path / "model"
    folder.mkdir()
    save_tiny_llada(folder, layers=1)
    name = f"path:{folder}"
    sizes = ["--texts", "12", "--answer-length", "16", "--block-length", "8", "--epochs", "40"]
    main([name, *sizes, "--device", "cpu", "--out", str(tmp_path)])
    assert "validation_loss" in capsys.readouterr().out
    model = load(name, LoadSettings(device="cpu"), offline=True, capability="MaskedDiffusionLM")
    for kind in ("block", "shared"):
        path = filter_path(name, kind, tmp_path)
        assert load_filter(path).kind == kind
        facts = json.loads(path.with_suffix(".json").read_text())
        assert (facts["model"], facts["texts"], facts["block_length"]) == (name, 12, 8)
        assert facts["oracle_forwards_per_text"] <= facts["plain_forwards_per_text"] == 16
        method = Learn2PD(filter=str(path), block_length=8, accept_threshold=0.5)
        with method.apply(model, PROFILE) as changed:  # type: ignore[arg-type]  # of that capability
            found = changed.generate([5, 6, 7], Decoding(max_new_tokens=16))
        assert 1 <= len(found.trace.forwards) <= 16
