"""The roofline: a forward takes at least as long as its bytes, and as its operations, take.

Pure functions on counts and limits. Operations count two for a multiply-add. Free width and the
figures to check it by: Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hardware.profile import Profile, StepCost


class Limits(NamedTuple):
    """What bounds a forward.

    Attributes:
        bandwidth: Bytes per second from memory.
        flops: Operations per second.
        basis: Where both come from: `measured` on this machine, or `data sheet`.
    """

    bandwidth: float
    flops: float
    basis: str = "data sheet"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a forward of a model has to move and to compute.

    Attributes:
        weight_bytes: Weights read by each forward, whatever its width.
        parameters: Weights that each token is multiplied with.
        kv_token_bytes: Cached keys and values of one token, all layers.
        attention_flops: Operations for one pair of a token and a token it attends to, all layers:
            4 * layers * heads * head_dim.
    """

    weight_bytes: float
    parameters: float
    kv_token_bytes: float = 0.0
    attention_flops: float = 0.0

    def __post_init__(self) -> None:
        for name in ("weight_bytes", "parameters"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        for name in ("kv_token_bytes", "attention_flops"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}.")

    def bytes_read(self, width: int, context: int) -> float:
        """Return the bytes that a forward of `width` tokens over `context` cached ones reads."""
        return self.weight_bytes + self.kv_token_bytes * (context + width)

    def flops(self, width: int, context: int) -> float:
        """Return its operations; a token attends to the cache, to those before it and to itself."""
        pairs = width * context + width * (width + 1) / 2
        return 2.0 * self.parameters * width + self.attention_flops * pairs


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A step-cost curve that nobody measured: the roofline of a profile. Show it as a projection.

    Attributes:
        hardware: Name of the profile.
        dtype: Type of the arithmetic.
        step_cost: lat(N) at the roofline.
        basis: `measured` ceilings or `data sheet`.
    """

    hardware: str
    dtype: str
    step_cost: StepCost
    basis: str


def limits(profile: Profile, dtype: str) -> Limits:
    """Return what bounds a profile: measured ceilings if they know the dtype, else the data sheet.

    The two are never mixed: a measured bandwidth beside a peak on paper has no meaning.

    Raises:
        ValueError: The profile knows no bandwidth, or no peak of this dtype.
    """
    ceilings = profile.ceilings
    if ceilings is not None and dtype in ceilings.matmul_flops:
        return Limits(ceilings.read_bandwidth, ceilings.matmul_flops[dtype], "measured")
    if dtype not in profile.peak_flops:
        known = {*profile.peak_flops, *(ceilings.matmul_flops if ceilings else ())}
        raise ValueError(
            f"profile {profile.name!r} has no peak for {dtype!r}; known: "
            f"{', '.join(sorted(known)) or 'none, measure its ceilings first'}."
        )
    if not profile.bandwidth > 0:
        raise ValueError(
            f"profile {profile.name!r} has no memory bandwidth for {dtype!r}; measure its ceilings "
            "first (hardware.ceilings.measured)."
        )
    return Limits(profile.bandwidth, profile.peak_flops[dtype])


def seconds_bound(bytes_read: float, flops: float, limit: Limits) -> float:
    """Return the seconds that no call with this traffic and these operations can undercut."""
    return max(bytes_read / limit.bandwidth, flops / limit.flops)


def free_width(work: Work, limit: Limits) -> float:
    """Return N*, the number of tokens whose products take as long as reading the weights.

    Up to N* a wider forward costs nothing at the roofline. Cache and attention are left out:
    N* = weight_bytes * flops / (2 * parameters * bandwidth).
    """
    return work.weight_bytes * limit.flops / (2.0 * work.parameters * limit.bandwidth)


def step_seconds(width: int, context: int, work: Work, limit: Limits) -> float:
    """Return the roofline's lat(N): seconds of `width` tokens over `context` cached ones."""
    return seconds_bound(work.bytes_read(width, context), work.flops(width, context), limit)


def project(
    profile: Profile, dtype: str, work: Work, widths: Sequence[int], contexts: Sequence[int]
) -> Projection:
    """Return the step-cost curve of `work` at the roofline of another machine.

    The counts go through the other machine's limits; how far the machine at hand stays above its
    own roofline is not carried over, since kernels differ. Where launches and not bytes take the
    time, as for small models on large GPUs, the projected seconds are too short.

    Args:
        profile: Where to.
        dtype: Type of the arithmetic there; `work.weight_bytes` must be that type's.
        work: The model.
        widths: Tokens fed, ascending.
        contexts: Cached tokens, ascending.

    Raises:
        ValueError: The profile lacks a limit.
    """
    limit = limits(profile, dtype)
    seconds = tuple(
        tuple(step_seconds(width, context, work, limit) for width in widths) for context in contexts
    )
    return Projection(
        hardware=profile.name,
        dtype=dtype,
        step_cost=StepCost(tuple(widths), tuple(contexts), seconds),
        basis=limit.basis,
    )
