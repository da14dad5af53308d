"""Health, readiness, metrics and version."""

from __future__ import annotations

from aiohttp import web

from gateway.errors import ApiError
from gateway.services import SERVICES
from moering import __version__


async def health(request: web.Request) -> web.Response:
    """This process lives."""
    return web.json_response({"status": "ok"})


async def ready(request: web.Request) -> web.Response:
    """200 when requests are accepted; 503 with the reason while loading or draining."""
    reason = request.app[SERVICES].not_ready()
    if reason is not None:
        raise ApiError(503, reason, code="not_ready", retry_after_s=1)
    return web.json_response({"status": "ready"})


async def metrics(request: web.Request) -> web.Response:
    """Prometheus text."""
    body = request.app[SERVICES].metrics.render()
    return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


async def get_version(request: web.Request) -> web.Response:
    """The release that is running."""
    return web.json_response({"version": __version__})
