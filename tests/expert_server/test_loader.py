"""The loader brings memory into line with the plan: orphans first, and never drops what the plan still wants."""

import threading
from dataclasses import replace

import numpy as np

from expert_server.backend import NoRoom
from expert_server.loader import Loader, targets
from expert_server.residency import Residency
from moering.protocol import View

LAYERS, EXPERTS = 2, 4
DEADLINE_S = 30.0
FOREVER_S = 3600.0


def view(mine, routed=(), epoch=1, second=()):
    """Server "me" is to hold `mine`, of these `second` after another; `routed` ones have a live replica elsewhere."""
    target = np.full((LAYERS, EXPERTS, 2), -1, "<i2")
    routing = target.copy()
    for key in mine:
        target[key][:] = (0, 1) if key in second else (1, -1)
    for key in routed:
        routing[key][0] = 0
    return View(1, epoch, [], ["other", "me"], LAYERS, EXPERTS, 2, routing.tobytes(), target.tobytes(), 2, 0, 0, 0)


class Fixture:
    def __init__(self, on_load=lambda key: None, rest_s=0.0):
        self.residency, self.loaded, self.reports, self.on_load = Residency(), [], [], on_load
        self.rests, self.resting, self._rest_s = [], threading.Event(), rest_s
        self.loader = Loader(
            "me", self.load, self.residency, lambda: self.reports.append(self.residency.keys()), rest_s=self.rest_s
        )

    def rest_s(self, took_s):
        self.rests.append(len(self.loaded))
        self.resting.set()
        return self._rest_s

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


def test_the_most_popular_are_loaded_first_after_the_orphans():
    popularity = np.array([[0, 9, 5, 0], [0, 0, 9, 7]], np.uint8).tobytes()
    f = Fixture()
    mine = {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (1, 0), (1, 1)}
    f.follow(replace(view(mine, routed=mine - {(1, 0), (1, 3)}), popularity=popularity))
    assert f.loaded == [(1, 3), (1, 0), (0, 1), (1, 2), (0, 2), (0, 3), (1, 1)]


def test_there_is_no_rest_after_an_orphan_nor_after_the_last_one():
    f = Fixture()
    mine = {(0, 0), (0, 1), (0, 2), (0, 3)}
    assert f.follow(view(mine, routed={(0, 0), (0, 1), (0, 2)}))
    assert f.rests == [2, 3]


def test_of_the_orphans_each_server_loads_those_first_that_it_comes_first_for(monkeypatch):
    monkeypatch.setattr("expert_server.loader.REPORT_S", FOREVER_S)  # on a slow machine these loads may take so long
    f = Fixture()
    f.follow(view({(0, 0), (0, 1), (0, 2), (0, 3)}, routed=[(0, 0)], second=[(0, 1), (0, 2)]))
    assert f.loaded == [(0, 3), (0, 1), (0, 2), (0, 0)]
    assert f.reports == [{(0, 3)}, {(0, 3), (0, 1), (0, 2)}, f.residency.keys()]


def test_a_server_joins_with_what_it_comes_first_for():
    f = Fixture()
    v = view({(0, 0), (0, 1), (0, 2)}, routed=[(0, 0)], second=[(0, 1)])
    assert f.loader.reconcile(v, online=False)
    assert f.loaded == [(0, 2)]
    assert f.rests == []


def test_a_server_becomes_first_when_the_one_before_it_dies():
    f, mine = Fixture(), {(0, 0), (0, 1), (0, 2)}
    newer = view(mine, epoch=2, second=[(0, 1)])
    f.on_load = lambda key: f.loader.view_changed(newer)
    assert not f.follow(view(mine, second=[(0, 1), (0, 2)]))
    assert f.loaded == [(0, 0)]
    f.follow(newer)
    assert f.loaded == [(0, 0), (0, 2), (0, 1)]


def test_an_orphan_does_not_wait_for_what_is_none_any_more():
    f, mine = Fixture(), {(0, 0), (0, 1), (0, 2)}
    f.on_load = lambda key: f.loader.view_changed(view(mine, routed=[(0, 1)], epoch=2, second=[(0, 1), (0, 2)]))
    assert f.follow(view(mine, second=[(0, 1), (0, 2)]))
    assert f.loaded == [(0, 0), (0, 2), (0, 1)]
    assert f.rests == []


def test_a_server_that_joined_for_orphans_rests_once_it_has_everything():
    f, mine = Fixture(), {(0, 0), (0, 1), (0, 2)}
    v = view(mine, routed=[(0, 1), (0, 2)])
    assert f.loader.reconcile(v, online=False)
    assert f.follow(v)
    assert (f.loaded, f.rests) == ([(0, 0), (0, 1), (0, 2)], [])
    more = mine | {(1, 0), (1, 1)}
    assert f.follow(view(more, routed=more, epoch=2))
    assert f.rests == [4]


def test_a_server_that_is_first_for_no_orphan_joins_with_nothing():
    f = Fixture()
    assert f.loader.reconcile(view({(0, 0), (0, 1)}, routed=[(0, 0)], second=[(0, 1)]), online=False)
    assert f.loaded == []


def test_what_another_server_has_brought_meanwhile_is_loaded_at_leisure():
    f, mine = Fixture(), {(0, 0), (0, 1), (0, 2)}
    f.on_load = lambda key: f.loader.view_changed(view(mine, routed=[(0, 1), (0, 2)], epoch=2, second=[(0, 1), (0, 2)]))
    assert f.follow(view(mine, second=[(0, 1), (0, 2)]))
    assert f.rests == [2]


def test_a_joining_server_without_orphans_rests_as_well():
    f = Fixture()
    v = view({(0, 0), (0, 1)}, routed={(0, 0), (0, 1)})
    assert f.loader.reconcile(v, online=False)
    assert f.rests == [1]


def test_an_orphan_ends_a_rest():
    f = Fixture(rest_s=FOREVER_S)
    mine = {(0, 0), (0, 1)}
    v = view(mine, routed=mine)
    f.loader.view_changed(v)
    done = []
    thread = threading.Thread(target=lambda: done.append(f.loader.reconcile(v, online=True)), daemon=True)
    thread.start()
    assert f.resting.wait(DEADLINE_S)
    f.loader.view_changed(view(mine, routed={(0, 0)}, epoch=2))
    thread.join(DEADLINE_S)
    assert done == [False] and f.loaded == [(0, 0)]


def test_a_newer_plan_cuts_loading_short():
    f, newer = Fixture(), view({(1, 1)}, epoch=2)
    f.on_load = lambda key: f.loader.view_changed(newer)
    assert not f.follow(view({(0, 0), (0, 1)}))
    assert f.loaded == [(0, 0)]
    assert f.reports, "what was loaded is reported, since the newer plan may build on it"


def test_a_server_that_the_plan_does_not_know_loads_nothing():
    assert targets(view({(0, 0)}), "stranger")[1:] == (set(), set(), set())


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
