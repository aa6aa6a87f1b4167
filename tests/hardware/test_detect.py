"""Detection of the machine, with fake GPUs and CPUs, and the facts kept beside measurements."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from hardware import catalog, detect, host

CPU = host.Cpu(
    model="Some CPU",
    architecture="x86_64",
    flags=frozenset({"avx2", "fma"}),
    logical_cores=8,
    physical_cores=4,
    available_cores=8,
    largest_mhz=0.0,
)
A100 = detect.Gpu("NVIDIA A100-SXM4-80GB", 85 * 10**9, "8.0", 1)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "find_gpu", lambda: A100)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "find_gpu", lambda: None)


@pytest.mark.usefixtures("gpu")
def test_a_known_gpu_gets_its_profile() -> None:
    assert detect.detect() == catalog.profile("a100-80gb")


def test_an_unknown_gpu_keeps_its_own_name_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "find_gpu", lambda: detect.Gpu("NVIDIA Z1", 7 * 2**30, "20.0", 2))
    found = detect.detect()
    assert (found.name, found.kind, found.label) == ("cuda", "cuda", "NVIDIA Z1")
    assert found.memory_bytes == 7 * 2**30
    assert found.peak_flops == {}


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_the_cpu_is_the_device() -> None:
    found = detect.detect()
    assert found.kind == "cpu"
    assert found.name in catalog.names()


def test_a_cpu_has_peaks_only_where_its_clock_is_known() -> None:
    known = catalog.entries()
    assert detect.cpu_profile(CPU, known).peak_flops == {}
    clocked = detect.cpu_profile(replace(CPU, largest_mhz=2500.0), known)
    # 32 operations per cycle (two units of eight float32, multiply and add) x 4 cores x 2.5 GHz.
    assert clocked.peak_flops == {"float32": 32 * 4 * 2.5e9}
    assert clocked.label == "Some CPU, 8 cores"


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_profile_is_refused_where_there_is_no_gpu() -> None:
    with pytest.raises(ValueError, match=r"'l4' is a GPU, and torch sees none.*'auto' or 'cpu"):
        detect.select("l4")


def test_auto_detects_and_a_name_is_taken_at_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "find_gpu", lambda: A100)
    assert detect.select("auto").name == "a100-80gb"
    assert detect.select("cpu").name == "cpu"
    assert detect.select("l4").name == "l4"
    with pytest.raises(catalog.UnknownProfileError):
        detect.select("l44")


def test_the_environment_is_flat_and_survives_json() -> None:
    facts = detect.environment()
    assert json.loads(json.dumps(facts)) == facts
    assert all(isinstance(value, str | int | float | None) for value in facts.values())
    assert facts["threads"] >= 1
    assert facts["torch_version"]
    assert facts["memory_bytes"] > 0


def test_the_environment_names_no_host_and_no_person(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: "secret-host")
    monkeypatch.setenv("USER", "secret-user")
    text = json.dumps(detect.environment())
    assert "secret" not in text
    assert str(Path.home()) not in text or str(Path.home()) == "/"


def test_the_machine_id_is_stable_and_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "find_gpu", lambda: None)
    here = detect.machine_id()
    assert re.fullmatch(r"[0-9a-f]{12}", here)
    assert detect.machine_id() == here
    memory = host.memory_bytes()
    monkeypatch.setattr(host, "memory_bytes", lambda: 2 * memory)
    more_memory = detect.machine_id()
    monkeypatch.setattr(detect, "find_gpu", lambda: A100)
    assert len({here, more_memory, detect.machine_id()}) == 3


def test_a_few_reserved_megabytes_do_not_make_another_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "memory_bytes", lambda: 16 * 2**30)
    before = detect.machine_id()
    monkeypatch.setattr(host, "memory_bytes", lambda: 16 * 2**30 - 90 * 2**20)
    assert detect.machine_id() == before


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun 6\nGCC 12.1",
            "535.54.03",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build",
            "570.124.06",
        ),
        ("", None),
    ],
)
def test_the_driver_version_is_found_in_both_of_its_forms(
    tmp_path: Path, text: str, version: str | None
) -> None:
    (tmp_path / "version").write_text(text)
    assert detect.gpu_driver(tmp_path / "version") == version


def test_the_commit_is_read_and_changes_are_noticed(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    assert detect.git_state(tmp_path / "nowhere") == ("", None)
    git("init", "-q")
    assert detect.git_state(tmp_path) == ("", None)
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-qm", "first")
    assert detect.git_state(tmp_path) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "file").write_text("two")
    assert detect.git_state(tmp_path).dirty is True


def test_a_machine_without_git_has_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert detect.git_state(tmp_path) == ("", None)


@pytest.mark.gpu
def test_the_gpu_at_hand_is_described() -> None:
    found = detect.find_gpu()
    assert found is not None
    profile = detect.detect()
    assert profile.kind == "cuda"
    # Drivers keep a few per cent for themselves.
    assert 0.85 < found.memory_bytes / profile.memory_bytes <= 1.02
    assert detect.environment()["gpu_driver"]
