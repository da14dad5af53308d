"""A cluster that only looks like one: streams from a formula, expert servers that are idle processes, a status.

What it does wrong after the first kill is planted by a test, so that the fault bench can be seen to find it.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from aiohttp import web

from tests.bench.fake_server import event, serving_in_thread, start

Tokens = list[tuple[int, str]]
"""(id, digest of the logits) of the tokens in one chunk."""
Plant = Callable[[int, Tokens], Tokens]
"""(position, the right tokens there) → what is sent instead."""

LOOKS_DEGRADED = 3
"""Looks at the status for which a kill shows before the fake has recovered."""


class FakeCluster:
    """State of the fake. Only its server's thread touches it, except for `close`."""

    def __init__(self, plant: Plant | None, expert_servers: int, counters: bool, hits: bool):
        self.plant, self.counters, self.hits = plant, counters, hits
        self.processes = {f"expert-server-{i}": self._spawn() for i in range(expert_servers)}
        self.incarnations = dict.fromkeys(self.processes, 1)
        self.looks_left = self.lost = 0
        self.tokens_since_kill = -1
        self.events: list[dict[str, Any]] = []

    def close(self) -> None:
        """End the idle processes."""
        for process in self.processes.values():
            process.kill()
            process.communicate()

    async def completions(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """A stream whose tokens follow from the prompt alone, until something planted changes them."""
        response = await start(request)
        for position in range(body["max_tokens"]):
            await asyncio.sleep(0.002)
            self._reap()
            value = zlib.crc32(repr((body["prompt"], position)).encode())
            tokens = [(value % 1000, f"{value:08x}")]
            if self.tokens_since_kill >= 0:
                self.tokens_since_kill += 1
                if self.plant and self.tokens_since_kill == 5:
                    tokens = self.plant(position, tokens)
            finish = "length" if position == body["max_tokens"] - 1 else None
            choice = {"token_ids": [i for i, _ in tokens], "moering": {"logits_digests": [d for _, d in tokens]}}
            await event(response, {"choices": [choice | {"index": 0, "text": "", "finish_reason": finish}]})
        await event(response, "[DONE]")
        return response

    async def status(self, _: web.Request) -> web.Response:
        """/admin/status; a look is also what time is made of here: the dead come back after some looks."""
        self._reap()
        survivable = 0 if self.looks_left else 1
        processes = [
            {"id": id, "kind": "expert-server", "pid": p.pid, "incarnation": self.incarnations[id], "experts": 8}
            | {"address": "", "state": "ONLINE" if p.poll() is None else "OFFLINE"}
            for id, p in self.processes.items()
        ]
        if self.looks_left:
            self.looks_left -= 1
        content: dict[str, Any] = {"epoch": 1, "processes": processes, "failures_survivable": survivable}
        if self.counters:
            names = ("dispatches_lost", "rows_lost", "rows_resent")
            content["router_counters"] = dict.fromkeys(names, self.lost) | {"tokens_recomputed": 0}
        return web.json_response(content)

    async def timeline(self, request: web.Request) -> web.Response:
        """/admin/events"""
        since = int(request.query["since"])
        return web.json_response({"events": [e for e in self.events if e["id"] > since]})

    def _event(self, type: str, subject: str) -> None:
        now_s = time.time()
        self.events.append({"id": int(now_s * 1e6), "at": now_s, "type": type, "subject": subject})

    def _reap(self) -> None:
        """Notice the dead, and replace them once the looks are over."""
        for id, process in self.processes.items():
            if process.poll() is None:
                continue
            if self.looks_left == 0 and self.incarnations[id] >= 0:
                self.looks_left, self.incarnations[id] = LOOKS_DEGRADED, -self.incarnations[id]
                self._event("member.offline", id)
                self.tokens_since_kill, self.lost = 0, self.lost + self.hits
            elif self.looks_left == 0:
                process.communicate()
                self.processes[id], self.incarnations[id] = self._spawn(), 1 - self.incarnations[id]
                self._event("member.online", id)

    @staticmethod
    def _spawn() -> subprocess.Popen[bytes]:
        # The last argument makes it look like an expert server; it ends with its standard input.
        argv = [sys.executable, "-S", "-c", "import sys; print(flush=True); sys.stdin.read()", "expert_server"]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()  # its command line can be read from here on
        return process


@contextlib.contextmanager
def fake_cluster(
    plant: Plant | None = None, *, expert_servers: int = 3, counters: bool = True, hits: bool = True
) -> Iterator[str]:
    """The URL of a fake cluster. `plant` changes one chunk, the fifth after the first kill."""
    cluster = FakeCluster(plant, expert_servers, counters, hits)
    try:
        with serving_in_thread(
            cluster.completions, {"/admin/status": cluster.status, "/admin/events": cluster.timeline}
        ) as url:
            yield url
    finally:
        cluster.close()
