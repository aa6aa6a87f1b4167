"""What a method must leave as it found it, looked at after every sample, outside the clock.

Each guard raises `Damage`, which ends the cell that was being measured; the worker is then started
again, so that the others meet a clean process.
"""

from __future__ import annotations

import gc
import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from results.records import Status

# Numbers of each tensor that are looked at after every sample; all of them at the end.
_PROBES = 64
# Growth over all samples of a cell that is called a leak: this share of what the worker may use,
# and never less than the bytes, since allocators keep pools.
_LEAK_SHARE = 1 / 8
_SMALLEST_LEAK_BYTES = 512 * 2**20
# The first samples fill caches and pools that stay.
_SAMPLES_TO_SETTLE = 2
# Share of the measured time that a method may spend in `apply`, outside the clock, and the time
# that is always fine: installing hooks.
_APPLY_SHARE, _APPLY_SECONDS = 0.25, 0.02
# Processes that Python and torch keep for themselves.
_HELPERS = ("multiprocessing.resource_tracker", "torch/_inductor", "torch._inductor")


class Damage(Exception):
    """A method left something behind or changed what is not its own.

    Attributes:
        status: How its cell ends.
    """

    def __init__(self, message: str, status: Status = "failed") -> None:
        super().__init__(message)
        self.status: Status = status


