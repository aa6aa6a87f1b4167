"""Measured ceilings: what is timed, what is kept, what is measured again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hardware import ceilings
from hardware.profile import Ceilings, Profile

CPU = Profile(name="cpu", kind="cpu", label="CPU")
LOW = Ceilings(read_bandwidth=1.0, copy_bandwidth=5.0, matmul_flops={"float32": 3.0})
HIGH = Ceilings(read_bandwidth=2.0, copy_bandwidth=4.0, matmul_flops={"float32": 6.0})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENMARK_CACHE", str(tmp_path))
    return tmp_path


class Bench:
    """Stands for the measurement: gives prepared answers and counts."""

    def __init__(self, *answers: Ceilings) -> None:
        self.answers = list(answers)
        self.tries = 0

    def __call__(self, profile: Profile) -> Ceilings:
        self.tries += 1
        return self.answers.pop(0)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMARK_CACHE", "/a/b")
    assert ceilings.cache_dir() == Path("/a/b")
    monkeypatch.delenv("TOKENMARK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert ceilings.cache_dir() == Path("/x/tokenmark")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert ceilings.cache_dir() == Path.home() / ".cache" / "tokenmark"


@pytest.mark.usefixtures("cache")
def test_ceilings_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(LOW)
    monkeypatch.setattr(ceilings, "measure", bench)
    first = ceilings.measured(CPU)
    assert first == replace(CPU, ceilings=LOW)
    assert ceilings.measured(CPU) == first
    assert bench.tries == 1


@pytest.mark.usefixtures("cache")
def test_another_try_raises_each_ceiling_and_lowers_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "measure", Bench(LOW, HIGH))
    ceilings.measured(CPU)
    best = Ceilings(read_bandwidth=2.0, copy_bandwidth=5.0, matmul_flops={"float32": 6.0})
    assert ceilings.measured(CPU, refresh=True).ceilings == best
    assert ceilings.measured(CPU).ceilings == best


def test_dtypes_that_only_one_try_knows_are_kept() -> None:
    more = replace(HIGH, matmul_flops={"bfloat16": 9.0})
    assert ceilings.higher(LOW, more).matmul_flops == {"float32": 3.0, "bfloat16": 9.0}


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"read_bandwidth": 1}', "null"])
def test_a_broken_cache_is_measured_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setattr(ceilings, "measure", Bench(LOW, HIGH))
    ceilings.measured(CPU)
    (file,) = (cache / "ceilings").iterdir()
    file.write_text(broken)
    assert ceilings.measured(CPU).ceilings == HIGH


def test_nonsense_in_the_cache_is_not_believed(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "measure", Bench(LOW, HIGH))
    ceilings.measured(CPU)
    (file,) = (cache / "ceilings").iterdir()
    file.write_text(file.read_text().replace("1.0", "0"))
    assert ceilings.measured(CPU).ceilings == HIGH


@pytest.mark.usefixtures("cache")
def test_another_number_of_threads_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(ceilings, "measure", Bench(LOW, HIGH))
    ceilings.measured(CPU)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert ceilings.measured(CPU).ceilings == HIGH


def test_a_cache_that_cannot_be_written_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TOKENMARK_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(ceilings, "measure", Bench(LOW, HIGH))
    assert ceilings.measured(CPU).ceilings == LOW
    assert ceilings.measured(CPU).ceilings == HIGH


class Clock:
    """Moves only when a kernel runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_best_call_of_the_best_kernel_counts() -> None:
    clock = Clock()
    calls: list[str] = []

    def kernel(name: str, *seconds: float) -> object:
        waiting = list(seconds)

        def run() -> None:
            calls.append(name)
            clock.now += waiting.pop(0) if len(waiting) > 1 else waiting[0]

        return run

    # The first call of each is warm-up, be it ever so fast.
    slow, fast = kernel("slow", 0.1, 4.0), kernel("fast", 0.1, 3.0, 2.0, 3.0)
    assert ceilings.best_seconds([slow, fast], 20.0, clock=clock) == pytest.approx(2.0)
    assert calls == ["slow", "fast"] * 4


def test_a_kernel_is_timed_twice_even_without_a_budget() -> None:
    clock = Clock()
    calls: list[float] = []

    def run() -> None:
        calls.append(clock.now)
        clock.now += 1.0

    assert ceilings.best_seconds([run], 0.0, clock=clock) == 1.0
    assert len(calls) == 3


def test_work_on_a_device_is_waited_for() -> None:
    clock = Clock()

    def synchronize() -> None:
        clock.now += 7.0

    assert ceilings.best_seconds([lambda: None], 0.0, synchronize, clock) == 7.0


def test_every_read_kernel_reads_the_whole_buffer() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ceilings._buffer(3 * 2**20) as buffer, ThreadPoolExecutor(3) as pool:
        assert buffer.nbytes == 3 * 2**20
        kernels = ceilings._read_kernels(buffer, 3, pool)
        before = [float(np.sum([np.asarray(part).sum() for part in _rows(k())])) for k in kernels]
        # One number changed at either end must show in what each kernel returns.
        buffer[0] += 64
        buffer[-1] += 64
        after = [float(np.sum([np.asarray(part).sum() for part in _rows(k())])) for k in kernels]
    assert all(b >= a + 100 for a, b in zip(before, after, strict=True))


def _rows(result: object) -> list[object]:
    return list(result) if isinstance(result, list) else [result]


def test_this_machine_has_plausible_ceilings() -> None:
    found = ceilings.measure_cpu(
        buffer_bytes=2**20,
        read_seconds=0.05,
        copy_seconds=0.05,
        matmul_seconds=0.05,
        dtypes=("float32",),
    )
    assert 5e8 < found.read_bandwidth < 5e12
    assert 5e8 < found.copy_bandwidth < 5e12
    assert 1e8 < found.matmul_flops["float32"] < 1e15


def test_measuring_leaves_the_precision_of_products_as_it_was() -> None:
    import torch

    before = torch.get_float32_matmul_precision()
    assert ceilings._matmul_flops("float32", "cpu", 0.0, 256) > 0
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.gpu
def test_a_gpu_stays_below_its_data_sheet_and_not_far() -> None:
    from hardware import detect

    profile = detect.detect()
    found = ceilings.measure_cuda()
    assert 0.5 < found.read_bandwidth / profile.bandwidth < 1.05
    assert 0.4 < found.matmul_flops["float16"] / profile.peak_flops["float16"] < 1.05
    assert found.matmul_flops["tf32"] >= 0.9 * found.matmul_flops["float32"]
