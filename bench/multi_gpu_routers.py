"""The part of `bench.multi_gpu` with two routers: what a second one on its own GPU adds, and what its death costs."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

from bench.cluster import serving
from bench.decode_rate import decode_together
from bench.engine_client import EngineClient, router_addresses
from bench.multi_gpu_config import Setting
from bench.multi_gpu_faults import account
from bench.static_cost import ANSWER_S, READY_S, WARM_UP_TOKENS, make_prompts

Figures = dict[str, Any]


async def routers(setting: Setting, figures: Figures, save: Callable[[], None]) -> None:
    """Fill `figures` with "tokens_per_s" of one router and of two, and "death": the account of SIGKILLs of one of two.

    Each router has `fault_streams` streams; expert servers are as many both times, and have the GPUs that two routers
    leave. With fewer than four GPUs they share them.
    """
    config, gpus = setting.config, setting.gpus
    servers = gpus.count - 2 if gpus.count > 3 else gpus.servers
    for count in (1, 2):
        flags = setting.serve_flags(servers, min(2, servers), 2 * config.fault_streams)
        log = setting.out / f"routers_{count}.log"
        async with serving(str(setting.checkpoint), log, [*flags, "--routers", str(count)], READY_S) as url:
            rate = await asyncio.to_thread(_rate, setting, await router_addresses(url))
            figures.setdefault("tokens_per_s", {})[str(count)] = round(rate, 1)
            print(f"{count} routers: {rate:.1f} tokens/s", file=sys.stderr)
            save()
            if count == 2:
                figures["death"] = await account(setting, url, servers, ("router",), config.kills_each)


def _rate(setting: Setting, addresses: list[str]) -> float:
    """Tokens/s of all routers together, while the streams of all decode."""
    config = setting.config
    clients = [EngineClient(address, ANSWER_S) for address in addresses]
    prompts = [make_prompts(setting, config.fault_streams)] * len(clients)
    decode_together(clients, prompts, 0.0, WARM_UP_TOKENS)
    return median(decode_together(clients, prompts, config.window_s, WARM_UP_TOKENS) for _ in range(config.rounds))
