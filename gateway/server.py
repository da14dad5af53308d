"""One gateway process from start to exit: membership, HTTP, signals. Start-up and clean-up come in pairs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable

from aiohttp import web

from gateway.app import make_app
from gateway.config import Config
from gateway.membership import joined
from gateway.model import Model, load_model
from gateway.reporter import report_load
from gateway.services import Services, make_services
from moering import process
from moering.errors import ConfigError
from moering.protocol import MemberInfo

logger = logging.getLogger(__name__)

SEND_BUFFER_BYTES = 128 << 10
"""Kernel memory for a client that does not read. Left alone, the kernel lets it grow to megabytes."""
BACKLOG = 1024
FLUSH_S = 2.0
"""Time that the last events get to reach their clients after the drain's limit."""


async def serve(config: Config) -> int:
    """Serve until SIGTERM or SIGINT; the exit status."""
    stop: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    handle_signals(lambda: _resolve(stop, 0))
    model = load_model(config.checkpoint, config.served_model_name, config.max_model_len_tokens)
    listener = listen(config.host, config.port)
    # Views keep coming until the last stream has ended: a router may die during a drain, too.
    async with (
        started(config, model, listener) as services,
        joined(services, on_refused=lambda: _resolve(stop, 1)),
        accepting(services, listener),
    ):
        logger.info("serving %s at %s", model.name, services.own.address)
        status = await stop
        logger.info("stopping; %d requests may finish within %g s", len(services.journal), config.drain_timeout_s)
    return status


@contextlib.asynccontextmanager
async def started(config: Config, model: Model, listener: socket.socket) -> AsyncIterator[Services]:
    """All but HTTP and membership: the pool of routers and the background tasks."""
    services = make_services(config, model, _own(config, listener.getsockname()[1]))
    tasks = [asyncio.create_task(services.guard.run()), asyncio.create_task(report_load(services))]
    try:
        yield services
    finally:
        await services.pool.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def accepting(services: Services, listener: socket.socket) -> AsyncIterator[None]:
    """HTTP. Its end stops accepting, lets running requests finish within the limit, then ends them with an error."""
    limit_s = services.config.drain_timeout_s
    runner = web.AppRunner(
        make_app(services),
        handler_cancellation=True,  # a client that goes away cancels its handler, which aborts the request
        access_log=None,
        shutdown_timeout=limit_s + FLUSH_S,
    )
    await runner.setup()
    try:
        await web.SockSite(runner, listener, backlog=BACKLOG).start()
        yield
    finally:
        services.cluster.draining = True
        timer = asyncio.get_running_loop().call_later(limit_s, services.pool.fail_all, "the server is stopping")
        await runner.cleanup()
        timer.cancel()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket whose connections have small send buffers. Raises `ConfigError`."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as e:
        raise ConfigError(f"cannot listen on {host}:{port}: {e.strerror or e}") from e
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    return listener


def _own(config: Config, port: int) -> MemberInfo:
    host = f"[{config.host}]" if ":" in config.host else config.host
    address = f"http://{host}:{port}"
    return MemberInfo(
        "gateway", config.server_id, process.incarnation(), address, os.getpid(), "JOINING", config.zone, 0, 0
    )


def handle_signals(on_stop: Callable[[], None]) -> None:
    """The first SIGTERM or SIGINT begins to drain, a second one ends the process at once."""
    received: list[int] = []

    def handle(signum: int) -> None:
        received.append(signum)
        if len(received) > 1:
            os._exit(128 + signum)
        on_stop()

    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, handle, signum)


def _resolve(future: asyncio.Future[int], status: int) -> None:
    if not future.done():
        future.set_result(status)
