"""Late, slow and wedged servers: whose rows go to whom, what is written once, and who comes back when."""

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.health import WEDGED_S
from router.instructions import Complete, Poisoned, Role
from router.pace import FLOOR_S, UNKNOWN_S
from router.race import BUDGET_ROWS, BUDGET_SHARE
from tests.router.test_dispatch import EXPERTS, HIDDEN_ROWS, LAYERS, dispatcher, ring, sends, topk, view

FAST_S = 0.001  # what a dispatch takes a server that is well


class Run:
    """A dispatcher and a clock, with servers that answer at once unless they are told otherwise."""

    def __init__(self, width=2, servers="abc", **options):
        routing = ring(width, len(servers))
        self.d = dispatcher(servers, routing=routing, **options)
        self.d.view_changed(view(routing, tuple(servers)), 0.0)
        self.now, self.work = 0.0, 0
        self.held, self.done = [], []  # dispatches not answered; Complete and Poisoned
        self.written = {}  # work: times that each slot was written
        self.times = {}  # server: seconds of an answer; None: never
        self.sent, self.completed = [], set()

    def submit(self, rows=HIDDEN_ROWS, ids=None, layer=0):
        self.work += 1
        ids = topk(rows, self.work) if ids is None else np.array(ids)
        self.written[self.work] = np.zeros(ids.size, int)
        self.take(self.d.submit(self.work, layer, ids, None, False, self.now))
        return self.work

    def take(self, instructions):
        new = sends(instructions)
        self.held += new
        self.sent += new
        self.done += [i for i in instructions if isinstance(i, Complete | Poisoned)]
        self.completed |= {i.work for i in instructions if isinstance(i, Complete)}

    def answer(self, d):
        self.held = [x for x in self.held if x is not d]
        found = self.d.find(d.server, 1, d.seq, len(d.slots))
        if found is not None:
            self.written[found.work][found.open_slots()] += 1
            self.take(self.d.replied(found, self.now))

    def run(self, seconds):
        """Let time pass: answers come when their server's time is up, deadlines when they are due."""
        until = self.now + seconds
        while True:
            due = [(d.sent_s + t, d.seq, d) for d in self.held if (t := self.times.get(d.server, FAST_S)) is not None]
            at, _, d = min(due, default=(float("inf"), 0, None))
            if min(at, self.d.due_s) > until:
                self.now = until
                return
            if at <= self.d.due_s:
                self.now = max(self.now, at)
                self.answer(d)
            else:
                self.now = max(self.now, self.d.due_s)
                self.take(self.d.tick(self.now))

    def complete(self, work):
        return work in self.completed

    def serve(self, seconds, **options):
        """One work after the other, each as soon as the one before is done. Returns their number."""
        until, n = self.now + seconds, 0
        while self.now < until:
            work = self.submit(**options)
            while not self.complete(work):
                self.run(0.001)
            n += 1
        return n

    def warm(self):
        """Until all servers are known."""
        for _ in range(100):
            self.submit(ids=np.random.default_rng(0).permuted(np.tile(np.arange(EXPERTS), (4, 1)), axis=1))
            self.run(0.005)
        assert all(h.well for h in self.d.health.values())
        self.sent.clear()
        return self

    def at(self, server):
        return [d for d in self.held if d.server == server]


ON_A = [[0, 3], [3, 6], [6, 0]]  # the first replica of all these is a, the second b


def test_a_late_dispatch_is_raced_by_the_next_replica_which_wins():
    r = Run().warm()
    r.times["a"] = None
    work = r.submit(ids=ON_A)
    r.run(FLOOR_S - 0.001)
    assert not r.complete(work)
    r.run(0.003)
    assert r.complete(work)
    assert (r.written[work] == 1).all()
    c = r.d.counters
    assert (c.hedges, c.hedges_won, c.hedged_rows, c.rows_resent, c.servers_late) == (1, 1, 3, 0, 1)
    (late,) = r.at("a")
    assert r.d.find("a", 1, late.seq, len(late.slots)) is late
    r.answer(late)  # whose slots may belong to another layer by now
    assert (r.written[work] == 1).all()
    assert (c.dropped_rows, c.stale_replies) == (3, 0)


def test_an_answer_that_comes_while_the_hedge_runs_is_used():
    r = Run().warm()
    r.times["a"], r.times["b"] = FLOOR_S + 0.002, 0.01
    work = r.submit(ids=ON_A)
    r.run(FLOOR_S + 0.003)
    assert r.complete(work)
    assert (r.d.counters.hedges, r.d.counters.hedges_won) == (1, 0)
    r.run(0.02)
    assert (r.written[work] == 1).all()
    assert r.d.counters.dropped_rows == 3
    assert not r.held


