"""Readiness, metrics, status, request ids, and the end of the process."""

import asyncio
import json
import subprocess
import sys

from moering.protocol import RouterStats
from tests.gateway.fake_router import FakeRouter
from tests.gateway.harness import gateway, in_thread, run

REQUEST = {"prompt": [5], "max_tokens": 8}


def test_importing_the_gateway_imports_no_torch():
    code = (
        "import sys, gateway.app, gateway.server, gateway.__main__\n"
        "bad = {'torch', 'transformers', 'router', 'expert_server', 'kernels'} & set(sys.modules)\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_ready_needs_a_router_and_all_experts_once(model):
    async def main():
        router = FakeRouter()
        async with gateway(model) as g:
            assert (await g.get("/health"))[0] == 200
            status, text, headers = await g.get("/ready")
            assert status == 503 and json.loads(text)["error"]["message"] == "the model is still being loaded"
            assert "Retry-After" in headers
            status, body, headers = await g.post("/v1/completions", REQUEST)
            assert status == 503 and body["error"]["code"] == "not_ready" and "Retry-After" in headers
            g.show(router, routed=False)
            await g.connected()
            assert (await g.get("/ready"))[0] == 503
            g.show(router, routed=True)
            assert (await g.get("/ready"))[0] == 200
            g.show(router, routed=False)  # experts orphaned later: requests are still accepted
            assert (await g.get("/ready"))[0] == 200
        router.kill()

    run(main())


def test_metrics_count_what_happened(model):
    async def main():
        async with gateway(model, FakeRouter()) as g:
            await g.post("/v1/completions", REQUEST)
            await g.post("/v1/completions", {"prompt": ""})
            status, text, headers = await g.get("/metrics")
            assert status == 200 and headers["Content-Type"].startswith("text/plain")
            for line in (
                "moering_prompt_tokens_total 1.0",
                "moering_generation_tokens_total 8.0",
                'moering_request_success_total{finished_reason="length"} 1.0',
                'moering_http_responses_total{status="400"} 1.0',
                "moering_time_to_first_token_seconds_count 1.0",
                "moering_e2e_request_latency_seconds_count 1.0",
                "moering_num_requests_running 0.0",
                "moering_routers_connected 1.0",
                "moering_epoch 1.0",
            ):
                assert line in text.splitlines(), line

    run(main())


def test_status_shows_the_view_and_this_process(model):
    async def main():
        router = FakeRouter()
        async with gateway(model, router) as g:
            status, text, _ = await g.get("/admin/status")
            body = json.loads(text)
            assert status == 200 and set(body) == {
                "epoch", "processes", "failures_survivable", "failures_restorable", "orphans", "under_target",
                "router_counters",
            }  # fmt: skip
            own, other = body["processes"]
            assert (own["kind"], own["state"], own["address"]) == ("gateway", "ONLINE", g.url)
            assert other == {
                "id": "router-0", "kind": "router", "pid": 1, "state": "ONLINE",
                "incarnation": router.incarnation, "address": router.address, "experts": 0,
                "zone": "", "passed_over": {},
            }  # fmt: skip

    run(main())


def resent(text):
    name = "moering_router_rows_resent_total"
    return {line.removeprefix(name) for line in text.splitlines() if line.startswith(name)}


def test_figures_of_the_routers_are_shown(model):
    async def main():
        routers = [FakeRouter(f"r{i}") for i in range(2)]
        async with gateway(model, *routers) as g:
            for router, rows in zip(routers, (3.0, 4.0), strict=True):
                gauges = {"kv_cache_usage_perc": rows / 10}
                router.send(RouterStats(router.server_id, {"rows_resent": rows}, gauges, {"router-9": "slow"}))
            await g.until(lambda: len(g.services.pool.stats) == 2)
            text = (await g.get("/metrics"))[1]
            assert resent(text) == {'{router="r0"} 3.0', '{router="r1"} 4.0'}
            assert text.count("# TYPE moering_router_rows_resent_total counter") == 1
            assert "moering_router_kv_cache_usage_perc 0.4" in text.splitlines()
            assert json.loads((await g.get("/admin/status"))[1])["router_counters"] == {"rows_resent": 7.0}
            g.show(routers[0])
            text = (await g.get("/metrics"))[1]
            assert resent(text) == {'{router="r0"} 3.0'}
            assert "moering_router_kv_cache_usage_perc 0.3" in text.splitlines()

    run(main())


def test_balance_is_shown_by_router_and_layer(model):
    async def main():
        router = FakeRouter("r0")
        async with gateway(model, router) as g:
            router.send(RouterStats("r0", {}, {}, {}, [1.5, 0.0, 3.0], [1.0, 0.0, 1.25]))
            await g.until(lambda: len(g.services.pool.stats) == 1)
            lines = (await g.get("/metrics"))[1].splitlines()
            shown = {line for line in lines if "max_over_mean{" in line}
            assert shown == {
                'moering_expert_load_max_over_mean{layer="0",router="r0"} 1.5',
                'moering_expert_load_max_over_mean{layer="2",router="r0"} 3.0',
                'moering_server_load_max_over_mean{layer="0",router="r0"} 1.0',
                'moering_server_load_max_over_mean{layer="2",router="r0"} 1.25',
            }

    run(main())


def test_request_ids_are_echoed_or_made(model):
    async def main():
        async with gateway(model, FakeRouter()) as g:
            for path, body in (("/v1/completions", {**REQUEST, "stream": True}), ("/v1/completions", {"prompt": ""})):
                async with g.session.post(g.url + path, json=body, headers={"X-Request-Id": "mine-1"}) as response:
                    assert response.headers["X-Request-Id"] == "mine-1"
            made = {(await g.get("/health"))[2]["X-Request-Id"] for _ in range(2)}
            assert len(made) == 2 and all(made)

    run(main())


def test_a_line_about_the_load_while_there_is_load(model, caplog):
    async def main():
        async with gateway(model, router := FakeRouter(hold_at=2), log_interval_s=0.05) as g:
            stream = asyncio.create_task(g.stream("/v1/completions", REQUEST))
            await g.until(lambda: "1 running, 0 waiting" in caplog.text)
            router.release()
            assert (await stream)[-1] == "[DONE]"

    caplog.set_level("INFO", "gateway.reporter")
    run(main())


def test_models_and_version(model):
    async def main():
        async with gateway(model) as g:
            listed = json.loads((await g.get("/v1/models"))[1])
            assert [m["id"] for m in listed["data"]] == ["tiny"]
            assert json.loads((await g.get("/v1/models/tiny"))[1]) == listed["data"][0]
            assert listed["data"][0]["max_model_len"] == 512
            assert "version" in json.loads((await g.get("/version"))[1])

    run(main())


def test_the_end_lets_running_streams_finish(model):
    async def main():
        router = FakeRouter(hold_at=3)
        async with gateway(model, router) as g:
            stream = asyncio.create_task(g.stream("/v1/completions", REQUEST))
            await g.until(lambda: g.services.journal.taken_tokens == 3)
            asyncio.get_running_loop().call_later(0.2, router.release)
            finished_by_end = stream
        # the gateway's clean-up has run: it waited for the stream
        assert (await finished_by_end)[-1] == "[DONE]"

    run(main())


def test_a_router_that_dies_during_the_end_does_not_end_its_streams(model):
    async def main():
        first, second = FakeRouter("r0", hold_at=3), FakeRouter("r1")
        async with gateway(model, first) as g:
            stream = asyncio.create_task(g.stream("/v1/completions", REQUEST))
            await in_thread(first.wait, lambda r: r.submits)
            g.show_members([first.member(), second.member()])
            await g.connected(2)
            asyncio.get_running_loop().call_later(0.1, first.kill)
        assert (await stream)[-1] == "[DONE]"

    run(main())


def test_the_end_does_not_wait_for_ever(model):
    async def main():
        router = FakeRouter(hold_at=3)
        async with gateway(model, router, drain_timeout_s=0.3) as g:
            stream = asyncio.create_task(g.stream("/v1/completions", REQUEST))
            await in_thread(router.wait, lambda r: r.submits)
            await g.until(lambda: g.services.journal.taken_tokens == 3)
            keep = g
        assert "stopping" in (await stream)[-1]["error"]["message"]
        assert len(keep.services.journal) == 0

    run(main())
