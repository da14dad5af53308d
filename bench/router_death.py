"""What the death of a router costs its streams and the others: ``python -m bench.router_death --model default``.

Two clusters in one run, with two routers and with one. In each the same requests run once undisturbed (throughput, and
what every stream must bring), then once for each two kills of a router. With two routers the second kill is of the one
that has all streams since the first. A gap is held against `allowance` seconds + what its tokens cost without a
failure: so many prompts of so many tokens arrive at once at a cluster with one router that does nothing else, and the
waits for their first tokens are taken. They are taken as soon as the streams of the kill have ended, since the speed of
a machine that others use changes within minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from bench.account import Account, Output, compare, total
from bench.client import Exchange, exchange, new_session
from bench.cluster import Status, kill, read_status, serving
from bench.command import Figures, run_bench, verdict
from bench.load import first_model
from bench.report import quantile
from bench.streams import FIRST_ID, Recorded, Streams, fixed_requests
from bench.workload import Lengths
from moering.config import option
from moering.errors import ConfigError, MoeringError

LOOK_S = 0.02
WARM_TOKENS = 16
KILLS_PER_ROUND = 2
SENT_S = 0.05
"""What comes so soon after a kill, the dead router had sent."""
JITTER_S = 0.3
"""Longer than a step: a kill's moment has nothing to do with the arrival that it was waited for with."""


@dataclass(frozen=True)
class RouterDeathConfig:
    """Gaps of streams when a router is killed, with and without a second one."""

    model: str = option("default", "model to serve: a checkpoint directory, or 'default'")
    serve_flags: tuple[str, ...] = option((), "further flags of moering serve, separated by commas")
    ready_timeout: float = option(600.0, "seconds within which a started cluster must be ready")
    times: int = option(4, "kills on each cluster, two in a round of the streams")
    restore_timeout: float = option(120.0, "seconds within which the cluster must be as before")
    streams: int = option(8, "concurrent streams")
    requests: int = option(8, "distinct requests, repeated in turn")
    prompt_tokens: str = option("16-64", "prompt length, fixed or a range")
    output_tokens: str = option("150-200", "output length, fixed or a range")
    vocab_size: int = option(2048, "prompt ids are below this")
    allowance: float = option(1.0, "seconds that a gap may exceed the prefill of its tokens")
    timeout: float = option(120.0, "seconds without a byte after which a request counts as failed")
    seed: int = option(0, "of prompts, sampling and moments")
    out: str = option("bench-router-death", "directory for router_death.json and the clusters' logs")

    def __post_init__(self) -> None:
        if min(self.times, self.streams) < 1 or self.requests < self.streams or self.vocab_size <= FIRST_ID:
            raise ConfigError(f"times, streams must be positive, requests at least streams, vocab_size over {FIRST_ID}")


@dataclass(frozen=True)
class Gap:
    """What one stream waited for across a kill, and the tokens it had: its prompt's and those that had come."""

    seconds: float
    tokens: int


@dataclass(frozen=True)
class Death:
    """One kill: the gaps of the streams that had to move and of those that did not, and when a new router served.

    `prefill_s`: what the moved streams' tokens cost without a failure. It and both lists of gaps are longest first.
    """

    moved: list[Gap]
    others: list[Gap]
    replaced_s: float
    prefill_s: list[float] = field(default_factory=list)

    def over_s(self, *, held: bool) -> list[float]:
        """By how much each gap exceeds its prefill, and with `held` the time without a router, too."""
        wait_s = self.replaced_s if held else 0.0
        return [gap.seconds - p - wait_s for gap, p in zip(self.moved, self.prefill_s, strict=True)]


@dataclass
class Phase:
    """One cluster."""

    tokens_per_s: float = 0.0
    deaths: list[Death] = field(default_factory=list)
    account: Account = field(default_factory=Account)


def gap_across(record: Exchange, at_s: float) -> float | None:
    """Seconds between the arrivals before and after a moment; None where the stream does not span it."""
    before = [a.at_s for a in record.arrivals if a.at_s <= at_s]
    after = [a.at_s for a in record.arrivals if a.at_s > at_s]
    return after[0] - before[-1] if before and after else None


def split(gaps: Sequence[Gap], moved: int) -> tuple[list[Gap], list[Gap]]:
    """The `moved` longest gaps and the others: a client is not told which router computes its stream."""
    ordered = sorted(gaps, key=lambda gap: gap.seconds, reverse=True)
    return ordered[:moved], ordered[moved:]


