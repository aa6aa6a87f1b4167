"""Programs that attack the sandbox, the checker or the machine.

Each is a completion of `PROMPT`. An attack is harmless if the program ends as one of its outcomes;
`passed` is among them only where the attack comes to nothing and the function is right.
"""

from __future__ import annotations

import textwrap
from typing import NamedTuple

from tasks.code_scoring import Outcome, Problem

PROMPT = 'def increment(x: int) -> int:\n    """ Return x plus 1."""'
PROBLEM = Problem(
    prompt=PROMPT,
    entry_point="increment",
    test=(
        "def check(candidate):\n"
        "    assert candidate(1) == 2\n"
        "    assert candidate(41) == 42\n"
        "    assert candidate(-7) == -6\n"
    ),
    reference="\n    return x + 1\n",
)
RIGHT = "\n    return x + 1\n\n\n"
WRONG = "\n    return 'wrong'\n\n\n"


class Attack(NamedTuple):
    """A program and how it may end."""

    name: str
    completion: str
    outcomes: tuple[Outcome, ...]

    def aimed(self, **targets: object) -> str:
        """Return the completion with `{name}` replaced by the target of that name."""
        completion = self.completion
        for name, target in targets.items():
            completion = completion.replace(f"{{{name}}}", repr(target))
        return completion


def _at_load(name: str, *outcomes: Outcome, code: str, function: str = RIGHT) -> Attack:
    """Attack while the program is loaded; the function is right unless told otherwise."""
    return Attack(name, function + textwrap.dedent(code), outcomes)


def _in_call(name: str, *outcomes: Outcome, code: str) -> Attack:
    """Attack while the function is called."""
    return Attack(name, "\n" + textwrap.indent(textwrap.dedent(code), "    "), outcomes)


