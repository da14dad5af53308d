"""Coordinators as processes, and honest members that find them through etcd: real lease threads, no model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moering.leader import finder
from moering.lease import LeaseClient
from moering.lease_session import LeaseSession
from moering.protocol import View
from tests.etcd_nodes import EtcdNodes, wait_for
from tests.moering.cluster import Member


class Candidate:
    """One coordinator process that stands for election."""

    def __init__(self, name: str, membership: str, directory: Path, *flags: str) -> None:
        self.name, self._log = name, directory / f"{name}.log"
        argv = [sys.executable, "-m", "moering.coordinator", "--bind", f"ipc://{directory}/{name}", "--id", name]
        argv += ["--membership", membership, "--election-ttl-s", "2", "--lease-s", "4", "--rejoin-grace-s", "0.5"]
        with self._log.open("wb") as out:
            self.process = subprocess.Popen([*argv, *flags], stdout=out, stderr=subprocess.STDOUT)

    def said(self, text: str) -> int:
        """How many lines of its log contain `text`."""
        return sum(text in line for line in self._log.read_text().splitlines())

    @property
    def address(self) -> str:
        return f"ipc://{self._log.with_suffix('')}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class LeasedMember:
    """A `Member` of the tests of the coordinator, with the lease thread of the product."""

    def __init__(self, member: Member, membership: str) -> None:
        self.member = member
        self.terms: list[int] = []  # of the views that it took, in their order
        session = LeaseSession(member.register, member.lease, self._view, self._refused)
        self.client = LeaseClient(finder("", membership), session)
        self.client.start()

    @property
    def view(self) -> View | None:
        return self.member.view

    def _view(self, view: View) -> None:
        self.terms.append(view.term)
        for reply in self.member.take(view):
            self.client.send(reply)

    def _refused(self, reason: str) -> None:
        self.member.refused = reason

    def close(self) -> None:
        self.client.close()


class Cluster:
    """Three expert servers, a router and a gateway, with coordinators to be added."""

    def __init__(self, etcd: EtcdNodes, directory: Path) -> None:
        self.etcd, self._directory = etcd, directory
        self.candidates: list[Candidate] = []
        members = [Member("expert-server", f"e{i}", state="JOINING") for i in range(3)]
        members += [Member("router", "r0"), Member("gateway", "g0")]
        self.members = {m.server_id: LeasedMember(m, etcd.membership) for m in members}

    def add_candidate(self, name: str, *flags: str) -> Candidate:
        candidate = Candidate(name, self.etcd.membership, self._directory, "--expert-servers", "3", *flags)
        self.candidates.append(candidate)
        return candidate

    def elected(self, *names: str) -> Candidate:
        """Wait until one of the named candidates has been seen in office by all members, and they are whole."""
        candidates = [c for c in self.candidates if c.name in names]
        found: Candidate = wait_for("elected and whole", lambda: next(filter(self._leads, candidates), None))
        return found

    def _leads(self, candidate: Candidate) -> bool:
        return self.all_see(
            lambda v: (
                v.failures_survivable == 1
                and next(m.server_id for m in v.members if m.kind == "coordinator") == candidate.name
            )
        )

    def all_see(self, condition: Callable[[View], bool]) -> bool:
        """Whether the newest view of every member is so."""
        return all(m.view is not None and condition(m.view) for m in self.members.values())

    def lose(self, server_id: str) -> Member:
        """A member vanishes without a word."""
        gone = self.members.pop(server_id)
        gone.close()
        return gone.member

    def close(self) -> None:
        for member in self.members.values():
            member.close()
        for candidate in self.candidates:
            candidate.close()


@contextmanager
def cluster(etcd: EtcdNodes, directory: Path) -> Iterator[Cluster]:
    """A cluster without coordinators; nothing of it is left at the end."""
    made = Cluster(etcd, directory)
    try:
        yield made
    finally:
        made.close()
