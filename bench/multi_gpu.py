"""The price and the failures of expert servers on several GPUs of one host: ``python -m bench.multi_gpu``.

One router on the first GPU, one expert server on each of the others; with fewer than three of those, three servers
share them while servers die, so that replicas, kills and recovery can be seen at all (processes take turns on a GPU, so
that says nothing about speed). The weights are random, of Qwen3-30B-A3B's shape, as many layers as fit. The parts:

* *static*: tokens/s against the same engine with all experts inside, one copy on each GPU, at equal streams a GPU;
  *price*: the parts of a layer, from a router that takes their times.
* *kills*: SIGKILL of one server; *at_once*: of 1, 2, … n - 1 at the same moment; *still*: SIGSTOP, and a kernel that
  does not return; *reload*: GB/s after losses against a plain read, and tokens/s meanwhile.
* *servers*: tokens/s against the number of expert servers; *routers*: of two routers against one, and deaths of one
  of two. With four GPUs and more each router has its own.

Each part has a limit of time of its own, and the figures are written after each.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from bench import multi_gpu_report
from bench.cluster import serving
from bench.multi_gpu_config import Config, Gpus, Setting, find_gpus
from bench.multi_gpu_faults import at_once, kills, reload_figures, throughput
from bench.multi_gpu_routers import routers
from bench.qwen3_shape import fewer_layers, layers_that_fit, write_checkpoint
from bench.standing_still import standing_still
from bench.static_cost import static_cost
from moering.config import parse
from moering.errors import MoeringError

READY_S = 120.0
_FAULTS = ("kills", "at_once", "still")
Figures = dict[str, Any]


class Bench:
    """All parts, and the figures so far."""

    def __init__(self, setting: Setting, faulty: Setting, figures: Figures) -> None:
        """`faulty`: for the parts in which servers die."""
        self._setting, self._faulty, self.figures = setting, faulty, figures

    def save(self) -> None:
        """Write what there is."""
        (self._setting.out / "multi_gpu.json").write_text(json.dumps(self.figures, indent=1) + "\n")

    async def run(self) -> None:
        """The parts in the order of their value; what goes wrong in one does not end the others."""
        parts = self._setting.config.parts
        if {"static", "price"} & set(parts):
            found: Figures = self.figures.setdefault("static", {})
            await self._part("static", lambda: static_cost(self._setting, found, self.save), 2)
        if set(_FAULTS) & set(parts):
            await self._part("cluster for faults", self._faults, 4)
        if "reload" in parts:
            await self._part("reload", self._reload)
        if "servers" in parts:
            await self._part("servers", self._servers)
        if "routers" in parts:
            found = self.figures.setdefault("routers", {})
            await self._part("routers", lambda: routers(self._faulty, found, self.save), 2)

    async def _part(self, name: str, part: Callable[[], Awaitable[None]], limits: int = 1) -> None:
        begun_s = time.perf_counter()
        try:
            async with asyncio.timeout(limits * self._setting.config.limit_s):
                await part()
        except (MoeringError, aiohttp.ClientError, TimeoutError, OSError) as e:
            self.figures.setdefault("failed", {})[name] = f"{type(e).__name__}: {str(e)[:3000]}"
            print(f"{name} failed: {type(e).__name__}: {e}", file=sys.stderr)
        self.figures.setdefault("seconds", {})[name] = round(time.perf_counter() - begun_s, 1)
        self.save()

    async def _faults(self) -> None:
        s, parts = self._faulty, self._faulty.config.parts
        servers = s.gpus.servers
        flags = s.serve_flags(servers, 2, 2 * s.config.fault_streams)
        async with serving(str(s.checkpoint), s.out / "cluster.log", flags, READY_S) as url:
            if "kills" in parts:
                done: list[Figures] = self.figures.setdefault("kills", [])
                await self._part("kills", lambda: kills(s, url, done, self.save), 2)
            if "still" in parts:
                await self._part("still", lambda: self._still(url))
            if "at_once" in parts:
                runs: Figures = self.figures.setdefault("at_once", {})
                await self._part("at_once", lambda: at_once(s, url, runs, self.save))

    async def _still(self, url: str) -> None:
        self.figures["still"] = await standing_still(self._faulty, url)

    async def _reload(self) -> None:
        self.figures["reload"] = await asyncio.to_thread(reload_figures, self._faulty, self.figures)

    async def _servers(self) -> None:
        runs: Figures = self.figures.setdefault("servers", {})
        await throughput(self._faulty, runs, self.save)


@contextlib.contextmanager
def settings(config: Config, gpus: Gpus) -> Iterator[tuple[Setting, Setting]]:
    """The whole checkpoint, and the one for the parts in which servers die; made if they are not there."""
    out = Path(config.out)
    with tempfile.TemporaryDirectory(prefix="moering-bench-", dir="/dev/shm") as temporary:
        whole = Path(config.directory or f"{temporary}/whole")
        begun_s = time.perf_counter()
        if not (whole / "config.json").exists():
            tiny = config.device == "cpu"
            write_checkpoint(whole, config.layers or (2 if tiny else layers_that_fit(gpus.gb, gpus.count)), tiny)
        print(f"the checkpoint is there after {time.perf_counter() - begun_s:.0f} s", file=sys.stderr)
        layers = int(json.loads((whole / "config.json").read_text())["num_hidden_layers"])
        fewer = whole
        if not gpus.apart and config.fault_layers < layers:
            fewer = fewer_layers(whole, Path(temporary, "fewer"), config.fault_layers)
        yield Setting(config, gpus, whole, out), Setting(config, gpus, fewer, out)


async def run(config: Config) -> Figures:
    """Everything."""
    gpus = find_gpus(config.device)
    with settings(config, gpus) as (whole, faulty):
        figures: Figures = {
            "config": dataclasses.asdict(config),
            "gpus": dataclasses.asdict(gpus),
            "layers": multi_gpu_report.layers_of(whole.checkpoint),
            "fault_layers": multi_gpu_report.layers_of(faulty.checkpoint),
            "fault_servers": gpus.servers,
            "apart": gpus.apart,
        }
        bench = Bench(whole, faulty, figures)
        await bench.run()
        return bench.figures


def main(argv: list[str] | None = None) -> int:
    """Run, draw and print; exit status 1 where a part failed."""
    try:
        config = parse(Config, sys.argv[1:] if argv is None else argv, prog="python -m bench.multi_gpu")
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        figures = uvloop.run(run(config))
    except MoeringError as e:
        print(f"bench.multi_gpu: {e}", file=sys.stderr)
        return 1
    except asyncio.CancelledError:  # by SIGTERM
        return 128 + signal.SIGTERM
    multi_gpu_report.draw(figures, out)
    print(multi_gpu_report.table(figures))
    return 1 if "failed" in figures else 0


if __name__ == "__main__":
    sys.exit(main())
