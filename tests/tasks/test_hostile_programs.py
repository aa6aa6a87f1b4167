"""Programs that attack: each is found out, in bounded time, and the machine is none the worse."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.code_scoring import Verdict, check, check_many
from tasks.sandbox import LEVELS, Level, Limits, available_levels
from tests.tasks.hostile_programs import ATTACKS, PROBLEM, Attack

# The odd size marks our processes: it stands in their command line.
MARK = (8 << 20) + os.getpid()
LIMITS = Limits(cpu_seconds=1, wall_seconds=6, memory_bytes=256 << 20, file_bytes=MARK)


def _our_processes() -> list[str]:
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = file.read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if b"child.py" in command and str(MARK).encode() in command:
            found.append(file.parent.name)
    return found


@pytest.fixture(scope="module", params=LEVELS)
def level(request: pytest.FixtureRequest) -> Level:
    if request.param not in available_levels():
        assert available_levels(), "no sandbox works here; hostile programs were not tested"
        pytest.skip(f"'{request.param}' does not work here; {available_levels()} is tested")
    found: Level = request.param
    return found


@pytest.fixture(scope="module")
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield server


@pytest.fixture(scope="module")
def verdicts(
    level: Level, listener: socket.socket, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Verdict]:
    """All attacks at once, with something to aim at."""
    secret = tmp_path_factory.mktemp("home") / "secret"
    secret.write_text("a secret")
    targets = {
        "port": listener.getsockname()[1],
        "secret": str(secret),
        "checkout": __file__,
        "variable": "TOKENMARK_SECRET",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENMARK_SECRET", "a secret")
        found = check_many(
            [(PROBLEM, attack.aimed(**targets)) for attack in ATTACKS],
            limits=LIMITS,
            level=level,
            workers=3,
        )
    assert secret.read_text() == "a secret"
    return dict(zip((attack.name for attack in ATTACKS), found, strict=True))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name.replace(" ", "-"))
def test_attack_comes_to_nothing(verdicts: dict[str, Verdict], attack: Attack) -> None:
    verdict = verdicts[attack.name]
    assert verdict.outcome in attack.outcomes, verdict


def test_right_program_passes_under_the_same_limits(level: Level) -> None:
    verdict = check(PROBLEM, PROBLEM.reference, limits=LIMITS, level=level)
    assert verdict.passed, verdict
    assert verdict.level == level


def test_no_process_outlives_its_check(verdicts: dict[str, Verdict]) -> None:
    deadline = time.monotonic() + 5
    while (left := _our_processes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert verdicts
    assert not left


def test_nobody_called_from_the_sandbox(
    verdicts: dict[str, Verdict], listener: socket.socket
) -> None:
    with pytest.raises(BlockingIOError):
        listener.accept()
    assert "network" in verdicts


def test_a_sleeper_is_ended_at_the_wall_limit(level: Level) -> None:
    limits = Limits(cpu_seconds=1, wall_seconds=1.0)
    begin = time.monotonic()
    verdict = check(PROBLEM, "\n    import time\n    time.sleep(60)", limits=limits, level=level)
    assert verdict.outcome == "timeout"
    assert time.monotonic() - begin < 10
