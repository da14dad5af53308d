"""When the first plan is made: not before the expert servers that are expected are here, or late. Pure."""

from __future__ import annotations

from moering.actions import Rules

PREDECESSOR_S = 1.5
"""Members renew every second: whoever knows of an earlier coordinator has brought its view by then."""
SETTLE_UNKNOWN_S = 2.0
"""Without a number of expert servers to expect: the first plan waits this long after the last one registered."""


class FirstPlan:
    """Waits for expert servers."""

    def __init__(self, rules: Rules, now_s: float) -> None:
        self._rules, self._not_before_s = rules, now_s + PREDECESSOR_S
        self._first_server_s = self._last_server_s = 0.0

    def server_registered(self, now_s: float) -> None:
        """An expert server is here."""
        self._last_server_s = now_s
        self._first_server_s = self._first_server_s or now_s

    def due(self, present: int, now_s: float) -> bool:
        """Whether `present` expert servers are enough to plan for."""
        if now_s < self._not_before_s:
            return False
        if self._rules.expert_servers:
            late = now_s - self._first_server_s >= self._rules.settle_s
            return present >= self._rules.expert_servers or (present > 0 and late)
        return present > 0 and now_s - self._last_server_s >= SETTLE_UNKNOWN_S
