"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from gateway.errors import ApiError
from gateway.model import Model
from gateway.services import SERVICES


async def list_models(request: web.Request) -> web.Response:
    """The one model."""
    return web.json_response({"object": "list", "data": [_card(request.app[SERVICES].model)]})


async def get_model(request: web.Request) -> web.Response:
    """The model of that name, or 404."""
    model, name = request.app[SERVICES].model, request.match_info["id"]
    if name != model.name:
        raise ApiError(404, f"the model {name[:200]!r} does not exist", "model", "model_not_found")
    return web.json_response(_card(model))


def _card(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "moering",
        "max_model_len": model.context_tokens,
    }
