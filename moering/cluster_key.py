"""The key of a cluster: who has it is a member, everybody else is refused, and nobody reads along.

ZeroMQ's CURVE (Curve25519, XSalsa20, Poly1305) encrypts each connection under keys of its own, so that traffic recorded
today stays unreadable when the cluster key is stolen tomorrow. All processes have the same key pair: a listening socket
is the CURVE server of it, a connecting one a client that expects that server and shows the same pair as its own.

CURVE by itself proves the server to the client only: whoever knows the public key would be admitted. Who else may come
in is asked of a ZAP handler, which libzmq looks for in the context of the listening socket. A process has one context
(`moering.transport`), so one handler serves all its sockets: a thread that sleeps until a connection is made, as those
that own sockets compute for long, or block. It keeps no state: the ZAP domain of a socket is the public key that opens
it. Where no handler is, sockets admit nobody (``ZAP_ENFORCE_DOMAIN``). The authenticator of `zmq.auth` would be a
thread as well, with lists of addresses and directories of keys that nobody needs here.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from moering.errors import ConfigError

KEY_HELP = "file with the cluster key, of `moering keygen`: who has it is admitted, and all zmq traffic is encrypted"
SAY_AGAIN_S = 60.0
REFUSALS = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
FRAME_OVERHEAD_BYTES = 33
"""What encryption adds to a frame: the command's name, a nonce, a checksum and the frame's flags."""
_ZAP = "inproc://zeromq.zap.01"
_FILE_BYTES = 1000  # more than any key file has

Context = zmq.Context[zmq.Socket[bytes]]
logger = logging.getLogger(__name__)
_said_at_s: dict[str, float] = {}
_numbers = itertools.count()


@dataclass(frozen=True)
class ClusterKey:
    """The pair of one cluster, both in Z85 (40 characters). The file holds the secret half, which tells the other."""

    public: bytes
    secret: bytes = field(repr=False)

    @classmethod
    def read(cls, path: str) -> ClusterKey:
        """The key in a file of `create`. Raises `ConfigError`, also when others than its owner may read the file."""
        _require_curve()
        try:
            with open(path, "rb") as f:
                mode, content = os.fstat(f.fileno()).st_mode & 0o777, f.read(_FILE_BYTES)
        except OSError as e:
            raise ConfigError(f"cannot read the cluster key {path}: {e.strerror}") from e
        if mode & 0o077:
            raise ConfigError(f"the cluster key {path} is open to others (mode {mode:03o}): chmod 600 {path}")
        try:
            secret = content.strip()
            return cls(zmq.curve_public(secret), secret)
        except (ValueError, zmq.ZMQError) as e:
            raise ConfigError(f"{path} holds no cluster key: `moering keygen` writes one line of 40 characters") from e

    @classmethod
    def create(cls, path: str) -> ClusterKey:
        """Write a new key to a file that only its owner can read. Raises `ConfigError`, also when there is one."""
        _require_curve()
        public, secret = zmq.curve_keypair()
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
                f.write(secret + b"\n")
        except FileExistsError as e:
            raise ConfigError(f"{path} is there already, and stays as it is") from e
        except OSError as e:
            raise ConfigError(f"cannot write the cluster key {path}: {e.strerror}") from e
        return cls(public, secret)

    def protect(self, socket: Any, *, listening: bool) -> None:
        """Have `socket`, which is not bound or connected yet, speak to members of this cluster alone."""
        socket.curve_publickey, socket.curve_secretkey = self.public, self.secret
        if not listening:
            socket.curve_serverkey = self.public
            return
        socket.curve_server = True
        socket.zap_domain = self.public
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        _start_doorkeeper(socket.context)


def _require_curve() -> None:
    if not zmq.has("curve"):
        raise ConfigError("this libzmq was built without CURVE: there is no cluster key with it")


@functools.cache
def _start_doorkeeper(context: Context) -> None:
    """Answer who is admitted at the sockets of `context`; once for all of them."""
    handler = context.socket(zmq.REP)
    handler.linger = 0
    handler.bind(_ZAP)
    threading.Thread(target=_keep_door, args=(handler,), name="doorkeeper", daemon=True).start()


def _keep_door(handler: zmq.Socket[bytes]) -> None:
    while True:
        version, request, domain, _, _, mechanism, *credentials = handler.recv_multipart()
        admitted = mechanism == b"CURVE" and credentials == [z85.decode(domain)]
        status = [b"200", b"OK"] if admitted else [b"400", b"not a member"]
        handler.send_multipart([version, request, *status, b"", b""])  # no user id, no metadata


# --- what is said of those who are refused ---


def watch(socket: Any, events: int) -> zmq.Socket[bytes]:
    """A socket that receives these events of `socket`, until that is closed or watched anew.

    Not pyzmq's `get_monitor_socket`: it names the pair's address after the socket's descriptor, which a new socket may
    have got before libzmq has let go of the old one's address (EADDRINUSE, 8 times in 20,000).
    """
    address = f"inproc://events-{next(_numbers)}"
    socket.monitor(address, events)
    monitor: zmq.Socket[bytes] = socket.context.socket(zmq.PAIR)
    monitor.connect(address)
    return monitor


def log_refusals(socket: Any) -> None:
    """Log on a thread of its own whom a listening socket refuses, until it is closed or watched anew."""
    monitor = watch(socket, REFUSALS | zmq.EVENT_MONITOR_STOPPED)
    threading.Thread(target=_log_refusals, args=(monitor,), name="refusals", daemon=True).start()


def _log_refusals(monitor: zmq.Socket[bytes]) -> None:
    with monitor:
        while (event := parse_monitor_message(monitor.recv_multipart()))["event"] != zmq.EVENT_MONITOR_STOPPED:
            say_refusal(event, keyed=True)


def say_refusal(event: Any, *, keyed: bool) -> None:
    """Log why a connection was refused, if this event of a socket's monitor says that it was for want of the key.

    `keyed`: whether the socket has one. Any other event is passed over.
    """
    if event["event"] == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
        reason = {
            zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC: "the other process has another cluster key",
            zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH: (
                "the other process has no cluster key, this one has"
                if keyed
                else "the other process has a cluster key, this one has none"
            ),
        }.get(event["value"])
    elif event["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        reason = "the connecting process has another cluster key"
    else:
        reason = None
    if reason is not None:
        say_seldom(f"no connection at {event['endpoint'].decode()}: {reason} (--key)")


def say_seldom(text: str) -> None:
    """Log a warning, at most once a minute: who is refused tries again and again."""
    now_s = time.monotonic()
    if now_s - _said_at_s.get(text, -SAY_AGAIN_S) >= SAY_AGAIN_S:
        _said_at_s[text] = now_s
        logger.warning(text)
