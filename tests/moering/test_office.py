"""What leaves an elected coordinator, and what it leaves in etcd. Pure."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from moering import election
from moering.actions import Send
from moering.election import read_plan, write_plan
from moering.errors import ConfigError
from moering.etcd import Cluster, Entry
from moering.leader import Fixed, Seat, finder
from moering.office import Fence
from tests.moering.cluster import running


def test_a_view_waits_until_it_is_published() -> None:
    fence, view = Fence(), replace(running(3).view, term=2, epoch=5)
    assert fence.holds(b"a", view) and fence.holds(b"b", view)
    assert fence.published(view) == [Send(b"a", view), Send(b"b", view)]
    assert fence.published(view) == []
    assert not fence.holds(b"a", view), "published: it may be sent again at once"


def test_who_waits_gets_the_newest_that_is_published_and_nothing_newer() -> None:
    five = replace(running(3).view, term=2, epoch=5)
    six, seven = replace(five, epoch=6), replace(five, epoch=7)
    fence = Fence()
    assert fence.holds(b"a", five) and fence.holds(b"b", five)
    assert fence.holds(b"b", six) and fence.holds(b"c", seven)
    assert fence.published(six) == [Send(b"a", six), Send(b"b", six)]
    assert not fence.holds(b"d", five) and fence.holds(b"d", seven)
    assert fence.published(seven) == [Send(b"c", seven), Send(b"d", seven)]


def entry(value: bytes) -> Entry:
    return Entry(value, 1, 1)


def test_a_plan_comes_back_whole() -> None:
    view = running(3).view
    assert read_plan(entry(write_plan(view))) == view
    head = json.loads(write_plan(view))
    assert (head["term"], head["epoch"], len(head["digest"])) == (view.term, view.epoch, 64)


def test_a_plan_that_is_not_what_it_was_is_passed_over() -> None:
    good = json.loads(write_plan(running(3).view))
    other = json.loads(write_plan(running(2).view))
    for bad in (
        b"", b"[]", b"{}", b"null", b"\xff", json.dumps(good | {"digest": other["digest"]}).encode(),
        json.dumps(good | {"view": "AAAA"}).encode(), json.dumps(good | {"view": 7}).encode(),
    ):  # fmt: skip
        assert read_plan(entry(bad)) is None, bad
    assert read_plan(None) is None


def test_a_view_too_large_for_etcd_is_published_by_its_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    view = running(3).view
    whole = json.loads(write_plan(view))
    monkeypatch.setattr(election, "MAX_VIEW_BYTES", 10)
    plan = write_plan(view)
    assert json.loads(plan) == {k: v for k, v in whole.items() if k != "view"}
    assert read_plan(entry(plan)) is None


def test_where_etcd_is() -> None:
    three = Cluster.parse("etcd://a:2379, b:2379,[::1]:2379/prod")
    assert three.nodes == ("http://a:2379", "http://b:2379", "http://[::1]:2379")
    assert three.key("leader") == "/prod/leader"
    assert Cluster.parse("etcd://a:1").key("plan") == "/moering/plan"
    assert finder("tcp://h:1", "embedded://") == Fixed(Seat("tcp://h:1"))


@pytest.mark.parametrize("wrong", ["etcd://", "etcd://a", "etcd://a:x", "etcd://a:1,", "etcd://:1", "zk://a:1", "a:1"])
def test_a_membership_without_meaning_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="membership"):
        finder("tcp://h:1", wrong)
