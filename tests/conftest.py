"""What holds for every test: seeded, offline, and nothing left behind in the user's folders."""

from __future__ import annotations

import os
import random
import socket
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# Read when the libraries are imported, so it is set before any of them is.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PIP_NO_INDEX": "1"}
os.environ.update(OFFLINE)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Models here are tiny: a second thread would mostly wait for the first, spinning. The tests of the
# native kernels ask for two threads themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A test that passes here passes everywhere: the same examples, however busy the machine.
settings.register_profile(
    "repeatable", derandomize=True, suppress_health_check=(HealthCheck.too_slow,)
)
settings.load_profile("repeatable")


def is_local(family: int, address: object) -> bool:
    """Return whether a socket address stays on this machine."""
    if family not in (socket.AF_INET, socket.AF_INET6):
        return True
    host = str(address[0]) if isinstance(address, tuple) else ""
    return host in ("localhost", "::1", "") or host.startswith("127.")


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuse every connection that leaves the machine, unless the test is marked `network`."""
    if request.node.get_closest_marker("network"):
        for name in OFFLINE:
            monkeypatch.delenv(name, raising=False)
        yield
        return

    def guarded(name: str):
        original = getattr(socket.socket, name)

        def connect(self: socket.socket, address: object) -> object:
            if not is_local(self.family, address):
                raise RuntimeError(f"a test reached for the network: {address!r}")
            return original(self, address)

        return connect

    lookup = socket.getaddrinfo

    def getaddrinfo(host: object, *arguments: object, **options: object) -> object:
        if not is_local(socket.AF_INET, (host or "", 0)):
            raise RuntimeError(f"a test looked up a host: {host!r}")
        return lookup(host, *arguments, **options)

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guarded(name))
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same random state; torch is seeded where it is loaded."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _shared_models_stay() -> Iterator[None]:
    """Fail where a file changes the configuration of a tiny model that later files share."""
    yield
    if tiny := sys.modules.get("tests.models.tiny"):
        changed = tiny.changed_modules()
        assert not changed, f"the tests of this file changed shared models: {', '.join(changed)}"