def test_each_of_several_hedges_takes_its_part_of_the_race():
    r = Run(width=3)
    r.d.view_changed(view([[[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 2, 1]] * 2] * LAYERS), 0.0)  # 0: a, b; 3: a, c
    r.warm()
    r.times |= {"a": None, "c": None}
    work = r.submit(ids=[[0, 3]])
    r.run(FLOOR_S + 0.01)
    assert not r.complete(work)
    assert list(r.written[work]) == [1, 0]  # b's part
    (late,) = r.at("a")
    r.answer(late)
    assert r.complete(work)
    assert list(r.written[work]) == [1, 1]
    r.answer(r.at("c")[0])
    assert list(r.written[work]) == [1, 1]


def test_a_late_server_is_passed_over_and_used_again_once_it_has_answered():
    r = Run().warm()
    r.times["a"] = None
    r.submit(ids=ON_A)
    r.run(FLOOR_S + 0.01)
    assert r.d.health["a"].late
    second = r.submit(ids=ON_A)
    assert not [d for d in r.at("a") if d.work == second]
    del r.times["a"]
    r.run(0.01)
    assert not r.d.health["a"].late
    third = r.submit(ids=ON_A)
    assert {d.server for d in r.held if d.work == third} == {"a"}


def test_when_all_are_late_nobody_is_suspected():
    r = Run().warm()
    r.times = dict.fromkeys("abc", 0.3)
    for _ in range(5):
        work = r.submit(rows=30)
        r.run(0.31)
        assert r.complete(work)
    assert r.d.counters.servers_late == r.d.counters.hedges == 0


def test_before_anything_is_known_of_a_server_it_has_a_second():
    r = Run()
    r.times["a"] = UNKNOWN_S - 0.01
    work = r.submit()
    r.run(UNKNOWN_S)
    assert r.complete(work)
    assert r.d.counters.servers_late == 0


def test_what_takes_long_by_its_size_is_not_late():
    """Two thousand rows may take longer than the deadline of a few."""
    r = Run(credit=10**6, max_rows=10**6)
    for _ in range(60):
        for rows in (2, 200):
            r.times = dict.fromkeys("abc", 1e-3 + 2e-4 * rows)
            r.submit(rows=rows)
            r.run(0.2)
    r.times = dict.fromkeys("abc", 1e-3 + 2e-4 * 2000)
    r.submit(rows=2000)
    r.run(1.0)
    assert r.d.counters.servers_late == 0


def test_a_pause_of_our_own_blames_nobody_before_a_second_look():
    r = Run().warm()
    r.times["a"] = None
    r.submit(ids=ON_A)
    r.now += 1.0
    assert r.d.tick(r.now) == []
    assert not r.d.health["a"].late
    r.answer(r.at("a")[0])
    r.run(0.1)
    assert r.d.counters.servers_late == 0


def test_what_waits_for_the_credit_of_a_late_server_goes_elsewhere():
    r = Run(credit=3).warm()
    r.times["a"] = None
    r.submit(ids=ON_A)
    second = r.submit(ids=ON_A)
    assert not [d for d in r.held if d.work == second]  # no credit
    r.run(FLOOR_S + 0.02)
    assert r.complete(second)
    assert (r.written[second] == 1).all()


def test_a_hedge_goes_only_where_there_is_credit():
    r = Run(credit=3).warm()
    r.times |= {"a": None, "b": FLOOR_S - 0.01}
    work = r.submit(ids=ON_A)
    r.run(0.03)
    r.submit(ids=[[1, 4], [4, 7], [7, 1]])  # b has no credit left
    r.run(FLOOR_S - 0.02)
    assert r.d.health["a"].late
    assert r.d.counters.hedges == 0
    r.run(0.1)
    assert r.complete(work)
    assert r.d.counters.hedges == 1


def test_hedges_keep_to_their_budget():
    r = Run(credit=10**6, max_rows=10**6)
    r.warm()
    rng = random.Random(0)
    for _ in range(300):
        r.times = dict.fromkeys("abc", FAST_S) | {rng.choice("abc"): 0.15}
        r.submit(rows=40)
        r.run(0.2)
    c = r.d.counters
    assert c.hedges > 3
    assert c.hedged_rows + c.probe_rows <= BUDGET_ROWS + BUDGET_SHARE * c.rows


def test_a_wedged_server_is_replaced_whatever_the_budget():
    r = Run(credit=10**6, max_rows=10**6).warm()
    r.times["a"] = None
    work = r.submit(ids=ON_A * BUDGET_ROWS)
    r.run(WEDGED_S - 0.02)
    assert not r.complete(work)
    r.run(0.1)
    assert r.complete(work)