async def run(config: RouterDeathConfig) -> Figures:
    """Both clusters; that with one router is there all the time, for the prefills, and idle but for its own turn."""
    two, one = Phase(), Phase()
    async with _cluster(1, config) as alone:
        async with _cluster(2, config) as pair:
            await _measure(two, pair, alone, config)
        await _measure(one, alone, alone, config)
    return {
        "two_routers": _figures(two, config.allowance, held=False),
        "one_router": _figures(one, config.allowance, held=True),
        "speedup_of_two_routers": round(two.tokens_per_s / one.tokens_per_s, 3),
    }


@contextlib.asynccontextmanager
async def _cluster(routers: int, config: RouterDeathConfig) -> AsyncIterator[Streams]:
    """The clients of a cluster that has been used a little: the first use of everything is not counted."""
    log = Path(config.out, f"cluster-{routers}.log")
    flags = ["--routers", str(routers), *config.serve_flags]
    async with serving(config.model, log, flags, config.ready_timeout) as url, new_session(config.timeout) as session:
        clients = await _streams(session, url, config)
        await Streams(session, url, [{**b, "max_tokens": WARM_TOKENS} for b in clients.bodies], config.streams).once()
        yield clients


async def _streams(session: aiohttp.ClientSession, url: str, config: RouterDeathConfig) -> Streams:
    try:
        lengths = Lengths.parse(config.prompt_tokens), Lengths.parse(config.output_tokens)
    except ValueError as e:
        raise ConfigError(f"prompt_tokens or output_tokens: {e}") from e
    model = await first_model(session, url)
    bodies = fixed_requests(config.requests, model, *lengths, config.vocab_size, config.seed)
    return Streams(session, url, bodies, config.streams)


async def _measure(phase: Phase, clients: Streams, alone: Streams, config: RouterDeathConfig) -> None:
    """The undisturbed run, then the kills, with their prefills on `alone`; fills `phase`."""
    started_s = time.perf_counter()
    await clients.once()
    wall_s = time.perf_counter() - started_s
    reference = {r.request: Output.of(r.exchange) for r in clients.recorded}
    phase.tokens_per_s = sum(len(output.tokens) for output in reference.values()) / wall_s
    clients.recorded.clear()
    for first in range(0, config.times, KILLS_PER_ROUND):
        stop = asyncio.Event()
        streaming = asyncio.create_task(clients.until(stop))
        deaths = []
        try:
            for number in range(first, min(first + KILLS_PER_ROUND, config.times)):
                deaths.append(await _death(clients, number, config))
        finally:
            stop.set()
            await streaming
        for death in deaths:
            death.prefill_s.extend(await _prefill(alone, death, config))
        phase.deaths += deaths
        print(f"{len(phase.deaths)} of {config.times} kills", file=sys.stderr)
    phase.account = total(_compared(reference, clients.recorded))


def _compared(reference: dict[int, Output], recorded: Sequence[Recorded]) -> list[Account]:
    return [compare(reference[r.request], Output.of(r.exchange), r.exchange.error) for r in recorded]


async def _death(clients: Streams, number: int, config: RouterDeathConfig) -> Death:
    """Kill a router, each in turn, while every stream flows; the later the number, the more of its tokens the furthest
    stream has. Wait until all is as before."""
    share = (number + 0.5) / config.times
    async with asyncio.timeout(config.restore_timeout):
        before = await read_status(clients.session, clients.url)
        failovers = await _failovers(clients)
        routers = sorted(before.online("router"), key=lambda p: p.id)
        victim = routers[number % len(routers)]
        while not (clients.flowing() and progress(clients) >= share):
            await asyncio.sleep(LOOK_S)
        await asyncio.sleep(random.Random(f"moment/{config.seed}/{number}").uniform(0.0, JITTER_S))
        records = dict(clients.running)
        tokens = {i: _prompt_tokens(clients, i) + sum(a.tokens for a in r.arrivals) for i, r in records.items()}
        at_s = kill(victim)
        while not _replaced(status := await read_status(clients.session, clients.url), before, victim.id):
            await asyncio.sleep(LOOK_S)
        while any(gap_across(r, at_s + SENT_S) is None and not r.ended_s for r in records.values()):
            await asyncio.sleep(LOOK_S)
    gaps = {i: gap_across(r, at_s + SENT_S) for i, r in records.items()}
    found = [Gap(gap, tokens[i]) for i, gap in gaps.items() if gap is not None]
    moved, others = split(found, await _failovers(clients) - failovers)
    return Death(moved, others, status.at_s - at_s)


