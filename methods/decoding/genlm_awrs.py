"""genlm-control's AWRS: the authors' maintained library, as a peer of `awrs`.

The same logits, the same constraint, the same rule for the last token; sampler, estimators and
sequential Monte Carlo are the library's, in a process and an environment of their own
(`common_genlm` says how to make it). Rows name its versions in the note `peer`. The time of a text
holds the conversation between the processes: the logits of each text once, and each check.

The library only samples: at temperature 0 it is unsupported.

Source: genlm-control 0.4.1 (package of genlm/genlm-control); arXiv 2504.05410.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from hardware.profile import Profile
from methods.checks import method_name, require_count
from methods.decoding.common_constraints import (
    Branches,
    ConstrainedMethod,
    Request,
    Resampling,
    Written,
    require_particles,
    write_one_of,
)
from methods.decoding.common_genlm import GENLM, genlm
from models.base import TextGenerator, Unsupported


@dataclass(frozen=True, kw_only=True)
class GenlmAwrs(ConstrainedMethod):
    """AWRS by genlm-control.

    Attributes:
        max_accepts: Accepted tokens after which its geometric estimator stops.
        proper_weights: False draws locally, all weights 1.
        particles: Texts that grow side by side.
        ess_threshold: Particles are resampled when their effective share falls below it; 0 never.
        resampling: How; the library's own default is multinomial.
        branch_nodes: As for `awrs`: it decides where our caches are, not what is sampled.
    """

    role = "peer"
    # It cannot show anything at temperature 0, nor anywhere without its environment.
    trial = MappingProxyType({})

    max_accepts: int = 2
    proper_weights: bool = True
    particles: int = 5
    ess_threshold: float = 0.5
    resampling: Resampling = "stratified"
    branch_nodes: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("max_accepts", self.max_accepts, 2, 1000, "One accept has no weight.")
        require_particles(self.particles, self.ess_threshold, self.resampling, self.branch_nodes)

    @contextmanager
    def apply(self, model: TextGenerator, hardware: Profile) -> Iterator[TextGenerator]:
        """Yield the model with constrained texts by the library, whose program runs from here on.

        Without the environment plain requests are decoded all the same; a constrained one is
        refused.
        """
        with super().apply(model, hardware) as changed:
            if not GENLM.missing():  # starting it takes seconds that are no text's
                genlm(method_name(self))
            yield changed

    def write(self, request: Request) -> Written:
        """Write a text; the notes hold the library's versions and its estimate.

        Raises:
            Unsupported: There is no environment, or the request is greedy.
        """
        if request.decoding.temperature == 0:
            raise Unsupported(
                "'genlm-awrs' samples; at temperature 0, which is asked for, it has no answer."
            )
        peer = genlm(method_name(self))
        branches = Branches(
            request.model,
            request.prompt_ids,
            request.decoding.max_new_tokens,
            request.trace,
            # A single particle is a lone text.
            most_nodes=1 if self.particles == 1 else self.branch_nodes,
        )
        texts = peer.sample(
            request,
            branches,
            {
                "particles": self.particles,
                "ess_threshold": self.ess_threshold,
                "resampling": self.resampling,
                "max_accepts": self.max_accepts,
                "proper_weights": self.proper_weights,
            },
        )
        request.trace.notes["peer"] = peer.versions
        return write_one_of(
            texts,
            request,
            np.random.default_rng(request.decoding.seed),
            dead=texts.particles[0],
            is_weighed=self.proper_weights,
        )
