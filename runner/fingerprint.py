"""The work fingerprint: what each method makes a model do, counted, exactly repeatable.

Every method of the tree decodes the same prompts on tiny models whose weights are small whole
numbers over a power of two: the same on every machine, without a file and without a random
generator of torch. In float64 and with the plain kernels, rounding is far below any gap between
logits, so forwards, tokens, operations and cache bytes are equal everywhere. The committed file is
a test: whoever alters the work of a method sees it fail, without a GPU and without a clock.

Peers are left out: their work is decided by another project's version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hardware.profile import Profile, StepCost
from methods.base import Method
from models.base import Decoding, TextGenerator, Unsupported
from models.text import CausalLM
from runner.conformance import tiny_text_model
from runner.conformance_base import fill_exactly
from runner.conformance_calls import CALLS, TEXTS, Calls
from runner.registry import ROOT, Registry
from runner.request import UsageError

PATH = ROOT / "tests" / "fingerprints" / "work.json"
UPDATE = "python run.py run --work-only --update"

# A curve that bends at 8 tokens, for methods that choose their size by it.
PROFILE = Profile(
    name="fingerprint",
    kind="cpu",
    label="No particular device",
    step_cost=StepCost((1, 8, 32, 81), (16, 112), ((1.0, 1.4, 3.0, 7.0), (1.1, 1.5, 3.1, 7.1))),
)
LENGTH = 20
_VOCABULARY = 64
_TEXTS = {
    "greedy": Decoding(max_new_tokens=LENGTH),
    "sampled": Decoding(max_new_tokens=LENGTH, temperature=1.0, seed=1),
}
# Repetitive, mixed, and a single token.
_PROMPTS: Sequence[Sequence[int]] = (
    (5, 9, 13, 7) * 4,
    (3, 41, 17, 8, 29, 60, 2, 33, 51, 12),
    (11,),
)
Counts = dict[str, int | str]
Fingerprint = dict[str, Counts]
"""What a method did, by model and kind of decoding: `llama greedy`."""


def methods(registry: Registry) -> list[str]:
    """Return the methods that have a fingerprint: those of the tree that are no peers."""
    return [
        name
        for name, entry in registry.entries("method").items()
        if entry.status == "ready"
        and entry.origin == "tree"
        and registry.load_method(name).role != "peer"
    ]


def fingerprint(method_class: type[Method[Any]]) -> Fingerprint:
    """Return the work of a method at its defaults.

    A method that needs more than a tiny model has (a trained draft model, a constraint) names other
    settings for trials itself, as the conformance battery knows them.
    """
    settings = trial_settings(method_class)
    if method_class.capability in CALLS:
        return _calls(method_class(**settings), CALLS[method_class.capability])
    found: Fingerprint = {}
    for name, model in tiny_models().items():
        for kind, decoding in _TEXTS.items():
            # Each text from a fresh method: what one leaves behind is not the next one's work.
            try:
                counted = [
                    _work(method_class(**settings), model, prompt, decoding) for prompt in _PROMPTS
                ]
            except Unsupported as refused:
                found[f"{name} {kind}"] = {"unsupported": " ".join(str(refused).split())}
                continue
            found[f"{name} {kind}"] = {
                quantity: sum(each[quantity] for each in counted) for quantity in counted[0]
            }
    return found


def fingerprints(registry: Registry, names: Sequence[str] = ()) -> dict[str, Fingerprint]:
    """Return the fingerprints of some methods, or of all that have one.

    Raises:
        UsageError: A method does not exist, is planned, or is a peer or from outside the tree.
    """
    known = methods(registry)
    for name in names:
        if name not in known:
            registry.load_method(name)  # raises with the reason where it does not exist
            raise UsageError(
                f"method {name!r} has no work fingerprint: it is a peer, or not of this tree."
            )
    return {name: fingerprint(registry.load_method(name)) for name in names or known}


def trial_settings(method_class: type[Method[Any]]) -> dict[str, Any]:
    """Return the settings with which a method works on a tiny model; mostly its defaults."""
    return dict(method_class.trial)


def committed(path: Path = PATH) -> dict[str, Fingerprint]:
    """Return the fingerprints on file; none if there is no file.

    Raises:
        UsageError: The file is no JSON.
    """
    try:
        found: dict[str, Fingerprint] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UsageError(f"{path} is no valid JSON: {error}. {UPDATE} writes it anew.") from error
    return found


def write(found: Mapping[str, Fingerprint], path: Path = PATH) -> None:
    """Write the fingerprints, sorted, a line for each number, so that changes read well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def differences(
    before: Mapping[str, Fingerprint], after: Mapping[str, Fingerprint]
) -> list[dict[str, str]]:
    """Return a row for each number that changed, and for each method that came or went."""
    rows = []
    for method in sorted(before.keys() | after.keys()):
        if method not in before or method not in after:
            what = "new" if method not in before else "gone"
            rows.append(_row(method, "", what, "", ""))
            continue
        old, new = before[method], after[method]
        for text in sorted(old.keys() | new.keys()):
            ours, theirs = old.get(text, {}), new.get(text, {})
            rows += [
                _row(method, text, name, str(ours.get(name, "")), str(theirs.get(name, "")))
                for name in sorted(ours.keys() | theirs.keys())
                if ours.get(name) != theirs.get(name)
            ]
    return rows


