"""The language of `tiny-lm-retrieval`, the circuit it starts with, its recipe and its weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import models.embedded.tiny_lm_retrieval as package
from models.embedded.tiny_lm_retrieval.data import (
    BEGIN,
    FACT_LENGTH,
    FIRST_FILLER,
    FIRST_KEY,
    FIRST_VALUE,
    VOCABULARY,
    decode,
    draw_batch,
    draw_question,
    encode,
    save_tokenizer,
)
from models.embedded.tiny_lm_retrieval.train import (
    GATE,
    LENGTH,
    QUESTION_FACTS,
    SIZES,
    SMOKE,
    load,
    main,
    new_module,
    recall,
    recall_loss,
    save,
    wire_recall,
)
from models.embedded.training import scaled

FOLDER = Path(package.__file__).parent


@pytest.fixture(scope="module")
def wired() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = new_module()
    wire_recall(module, torch.Generator().manual_seed(0))
    return module.eval()


# --- the language ---


def test_every_word_is_another_one() -> None:
    assert len(set(VOCABULARY)) == len(VOCABULARY) == 515
    assert all(len(word) == 4 and word.isalpha() for word in VOCABULARY[FIRST_KEY:])


@given(
    seed=st.integers(0, 50),
    length=st.integers(8, 70),
    most_facts=st.integers(1, 9),
    least_share=st.floats(0.0, 0.95),
)
def test_recalled_words_are_those_that_the_text_has_told(
    seed: int, length: int, most_facts: int, least_share: float
) -> None:
    batch = draw_batch(np.random.default_rng(seed), 4, length, most_facts, least_share)
    assert batch.ids.shape == batch.recalled.shape == (4, length)
    for ids, recalled in zip(batch.ids.tolist(), batch.recalled.tolist(), strict=True):
        assert ids[0] == BEGIN
        told: dict[int, int] = {}
        place = 1
        expected = [False] * length
        while place < length:
            token = ids[place]
            if not FIRST_KEY <= token < FIRST_VALUE:
                assert token >= FIRST_FILLER  # a value stands behind its key only
                place += 1
                continue
            fact = ids[place : place + FACT_LENGTH]
            was_told = token in told
            for offset in range(1, FACT_LENGTH):
                assert FIRST_VALUE <= fact[offset] < FIRST_FILLER
                expected[place + offset] = was_told
                # What stands before a word tells it, once it is told.
                assert told.setdefault(fact[offset - 1], fact[offset]) == fact[offset]
            place += FACT_LENGTH
        assert recalled == expected


@given(seed=st.integers(0, 50), length=st.integers(8, 300), facts=st.integers(1, 60))
def test_a_question_is_answered_by_one_place_of_its_context(
    seed: int, length: int, facts: int
) -> None:
    if length < 1 + FACT_LENGTH * facts:
        with pytest.raises(ValueError, match=f"length must be at least that, got {length}"):
            draw_question(np.random.default_rng(seed), length, facts)
        return
    question = draw_question(np.random.default_rng(seed), length, facts)
    assert len(question.context) == length
    assert question.prompt == [*question.context, question.key]
    assert question.context.count(question.key) == 1
    place = question.context.index(question.key)
    assert place == question.place
    assert question.context[place + 1 : place + FACT_LENGTH] == question.values
    assert sum(FIRST_KEY <= token < FIRST_VALUE for token in question.context) == facts


def test_the_same_seed_gives_the_same_texts() -> None:
    one, again, other = (draw_batch(np.random.default_rng(seed), 3, 40) for seed in (1, 1, 2))
    assert (one.ids == again.ids).all()
    assert (one.ids != other.ids).any()


def test_impossible_texts_are_refused() -> None:
    generator = np.random.default_rng(0)
    with pytest.raises(ValueError, match="length must be at least 8 tokens, got 7"):
        draw_batch(generator, 1, 7)
    with pytest.raises(ValueError, match=r"most_facts must lie in \[1, 128\], got 129"):
        draw_batch(generator, 1, 20, 129)
    with pytest.raises(ValueError, match="no word 'seven'"):
        encode("seven")


def test_the_saved_tokenizer_reads_and_writes_the_language(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    question = draw_question(np.random.default_rng(0), 40, 3)
    text = decode(question.context[1:])
    assert tokenizer(text).input_ids == list(question.context) == [BEGIN, *encode(text)]
    assert tokenizer.decode(question.context, skip_special_tokens=True) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BEGIN, 1)


# --- the network ---


@torch.no_grad()
def test_the_first_head_starts_by_looking_one_back(wired: Any) -> None:
    seen: dict[str, torch.Tensor] = {}
    attention = wired.model.layers[0].self_attn
    hook = attention.register_forward_pre_hook(
        lambda module, arguments, settings: seen.update(settings), with_kwargs=True
    )
    ids = torch.from_numpy(draw_batch(np.random.default_rng(0), 2, 60).ids)
    wired.model(ids)
    hook.remove()
    states, (cos, sin) = seen["hidden_states"], seen["position_embeddings"]
    size = attention.head_dim

    def rotated(project: Any) -> torch.Tensor:
        state = project(states)[..., :size]
        first, second = state.chunk(2, dim=-1)
        return state * cos + torch.cat([-second, first], dim=-1) * sin

    scores = rotated(attention.q_proj) @ rotated(attention.k_proj).transpose(1, 2) * size**-0.5
    behind = torch.ones(60, 60, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(behind, -torch.inf).softmax(-1)
    assert weights.diagonal(-1, 1, 2).mean() > 0.9


@torch.no_grad()
def test_the_wired_network_recalls_before_it_is_trained_and_a_plain_one_does_not(
    wired: Any,
) -> None:
    batch = draw_batch(np.random.default_rng(1), 16, 64, 5, 0.6)
    ids, recalled = torch.from_numpy(batch.ids), torch.from_numpy(batch.recalled)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = new_module().eval()
    assert recall_loss(wired, ids, recalled)[1] > 0.5
    assert recall_loss(plain, ids, recalled)[1] < 0.05


@torch.no_grad()
def test_the_loss_is_the_mean_over_recalled_words(wired: Any) -> None:
    batch = draw_batch(np.random.default_rng(2), 3, 30, 3, 0.8)
    ids, recalled = torch.from_numpy(batch.ids), torch.from_numpy(batch.recalled)
    log_probabilities = wired(ids).logits.log_softmax(-1)
    losses = [
        -float(log_probabilities[row, place - 1, ids[row, place]])
        for row, place in recalled.nonzero().tolist()
    ]
    assert float(recall_loss(wired, ids, recalled)[0]) == pytest.approx(np.mean(losses), rel=1e-4)


@torch.no_grad()
def test_recall_is_that_of_greedy_decoding(wired: Any) -> None:
    generator = np.random.default_rng([1, 24, 3])
    right = 0
    for _ in range(12):
        question = draw_question(generator, 24, 3)
        ids = list(question.prompt)
        for _ in question.values:
            ids.append(int(wired(torch.tensor([ids])).logits[0, -1].argmax()))
        right += tuple(ids[-2:]) == question.values
    assert 0 < right < 12, "the example decides nothing"
    assert recall(wired, length=24, facts=3, count=12) == right / 12


@torch.no_grad()
def test_weights_survive_their_file(wired: Any, tmp_path: Path) -> None:
    save(wired, tmp_path)
    again = load(tmp_path)
    for name, value in wired.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value.half().float())


def test_the_whole_recipe_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["train", "--out", str(tmp_path), "--device", "cpu", "--steps-scale", "0.0005"]
    monkeypatch.setattr(sys, "argv", command)
    with torch.random.fork_rng():
        main()
    quality = json.loads((tmp_path / "quality.json").read_text())
    assert quality["train_steps"] == 3
    assert 0 <= quality["recall_256_16_facts"] <= 1
    files = {path.name for path in tmp_path.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "curve.csv",
        "sample.txt",
    } <= files


def test_a_device_without_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="device must be one of cuda, cpu, got 'meta'"):
        scaled(SIZES, SMOKE, torch.device("meta"), 1.0)


# --- the weights ---


def test_the_weights_pass_the_gate_at_the_length_of_the_training() -> None:
    assert recall(load(FOLDER), length=LENGTH, facts=QUESTION_FACTS, count=50, seed=9) >= GATE
