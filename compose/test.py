"""The compose cluster on a real container engine: ``make compose-test``.

Builds the image, starts the cluster, streams a chat, kills an expert server's process inside its container in the
middle of a second stream, and checks equal tokens, the container's restart and full redundancy; then scales to four
expert servers. Without an engine it says so and fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.account import Output, compare
from bench.client import Exchange, exchange, new_session
from bench.cluster import Process, Status, free_port
from moering.errors import MoeringError

FILE = Path(__file__).with_name("docker-compose.yml")
WHEELS = FILE.with_name("wheels")
PROJECT = "moering-test"
START_S, RECOVER_S = 600.0, 120.0
OUTPUT_TOKENS = 160
BODY = {
    "model": "default",
    "messages": [{"role": "user", "content": "Tell me a long story about a ring and a river."}],
    "max_tokens": OUTPUT_TOKENS,
    "temperature": 0.7,
    "seed": 7,
    "stream": True,
    "ignore_eos": True,
    "return_token_ids": True,
    "moering": {"logits_digest": True},
}


class Compose:
    """The test's project on the engine."""

    def __init__(self, port: int) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self._environment = os.environ | {"MOERING_PORT": str(port)}

    def run(self, *argv: str, capture: bool = False) -> str:
        """``docker compose`` with the test's file and project; raises `MoeringError` when it fails."""
        command = ["docker", "compose", "-f", str(FILE), "-p", PROJECT, *argv]
        stdout = subprocess.PIPE if capture else None
        try:
            done = subprocess.run(command, check=True, stdout=stdout, text=True, env=self._environment)
        except subprocess.CalledProcessError as e:
            raise MoeringError(f"docker compose {' '.join(argv)} ended with status {e.returncode}") from e
        return done.stdout or ""

    def status(self) -> Status:
        """The cluster's status. The admin interface answers its own machine only, so it is asked in its container."""
        text = self.run("exec", "-T", "gateway", "moering", "status", "--json", capture=True)
        return Status.parse(time.perf_counter(), json.loads(text))


def require_engine() -> None:
    """Raise `MoeringError` where no container engine answers."""
    try:
        subprocess.run(["docker", "version"], check=True, capture_output=True, text=True, timeout=60)
    except FileNotFoundError as e:
        raise MoeringError("there is no `docker` command: this test needs a container engine") from e
    except subprocess.CalledProcessError as e:
        raise MoeringError(f"no container engine answers `docker version`: {e.stderr.strip()}") from e


def lay_wheels() -> None:
    """Give the build what pip finds in a local folder on this machine: a container does not see that folder."""
    folder = Path(os.environ.get("PIP_FIND_LINKS") or "")
    for wheel in folder.glob("*.whl") if folder.is_absolute() else ():
        if not (WHEELS / wheel.name).exists():
            shutil.copy(wheel, WHEELS)


def wait_for(what: str, check: Callable[[], Any], limit_s: float) -> Any:
    """Ask `check` until it returns something true, and return that. Raises `MoeringError` after `limit_s`."""
    deadline_s, last = time.monotonic() + limit_s, ""
    while time.monotonic() < deadline_s:
        try:
            if result := check():
                return result
        except (MoeringError, OSError, ValueError) as e:
            last = f" (last: {e})"
        time.sleep(0.5)
    raise MoeringError(f"{what}: not within {limit_s:.0f} s{last}")


def whole(status: Status, servers: int) -> Status | None:
    """`status` if that many expert servers serve and any one of them may die."""
    return status if len(status.online("expert-server")) == servers and status.failures_survivable >= 1 else None


async def chat(url: str, record: Exchange | None = None) -> Exchange:
    """One streamed chat of fixed sampling; raises `MoeringError` on any error."""
    async with new_session(120.0) as session:
        result = await exchange(session, url, "chat", BODY, record)
    if result.error:
        raise MoeringError(f"the chat ended with {result.error}: {result.detail}")
    return result


async def chat_with_kill(url: str, victim: Process) -> tuple[Exchange, int]:
    """The chat again, with `victim` killed at its 20th token; also how many tokens came after that."""
    record = Exchange()
    running = asyncio.create_task(chat(url, record))
    while len(record.arrivals) < 20 and not running.done():
        await asyncio.sleep(0.002)
    await asyncio.to_thread(kill_in_container, victim)
    killed_at_s = time.perf_counter()
    result = await running
    return result, sum(a.at_s > killed_at_s for a in result.arrivals)


def container_of(process: Process) -> str:
    """Ids of expert servers end with the host name of their container, which is its short id."""
    return process.id.rpartition("-")[2]


def kill_in_container(process: Process) -> None:
    """SIGKILL to the server's process: `docker kill` would not be undone by the restart policy."""
    command = ["docker", "exec", container_of(process), "sh", "-c", f"kill -9 {process.pid}"]
    subprocess.run(command, check=True)


def restarts(process: Process) -> int:
    """How often the engine has started the container again."""
    command = ["docker", "inspect", "-f", "{{.RestartCount}}", container_of(process)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def check(compose: Compose) -> None:
    """The test proper; raises `MoeringError`."""
    before = wait_for("three expert servers, replication 2", lambda: whole(compose.status(), 3), START_S)
    say("up")
    reference = asyncio.run(chat(compose.url))
    say(f"a chat of {len(reference.token_ids)} tokens: {''.join(a.text for a in reference.arrivals)[:100]!r} …")
    victim = before.online("expert-server")[0]
    observed, after_kill = asyncio.run(chat_with_kill(compose.url, victim))
    account = compare(Output.of(reference), Output.of(observed))
    say(f"{victim.id} killed, {after_kill} tokens after that: {account}")
    if not account.clean or after_kill < OUTPUT_TOKENS // 4:
        raise MoeringError(f"the stream with a kill is not the one without: {account}, {after_kill} tokens after it")

    def recovered() -> bool:
        status = whole(compose.status(), 3)
        now = status and status.processes.get(victim.id)
        return bool(now and now.incarnation != victim.incarnation)

    wait_for("the killed server is back and redundancy is whole", recovered, RECOVER_S)
    if restarts(victim) != 1:
        raise MoeringError(f"the container of {victim.id} was restarted {restarts(victim)} times, not once")
    say(f"{victim.id} is back, redundancy is whole")
    compose.run("up", "-d", "--no-build", "--no-recreate", "--scale", "expert-server=4")
    wait_for("four expert servers", lambda: whole(compose.status(), 4), RECOVER_S)
    if not compare(Output.of(reference), Output.of(asyncio.run(chat(compose.url)))).clean:
        raise MoeringError("with four expert servers the chat has other tokens")
    say("scaled to four expert servers, the same tokens")


def say(text: str) -> None:
    """One line of progress."""
    print(f"compose-test: {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Run the test. Exit status 1 when something is not as it must be."""
    parser = argparse.ArgumentParser(prog="python -m compose.test", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the cluster running afterwards")
    keep = parser.parse_args().keep
    try:
        require_engine()
        lay_wheels()
        compose = Compose(free_port())
        try:
            compose.run("up", "-d", "--build")
            check(compose)
        except MoeringError:
            compose.run("logs", "--tail", "30")
            raise
        finally:
            if not keep:
                compose.run("down", "--volumes", "--remove-orphans", "--timeout", "5")
    except MoeringError as e:
        say(f"FAILED: {e}")
        return 1
    say("passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