def progress(clients: Streams) -> float:
    """The share that has come of the tokens of the stream that is furthest."""
    bodies = {i: clients.bodies[clients.request[i]] for i in clients.running}
    return max(len(r.token_ids) / bodies[i]["max_tokens"] for i, r in clients.running.items())


def _prompt_tokens(clients: Streams, stream: int) -> int:
    return len(clients.bodies[clients.request[stream]]["prompt"])


def _replaced(now: Status, before: Status, router: str) -> bool:
    process = now.processes.get(router)
    return bool(process and process.state == "ONLINE" and process.incarnation != before.processes[router].incarnation)


async def _failovers(clients: Streams) -> int:
    """How many requests the gateway has given to another router so far."""
    async with clients.session.get(clients.url + "/metrics") as response:
        for line in (await response.text()).splitlines():
            if line.startswith("moering_failovers_total "):
                return int(float(line.split()[1]))
    raise MoeringError("the gateway's metrics do not count failovers")


async def _prefill(alone: Streams, death: Death, config: RouterDeathConfig) -> list[float]:
    """The waits for the first token when prompts of the moved streams' lengths arrive at once, longest first.

    Nothing else is under way: beside streams that decode, prompts are paced for their sake, and moved streams are not.
    """
    rng = random.Random(f"prefill/{config.seed}/{death.replaced_s}")
    prompts = [[rng.randrange(FIRST_ID, config.vocab_size) for _ in range(gap.tokens)] for gap in death.moved]
    return sorted(await asyncio.gather(*(_first_token(alone, prompt) for prompt in prompts)), reverse=True)


async def _first_token(clients: Streams, prompt: list[int]) -> float:
    body = {**clients.bodies[0], "prompt": prompt, "max_tokens": 1}
    result = await exchange(clients.session, clients.url, "completions", body)
    if result.error:
        raise MoeringError(f"a prompt alone failed: {result.error} {result.detail}")
    return result.arrivals[0].at_s - result.started_s


def _figures(phase: Phase, allowance_s: float, *, held: bool) -> dict[str, Any]:
    """`held`: streams had to wait for the dead router's successor."""
    moved = [gap.seconds for d in phase.deaths for gap in d.moved]
    over = [seconds for d in phase.deaths for seconds in d.over_s(held=held)]
    a = phase.account
    return {
        "tokens_per_s": round(phase.tokens_per_s, 2),
        "kills": len(phase.deaths),
        "moved_streams": len(moved),
        "gap_moved_s": _spread(moved),
        "gap_others_s": _spread([gap.seconds for d in phase.deaths for gap in d.others]),
        "restart_s": _spread([d.replaced_s for d in phase.deaths]),
        "prefill_s": _spread([p for d in phase.deaths for p in d.prefill_s]),
        "over_prefill_s": _spread(over),
        "over_prefill_by_kill_s": [[round(seconds, 2) for seconds in d.over_s(held=held)] for d in phase.deaths],
        "within_bar": sum(o <= allowance_s for o in over),
        "met": bool(over) and max(over) <= allowance_s and a.clean,
        "tokens": a.tokens,
        "tokens_lost_duplicated_changed": [a.lost, a.duplicated, a.changed],
        "changed_digests": a.changed_digests,
        "errors": a.errors,
    }


def _spread(seconds: list[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    return {name: round(quantile(seconds, q), 3) for name, q in (("p50", 0.5), ("p90", 0.9), ("max", 1.0))}


def _table(figures: Figures) -> str:
    lines = []
    for name in ("two_routers", "one_router"):
        lines += [name, *(f"  {key:<32}{value}" for key, value in figures[name].items())]
        lines.append(f"  gaps within prefill + allowance: {verdict(figures[name]['met'])}")
    return "\n".join([*lines, f"speedup of two routers: {figures['speedup_of_two_routers']}"])


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write the figures."""
    return run_bench("router_death", RouterDeathConfig, run, _table, argv)


if __name__ == "__main__":
    sys.exit(main())
