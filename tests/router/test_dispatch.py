"""The dispatch state machine under every order of events: each slot is answered once, by a live replica."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moering.errors import ProtocolError
from moering.protocol import View
from router.dispatch import Dispatcher
from router.instructions import Complete, Poisoned, Send

LAYERS, EXPERTS, HIDDEN_ROWS = 3, 8, 6


def view(routing, servers=("a", "b", "c"), epoch=1):
    routing = np.asarray(routing, "<i2")
    layers, experts, width = routing.shape
    return View(1, epoch, [], list(servers), layers, experts, width, routing.tobytes(), routing.tobytes(), 2, 1, 0, 0)


def ring(width=2, servers=3):
    """Expert e lives on servers e, e + 1, … modulo the number of servers."""
    one = [[(e + i) % servers for i in range(width)] for e in range(EXPERTS)]
    return np.array([one] * LAYERS)


def dispatcher(servers="abc", credit=1000, max_rows=1000, routing=None):
    d = Dispatcher()
    d.view_changed(view(ring() if routing is None else routing), 0.0)
    for s in servers:
        d.connected(s, 1, credit, max_rows, 0.0)
    return d


def topk(rows, seed=0, k=2):
    rng = random.Random(seed)
    return np.array([rng.sample(range(EXPERTS), k) for _ in range(rows)])


def sends(instructions):
    return [i.dispatch for i in instructions if isinstance(i, Send)]


@pytest.mark.parametrize("plan_before", [False, True])
def test_a_view_without_a_plan_leaves_every_slot_missing(plan_before):
    d = dispatcher() if plan_before else Dispatcher()
    old = sends(d.submit(1, 0, topk(2), None, False, 0.0)) if plan_before else []
    d.view_changed(view(np.empty((0, 0, 0)), servers=(), epoch=2), 0.0)
    out = d.submit(2, 0, topk(2), None, False, 0.0)
    assert [(i.work, list(i.missing)) for i in out] == [(2, [0, 1, 2, 3])]
    out = d.tick(1e9)  # what is outstanding is late beyond measure, and nobody else is known
    assert not sends(out)
    assert d.works.keys() == ({1} if old else set())


def test_each_slot_goes_once_to_the_first_replica_of_its_expert():
    d, ids = dispatcher(), topk(HIDDEN_ROWS)
    out = sends(d.submit(1, 0, ids, None, False, 0.0))
    seen = np.concatenate([x.slots for x in out])
    assert sorted(seen) == list(range(ids.size))
    for x in out:
        assert {"abc"[e % 3] for e in x.experts} == {x.server}
        assert (x.experts == ids.reshape(-1)[x.slots]).all()
        assert (x.rows[x.local_rows()] == x.slots // 2).all()
        assert list(x.experts) == sorted(x.experts)


def test_a_token_goes_to_a_server_once_however_many_of_its_experts_live_there():
    out = sends(dispatcher().submit(1, 0, np.array([[0, 3]]), None, False, 0.0))
    assert [(x.server, list(x.rows), len(x.slots)) for x in out] == [("a", [0], 2)]


def test_a_loss_sends_again_what_was_outstanding_there_and_nothing_else():
    d, ids = dispatcher(), topk(HIDDEN_ROWS)
    out = sends(d.submit(1, 0, ids, None, False, 0.0))
    lost = [x for x in out if x.server == "a"]
    again = sends(d.disconnected("a", 1.0))
    assert sorted(np.concatenate([x.slots for x in again])) == sorted(np.concatenate([x.slots for x in lost]))
    assert "a" not in {x.server for x in again}
    assert d.counters.rows_lost == d.counters.rows_resent == sum(len(x.rows) for x in lost)


def test_a_server_that_owed_nothing_costs_nothing():
    d = dispatcher()
    d.submit(1, 0, np.array([[0, 3]]), None, False, 0.0)  # both on a
    assert d.disconnected("b", 1.0) == []
    assert d.counters.rows_resent == 0


def test_replies_complete_a_work_exactly_once():
    d = dispatcher()
    out = sends(d.submit(7, 1, topk(HIDDEN_ROWS), None, False, 0.0))
    done = []
    for x in out:
        done += d.replied(d.find(x.server, 1, x.seq, len(x.slots)), 0.1)
    assert [(i.work, len(i.missing)) for i in done] == [(7, 0)]


def test_stale_replies_are_dropped_and_counted():
    d = dispatcher()
    (x,) = sends(d.submit(1, 0, np.array([[0, 3]]), None, False, 0.0))
    assert d.find("b", 1, x.seq, 2) is None  # another server
    assert d.find("a", 2, x.seq, 2) is None  # another incarnation
    assert d.find("a", 1, x.seq + 1, 2) is None  # never sent
    d.disconnected("a", 0.1)
    d.connected("a", 1, 1000, 1000, 0.2)
    assert d.find("a", 1, x.seq, 2) is None  # answered elsewhere by now
    assert d.counters.stale_replies == 4


def test_a_reply_with_too_few_rows_is_an_error_and_not_waited_out():
    d = dispatcher()
    (x,) = sends(d.submit(1, 0, np.array([[0, 3]]), None, False, 0.0))
    with pytest.raises(ProtocolError, match="1 rows where 2 were asked for"):
        d.find("a", 1, x.seq, 1)


def test_without_a_replica_slots_come_back_as_missing_and_can_be_tried_again():
    d, ids = dispatcher(servers="a"), np.array([[0, 1], [3, 2]])  # 0 and 3: a; 1: b, c; 2: c, a
    (x,) = sends(d.submit(1, 0, ids, None, False, 0.0))
    (done,) = d.replied(d.find("a", 1, x.seq, len(x.slots)), 0.1)
    assert list(done.missing) == [1]
    d.connected("c", 1, 1000, 1000, 0.2)
    (y,) = sends(d.submit(2, 0, ids, done.missing, False, 0.3))
    assert (y.server, list(y.slots)) == ("c", [1])


def test_not_here_looks_elsewhere_until_the_next_plan():
    d = dispatcher()
    (x,) = sends(d.submit(1, 0, np.array([[0, 3]]), None, False, 0.0))
    again = sends(d.not_here("a", 1, x.seq, 0.1))
    assert {y.server for y in again} == {"b"}
    assert {y.server for y in sends(d.submit(2, 0, np.array([[0, 3]]), None, False, 0.2))} == {"b"}
    d.view_changed(view(ring(), epoch=2), 0.3)
    assert {y.server for y in sends(d.submit(3, 0, np.array([[0, 3]]), None, False, 0.4))} == {"a"}


def test_credits_hold_back_what_the_server_could_not_take():
    d = dispatcher(credit=2, max_rows=2)
    ids = np.array([[0, 3]] * 4)
    first = sends(d.submit(1, 0, ids, None, False, 0.0))
    assert sum(len(x.rows) for x in first) <= 2
    answered, queue = 0, list(first)
    while queue:
        x = queue.pop()
        assert len(x.slots) <= 2
        answered += len(x.slots)
        queue += sends(d.replied(d.find("a", 1, x.seq, len(x.slots)), 0.1))
    assert answered == ids.size


def test_what_waited_for_credit_of_a_lost_server_was_not_lost_there():
    d = dispatcher(credit=1, max_rows=1)
    d.submit(1, 0, np.array([[0, 3]] * 3), None, False, 0.0)
    d.disconnected("a", 0.1)
    assert d.counters.dispatches_lost == 1
    assert d.counters.rows_resent == 1


def test_a_row_that_kills_is_found_and_ended_and_its_batch_mates_are_not():
    servers = [f"s{i}" for i in range(40)]
    routing = np.array([[list(range(40))] * EXPERTS] * LAYERS)
    d = Dispatcher()
    d.view_changed(view(routing, servers), 0.0)
    for s in servers:
        d.connected(s, 1, 1000, 1000, 0.0)
    poison, deaths, poisoned, done = 5, 0, [], []
    queue = sends(d.submit(1, 0, np.zeros((8, 1), int), None, False, 0.0))
    while queue:
        x = queue.pop(0)
        if x.seq not in d.outbox.unanswered:
            continue
        if poison in x.rows:
            deaths += 1
            new = d.disconnected(x.server, 0.0)
        else:
            new = d.replied(d.find(x.server, 1, x.seq, len(x.slots)), 0.0)
        poisoned += [int(r) for i in new if isinstance(i, Poisoned) for r in i.rows]
        done += [i for i in new if isinstance(i, Complete)]
        queue += sends(new)
    assert poisoned == [poison]
    assert len(done) == 1
    assert deaths <= 7


def test_two_deaths_of_holders_end_no_innocent_lone_row():
    d = dispatcher(routing=np.array([[[0, 1]] * EXPERTS] * LAYERS))
    d.submit(1, 0, np.array([[0]]), None, False, 0.0)
    again = d.disconnected("a", 0.1)
    assert sends(again)
    (done,) = d.disconnected("b", 0.2)
    assert isinstance(done, Complete)
    assert list(done.missing) == [0]


def test_rows_that_come_before_the_first_plan_wait_for_it():
    d = Dispatcher()
    (done,) = d.submit(1, 0, np.array([[0, 1]]), None, False, 0.0)
    assert isinstance(done, Complete)
    assert list(done.missing) == [0, 1]
    assert not d.routable(0, np.array([0, 1]), 0.0).any()


class Cluster:
    """A random run: any order of replies, losses, returns, refusals and new plans. Every slot ends up answered once."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.d = dispatcher(credit=self.rng.choice([1, 3, 1000]), max_rows=self.rng.choice([1, 2, 1000]))
        self.up, self.incarnation = set("abc"), dict.fromkeys("abc", 1)
        self.queue, self.works, self.answers, self.epoch, self.now = [], {}, {}, 1, 0.0

    def take(self, instructions):
        for i in instructions:
            if isinstance(i, Send):
                assert i.dispatch.server in self.up
                self.queue.append((i.dispatch, self.incarnation[i.dispatch.server]))
            elif isinstance(i, Complete):
                self.works[i.work]["missing"] = i.missing
            elif isinstance(i, Poisoned):
                self.works[i.work]["poisoned"] |= set(i.rows.tolist())

    def submit(self, work):
        ids = topk(self.rng.randint(1, 9), self.rng.random())
        self.works[work] = {"ids": ids, "missing": None, "poisoned": set()}
        self.answers[work] = np.zeros(ids.size, int)
        self.take(self.d.submit(work, self.rng.randrange(LAYERS), ids, None, False, self.now))

    def step(self):
        self.now += self.rng.random()
        getattr(self, self.rng.choice(["reply", "reply", "reply", "lose", "rejoin", "refuse", "replan"]))()

    def reply(self):
        if self.queue:
            x, incarnation = self.queue.pop(self.rng.randrange(len(self.queue)))
            found = self.d.find(x.server, incarnation, x.seq, len(x.slots))
            if found is not None:
                self.answers[found.work][found.slots] += 1
                self.take(self.d.replied(found, self.now))

    def refuse(self):
        if self.queue and self.rng.random() < 0.3:
            x, incarnation = self.queue.pop()
            self.take(self.d.not_here(x.server, incarnation, x.seq, self.now))

    def lose(self):
        if self.up:
            server = self.rng.choice(sorted(self.up))
            self.up.discard(server)
            self.take(self.d.disconnected(server, self.now))

    def rejoin(self):
        for server in sorted(set("abc") - self.up)[:1]:
            self.incarnation[server] += self.rng.random() < 0.5
            self.up.add(server)
            self.d.connected(server, self.incarnation[server], 1000, 1000, self.now)

    def replan(self):
        self.epoch += 1
        self.d.view_changed(view(ring(self.rng.choice([1, 2, 3])), epoch=self.epoch), self.now)

    def settle(self):
        while self.queue:
            self.reply()


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_every_slot_is_answered_exactly_once_or_reported(seed):
    c = Cluster(seed)
    for work in range(3):
        c.submit(work)
        for _ in range(c.rng.randint(0, 25)):
            c.step()
    c.settle()
    for work, state in c.works.items():
        assert state["missing"] is not None, "a work neither completes nor reports what it lacks"
        unanswered = set(state["missing"].tolist())
        unanswered |= {s for s in range(state["ids"].size) if s // 2 in state["poisoned"] and not c.answers[work][s]}
        for slot, times in enumerate(c.answers[work]):
            assert times == (slot not in unanswered), f"slot {slot} of work {work} was answered {times} times"
    assert not c.d.outbox.unanswered


@pytest.mark.parametrize("losses", [1, 2])
def test_bans_grow_and_are_ignored_when_nobody_else_is_left(losses):
    d = dispatcher(routing=np.array([[[0, 1]] * EXPERTS] * LAYERS))
    for _ in range(losses):
        d.disconnected("a", 0.0)
        d.connected("a", 1, 1000, 1000, 0.0)
    first = sends(d.submit(1, 0, np.array([[0]]), None, False, 0.1))[0]
    assert first.server == ("a" if losses == 1 else "b")
    d.disconnected("b", 0.1)
    assert sends(d.submit(2, 0, np.array([[0]]), None, False, 0.1))[0].server == "a"


def test_a_row_that_kills_all_holders_is_remembered_until_one_is_back():
    """It is held while nobody can serve it; of those that come back it kills two."""
    d = dispatcher(routing=np.array([[[0, 1]] * EXPERTS] * LAYERS), servers="ab")
    ids = np.zeros((4, 1), int)
    d.submit(1, 0, ids, None, False, 0.0)
    d.disconnected("a", 0.1)
    (held,) = d.disconnected("b", 0.2)
    assert (list(held.missing), list(held.deaths)) == ([0, 1, 2, 3], [2, 2, 2, 2])
    d.connected("a", 2, 1000, 1000, 1.0)
    d.connected("b", 2, 1000, 1000, 1.0)
    d.disconnected("b", 1.0)
    (x,) = sends(d.submit(2, 0, ids, held.missing, False, 1.0, held.deaths))
    assert list(x.rows) == [0], "row by row"
    (y,) = sends(d.replied(d.find("a", 2, x.seq, 1), 1.1))
    assert list(y.rows) == [1]
    (held,) = d.disconnected("a", 1.2)
    assert (list(held.missing), list(held.deaths)) == ([1, 2, 3], [3, 2, 2])
    d.connected("a", 3, 1000, 1000, 2.0)
    (z,) = sends(d.submit(3, 0, ids, held.missing, False, 2.0, held.deaths))
    assert list(z.rows) == [1]
    *ended, done = d.disconnected("a", 2.1)
    assert [list(i.rows) for i in ended if isinstance(i, Poisoned)] == [[1]]
    assert (list(done.missing), list(done.deaths)) == ([2, 3], [2, 2])


def test_a_third_death_while_what_two_have_left_is_computed_ends_no_innocent_row():
    """Both holders die at once, and then, by chance, the one that has loaded their experts for them."""
    holders = [[[0, 1]] * EXPERTS] * LAYERS
    d = dispatcher(routing=np.array(holders), servers="abcd")
    for s in "ab":  # others have died and come back lately
        d.disconnected(s, 0.0)
        d.connected(s, 2, 1000, 1000, 0.0)
    d.submit(1, 0, np.array([[0]]), None, False, 0.1)
    d.disconnected("a", 0.1)
    (held,) = d.disconnected("b", 0.1)
    d.view_changed(view(np.array([[[2, 3]] * EXPERTS] * LAYERS), "abcd", epoch=2), 0.2)
    (x,) = sends(d.submit(2, 0, np.array([[0]]), held.missing, False, 0.2, held.deaths))
    (y,) = sends(d.disconnected(x.server, 0.2))
    (done,) = d.replied(d.find(y.server, 1, y.seq, 1), 0.3)
    assert isinstance(done, Complete) and not len(done.missing)


def test_connections_that_break_without_a_death_end_no_row_that_nobody_could_serve():
    d = dispatcher(routing=np.array([[[0, 1]] * EXPERTS] * LAYERS), servers="ab")
    d.submit(1, 0, np.array([[0]]), None, False, 0.0)
    d.disconnected("b", 0.1)
    held = d.disconnected("a", 0.1)[-1]
    for work in range(2, 9):
        d.connected("a", 1, 1000, 1000, float(work))
        d.submit(work, 0, np.array([[0]]), held.missing, False, float(work), held.deaths)
        (held,) = d.disconnected("a", work + 0.1)
        assert isinstance(held, Complete) and list(held.missing) == [0]
