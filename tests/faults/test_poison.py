"""A row that kills every server that computes it: its own request ends with an error, and nobody else notices."""

from __future__ import annotations

from pathlib import Path

from tests.faults.arena import AT_ONCE, arena
from tests.integration.cluster import SERVERS
from tests.integration.streams import Streams, bodies

POISON = bodies(1, 4)[0] | {"prompt": [300], "max_tokens": 1}
"""The first row of its first layer depends on this token alone, and no other prompt begins with it."""


FLAGS = (*AT_ONCE, "--router-args", "--threads 1 --missing-expert-timeout-s 120")
"""One router: a second one could not tell whose row it was. All servers die, and each death costs a start."""


def test_only_the_guilty_request_ends(checkpoint: Path, tmp_path: Path) -> None:
    with arena(checkpoint, tmp_path, FLAGS) as a:
        seen = [a.hub.arm(s, "row", "note") for s in SERVERS]
        Streams(a.cluster.url, [POISON]).finish()
        digest = next(gate.facts["digest"] for gate in seen if gate.fired.is_set())
        for gate in seen:
            gate.release()
        deadly = [a.hub.arm_always(s, "row", "kill", match={"digest": digest}) for s in SERVERS]
        before = a.incarnations()
        held = a.hub.arm("expert-0", "received", match={"prefill": False}, skip=3)
        streams = a.streams()
        held.wait_fired()  # so that the guilty row travels with rows that are decoded
        guilty = Streams(a.cluster.url, [POISON])
        held.release()
        (stream,) = guilty.finish()
        a.check(streams.finish())
        assert sum(gate.fired.is_set() for gate in deadly) >= 2, "the row killed nobody"
        assert not stream.tokens and len(stream.ends) == 1 and "failures in a row" in stream.ends[0], stream
        a.hub.disarm_always()
        a.cluster.wait_settled()
        a.check(a.streams().finish())
        after = a.incarnations()
        assert {i for i in before if before[i] != after[i]} <= set(SERVERS)
