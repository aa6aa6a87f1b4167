"""The network of LLaDA- and Dream-class checkpoints, its canvas, and how checkpoints are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from models.base import MaskedDiffusionLM, Unsupported
from models.embedded.tiny_dllm.batches import save_tokenizer
from models.embedded.tiny_dllm.data import PAD, VOCABULARY
from models.loading import LoadSettings, ModelError, load
from models.masked_diffusion import MaskedDiffusionModel
from models.masked_diffusion_network import Network, read_config, read_network
from runner.conformance_base import sharpen
from tests.models.tiny_diffusion import EOS, MASK, save_tiny_llada, tiny_config, tiny_diffusion
from tests.models.tiny_diffusion import VOCABULARY as TINY_VOCABULARY

# `config.json` of GSAI-ML/LLaDA-8B-Instruct and of Dream-org/Dream-v0-Instruct-7B, what decides.
LLADA_8B: dict[str, Any] = {
    "model_type": "llada",
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "vocab_size": 126464,
    "weight_tying": False,
}
DREAM_7B: dict[str, Any] = {
    "model_type": "Dream",
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "mask_token_id": 151666,
    "max_position_embeddings": 131072,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pad_token_id": 151643,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


def dream_folder(folder: Path, **changes: Any) -> Qwen2ForCausalLM:
    """Write a random checkpoint with Dream's names; return Qwen2, which has the same weights."""
    settings = {
        **DREAM_7B,
        "eos_token_id": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "mask_token_id": 1,
        "max_position_embeddings": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "vocab_size": len(VOCABULARY),
        **changes,
    }
    torch.manual_seed(0)
    module = Qwen2ForCausalLM(
        Qwen2Config(
            **{
                name: value
                for name, value in settings.items()
                if name not in ("model_type", "mask_token_id", "rope_theta", "rope_scaling")
            },
            rope_parameters={"rope_type": "default", "rope_theta": settings["rope_theta"]},
        )
    ).eval()
    sharpen(module, 8, biases=0.3)
    (folder / "config.json").write_text(json.dumps(settings))
    state = {name: value.contiguous() for name, value in module.state_dict().items()}
    if settings["tie_word_embeddings"]:
        del state["lm_head.weight"]
    names = sorted(state)
    # In two files, as large checkpoints come.
    for number in range(2):
        part = {name: state[name] for name in names[number::2]}
        save_file(part, folder / f"model-{number + 1}-of-2.safetensors")
    save_tokenizer(folder)
    return module


def logits_of(model: MaskedDiffusionModel, ids: Tensor, padding: tuple[int, ...]) -> Tensor:
    canvas = model.canvas(padding, ids.shape[1], keeps=False)
    return canvas.denoise(ids, 0, range(ids.shape[1]))


# ---- networks against independent ones


