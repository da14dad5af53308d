"""``moering scale | drain | restart``: begin an operation on a cluster, and say how it goes until it has ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moering.config import option
from moering.errors import ConfigError, MoeringError
from moering.http_client import HttpError, base, get_json, read_json, request
from moering.process import run_main

LOOK_S = 0.3
PATIENCE_S = 60.0
"""A gateway may restart meanwhile; that none answers for so long is another matter."""

_URL = "address of a gateway"
_KEY = "key of the gateway's admin interface, where it has one"
_DEADLINE = "roll back what is not finished by then (default: 300 s, for a restart that for each process)"
_WAIT = "wait until it has ended; the exit status says whether it was done"


@dataclass(frozen=True)
class Scale:
    """Change the number of expert servers or routers while requests are served."""

    count: int = option(0, "how many there should be", positional=True)
    kind: str = option("expert-server", "of which kind", choices=("expert-server", "router"))
    url: str = option("http://127.0.0.1:8000", _URL)
    admin_key: str = option("", _KEY)
    deadline_s: float = option(0.0, _DEADLINE)
    wait: bool = option(True, _WAIT)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError("the number of processes is needed: moering scale [flags] N, N at least 1")


@dataclass(frozen=True)
class Drain:
    """Empty a process while requests are served; then it exits, and is not started again."""

    id: str = option("", "id of the process, as `moering status` shows it", positional=True)
    url: str = option("http://127.0.0.1:8000", _URL)
    admin_key: str = option("", _KEY)
    deadline_s: float = option(0.0, _DEADLINE)
    wait: bool = option(True, _WAIT)

    def __post_init__(self) -> None:
        if not self.id:
            raise ConfigError("the id of a process is needed: moering drain [flags] ID")


@dataclass(frozen=True)
class Restart:
    """Restart processes one after the other, each drained before, while requests are served."""

    id: str = option("", "only this one", positional=True)
    kind: str = option("", "only this kind: expert-server, router, gateway or coordinator")
    url: str = option("http://127.0.0.1:8000", _URL)
    admin_key: str = option("", _KEY)
    deadline_s: float = option(0.0, _DEADLINE)
    wait: bool = option(True, _WAIT)


def scale(argv: Sequence[str] | None = None) -> int:
    """The command ``moering scale``."""
    return run_main("scale", Scale, lambda c: _operate("scale", c, {"kind": c.kind, "count": c.count}), argv)


def drain(argv: Sequence[str] | None = None) -> int:
    """The command ``moering drain``."""
    return run_main("drain", Drain, lambda c: _operate("drain", c, {"id": c.id}), argv)


def restart(argv: Sequence[str] | None = None) -> int:
    """The command ``moering restart``."""
    return run_main("restart", Restart, lambda c: _operate("restart", c, {"kind": c.kind, "id": c.id}), argv)


def _operate(action: str, config: Scale | Drain | Restart, body: dict[str, Any]) -> int:
    gateway, key = base(config.url), config.admin_key or None
    url = f"{gateway}/admin/{action}"
    operation = read_json(request(url, {**body, "deadline_s": config.deadline_s}, 30.0, key), url)
    if config.wait:
        operation = follow(gateway, operation, key, lambda text: print(text, file=sys.stderr, flush=True))
    try:
        print(line(operation))
        return 1 if operation["phase"] == "failed" else 0
    except (KeyError, TypeError) as e:
        raise MoeringError(f"{url} does not answer as expected: {e!r}") from e


def follow(gateway: str, operation: Any, key: str | None, show: Callable[[str], None]) -> Any:
    """Wait for the end of an operation and return it; each change is shown. Raises `HttpError`."""
    shown, answered_s = "", time.monotonic()
    while operation["phase"] not in ("done", "failed"):
        if line(operation) != shown:
            shown = line(operation)
            show(shown)
        time.sleep(LOOK_S)
        try:
            operation = get_json(f"{gateway}/admin/operations/{operation['id']}", key=key)
            answered_s = time.monotonic()
        except HttpError:
            if time.monotonic() - answered_s > PATIENCE_S:
                raise
    return operation


def line(operation: Any) -> str:
    """An operation in one line."""
    parts = [f"{operation['id']}: {operation['phase']}"]
    for name, text in (("start", "starting"), ("drain", "draining"), ("pending", "still to restart:")):
        if operation[name]:
            parts.append(f"{text} {', '.join(operation[name])}")
    if operation["ended_at"]:
        took_s = operation["ended_at"] - operation["started_at"]
        parts.append(f"{took_s:.1f} s, {operation['moved_bytes'] / 1e6:.1f} MB of experts loaded")
    return "; ".join([*parts, *filter(None, [operation["error"]])])
