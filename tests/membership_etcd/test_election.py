"""One `Election` against another on a real etcd, without coordinators around them."""

from __future__ import annotations

import asyncio
import shutil
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from moering.election import Election, read_plan, write_plan
from moering.etcd import Cluster, Entry, Etcd, put
from moering.http_client import request
from moering.office import Deposed, Elected, Event, Published
from moering.protocol import View
from tests.etcd_nodes import EtcdNodes, wait_for
from tests.membership_etcd.members import Cluster as Members
from tests.moering.cluster import OWN, running

ROUNDS, READERS = 100, 32
"""When the reads were transactions, etcd 3.5.1 panicked within 4 to 16 such rounds."""
SELDOM_S = 40  # so that nothing but its publication tells an election that its office is lost


class Candidate:
    def __init__(self, cluster: Cluster, ttl_s: int = SELDOM_S) -> None:
        self.events: list[Event] = []
        self.election = Election(cluster, OWN, ttl_s, lambda: None)
        self.election.start()

    def next(self, kind: type[Any]) -> Any:
        """The first event of a kind from now on."""

        def look() -> Any:
            self.events += self.election.take()
            return next((e for e in self.events[seen:] if isinstance(e, kind)), None)

        seen = len(self.events)
        return wait_for(kind.__name__, look)


@pytest.fixture
def store(etcd: EtcdNodes) -> Cluster:
    return Cluster.parse(etcd.membership)


@pytest.fixture
def stand(store: Cluster) -> Iterator[Callable[[], Candidate]]:
    made: list[Candidate] = []

    def one() -> Candidate:
        made.append(Candidate(store))
        return made[-1]

    yield one
    for candidate in made:
        candidate.election.close()


def view(term: int, epoch: int) -> View:
    return replace(running(3).view, term=term, epoch=epoch)


def read(store: Cluster, of: str) -> Entry | None:
    async def ask() -> Entry | None:
        async with Etcd(store.nodes) as etcd:
            return (await etcd.read(store.key(of)))[0]

    return asyncio.run(ask())


def delete_leader(store: Cluster) -> None:
    key = b64encode(store.key("leader").encode()).decode()
    request(f"{store.nodes[0]}/v3/kv/deleterange", {"key": key}).close()


def test_a_publication_beside_a_successor_is_refused(store: Cluster, stand: Callable[[], Candidate]) -> None:
    first = stand()
    assert first.next(Elected) == Elected(1, None)
    first.election.publish(view(1, 3))
    assert first.next(Published).view == view(1, 3)
    second = stand()
    delete_leader(store)  # as when the first was stopped for longer than its lease
    assert second.next(Elected) == Elected(2, view(1, 3))
    second.election.publish(view(2, 4))
    second.next(Published)
    first.election.publish(view(1, 9))
    assert "was refused" in first.next(Deposed).reason
    assert read_plan(read(store, "plan")) == view(2, 4)
    second.election.close()
    assert first.next(Elected) == Elected(3, view(2, 4)), "it stands again, behind the other"


def test_a_view_decided_in_an_earlier_office_is_not_published(stand: Callable[[], Candidate]) -> None:
    first = stand()
    first.next(Elected)
    first.election.publish(view(0, 99))
    first.election.publish(view(1, 1))
    assert first.next(Published).view == view(1, 1)
    assert [e for e in first.events if isinstance(e, Published)] == [Published(view(1, 1))]


def test_a_term_that_members_brought_counts_from_its_publication_on(
    store: Cluster, stand: Callable[[], Candidate]
) -> None:
    first = stand()
    first.next(Elected)
    first.election.publish(view(41, 500))
    first.next(Published)
    assert read(store, "term").value == b"41"
    first.election.close()
    assert stand().next(Elected) == Elected(42, view(41, 500))


def test_a_plan_that_is_written_beside_an_election_is_not_lost(
    store: Cluster, stand: Callable[[], Candidate], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_key, late = Etcd.read, [view(1, 7)]

    async def read_before_it_is_written(etcd: Etcd, key: str) -> tuple[Entry | None, int]:
        found = await read_key(etcd, key)
        if key == store.key("plan") and late:
            await etcd.transact([], [put(key, write_plan(late.pop()))])
        return found

    monkeypatch.setattr(Etcd, "read", read_before_it_is_written)
    assert stand().next(Elected) == Elected(1, view(1, 7))


def test_readers_that_go_away_do_not_end_etcd(etcd: EtcdNodes, store: Cluster) -> None:
    key = store.key("plan")

    async def read_and_go() -> None:
        async with Etcd(store.nodes) as client:
            await client.transact([], [put(key, b"of any value")])
            for _ in range(ROUNDS):
                readers = [asyncio.create_task(client.read(key)) for _ in range(READERS)]
                await asyncio.wait(readers, return_when=asyncio.FIRST_COMPLETED)
                for reader in readers:
                    reader.cancel()
                await asyncio.gather(*readers, return_exceptions=True)

    asyncio.run(read_and_go())
    wait_for("etcd serves", lambda: etcd.nodes[0].healthy)


def test_without_etcd_nobody_is_elected_and_with_it_again_somebody_is(
    etcd: EtcdNodes, stand: Callable[[], Candidate], caplog: pytest.LogCaptureFixture
) -> None:
    etcd.kill()
    candidate = stand()
    wait_for("it has tried", lambda: "no coordinator can be elected" in caplog.text)
    assert candidate.election.take() == []
    etcd.start()
    assert candidate.next(Elected) == Elected(1, None)


def test_an_etcd_without_its_data_gets_a_term_above_all_before(members: Members) -> None:
    for name in ("a", "b"):
        members.add_candidate(name)
    before = members.elected("a", "b")
    members.etcd.kill()
    shutil.rmtree(members.etcd.nodes[0].data)
    members.etcd.start()
    wait_for("it has noticed", lambda: before.said("no longer the elected coordinator"))
    wait_for("a later term", lambda: members.all_see(lambda v: v.term == 2 and v.failures_survivable == 1))
    assert all(m.terms == sorted(m.terms) for m in members.members.values())
