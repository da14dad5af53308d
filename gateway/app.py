"""The aiohttp application."""

from __future__ import annotations

from aiohttp import web

from gateway.api import chat, completions, models, operations
from gateway.middleware import add_request_id, envelope
from gateway.services import SERVICES, Services


def make_app(services: Services) -> web.Application:
    """All routes over `services`, whose start and end are the caller's."""
    app = web.Application(middlewares=[envelope], client_max_size=services.config.max_body_bytes)
    app[SERVICES] = services
    app.on_response_prepare.append(add_request_id)
    app.router.add_routes([
        web.post("/v1/chat/completions", chat.chat_completions),
        web.post("/v1/completions", completions.completions),
        web.get("/v1/models", models.list_models),
        web.get("/v1/models/{id:.+}", models.get_model),
        web.get("/health", operations.health),
        web.get("/ready", operations.ready),
        web.get("/metrics", operations.metrics),
        web.get("/version", operations.get_version),
        web.get("/admin/status", operations.status),
    ])  # fmt: skip
    return app
