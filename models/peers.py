"""Rivals that run in environments of their own, spoken to over a local connection.

A rival may need other versions of libraries than ours, or packages that nobody else needs. It then
gets a virtual environment in `.peers/NAME`, which git does not see, and its program runs there as a
process of its own. The environment sees the packages of the one that made it, so only what is
missing there, or wanted in another version, is installed.

An environment is made by one explicit command, which reaches for the network; a run never makes
one. Where it is missing, or was made for other versions, the rival is `Unsupported`, and the
message is that command.

Messages are JSON, numbers in bulk follow as raw bytes. The program is any file that reads and
writes them with `multiprocessing.connection.Connection(int(sys.argv[1]))`; its first message tells
the versions it runs with.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import IO, Any

from models.base import Unsupported

PEERS = Path(__file__).resolve().parents[1] / ".peers"

_LOG_CHARACTERS = 2000
_SECONDS_TO_END = 5.0


class PeerError(RuntimeError):
    """A rival's program failed; the message holds the end of what it printed."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A rival's program and the environment that it needs.

    Attributes:
        name: Folder under `.peers`, and what messages call it.
        requirements: What is installed, each `package==version`.
        program: Python file that the environment's interpreter runs. It imports nothing of ours.
        maker: Module whose `python -m` makes the environment.
    """

    name: str
    requirements: tuple[str, ...]
    program: Path
    maker: str

    def __post_init__(self) -> None:
        for requirement in self.requirements:
            if "==" not in requirement:
                raise ValueError(
                    f"requirements of a peer must be pinned, got {requirement!r}. "
                    f"Write {requirement.rstrip('<>~=0123456789.')}==VERSION."
                )

    @property
    def folder(self) -> Path:
        """Where the environment is, or would be."""
        return PEERS / self.name

    @property
    def interpreter(self) -> Path:
        """Python of the environment."""
        return self.folder / "bin" / "python"

    @property
    def command(self) -> str:
        """What makes the environment."""
        return f"python -m {self.maker}"

    @property
    def _stamp(self) -> Path:
        return self.folder / "tokenmark-requirements.txt"

    def missing(self) -> str:
        """Return why the environment cannot be used, empty if it can."""
        if not self._stamp.is_file() or not self.interpreter.exists():
            return "is not there"
        if self._stamp.read_text(encoding="utf-8").split() != list(self.requirements):
            return "was made for other versions"
        return ""

    def require(self, who: str) -> None:
        """Raise unless the environment can be used.

        Args:
            who: Who asks, for the message.

        Raises:
            Unsupported: With the command that makes it.
        """
        if why := self.missing():
            raise Unsupported(
                f"'{who}' runs {self.requirements[0]} in an environment of its own, which {why}. "
                f"Make it, with a network: {self.command}"
            )

    def create(self) -> None:
        """Make the environment, anew if it is there.

        Raises:
            subprocess.CalledProcessError: pip failed; it has said why.
        """
        if self.folder.exists():
            shutil.rmtree(self.folder)
        subprocess.run([sys.executable, "-m", "venv", str(self.folder)], check=True)
        paths = sysconfig.get_paths(vars={"base": str(self.folder), "platbase": str(self.folder)})
        ours = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
        # Behind the environment's own packages, so that what it installs itself comes first.
        shared = Path(paths["purelib"]) / "packages-of-the-checkout.pth"
        shared.write_text("".join(f"{path}\n" for path in ours), encoding="utf-8")
        install = [str(self.interpreter), "-m", "pip", "install", "--no-input"]
        subprocess.run([*install, *self.requirements], check=True)
        # Last, so that what stopped halfway does not pass for an environment.
        text = "".join(f"{requirement}\n" for requirement in self.requirements)
        self._stamp.write_text(text, encoding="utf-8")

    def start(self, who: str) -> PeerProcess:
        """Start the program.

        Args:
            who: Who asks, for the message.

        Raises:
            Unsupported: There is no such environment.
            PeerError: The program does not start.
        """
        self.require(who)
        return PeerProcess(self.name, [str(self.interpreter), "-P", str(self.program)], self.folder)


class PeerProcess:
    """A running program of a rival; it ends with this object or with our process.

    Attributes:
        versions: What the program runs with, by name.
    """

    def __init__(self, name: str, command: Sequence[str], folder: Path) -> None:
        """Start `command` in `folder`, with the connection's number as its last argument.

        Raises:
            PeerError: It ends before its first message.
        """
        self._name = name
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by _end
        self._connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [*command, str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            cwd=folder,
            # A rival that has all it needs has no reason to look for more.
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        theirs.close()
        self._finalizer = weakref.finalize(self, _end, self._connection, self._process, self._log)
        self._printed = ""
        self.versions: dict[str, str] = self.receive()["versions"]

    def send(self, message: Mapping[str, Any], *data: bytes) -> None:
        """Send a message, and behind it raw bytes that it announces.

        Raises:
            PeerError: The program has ended.
        """
        try:
            for part in (json.dumps(message).encode(), *data):
                self._connection.send_bytes(part)
        except OSError as error:
            raise self._failed() from error

    def receive(self) -> dict[str, Any]:
        """Return the program's next message.

        Raises:
            PeerError: The program has ended.
        """
        try:
            message: dict[str, Any] = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._failed() from error
        return message

    def close(self) -> None:
        """End the program."""
        self._finalizer()

    def _failed(self) -> PeerError:
        try:
            status: int | str = self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            status = "none yet"
        if not self._log.closed:  # else it has been closed, or has failed before
            self._log.seek(0)
            self._printed = self._log.read().decode(errors="replace").strip()[-_LOG_CHARACTERS:]
            self.close()
        return PeerError(
            f"the program of peer '{self._name}' ended (exit status {status}). It printed: "
            f"{self._printed or 'nothing'}"
        )


def _end(connection: Connection, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    """Hang up, which ends the program, and see that it does."""
    connection.close()
    try:
        process.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    log.close()
