"""Learn2PD: a learned filter says which candidates are final already; padding is not decoded.

At every step a network of two thousand weights reads the confidences of the whole block and writes
the masks whose candidates one-at-a-time decoding would end with anyway; the surest mask is written
in any case. The answer is cut as soon as its end is predicted. The model stays as it is: the filter
is trained once, in minutes, on what the model itself decoded.

Source: arXiv 2509.25188; ims-kdks/Learning-to-Parallel-Decoding at 342293c (LLaDA's sampler).
Differs from that code: its filter's module was not published with the revision read, two layers of
32 with a ReLU are assumed (2,112 weights, the paper's figure); behind the end of a cut block the
filter reads confidence 1, where the code would fail; a cut never removes a written token that is no
end of text; every end-of-text id counts, not one alone; what takes part in a cut under a dual cache
is only what was run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import get_args

from hardware.profile import Profile
from methods.checks import method_name, require_choice, require_number
from methods.diffusion_lm.common import DiffusionMethod, require_masked_diffusion
from methods.diffusion_lm.common_learn2pd import (
    ConfidenceFilter,
    EndPrediction,
    Filter,
    FilterKind,
    FilterRule,
    ForesightModel,
    PredictedEnd,
    filter_path,
    load_filter,
)
from models.base import Decoding, MaskedDiffusionLM, Unsupported
from models.masked_diffusion_decode import Ending, OneAtATime

_SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class Learn2PD(DiffusionMethod):
    """Parallel decoding by a learned filter, with prediction of the end.

    Attributes:
        filter: `block` reads all confidences of a block together (the paper's), `shared` each by
            itself; both are those trained for the model. `confidence` takes the confidence itself
            for the filter's probability, so that nothing is learned, and `oracle` knows the
            plain decoder's text, which it decodes first: two controls. Else the file of a filter,
            *.safetensors.
        accept_threshold: Probability above which a candidate is written, in [0, 1]; 1 accepts none,
            which leaves one token a step. 0.96 in the authors' GSM8K script.
        end_prediction: Where the answer is cut: at an end of text that the filter accepts
            (`filter`), else also at the surest one ahead (`shrink`, the authors' code), or nowhere.
    """

    filter: str = "block"
    accept_threshold: float = 0.96
    end_prediction: EndPrediction = "shrink"
    neutral = MappingProxyType(
        {"filter": "confidence", "accept_threshold": 1.0, "end_prediction": "none"}
    )
    # No filter is trained for a random model, and it is sure of nothing.
    trial = MappingProxyType({"filter": "confidence", "accept_threshold": 0.3})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.filter.endswith(_SUFFIX):
            known = (*get_args(FilterKind), "confidence", "oracle", "*" + _SUFFIX)
            require_choice("filter", self.filter, known)
        require_number(
            "accept_threshold",
            self.accept_threshold,
            0,
            1,
            "It is the probability above which a candidate is taken for final.",
        )
        require_choice("end_prediction", self.end_prediction, get_args(EndPrediction))
        if self.filter == "oracle" and self.end_prediction != "none":
            raise ValueError(
                "the oracle writes the plain decoder's text, all of it: end_prediction must be "
                f"'none', got {self.end_prediction!r}. early_stop is for both of them."
            )
        if self.confidence != "probability" or self.defer_eos:
            raise ValueError(
                "the filter reads probabilities as the model gives them: confidence must be "
                f"'probability' and defer_eos false, got {self.confidence!r} and {self.defer_eos}."
            )

    @contextmanager
    def apply(self, model: MaskedDiffusionLM, hardware: Profile) -> Iterator[MaskedDiffusionLM]:
        """Yield the model with its texts filled in; without a filter it is refused here."""
        require_masked_diffusion(self, model)
        if self.filter == "oracle":
            yield ForesightModel(
                model, lambda decoding: (OneAtATime(), self.ending(model)), self.procedure()
            )
            return
        self.filter_for(model)
        with super().apply(model, hardware) as changed:
            yield changed

    def rule(self, model: MaskedDiffusionLM, decoding: Decoding) -> FilterRule:
        """Return the rule.

        Raises:
            Unsupported: No filter is trained for the model, or for blocks of this length; or it is
                the oracle, whose rule is a text's own.
        """
        return FilterRule(self.filter_for(model), self.accept_threshold)

    def ending(self, model: MaskedDiffusionLM) -> Ending:
        """Return what cuts the answer."""
        otherwise = super().ending(model)
        if self.end_prediction == "none":
            return otherwise
        return PredictedEnd(
            FilterRule(self.filter_for(model), self.accept_threshold),
            model.facts.eos_ids,
            shrinks=self.end_prediction == "shrink",
            otherwise=otherwise,
        )

    def filter_for(self, model: MaskedDiffusionLM) -> Filter:
        """Return the filter for a model.

        Raises:
            Unsupported: There is none, or it was trained for shorter or longer blocks.
        """
        if self.filter == "oracle":
            raise Unsupported(f"'{method_name(self)}': the oracle is no filter, it knows the text.")
        if self.filter == "confidence":
            return ConfidenceFilter()
        path = (
            Path(self.filter)
            if self.filter.endswith(_SUFFIX)
            else filter_path(model.name, "shared" if self.filter == "shared" else "block")
        )
        if not path.is_file():
            raise Unsupported(
                f"'{method_name(self)}' has no filter that was trained for '{model.name}': there "
                f"is no {path.name}. `python -m methods.diffusion_lm.common_learn2pd_training "
                f"{model.name}` trains one; filter=confidence needs none."
            )
        found = load_filter(path)
        if found.width not in (None, self.block_length):
            raise Unsupported(
                f"'{method_name(self)}': {path.name} was trained for blocks of {found.width} "
                f"tokens, block_length is {self.block_length}."
            )
        return found
