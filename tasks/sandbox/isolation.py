"""Starting a process that can see, keep and reach next to nothing.

Two levels, the first that works is used: `bubblewrap` (the `bwrap` program) and `namespaces` (the
same by ctypes, with Landlock; needs Linux 5.13 and leave to create user namespaces). Both give:
new user, pid, net, mount, ipc, uts and cgroup namespaces, so no network and nobody to send a signal
to; a root that shows the libraries of the system and the standard library of this Python,
read-only, no site-packages, no home, no /proc, no /dev; a private /tmp of a few megabytes; an empty
environment; a new session; death with the parent; and a seccomp filter. Resource limits are set by
`tasks/sandbox/child.py` before it touches foreign code.

The filter refuses what makes processes and threads: a program is one thread, so a fork bomb fails
at its first fork. RLIMIT_NPROC would not do that, it does not bind root.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from models.base import Unsupported
from tasks.sandbox.child import frame

Level = Literal["bubblewrap", "namespaces"]
LEVELS: tuple[Level, ...] = ("bubblewrap", "namespaces")

UID = 65534  # nobody
TMP_BYTES = 16 << 20
CHILD = Path(__file__).with_name("child.py")
NAMESPACES = Path(__file__).with_name("namespaces.py")
CHILD_IN_SANDBOX = "/child.py"
# String hashes, and with them the order of sets, are the same in every run.
ENVIRONMENT = {"PYTHONHASHSEED": "0"}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one sandboxed process may use.

    Attributes:
        cpu_seconds: Processor time; the kernel counts it in whole seconds.
        wall_seconds: Time after which everything is killed.
        memory_bytes: Address space.
        file_bytes: Largest file.
        open_files: Largest number of file descriptors.
    """

    cpu_seconds: int = 3
    wall_seconds: float = 12.0
    memory_bytes: int = 1 << 30
    file_bytes: int = TMP_BYTES
    open_files: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}.")

    def rlimits(self) -> dict[str, int]:
        """Return the resource limits by the names of the `resource` module."""
        return {
            "CPU": self.cpu_seconds,
            "AS": self.memory_bytes,
            "FSIZE": self.file_bytes,
            "NOFILE": self.open_files,
            "NPROC": 16,
            "CORE": 0,
        }


class _Machine(NamedTuple):
    """Numbers of system calls on one processor architecture."""

    audit_arch: int
    denied: dict[str, int]


# Refused beside processes and threads: what makes sockets, memory that no limit counts (System V,
# message queues, memfd), namespaces, mounts; what looks into other processes; and parts of the
# kernel with a history of holes.
_X86_64 = _Machine(
    audit_arch=0xC000003E,
    denied={
        "clone": 56, "fork": 57, "vfork": 58,
        "socket": 41, "socketpair": 53,
        "shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240, "memfd_create": 319,
        "unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155,
        "chroot": 161, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311,
        "kcmp": 312, "perf_event_open": 298, "bpf": 321, "userfaultfd": 323,
        "add_key": 248, "request_key": 249, "keyctl": 250, "init_module": 175,
        "finit_module": 313, "kexec_load": 246, "quotactl": 179, "inotify_init1": 294,
        "fanotify_init": 300, "open_by_handle_at": 304,
    },
)  # fmt: skip
_AARCH64 = _Machine(
    audit_arch=0xC00000B7,
    denied={
        "clone": 220,
        "socket": 198, "socketpair": 199,
        "shmget": 194, "semget": 190, "msgget": 186, "mq_open": 180, "memfd_create": 279,
        "unshare": 97, "setns": 268, "mount": 40, "umount2": 39, "pivot_root": 41,
        "chroot": 51, "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271,
        "kcmp": 272, "perf_event_open": 241, "bpf": 280, "userfaultfd": 282,
        "add_key": 217, "request_key": 218, "keyctl": 219, "init_module": 105,
        "finit_module": 273, "kexec_load": 104, "quotactl": 60, "inotify_init1": 26,
        "fanotify_init": 262, "open_by_handle_at": 265,
    },
)  # fmt: skip
_MACHINES = {"x86_64": _X86_64, "aarch64": _AARCH64}
_CLONE3 = 435  # this and the following numbers are the same on all architectures
# io_uring, the newer mount calls, pidfd_getfd, memfd_secret.
_DENIED_EVERYWHERE = (425, 426, 427, 428, 429, 430, 432, 438, 442, 447)


