"""The whole system on one GPU: ``python -m bench.gpu_end_to_end --out results/``.

A random checkpoint of Qwen3-30B-A3B's shape, as many layers as `--layers`, then three parts, each of them optional:

* *speed*: the in-process engine (router and experts in one process) against transformers' `generate` on the same GPU,
  in turns, at several numbers of streams; both times include the prompts. transformers computes its experts in the way
  that is fastest there at that number.
* *correct*: every token of the engine and of transformers in bf16 under transformers in float32, which reads the same
  text: how often it is the choice, and how far off it is otherwise. Random weights have close rivals everywhere.
* *cluster*: one router and several expert servers on the GPU: logits equal to the engine's by digest; `bench.faults`
  kills servers under streams; seconds and GB/s of loading from the cluster's log.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from bench import fault_run
from bench.cluster import serving
from bench.command import Figures, run_bench, verdict
from bench.engine_client import Answers, EngineClient, router_address
from bench.engine_processes import Place, in_process
from bench.fault_report import report
from bench.generators import Prompts, Transformers, Variant, transformers
from bench.random_checkpoint import Shape, write
from moering.checkpoint import Checkpoint
from moering.config import option
from moering.errors import MoeringError

BAR_STREAMS, BAR = "32", 3.0
READY_S = 240.0
WARM_UPS = 4
_LOADED = re.compile(r"loaded (\d+) experts in ([0-9.]+) s")


@dataclass(frozen=True)
class Config:
    """The whole system on one GPU, against transformers and with servers killed."""

    device: str = option("cuda", "where everything runs; cpu is for trying the bench out", choices=("cpu", "cuda"))
    model: str = option("", "checkpoint directory; empty: a random one is written to /dev/shm")
    layers: int = option(12, "layers of the random checkpoint; the model has 48")
    parts: tuple[str, ...] = option(("speed", "correct", "cluster"), "what to do, separated by commas")
    streams: tuple[str, ...] = option(("1", "8", "32"), "numbers of streams, separated by commas")
    rounds: int = option(3, "rounds of the speed part")
    prompt_tokens: int = option(64, "tokens of each prompt")
    tokens: int = option(64, "new tokens of each prompt")
    experts: tuple[str, ...] = option(("grouped_mm", "batched_mm", "eager"), "transformers' ways to compute experts")
    expert_servers: int = option(4, "expert servers")
    replication: int = option(2, "replicas of each expert")
    load_threads: int = option(3, "experts that each server reads and hashes at once")
    host_replicas: int = option(0, "further experts that each server keeps in pinned host memory")
    kills: int = option(2, "servers killed, one after the other")
    fault_streams: int = option(8, "streams while servers are killed")
    out: str = option("bench-gpu", "directory for gpu_end_to_end.json and the logs")


async def run(config: Config) -> Figures:
    """All parts."""
    out = Path(config.out)
    with _checkpoint(config) as directory:
        checkpoint = Checkpoint(directory)
        prompts = _prompts(config, int(checkpoint.config["vocab_size"]))
        figures: Figures = {"gpu": _gpu(config), "layers": checkpoint.num_layers}
        answers: Answers | None = None
        place = Place(directory, config.device)
        with in_process(place, _engine_flags(config), out / "in_process.log") as address:
            engine = EngineClient(address)
            engine.generate(prompts[:2], 4)
            if "speed" in config.parts:
                figures["speed"] = await _speed(config, directory, engine, prompts)
            answers = engine.generate(prompts, config.tokens, digests=True)
        theirs = figures.get("speed", {}).pop("outputs", None)
        if "correct" in config.parts:
            figures["correct"] = {"engine": _gaps(config, directory, prompts, answers.outputs)}
            if theirs:
                figures["correct"]["transformers, bf16"] = _gaps(config, directory, prompts[: len(theirs)], theirs)
            print(f"correct: {figures['correct']}", file=sys.stderr)
        if "cluster" in config.parts:
            figures["cluster"] = await _cluster(config, checkpoint, prompts, answers)
        return figures


@contextlib.contextmanager
def _checkpoint(config: Config) -> Iterator[Path]:
    if config.model:
        yield Path(config.model).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="moering-bench-", dir="/dev/shm") as directory:
        shape = Shape(
            directory, "qwen3_moe", layers=config.layers, hidden=2048, intermediate=768, experts=128, top_k=8, heads=32,
            kv_heads=4, head_dim=128, vocab=151936, dtype="bfloat16", jobs=os.cpu_count() or 1,
        )  # fmt: skip
        started_s = time.perf_counter()
        yield write(shape)
        print(f"the checkpoint was there for {time.perf_counter() - started_s:.0f} s", file=sys.stderr)


def _prompts(config: Config, vocab: int) -> Prompts:
    rng = random.Random(1)
    most = max(map(int, config.streams))
    return [[rng.randrange(3, vocab) for _ in range(config.prompt_tokens)] for _ in range(most)]


def _gpu(config: Config) -> str:
    if config.device == "cpu":
        return "none"
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()


def _engine_flags(config: Config) -> list[str]:
    length = 2 * (config.prompt_tokens + config.tokens) + 600
    return ["--max-model-len", str(length), "--kv-cache-mb", "2048", "--max-num-batched-tokens", "1024"]


# --- speed ---


async def _speed(config: Config, directory: Path, engine: EngineClient, prompts: Prompts) -> dict[str, Any]:
    result: dict[str, Any] = {}
    log = Path(config.out) / "transformers.log"
    with transformers(directory, ["auto"], log, config.device) as theirs:
        for streams in map(int, config.streams):
            some = prompts[:streams]
            for _ in range(WARM_UPS):  # graphs are captured, and the scheduler learns what steps cost
                engine.generate(some, config.tokens)
            trials = await _trials(config, theirs, some)
            best = max(trials, key=lambda experts: trials[experts])
            rounds = []
            for _ in range(config.rounds):
                ours = engine.generate(some, config.tokens)
                answer = await theirs.generate(some, config.tokens, True, Variant("auto", best, 1))
                rounds.append((ours.tokens_per_s, answer.tokens_per_s))
                result["outputs"] = answer.outputs
            result[str(streams)] = {
                "engine": round(median(a for a, _ in rounds), 1),
                "transformers": round(median(b for _, b in rounds), 1),
                "ratio": round(median(a / b for a, b in rounds), 2),
                "rounds": [[round(a, 1), round(b, 1)] for a, b in rounds],
                "transformers_trials": trials,
            }
            print(f"{streams} streams: {result[str(streams)]}", file=sys.stderr)
    return result


async def _trials(config: Config, theirs: Transformers, prompts: Prompts) -> dict[str, float]:
    """Tokens/s of each way to compute the experts, on a few tokens. A way that fails here counts as 0."""
    found = {}
    for experts in config.experts:
        variant = Variant("auto", experts, 1)
        found[experts] = 0.0
        with contextlib.suppress(MoeringError):
            await theirs.generate(prompts, 2, True, variant)  # first use of everything
            found[experts] = round((await theirs.generate(prompts, 8, True, variant)).tokens_per_s, 1)
    return found


# --- correct ---


def _gaps(config: Config, directory: Path, prompts: Prompts, outputs: Prompts) -> dict[str, float]:
    """Under transformers in float32: the share of tokens that are its choice, and the gaps in standard deviations."""
    argv = [sys.executable, "-m", "bench.transformers_scores", str(directory), config.device]
    sequences = json.dumps(list(zip(prompts, outputs, strict=True)))
    with (Path(config.out) / "scores.log").open("ab") as log:
        env = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(argv, check=False, input=sequences.encode(), stdout=subprocess.PIPE, stderr=log, env=env)
    if done.returncode:
        raise MoeringError(f"bench.transformers_scores failed; see {log.name}")
    answer = json.loads(done.stdout)
    gaps = sorted(gap / answer["spread"] for row in answer["gaps"] for gap in row)
    return {
        "tokens": len(gaps),
        "chosen": round(sum(gap == 0 for gap in gaps) / len(gaps), 4),
        "gap_p99": round(gaps[int(0.99 * (len(gaps) - 1))], 4),
        "gap_max": round(gaps[-1], 4),
    }


# --- cluster ---


async def _cluster(config: Config, checkpoint: Checkpoint, prompts: Prompts, engine: Answers) -> dict[str, Any]:
    out = Path(config.out)
    pairs = checkpoint.num_layers * checkpoint.num_experts * config.replication
    capacity = 5 * pairs // (4 * config.expert_servers) + 1  # room to move
    flags = ["--expert-servers", str(config.expert_servers), "--replication", str(config.replication)]
    flags += ["--device", config.device, f"--router-args={' '.join(_engine_flags(config))}"]
    of_servers = {"capacity": capacity, "load-threads": config.load_threads, "host-replicas": config.host_replicas}
    flags += [f"--expert-server-args={' '.join(f'--{name} {value}' for name, value in of_servers.items())}"]
    started_s = time.perf_counter()
    async with serving(str(checkpoint.path), out / "cluster.log", flags, READY_S) as url:
        ready_s = time.perf_counter() - started_s
        client = EngineClient(await router_address(url))
        await asyncio.to_thread(client.generate, prompts[:8], 8)
        calm = await asyncio.to_thread(client.generate, prompts, config.tokens, True)
        equal = sum(a == b for a, b in zip(chain(*calm.digests), chain(*engine.digests), strict=True))
        figures: dict[str, Any] = {"ready_s": round(ready_s, 1), "tokens_per_s": round(calm.tokens_per_s, 1)}
        figures |= {"digests_equal_to_engine": equal, "digests": sum(map(len, calm.digests))}
        print(f"cluster: {figures}", file=sys.stderr)
        if config.kills:
            figures["faults"] = await _faults(config, url, int(checkpoint.config["vocab_size"]))
    return figures | {"loading": loading(out / "cluster.log", checkpoint.expert_bytes)}


async def _faults(config: Config, url: str, vocab: int) -> dict[str, Any]:
    fault_config = fault_run.FaultConfig(
        model=config.model, url=url, expert_servers=config.expert_servers, replication=config.replication,
        times=config.kills, streams=config.fault_streams, requests=2 * config.fault_streams,
        output_tokens=str(config.tokens), vocab_size=vocab, restore_timeout=150.0, out=config.out,
    )  # fmt: skip
    return report(await fault_run.run(fault_config))


def loading(log: Path, expert_bytes: int) -> list[dict[str, float]]:
    """Every load that the log tells of, first the starts of all servers."""
    loads = []
    for count, seconds in _LOADED.findall(log.read_text(errors="replace")):
        size = int(count) * expert_bytes / 1e9
        rate = round(size / max(float(seconds), 0.05), 2)
        loads.append({"experts": int(count), "gb": round(size, 2), "seconds": float(seconds), "gb_per_s": rate})
    return loads


def table(figures: Figures) -> str:
    """The figures in markdown."""
    lines = [f"{figures['gpu']}; {figures['layers']} layers of 48", ""]
    if "speed" in figures:
        lines += ["| streams | engine, tokens/s | transformers | ratio |", "|---" * 4 + "|"]
        for streams, row in figures["speed"].items():
            bar = f" (bar {BAR:g}: {verdict(row['ratio'] >= BAR)})" if streams == BAR_STREAMS else ""
            trials = row["transformers_trials"]
            theirs = f"{row['transformers']} ({max(trials, key=lambda t: trials[t])})"
            lines.append(f"| {streams} | {row['engine']} | {theirs} | {row['ratio']}{bar} |")
    for name, row in figures.get("correct", {}).items():
        lines.append(f"{name}: {row['chosen']:.2%} of {row['tokens']} tokens are float32's choice; gap p99, max {row}")
    if "cluster" in figures:
        c = figures["cluster"]
        equal = f"{c['digests_equal_to_engine']} of {c['digests']} digests are the engine's"
        lines.append(f"cluster: {equal}; {c['tokens_per_s']} tokens/s; ready after {c['ready_s']} s")
        if "faults" in c:
            kept = {name: c["faults"][name] for name in ("kept", "account", "hits")}
            times = [(f["noticed_ms"], f["over_kill_ms"], f["redundant_ms"]) for f in c["faults"]["faults"]]
            lines.append(f"faults: {kept}; noticed, longest gap over the kill, redundant again (ms): {times}")
        lines += [f"loaded {x}" for x in c["loading"]]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_bench("gpu_end_to_end", Config, run, table, argv)


if __name__ == "__main__":
    sys.exit(main())
