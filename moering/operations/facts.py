"""What an operation is made of: its phases, and what it has to know of the cluster."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from moering.protocol import MemberInfo, Operation

ENDED = ("done", "failed")
PREFIXES = {"expert-server": "expert", "router": "router", "gateway": "gateway"}
"""Names of the processes that a launcher runs: the prefix of the kind, and a number."""


class Facts(Protocol):
    """What an operation needs to know of the cluster."""

    @property
    def launcher(self) -> MemberInfo | None:
        """The launcher that starts what is to be started, if the cluster has one; each has a machine of its own."""

    @property
    def launcher_epoch(self) -> int:
        """The newest epoch that every launcher has acknowledged."""

    @property
    def settled(self) -> bool:
        """Whether as many failures are survived as the plan provides for."""

    def member(self, server_id: str) -> MemberInfo | None:
        """The living process with this id."""

    def of_kind(self, kind: str) -> Sequence[MemberInfo]:
        """The living processes of a kind."""

    def floor(self) -> int:
        """The failures of expert servers that an operation starting now must leave survivable."""

    def refusal(self, server_ids: Iterable[str], floor: int) -> str | None:
        """Why the cluster cannot do without these processes."""

    def deaths(self, server_id: str) -> int:
        """How often a process with this id died since the operation began."""


def end(op: Operation, now_at: float, error: str = "") -> Operation:
    """`op` done, or failed with `error`."""
    op = replace(op, error=error, ended_at=now_at)
    return to_phase(op, "failed" if error else "done", start={}, stop=[], retire=[], drain={}, pending={})


def to_phase(op: Operation, phase: str, **changes: object) -> Operation:
    """`op` in another phase, not published yet."""
    return replace(op, phase=phase, epoch=0, **changes)  # type: ignore[arg-type]


def launcher_knows(op: Operation, facts: Facts) -> bool:
    """Whether the launcher has seen this phase."""
    return op.epoch > 0 and facts.launcher_epoch >= op.epoch


def online(server_id: str, facts: Facts) -> bool:
    """Whether a process with this id serves."""
    member = facts.member(server_id)
    return member is not None and member.state == "ONLINE"


def still_there(server_id: str, incarnation: int, facts: Facts) -> bool:
    """Whether it is still the same process that has this id."""
    member = facts.member(server_id)
    return member is not None and member.incarnation == incarnation


def natural(server_id: str) -> tuple[str, int]:
    """Sorts expert-10 after expert-9."""
    match = re.search(r"^(.*?)(\d{1,15})$", server_id)
    return (match[1], int(match[2])) if match else (server_id, -1)


def name_prefix(kind: str, facts: Facts) -> str:
    """What the ids of the launcher's processes of this kind begin with."""
    machine = "" if facts.launcher is None else facts.launcher.server_id.removesuffix("launcher")
    return f"{machine}{PREFIXES.get(kind)}-"


def free_ids(kind: str, count: int, facts: Facts) -> dict[str, str]:
    """Ids for `count` new processes, each with its kind; the lowest numbers that nobody has."""
    names = (f"{name_prefix(kind, facts)}{n}" for n in itertools.count())
    return dict.fromkeys(itertools.islice((n for n in names if facts.member(n) is None), count), kind)
