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
from moering.cluster_key import KEY_HELP
from moering.commands import Commands, coordinator_address
from moering.config import check_numbers, option
from moering.errors import ConfigError
from moering.exit_reports import ExitReports
from moering.http_client import HttpError, get_json, request
from moering.launcher_member import LauncherMember, Make
from moering.leader import EMBEDDED, MEMBERSHIP_HELP, Finder, etcd_cluster, finder
from moering.process import run_main
from moering.protocol import ProvenExit
from moering.status import coverage, fetch
from moering.supervisor import Command, Exit, Policy, Supervisor

logger = logging.getLogger(__name__)

STOP_ORDER = ("gateway", "router", "expert-server", "coordinator")  # nobody loses a peer that it still needs
READY_POLL_S = 0.2
BACKLOG = 1024  # connections that wait for a gateway to take them
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
    key: str = option("", KEY_HELP)
    insecure: bool = option(False, "allow --listen on an address that other machines reach without a key")
    host: str = option("127.0.0.1", "address of the HTTP port")
    port: int = option(8000, "HTTP port")
    served_model_name: str = option("", "name in the API; `default` or the directory's name where not given")
    device: str = option("cpu", "where routers and expert servers compute", choices=("cpu", "cuda"))
    gpus: tuple[str, ...] = option(
        (), "with --device cuda: GPUs, as 0,1,2: routers get the first, expert servers the rest"
    )
    preload: bool = option(True, "fork routers and expert servers from a process that has imported PyTorch (Linux)")
    coordinator_args: str = option("", "further flags of the coordinator, in one string")
    expert_server_args: str = option("", "further flags of each expert server")
    router_args: str = option("", "further flags of each router")
    gateway_args: str = option("", "further flags of the gateway")
    rejoin_grace_s: float = option(5.0, "seconds that a dead server's experts wait for it before others load them")
    max_restart_delay_s: float = option(10.0, "longest delay before a process that keeps dying is started again")
    drain_timeout_s: float = option(30.0, "at a stop, how long each kind of process may take before it is killed")

    def __post_init__(self) -> None:
        """Raises `ConfigError` for what cannot be served."""
        check_numbers(
            self,
            positive=("expert_servers", "routers", "replication"),
            not_negative=("rejoin_grace_s", "max_restart_delay_s", "drain_timeout_s"),
        )
        if self.replication > self.expert_servers and self.membership == EMBEDDED:
            raise ConfigError(f"replication {self.replication} is not in 1..{self.expert_servers} (--expert-servers)")
        if self.gpus and self.device == "cpu":
            raise ConfigError("--gpus needs --device cuda")
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"port {self.port} is not in 1..65535")
        for name in ("coordinator_args", "expert_server_args", "router_args", "gateway_args"):
            try:
                shlex.split(getattr(self, name))
            except ValueError as e:
                raise ConfigError(f"{name}: {e}") from e

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


def serve(
    config: Config, processes: Sequence[Command], coordinator: str, make: Make, http: socket.socket | None = None
) -> int:
    """Run `processes` until SIGTERM, SIGINT or SIGHUP; a second one kills them. Returns the exit status; raises
    `StartFailed`.

    The proven exits go to the elected coordinator, or to the single one at address `coordinator`. `make` is for what
    operations add later. The listening socket `http` is closed when the end begins.
    """
    return asyncio.run(_serve(config, processes, coordinator, make, http))


async def _serve(
    config: Config, processes: Sequence[Command], coordinator: str, make: Make, http: socket.socket | None
) -> int:
    policy = Policy(max_delay_s=config.max_restart_delay_s, stop_s=config.drain_timeout_s)
    loop = asyncio.get_running_loop()
    with _reports(finder(coordinator, config.membership), loop) as report:
        supervisor = Supervisor(processes, STOP_ORDER, report, policy)

        def stop() -> None:
            supervisor.stop()
            if http is not None:
                http.close()

        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as some parents leave it, it hides how children end
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # `nohup` ignores it
                loop.add_signal_handler(number, stop)
        member = LauncherMember(config.prefix + "launcher", finder(coordinator, config.membership), supervisor, make)
        announcing = asyncio.create_task(_announce(config, supervisor.mark_ready))
        try:
            await supervisor.run()
        finally:
            announcing.cancel()
            member.close()
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
        status = fetch(url, key=os.environ.get("MOERING_ADMIN_KEY"))
        covered, under = coverage(status), status.get("under_target", 0)
    except (HttpError, KeyError, TypeError) as e:  # for example because /admin needs a key
        return f"Ready: {url}/v1 (no details: {e})"
    loading = f"; further replicas of {under} experts are being loaded" if under else ""
    return f"Ready: {url}/v1 serves {models}; {covered}{loading}"


def _run(config: Config) -> int:
    etcd_cluster(config.membership)  # a wrong one is one error here and not one of each process
    os.environ.pop("MOERING_CONFIG", None)  # the keys of that file are the launcher's; its processes would refuse them
    http = _listen(config)
    checkpoint = _checkpoint(config.model)
    run_directory = _make_run_directory()
    commands = Commands(config, checkpoint, run_directory, http.fileno())
    try:
        return serve(config, commands.initial(), coordinator_address(run_directory), commands.make, http)
    finally:
        http.close()
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


def _listen(config: Config) -> socket.socket:
    """The HTTP port. It is the launcher's, so that no connection is refused while one gateway follows another."""
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((config.host, config.port), family=family, backlog=BACKLOG)
    except OSError as e:
        raise ConfigError(f"cannot listen on {config.host} port {config.port}: {e.strerror}; see --host, --port") from e


def _make_run_directory() -> Path:
    """A new directory that only this user can enter."""
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    if len(base) > MAX_RUN_DIRECTORY_CHARS or not os.access(base, os.W_OK | os.X_OK):
        base = "/tmp"
    return Path(tempfile.mkdtemp(prefix="moering-", dir=base))
