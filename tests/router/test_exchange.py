"""The exchange over real sockets, with compute threads that can be killed between receive and reply."""

import ctypes
import errno
import gc
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import zmq

from expert_server.residency import Residency
from expert_server.service import Service
from moering import protocol, transport
from moering.expert_frames import INLINE, ITEM_BYTES, Reply
from moering.protocol import Hello, MemberInfo, View
from moering.shared_rows import MAX_BYTES, SLOT_BYTES, SLOTS, Layout, SharedRows
from router.exchange import HANDSHAKE_S, Exchange
from router.expert_rows import HostRows
from router.expert_rows_cuda import DeviceRows
from tests.expert_server.test_service import compute

LAYERS, EXPERTS, HIDDEN, TOP_K = 2, 4, 8, 2
DEADLINE_S = 20.0


class Server:
    """An expert server without a process: a socket and a compute thread. Expert e multiplies by e + 1."""

    def __init__(self, tmp_path, name, incarnation=1, digest="digest", experts=range(EXPERTS)):
        self.name, self.incarnation = name, incarnation
        residency = Residency()
        for layer in range(LAYERS):
            for e in experts:
                residency.add((layer, e), float(e + 1), bytes(8))
        self.socket = transport.make_socket(zmq.ROUTER)
        self.address = transport.bind(self.socket, f"ipc://{tmp_path}/{name}-{incarnation}")
        self.service = Service(self.socket, name, incarnation, 1000, residency)
        self.digest = digest

    def serve(self, dtype="float32"):
        self.service.start()
        self.service.open("model", self.digest, (LAYERS, EXPERTS, HIDDEN), compute, dtype=dtype)
        return self

    def die(self):
        if self.service.is_alive():
            self.service.close()
        else:
            self.socket.close()

    @property
    def member(self):
        return MemberInfo("expert-server", self.name, self.incarnation, self.address, 0, "ONLINE", "", 99, 8)


class Rows:
    """What the exchange sees of a micro-batch."""

    def __init__(self, ids, layer=0):
        self.layer, self.prefill = layer, False
        self.ids = self.topk_ids = np.asarray(ids)
        self.hidden = np.random.default_rng(0).standard_normal((len(ids), HIDDEN), np.float32)
        self.output = np.full((self.ids.size, HIDDEN), np.nan, np.float32)

    @property
    def expert_rows(self):
        return HostRows(self.hidden, self.output)

    def expected(self):
        return (np.repeat(self.hidden, TOP_K, axis=0) * (self.ids.reshape(-1, 1) + 1.0)).astype(np.float32)


class Harness:
    def __init__(self, dtype="float32", pin=None):
        self.poller = zmq.Poller()
        hello = Hello("r", 7, "model", "digest", "", SLOTS, dtype)
        self.exchange = Exchange(hello, HIDDEN, self.poller, time.monotonic, pin)
        self.epoch = 0

    def view(self, *servers, routing=None):
        self.epoch += 1
        if routing is None:  # expert e: server e first, then the next
            routing = [[[(e + i) % len(servers) for i in range(2)] for e in range(EXPERTS)]] * LAYERS
        r = np.array(routing, "<i2")
        names, members = [s.name for s in servers], [s.member for s in servers]
        v = View(1, self.epoch, members, names, LAYERS, EXPERTS, r.shape[2], r.tobytes(), r.tobytes(), 2, 1, 0, 0)
        self.exchange.view_changed(v)

    def until(self, condition):
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, "nothing happened"
            self.exchange.connect_missing()
            self.exchange.handle(self.poller.poll(50))

    def connected(self, *servers):
        health = self.exchange.dispatcher.health
        self.until(lambda: all(s.name in health and health[s.name].connected for s in servers))

    def finish(self):
        done = []

        def finished():
            done.extend(self.exchange.take_finished())
            return done

        self.until(finished)
        assert len(done) == 1
        return done[0]


@pytest.fixture
def servers(tmp_path):
    s = [Server(tmp_path, n) for n in "ab"]
    yield s
    for server in s:
        server.die()


@pytest.fixture
def harness():
    h = Harness()
    yield h
    h.exchange.close()


IDS = [[0, 1], [2, 3], [1, 2], [3, 0]]


def test_rows_travel_and_results_land_in_their_slots(harness, servers):
    a, b = (s.serve() for s in servers)
    harness.view(a, b)
    harness.connected(a, b)
    rows = Rows(IDS)
    harness.exchange.submit(rows)
    done = harness.finish()
    assert done.micro_batch is rows
    assert len(done.missing) == 0
    assert (rows.output == rows.expected()).all()


