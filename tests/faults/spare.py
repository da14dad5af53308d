"""A process beside those of the launcher, started by a test to see it fail while it joins or loads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import zmq

from moering import protocol, transport
from moering.protocol import ProvenExit
from tests.faults.arena import Arena
from tests.faults.processes.agent import HUB
from tests.faults.relay import Relay
from tests.integration.cluster import DEADLINE_S, REPO, wait_for
from tests.ports import free_port

KINDS = {"expert server": "expert_server", "router": "router", "gateway": "gateway"}


def server_id_of(kind: str) -> str:
    """The id of the spare of a kind."""
    return f"spare-{kind.replace(' ', '-')}"


@dataclass
class Spare:
    """The process, the relay through which it joins (without etcd), and its own copy of the checkpoint."""

    server_id: str
    process: subprocess.Popen[bytes]
    relay: Relay
    checkpoint: Path

    coordinator: str

    def wait_ended(self) -> int:
        """Until it has exited, and tell the coordinator, as a launcher does; its status."""
        status = self.process.wait(DEADLINE_S)
        with transport.make_socket(zmq.DEALER) as socket:
            transport.connect(socket, self.coordinator)
            socket.send(protocol.encode(ProvenExit(self.server_id, self.process.pid, status)))
            socket.linger = 1000
        return status


@contextmanager
def spare(arena: Arena, who: str) -> Iterator[Spare]:
    """Start one. At the end it is told to leave if it runs, and the cluster has let go of it."""
    server_id = server_id_of(who)
    checkpoint = arena.directory / server_id / arena.cluster.checkpoint.name
    shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.copytree(arena.cluster.checkpoint, checkpoint)
    argv = [sys.executable, "-m", f"tests.faults.processes.{KINDS[who]}", "--checkpoint", str(checkpoint)]
    argv += ["--id", server_id]
    argv += ["--port", str(free_port())] if who == "gateway" else ["--bind", "tcp://127.0.0.1:*"]
    argv += ["--no-nice"] if who == "expert server" else []
    env = os.environ | {HUB: arena.hub.path, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    with (
        closing(Relay(lambda: arena.coordinator.removeprefix("ipc://"))) as relay,
        (arena.directory / f"{server_id}.log").open("ab") as log,
    ):
        argv += ["--join", f"tcp://127.0.0.1:{relay.port}", "--membership", arena.membership]
        process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, cwd=REPO, env=env)
        try:
            own = Spare(server_id, process, relay, checkpoint, arena.coordinator)
            yield own
            if process.poll() is None:
                process.terminate()
                own.wait_ended()
        finally:
            process.kill()
    wait_for("the spare is gone", lambda: server_id not in arena.processes())