def rows(found: Mapping[str, Fingerprint]) -> list[dict[str, str]]:
    """Return fingerprints for people, a row for each method and text."""
    counted = [counts for texts in found.values() for counts in texts.values()]
    columns = dict.fromkeys(name for counts in counted for name in counts)
    return [
        {"method": method, "text": text} | {name: str(counts.get(name, "")) for name in columns}
        for method, texts in found.items()
        for text, counts in texts.items()
    ]


def tiny_models() -> dict[str, CausalLM]:
    """Return the models by name: a Llama with grouped heads, and a GPT-2 with learned positions."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    llama = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=192,
        **ends,
    )
    gpt2 = GPT2Config(
        vocab_size=_VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=192, **ends
    )
    tokenizer = tiny_text_model().tokenizer
    with torch.random.fork_rng(devices=[]):
        modules = {"llama": LlamaForCausalLM(llama), "gpt2": GPT2LMHeadModel(gpt2)}
    for module in modules.values():
        fill_exactly(module)
    return {
        name: CausalLM(module, tokenizer, f"tiny-{name}", kernels="transformers")
        for name, module in modules.items()
    }


def _calls(method: Method[Any], calls: Calls) -> Fingerprint:
    """Return the work of a method whose calls are functions of a text.

    Weights do not change it, or they are the same on every machine.
    """
    with method.apply(calls.model(), PROFILE) as changed:
        counted = [calls.call(changed, text).work for text in TEXTS]
    return {"texts": {quantity: sum(each[quantity] for each in counted) for quantity in counted[0]}}


def _work(
    method: Method[Any], model: TextGenerator, prompt: Sequence[int], decoding: Decoding
) -> dict[str, int]:
    with method.apply(model, PROFILE) as changed:
        found = changed.generate(list(prompt), decoding)
    trace = found.trace
    return {
        "output_tokens": len(found.token_ids),
        "prefill_tokens": sum(forward.width for forward in trace.prefill),
        "forwards": len(trace.forwards),
        "forward_tokens": sum(forward.width for forward in trace.forwards),
        "accepted_tokens": trace.accepted_drafts,
        "draft_forwards": trace.draft_forwards,
        "flops": int(trace.flops),  # sums of whole numbers far below 2**53
        "kv_bytes": trace.kv_bytes,
    }


def _row(method: str, text: str, what: str, before: str, after: str) -> dict[str, str]:
    return {"method": method, "text": text, "what": what, "before": before, "now": after}
