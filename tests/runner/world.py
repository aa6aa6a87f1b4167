"""A small world for the runner: a local model folder, and a plug-in that misbehaves."""

from __future__ import annotations

from pathlib import Path

from tests.models.tiny import tiny_module

PLUGIN = Path(__file__).with_name("plugin.py")


def save_model(folder: Path) -> str:
    """Write a tiny random Llama laid out like a hub's folder; return its model id."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{token}": token for token in range(97)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t0").save_pretrained(folder)
    tiny_module("llama").save_pretrained(folder)
    return f"path:{folder}"
