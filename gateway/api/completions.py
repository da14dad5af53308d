"""POST /v1/completions."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from gateway import fields
from gateway.api.body import check_model, decode, encode, read_json
from gateway.api.generate import generate
from gateway.errors import bad_request
from gateway.formats import CompletionFormat
from gateway.model import Model
from gateway.request import parse_options
from gateway.services import SERVICES


async def completions(request: web.Request) -> web.StreamResponse:
    """Continue one or several texts."""
    services = request.app[SERVICES]
    model = services.model
    services.admit(1)
    body = await read_json(request)
    check_model(body, model)
    options = parse_options(body, False, model.vocab_size, model.eos_ids, services.config.max_choices)
    prompts = await read_prompts(model, body.get("prompt"), services.config.max_choices)
    echoes = await _texts(model, body.get("prompt"), prompts) if options.echo else ()
    return await generate(request, services, prompts, options, "cmpl-", CompletionFormat, echoes)


async def read_prompts(model: Model, value: Any, max_prompts: int) -> list[list[int]]:
    """Token ids of each prompt: from a string, a list of strings, a list of ids, or a list of lists of ids."""
    if isinstance(value, str):
        value = [value]
    if type(value) is not list or not value:
        raise bad_request("'prompt' must be text or token ids, and not empty", "prompt")
    if type(value[0]) is int:
        value = [value]
    if len(value) > max_prompts:
        raise bad_request(f"'prompt' holds {len(value)} prompts; the limit is {max_prompts}", "prompt")
    return [await _read_prompt(model, prompt) for prompt in value]


async def _texts(model: Model, value: Any, prompts: list[list[int]]) -> list[str]:
    """The text of each prompt: as it was given, or decoded from its ids."""
    given = value if type(value) is list and len(value) == len(prompts) else [value]
    return [t if isinstance(t, str) else await decode(model, p, "prompt") for t, p in zip(given, prompts, strict=True)]


async def _read_prompt(model: Model, prompt: Any) -> list[int]:
    if prompt == "":  # with a tokenizer that adds a first token it would not be empty any more
        raise bad_request("'prompt' is empty", "prompt")
    if isinstance(prompt, str):
        return await encode(model, prompt, "prompt", add_special_tokens=True)
    return fields.token_ids(prompt, "prompt", model.vocab_size)
