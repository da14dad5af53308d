"""A router is lost, stuck, restarted or lies: the client's stream goes on with the same tokens, or ends once."""

import asyncio
import dataclasses
from functools import partial

import pytest

from gateway import router_link
from moering.protocol import Failed, MemberInfo, RouterStats, Token, Tokens
from tests.gateway.fake_router import FakeRouter, counts, token
from tests.gateway.harness import OwnClock, gateway, in_thread, pass_time, run

REQUEST = {"prompt": [5, 6], "max_tokens": 12, "seed": 3, "return_token_ids": True}


def expected_ids(model) -> list[int]:
    """What an undisturbed run emits."""
    result = []

    async def main():
        async with gateway(model, FakeRouter()) as g:
            _, body, _ = await g.post("/v1/completions", REQUEST)
            result.extend(body["choices"][0]["token_ids"])

    run(main())
    assert len(result) == 12
    return result


def streamed_ids(events) -> list[int]:
    assert events[-1] == "[DONE]"
    assert [e["choices"][0]["finish_reason"] for e in events[:-1]].count("length") == 1
    return [t for e in events[:-1] for t in e["choices"][0]["token_ids"]]


@pytest.mark.parametrize("hold_at", [0, 1, 5, 11])
def test_a_stream_goes_on_at_another_router_with_equal_tokens(model, hold_at):
    expected = expected_ids(model)

    async def main():
        first, second = FakeRouter("r0", hold_at=hold_at), FakeRouter("r1", hold_at=0)
        async with gateway(model, first) as g:
            stream = asyncio.create_task(g.stream("/v1/completions", REQUEST))
            await g.until(lambda: any(len(r.emitted) == hold_at for r in g.services.journal.records()))
            g.show(first, second)
            await g.connected(2)
            await in_thread(first.kill)
            await in_thread(second.wait, lambda r: r.submits)
            submit = second.submits[0]
            assert (submit.emitted, submit.attempt) == (expected[:hold_at], 2)
            assert submit.sampling == first.submits[0].sampling
            second.release()
            assert streamed_ids(await stream) == expected
            assert g.services.pool.failovers == 1
        second.kill()

    run(main())


def test_the_streams_of_a_lost_router_arrive_together_the_shortest_first(model):
    lengths = (4, 2, 9, 3)

    async def main():
        first, second = FakeRouter("r0", hold_at=1), FakeRouter("r1")
        async with gateway(model, first) as g:
            streams = []
            for count, n in enumerate(lengths, 1):
                streams.append(asyncio.create_task(g.stream("/v1/completions", {**REQUEST, "prompt": [5] * n})))
                await g.until(partial(emitted, g, count))
            g.show(first, second)
            await g.connected(2)
            await in_thread(first.kill)
            for stream in streams:
                streamed_ids(await stream)
            assert [len(s.prompt) for s in second.submits] == sorted(lengths)
            assert second.arrived == [1, len(lengths)]  # the hello
        second.kill()

    run(main())


def test_without_another_router_the_stream_is_held_for_the_new_incarnation(model):
    expected = expected_ids(model)

    async def main():
        first = FakeRouter("r0", hold_at=4)
        async with gateway(model, first) as g:
            stream = asyncio.create_task(g.stream("/v1/completions", REQUEST))
            await g.until(lambda: any(len(r.emitted) == 4 for r in g.services.journal.records()))
            await in_thread(first.kill)
            await g.until(lambda: g.services.pool.held == 1)
            assert (await g.get("/ready"))[0] == 503
            late = asyncio.create_task(g.post("/v1/completions", REQUEST))  # accepted while no router is there
            await g.until(lambda: g.services.pool.held == 2)
            second = FakeRouter("r0")
            g.show(second)
            assert streamed_ids(await stream) == expected
            assert (await late)[1]["choices"][0]["token_ids"] == expected
            assert (await g.get("/ready"))[0] == 200
            second.kill()

    run(main())


def test_a_router_that_left_the_view_loses_its_requests_even_if_it_still_answers(model):
    expected = expected_ids(model)

    async def main():
        first, second = FakeRouter("r0", hold_at=4), FakeRouter("r1")
        async with gateway(model, first) as g:
            stream = asyncio.create_task(g.stream("/v1/completions", REQUEST))
            await g.until(lambda: any(len(r.emitted) == 4 for r in g.services.journal.records()))
            g.show(second)
            first.release()  # a zombie that goes on
            assert streamed_ids(await stream) == expected
        second.kill()

    run(main())


