"""POST /tokenize and /detokenize, as vLLM has them: what a prompt is in tokens, and what tokens are in text."""

from __future__ import annotations

from aiohttp import web

from gateway import fields
from gateway.api.body import check_model, decode, encode, read_json
from gateway.api.chat import render
from gateway.errors import bad_request
from gateway.request import refuse_unimplemented
from gateway.services import SERVICES


async def tokenize(request: web.Request) -> web.Response:
    """The tokens of a text, or of messages through the chat template."""
    model = request.app[SERVICES].model
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
    return web.json_response({
        "count": len(tokens),
        "max_model_len": model.context_tokens,
        "tokens": tokens,
        "token_strs": [model.tokenizer.id_to_token(t) for t in tokens] if with_strings else None,
    })  # fmt: skip


async def detokenize(request: web.Request) -> web.Response:
    """The text of tokens."""
    model = request.app[SERVICES].model
    body = await read_json(request)
    check_model(body, model)
    tokens = fields.token_ids(body.get("tokens"), "tokens", model.vocab_size)
    return web.json_response({"prompt": await decode(model, tokens, "tokens")})
