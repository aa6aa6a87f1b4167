"""Programs of rivals: their environments are made by command only, and what they say comes back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from models import peers
from models.base import Unsupported
from models.peers import Peer, PeerError, PeerProcess

# Adds up the bytes that follow a message; ends in disgrace when it is told to.
ADDER = """
import json, sys
from multiprocessing.connection import Connection
line = Connection(int(sys.argv[1]))
line.send_bytes(json.dumps({"versions": {"adder": "1.0"}}).encode())
while True:
    try:
        message = json.loads(line.recv_bytes())
    except EOFError:
        break
    if message["do"] == "fail":
        print("no more sums")
        sys.exit(3)
    line.send_bytes(json.dumps({"sum": sum(line.recv_bytes()) * message["times"]}).encode())
"""


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Peer:
    monkeypatch.setattr(peers, "PEERS", tmp_path / "peers")
    program = tmp_path / "adder.py"
    program.write_text(ADDER, encoding="utf-8")
    return Peer(name="adder", requirements=("adder==1.0",), program=program, maker="methods.adder")


def adder(peer: Peer) -> PeerProcess:
    return PeerProcess(peer.name, [sys.executable, "-P", str(peer.program)], peer.program.parent)


def test_messages_and_bytes_go_there_and_answers_come_back(peer: Peer) -> None:
    process = adder(peer)
    assert process.versions == {"adder": "1.0"}
    for times in (1, 10):
        process.send({"do": "add", "times": times}, bytes([1, 2, 250]))
        assert process.receive() == {"sum": 253 * times}
    process.close()


def test_a_closed_program_has_ended_of_itself(peer: Peer) -> None:
    process = adder(peer)
    process.close()
    assert process._process.returncode == 0
    process.close()  # again does nothing


def test_a_program_that_fails_says_what_it_printed(peer: Peer) -> None:
    process = adder(peer)
    process.send({"do": "fail"})
    with pytest.raises(PeerError, match=r"'adder' ended \(exit status 3\).*no more sums"):
        process.receive()
    with pytest.raises(PeerError, match="no more sums"):  # and whenever it is asked again
        process.send({"do": "add", "times": 1}, b"")


def test_a_program_that_was_closed_takes_no_more_requests(peer: Peer) -> None:
    process = adder(peer)
    process.close()
    with pytest.raises(PeerError, match=r"'adder' ended \(exit status 0\)"):
        process.receive()


def test_a_program_that_does_not_start_says_why(peer: Peer) -> None:
    peer.program.write_text("import nothing_of_that_name", encoding="utf-8")
    with pytest.raises(PeerError, match="No module named 'nothing_of_that_name'"):
        adder(peer)


def test_a_missing_environment_is_refused_with_the_command_and_never_made(peer: Peer) -> None:
    with pytest.raises(Unsupported, match=r"is not there.*python -m methods\.adder") as refused:
        peer.start("who-asks")
    assert "'who-asks' runs adder==1.0" in str(refused.value)
    assert not peers.PEERS.exists()


def make(peer: Peer, monkeypatch: pytest.MonkeyPatch, fails: bool = False) -> list[list[str]]:
    """Run `create` without a network; the interpreter that it makes is a link to ours."""
    commands: list[list[str]] = []

    def run(command: list[str], *, check: bool) -> None:
        commands.append(command)
        if "venv" in command:
            peer.interpreter.parent.mkdir(parents=True)
            peer.interpreter.symlink_to(sys.executable)
            version = f"python{sys.version_info.major}.{sys.version_info.minor}"
            (peer.folder / "lib" / version / "site-packages").mkdir(parents=True)
        elif fails:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", run)
    peer.create()
    return commands


def test_an_environment_installs_what_is_pinned_and_sees_the_packages_of_its_maker(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = peer.folder / "left-over"
    old.parent.mkdir(parents=True)
    old.touch()
    venv, install = make(peer, monkeypatch)
    assert venv == [sys.executable, "-m", "venv", str(peer.folder)]
    assert install[0] == str(peer.interpreter)
    assert install[-1] == "adder==1.0"
    assert not old.exists()
    (shared,) = peer.folder.glob("lib/*/site-packages/*.pth")
    assert any((Path(line) / "pytest").is_dir() for line in shared.read_text().split())
    assert peer.missing() == ""


def test_an_environment_that_stopped_halfway_or_is_of_other_versions_is_none(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        make(peer, monkeypatch, fails=True)
    assert peer.missing() == "is not there"
    make(peer, monkeypatch)
    newer = Peer(**{**vars(peer), "requirements": ("adder==1.1",)})
    assert newer.missing() == "was made for other versions"


@pytest.mark.parametrize("requirement", ["adder", "adder>=1.0"])
def test_a_requirement_without_a_version_is_refused(requirement: str) -> None:
    settings: dict[str, Any] = {"name": "a", "program": Path("a.py"), "maker": "a"}
    with pytest.raises(ValueError, match=r"must be pinned.*adder==VERSION"):
        Peer(requirements=(requirement,), **settings)
