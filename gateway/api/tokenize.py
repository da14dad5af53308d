"""POST /tokenize and /detokenize, as vLLM has them: what a prompt is in tokens, and what tokens are in text."""

from __future__ import annotations

from aiohttp import web

from gateway import fields
from gateway.api.body import check_model, decode, encode, read_json
from gateway.api.chat import render
from gateway.errors import bad_request
from gateway.model import Model
from gateway.offload import offload
from gateway.request import refuse_unimplemented
from gateway.services import SERVICES
from gateway.sse import send_json


async def tokenize(request: web.Request) -> web.StreamResponse:
    """The tokens of a text, or of messages through the chat template. There may be more than fit the context."""
    services = request.app[SERVICES]
    model = services.model
    body = await read_json(request)
    check_model(body, model)
    refuse_unimplemented(body)
    chat = body.get("messages") is not None
    text, param = (render(model, body), "messages") if chat else (body.get("prompt"), "prompt")
    if not isinstance(text, str):
        raise bad_request("'prompt' must be a string", "prompt")
    # A chat template writes the special tokens itself.
    tokens = await encode(model, text, param, fields.boolean(body, "add_special_tokens", not chat))
    with_strings = fields.boolean(body, "return_token_strs", False)
    strings = await offload(len(tokens), _strings, model, tokens) if with_strings else None
    answer = {
        "count": len(tokens), "max_model_len": model.context_tokens, "tokens": tokens, "token_strs": strings,
    }  # fmt: skip
    return await send_json(request, services.guard, answer, len(tokens))


def _strings(model: Model, tokens: list[int]) -> list[str | None]:
    return [model.tokenizer.id_to_token(t) for t in tokens]


async def detokenize(request: web.Request) -> web.StreamResponse:
    """The text of tokens."""
    services = request.app[SERVICES]
    model = services.model
    body = await read_json(request)
    check_model(body, model)
    tokens = fields.token_ids(body.get("tokens"), "tokens", model.vocab_size)
    return await send_json(request, services.guard, {"prompt": await decode(model, tokens, "tokens")})