def test_a_loss_after_the_hedge_was_sent_sends_nothing_twice():
    r = Run().warm()
    r.times |= {"a": None, "b": None}
    work = r.submit(ids=ON_A)
    r.run(FLOOR_S + 0.005)
    (hedge,) = r.at("b")
    assert hedge.role.value == "hedge"
    r.held = [hedge]
    r.take(r.d.disconnected("a", r.now))
    assert r.held == [hedge]
    assert hedge.role.value == "owner"
    assert r.d.counters.rows_resent == r.d.counters.rows_lost == 0
    r.answer(hedge)
    assert r.complete(work)
    assert (r.written[work] == 1).all()


def test_a_lost_hedge_leaves_the_race_to_its_original():
    r = Run().warm()
    r.times |= {"a": None, "b": None}
    work = r.submit(ids=ON_A)
    r.run(FLOOR_S + 0.005)
    r.held = r.at("a")
    r.take(r.d.disconnected("b", r.now))
    assert r.d.counters.rows_resent == 0
    r.answer(r.at("a")[0])
    assert r.complete(work)
    assert (r.written[work] == 1).all()


# --- slow ---


def test_a_slow_server_is_ejected_within_two_seconds_and_comes_back_when_it_is_fast():
    r = Run().warm()
    healthy = r.serve(1.0)
    r.times["a"] = 20 * FAST_S  # far below any deadline
    r.serve(2.0)
    assert r.d.health["a"].ejected
    assert r.d.counters.servers_late == 0
    assert r.serve(1.0) >= 0.9 * healthy
    r.serve(10.0)
    assert r.d.health["a"].ejected
    assert r.d.counters.probes > 5
    del r.times["a"]
    r.serve(20.0)
    assert not r.d.health["a"].ejected
    first = r.submit(ids=ON_A)
    assert {d.server for d in r.held if d.work == first} == {"a"}


def test_all_slow_alike_are_not_ejected():
    r = Run().warm()
    r.times = dict.fromkeys("abc", 20 * FAST_S)
    r.serve(3.0)
    assert r.d.counters.servers_ejected == 0


def test_one_long_pause_ejects_nobody_and_many_do():
    r = Run().warm()
    r.times["a"] = 0.2
    r.submit(ids=ON_A)
    r.run(0.3)
    del r.times["a"]
    r.serve(1.0)
    assert (r.d.counters.servers_late, r.d.health["a"].ejected) == (1, False)
    for _ in range(3):
        r.times["a"] = 0.2
        r.submit(ids=ON_A)
        r.run(0.3)
        del r.times["a"]
        r.serve(0.1)
    assert r.d.counters.servers_ejected >= 1


def test_bans_double_while_probes_find_it_slow():
    r = Run().warm()
    r.times["a"] = 20 * FAST_S
    r.serve(20.0)
    probes = [d.sent_s for d in r.sent if d.role is Role.PROBE]
    bans = [b - a for a, b in pairwise(probes) if b - a > 0.4]
    assert len(bans) >= 3
    assert all(1.7 < b / a < 2.3 for a, b in pairwise(bans))


def test_nobody_waits_for_a_probe_and_its_answer_is_written_nowhere():
    r = Run().warm()
    r.times["a"] = 20 * FAST_S
    r.serve(2.0)
    r.times["a"] = None
    before = r.d.counters.probes
    r.serve(3.0)
    assert r.d.counters.probes > before
    assert all((w == 1).all() for work, w in r.written.items() if r.complete(work))
    assert r.d.health["a"].late
    for d in r.at("a"):
        r.answer(d)
    assert all((w == 1).all() for work, w in r.written.items() if r.complete(work))


def test_an_ejected_server_serves_what_nobody_else_has():
    r = Run().warm()
    r.d.view_changed(view([[[0]] * EXPERTS] * LAYERS), r.now)
    r.d.health["a"].eject(r.now)
    r.d.routes.changed()
    assert r.complete(r.submit()) is False
    r.run(0.01)
    assert r.complete(r.work)


# --- wedged ---


def test_rows_outstanding_at_two_wedged_servers_go_on_in_parts():
    r = Run(width=3).warm()
    r.times |= {"a": None, "b": None}
    work = r.submit(ids=ON_A)
    r.run(2 * WEDGED_S + 0.2)
    parts = [d for d in r.sent if d.server == "c"]
    assert sorted(row for d in parts for row in d.rows) == [0, 1, 2]
    assert len(parts) == 2
    assert parts[1].sent_s > parts[0].sent_s
    assert r.complete(work)
    assert (r.written[work] == 1).all()
    for d in list(r.held):
        r.answer(d)
    assert (r.written[work] == 1).all()


