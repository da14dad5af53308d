"""The admin interface: who may use it, what it asks of the coordinator, and the timeline it shows."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from gateway import server
from gateway.admin import Admin, admin_keys
from gateway.config import Config
from gateway.membership import apply_view
from moering.errors import ConfigError
from moering.protocol import Event, Events, Operate, OperateAnswer, Operation
from tests.gateway.fake_router import FakeRouter
from tests.gateway.harness import Gateway, OwnClock, gateway, make_view, pass_time, run


class Coordinator:
    """Answers what the gateway asks, after `deaf` times of silence, and shows it in a view."""

    def __init__(self, g: Gateway, code: str = "accepted", phase: str = "done", deaf: int = 0) -> None:
        self.asked: list[Operate] = []
        self._g, self._code, self._phase, self._deaf = g, code, phase, deaf
        g.services.admin.send = self.take

    def take(self, ask: Any) -> None:
        self.asked.append(ask)
        if len(self.asked) <= self._deaf:
            return
        if self._code == "accepted":
            op = Operation(ask.id, ask.action, ask.process_kind, ask.count, self._phase, "", 1.0, 2.0, 3.0, 77)
            apply_view(self._g.services, replace(make_view([], 50), operations=[op]))
        self._g.services.admin.take(OperateAnswer(ask.id, self._code, "because"))


def test_operations_go_to_the_coordinator(model):
    async def main():
        async with gateway(model) as g:
            coordinator = Coordinator(g, deaf=1)
            status, body, _ = await g.post("/admin/scale", {"kind": "router", "count": 2, "deadline_s": 9})
            assert (status, body["action"], body["kind"], body["count"]) == (202, "scale", "router", 2)
            assert coordinator.asked[0] == coordinator.asked[1]  # asked again, under the same id
            assert coordinator.asked[0].deadline_s == 9.0
            assert json.loads((await g.get(f"/admin/operations/{body['id']}"))[1]) == body
            assert (await g.get("/admin/operations/nothing"))[0] == 404

    run(main())


@pytest.mark.parametrize(
    ("code", "status"), [("busy", 409), ("refused", 409), ("not_found", 404), ("bad_request", 400)]
)
def test_a_refusal_is_passed_on_with_its_reason(model, code, status):
    async def main():
        async with gateway(model) as g:
            Coordinator(g, code)
            got, body, _ = await g.post("/admin/drain", {"id": "expert-0"})
            assert (got, body["error"]["message"], body["error"]["code"]) == (status, "because", code)

    run(main())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/admin/scale", {}),
        ("/admin/scale", {"count": "6"}),
        ("/admin/scale", {"count": True}),
        ("/admin/drain", {"name": "expert-0"}),
        ("/admin/restart", {"kind": 1}),
        ("/scale_elastic_ep", {"new_data_parallel_size": 0}),
        ("/scale_elastic_ep", {"new_data_parallel_size": 2, "drain_timeout": -1}),
    ],
)
def test_bad_bodies_are_refused_here(model, path, body):
    async def main():
        async with gateway(model) as g:
            coordinator = Coordinator(g)
            assert (await g.post(path, body))[0] == 400
            assert not coordinator.asked
            # A web page of another origin cannot send JSON without asking first.
            assert (await g.post(path, data="{}", headers={"Content-Type": "text/plain"}))[0] == 415

    run(main())


# Python's JSON takes all of these, and no message to the coordinator does: the thread that sent one ended the process.
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/admin/scale", '{"count": 99999999999999999999}'),
        ("/admin/scale", '{"count": 3, "deadline_s": Infinity}'),
        ("/admin/scale", '{"count": 3, "deadline_s": NaN}'),
        ("/admin/scale", '{"count": 3, "deadline_s": ' + "9" * 400 + "}"),
        ("/admin/drain", r'{"id": "\ud800"}'),
        ("/scale_elastic_ep", '{"new_data_parallel_size": 99999999999999999999}'),
        ("/scale_elastic_ep", '{"new_data_parallel_size": 3, "drain_timeout": Infinity}'),
        ("/scale_elastic_ep", '{"new_data_parallel_size": 3, "drain_timeout": ' + "9" * 400 + "}"),
    ],
)
def test_what_the_coordinator_could_not_read_is_refused_here(model, path, body):
    async def main():
        async with gateway(model) as g:
            coordinator = Coordinator(g)
            assert (await g.post(path, data=body, headers={"Content-Type": "application/json"}))[0] == 400
            assert not coordinator.asked

    run(main())


def test_the_endpoints_of_other_servers(model):
    async def main():
        async with gateway(model) as g:
            Coordinator(g)
            status, body, _ = await g.post("/scale_elastic_ep", {"new_data_parallel_size": 6, "drain_timeout": 60})
            assert (status, body["moved_bytes"]) == (200, 77)
            assert json.loads((await g.get("/is_scaling_elastic_ep"))[1]) == {"is_scaling_elastic_ep": False}
            Coordinator(g, phase="starting")
            assert (await g.post("/admin/scale", {"count": 3}))[0] == 202
            assert (await g.post("/is_scaling_elastic_ep"))[1] == {"is_scaling_elastic_ep": True}

    run(main())


PATHS = ("/admin/status", "/admin/operations", "/admin/events", "/is_scaling_elastic_ep")


@pytest.mark.parametrize("path", PATHS)
def test_with_a_key_everybody_needs_it(model, path):
    async def main():
        async with gateway(model, admin_key="secret") as g:
            for headers, status in (({}, 401), ({"Authorization": "Bearer wrong"}, 401),
                                    ({"Authorization": "Bearer secret"}, 200)):  # fmt: skip
                async with g.session.get(g.url + path, headers=headers) as response:
                    assert response.status == status
            assert (await g.get("/health"))[0] == (await g.get("/metrics"))[0] == 200

    run(main())


def test_a_key_that_is_no_text_is_wrong(model):
    async def main():
        async with gateway(model, admin_key="secret") as g:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(g.url.rpartition(":")[2]))
            writer.write(b"GET /admin/status HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer \xff\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 401")
            writer.close()

    run(main())


@pytest.mark.parametrize("path", PATHS)
def test_without_a_key_a_proxy_on_this_machine_may_not(model, path):
    async def main():
        async with gateway(model) as g:
            async with g.session.get(g.url + path, headers={"X-Forwarded-For": "10.0.0.1"}) as response:
                assert response.status == 403
            assert (await g.get(path))[0] == 200

    run(main())


def test_keys_come_from_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text("one\ntwo\n")
    assert admin_keys(Config(admin_key="zero", admin_key_file=str(file))) == ["zero", "one", "two"]
    file.write_text("\n")
    with pytest.raises(ConfigError, match="holds no key"):
        admin_keys(Config(admin_key_file=str(file)))


def event(number: int) -> Event:
    return Event(number, "member.offline", f"expert-{number}", 3, "gone")


def test_the_timeline_from_an_event_on(model):
    async def main():
        async with gateway(model) as g:
            g.services.admin.take(Events([event(1), event(2)]))
            g.services.admin.take(Events([event(2), event(3)]))  # a gateway that registers again gets all of them again

            async def ids(path: str) -> list[int]:
                return [e["id"] for e in json.loads((await g.get(path))[1])["events"]]

            assert await ids("/admin/events") == [1, 2, 3]
            assert await ids("/admin/events?since=2") == [3]
            assert (await g.get("/admin/events?since=yesterday"))[0] == 400

    run(main())


def test_the_timeline_live(model):
    async def main():
        async with gateway(model) as g:
            g.services.admin.take(Events([event(1), event(2)]))
            headers = {"Accept": "text/event-stream", "Last-Event-ID": "1"}
            async with g.session.get(g.url + "/admin/events", headers=headers) as response:
                assert await response.content.readline() == b"id: 2\n"
                assert json.loads((await response.content.readline())[6:])["subject"] == "expert-2"
                await response.content.readline()
                g.services.admin.take(Events([event(3)]))
                assert await response.content.readline() == b"id: 3\n"
        # and the end of the gateway did not wait for that stream

    run(main())


def test_a_gateway_that_leaves_serves_the_connections_it_has(model):
    """A client that sends its next request while the gateway goes gets its answer, and is told to go elsewhere."""

    async def main():
        request = {"model": "tiny", "prompt": [1, 2], "max_tokens": 2}
        async with gateway(model, FakeRouter()) as g:
            assert (await g.post("/v1/completions", request))[0] == 200
            g.services.cluster.leaving = True
            status, _, headers = await g.post("/v1/completions", request)
            assert (status, headers["Connection"]) == (200, "close")
            assert (await g.get("/ready"))[0] == 503
            assert g.services.member().state == "DRAINING"

    run(main())


def test_the_next_request_on_a_connection_is_served_by_a_gateway_that_an_operation_ends(model, monkeypatch):
    """A stream that began before keeps its connection, which the client knows of no reason not to use again."""
    monkeypatch.setattr("gateway.server.LAME_DUCK_S", 60.0)

    async def main():
        request = {"model": "tiny", "prompt": [1, 2], "max_tokens": 2}
        router = FakeRouter(hold_at=1)

        async def two_requests(url, begun):
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as session:
                async with session.post(f"{url}/v1/completions", json=request | {"stream": True}) as response:
                    begun.set()
                    assert (await response.read()).endswith(b"data: [DONE]\n\n")
                await asyncio.sleep(10 * server.LAME_DUCK_LOOK_S)  # the gateway sees that nothing is under way
                async with session.post(f"{url}/v1/completions", json=request) as response:
                    return response.status, response.headers["Connection"]

        async def let_go_late(g):
            await g.until(lambda: g.services.cluster.leaving)
            pass_time(100)  # the moment for those who send just now is over long before the stream is
            await asyncio.sleep(5 * server.LAME_DUCK_LOOK_S)
            router.release()

        async with gateway(model, router) as g:
            begun = asyncio.Event()
            requests = asyncio.create_task(two_requests(g.url, begun))
            await begun.wait()
            g.services.cluster.told_to_leave.set()
            letting_go = asyncio.create_task(let_go_late(g))
        await letting_go
        assert await requests == (200, "close")

    run(main(), OwnClock)


def test_a_coordinator_that_never_answers(monkeypatch):
    async def main():
        monkeypatch.setattr("gateway.admin.GIVE_UP_S", 0.05)
        with pytest.raises(Exception, match="does not answer"):
            await Admin([]).ask(Operate("op", "scale"))

    asyncio.run(main())


def test_two_who_ask_the_same_at_once_are_both_answered():
    async def main():
        admin, asked = Admin([]), []

        def send(ask):
            asked.append(ask)
            if len(asked) == 2:
                admin.take(OperateAnswer("op", "accepted", ""))

        admin.send = send
        await asyncio.gather(*(admin.ask(Operate("op", "cancel")) for _ in range(2)))
        assert len(asked) == 2

    run(main())
