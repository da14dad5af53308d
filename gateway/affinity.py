"""Which router gets a request: that with the least work, or one near it whose cache holds what the prompt begins with.

Pure: no I/O, no clock. What a router's cache holds is taken to be what it was sent; a wrong guess costs a prefill.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

SLACK = 2.0
SLACK_SHARE = 0.25
"""A router may be chosen for its cache while its load is at most (1 + SLACK_SHARE) x the least one + SLACK."""
MAX_PREFIXES = 4096

R = TypeVar("R", bound=Hashable)


class Affinity:
    """Remembers which routers were sent which prefixes, the `most` that were used last."""

    def __init__(self, most: int = MAX_PREFIXES) -> None:
        self._most = most
        self._sent_to: OrderedDict[bytes, set[Hashable]] = OrderedDict()

    def choose(self, keys: Sequence[bytes], loads: Mapping[R, float]) -> R:
        """One of the routers of `loads`, which must not be empty, for a prompt whose blocks have these keys."""
        limit = min(loads.values()) * (1 + SLACK_SHARE) + SLACK
        near = [router for router, load in loads.items() if load <= limit]
        return min(near, key=lambda router: (-self._held(keys, router), loads[router]))

    def sent(self, keys: Sequence[bytes], router: Hashable) -> None:
        """`router` is computing a prompt with these keys."""
        for key in reversed(keys):  # without the blocks before it a block is of no use, so it is forgotten first
            self._sent_to.setdefault(key, set()).add(router)
            self._sent_to.move_to_end(key)
        while len(self._sent_to) > self._most:
            self._sent_to.popitem(last=False)

    def forget(self, router: Hashable) -> None:
        """Its cache is gone."""
        for routers in self._sent_to.values():
            routers.discard(router)

    def _held(self, keys: Sequence[bytes], router: Hashable) -> int:
        """Leading blocks that the router was sent."""
        for count, key in enumerate(keys):
            if router not in self._sent_to.get(key, ()):
                return count
        return len(keys)
