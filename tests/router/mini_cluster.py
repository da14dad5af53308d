"""A router's engine and expert servers as threads of one process: real sockets, real arithmetic, gates to hold compute.

What dies here is a connection or a compute thread; processes die in tests/faults.
"""

import threading
import time
from collections import defaultdict

import numpy as np
import zmq

from expert_server.backend_cpu import CpuBackend
from expert_server.residency import Residency
from expert_server.service import Service
from moering import protocol, transport
from moering.checkpoint import Checkpoint
from moering.protocol import Failed, Hello, MemberInfo, PromptLogprobs, Sampling, Submit, Tokens, View
from moering.shared_rows import SLOTS
from router.config import Config
from router.exchange import Exchange
from router.frontend import Frontend
from router.process import build_engine

DEADLINE_S = 60.0


def wait_for(condition):
    """Look every 10 ms until it is so."""
    pause = threading.Event()
    for _ in range(int(DEADLINE_S * 100)):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it did not happen")


class Server:
    """One expert server: thread and socket. `gate` holds its computations while it is cleared."""

    def __init__(self, directory, index, incarnation, checkpoint, backend, experts):
        self.name, self.incarnation = f"e{index}", incarnation
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self.dead = False
        residency = Residency()
        for key in experts:
            weights = checkpoint.expert(*key)
            residency.add(key, backend.load(weights), weights.digest)
        socket = transport.make_socket(zmq.ROUTER)
        self.address = transport.bind(socket, f"ipc://{directory}/e{index}.{incarnation}")
        self.service = Service(socket, self.name, incarnation, 4096, residency)
        self.service.start()
        shape = (checkpoint.num_layers, checkpoint.num_experts, checkpoint.hidden_size)

        def compute(*args):
            self.entered.set()
            assert self.gate.wait(DEADLINE_S)
            if self.dead:
                raise SystemExit  # ends this thread
            backend.compute(*args)

        terms = {name: getattr(backend, name) for name in ("max_tensor_bytes", "slot_bytes", "dtype", "pin")}
        self.service.open("m", checkpoint.digest, shape, compute, **terms)

    @property
    def member(self):
        return MemberInfo("expert-server", self.name, self.incarnation, self.address, 0, "ONLINE", "", 99, 8)

    def die(self):
        """A computation in progress ends without a reply, then the connections break."""
        self.dead = True
        self.gate.set()
        self.service.close()
        self.service._socket.close()


class MiniCluster:
    """`replication` replicas of each expert on `n` servers: expert e of layer l on servers (e + l), (e + l + 1), …"""

    def __init__(
        self, directory, checkpoint_path, n=3, replication=2, beside=None, dtype=None, published=True, **options
    ):
        """`beside`: another cluster, whose servers this one's router uses, too. `dtype`: of rows; else the servers'."""
        self.directory, self.n, self.replication = directory, n, replication
        self.checkpoint, self.backend = Checkpoint(checkpoint_path), CpuBackend("auto", 1)
        self.servers = beside.servers if beside else [self.start(i) for i in range(n)]
        poller, router = zmq.Poller(), 2 if beside else 1
        hello = Hello(f"r{router}", router, "m", self.checkpoint.digest, "", SLOTS, dtype or self.backend.dtype)
        self.exchange = Exchange(hello, self.checkpoint.hidden_size, poller, time.monotonic, self.backend.pin)
        socket = transport.make_socket(zmq.ROUTER)
        self.address = transport.bind(socket, f"ipc://{directory}/r{router}")
        config = Config(**{"kv_cache_mb": 64, **options})
        frontend = Frontend(socket, f"r{router}", router, 64, "m", self.checkpoint.digest)
        self.engine = build_engine(config, self.checkpoint, self.exchange, frontend, poller)
        self.epoch = 0
        if published:
            self.publish()
        self.thread = threading.Thread(target=self.engine.run, daemon=True)
        self.thread.start()
        if published:
            wait_for(lambda: len(self.exchange.dispatcher.health) == n)

    def holders(self, layer, expert):
        return [(layer + expert + i) % self.n for i in range(self.replication)]

    def start(self, index, incarnation=1):
        c = self.checkpoint
        pairs = [(layer, e) for layer in range(c.num_layers) for e in range(c.num_experts)]
        mine = [p for p in pairs if index in self.holders(*p)]
        return Server(self.directory, index, incarnation, c, self.backend, mine)

    def publish(self):
        self.epoch += 1
        c = self.checkpoint
        routing = np.array(
            [[self.holders(layer, e) for e in range(c.num_experts)] for layer in range(c.num_layers)], "<i2"
        )
        r, names = routing.tobytes(), [s.name for s in self.servers]
        members = [s.member for s in self.servers]
        shape = (c.num_layers, c.num_experts, self.replication)
        self.engine.view_changed(View(1, self.epoch, members, names, *shape, r, r, self.replication, 1, 0, 0))

    def restart(self, index):
        old = self.servers[index]
        self.servers[index] = self.start(index, old.incarnation + 1)
        self.publish()

    def close(self):
        self.engine.stop()
        for server in self.servers:
            server.die()
        self.thread.join(DEADLINE_S)


class Client:
    """A gateway's end: sends requests, collects (token, digest of its logits) of each."""

    def __init__(self, address):
        self.socket = transport.make_socket(zmq.DEALER)
        self.socket.rcvtimeo = int(DEADLINE_S * 1000)
        transport.connect(self.socket, address)
        self.tokens, self.failures, self.finished = defaultdict(list), {}, set()
        self.renormalized = defaultdict(int)
        self.prompt_logprobs = defaultdict(list)  # messages

    def submit(self, name, prompt, emitted=(), **sampling):
        self.socket.send(self.message(name, prompt, emitted, **sampling))

    def message(self, name, prompt, emitted=(), **sampling):
        options = {"max_tokens": 16, "temperature": 0.0, "logits_digest": True, **sampling}
        return protocol.encode(Submit(name, 0, list(prompt), list(emitted), Sampling(**options), DEADLINE_S))

    def receive(self):
        message, _ = protocol.decode(self.socket.recv_multipart())
        if isinstance(message, Tokens):
            for t in message.tokens:
                assert t.position == len(self.tokens[t.request_id]), "a token lost or twice"
                self.tokens[t.request_id].append((t.token_id, t.logits_digest))
                self.renormalized[t.request_id] += t.renormalized
                if t.finish_reason:
                    self.finished.add(t.request_id)
        elif isinstance(message, PromptLogprobs):
            assert message.request_id not in self.tokens, "after the first token"
            self.prompt_logprobs[message.request_id].append(message)
        elif isinstance(message, Failed):
            self.failures[message.request_id] = message.code
        return message

    def until(self, condition):
        while not condition():
            self.receive()

    def until_ended(self, n):
        self.until(lambda: len(self.finished) + len(self.failures) >= n)
        return dict(self.tokens)
