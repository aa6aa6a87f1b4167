"""The battery passes for our methods, and each of its checks catches a method that breaks it."""

from __future__ import annotations

import dataclasses
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from hardware.profile import Profile
from methods.base import Output
from methods.decoding.common import DecodingMethod, StatefulDecodingMethod, require_text_generator
from methods.decoding.prompt_lookup import LookupDrafter, NgramIndex, PromptLookup
from methods.decoding.token_recycling import TokenRecycling
from models.base import Decoding, Generation, TextGenerator, Trace, Unsupported
from models.decode import NoDraft, decode
from runner.conformance import Check, check_method, conformance, tiny_text_model
from runner.registry import Registry
from runner.request import UsageError
from tests.models.toy import TableModel, random_table

METHODS = sorted(
    name for name, entry in Registry().entries("method").items() if entry.status == "ready"
)


@pytest.fixture(scope="module")
def tiny() -> TextGenerator:
    return tiny_text_model()


@pytest.fixture(scope="module")
def model() -> TextGenerator:
    """A table: what breaks a promise breaks it on any model, and this one is the fastest."""
    return TableModel(random_table(40, 2, spread=2), eos_ids=frozenset({0}))


def broken(checks: Sequence[Check]) -> dict[str, str]:
    """Return what failed; classes of this file have no card, which has tests of its own."""
    return {c.name: c.detail for c in checks if not c.ok and c.name != "card is complete"}


@pytest.mark.parametrize("method", METHODS)
def test_our_methods_keep_the_contract(method: str, tiny: TextGenerator) -> None:
    cls = Registry().load_method(method)
    checks = check_method(cls, tiny if cls.capability == "TextGenerator" else None)
    assert [check for check in checks if not check.ok] == []
    # Those with ends or places of their own have more to keep.
    assert len(checks) == {"TextGenerator": 13, "ImageGenerator": 14}.get(cls.capability, 11)


@pytest.mark.parametrize(
    "method",
    [
        TokenRecycling(tree_nodes=9, prompt_update=True, skip_unknown=True, state="session"),
        PromptLookup(num_tokens="auto", occurrence="last"),
    ],
)
def test_other_settings_keep_it_too(method: DecodingMethod, model: TextGenerator) -> None:
    assert broken(check_method(method, model)) == {}


# --- methods that break one promise each ----------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Drafts(DecodingMethod):
    """Prompt lookup, as the honest ground for what breaks."""

    num_tokens: int = 4
    neutral = MappingProxyType({"num_tokens": 0})

    def drafter(self, model: TextGenerator, hardware: Profile) -> NoDraft:
        return LookupDrafter(NgramIndex(2, "first"), self.num_tokens, model.facts.eos_ids)


class Altered:
    """A text generator whose generations are tampered with."""

    def __init__(self, model: TextGenerator, generate: Callable[..., Generation]) -> None:
        self._model, self._generate = model, generate
        self.name, self.tokenizer, self.facts = model.name, model.tokenizer, model.facts
        self.session, self.synchronize = model.session, model.synchronize

    def generate(self, prompt_ids: Sequence[int], decoding: Decoding) -> Generation:
        return self._generate(self._model, prompt_ids, decoding)


class Tampering(Drafts):
    """Base of methods that spoil what an honest one returns."""

    @contextmanager
    def apply(self, model: TextGenerator, hardware: Profile) -> Iterator[TextGenerator]:
        require_text_generator(self, model)
        with super().apply(model, hardware) as honest:
            yield Altered(honest, self.tamper) if self.num_tokens else honest

    def tamper(
        self, model: TextGenerator, prompt_ids: Sequence[int], decoding: Decoding
    ) -> Generation:
        raise NotImplementedError


def test_the_honest_ground_is_honest(model: TextGenerator) -> None:
    assert broken(check_method(Drafts, model)) == {}


@dataclass(frozen=True, kw_only=True)
class SettingsOfNoText(Drafts):
    sizes: tuple[int, ...] = (1, 2)


def test_settings_that_json_changes_are_found(model: TextGenerator) -> None:
    assert list(broken(check_method(SettingsOfNoText, model))) == ["settings survive JSON"]


@dataclass(frozen=True, kw_only=True)
class NeedsASetting(Drafts):
    depth: int


def test_settings_without_a_default_are_found(model: TextGenerator) -> None:
    [check] = check_method(NeedsASetting, model)
    assert not check.ok
    assert "depth" in check.detail


