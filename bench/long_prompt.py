"""What one long prompt costs the streams beside it: ``python -m bench.long_prompt --model default``.

While streams decode, a prompt of `--prompt` tokens arrives, several times. The streams' inter-token latencies from its
arrival to its first token are compared with those of the same run outside of that.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from bench.client import exchange, new_session
from bench.cluster import found_or_started
from bench.gaps import Window, intervals, outside, within
from bench.load import first_model
from bench.report import distribution, quantile
from bench.streams import FIRST_ID, Streams, fixed_requests
from bench.workload import Lengths
from moering.config import option, parse
from moering.errors import ConfigError, MoeringError


@dataclass(frozen=True)
class LongPromptConfig:
    """What one long prompt costs the streams beside it."""

    model: str = option("default", "model to serve: a checkpoint directory, or 'default'")
    url: str | None = option(None, "use this server instead of starting one")
    serve_flags: tuple[str, ...] = option((), "flags of moering serve, separated by commas")
    ready_timeout: float = option(600.0, "seconds within which the started cluster must be ready")
    prompt: int = option(2000, "tokens of the long prompt")
    times: int = option(5, "long prompts, one after another")
    calm: float = option(5.0, "seconds before each of them, and after the last")
    streams: int = option(8, "concurrent streams")
    output_tokens: int = option(400, "tokens of each of their requests")
    vocab_size: int = option(259, "prompt ids are below this")
    timeout: float = option(120.0, "seconds without a byte after which a request counts as failed")
    seed: int = option(0, "of prompts and sampling")
    out: str = option("bench-long-prompt", "directory for long_prompt.json and the cluster's log")

    def __post_init__(self) -> None:
        if min(self.times, self.streams, self.prompt, self.output_tokens) < 1 or self.vocab_size <= FIRST_ID:
            raise ConfigError(f"times, streams, prompt and output_tokens must be positive, vocab_size above {FIRST_ID}")


async def run(config: LongPromptConfig) -> dict[str, Any]:
    """Measure; raises `MoeringError` when a request fails."""
    cluster = found_or_started(
        config.url, config.model, Path(config.out, "cluster.log"), config.serve_flags, config.ready_timeout
    )
    async with cluster as url, new_session(config.timeout) as session:
        lengths = Lengths(16, 64), Lengths(config.output_tokens, config.output_tokens)
        model = await first_model(session, url)
        bodies = fixed_requests(config.streams, model, *lengths, config.vocab_size, config.seed)
        await Streams(session, url, bodies, config.streams).once()  # first use of everything: not counted
        clients, stop = Streams(session, url, bodies, config.streams), asyncio.Event()
        streaming = asyncio.create_task(clients.until(stop))
        try:
            windows = [await _one(clients, config, number) for number in range(config.times)]
            await asyncio.sleep(config.calm)
        finally:
            stop.set()
            await streaming
        return _figures(clients, windows)


async def _one(clients: Streams, config: LongPromptConfig, number: int) -> Window:
    """Send a long prompt into the streams; the time from its sending to its first token."""
    await asyncio.sleep(config.calm)
    async with asyncio.timeout(config.timeout):
        while not clients.flowing():
            await asyncio.sleep(0.001)
    rng = random.Random(f"long/{config.seed}/{number}")  # another each time, so that no prefix is known
    prompt = [rng.randrange(FIRST_ID, config.vocab_size) for _ in range(config.prompt)]
    body = {"model": clients.bodies[0]["model"], "prompt": prompt, "max_tokens": 1, "stream": True}
    body |= {"temperature": 0.0, "ignore_eos": True, "return_token_ids": True}
    started_s = time.perf_counter()
    result = await exchange(clients.session, clients.url, "completions", body)
    if result.error:
        raise MoeringError(f"the long prompt failed: {result.error} {result.detail}")
    return Window(started_s, result.arrivals[0].at_s)


def _figures(clients: Streams, windows: list[Window]) -> dict[str, Any]:
    exchanges = [r.exchange for r in clients.recorded]
    failed = [e for e in exchanges if e.error]
    if failed:
        raise MoeringError(f"{len(failed)} streams failed: {failed[0].error} {failed[0].detail}")
    spans = [interval for e in exchanges for interval in intervals(e)]
    beside = [gap for window in windows for gap in within(spans, window)]
    alone = outside(spans, windows)
    ratio = quantile(beside, 0.99) / quantile(alone, 0.99) if beside and alone else math.nan
    return {
        "first_token_ms": distribution(w.end_s - w.start_s for w in windows),
        "itl_beside_ms": distribution(beside),
        "itl_otherwise_ms": distribution(alone),
        "p99_ratio": round(ratio, 3),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write the figures."""
    try:
        config = parse(LongPromptConfig, sys.argv[1:] if argv is None else argv, prog="python -m bench.long_prompt")
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        figures = uvloop.run(run(config))
    except (MoeringError, aiohttp.ClientError, TimeoutError) as e:
        print(f"bench.long_prompt: {type(e).__name__}: {e}", file=sys.stderr)
        return 1
    except asyncio.CancelledError:  # by SIGTERM
        return 128 + signal.SIGTERM
    text = json.dumps({"config": dataclasses.asdict(config)} | figures, indent=1)
    (out / "long_prompt.json").write_text(text + "\n")
    print(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