def test_a_llada_checkpoint_is_read_as_the_trained_module_was_written(tmp_path: Path) -> None:
    oracle = save_tiny_llada(tmp_path)
    model = load(f"path:{tmp_path}", capability="MaskedDiffusionLM")
    assert isinstance(model, MaskedDiffusionModel)
    ids = torch.randint(3, len(VOCABULARY), (3, 20), generator=torch.Generator().manual_seed(1))
    ids[1, :4] = PAD
    with torch.no_grad():
        expected = oracle(ids)
    found = logits_of(model, ids, (0, 4, 0))
    assert torch.allclose(found[[0, 2]], expected[[0, 2]], atol=1e-4)
    assert torch.allclose(found[1, 4:], expected[1, 4:], atol=1e-4)
    assert expected.abs().max() > 1


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_dream_checkpoint_gives_the_logits_of_a_qwen2_without_causal_mask_shifted(
    tmp_path: Path, is_tied: bool
) -> None:
    oracle = dream_folder(tmp_path, tie_word_embeddings=is_tied)
    model = load(f"path:{tmp_path}", capability="MaskedDiffusionLM")
    assert isinstance(model, MaskedDiffusionModel)
    ids = torch.randint(3, len(VOCABULARY), (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mask = torch.ones(2, 1, 17, 17, dtype=torch.bool)
        plain = oracle(input_ids=ids, attention_mask=mask).logits
    expected = torch.cat([plain[:, :1], plain[:, :-1]], dim=1)
    assert torch.allclose(logits_of(model, ids, (0, 0)), expected, atol=1e-4)


@pytest.mark.parametrize("is_shifted", [False, True])
def test_a_model_that_says_its_input_is_read_at_the_right_place(is_shifted: bool) -> None:
    """One-hot embeddings and no layers: the output at i is the token at i, so it must be found at i
    in place and at i + 1 when shifted."""
    config = tiny_config(is_shifted=is_shifted)
    network = Network(config).eval()
    with torch.no_grad():
        network.layers = torch.nn.ModuleList()
        network.embedding.weight.copy_(torch.eye(TINY_VOCABULARY, config.width))
        network.head.weight.copy_(torch.eye(TINY_VOCABULARY, config.width))
    ids = torch.arange(3, 13)[None]
    model = MaskedDiffusionModel(network, tiny_diffusion().tokenizer, "copy")
    found = logits_of(model, ids, (0,)).argmax(-1)[0].tolist()
    assert found == ([3, *range(3, 12)] if is_shifted else list(range(3, 13)))


def test_the_published_configurations_are_read() -> None:
    llada, dream = read_config(LLADA_8B), read_config(DREAM_7B)
    assert (llada.width, llada.head_dim, llada.num_layers, llada.inner_width) == (
        4096,
        128,
        32,
        12288,
    )
    assert (llada.mask_id, llada.eos_ids, llada.is_shifted) == (126336, {126081}, False)
    assert (dream.width, dream.head_dim, dream.num_kv_heads, dream.vocab_size) == (
        3584,
        128,
        4,
        152064,
    )
    assert (dream.mask_id, dream.eos_ids, dream.is_shifted) == (151666, {151643}, True)
    assert (llada.has_qkv_bias, dream.has_qkv_bias) == (False, True)


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        *(
            (LLADA_8B, change)
            for change in (
                {"activation_type": "gelu"},
                {"alibi": True},
                {"attention_layer_norm": True},
                {"block_group_size": 2},
                {"block_type": "sequential"},
                {"clip_qkv": 8.0},
                {"include_bias": True},
                {"input_emb_norm": True},
                {"layer_norm_type": "default"},
                {"rope": False},
                {"rope_full_precision": False},
                {"scale_logits": True},
            )
        ),
        (DREAM_7B, {"hidden_act": "gelu"}),
        (DREAM_7B, {"rope_scaling": {"rope_type": "yarn"}}),
        (DREAM_7B, {"use_sliding_window": True}),
    ],
)
def test_variants_that_are_not_run_are_refused(
    settings: dict[str, Any], change: dict[str, Any]
) -> None:
    with pytest.raises(Unsupported, match=f"{next(iter(change))} = "):
        read_config({**settings, **change})


def test_another_class_of_model_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(Unsupported, match="'llama' is known; there are those of type llada, dream"):
        read_config({"model_type": "llama"})


def test_weights_that_lack_or_are_too_much_or_of_another_shape_are_told_by_name(
    tmp_path: Path,
) -> None:
    module = save_tiny_llada(tmp_path)
    state = module.checkpoint()
    key = "model.transformer.blocks.1.q_proj.weight"

    def error(changed: dict[str, Tensor]) -> str:
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"weight|by config") as raised:
            read_network(tmp_path, torch.float32, "cpu")
        return str(raised.value)

    lacking = {name: value for name, value in state.items() if name != key}
    assert "lacks 1 weights, 'layers.1.query.weight'" in error(lacking)
    assert "'odd.weight'" in error({**state, "odd.weight": torch.ones(2)})
    assert "(3, 3); by config.json it should be (32, 32)" in error({**state, key: torch.ones(3, 3)})
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(f"path:{tmp_path}", capability="MaskedDiffusionLM")


def test_loading_takes_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    save_tiny_llada(tmp_path)
    settings = LoadSettings(dtype="bfloat16")
    model = load(f"path:{tmp_path}", settings, capability="MaskedDiffusionLM")
    assert model.facts.dtype == "bfloat16"
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.bfloat16}  # type: ignore[union-attr]  # it has a module


