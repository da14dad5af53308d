"""Equal bytes for both, and the ratio of what is left of ours to raw."""

from __future__ import annotations

import contextlib
from pathlib import Path

from bench.round_trip import Times, figures
from bench.round_trip_ends import Raw, echo, frame_bytes


def test_the_compute_is_taken_off_trip_by_trip() -> None:
    result = figures(Times(raw=[100.0, 100.0, 100.0], ours=[1150.0, 250.0, 350.0], compute=[1000.0, 50.0, 100.0]))
    assert result["rest_p50_us"] == 200.0  # of 150, 200, 250: a slow computation is not in it
    assert result["ratio"] == 2.0


def test_a_reply_has_a_row_for_each_pair() -> None:
    (request_header, request_tensor), (reply_header, reply_tensor) = frame_bytes(8, 2, 576)
    assert (request_tensor, reply_tensor) == (8 * 576 * 4, 16 * 576 * 4)
    assert request_header > 16 * 4  # two uint16 of each pair are in it
    assert 0 < reply_header < request_header


def test_the_raw_peer_answers_with_the_sizes_it_was_told(tmp_path: Path) -> None:
    with echo(f"ipc://{tmp_path}/e") as address, contextlib.closing(Raw(address)) as raw:
        for reply in ((10, 1000), (20, 0)):
            raw.resize((5, 50), reply)
            raw._socket.send_multipart(raw._frames)
            assert tuple(map(len, raw._socket.recv_multipart())) == reply
        assert raw.trip() > 0
