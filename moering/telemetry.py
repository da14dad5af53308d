"""Logging of every process: one line format on stderr, with the process's id, so that merged logs stay readable."""

from __future__ import annotations

import logging
import os
import sys

from moering.errors import ConfigError

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def set_up_logging(process_id: str, level: str | None = None) -> None:
    """Log to stderr as ``time level process_id logger: message``.

    `level` defaults to the environment's ``MOERING_LOG_LEVEL``, and that to INFO. Raises `ConfigError` on another word.
    """
    level = (level or os.environ.get("MOERING_LOG_LEVEL") or "INFO").upper()
    if level not in LEVELS:
        raise ConfigError(f"log level {level!r} is not one of {', '.join(LEVELS)}")
    handler = logging.StreamHandler(sys.stderr)
    line = f"%(asctime)s.%(msecs)03d %(levelname)-7s {process_id} %(name)s: %(message)s"
    handler.setFormatter(logging.Formatter(line, datefmt="%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