def seccomp_program(machine: _Machine) -> bytes:
    """Return the filter as BPF instructions of 8 bytes, each (code, if true, if false, value)."""
    load, equal, at_least, ret = 0x20, 0x15, 0x35, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000  # 0x0005: fail with errno 1, EPERM
    missing = 0x00050026  # errno 38, ENOSYS: the C library then tries clone
    lines: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4),  # architecture of the call
        (equal, 1, 0, machine.audit_arch),
        (ret, 0, 0, kill),
        (load, 0, 0, 0),  # its number
        (at_least, 0, 1, 0x40000000),  # the second set of numbers that x86-64 has
        (ret, 0, 0, refuse),
    ]
    lines += [(equal, 0, 1, _CLONE3), (ret, 0, 0, missing)]
    for number in (*machine.denied.values(), *_DENIED_EVERYWHERE):
        lines += [(equal, 0, 1, number), (ret, 0, 0, refuse)]
    lines.append((ret, 0, 0, allow))
    return b"".join(struct.pack("HBBI", *line) for line in lines)


class _View(NamedTuple):
    """What of the host a sandbox shows.

    Attributes:
        python: The interpreter.
        binds: Files and folders shown at the same path, read-only.
        links: Symbolic links of the root, (place, target).
        masked: Folders shown empty.
    """

    python: str
    binds: tuple[str, ...]
    links: tuple[tuple[str, str], ...]
    masked: tuple[str, ...]


@functools.cache
def _view() -> _View:
    python = Path(sys.executable).resolve()
    folders = [
        path for path in map(Path, ("/usr/lib", "/usr/lib32", "/usr/lib64")) if path.is_dir()
    ]
    links = []
    for path in map(Path, ("/lib", "/lib32", "/lib64")):
        if path.is_symlink():
            links.append((str(path), str(path.readlink())))
        elif path.is_dir():
            folders.append(path)
    prefix = Path(sys.base_prefix).resolve()
    standard = Path(sysconfig.get_path("stdlib")).resolve()
    for path in (prefix / "lib", prefix / "lib64", standard):
        if path.is_dir() and not any(path.is_relative_to(folder) for folder in folders):
            folders.append(path)
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    packages = {standard / "site-packages", Path("/usr/lib/python3/dist-packages")}
    packages |= {Path(sysconfig.get_path(kind, vars=base)) for kind in ("purelib", "platlib")}
    masked = [
        str(path)
        for path in sorted({path.resolve() for path in packages})
        if path.is_dir() and any(path.is_relative_to(folder) for folder in folders)
    ]
    files = [path for path in (python, Path("/etc/ld.so.cache")) if path.exists()]
    return _View(str(python), tuple(map(str, folders + files)), tuple(links), tuple(masked))


@functools.cache
def _lifeline() -> tuple[int, int]:
    """Return a pipe that nobody reads or writes: its reader sees its end when this process dies.

    Death with the parent is a request to the kernel that a sandbox makes while it starts. One whose
    parent died before that would stay for ever, so it looks at this pipe afterwards.
    """
    return os.pipe()


# No site-packages, no script's folder on the path, no byte code written; the environment counts
# for the hash seed.
_PYTHON_OPTIONS = ("-S", "-s", "-P", "-B")


def _program(role: str, limits: Limits, descriptors: Sequence[int]) -> list[str]:
    rlimits = ",".join(f"{name}={value}" for name, value in limits.rlimits().items())
    arguments = [role, rlimits, *map(str, descriptors)]
    return [_view().python, *_PYTHON_OPTIONS, CHILD_IN_SANDBOX, *arguments]


def _binds() -> list[tuple[str, str]]:
    return [(path, path) for path in _view().binds] + [(str(CHILD), CHILD_IN_SANDBOX)]


