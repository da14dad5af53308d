"""The I/O thread of a process that computes may interrupt the computation; the computation itself keeps its slice."""

import ast
import subprocess
import sys

from moering.time_slice import SHORT_NS, SLICE, attributes

ATTRIBUTES = """
import os
from moering import transport
from moering.time_slice import attributes
transport.start_io_thread()
print([attributes(int(t)) for t in sorted(os.listdir("/proc/self/task"), key=int)])
"""


def test_only_the_threads_started_meanwhile_get_the_short_slice() -> None:
    out = subprocess.run([sys.executable, "-c", ATTRIBUTES], check=True, capture_output=True, text=True).stdout
    mine, *started = ast.literal_eval(out)
    assert mine == attributes()
    assert len(started) >= 1
    assert {None if s is None else s[SLICE] for s in started} == {None if mine is None else SHORT_NS}
