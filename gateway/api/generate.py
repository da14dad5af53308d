"""From checked prompts and options to the answer, the same for chat and completions."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

from aiohttp import web

from gateway.api.respond import respond
from gateway.errors import bad_request
from gateway.formats import Format
from gateway.generation import Generation
from gateway.model import Model
from gateway.request import Options
from gateway.services import Services


async def generate(
    request: web.Request,
    services: Services,
    prompts: list[list[int]],
    options: Options,
    id_prefix: str,
    make_format: Callable[[str, Model, Options], Format],
    echoes: Sequence[str] = (),
) -> web.StreamResponse:
    """Check the sizes, then generate. The response's id is drawn here, so a client cannot make two equal.

    `echoes`: what the answers to each prompt begin with, if anything.
    """
    config, model = services.config, services.model
    if not all(prompts):
        raise bad_request("the prompt is empty", "prompt")
    if len(prompts) * options.n > config.max_choices:
        raise bad_request(f"prompts times 'n' must not be more than {config.max_choices}", "n")
    response_id = id_prefix + secrets.token_hex(12)
    generation = Generation(
        *(response_id, prompts, options, model, services.pool, services.metrics), config.request_timeout_s, echoes
    )
    return await respond(request, services, generation, make_format(response_id, model, options))
