"""When a process that is asked to go may do so, by what it has been told and by who is connected."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moering.drain import requests_are_elsewhere
from moering.protocol import MemberInfo, View
from tests.moering.cluster import running

OWN = MemberInfo("router", "router-9", 7, "", 1, "ONLINE", "", 0, 0)


def view(state: str, incarnation: int = 7) -> View:
    last = running(3).view
    return replace(last, members=[*last.members, replace(OWN, state=state, incarnation=incarnation)])


@pytest.mark.parametrize(
    ("seen", "queued", "gateways", "may_go"),
    [
        (view("DRAINING"), 0, 2, True),
        (view("DRAINING"), 1, 2, False),
        (view("ONLINE"), 0, 1, False),
        (view("DRAINING", incarnation=6), 0, 1, False),
        (None, 0, 1, False),
        (view("ONLINE"), 0, 0, True),
        (view("ONLINE"), 1, 0, False),
        (None, 0, 0, True),
    ],
)
def test_a_router_goes_when_nobody_sends_it_requests_any_more(
    seen: View | None, queued: int, gateways: int, may_go: bool
) -> None:
    assert requests_are_elsewhere(seen, OWN, queued, gateways) == may_go
