"""What the conformance batteries share: checks, the promises of every method, a model's state."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hardware.profile import Profile
from methods.base import Method
from methods.cards import CardError, load_card
from models.base import Unsupported
from runner.blame import in_a_line
from runner.stacking import Stack

# Largest weight of a matrix, as a multiple of 1/1024: large enough for decided logits.
_LARGEST_WEIGHT = 400

PROFILE = Profile(name="conformance", kind="cpu", label="No particular device")


@dataclass(frozen=True)
class Check:
    """One promise, whether it is kept, and what was found."""

    name: str
    ok: bool
    detail: str = ""


class Broken(Exception):  # a finding, no error of ours
    """A promise is not kept; the message says how."""


class OnPurpose(Exception):  # a signal, no error
    """Raised where a method's block must let it through."""


def judge(name: str, check: Callable[[], str]) -> Check:
    """Run one check; whatever it raises is a finding."""
    try:
        return Check(name, True, check())
    except Broken as broken:
        return Check(name, False, str(broken))
    except Exception as error:  # noqa: BLE001  # a stranger's method may raise anything
        return Check(name, False, f"raised {in_a_line(error)}")


class Battery:
    """Promises that do not depend on what the model is."""

    def __init__(self, method: Method[Any]) -> None:
        self.method = method

    def card(self) -> str:
        """Look for the card beside the code; a stack's parts have one each."""
        parts = self.method.parts if isinstance(self.method, Stack) else (self.method,)
        return f"{sum(map(_claims_of, parts))} claims"

    def settings(self) -> str:
        """Send the settings through JSON."""
        before = self.method.parameters()
        text = json.dumps(before, sort_keys=True)
        rebuilt = self.method.with_parameters(json.loads(text))
        if rebuilt != self.method or json.dumps(rebuilt.parameters(), sort_keys=True) != text:
            raise Broken(f"{text} became {json.dumps(rebuilt.parameters(), sort_keys=True)}.")
        return text

    def refusal(self) -> str:
        """Offer a model that can do nothing."""
        try:
            with self.method.apply(_Nothing(), PROFILE):
                pass
        except Unsupported as refused:
            if not str(refused).strip():
                raise Broken("Unsupported came without a reason.") from refused
            return str(refused)
        raise Broken(f"a model without any capability was accepted as {self.method.capability}.")


def fresh(method: Method[Any]) -> Method[Any]:
    """Return an instance with the same settings and no past."""
    return method.with_parameters(method.parameters())


def _claims_of(method: Method[Any]) -> int:
    """Return how many claims the card of a method has.

    Raises:
        Broken: There is none, or it is not complete.
    """
    source = inspect.getfile(type(method))
    path = Path(source).with_suffix(".toml")
    if not path.is_file():
        raise Broken(
            f"there is no {path.name} beside {Path(source).name}; docs/adding-a-method.md has one."
        )
    try:
        card = load_card(path)
    except CardError as error:
        raise Broken(str(error)) from error
    paper = card.paper
    if method.role == "method" and not (paper.arxiv or paper.code or paper.kind == "unpublished"):
        raise Broken(
            f"{path.name} names neither a paper (arxiv) nor its code; an idea of your own says "
            'kind = "unpublished".'
        )
    return len(card.claims)


class _Nothing:
    """A model that can do nothing."""

    name = "nothing"


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Hold two snapshots against each other.

    Raises:
        Broken: Something changed.
    """
    changed = sorted(name for name in before if before[name] != after[name])
    if changed:
        raise Broken(f"changed and not restored: {', '.join(changed)}.")
    return f"{len(before)} things compared"


def snapshot(model: Any) -> dict[str, Any]:
    """Return what a method must leave as it was, in a form that can be compared."""
    module = getattr(model, "networks", getattr(model, "module", None))
    # First, because what it imports sets environment variables.
    inside = _snapshot_module(module) if isinstance(module, torch.nn.Module) else {}
    things: dict[str, Any] = {
        "gradient mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "number of threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "cuDNN flags": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark),
        "torch's random state": _digest(torch.random.get_rng_state()),
        "NumPy's random state": repr(np.random.get_state()),  # others may use it
        "Python's random state": hash(random.getstate()),
        "environment variables": dict(os.environ),
        "working directory": str(Path.cwd()),
        "methods of the model": _callables(model),
        "facts of the model": model.facts,
    }
    return things | inside


def _snapshot_module(module: Any) -> dict[str, Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    parts = dict(module.named_modules())
    config = getattr(module, "config", None)
    defaults = getattr(module, "generation_config", None)
    return {
        "weights": {name: _digest(value) for name, value in module.state_dict().items()},
        "modules": {name: id(part) for name, part in parts.items()},
        "hooks": {
            name: [
                len(hooks) for key, hooks in sorted(vars(part).items()) if key.endswith("_hooks")
            ]
            for name, part in parts.items()
        },
        "training mode": {name: part.training for name, part in parts.items()},
        "gradients wanted": {name: p.requires_grad for name, p in module.named_parameters()},
        "methods of the modules": {name: _callables(part) for name, part in parts.items()},
        "configuration": getattr(config, "to_dict", config.__repr__)(),
        "attention kernel": getattr(config, "_attn_implementation", None),
        "generation defaults": defaults.to_dict() if defaults is not None else None,
        "attention functions": sorted(ALL_ATTENTION_FUNCTIONS.keys()),
    }


def _callables(thing: object) -> dict[str, int]:
    """Return the functions set on an object or its class, by identity: monkeypatches show."""
    found = {name: id(value) for name, value in vars(thing).items() if inspect.isroutine(value)}
    for cls in reversed(type(thing).__mro__[:-1]):
        found |= {
            f"{cls.__name__}.{name}": id(value)
            for name, value in vars(cls).items()
            if inspect.isfunction(value)
        }
    return found


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(data.tobytes()).hexdigest()


def random_llama(*, vocab_size: int, layers: int, positions: int = 128) -> Any:
    """Return a seeded Llama of some ten thousand weights, token 0 its end of text.

    Args:
        vocab_size: Number of token ids.
        layers: Decoder layers, hidden size 32, four query heads on two key-value heads.
        positions: Longest context.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = LlamaForCausalLM(config)
        sharpen(module, 6)
    return module


@torch.no_grad()
def sharpen(module: Any, factor: float, biases: float = 0.0) -> None:
    """Make a random module's answers differ: at the usual scale all logits are nearly equal.

    Args:
        module: Its matrices are multiplied in place.
        factor: By this.
        biases: Standard deviation of the biases, drawn anew from torch's generator; 0 leaves them.
    """
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.mul_(factor)
        elif biases and name.endswith("bias"):
            parameter.normal_(0, biases)


def byte_tokenizer(special_words: Sequence[str] = ("<end>",)) -> Any:
    """Return a tokenizer of bytes behind special words; `<end>` among them ends a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: place for place, word in enumerate((*special_words, *alphabet))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, special=True) for word in special_words])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def fill_exactly(module: Any, seed: int = 0) -> None:
    """Turn a module to float64 and fill its matrices with numbers that are exact everywhere."""
    module.double()
    draw = np.random.default_rng(seed)  # whole numbers of PCG64 are the same on every machine
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                whole = draw.integers(-_LARGEST_WEIGHT, _LARGEST_WEIGHT + 1, parameter.shape)
                parameter.copy_(torch.from_numpy(whole / 1024))
