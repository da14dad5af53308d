"""A router that takes the time of each part of a layer: ``python -m bench.traced_router``, with a router's own flags.

It joins a cluster beside its routers and serves in the same way. When it ends it writes medians in µs, by the rows of a
decode step, to the file that the environment variable BENCH_TRACE names:

* *combine* (reads experts' outputs in their slots), *attention* (and gate), *copy_out* (expert ids and inputs to the
  host): on the GPU's clock; *until_experts*: these, and what starting them and waiting for them costs, on the host's.
* *send*: packing, rows to the slots of servers, and sending; *receive*: taking in answers; *compute*: what the slowest
  server says it took, its own copies included; *round_trip*: from before *send* to the last output. *hop* is
  *round_trip* less *compute*.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from moering.expert_frames import Reply
from moering.process import run_main
from router.config import Config
from router.connection import Connection
from router.exchange import Exchange, Finished, Rows

LEAST_SAMPLES = 20


class Trace:
    """Samples in µs by rows and name."""

    def __init__(self) -> None:
        self._samples: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def add(self, rows: int, **us: float) -> None:
        """One sample of each name."""
        for name, value in us.items():
            self._samples[rows][name].append(value)

    def medians(self) -> dict[str, dict[str, float]]:
        """By rows, as text; those with too few samples are left out."""
        return {
            str(rows): {name: round(median(values), 1) for name, values in sorted(named.items())}
            for rows, named in sorted(self._samples.items())
            if len(named["round_trip"]) >= LEAST_SAMPLES
        }


TRACE = Trace()


class TracedExchange(Exchange):
    """Takes the times of one work: the router's own, and what its servers say."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._begun: dict[int, int] = {}  # ns, by the id of the micro-batch
        self._own_us: dict[int, list[float]] = {}  # send, receive
        self._compute_us: dict[int, dict[str, int]] = {}  # by server

    def submit(self, micro_batch: Rows, slots: np.ndarray | None = None, deaths: np.ndarray | None = None) -> None:
        """See `Exchange.submit`."""
        key, begun = id(micro_batch), time.perf_counter_ns()
        self._begun[key], self._compute_us[key] = begun, defaultdict(int)
        super().submit(micro_batch, slots, deaths)
        self._own_us[key] = [(time.perf_counter_ns() - begun) / 1e3, 0.0]

    def take_finished(self) -> list[Finished]:
        """See `Exchange.take_finished`."""
        now, finished = time.perf_counter_ns(), super().take_finished()
        for f in finished:
            key = id(f.micro_batch)
            trip, (send, receive) = (now - self._begun.pop(key)) / 1e3, self._own_us.pop(key)
            compute = max(self._compute_us.pop(key).values(), default=0)
            if not f.micro_batch.prefill:
                TRACE.add(
                    f.micro_batch.rows, round_trip=trip, send=send, receive=receive, compute=compute, hop=trip - compute
                )
        return finished

    def _put(self, connection: Connection, reply: Reply, tensor: memoryview | None) -> None:
        begun, d = time.perf_counter_ns(), self.dispatcher.outbox.unanswered.get(reply.seq)
        key = id(self._micro_batches.get(d.work)) if d is not None else 0
        super()._put(connection, reply, tensor)
        if key in self._own_us:
            self._own_us[key][1] += (time.perf_counter_ns() - begun) / 1e3
            self._compute_us[key][connection.server_id] += reply.compute_us


def traced_decoder() -> type:
    """The decoder for GPUs, with events around its parts."""
    from router.buffers_cuda import Step
    from router.decoder_cuda import Decoder
    from router.micro_batch_cuda import MicroBatch

    class TracedDecoder(Decoder):
        def launch(self, mb: MicroBatch) -> None:
            begun = time.perf_counter_ns()
            self._marks = [self._mark()]
            super().launch(mb)
            marks = [*self._marks, self._mark()]
            marks[-1].synchronize()
            wall_us = (time.perf_counter_ns() - begun) / 1e3
            if mb.rows == len(mb.step.paged.decode_rows) or not mb.step.paged.tiles.shape[0]:
                names = ("until_combine", "combine", "attention", "copy_out")
                parts = [a.elapsed_time(b) * 1e3 for a, b in pairwise(marks)]
                if len(parts) == len(names):  # the first layer has nothing to take in
                    TRACE.add(mb.rows, until_experts=wall_us, **dict(zip(names[1:], parts[1:], strict=True)))

        def _run_segment(self, step: Step, layer: int) -> None:
            if layer:
                self._marks.append(self._mark())
                self._combine(step)
                self._marks.append(self._mark())
            key = (id(step.buffers), step.padded, step.paged.splits, layer)
            if step.padded in self._graph_rows and not step.paged.tiles.shape[0]:
                self._graphs.run(key, lambda: self._segment(step, layer))
            else:
                self._segment(step, layer)
            self._marks.append(self._mark())
            self._fetch_choice(step)

        @staticmethod
        def _mark() -> torch.cuda.Event:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event

    return TracedDecoder


def run(config: Config) -> int:
    """Serve as a router does, then write what was seen."""
    process: Any = importlib.import_module("router.process")
    process.Exchange = TracedExchange
    if config.device == "cuda":
        decoders: Any = importlib.import_module("router.decoder_cuda")
        decoders.Decoder = traced_decoder()
    try:
        status: int = process.Router(config).run()
        return status
    finally:
        Path(os.environ["BENCH_TRACE"]).write_text(json.dumps(TRACE.medians()))


if __name__ == "__main__":
    sys.exit(run_main("bench.traced_router", Config, run))
