"""Operations on a running cluster, as its operators ask for them, under streams that never stop."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moering.http_client import get_json, read_json, request
from tests.integration.cluster import Cluster, wait_for
from tests.integration.streams import Stream, Streams, bodies, check_equal

Operation = dict[str, Any]
WITHIN_S = 240.0  # nine processes one after the other, on a machine that does other things as well


def begin(cluster: Cluster, action: str, **body: object) -> Operation:
    url = f"{cluster.url}/admin/{action}"
    return dict(read_json(request(url, body), url))


def look(cluster: Cluster, operation: Operation) -> Operation:
    return dict(get_json(f"{cluster.url}/admin/operations/{operation['id']}"))


def wait_phase(cluster: Cluster, operation: Operation, *phases: str) -> Operation:
    wait_for(f"{operation['action']} is {phases}", lambda: look(cluster, operation)["phase"] in phases, WITHIN_S)
    return look(cluster, operation)


def done(cluster: Cluster, operation: Operation) -> Operation:
    """Wait for its end, which must be a good one."""
    operation = wait_phase(cluster, operation, "done", "failed")
    assert operation["phase"] == "done", operation
    return operation


def ids(cluster: Cluster, kind: str) -> list[str]:
    processes = cluster.status()["processes"]
    return sorted(p["id"] for p in processes if p["kind"] == kind and p["state"] == "ONLINE")


@contextmanager
def streaming(cluster: Cluster, reference: list[Stream], count: int, max_tokens: int) -> Iterator[None]:
    """Rounds of streams, one after the other, as long as the block lasts; each brings what the reference did."""
    stop, rounds, errors = threading.Event(), [0], []

    def go_round() -> None:
        try:
            while not stop.is_set():
                check_equal(Streams(cluster.url, bodies(count, max_tokens)).finish(), reference)
                rounds[0] += 1
        except BaseException as e:
            errors.append(e)

    thread = threading.Thread(target=go_round)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if errors:
        raise errors[0]
    assert rounds[0] > 0
