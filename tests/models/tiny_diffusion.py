"""Small masked-diffusion models: random ones of both alignments, and hand-made tables."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.base import Decoding, Generation, MaskedDiffusionFacts
from models.embedded.tiny_dllm.batches import save_tokenizer
from models.embedded.tiny_dllm.data import VOCABULARY as WORDS
from models.embedded.tiny_dllm.model import DecoderConfig, MaskedDiffusionDecoder
from models.masked_diffusion import MaskedDiffusionModel
from models.masked_diffusion_decode import decode
from models.masked_diffusion_network import Network, NetworkConfig
from runner.conformance_base import sharpen
from tests.models.tiny import NumberTokenizer

MASK, EOS, VOCABULARY = 1, 2, 23
LONGEST = 96


def tiny_config(*, is_shifted: bool = False) -> NetworkConfig:
    return NetworkConfig(
        width=32,
        num_heads=4,
        num_kv_heads=2,
        num_layers=2,
        inner_width=48,
        vocab_size=VOCABULARY,
        rope_theta=10000.0,
        norm_epsilon=1e-5,
        max_positions=LONGEST,
        mask_id=MASK,
        eos_ids=frozenset({EOS}),
        has_qkv_bias=is_shifted,
        is_tied=False,
        is_shifted=is_shifted,
    )


@functools.cache
def tiny_diffusion(*, is_shifted: bool = False, seed: int = 0) -> MaskedDiffusionModel:
    """Return a seeded random model whose confidences are spread over (0, 1)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Network(tiny_config(is_shifted=is_shifted)).eval()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if parameter.ndim > 1:
                    parameter.mul_(8.0 if name.startswith("head") else 2.0)
                elif name.endswith("bias"):
                    parameter.normal_(0, 0.3)
    network.requires_grad_(False)
    return MaskedDiffusionModel(network, NumberTokenizer(), "tiny-diffusion")


def save_tiny_llada(folder: Path, *, layers: int = 2) -> MaskedDiffusionDecoder:
    """Write a random checkpoint with LLaDA's names; return the module that trained such ones."""
    torch.manual_seed(0)
    config = DecoderConfig(
        d_model=32,
        n_heads=4,
        n_kv_heads=2,
        n_layers=layers,
        mlp_hidden_size=48,
        vocab_size=len(WORDS),
    )
    module = MaskedDiffusionDecoder(config).eval()
    sharpen(module, 8)
    (folder / "config.json").write_text(config.to_json())
    save_file(module.checkpoint(), folder / "model.safetensors")
    save_tokenizer(folder)
    return module


class TableModel:
    """A model whose distributions are written down: they depend on what is written, as told.

    `tables[n]` is used when n answer tokens are written: (answer places, vocabulary) probabilities,
    ids as in the columns. The last table is used from there on.
    """

    name = "table"
    tokenizer = NumberTokenizer()

    def __init__(self, tables: Sequence[Tensor], *, eos_id: int | None = None) -> None:
        self.tables = [table.double() for table in tables]
        vocabulary = tables[0].shape[1]
        self.mask_id = vocabulary
        self.seen: list[list[int]] = []
        self.facts = MaskedDiffusionFacts(
            vocab_size=vocabulary + 1,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=1,
            matrix_parameters=1,
            head_parameters=1,
            weight_bytes=1,
            kv_item_bytes=1,
            max_positions=512,
            eos_ids=frozenset() if eos_id is None else frozenset({eos_id}),
            dtype="float32",
            mask_id=vocabulary,
        )

    def generate(self, prompt_ids: Sequence[int], decoding: Decoding) -> Generation:
        return decode(self, prompt_ids, decoding)

    def canvas(self, padding: Sequence[int], length: int, *, keeps: bool) -> TableCanvas:
        assert not keeps, "a table has no keys and values"
        return TableCanvas(self, length)

    def synchronize(self) -> None:
        """Nothing is running."""


class TableCanvas:
    def __init__(self, model: TableModel, length: int) -> None:
        self.length = length
        self.model = model
        self.prompt = length - model.tables[0].shape[0]

    def denoise(
        self, token_ids: Tensor, first: int, wanted: range, rows: Sequence[int] | None = None
    ) -> Tensor:
        assert first == 0
        self.model.seen += token_ids.tolist()
        found = []
        for row in token_ids:
            answer = row[self.prompt :]
            written = int((answer != self.model.mask_id).sum())
            table = self.model.tables[min(written, len(self.model.tables) - 1)]
            part = table[wanted.start - self.prompt : wanted.stop - self.prompt]
            # The mask's own logit is the largest: nobody may choose it.
            found.append(torch.nn.functional.pad(part.log(), (0, 1), value=9.0))
        return torch.stack(found).float()

    def cut(self, ends: Sequence[int]) -> None:
        """What is cut is not asked for."""