class TakesAnything(Drafts):
    @contextmanager
    def apply(self, model: TextGenerator, hardware: Profile) -> Iterator[TextGenerator]:
        if not hasattr(model, "session"):
            yield model
            return
        with super().apply(model, hardware) as changed:
            yield changed


class RefusesWithoutAWord(Drafts):
    @contextmanager
    def apply(self, model: TextGenerator, hardware: Profile) -> Iterator[TextGenerator]:
        if not hasattr(model, "session"):
            raise Unsupported
        with super().apply(model, hardware) as changed:
            yield changed


@pytest.mark.parametrize("method", [TakesAnything, RefusesWithoutAWord])
def test_a_careless_refusal_is_found(method: type[Drafts], model: TextGenerator) -> None:
    assert list(broken(check_method(method, model))) == [
        "unsupported models are refused with a reason"
    ]


class NotQuiteNeutral(Drafts):
    neutral = MappingProxyType({"num_tokens": 1})


def test_a_neutral_setting_that_does_something_is_found(model: TextGenerator) -> None:
    assert broken(check_method(NotQuiteNeutral, model)) == {
        "neutral setting equals plain decoding to the bit": "logits differ at temperature 0."
    }


class DoesNothing(Drafts):
    def drafter(self, model: TextGenerator, hardware: Profile) -> NoDraft:
        return NoDraft()


def test_a_method_that_does_nothing_is_found(model: TextGenerator) -> None:
    assert list(broken(check_method(DoesNothing, model))) == ["it acts at these settings"]


class SecondBest(Tampering):
    """Says one other token, and goes on from there as the model would."""

    def tamper(
        self, model: TextGenerator, prompt_ids: Sequence[int], decoding: Decoding
    ) -> Generation:
        result = model.generate(prompt_ids, decoding)
        if decoding.temperature or len(result.token_ids) < 20:
            return result
        token_ids = list(result.token_ids)
        token_ids[15] = token_ids[15] % 39 + 1
        text = model.tokenizer.decode(token_ids)
        return dataclasses.replace(result, token_ids=tuple(token_ids), text=text)


def test_text_that_is_not_the_models_is_found(model: TextGenerator) -> None:
    found = broken(check_method(SecondBest, model))
    assert list(found) == ["declared output holds when greedy"]
    assert "in logits below the best" in found["declared output holds when greedy"]


class HalfTheHeat(Tampering):
    def tamper(
        self, model: TextGenerator, prompt_ids: Sequence[int], decoding: Decoding
    ) -> Generation:
        return model.generate(
            prompt_ids, dataclasses.replace(decoding, temperature=decoding.temperature / 2)
        )


def test_sampling_from_another_distribution_is_found(model: TextGenerator) -> None:
    assert list(broken(check_method(HalfTheHeat, model))) == ["declared output holds when sampling"]


class OwnsUpToAnother(HalfTheHeat):
    output = Output.APPROXIMATE


def test_what_is_declared_approximate_may_differ(model: TextGenerator) -> None:
    assert broken(check_method(OwnsUpToAnother, model)) == {}


class OneTooMany(Tampering):
    def tamper(
        self, model: TextGenerator, prompt_ids: Sequence[int], decoding: Decoding
    ) -> Generation:
        longer = dataclasses.replace(decoding, max_new_tokens=decoding.max_new_tokens + 1)
        return model.generate(prompt_ids, longer)


class IgnoresStopStrings(Tampering):
    def tamper(
        self, model: TextGenerator, prompt_ids: Sequence[int], decoding: Decoding
    ) -> Generation:
        return model.generate(prompt_ids, dataclasses.replace(decoding, stop=()))


class ForgetsToCut(Tampering):
    def tamper(
        self, model: TextGenerator, prompt_ids: Sequence[int], decoding: Decoding
    ) -> Generation:
        result = model.generate(prompt_ids, decoding)
        return dataclasses.replace(result, text=model.tokenizer.decode(result.token_ids))


@pytest.mark.parametrize("method", [OneTooMany, IgnoresStopStrings, ForgetsToCut])
def test_texts_that_end_elsewhere_are_found(method: type[Drafts], model: TextGenerator) -> None:
    assert "texts end where they must" in broken(check_method(method, model))


class Boasts(Tampering):
    def tamper(
        self, model: TextGenerator, prompt_ids: Sequence[int], decoding: Decoding
    ) -> Generation:
        result = model.generate(prompt_ids, decoding)
        result.trace.forwards[1:] = []
        result.trace.accepted[1:] = []
        return result


class Silent(Tampering):
    def tamper(
        self, model: TextGenerator, prompt_ids: Sequence[int], decoding: Decoding
    ) -> Generation:
        return dataclasses.replace(model.generate(prompt_ids, decoding), trace=Trace())


