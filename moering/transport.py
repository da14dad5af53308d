"""Every zmq socket of a process is made here, with every option set, because libzmq's defaults hurt.

The cluster key (`use_key`) protects all of them. It belongs to the process, as the one context does: a socket that was
made without it would be a hole.

Left alone, a socket lingers at exit, reconnects for ever and delivers what was queued for a dead process to its
successor, `zmq.ROUTER` drops silently, a frame may be of any size, and a name is resolved in the I/O thread that all
sockets share.
"""

from __future__ import annotations

import contextlib
import socket as sockets
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import zmq
from zmq.utils.monitor import parse_monitor_message

from moering.cluster_key import FRAME_OVERHEAD_BYTES, ClusterKey
from moering.errors import ConfigError
from moering.protocol import MAX_FRAME_BYTES
from moering.refusals import REFUSALS, log_refusals, say_refusal, watch
from moering.time_slice import short_slice

SPIN_S = 0.002
"""For how long a thread beside a GPU looks for the next message before it sleeps. Such a machine has cores to spare,
and a virtual one takes 0.1 ms and more to wake a thread up."""


@dataclass(frozen=True)
class Heartbeat:
    """ZMTP PING interval and the silence after which a connection counts as lost. libzmq's own thread answers."""

    interval_ms: int
    timeout_ms: int


DATA = Heartbeat(100, 300)  # router → expert server: a stopped process is noticed after about 350 ms
CONTROL = Heartbeat(1000, 5000)

Frames = Sequence[bytes | memoryview]
_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)  # arithmetic of zmq's enumerations costs microseconds


def context() -> zmq.Context[zmq.Socket[bytes]]:
    """The one context of this process."""
    return zmq.Context.instance()


class _Process:
    key: ClusterKey | None = None


def use_key(key: ClusterKey | None) -> None:
    """Protect all sockets that this process makes from now on."""
    _Process.key = key


def has_key() -> bool:
    """Whether sockets that are made now have a cluster key."""
    return _Process.key is not None


def start_io_thread() -> None:
    """Start the context's I/O thread, ready to take a core from a computation for the microseconds that it needs.

    Linux lets a thread that wakes up interrupt a running one only when its time slice is the shorter one (since 6.12;
    earlier kernels ignore it). New threads inherit it, so it is set while the first socket starts the I/O thread.
    """
    with short_slice():
        context().socket(zmq.PAIR).close()


def make_socket(
    kind: int, heartbeat: Heartbeat = CONTROL, *, queue_messages: int = 1000, reconnect: bool = False
) -> Any:
    """A socket with all options set: a `zmq.ROUTER` to listen, any other kind to connect.

    Without `reconnect` a lost connection stays lost: its owner opens a new socket for the new incarnation, so that
    nothing queued for a dead process reaches the next one at that address.
    """
    s: Any = context().socket(kind)
    s.maxmsgsize = MAX_FRAME_BYTES
    if _Process.key is not None:
        _Process.key.protect(s, listening=kind == zmq.ROUTER)
        s.maxmsgsize += FRAME_OVERHEAD_BYTES
    s.linger = 0
    s.sndhwm = s.rcvhwm = queue_messages
    s.handshake_ivl = 2000
    s.heartbeat_ivl, s.heartbeat_timeout = heartbeat.interval_ms, heartbeat.timeout_ms
    s.heartbeat_ttl = heartbeat.timeout_ms
    if kind == zmq.ROUTER:
        s.router_mandatory = 1  # an error, not a silent drop, for a peer that is gone
    if reconnect:
        s.reconnect_ivl, s.reconnect_ivl_max = 100, 1000
    else:
        s.reconnect_ivl = -1
    return s


def bind(socket: Any, endpoint: str, *, insecure: bool = False, advertise: str = "") -> str:
    """Bind and return the address where peers connect.

    An address beyond this machine is refused unless the socket has a cluster key, or `insecure` is given.
    """
    protected = socket.mechanism == zmq.CURVE
    if not (protected or insecure or is_local(endpoint)):
        raise ConfigError(
            f"refusing to bind {endpoint}, which other machines reach, without a cluster key: "
            "--key gives one (moering keygen makes it), --insecure does without"
        )
    if endpoint.startswith("tcp://") and endpoint.count(":") == 1:
        endpoint += ":*"
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as e:
        raise ConfigError(f"cannot bind {endpoint}: {e}") from e
    if protected:
        log_refusals(socket)
    address = str(socket.last_endpoint.rstrip(b"\0").decode())
    if advertise and address.startswith("tcp://"):
        address = f"tcp://{advertise}:{address.rpartition(':')[2]}"
    return address


