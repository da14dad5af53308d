"""A bug, or memory that is short, in the gateway itself: no client waits for its deadline, and nobody else notices."""

import asyncio

import pytest
import zmq

from gateway.generation import Generation
from gateway.output import ChoiceOutput
from gateway.router_pool import RouterPool
from moering import transport
from moering.protocol import Tokens
from tests.gateway.fake_router import FakeRouter
from tests.gateway.harness import gateway, run
from tests.gateway.test_failover import REQUEST, streamed_ids

EXPECTED = [40 + (9 + 3 * position) % 60 for position in range(12)]
"""What the script of `FakeRouter` says to `REQUEST`."""


class Breaks:
    """A method of the product that fails once, at a call of the test's choice."""

    def __init__(self, monkeypatch, owner, name, when=lambda *args: True, raises=MemoryError):
        self.fired, original = 0, getattr(owner, name)

        def broken(*args, **kwargs):
            if not self.fired and when(*args):
                self.fired += 1
                raise raises
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, broken)


async def two_streams(g, router):
    """Both are held at the fourth token, with the first on its way to the client."""
    begun = [asyncio.Event(), asyncio.Event()]
    streams = [asyncio.create_task(g.stream("/v1/completions", REQUEST, b)) for b in begun]
    for b in begun:
        await b.wait()
    await g.until(lambda: [len(r.emitted) for r in g.services.journal.records()] == [4, 4])
    return streams


def past_the_fourth(generation, *args):
    return len(generation.outputs[0].record.emitted) > 4


@pytest.mark.parametrize("in_a_callback", [True, False])
def test_what_breaks_one_stream_ends_it_with_one_error(model, monkeypatch, in_a_callback):
    async def main():
        router = FakeRouter(hold_at=4)
        async with gateway(model, router, request_timeout_s=600.0) as g:
            if in_a_callback:
                breaks = Breaks(monkeypatch, Generation, "_put", past_the_fourth)
            streams = await two_streams(g, router)
            if not in_a_callback:
                breaks = Breaks(monkeypatch, ChoiceOutput, "push")
            router.release()
            results = await asyncio.gather(*streams)
            assert breaks.fired
            broken, whole = sorted(results, key=lambda events: events[-1] == "[DONE]")
            assert broken[-1]["error"]["code"] == "internal" and "[DONE]" not in broken
            assert [e for e in broken if "error" in e] == broken[-1:]
            assert streamed_ids(whole) == EXPECTED
            assert not g.services.journal.records()

    run(main())


def test_the_last_token_that_breaks_its_stream_ends_it_with_one_error(model, monkeypatch):
    async def main():
        router = FakeRouter(hold_at=4)  # else all tokens may come as one event, the broken one
        async with gateway(model, router, request_timeout_s=600.0) as g:
            Breaks(monkeypatch, Generation, "_put", lambda generation, index, event: event.finish_reason is not None)
            streams = await two_streams(g, router)
            router.release()
            events = min(await asyncio.gather(*streams), key=lambda events: events[-1] == "[DONE]")
            assert events[-1]["error"]["code"] == "internal" and len(events) > 1

    run(main())


def test_a_message_that_cannot_be_taken_costs_its_connection_and_no_token(model, monkeypatch):
    async def main():
        router = FakeRouter(hold_at=4)
        async with gateway(model, router, request_timeout_s=600.0) as g:
            streams = await two_streams(g, router)
            breaks = Breaks(monkeypatch, RouterPool, "_receive", lambda pool, link, m: isinstance(m, Tokens))
            # links hold the method that they were made with
            monkeypatch.setattr(next(iter(g.services.pool._links.values())), "_on_message", g.services.pool._receive)
            router.release()
            assert [streamed_ids(await s) for s in streams] == [EXPECTED, EXPECTED]
            assert breaks.fired and g.services.pool.failovers >= 1

    run(main())


def test_a_connection_that_cannot_be_made_for_want_of_files_is_tried_again(model, monkeypatch):
    async def main():
        router = FakeRouter()
        breaks = Breaks(monkeypatch, transport, "make_socket", raises=zmq.ZMQError(24))
        async with gateway(model, router) as g:
            assert breaks.fired
            assert streamed_ids(await g.stream("/v1/completions", REQUEST)) == EXPECTED

    run(main())


def test_a_callback_that_fails_leaves_no_request_to_its_deadline(model, monkeypatch):
    async def main():
        router, other = FakeRouter(hold_at=4), FakeRouter("other")
        async with gateway(model, router, request_timeout_s=600.0) as g:
            streams = await two_streams(g, router)
            breaks = Breaks(monkeypatch, RouterPool, "_assign")
            asyncio.get_running_loop().call_soon(g.show, other)  # where its requests are to go on
            ends = [(await s)[-1] for s in streams]
            assert breaks.fired
            assert [e["error"]["code"] for e in ends] == ["internal"] * 2
        other.kill()

    run(main())
