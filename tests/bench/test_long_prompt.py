"""The cost of a long prompt, measured on a server that makes everybody wait for it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from aiohttp import web

from bench.long_prompt import main
from tests.bench.fake_server import event, serving_in_thread, start

FLAGS = ["--prompt", "500", "--times", "2", "--calm", "0.1", "--streams", "3", "--output-tokens", "40"]


class Queue:
    """Tokens come one by one; a prompt of 100 tokens and more holds them all up, where `fair` is not set."""

    def __init__(self, fair: bool) -> None:
        self.fair = fair
        self.blocked = 0

    async def completions(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await start(request)
        if len(body["prompt"]) >= 100:
            self.blocked += 1
            await asyncio.sleep(0.1)
            self.blocked -= 1
        for position in range(body["max_tokens"]):
            await asyncio.sleep(0.002)
            while self.blocked and not self.fair:
                await asyncio.sleep(0.002)
            finish = "length" if position == body["max_tokens"] - 1 else None
            await event(response, {"choices": [{"text": "x", "token_ids": [position], "finish_reason": finish}]})
        await event(response, "[DONE]")
        return response


def measure(server: Queue, out: Path) -> dict[str, Any]:
    with serving_in_thread(server.completions) as url:
        assert main(["--url", url, "--out", str(out), *FLAGS]) == 0
    figures: dict[str, Any] = json.loads((out / "long_prompt.json").read_text())
    return figures


def test_a_server_that_makes_everybody_wait_shows(tmp_path: Path) -> None:
    figures = measure(Queue(fair=False), tmp_path)
    assert figures["first_token_ms"]["p50"] >= 100
    assert figures["itl_beside_ms"]["max"] >= 80
    assert figures["itl_otherwise_ms"]["p99"] < figures["itl_beside_ms"]["max"]  # the waits are not among the others
    assert figures["p99_ratio"] > 2


def test_a_failing_stream_ends_the_run(tmp_path: Path, capsys: Any) -> None:
    async def refuse(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if len(body["prompt"]) >= 100:
            return web.json_response({"error": {"message": "too long"}}, status=400)
        return await Queue(fair=True).completions(request, body)

    with serving_in_thread(refuse) as url:
        assert main(["--url", url, "--out", str(tmp_path), *FLAGS]) == 1
    assert "the long prompt failed: http_400" in capsys.readouterr().err
