"""A router without a model: a real `zmq.ROUTER` socket in a thread that answers submissions with scripted tokens."""

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from moering import protocol, transport
from moering.protocol import Abort, Hello, MemberInfo, RouterStats, Submit, Token, Tokens, Welcome

_incarnations = itertools.count(1000)
Script = Callable[[Submit, int], Token]


def token(submit: Submit, position: int, token_id: int, **extra) -> Token:
    """A token of the submission's attempt; the last one by `max_tokens` says so."""
    if position + 1 == submit.sampling.max_tokens:
        extra.setdefault("finish_reason", "length")
    return Token(submit.request_id, submit.attempt, position, token_id, **extra)


def says(ids: list[int], eos: int | None = None) -> Script:
    """A script that plays `ids`, then `eos` as a stop."""

    def script(submit: Submit, position: int) -> Token:
        if position < len(ids):
            return token(submit, position, ids[position])
        assert eos is not None, "the script is too short for the request"
        return Token(submit.request_id, submit.attempt, position, eos, finish_reason="stop")

    return script


def counts(submit: Submit, position: int) -> Token:
    """A token that depends on what an exact resume depends on: seed, choice, position, and the last prompt id."""
    sampling = submit.sampling
    return token(submit, position, 40 + (sampling.seed + 7 * sampling.choice + 3 * position + submit.prompt[-1]) % 60)


@dataclass
class _Active:
    identity: bytes
    submit: Submit
    position: int


class FakeRouter(threading.Thread):
    """Plays `script` for each submission, at most up to position `hold_at` until that is lifted by `release`."""

    def __init__(self, server_id: str = "router-0", script: Script = counts, hold_at: int | None = None) -> None:
        super().__init__(daemon=True, name=f"fake-{server_id}")
        self.server_id, self.incarnation = server_id, next(_incarnations)
        self.script, self.hold_at = script, hold_at
        self.hellos: list[Hello] = []
        self.submits: list[Submit] = []
        self.arrived: list[int] = []  # how many messages together
        self.aborts: list[Abort] = []
        self.welcome = True
        self.report_s: float | None = None  # between the figures that it sends, which show that it lives
        self._active: dict[str, _Active] = {}
        self._peers: list[bytes] = []
        self._outbox: list[object] = []
        self._changed = threading.Condition()
        self._wakeup = transport.Wakeup()
        self._stopping = False
        self._socket = transport.make_socket(zmq.ROUTER)
        self.address = transport.bind(self._socket, "tcp://127.0.0.1:*")
        self.start()

    def member(self, state: str = "ONLINE") -> MemberInfo:
        return MemberInfo("router", self.server_id, self.incarnation, self.address, 1, state, "", 0, 0)

    def release(self) -> None:
        """Lift `hold_at`."""
        self.hold_at = None
        self._wakeup.set()

    def send(self, *messages: object) -> None:
        """Send messages, whatever the protocol says, to the gateway that came last."""
        with self._changed:
            self._outbox.extend(messages)
        self._wakeup.set()

    def wait(self, condition: Callable[["FakeRouter"], object], timeout_s: float = 60.0) -> None:
        """Wait until `condition(self)` holds."""
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self), timeout_s), "the router waited in vain"

    def kill(self) -> None:
        """Vanish as a killed process does: the connection breaks, nothing more is said."""
        self._stopping = True
        self._wakeup.set()
        self.join(60.0)
        assert not self.is_alive()

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wakeup.fd, zmq.POLLIN)
        while not self._stopping:
            patience_ms = 1000 if self.report_s is None else int(1000 * self.report_s)
            poller.poll(0 if self._runnable() else patience_ms)
            self._wakeup.clear()
            if self.report_s is not None:
                self._outbox.append(RouterStats(self.server_id, {}, {}))
            while (frames := transport.try_receive(self._socket)) is not None:
                self.arrived.append(len(frames) - 1)
                for frame in frames[1:]:
                    self._handle(frames[0], protocol.decode([frame])[0])
            with self._changed:
                outbox, self._outbox = self._outbox, []
            for message in outbox:
                data = message if isinstance(message, bytes) else protocol.encode(message)
                transport.try_send(self._socket, [self._peers[-1], data])
            self._step()
        self._socket.close(0)
        self._wakeup.close()

    def _runnable(self) -> list[_Active]:
        limit = self.hold_at
        return [a for a in self._active.values() if limit is None or a.position < limit]

    def _handle(self, identity: bytes, message: object) -> None:
        with self._changed:
            if isinstance(message, Hello):
                self.hellos.append(message)
                self._peers.append(identity)
                if self.welcome:
                    reply = Welcome(self.server_id, self.incarnation, 0, 0)
                    transport.try_send(self._socket, [identity, protocol.encode(reply)])
            elif isinstance(message, Submit):
                self.submits.append(message)
                self._active[message.request_id] = _Active(identity, message, len(message.emitted))
            elif isinstance(message, Abort):
                self.aborts.append(message)
                self._active.pop(message.request_id, None)
            self._changed.notify_all()

    def _step(self) -> None:
        """One token for each active submission, in one message per gateway."""
        by_gateway: dict[bytes, list[Token]] = {}
        for active in self._runnable():
            new = self.script(active.submit, active.position)
            active.position += 1
            by_gateway.setdefault(active.identity, []).append(new)
            if new.finish_reason is not None:
                del self._active[active.submit.request_id]
        for identity, tokens in by_gateway.items():
            transport.try_send(self._socket, [identity, protocol.encode(Tokens(tokens))])