class WeightGuard:
    """Knows the weights of a model and tells when they have changed.

    After every sample some numbers of each tensor and its place in memory are compared, which takes
    milliseconds; `check_all` reads everything and finds what slipped through.
    """

    def __init__(self, model: Any) -> None:
        """Look at the weights.

        Args:
            model: Any capability; one without a `module` of torch has nothing to guard, one of
                several networks has them all in `networks`.
        """
        self._module = getattr(model, "networks", getattr(model, "module", None))
        if not hasattr(self._module, "state_dict"):
            self._module = None
        self._probes: dict[str, Any] = {}
        self._views: dict[Any, list[Any]] = defaultdict(list)
        tensors = self._tensors()
        for name, tensor in tensors.items():
            count = tensor.numel()
            step = max(1, count // _PROBES)
            self._probes[name] = slice(step // 2 if count else 0, None, step)
            if tensor.is_contiguous():
                self._views[tensor.dtype].append(tensor.view(-1)[self._probes[name]])
        self._numbers = self._probed()
        self._places = _places(tensors)
        self._seen = self._look(tensors)
        self._sums = {name: _checksum(tensor) for name, tensor in tensors.items()}

    def check(self) -> None:
        """Compare a sample of every tensor.

        Raises:
            Damage: One of them has changed.
        """
        import torch

        tensors = self._tensors()
        # Where every tensor lies where it lay, the views say in a fifth of the time whether any
        # number differs; what they cannot say (a NaN equals nothing) is looked at name by name.
        if _places(tensors) == self._places and all(
            torch.equal(numbers, self._numbers[dtype]) for dtype, numbers in self._probed().items()
        ):
            return
        self._compare(self._seen, self._look(tensors))

    def check_all(self) -> None:
        """Compare every byte.

        Raises:
            Damage: Something has changed.
        """
        self._compare(
            self._sums, {name: _checksum(tensor) for name, tensor in self._tensors().items()}
        )

    def _tensors(self) -> dict[str, Any]:
        return {} if self._module is None else self._module.state_dict()

    def _probed(self) -> dict[Any, Any]:
        """Return the probed numbers of all contiguous tensors, one tensor a dtype."""
        import torch

        return {dtype: torch.cat(views) for dtype, views in self._views.items()}

    def _look(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Return shape, dtype and probed numbers of each tensor, all read in one transfer."""
        import torch

        probed = [
            tensor.detach().reshape(-1)[self._probes.get(name, slice(0, 1))].double()
            for name, tensor in tensors.items()
        ]
        lengths = [len(values) for values in probed]
        numbers = torch.cat(probed).nan_to_num().tolist() if probed else []
        seen, start = {}, 0
        for (name, tensor), length in zip(tensors.items(), lengths, strict=True):
            seen[name] = (tuple(tensor.shape), tensor.dtype, numbers[start : start + length])
            start += length
        return seen

    def _compare(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        changed = [name for name in before if before[name] != after.get(name)]
        changed += [name for name in after if name not in before]
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise Damage(f"left the model's weights changed: {changed[0]}{more}")


def _places(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return where each contiguous tensor lies, its shape and dtype; another is never the same."""
    return {
        name: (tensor.data_ptr(), tensor.shape, tensor.dtype)
        if tensor.is_contiguous()
        else object()
        for name, tensor in tensors.items()
    }


def _checksum(tensor: Any) -> int:
    """Return the sum of the tensor's words as integers: any one changed word changes it."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(flat.view(words[flat.element_size()]).sum(dtype=torch.int64))


class ProcessGuard:
    """Tells when a method has left processes running."""

    def __init__(self) -> None:
        self._known = _children()

    def check(self) -> None:
        """Look for new children of this process.

        Raises:
            Damage: There are some, which are ended here.
        """
        new = _children() - self._known
        left = []
        for pid in sorted(new):
            try:
                process = psutil.Process(pid)
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if any(helper in " ".join(process.cmdline()) for helper in _HELPERS):
                    self._known.add(pid)
                    continue
                left.append(f"{pid} ({process.name()})")
                process.kill()
            except psutil.Error:
                continue  # it has just ended
        if left:
            raise Damage(f"left {len(left)} processes running: {', '.join(left[:3])}")


def _children() -> set[int]:
    """Return the children of this process; those of ended children become its own (subreaper)."""
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        try:
            found.update(map(int, path.read_text().split()))
        except OSError:
            continue  # the thread has just ended
    return found


@dataclass
class Ledger:
    """What a cell's samples took beside the clock.

    Attributes:
        growth: Bytes that the process held more after each sample than before.
        apply_seconds: Time in `apply`, entering and leaving, of each sample.
        measured_seconds: Time on the clock, of each sample.
    """

    growth: list[int] = field(default_factory=list)
    apply_seconds: list[float] = field(default_factory=list)
    measured_seconds: list[float] = field(default_factory=list)

    def check_memory(self, before: int, limit_bytes: int) -> None:
        """Note what the process holds after a sample.

        Args:
            before: Bytes that it held before the sample.
            limit_bytes: What it may use; 0 if there is no limit.

        Raises:
            Damage: The cell's samples have left too much behind.
        """
        grown = held_bytes() - before
        if grown > _SMALLEST_LEAK_BYTES / 8:
            gc.collect()  # cycles are garbage, no leak
            grown = held_bytes() - before
        self.growth.append(grown)
        leaked = sum(self.growth[_SAMPLES_TO_SETTLE:])
        allowed = max(_SMALLEST_LEAK_BYTES, int(limit_bytes * _LEAK_SHARE))
        if leaked > allowed:
            count = len(self.growth) - _SAMPLES_TO_SETTLE
            raise Damage(
                f"leaks memory: {leaked / 1e9:.1f} GB stayed behind after {count} samples",
                "oom-host",
            )

    def hidden_time(self) -> str:
        """Return what is wrong with the time in `apply`, "" if nothing is."""
        if not self.measured_seconds:
            return ""
        outside = statistics.median(self.apply_seconds)
        inside = statistics.median(self.measured_seconds)
        if outside <= max(_APPLY_SECONDS, _APPLY_SHARE * inside):
            return ""
        return (
            f"spends {outside:.3f} s of each sample in apply, outside the clock, beside "
            f"{inside:.3f} s measured: what a sample costs belongs into the call"
        )


def held_bytes() -> int:
    """Return the host memory that this process holds."""
    return int(psutil.Process().memory_info().rss)
