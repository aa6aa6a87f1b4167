"""Which machine is this: its profile, and the facts that belong beside every measurement."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hardware import catalog, host
from hardware.profile import Profile

if TYPE_CHECKING:
    from types import ModuleType

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
    "duckdb",
    "pyarrow",
    "nvidia-ml-py",
)
FLAGS_OF_INTEREST = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
    "sve2",
)


class Gpu(NamedTuple):
    """A CUDA device as torch shows it; `visible` counts the devices that torch sees."""

    name: str
    memory_bytes: int
    compute_capability: str
    visible: int


def detect() -> Profile:
    """Return the profile of the device that a run would use: the current GPU, else the CPU.

    A GPU that no profile knows gets `cuda` with its own name and memory; what it can do is then
    measured.
    """
    known = catalog.entries()
    gpu = find_gpu()
    if gpu is None:
        return cpu_profile(host.read_cpu(), known)
    entry = catalog.recognise_gpu(gpu.name, gpu.memory_bytes, known)
    if entry is None:
        return replace(catalog.profile("cuda"), label=gpu.name, memory_bytes=gpu.memory_bytes)
    return entry.profile


def select(name: str) -> Profile:
    """Return the profile for `--hardware`: `auto` detects, a name is taken at its word.

    Raises:
        hardware.catalog.UnknownProfileError: No profile has this name.
        ValueError: The profile is a GPU's and torch sees none here.
    """
    if name == "auto":
        return detect()
    chosen = catalog.profile(name)
    if chosen.kind == "cuda" and find_gpu() is None:
        here = cpu_profile(host.read_cpu(), catalog.entries())
        raise ValueError(
            f"hardware {name!r} is a GPU, and torch sees none on this machine. "
            f"Use 'auto' or {here.name!r}."
        )
    return chosen


def cpu_profile(cpu: host.Cpu, known: list[catalog.Entry]) -> Profile:
    """Return the profile of a CPU: its class, with the peaks of this model where they are known.

    Peaks are operations per core and cycle times cores times the largest clock: never reached,
    since wide units lower the clock. Without a known clock there is no peak, only the measured
    ceiling.
    """
    entry = catalog.recognise_cpu(cpu.architecture, cpu.flags, known)
    if entry is None:
        raise LookupError("the catalogue has lost its fallback, profiles/cpu.toml.")
    cycles = cpu.physical_cores * cpu.largest_mhz * 1e6
    return replace(
        entry.profile,
        label=f"{cpu.model}, {cpu.logical_cores} cores",
        peak_flops={
            dtype: operations * cycles
            for dtype, operations in entry.operations_per_core_cycle.items()
            if cycles
        },
    )


def find_gpu() -> Gpu | None:
    """Return the current CUDA device, or None without torch or without a device."""
    torch = _torch()
    if torch is None or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Gpu(
        name=properties.name,
        memory_bytes=properties.total_memory,
        compute_capability=f"{properties.major}.{properties.minor}",
        visible=torch.cuda.device_count(),
    )


def machine_id() -> str:
    """Return a name for this machine: 12 hexadecimal digits from CPU model, cores, memory and GPU.

    Machines of the same build share it. No host name, user or serial number goes in.
    """
    cpu, gpu = host.read_cpu(), find_gpu()
    # Kernels reserve a varying part of memory: whole GiB are stable.
    parts = (
        cpu.model,
        cpu.logical_cores,
        round(host.memory_bytes() / 2**30),
        gpu.name if gpu else None,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def environment() -> dict[str, Any]:
    """Return the facts of machine and software: flat, JSON-able, None where unknown.

    Nothing in it names a person or a host.
    """
    cpu, gpu, torch = host.read_cpu(), find_gpu(), _torch()
    commit, dirty = git_state(Path(__file__).resolve().parents[1])
    facts: dict[str, Any] = {
        "machine_id": machine_id(),
        "cpu_model": cpu.model,
        "cpu_architecture": cpu.architecture,
        "cpu_flags": " ".join(flag for flag in FLAGS_OF_INTEREST if flag in cpu.flags),
        "cpu_logical_cores": cpu.logical_cores,
        "cpu_physical_cores": cpu.physical_cores,
        "cpu_available_cores": cpu.available_cores,
        "cpu_quota": host.cpu_quota(),
        "cpu_largest_mhz": cpu.largest_mhz or None,
        "cpu_governor": host.governor() or None,
        "cpu_turbo": host.turbo(),
        "last_level_cache_bytes": host.last_level_cache_bytes() or None,
        "memory_bytes": host.memory_bytes(),
        "memory_available_bytes": host.available_memory_bytes(),
        "huge_pages": _bracketed(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        "load_average": host.load_average(),
        "virtualization": host.virtualization(cpu),
        "os": _os_name(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "threads": torch.get_num_threads() if torch else None,
        "gpu_name": gpu.name if gpu else None,
        "gpu_count": gpu.visible if gpu else 0,
        "gpu_memory_bytes": gpu.memory_bytes if gpu else None,
        "gpu_compute_capability": gpu.compute_capability if gpu else None,
        "gpu_driver": gpu_driver() if gpu else None,
        "cuda_version": torch.version.cuda if torch and gpu else None,
        "git_commit": commit,
        "git_dirty": dirty,
    }
    for package in PACKAGES:
        facts[f"{package.replace('-', '_')}_version"] = _version(package)
    return facts


def gpu_driver(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Return the version of the NVIDIA kernel driver, or None."""
    found = re.search(r"^NVRM version:.*?\s(\d+(?:\.\d+)+)", host.read_text(path), re.MULTILINE)
    return found[1] if found else None


class GitState(NamedTuple):
    """Commit of a checkout ("" if unknown), and whether tracked files differ from it."""

    commit: str
    dirty: bool | None


def git_state(checkout: Path) -> GitState:
    """Return the commit of `checkout`; without git or a repository, `GitState("", None)`."""
    commit = _git(checkout, "rev-parse", "--verify", "HEAD")
    if not commit:
        return GitState("", None)
    changes = _git(checkout, "status", "--porcelain", "--untracked-files=no")
    return GitState(commit, None if changes is None else bool(changes))


def _git(checkout: Path, *arguments: str) -> str | None:
    # Reading must not take the index lock: the user may be committing meanwhile.
    variables = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
            env=variables,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _torch() -> ModuleType | None:
    try:
        import torch
    except ImportError:
        return None
    return torch


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _bracketed(path: Path) -> str | None:
    """Return the choice that the kernel marks: `always [madvise] never`."""
    found = re.search(r"\[(\w+)\]", host.read_text(path))
    return found[1] if found else None


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()
