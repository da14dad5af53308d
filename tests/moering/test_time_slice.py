"""The I/O thread of a process that computes may interrupt the computation; the computation itself keeps its slice."""

import subprocess
import sys

from moering.time_slice import SHORT_NS, slice_ns

SLICES = """
import os
from moering import transport
from moering.time_slice import slice_ns
transport.start_io_thread()
print(*(slice_ns(int(t)) for t in sorted(os.listdir("/proc/self/task"), key=int)))
"""


def test_only_the_threads_started_meanwhile_get_the_short_slice() -> None:
    out = subprocess.run([sys.executable, "-c", SLICES], check=True, capture_output=True, text=True).stdout
    mine, *started = (None if s == "None" else int(s) for s in out.split())
    assert mine == slice_ns(0)
    assert len(started) >= 1
    assert set(started) == {None if mine is None else SHORT_NS}
