"""The doctor says what limits measuring here, and what would help."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from hardware import catalog, detect, doctor, host, meters
from hardware.profile import Profile

CPU = host.Cpu(
    model="Some CPU",
    architecture="x86_64",
    flags=frozenset(),
    logical_cores=8,
    physical_cores=4,
    available_cores=4,
    largest_mhz=0.0,
)
PROFILE = Profile(name="cpu", kind="cpu", label="CPU")


def test_every_check_names_itself_and_every_fault_has_advice() -> None:
    found = doctor.checks()
    names = [check.name for check in found]
    assert len(set(names)) == len(names)
    assert {"clock", "cores", "memory", "GPU", "C compiler", "bubblewrap"} <= set(names)
    for check in found:
        assert check.detail, check.name
        assert check.ok or check.advice, check.name


def test_the_doctor_works_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else original(name)
    )
    monkeypatch.setattr(detect, "_torch", lambda: pytest.fail("torch was asked for"))
    torch = next(check for check in doctor.checks() if check.name == "torch")
    assert not torch.ok


@pytest.mark.parametrize(
    ("load", "quota", "ok", "words"),
    [
        (0.3, None, True, "4 of 8 cores, load 0.3"),
        (3.0, None, False, "load 3.0"),
        (0.3, 2.0, False, "limited to 2 CPUs"),
        (0.3, 4.0, True, "limited to 4 CPUs"),
        (None, None, True, "4 of 8"),
    ],
)
def test_busy_and_throttled_cores_are_told(
    load: float | None, quota: float | None, ok: bool, words: str
) -> None:
    check = doctor.check_cores(CPU, load, quota)
    assert check.ok is ok
    assert words in check.detail


@pytest.mark.parametrize(
    ("governor", "turbo", "ok"),
    [("performance", True, True), ("powersave", True, False), ("", None, False), ("", True, True)],
)
def test_a_moving_clock_is_told(governor: str, turbo: bool | None, ok: bool) -> None:
    assert doctor.check_clock_speed(governor, turbo).ok is ok


def test_little_memory_and_little_disk_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor.check_memory(16 * 2**30, 8 * 2**30).ok
    assert not doctor.check_memory(16 * 2**30, 2**30).ok
    monkeypatch.setattr(doctor, "ENOUGH_DISK_BYTES", 0)
    assert doctor.check_disk("disk", tmp_path / "not" / "there" / "yet").ok
    monkeypatch.setattr(doctor, "ENOUGH_DISK_BYTES", 2**62)
    assert not doctor.check_disk("disk", tmp_path).ok


def test_a_gpu_without_a_profile_is_told() -> None:
    gpu = detect.Gpu("NVIDIA Z1", 2**34, "20.0", 1)
    assert not doctor.check_gpu(gpu, catalog.profile("cuda")).ok
    assert doctor.check_gpu(gpu, catalog.profile("l4")).ok
    assert doctor.check_gpu(None, PROFILE).ok


def test_each_absent_meter_is_named_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meters.Rapl.__init__, "__defaults__", (tmp_path,))
    monkeypatch.setattr(meters.LinuxHost.__init__, "__defaults__", (tmp_path,))
    found = {check.name: check for check in doctor.check_meters(PROFILE)}
    assert not found["meter energy_j"].ok
    assert "no RAPL counters" in found["meter energy_j"].detail
    assert not found["meter peak_bytes"].ok
    assert found["meter device_seconds"].ok


def test_the_first_program_on_the_path_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = doctor.check_program("C compiler", ("cc", "gcc"), "install one")
    assert not missing.ok
    assert missing.advice == "install one"
    program = tmp_path / "gcc"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert doctor.check_program("C compiler", ("cc", "gcc"), "") == doctor.Check(
        "C compiler", True, str(program)
    )
