"""Streams on a cluster, each request once without a failure and then while processes are killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from tqdm import tqdm

from bench.account import Output
from bench.client import new_session
from bench.cluster import Status, found_or_started, read_status
from bench.episodes import Episode, Watcher, inject
from bench.fault_report import Run
from bench.load import first_model
from bench.streams import Recorded, Streams, fixed_requests
from bench.workload import Lengths
from moering.config import option
from moering.errors import ConfigError, MoeringError

# Routers send their counters once a second.
COUNTERS_S = 1.5
_KINDS = ("expert-server", "router", "gateway", "coordinator")


@dataclass(frozen=True)
class FaultConfig:
    """Kills processes under concurrent streams and writes the client's own account."""

    model: str = option("default", "model to serve: a checkpoint directory, or 'default'")
    url: str | None = option(None, "use this cluster of this machine instead of starting one")
    matrix: bool = option(False, "0, 1, 2, 4, … and all expert servers dead at once: writes faults.md into --docs")
    at_once: tuple[str, ...] = option((), "with --matrix: how many die at once; default: 0, powers of 2, and all")
    docs: str = option("docs", "with --matrix: the page goes here, its pictures into pictures/ beside it")
    expert_servers: int | None = option(None, "expert servers to start; default 3, with --matrix 8")
    replication: int = option(2, "replicas of each expert, also of a cluster given by its URL")
    serve_flags: tuple[str, ...] = option((), "further flags of moering serve, separated by commas")
    ready_timeout: float = option(600.0, "seconds within which the started cluster must be ready")
    kill: tuple[str, ...] = option(("expert-server",), f"kinds to kill in one fault, separated by commas: {_KINDS}")
    on_missing_expert: str = option("wait", "what the requests ask for", choices=("wait", "fail", "renormalize"))
    stagger: float = option(0.0, "seconds between the kills of one fault")
    times: int | None = option(
        None,
        "faults that must hit an outstanding dispatch where routers tell; 0: none; default 20, with --matrix 3 each",
    )
    calm: float = option(4.0, "seconds without a fault before each one")
    restore_timeout: float = option(60.0, "seconds within which the cluster must be as before")
    streams: int = option(8, "concurrent streams")
    requests: int = option(16, "distinct requests, repeated in turn")
    prompt_tokens: str = option("16-64", "prompt length, fixed or a range")
    output_tokens: str = option("200-300", "output length, fixed or a range")
    vocab_size: int | None = option(None, "prompt ids are below this; default: that of the checkpoint, or 2048")
    poll: float = option(0.05, "seconds between two looks at the status")
    timeout: float = option(120.0, "seconds without a byte after which a request counts as failed")
    seed: int = option(0, "of prompts, sampling, victims and moments")
    out: str = option("bench-faults", "directory for faults.json, faults.md, the pictures and the cluster's log")

    def __post_init__(self) -> None:
        unknown = sorted(set(self.kill) - set(_KINDS))
        if unknown or not self.kill:
            raise ConfigError(f"kill: {', '.join(unknown) or 'nothing'} is not among {', '.join(_KINDS)}")
        for name in ("streams", "requests", "replication", "poll"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}: {getattr(self, name)} is not positive")
        if self.requests < self.streams:
            raise ConfigError(f"requests: {self.requests} are fewer than {self.streams} streams")
        for k in self.at_once:
            if not k.isdecimal() or int(k) > self.servers:
                raise ConfigError(f"at_once: {k!r} is no number from 0 to {self.servers} (--expert-servers)")

    @property
    def servers(self) -> int:
        """Expert servers."""
        return self.expert_servers or (8 if self.matrix else 3)

    @property
    def faults(self) -> int:
        """How many faults of one kind."""
        return (3 if self.matrix else 20) if self.times is None else self.times

    @property
    def numbers(self) -> list[int]:
        """How many die at once, in turn."""
        if self.at_once:
            return [int(k) for k in self.at_once]
        return [0, *(k for k in (1 << i for i in range(10)) if k < self.servers), self.servers]

    def ids_below(self) -> int:
        """The bound of prompt ids."""
        if self.vocab_size:
            return self.vocab_size
        path = Path(self.model, "config.json")
        return int(json.loads(path.read_text())["vocab_size"]) if path.is_file() else 2048

    def lengths(self) -> tuple[Lengths, Lengths]:
        """Of prompts and outputs; raises `ConfigError`."""
        try:
            return Lengths.parse(self.prompt_tokens), Lengths.parse(self.output_tokens)
        except ValueError as e:
            raise ConfigError(f"prompt_tokens or output_tokens: {e}") from e


@dataclass(frozen=True)
class Prepared:
    """A running cluster, and what each request brought there without a failure."""

    session: aiohttp.ClientSession
    url: str
    bodies: list[dict[str, Any]]
    reference: list[Recorded]
    reference_s: float


