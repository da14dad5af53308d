"""The checkpoint's Jinja chat template, run in a sandbox: it comes from a download and must not be able to do harm."""

from __future__ import annotations

import json
import time
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gateway.errors import bad_request
from moering.errors import CheckpointError


class ChatTemplate:
    """Renders messages to the prompt's text."""

    def __init__(self, source: str, tokens: dict[str, str]) -> None:
        """`tokens` are the special tokens that templates name (`bos_token`, …). Raises `CheckpointError`."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = time.strftime
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as e:
            raise CheckpointError(f"the chat template does not parse: {' '.join(str(e).split())}") from e
        self._tokens = tokens

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool, extra: dict[str, Any]) -> str:
        """The prompt. A template that refuses the messages, or fails on them, is a 400."""
        names = {**extra, **self._tokens, "messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(names)
        except jinja2.TemplateError as e:
            raise bad_request(f"the model's chat template refuses the messages: {e}", "messages") from e
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as e:
            raise bad_request("the model's chat template cannot render these messages", "messages") from e


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
