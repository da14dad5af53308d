"""Cluster keys of tests, and sockets of this process that have them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import zmq

from moering import transport
from moering.cluster_key import ClusterKey


@contextmanager
def using(key: ClusterKey | None) -> Iterator[None]:
    """Sockets that are made meanwhile have this key; those made before or after have none."""
    transport.use_key(key)
    try:
        yield
    finally:
        transport.use_key(None)


def new_key() -> ClusterKey:
    """One that nobody else has."""
    return ClusterKey(*zmq.curve_keypair())
