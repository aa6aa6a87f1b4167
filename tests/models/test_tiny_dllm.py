"""The language of `tiny-dllm`, its decoder, its losses, and its causal twin's."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from models.embedded.tiny_causal.train import (
    LONGEST_ANSWER,
    causal_mask,
    decode_greedily,
    dual_stream_batch,
    dual_stream_mask,
    new_module,
    next_token_loss,
)
from models.embedded.tiny_dllm.batches import Pool, exact_match, held_out, save_tokenizer
from models.embedded.tiny_dllm.data import (
    ANSWER_LENGTH,
    EOT,
    MASK,
    MAX_STEPS,
    MAX_TOTAL,
    OPERATIONS,
    PAD,
    PROMPT_LENGTH,
    VOCABULARY,
    Split,
    apply_operation,
    decode,
    encode,
    final_number,
    generate,
    held_out_pairs,
    pair_key,
)
from models.embedded.tiny_dllm.model import DecoderConfig, MaskedDiffusionDecoder, beginning, load
from models.embedded.tiny_dllm.train import EPSILON, decode_one_at_a_time, diffusion_loss
from models.embedded.training import save_half
from runner.conformance_base import sharpen

SMALL = DecoderConfig(
    d_model=32, n_heads=4, n_kv_heads=2, n_layers=2, mlp_hidden_size=48, vocab_size=len(VOCABULARY)
)


@pytest.fixture(scope="module")
def decoder() -> MaskedDiffusionDecoder:
    torch.manual_seed(0)
    module = MaskedDiffusionDecoder(SMALL).eval()
    sharpen(module, 8)
    return module


@pytest.fixture(scope="module")
def twin() -> Any:
    torch.manual_seed(0)
    module = new_module().eval()
    sharpen(module, 4)
    return module


# ---- the language


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_every_step_of_every_answer_is_right_and_says_what_the_operands_say(split: Split) -> None:
    problems = generate(600, steps=None, split=split, seed=5)
    assert set(problems.steps.tolist()) == set(range(1, MAX_STEPS + 1))
    for row in range(600):
        words, total = [], None
        for operation, first, second in problems.operands[row, : problems.steps[row]].tolist():
            assert total in (None, first)
            total = apply_operation(operation, first, second)
            assert 1 <= total <= MAX_TOTAL
            words += [*str(first), OPERATIONS[operation], *str(second), "=", *str(total), ";"]
        words += ["####", *str(total)]
        assert decode(problems.answers[row]) == " ".join(words)
        assert problems.results[row] == total == final_number(problems.answers[row])
        assert (problems.operands[row, problems.steps[row] :] == -1).all()


def test_the_prompt_tells_all_that_the_answer_needs() -> None:
    problems = generate(400, steps=None, split="train", seed=6)
    for row in range(400):
        sentences = decode(problems.prompts[row]).split(" . ")
        assert sentences[-1].startswith("how many")
        total = int("".join(word for word in sentences[0].split() if word.isdigit()))
        for sentence in sentences[1:-1]:
            number = int("".join(word for word in sentence.split() if word.isdigit()))
            if "times as many" in sentence:
                total *= number
            else:
                total += number if sentence.endswith("more") else -number
        assert total == problems.results[row]


def test_training_and_held_out_problems_share_no_operand_pair() -> None:
    seen = {}
    for split in ("train", "held-out"):
        problems = generate(5000, steps=None, split=split, seed=7)  # type: ignore[arg-type]  # both are splits
        steps = problems.operands.reshape(-1, 3)
        seen[split] = {pair_key(*step) for step in steps[steps[:, 0] >= 0].tolist()}
    assert len(seen["train"]) > 4000
    assert len(seen["held-out"]) > 1000
    assert seen["held-out"] <= held_out_pairs()
    assert not seen["train"] & held_out_pairs()


def test_the_order_of_operands_does_not_smuggle_a_sum_into_the_other_split() -> None:
    plus, minus = OPERATIONS.index("+"), OPERATIONS.index("-")
    assert pair_key(plus, 7, 12) == pair_key(plus, 12, 7)
    assert pair_key(minus, 12, 7) != pair_key(minus, 7, 12)


@pytest.mark.parametrize("steps", range(1, MAX_STEPS + 1))
def test_rows_fit_and_are_padded_on_their_own_side(steps: int) -> None:
    problems = generate(2000, steps=steps, split="train", seed=8)
    assert problems.prompts.shape == (2000, PROMPT_LENGTH)
    assert problems.answers.shape == (2000, ANSWER_LENGTH)
    for padding in (problems.prompts == PAD, (problems.answers == EOT)[:, ::-1]):
        lengths = (~padding).sum(1)
        assert (
            padding == (np.arange(padding.shape[1]) < padding.shape[1] - lengths[:, None])
        ).all()
    assert ((problems.answers != EOT).sum(1) < LONGEST_ANSWER).all()
    for rows in (problems.prompts, problems.answers):
        assert not (rows == MASK).any()


def test_the_same_seed_gives_the_same_problems_and_another_one_others() -> None:
    first, again, other = (generate(50, steps=None, split="train", seed=seed) for seed in (1, 1, 2))
    assert all((one == two).all() for one, two in zip(first, again, strict=True))
    assert (first.prompts != other.prompts).any()


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="steps must lie in"):
        generate(1, steps=5, split="train", seed=0)
    with pytest.raises(ValueError, match="answer_length must be at least"):
        generate(1, steps=1, split="train", seed=0, answer_length=32)
    with pytest.raises(ValueError, match="split must be"):
        generate(1, steps=1, split="test", seed=0)  # type: ignore[arg-type]  # what is tested
    with pytest.raises(ValueError, match="no word 'seven'"):
        encode("Ann has seven pens .")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 3 = 5 ; #### 5", 5),
        ("#### 1 0 7", 107),
        ("2 + 3 = 5 ;", None),
        ("####", None),
        ("#### 3 6 + 1", None),
        ("#### 3 #### 4", None),
    ],
)
def test_the_final_number_is_what_stands_alone_behind_the_marker(
    text: str, number: int | None
) -> None:
    assert final_number([*encode(text), EOT, EOT]) == number
    assert final_number(encode(text)) == number


def test_the_held_out_set_has_as_many_problems_of_each_number_of_steps() -> None:
    problems = held_out(2000)
    assert np.bincount(problems.steps).tolist() == [0, 500, 500, 500, 500]
    assert exact_match(torch.from_numpy(problems.answers), problems).all()
    wrong = torch.from_numpy(problems.answers).roll(1, 0)
    assert exact_match(wrong, problems).mean() < 0.05


def test_the_curriculum_unlocks_longer_problems_one_step_at_a_time() -> None:
    pool = Pool(300, 0, torch.device("cpu"))
    equals = VOCABULARY.index("=")
    for progress, most in ((0.0, 1), (0.1, 2), (0.2, 3), (0.3, 4), (1.0, 4)):
        steps = (pool.draw(400, progress) == equals).sum(1)
        assert steps.min() == 1
        assert steps.max() == most
    long = pool.draw(5, 1.0, 256)
    assert long.shape == (5, PROMPT_LENGTH + 256)
    assert (long[:, PROMPT_LENGTH + ANSWER_LENGTH :] == EOT).all()


def test_the_saved_tokenizer_reads_and_writes_the_language(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    problems = generate(5, steps=None, split="train", seed=0)
    for row in problems.prompts:
        text = decode(row)
        assert tokenizer(text).input_ids == encode(text) == row[row != PAD].tolist()
        assert tokenizer.decode(encode(text)) == text
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.eos_token_id) == (
        PAD,
        MASK,
        EOT,
    )


# ---- the decoder


def llama_of(decoder: MaskedDiffusionDecoder) -> Any:
    """Transformers' Llama with the decoder's weights: the oracle, behind an open mask."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = decoder.config
    llama: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.mlp_hidden_size,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    ).eval()
    renamed = {}
    for name, value in decoder.checkpoint().items():
        for ours, theirs in (
            ("model.transformer.wte", "model.embed_tokens"),
            ("model.transformer.ln_f", "model.norm"),
            ("model.transformer.ff_out", "lm_head"),
            ("model.transformer.blocks", "model.layers"),
            (".attn_norm", ".input_layernorm"),
            (".ff_norm", ".post_attention_layernorm"),
            (".attn_out", ".self_attn.o_proj"),
            (".q_proj", ".self_attn.q_proj"),
            (".k_proj", ".self_attn.k_proj"),
            (".v_proj", ".self_attn.v_proj"),
            (".ff_proj", ".mlp.gate_proj"),
            (".up_proj", ".mlp.up_proj"),
            (".ff_out", ".mlp.down_proj"),
        ):
            name = name.replace(ours, theirs)
        renamed[name] = value
    llama.load_state_dict(renamed)
    return llama


