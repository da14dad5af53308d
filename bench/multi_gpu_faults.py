"""The parts of `bench.multi_gpu` in which expert servers die, and what loading and more servers bring."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from bench.cluster import serving
from bench.decode_rate import decode_rate
from bench.engine_client import EngineClient, router_address
from bench.fault_report import report
from bench.fault_run import FaultConfig
from bench.fault_run import run as run_faults
from bench.gpu_end_to_end import loading
from bench.loading_rates import read_file
from bench.multi_gpu_config import Setting
from bench.static_cost import ANSWER_S, READY_S, WARM_UP_TOKENS, make_prompts
from moering.checkpoint import Checkpoint

READERS = 8
Figures = dict[str, Any]
Save = Callable[[], None]


async def kills(setting: Setting, url: str, done: list[Figures], save: Save) -> None:
    """SIGKILL of one server under all streams, again and again; an account for each few kills."""
    left = setting.config.kills
    while left > 0:
        times = min(left, setting.config.kills_each)
        left -= times
        done.append(await account(setting, url, setting.gpus.servers, ("expert-server",), times))
        print(f"kills: {_short(done[-1])}", file=sys.stderr)
        save()


async def at_once(setting: Setting, url: str, runs: Figures, save: Save) -> None:
    """SIGKILL of 1, 2, … n - 1 of n servers at the same moment."""
    servers = setting.gpus.servers
    for count in range(1, servers):
        runs[str(count)] = await account(setting, url, servers, ("expert-server",) * count, 1)
        print(f"{count} at once: {_short(runs[str(count)])}", file=sys.stderr)
        save()


async def account(setting: Setting, url: str, servers: int, kill: tuple[str, ...], times: int) -> Figures:
    """What clients of a cluster of so many expert servers see while processes of these kinds die at once, `times`."""
    config = setting.config
    fault_config = FaultConfig(
        url=url, expert_servers=servers, kill=kill, times=times, calm=2.0,
        streams=config.fault_streams, requests=config.fault_streams, prompt_tokens=str(config.prompt_tokens),
        output_tokens=str(config.fault_tokens), restore_timeout=60.0, out=config.out,
        vocab_size=int(Checkpoint(setting.checkpoint).config["vocab_size"]),
    )  # fmt: skip
    return report(await run_faults(fault_config))


def _short(r: Figures) -> Figures:
    gaps = [(f["over_kill_ms"], f["redundant_ms"]) for f in r["faults"]]
    return {"kept": r["kept"], "account": r["account"], "calm": r["between_faults"], "over kill, redundant": gaps}


def reload_figures(setting: Setting, figures: Figures) -> Figures:
    """GB/s of the loads in the cluster's log and a plain read of the same files; tokens/s while experts came back."""
    log = setting.out / "cluster.log"
    loads = loading(log, Checkpoint(setting.checkpoint).expert_bytes) if log.exists() else []
    files = sorted(setting.checkpoint.glob("*.safetensors"))
    result: Figures = {"loads": loads, "plain_read_gb_per_s": round(plain_read(files), 3), "readers": READERS}
    starts, later = loads[: setting.gpus.servers], loads[setting.gpus.servers :]
    for name, some in (("start", starts), ("after_losses", later)):
        if some:
            result[f"{name}_gb_per_s"] = round(median(load["gb_per_s"] for load in some), 2)
    runs = [r for r in figures.get("kills", []) if r["between_faults"]["tokens_per_s"]]
    if runs:
        result["tokens_per_s"] = {
            name: round(median(r[name]["tokens_per_s"] for r in runs), 1)
            for name in ("between_faults", "during_faults")
        }
    return result


def plain_read(files: list[Path]) -> float:
    """GB/s of reading these files once, several at a time."""
    begun_s = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        size = sum(pool.map(read_file, files))
    return size / 1e9 / (time.perf_counter() - begun_s)


async def throughput(setting: Setting, runs: Figures, save: Save) -> None:
    """Tokens/s of all streams with 1, 2, … expert servers, one replica of each expert, and two micro-batches."""
    config, gpus = setting.config, setting.gpus
    counts = range(1, gpus.for_experts + 1) if gpus.for_experts > 1 else (1, 2, gpus.servers)
    prompts = make_prompts(setting, config.fault_streams)
    for count in counts:
        flags = setting.serve_flags(count, 1, config.fault_streams, micro_batches=2)
        log = setting.out / f"servers_{count}.log"
        async with serving(str(setting.checkpoint), log, flags, READY_S) as url:
            client = EngineClient(await router_address(url), ANSWER_S)
            await asyncio.to_thread(decode_rate, client, prompts, 0.0, WARM_UP_TOKENS)
            rates = [
                await asyncio.to_thread(decode_rate, client, prompts, config.window_s, WARM_UP_TOKENS)
                for _ in range(config.rounds)
            ]
            runs[str(count)] = round(median(r.tokens_per_s for r in rates), 1)
            print(f"{count} expert servers: {runs[str(count)]} tokens/s", file=sys.stderr)
        save()
