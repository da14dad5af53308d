"""A whole gateway on the real aiohttp runner, a real port and uvloop, with views given by the test."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import aiohttp
import numpy as np
import uvloop

from gateway.config import Config
from gateway.membership import apply_view
from gateway.model import Model
from gateway.server import accepting, listen, started
from gateway.services import Services
from moering.protocol import MemberInfo, View
from tests.gateway.fake_router import FakeRouter

DEADLINE_S = 60.0
"""What a test waits for is there at once on a quiet machine, and within this on a busy one."""


class OwnClock(asyncio.SelectorEventLoop):
    """A loop on whose clock time also passes when the test says so: it reaches a limit of a minute in no time."""

    ahead_s = 0.0

    def time(self) -> float:
        return super().time() + self.ahead_s


def pass_time(seconds: float) -> None:
    """Put the clock of the running `OwnClock` forward."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, OwnClock)
    loop.ahead_s += seconds


def run(
    coroutine: Coroutine[Any, Any, None],
    loop: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop,
    timeout_s: float = 4 * DEADLINE_S,
) -> None:
    """Run a test, on the loop that production uses unless it needs a clock of its own."""
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(asyncio.wait_for(coroutine, timeout_s))


def make_view(members: list[MemberInfo], epoch: int = 1, routed: bool = True) -> View:
    routing = np.zeros((2, 4, 1), "<i2") if routed else np.full((2, 4, 1), -1, "<i2")
    orphans = 0 if routed else 8
    return View(1, epoch, members, ["e0"], 2, 4, 1, routing.tobytes(), routing.tobytes(), 1, 0, orphans, 0)


class Gateway:
    """The gateway under test, and a client of it."""

    def __init__(self, services: Services, session: aiohttp.ClientSession) -> None:
        self.services, self.session = services, session
        self.url = services.own.address
        self._epoch = 0

    def show(self, *routers: FakeRouter, routed: bool = True) -> None:
        """Apply a view with these routers."""
        self.show_members([r.member() for r in routers], routed)

    def show_members(self, members: list[MemberInfo], routed: bool = True) -> None:
        self._epoch += 1
        apply_view(self.services, make_view(members, self._epoch, routed))

    async def until(self, condition: Callable[[], Any], timeout_s: float = DEADLINE_S) -> None:
        """Wait for a state of the gateway, which has no event to wait for."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.005)

    async def connected(self, count: int = 1) -> None:
        await self.until(lambda: self.services.pool.connected == count)

    async def post(self, path: str, body: Any = None, **kwargs: Any) -> tuple[int, Any, Any]:
        """Status, parsed body, headers."""
        if body is not None:
            kwargs["json"] = body
        async with self.session.post(self.url + path, **kwargs) as response:
            text = await response.text()
            return response.status, json.loads(text), response.headers

    async def get(self, path: str) -> tuple[int, str, Any]:
        async with self.session.get(self.url + path) as response:
            return response.status, await response.text(), response.headers

    async def stream(self, path: str, body: dict[str, Any], begun: asyncio.Event | None = None) -> list[Any]:
        """All events of a stream; `[DONE]` as the string. `begun` is set when the status is there."""
        async with self.session.post(self.url + path, json={**body, "stream": True}) as response:
            assert response.status == 200, await response.text()
            if begun is not None:
                begun.set()
            return parse_events(await response.read())


def parse_events(data: bytes) -> list[Any]:
    events = data.decode().split("\n\n")
    assert events.pop() == "", "the stream ends in the middle of an event"
    assert all(e.startswith("data: ") for e in events)
    return ["[DONE]" if e == "data: [DONE]" else json.loads(e[6:]) for e in events]


@contextlib.asynccontextmanager
async def gateway(model: Model, *routers: FakeRouter, **options: Any) -> AsyncIterator[Gateway]:
    """A gateway that is connected to `routers`, which it kills in the end."""
    config = Config(**{"port": 0, "drain_timeout_s": 5.0, **options})
    try:
        listener = listen(config.host, config.port)
        async with (
            # A client that keeps an idle connection makes the gateway's end wait for its last request.
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session,
            started(config, model, listener) as services,
            accepting(services, listener),
        ):
            g = Gateway(services, session)
            if routers:
                g.show(*routers)
                await g.connected(len(routers))
            yield g
    finally:
        for router in routers:
            router.kill()


async def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Run something that blocks."""
    return await asyncio.get_running_loop().run_in_executor(None, function, *args)
