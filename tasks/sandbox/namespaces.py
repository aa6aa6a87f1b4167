"""The sandbox without bubblewrap: namespaces, a new root, Landlock and seccomp, by ctypes alone.

Run as a script by `tasks.sandbox.isolation`, `python namespaces.py SETTINGS COMMAND…`. It becomes
three processes: this one, which waits; process 1 of a new pid namespace, whose death ends all in
it; and the command. Each dies with the one before.

Follows what bubblewrap does (two pivots of the root, so that no path of the host stays reachable)
and adds Landlock, so that a mistake in one of the two does not open the file system.
"""

# Without pathlib: its import would take a third of this script's time, at every check.
import ctypes
import json
import os
import signal
import struct
import sys

CLONE_FLAGS = (
    0x00020000  # mount
    | 0x02000000  # cgroup
    | 0x04000000  # uts
    | 0x08000000  # ipc
    | 0x10000000  # user
    | 0x20000000  # pid
    | 0x40000000  # net
)
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_READ_ONLY, MOUNT_NO_SUID, MOUNT_NO_DEVICES = 0x1, 0x2, 0x4
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
# These numbers are the same on all architectures, as for every call added since Linux 5.1.
SYS_MOUNT_SETATTR = 442
SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT = 444, 445, 446
LANDLOCK_READ = 0x1 | 0x4 | 0x8  # execute, read a file, list a folder
# Rights known to each version of Landlock, from the first; the fourth and sixth added networks and
# scopes instead of files.
LANDLOCK_FILE_RIGHTS = (0x1FFF, 0x3FFF, 0x7FFF, 0x7FFF, 0xFFFF)

libc = ctypes.CDLL(None, use_errno=True)


def call(name, *args):
    """Call a function of the C library; a failure becomes OSError with the name in it."""
    result = getattr(libc, name)(
        *(ctypes.c_char_p(arg) if isinstance(arg, bytes) else arg for arg in args)
    )
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result


def syscall(number, *args):
    """Make a system call that the C library may not know."""
    return call("syscall", ctypes.c_long(number), *args)


def pivot_root(new, old, number):
    """Make the mount `new` the root and hang the old root at `old`."""
    syscall(number, new.encode(), old.encode())


def write(path, text):
    """Write a file of /proc."""
    with open(path, "w") as file:
        file.write(text)


def enter_namespaces(uid):
    """Leave all namespaces of the parent and become an unprivileged user in the new ones."""
    outer_uid, outer_gid = os.geteuid(), os.getegid()
    call("unshare", CLONE_FLAGS)
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"{uid} {outer_uid} 1")
    write("/proc/self/gid_map", f"{uid} {outer_gid} 1")
    call("sethostname", b"sandbox", 7)


def build_root(settings):
    """Replace the root by an empty one that shows only what the settings name, read-only."""
    size = f"size={settings['tmp_bytes']},mode=0700".encode()
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    call("mount", b"tmpfs", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV, b"size=1m,mode=0755")
    os.mkdir("/tmp/new")
    os.mkdir("/tmp/old")
    pivot_root("/tmp", "/tmp/old", settings["pivot_root"])
    os.chdir("/")
    call("mount", b"/new", b"/new", None, MS_BIND, None)
    for source, target in settings["binds"]:
        place = f"/new{target}"
        if os.path.isdir(f"/old{source}"):
            os.makedirs(place, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o644))
        call("mount", f"/old{source}".encode(), place.encode(), None, MS_BIND | MS_REC, None)
    for target, link in settings["links"]:
        os.symlink(link, f"/new{target}")
    for target in settings["masked"]:
        call("mount", b"tmpfs", f"/new{target}".encode(), b"tmpfs", 0, b"size=4k")
    os.mkdir("/new/tmp")
    attributes = struct.pack("QQQQ", MOUNT_READ_ONLY | MOUNT_NO_SUID | MOUNT_NO_DEVICES, 0, 0, 0)
    syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/new", AT_RECURSIVE, attributes, len(attributes))
    call("mount", b"tmpfs", b"/new/tmp", b"tmpfs", MS_NOSUID | MS_NODEV, size)
    call("umount2", b"/old", MNT_DETACH)
    os.chdir("/new")
    # The old root comes to lie on top of the new one at the same place, and is taken off.
    pivot_root(".", ".", settings["pivot_root"])
    call("umount2", b".", MNT_DETACH)
    os.chdir("/tmp")


def restrict_files():
    """Let Landlock allow reading below / and everything below /tmp; no network, no scope left."""
    version = syscall(SYS_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    every_right = LANDLOCK_FILE_RIGHTS[min(version, len(LANDLOCK_FILE_RIGHTS)) - 1]
    network = 0x3 if version >= 4 else 0
    scope = 0x3 if version >= 6 else 0
    rules = struct.pack("QQQ", every_right, network, scope)
    rules_fd = syscall(SYS_LANDLOCK_CREATE, rules, ctypes.c_size_t(len(rules)), 0)
    for path, rights in (("/", LANDLOCK_READ), ("/tmp", every_right)):
        path_fd = os.open(path, os.O_PATH)
        syscall(SYS_LANDLOCK_ADD, rules_fd, 1, struct.pack("=Qi", rights, path_fd), 0)
        os.close(path_fd)
    syscall(SYS_LANDLOCK_RESTRICT, rules_fd, 0)
    os.close(rules_fd)


def restrict_calls(program):
    """Install the seccomp filter, an array of 8-byte BPF instructions."""
    buffer = ctypes.create_string_buffer(program, len(program))
    filter_program = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filter_program, 0, 0)


def wait_for(pid):
    """Return how a child ended, as a shell would: its status, or 128 and the signal."""
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def main(settings, command):
    """Build the sandbox and run the command in it."""
    os.setsid()
    enter_namespaces(settings["uid"])
    # After that, for a change of user takes it back.
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    first = os.fork()
    if first:
        os._exit(wait_for(first))
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    build_root(settings)
    second = os.fork()
    if second:
        os._exit(wait_for(second))
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    restrict_files()
    restrict_calls(bytes.fromhex(settings["seccomp"]))
    os.execve(command[0], command, settings["environment"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2:])
