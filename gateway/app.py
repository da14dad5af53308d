"""The aiohttp application."""

from __future__ import annotations

from aiohttp import web

from gateway.api import admin, chat, completions, elastic, models, operations, tokenize
from gateway.middleware import add_request_id, envelope, expect
from gateway.services import SERVICES, Services


def make_app(services: Services) -> web.Application:
    """All routes over `services`, whose start and end are the caller's."""
    app = web.Application(middlewares=[envelope], client_max_size=services.config.max_body_bytes)
    app[SERVICES] = services
    app.on_response_prepare.append(add_request_id)
    routes = [
        web.post("/v1/chat/completions", chat.chat_completions),
        web.post("/v1/completions", completions.completions),
        web.post("/tokenize", tokenize.tokenize),
        web.post("/detokenize", tokenize.detokenize),
        web.get("/v1/models", models.list_models),
        web.get("/v1/models/{id:.+}", models.get_model),
        web.get("/health", operations.health),
        web.get("/ready", operations.ready),
        web.get("/metrics", operations.metrics),
        web.get("/version", operations.get_version),
        web.get("/admin/status", admin.guarded(admin.status)),
        web.get("/admin/operations", admin.guarded(admin.operations)),
        web.get("/admin/operations/{id}", admin.guarded(admin.operation)),
        web.delete("/admin/operations/{id}", admin.guarded(admin.cancel)),
        web.get("/admin/events", admin.guarded(admin.events)),
        web.post("/admin/scale", admin.guarded(admin.scale)),
        web.post("/admin/drain", admin.guarded(admin.drain)),
        web.post("/admin/restart", admin.guarded(admin.restart)),
        web.post("/scale_elastic_ep", admin.guarded(elastic.scale_elastic_ep)),
        web.route("GET", "/is_scaling_elastic_ep", admin.guarded(elastic.is_scaling_elastic_ep)),
        web.route("POST", "/is_scaling_elastic_ep", admin.guarded(elastic.is_scaling_elastic_ep)),
    ]
    for route in routes:
        route.kwargs["expect_handler"] = expect
    app.router.add_routes(routes)
    return app