def test_stale_repeated_and_early_tokens_never_reach_the_client(model):
    expected = expected_ids(model)

    async def main():
        router = FakeRouter(hold_at=4)
        async with gateway(model, router) as g:
            stream = asyncio.create_task(g.stream("/v1/completions", REQUEST))
            await g.until(lambda: any(len(r.emitted) == 4 for r in g.services.journal.records()))
            submit = router.submits[0]
            stale = [Token(submit.request_id, attempt, 4, 9) for attempt in (0, 2)]
            strays = [token(submit, 3, 9), token(submit, 5, 9), Token("nobody", 1, 0, 9), *stale]
            router.send(Tokens(strays), Failed(submit.request_id, 0, "internal", "stale"))
            await g.until(lambda: g.services.journal.dropped_tokens == len(strays))
            router.release()
            assert streamed_ids(await stream) == expected

    run(main())


def test_a_draining_router_finishes_its_requests_and_gets_no_new_ones(model):
    async def main():
        first, second = FakeRouter("r0", hold_at=4), FakeRouter("r1")
        async with gateway(model, first) as g:
            stream = asyncio.create_task(g.stream("/v1/completions", REQUEST))
            await in_thread(first.wait, lambda r: r.submits)
            g.show_members([first.member("DRAINING"), second.member()])
            await g.connected(1)
            assert (await g.post("/v1/completions", REQUEST))[0] == 200
            assert len(second.submits) == 1 and len(first.submits) == 1
            first.release()
            streamed_ids(await stream)
            assert g.services.pool.failovers == 0
        second.kill()

    run(main())


def test_requests_go_to_the_router_with_the_least_work(model):
    async def main():
        routers = [FakeRouter(f"r{i}", hold_at=1) for i in range(2)]
        async with gateway(model, *routers) as g:
            tasks = [asyncio.create_task(g.stream("/v1/completions", REQUEST)) for _ in range(4)]
            for router in routers:
                await in_thread(router.wait, lambda r: len(r.submits) == 2)
            for router in routers:
                router.release()
            for task in tasks:
                streamed_ids(await task)

    run(main())


def emitted(g, count: int) -> bool:
    return sum(len(r.emitted) for r in g.services.journal.records()) == count


def test_requests_that_begin_alike_go_to_one_router_while_its_load_allows(model):
    model = dataclasses.replace(model, context_tokens=1024)
    alike = {**REQUEST, "prompt": [10] * 512 + [5, 6]}

    async def main():
        routers = [FakeRouter(f"r{i}") for i in range(2)]
        async with gateway(model, *routers) as g:
            for _ in range(3):
                assert (await g.post("/v1/completions", alike))[0] == 200
            first = next(r for r in routers if r.submits)
            other = next(r for r in routers if r is not first)
            assert (len(first.submits), len(other.submits)) == (3, 0)
            for router in routers:
                router.hold_at = 1
            tasks = []
            for count in range(1, 7):
                tasks.append(asyncio.create_task(g.stream("/v1/completions", alike)))
                await g.until(partial(emitted, g, count))
            assert (len(first.submits), len(other.submits)) == (3 + 3, 3)  # since its first it has the prefix, too
            for router in routers:
                router.release()
            for task in tasks:
                streamed_ids(await task)

    run(main())


def test_what_a_router_computes_for_other_gateways_counts(model):
    async def main():
        routers = [FakeRouter(f"r{i}") for i in range(2)]
        async with gateway(model, *routers) as g:
            routers[0].send(RouterStats("r0", {}, {"requests_running": 5, "requests_waiting": 2}))
            await g.until(lambda: "r0" in g.services.pool.stats)
            for _ in range(4):
                assert (await g.post("/v1/completions", REQUEST))[0] == 200
            assert [len(r.submits) for r in routers] == [0, 4]

    run(main())


def test_a_router_that_answers_heartbeats_and_says_nothing_is_left(model, monkeypatch):
    """Its process lives and its main loop hangs. One that reports goes on, however slow its tokens are."""
    monkeypatch.setattr(router_link, "SILENCE_S", 2)
    expected = expected_ids(model)

    async def main():
        hangs, works = FakeRouter("r0", hold_at=4), FakeRouter("r1", hold_at=0)
        async with gateway(model, hangs) as g:
            stream = asyncio.create_task(g.stream("/v1/completions", REQUEST))
            await g.until(lambda: any(len(r.emitted) == 4 for r in g.services.journal.records()))
            g.show(hangs, works)
            await g.connected(2)
            works.report_s = 0.2
            await in_thread(works.wait, lambda r: r.submits)
            assert works.submits[0].emitted == expected[:4]
            await asyncio.sleep(3)  # more than the silence that is allowed
            works.release()
            assert streamed_ids(await stream) == expected
            assert len(works.submits) == 1
        works.kill()

    run(main())


