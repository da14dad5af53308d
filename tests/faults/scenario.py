"""Streams through a failure, held against the same streams without one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tests.integration.cluster import Cluster
from tests.integration.streams import Stream, Streams, bodies, check_equal

STREAMS, TOKENS, FAULT_AT = 8, 160, 40


class Scenario:
    """A cluster, and what its streams bring when nothing fails."""

    def __init__(self, cluster: Cluster, streams: int = STREAMS, tokens: int = TOKENS) -> None:
        self.cluster = cluster
        self.bodies = bodies(streams, tokens)
        self.reference = Streams(cluster.url, self.bodies).finish()
        assert len({tuple(s.tokens) for s in self.reference}) == streams
        assert all(len(s.tokens) == len(s.digests) == tokens for s in self.reference)
        check_equal(self.reference, self.reference)
        counted = cluster.counters_after(0)
        assert counted["rows_lost"] == counted["tokens_recomputed"] == counted["forwards_dropped"] == 0

    def through(self, fault: Callable[[Streams], None]) -> list[Stream]:
        """Run all streams, call `fault` in their middle, and check that nobody can tell by what he got."""
        seen = in_the_middle(self.cluster, self.bodies, FAULT_AT, fault)
        check_equal(seen, self.reference)
        return seen

    def through_death_of_servers(self, fault: Callable[[Streams], None], victims: Sequence[str] = ()) -> list[Stream]:
        """The same; the router lost the victims, and by its own account computed again only the rows that were lost.

        `fault` may add to the victims. Others may be lost for a moment: on a busy machine one is silent for 300 ms.
        """
        before = self.cluster.counters()
        lost = {server: self.cluster.times_lost(server) for server in self.cluster.servers}
        seen = self.through(fault)
        after = self.cluster.counters_after(before["forwards"])
        grown = {name: after[name] - before[name] for name in after}
        assert all(self.cluster.times_lost(victim) > lost[victim] for victim in victims)
        assert grown["rows_resent"] == grown["rows_lost"]
        assert grown["forwards_dropped"] == grown["tokens_recomputed"] == grown["preemptions"] == 0
        return seen


def in_the_middle(
    cluster: Cluster, bodies: list[dict[str, Any]], tokens: int, fault: Callable[[Streams], None]
) -> list[Stream]:
    """Run all streams to their ends, and call `fault` when each has so many tokens."""
    streams = Streams(cluster.url, bodies)
    streams.wait_tokens(tokens)
    fault(streams)
    return streams.finish()
