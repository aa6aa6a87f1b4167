"""What the operating system tells about the machine: CPU, caches, memory, files of `/sys`."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import psutil

CPU_FOLDER = Path("/sys/devices/system/cpu")


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """The processor, as far as the system shows it.

    Attributes:
        model: Marketing name, or the architecture where there is none.
        architecture: `x86_64`, `aarch64`, …
        flags: Instruction sets, in the kernel's words.
        logical_cores: Hardware threads of the machine.
        physical_cores: Cores; a virtual machine may show threads as cores.
        available_cores: Hardware threads that this process may run on.
        largest_mhz: Highest clock; 0 if the system does not tell.
    """

    model: str
    architecture: str
    flags: frozenset[str]
    logical_cores: int
    physical_cores: int
    available_cores: int
    largest_mhz: float


def read_text(path: Path) -> str:
    """Return the file's text without blanks around it, or "" where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def read_cpu(cpuinfo: str | None = None, cpu_folder: Path = CPU_FOLDER) -> Cpu:
    """Return the processor's facts; `cpuinfo` replaces the text of `/proc/cpuinfo`."""
    text = read_text(Path("/proc/cpuinfo")) if cpuinfo is None else cpuinfo
    blocks = [_fields(block) for block in re.split(r"\n\s*\n", text) if block.strip()]
    first = blocks[0] if blocks else {}
    logical = os.cpu_count() or 1
    cores = {
        (block.get("physical id", "0"), block["core id"]) for block in blocks if "core id" in block
    }
    khz = read_text(cpu_folder / "cpu0" / "cpufreq" / "cpuinfo_max_freq")
    return Cpu(
        model=_model(first) or platform.processor() or platform.machine(),
        architecture=platform.machine(),
        flags=frozenset((first.get("flags") or first.get("Features") or "").split()),
        logical_cores=logical,
        physical_cores=len(cores) or logical,
        available_cores=_available_cores(logical),
        largest_mhz=int(khz) / 1e3 if khz.isdigit() else 0.0,
    )


def memory_bytes() -> int:
    """Return the size of main memory."""
    return int(psutil.virtual_memory().total)


def available_memory_bytes() -> int:
    """Return what could be allocated without swapping."""
    return int(psutil.virtual_memory().available)


def last_level_cache_bytes(cpu_folder: Path = CPU_FOLDER) -> int:
    """Return the bytes of all last-level caches together, 0 if unknown."""
    caches: dict[int, dict[str, int]] = {}
    for index in cpu_folder.glob("cpu[0-9]*/cache/index*"):
        level, size = read_text(index / "level"), read_text(index / "size")
        found = re.fullmatch(r"(\d+)([KMG]?)", size)
        if level.isdigit() and found:
            scale = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[found[2]]
            # Cores that share a cache all list it; the list of sharers names it once.
            shared = read_text(index / "shared_cpu_list") or index.parent.parent.name
            caches.setdefault(int(level), {})[shared] = int(found[1]) * scale
    return sum(caches[max(caches)].values()) if caches else 0


def governor(cpu_folder: Path = CPU_FOLDER) -> str:
    """Return the clock governor of the first core, "" if hidden."""
    return read_text(cpu_folder / "cpu0" / "cpufreq" / "scaling_governor")


def turbo(cpu_folder: Path = CPU_FOLDER) -> bool | None:
    """Return whether clocks may rise above the base, None if hidden."""
    no_turbo = read_text(cpu_folder / "intel_pstate" / "no_turbo")
    if no_turbo:
        return no_turbo == "0"
    boost = read_text(cpu_folder / "cpufreq" / "boost")
    return boost == "1" if boost else None


def load_average() -> float | None:
    """Return the mean number of runnable tasks over the last minute, None if unknown."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None


def virtualization(cpu: Cpu) -> str:
    """Return what stands between us and the machine: "", `vm`, `container` or `vm+container`.

    A hint only: a container that hides itself well is not found.
    """
    hints = []
    if "hypervisor" in cpu.flags:
        hints.append("vm")
    in_container = (
        Path("/.dockerenv").exists()
        or Path("/run/.containerenv").exists()
        or bool(os.environ.get("KUBERNETES_SERVICE_HOST"))
    )
    if in_container:
        hints.append("container")
    return "+".join(hints)


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Return the CPUs' worth of time that the control group allows, None if it sets no limit."""
    quota, _, period = read_text(root / "cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _fields(block: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in block.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _model(fields: dict[str, str]) -> str:
    if "model name" in fields:
        return fields["model name"]
    if "CPU part" in fields:  # Arm kernels give numbers and no name.
        return f"Arm implementer {fields.get('CPU implementer', '?')} part {fields['CPU part']}"
    return ""


def _available_cores(logical: int) -> int:
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return logical
