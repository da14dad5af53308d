"""What this gateway asks of the coordinator for its operators, and who may ask."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from aiohttp import web

from gateway.config import Config
from gateway.errors import ApiError, bad_request
from gateway.event_log import EventLog
from moering.errors import ConfigError, ProtocolError
from moering.protocol import Events, Operate, OperateAnswer, decode, encode

ASK_AGAIN_S = 1.0
GIVE_UP_S = 10.0
_STATUS = {"bad_request": 400, "not_found": 404, "busy": 409, "refused": 409}
_FORWARDED = ("Forwarded", "X-Forwarded-For", "X-Real-IP")


class Admin:
    """The way to the coordinator and back. `send` is set once this process is a member."""

    def __init__(self, keys: list[str]) -> None:
        self.events = EventLog()
        self.send: Callable[[Any], None] = lambda message: None
        self._keys = [key.encode() for key in keys]
        self._waiting: dict[asyncio.Future[OperateAnswer], str] = {}  # for the answer to the ask of this id

    def check(self, request: web.Request) -> None:
        """Raise 401 or 403 for who may not use the admin interface.

        With keys, everybody needs one. Without, only this machine may, and not through a proxy that stands on it.
        """
        if self._keys:
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            # All of them, so that the time tells nothing.
            known = [hmac.compare_digest(given.strip().encode(errors="surrogateescape"), key) for key in self._keys]
            if scheme.lower() != "bearer" or not any(known):
                raise ApiError(401, "the admin interface needs its key, as a bearer token", code="invalid_api_key")
        elif not _is_loopback(request.remote) or any(name in request.headers for name in _FORWARDED):
            text = "without a key (--admin-key-file) the admin interface answers only requests from its own machine"
            raise ApiError(403, text, code="forbidden")

    async def ask(self, ask: Operate) -> None:
        """Have the coordinator begin `ask`. Raises `ApiError` where it cannot read that, refuses, or is silent."""
        _check_readable(ask)
        answer: asyncio.Future[OperateAnswer] = asyncio.get_running_loop().create_future()
        self._waiting[answer] = ask.id  # others may ask the same: two who cancel one operation
        try:
            async with asyncio.timeout(GIVE_UP_S):
                while not answer.done():
                    self.send(ask)  # again: asking twice begins one operation
                    await asyncio.wait([answer], timeout=ASK_AGAIN_S)
        except TimeoutError:
            raise ApiError(
                503, "the coordinator does not answer; try again", code="no_coordinator", retry_after_s=5
            ) from None
        finally:
            del self._waiting[answer]
        result = answer.result()
        if result.code != "accepted":
            raise ApiError(_STATUS.get(result.code, 500), result.reason, code=result.code)

    def take(self, message: Any) -> None:
        """A message of the coordinator."""
        if isinstance(message, Events):
            self.events.add(message.events)
        elif isinstance(message, OperateAnswer):
            for answer, asked in self._waiting.items():
                if asked == message.id and not answer.done():
                    answer.set_result(message)


def _check_readable(ask: Operate) -> None:
    """400 for what no message can carry. The thread that sends it would end with this process."""
    try:
        decode([encode(ask)])
    except (ProtocolError, OverflowError, UnicodeEncodeError) as e:
        raise bad_request("a number is too large, or a text is not valid Unicode") from e


def admin_keys(config: Config) -> list[str]:
    """The keys that `config` names. Raises `ConfigError`."""
    keys = [config.admin_key] if config.admin_key else []
    if config.admin_key_file:
        try:
            lines = Path(config.admin_key_file).read_text().split()
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"--admin-key-file {config.admin_key_file}: {e}") from e
        if not lines:
            raise ConfigError(f"--admin-key-file {config.admin_key_file} holds no key")
        keys += lines
    return keys


def _is_loopback(remote: str | None) -> bool:
    try:
        return ip_address(remote or "").is_loopback
    except ValueError:
        return False
