"""Masked-diffusion language models of the LLaDA and Dream classes, as `MaskedDiffusionLM`.

A `Canvas` holds a batch of sequences. The network sees in both directions, so keys and values of
one position depend on all others and a cache of them is an approximation: what is run anew replaces
what was kept, and all else is seen as it was when last run. The two caches of Fast-dLLM (arXiv
2505.22618) are choices of what to run, see `models.masked_diffusion_decode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.base import Decoding, Generation, MaskedDiffusionFacts, Tokenizer
from models.device import OnDevice, linear_parameters
from models.masked_diffusion_decode import decode
from models.masked_diffusion_network import Kept, Network, read_network

if TYPE_CHECKING:
    from models.loading import LoadSettings

# What ends a turn of a chat ends an answer too, though `config.json` does not name it: LLaDA's and
# Dream's words for it.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>")


class MaskedDiffusionModel(OnDevice):
    """A `models.base.MaskedDiffusionLM` over a network.

    Attributes:
        name: For messages and tables.
        tokenizer: Text to ids and back.
        facts: Sizes.
        module: The network.
        kernels: What runs the forwards, for the record.
    """

    kernels = "own"

    def __init__(
        self,
        network: Network,
        tokenizer: Tokenizer,
        name: str,
        *,
        more_eos_ids: frozenset[int] = frozenset(),
    ) -> None:
        """Wrap a network.

        Args:
            network: In evaluation mode.
            tokenizer: Of the same ids.
            name: For messages and tables.
            more_eos_ids: Ids that end a text besides those of the network's configuration.
        """
        self.module = network
        self.tokenizer = tokenizer
        self.name = name
        self.facts = _facts(network, more_eos_ids)

    def canvas(self, padding: Sequence[int], length: int, *, keeps: bool) -> TensorCanvas:
        """See `models.base.MaskedDiffusionLM.canvas`."""
        return TensorCanvas(self.module, padding, length, keeps=keeps)

    def generate(self, prompt_ids: Sequence[int], decoding: Decoding) -> Generation:
        """Continue `prompt_ids` plainly: one token a forward, the surest of each step."""
        return decode(self, prompt_ids, decoding)


class TensorCanvas:
    """A `models.base.Canvas` over a network."""

    def __init__(
        self, network: Network, padding: Sequence[int], length: int, *, keeps: bool
    ) -> None:
        """Open a canvas; see `models.base.MaskedDiffusionLM.canvas`."""
        config, weight = network.config, network.head.weight
        self.length = length
        self._network = network
        self._begins = torch.tensor(padding, device=weight.device)
        self._ends = torch.full_like(self._begins, length)
        self._is_ragged = any(padding)
        self._has_run = False
        shape = (len(padding), config.num_kv_heads, length, config.head_dim)
        self._kept = (
            # Zeros, as what was never run is hidden by a mask, which NaN would break through.
            [Kept(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in network.layers]
            if keeps
            else None
        )

    @torch.inference_mode()
    def denoise(
        self, token_ids: Tensor, first: int, wanted: range, rows: Sequence[int] | None = None
    ) -> Tensor:
        """See `models.base.Canvas.denoise`.

        Raises:
            ValueError: Positions are wanted that are not run, or a part of the sequence is run on a
                canvas that keeps nothing.
        """
        last = first + token_ids.shape[1]
        # The output about a token comes from the position before it; the very first has none and
        # is read at its own place, as Dream's code does.
        shift = int(self._network.config.is_shifted)
        sources = range(max(wanted.start - shift, 0), wanted.stop - shift)
        if not first <= sources.start or wanted.stop > last:
            raise ValueError(
                f"logits of positions {wanted.start} to {wanted.stop} need positions from "
                f"{sources.start} on, but {first} to {last} are run."
            )
        is_part = first > 0 or (self._kept is not None and last < int(self._ends.max()))
        if is_part and not self._has_run:
            raise ValueError(
                f"positions {first} to {last} cannot be run alone: no keys and values of others "
                f"are kept."
            )
        self._has_run = self._kept is not None
        # All rows are not picked out: that would copy every key and value that is kept.
        is_all = rows is None or list(rows) == list(range(len(self._begins)))
        place = None if is_all else torch.tensor(rows, device=self._begins.device)
        seen = self.length if self._kept is not None else last
        hidden = self._network(
            token_ids.to(self._begins.device),
            first,
            self._kept,
            place,
            self._visible(place, seen),
        )
        read = hidden[:, sources.start - first : sources.stop - first]
        if len(sources) < len(wanted):
            read = torch.cat([read[:, :1], read], dim=1)
        logits: Tensor = self._network.head(read).float()
        return logits

    def cut(self, ends: Sequence[int]) -> None:
        """See `models.base.Canvas.cut`."""
        self._ends = torch.minimum(self._ends, torch.tensor(ends, device=self._ends.device))
        self._is_ragged = True

    def _visible(self, rows: Tensor | None, seen: int) -> Tensor | None:
        """Return which of the first `seen` positions are seen, (rows, 1, 1, seen)."""
        if not self._is_ragged:
            return None
        begins, ends = (each if rows is None else each[rows] for each in (self._begins, self._ends))
        places = torch.arange(seen, device=begins.device)
        visible = (places >= begins[:, None]) & (places < ends[:, None])
        return visible[:, None, None]


def load_masked_diffusion(
    folder: Path, model_id: str, settings: LoadSettings, tokenizer_folder: Path
) -> MaskedDiffusionModel:
    """Load a LLaDA- or Dream-class model from a folder laid out like the hub's.

    Args:
        folder: With config.json and *.safetensors.
        model_id: For messages and tables.
        settings: Device and dtype; there is one kind of kernels.
        tokenizer_folder: With tokenizer.json.

    Raises:
        models.loading.ModelError: The files are not those of such a model.
        models.base.Unsupported: It is of a class or variant that is not run here.
    """
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    from models.loading import ModelError, quiet_transformers
    from models.tokenization import HubTokenizer

    # By class and not by `AutoTokenizer`, which wants to know the model. Dream's comes in Qwen2's
    # two files and with code of its own, which is not run.
    is_whole = (tokenizer_folder / "tokenizer.json").is_file()
    tokenizer_class = PreTrainedTokenizerFast if is_whole else Qwen2Tokenizer
    try:
        network = read_network(
            folder, getattr(torch, settings.dtype_name()), settings.device_name()
        )
        with quiet_transformers():
            hub = tokenizer_class.from_pretrained(tokenizer_folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"'{model_id}' cannot be loaded: {error}") from error
    vocabulary = hub.get_vocab()
    ends = frozenset(vocabulary[word] for word in _TURN_ENDS if word in vocabulary)
    return MaskedDiffusionModel(network, HubTokenizer(hub), model_id, more_eos_ids=ends)


def _facts(network: Network, more_eos_ids: frozenset[int]) -> MaskedDiffusionFacts:
    config, weight = network.config, network.head.weight
    matrices = linear_parameters(network)
    return MaskedDiffusionFacts(
        vocab_size=config.vocab_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        matrix_parameters=matrices,
        head_parameters=weight.numel(),
        weight_bytes=matrices * weight.element_size(),
        kv_item_bytes=weight.element_size(),
        max_positions=config.max_positions,
        eos_ids=config.eos_ids | more_eos_ids,
        dtype=str(weight.dtype).removeprefix("torch."),
        mask_id=config.mask_id,
        is_shifted=config.is_shifted,
    )
