"""Expert servers that stand still under load and come back: stopped by a signal, or with a GPU that hangs."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from bench.account import Output, compare, total
from bench.client import new_session
from bench.cluster import Process, Status, read_status
from bench.engine_processes import coordinator_address, started
from bench.gaps import Window, intervals, within
from bench.hanging_expert_server import HANG_S
from bench.load import first_model
from bench.multi_gpu_config import Setting
from bench.report import distribution
from bench.streams import Streams, fixed_requests
from bench.workload import Lengths
from moering.checkpoint import Checkpoint
from moering.errors import MoeringError

BACK_S = 4.0
"""Until a server that stood still is used again."""
JOIN_S = 60.0
CALM_S = 4.0
BAR_MS = 500.0
TIMEOUT_S = 120.0
HANGING = "expert-77"
Figures = dict[str, Any]


async def standing_still(setting: Setting, url: str) -> Figures:
    """SIGSTOP of one server, then a GPU that hangs, each several times under the same streams; their account."""
    config = setting.config
    async with new_session(TIMEOUT_S) as session:
        count, fixed = config.fault_streams, Lengths(config.prompt_tokens, config.prompt_tokens)
        output = Lengths(config.fault_tokens, config.fault_tokens)
        vocab = int(Checkpoint(setting.checkpoint).config["vocab_size"])
        bodies = fixed_requests(count, await first_model(session, url), fixed, output, vocab, 0)
        reference = Streams(session, url, bodies, count)
        await reference.once()
        clients, stop = Streams(session, url, bodies, count), asyncio.Event()
        streaming = asyncio.create_task(clients.until(stop))
        try:
            figures = await _phases(setting, url, clients)
        finally:
            stop.set()
            await streaming
        wanted = {r.request: Output.of(r.exchange) for r in reference.recorded}
        found = total(compare(wanted[r.request], Output.of(r.exchange), r.exchange.error) for r in clients.recorded)
        return figures | {"account": dataclasses.asdict(found)}


async def _phases(setting: Setting, url: str, clients: Streams) -> Figures:
    config = setting.config
    begun_s = time.perf_counter()
    await asyncio.sleep(CALM_S)
    calm = _gaps(clients, Window(begun_s, time.perf_counter()))
    figures: Figures = {"calm": calm, "stopped": [], "hung": []}
    for n in range(config.stops):
        status = await read_status(clients.session, url)
        victim = sorted(status.online("expert-server"), key=lambda p: p.id)[n]
        figures["stopped"].append(await _one(clients, victim, signal.SIGSTOP))
    async with _hanging_server(setting, url, clients.session) as victim:
        for _ in range(config.stops):
            figures["hung"].append(await _one(clients, victim, signal.SIGUSR1))
    return figures


async def _one(clients: Streams, victim: Process, how: signal.Signals) -> Figures:
    """One server stands still for `HANG_S`: the gaps, and whether it is the same one afterwards."""
    started_s = time.perf_counter()
    os.kill(victim.pid, how)
    try:
        await asyncio.sleep(HANG_S)
    finally:
        if how is signal.SIGSTOP:
            os.kill(victim.pid, signal.SIGCONT)
    gaps = _gaps(clients, Window(started_s, time.perf_counter()))
    await asyncio.sleep(BACK_S)
    after = (await read_status(clients.session, clients.url)).processes.get(victim.id)
    return {"server": victim.id, "gap_ms": gaps, "came_back": after == victim}


@contextlib.asynccontextmanager
async def _hanging_server(setting: Setting, url: str, session: aiohttp.ClientSession) -> AsyncIterator[Process]:
    """One more expert server, on the last GPU, whose GPU hangs at a SIGUSR1; yields it once it serves experts."""
    flags = ["--join", await coordinator_address(url), "--id", HANGING, *setting.expert_flags(setting.gpus.servers, 2)]
    place, log = setting.place(setting.gpus.count - 1), setting.out / "hanging.log"
    with started("bench.hanging_expert_server", place, [*flags, "--drain-timeout-s", "1"], log):
        try:
            async with asyncio.timeout(JOIN_S):
                while not _serves(status := await read_status(session, url)):
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise MoeringError(f"the server that is to hang did not join within {JOIN_S:g} s; see {log}") from None
        await asyncio.sleep(BACK_S)  # moves to it have ended
        yield status.processes[HANGING]


def _serves(status: Status) -> bool:
    return any(p.id == HANGING for p in status.online("expert-server")) and status.failures_survivable > 0


def _gaps(clients: Streams, window: Window) -> dict[str, float | None]:
    exchanges = [r.exchange for r in clients.recorded] + list(clients.running.values())
    return distribution(gap for e in exchanges for gap in within(intervals(e), window))
