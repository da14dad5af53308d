"""An expert server whose next computation hangs at a SIGUSR1: ``python -m bench.hanging_expert_server``.

It takes an expert server's own flags and joins a running cluster. On a GPU a kernel that does not return for `HANG_S`
blocks the stream that computes; on a CPU the computing thread stands still. All its other threads go on.
"""

from __future__ import annotations

import signal
import sys
import time
from types import FrameType
from typing import Any

from expert_server.config import Config
from expert_server.process import ExpertServer
from moering.process import run_main

HANG_S = 2.0
"""Below the 3 s after which the coordinator takes a wedged server out of the plan: this one comes back."""
CYCLES_PER_S = 1.7e9


class HangingServer(ExpertServer):
    """See the module."""

    to_hang = False

    def _prepare(self) -> None:
        super()._prepare()
        compute = self.service._compute

        def hanging(*args: Any) -> None:
            if self.to_hang:
                self.to_hang = False
                self._stand_still()
            compute(*args)

        self.service._compute = hanging

    def _stand_still(self) -> None:
        if self.config.device == "cpu":
            time.sleep(HANG_S)
            return
        import torch

        torch.cuda._sleep(int(HANG_S * CYCLES_PER_S))


def run(config: Config) -> int:
    """Serve; SIGUSR1 makes it hang."""
    server = HangingServer(config)

    def hang(number: int, frame: FrameType | None) -> None:
        server.to_hang = True

    signal.signal(signal.SIGUSR1, hang)
    return server.run()


if __name__ == "__main__":
    sys.exit(run_main("bench.hanging_expert_server", Config, run))
