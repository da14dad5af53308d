"""An expert that every token chooses: several servers share its rows, and nobody can tell by the tokens."""

from __future__ import annotations

from pathlib import Path

from tests.faults.scenario import in_the_middle
from tests.integration.cluster import Cluster, samples, serving, wait_for
from tests.integration.streams import Streams, bodies, check_equal
from tests.tiny import write_checkpoint

STREAMS, TOKENS = 8, 60
ALONE = 1.5
"""Max/mean of three servers' rows when one of them computes the hot expert: half of all rows, and no server less."""


def test_rows_of_a_hot_expert_are_shared_also_while_one_who_shares_dies(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny", hot=True)
    with serving(checkpoint, tmp_path, environment={"MOERING_REBALANCE_S": "1"}) as cluster:
        requests = bodies(STREAMS, TOKENS)
        reference = Streams(cluster.url, requests).finish()
        assert min(wait_for("a report", lambda: by_layer(cluster, "expert_load_max_over_mean"))) > 3.9, "half of 8 rows"

        def shared() -> bool:
            check_equal(Streams(cluster.url, requests).finish(), reference)
            return max(by_layer(cluster, "server_load_max_over_mean")) < ALONE - 0.1

        wait_for("servers share the rows", shared)
        killed = []
        for victim in ("expert-0", "expert-1"):  # with three servers at least one of the two shares

            def fault(_: Streams, victim: str = victim) -> None:
                killed.extend(cluster.kill(victim))

            check_equal(in_the_middle(cluster, requests, 20, fault), reference)
            cluster.wait_replaced(killed)
        wait_for("servers share the rows again", shared)


def by_layer(cluster: Cluster, name: str) -> list[float]:
    """The samples of a gauge with labels."""
    return [value for sample, value in samples(cluster.url) if sample.startswith(f"moering_{name}{{")]
