"""What a coordinator's log says of the views that it publishes: redundancy, as it changes, and loads that take long."""

from __future__ import annotations

import logging

from moering.protocol import View

logger = logging.getLogger(__name__)

PROGRESS_S = 10.0
"""Between two lines about loads that go on."""


class ViewLog:
    """One line for each view; at INFO only for those that an operator has to know of."""

    def __init__(self) -> None:
        self._said: tuple[bool, bool, int, int] | None = None
        self._said_s = 0.0

    def published(self, view: View, now_s: float) -> None:
        """`view` is sent to all members at `now_s`."""
        state = bool(view.orphans), bool(view.under_target), view.failures_survivable, view.failures_restorable
        goes_on = bool(view.under_target) and now_s - self._said_s >= PROGRESS_S
        says = bool(view.layers) and (state != self._said or goes_on)
        if says:
            self._said, self._said_s = state, now_s
        logger.log(logging.INFO if says else logging.DEBUG, "epoch %d: %s", view.epoch, describe_view(view))


def describe_view(view: View) -> str:
    """One line for people on who is there and how safe the experts are."""
    processes = f"{sum(m.state != 'OFFLINE' for m in view.members)} processes"
    if not view.layers:
        return f"{processes}; no plan yet"
    total, wanted = view.layers * view.experts, f"{view.replication} replicas"
    survivable = f"failures survivable {view.failures_survivable}, restorable {view.failures_restorable}"
    return "; ".join([
        processes,
        f"{view.orphans} of {total} experts without a replica" if view.orphans else survivable,
        f"{view.under_target} of {total} under {wanted}" if view.under_target else f"every expert has {wanted}",
    ])  # fmt: skip
