"""What libzmq reports of a socket, and what is said of those whom it refuses for want of the cluster key."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

SAY_AGAIN_S = 60.0
REFUSALS = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
logger = logging.getLogger(__name__)
_said_at_s: dict[str, float] = {}
_numbers = itertools.count()


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
