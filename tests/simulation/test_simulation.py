"""Thousands of random fault schedules over the real code, and their exact repetition. `make simulate` runs more."""

from __future__ import annotations

import os
import subprocess
import sys
import time

SCHEDULES = 2000
PROCESSES = 2


def start(*args: str, hash_seed: str = "random") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.simulation", *args],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
    )


def test_no_fault_schedule_loses_duplicates_or_changes_a_token() -> None:
    share = SCHEDULES // PROCESSES
    started = time.monotonic()
    runs = [start("--seeds", f"{n * share}:{(n + 1) * share}") for n in range(PROCESSES)]
    outputs = [run.communicate()[0] for run in runs]
    print(*outputs, f"{time.monotonic() - started:.1f} s")
    for run, output in zip(runs, outputs, strict=True):
        assert run.returncode == 0, output
        assert f"{share} schedules" in output and " 0 failed" in output


def test_a_seed_repeats_exactly_in_another_process() -> None:
    runs = [start("--seed", "12", hash_seed=hash_seed) for hash_seed in ("1", "2")]
    first, second = (run.communicate()[0] for run in runs)
    assert "digest" in first and first.count("\n") > 50
    assert first == second
