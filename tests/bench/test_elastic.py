"""What the bench of elastic operations says of what its clients recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from bench.client import Arrival, Exchange
from bench.elastic import Step, main, report, show
from bench.streams import Recorded, Streams


def exchange(times: list[float], ids: list[int], error: str | None = None) -> Exchange:
    made = Exchange(error=error)
    for at_s, token in zip(times, ids, strict=True):
        made.arrivals.append(Arrival(at_s, "x", [token], []))
    return made


def figures(times: list[float], ids: list[int], error: str | None = None, phase: str = "done") -> dict[str, Any]:
    operation = {"phase": phase, "error": "", "moved_bytes": 2_000_000}
    clients = Streams(cast(Any, None), "", [], 1, [Recorded(0, 0, exchange(times, ids, error))])
    return report([Step("scale=6", 0.0, 1.0, 2.0, operation)], clients, {0: [1, 2, 3, 4]})


CALM = [0.1, 0.2, 1.05, 1.1]


def test_a_clean_step() -> None:
    result = figures([0.1, 0.2, 1.0, 1.2], [1, 2, 3, 4])
    (row,) = result["steps"]
    assert (row["calm_p99_ms"], row["longest_gap_ms"], row["moved_bytes"]) == (100.0, 800.0, 2_000_000)
    assert result["kept"] and not row["met"]
    assert "MISSED" in show(result)
    (row,) = figures([0.7, 0.8, 0.95, 1.1], [1, 2, 3, 4])["steps"]
    assert row["met"]


@pytest.mark.parametrize(
    ("ids", "error", "phase"),
    [([1, 2, 9, 4], None, "done"), ([1, 2, 3, 4], "http_503", "done"), ([1, 2, 3, 4], None, "failed")],
)
def test_what_breaks_the_promise(ids: list[int], error: str | None, phase: str) -> None:
    assert not figures(CALM, ids, error, phase)["kept"]


def test_a_bad_step_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--steps", "scale=many", "--out", str(tmp_path)]) == 1
    assert "scale=many is neither" in capsys.readouterr().err