@pytest.mark.parametrize("method", [Boasts, Silent])
def test_a_trace_that_does_not_add_up_is_found(method: type[Drafts], model: TextGenerator) -> None:
    assert list(broken(check_method(method, model))) == ["trace accounts for every token"]


class ByChance(Tampering):
    def tamper(
        self, model: TextGenerator, prompt_ids: Sequence[int], decoding: Decoding
    ) -> Generation:
        seed = int.from_bytes(os.urandom(4), "little")
        return model.generate(prompt_ids, dataclasses.replace(decoding, seed=seed))


class AlwaysTheSame(Tampering):
    def tamper(
        self, model: TextGenerator, prompt_ids: Sequence[int], decoding: Decoding
    ) -> Generation:
        return model.generate(prompt_ids, dataclasses.replace(decoding, seed=5))


@pytest.mark.parametrize("method", [ByChance, AlwaysTheSame])
def test_a_seed_that_does_not_decide_is_found(method: type[Drafts], model: TextGenerator) -> None:
    assert "same seed, same output" in broken(check_method(method, model))


@dataclass(frozen=True, kw_only=True)
class RemembersThoughCold(StatefulDecodingMethod):
    neutral = MappingProxyType({"state": "cold"})

    def drafter(self, model: TextGenerator, hardware: Profile) -> NoDraft:
        """Draft longer with every text."""
        self._kept.append((None, None))
        drafts = min(len(self._kept), 8)
        return LookupDrafter(NgramIndex(2, "first"), drafts, model.facts.eos_ids)


def test_state_that_outlives_its_text_is_found(model: TextGenerator) -> None:
    assert "applications do not leak into each other" in broken(
        check_method(RemembersThoughCold, model)
    )


class Leaves(Drafts):
    """Changes something about the model or the process; `undo` puts it back on a normal exit."""

    @contextmanager
    def apply(self, model: TextGenerator, hardware: Profile) -> Iterator[TextGenerator]:
        require_text_generator(self, model)
        with super().apply(model, hardware) as changed:
            if self.num_tokens:
                CHANGES[CURRENT[0]][0](model.module)
            yield changed
            if self.num_tokens and CURRENT[1]:
                CHANGES[CURRENT[0]][1](model.module)


CURRENT: list[Any] = ["", False]
_HANDLES: list[Any] = []
_WEIGHT: list[torch.Tensor] = []


def first_weight(module: torch.nn.Module) -> torch.Tensor:
    return module.model.layers[0].mlp.up_proj.weight.data


def disturb_weight(module: torch.nn.Module) -> None:
    _WEIGHT.append(first_weight(module).clone())
    first_weight(module)[0, 0] += 1e-6


def restore_weight(module: torch.nn.Module) -> None:
    first_weight(module).copy_(_WEIGHT[0])
    _WEIGHT.clear()


def add_hook(module: torch.nn.Module) -> None:
    _HANDLES.append(module.model.norm.register_forward_hook(lambda *args: None))


def remove_hooks(module: torch.nn.Module) -> None:
    while _HANDLES:
        _HANDLES.pop().remove()


def patch_forward(module: torch.nn.Module) -> None:
    module.model.norm.forward = type(module.model.norm).forward.__get__(module.model.norm)


def unpatch_forward(module: torch.nn.Module) -> None:
    vars(module.model.norm).pop("forward", None)


