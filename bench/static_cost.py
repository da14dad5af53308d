"""What experts on other GPUs cost while nothing fails: the same engine with and without them, in turns."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

from bench.cluster import serving
from bench.decode_rate import decode_rate, decode_together
from bench.engine_client import EngineClient, router_address
from bench.engine_processes import coordinator_address, in_process, started
from bench.multi_gpu_config import Setting
from moering.checkpoint import Checkpoint
from moering.errors import MoeringError

READY_S = 150.0
ANSWER_S = 20.0
DIGEST_STREAMS, DIGEST_TOKENS = 32, 8
WARM_UP_TOKENS = 6
Figures = dict[str, Any]


def make_prompts(setting: Setting, count: int) -> list[list[int]]:
    """Random ids, always the same."""
    vocab, rng = int(Checkpoint(setting.checkpoint).config["vocab_size"]), random.Random(1)
    return [[rng.randrange(20, vocab) for _ in range(setting.config.prompt_tokens)] for _ in range(count)]


async def static_cost(setting: Setting, figures: Figures, save: Callable[[], None]) -> None:
    """Fill `figures` with "equal" and, by streams a GPU, tokens/s of all variants and their cost.

    In process: one engine on each GPU. Cluster: all of their streams at one router, whose expert servers have the other
    GPUs, with one and with two micro-batches.
    """
    config, gpus = setting.config, setting.gpus
    most = max(map(int, config.streams)) * gpus.count
    servers = gpus.for_experts
    flags = setting.serve_flags(servers, min(2, servers), most, micro_batches=1)
    async with contextlib.AsyncExitStack() as stack:
        copies = []
        for gpu in range(gpus.count):
            engine = in_process(
                setting.place(gpu), setting.engine_flags(most // gpus.count), setting.out / f"in_process_{gpu}.log"
            )
            copies.append(engine)
        addresses = await asyncio.gather(*(asyncio.to_thread(stack.enter_context, e) for e in copies))
        log = setting.out / "static_cluster.log"
        url = await stack.enter_async_context(serving(str(setting.checkpoint), log, flags, READY_S))
        one_address = await router_address(url)
        join = ["--join", await coordinator_address(url), "--drain-timeout-s", "1"]
        join_two = [*join, "--id", "router-two", *setting.engine_flags(most, micro_batches=2)]
        two = started("router", setting.place(0), join_two, setting.out / "two.log")
        _, two_address = stack.enter_context(two)
        variants = {
            "in process": [EngineClient(a, ANSWER_S) for a in addresses],
            "one micro-batch": [EngineClient(one_address, ANSWER_S)],
            "two micro-batches": [EngineClient(two_address, ANSWER_S)],
        }
        comparison = _Comparison(setting, variants, make_prompts(setting, most))
        if "price" in config.parts:
            join_one = [*join, *setting.engine_flags(most, micro_batches=1)]
            figures["price"] = await asyncio.to_thread(_price, setting, join_one, comparison.prompts)
            save()
        if "static" in config.parts:
            figures["equal"] = await asyncio.to_thread(comparison.equal)
            save()
            for streams in map(int, config.streams):
                figures.setdefault("streams", {})[str(streams)] = await asyncio.to_thread(comparison.measure, streams)
                print(f"static, {streams} streams a GPU: {figures['streams'][str(streams)]}", file=sys.stderr)
                save()


class _Comparison:
    """All variants, asked in turns."""

    def __init__(self, setting: Setting, variants: dict[str, list[EngineClient]], prompts: list[list[int]]) -> None:
        self._setting, self._variants, self.prompts = setting, variants, prompts

    def equal(self) -> Figures:
        """Of each variant: how many digests of sampled logits are those of the first engine in one process."""
        answers = {
            name: clients[0].generate(self.prompts[:DIGEST_STREAMS], DIGEST_TOKENS, True)
            for name, clients in self._variants.items()
        }
        wanted = [d for row in answers["in process"].digests for d in row]
        found = {n: [d for row in a.digests for d in row] for n, a in answers.items()}
        return {n: {"digests": len(f), "equal": sum(map(str.__eq__, f, wanted))} for n, f in found.items()}  # type: ignore[arg-type]

    def measure(self, streams: int) -> Figures:
        """Medians of tokens/s a GPU, ms a token, and the cost against the engine in one process."""
        config, count = self._setting.config, self._setting.gpus.count
        for name in self._variants:
            self._rate(name, streams, 0.0, WARM_UP_TOKENS)  # graphs are captured
        rounds: list[dict[str, float]] = []
        for _ in range(config.rounds):
            rounds.append({n: self._rate(n, streams, config.window_s, WARM_UP_TOKENS) for n in self._variants})
        result: Figures = {"rounds": [{n: round(r, 1) for n, r in one.items()} for one in rounds]}
        for name in self._variants:
            rate = median(one[name] for one in rounds)
            result[name] = {
                "tokens_per_s_a_gpu": round(rate / count, 1),
                "ms_a_token": round(1e3 * streams * count / rate, 3),
            }
            result[name]["cost"] = round(1 - median(one[name] / one["in process"] for one in rounds), 4)
        return result

    def _rate(self, name: str, streams: int, window_s: float, least: int) -> float:
        """Tokens/s of all GPUs together."""
        clients, count = self._variants[name], self._setting.gpus.count
        each = streams * count // len(clients)
        parts = [self.prompts[i * each : (i + 1) * each] for i in range(len(clients))]
        return decode_together(clients, parts, window_s, least)


def _price(setting: Setting, join: list[str], prompts: list[list[int]]) -> Figures:
    """The parts of a layer, by the rows of a step, from a router that takes their times."""
    trace = setting.out / "trace.json"
    env = {"BENCH_TRACE": str(trace)}
    flags = [*join, "--id", "router-traced"]
    with started("bench.traced_router", setting.place(0), flags, setting.out / "traced.log", env) as (_, address):
        client = EngineClient(address, ANSWER_S)
        for streams in sorted({int(s) * setting.gpus.count for s in setting.config.streams}):
            decode_rate(client, prompts[:streams], 0.0, WARM_UP_TOKENS)
            decode_rate(client, prompts[:streams], setting.config.window_s, WARM_UP_TOKENS)
    if not trace.is_file():
        raise MoeringError(f"the traced router left no trace; see {setting.out / 'traced.log'}")
    result: Figures = json.loads(trace.read_text())
    print(f"price: {result}", file=sys.stderr)
    return result
