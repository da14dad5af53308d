"""The two scaling endpoints of vLLM and SGLang, over the admin interface's operations."""

from __future__ import annotations

import asyncio

from aiohttp import web

from gateway import fields
from gateway.api.admin import begin, find, new_id
from gateway.api.body import read_json
from gateway.errors import ApiError, bad_request
from gateway.services import SERVICES
from moering.operations.facts import ENDED
from moering.protocol import Operate

LOOK_S = 0.1
DEFAULT_TIMEOUT_S = 120.0


async def scale_elastic_ep(request: web.Request) -> web.Response:
    """Scale expert servers to `new_data_parallel_size`, and answer when it is done. Requests go on meanwhile."""
    services, body = request.app[SERVICES], await read_json(request)
    size = body.get("new_data_parallel_size")
    timeout_s = fields.number(body, "drain_timeout", DEFAULT_TIMEOUT_S, 0.0, above=True)
    if type(size) is not int or size < 1:
        raise bad_request("'new_data_parallel_size' must be a positive integer", "new_data_parallel_size")
    operation = await begin(services, Operate(new_id(), "scale", "expert-server", size, "", timeout_s))
    while operation.phase not in ENDED:
        await asyncio.sleep(LOOK_S)
        operation = find(services, operation.id)
    if operation.phase == "failed":
        raise ApiError(408 if "not finished within" in operation.error else 500, operation.error, code="scaling_failed")
    return web.json_response(
        {"message": f"Scaled to {size} data parallel engines", "moved_bytes": operation.moved_bytes}
    )


async def is_scaling_elastic_ep(request: web.Request) -> web.Response:
    """Whether a scaling is under way."""
    view = request.app[SERVICES].cluster.view
    operations = [] if view is None else view.operations
    return web.json_response({
        "is_scaling_elastic_ep": any(op.action == "scale" and op.phase not in ENDED for op in operations)
    })  # fmt: skip
