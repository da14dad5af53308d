"""The command lines of the processes that a launcher runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moering.forking import can_fork
from moering.leader import EMBEDDED
from moering.process import command_line
from moering.supervisor import Command

if TYPE_CHECKING:
    from moering.launcher import Config

VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
"""A process that sees one GPU alone calls it `cuda`, whichever it is."""


def coordinator_address(run_directory: Path) -> str:
    """Where a single coordinator is reached, now and after a restart."""
    return f"ipc://{run_directory}/coordinator"


class Commands:
    """Each start has a socket of its own, so that no process is taken for the one before it; only a single coordinator
    keeps its address, where its members look for it again."""

    def __init__(self, config: Config, checkpoint: Path, run_directory: Path, http_fd: int | None = None) -> None:
        """`http_fd`: the listening socket that all gateways share."""
        self._config, self._checkpoint, self._run_directory, self._http_fd = config, checkpoint, run_directory, http_fd
        self._device = [] if config.device == "cpu" else ["--device", config.device]
        self._preload = config.preload and can_fork()
        self._elected = config.membership != EMBEDDED
        gpus, routers = config.gpus, config.routers
        # with GPUs for all, routers and expert servers have none in common
        apart = len(gpus) > routers
        self._gpus = {
            "router": gpus[:routers] if apart else gpus,
            "expert-server": gpus[routers:] if apart else gpus,
        }
        address = coordinator_address(run_directory)
        self._join = ["--membership", config.membership] if self._elected else ["--join", address]
        self._key = ["--key", config.key] if config.key else []

    def initial(self) -> list[Command]:
        """What runs from the start, in this order."""
        config = self._config
        return [
            Command(config.prefix + "coordinator", "coordinator", self._coordinator),
            *(self._expert_server(i) for i in range(config.expert_servers)),
            *(self._router(i) for i in range(config.routers)),
            self._gateway(0),
        ]

    def make(self, server_id: str, kind: str) -> Command | None:
        """For one more process; None where the id is not one of this machine's."""
        match = re.fullmatch(re.escape(self._config.prefix) + r"(?:expert|router|gateway)-(\d{1,9})", server_id)
        makers = {"expert-server": self._expert_server, "router": self._router, "gateway": self._gateway}
        return None if match is None or kind not in makers else makers[kind](int(match[1]))

    def _expert_server(self, number: int) -> Command:
        config = self._config
        flags = [*self._device, *config.zone_flags(number)]
        return self._member("expert-server", f"expert-{number}", flags, config.expert_server_args, number)

    def _router(self, number: int) -> Command:
        # The successor of a dead router must not take the cores from those that go on with its streams.
        beside = ["--nice", "--catch-up-lock", f"{self._run_directory}/catch-up"] if self._config.routers > 1 else []
        return self._member("router", f"router-{number}", [*self._device, *beside], self._config.router_args, number)

    def _gateway(self, number: int) -> Command:
        config = self._config
        name = "default" if config.model == "default" else self._checkpoint.name
        http = ["--host", config.host, "--port", str(config.port)]
        http += ["--served-model-name", config.served_model_name or name]
        http += [] if self._http_fd is None else ["--listen-fd", str(self._http_fd)]
        return self._member("gateway", f"gateway-{number}", http, config.gateway_args)

    def _member(self, kind: str, name: str, flags: Sequence[str], extra: str, number: int = 0) -> Command:
        server_id, read = self._config.prefix + name, ["--checkpoint", str(self._checkpoint)]

        def argv(start: int) -> list[str]:
            at = [] if kind == "gateway" else self._bind(server_id, start)
            own = [*self._join, *self._key, "--id", server_id]
            return [*command_line(kind), *read, *own, *at, *flags, *shlex.split(extra)]

        inherits = kind == "gateway" and self._http_fd is not None
        fds = (self._http_fd,) if inherits and self._http_fd is not None else ()
        gpus = self._gpus.get(kind, ())
        env = {VISIBLE_GPUS: gpus[number % len(gpus)]} if gpus else {}
        return Command(server_id, kind, argv, fds, env, self._preload and kind in ("router", "expert-server"))

    def _coordinator(self, start: int) -> list[str]:
        config = self._config
        own = [*self._bind("coordinator", start), *self._join, "--id", config.prefix + "coordinator"]
        own = own if self._elected else ["--bind", self._join[1]]
        size = ["--expert-servers", str(config.expert_servers), "--replication", str(config.replication)]
        size += ["--rejoin-grace-s", str(config.rejoin_grace_s)]
        return [*command_line("coordinator"), *own, *self._key, *size, *shlex.split(config.coordinator_args)]

    def _bind(self, server_id: str, start: int) -> list[str]:
        config = self._config
        if not config.listen:
            return ["--bind", f"ipc://{self._run_directory}/{server_id}.{start}"]
        return ["--bind", f"tcp://{config.listen}:*", *(["--insecure"] if config.insecure else [])]
