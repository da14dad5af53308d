"""Fault bench: kills processes under concurrent streams and writes the client's own account.

``python -m bench.faults --model default --kill expert-server --times 20 --out results/`` starts a cluster, records what
every request brings without a failure, sends the same requests again while processes are killed with SIGKILL, and
compares: tokens lost, duplicated, changed; digests of the sampled logits; the longest gap after each kill.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import uvloop
from tqdm import tqdm

from bench.account import Output
from bench.client import new_session
from bench.cluster import Status, found_or_started, read_status
from bench.episodes import Episode, Watcher, inject
from bench.fault_pictures import draw
from bench.fault_report import Run, markdown, report
from bench.load import first_model
from bench.streams import Recorded, Streams, fixed_requests
from bench.workload import Lengths
from moering.config import option, parse
from moering.errors import ConfigError, MoeringError

# Routers send their counters once a second.
COUNTERS_S = 1.5
_KINDS = ("expert-server", "router", "gateway", "coordinator")


@dataclass(frozen=True)
class FaultConfig:
    """Kills processes under concurrent streams and writes the client's own account."""

    model: str = option("default", "model to serve: a checkpoint directory, or 'default'")
    url: str | None = option(None, "use this cluster of this machine instead of starting one")
    expert_servers: int = option(3, "expert servers to start")
    replication: int = option(2, "replicas of each expert, also of a cluster given by its URL")
    serve_flags: tuple[str, ...] = option((), "further flags of moering serve, separated by commas")
    ready_timeout: float = option(600.0, "seconds within which the started cluster must be ready")
    kill: tuple[str, ...] = option(("expert-server",), f"kinds to kill in one fault, separated by commas: {_KINDS}")
    stagger: float = option(0.0, "seconds between the kills of one fault")
    times: int = option(20, "faults that must hit an outstanding dispatch where routers tell; 0 for a run without one")
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


async def run(config: FaultConfig) -> Run:
    """The reference and the run with faults, on a cluster started for it or the one at `config.url`."""
    flags = ["--expert-servers", str(config.expert_servers), "--replication", str(config.replication)]
    log = Path(config.out, "cluster.log")
    cluster = found_or_started(config.url, config.model, log, [*flags, *config.serve_flags], config.ready_timeout)
    async with cluster as url, new_session(config.timeout) as session:
        prompt, output = config.lengths()
        model = await first_model(session, url)
        bodies = fixed_requests(config.requests, model, prompt, output, config.ids_below(), config.seed)
        reference, reference_s = await _reference(session, url, bodies, config)
        clients = Streams(session, url, bodies, config.streams)
        before, started_s = await read_status(session, url), time.perf_counter()
        episodes = await _faults(clients, config)
        ended_s = time.perf_counter()
        await asyncio.sleep(COUNTERS_S)
        counters = (await read_status(session, url)).grown_since(before)
        return Run(reference, reference_s, clients.recorded, episodes, counters, started_s, ended_s)


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
    with tqdm(total=config.times, unit="fault", file=sys.stderr, disable=None) as bar:
        # A kill that hit nothing outstanding is in the account but proves little, so another one follows it.
        while sum(e.hit is not False for e in episodes) < config.times and len(episodes) < 3 * config.times:
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


def main(argv: list[str] | None = None) -> int:
    """Run, write the report, and say whether the promise was kept: exit status 1 when it was not."""
    try:
        config = parse(FaultConfig, sys.argv[1:] if argv is None else argv, prog="python -m bench.faults")
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        measured = uvloop.run(run(config))
    except (MoeringError, aiohttp.ClientError, TimeoutError) as e:
        print(f"bench.faults: {type(e).__name__}: {e}", file=sys.stderr)
        return 1
    except asyncio.CancelledError:  # by SIGTERM
        return 128 + signal.SIGTERM
    result = {"config": dataclasses.asdict(config)} | report(measured)
    (out / "faults.json").write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    (out / "faults.md").write_text(text)
    draw(measured, out)
    print(text)
    return 0 if result["kept"] else 1


if __name__ == "__main__":
    sys.exit(main())
