"""Meters around one call: wall time, device time, CPU time, peak memory, energy.

A value that cannot be had on this machine is None, and `Meter.absent` says why. What is slow (the
memory and energy counters, some 20 microseconds each) is read outside the clock.
"""

from __future__ import annotations

import importlib
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hardware.profile import Profile

T = TypeVar("T")

POWERCAP = Path("/sys/class/powercap")
PROCESS = Path("/proc/self")


class MeterAbsentError(Exception):
    """A meter cannot work on this machine; the message says why."""


@dataclass(frozen=True)
class Reading:
    """What one call took.

    Attributes:
        seconds: Wall time, the device synchronised on both edges.
        device_seconds: Time between CUDA events on the current stream; None on a CPU.
        cpu_seconds: CPU time of all threads of this process, and of the children that ended and
            were waited for during the call: work cannot be hidden by starting a process.
        peak_bytes: CUDA: high-water mark of the memory allocated by torch, weights included. CPU:
            growth of the resident set over its size at the start. Memory that the allocator kept
            from earlier calls is resident already and shows no growth, so 0 means "no more than
            before". Children are not counted.
        energy_j: CUDA: the whole board's. CPU: the packages' and their memory's, whoever caused it.
            NVML's counter moves every 20 to 100 ms, RAPL's every ms: shorter calls read 0 or a
            whole step.
    """

    seconds: float
    device_seconds: float | None
    cpu_seconds: float
    peak_bytes: int | None
    energy_j: float | None


class EnergyCounter(Protocol):
    """Counts energy since some moment in the past."""

    def read(self) -> list[int]:
        """Return the counters now.

        Raises:
            MeterAbsentError: They can be read no longer.
        """
        ...

    def joules(self, before: list[int], after: list[int]) -> float:
        """Return the energy between two readings."""
        ...


class Rapl:
    """Energy of the CPU packages and their memory, from the kernel's power capping interface.

    The counters wrap around, after half an hour or more at full power; one wrap between two
    readings is put right.

    Raises:
        MeterAbsentError: No counters, or only root may read them.
    """

    def __init__(self, folder: Path = POWERCAP) -> None:
        domains = [
            path
            for path in sorted(folder.glob("intel-rapl:*"))
            if _domain_name(path).startswith(("package", "dram"))
            # A package holds its cores; memory stands beside it. `psys` would count all twice.
        ]
        if not domains:
            raise MeterAbsentError(
                f"no RAPL counters in {folder}; virtual machines seldom have them"
            )
        self._files = [path / "energy_uj" for path in domains]
        try:
            self._ranges = [int((path / "max_energy_range_uj").read_text()) for path in domains]
        except (OSError, ValueError) as error:
            raise MeterAbsentError(f"RAPL counters without a range: {error}") from None
        self.read()

    def read(self) -> list[int]:
        """Return microjoules by domain."""
        try:
            return [int(file.read_text()) for file in self._files]
        except PermissionError:
            raise MeterAbsentError(
                "RAPL counters are for root only; `chmod o+r` on the energy_uj files opens them"
            ) from None
        except (OSError, ValueError) as error:
            raise MeterAbsentError(f"RAPL counters cannot be read: {error}") from None

    def joules(self, before: list[int], after: list[int]) -> float:
        """Return the energy between two readings, over at most one wrap of each counter."""
        used = 0
        for start, end, largest in zip(before, after, self._ranges, strict=True):
            # The counter runs from 0 to `largest`, both included.
            used += end - start if end >= start else end - start + largest + 1
        return used / 1e6


