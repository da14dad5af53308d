"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from gateway import fields
from gateway.api.body import check_model, encode, read_json
from gateway.api.generate import generate
from gateway.errors import bad_request
from gateway.fields import Body
from gateway.formats import ChatFormat
from gateway.model import Model
from gateway.request import parse_options
from gateway.services import SERVICES

_ROLES = {"system", "user", "assistant", "developer"}


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Continue a conversation."""
    services = request.app[SERVICES]
    model = services.model
    services.admit(1)
    body = await read_json(request)
    check_model(body, model)
    options = parse_options(body, True, model.vocab_size, model.eos_ids, services.config.max_choices)
    text = render(model, body)
    prompt = await encode(model, text, "messages", add_special_tokens=False)
    return await generate(request, services, [prompt], options, "chatcmpl-", ChatFormat)


def render(model: Model, body: Body) -> str:
    """The prompt's text: the messages through the model's chat template."""
    if model.template is None:
        raise bad_request("this model has no chat template; use /v1/completions")
    messages = parse_messages(body.get("messages"))
    extra = fields.mapping(body, "chat_template_kwargs")
    return model.template.render(messages, fields.boolean(body, "add_generation_prompt", True), extra)


def parse_messages(value: Any) -> list[dict[str, Any]]:
    """Messages as templates want them: `role`, and `content` as one string."""
    if type(value) is not list or not value:
        raise bad_request("'messages' must be a list with at least one message", "messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def _message(value: Any, where: str) -> dict[str, Any]:
    if type(value) is not dict:
        raise bad_request(f"'{where}' must be an object", where)
    role = value.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise bad_request(f"'{where}.role' must be one of {', '.join(sorted(_ROLES))}", f"{where}.role")
    if value.get("tool_calls"):
        raise bad_request(f"'{where}.tool_calls' is not implemented by this server", f"{where}.tool_calls")
    # Templates know no developer: OpenAI's newer name for the system's role.
    return {"role": "system" if role == "developer" else role, "content": _content(value.get("content"), where)}


def _content(value: Any, where: str) -> str:
    """A string, or the joined text parts of a list."""
    where = f"{where}.content"
    if isinstance(value, str):
        return value
    if type(value) is not list:
        raise bad_request(f"'{where}' must be a string or a list of text parts", where)
    for part in value:
        if type(part) is not dict or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise bad_request(f"'{where}' may hold only parts like {{'type': 'text', 'text': '…'}}", where)
    return "\n".join(part["text"] for part in value)
