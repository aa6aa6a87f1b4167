"""Compiles the C kernels once per machine with the system's compiler and loads them."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from models.base import Unsupported
from models.cache import cache_dir

# Contraction to fused multiply-adds is wanted; -ffast-math is not: it drops NaN and, when linked
# into a shared library, flushes denormals for the whole process.
FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-shared",
    "-fPIC",
)


def compiler() -> str | None:
    """Return the C compiler: `CC` if set, else the first of cc, gcc and clang."""
    wanted = os.environ.get("CC")
    names = (wanted,) if wanted else ("cc", "gcc", "clang")
    return next((path for name in names if (path := shutil.which(name))), None)


@functools.cache
def load(source: str) -> ctypes.CDLL:
    """Return the shared library of a C file beside this module, compiled if need be.

    The file is cached under a hash of source, flags, compiler and processor, so a cache that is
    carried to another machine is not used there. torch must be imported before: the library then
    shares its OpenMP threads instead of starting a second pool that competes for the cores.

    Raises:
        models.base.Unsupported: There is no compiler, or it refuses the file.
    """
    import torch  # noqa: F401  # loads the OpenMP runtime first

    path = Path(__file__).with_name(source)
    cc = compiler()
    if cc is None:
        raise Unsupported(
            "the native kernels need a C compiler (cc, gcc or clang); none was found."
        )
    version = subprocess.run([cc, "--version"], capture_output=True, text=True, check=False).stdout
    key = hashlib.sha256(
        "\0".join([path.read_text(), *FLAGS, version, _processor()]).encode()
    ).hexdigest()[:16]
    library = cache_dir() / "native" / f"{path.stem}-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            command = [cc, *FLAGS, str(path), "-o", str(built), "-lm"]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise Unsupported(f"{cc} cannot compile {source}: {result.stderr.strip()[-500:]}")
            built.replace(library)
    return ctypes.CDLL(str(library))


def _processor() -> str:
    """Return the processor's model and instruction sets, as the kernel lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))
