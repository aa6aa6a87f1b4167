"""What is read from /proc and /sys, on folders made for the purpose."""

from __future__ import annotations

from pathlib import Path

import pytest

from hardware import host

TWO_SOCKETS = """processor\t: 0
model name\t: Some CPU
physical id\t: 0
core id\t\t: 0
flags\t\t: fpu avx2 fma hypervisor

processor\t: 1
model name\t: Some CPU
physical id\t: 0
core id\t\t: 0

processor\t: 2
model name\t: Some CPU
physical id\t: 1
core id\t\t: 0
"""
ARM = """processor\t: 0
Features\t: fp asimd i8mm
CPU implementer\t: 0x41
CPU part\t: 0xd4f
"""


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def test_threads_of_one_core_count_as_one_core(tmp_path: Path) -> None:
    cpu = host.read_cpu(TWO_SOCKETS, tmp_path)
    assert cpu.model == "Some CPU"
    assert cpu.physical_cores == 2
    assert {"avx2", "fma"} <= cpu.flags
    assert cpu.largest_mhz == 0


def test_arm_has_features_and_numbers_for_a_name(tmp_path: Path) -> None:
    cpu = host.read_cpu(ARM, tmp_path)
    assert cpu.model == "Arm implementer 0x41 part 0xd4f"
    assert "asimd" in cpu.flags
    assert cpu.physical_cores == cpu.logical_cores


def test_a_system_without_cpuinfo_still_has_a_cpu(tmp_path: Path) -> None:
    cpu = host.read_cpu("", tmp_path)
    assert cpu.model
    assert cpu.flags == frozenset()
    assert 1 <= cpu.available_cores <= cpu.logical_cores


def test_the_largest_clock_is_read_in_megahertz(tmp_path: Path) -> None:
    write(tmp_path / "cpu0/cpufreq/cpuinfo_max_freq", "3500000")
    assert host.read_cpu("", tmp_path).largest_mhz == 3500


def test_a_shared_cache_is_counted_once_and_only_the_last_level(tmp_path: Path) -> None:
    for core in range(4):
        index = tmp_path / f"cpu{core}/cache"
        write(index / "index0/level", "1")
        write(index / "index0/size", "32K")
        write(index / "index0/shared_cpu_list", str(core))
        write(index / "index3/level", "3")
        write(index / "index3/size", "16M")
        write(index / "index3/shared_cpu_list", "0-1" if core < 2 else "2-3")
    assert host.last_level_cache_bytes(tmp_path) == 2 * 16 * 2**20


def test_unknown_caches_are_zero(tmp_path: Path) -> None:
    assert host.last_level_cache_bytes(tmp_path) == 0


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("intel_pstate/no_turbo", "1", False),
        ("intel_pstate/no_turbo", "0", True),
        ("cpufreq/boost", "1", True),
        ("cpufreq/boost", "0", False),
        ("nothing", "", None),
    ],
)
def test_turbo_is_read_from_either_driver(
    tmp_path: Path, file: str, text: str, expected: bool | None
) -> None:
    write(tmp_path / file, text)
    assert host.turbo(tmp_path) is expected


def test_a_quota_is_told_in_cpus(tmp_path: Path) -> None:
    assert host.cpu_quota(tmp_path) is None
    write(tmp_path / "cpu.max", "150000 100000")
    assert host.cpu_quota(tmp_path) == 1.5
    write(tmp_path / "cpu.max", "max 100000")
    assert host.cpu_quota(tmp_path) is None


def test_an_unreadable_file_is_empty_text(tmp_path: Path) -> None:
    assert host.read_text(tmp_path) == ""
    assert host.read_text(tmp_path / "missing") == ""
