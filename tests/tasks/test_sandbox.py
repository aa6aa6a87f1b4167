"""How values travel, what the sandbox shows, and what it says where there is none."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import struct
import subprocess
import sys
from collections import Counter, OrderedDict, deque, namedtuple
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.base import Unsupported
from tasks.code_scoring import Problem, check
from tasks.sandbox import LEVELS, Level, Limits, available_levels, child, isolation, require_level

LIMITS = Limits()

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**5000, max_value=10**5001)
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text(st.characters())  # lone surrogates included
    | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.integers() | st.text(), inner)
    ),
    max_leaves=12,
)


def _types(value: Any) -> Any:
    """Return the types of a nested value; == alone takes 1, 1.0 and True for the same."""
    if isinstance(value, (list, tuple)):
        return type(value), [_types(item) for item in value]
    if isinstance(value, dict):
        return type(value), [(_types(key), _types(item)) for key, item in value.items()]
    return type(value)


def _travel(value: Any) -> Any:
    return child.decode(child.encode(value))


@given(plain)
def test_plain_values_arrive_as_themselves(value: Any) -> None:
    arrived = _travel(value)
    assert arrived == value
    assert _types(arrived) == _types(value)


@given(st.sets(st.integers() | st.text()))
def test_sets_arrive_as_themselves(value: set[Any]) -> None:
    assert _travel(value) == value
    assert _travel(frozenset(value)) == value
    assert isinstance(_travel(frozenset(value)), frozenset)


@given(st.floats())
def test_floats_arrive_to_the_bit(value: float) -> None:
    arrived = _travel(value)
    if math.isnan(value):
        assert math.isnan(arrived)
    else:
        assert struct.pack("d", arrived) == struct.pack("d", value)


@pytest.mark.parametrize(
    "value", [range(3, 30, 4), Fraction(-1, 3), Decimal("0.10"), Decimal("NaN").copy_abs]
)
def test_numbers_of_the_library_arrive(value: Any) -> None:
    if callable(value):
        assert isinstance(_travel(value), child.Foreign)
    else:
        assert _travel(value) == value
        assert type(_travel(value)) is type(value)


class Anything(int):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


@pytest.mark.parametrize(
    ("value", "arrives"),
    [
        (Counter("aab"), {"a": 2, "b": 1}),
        (OrderedDict(x=1), {"x": 1}),
        (namedtuple("Pair", "left right")(1, 2), (1, 2)),
        (Anything(7), 7),
        (type("Text", (str,), {"__eq__": lambda *_: True, "__hash__": str.__hash__})("a"), "a"),
    ],
)
def test_a_subclass_arrives_as_the_builtin_value_it_holds(value: Any, arrives: Any) -> None:
    arrived = _travel(value)
    assert type(arrived) is type(arrives)
    assert arrived == arrives


@pytest.mark.parametrize(
    "value", [iter([1, 2]), (x for x in (1, 2)), deque([1, 2]), {1: 0, 2: 0}.keys()]
)
def test_other_iterables_can_be_iterated_and_equal_nothing(value: Any) -> None:
    arrived = _travel(value)
    assert list(arrived) == [1, 2]
    assert arrived != [1, 2]


def test_an_endless_iterator_is_given_up() -> None:
    with pytest.raises(MemoryError, match="100000 items"):
        child.encode(itertools.count())


def test_an_argument_without_a_plain_value_is_refused() -> None:
    with pytest.raises(TypeError, match="type function cannot be handed"):
        child.encode([lambda: None], strict=True)


@given(st.binary() | st.text("NTFsifbDOltSZdcrqI0123456789:-_ xe.", max_size=30).map(str.encode))
def test_malformed_messages_are_a_protocol_error_and_nothing_else(data: bytes) -> None:
    with contextlib.suppress(child.ProtocolError):
        child.decode(data)


@given(plain, st.data())
def test_damaged_messages_are_a_protocol_error_or_another_value(
    value: Any, data: st.DataObject
) -> None:
    message = bytearray(child.encode(value))
    message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(child.ProtocolError):
        child.decode(bytes(message))
    with pytest.raises(child.ProtocolError):
        child.decode(child.encode(value)[:-1])


@pytest.mark.parametrize(
    "data", [b"", b"l999999999:", b"i3:1", b"l1:" * 10**5, b"d1:N", b"NN", b"x1:a", b"S1:l0:"]
)
def test_known_damage_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(child.ProtocolError):
        child.decode(data)


def test_a_message_that_is_too_long_is_not_read() -> None:
    read_fd, write_fd = os.pipe()
    os.write(write_fd, (child.MAX_MESSAGE_BYTES + 1).to_bytes(4))
    with pytest.raises(child.ProtocolError, match="longer than"):
        child.Channel(read_fd, write_fd).receive()
    os.close(read_fd)
    os.close(write_fd)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("x"), ValueError),
        (UnicodeDecodeError("utf8", b"", 0, 1, "x"), UnicodeError),
        (type("Own", (KeyError,), {})("x"), KeyError),
        (type("Other", (Exception,), {})("x"), Exception),
        (SystemExit(0), SystemExit),
    ],
)
def test_an_exception_arrives_as_its_nearest_builtin(error: BaseException, kind: type) -> None:
    reply = child.describe_exception(error)
    assert type(child.rebuild_exception(reply["raised"], reply["text"])) in (kind, ValueError)


def test_a_name_that_is_no_exception_is_a_protocol_error() -> None:
    with pytest.raises(child.ProtocolError):
        child.rebuild_exception(["print", "int", "Nonesuch"], "x")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Level:
    if request.param not in available_levels():
        assert available_levels(), "no sandbox works on this machine"
        pytest.skip(f"'{request.param}' does not work here; {available_levels()} is tested")
    found: Level = request.param
    return found


LOOK_AROUND = """
    import os, sys, sysconfig
    descriptors = []
    for number in range(3, 64):
        try:
            os.fstat(number)
            descriptors.append(number)
        except OSError:
            pass
    visible = [
        os.path.join(folder, name)
        for top in ("/root", "/home", "/tmp", "/proc", "/dev", "/sys", "/etc", "/run")
        for folder, folders, files in os.walk(top)
        for name in files
        if not folder.startswith(sys.base_prefix)
    ]
    status = {
        "environment": dict(os.environ),
        "descriptors": len(descriptors),
        "visible": visible,
        "packages": os.listdir(sysconfig.get_path("purelib")),
        "uid": os.getuid(),
        "pid": os.getpid(),
        "path": [place for place in sys.path if "packages" in place],
        "writable": [place for place in ("/", "/usr/lib", "/etc", sys.base_prefix, "/tmp")
                     if os.access(place, os.W_OK)],
        "host": os.uname().nodename,
        "home": os.path.exists(%r),
    }
    return status
