"""What each expert server owes this router, what waits until it owes less, and until when it should have answered."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from router.instructions import Counters, Dispatch, Instruction, Role, Send
from router.pace import Pace, ServerPace


@dataclass(slots=True)
class Queue:
    """One server's."""

    credit_rows: int
    max_pairs: int
    pace: ServerPace
    owed_rows: int = 0
    owed_s: float = 0.0  # the time that these should take
    waiting: deque[Dispatch] = field(default_factory=deque)

    def fits(self, d: Dispatch) -> bool:
        """A server that owes nothing takes any dispatch."""
        return not self.owed_rows or self.owed_rows + len(d.rows) <= self.credit_rows


class Outbox:
    """All dispatches without an answer, by `seq`, waiting ones included."""

    def __init__(self, counters: Counters) -> None:
        self.pace = Pace()
        self._counters = counters
        self.unanswered: dict[int, Dispatch] = {}
        self.queues: dict[str, Queue] = {}
        self.due_s = float("inf")  # when there is something to judge: nothing that is not late yet is due before

    def open(self, server: str, credit_rows: int, max_pairs: int) -> None:
        """A connection to it is up."""
        self.queues[server] = Queue(credit_rows, max_pairs, self.pace.of(server))

    def close(self, server: str) -> tuple[list[Dispatch], list[Dispatch]]:
        """The connection is lost: forget what was outstanding there. Returns (sent, never sent)."""
        waiting = self.forget_waiting(server)
        sent = self.at(server)
        for d in sent:
            del self.unanswered[d.seq]
        del self.queues[server]
        return sent, waiting

    def at(self, server: str) -> list[Dispatch]:
        """What this server has not answered."""
        return [d for d in self.unanswered.values() if d.server == server]

    def give(self, d: Dispatch, now_s: float) -> list[Instruction]:
        """Send it now, or as soon as its server's credit allows."""
        self.unanswered[d.seq] = d
        queue = self.queues[d.server]
        if queue.fits(d):  # a decode may overtake the pieces of a prefill
            return [self._send(queue, d, now_s)]
        queue.waiting.append(d)
        return []

    def answered(self, d: Dispatch, now_s: float) -> list[Instruction]:
        """The server owes it no more: what waited for its credit may go."""
        del self.unanswered[d.seq]
        queue = self.queues[d.server]
        queue.pace.samples.append((now_s - d.sent_s, d.before_s, d.distinct_experts, len(d.slots)))
        return self.settle(d, now_s)

    def settle(self, d: Dispatch, now_s: float) -> list[Instruction]:
        """The same without learning from it."""
        queue = self.queues[d.server]
        queue.owed_rows -= len(d.rows)
        queue.owed_s = queue.owed_s - d.expected_s if queue.owed_rows else 0.0
        if not queue.waiting:
            return []
        instructions: list[Instruction] = []
        while queue.waiting and queue.fits(queue.waiting[0]):
            instructions.append(self._send(queue, queue.waiting.popleft(), now_s))
        return instructions

    def forget_waiting(self, server: str) -> list[Dispatch]:
        """Take back what was never sent."""
        queue = self.queues[server]
        waiting = list(queue.waiting)
        queue.waiting.clear()
        for d in waiting:
            del self.unanswered[d.seq]
        return waiting

    def overdue(self, now_s: float) -> list[Dispatch]:
        """What should have been answered by now; `due_s` is set to the next of the others."""
        late, next_s = [], float("inf")
        for d in self.unanswered.values():
            if d.due_s <= now_s:
                late.append(d)
            else:
                next_s = min(next_s, d.due_s)
        self.due_s = next_s
        return late

    def _send(self, queue: Queue, d: Dispatch, now_s: float) -> Send:
        d.expected_s = self.pace.expected_s(d.distinct_experts, len(d.slots))
        d.before_s, d.sent_s = queue.owed_s, now_s
        queue.owed_rows += len(d.rows)
        queue.owed_s += d.expected_s
        d.due_s = due_s = now_s + queue.pace.allowed_s(queue.owed_s)
        if due_s < self.due_s:
            self.due_s = min(due_s, max(now_s, self.pace.next_look_s))
        if d.role is Role.OWNER:
            self._counters.dispatches += 1
            self._counters.rows += len(d.rows)
        return Send(d)
