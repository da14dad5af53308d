"""The admin interface: the cluster's status, operations on it, and its timeline.

``POST /admin/scale {"kind", "count"}``, ``/admin/drain {"id"}`` and ``/admin/restart {"kind", "id"}``, each with
``deadline_s``, answer 202 with the operation; ``GET /admin/status``; ``GET /admin/operations[/ID]``, ``DELETE`` rolls
one back; ``GET /admin/events?since=ID`` as JSON, or as Server-Sent Events for who accepts ``text/event-stream``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from gateway import fields
from gateway.api.body import read_json
from gateway.errors import ApiError, bad_request
from gateway.services import SERVICES, Services
from gateway.sse import dumps
from moering.protocol import Operate, Operation
from moering.timeline import as_json

EVENT_WAIT_S = 1.0
_SHOWN = (
    "id", "action", "kind", "count", "phase", "error", "started_at", "deadline_at", "ended_at", "moved_bytes", "start",
    "drain", "pending",
)  # fmt: skip


def guarded(handler: Handler) -> Handler:
    """`handler` for who may use the admin interface."""

    async def check_first(request: web.Request) -> web.StreamResponse:
        request.app[SERVICES].admin.check(request)
        return await handler(request)

    return check_first


async def status(request: web.Request) -> web.Response:
    """The cluster as this gateway sees it, for `moering status`."""
    services = request.app[SERVICES]
    pool = services.pool
    return web.json_response(services.cluster.status(services.member(), pool.router_counters(), pool.passed_over()))


async def scale(request: web.Request) -> web.Response:
    """Change the number of processes of a kind."""
    body = await _read(request, {"kind": str, "count": int})
    return await _begin(request, "scale", body, body.get("kind", "expert-server"), count=_needed(body, "count"))


async def drain(request: web.Request) -> web.Response:
    """Empty a process, which then exits."""
    body = await _read(request, {"id": str})
    return await _begin(request, "drain", body, target=_needed(body, "id"))


async def restart(request: web.Request) -> web.Response:
    """Restart every process, or those of a kind, or one, one after the other."""
    body = await _read(request, {"kind": str, "id": str})
    return await _begin(request, "restart", body, body.get("kind", ""), target=body.get("id", ""))


async def operations(request: web.Request) -> web.Response:
    """The last operations, the newest at the end."""
    return web.json_response({"operations": [shown(op) for op in _operations(request.app[SERVICES])]})


async def operation(request: web.Request) -> web.Response:
    """One operation."""
    return web.json_response(shown(find(request.app[SERVICES], request.match_info["id"])))


async def cancel(request: web.Request) -> web.Response:
    """Roll back an operation that is under way."""
    services, op_id = request.app[SERVICES], request.match_info["id"]
    await services.admin.ask(Operate(op_id, "cancel"))
    return web.json_response(shown(find(services, op_id)), status=202)


async def events(request: web.Request) -> web.StreamResponse:
    """The timeline from an event on: now, or live."""
    since = request.headers.get("Last-Event-ID") or request.query.get("since") or "0"
    if not since.isdecimal():
        raise bad_request("'since' must be the id of an event", "since")
    services = request.app[SERVICES]
    if "text/event-stream" in request.headers.get("Accept", ""):
        return await _stream_events(request, services, int(since))
    return web.json_response({"events": [as_json(e) for e in services.admin.events.after(int(since))]})


async def begin(services: Services, ask: Operate) -> Operation:
    """Begin an operation and wait until it is in a view. Raises `ApiError`."""
    await services.admin.ask(ask)
    for _ in range(100):
        found = next((op for op in _operations(services) if op.id == ask.id), None)
        if found is not None:
            return found
        await asyncio.sleep(0.05)
    raise ApiError(
        503, f"operation {ask.id} was accepted, but no view shows it yet", code="no_coordinator", retry_after_s=5
    )


def new_id() -> str:
    """An operation's id."""
    return f"op-{secrets.token_hex(6)}"


def shown(operation: Operation) -> dict[str, Any]:
    """The JSON of an operation."""
    fields = dataclasses.asdict(operation)
    return {name: fields[name] for name in _SHOWN} | {"start": list(operation.start), "drain": list(operation.drain)}


def find(services: Services, operation_id: str) -> Operation:
    """The operation with this id, or 404."""
    for op in _operations(services):
        if op.id == operation_id:
            return op
    raise ApiError(404, "there is no such operation", code="not_found")


def _operations(services: Services) -> list[Operation]:
    return [] if services.cluster.view is None else services.cluster.view.operations


async def _begin(
    request: web.Request, action: str, body: dict[str, Any], kind: str = "", count: int = 0, target: str = ""
) -> web.Response:
    ask = Operate(new_id(), action, kind, count, target, fields.number(body, "deadline_s", 0.0, 0.0))
    operation = await begin(request.app[SERVICES], ask)
    return web.json_response(shown(operation), status=202)


async def _read(request: web.Request, fields: dict[str, type]) -> dict[str, Any]:
    """The body, with these fields and a deadline at most."""
    body = dict(await read_json(request))
    known: dict[str, tuple[type, ...]] = {"deadline_s": (int, float)} | {name: (of,) for name, of in fields.items()}
    for name, value in body.items():
        if name not in known:
            raise bad_request(f"there is no field {name[:40]!r}", name[:40])
        if not isinstance(value, known[name]) or isinstance(value, bool):
            raise bad_request(f"{name!r} must be of type {known[name][-1].__name__}", name)
    return body


def _needed(body: dict[str, Any], name: str) -> Any:
    if name not in body:
        raise bad_request(f"{name!r} is needed", name)
    return body[name]


async def _stream_events(request: web.Request, services: Services, since: int) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    while not services.cluster.leaving:
        for event in services.admin.events.after(since):
            since = event.id
            await response.write(b"id: %d\ndata: %s\n\n" % (event.id, dumps(as_json(event))))
        await services.admin.events.wait(EVENT_WAIT_S)
    return response
