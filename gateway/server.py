"""One gateway process from start to exit: membership, HTTP, signals. Start-up and clean-up come in pairs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

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
LAME_DUCK_S, LAME_DUCK_LOOK_S = 1.0, 0.02
FIRST_VIEW_S = 5.0
FLUSH_S = 2.0
"""Time that the last events get to reach their clients after the drain's limit."""


async def serve(config: Config) -> int:
    """Serve until SIGTERM or SIGINT; the exit status."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[int] = loop.create_future()

    def on_signal() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends already
            loop.call_soon_threadsafe(_resolve, stop, 0)

    process.install_signal_handlers(on_signal)
    model = load_model(config.checkpoint, config.served_model_name, config.max_model_len_tokens)
    listener = listen(config.host, config.port) if config.listen_fd < 0 else inherited(config.listen_fd)
    # Views keep coming until the last stream has ended: a router may die during a drain, too.
    async with (
        started(config, model, listener) as services,
        joined(services, on_refused=lambda: _resolve(stop, 1)),
        accepting(services, listener),
    ):
        logger.info("listening at %s for requests to %s", services.own.address, model.name)
        status = await told_to_stop(stop, services.cluster.told_to_leave)
        logger.info("stopping; %d requests may finish within %g s", len(services.journal), config.drain_timeout_s)
    return status


@contextlib.asynccontextmanager
async def started(config: Config, model: Model, listener: socket.socket) -> AsyncIterator[Services]:
    """All but HTTP and membership: the pool of routers and the background tasks."""
    services = make_services(config, model, _own(config, listener.getsockname()[1]))
    asyncio.get_running_loop().set_exception_handler(partial(_on_callback_error, services))
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
    logging.getLogger("aiohttp.server").addFilter(without_traceback)
    runner = web.AppRunner(
        make_app(services),
        handler_cancellation=True,  # a client that goes away cancels its handler, which aborts the request
        access_log=None,
        shutdown_timeout=limit_s + FLUSH_S,
    )
    await runner.setup()
    if services.config.listen_fd >= 0:  # connections wait, rather than be told that this process knows nothing yet
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(services.cluster.seen.wait(), FIRST_VIEW_S)
    site = web.SockSite(runner, listener, backlog=BACKLOG)
    await site.start()
    try:
        yield
    finally:
        services.cluster.leaving = True
        await site.stop()  # whoever shares the port has new connections from here on
        await lame_duck(services, runner)
        services.cluster.draining = True
        timer = asyncio.get_running_loop().call_later(limit_s, services.pool.fail_all, "the server is stopping")
        await runner.cleanup()
        timer.cancel()


async def told_to_stop(stop: asyncio.Future[int], told_to_leave: asyncio.Event) -> int:
    """Until a signal or an operation ends this process; the exit status."""
    told = asyncio.create_task(told_to_leave.wait())
    waiting: list[asyncio.Future[Any]] = [stop, told]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    told.cancel()
    return stop.result() if stop.done() else 0


async def lame_duck(services: Services, runner: web.AppRunner) -> None:
    """Serve on over connections that are there, each of whose answers closes its own: a client that sends just now gets
    its answer. For a moment; if an operation ends this process, for a moment after the last request has ended by
    itself: an answer that began before does not close its connection, on which the client may send the next request."""
    loop = asyncio.get_running_loop()
    begun_s = served_s = loop.time()
    limit_s = services.config.request_timeout_s
    while runner.server is not None and runner.server.connections and loop.time() < begun_s + limit_s:
        if services.cluster.told_to_leave.is_set() and services.journal:
            served_s = loop.time()
        if loop.time() >= served_s + LAME_DUCK_S:
            return
        await asyncio.sleep(LAME_DUCK_LOOK_S)


def without_traceback(record: logging.LogRecord) -> bool:
    """A filter for aiohttp's log: what a client sends that is no HTTP is no bug, and one line for each is enough."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError | web.RequestPayloadError):
        record.msg, record.args = "%s: %s", (record.getMessage(), " ".join(str(error).split())[:200])
        record.levelno, record.levelname, record.exc_info = logging.WARNING, "WARNING", None
    return True


def inherited(fd: int) -> socket.socket:
    """The listening socket that the launcher and all its gateways share. Raises `ConfigError`."""
    try:
        listener = socket.socket(fileno=fd)
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    except OSError as e:
        raise ConfigError(f"--listen-fd {fd}: {e.strerror or e}") from e
    return listener


def listen(host: str, port: int) -> socket.socket:
    """A listening socket whose connections have small send buffers. Raises `ConfigError`."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as e:
        raise ConfigError(f"cannot listen on {host}:{port}: {e.strerror or e}") from e
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    return listener


def _on_callback_error(services: Services, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What a callback that failed has left undone must not keep a client waiting."""
    loop.default_exception_handler(context)
    if isinstance(context.get("exception"), Exception):
        services.pool.fail_stranded()


def _own(config: Config, port: int) -> MemberInfo:
    host = f"[{config.host}]" if ":" in config.host else config.host
    address = f"http://{host}:{port}"
    return MemberInfo(
        "gateway", config.server_id, process.incarnation(), address, os.getpid(), "JOINING", config.zone,
        capacity=0, experts=0,
    )  # fmt: skip


def _resolve(future: asyncio.Future[int], status: int) -> None:
    if not future.done():
        future.set_result(status)
