"""Around every handler: request ids, errors as OpenAI bodies, counting."""

from __future__ import annotations

import logging
import re
import secrets
from contextvars import ContextVar

from aiohttp import HttpVersion11, web
from aiohttp.typedefs import Handler

from gateway.errors import ApiError
from gateway.services import SERVICES
from gateway.sse import dumps

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Of the request that the current task handles."""


@web.middleware
async def envelope(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every error into JSON without paths or tracebacks; log what is a bug."""
    given = request.headers.get("X-Request-Id", "")
    request_id.set(given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}")
    try:
        response = await handler(request)
    except ApiError as e:
        response = error_response(e)
    except web.HTTPException as e:
        response = error_response(ApiError(e.status, _text(e)))
        for name in set(e.headers) & {"Allow"}:
            response.headers[name] = e.headers[name]
    except ConnectionError:
        raise  # the client is gone: aiohttp knows
    except Exception:
        logger.exception("request %s failed", request_id.get())
        response = error_response(ApiError(500, "internal error", code="internal"))
    request.app[SERVICES].metrics.http_responses.labels(status=str(response.status)).inc()
    return response


async def expect(request: web.Request) -> web.StreamResponse | None:
    """The answer to a client that asks, with `Expect: 100-continue`, before it sends its body; None: to go on."""
    if request.version < HttpVersion11:  # it cannot be meant
        return None
    if request.headers["Expect"].lower() != "100-continue":
        return await _refuse(request, _unknown_expectation)
    if (request.content_length or 0) > request.client_max_size:
        return await _refuse(request, _too_large)
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # aiohttp takes what was written for the begun answer
    return None


async def _refuse(request: web.Request, why: Handler) -> web.StreamResponse:
    response = await envelope(request, why)
    response.force_close()  # the body may come or not: nothing else can follow on this connection
    return response


async def _unknown_expectation(request: web.Request) -> web.StreamResponse:
    raise ApiError(417, "this server knows no expectation but 100-continue")


async def _too_large(request: web.Request) -> web.StreamResponse:
    raise web.HTTPRequestEntityTooLarge(request.client_max_size, request.content_length or 0)


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """`on_response_prepare`: also streams carry the id. A gateway that leaves sends its clients to the next one."""
    if request.app[SERVICES].cluster.leaving:
        response.force_close()
        response.headers["Connection"] = "close"
    response.headers["X-Request-Id"] = request_id.get()


def error_response(error: ApiError) -> web.Response:
    """The JSON response for an error."""
    return web.Response(
        body=dumps(error.body()), status=error.status, headers=error.headers(), content_type="application/json"
    )


def _text(e: web.HTTPException) -> str:
    if e.status == 413:
        return "the request body is larger than this server accepts"
    if e.status == 404:
        return "there is no such endpoint"
    return str(e.reason).lower()
