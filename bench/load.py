"""Load generator for any server with OpenAI's API: ``python -m bench.load --url http://127.0.0.1:8000``.

A closed loop keeps ``--concurrency`` requests running; an open loop (``--rate``) starts them at Poisson times whatever
the server does, so that a slow server shows in the latencies. Figures go to stdout and, as JSON, to ``--json``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from tqdm import tqdm

from bench.client import Exchange, exchange, new_session
from bench.report import summarise, table
from bench.workload import Lengths, Workload, poisson_times
from moering.config import option, parse
from moering.errors import ConfigError, MoeringError


@dataclass(frozen=True)
class LoadConfig:
    """Load generator for any server with OpenAI's API."""

    url: str = option("http://127.0.0.1:8000", "base URL of the server, without /v1")
    model: str | None = option(None, "model to ask for; by default the first one that the server lists")
    api: str = option("chat", "which API to use", choices=("chat", "completions"))
    concurrency: int = option(8, "closed loop: requests running at once")
    rate: float | None = option(None, "open loop: requests started per second, at Poisson times")
    requests: int | None = option(None, "requests to send; 64 when no duration is given either")
    duration: float | None = option(None, "seconds during which requests are started")
    prompt_tokens: str = option("64", "prompt length, fixed or a range like 64-256; about that many when sent as text")
    output_tokens: str = option("64", "max_tokens, fixed or a range like 64-256")
    vocab_size: int | None = option(None, "completions: send prompts as token ids below this instead of text")
    temperature: float = option(0.0, "sampling temperature")
    ignore_eos: bool = option(False, "ask for exactly the output length (an extension: OpenAI's own API refuses it)")
    stream: bool = option(True, "stream the answers")
    seed: int = option(0, "of prompts, lengths and arrival times")
    timeout: float = option(120.0, "seconds without a byte after which a request counts as failed")
    api_key: str | None = option(None, "bearer token")
    json: str | None = option(None, "file to write the figures to")

    def __post_init__(self) -> None:
        for name in ("concurrency", "rate", "requests", "duration", "timeout", "vocab_size"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name}: {value} is not positive")

    @property
    def limit(self) -> int | None:
        """Requests to send, None where only the duration ends the run."""
        return 64 if self.requests is None and self.duration is None else self.requests


class Source:
    """Hands out request numbers until the count or the time is used up."""

    def __init__(self, limit: int | None, duration_s: float | None, clock: Callable[[], float] = time.perf_counter):
        self._limit, self._clock = limit, clock
        self._end_s = None if duration_s is None else clock() + duration_s
        self._next = 0

    def take(self) -> int | None:
        """The next request's number, or None when no more are to be started."""
        over = self._end_s is not None and self._clock() >= self._end_s
        if over or self._next == self._limit:
            return None
        self._next += 1
        return self._next - 1


async def closed_loop(source: Source, concurrency: int, send: Callable[[int], Any]) -> None:
    """Keep `concurrency` requests running until `source` ends."""

    async def worker() -> None:
        while (index := source.take()) is not None:
            await send(index)

    await asyncio.gather(*(worker() for _ in range(concurrency)))


async def open_loop(source: Source, rate: float, seed: int, send: Callable[[int], Any]) -> None:
    """Start requests at Poisson times until `source` ends, then wait for all of them."""
    started_s = time.perf_counter()
    async with asyncio.TaskGroup() as running:
        for due_s in poisson_times(rate, seed):
            await asyncio.sleep(max(0.0, started_s + due_s - time.perf_counter()))
            if (index := source.take()) is None:
                break
            running.create_task(send(index))


async def first_model(session: aiohttp.ClientSession, url: str) -> str:
    """The id of the first model that the server lists; raises `MoeringError`."""
    address = url.rstrip("/") + "/v1/models"
    try:
        async with session.get(address) as response:
            return str((await response.json())["data"][0]["id"])
    except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError) as e:
        raise MoeringError(f"cannot read the list of models from {address}: {type(e).__name__} {e}") from e


def workload(config: LoadConfig, model: str) -> Workload:
    """The requests that `config` asks for; raises `ConfigError`."""
    try:
        prompt, output = Lengths.parse(config.prompt_tokens), Lengths.parse(config.output_tokens)
    except ValueError as e:
        raise ConfigError(f"prompt_tokens or output_tokens: {e}") from e
    chosen = {
        name: getattr(config, name) for name in ("api", "seed", "stream", "temperature", "vocab_size", "ignore_eos")
    }
    return Workload(model=model, prompt=prompt, output=output, **chosen)


async def run(config: LoadConfig) -> tuple[list[Exchange], float]:
    """Send the load; the exchanges in order of their end, and the seconds it all took."""
    exchanges: list[Exchange] = []
    async with new_session(config.timeout, config.api_key) as session:
        requests = workload(config, config.model or await first_model(session, config.url))
        # disable=None: a bar on a terminal only
        with tqdm(total=config.limit, unit="req", file=sys.stderr, disable=None) as bar:

            async def send(index: int) -> None:
                exchanges.append(await exchange(session, config.url, config.api, requests.body(index)))
                bar.update()

            started_s = time.perf_counter()
            source = Source(config.limit, config.duration)
            if config.rate is None:
                await closed_loop(source, config.concurrency, send)
            else:
                await open_loop(source, config.rate, config.seed, send)
    return exchanges, time.perf_counter() - started_s


def main(argv: list[str] | None = None) -> int:
    """Run the load and report. Exit status 1 when a request failed or nothing could be sent."""
    try:
        config = parse(LoadConfig, sys.argv[1:] if argv is None else argv, prog="python -m bench.load")
        exchanges, wall_s = uvloop.run(run(config))
    except MoeringError as e:
        print(f"bench.load: {e}", file=sys.stderr)
        return 1
    summary = summarise(exchanges, wall_s)
    print(table(summary))
    if config.json:
        shown = dataclasses.asdict(config) | {"api_key": None}
        Path(config.json).write_text(json.dumps({"config": shown, "summary": summary}, indent=1) + "\n")
    for kind, detail in {e.error: e.detail for e in exchanges if e.error}.items():
        print(f"{kind}: {detail}", file=sys.stderr)
    return 1 if summary["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
