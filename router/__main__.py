"""`python -m router`: see `router.process`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from moering.process import run_main
from router.catch_up import CatchUp
from router.config import Config

logger = logging.getLogger(__name__)

MAX_WAIT_S = 30.0
"""For others that catch up. Not for very long streams: while a router is missing, the death of another is worse."""


def run(config: Config) -> int:
    """Serve until SIGTERM; raises like `Router.run`. One that starts behind others lets those catch up first."""
    if config.nice and config.catch_up_lock:
        waited_s = CatchUp(config.catch_up_lock).wait(MAX_WAIT_S)
        logger.info("waited %.1f s for routers of this machine that catch up with interrupted streams", waited_s)
    from router.process import Router  # not before: what it imports, PyTorch at worst, takes a core for a while

    return Router(config).run()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_main("router", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