def test_a_tokenizer_in_qwen2s_two_files_is_read(tmp_path: Path) -> None:
    dream_folder(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    vocabulary = {"a": 3, "b": 4, "ab": 5, "Ġ": 6, "<|endoftext|>": 7}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    model = load(f"path:{tmp_path}", capability="MaskedDiffusionLM")
    assert isinstance(model, MaskedDiffusionModel)
    assert model.tokenizer.encode("ab a") == [5, 6, 3]
    assert model.tokenizer.decode([5, 6, 3]) == "ab a"


def test_what_ends_a_turn_ends_a_text(tmp_path: Path) -> None:
    save_tiny_llada(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"Ann"', '"<|eot_id|>"'))
    model = load(f"path:{tmp_path}", capability="MaskedDiffusionLM")
    assert model.facts.eos_ids == {2, VOCABULARY.index("Ann")}  # type: ignore[union-attr]  # a text model


# ---- facts


def test_operations_are_those_of_products_in_which_every_position_sees_every_other() -> None:
    model = tiny_diffusion()
    config, facts = model.module.config, model.facts
    from models.base import Forward

    width, context, wanted = 5, 11, 3
    multiplied = 0
    for _ in range(config.num_layers):
        kv_width = config.head_dim * config.num_kv_heads
        multiplied += width * config.width * (2 * config.width + 2 * kv_width)
        multiplied += 3 * width * config.width * config.inner_width
        multiplied += 2 * config.num_heads * width * (width + context) * config.head_dim
    multiplied += wanted * config.width * config.vocab_size
    assert facts.flops(Forward(width, context), wanted) == 2 * multiplied
    assert isinstance(model, MaskedDiffusionLM)


# ---- the canvas


@pytest.mark.parametrize("is_shifted", [False, True])
def test_running_a_part_right_after_everything_changes_nothing(is_shifted: bool) -> None:
    model = tiny_diffusion(is_shifted=is_shifted)
    ids = torch.randint(3, TINY_VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(2))
    canvas = model.canvas((0, 3), 24, keeps=True)
    whole = canvas.denoise(ids, 0, range(24))
    part = canvas.denoise(ids[:, 7:15], 7, range(8, 15))
    assert torch.allclose(part, whole[:, 8:15], atol=1e-5)
    alone = canvas.denoise(ids[1:, 9:], 9, range(10, 24), rows=[1])
    assert torch.allclose(alone, whole[1:, 10:], atol=1e-5)


def test_a_part_is_run_against_what_the_others_were_when_last_run() -> None:
    model = tiny_diffusion()
    draw = torch.Generator().manual_seed(3)
    before, after = torch.randint(3, TINY_VOCABULARY, (2, 1, 12), generator=draw)
    canvas = model.canvas((0,), 12, keeps=True)
    canvas.denoise(before, 0, range(12))
    found = canvas.denoise(after[:, 4:8], 4, range(4, 8))
    # An oracle without a cache: one network run in which the old tokens stand beside the new ones,
    # and only the new ones are looked at. Old and new exchange nothing in one direction.
    again = model.canvas((0,), 12, keeps=True)
    again.denoise(before, 0, range(12))
    assert torch.equal(again.denoise(after[:, 4:8], 4, range(4, 8)), found)
    # What was run last is kept: the same tokens seen from elsewhere give what they would in a row.
    mixed = torch.cat([before[:, :4], after[:, 4:8], before[:, 8:]], dim=1)
    assert not torch.allclose(found, logits_of(model, mixed, (0,))[:, 4:8], atol=1e-3)
    kept = canvas._kept
    assert kept is not None
    fresh = model.canvas((0,), 12, keeps=True)
    fresh.denoise(mixed, 0, range(12))
    # In the first layer keys and values depend on the token alone, so they must agree everywhere.
    for mine, theirs in zip(kept[0], fresh._kept[0], strict=True):  # type: ignore[index]  # it keeps
        assert torch.allclose(mine, theirs, atol=1e-6)
    # In the second they are stale outside the part and inside it are not those of a full run.
    assert torch.allclose(kept[1].keys[:, :, 8:], _second_layer(model, before)[:, :, 8:], atol=1e-6)


def _second_layer(model: MaskedDiffusionModel, ids: Tensor) -> Tensor:
    canvas = model.canvas((0,), ids.shape[1], keeps=True)
    canvas.denoise(ids, 0, range(ids.shape[1]))
    assert canvas._kept is not None
    return canvas._kept[1].keys


def test_padding_and_what_was_cut_off_are_seen_by_nobody() -> None:
    model = tiny_diffusion()
    ids = torch.randint(3, TINY_VOCABULARY, (1, 16), generator=torch.Generator().manual_seed(4))
    canvas = model.canvas((5,), 16, keeps=False)
    canvas.cut([13])
    changed = ids.clone()
    changed[:, :5] = MASK
    changed[:, 13:] = EOS
    found = canvas.denoise(ids, 0, range(5, 13))
    assert torch.equal(found, canvas.denoise(changed, 0, range(5, 13)))
    alone = logits_of(model, ids[:, 5:13], (0,))
    assert torch.allclose(found, alone, atol=1e-4)


def test_a_part_cannot_be_run_before_everything_was() -> None:
    model = tiny_diffusion()
    ids = torch.full((1, 4), 5)
    with pytest.raises(ValueError, match="cannot be run alone"):
        model.canvas((0,), 12, keeps=True).denoise(ids, 4, range(4, 8))
    canvas = model.canvas((0,), 12, keeps=False)
    canvas.denoise(torch.full((1, 12), 5), 0, range(12))
    with pytest.raises(ValueError, match="cannot be run alone"):
        canvas.denoise(ids, 4, range(4, 8))


def test_a_shifted_model_needs_the_position_before_those_that_are_wanted() -> None:
    canvas = tiny_diffusion(is_shifted=True).canvas((0,), 12, keeps=True)
    ids = torch.full((1, 12), 5)
    canvas.denoise(ids, 0, range(12))
    with pytest.raises(ValueError, match="need positions from 3 on, but 4 to 8 are run"):
        canvas.denoise(ids[:, 4:8], 4, range(4, 8))
