"""The timeline: what happened, in order, with ids that grow, whatever the clock does."""

from __future__ import annotations

import json

import pytest

from moering.timeline import KEPT, Timeline
from tests.moering.cluster import Member, running
from tests.moering.elastic_cluster import ElasticCluster, elastic


def types(c: ElasticCluster, since: int = 0) -> list[tuple[str, str]]:
    return [(e.type, e.subject) for e in c.coordinator.timeline.after(since, KEPT)]


def test_ids_are_times_and_grow_even_if_the_clock_goes_back() -> None:
    t = Timeline()
    for at in (10.0, 10.0, 5.0, 11.0):
        t.add("x", "", "", at=at)
    ids = [e.id for e in t.after(0, 10)]
    assert ids == [10_000_000, 10_000_001, 10_000_002, 11_000_000]
    assert [e.id for e in t.after(ids[1], 1)] == [ids[2]]
    assert t.after(ids[3], 10) == []


def test_only_the_last_events_are_kept() -> None:
    t = Timeline()
    for i in range(KEPT + 5):
        t.add("x", str(i), "", at=float(i))
    assert len(t.after(0, 10**6)) == KEPT
    assert t.after(0, 1)[0].subject == "5"


def test_every_event_is_a_line_of_json(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "moering.timeline")
    t = Timeline()
    t.add("member.offline", "expert-1", 'it said "no"\nand died', at=12.5, epoch=7)
    (line,) = [r.message for r in caplog.records]
    assert "\n" not in line
    assert json.loads(line) == {
        "id": 12_500_000, "at": 12.5, "type": "member.offline", "subject": "expert-1", "epoch": 7,
        "text": 'it said "no"\nand died',
    }  # fmt: skip


def test_a_death_and_the_recovery_from_it() -> None:
    c = running(3, kind=ElasticCluster)
    last = c.coordinator.timeline.after(0, KEPT)[-1].id
    c.members["r0"].suspects = ["e1"]
    c.run(1)
    c.kill("e1")
    c.run(1)
    c.members["r0"].suspects = []
    c.run(10)
    seen = types(c, last)
    order = [("failure.suspected", "e1"), ("member.offline", "e1")]
    order += [("redundancy.lost", ""), ("redundancy.restored", "")]
    assert [s for s in seen if s in order] == order
    assert ("failure.over", "e1") in seen
    offline = next(e for e in c.coordinator.timeline.after(0, KEPT) if e.type == "member.offline")
    assert offline.text == "it exited with -9"


def test_joining_and_an_operation_and_a_new_coordinator() -> None:
    c = elastic()
    last = c.coordinator.timeline.after(0, KEPT)[-1].id
    c.ask("scale", kind="expert-server", count=4)
    c.until_over()
    wanted = [
        ("operation.starting", "op"), ("member.registered", "expert-3"), ("member.online", "expert-3"),
        ("operation.done", "op"),
    ]  # fmt: skip
    seen = types(c, last)
    assert [s for s in seen if s in wanted] == wanted
    c.ask("drain", "no", target="nobody")
    assert types(c)[-1] == ("operation.refused", "no")
    c.run(1.5)
    c.start_coordinator()
    c.run(3)
    assert ("coordinator.took_over", "coordinator") in types(c)
    assert not any(kind.startswith("operation") for kind, _ in types(c)), "an operation that is over is no news"


def test_nothing_happens_while_nothing_happens() -> None:
    c = running(3, kind=ElasticCluster)
    c.run(5)
    before = types(c)
    c.add(Member("gateway", "g1"))
    c.run(30)
    assert types(c)[len(before) :] == [("member.registered", "g1"), ("plan.published", "")]
