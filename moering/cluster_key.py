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
import os
import threading
from dataclasses import dataclass, field
from typing import Any

import zmq
from zmq.utils import z85

from moering.errors import ConfigError

KEY_HELP = "file with the cluster key, of `moering keygen`: who has it is admitted, and all zmq traffic is encrypted"
FRAME_OVERHEAD_BYTES = 33
"""What encryption adds to a frame: the command's name, a nonce, a checksum and the frame's flags."""
_ZAP = "inproc://zeromq.zap.01"
_FILE_BYTES = 1000  # more than any key file has

Context = zmq.Context[zmq.Socket[bytes]]


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
