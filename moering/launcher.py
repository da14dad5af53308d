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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moering.checkpoint import Checkpoint
from moering.config import option
from moering.errors import ConfigError
from moering.exit_reports import ExitReports
from moering.http_client import HttpError, get_json, request
from moering.leader import EMBEDDED, MEMBERSHIP_HELP, Finder, etcd_cluster, finder
from moering.process import command_line, run_main
from moering.protocol import ProvenExit
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
    membership: str = option(EMBEDDED, MEMBERSHIP_HELP)
    machine: str = option("", "with etcd: what all ids of this machine begin with (default: its host name)")
    listen: str = option("", "address where the cluster's other machines reach this one (default: Unix sockets only)")
    insecure: bool = option(False, "allow --listen on an address that other machines reach, without encryption")
    host: str = option("127.0.0.1", "address of the HTTP port")
    port: int = option(8000, "HTTP port")
    served_model_name: str = option("", "name in the API; `default` or the directory's name where not given")
    device: str = option("cpu", "where routers and expert servers compute", choices=("cpu", "cuda"))
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
        if not 1 <= self.replication <= self.expert_servers and self.membership == EMBEDDED:
            raise ConfigError(f"replication {self.replication} is not in 1..{self.expert_servers} (--expert-servers)")
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"port {self.port} is not in 1..65535")

    def zone_flags(self, expert_server: int) -> list[str]:
        """Which failure domain an expert server belongs to, counted from 0."""
        return ["--zone", self.zones[expert_server % len(self.zones)]] if self.zones else []

    @property
    def prefix(self) -> str:
        """What the ids of this machine's processes begin with."""
        if self.membership == EMBEDDED:
            return ""
        return f"{self.machine or socket.gethostname()}-"

    @property
    def url(self) -> str:
        """Where this machine reaches the gateway."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``moering serve``."""
    return run_main("serve", Config, _run, argv)


def commands(config: Config, checkpoint: Path, run_directory: Path) -> list[Command]:
    """The processes to run. Each start has a socket of its own, so that no process is taken for the one before it; only
    a single coordinator keeps its address, where its members look for it again."""
    elected = config.membership != EMBEDDED
    join = ["--membership", config.membership] if elected else ["--join", coordinator_address(run_directory)]
    read = ["--checkpoint", str(checkpoint)]
    device = [] if config.device == "cpu" else ["--device", config.device]

    def bind(server_id: str, start: int) -> list[str]:
        if not config.listen:
            return ["--bind", f"ipc://{run_directory}/{server_id}.{start}"]
        return ["--bind", f"tcp://{config.listen}:*", *(["--insecure"] if config.insecure else [])]

    def member(kind: str, name: str, flags: Sequence[str], extra: str) -> Command:
        server_id = config.prefix + name

        def argv(start: int) -> list[str]:
            at = [] if kind == "gateway" else bind(server_id, start)
            return [*command_line(kind), *read, *join, "--id", server_id, *at, *flags, *shlex.split(extra)]

        return Command(server_id, kind, argv)

    def coordinator(start: int) -> list[str]:
        own = [*bind("coordinator", start), *join, "--id", config.prefix + "coordinator"]
        own = own if elected else ["--bind", join[1]]
        size = ["--expert-servers", str(config.expert_servers), "--replication", str(config.replication)]
        size += ["--rejoin-grace-s", str(config.rejoin_grace_s)]
        return [*command_line("coordinator"), *own, *size, *shlex.split(config.coordinator_args)]

    name = config.served_model_name or ("default" if config.model == "default" else checkpoint.name)
    http = ["--host", config.host, "--port", str(config.port), "--served-model-name", name]
    return [
        Command(config.prefix + "coordinator", "coordinator", coordinator),
        *(
            member("expert-server", f"expert-{i}", device + config.zone_flags(i), config.expert_server_args)
            for i in range(config.expert_servers)
        ),
        *(member("router", f"router-{i}", device, config.router_args) for i in range(config.routers)),
        member("gateway", "gateway-0", http, config.gateway_args),
    ]


def coordinator_address(run_directory: Path) -> str:
    """Where a single coordinator is reached, now and after a restart."""
    return f"ipc://{run_directory}/coordinator"


def serve(config: Config, processes: Sequence[Command], coordinator: str) -> int:
    """Run `processes` until SIGTERM or SIGINT; a second one kills them. Returns the exit status; raises `StartFailed`.

    The proven exits go to the elected coordinator, or to the single one at address `coordinator`.
    """
    return asyncio.run(_serve(config, processes, coordinator))


async def _serve(config: Config, processes: Sequence[Command], coordinator: str) -> int:
    policy = Policy(max_delay_s=config.max_restart_delay_s, stop_s=config.drain_timeout_s)
    loop = asyncio.get_running_loop()
    with _reports(finder(coordinator, config.membership), loop) as report:
        supervisor = Supervisor(processes, STOP_ORDER, report, policy)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, supervisor.stop)
        announcing = asyncio.create_task(_announce(config, supervisor.mark_ready))
        try:
            await supervisor.run()
        finally:
            announcing.cancel()
    return 1 if supervisor.killed else 0


@contextlib.contextmanager
def _reports(coordinator: Finder, loop: asyncio.AbstractEventLoop) -> Iterator[Callable[[Exit], None]]:
    """What tells the coordinator of the exits of its members."""
    reports = ExitReports(coordinator)

    def report(exit: Exit) -> None:
        if exit.command.kind != "coordinator":
            reports.send(ProvenExit(exit.command.id, exit.pid, exit.code))

    reports.follow()
    coordinator.start(lambda: loop.call_soon_threadsafe(reports.follow))
    try:
        yield report
    finally:
        coordinator.close()
        reports.close()


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
    etcd_cluster(config.membership)  # a wrong one is one error here and not one of each process
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
