"""How long to rest between two experts, so that loading in the background leaves the machine to those who wait."""

from __future__ import annotations

from collections.abc import Callable


class Pace:
    """The two limits of background loading: a share of one thread's time, and bytes a second from the store.

    The share, of which traffic is to notice little, holds only while there is traffic; `calls` counts what this server
    has computed so far. The store is shared with other servers, so that limit holds at all times.
    """

    def __init__(self, share: float, expert_s: float, calls: Callable[[], int]) -> None:
        """`share` is in (0, 1]; one expert takes at least `expert_s` seconds, as a limit of the store's bytes says."""
        self._share, self._expert_s, self._calls = share, expert_s, calls
        self._calls_before = calls()

    def rest_s(self, took_s: float) -> float:
        """Seconds to rest after an expert that took `took_s`, a rest before it not counted."""
        calls, before = self._calls(), self._calls_before
        self._calls_before = calls
        busy_s = took_s / self._share if calls != before else took_s
        return max(busy_s, self._expert_s) - took_s
