"""Measured ceilings: what memory and arithmetic of this very machine reach.

A ceiling is the best of many tries of several kernels, taken in turn so that a slow second hurts
all of them alike. The read buffer is many times the last-level cache and lies on huge pages where
the kernel grants them: with small pages the same loop reads a fifth to a third less, and a ceiling
must not be lower than what a careful program could reach.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hardware import detect, host
from hardware.profile import Ceilings, Profile

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

CPU_DTYPES = ("float32", "bfloat16")
CUDA_DTYPES = ("float32", "tf32", "float16", "bfloat16")
BUFFER_BYTES = 256 * 2**20
READ_SECONDS = 1.8
COPY_SECONDS = 0.8
MATMUL_SECONDS = 0.7

_FORMAT = 1  # of the cache's files; a change of the measurement raises it


def cache_dir() -> Path:
    """Return the folder for what is measured once: TOKENMARK_CACHE, else XDG's cache/tokenmark."""
    own = os.environ.get("TOKENMARK_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenmark"


def measured(profile: Profile, refresh: bool = False) -> Profile:
    """Return the profile with this machine's ceilings filled in.

    They are measured once, in about six seconds, and kept by machine, torch version and threads.
    `refresh` tries again, and each ceiling rises to the better try: what was reached once can be
    reached, and a busy neighbour lowers a try but not the ceiling.
    """
    path = _cache_file(profile)
    kept = _read(path)
    if kept is not None and not refresh:
        return replace(profile, ceilings=kept)
    tried = measure(profile)
    ceilings = tried if kept is None else higher(kept, tried)
    _write(path, ceilings)
    return replace(profile, ceilings=ceilings)


def higher(first: Ceilings, second: Ceilings) -> Ceilings:
    """Return the larger of each pair of ceilings; a dtype that only one has is kept."""
    flops = dict(first.matmul_flops)
    for dtype, value in second.matmul_flops.items():
        flops[dtype] = max(value, flops.get(dtype, 0.0))
    return Ceilings(
        read_bandwidth=max(first.read_bandwidth, second.read_bandwidth),
        copy_bandwidth=max(first.copy_bandwidth, second.copy_bandwidth),
        matmul_flops=flops,
    )


def measure(profile: Profile) -> Ceilings:
    """Measure the ceilings of this machine's CPU or current GPU, by the profile's kind."""
    return measure_cuda() if profile.kind == "cuda" else measure_cpu()


def measure_cpu(
    *,
    buffer_bytes: int | None = None,
    read_seconds: float = READ_SECONDS,
    copy_seconds: float = COPY_SECONDS,
    matmul_seconds: float = MATMUL_SECONDS,
    dtypes: Sequence[str] = CPU_DTYPES,
) -> Ceilings:
    """Measure the CPU with as many threads as torch uses.

    Args:
        buffer_bytes: Size of the buffer read, and of the one it is copied to. None takes 256 MiB or
            eight times the last-level caches, whichever is more, but an eighth of the free memory
            at most.
        read_seconds: Time for reading.
        copy_seconds: Time for copying.
        matmul_seconds: Time for the products of each dtype.
        dtypes: Names of torch dtypes to multiply in.
    """
    import numpy as np
    import torch

    if buffer_bytes is None:
        buffer_bytes = max(BUFFER_BYTES, 8 * host.last_level_cache_bytes())
        buffer_bytes = min(buffer_bytes, host.available_memory_bytes() // 8)
    threads = torch.get_num_threads()
    with (
        ThreadPoolExecutor(threads) as pool,
        _buffer(buffer_bytes) as source,
        _buffer(buffer_bytes) as target,
    ):
        nbytes = source.nbytes
        read = nbytes / best_seconds(_read_kernels(source, threads, pool), read_seconds)
        copies: list[Callable[[], object]] = [
            partial(torch.from_numpy(target).copy_, torch.from_numpy(source)),
            _in_threads(
                pool,
                np.copyto,
                list(zip(_parts(target, threads), _parts(source, threads), strict=True)),
            ),
        ]
        copy = 2 * nbytes / best_seconds(copies, copy_seconds)
    flops = {dtype: _matmul_flops(dtype, "cpu", matmul_seconds, 4096) for dtype in dtypes}
    return Ceilings(read_bandwidth=read, copy_bandwidth=copy, matmul_flops=flops)


def measure_cuda(
    *,
    read_seconds: float = 0.5,
    copy_seconds: float = 0.3,
    matmul_seconds: float = 0.5,
    dtypes: Sequence[str] = CUDA_DTYPES,
) -> Ceilings:
    """Measure the current CUDA device, each call synchronised on both edges.

    Args:
        read_seconds: Time for reading.
        copy_seconds: Time for copying.
        matmul_seconds: Time for the products of each dtype.
        dtypes: Names of torch dtypes to multiply in; `tf32` is float32 on tensor cores.
    """
    import torch

    free, _ = torch.cuda.mem_get_info()
    # 2 GiB: a call then takes long enough for its launch not to matter, on any board.
    source = torch.ones(min(2 * 2**30, free // 8) // 4, device="cuda")
    target = torch.empty_like(source)
    nbytes = source.numel() * source.element_size()
    wait = torch.cuda.synchronize
    reads: list[Callable[[], object]] = [
        partial(torch.sum, source),
        partial(torch.amax, source),
        partial(torch.linalg.vector_norm, source),
    ]
    read = nbytes / best_seconds(reads, read_seconds, wait)
    copy = 2 * nbytes / best_seconds([partial(target.copy_, source)], copy_seconds, wait)
    del source, target, reads
    flops = {dtype: _matmul_flops(dtype, "cuda", matmul_seconds, 16384, wait) for dtype in dtypes}
    return Ceilings(read_bandwidth=read, copy_bandwidth=copy, matmul_flops=flops)


def best_seconds(
    kernels: Sequence[Callable[[], object]],
    budget_seconds: float,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the shortest call of any kernel, taken in turn until the budget is spent.

    Every kernel is called once to warm up and at least twice in earnest.
    """
    for kernel in kernels:
        kernel()
    synchronize()
    best, rounds, deadline = float("inf"), 0, clock() + budget_seconds
    while rounds < 2 or clock() < deadline:
        for kernel in kernels:
            started = clock()
            kernel()
            synchronize()
            best = min(best, clock() - started)
        rounds += 1
    return best


def _read_kernels(
    source: npt.NDArray[np.float32], threads: int, pool: ThreadPoolExecutor
) -> list[Callable[[], object]]:
    """Return reductions that read `source` once; which is fastest differs from CPU to CPU."""
    import numpy as np
    import torch

    flat = torch.from_numpy(source)
    rows = flat.view(-1, 4096)
    ones = torch.ones(4096)
    parts = [(part, part) for part in _parts(source, threads)]
    return [
        partial(torch.sum, flat),
        partial(torch.mv, rows, ones),
        _in_threads(pool, np.dot, parts),
    ]


def _in_threads(
    pool: ThreadPoolExecutor, function: Callable[..., object], arguments: list[tuple[Any, ...]]
) -> Callable[[], object]:
    """Return a call that runs `function` on each of `arguments` at once; numpy frees the GIL."""
    return lambda: [done.result() for done in [pool.submit(function, *each) for each in arguments]]


def _parts(array: npt.NDArray[np.float32], count: int) -> list[npt.NDArray[np.float32]]:
    import numpy as np

    return np.array_split(array, count)


@contextmanager
def _buffer(size: int) -> Iterator[npt.NDArray[np.float32]]:
    """Yield float32 ones of about `size` bytes, in rows of 4096, on huge pages where possible."""
    import numpy as np

    length = max(1, size // (4096 * 4)) * 4096
    memory = mmap.mmap(-1, length * 4)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # A kernel without huge pages refuses: the ceiling is then that of small ones.
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, dtype=np.float32)
    # Written, or all pages would be the one page of zeros, which the cache holds.
    array[:] = 1
    # The map goes when the last array on it does; closing it under torch's views would raise.
    yield array


def _matmul_flops(
    dtype: str,
    device: str,
    budget_seconds: float,
    largest: int,
    synchronize: Callable[[], None] = lambda: None,
) -> float:
    """Return operations per second of the best square product; a multiply-add counts two.

    Sizes double while a product stays short, so that slow dtypes end at small sizes.
    """
    import torch

    kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        best, size = 0.0, 256
        deadline = time.perf_counter() + budget_seconds
        while True:
            left, right = (_random(size, kind, device) for _ in range(2))
            out = torch.empty(size, size, dtype=kind, device=device)
            product = partial(torch.mm, left, right, out=out)
            seconds = best_seconds([product], 0, synchronize)
            best = max(best, 2 * size**3 / seconds)
            remaining = deadline - time.perf_counter()
            # The next size takes eight times as long, and is called three times.
            if size == largest or 8 * 3 * seconds > remaining:
                if remaining > 0:
                    seconds = best_seconds([product], remaining, synchronize)
                    best = max(best, 2 * size**3 / seconds)
                return best
            size *= 2
    finally:
        torch.set_float32_matmul_precision(precision)


def _random(size: int, kind: Any, device: str) -> Tensor:
    # Not zeros: products of zeros draw less power, hence run at higher clocks than real ones.
    import torch

    generator = torch.Generator(device).manual_seed(size)
    return torch.randn(size, size, generator=generator, device=device).to(kind)


def _cache_file(profile: Profile) -> Path:
    import torch

    key = [detect.machine_id(), profile.kind, f"torch-{torch.__version__}", f"v{_FORMAT}"]
    if profile.kind == "cpu":
        key.append(f"{torch.get_num_threads()}-threads")
    return cache_dir() / "ceilings" / f"{'-'.join(key)}.json"


def _read(path: Path) -> Ceilings | None:
    """Return cached ceilings, or None if there are none that make sense."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        ceilings = Ceilings(
            read_bandwidth=float(data["read_bandwidth"]),
            copy_bandwidth=float(data["copy_bandwidth"]),
            matmul_flops={name: float(flops) for name, flops in data["matmul_flops"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    numbers = (ceilings.read_bandwidth, ceilings.copy_bandwidth, *ceilings.matmul_flops.values())
    return ceilings if all(0 < number < float("inf") for number in numbers) else None


def _write(path: Path, ceilings: Ceilings) -> None:
    """Keep the ceilings; a cache that cannot be written costs only time, so that is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    except OSError:
        return
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(asdict(ceilings), file, indent=1)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
