"""One run: a cluster comes up, serves requests while things go wrong, and must then come back to order by itself."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import random
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.simulation import faults as fault_module
from tests.simulation.cluster import Cluster
from tests.simulation.faults import Fault
from tests.simulation.oracle import require
from tests.simulation.world import World

UP_S = 3.0
SETTLE_S, LOOK_S = 90.0, 0.5


@dataclass
class Outcome:
    """What a run came to. `failure` is empty when nothing was wrong."""

    seed: int
    failure: str
    faults: list[Fault]
    trace: list[str]
    digest: str
    virtual_s: float
    events: int
    counts: Counter[str] = field(default_factory=Counter)


def run(seed: int, keep: list[int] | None = None, *, tracing: bool = False) -> Outcome:
    """Run a seed; `keep` restricts its faults to those with these numbers."""
    cluster = Cluster(seed, tracing=tracing)
    rng = random.Random(f"{seed}/faults")
    faults = fault_module.draw(rng, cluster.size, UP_S)
    kept = faults if keep is None else [faults[n] for n in keep]
    failure = ""
    with _log_to(cluster.world) if tracing else contextlib.nullcontext():
        try:
            _play(cluster, kept, random.Random(f"{seed}/requests"))
        except Exception as e:  # whatever the code under test raises is a finding
            failure = f"{type(e).__name__}: {e}"
            cluster.world.trace.extend(traceback.format_exc().splitlines())
    world = cluster.world
    digest = hashlib.blake2b(repr((world.now_s, world.events, sorted(cluster.oracle.counts.items()))).encode())
    return Outcome(
        seed, failure, kept, list(world.trace), digest.hexdigest()[:16], world.now_s, world.events,
        cluster.oracle.counts,
    )  # fmt: skip


def _play(cluster: Cluster, faults: list[Fault], rng: random.Random) -> None:
    world = cluster.world
    end_s = fault_module.schedule(cluster, faults)
    for n in range(rng.randint(3, 6)):
        at_s = UP_S + fault_module.WINDOW_S * rng.random()
        prompt = [rng.randrange(1000) for _ in range(rng.randint(1, 6))]
        world.after(at_s, None, _ask, cluster, n, prompt, rng.randint(1, 8))
    world.run(max(end_s, UP_S + fault_module.WINDOW_S) + 0.1)
    last_s = world.now_s + SETTLE_S
    while what := cluster.oracle.unsettled():
        require(world.now_s < last_s, f"{SETTLE_S:g} s after the last fault, {what}")
        world.run(world.now_s + LOOK_S)


def _ask(cluster: Cluster, n: int, prompt: list[int], max_tokens: int) -> None:
    gateways = cluster.of_kind("gateway")
    if gateways:
        gateway = gateways[n % len(gateways)]
        gateway.do(gateway.request, f"q{n}", prompt, max_tokens)


@contextlib.contextmanager
def _log_to(world: World) -> Iterator[None]:
    """Put what the code under test logs into the trace."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            world.note(f"  {record.name}: {record.getMessage()}")

    root, handler = logging.getLogger(), Handler()
    level, disabled = root.level, logging.root.manager.disable
    logging.disable(logging.NOTSET)
    root.setLevel(logging.INFO)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        logging.disable(disabled)


def run_many(seeds: range, seconds: float | None = None) -> tuple[int, list[Outcome], Counter[str]]:
    """Run seeds until one fails or time is up: how many ran, the failures, and what happened in all of them."""
    logging.disable(logging.CRITICAL)
    total: Counter[str] = Counter()
    started, done = time.monotonic(), 0
    for seed in seeds:
        if seconds is not None and time.monotonic() - started > seconds:
            break
        outcome = run(seed)
        done += 1
        total.update(outcome.counts)
        total["virtual_s"] += int(outcome.virtual_s)
        total["events"] += outcome.events
        if outcome.failure:
            return done, [outcome], total
    return done, [], total
