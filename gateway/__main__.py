"""`python -m gateway`: run one gateway."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import sys
from collections.abc import Sequence

import uvloop

from gateway.config import Config
from gateway.server import serve
from moering.errors import ConfigError
from moering.process import run_main


def run(config: Config) -> int:
    """Serve until told to stop."""
    if not config.checkpoint:
        raise ConfigError("--checkpoint is needed")
    allow_many_connections()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(config))


def allow_many_connections() -> None:
    """Raise the limit of descriptors, often 1024, to the hard one: beyond it libuv resets connections, unlogged."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # where no limit is not allowed
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(argv: Sequence[str] | None = None) -> int:
    """The process's main function; returns the exit status."""
    return run_main("gateway", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
