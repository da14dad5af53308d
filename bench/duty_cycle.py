"""Makes a process of this machine slow from outside: SIGSTOP and SIGCONT in turn, many times a second."""

from __future__ import annotations

import os
import signal
import threading

PERIOD_S = 0.05
"""Short against the 300 ms after which a connection counts as lost."""


class DutyCycle:
    """While the block runs the process runs 1/`factor` of the time."""

    def __init__(self, pid: int, factor: float) -> None:
        self._pid, self._run_s = pid, PERIOD_S / factor
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._alternate, name="duty-cycle", daemon=True)

    def __enter__(self) -> DutyCycle:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _alternate(self) -> None:
        try:
            while not self._ended.is_set():
                os.kill(self._pid, signal.SIGSTOP)
                self._ended.wait(PERIOD_S - self._run_s)
                os.kill(self._pid, signal.SIGCONT)
                self._ended.wait(self._run_s)
        finally:
            os.kill(self._pid, signal.SIGCONT)