@contextlib.asynccontextmanager
async def prepared(config: FaultConfig) -> AsyncIterator[Prepared]:
    """The reference, on a cluster started for it or the one at `config.url`."""
    flags = ["--expert-servers", str(config.servers), "--replication", str(config.replication)]
    log = Path(config.out, "cluster.log")
    cluster = found_or_started(config.url, config.model, log, [*flags, *config.serve_flags], config.ready_timeout)
    async with cluster as url, new_session(config.timeout) as session:
        prompt, output = config.lengths()
        model = await first_model(session, url)
        bodies = fixed_requests(config.requests, model, prompt, output, config.ids_below(), config.seed)
        yield Prepared(session, url, bodies, *await _reference(session, url, bodies, config))


async def run(config: FaultConfig) -> Run:
    """The reference and the run with faults."""
    async with prepared(config) as cluster:
        return await faulted(cluster, config)


async def faulted(cluster: Prepared, config: FaultConfig) -> Run:
    """The run with faults: streams until enough of them hit."""
    policy = {"on_missing_expert": config.on_missing_expert}
    bodies = [b | {"moering": b["moering"] | policy} for b in cluster.bodies]
    clients = Streams(cluster.session, cluster.url, bodies, config.streams)
    before, started_s = await read_status(cluster.session, cluster.url), time.perf_counter()
    episodes = await _faults(clients, config)
    ended_s = time.perf_counter()
    await asyncio.sleep(COUNTERS_S)
    counters = (await read_status(cluster.session, cluster.url)).grown_since(before)
    return Run(cluster.reference, cluster.reference_s, clients.recorded, episodes, counters, started_s, ended_s)


async def _reference(
    session: aiohttp.ClientSession, url: str, bodies: list[dict[str, object]], config: FaultConfig
) -> tuple[list[Recorded], float]:
    """Every request once without a failure, all streams at once. Raises `MoeringError` if one goes wrong by itself."""
    print("reference: every request once without a failure", file=sys.stderr)
    await Streams(session, url, bodies[: config.streams], config.streams).once()  # first use of everything: not counted
    clients = Streams(session, url, bodies, config.streams)
    started_s = time.perf_counter()
    await clients.once()
    for recorded in clients.recorded:
        seen, wanted = Output.of(recorded.exchange), bodies[recorded.request]["max_tokens"]
        if recorded.exchange.error or len(seen.tokens) != wanted or len(seen.digests) != wanted:
            raise MoeringError(
                f"request {recorded.request} without a failure: error {recorded.exchange.error} "
                f"{recorded.exchange.detail}, {len(seen.tokens)} ids and {len(seen.digests)} digests of {wanted} tokens"
            )
    return clients.recorded, time.perf_counter() - started_s


async def _faults(clients: Streams, config: FaultConfig) -> list[Episode]:
    """Keep the streams going and kill until enough faults hit; the streams under way then run to their end."""
    watcher = Watcher(clients.session, clients.url, config.poll)
    stop = asyncio.Event()
    watching = asyncio.create_task(watcher.run())
    streaming = asyncio.create_task(clients.until(stop))
    try:
        return await _kill_all(clients, watcher, config)
    finally:
        stop.set()
        await streaming
        watching.cancel()


async def _kill_all(clients: Streams, watcher: Watcher, config: FaultConfig) -> list[Episode]:
    episodes: list[Episode] = []
    rng = random.Random(f"moments/{config.seed}")
    wanted = config.replication - 1
    await _settled(clients, wanted, config)
    with tqdm(total=config.faults, unit="fault", file=sys.stderr, disable=None) as bar:
        # A kill that hit nothing outstanding is in the account but proves little, so another one follows it.
        while sum(e.hit is not False for e in episodes) < config.faults and len(episodes) < 3 * config.faults:
            await asyncio.sleep(config.calm + rng.random() * 0.5)
            async with asyncio.timeout(config.restore_timeout):
                while not clients.flowing():
                    await asyncio.sleep(0.001)
            seed = f"victims/{config.seed}/{len(episodes)}"
            args = (wanted, len(clients.running), config.restore_timeout, seed)
            episode = await inject(watcher, config.kill, config.stagger, *args)
            episodes.append(episode)
            bar.update(int(episode.hit is not False))
            if not episode.over:
                print(f"not as before after {config.restore_timeout:.0f} s; no more faults", file=sys.stderr)
                break
    await asyncio.sleep(config.calm)
    return episodes


async def _settled(clients: Streams, wanted: int, config: FaultConfig) -> Status:
    """Wait until the cluster survives as many failures as it should."""
    deadline_s = time.perf_counter() + config.restore_timeout
    while True:
        status = await read_status(clients.session, clients.url)
        if status.failures_survivable >= wanted:
            return status
        if time.perf_counter() > deadline_s:
            raise MoeringError(f"{status.failures_survivable} failures survivable, not the {wanted} wanted")
        await asyncio.sleep(config.poll)
