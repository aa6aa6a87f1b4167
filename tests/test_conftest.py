import os
import random
import socket

import pytest


def test_connections_that_leave_the_machine_are_refused():
    with socket.socket() as outside, pytest.raises(RuntimeError, match="reached for the network"):
        outside.connect(("192.0.2.1", 80))
    with socket.socket() as outside, pytest.raises(RuntimeError, match="reached for the network"):
        outside.connect_ex(("192.0.2.1", 80))


def test_host_names_are_not_looked_up():
    with pytest.raises(RuntimeError, match=r"looked up a host: 'example\.org'"):
        socket.create_connection(("example.org", 80), timeout=1)


def test_loopback_and_unix_sockets_work():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.connect(server.getsockname())
    one, other = socket.socketpair()
    with one, other:
        one.sendall(b"x")
        assert other.recv(1) == b"x"


def test_libraries_are_told_to_stay_offline():
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("_", range(2))
def test_every_test_starts_from_the_same_random_state(_):
    assert random.random() == pytest.approx(0.8444218515250481)
