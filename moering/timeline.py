"""What happened to the cluster, as events: kept in a bounded list, and logged as JSON, one per line, at DEBUG. Pure."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import deque
from collections.abc import Iterable

from moering.protocol import Event, Operation, View
from moering.view_log import describe_view

logger = logging.getLogger(__name__)

KEPT = 1000


class Timeline:
    """The last events of one coordinator."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=KEPT)
        self._last_id = 0
        self._operations: set[tuple[object, ...]] = set()

    def add(self, type: str, subject: str, text: str, *, at: float, epoch: int = 0) -> None:
        """Something happened; `at` in seconds since 1970."""
        self._last_id = max(self._last_id + 1, int(at * 1e6))
        event = Event(self._last_id, type, subject, epoch, text)
        self._events.append(event)
        logger.debug("%s", json.dumps(as_json(event)))

    def after(self, event_id: int, limit: int) -> list[Event]:
        """The oldest `limit` events with a higher id."""
        if event_id >= self._last_id:
            return []
        return [e for e in self._events if e.id > event_id][:limit]

    def took_over(self, operations: Iterable[Operation]) -> None:
        """What an earlier coordinator has published of operations is no news."""
        self._new(operations)

    def _new(self, operations: Iterable[Operation]) -> list[Operation]:
        """Those that are in another phase, or at another process, than when they were last given."""
        keys = {(op.id, op.phase, *op.drain, *op.start): op for op in operations}
        new = [op for key, op in keys.items() if key not in self._operations]
        self._operations = set(keys)
        return new

    def published(self, before: View | None, view: View, at: float) -> None:
        """A view was published: what has changed of the plan, of redundancy and of operations."""
        old, text = _redundancy(before), describe_view(view)
        self.add("plan.published", "", text, at=at, epoch=view.epoch)
        if old and not _redundancy(view):
            self.add("redundancy.lost", "", text, at=at, epoch=view.epoch)
        if old is False and _redundancy(view):
            text = f"every expert has {view.replication} replicas"
            self.add("redundancy.restored", "", text, at=at, epoch=view.epoch)
        for operation in self._new(view.operations):
            phase = operation.phase.replace(" ", "_")
            self.add(f"operation.{phase}", operation.id, describe(operation), at=at, epoch=view.epoch)


def as_json(event: Event) -> dict[str, object]:
    """For the log and for HTTP: `at` is in seconds since 1970."""
    fields = dataclasses.asdict(event)
    return {"id": fields.pop("id"), "at": round(event.id / 1e6, 6), **fields}


def describe(operation: Operation) -> str:
    """One line on an operation for people."""
    what = {"scale": f"scale {operation.kind} to {operation.count}", "drain": f"drain {operation.kind}"}
    parts = [
        what.get(operation.action, f"restart {operation.kind or 'all kinds'}"),
        f"start {', '.join(operation.start)}" if operation.start else "",
        f"drain {', '.join(operation.drain)}" if operation.drain else "",
        f"moved {operation.moved_bytes / 1e6:.1f} MB" if operation.ended_at else "",
        operation.error,
    ]
    return "; ".join(filter(None, parts))


def _redundancy(view: View | None) -> bool | None:
    """Whether every expert has its replicas; None before there is a plan."""
    return None if view is None or not view.layers else not view.under_target
