"""One log line with the load every few seconds, while there is load."""

from __future__ import annotations

import asyncio
import logging

from gateway.services import Services

logger = logging.getLogger(__name__)


async def report_load(services: Services) -> None:
    """The reporter's task."""
    loop = asyncio.get_running_loop()
    last_tokens, last_time = services.journal.taken_tokens, loop.time()
    while True:
        await asyncio.sleep(services.config.log_interval_s)
        tokens, now = services.journal.taken_tokens, loop.time()
        running = sum(bool(r.emitted) for r in services.journal.records())
        if tokens != last_tokens or len(services.journal):
            rate = (tokens - last_tokens) / (now - last_time)
            logger.info("%.1f tokens/s, %d running, %d waiting", rate, running, len(services.journal) - running)
        last_tokens, last_time = tokens, now