def test_garbage_from_a_router_costs_its_connection_and_no_request(model):
    expected = expected_ids(model)

    async def main():
        router = FakeRouter(hold_at=4)
        async with gateway(model, router) as g:
            stream = asyncio.create_task(g.stream("/v1/completions", REQUEST))
            await g.until(lambda: any(len(r.emitted) == 4 for r in g.services.journal.records()))
            router.send(b"\xc1garbage")
            await in_thread(router.wait, lambda r: len(r.hellos) == 2)
            router.release()
            assert streamed_ids(await stream) == expected
            assert [s.attempt for s in router.submits] == [1, 2]

    run(main())


def test_an_address_where_another_incarnation_answers_is_not_used(model):
    async def main():
        router = FakeRouter()
        async with gateway(model, router) as g:
            wrong = router.member()
            wrong = MemberInfo("router", "r9", wrong.incarnation + 1, wrong.address, 1, "ONLINE", "", 0, 0)
            g.show_members([router.member(), wrong])
            await in_thread(router.wait, lambda r: len(r.hellos) >= 3)  # it was tried, and tried again
            assert g.services.pool.connected == 1

    run(main())


@pytest.mark.parametrize(
    ("code", "status"),
    [("context_length", 400), ("no_replica", 503), ("overloaded", 503), ("timeout", 504), ("internal", 500)],
)
def test_a_failure_before_the_first_token_has_its_own_status(model, code, status):
    async def main():
        router = FakeRouter(hold_at=0)
        async with gateway(model, router) as g:
            for stream in (False, True):
                answer = asyncio.create_task(g.post("/v1/completions", {**REQUEST, "stream": stream}))
                await in_thread(router.wait, lambda r, n=1 + stream: len(r.submits) == n)
                router.send(Failed(router.submits[-1].request_id, 1, code, "because"))
                got, body, headers = await answer
                assert (got, body["error"]["code"], body["error"]["message"]) == (status, code, "because")
                assert ("Retry-After" in headers) == (status == 503)

    run(main())


def test_a_failure_in_mid_stream_is_an_event_without_done(model):
    async def main():
        router = FakeRouter(hold_at=3)
        async with gateway(model, router) as g:
            request = {**REQUEST, "n": 2}
            stream = asyncio.create_task(g.stream("/v1/completions", request))
            await g.until(lambda: g.services.journal.taken_tokens == 6)
            router.send(Failed(router.submits[0].request_id, 1, "no_replica", "gone"))
            *chunks, last = await stream
            assert len(chunks) >= 2 and last["error"]["code"] == "no_replica"
            await in_thread(router.wait, lambda r: r.aborts)  # the other choice is not computed for nobody
            assert router.aborts[0].request_id == router.submits[1].request_id
            assert len(g.services.journal) == 0

    run(main())


def test_a_request_that_outlives_too_many_routers_is_ended(model):
    async def main():
        async with gateway(model) as g:
            g.show(router := FakeRouter("r0", hold_at=0))
            await g.connected()
            answer = asyncio.create_task(g.post("/v1/completions", REQUEST))
            for i in range(1, 6):
                await in_thread(router.wait, lambda r: r.submits)
                following = FakeRouter(f"r{i}", hold_at=0)
                await in_thread(router.kill)
                g.show(router := following)
            status, body, _ = await answer
            assert (status, body["error"]["code"]) == (500, "poison")
            assert router.submits == []
            await in_thread(router.kill)

    run(main())


def test_the_deadline_ends_a_request_once(model):
    async def main():
        router = FakeRouter(hold_at=2)
        async with gateway(model, router, request_timeout_s=40.0) as g:
            begun = asyncio.Event()
            stream = asyncio.create_task(g.stream("/v1/completions", REQUEST, begun))
            await begun.wait()
            pass_time(40.0)
            *_, last = await stream
            assert last["error"]["code"] == "timeout"
            await in_thread(router.wait, lambda r: r.aborts)
            assert 0 < router.submits[0].deadline_s <= 40.0
            assert len(g.services.journal) == 0

    run(main(), OwnClock)


def test_counts_depends_on_what_a_resume_must_keep():
    """The fake's tokens would show a resume with another seed, choice, position or prompt."""
    from moering.protocol import Sampling, Submit

    def first(seed=1, choice=0, position=0, prompt=(5,)):
        sampling = Sampling(9, seed=seed, choice=choice)
        return counts(Submit("a", 1, list(prompt), [], sampling, 1.0), position).token_id

    assert len({first(), first(seed=2), first(choice=1), first(position=1), first(prompt=(9,))}) == 5
