from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from moering.errors import ProtocolError
from moering.lease_session import LeaseSession
from moering.protocol import View
from moering.views import check_view

TABLE = np.array([[[0, 1], [1, -1]]], "<i2").tobytes()
GOOD = View(1, 2, [], ["a", "b"], 1, 2, 2, TABLE, TABLE, 2, 1, 0, 0)
BAD = [
    {"layers": 2},
    {"layers": -1, "experts": -2},
    {"routing": TABLE[:-2]},
    {"target": b""},
    {"servers": ["a"]},
    {"routing": np.array([0, 1, 1, -2], "<i2").tobytes()},
    {"popularity": bytes(3)},
]


def test_a_good_view_passes() -> None:
    check_view(GOOD)
    check_view(dataclasses.replace(GOOD, popularity=bytes(2)))
    check_view(View(1, 1, [], [], 0, 0, 0, b"", b"", 2, -1, 0, 0))  # before the first plan


@pytest.mark.parametrize("wrong", BAD)
def test_tables_that_do_not_fit_are_an_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="view: "):
        check_view(dataclasses.replace(GOOD, **wrong))


def test_a_member_keeps_the_view_it_has() -> None:
    seen: list[View] = []
    never: Any = None  # neither registers nor renews here
    session = LeaseSession(never, never, seen.append, never)
    session.take(GOOD)
    with pytest.raises(ProtocolError):
        session.take(dataclasses.replace(GOOD, epoch=3, layers=2))
    later = dataclasses.replace(GOOD, epoch=4)
    session.take(later)
    assert seen == [GOOD, later]