@pytest.mark.parametrize("way", ["frames", "slots", "pinned slots"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_on_a_device_travel_in_the_type_that_both_ends_agree_on(tmp_path, monkeypatch, dtype, way):
    """A router that asks for bf16, with servers that compute in it, and with ones that do not."""
    shared = way != "frames"
    if not shared:
        monkeypatch.setattr(SharedRows, "open", lambda *args: None)
    servers = [Server(tmp_path, n).serve(dtype) for n in "ab"]
    harness = Harness("bfloat16", pin=(lambda memory: lambda: None) if way == "pinned slots" else None)
    harness.view(*servers)
    harness.connected(*servers)
    for layer in range(LAYERS):
        rows = DeviceRowsOf(IDS, layer)
        harness.exchange.submit(rows)
        harness.finish()
        assert torch.equal(rows.outputs(), torch.from_numpy(rows.expected()).bfloat16())
        in_place = way == "pinned slots" and dtype == "bfloat16"
        assert bool(rows.copied().isnan().all()) is in_place
    slots = f"{SLOTS} slots of {SLOT_BYTES // (ITEM_BYTES[dtype] * HIDDEN)}, doorbell" if shared else "no shared memory"
    assert {c.terms for c in harness.exchange._connections.values()} == {f"{dtype} rows, {slots}"}
    harness.exchange.close()
    for server in servers:
        server.die()


class DeviceRowsOf(Rows):
    """The same rows on a device."""

    def __init__(self, ids, layer=0):
        super().__init__(ids, layer)
        inputs = torch.from_numpy(self.hidden).bfloat16()
        self.hidden = inputs.float().numpy()
        self._outputs = torch.full((self.ids.size, HIDDEN), float("nan"), dtype=torch.bfloat16)
        self._addresses = torch.zeros(self.ids.size, dtype=torch.int64)
        self._device_rows = DeviceRows(inputs, self._outputs, self._addresses)

    @property
    def expert_rows(self):
        return self._device_rows

    def copied(self):
        return self._outputs

    def outputs(self):
        rows = [(ctypes.c_int16 * HIDDEN).from_address(a) for a in self._addresses.tolist()]
        return torch.from_numpy(np.array(rows, np.int16)).view(torch.bfloat16)


def test_without_shared_memory_rows_travel_in_frames(harness, servers, monkeypatch):
    monkeypatch.setattr(SharedRows, "open", lambda *args: None)
    a, b = (s.serve() for s in servers)
    harness.view(a, b)
    harness.connected(a, b)
    rows = Rows(IDS)
    harness.exchange.submit(rows)
    harness.finish()
    assert (rows.output == rows.expected()).all()


def test_more_works_than_slots_are_under_way_at_once(harness, servers):
    a, b = (s.serve() for s in servers)
    harness.view(a, b)
    harness.connected(a, b)
    works = [Rows(IDS, layer=n % LAYERS) for n in range(3 * SLOTS)]
    for rows in works:
        rows.hidden *= 1 + works.index(rows)
        harness.exchange.submit(rows)
    done = []

    def finished():
        done.extend(harness.exchange.take_finished())
        return len(done) == len(works)

    harness.until(finished)
    for rows in works:
        assert (rows.output == rows.expected()).all()


def test_closing_gives_up_all_shared_memory(harness, servers):
    def segments():
        return sum("moering-rows" in os.path.realpath(fd) for fd in Path("/proc/self/fd").iterdir())

    a, b = servers
    a.serve()
    before = segments()
    harness.view(a, b)  # b answers no hello
    harness.connected(a)
    assert segments() > before + 1
    harness.exchange.close()
    harness.until(lambda: segments() == before)  # a gives up its end when it hears that nobody is there


def descriptors():
    """Memory and pipes that this process has."""
    gc.collect()  # what tests before have left
    names = [os.path.realpath(fd) for fd in Path("/proc/self/fd").iterdir()]
    return sum("moering-rows" in name or "pipe:" in name for name in names)


@pytest.mark.parametrize("what", ["make_socket", "watch_disconnects"])
def test_a_connection_that_cannot_be_made_for_want_of_files_is_tried_again(harness, servers, monkeypatch, what):
    a, _ = servers
    before, want = descriptors(), [zmq.ZMQError(errno.EMFILE)]
    make = getattr(transport, what)

    def short(*args, **options):
        if want:
            raise want.pop()
        return make(*args, **options)

    monkeypatch.setattr(transport, what, short)
    harness.view(a)
    assert not want and harness.exchange.suspects == ["a"]
    assert descriptors() == before
    a.serve()
    harness.exchange._retry_at.clear()
    harness.connected(a)


def test_a_server_that_dies_between_receive_and_reply_loses_nothing(harness, servers):
    """`a` welcomes but never computes, then dies: its rows, and only its, are computed by `b`."""
    a, b = servers
    only_welcomes(harness, a, b)
    rows = Rows(IDS)
    harness.exchange.submit(rows)
    assert a.socket.poll(10_000), "nothing was outstanding at the one that dies"
    outstanding = harness.exchange.dispatcher.outstanding_at("a")
    a.die()
    done = harness.finish()
    assert len(done.missing) == 0
    assert (rows.output == rows.expected()).all()
    counters = harness.exchange.dispatcher.counters
    assert counters.rows_resent == counters.rows_lost == sum(len(d.rows) for d in outstanding) > 0


@pytest.mark.parametrize("change", [{"dtype": "float16"}, {"dtype": "bfloat16"}, {"columns": HIDDEN - 1}, {"slot": 0}])
def test_a_reply_of_other_rows_costs_its_server_the_connection_and_nothing_else(harness, servers, change):
    a, b = servers
    identity = only_welcomes(harness, a, b)
    rows = Rows(IDS)
    harness.exchange.submit(rows)
    assert a.socket.poll(10_000), "nothing was sent to the one that answers wrongly"
    header = a.socket.recv_multipart()[1]
    dispatch, _ = protocol.decode([header, bytes(4 * HIDDEN * len(rows.hidden))])
    pairs = len(dispatch.pairs) // 4
    reply = Reply(dispatch.router, dispatch.seq, 1, 0, "float32", pairs, HIDDEN)._replace(**change)
    tensor = [bytes(pairs * reply.columns * ITEM_BYTES[reply.dtype])] if reply.slot == INLINE else []
    a.socket.send_multipart([identity, protocol.encode(reply), *tensor])
    assert len(harness.finish().missing) == 0
    assert (rows.output == rows.expected()).all()
    assert harness.exchange.dispatcher.counters.servers_lost == 1


def test_a_second_welcome_gives_out_no_slot_twice(harness, servers):
    a, _ = servers
    harness.view(a)
    harness.until(lambda: a.socket.poll(0))
    identity, hello = a.socket.recv_multipart()
    segment = SharedRows.open(protocol.decode([hello])[0].shared_rows, Layout(SLOTS, 16, HIDDEN))
    harness_welcome(a, identity, slot_rows=16)
    harness.connected(a)
    slots = []
    for work in range(2):
        harness.exchange.submit(Rows(IDS, layer=work))
        header = a.socket.recv_multipart()[1]
        slots.append(protocol.decode([header])[0].slot)
        harness_welcome(a, identity, slot_rows=16)
        harness.exchange.handle(harness.poller.poll(10_000))
    assert segment is not None
    assert len(set(slots)) == 2


@pytest.mark.parametrize("terms", [{"slot_rows": MAX_BYTES}, {"dtype": "bfloat16"}, {"dtype": "float16"}])
def test_a_welcome_on_impossible_terms_costs_its_server_the_connection(harness, servers, terms):
    a, _ = servers
    harness.view(a)
    harness.until(lambda: a.socket.poll(0))
    identity, _ = a.socket.recv_multipart()
    harness_welcome(a, identity, **terms)
    harness.until(lambda: "a" not in harness.exchange._connections)
    assert harness.exchange.suspects == ["a"]


def test_a_slot_for_which_there_is_no_memory_is_given_up(harness, servers, monkeypatch):
    a, b = (s.serve() for s in servers)
    harness.view(a, b)
    harness.connected(a, b)
    monkeypatch.setattr(SharedRows, "ready", lambda self, slot: slot == 0)
    for n in range(2):
        rows = Rows(IDS, layer=n)
        harness.exchange.submit(rows)
        harness.finish()
        assert (rows.output == rows.expected()).all()
    connections = harness.exchange._connections.values()
    assert [c._free_slots for c in connections] == [[0], [0]]


def only_welcomes(harness, a, b):
    """Connect to `a`, which welcomes without shared memory and then does nothing, and to `b`, which serves."""
    b.serve()
    harness.view(a, b)
    harness.connected(b)
    harness.until(lambda: a.socket.poll(0))
    identity, _ = a.socket.recv_multipart()
    harness_welcome(a, identity)
    harness.connected(a)
    return identity


def harness_welcome(server, identity, **terms):
    welcome = protocol.Welcome(server.name, server.incarnation, 100, 100, **terms)
    server.socket.send_multipart([identity, protocol.encode(welcome)])


def test_without_replica_rows_are_missing_until_a_new_incarnation_is_up(harness, servers, tmp_path):
    a, b = (s.serve() for s in servers)
    only_own = [[[e % 2] for e in range(EXPERTS)]] * LAYERS
    harness.view(a, b, routing=only_own)
    harness.connected(a, b)
    a.die()
    harness.until(lambda: "a" in harness.exchange.suspects)
    rows = Rows(IDS)
    harness.exchange.submit(rows)
    done = harness.finish()
    assert done.missing.tolist() == [0, 2, 5, 7]  # slots of experts 0 and 2
    again = Server(tmp_path, "a", incarnation=2).serve()
    harness.view(again, b, routing=only_own)
    harness.connected(again)
    harness.until(lambda: "a" not in harness.exchange.suspects)
    harness.exchange.submit(rows, done.missing)
    assert len(harness.finish().missing) == 0
    assert (rows.output == rows.expected()).all()
    again.die()


class Silent:
    """A server of the plan that nobody has started."""

    def __init__(self, directory, name):
        self.name = name
        self.member = MemberInfo("expert-server", name, 1, f"ipc://{directory}/{name}", 0, "ONLINE", "", 99, 8)


def test_suspects_may_be_read_while_connections_come_and_go(harness, tmp_path):
    """The lease's thread reads them at each renewal, while the engine's connects and loses."""
    plans = [[Silent(tmp_path, f"{plan}-{n}") for n in range(10)] for plan in range(100)]
    names = [[], *([s.name for s in plan] for plan in plans)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as pool:
            changes = pool.submit(lambda: [harness.view(*plan) for plan in plans])
            while not changes.done():
                assert harness.exchange.suspects in names
            changes.result()
    finally:
        sys.setswitchinterval(interval)
    assert harness.exchange.suspects == names[-1]


def test_suspects_may_be_read_while_garbage_is_collected(harness, tmp_path):
    """Finalizers in Python run within a collection, and meanwhile the engine's thread may."""
    connections, pairs = harness.exchange._connections, [(n, n) for n in range(5000)]  # none is left to be used again
    harness.view(*(Silent(tmp_path, str(n)) for n in range(10)))
    threshold, added = gc.get_threshold(), []

    def add(phase, info):
        added.append(f"{len(added)} more")
        connections[added[-1]] = connections["0"]

    gc.callbacks.append(add)
    gc.set_threshold(1)
    try:
        suspects = harness.exchange.suspects
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(add)
        for name in added:
            del connections[name]
    assert added and len(suspects) == 10 < len(pairs)


def test_the_log_says_when_a_connection_that_was_lost_is_there_again(harness, servers, tmp_path, caplog):
    a, b = (s.serve() for s in servers)
    with caplog.at_level("INFO", "router.exchange"):
        harness.view(a, b)
        harness.connected(a, b)
        assert caplog.messages == []
        a.die()
        harness.until(lambda: "a" in harness.exchange.suspects)
        again = Server(tmp_path, "a").serve()
        harness.connected(again)
    again.die()
    lost, found = caplog.messages
    assert lost.startswith("a: the connection is lost") and found.startswith("connected to a: ")


def test_an_exchange_that_closes_suspects_nobody(harness, tmp_path):
    """The lease's thread says so once more if it happens to renew just then."""
    harness.view(*(Silent(tmp_path, str(n)) for n in range(3)))
    assert len(harness.exchange.suspects) == 3
    harness.exchange.close()
    assert harness.exchange.suspects == []


def test_a_server_of_another_checkpoint_is_not_used(harness, servers, tmp_path):
    stranger = Server(tmp_path, "a", digest="another").serve()
    b = servers[1].serve()
    harness.view(stranger, b)
    harness.connected(b)
    rows = Rows(IDS)
    harness.exchange.submit(rows)
    assert len(harness.finish().missing) == 0
    assert (rows.output == rows.expected()).all()
    assert "a" in harness.exchange.suspects
    stranger.die()


def test_a_server_without_the_expert_says_so_and_the_next_is_asked(harness, servers, tmp_path):
    half = Server(tmp_path, "a", experts=[0]).serve()
    b = servers[1].serve()
    harness.view(half, b)
    harness.connected(half, b)
    rows = Rows(IDS)
    harness.exchange.submit(rows)
    assert len(harness.finish().missing) == 0
    assert (rows.output == rows.expected()).all()
    assert harness.exchange.dispatcher.counters.not_here == 1
    half.die()


def test_it_settles_once_every_server_has_answered_or_failed_to(harness, tmp_path):
    now_s = time.monotonic()
    harness.exchange._clock = lambda: now_s
    answers, never = Server(tmp_path, "a"), Server(tmp_path, "b")
    harness.view(answers, never)
    assert harness.exchange.settling
    answers.serve()
    harness.connected(answers)
    assert harness.exchange.settling, "the other one may still answer"
    for _ in range(3):  # an attempt ends, another one begins: it is known not to answer
        now_s += HANDSHAKE_S
        harness.exchange.connect_missing()
        assert not harness.exchange.settling
    answers.die()
    never.die()
