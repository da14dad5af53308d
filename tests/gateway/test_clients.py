"""Clients that go away, never read, or are too many."""

import asyncio
import json
import socket

import pytest

from moering.protocol import Submit, Token
from tests.gateway.fake_router import FakeRouter, token
from tests.gateway.harness import OwnClock, gateway, in_thread, pass_time, run

REQUEST = {"prompt": [5], "max_tokens": 400}


HEAVY = {"prompt": [5], "max_tokens": 500, "stream": True, "logprobs": 20, "n": 8}
"""Its stream has some 1.5 MB: far more than the buffers of a connection hold."""
BUFFERS_BYTES = 512 << 10
"""More than the kernel keeps of a connection: who has read so much has taken something from the gateway."""


def heavy(submit: Submit, position: int) -> Token:
    ids = list(range(40, 60))
    return token(submit, position, 40, logprob=-0.123456789, top_ids=ids, top_logprobs=[-0.123456789] * 20)


async def raw_post(
    port: int, body: dict, receive_bytes: int | None = None, path: str = "/v1/completions"
) -> socket.socket:
    """A connection that has sent a request and reads nothing."""
    client = socket.socket()
    if receive_bytes is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", port))
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    await loop.sock_sendall(client, head.encode() + data)
    return client


def port_of(g) -> int:
    return int(g.url.rpartition(":")[2])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hold_at", [0, 3])
def test_a_disconnect_aborts(model, stream, hold_at):
    async def main():
        router = FakeRouter(hold_at=hold_at)
        async with gateway(model, router) as g:
            client = await raw_post(port_of(g), {**REQUEST, "stream": stream, "n": 2})
            await g.until(lambda: g.services.journal.taken_tokens == 2 * hold_at)
            await in_thread(router.wait, lambda r: len(r.submits) == 2)
            client.close()
            await in_thread(router.wait, lambda r: len(r.aborts) == 2)
            assert {a.request_id for a in router.aborts} == {s.request_id for s in router.submits}
            await g.until(lambda: len(g.services.journal) == 0)
            _, text, _ = await g.get("/metrics")
            assert 'moering_request_success_total{finished_reason="abort"} 2.0' in text

    run(main())


def test_many_dropped_requests_leave_a_server_that_answers(model):
    async def main():
        router = FakeRouter(hold_at=5)
        async with gateway(model, router) as g:
            clients = [await raw_post(port_of(g), {**REQUEST, "stream": True}) for _ in range(200)]
            await g.until(lambda: len(router.submits) == 200)
            for client in clients:
                client.close()
            await in_thread(router.wait, lambda r: len(r.aborts) == 200)
            router.release()
            status, body, _ = await g.post("/v1/completions", REQUEST)
            assert status == 200 and body["usage"]["completion_tokens"] == 400

    run(main())


def test_clients_that_never_read_are_cut_off_and_delay_nobody(model):
    async def main():
        router = FakeRouter(script=heavy, hold_at=400)
        async with gateway(model, router, stall_timeout_s=0.5) as g:
            silent = [await raw_post(port_of(g), HEAVY, receive_bytes=4096) for _ in range(5)]
            for _ in range(3):
                assert (await g.stream("/v1/completions", {"prompt": [5], "max_tokens": 100}))[-1] == "[DONE]"
            await in_thread(router.wait, lambda r: len(r.aborts) == 5 * HEAVY["n"])
            assert g.services.guard.cut_count == 5
            await g.until(lambda: len(g.services.journal) == 0)
            for client in silent:
                with pytest.raises(ConnectionResetError):
                    while await asyncio.get_running_loop().sock_recv(client, 1 << 20):
                        pass
                client.close()

    run(main())


def test_a_slow_reader_that_does_read_is_not_cut_off(model):
    async def main():
        async with gateway(model, FakeRouter(script=heavy), stall_timeout_s=20.0) as g:
            client = await raw_post(port_of(g), {**HEAVY, "n": 16}, receive_bytes=65536)
            received, loop, passed = b"", asyncio.get_running_loop(), 0
            while not received.endswith(b"0\r\n\r\n"):
                received += (data := await loop.sock_recv(client, 16384))
                assert data, "the connection was cut"
                if len(received) > (passed + 1) * BUFFERS_BYTES:
                    passed += 1
                    pass_time(10.0)
            assert passed > 3 and b"[DONE]" in received[-100:] and g.services.guard.cut_count == 0
            client.close()

    run(main(), OwnClock)


def test_over_the_limit_429_then_room_again(model):
    async def main():
        router = FakeRouter(hold_at=1)
        async with gateway(model, router, max_requests=3) as g:
            running = asyncio.create_task(g.post("/v1/completions", {**REQUEST, "n": 2}))
            await g.until(lambda: len(g.services.journal) == 2)
            status, body, headers = await g.post("/v1/completions", {**REQUEST, "n": 2})
            assert (status, body["error"]["code"], body["error"]["type"]) == (429, "queue_full", "rate_limit_error")
            assert int(headers["Retry-After"]) > 0
            router.release()
            assert (await running)[0] == 200
            assert (await g.post("/v1/completions", {**REQUEST, "n": 2}))[0] == 200

    run(main())


def test_a_queue_that_does_not_move_takes_nobody_more(model):
    """Degraded must not become collapse: who is admitted waits a bounded time, the others are told at once."""

    async def main():
        router = FakeRouter(hold_at=0)
        async with gateway(model, router, max_requests=16, max_queue_wait_s=30.0) as g:
            few = [asyncio.create_task(g.post("/v1/completions", REQUEST)) for _ in range(2)]
            await g.until(lambda: len(g.services.journal) == 2)
            pass_time(31.0)
            third = asyncio.create_task(g.post("/v1/completions", REQUEST))  # two that wait long are no queue
            await g.until(lambda: len(g.services.journal) == 3)
            status, body, headers = await g.post("/v1/completions", REQUEST)
            assert (status, body["error"]["code"], headers["Retry-After"]) == (429, "queue_slow", "5")
            router.release()
            assert [(await answer)[0] for answer in (*few, third)] == [200] * 3
            router.hold_at = 0
            after = [asyncio.create_task(g.post("/v1/completions", REQUEST)) for _ in range(4)]
            await g.until(lambda: len(g.services.journal) == 4)  # a queue that is young is taken
            router.release()
            assert [(await answer)[0] for answer in after] == [200] * 4

    run(main(), OwnClock)
