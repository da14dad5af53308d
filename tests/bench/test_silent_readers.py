"""Clients that never read: what they notice, and what is made of it."""

from __future__ import annotations

import socket
import struct
import time
from pathlib import Path

import pytest

from bench.command import run_bench
from bench.gaps import Window
from bench.silent_client import SilentClients
from bench.silent_readers import Config, ratios, stalls, table
from moering.errors import MoeringError


def look_until(clients: SilentClients, left: int) -> None:
    give_up_s = time.monotonic() + 10
    while clients.open > left and time.monotonic() < give_up_s:
        clients.look()
    assert clients.open == left


def test_a_reset_is_noticed_and_unread_data_is_not_taken_for_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with SilentClients(url, {"stream": True}, 2) as clients:
            first, second = server.accept()[0], server.accept()[0]
            with second:
                assert b'{"stream": true}' in first.recv(10_000)
                first.sendall(b"unread")
                clients.look()
                assert clients.open == 2
                first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                first.close()
                look_until(clients, 1)
        assert len(clients.cut_at_s) == 1
        assert clients.open == 0  # leaving closes the rest


def test_the_gateways_own_waits_are_read_from_its_log() -> None:
    line = "W gateway-0 a client read nothing for {} s; its connection is cut\n"
    assert stalls("x\n" + line.format("5.1") + "y\n" + line.format("5.3")) == [5.1, 5.3]


def test_latencies_are_held_against_those_beside_reading_clients() -> None:
    spans = [(1.0, 1.2), (1.2, 1.4), (11.0, 11.1), (11.1, 11.2)]
    windows = {"silent": Window(1.0, 2.0), "reading": Window(11.0, 12.0)}
    assert ratios(spans, windows) == {"p50": pytest.approx(2.0), "p99": pytest.approx(2.0)}


def test_a_client_that_was_not_cut_misses_the_bar() -> None:
    figures = {
        "clients": 2, "stall_timeout_s": 5.0, "cut_ms": {"p50": 9e3, "p99": 9e3, "max": 9e3}, "itl_ms": {},
        "ratio": {"p50": 1.0, "p99": 1.0}, "rss_bytes": {"gateway-0": {"before": 0, "peak": 0, "after": 0}},
    }  # fmt: skip
    assert "MISSED" not in table(figures | {"server_waited_s": [5.1, 5.2]})
    assert "MISSED" in table(figures | {"server_waited_s": [5.1]})
    assert "MISSED" in table(figures | {"server_waited_s": [5.1, 50.0]})


def test_a_failed_bench_says_why_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def fail(config: Config) -> dict[str, object]:
        raise MoeringError("no cluster")

    assert run_bench("silent_readers", Config, fail, str, ["--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "bench.silent_readers: MoeringError: no cluster\n"
    assert run_bench("silent_readers", Config, fail, str, ["--silent", "0"]) == 1
    assert "must be positive" in capsys.readouterr().err
