"""``moering status``: what the gateway knows of the cluster, as a table or as its JSON.

The JSON of ``GET /admin/status`` is ``{"epoch": int, "failures_survivable": int, "failures_restorable": int, "orphans":
int, "under_target": int, "router_counters": {name: number}, "processes": [{"id", "kind", "pid", "state", "incarnation",
"address", "experts", "zone", "passed_over"}]}``. ``failures_survivable`` is -1 while an expert has no live replica (is
an orphan), ``failures_restorable`` while the servers there are cannot hold all replicas in different failure domains.
``under_target`` counts experts with fewer live replicas than wanted. ``router_counters`` are the sums over all routers.
``passed_over`` of an expert server maps each router that lets others come first to its reason.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moering.config import option
from moering.errors import MoeringError
from moering.http_client import base, get_json
from moering.process import run_main

COLUMNS = ("id", "kind", "state", "pid", "experts", "zone", "incarnation", "address")


@dataclass(frozen=True)
class Config:
    """Show the processes of a cluster, the epoch of its plan and how many failures it survives now."""

    url: str = option("http://127.0.0.1:8000", "address of a gateway")
    json: bool = option(False, "print the gateway's JSON as it is")
    admin_key: str = option("", "key of the gateway's /admin endpoints, where it has one")


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``moering status``."""
    try:
        status = run_main("status", Config, _run, argv)
        sys.stdout.flush()
    except BrokenPipeError:  # `moering status | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter's last flush goes there
        return 1
    return status


def fetch(url: str, timeout_s: float = 10.0, key: str | None = None) -> Any:
    """The status document of the gateway at `url`. Raises `HttpError`."""
    return get_json(base(url) + "/admin/status", timeout_s, key)


def table(status: Mapping[str, Any]) -> str:
    """The status for people: a line for the cluster, then one per process."""
    processes = status["processes"]
    columns = [c for c in COLUMNS if c != "zone" or any(p.get(c) for p in processes)]
    rows = [columns, *([str(p.get(c, "")) for c in columns] for p in processes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"epoch {status['epoch']}; {coverage(status)}", *shortage(status), "", *lines])


def coverage(status: Mapping[str, Any]) -> str:
    """One sentence on where the experts are and what may fail now."""
    servers = [p for p in status["processes"] if p["kind"] == "expert-server" and p["state"] == "ONLINE"]
    replicas, survivable = sum(p["experts"] for p in servers), status["failures_survivable"]
    failures = {
        -1: "some experts have NO live replica",
        0: "NO failure of an expert server is survived now",
        1: "1 failure of an expert server is survived",
    }.get(survivable, f"{survivable} failures of expert servers are survived")
    return f"{replicas} expert replicas on {len(servers)} expert servers; {failures}"


def shortage(status: Mapping[str, Any]) -> list[str]:
    """Lines on what is missing now, on how far memory reaches, and on servers that are late or slow."""
    orphans, under = status.get("orphans", 0), status.get("under_target", 0)
    lines = [f"{orphans} experts have no replica, {under} fewer than wanted"] if under else []
    restorable = status.get("failures_restorable")
    if restorable is not None:
        memory = f"further failures after which full redundancy can be restored: {restorable}"
        lines.append(memory if restorable >= 0 else "these servers do NOT suffice for full redundancy")
    for p in status["processes"]:
        lines += [f"{router} passes over {p['id']}: {why}" for router, why in (p.get("passed_over") or {}).items()]
    return lines


def _run(config: Config) -> int:
    status = fetch(config.url, key=config.admin_key or None)
    if config.json:
        print(json.dumps(status))
        return 0
    try:
        print(table(status))
    except (KeyError, TypeError, AttributeError) as e:
        raise MoeringError(f"the status of {config.url} is not as expected: {e!r}") from e
    return 0
