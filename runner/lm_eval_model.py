"""`tokenmark` as a model of lm-eval: any of its tasks through any of our text methods.

Importing this module registers the model, so that `lm_eval.simple_evaluate(model="tokenmark",
model_args="model=smollm2-135m,method=token-recycling:tree_nodes=auto", tasks=["hellaswag"])` works.
Every request is one call, with the method applied around it as in a measurement; lm-eval's batch
size changes nothing. Only lm-eval's own numbers come of it: for speed run the task
`lm-eval:<name>`, which measures methods beside the baseline.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model

from hardware import ceilings, detect
from hardware.profile import Profile
from models.base import TextGenerator
from models.loading import load, weights_hash
from runner.capabilities import CONVENTIONS, taken_as
from runner.keys import digest, shared_source, versions
from runner.plan import named_model, offered_as
from runner.registry import Registry
from runner.request import UsageError
from runner.settings import MethodSpec, Spec, format_spec, parse_method, parse_spec
from runner.stacking import Made, made_of, source_of
from runner.worker import calibrate
from tasks.lm_eval_model import DEFAULT_NEW_TOKENS, GeneratorLM

CALIBRATION_SECONDS = 5.0


@register_model("tokenmark")
class Tokenmark(GeneratorLM):
    """One of our models with one of our methods around every request.

    Attributes:
        facts: Who answers: model, method, their settings and hashes; part of lm-eval's results.
    """

    def __init__(
        self,
        model: str = "smollm2-135m",
        method: str = "",
        *,
        hardware: str = "auto",
        device: str | None = None,
        seed: int = 0,
        max_length: int | None = None,
        max_gen_toks: int = DEFAULT_NEW_TOKENS,
        offline: bool = False,
        plugin: str = "",
        batch_size: object = None,
        max_batch_size: object = None,
        **settings: Any,
    ) -> None:
        """Load a model and make a method.

        Args:
            model: Id with settings, as on our command line.
            method: Spec, `token-recycling:tree_nodes=auto`; the capability's baseline if empty.
            hardware: `auto` or a profile's name.
            device: Of the weights; the model's setting if None.
            seed: Of sampled texts.
            max_length: Tokens of the longest text; the model's own limit if None.
            max_gen_toks: New tokens where a task names no number.
            offline: Never reach for the network.
            plugin: Python file that brings the method; empty for none.
            batch_size, max_batch_size: Taken, as lm-eval passes them, and without effect.
            settings: Further settings of the method: in lm-eval's text of arguments a comma ends
                the spec, `method=token-recycling:tree_nodes=32,state=session`.

        Raises:
            UsageError: A name or setting is wrong, or the method does not fit the model.
            models.loading.ModelError: The weights are not to be had.
            models.base.Unsupported: The tokenizer is none of transformers.
        """
        registry = Registry((Path(plugin),) if plugin else ())
        model_id, load_settings = named_model(str(model), registry)
        if device is not None:
            load_settings = replace(load_settings, device=device)
        offered = offered_as(model_id, load_settings, offline=offline)
        capability = taken_as("TextGenerator", offered)
        if capability not in CONVENTIONS or (offered and capability not in offered):
            raise UsageError(f"model {model_id!r} writes no text: it is {' or '.join(offered)}.")
        made = _method(method, settings, capability, registry)
        self.method = made.method
        generator: Any = load(model_id, load_settings, offline=offline, capability=capability)
        super().__init__(generator, max_length=max_length, max_gen_toks=max_gen_toks, seed=seed)
        self.profile = self._profile(hardware, seed)
        self.facts = {
            "model": model_id,
            "model_params": dict(parse_spec(format_spec(load_settings, model_id)).params),
            "model_hash": weights_hash(model_id, load_settings),
            "method": made.name,
            "spec": made.spec,
            "params": self.method.parameters(),
            "method_source": source_of(made.name, registry),
            "source": shared_source(),
            "versions": versions(),
            "family": made.family,
            "role": self.method.role,
            "declared_output": self.method.declared_output(0.0).value,
            "hardware": self.profile.name,
            "seed": seed,
            "environment": detect.environment(),
        }

    def _profile(self, hardware: str, seed: int) -> Profile:
        profile = detect.select(hardware)
        if self.method.role == "baseline":
            return profile  # it looks at nothing of the machine
        profile = ceilings.measured(profile)
        return replace(profile, step_cost=calibrate(self.generator, CALIBRATION_SECONDS, seed))

    @contextmanager
    def applied(self) -> Iterator[TextGenerator]:
        """Yield the model with the method around it, for one request."""
        with self.method.apply(self.generator, self.profile) as changed:
            yield changed

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes into its results about the model."""
        return {"tokenmark": self.facts}

    def key(self) -> str:
        """Return a hash over all that can change an answer, as a name for a cache of answers."""
        left_out = ("environment", "hardware")
        kept = {name: value for name, value in self.facts.items() if name not in left_out}
        return digest({**kept, "max_length": self.max_length, "new_tokens": self.max_gen_toks})[:16]


def _method(text: str, settings: dict[str, Any], capability: str, registry: Registry) -> Made:
    """Return the method; of a stack, the settings are those of the last part.

    Raises:
        UsageError: It is unknown, takes another capability, or its settings are wrong.
    """
    *others, asked = parse_method(text or CONVENTIONS[capability].baseline).parts
    # lm-eval has read the values already: `true` is a truth value to it.
    more = {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in settings.items()
    }
    last = Spec(asked.name, {**asked.params, **more})
    made = made_of(MethodSpec((*others, last)), registry)
    if (takes := made.method.capability) != capability:
        raise UsageError(
            f"method {made.name!r} changes a {takes}, and lm-eval's requests go to a {capability}."
        )
    return made
