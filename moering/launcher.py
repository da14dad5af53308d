"""``moering serve``: all processes of a cluster on one machine, started, supervised and stopped.

The launcher holds no state that matters. Killed, it takes its processes with it; the processes come back from the
checkpoint. It tells the coordinator of each process that it reaps, which is proof that no vote has to confirm.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import zmq

from moering import protocol, transport
from moering.checkpoint import Checkpoint
from moering.config import option
from moering.errors import ConfigError
from moering.http_client import HttpError, get_json, request
from moering.process import command_line, run_main
from moering.status import coverage, fetch
from moering.supervisor import Command, Exit, Policy, Supervisor

logger = logging.getLogger(__name__)

STOP_ORDER = ("gateway", "router", "expert-server", "coordinator")  # nobody loses a peer that it still needs
READY_POLL_S = 0.2
MAX_RUN_DIRECTORY_CHARS = 60  # a Unix socket's path ends at 103 characters on some systems


@dataclass(frozen=True)
class Config:
    """Serve a model on this machine: a coordinator, expert servers, routers and a gateway under one supervisor."""

    model: str = option("default", "a checkpoint directory, or `default`", positional=True)
    expert_servers: int = option(3, "number of expert servers")
    replication: int = option(2, "replicas of each expert")
    zones: tuple[str, ...] = option((), "failure domains, as a,b: expert servers are put into them in turn")
    routers: int = option(1, "number of routers")
    host: str = option("127.0.0.1", "address of the HTTP port")
    port: int = option(8000, "HTTP port")
    served_model_name: str = option("", "name in the API; `default` or the directory's name where not given")
    coordinator_args: str = option("", "further flags of the coordinator, in one string")
    expert_server_args: str = option("", "further flags of each expert server")
    router_args: str = option("", "further flags of each router")
    gateway_args: str = option("", "further flags of the gateway")
    rejoin_grace_s: float = option(2.0, "seconds that a dead server's experts wait for it before others load them")
    max_restart_delay_s: float = option(10.0, "longest delay before a process that keeps dying is started again")
    drain_timeout_s: float = option(30.0, "at a stop, how long each kind of process may take before it is killed")

    def __post_init__(self) -> None:
        if self.expert_servers < 1 or self.routers < 1:
            raise ConfigError("at least one expert server and one router are needed")
        if not 1 <= self.replication <= self.expert_servers:
            raise ConfigError(f"replication {self.replication} is not in 1..{self.expert_servers} (--expert-servers)")
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"port {self.port} is not in 1..65535")

    def zone_flags(self, expert_server: int) -> list[str]:
        """Which failure domain an expert server belongs to, counted from 0."""
        return ["--zone", self.zones[expert_server % len(self.zones)]] if self.zones else []

    @property
    def url(self) -> str:
        """Where this machine reaches the gateway."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``moering serve``."""
    return run_main("serve", Config, _run, argv)


def commands(config: Config, checkpoint: Path, run_directory: Path) -> list[Command]:
    """The processes to run. Sockets lie in `run_directory`, a new one for each start, so that no process is taken for
    the one before it; only the coordinator keeps its address, where its members look for it again."""
    join = coordinator_address(run_directory)
    read = ["--checkpoint", str(checkpoint)]

    def member(kind: str, server_id: str, flags: Sequence[str], extra: str) -> Command:
        def argv(start: int) -> list[str]:
            bind = [] if kind == "gateway" else ["--bind", f"ipc://{run_directory}/{server_id}.{start}"]
            return [*command_line(kind), *read, "--join", join, "--id", server_id, *bind, *flags, *shlex.split(extra)]

        return Command(server_id, kind, argv)

    size = ["--expert-servers", str(config.expert_servers), "--replication", str(config.replication)]
    size += ["--rejoin-grace-s", str(config.rejoin_grace_s)]
    coordinator = [*command_line("coordinator"), "--bind", join, *size, *shlex.split(config.coordinator_args)]
    name = config.served_model_name or ("default" if config.model == "default" else checkpoint.name)
    http = ["--host", config.host, "--port", str(config.port), "--served-model-name", name]
    return [
        Command("coordinator", "coordinator", lambda _: coordinator),
        *(
            member("expert-server", f"expert-{i}", config.zone_flags(i), config.expert_server_args)
            for i in range(config.expert_servers)
        ),
        *(member("router", f"router-{i}", [], config.router_args) for i in range(config.routers)),
        member("gateway", "gateway-0", http, config.gateway_args),
    ]


