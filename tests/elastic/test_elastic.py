"""A cluster grows, shrinks and is renewed under streams: real processes, and clients that notice nothing."""

from __future__ import annotations

import signal
from contextlib import suppress

import pytest

from moering.http_client import HttpError, get_json
from tests.elastic.operations import begin, done, ids, streaming, wait_phase
from tests.faults.scenario import STREAMS, TOKENS, Scenario
from tests.integration.cluster import SERVERS, Cluster

SIX = [f"expert-{i}" for i in range(6)]
KINDS = ("expert-server", "router", "gateway", "coordinator")


def incarnations(cluster: Cluster, *kinds: str) -> dict[str, int]:
    processes = [p for p in cluster.status()["processes"] if p["state"] == "ONLINE"]  # not those who left of late
    return {p["id"]: p["incarnation"] for p in processes if p["kind"] in kinds}


def test_three_six_three_under_streams_and_then_a_death(cluster: Cluster, scenario: Scenario) -> None:
    with streaming(cluster, scenario.reference, STREAMS, TOKENS):
        up = done(cluster, begin(cluster, "scale", kind="expert-server", count=6))
        assert ids(cluster, "expert-server") == SIX
        down = done(cluster, begin(cluster, "scale", kind="expert-server", count=3))
    assert ids(cluster, "expert-server") == list(SERVERS)
    assert up["moved_bytes"] > 0 and down["moved_bytes"] > 0
    assert not cluster.logged("no live replica for rows")
    dead = cluster.process("expert-1")
    scenario.through(lambda _: cluster.kill("expert-1") and None)
    cluster.wait_replaced([dead])


def test_every_process_is_restarted_under_streams(cluster: Cluster, scenario: Scenario) -> None:
    before = incarnations(cluster, *KINDS)
    with streaming(cluster, scenario.reference, STREAMS, TOKENS):
        done(cluster, begin(cluster, "restart"))
    cluster.wait_settled()
    after = incarnations(cluster, *KINDS)
    assert after.keys() == before.keys()
    assert all(after[i] != before[i] for i in before)
    assert sorted(ids(cluster, "router") + ids(cluster, "gateway")) == ["gateway-0", "router-0"]


def test_what_would_break_redundancy_is_refused(cluster: Cluster, scenario: Scenario) -> None:
    for action, body, text in (
        ("scale", {"count": 1}, "not the 1 promised"),
        ("drain", {"id": "router-0"}, "no other router is ONLINE"),
        ("drain", {"id": "gateway-0"}, "no other gateway is ONLINE"),
    ):
        with pytest.raises(HttpError, match=text) as e:
            begin(cluster, action, **body)
        assert e.value.status == 409
    assert cluster.settled()


def test_a_server_is_killed_while_it_drains(cluster: Cluster, scenario: Scenario) -> None:
    done(cluster, begin(cluster, "scale", count=4))
    with streaming(cluster, scenario.reference, STREAMS, TOKENS):
        operation = begin(cluster, "drain", id="expert-3")
        # It is told and may have left before the signal comes: both are ends that a drain may have.
        wait_phase(cluster, operation, "draining", "done")
        with suppress(StopIteration, FileNotFoundError, ProcessLookupError):
            cluster.kill("expert-3")
        done(cluster, operation)
    assert ids(cluster, "expert-server") == list(SERVERS)
    cluster.wait_settled()


def test_the_coordinator_is_killed_while_the_cluster_grows(cluster: Cluster, scenario: Scenario) -> None:
    with streaming(cluster, scenario.reference, STREAMS, TOKENS):
        operation = begin(cluster, "scale", count=4)
        cluster.kill("coordinator")
        done(cluster, operation)
        assert ids(cluster, "expert-server") == SIX[:4]
        done(cluster, begin(cluster, "scale", count=3))
    cluster.wait_settled()


def test_a_server_that_is_terminated_is_empty_when_it_goes(cluster: Cluster, scenario: Scenario) -> None:
    cluster.wait_settled()
    dead = cluster.process("expert-2")

    before, drained = cluster.counters()["rows_lost"], cluster.logged("draining: others load the")
    scenario.through(lambda _: cluster.kill("expert-2", number=signal.SIGTERM) and None)
    cluster.wait_replaced([dead])
    assert cluster.logged("draining: others load the") == drained + 1
    assert cluster.counters()["rows_lost"] == before


def test_the_timeline_tells_what_has_happened_since(cluster: Cluster) -> None:
    cluster.wait_settled()
    last = get_json(f"{cluster.url}/admin/events")["events"][-1]["id"]
    cluster.wait_replaced(cluster.kill("expert-1"))
    events = get_json(f"{cluster.url}/admin/events?since={last}")["events"]
    assert [last, *(e["id"] for e in events)] == sorted({last, *(e["id"] for e in events)})
    seen = [(e["type"], e["subject"]) for e in events]
    wanted = [("member.offline", "expert-1"), ("member.registered", "expert-1"), ("member.online", "expert-1")]
    assert [event for event in seen if event in wanted] == wanted
    assert ("plan.published", "") in seen