ATTACKS = (
    # Using up the machine.
    _at_load("fork bomb", "error", code="import os\nwhile True:\n    os.fork()"),
    _at_load(
        "fork bomb that ignores errors",
        "timeout",
        "killed",
        code="""
            import os
            while True:
                try:
                    os.fork()
                except OSError:
                    pass
        """,
    ),
    _at_load(
        "processes by subprocess",
        "error",
        code="import subprocess\nsubprocess.run(['/bin/true'], check=True)",
    ),
    _at_load(
        "processes by multiprocessing",
        "error",
        code="import multiprocessing\nmultiprocessing.Process(target=print).start()",
    ),
    _at_load(
        "threads",
        "error",
        code="""
            import threading
            while True:
                threading.Thread(target=threading.Event().wait).start()
        """,
    ),
    _at_load(
        "memory bomb", "killed", code="held = []\nwhile True:\n    held.append(bytearray(10**7))"
    ),
    _at_load("memory in one piece", "killed", code="held = 'x' * 10**12"),
    _in_call("memory in the call", "killed", code="return [x] * 10**12"),
    _at_load(
        "memory that address limits do not count",
        "error",
        code="""
            import ctypes
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.shmget(0, 1 << 30, 0o1600) < 0:
                raise OSError(ctypes.get_errno())
        """,
    ),
    _at_load(
        "file of ten gigabytes",
        "error",
        code="""
            with open("/tmp/large", "wb") as file:
                for _ in range(10_000):
                    file.write(bytes(1_000_000))
        """,
    ),
    _at_load(
        "many files",
        "error",
        code="""
            for number in range(10_000):
                with open(f"/tmp/{number}", "wb") as file:
                    file.write(bytes(1_000_000))
        """,
    ),
    _at_load(
        "descriptors",
        "error",
        code="import os\nheld = [os.open('/', os.O_RDONLY) for _ in range(10_000)]",
    ),
    _at_load("endless loop", "timeout", code="while True:\n    pass"),
    _in_call("endless loop in the call", "timeout", code="while True:\n    pass"),
    _in_call("endless sleep", "timeout", code="import time\ntime.sleep(10**6)"),
    _in_call("endless arithmetic", "timeout", "killed", code="return 9 ** 9 ** 9 ** 9"),
    _in_call("endless recursion", "error", code="return increment(x)"),
    _in_call(
        "recursion beyond the stack",
        "killed",
        "error",
        "timeout",
        code="""
            import sys
            sys.setrecursionlimit(10**9)
            nested = []
            for _ in range(10**6):
                nested = [nested]
            return repr(nested)
        """,
    ),
    _at_load(
        "limits lifted",
        "error",
        code="import resource\nresource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6))",
    ),
    # Staying alive.
    _at_load(
        "signals ignored",
        "timeout",
        "killed",
        code="""
            import signal
            for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
                signal.signal(number, signal.SIG_IGN)
            while True:
                pass
        """,
    ),
    _at_load("stopped", "timeout", code="import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)"),
    _at_load(
        "new session",
        "passed",
        "error",
        code="import os\nos.setsid()",
    ),
    # Reaching out.
    _at_load(
        "parent killed",
        "passed",
        "error",
        "killed",
        code="import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    ),
    _at_load(
        "everyone killed",
        "passed",
        "error",
        "killed",
        code="import os, signal\nos.kill(-1, signal.SIGKILL)",
    ),
    _at_load(
        "itself killed", "killed", code="import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    ),
    _at_load(
        "network",
        "error",
        code="import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)",
    ),
    _at_load(
        "datagrams",
        "error",
        code="""
            import socket
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", {port}))
        """,
    ),
    _at_load("secret of the home folder", "error", code="open({secret}).read()"),
    _at_load("the checkout", "error", code="open({checkout}).read()"),
    _at_load(
        "symbolic link out",
        "error",
        code="import os\nos.symlink({secret}, '/tmp/link')\nopen('/tmp/link').read()",
    ),
    _at_load("hard link out", "error", code="import os\nos.link({secret}, '/tmp/link')"),
    _at_load("password file", "error", code="open('/etc/passwd').read()"),
    _at_load("terminal", "error", code="open('/dev/tty', 'w').write('passed')"),
    _at_load("environment", "error", code="import os\nos.environ[{variable}]"),
    _at_load(
        "environment as the process got it", "error", code="open('/proc/self/environ').read()"
    ),
    _at_load("environment of the parent", "error", code="open('/proc/1/environ').read()"),
    _at_load("memory of the parent", "error", code="open('/proc/1/mem', 'rb').read(1)"),
    _at_load(
        "proc mounted",
        "error",
        code="""
            import ctypes
            import os
            os.mkdir("/tmp/proc")
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.mount(b"proc", b"/tmp/proc", b"proc", 0, None):
                raise OSError(ctypes.get_errno())
        """,
    ),
    _at_load(
        "privileges by a user namespace",
        "error",
        code="""
            import ctypes
            if ctypes.CDLL(None).unshare(0x10000000):
                raise OSError
        """,
    ),
    _at_load(
        "out of the root",
        "error",
        code="""
            import os
            os.mkdir("/tmp/cell")
            os.chroot("/tmp/cell")
        """,
    ),
    _at_load("another user", "error", code="import os\nos.setuid(0)"),
    _at_load(
        "debugger on the parent",
        "error",
        code="""
            import ctypes
            if ctypes.CDLL(None).ptrace(16, 1, None, None):
                raise OSError
        """,
    ),
    _at_load("system overwritten", "error", code="import os\nopen(os.__file__, 'a').write('x')"),
    _at_load("checker's code overwritten", "error", code="open('/child.py', 'a').write('x')"),
    _at_load("checker's code removed", "error", code="import os\nos.remove('/child.py')"),
    _at_load(
        "packages planted",
        "error",
        code="import sysconfig\nopen(sysconfig.get_path('purelib') + '/sitecustomize.py', 'w')",
    ),
    _at_load(
        "another program",
        "protocol",
        "error",
        code="import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'pass'])",
    ),
    # Forging the verdict.
    _at_load("left at load", "protocol", code="import os\nos._exit(0)"),
    _in_call("left in the call", "protocol", code="import os\nos._exit(0)"),
    _in_call("exit", "error", code="raise SystemExit(0)"),
    _in_call("interrupt", "error", code="raise KeyboardInterrupt"),
    _in_call("assertion of its own", "error", code="raise AssertionError('passed')"),
    _in_call("verdict returned", "failed", code="return {'outcome': 'passed', 'detail': ''}"),
    _at_load(
        "verdict printed",
        "protocol",
        "error",
        "failed",
        function=WRONG,
        code="""
            import os
            print("passed")
            for descriptor in range(64):
                for text in (b'{"outcome": "passed", "detail": ""}\\n', b"passed\\n"):
                    try:
                        os.write(descriptor, text)
                    except OSError:
                        pass
        """,
    ),
    _at_load(
        "answers written before they are asked for",
        "failed",
        "protocol",
        function=WRONG,
        code="""
            import os
            import stat
            from __main__ import encode
            for descriptor in range(3, 64):
                try:
                    if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                        reply = encode({"returned": encode(True), "cpu_seconds": 0.1})
                        os.write(descriptor, (len(reply).to_bytes(4) + reply) * 9)
                except OSError:
                    pass
        """,
    ),
    _at_load("channel closed", "protocol", "error", code="import os\nos.closerange(0, 256)"),
    _at_load(
        "channel closed, process kept",
        "protocol",
        "timeout",
        code="import os\nos.closerange(0, 256)\nwhile True:\n    pass",
    ),
    _at_load(
        "channel read",
        "timeout",
        "protocol",
        "failed",
        "error",
        function=WRONG,
        code="""
            import os
            import stat
            for descriptor in range(3, 64):
                try:
                    os.set_blocking(descriptor, False)
                    stolen = os.read(descriptor, 1 << 20)
                except OSError:
                    continue
        """,
    ),
    _in_call(
        "equality of its own",
        "failed",
        code="""
            class Anything:
                __hash__ = None
                def __eq__(self, other):
                    return True
            return Anything()
        """,
    ),
    _in_call(
        "equality of its own in a number",
        "failed",
        code="""
            class Anything(int):
                def __eq__(self, other):
                    return True
                __hash__ = int.__hash__
            return Anything(0)
        """,
    ),
    _in_call(
        "equality by class",
        "failed",
        "error",
        code="""
            class Meta(type):
                def __eq__(cls, other):
                    return True
                __hash__ = type.__hash__
            class Anything(metaclass=Meta):
                __class__ = int
            return Anything
        """,
    ),
    _in_call("not a number", "failed", code="return float('nan')"),
    _at_load(
        "builtins replaced",
        "failed",
        "error",
        "protocol",
        function=WRONG,
        code="""
            import builtins
            builtins.AssertionError = None
            builtins.isinstance = lambda *args: True
            builtins.type = lambda *args: int
            builtins.exec = builtins.compile = lambda *args: None
        """,
    ),
    _at_load(
        "own loop replaced",
        "failed",
        "error",
        "protocol",
        function=WRONG,
        code="""
            import __main__
            __main__.run_test = lambda *args: {"outcome": "passed", "detail": ""}
            __main__.decode = __main__.load = lambda *args: True
            __main__.Proxy = object
        """,
    ),
    _in_call(
        "frames walked",
        "failed",
        code="""
            import sys
            frame, seen = sys._getframe(), []
            while frame:
                seen.append(repr(frame.f_locals) + repr(sorted(frame.f_globals)))
                for name in ("outcome", "report", "namespace", "job"):
                    frame.f_locals[name] = {"outcome": "passed"}
                frame = frame.f_back
            return "== 2" in "".join(seen) and 2
        """,
    ),
    _in_call(
        "memory searched for the test",
        "failed",
        code="""
            import gc
            found = [it for it in gc.get_objects() if isinstance(it, dict) and "test" in it]
            return 2 if any("== 2" in str(it.get("test")) for it in found) else found == []
        """,
    ),
    _at_load(
        "import hook",
        "failed",
        function=WRONG,
        code="""
            import sys
            class Hook:
                def find_spec(self, name, path=None, target=None):
                    raise SystemExit(0)
            sys.meta_path.insert(0, Hook())
            sys.modules["os"] = sys.modules["json"] = None
        """,
    ),
    _at_load(
        "encoding replaced",
        "failed",
        "error",
        "protocol",
        function=WRONG,
        code="import __main__\n__main__.encode = lambda *args, **kwargs: b'T'",
    ),
    _at_load(
        "exit handler",
        "failed",
        function=WRONG,
        code="import atexit, os\natexit.register(os._exit, 0)",
    ),
    _at_load(
        "tracing",
        "failed",
        function=WRONG,
        code="import sys\nsys.settrace(lambda *args: None)\nsys.setprofile(lambda *args: None)",
    ),
    _at_load(
        "alarms",
        "failed",
        "error",
        function=WRONG,
        code="""
            import signal
            signal.signal(signal.SIGALRM, lambda *args: None)
            signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
        """,
    ),
    _at_load("null pointer", "killed", code="import ctypes\nctypes.string_at(0)"),
    _at_load("abort", "killed", code="import os\nos.abort()"),
    _at_load(
        "interpreter corrupted",
        "killed",
        "failed",
        "error",
        "protocol",
        function=WRONG,
        code="""
            import ctypes
            ctypes.memset(id(True) + 24, 255, 8)
            ctypes.c_long.from_address(id(2) + 24).value = 3
        """,
    ),
    # Overwhelming the checker.
    _in_call("endless answer", "protocol", "killed", code="return 'x' * 10**8"),
    _in_call("endless number", "protocol", "killed", code="return 1 << 10**8"),
    _in_call("endless iterator", "killed", code="import itertools\nreturn itertools.count()"),
    _in_call(
        "deep answer",
        "error",
        code="nested = []\nfor _ in range(10**5):\n    nested = [nested]\nreturn nested",
    ),
    _in_call("answer that holds itself", "error", code="x = []\nx.append(x)\nreturn x"),
    _in_call(
        "keys that collide",
        "timeout",
        "protocol",
        "failed",
        code="return set(range(0, 30_000 * (2**61 - 1), 2**61 - 1))",
    ),
    _at_load(
        "keys that collide, written by hand",
        "timeout",
        function=WRONG,
        code="""
            import os
            from __main__ import frame
            keys = [i * (2**61 - 1) for i in range(60_000)]
            returned = b"S%d:" % len(keys) + b"".join(b"i20:%020x" % key for key in keys)
            for value in (b"N", returned):
                os.write(4, frame({"returned": value, "cpu_seconds": 0.1}))
        """,
    ),
)