class Poisonous(Run):
    """A server that gets row 2 of the work `poisonous` never answers anything again."""

    poisonous = -1

    def take(self, instructions):
        super().take(instructions)
        self.times |= {d.server: None for d in sends(instructions) if d.work == self.poisonous and 2 in d.rows}


def test_a_row_that_wedges_one_server_after_the_other_is_ended():
    r = Poisonous(width=8, servers="abcdefgh").warm()
    r.poisonous = r.work + 1
    work = r.submit(rows=8, ids=[[0]] * 8)
    for _ in range(3000):
        r.submit(rows=4)  # other requests keep the others' clocks right
        r.run(0.002)
    assert [list(i.rows) for i in r.done if isinstance(i, Poisoned)] == [[2]]
    assert r.complete(work)
    assert (np.delete(r.written[work], 2) == 1).all()
    assert len(r.times) <= 6
    r.run(1.0)
    assert set(r.written) == r.completed, "other requests were held up for good"


# --- any order ---


class AnyOrder(Run):
    """Answers, losses, returns, refusals, plans and pauses in any order; nothing answers by itself."""

    def __init__(self, seed):
        rng = self.rng = random.Random(seed)
        super().__init__(
            width=rng.choice([1, 2, 3]), credit=rng.choice([1, 3, 1000]), max_rows=rng.choice([1, 2, 1000])
        )
        self.up, self.epoch = set("abc"), 1
        for _ in range(rng.choice([0, 70])):  # known, or not
            self.submit(rows=2)
            self.run(0.002)
        self.times = dict.fromkeys("abc", None)

    def take(self, instructions):
        super().take(instructions)
        assert all(d.server in self.up for d in sends(instructions)) if hasattr(self, "up") else True

    def step(self):
        self.now += self.rng.choice([0.0, 0.001, 0.02, 0.3, 1.5])
        getattr(
            self, self.rng.choice(["reply", "reply", "reply", "lose", "rejoin", "refuse", "replan", *["look"] * 3])
        )()

    def look(self):
        if self.now >= self.d.due_s:
            self.take(self.d.tick(self.now))

    def reply(self):
        if self.held:
            self.answer(self.rng.choice(self.held))

    def refuse(self):
        if self.held and self.rng.random() < 0.3:
            d = self.rng.choice(self.held)
            self.held = [x for x in self.held if x is not d]
            self.take(self.d.not_here(d.server, 1, d.seq, self.now))

    def lose(self):
        if self.up and self.rng.random() < 0.5:
            server = self.rng.choice(sorted(self.up))
            self.up.discard(server)
            self.take(self.d.disconnected(server, self.now))

    def rejoin(self):
        for server in sorted(set("abc") - self.up)[:1]:
            self.up.add(server)
            self.d.connected(server, 1, 1000, 1000, self.now)

    def replan(self):
        self.epoch += 1
        self.d.view_changed(view(ring(self.rng.choice([1, 2, 3])), epoch=self.epoch), self.now)

    def settle(self):
        while self.held:
            self.now += 0.001
            self.look()
            self.reply()


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2**32))
def test_every_slot_is_written_exactly_once_or_reported_in_any_order(seed):
    r = AnyOrder(seed)
    works = []
    for _ in range(3):
        works.append(r.submit(rows=r.rng.randint(1, 9)))
        for _ in range(r.rng.randint(0, 30)):
            r.step()
    r.settle()
    for work in works:
        (complete,) = [i for i in r.done if isinstance(i, Complete) and i.work == work]
        poisoned = {row for i in r.done if isinstance(i, Poisoned) and i.work == work for row in i.rows}
        for slot, times in enumerate(r.written[work]):
            unanswered = slot in complete.missing or (slot // 2 in poisoned and not times)
            assert times == (not unanswered), f"slot {slot} of work {work} was written {times} times"
    assert not r.d.outbox.unanswered
    assert len({d.seq for d in r.sent}) == len(r.sent)
    assert all(q.owed_rows == 0 and q.owed_s == 0 and not q.waiting for q in r.d.outbox.queues.values())


@pytest.mark.parametrize("seed", range(3))
def test_hedges_and_write_offs_do_happen_in_any_order(seed):
    """The test above would show nothing if they did not."""
    hedges = won = 0
    for n in range(300):
        r = AnyOrder(1000 * seed + n)
        for _ in range(3):
            r.submit(rows=r.rng.randint(1, 9))
            for _ in range(r.rng.randint(0, 30)):
                r.step()
        hedges, won = hedges + r.d.counters.hedges, won + r.d.counters.hedges_won
    assert hedges > won > 0