class Nvml:
    """Energy of a GPU board, from NVIDIA's management library (package `nvidia-ml-py`).

    Args:
        uuid: The device's UUID, so that CUDA_VISIBLE_DEVICES cannot point at the wrong board.
        library: The module `pynvml`; imported when None.

    Raises:
        MeterAbsentError: No library, no driver, no such device, or no counter (GPUs before Volta).
    """

    def __init__(self, uuid: str, library: Any = None) -> None:
        if library is None:
            try:
                library = importlib.import_module("pynvml")
            except ImportError:
                raise MeterAbsentError(
                    "the package nvidia-ml-py is not installed: pip install nvidia-ml-py"
                ) from None
        self._library = library
        try:
            library.nvmlInit()
            self._handle = library.nvmlDeviceGetHandleByUUID(uuid)
        except library.NVMLError as error:
            raise MeterAbsentError(f"NVML does not open the GPU: {error}") from None
        self.read()

    def read(self) -> list[int]:
        """Return millijoules since the driver was loaded."""
        try:
            return [int(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle))]
        except self._library.NVMLError as error:
            raise MeterAbsentError(f"the GPU has no energy counter: {error}") from None

    def joules(self, before: list[int], after: list[int]) -> float:
        """Return the energy between two readings."""
        return (after[0] - before[0]) / 1e3


class Device(Protocol):
    """What a meter asks of the device that computes."""

    def reset_peak(self) -> None:
        """Start watching the memory anew."""
        ...

    def begin(self) -> None:
        """Mark the call's beginning in the device's queue."""
        ...

    def end(self) -> None:
        """Mark its end."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        ...

    def device_seconds(self) -> float | None:
        """Return the time between the marks, after `synchronize`."""
        ...

    def peak_bytes(self) -> int | None:
        """Return the high-water mark since `reset_peak`."""
        ...


class Host:
    """The CPU: nothing to wait for, and no way to watch the memory."""

    def reset_peak(self) -> None:
        """Do nothing: there is no mark to set back."""

    def begin(self) -> None:
        """Do nothing: a CPU has no queue."""

    def end(self) -> None:
        """Do nothing: a CPU has no queue."""

    def synchronize(self) -> None:
        """Do nothing: what returned is done."""

    def device_seconds(self) -> float | None:
        """Return None: a CPU has no clock of its own."""
        return None

    def peak_bytes(self) -> int | None:
        """Return None: unknown."""
        return None


class LinuxHost(Host):
    """The CPU, with the kernel's high-water mark of the resident set.

    Linux keeps the mark as VmHWM, and sets it back to the resident set when 5 is written to
    `clear_refs`; neither walks the page tables, so both are cheap at any size.

    Raises:
        MeterAbsentError: The kernel offers no such mark.
    """

    def __init__(self, folder: Path = PROCESS) -> None:
        self._clear_refs = str(folder / "clear_refs")
        self._status = str(folder / "status")
        self._start = 0
        self.reset_peak()

    def reset_peak(self) -> None:
        """Set the mark back to the resident set of now."""
        # Opened each time: a forked child that inherited the files would watch its parent.
        try:
            file = os.open(self._clear_refs, os.O_WRONLY)
            try:
                os.write(file, b"5")
            finally:
                os.close(file)
        except OSError as error:
            raise MeterAbsentError(
                f"the memory's high-water mark cannot be reset: {error}"
            ) from None
        self._start = self._high_water()

    def peak_bytes(self) -> int | None:
        """Return by how many bytes the resident set grew over its size at `reset_peak`."""
        return max(0, self._high_water() - self._start)

    def _high_water(self) -> int:
        try:
            file = os.open(self._status, os.O_RDONLY)
            try:
                status = os.read(file, 16384)
            finally:
                os.close(file)
        except OSError as error:
            raise MeterAbsentError(f"the high-water mark cannot be read: {error}") from None
        _, found, rest = status.partition(b"VmHWM:")
        if not found:
            raise MeterAbsentError(
                "the kernel reports no VmHWM, the resident set's high-water mark"
            )
        return int(rest.split(maxsplit=1)[0]) * 1024


class CudaDevice:
    """The current CUDA device.

    Events are recorded on the stream that is current at the call's edges: work that a method puts
    on other streams counts in the wall time, and in the device time only if that stream waits for
    it.

    Args:
        cuda: The module `torch.cuda`; imported when None.
    """

    def __init__(self, cuda: Any = None) -> None:
        self._cuda = importlib.import_module("torch").cuda if cuda is None else cuda
        self._first = self._cuda.Event(enable_timing=True)
        self._last = self._cuda.Event(enable_timing=True)

    def reset_peak(self) -> None:
        """Set the allocator's mark back to what is allocated now."""
        self._cuda.reset_peak_memory_stats()

    def begin(self) -> None:
        """Record the first event."""
        self._first.record()

    def end(self) -> None:
        """Record the last event."""
        self._last.record()

    def synchronize(self) -> None:
        """Wait for all streams of the device."""
        self._cuda.synchronize()

    def device_seconds(self) -> float | None:
        """Return the time between the events."""
        return float(self._first.elapsed_time(self._last)) / 1e3

    def peak_bytes(self) -> int | None:
        """Return the most that torch had allocated."""
        return int(self._cuda.max_memory_allocated())

    def uuid(self) -> str:
        """Return the device's UUID as NVML writes it."""
        uuid = str(self._cuda.get_device_properties(self._cuda.current_device()).uuid)
        return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


