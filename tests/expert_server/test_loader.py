"""The loader brings memory into line with the plan: orphans first, and never drops what the plan still wants."""

from dataclasses import replace

import numpy as np

from expert_server.backend import NoRoom
from expert_server.loader import Loader, targets
from expert_server.residency import Residency
from moering.protocol import View

LAYERS, EXPERTS = 2, 4


def view(mine, routed=(), epoch=1):
    """Server "me" is to hold `mine`; `routed` experts have a live replica elsewhere."""
    target = np.full((LAYERS, EXPERTS, 2), -1, "<i2")
    routing = target.copy()
    for key in mine:
        target[key][0] = 1
    for key in routed:
        routing[key][0] = 0
    return View(1, epoch, [], ["other", "me"], LAYERS, EXPERTS, 2, routing.tobytes(), target.tobytes(), 2, 0, 0, 0)


class Fixture:
    def __init__(self, on_load=lambda key: None):
        self.residency, self.loaded, self.reports, self.on_load = Residency(), [], [], on_load
        self.loader = Loader("me", self.load, self.residency, lambda: self.reports.append(self.residency.keys()))

    def load(self, layer, expert):
        self.loaded.append((layer, expert))
        self.on_load((layer, expert))
        return f"expert {layer}.{expert}", bytes(8)

    def follow(self, v):
        self.loader.view_changed(v)
        return self.loader.reconcile(v, online=True)


def test_memory_matches_the_plan_afterwards():
    f = Fixture()
    assert f.follow(view({(0, 1), (1, 2)}))
    assert f.follow(view({(1, 2), (1, 3)}, epoch=2))
    assert f.residency.keys() == {(1, 2), (1, 3)}
    assert f.loaded == [(0, 1), (1, 2), (1, 3)]
    assert f.reports[-1] == {(1, 2), (1, 3)}


def test_orphans_are_loaded_first_and_reported_before_the_rest():
    f = Fixture()
    f.follow(view({(0, 0), (0, 1), (1, 3)}, routed=[(0, 0), (0, 1)]))
    assert f.loaded[0] == (1, 3)
    assert f.reports[0] == {(1, 3)}


def test_a_newer_plan_cuts_loading_short():
    f, newer = Fixture(), view({(1, 1)}, epoch=2)
    f.on_load = lambda key: f.loader.view_changed(newer)
    assert not f.follow(view({(0, 0), (0, 1)}))
    assert f.loaded == [(0, 0)]
    assert f.reports, "what was loaded is reported, since the newer plan may build on it"


def test_a_server_that_the_plan_does_not_know_loads_nothing():
    assert targets(view({(0, 0)}), "stranger") == ({}, set())


def test_a_view_that_does_not_know_the_server_takes_nothing_from_it():
    f = Fixture()
    f.follow(view({(0, 1), (1, 2)}))
    assert f.follow(replace(view(set(), epoch=2), servers=["other", "another"]))
    assert f.residency.keys() == {(0, 1), (1, 2)}


def test_the_report_is_sorted_and_carries_a_digest_each():
    r = Residency()
    r.add((1, 2), "x", b"12345678")
    r.add((0, 3), "y", b"abcdefgh")
    held, digests = r.report()
    assert np.frombuffer(held, "<u4").tolist() == [3, 1 << 16 | 2]
    assert digests == b"abcdefgh12345678"


def test_lack_of_room_is_survived_and_the_next_plan_goes_on():
    """A plan in transition may name more than fit, until what it replaces may be dropped."""
    room = 2

    def full(key):
        if len(f.residency.keys()) >= room:
            raise NoRoom("no room")

    f = Fixture(full)
    assert not f.follow(view({(0, 0), (0, 1), (0, 2), (0, 3)}, routed={(0, 0), (0, 1), (0, 2)}))
    assert f.residency.keys() == {(0, 3), (0, 0)}  # the orphan first
    assert f.reports[-1] == {(0, 3), (0, 0)}
    assert f.follow(view({(0, 1), (0, 3)}, epoch=2))
    assert f.residency.keys() == {(0, 1), (0, 3)}