def _namespaces_command() -> list[str]:
    view, machine = _view(), _MACHINES[platform.machine()]
    settings = {
        "uid": UID,
        "tmp_bytes": TMP_BYTES,
        "binds": _binds(),
        "links": view.links,
        "masked": view.masked,
        "pivot_root": machine.denied["pivot_root"],
        "seccomp": seccomp_program(machine).hex(),
        "environment": ENVIRONMENT,
    }
    return [view.python, *_PYTHON_OPTIONS, str(NAMESPACES), json.dumps(settings)]


def _bubblewrap_command(filter_fd: int) -> list[str]:
    view = _view()
    command = [_bubblewrap() or "bwrap", "--unshare-user", "--unshare-pid", "--unshare-net"]
    command += ["--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", "--hostname", "sandbox"]
    command += ["--uid", str(UID), "--gid", str(UID), "--cap-drop", "ALL"]
    command += ["--die-with-parent", "--new-session", "--clearenv"]
    for name, value in ENVIRONMENT.items():
        command += ["--setenv", name, value]
    for source, target in _binds():
        command += ["--ro-bind", source, target]
    for place, target in view.links:
        command += ["--symlink", target, place]
    for path in view.masked:
        command += ["--size", "4096", "--tmpfs", path, "--remount-ro", path]
    command += ["--perms", "0700", "--size", str(TMP_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    return [*command, "--remount-ro", "/", "--seccomp", str(filter_fd), "--"]


@contextmanager
def _filter_file() -> Iterator[int]:
    """Yield a descriptor from which bubblewrap reads the filter; it closes it."""
    descriptor = os.memfd_create("seccomp")
    try:
        os.write(descriptor, seccomp_program(_MACHINES[platform.machine()]))
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def start(
    level: Level,
    role: Literal["candidate", "checker"],
    limits: Limits,
    *,
    stdin: int,
    stdout: int,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start `child.py` in a sandbox; what it prints to standard error is lost.

    Args:
        level: How to isolate it.
        role: Its first argument.
        limits: All but the wall limit, which is the caller's to enforce.
        stdin: As for `subprocess.Popen`.
        stdout: As for `subprocess.Popen`.
        pass_fds: Further descriptors it inherits; their numbers become its last arguments.
    """
    pass_fds = (_lifeline()[0], *pass_fds)
    program = _program(role, limits, pass_fds)
    with ExitStack() as stack:
        if level == "bubblewrap":
            filter_fd = stack.enter_context(_filter_file())
            pass_fds = (*pass_fds, filter_fd)
            command = _bubblewrap_command(filter_fd)
        else:
            command = _namespaces_command()
        return subprocess.Popen(
            [*command, *program],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            pass_fds=pass_fds,
            env=ENVIRONMENT,
            cwd="/",
        )


def _bubblewrap() -> str | None:
    return shutil.which("bwrap")


@functools.cache
def _works(level: Level) -> bool:
    """Tell whether a program in a sandbox of this level starts and answers; found by trying."""
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        return False
    if level == "bubblewrap" and _bubblewrap() is None:
        return False
    program = frame({"program": "def f(): pass", "entry_point": "f"})
    process = start(level, "candidate", Limits(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        answer, _ = process.communicate(program, timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return False
    return b"returned" in answer


def available_levels() -> tuple[Level, ...]:
    """Return the levels that work here, the preferred one first."""
    return tuple(level for level in LEVELS if _works(level))


def level() -> Level | None:
    """Return the level in use, None if generated code cannot be run here."""
    return next((level for level in LEVELS if _works(level)), None)


def require_level() -> Level:
    """Return the level in use.

    Raises:
        Unsupported: There is none; the message names the package to install.
    """
    if (found := level()) is None:
        raise Unsupported(
            "generated code runs only in a sandbox, and this machine offers none: install the "
            "package 'bubblewrap' (apt-get install bubblewrap), or allow unprivileged user "
            "namespaces on a Linux of at least 5.13 with Landlock (x86-64 or aarch64)."
        )
    return found
