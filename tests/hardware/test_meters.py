"""Meters: real on the CPU, with fakes for counters and devices that are not here."""

from __future__ import annotations

import mmap
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware import meters
from hardware.meters import CudaDevice, LinuxHost, Meter, MeterAbsentError, Nvml, Rapl
from hardware.profile import Profile

CPU = Profile(name="cpu", kind="cpu", label="CPU")
MIB = 2**20


def needs_high_water_mark() -> None:
    try:
        LinuxHost()
    except MeterAbsentError as reason:
        pytest.skip(str(reason))


def spin(seconds: float) -> None:
    """Use the CPU for so long, by its own clock."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def touch(size: int) -> mmap.mmap:
    """Return fresh memory, every page written, given back to the system when it goes."""
    memory = mmap.mmap(-1, size)
    memory.write(b"x" * size if size <= MIB else b"")
    for start in range(0, size, mmap.PAGESIZE):
        memory[start] = 1
    return memory


def rapl_domain(folder: Path, path: str, name: str, energy: int, largest: int = 999) -> Path:
    domain = folder / path
    domain.mkdir(parents=True)
    (domain / "name").write_text(f"{name}\n")
    (domain / "energy_uj").write_text(f"{energy}\n")
    (domain / "max_energy_range_uj").write_text(f"{largest}\n")
    return domain


def test_the_call_result_comes_back_with_its_reading() -> None:
    result, reading = Meter(CPU).measure(lambda: "answer")
    assert result == "answer"
    assert 0 < reading.seconds < 2
    assert reading.device_seconds is None


def test_sleeping_takes_wall_time_and_no_cpu_time() -> None:
    _, reading = Meter(CPU).measure(lambda: time.sleep(0.1))
    assert reading.seconds >= 0.1
    assert reading.cpu_seconds < 0.08


def test_computing_takes_cpu_time() -> None:
    _, reading = Meter(CPU).measure(lambda: spin(0.03))
    assert reading.cpu_seconds >= 0.03
    assert reading.seconds >= 0.02


def test_work_cannot_be_hidden_in_a_child_process() -> None:
    code = "import time\nwhile time.process_time() < 0.15: pass"
    _, reading = Meter(CPU).measure(
        lambda: subprocess.run([sys.executable, "-c", code], check=True)
    )
    assert reading.cpu_seconds >= 0.15


def test_exceptions_pass_through_and_the_meter_lives_on() -> None:
    meter = Meter(CPU)
    with pytest.raises(ZeroDivisionError):
        meter.measure(lambda: 1 / 0)
    assert meter.measure(lambda: 7)[0] == 7


def test_the_peak_is_what_the_call_held_at_most_even_if_it_gave_it_back() -> None:
    needs_high_water_mark()
    meter = Meter(CPU)

    def call() -> None:
        touch(48 * MIB).close()

    call()
    _, reading = meter.measure(call)
    assert reading.peak_bytes is not None
    # Within a page of accounting slack for each core's counter, and the test's own objects.
    assert 46 * MIB <= reading.peak_bytes <= 56 * MIB


def test_memory_held_before_the_call_does_not_count() -> None:
    needs_high_water_mark()
    held = touch(48 * MIB)
    _, reading = Meter(CPU).measure(lambda: None)
    held.close()
    assert reading.peak_bytes is not None
    assert reading.peak_bytes < 8 * MIB


def test_the_meter_costs_a_call_next_to_nothing() -> None:
    meter = Meter(CPU)
    inside, outside = [], []
    for _ in range(300):
        started = time.perf_counter()
        _, reading = meter.measure(lambda: None)
        outside.append(time.perf_counter() - started)
        inside.append(reading.seconds)
    # Measured: 0.5 and 60 microseconds; the margins are for busy machines.
    assert statistics.quantiles(inside)[0] < 20e-6
    assert statistics.quantiles(outside)[0] < 1e-3


def test_a_system_without_a_high_water_mark_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MeterAbsentError, match="cannot be reset"):
        LinuxHost(tmp_path)
    (tmp_path / "clear_refs").write_text("")
    (tmp_path / "status").write_text("Name:\tx\nVmRSS:\t 12 kB\n")
    with pytest.raises(MeterAbsentError, match="VmHWM"):
        LinuxHost(tmp_path)
    monkeypatch.setattr(meters.LinuxHost.__init__, "__defaults__", (tmp_path,))
    meter = Meter(CPU)
    _, reading = meter.measure(lambda: None)
    assert reading.peak_bytes is None
    assert "VmHWM" in meter.absent["peak_bytes"]


def test_the_mark_is_reset_and_growth_is_told_in_bytes(tmp_path: Path) -> None:
    (tmp_path / "clear_refs").write_text("")
    (tmp_path / "status").write_text("VmHWM:\t  100 kB\nVmRSS:\t 90 kB\n")
    host = LinuxHost(tmp_path)
    assert (tmp_path / "clear_refs").read_text() == "5"
    (tmp_path / "status").write_text("VmHWM:\t  164 kB\n")
    assert host.peak_bytes() == 64 * 1024


def test_packages_and_memory_are_added_and_their_parts_are_not(tmp_path: Path) -> None:
    package = rapl_domain(tmp_path, "intel-rapl:0", "package-0", 100)
    core = rapl_domain(tmp_path, "intel-rapl:0:0", "core", 100)
    memory = rapl_domain(tmp_path, "intel-rapl:0:1", "dram", 100)
    system = rapl_domain(tmp_path, "intel-rapl:1", "psys", 100)
    twin = rapl_domain(tmp_path, "intel-rapl-mmio:0", "package-0", 100)
    rapl = Rapl(tmp_path)
    before = rapl.read()
    for domain, energy in ((package, 400), (memory, 150), (core, 900), (system, 900), (twin, 900)):
        (domain / "energy_uj").write_text(str(energy))
    assert rapl.joules(before, rapl.read()) == pytest.approx((300 + 50) / 1e6)


@pytest.fixture(scope="module")
def small_counter(tmp_path_factory: pytest.TempPathFactory) -> Rapl:
    folder = tmp_path_factory.mktemp("rapl")
    rapl_domain(folder, "intel-rapl:0", "package-0", 0, largest=999)
    return Rapl(folder)


@given(start=st.integers(0, 999), used=st.integers(0, 999))
def test_a_counter_that_wraps_around_loses_nothing(
    small_counter: Rapl, start: int, used: int
) -> None:
    joules = small_counter.joules([start], [(start + used) % 1000])
    assert joules == pytest.approx(used / 1e6)


def test_absent_and_forbidden_counters_give_their_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MeterAbsentError, match="no RAPL counters"):
        Rapl(tmp_path)
    domain = rapl_domain(tmp_path, "intel-rapl:0", "package-0", 1)
    original = Path.read_text

    def forbidden(path: Path, *args: object, **kwargs: object) -> str:
        if path.name == "energy_uj":
            raise PermissionError(path)
        return original(path)

    monkeypatch.setattr(Path, "read_text", forbidden)
    with pytest.raises(MeterAbsentError, match="root only"):
        Rapl(tmp_path)
    monkeypatch.undo()
    (domain / "max_energy_range_uj").unlink()
    with pytest.raises(MeterAbsentError, match="range"):
        Rapl(tmp_path)


def test_a_call_is_told_the_joules_between_its_edges(tmp_path: Path) -> None:
    domain = rapl_domain(tmp_path, "intel-rapl:0", "package-0", 900_000, largest=999_999)
    meter = Meter(CPU, energy=Rapl(tmp_path))
    _, reading = meter.measure(lambda: (domain / "energy_uj").write_text("400000"))
    assert reading.energy_j == pytest.approx(0.5)
    assert "energy_j" not in meter.absent


def test_a_counter_that_goes_away_costs_the_energy_and_not_the_time(tmp_path: Path) -> None:
    domain = rapl_domain(tmp_path, "intel-rapl:0", "package-0", 1)
    meter = Meter(CPU, energy=Rapl(tmp_path))
    _, reading = meter.measure((domain / "energy_uj").unlink)
    assert reading.energy_j is None
    assert reading.seconds > 0
    assert "cannot be read" in meter.absent["energy_j"]


class FakeNvml:
    """As much of `pynvml` as the meter uses."""

    class NVMLError(Exception):
        pass

    def __init__(self, millijoules: list[int]) -> None:
        self.millijoules = millijoules

    def nvmlInit(self) -> None:  # noqa: N802 - the library's name
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802 - the library's name
        if not uuid.startswith("GPU-"):
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        if not self.millijoules:
            raise self.NVMLError("Not Supported")
        return self.millijoules.pop(0)


def test_the_board_energy_is_read_in_millijoules() -> None:
    counter = Nvml("GPU-1", FakeNvml([1000, 1500, 4000]))
    assert counter.joules(counter.read(), counter.read()) == 2.5


def test_old_and_missing_gpus_give_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MeterAbsentError, match="no energy counter: Not Supported"):
        Nvml("GPU-1", FakeNvml([]))
    with pytest.raises(MeterAbsentError, match="Not Found"):
        Nvml("MIG-1", FakeNvml([1]))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(MeterAbsentError, match="nvidia-ml-py is not installed"):
        Nvml("GPU-1")


class FakeCuda:
    """A `torch.cuda` that writes down what is asked of it, in order."""

    log: ClassVar[list[str]] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            FakeCuda.log.append("record")

        def elapsed_time(self, end: FakeCuda.Event) -> float:
            assert end is not self
            FakeCuda.log.append("elapsed")
            return 1500.0

    def synchronize(self) -> None:
        if "call" in self.log:
            time.sleep(0.02)
        self.log.append("synchronize")

    def reset_peak_memory_stats(self) -> None:
        self.log.append("reset")

    def max_memory_allocated(self) -> int:
        self.log.append("peak")
        return 12345


def test_a_gpu_is_synchronised_on_both_edges_and_events_lie_inside() -> None:
    FakeCuda.log.clear()
    meter = Meter(
        Profile(name="cuda", kind="cuda", label="GPU"),
        device=CudaDevice(FakeCuda()),
        energy=Nvml("GPU-1", FakeNvml([0, 1000, 3000])),
    )
    _, reading = meter.measure(lambda: FakeCuda.log.append("call"))
    assert reading.device_seconds == 1.5
    # What was still in flight when the call returned belongs to it.
    assert reading.seconds >= 0.02
    assert reading.peak_bytes == 12345
    assert reading.energy_j == 2.0
    around = FakeCuda.log.index("call")
    assert FakeCuda.log[around - 2 : around + 3] == [
        "synchronize",
        "record",
        "call",
        "record",
        "synchronize",
    ]
    assert FakeCuda.log.index("reset") < around < FakeCuda.log.index("elapsed")
    assert meter.absent == {}


@pytest.mark.gpu
def test_a_gpu_reading_is_whole_and_consistent() -> None:
    import torch

    meter = Meter(Profile(name="cuda", kind="cuda", label="GPU"))
    matrix = torch.randn(4096, 4096, device="cuda")
    meter.measure(lambda: matrix @ matrix)
    result, reading = meter.measure(lambda: [matrix @ matrix for _ in range(20)][-1])
    assert result.shape == (4096, 4096)
    assert reading.device_seconds is not None
    assert 0 < reading.device_seconds <= reading.seconds
    # Twenty products of 137 GFLOP: no GPU does them in less than 2 ms.
    assert reading.seconds > 2e-3
    assert reading.peak_bytes is not None
    assert reading.peak_bytes >= 21 * 4096 * 4096 * 4
    if "energy_j" not in meter.absent:
        assert reading.energy_j is not None
        assert reading.energy_j >= 0
