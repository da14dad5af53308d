"""The verdicts of the slow-server bench, and the process that it slows."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import psutil

from bench.duty_cycle import DutyCycle
from bench.slow_server import table


def figures(slow: float, hedged: int, gap_ms: float, *, came_back: bool) -> dict[str, Any]:
    def phase(rate: float) -> dict[str, Any]:
        gap = {"p50": 10.0, "p99": 20.0, "max": 30.0}
        counters = {"rows": 1000, "hedged_rows": hedged, "probe_rows": 0}
        return {"tokens_per_s": rate, "each_second": [1.0] * 5 + [rate] * 5, "gap_ms": gap, "counters": counters}

    stop = {"server": "e0", "gap_ms": {"max": gap_ms}, "came_back": came_back}
    phases = {"healthy": phase(100.0), "slow": phase(slow), "recovery": phase(100.0)}
    return {**phases, "stops": [stop], "requests": 1, "errors": 0}


def test_the_bars() -> None:
    assert table(figures(80.0, 30, 520.0, came_back=True)).count("MISSED") == 0
    assert table(figures(79.0, 31, 521.0, came_back=True)).count("MISSED") == 3
    assert table(figures(80.0, 30, 520.0, came_back=False)).count("MISSED") == 1


def test_a_slowed_process_is_stopped_most_of_the_time_and_left_running() -> None:
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        process = psutil.Process(child.pid)
        with DutyCycle(child.pid, 10.0):
            looks = [process.status() for _ in range(2000)]
            while psutil.STATUS_STOPPED not in looks:
                looks.append(process.status())
        assert process.status() != psutil.STATUS_STOPPED
    finally:
        child.kill()
        child.wait()
