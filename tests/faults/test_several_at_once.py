"""Several of eight expert servers die at once, in two zones with two replicas: real processes, real signals.

What is killed is looked up first, so that each test knows whether experts lose their last replica by it. One and two at
once are in `test_kill_matrix`, every number in `tests/moering/test_redundancy.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.placement import holders
from tests.faults.scenario import Scenario
from tests.integration.cluster import Cluster, samples, serving, wait_for
from tests.integration.streams import Streams

ZONE_A = ("expert-0", "expert-2", "expert-4", "expert-6")
FLAGS = ("--expert-servers", "8", "--zones", "a,b", "--max-restart-delay-s", "0")
STREAMS, TOKENS = 4, 100
EXPERTS = 8  # of a layer
PARKED = "no live replica for rows"


@pytest.fixture(scope="module")
def whole_scenario(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenario]:
    with serving(checkpoint, tmp_path_factory.mktemp("eight"), FLAGS) as cluster:
        yield Scenario(cluster, STREAMS, TOKENS)


@pytest.fixture
def scenario(whole_scenario: Scenario) -> Scenario:
    """At rest: no expert is anywhere but where the plan wants it, so that killing its holders makes an orphan."""
    cluster = whole_scenario.cluster
    cluster.wait_settled()
    wait_for("no third replicas", lambda: held(cluster) == 2 * len(holders(cluster)))
    return whole_scenario


def held(cluster: Cluster) -> int:
    """Replicas in memory, those included that no row is routed to any more: of use again when others are lost."""
    return sum(p["experts"] for p in cluster.status()["processes"] if p["kind"] == "expert-server")


def lost_with(placed: list[set[str]], victims: set[str]) -> int:
    return sum(row <= victims for row in placed)


def who_share_one_of_a_layer(placed: list[set[str]]) -> list[str]:
    """Two servers that alone hold an expert, and never two of one layer: every row keeps one of its two."""
    layers = [placed[at : at + EXPERTS] for at in range(0, len(placed), EXPERTS)]
    pairs = sorted({tuple(sorted(row)) for row in placed if len(row) == 2})
    return next(list(p) for p in pairs if max(lost_with(layer, set(p)) for layer in layers) == 1)


def renormalized(cluster: Cluster) -> float:
    return dict(samples(cluster.url))['moering_router_tokens_renormalized_total{router="router-0"}']


def with_policy(policy: str, body: dict[str, Any]) -> dict[str, Any]:
    return body | {"moering": {"logits_digest": True, "on_missing_expert": policy}}


def test_four_of_eight_at_once(scenario: Scenario) -> None:
    """With both holders of some experts among them: what needs those waits until they are loaded again."""
    cluster, placed = scenario.cluster, holders(scenario.cluster)
    victims = sorted(placed[0])
    victims += [i for i in cluster.servers if i not in victims][:2]
    assert lost_with(placed, set(victims)) > 0
    killed: list[dict[str, Any]] = []
    scenario.through_death_of_servers(lambda _: killed.extend(cluster.kill(*victims)), victims)
    cluster.wait_replaced(killed)


def test_a_zone_dies_and_no_expert_loses_its_last_replica(scenario: Scenario) -> None:
    cluster, placed = scenario.cluster, holders(scenario.cluster)
    assert [p["zone"] for p in map(cluster.process, ZONE_A)] == ["a"] * 4
    assert lost_with(placed, set(ZONE_A)) == 0
    before = cluster.log.read_text(errors="replace")
    killed: list[dict[str, Any]] = []
    scenario.through_death_of_servers(lambda _: killed.extend(cluster.kill(*ZONE_A)), ZONE_A)
    cluster.wait_replaced(killed)
    since = cluster.log.read_text(errors="replace")[len(before) :]
    assert PARKED not in since
    assert "experts without a replica" not in since and "moering.view_log: epoch" in since


def test_a_third_dies_while_it_loads_what_two_have_left(scenario: Scenario) -> None:
    cluster, placed = scenario.cluster, holders(scenario.cluster)
    victims = sorted(placed[0])
    assert lost_with(placed, set(victims)) > 0
    killed: list[dict[str, Any]] = []

    def fault(_: Streams) -> None:
        before = loads_of_orphans(cluster)
        killed.extend(cluster.kill(*victims))
        loader = wait_for("a survivor loads orphans", lambda: loads_of_orphans(cluster)[len(before) :])[0]
        # The gateway that is asked may get that view a moment after the loader.
        wait_for("not yet as before", lambda: cluster.status()["failures_survivable"] < 1)
        killed.extend(cluster.kill(loader))
        victims.append(loader)

    scenario.through_death_of_servers(fault, victims)
    cluster.wait_replaced(killed)


def test_each_request_does_what_it_asked_for_while_an_expert_is_gone(scenario: Scenario) -> None:
    """The coordinator stands still meanwhile, so that nobody loads the orphans."""
    cluster = scenario.cluster
    victims = who_share_one_of_a_layer(holders(cluster))
    tokens = renormalized(cluster)
    coordinator = cluster.process("coordinator")
    prompts = scenario.bodies[:2]
    renormalizing = [with_policy("renormalize", b) | {"max_tokens": 400} for b in prompts]
    failing = [with_policy("fail", b) | {"max_tokens": 2000} for b in prompts]
    killed: list[dict[str, Any]] = []

    def parked() -> float:
        return cluster.metrics()["moering_router_requests_parked"]

    def fault(waiting: Streams) -> None:
        others = Streams(cluster.url, [*renormalizing, *failing])
        others.wait_tokens(5)
        with cluster.stopped("coordinator"):
            killed.extend(cluster.kill(*victims))
            seen = others.finish()
            wait_for("the other streams wait", lambda: 0 < parked() == sum(not s.closed for s in waiting.streams))
        for stream in seen[:2]:
            assert (stream.ends, stream.done_lines) == (["length"], 1)
        assert sum(stream.renormalized for stream in seen[:2]) > 0
        for stream in seen[2:]:
            (end,) = stream.ends
            assert "error event" in end and "no_replica" in end and stream.done_lines == 0

    scenario.through(fault)
    cluster.wait_replaced(killed)
    assert cluster.process("coordinator")["pid"] == coordinator["pid"]
    assert renormalized(cluster) > tokens
    again = Streams(cluster.url, [with_policy("renormalize", b) for b in scenario.bodies]).finish()
    assert [s.tokens for s in again] == [s.tokens for s in scenario.reference], "with all experts back it is exact"
    assert [s.renormalized for s in again] == [0] * STREAMS


def loads_of_orphans(cluster: Cluster) -> list[str]:
    """The servers that have begun to load orphans, in order."""
    lines = cluster.log.read_text(errors="replace").splitlines()
    loads = [line for line in lines if "experts," in line and "of them orphans" in line and ", 0 of" not in line]
    return [next(word for word in line.split() if word.startswith("expert-")) for line in loads]
