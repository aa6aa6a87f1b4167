"""Diagnosis: what of this machine can be measured, what cannot, and what would help."""

from __future__ import annotations

import importlib.util
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from hardware import catalog, ceilings, detect, host, meters
from hardware.profile import Profile

ENOUGH_MEMORY_BYTES = 4 * 2**30
ENOUGH_DISK_BYTES = 5 * 2**30
STEADY_CLOCKS = ("tsc", "kvm-clock", "hyperv_clocksource_tsc_page", "arch_sys_counter", "xen")


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Attributes:
        name: What.
        ok: False where something limits what can be measured or trusted.
        detail: What was found.
        advice: What to do about it; "" if nothing is to be done.
    """

    name: str
    ok: bool
    detail: str
    advice: str = ""


def checks() -> list[Check]:
    """Return all checks of this machine; works without torch."""
    cpu = host.read_cpu()
    found = [
        check_clock(),
        check_cores(cpu, host.load_average(), host.cpu_quota()),
        check_clock_speed(host.governor(), host.turbo()),
        check_memory(host.memory_bytes(), host.available_memory_bytes()),
        check_disk("cache disk", ceilings.cache_dir()),
        check_disk("checkout disk", Path(__file__).resolve().parents[1]),
    ]
    if importlib.util.find_spec("torch") is None:
        found.append(Check("torch", False, "not installed", "pip install -e ."))
        profile = detect.cpu_profile(cpu, catalog.entries())
    else:
        profile = detect.detect()
        found.append(check_gpu(detect.find_gpu(), profile))
    found += check_meters(profile)
    found += [
        check_program(
            "C compiler",
            ("cc", "gcc", "clang"),
            "install gcc or clang: compiled kernels of baseline and methods need it",
        ),
        check_program(
            "bubblewrap",
            ("bwrap",),
            "install the package bubblewrap: generated programs then run in the stronger sandbox",
        ),
    ]
    return found


def check_clock() -> Check:
    """Look at the clock that times the calls."""
    info = time.get_clock_info("perf_counter")
    folder = Path("/sys/devices/system/clocksource/clocksource0")
    source = host.read_text(folder / "current_clocksource")
    detail = f"perf_counter, resolution {info.resolution * 1e9:.0f} ns"
    if source:
        detail += f", kernel clock {source}"
    if not info.monotonic or info.resolution > 1e-6:
        return Check("clock", False, detail, "the clock is too coarse: short calls cannot be timed")
    if source and source not in STEADY_CLOCKS:
        return Check(
            "clock", False, detail, "this clock is slow to read; boot with clocksource=tsc"
        )
    return Check("clock", True, detail)


def check_cores(cpu: host.Cpu, load: float | None, quota: float | None) -> Check:
    """Look at the cores, and at who else uses them."""
    detail = f"{cpu.model}, {cpu.available_cores} of {cpu.logical_cores} cores"
    if quota is not None:
        detail += f", limited to {quota:g} CPUs' time"
    if load is None:
        return Check("cores", True, detail)
    detail += f", load {load:.1f}"
    if quota is not None and quota < cpu.available_cores:
        return Check(
            "cores", False, detail, "the container's limit stops threads in mid-call: lift it"
        )
    if load > 0.5 * cpu.available_cores:
        return Check(
            "cores", False, detail, "others use the machine: intervals widen, ceilings come out low"
        )
    return Check("cores", True, detail)


def check_clock_speed(governor: str, turbo: bool | None) -> Check:
    """Look at what moves the CPU's clock."""
    if not governor and turbo is None:
        return Check(
            "clock speed",
            False,
            "governor and turbo are hidden, as in most virtual machines",
            "the clock may move between runs: trust ratios of interleaved methods, not seconds",
        )
    words = {None: "turbo hidden", True: "turbo on", False: "turbo off"}
    detail = f"governor {governor or 'hidden'}, {words[turbo]}"
    if governor not in ("", "performance"):
        return Check("clock speed", False, detail, "cpupower frequency-set -g performance")
    return Check("clock speed", True, detail)


def check_memory(total: int, available: int) -> Check:
    """Look at main memory."""
    detail = f"{available / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    if available < ENOUGH_MEMORY_BYTES:
        return Check("memory", False, detail, f"runs want {ENOUGH_MEMORY_BYTES >> 30} GiB free")
    return Check("memory", True, detail)


def check_disk(name: str, folder: Path) -> Check:
    """Look at the space where `folder` is or will be."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    detail = f"{free / 2**30:.1f} GiB free"
    if free < ENOUGH_DISK_BYTES:
        return Check(name, False, detail, f"weights and results want {ENOUGH_DISK_BYTES >> 30} GiB")
    return Check(name, True, detail)


def check_gpu(gpu: detect.Gpu | None, profile: Profile) -> Check:
    """Look at the GPU that torch sees, and at whether a profile knows it."""
    if gpu is None:
        # Not a fault: the embedded suite is made for this.
        return Check("GPU", True, f"none that torch can use; runs use the CPU as {profile.name}")
    memory = f"{gpu.memory_bytes / 2**30:.0f} GiB"
    detail = f"{gpu.name}, {memory}, {gpu.visible} visible, as {profile.name}"
    if profile.name == "cuda":
        return Check(
            "GPU", False, detail, "no profile knows it: add one to hardware/profiles for its peaks"
        )
    return Check("GPU", True, detail)


def check_meters(profile: Profile) -> list[Check]:
    """Say of each value of a reading whether it can be had, and why not."""
    meter = meters.Meter(profile)
    found = []
    for name in ("device_seconds", "peak_bytes", "energy_j"):
        reason = meter.absent.get(name)
        if reason is None:
            found.append(Check(f"meter {name}", True, "works"))
        elif name == "device_seconds":
            found.append(Check(f"meter {name}", True, f"absent: {reason}"))
        else:
            found.append(
                Check(f"meter {name}", False, f"absent: {reason}", f"{name} stays empty in results")
            )
    return found


def check_program(name: str, candidates: tuple[str, ...], advice: str) -> Check:
    """Look for the first of `candidates` on the path."""
    for candidate in candidates:
        path = shutil.which(candidate)
        if path:
            return Check(name, True, path)
    return Check(name, False, f"none of {', '.join(candidates)} is on the path", advice)