def is_local(endpoint: str) -> bool:
    """Whether only this machine reaches the endpoint (ipc, inproc, tcp on a loopback address)."""
    parts = urlsplit(endpoint)
    if parts.scheme in ("ipc", "inproc"):
        return True
    host = parts.netloc.rpartition(":")[0].strip("[]") or parts.netloc
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def connect(socket: Any, address: str) -> None:
    """Connect by numeric address. Raises `OSError` when the name does not resolve."""
    socket.connect(resolve(address))


def resolve(address: str) -> str:
    """`address` with its host name replaced by a numeric one; not in libzmq's I/O thread, which all sockets share."""
    if not address.startswith("tcp://"):
        return address
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    infos = sockets.getaddrinfo(host.strip("[]"), int(port), type=sockets.SOCK_STREAM)
    family, number = infos[0][0], infos[0][4][0]
    return f"tcp://[{number}]:{port}" if family == sockets.AF_INET6 else f"tcp://{number}:{port}"


def try_send(socket: Any, frames: Frames) -> bool:
    """Send without ever blocking. False when the peer's queue is full or the peer is gone."""
    try:
        socket.send_multipart(frames, zmq.NOBLOCK)
    except (zmq.Again, zmq.ZMQError) as e:
        if e.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH):
            return False
        raise
    return True


def try_receive(socket: Any) -> list[bytes] | None:
    """The next message, or None when none is waiting."""
    if not socket.get(_EVENTS) & _POLLIN:
        return None  # the usual end of a loop: cheaper than the exception
    try:
        frames: list[bytes] = socket.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return None
    return frames


def watch_disconnects(socket: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    """A socket that becomes readable when `socket` loses its connection, 1.4 ms after a peer's SIGKILL.

    Failed attempts to connect count as well.
    """
    lost = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_CONNECT_RETRIED
    return watch(socket, lost | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | REFUSALS)


def watch_handshakes(socket: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    """A socket that becomes readable when a handshake of the connecting `socket` fails."""
    return watch(socket, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | REFUSALS)


def watch_connections(socket: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    """A socket to be read with `next_event` until `EVENT_MONITOR_STOPPED`: who connects to the listening `socket`, and
    whose connection ends."""
    both = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
    return watch(socket, both | zmq.EVENT_MONITOR_STOPPED | REFUSALS)


class Event(NamedTuple):
    """What happened to a watched socket, as libzmq says it: a `zmq.Event`, and an errno or another detail."""

    kind: int
    value: int


def read_event(monitor: zmq.Socket[bytes]) -> Event | None:
    """The next event of a watched socket, or None when none is waiting. A refusal for want of the key is logged."""
    frames = try_receive(monitor)
    return None if frames is None else _event(frames)


def next_event(monitor: zmq.Socket[bytes]) -> Event:
    """Like `read_event`, but waits for it."""
    return _event(monitor.recv_multipart())


def _event(frames: list[bytes]) -> Event:
    event = parse_monitor_message(frames)
    say_refusal(event, keyed=has_key())
    return Event(int(event["event"]), int(event["value"]))


class Wakeup:
    """Wakes a thread out of a zmq poll: register `fd` for POLLIN, `set` from any thread, `clear` after waking."""

    def __init__(self) -> None:
        self._read, self._write = sockets.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self.fd = self._read.fileno()

    def set(self) -> None:
        """Make `fd` readable. Never blocks; may be called from any thread."""
        with contextlib.suppress(BlockingIOError, OSError):  # full: the reader has been woken already
            self._write.send(b"\0")

    def clear(self) -> None:
        """Forget all earlier calls of `set`."""
        with contextlib.suppress(BlockingIOError):
            while self._read.recv(4096):
                pass

    def close(self) -> None:
        """Release both ends."""
        self._read.close()
        self._write.close()
