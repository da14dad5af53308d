"""The coordinator's operations: at most one under way, the last ones remembered. Pure: `now_at` is an argument."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace

from moering.operations.begin import Refusal, begin
from moering.operations.facts import ENDED, Facts
from moering.operations.steps import step
from moering.operations.undo import roll_back
from moering.protocol import Operate, OperateAnswer, Operation, View

logger = logging.getLogger(__name__)

REMEMBERED = 8


class Operations:
    """All operations that are remembered, the newest at the end."""

    def __init__(self) -> None:
        self._all: list[Operation] = []
        self._began = False  # an operation of this coordinator's own
        self._restored = (0, 0)  # term and epoch of the view that the others are from
        self.deaths: Counter[str] = Counter()  # by server id, since the operation under way began

    @property
    def active(self) -> Operation | None:
        """The one under way."""
        return self._all[-1] if self._all and self._all[-1].phase not in ENDED else None

    @property
    def unpublished(self) -> bool:
        """Whether members do not know the newest phase yet."""
        return any(op.epoch == 0 for op in self._all)

    def to_publish(self, epoch: int) -> list[Operation]:
        """For the view of `epoch`."""
        self._all = [op if op.epoch else replace(op, epoch=epoch) for op in self._all]
        return list(self._all)

    def ask(self, ask: Operate, facts: Facts, now_at: float) -> OperateAnswer:
        """Begin an operation, or cancel one, if that is possible."""
        try:
            self._take(ask, facts, now_at)
        except Refusal as refusal:
            logger.info("refused to %s (operation %s): %s", ask.action, ask.id, refusal)
            return OperateAnswer(ask.id, refusal.code, str(refusal))
        return OperateAnswer(ask.id, "accepted", "")

    def _take(self, ask: Operate, facts: Facts, now_at: float) -> None:
        known = next((op for op in self._all if op.id == ask.id), None)
        if ask.action == "cancel":
            if known is None:
                raise Refusal("not_found", f"there is no operation {ask.id!r:.80}")
            if known is not self.active or known.phase == "rolling back":
                raise Refusal("refused", f"operation {known.id} is {known.phase}")
            self._put(roll_back(known, "cancelled", facts, now_at))
        elif known is None:
            if self.active is not None:
                raise Refusal("busy", f"operation {self.active.id} ({self.active.action}) is under way")
            self.deaths.clear()
            self._all = [*self._all[1 - REMEMBERED :], begin(ask, facts, now_at)]
            self._began = True

    def advance(self, facts: Facts, now_at: float) -> bool:
        """Take the steps that the cluster's state allows. True if there was one."""
        op = self.active
        if op is None:
            return False
        # One phase may be over as soon as it begins; members see only where that ends.
        after = step(op, facts, now_at)
        self._put(after)
        return after is not op

    def died(self, server_id: str) -> None:
        """A process exited."""
        self.deaths[server_id] += 1

    def loaded(self, moved_bytes: int) -> None:
        """An expert server loaded experts."""
        if self.active is not None:
            self._put(replace(self.active, moved_bytes=self.active.moved_bytes + moved_bytes))

    def restore(self, view: View) -> None:
        """Go on from what an earlier coordinator published: the newest view that a member brings counts."""
        if self._began or (view.term, view.epoch) <= self._restored:
            return
        self._restored = view.term, view.epoch
        self._all = [replace(op, epoch=0) for op in view.operations][-REMEMBERED:]
        if self.active is not None:
            logger.info("going on with operation %s (%s, %s)", self.active.id, self.active.action, self.active.phase)

    def _put(self, op: Operation) -> None:
        self._all[-1] = op