"""


def _observe(level: Level, body: str) -> Any:
    """Return what a function finds in the sandbox, by way of the test's failure."""
    problem = Problem(
        prompt='def look():\n    """Look around."""',
        entry_point="look",
        test=(
            "def check(candidate):\n"
            "    import json\n    raise ValueError(json.dumps(candidate()))\n"
        ),
        reference="",
    )
    verdict = check(problem, body, limits=LIMITS, level=level)
    assert verdict.outcome == "error", verdict
    return json.loads(verdict.detail.removeprefix("ValueError: "))


def test_the_sandbox_shows_nothing_but_python(level: Level) -> None:
    assert _observe(level, LOOK_AROUND % str(Path(__file__).parent)) == {
        "environment": {},
        "descriptors": 2,  # the channel
        "visible": ["/etc/ld.so.cache"] if Path("/etc/ld.so.cache").exists() else [],
        "packages": [],
        "uid": isolation.UID,
        "pid": 2,
        "path": [],
        "writable": ["/tmp"],
        "host": "sandbox",
        "home": False,
    }


def test_the_kernel_confirms_the_restrictions(level: Level) -> None:
    body = (
        "\n    import ctypes\n    libc = ctypes.CDLL(None, use_errno=True)\n"
        "    return [libc.prctl(39, 0, 0, 0, 0), libc.prctl(21, 0, 0, 0, 0)]\n"
    )
    # PR_GET_NO_NEW_PRIVS is set; PR_GET_SECCOMP says that a filter is at work.
    assert _observe(level, body) == [1, 2]