class Meter:
    """Measures calls on the device of a profile.

    Args:
        profile: Whose kind, `cpu` or `cuda`, decides what is metered.
        device: Replaces the device that the kind stands for.
        energy: Replaces the counter that the kind stands for.

    Attributes:
        absent: Reason for each value of a reading that stays None, by its name.
    """

    def __init__(
        self,
        profile: Profile,
        *,
        device: Device | None = None,
        energy: EnergyCounter | None = None,
    ) -> None:
        self.absent: dict[str, str] = {}
        if profile.kind == "cpu":
            self.absent["device_seconds"] = "a CPU has no clock of its own, see cpu_seconds"
        self._device = device or self._find_device(profile)
        self._energy = energy or self._find_energy()

    def measure(self, call: Callable[[], T]) -> tuple[T, Reading]:
        """Return what `call` returns, and what it took. Its exceptions pass through."""
        device = self._device
        device.synchronize()
        device.reset_peak()
        energy_before = self._read_energy()
        cpu_before = _cpu_nanoseconds()
        device.synchronize()
        started = time.perf_counter_ns()
        # The event lies inside the wall clock, so device time cannot exceed wall time.
        device.begin()
        result = call()
        device.end()
        device.synchronize()
        ended = time.perf_counter_ns()
        cpu_after = _cpu_nanoseconds()
        energy_after = self._read_energy()
        energy_j = None
        if self._energy is not None and energy_before is not None and energy_after is not None:
            energy_j = self._energy.joules(energy_before, energy_after)
        return result, Reading(
            seconds=(ended - started) / 1e9,
            device_seconds=device.device_seconds(),
            cpu_seconds=(cpu_after - cpu_before) / 1e9,
            peak_bytes=device.peak_bytes(),
            energy_j=energy_j,
        )

    def _find_device(self, profile: Profile) -> Device:
        if profile.kind == "cuda":
            return CudaDevice()
        try:
            return LinuxHost()
        except MeterAbsentError as reason:
            self.absent["peak_bytes"] = str(reason)
            return Host()

    def _find_energy(self) -> EnergyCounter | None:
        try:
            if isinstance(self._device, CudaDevice):
                return Nvml(self._device.uuid())
            return Rapl()
        except MeterAbsentError as reason:
            self.absent["energy_j"] = str(reason)
            return None

    def _read_energy(self) -> list[int] | None:
        if self._energy is None:
            return None
        try:
            return self._energy.read()
        except MeterAbsentError as reason:
            # A driver may go away under a long run; the time of the call is still good.
            self.absent["energy_j"] = str(reason)
            return None


def _domain_name(path: Path) -> str:
    try:
        return (path / "name").read_text().strip()
    except OSError:
        return ""


def _cpu_nanoseconds() -> int:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time_ns() + round((children.ru_utime + children.ru_stime) * 1e9)