def coordinator_address(run_directory: Path) -> str:
    """Where the coordinator is reached, now and after a restart."""
    return f"ipc://{run_directory}/coordinator"


def serve(config: Config, processes: Sequence[Command], coordinator: str) -> int:
    """Run `processes` until SIGTERM or SIGINT; a second one kills them. Returns the exit status; raises `StartFailed`.

    The proven exits go to the coordinator at address `coordinator`.
    """
    return asyncio.run(_serve(config, processes, coordinator))


async def _serve(config: Config, processes: Sequence[Command], coordinator: str) -> int:
    policy = Policy(max_delay_s=config.max_restart_delay_s, stop_s=config.drain_timeout_s)
    with transport.make_socket(zmq.DEALER, reconnect=True) as to_coordinator:
        transport.connect(to_coordinator, coordinator)
        supervisor = Supervisor(processes, STOP_ORDER, _report_to(to_coordinator), policy)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, supervisor.stop)
        announcing = asyncio.create_task(_announce(config, supervisor.mark_ready))
        try:
            await supervisor.run()
        finally:
            announcing.cancel()
    return 1 if supervisor.killed else 0


def _report_to(coordinator: zmq.Socket[bytes]) -> Callable[[Exit], None]:
    def report(exit: Exit) -> None:
        if exit.command.kind != "coordinator":
            proof = protocol.ProvenExit(exit.command.id, exit.pid, exit.code)
            transport.try_send(coordinator, [protocol.encode(proof)])

    return report


async def _announce(config: Config, mark_ready: Callable[[], None]) -> None:
    """Wait until requests are accepted, then print one line that says where and what; until then, what is missing."""
    shown = ""
    while True:
        try:
            await asyncio.to_thread(_check_ready, config.url)
            break
        except HttpError as e:
            if e.status and str(e) != shown:
                shown = str(e)
                logger.info("not ready yet: %s", shown)
        await asyncio.sleep(READY_POLL_S)
    mark_ready()
    print(await asyncio.to_thread(_ready_line, config.url), flush=True)


def _check_ready(url: str) -> None:
    request(f"{url}/ready", timeout_s=2.0).close()


def _ready_line(url: str) -> str:
    try:
        models = ", ".join(str(m["id"]) for m in get_json(f"{url}/v1/models")["data"])
        covered = coverage(fetch(url))
    except (HttpError, KeyError, TypeError) as e:  # for example because /admin needs a key
        return f"Ready: {url}/v1 (no details: {e})"
    return f"Ready: {url}/v1 serves {models}; {covered}"


def _run(config: Config) -> int:
    _check_port_is_free(config)
    os.environ.pop("MOERING_CONFIG", None)  # the keys of that file are the launcher's; its processes would refuse them
    checkpoint = _checkpoint(config.model)
    logger.info("%d expert servers, replication %d", config.expert_servers, config.replication)
    run_directory = _make_run_directory()
    try:
        return serve(config, commands(config, checkpoint, run_directory), coordinator_address(run_directory))
    finally:
        shutil.rmtree(run_directory, ignore_errors=True)


def _checkpoint(model: str) -> Path:
    """The checkpoint's directory, checked here so that a bad one is one error and not one of each process."""
    if model == "default":
        from moering.default_model import default_model_path  # building it needs imports that serving does not

        path = default_model_path()
    else:
        path = Path(model).resolve()
        if not path.is_dir():
            raise ConfigError(f"{model} is neither `default` nor a checkpoint directory")
    with contextlib.closing(Checkpoint(path)) as c:
        logger.info("%s: %d layers of %d experts, top-%d", path, c.num_layers, c.num_experts, c.top_k)
    return path


def _check_port_is_free(config: Config) -> None:
    """Without this, the readiness of another server on the port would be taken for ours."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, number) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as e:
        raise ConfigError(f"cannot listen on {config.host} port {config.port}: {e.strerror}; see --host, --port") from e


def _make_run_directory() -> Path:
    """A new directory that only this user can enter."""
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    if len(base) > MAX_RUN_DIRECTORY_CHARS or not os.access(base, os.W_OK | os.X_OK):
        base = "/tmp"
    return Path(tempfile.mkdtemp(prefix="moering-", dir=base))