def test_strings_hash_the_same_in_every_run(level: Level) -> None:
    body = "\n    return [hash('tokenmark'), list({'a', 'b', 'c', 'd', 'e'})]\n"
    assert _observe(level, body) == _observe(level, body)


def test_a_killed_harness_leaves_no_candidate_behind(level: Level, tmp_path: Path) -> None:
    mark = (8 << 20) + os.getpid() * 3
    script = (
        "from tasks.code_scoring import Problem, check\nfrom tasks.sandbox import Limits\n"
        "problem = Problem(prompt='def f():', entry_point='f', test='', reference='')\n"
        f"check(problem, ' pass\\nimport time\\ntime.sleep(60)', level={level!r},\n"
        f"      limits=Limits(file_bytes={mark}, wall_seconds=60))\n"
    )
    harness = subprocess.Popen([sys.executable, "-c", script])

    def running() -> list[Path]:
        return [file for file in Path("/proc").glob("[0-9]*/cmdline") if _mentions(file, mark)]

    _wait_until(lambda: len(running()) >= 2)
    harness.kill()
    harness.wait()
    _wait_until(lambda: not running())


def _mentions(file: Path, mark: int) -> bool:
    try:
        command = file.read_bytes()
    except OSError:
        return False
    return f"FSIZE={mark}".encode() in command


def _wait_until(condition: Any, seconds: float = 20.0) -> None:
    import time

    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_without_a_sandbox_the_task_refuses_and_names_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(isolation, "_works", lambda level: False)
    assert isolation.level() is None
    with pytest.raises(Unsupported, match="apt-get install bubblewrap"):
        require_level()


def test_bubblewrap_is_preferred() -> None:
    assert isolation.LEVELS[0] == "bubblewrap"
    assert isolation.level() == available_levels()[0]


def test_a_level_that_does_not_work_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_bubblewrap", lambda: "/bin/false")
    assert not isolation._works.__wrapped__("bubblewrap")  # without its cache
    monkeypatch.setattr(isolation, "_bubblewrap", lambda: None)
    assert not isolation._works.__wrapped__("bubblewrap")


@pytest.mark.parametrize("machine", isolation._MACHINES.values(), ids=isolation._MACHINES)
def test_the_filter_jumps_only_inside_itself(machine: Any) -> None:
    program = isolation.seccomp_program(machine)
    lines = list(struct.iter_unpack("HBBI", program))
    for number, (code, if_true, if_false, _) in enumerate(lines):
        if code & 0x07 == 0x05:
            assert number + 1 + max(if_true, if_false) < len(lines)
    assert lines[-1] == (0x06, 0, 0, 0x7FFF0000)


def _filtered(machine: Any, arch: int, number: int) -> int:
    """Interpret the filter: an oracle for what it lets through."""
    lines = list(struct.iter_unpack("HBBI", isolation.seccomp_program(machine)))
    at, loaded = 0, 0
    while True:
        code, if_true, if_false, value = lines[at]
        at += 1
        if code == 0x20:
            loaded = {0: number, 4: arch}[value]
        elif code == 0x15:
            at += if_true if loaded == value else if_false
        elif code == 0x35:
            at += if_true if loaded >= value else if_false
        else:
            assert code == 0x06
            return value


@pytest.mark.parametrize("machine", isolation._MACHINES.values(), ids=isolation._MACHINES)
def test_the_filter_refuses_what_it_lists_and_nothing_else(machine: Any) -> None:
    refused = {*machine.denied.values(), *isolation._DENIED_EVERYWHERE}
    for number in range(500):
        verdict = _filtered(machine, machine.audit_arch, number)
        if number in refused:
            assert verdict == 0x00050001
        elif number == 435:
            assert verdict == 0x00050026
        else:
            assert verdict == 0x7FFF0000
    assert _filtered(machine, 0x40000003, 1) == 0x80000000
    assert _filtered(machine, machine.audit_arch, 0x40000000 + 57) == 0x00050001


@pytest.mark.parametrize(
    "setting", [{"cpu_seconds": 0}, {"wall_seconds": -1.0}, {"memory_bytes": 0}]
)
def test_limits_must_be_positive(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        Limits(**setting)
