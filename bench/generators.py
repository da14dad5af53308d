"""moering over HTTP and transformers in a subprocess, each asked for the same tokens, each timed from outside."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from bench.client import exchange
from bench.transformers_worker import Request
from moering.errors import MoeringError

Prompts = list[list[int]]


@dataclass(frozen=True)
class Variant:
    """How transformers computes."""

    dtype: str
    experts: str
    threads: int


@dataclass(frozen=True)
class Answer:
    """New tokens of each prompt, and the seconds they took together."""

    seconds: float
    outputs: Prompts

    @property
    def tokens_per_s(self) -> float:
        """New tokens by the time, that of the prompts included."""
        return sum(map(len, self.outputs)) / self.seconds


class Transformers:
    """The process with transformers."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._read()

    async def generate(self, prompts: Prompts, tokens: int, batched: bool, variant: Variant) -> Answer:
        """Have it generate; it is idle before and after."""
        request = Request(prompts, tokens, batched, **dataclasses.asdict(variant))
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(dataclasses.asdict(request)) + "\n")
        self._process.stdin.flush()
        content = await asyncio.to_thread(self._read)
        if "error" in content:
            raise MoeringError(f"transformers: {content['error']}")
        answer = Answer(**content)
        if {len(o) for o in answer.outputs} != {tokens}:
            raise MoeringError("transformers generated another number of tokens than it was asked for")
        return answer

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise MoeringError("the process with transformers has ended; its log says why")
        return json.loads(line)


@contextlib.contextmanager
def transformers(checkpoint: Path, dtypes: Sequence[str], log: Path, device: str = "cpu") -> Iterator[Transformers]:
    """Start the process and wait until it has loaded the checkpoint."""
    argv = [sys.executable, "-m", "bench.transformers_worker", str(checkpoint), device, *dtypes]
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    try:
        yield Transformers(process)
    finally:
        process.kill()
        process.communicate()


async def ask_moering(session: aiohttp.ClientSession, url: str, model: str, prompts: Prompts, tokens: int) -> Answer:
    """Send all prompts at once and wait for the last token."""
    body = {"model": model, "max_tokens": tokens, "temperature": 0.0, "stream": True}
    body |= {"ignore_eos": True, "return_token_ids": True}
    started_s = time.perf_counter()
    answers = await asyncio.gather(*(exchange(session, url, "completions", body | {"prompt": p}) for p in prompts))
    seconds = time.perf_counter() - started_s
    if bad := [a for a in answers if a.error or len(a.token_ids) != tokens]:
        raise MoeringError(f"a request failed: {bad[0].error} {bad[0].detail}; {len(bad[0].token_ids)} tokens")
    return Answer(seconds, [a.token_ids for a in answers])
