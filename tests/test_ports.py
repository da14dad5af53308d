from __future__ import annotations

import socket

import pytest

from tests.ports import free_port


def test_a_port_stays_free_for_who_listens_there_again() -> None:
    port = free_port()
    for _ in range(2):
        socket.create_server(("127.0.0.1", port)).close()
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
