"""The catalogue: data that is complete, files that are checked, devices that are recognised."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware import catalog

GIB = 2**30
GOOD = """
kind = "cuda"
label = "Board"
match = '^Board$'
memory_gib = 2
bandwidth_gb_per_s = 3.5
[peak_tera_ops]
float32 = 1
[sources]
memory_gib = "sheet"
bandwidth_gb_per_s = "sheet"
peak_tera_ops = "sheet"
"""

# Names as drivers report them.
DEVICE_NAMES = {
    ("NVIDIA A100-SXM4-40GB", 39.4): "a100-40gb",
    ("NVIDIA A100-PCIE-40GB", 39.4): "a100-40gb-pcie",
    ("NVIDIA A100-SXM4-80GB", 79.2): "a100-80gb",
    ("NVIDIA A100 80GB PCIe", 79.2): "a100-80gb-pcie",
    ("NVIDIA H100 80GB HBM3", 79.1): "h100-sxm",
    ("NVIDIA H100 PCIe", 79.1): "h100-pcie",
    ("NVIDIA H100 NVL", 93.1): "h100-nvl",
    ("NVIDIA H200", 139.8): "h200",
    ("NVIDIA H200 NVL", 139.8): "h200-nvl",
    ("NVIDIA L4", 22.0): "l4",
    ("Tesla T4", 14.6): "t4",
    ("Tesla V100-SXM2-16GB", 15.8): "v100-sxm2-16gb",
    ("Tesla V100-SXM2-32GB", 31.7): "v100-sxm2-32gb",
    ("NVIDIA GeForce RTX 3090", 23.7): "rtx-3090",
    ("NVIDIA GeForce RTX 4090", 23.5): "rtx-4090",
    ("NVIDIA TITAN Xp", 11.9): "titan-xp",
    ("Orin", 61.3): "jetson-agx-orin-64gb",
    ("Orin", 29.8): "jetson-agx-orin-32gb",
}


def test_a_profile_is_read_in_bytes_and_operations_per_second() -> None:
    entry = catalog.parse("board", GOOD)
    assert entry.profile.name == "board"
    assert entry.profile.memory_bytes == 2 * GIB
    assert entry.profile.bandwidth == 3.5e9
    assert entry.profile.peak_flops == {"float32": 1e12}
    assert entry.profile.power_watts == 0


def test_the_catalogue_covers_every_device_that_a_driver_may_name() -> None:
    known = catalog.entries()
    for (device_name, gib), expected in DEVICE_NAMES.items():
        entry = catalog.recognise_gpu(device_name, round(gib * GIB), known)
        assert entry is not None, device_name
        assert entry.profile.name == expected
    named = {entry.profile.name for entry in known if entry.profile.match}
    assert named == set(DEVICE_NAMES.values())


@pytest.mark.parametrize(
    "device_name",
    [
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA L40S",
        "NVIDIA TITAN X (Pascal)",
    ],
)
def test_slices_and_namesakes_are_not_taken_for_the_whole_board(device_name: str) -> None:
    assert catalog.recognise_gpu(device_name, 80 * GIB, catalog.entries()) is None


def test_every_gpu_with_a_pattern_has_memory_bandwidth_peaks_and_power() -> None:
    for entry in catalog.entries():
        if entry.profile.match:
            profile = entry.profile
            assert profile.memory_bytes > 0 < profile.bandwidth, profile.name
            assert profile.power_watts > 0, profile.name
            assert {"float32", "float16"} <= set(profile.peak_flops), profile.name
            assert set(entry.sources) == {
                "memory_gib",
                "bandwidth_gb_per_s",
                "peak_tera_ops",
                "power_watts",
            }


def test_peaks_are_dense_and_grow_as_numbers_shrink() -> None:
    order = ["float32", "tf32", "float16", "float8"]
    for entry in catalog.entries():
        peaks = entry.profile.peak_flops
        row = [peaks[dtype] for dtype in order if dtype in peaks]
        assert row == sorted(row), entry.profile.name
        if "float8" in peaks:
            # With sparsity the eight-bit figure would be four times the sixteen-bit one.
            assert 1.9 < peaks["float8"] / peaks["float16"] < 2.1, entry.profile.name


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx2", "fma"}, "cpu-avx2"),
        ({"avx2", "fma", "avx512f"}, "cpu-avx512"),
        ({"avx2", "fma", "avx512f", "avx512_bf16"}, "cpu-avx512-bf16"),
        ({"avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16"}, "cpu-amx"),
        ({"sse2"}, "cpu"),
    ],
)
def test_a_cpu_belongs_to_the_most_demanding_class_that_it_meets(
    flags: set[str], expected: str
) -> None:
    entry = catalog.recognise_cpu("x86_64", frozenset(flags), catalog.entries())
    assert entry is not None
    assert entry.profile.name == expected


def test_arm_flags_count_only_on_arm() -> None:
    known = catalog.entries()
    arm = catalog.recognise_cpu("aarch64", frozenset({"asimd"}), known)
    odd = catalog.recognise_cpu("riscv64", frozenset({"asimd", "avx2", "fma"}), known)
    assert arm is not None
    assert odd is not None
    assert (arm.profile.name, odd.profile.name) == ("cpu-arm", "cpu")


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(catalog.UnknownProfileError, match="Did you mean 'h100-sxm'"):
        catalog.load("h100-smx")


def test_a_name_cannot_leave_the_folder() -> None:
    with pytest.raises(catalog.UnknownProfileError):
        catalog.load("../profiles/l4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("bandwidth_gb_per_s = 3.5", "bandwith_gb_per_s = 3.5"), "mean 'bandwidth_gb_per_s'"),
        (("float32 = 1", "floaty32 = 1"), "Did you mean 'float32'"),
        (("memory_gib = 2", "memory_gib = -2"), "above 0, got -2"),
        (("memory_gib = 2", "memory_gib = true"), "above 0, got True"),
        (("memory_gib = 2", "memory_gib = nan"), "above 0, got nan"),
        (("float32 = 1", "float32 = '1'"), "peak_tera_ops.float32 must be a number"),
        (("[peak_tera_ops]\nfloat32 = 1", "peak_tera_ops = 1"), "peak_tera_ops must be a table"),
        (('kind = "cuda"', 'kind = "tpu"'), "must be 'cpu' or 'cuda', not 'tpu'"),
        (('label = "Board"', "label = 3"), "label must be text"),
        (('label = "Board"', ""), "needs a label"),
        (("'^Board$'", "'^Board('"), "no regular expression"),
        (("^Board$'", "^Board$'\nneeds_flags = 'avx2'"), "list of texts"),
        (('memory_gib = "sheet"', ""), "memory_gib has no source"),
        (('memory_gib = "sheet"', 'memory_gib = "sheet"\npower_watts = "sheet"'), "power_watts"),
        (("[sources]", "[sources"), "not valid TOML"),
        (('peak_tera_ops = "sheet"', "peak_tera_ops = 1"), "sources must be a table of texts"),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason(change: tuple[str, str], message: str) -> None:
    assert change[0] in GOOD
    with pytest.raises(catalog.ProfileError, match=re.escape(message)) as caught:
        catalog.parse("board", GOOD.replace(change[0], change[1], 1))
    assert "'board'" in str(caught.value)


@given(
    peaks=st.dictionaries(st.sampled_from(catalog.DTYPES), st.floats(1e-3, 1e6), min_size=1),
    memory=st.integers(1, 4096),
)
def test_what_is_written_is_what_is_read(peaks: dict[str, float], memory: int) -> None:
    lines = [f"{dtype} = {value!r}" for dtype, value in peaks.items()]
    text = "\n".join(
        [
            'kind = "cuda"\nlabel = "x"',
            f"memory_gib = {memory}",
            "[peak_tera_ops]",
            *lines,
            '[sources]\nmemory_gib = "a"\npeak_tera_ops = "b"',
        ]
    )
    profile = catalog.parse("x", text).profile
    assert profile.memory_bytes == memory * GIB
    assert profile.peak_flops == {dtype: value * 1e12 for dtype, value in peaks.items()}


def test_listing_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from hardware import catalog; catalog.entries();"
        "print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    root = Path(catalog.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
