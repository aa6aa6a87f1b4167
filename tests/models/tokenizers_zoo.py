"""Small tokenizers of every kind, and tiny random models of real architectures behind them."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from models.tokenized import CausalTokenizedLM, PlainTokenizer
from tests.models.tiny import ARCHITECTURES

TEXTS = (
    "the cat sat on the mat and the dog sat on the log, so the mat was flat.",
    "a heat wave sat over the city; the theatre was hot and the cats were thirsty!",
    "then there were three: the thin one, the other one, and the third — na\u00efve caf\u00e9.",
)
OTHER_TEXTS = (
    "one dog and another dog ran to the river, and the river ran to the sea.",
    "running and jumping, the dogs and the cats were everywhere; nowhere was there a mat.",
    "where were the three theatres? the hottest city had another, flatter theatre.",
)


@functools.cache
def byte_level(size: int = 300, other: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2's kind: bytes as letters, `Ġ` for a space."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(OTHER_TEXTS if other else TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|pad|>"
    )


@functools.cache
def word_piece() -> PreTrainedTokenizerFast:
    """BERT's kind: `##` goes on with a word; lower-cases; cuts and pads unless told otherwise."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(prefix="##")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    core.train_from_iterator(TEXTS, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    core.enable_truncation(8)
    core.enable_padding(length=8)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


@functools.cache
def sentence_piece() -> PreTrainedTokenizerFast:
    """Llama 2's kind: `▁` for a space, `<0x41>` for a byte that has no token."""
    special = ["<unk>", "<s>", "</s>"]
    words = ["▁the", "▁cat", "▁", "the", "cat", "s", "▁mat", "c", "a", "t", "A"]
    names = special + [f"<0x{byte:02X}>" for byte in range(256)] + words
    vocabulary = {name: number for number, name in enumerate(names)}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def tiny_lm(
    architecture: str = "llama",
    hub: Any = None,
    *,
    tied: bool = True,
    seed: int = 0,
    window: int = 512,
    spare_rows: int = 0,
) -> CausalTokenizedLM:
    """Return a random model whose vocabulary is that of a tokenizer; `byte_level()` by default."""
    hub = hub or byte_level()
    class_name, settings = ARCHITECTURES[architecture]
    model_class = getattr(transformers, class_name)
    settings = {**settings, "vocab_size": len(hub) + spare_rows, "tie_word_embeddings": tied}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = model_class(model_class.config_class(**settings))
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if parameter.ndim > 1 and "embed" not in name and "wte" not in name:
                    parameter.mul_(4.0)
    return CausalTokenizedLM(module, PlainTokenizer(hub), f"tiny-{architecture}", window=window)
