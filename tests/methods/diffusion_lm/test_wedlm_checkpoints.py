"""Where WeDLM's weights come from: Qwen under another name, and a second file beside the first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import models.loading
from methods.diffusion_lm.common_wedlm import mask_token_of
from methods.diffusion_lm.wedlm import WeDLM
from models.base import Decoding
from models.embedded.tiny_causal.train import new_module
from models.embedded.tiny_dllm.batches import save_tokenizer
from models.embedded.tiny_dllm.data import MASK, encode
from models.loading import LoadSettings, ModelError, load
from models.wedlm import MASK_TOKEN_ID, causal_config
from runner.conformance_base import PROFILE, sharpen
from tests.methods.diffusion_lm.test_wedlm import slow_stream

CPU = LoadSettings(device="cpu")
PROMPT = "Ann has 2 3 pens . how many pens does she have now ?"


def checkpoint(folder: Path, *, qk_norm: bool, **more: Any) -> Any:
    """Write a tiny random checkpoint as WeDLM's lie on the hub; return the Qwen that it is."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    sizes = {
        "vocab_size": 71,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(1)
    module: Any = (
        Qwen3ForCausalLM(Qwen3Config(**sizes, attention_bias=False))
        if qk_norm
        else Qwen2ForCausalLM(Qwen2Config(**sizes))
    )
    sharpen(module, 8, biases=0.3)
    folder.mkdir(exist_ok=True)
    settings = {
        **sizes,
        "architectures": ["WeDLMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_wedlm.WeDLMConfig",
            "AutoModelForCausalLM": "modeling_wedlm.WeDLMForCausalLM",
        },
        "model_type": "wedlm",
        "qk_norm": qk_norm,
        "attention_bias": not qk_norm,
        **more,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(
        {name: value.contiguous() for name, value in module.state_dict().items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    save_tokenizer(folder)
    return module.eval()


@pytest.mark.parametrize("qk_norm", [True, False])
def test_a_wedlm_checkpoint_is_the_qwen_that_it_was_made_from_and_is_streamed(
    tmp_path: Path, qk_norm: bool
) -> None:
    qwen = checkpoint(tmp_path / "wedlm", qk_norm=qk_norm)
    model = load(f"path:{tmp_path / 'wedlm'}", CPU, offline=True)
    assert type(model.module).__name__ == type(qwen).__name__
    ids = torch.tensor([encode(PROMPT)])
    with torch.no_grad():
        torch.testing.assert_close(model.module(ids).logits, qwen(ids).logits, atol=1e-4, rtol=1e-4)
    method = WeDLM(window=5, entropy_threshold=2.5)
    with method.apply(model, PROFILE) as changed:
        found = changed.generate(encode(PROMPT), Decoding(max_new_tokens=12, ignore_eos=True))
    tokens, _ = slow_stream(
        qwen,
        encode(PROMPT),
        12,
        window=5,
        threshold=2.5,
        penalty=0.02,
        refill="before",
        mask_id=MASK,
    )
    assert list(found.token_ids) == tokens


def test_the_mask_is_the_checkpoints_or_the_engines_own(tmp_path: Path) -> None:
    checkpoint(tmp_path, qk_norm=True)
    assert causal_config(tmp_path).mask_token_id == MASK_TOKEN_ID
    checkpoint(tmp_path, qk_norm=True, mask_token_id=7)
    assert causal_config(tmp_path).mask_token_id == 7
    # A tokenizer without a mask leaves it to the configuration.
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["mask_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert mask_token_of(load(f"path:{tmp_path}", CPU, offline=True)) == 7


def test_other_checkpoints_are_none_of_its_business(tmp_path: Path) -> None:
    new_module().config.save_pretrained(tmp_path)
    assert causal_config(tmp_path) is None


@pytest.mark.parametrize("name", ["q_norm.weight", "o_proj.bias"])
def test_a_checkpoint_with_a_weight_too_few_or_too_many_is_refused(
    tmp_path: Path, name: str
) -> None:
    checkpoint(tmp_path, qk_norm=True)
    weights = load_file(tmp_path / "model.safetensors")
    place = f"model.layers.1.self_attn.{name}"
    if weights.pop(place, None) is None:
        weights[place] = torch.ones(32)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"1 weights, {place}"):
        load(f"path:{tmp_path}", CPU, offline=True)


def test_the_two_stages_lie_in_one_folder_and_are_two_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tiny_causal.toml", "tiny_wedlm.toml"):
        shutil.copy(models.loading._EMBEDDED / name, tmp_path)
    folder = tmp_path / "tiny_causal"
    stages = {}
    for seed, file in enumerate(("model.safetensors", "dual_stream.safetensors")):
        torch.manual_seed(seed)
        module = new_module()
        module.config.save_pretrained(folder)
        save_file(module.state_dict(), folder / file, metadata={"format": "pt"})
        stages[file] = module.state_dict()["lm_head.weight"].clone()
    save_tokenizer(folder)
    monkeypatch.setattr(models.loading, "_EMBEDDED", tmp_path)
    for name, file in (
        ("tiny-causal", "model.safetensors"),
        ("tiny-wedlm", "dual_stream.safetensors"),
    ):
        model = load(name, CPU, offline=True)
        assert model.name == name
        assert torch.equal(model.module.lm_head.weight, stages[file])
        assert mask_token_of(model) == MASK
    (folder / "dual_stream.safetensors").unlink()
    with pytest.raises(ModelError, match="tiny-wedlm"):
        load("tiny-wedlm", CPU, offline=True)
