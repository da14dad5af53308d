"""`python -m gateway` as a real process, with a real coordinator."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest

from tests.gateway.harness import DEADLINE_S, run
from tests.ports import free_port
from tests.tiny import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny", layers=1, experts=2)


@pytest.fixture
def coordinator(tmp_path):
    address = f"ipc://{tmp_path}/c"
    process = subprocess.Popen([sys.executable, "-m", "moering.coordinator", "--bind", address])
    yield address
    process.kill()
    process.wait(DEADLINE_S)


def start(*flags: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("MOERING_")}
    argv = [*before, sys.executable, "-m", "gateway", *flags]
    return subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=env)


async def get_json(session: aiohttp.ClientSession, url: str, done) -> dict:
    """Ask until the process listens and the answer is as wanted."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                async with session.get(url) as response:
                    if done(body := await response.json()):
                        return body
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.02)


def test_it_joins_serves_and_leaves_on_sigterm(checkpoint, coordinator):
    port = free_port()
    process = start("--checkpoint", str(checkpoint), "--join", coordinator, "--port", str(port), "--id", "g7")

    async def main():
        async with aiohttp.ClientSession() as session:
            url = f"http://127.0.0.1:{port}"
            assert await get_json(session, url + "/health", lambda b: True) == {"status": "ok"}
            models = await get_json(session, url + "/v1/models", lambda b: True)
            assert models["data"][0]["id"] == checkpoint.name
            status = await get_json(session, url + "/admin/status", lambda b: b.get("epoch", 0) > 0)
            own = status["processes"][0]
            assert (own["id"], own["kind"], own["pid"], own["state"]) == ("g7", "gateway", process.pid, "JOINING")
            async with session.post(url + "/v1/completions", json={"prompt": "a"}) as response:
                assert response.status == 503 and "Retry-After" in response.headers

    try:
        run(main())
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, log
        assert "Traceback" not in log and f"http://127.0.0.1:{port}" in log
    finally:
        process.kill()


def test_the_soft_limit_of_descriptors_does_not_limit_connections(checkpoint, coordinator):
    """libuv closes the connections beyond it at once, and says nothing."""
    port = free_port()
    flags = "--checkpoint", str(checkpoint), "--join", coordinator, "--port", str(port)
    process = start(*flags, before=("sh", "-c", 'ulimit -Sn 64; exec "$0" "$@"'))

    async def main():
        async with aiohttp.ClientSession() as session:
            await get_json(session, f"http://127.0.0.1:{port}/health", lambda b: True)
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(100)]
        for reader, writer in opened:
            writer.write(b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n")
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        for _, writer in opened:
            writer.close()

    try:
        run(main())
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        ([], 2, "--checkpoint is needed"),
        (["--checkpoint", "/nowhere"], 2, "/nowhere is not a directory"),
        (["--max-requests", "many"], 2, "max_requests"),
    ],
)
def test_a_wrong_start_is_one_line(flags, status, message):
    process = start(*flags)
    _, log = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == status
    assert message in log and "Traceback" not in log and len(log.splitlines()) == 1


def test_a_second_sigterm_ends_it_now():
    code = (
        "import asyncio, uvloop\n"
        "from moering.process import install_signal_handlers\n"
        "async def main():\n"
        "    stop, loop = asyncio.Event(), asyncio.get_running_loop()\n"
        "    install_signal_handlers(lambda: loop.call_soon_threadsafe(stop.set))\n"
        "    print('up', flush=True)\n"
        "    await stop.wait()\n"
        "    print('draining', flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "uvloop.run(main())"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        for expected in ("up\n", "draining\n"):
            assert process.stdout is not None and process.stdout.readline() == expected
            process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 128 + signal.SIGTERM
    finally:
        process.kill()


def test_a_port_that_is_taken_is_one_line(checkpoint):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start("--checkpoint", str(checkpoint), "--join", "ipc:///tmp/none", "--port", str(port))
        _, log = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in log and "Traceback" not in log