@torch.no_grad()
def test_the_decoder_is_transformers_llama_behind_an_open_mask(
    decoder: MaskedDiffusionDecoder,
) -> None:
    ids = torch.randint(3, len(VOCABULARY), (2, 17), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 1, 17, 17, dtype=torch.bool)
    expected = llama_of(decoder)(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(decoder(ids), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_every_position_sees_every_other_one(decoder: MaskedDiffusionDecoder) -> None:
    ids = torch.full((1, 9), 5)
    before = decoder(ids)
    for place in (0, 8):
        changed = ids.clone()
        changed[0, place] = 6
        difference = (decoder(changed) - before).abs().amax(-1)[0]
        assert (difference > 1e-5).all()


@torch.no_grad()
def test_left_padding_changes_nothing(decoder: MaskedDiffusionDecoder) -> None:
    ids = torch.randint(3, len(VOCABULARY), (1, 11), generator=torch.Generator().manual_seed(1))
    padded = decoder(F.pad(ids, (6, 0), value=PAD))
    torch.testing.assert_close(padded[:, 6:], decoder(ids), atol=1e-4, rtol=1e-4)
    assert torch.isfinite(padded).all()


def test_weights_and_configuration_survive_their_files(
    decoder: MaskedDiffusionDecoder, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(decoder.config.to_json())
    save_half(decoder.checkpoint(), tmp_path / "model.safetensors")
    again = load(tmp_path)
    assert again.config == decoder.config
    for name, value in decoder.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value.half().float())


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of n_heads"):
        DecoderConfig(d_model=30, n_heads=4)
    with pytest.raises(ValueError, match="multiple of n_kv_heads"):
        DecoderConfig(d_model=32, n_heads=4, n_kv_heads=3)


class Recording(nn.Module):
    """Returns fixed logits and keeps what it was given."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.given: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        self.given.append(ids.clone())
        return self.logits.expand(len(ids), -1, -1)


def test_the_diffusion_loss_masks_only_answers_and_weighs_by_the_rows_probability() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = Pool(50, 0, torch.device("cpu")).draw(64, 1.0)
    logits = torch.randn(1, rows.shape[1], len(VOCABULARY), generator=generator)
    module = Recording(logits)
    loss = diffusion_loss(module, rows, torch.Generator().manual_seed(4))
    given = module.given[0]
    masked = given == MASK
    assert not masked[:, :PROMPT_LENGTH].any()
    assert (given[~masked] == rows[~masked]).all()
    # The generator's first number is the offset of the stratified times.
    offset = float(torch.rand(1, generator=torch.Generator().manual_seed(4)))
    expected = 0.0
    for row in range(64):
        time_ = (row / 64 + offset) % 1
        probability = (1 - EPSILON) * time_ + EPSILON
        places = masked[row].nonzero()[:, 0]
        share = len(places) / ANSWER_LENGTH
        assert abs(share - probability) < 0.25
        entropy = F.cross_entropy(logits[0, places], rows[row, places], reduction="sum")
        expected += float(entropy) / probability / ANSWER_LENGTH / 64
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_with_a_prefix_share_of_one_nothing_before_the_first_mask_is_masked_again() -> None:
    rows = Pool(50, 0, torch.device("cpu")).draw(64, 1.0)
    module = Recording(torch.zeros(1, rows.shape[1], len(VOCABULARY)))
    diffusion_loss(module, rows, torch.Generator().manual_seed(4))
    diffusion_loss(module, rows, torch.Generator().manual_seed(4), prefix_share=1.0)
    plain, prefixed = ((given == MASK)[:, PROMPT_LENGTH:] for given in module.given)
    # The same draws, but for a stretch at the front of each row.
    assert not (prefixed & ~plain).any()
    known = (plain & ~prefixed).long()
    last_known = (known * torch.arange(ANSWER_LENGTH)).amax(1)
    first_masked = torch.where(prefixed, torch.arange(ANSWER_LENGTH), ANSWER_LENGTH).amin(1)
    assert (first_masked > last_known).all()
    tokens = (rows[:, PROMPT_LENGTH:] != EOT).sum(1)
    assert (last_known < tokens).all()
    assert (known.sum(1) > 0).float().mean() > 0.5


def test_the_causal_twins_weights_under_a_causal_mask_give_its_logits(
    twin: Any, tmp_path: Path
) -> None:
    twin.config.save_pretrained(tmp_path)
    save_file(
        {name: value.contiguous() for name, value in twin.state_dict().items()},
        tmp_path / "model.safetensors",
    )
    module = MaskedDiffusionDecoder(DecoderConfig()).eval()
    module.network.load_state_dict(beginning(tmp_path))
    rows = Pool(20, 0, torch.device("cpu")).draw(4, 1.0)
    with torch.no_grad():
        expected = twin(input_ids=rows, attention_mask=causal_mask(rows), use_cache=False).logits
        states = module.network(rows, 0, None, None, causal_mask(rows))
        torch.testing.assert_close(module.network.head(states), expected, atol=1e-4, rtol=1e-4)


def test_one_at_a_time_decoding_writes_the_most_confident_token_of_the_block() -> None:
    # Confidences of a table: the order of writing is known beforehand.
    logits = torch.zeros(1, 6, len(VOCABULARY))
    for place, (token, logit) in enumerate([(9, 1), (9, 1), (4, 2), (5, 7), (6, 9), (7, 3)]):
        logits[0, place, token] = logit
    module = Recording(logits)
    answers = decode_one_at_a_time(module, torch.tensor([[8, 8]]), 4, 2)
    assert answers.tolist() == [[4, 5, 6, 7]]
    states = [ids[0, 2:].tolist() for ids in module.given]
    assert states == [
        [MASK, MASK, MASK, MASK],
        [MASK, 5, MASK, MASK],
        [4, 5, MASK, MASK],
        [4, 5, 6, MASK],
    ]
    with pytest.raises(ValueError, match="multiple of block_length"):
        decode_one_at_a_time(module, torch.tensor([[8, 8]]), 4, 3)


@torch.no_grad()
def test_batched_decoding_is_that_of_each_row_alone(decoder: MaskedDiffusionDecoder) -> None:
    problems = generate(4, steps=None, split="train", seed=3)
    prompts = torch.from_numpy(problems.prompts)
    together = decode_one_at_a_time(decoder, prompts, 8, 4)
    for row in range(4):
        alone = prompts[row][prompts[row] != PAD][None]
        assert together[row].tolist() == decode_one_at_a_time(decoder, alone, 8, 4)[0].tolist()


# ---- the causal twin


def test_the_twin_is_of_the_same_size() -> None:
    own = sum(value.numel() for value in new_module().parameters())
    decoder = MaskedDiffusionDecoder(DecoderConfig(vocab_size=len(VOCABULARY)))
    assert own == sum(value.numel() for value in decoder.parameters())


@torch.no_grad()
def test_the_twins_mask_is_causal_and_hides_padding(twin: Any) -> None:
    ids = torch.tensor([[PAD, PAD, 9, 5, 7, 8]])
    logits = twin(input_ids=ids, attention_mask=causal_mask(ids), use_cache=False).logits
    assert torch.isfinite(logits).all()
    expected = twin(input_ids=ids[:, 2:], use_cache=False).logits
    torch.testing.assert_close(logits[:, 2:], expected, atol=1e-4, rtol=1e-4)


def test_the_next_token_loss_counts_answers_up_to_the_first_end() -> None:
    rows = torch.full((2, PROMPT_LENGTH + 6), EOT)
    rows[:, :PROMPT_LENGTH] = 5
    rows[0, PROMPT_LENGTH : PROMPT_LENGTH + 2] = torch.tensor([7, 8])
    logits = torch.randn(
        2, PROMPT_LENGTH + 6, len(VOCABULARY), generator=torch.Generator().manual_seed(0)
    )
    total = sum(
        float(F.cross_entropy(logits[row, PROMPT_LENGTH + place - 1], torch.tensor(token)))
        for row, place, token in ((0, 0, 7), (0, 1, 8), (0, 2, EOT), (1, 0, EOT))
    )
    assert float(next_token_loss(logits, rows)) == pytest.approx(total / 4, rel=1e-5)


def test_the_dual_stream_mask_is_the_one_of_the_definition() -> None:
    # Length 7, blocks of 3, the last one short; then a prompt of 2, one column of it padding.
    for prompt_length, padding in ((0, 0), (2, 1)):
        length, block = 7 + prompt_length, 3
        ids = torch.full((1, length), 9)
        ids[0, :padding] = PAD
        found = dual_stream_mask(ids, prompt_length, block)[0, 0]
        width = length + 7
        assert found.shape == (width, width)

        def place(column: int, length: int = length, start: int = prompt_length) -> tuple[str, int]:
            if column < length:
                return "memory", column
            return "prediction", column - length + start

        for query, key in itertools.product(range(width), repeat=2):
            (stream, row), (other, column) = place(query), place(key)
            row_block = (row - prompt_length) // block
            column_block = max((column - prompt_length) // block, -1)
            if stream == "memory":
                seen = other == "memory" and column <= row
            elif other == "memory":
                seen = column_block < row_block
            else:
                seen = column_block == row_block and column <= row
            if other == "memory" and column < padding:
                seen = False
            assert bool(found[query, key]) == (seen or query == key), (query, key)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 100))
def test_the_prediction_stream_is_a_reordered_copy_with_masks_at_the_end(seed: int) -> None:
    block = 16
    rows = Pool(20, 0, torch.device("cpu")).draw(6, 1.0)
    ids, positions, targets, weights = dual_stream_batch(
        rows, block, torch.Generator().manual_seed(seed)
    )
    width = rows.shape[1]
    assert (ids[:, :width] == rows).all()
    assert (positions[:, :width] == torch.arange(width)).all()
    masked = ids[:, width:] == MASK
    assert (targets == rows.gather(1, positions[:, width:])).all()
    assert (ids[:, width:][~masked] == targets[~masked]).all()
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-5)
    assert ((weights > 0) == masked).all()
    for row, start in itertools.product(range(6), range(0, ANSWER_LENGTH, block)):
        part = slice(start, start + block)
        order = positions[row, width:][part] - PROMPT_LENGTH
        assert sorted(order.tolist()) == list(range(start, start + block))
        hidden = masked[row, part]
        count = int(hidden.sum())
        assert hidden.tolist() == [False] * (block - count) + [True] * count
        for group in (order[~hidden], order[hidden]):
            assert group.tolist() == sorted(group.tolist())
        if count:
            # 1 / gamma, up to the batch's common factor, with round(gamma * block) masks.
            assert weights[row, part][hidden].unique().numel() == 1


@torch.no_grad()
def test_predictions_do_not_see_their_own_block_in_the_memory(twin: Any) -> None:
    rows = Pool(20, 0, torch.device("cpu")).draw(2, 1.0)
    ids, positions, _, _ = dual_stream_batch(rows, 16, torch.Generator().manual_seed(0))
    width = rows.shape[1]

    def logits_of(memory: Tensor) -> Tensor:
        joined = torch.cat([memory, ids[:, width:]], dim=1)
        logits: Tensor = twin(
            input_ids=joined,
            position_ids=positions,
            attention_mask=dual_stream_mask(memory, PROMPT_LENGTH, 16),
            use_cache=False,
        ).logits
        return logits

    changed = rows.clone()
    changed[:, PROMPT_LENGTH + 16 : PROMPT_LENGTH + 32] = 40  # the second block
    difference = (logits_of(rows) - logits_of(changed)).abs().amax(-1)
    prediction = difference[:, width:]
    assert prediction[:, :32].max() < 1e-5
    assert prediction[:, 32:].min() > 1e-6
    assert difference[:, : PROMPT_LENGTH + 16].max() < 1e-5


@torch.no_grad()
def test_without_masks_the_prediction_stream_is_the_plain_forward(twin: Any) -> None:
    rows = Pool(20, 0, torch.device("cpu")).draw(2, 1.0)
    width = rows.shape[1]
    joined = torch.cat([rows, rows[:, PROMPT_LENGTH:]], dim=1)
    positions = torch.cat([torch.arange(width), torch.arange(PROMPT_LENGTH, width)])[None]
    logits = twin(
        input_ids=joined,
        position_ids=positions.expand(2, -1),
        attention_mask=dual_stream_mask(rows, PROMPT_LENGTH, 16),
        use_cache=False,
    ).logits
    plain = twin(input_ids=rows, attention_mask=causal_mask(rows), use_cache=False).logits
    torch.testing.assert_close(logits[:, :width], plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[:, width:], plain[:, PROMPT_LENGTH:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_greedy_answers_are_the_argmax_token_by_token(twin: Any) -> None:
    problems = generate(2, steps=2, split="train", seed=3)
    prompts = torch.from_numpy(problems.prompts)
    for masked in (False, True):
        answers = decode_greedily(twin, prompts, masked=masked)
        assert answers.shape == (2, ANSWER_LENGTH)
        for row in range(2):
            ids = prompts[row][prompts[row] != PAD].long().tolist()
            for token in answers[row, :5].tolist():
                given_ids = torch.tensor([[*ids, MASK] if masked else ids])
                assert int(twin(input_ids=given_ids).logits[0, -1].argmax()) == token
                if token == EOT:
                    break
                ids.append(token)
