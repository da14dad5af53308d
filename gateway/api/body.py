"""Reading a request's JSON body, and the checks that all endpoints share."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

from gateway.errors import ApiError, bad_request
from gateway.fields import Body
from gateway.model import Model
from gateway.offload import offload


async def read_json(request: web.Request) -> Body:
    """The body as an object. 415, 413 or 400 when it is something else."""
    if request.content_type != "application/json" and not request.content_type.endswith("+json"):
        raise ApiError(415, "the Content-Type must be application/json")
    try:
        data = await request.read()
    except web.RequestPayloadError as e:
        raise bad_request("the request body cannot be decoded as the Content-Encoding says") from e
    try:
        body: Any = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise bad_request("the request body is not valid JSON") from e
    if not isinstance(body, dict):
        raise bad_request("the request body must be a JSON object")
    return body


def check_model(body: Body, model: Model) -> None:
    """404 for a model that is not served here; without the field, the one there is."""
    name = body.get("model")
    if name is None or name == model.name:
        return
    if not isinstance(name, str):
        raise bad_request("'model' must be a string", "model")
    raise ApiError(404, f"the model {name[:200]!r} does not exist", "model", "model_not_found")


async def encode(model: Model, text: str, param: str, add_special_tokens: bool) -> list[int]:
    """Token ids of `text`; a long text is tokenized in a thread, one that cannot fit the context not at all."""
    if len(text) > model.max_prompt_chars:
        raise bad_request(
            f"This model's maximum context length is {model.context_tokens} tokens; {len(text)} characters are more.",
            param,
            "context_length_exceeded",
        )
    return await offload(len(text), model.encode, text, param, add_special_tokens)


async def decode(model: Model, ids: list[int], param: str) -> str:
    """The text of tokens that the model has; many are decoded in a thread, more than fit the context not at all."""
    if len(ids) > model.context_tokens:
        raise bad_request(
            f"This model's maximum context length is {model.context_tokens} tokens; there are {len(ids)}.",
            param,
            "context_length_exceeded",
        )
    return await offload(len(ids), model.decode, ids)