CHANGES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "weights": (disturb_weight, restore_weight),
    "hooks": (add_hook, remove_hooks),
    "methods of the modules": (patch_forward, unpatch_forward),
    "training mode": (lambda m: m.model.norm.train(), lambda m: m.model.norm.eval()),
    "gradients wanted": (
        lambda m: m.model.norm.requires_grad_(False),
        lambda m: m.model.norm.requires_grad_(True),
    ),
    "configuration": (
        lambda m: setattr(m.config, "rms_norm_eps", 1e-3),
        lambda m: setattr(m.config, "rms_norm_eps", 1e-6),
    ),
    "generation defaults": (
        lambda m: setattr(m.generation_config, "top_k", 7),
        lambda m: setattr(m.generation_config, "top_k", None),
    ),
    "number of threads": (
        lambda m: torch.set_num_threads(7),
        lambda m: torch.set_num_threads(THREADS),
    ),
    "matmul precision": (
        lambda m: torch.set_float32_matmul_precision("medium"),
        lambda m: torch.set_float32_matmul_precision("highest"),
    ),
    "torch's random state": (lambda m: torch.manual_seed(99), lambda m: torch.manual_seed(0)),
    "NumPy's random state": (lambda m: np.random.seed(99), lambda m: np.random.seed(0)),
    "Python's random state": (lambda m: random.seed(99), lambda m: random.seed(0)),
    "environment variables": (
        lambda m: os.environ.update(TOKENMARK_TEST="1"),
        lambda m: os.environ.pop("TOKENMARK_TEST", None),
    ),
    "gradient mode": (
        lambda m: torch.set_grad_enabled(False),
        lambda m: torch.set_grad_enabled(True),
    ),
}
THREADS = torch.get_num_threads()


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("undone_on_exit", [False, True])
def test_what_is_left_changed_is_found(
    what: str, undone_on_exit: bool, tiny: TextGenerator
) -> None:
    CURRENT[:] = [what, undone_on_exit]
    try:
        found = broken_after(Leaves(), tiny)
    finally:
        CHANGES[what][1](tiny.module)
    normal = "model and global state are restored"
    raised = "they are restored after an exception too"
    assert (normal in found) == (not undone_on_exit)
    if undone_on_exit:
        assert found[raised] == f"changed and not restored: {what}."
    else:
        assert found[normal] == f"changed and not restored: {what}."


def broken_after(method: DecodingMethod, model: TextGenerator) -> dict[str, str]:
    """Run only the last two checks: the others are not what is tested and take their time."""
    from runner.conformance import _TextBattery
    from runner.conformance_base import judge

    checks = list(_TextBattery(method, model).checks().items())[-2:]
    return broken([judge(name, check) for name, check in checks])


class Swallows(Drafts):
    @contextmanager
    def apply(self, model: TextGenerator, hardware: Profile) -> Iterator[TextGenerator]:
        with super().apply(model, hardware) as changed, suppress(Exception):
            yield changed


def test_a_method_that_swallows_exceptions_is_found(model: TextGenerator) -> None:
    assert list(broken_after(Swallows(), model).values()) == [
        "it swallowed an exception from inside its block."
    ]


class Raises(Drafts):
    def apply(
        self, model: TextGenerator, hardware: Profile
    ) -> AbstractContextManager[TextGenerator]:
        raise RuntimeError("no such luck")


def test_a_method_that_raises_fails_its_checks_and_stops_none(model: TextGenerator) -> None:
    checks = check_method(Raises, model)
    assert len(checks) == 13
    assert any(
        re.fullmatch(
            r"raised RuntimeError: no such luck \(test_conformance\.py:\d+, in apply\)",
            check.detail,
        )
        for check in checks
    )


class ReturnsText(Tampering):
    def tamper(self, model: TextGenerator, prompt_ids: Sequence[int], decoding: Decoding) -> Any:
        return decode(model, prompt_ids, decoding).text


def test_a_method_that_returns_something_else_is_found(model: TextGenerator) -> None:
    found = broken(check_method(ReturnsText, model))
    assert "generate returned str, not a Generation." in found.values()


# --- by name, with a card -------------------------------------------------------------------------

PLUGIN = '''
"""A method from outside."""
from dataclasses import dataclass
from methods.decoding.prompt_lookup import PromptLookup as Base

@dataclass(frozen=True, kw_only=True)
class Outside(Base):
    """Prompt lookup under another name."""
'''


@pytest.mark.parametrize(
    ("card", "reason"),
    [
        ('[paper]\ntitle = "Outside"\narxiv = "2401.00001"\nyear = 2024\n', ""),
        ('[paper]\ntitle = "Outside"\nkind = "unpublished"\n', ""),
        ('[paper]\ntitle = "Outside"\n', "names neither a paper (arxiv) nor its code"),
        ('[paper]\narxiv = "2401.00001"\n', "'title' is missing"),
        (None, "there is no outside.toml beside outside.py"),
    ],
)
def test_a_plugin_is_checked_by_name_and_needs_a_card(
    card: str | None, reason: str, tmp_path: Path
) -> None:
    plugin = tmp_path / "outside.py"
    plugin.write_text(PLUGIN)
    if card is not None:
        plugin.with_suffix(".toml").write_text(card)
    found = {c.name: c.detail for c in conformance("outside", Registry((plugin,))) if not c.ok}
    assert list(found) == (["card is complete"] if reason else [])
    assert reason in found.get("card is complete", "")


def test_an_unknown_name_is_the_users_mistake() -> None:
    with pytest.raises(
        UsageError, match=r"no method named 'prompt-lokup'\. Did you mean 'prompt-lookup'"
    ):
        conformance("prompt-lokup", Registry())
